"""The demo under one and fifty visitors, who ask for pictures as fast as they get them: pictures a second, pictures other than
those that the same request got alone, refusals, and the memory that the program has resident."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mm.bench import Row, Settings
from mm.bench.serve import MIB, growth, load

PROMPTS = ("red apple, noto", "handwritten digit seven", "grinning face, noto", "soccer ball, twemoji")
SEEDS = 4
VISITORS = (1, 50)
SAMPLING = (1.3, 0.7, 0.9, 0)
"""Guidance, temperature, top-p, steps."""


def rows(settings: Settings) -> Iterator[Row]:
    wanted = [(prompt, seed) for seed in range(SEEDS) for prompt in PROMPTS]
    with showing() as (address, process):
        alone = Visitor(address, process)
        known = {request: alone.ask(*request)[0] for request in wanted}  # which also warms the program up
        one = 0.0
        for visitors in VISITORS:
            found = load(lambda: Visitor(address, process), wanted, visitors, 2.0 * settings.rounds, known)
            rate = (found.answers - found.refused) / found.seconds
            one = one or rate
            name = f"{visitors} visitor{'s' if visitors > 1 else ''}"
            yield Row(f"pictures, {name}", rate, "pictures/s", one, rate / one, "1 visitor")
            yield Row(f"pictures other than alone, {name} (of {found.answers})", found.wrong, "pictures")
            yield Row(f"refusals, {name} (of {found.answers})", found.refused, "answers")
            if found.memory:
                yield Row(f"memory, {name}, at the end", found.memory[-1] / MIB, "MiB")
                yield Row(f"memory, {name}, end / first quarter", growth(found.memory), "times")


@contextmanager
def showing() -> Iterator[tuple[str, int]]:
    """The address of `mm app` in a process of its own, and that process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mm.cli", "app", "--model", "mm-tiny", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        try:
            line = next((line for line in program.stderr if "http://" in line), "")
            if not line:
                raise ValueError("the demo didn't start; run mm app to see why")
            yield "http://" + line.split("http://")[1].split("/")[0], program.pid
        finally:
            program.terminate()


class Visitor:
    """One who presses the button again as soon as there is a picture."""

    def __init__(self, address: str, process: int) -> None:
        self.place, self.process = urlsplit(address).netloc, process

    def ask(self, prompt: str, seed: int) -> tuple[str, int]:
        """A digest of the picture, and 1; or "" and 0, if it was refused."""
        event = json.loads(
            self._send("POST", "/gradio_api/call/draw", json.dumps({"data": [prompt, 1, str(seed), *SAMPLING]}))
        )
        if "event_id" not in event:
            return "", 0
        told = self._send("GET", f"/gradio_api/call/draw/{event['event_id']}").decode()
        kind, _, data = told[told.rfind("event: ") + 7 :].partition("\ndata: ")
        if kind != "complete":
            return "", 0
        picture = json.loads(data)[0][0]["image"]
        return hashlib.sha256(self._send("GET", urlsplit(picture["url"]).path)).hexdigest(), 1

    def memory(self) -> float | None:
        """Bytes that the program has resident, where the system says so."""
        status = Path(f"/proc/{self.process}/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        return next((1024.0 * float(line.split()[1]) for line in lines if line.startswith("VmRSS:")), None)

    def _send(self, method: str, path: str, body: str | None = None) -> bytes:
        # one connection each: the program ends the one that it streams over
        connection = http.client.HTTPConnection(self.place, timeout=300)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            return connection.getresponse().read()
        finally:
            connection.close()
