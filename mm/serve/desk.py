"""Where the work of a request is done: in a thread, until it is done, its time is up, or the client has gone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mm.batching import Dropped
from mm.serve.errors import Broken, Refusal, refusal, sentence

T = TypeVar("T")
Tell = Callable[[bytes], None]
Failed = Callable[[Refusal], bytes]


class Ticket:
    """Of one piece of work: until when somebody waits for it. `ended`: whether nobody ever will any more."""

    def __init__(self, seconds: float, ended: Callable[[], bool] = lambda: False) -> None:
        self.deadline, self._ended = time.monotonic() + seconds, ended
        self._left = threading.Event()

    def gone(self) -> bool:
        return self._left.is_set() or self.expired or self._ended()

    def leave(self) -> None:
        """Nobody waits any more."""
        self._left.set()

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.deadline

    def check(self) -> None:
        """Raises `Dropped` when nobody waits any more."""
        if self.gone():
            raise Dropped("nobody waits for this any more")


class Desk:
    """Args: threads, and the seconds that a request may take."""

    def __init__(self, threads: int, seconds: float) -> None:
        self.seconds = seconds
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="mm serve")

    async def run(self, request: Request, work: Callable[[Ticket], T]) -> T:
        """The result of `work`, or a refusal."""
        ticket = Ticket(self.seconds)
        working = asyncio.get_running_loop().run_in_executor(self.pool, self._guarded, work, ticket)
        return await self._awaited(request, working, ticket)

    async def stream(
        self, request: Request, work: Callable[[Ticket, Tell], None], media_type: str, failed: Failed | None = None
    ) -> Response:
        """What `work` tells, as it tells it. What it raises before it has told anything is a refusal as any other; after that,
        what `failed` makes of it is the end of the answer, or the connection breaks."""
        loop, ticket = asyncio.get_running_loop(), Ticket(self.seconds)
        told: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()

        def tell(piece: bytes) -> None:
            ticket.check()
            loop.call_soon_threadsafe(told.put_nowait, piece)

        def run() -> None:
            try:
                self._guarded(lambda own: work(own, tell), ticket)
                loop.call_soon_threadsafe(told.put_nowait, None)
            except BaseException as error:
                loop.call_soon_threadsafe(told.put_nowait, error)

        self.pool.submit(run)
        first = await self._awaited(request, asyncio.ensure_future(told.get()), ticket)
        if isinstance(first, BaseException):
            raise refusal(first)

        async def pieces() -> AsyncIterator[bytes]:
            news: bytes | BaseException | None = first
            try:
                while news is not None:
                    if isinstance(news, BaseException):
                        if failed is None:
                            raise Broken(sentence(refusal(news).detail))
                        yield failed(refusal(news))
                        return
                    yield news
                    news = await told.get()
            finally:
                ticket.leave()

        return StreamingResponse(pieces(), media_type=media_type, headers={"Cache-Control": "no-store"})

    async def _awaited(self, request: Request, working: asyncio.Future[T], ticket: Ticket) -> T:
        leaving = asyncio.ensure_future(_left(request))
        try:
            both: set[asyncio.Future[Any]] = {working, leaving}
            await asyncio.wait(both, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            working.add_done_callback(lambda done: done.cancelled() or done.exception())  # is nobody's news any more
            if leaving.done():
                raise Refusal(499, "the client has gone")
            raise self._late()
        except BaseException as error:
            ticket.leave()
            raise refusal(error) if isinstance(error, Exception) else error from None
        finally:
            leaving.cancel()

    def _guarded(self, work: Callable[[Ticket], T], ticket: Ticket) -> T:
        try:
            ticket.check()
            return work(ticket)
        except Dropped as error:
            if ticket.expired:
                raise self._late() from error
            raise Refusal(499 if ticket.gone() else 503, "the work was ended") from error

    def _late(self) -> Refusal:
        return Refusal(504, f"the answer took longer than {self.seconds:g} s; ask for less, or try again later")

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


async def _left(request: Request) -> None:
    """Until the client has gone. The body has been read, so that nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
