"""Sound and video while they are generated: the steps of work in another thread, and samples and frames as far as nothing can
change them any more."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import numpy as np
from torch import Tensor

from mm.audio import Audio
from mm.generation import Event
from mm.interfaces import Encoded, ModalityTokenizer
from mm.video import Frames

CONTEXT = 32
"""Elements on either side that are decoded with a piece, where the tokenizer doesn't say how many matter (`decoder_reach`)."""


class _Unheard(Exception):
    """Ends work that nobody waits for any more."""


def events(work: Callable[[Callable[[Event], None]], object]) -> Iterator[Event]:
    """What `work(callback)`, run in a thread, calls back with. What it raises is raised here. Closing the iterator ends the work
    at its next event, and waits for that."""
    told: SimpleQueue[Event | BaseException | None] = SimpleQueue()
    gone = threading.Event()

    def tell(event: Event) -> None:
        if gone.is_set():
            raise _Unheard
        told.put(event)

    def run() -> None:
        try:
            work(tell)
            told.put(None)
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=run, name="mm stream", daemon=True)
    thread.start()
    try:
        while (news := told.get()) is not None:
            if isinstance(news, BaseException):
                raise news
            yield news
    finally:
        gone.set()
        thread.join()


class Player:
    """Decodes an item piece by piece. Each piece is decoded with elements before and after it, which decide its samples too, so
    that all pieces joined are what decoding the whole item gives, if the tokenizer's `decoder_reach` is right."""

    def __init__(self, tokenizer: ModalityTokenizer, wrap: Callable[[Tensor], Encoded], chunk: int) -> None:
        self.tokenizer, self.wrap, self.chunk = tokenizer, wrap, chunk
        spec = tokenizer.spec
        self.context = int(getattr(tokenizer, "decoder_reach", CONTEXT))
        self.samples = spec.sample_rate / spec.frame_rate
        self.played = 0

    def play(self, content: Tensor, final: int, last: bool) -> Audio | None:
        """The samples that became certain, if they are enough for a piece; of the `last` elements all that are left."""
        until = final if last else final - self.context
        if until - self.played < (1 if last else self.chunk):
            return None
        start, stop = max(0, self.played - self.context), min(final, until + self.context)
        decoded: Audio = self.tokenizer.decode(self.wrap(content[start:stop])).value
        begin, end = (round(place * self.samples) - round(start * self.samples) for place in (self.played, until))
        self.played = until
        return Audio(np.ascontiguousarray(decoded.samples[begin : None if last else end]), decoded.rate)


class Reel:
    """Decodes a clip step by step in time, as far as it is final. A tokenizer that says how (`streaming`) goes on from where it
    was; others decode from the beginning each time, which is right for those whose frames depend on earlier ones only."""

    def __init__(
        self, tokenizer: ModalityTokenizer, wrap: Callable[[Tensor, tuple[int, ...]], Encoded], grid: tuple[int, ...]
    ) -> None:
        self.tokenizer, self.wrap, self.grid = tokenizer, wrap, grid
        streaming = getattr(tokenizer, "streaming", None)
        self.decoder = streaming() if grid and streaming is not None else None
        self.steps = self.shown = 0

    def show(self, content: Tensor, final: int, *, ended: bool) -> Frames:
        """The frames, uint8 [T, H, W, 3], that became certain; `ended`: all of the content is. A list without a grid is shown
        when it has ended."""
        if not self.grid:
            steps = int(ended)
            grid: tuple[int, ...] = (len(content),)
        else:
            each = math.prod(self.grid[1:])
            steps = (len(content) if ended else final) // each
            content, grid = content[: steps * each], (steps, *self.grid[1:])
        if steps <= self.steps:
            return np.zeros((0, 1, 1, 3), dtype=np.uint8)
        if self.decoder is not None:
            frames: Frames = self.decoder.decode(content[self.steps * each :])
        else:
            frames = self.tokenizer.decode(self.wrap(content, grid)).value.frames[self.shown :]
        self.steps, self.shown = steps, self.shown + len(frames)
        return frames
