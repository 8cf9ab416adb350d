"""The HTTP server under one, eight and fifty clients, which ask for texts as fast as they get them: tokens a second, answers that
aren't what the same request got alone, refusals, and the memory that the server has resident."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from mm.bench import Row, Settings

PROMPTS = ("red ", "handwritten ", "a", "green", "smiling ", "cat", "flag of ", "woman ")
SEEDS = 8
CLIENTS = (1, 8, 50)
MIB = float(1 << 20)


@dataclass
class Load:
    """What came of a number of clients."""

    tokens: int = 0
    answers: int = 0
    refused: int = 0
    wrong: int = 0
    seconds: float = 0.0
    memory: list[float] = field(default_factory=list)
    """Bytes resident, about once a second."""


def rows(settings: Settings) -> Iterator[Row]:
    with serving("mm-tiny") as address:
        known: dict[tuple[str, int], str] = {}
        one = 0.0
        for clients in CLIENTS:
            if clients == 1:  # what each request gets alone, which also warms the server up
                client = Client(address, settings.tokens)
                for request in requests():
                    known[request], _ = client.ask(*request)
            found = load(
                lambda: Client(address, settings.tokens), list(requests()), clients, 2.0 * settings.rounds, known
            )
            rate = found.tokens / found.seconds
            one = one or rate
            name = f"{clients} client{'s' if clients > 1 else ''}"
            yield Row(f"text, {name}", rate, "tokens/s", one, rate / one, "1 client")
            yield Row(
                f"answers other than alone and refusals, {name} (of {found.answers})",
                found.wrong + found.refused,
                "answers",
            )
            if found.memory:
                yield Row(f"memory, {name}, at the end", found.memory[-1] / MIB, "MiB")
                yield Row(f"memory, {name}, end / first quarter", growth(found.memory), "times")


def growth(memory: list[float]) -> float:
    """Resident memory at the end beside that after a quarter of the time, when every buffer has had its use."""
    return memory[-1] / memory[len(memory) // 4]


def requests() -> Iterator[tuple[str, int]]:
    yield from ((prompt, seed) for seed in range(SEEDS) for prompt in PROMPTS)


@contextmanager
def serving(*models: str) -> Iterator[str]:
    """The address of `mm serve` in a process of its own."""
    command = [sys.executable, "-m", "mm.cli", "serve", "--port", "0", "--queue", "64"]
    named = [word for model in models for word in ("--model", model)]
    with subprocess.Popen([*command, *named], stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        line = program.stderr.readline()
        try:
            if "http://" not in line:
                raise ValueError(f"the server didn't start: {line.strip()[:200]}")
            yield "http://" + line.split("http://")[1].split("/v1")[0]
        finally:
            program.terminate()


class Asks(Protocol):
    """A client of a server."""

    def ask(self, prompt: str, seed: int) -> tuple[str, int]:
        """The answer, and how much it is; or "" and 0, if it was refused."""

    def memory(self) -> float | None:
        """Bytes that the server has resident, where its system says so."""


class Client:
    """One connection that stays."""

    def __init__(self, address: str, tokens: int) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=300)
        self.tokens = tokens

    def ask(self, prompt: str, seed: int) -> tuple[str, int]:
        """The answer, and its tokens; or "" and 0, if it was refused."""
        asked = {
            "model": "mm-tiny", "messages": [{"role": "user", "content": prompt}],
            "seed": seed, "temperature": 1.0, "max_tokens": self.tokens,
        }  # fmt: skip
        status, answer = self._send("POST", "/v1/chat/completions", json.dumps(asked))
        if status != 200:
            return "", 0
        told = json.loads(answer)
        return told["choices"][0]["message"]["content"], told["usage"]["completion_tokens"]

    def memory(self) -> float | None:
        """Bytes that the server has resident, where its system says so."""
        lines = self._send("GET", "/metrics")[1].decode().splitlines()
        return next(
            (float(line.split()[1]) for line in lines if line.startswith("process_resident_memory_bytes ")), None
        )

    def _send(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        self.connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        return answer.status, answer.read()


def load(
    open_client: Callable[[], Asks],
    wanted: Sequence[tuple[str, int]],
    clients: int,
    seconds: float,
    known: Mapping[Any, str],
) -> Load:
    """So many clients for so many seconds; each takes its turn through all requests, beginning with another one. `known`: what a
    request gets alone."""
    found, lock = Load(), threading.Lock()
    begin = time.perf_counter()

    def work(number: int) -> None:
        client, at = open_client(), number * 5
        while time.perf_counter() - begin < seconds:
            request = wanted[at % len(wanted)]
            text, count = client.ask(*request)
            at += 1
            with lock:
                found.answers += 1
                found.tokens += count
                found.refused += not count
                found.wrong += bool(count) and known.get(request, text) != text

    def watch() -> None:
        client = open_client()
        while time.perf_counter() - begin < seconds and (memory := client.memory()) is not None:
            found.memory.append(memory)
            time.sleep(1.0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    threads.append(threading.Thread(target=watch))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.seconds = time.perf_counter() - begin
    return found
