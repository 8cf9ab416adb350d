"""Requests of many callers in one running batch: whoever comes joins with the next pass, and a row that is done gives its place
to the next one. What a row gets doesn't depend on its neighbours, for each has its own generator."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Protocol

import torch

from mm.cache import KVCache
from mm.decoding import SingleStep
from mm.generation import Engine, Event, Request, ordinary
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.rows import Row

ROUND = 64
"""Positions by which the cache's rows grow."""
INTERVAL = 0.05
"""Seconds between two looks at whether those who wait for a place still do."""
OnStep = Callable[[Event], None]


class Generates(Protocol):
    """What a pipeline needs of an engine."""

    def generate(self, requests: Sequence[Request], on_step: OnStep | None = None) -> list[list[Segment]]: ...


class Dropped(Exception):
    """The work has ended early, because nobody waits for it any more, or because the batcher was closed."""


class Batcher:
    """An engine for many threads at once. Its own thread runs the batch; callers wait for their rows.

    Args:
        model: what generates; it is put into evaluation mode, and must not be trained meanwhile.
        rows: most rows of the batch; others wait, in the order in which they came.
        window: seconds that the first request of an idle batcher waits for company.
    """

    def __init__(self, model: MultimodalModel, rows: int = 16, window: float = 0.002) -> None:
        if rows < 1:
            raise ValueError(f"a batch has at least 1 row, got {rows}")
        self.batch, self.most, self.window = _Batch(model.eval(), rows), rows, window
        self.passes, self.fed = 0, 0
        """Passes so far, and rows in all of them together."""
        self._changed = threading.Condition()
        self._waiting: deque[tuple[_Job, int]] = deque()
        self._closed, self._look = False, 0.0
        self._thread = threading.Thread(target=self._work, name="mm batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that have no place yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows of the batch."""
        return len(self.batch.rows)

    def generate(
        self, requests: Sequence[Request], on_step: OnStep | None = None, gone: Callable[[], bool] | None = None
    ) -> list[list[Segment]]:
        """As `Engine.generate`, beside the requests of other threads. `on_step` is called in the caller's thread; what it raises
        ends its rows, and is raised here. `gone` is asked before every pass: once it says so, the rows end.

        Raises:
            ValueError: as the engine, before anything runs.
            Dropped: `gone` said so, or the batcher is closed.
        """
        with torch.inference_mode():
            rows = [Row(self.batch.model, 0, request) for request in requests]
        if not rows:
            return []
        job = _Job(rows, on_step is not None, gone or (lambda: False))
        with self._changed:
            if self._closed:
                raise Dropped("the batcher is closed")
            self._waiting.extend((job, number) for number in range(len(rows)))
            self._changed.notify()
        try:
            while (news := job.told.get()) is not None:
                if isinstance(news, BaseException):
                    raise news
                if on_step is not None:
                    on_step(news)
        finally:
            job.ended = True
        return [[replace(s, content=ordinary(s.content)) for s in row.segments] for row in rows]

    def caller(self, gone: Callable[[], bool]) -> Generates:
        """This batcher for one caller, whose requests end once `gone` says so."""
        return _Caller(self, gone)

    def close(self) -> None:
        """Take no more requests; those that came before are finished."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # --- the batcher's own thread -------------------------------------------------------------------------------------

    def _work(self) -> None:
        with torch.inference_mode():
            while self._admit():
                try:
                    self._step()
                except Exception as error:  # whose request it was can't be told: all rows of the pass are lost
                    for job, _ in self.batch.clear():
                        job.end(error)

    def _admit(self) -> bool:
        """Let rows in while there is room; with none at all, wait for some. False: closed, and nothing is left to do."""
        with self._changed:
            if not self.batch.rows:
                alone = not self._waiting
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if alone and self._waiting and not self._closed:
                    self._changed.release()
                    time.sleep(self.window)
                    self._changed.acquire()
            if time.monotonic() >= self._look:  # not every pass: there may be many
                self._look = time.monotonic() + INTERVAL
                self._waiting = deque(one for one in self._waiting if not one[0].dropped())
            while self._waiting and self.running < self.most:
                job, number = self._waiting.popleft()
                if job.dropped():
                    continue
                if job.rows[number].state == "done":  # nothing was asked for that takes a pass
                    job.finish()
                else:
                    self.batch.enter(job, number)
            return bool(self.batch.rows or self._waiting or not self._closed)

    def _step(self) -> None:
        for place in reversed(range(self.running)):
            job, _ = self.batch.owners[place]
            if job.dropped():
                self.batch.leave(place)
        if not self.batch.rows:
            return
        self.passes, self.fed = self.passes + 1, self.fed + self.running
        self.batch.step()
        for place in reversed(range(self.running)):
            row, (job, number) = self.batch.rows[place], self.batch.owners[place]
            if job.watched and (event := row.event()) is not None:
                job.told.put(Event(number, *event))
            if row.state == "done":
                self.batch.leave(place)
                job.finish()


@dataclass(eq=False)
class _Job:
    """What one caller asked for at once."""

    rows: list[Row]
    watched: bool
    gone: Callable[[], bool]
    told: SimpleQueue[Event | BaseException | None] = field(default_factory=SimpleQueue)
    """Steps; None when all rows are done; or why they never will be."""
    ended: bool = False
    done: int = 0

    def dropped(self) -> bool:
        """Whether nobody waits for it any more; if somebody did until now, they are told."""
        if not self.ended and self.gone():
            self.end(Dropped("nobody waits for this any more"))
        return self.ended

    def finish(self) -> None:
        """One more row is done."""
        self.done += 1
        if self.done == len(self.rows):
            self.told.put(None)

    def end(self, error: BaseException) -> None:
        if not self.ended:
            self.ended = True
            self.told.put(error)


@dataclass(frozen=True)
class _Caller:
    batcher: Batcher
    gone: Callable[[], bool]

    def generate(self, requests: Sequence[Request], on_step: OnStep | None = None) -> list[list[Segment]]:
        return self.batcher.generate(requests, on_step, self.gone)


class _Batch(Engine):
    """Rows side by side in one cache, without gaps; the twins of all of them stand behind place `most`."""

    def __init__(self, model: MultimodalModel, most: int) -> None:
        super().__init__(model)
        self.most = most
        self.rows: list[Row] = []
        self.owners: list[tuple[_Job, int]] = []
        self.cache = KVCache(model.backbone.config, most, ROUND, model.device, model.embedding.weight.dtype)
        self.branches = 1
        self.single = self._single()

    def enter(self, job: _Job, number: int) -> None:
        row, place = job.rows[number], len(self.rows)
        branches, capacity = 1 + row.most_twins, -(-row.need // ROUND) * ROUND
        if branches > self.branches or capacity > self.cache.capacity:
            self.branches = max(branches, self.branches)
            self.cache.grow(self.most * self.branches, max(capacity, self.cache.capacity))
            self.single = self._single()
        self.cache.reset(place)
        _place(row, place)
        self.rows.append(row)
        self.owners.append((job, number))

    def leave(self, place: int) -> None:
        """The last row moves into the gap: neighbours are evaluated fastest."""
        row, owner = self.rows.pop(), self.owners.pop()
        last = len(self.rows)
        if place == last:
            return
        for branch in range(1 + len(row.twins)):
            self.cache.move(last + branch * self.most, place + branch * self.most)
        _place(row, place)
        self.rows[place], self.owners[place] = row, owner

    def step(self) -> None:
        fed = self._pass(self.rows, self.cache, self.most, self.single)
        assert fed, "a row that isn't done has something to feed"

    def clear(self) -> list[tuple[_Job, int]]:
        owners, self.rows, self.owners = self.owners, [], []
        return owners

    def _single(self) -> SingleStep | None:
        return SingleStep(self.model.backbone, self.cache) if SingleStep.fits(self.model.backbone) else None


def _place(row: Row, place: int) -> None:
    """Between two passes: the row stands here from now on."""
    row.number = place
    for track in (row.main, *row.twins):
        track.row = place
