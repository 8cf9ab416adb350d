"""What the endpoints share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mm.serve.desk import Desk
from mm.serve.errors import Refusal, body
from mm.serve.gate import Gate, Settings
from mm.serve.shelf import Shelf

STREAM = "text/event-stream"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Place:
    """One server."""

    shelf: Shelf
    desk: Desk
    gate: Gate
    settings: Settings

    def close(self) -> None:
        """When nobody is inside any more."""
        self.desk.close()
        self.shelf.close()


def sent(data: dict[str, Any], *, named: bool = False) -> bytes:
    """A server-sent event; `named`: after its `type`."""
    head = f"event: {data['type']}\n" if named else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def broken(error: Refusal) -> bytes:
    """The last event of a stream that can't go on."""
    return sent(body(error))


def streamed(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI description: an answer may also be of these kinds."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {200: {"content": {kind: {} if kind == STREAM or kind.startswith("text/") else binary for kind in kinds}}}
