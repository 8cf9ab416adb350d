"""Who gets in: keys, sizes, places; refusals before anything of a body is read. Also counts what went through."""

from __future__ import annotations

import asyncio
import hmac
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm.serve.errors import Broken, Refusal, log, response
from mm.serve.metrics import Metrics
from mm.serve.shelf import Shelf

OPEN = frozenset(("/health", "/openapi.json", "/docs"))
"""What needs no key."""
RETRY = 2
"""Seconds after which a refused client may try again."""


@dataclass(frozen=True)
class Settings:
    """Of a server."""

    api_key: str | None = None
    """Clients must show it; None: everybody is let in."""
    places: int = 64
    """Requests that are answered or wait at a time; the next one is told to come back."""
    seconds: float = 120.0
    """Most of a request: of its arrival, and of its answer."""
    max_bytes: int = 1 << 25
    """Largest body (32 MiB)."""

    def __post_init__(self) -> None:
        if self.api_key is not None and (not self.api_key.isprintable() or not self.api_key.strip()):
            raise ValueError("the API key must be printable and not empty; leave it out to let everybody in")
        if self.places < 1 or self.seconds <= 0 or self.max_bytes < 1:
            raise ValueError(
                f"places, seconds and max_bytes must be above 0, got {self.places}, {self.seconds:g} and {self.max_bytes}"
            )


class Gate:
    """ASGI middleware. `draining`: whoever comes is refused, and who is inside is served to the end."""

    def __init__(self, settings: Settings, shelf: Shelf) -> None:
        self.settings = settings
        self.inside, self.draining = 0, False
        self.metrics = Metrics(shelf, lambda: self.inside)

    def around(self, app: ASGIApp) -> ASGIApp:
        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            await self._serve(app, scope, receive, send)

        return guarded

    async def _serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        takes = scope["method"] in ("POST", "PUT", "PATCH")
        try:
            self._check(scope, takes)
        except Refusal as error:
            await response(error)(scope, receive, counted)
            self._count(scope, status, start)
            return
        self.inside += takes
        try:
            await app(scope, self._bounded(receive), counted)
        except Broken as error:
            log.warning(
                "an answer of %s was broken off: %s", scope["path"], error
            )  # uvicorn closes what isn't complete
        finally:
            self.inside -= takes
            self._count(scope, status, start)

    def _check(self, scope: Scope, takes: bool) -> None:
        headers = dict(scope["headers"])
        if self.draining and scope["path"] != "/metrics":
            raise Refusal(503, "the server is shutting down; try another one, or later", retry=RETRY)
        key = self.settings.api_key
        if key is not None and scope["path"] not in OPEN:
            scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), key.encode()):
                raise Refusal(
                    401,
                    "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.settings.max_bytes:
            raise self._large()
        if takes and self.inside >= self.settings.places:
            raise Refusal(
                429,
                f"all {self.settings.places} places are taken; try again in {RETRY} s",
                code="queue_full",
                retry=RETRY,
            )

    def _bounded(self, receive: Receive) -> Receive:
        """Bodies whose length isn't said, or is a lie, or that never end."""
        count, whole, deadline = 0, False, time.monotonic() + self.settings.seconds

        async def bounded() -> Message:
            nonlocal count, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                raise Refusal(408, f"the request took longer than {self.settings.seconds:g} s to arrive") from None
            count += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if count > self.settings.max_bytes:
                raise self._large()
            return message

        return bounded

    def _large(self) -> Refusal:
        return Refusal(
            413, f"the request is larger than the {self.settings.max_bytes:,} bytes that are taken; send less"
        )

    def _count(self, scope: Scope, status: int, start: float) -> None:
        route = getattr(scope.get("route"), "path", "other")  # the path itself could be anything
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(time.monotonic() - start)
