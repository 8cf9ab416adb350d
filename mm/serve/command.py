"""`mm serve`: the HTTP server."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from mm.commands.common import choose_threads, parser

if TYPE_CHECKING:
    from mm.serve.gate import Gate, Settings
    from mm.serve.shelf import Shelf


def arguments(argv: list[str]) -> Namespace:
    command = parser(
        "serve",
        "Serve models over HTTP, at endpoints of OpenAI's shapes (docs/serve.md). Ctrl+C or SIGTERM ends it, once who is "
        "inside has been served.",
    )
    add = command.add_argument
    add(
        "--model", action="append", metavar="NAME",
        help="a shipped checkpoint, a folder, or owner/name on the hub; may be repeated; default: all that are shipped",
    )  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen on: 127.0.0.1 = this machine only, 0.0.0.0 = all")
    add("--port", type=int, default=8000, help="port to listen on; 0 = any that is free")
    add("--api-key", default=os.environ.get("MM_API_KEY"), metavar="KEY", help="what clients must show; or MM_API_KEY")
    add("--rows", type=int, default=16, metavar="N", help="most rows of a batch")
    add("--queue", type=int, default=64, metavar="N", help="requests inside at a time; the next one gets 429")
    add("--timeout", type=float, default=120.0, metavar="S", help="seconds that a request may take")
    add("--max-mb", type=float, default=32.0, metavar="MB", help="largest request, in MiB")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, metavar="N", help="CPU threads; default: 1 for small models, else torch's")
    return command.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit status; raises `ValueError` for what can't be done."""
    args = arguments(argv)
    for name in ("queue", "timeout", "max_mb"):
        if not 0 < (value := getattr(args, name)) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be a number above 0, got {value:g}")
    listening = listen(args.host, args.port)  # before the seconds that loading takes
    with listening:
        from mm.serve.gate import Settings

        settings = Settings(args.api_key, args.queue, args.timeout, int(args.max_mb * (1 << 20)))
        shelf = load(args.model, args.device, args.rows, args.threads)
        name, port = listening.getsockname()[:2]
        print(
            f"{', '.join(shelf.models)} at http://{f'[{name}]' if ':' in name else name}:{port}/v1 (Ctrl+C ends it)",
            file=sys.stderr,
            flush=True,
        )
        run(shelf, settings, listening)
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Raises `ValueError` for an address that can't be listened on."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (")[0].lower()
        raise ValueError(f"can't listen on {host}:{port}: {reason}; choose another --port or --host") from error


def load(names: list[str] | None, device: str, rows: int, threads: int | None) -> Shelf:
    """Raises `ValueError` for what is no checkpoint, and for two of one name."""
    from mm import hub
    from mm.pipelines.base import Pipeline
    from mm.serve.shelf import Shelf

    if rows < 1:
        raise ValueError(f"--rows must be at least 1, got {rows}")
    pipelines: dict[str, Pipeline] = {}
    for given in names or hub.answering():
        name = given if given in hub.shipped() or not os.path.isdir(given) else os.path.basename(os.path.abspath(given))
        if name in pipelines:
            raise ValueError(f"two models are called {name!r}; rename a folder")
        pipelines[name] = Pipeline.from_pretrained(given, device)
    choose_threads(
        max((p.model for p in pipelines.values()), key=lambda m: sum(w.numel() for w in m.parameters())), threads
    )
    return Shelf(pipelines, rows)


def run(shelf: Shelf, settings: Settings, listening: socket.socket) -> None:
    """Until a signal; then whoever comes is told so, whoever is inside is served to the end, and it is over."""
    import uvicorn

    from mm.serve.app import create

    app, place = create(shelf, settings)
    config = uvicorn.Config(
        app, log_level="warning", lifespan="off", server_header=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.seconds) + 1,
    )  # fmt: skip
    try:
        server(config, place.gate).run(sockets=[listening])
    finally:
        place.close()


def server(config: Any, gate: Gate) -> Any:
    """A uvicorn server that goes on listening while it drains, so that who comes is refused in words; a second signal ends it
    at once."""
    import uvicorn

    class Draining(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            if gate.draining or not self.started:
                super().handle_exit(sig, frame)
            gate.draining = True

        async def on_tick(self, counter: int) -> bool:
            if gate.draining and not gate.inside:
                self.should_exit = True
                await asyncio.sleep(0)
            return await super().on_tick(counter)

    return Draining(config)
