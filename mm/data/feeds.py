"""Feeds: documents made from examples, numbered, in small chunks, in this process or in workers that keep the order.

All draws for a document come from a generator seeded with (seed, name of the document). So a document can be made again
at any time, and nothing depends on which process makes it.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import io
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from mm.data.documents import Template
from mm.data.example import BrokenExample, Example, Source, digest
from mm.data.streaming import Place, StreamingShards
from mm.interfaces import Encoded, ModalityTokenizer
from mm.layout import Segment
from mm.stream import TokenStream, pack, unpack

ToStream = Callable[[list[Segment], torch.Generator], TokenStream]
Ref = tuple[int, ...]
"""Names a document for good: its generator is seeded with it, and it can be made again."""
Cursor = Any
"""Where a feed goes on: plain numbers, lists and tuples."""


class DocumentMaker:
    """Example → template → tokens → laid-out stream.

    Args:
        to_stream: lays a document out; gets the generator that the template drew from.
        tokenizers: modality → tokenizer for contents that are still raw; what is missing here is left to `to_stream`.
        seed: with the document's name, seeds its generator.
    """

    def __init__(
        self, to_stream: ToStream, tokenizers: Mapping[str, ModalityTokenizer] | None = None, seed: int = 0
    ) -> None:
        self.to_stream, self.tokenizers, self.seed = to_stream, dict(tokenizers or {}), seed

    def __call__(self, example: Example, template: Template, ref: Ref) -> TokenStream:
        """Raises `BrokenExample` if the example's data can't be read or encoded, `ValueError` if the setup is wrong."""
        rng = torch.Generator().manual_seed(_mixed(self.seed, *ref))
        document = [self._encoded(segment, example) for segment in template(example, rng)]
        return self.to_stream(document, rng)

    def _encoded(self, segment: Segment, example: Example) -> Segment:
        tokenizer = self.tokenizers.get(segment.modality)
        if tokenizer is None or segment.content is None or isinstance(segment.content, Encoded):
            return segment
        try:
            content = tokenizer.encode(segment.content)
        except ValueError as error:
            raise BrokenExample(f"example {example['key']!r} can't be encoded: {error}") from error
        return dataclasses.replace(segment, content=content)


@dataclass(frozen=True)
class Chunk:
    """A few documents that were made together."""

    cursor: Cursor
    """Where the feed goes on after this chunk."""
    refs: list[Ref]
    streams: list[TokenStream] | bytes
    """The documents. From a worker process: all in one pack, serialised (see `_Pickler`)."""
    skipped: list[str]
    """Why examples were left out."""
    error: str = ""
    """A mistake in the setup, to be raised in the main process."""

    def documents(self) -> list[TokenStream]:
        if isinstance(self.streams, bytes):  # they come from our own worker process
            return unpack(pickle.loads(self.streams))
        return self.streams


@dataclass(kw_only=True)
class Part:
    """One entry of a data mixture."""

    source: Source | StreamingShards
    template: Template
    weight: float = 1.0
    """How often an epoch shows each example; 0.5: every epoch draws half of them."""


class Feed(abc.ABC):
    """Makes chunks from a cursor on."""

    patience: int
    """Examples in a row that may be broken before it is taken for a mistake."""
    identity: str
    """Changes with the data, their order or their seeds."""

    @abc.abstractmethod
    def start(self) -> Cursor: ...

    @abc.abstractmethod
    def data(self, cursor: Cursor) -> tuple[Dataset[Chunk], Iterable[Any] | None]:
        """What a `DataLoader` without batching needs to give this feed's chunks in order: dataset and sampler."""

    @abc.abstractmethod
    def fetch(self, refs: Sequence[Ref], cursor: Cursor) -> list[TokenStream]:
        """Documents made before `cursor`, again."""

    def chunks(self, cursor: Cursor, num_workers: int, prefetch: int) -> Iterator[Chunk]:
        dataset, sampler = self.data(cursor)
        if not num_workers:
            if sampler is None:
                return iter(dataset)
            return map(dataset.__getitem__, sampler)
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            collate_fn=_same,
        )
        return iter(loader)


