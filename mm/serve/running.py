"""A server in a thread of this process, for notebooks and tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from mm.serve.app import create
from mm.serve.command import listen, server
from mm.serve.gate import Settings
from mm.serve.place import Place
from mm.serve.shelf import Shelf


@contextmanager
def running(shelf: Shelf, settings: Settings | None = None) -> Iterator[tuple[str, Place]]:
    """Its address, at a free port, and what it works with. At the end who is inside is served, and the shelf is closed."""
    app, place = create(shelf, settings)
    with listen("127.0.0.1", 0) as listening:
        one = server(uvicorn.Config(app, log_level="warning", lifespan="off"), place.gate)
        thread = threading.Thread(target=one.run, args=([listening],), name="mm server", daemon=True)
        thread.start()
        while not one.started and thread.is_alive():
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", place
        finally:
            place.gate.draining = True
            thread.join()
            place.close()
