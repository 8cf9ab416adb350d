"""What the tabs of the demo share: work that one sees happen, and mistakes that are said on the page."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mm.generation import Event

T = TypeVar("T")
INTERVAL = 0.2
"""Seconds between two looks at unfinished work: each costs a decoding and the sending of files."""
OURS = "This went wrong in the program, not in what you did; its log says more. Other inputs may work."
LONGEST = 500
"""Characters of a message on the page."""


class _Unwatched(Exception):
    """Ends work that nobody waits for any more."""


def live(work: Callable[[Callable[[Event], None]], T]) -> Iterator[tuple[list[Event], T | None]]:
    """Run `work(callback)` in a thread. A few times a second: the last event of each row, and None; at the end: what
    the work returns. What it raises is raised here. Once the visitor has gone, it ends with its next event."""
    told: SimpleQueue[Event | BaseException | tuple[T]] = SimpleQueue()
    gone = threading.Event()

    def tell(event: Event) -> None:
        if gone.is_set():
            raise _Unwatched
        told.put(event)

    def run() -> None:
        try:
            told.put((work(tell),))
        except BaseException as error:
            told.put(error)

    threading.Thread(target=run, name="mm app", daemon=True).start()
    last: dict[int, Event] = {}
    due = time.monotonic() + INTERVAL
    try:
        while True:
            news = told.get()
            if isinstance(news, BaseException):
                raise news
            if isinstance(news, tuple):
                yield [], news[0]
                return
            last[news.row] = news
            if time.monotonic() >= due:
                yield [last[row] for row in sorted(last)], None
                due = time.monotonic() + INTERVAL
    finally:
        gone.set()


@contextmanager
def toasts() -> Iterator[None]:
    """What the visitor can mend is said on the page; anything else is a mistake of ours: it goes to the log, and the page says
    that it is none of theirs."""
    import gradio as gr

    try:
        yield
    except ValueError as error:
        text = " ".join(str(error).split())[:LONGEST]
        raise gr.Error(text[:1].upper() + text[1:], print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        logging.getLogger("mm.app").exception("a tab failed")
        raise gr.Error(OURS, print_exception=False) from error