def build_chunk(cursor: Cursor, items: Iterable[tuple[Ref, Callable[[], TokenStream]]]) -> Chunk:
    """Make the documents of one chunk; what is broken is left out and reported."""
    refs: list[Ref] = []
    streams: list[TokenStream] = []
    skipped: list[str] = []
    for ref, make in items:
        try:
            streams.append(make())
        except BrokenExample as error:
            skipped.append(str(error))
        except ValueError as error:
            return Chunk(cursor, [], [], skipped, error=str(error))
        else:
            refs.append(ref)
    if streams and get_worker_info() is not None:
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=5).dump(pack(streams))
        return Chunk(cursor, refs, buffer.getvalue(), skipped)
    return Chunk(cursor, refs, streams, skipped)


class _Pickler(pickle.Pickler):
    """Tensors by value. torch would send each through a file handle of its own, which for tensors this small costs more
    than copying does and stays open as long as a document waits."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16:  # which numpy doesn't have
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


class MixtureFeed(Feed, Dataset[Chunk]):
    """Random-access parts, mixed by weight and permuted anew every epoch. Documents are numbered on without end, or up
    to the end of epoch `epochs`; rank r of w makes numbers r, r + w, … of the whole."""

    def __init__(
        self,
        parts: Sequence[Part],
        make: DocumentMaker,
        *,
        shuffle: bool = True,
        epochs: int | None = None,
        rank: int = 0,
        world: int = 1,
        chunk: int = 16,
    ) -> None:
        if not parts or any(not 0 < part.weight < float("inf") for part in parts):
            raise ValueError(f"give at least one part, weights > 0; got weights {[part.weight for part in parts]}")
        self.parts, self.make, self.shuffle = list(parts), make, shuffle
        self.rank, self.world, self.chunk = rank, world, chunk
        self.sizes = [len(_random_access(part.source)) for part in parts]
        counts = [max(1, round(size * part.weight)) for size, part in zip(self.sizes, parts, strict=True)]
        self.epoch_length = sum(counts)
        """Documents of an epoch, over all ranks."""
        self.limit = None if epochs is None else len(range(rank, epochs * self.epoch_length, world))
        self.patience = max(100, self.epoch_length // world)
        identities = [part.source.identity for part in parts]
        self.identity = digest("mixture", *identities, *(str(n) for n in (*counts, shuffle, world, chunk, make.seed)))
        self._counts = counts
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def start(self) -> Cursor:
        return 0

    def data(self, cursor: Cursor) -> tuple[Dataset[Chunk], Iterable[Any] | None]:
        if self.limit is None:
            return self, itertools.count(cursor)
        return self, range(cursor, -(-self.limit // self.chunk))

    def __getitem__(self, number: int) -> Chunk:
        first = number * self.chunk
        last = first + self.chunk if self.limit is None else min(first + self.chunk, self.limit)
        return build_chunk(number + 1, [((n,), partial(self.document, n)) for n in range(first, last)])

    def document(self, number: int) -> TokenStream:
        """The document with this number of this rank. Raises `BrokenExample`, or `ValueError` where its source is
        strict."""
        place = number * self.world + self.rank
        part, index = self.locate(*divmod(place, self.epoch_length))
        source = _random_access(part.source)
        with _strictly(source):
            return self.make(source[index], part.template, (place,))

    def locate(self, epoch: int, place: int) -> tuple[Part, int]:
        """Which example stands at a place of an epoch."""
        if self._order[0] != epoch:
            self._order = (epoch, self._permuted(epoch))
        flat = int(self._order[1][place])
        for part, size in zip(self.parts, self.sizes, strict=True):
            if flat < size:
                return part, flat
            flat -= size
        raise AssertionError("unreachable: flat indices lie below the sum of sizes")

    def _permuted(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng(_mixed(self.make.seed, epoch, -1))
        drawn, base = [], 0
        for size, count in zip(self.sizes, self._counts, strict=True):
            whole, rest = divmod(count, size)
            drawn += [base + np.arange(size)] * whole + [base + rng.permutation(size)[:rest]]
            base += size
        order = np.concatenate(drawn)
        return rng.permutation(order) if self.shuffle else order

    def fetch(self, refs: Sequence[Ref], cursor: Cursor) -> list[TokenStream]:
        return [self.document(number) for (number,) in refs]


class StreamFeed(Feed, IterableDataset[Chunk]):
    """Streaming shards: lanes in turn, `chunk` examples each, without end. Workers share the lanes evenly."""

    def __init__(self, part: Part, make: DocumentMaker, *, rank: int = 0, world: int = 1, chunk: int = 16) -> None:
        assert isinstance(part.source, StreamingShards)
        self.source, self.template, self.make = part.source, part.template, make
        self.rank, self.world, self.chunk = rank, world, chunk
        self.lanes = self.source.lanes
        if len(self.source.urls) < self.lanes * world:
            raise ValueError(
                f"{len(self.source.urls)} shards are too few for {self.lanes} lanes on each of {world} ranks; "
                "use fewer lanes or more, smaller shards"
            )
        self.patience = 10_000
        self.identity = digest("stream feed", self.source.identity, *(str(n) for n in (world, chunk, make.seed)))
        self._cursor = self.start()

    def start(self) -> Cursor:
        return (0, [(0, 0, 0)] * self.lanes)

    def data(self, cursor: Cursor) -> tuple[Dataset[Chunk], Iterable[Any] | None]:
        self._cursor = cursor
        return self, None

    def chunks(self, cursor: Cursor, num_workers: int, prefetch: int) -> Iterator[Chunk]:
        if num_workers and self.lanes % num_workers:
            raise ValueError(f"num_workers must divide the {self.lanes} lanes of the stream, got {num_workers}")
        places = list(cursor[1])
        for chunk in super().chunks(cursor, num_workers, prefetch):
            lane, place = chunk.cursor
            places[lane] = place
            yield dataclasses.replace(chunk, cursor=((lane + 1) % self.lanes, list(places)))

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks of this worker's lanes; a `DataLoader` that takes one from each worker in turn restores the order."""
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        first, places = self._cursor
        mine = [(first + turn) % self.lanes for turn in range(number, self.lanes, count)]
        readers = {lane: self.source.lane(lane, places[lane], rank=self.rank, world=self.world) for lane in mine}
        for lane in itertools.cycle(mine):
            try:
                items = list(itertools.islice(readers[lane], self.chunk))
            except ValueError as error:
                yield Chunk((lane, places[lane]), [], [], [], error=str(error))
                return
            epoch, shard, index = items[-1][0]
            makers = [((lane, *place), partial(self._make, lane, place, example)) for place, example in items]
            yield build_chunk((lane, (epoch, shard, index + 1)), makers)

    def _make(self, lane: int, place: Place, example: Example | BrokenExample) -> TokenStream:
        with _strictly(self.source):
            if isinstance(example, BrokenExample):
                raise example
            return self.make(example, self.template, (self.rank, lane, *place))

    def fetch(self, refs: Sequence[Ref], cursor: Cursor) -> list[TokenStream]:
        found: dict[Ref, TokenStream] = {}
        for lane in sorted({ref[0] for ref in refs}):
            wanted = {ref[1:] for ref in refs if ref[0] == lane}
            for place, example in self.source.lane(lane, min(wanted), rank=self.rank, world=self.world):  # type: ignore[arg-type]
                if place in wanted:
                    found[(lane, *place)] = self._make(lane, place, example)
                    wanted.discard(place)
                if not wanted:
                    break
        return [found[ref] for ref in refs]


@contextlib.contextmanager
def _strictly(source: Source | StreamingShards) -> Iterator[None]:
    """Of a strict source, a broken example is an error rather than one to skip."""
    try:
        yield
    except BrokenExample as error:
        if source.strict:
            raise ValueError(str(error)) from error
        raise


def _random_access(source: Source | StreamingShards) -> Source:
    if isinstance(source, StreamingShards):
        raise ValueError("StreamingShards can't be mixed with other sources; make it the only one")
    return source


def _same(value: Any) -> Any:
    return value


def _mixed(*parts: int) -> int:
    """A seed from several numbers (63 bits)."""
    return int(digest(*(str(part) for part in parts))[:15], 16)
