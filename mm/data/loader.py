"""Chunks of documents → packed batches: the same whatever the number of worker processes, and resumable at any batch.

The loader lays a feed's chunks into a `Packer` and yields batches. Its state is two facts: where the feed goes on, and
which documents wait in the packer; those are made again on resume.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from mm.data.example import BrokenExample
from mm.data.feeds import Chunk, Feed, MixtureFeed, Ref
from mm.data.packing import Packer
from mm.stream import TokenStream, pack


class PackedLoader:
    """Batches of at most `tokens` positions. With `batches` it is endless and an epoch is that many batches (every rank
    the same); without, it ends with the feed.

    `state_dict` holds the place after the last batch it gave; on several ranks it gathers that of all, so all must call
    it. Raises `ValueError` for a document longer than a batch, unless `oversize` is `skip`.

    Args:
        lookahead: documents that wait while a batch is chosen.
        num_workers, prefetch: worker processes, and chunks that each prepares ahead. Batches don't depend on them.
        strict: raise at the first broken example.
    """

    def __init__(
        self,
        feed: Feed,
        tokens: int,
        *,
        batches: int | None = None,
        lookahead: int = 128,
        num_workers: int = 0,
        prefetch: int = 4,
        oversize: Literal["error", "skip"] = "error",
        strict: bool = False,
        pin_memory: bool = False,
        rank: int = 0,
        world: int = 1,
        collate: Callable[[Sequence[TokenStream]], TokenStream] = pack,
    ) -> None:
        if lookahead < 1 or (batches is not None and batches < 1):
            raise ValueError(f"lookahead and batches must be at least 1, got {lookahead} and {batches}")
        self.feed, self.tokens, self.batches, self.lookahead = feed, tokens, batches, lookahead
        self.num_workers, self.prefetch, self.oversize, self.strict = num_workers, prefetch, oversize, strict
        self.pin_memory, self.rank, self.world, self.collate = pin_memory, rank, world, collate
        self.packer: Packer[tuple[Ref, TokenStream]] = Packer(tokens)
        self.cursor = feed.start()
        self.done = 0
        """Batches given in this epoch."""
        self.skipped = 0
        self.given, self.positions = 0, 0
        """Batches given in all, and their positions."""
        self._resumed = False
        self._iterator: Iterator[Chunk] | None = None  # the name by which Lightning ends worker processes
        self._in_a_row = 0

    @property
    def utilisation(self) -> float:
        """Share of the budget that the batches given so far have used."""
        return self.positions / (self.given * self.tokens) if self.given else 0.0

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("the number of batches is known only once everything is packed")
        return self.batches

    def __iter__(self) -> Iterator[TokenStream]:
        if not self._resumed:
            self.done = 0
            if self.batches is None:
                self._restart()
        self._resumed = False
        while self.batches is None or self.done < self.batches:
            batch = self._next()
            if batch is None:
                return
            self.done += 1
            yield batch

    def _restart(self) -> None:
        self.packer = Packer(self.tokens)
        self.cursor, self._iterator = self.feed.start(), None

    def _next(self) -> TokenStream | None:
        while len(self.packer) < self.lookahead or self.packer.positions * 4 < self.tokens * 5:
            if self._iterator is None:
                self._iterator = self.feed.chunks(self.cursor, self.num_workers, self.prefetch)
            chunk = next(self._iterator, None)
            if chunk is None:
                break
            self._accept(chunk)
        chosen = self.packer.batch()
        if not chosen:
            return None
        batch = self.collate([stream for _, stream in chosen])
        self.given += 1
        self.positions += len(batch)
        return batch.pin_memory() if self.pin_memory else batch

    def _accept(self, chunk: Chunk) -> None:
        if chunk.error:
            raise ValueError(chunk.error)
        self.cursor = chunk.cursor
        for reason in chunk.skipped:
            self._skip(reason, self.strict)
        streams = chunk.documents()
        if streams:
            self._in_a_row = 0
        for ref, stream in zip(chunk.refs, streams, strict=True):
            if len(stream) > self.tokens:
                reason = f"a document has {len(stream)} positions, but a batch at most {self.tokens}"
                self._skip(f"{reason}; raise tokens, or set oversize to 'skip'", self.oversize == "error")
            else:
                self.packer.add(len(stream), (ref, stream))

    def _skip(self, reason: str, fatal: bool) -> None:
        if fatal:
            raise ValueError(reason)
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.feed.patience:
            raise ValueError(f"{self._in_a_row} examples in a row can't be used; the last: {reason}")
        if self.skipped & (self.skipped - 1) == 0:  # 1, 2, 4, 8, …: seldom, and the count is current
            warnings.warn(f"skipped {self.skipped} examples so far; the last: {reason}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        mine = {
            "rank": self.rank,
            "cursor": self.cursor,
            "waiting": [ref for _, (ref, _) in self.packer.waiting.values()],
            "done": self.done if self.batches is None else self.done % self.batches,
            "skipped": self.skipped,
        }
        ranks = [mine]
        if self.world > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [mine] * self.world
            torch.distributed.all_gather_object(ranks, mine)
        return {"identity": self.feed.identity, "tokens": self.tokens, "lookahead": self.lookahead, "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken. Raises `ValueError` if the data or the setup are not the same."""
        for name, own in (("identity", self.feed.identity), ("tokens", self.tokens), ("lookahead", self.lookahead)):
            if state[name] != own:
                raise ValueError(
                    f"the data state can't be resumed: {name} was {state[name]} and is {own} now; sources, weights, "
                    "seed, ranks, chunk, tokens and lookahead must be those of the interrupted run"
                )
        mine = next((entry for entry in state["ranks"] if entry["rank"] == self.rank), None)
        if mine is None:
            raise ValueError(f"the data state covers {len(state['ranks'])} ranks, but this is rank {self.rank}")
        self._restart()
        self.cursor, self.done, self.skipped = mine["cursor"], mine["done"], mine["skipped"]
        refs = [tuple(ref) for ref in mine["waiting"]]
        for ref, stream in zip(refs, self.feed.fetch(refs, self.cursor), strict=True):
            self.packer.add(len(stream), (ref, stream))
        self._resumed = True


def estimate_batches(feed: MixtureFeed, tokens: int, samples: int = 64) -> int:
    """Batches in which one rank sees about one epoch, from the lengths of evenly spread documents. Deterministic."""
    count = -(-feed.epoch_length // feed.world)
    lengths = []
    for number in range(0, count, max(1, count // samples)):
        try:
            lengths.append(len(feed.document(number)))
        except BrokenExample:
            continue
    if not lengths:
        raise ValueError(f"none of the {min(samples, count)} examples that were tried can be used")
    return max(1, round(count * sum(lengths) / len(lengths) / (0.98 * tokens)))
