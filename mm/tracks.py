"""What one sequence of the engine feeds in a pass: its positions with their tokens, orders, coordinates and records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.cache import Forgotten
from mm.interfaces import Layout, Order
from mm.layout import Draft, Span, holdings, stretch
from mm.stream import RECORDS, Placed, join

if TYPE_CHECKING:
    from mm.vocabulary import Entry

Records = dict[tuple[str, str], tuple[Tensor, Tensor]]
"""(kind of record, name) → values, and the places among a feed's positions where they stand."""


@dataclass(kw_only=True)
class Feed:
    """Positions that one row (or a twin of it) feeds in one pass."""

    row: int
    branch: int
    """0: the row itself; 1, 2: its twins, for guidance."""
    modality: list[int]
    ids: list[int]
    order: list[int]
    position: list[tuple[float, float, float]]
    copy: list[int] | None = None
    time: Tensor | None = None
    records: Records = field(default_factory=dict)
    keep: bool = True
    read: str | Tensor | None = None
    """Hidden states the row samples from: `"last"`, indices, or none."""
    reset: bool = False
    """The twin starts anew."""
    forgotten: Forgotten | None = None
    """What leaves the cache once the pass is done."""

    @property
    def plain(self) -> bool:
        """One clean position to be kept."""
        return len(self.ids) == 1 and self.keep and self.copy is None and self.time is None

    def slot(self, rows: int) -> int:
        """Row of the cache: twins stand behind all rows."""
        return self.row + rows * self.branch


class Track:
    """Where one sequence stands (next order, next coordinate) and what waits to be fed."""

    def __init__(self, row: int, branch: int = 0) -> None:
        self.row, self.branch = row, branch
        self.order, self.cursor, self.length = 0, 0.0, 0
        self.span: Span | None = None
        """The text that the next item may run along, if any."""
        self.start, self.rate = 0.0, 1.0
        """Where the open item begins on the rotary axes, and how far apart its elements stand."""
        self.entered = 0
        """The open item's first place in the cache."""
        self.fresh = True
        self._clear()

    def _clear(self) -> None:
        self.modality: list[int] = []
        self.ids: list[int] = []
        self.orders: list[int] = []
        self.position: list[tuple[float, float, float]] = []
        self.times: list[float] = []
        self.forgotten: Forgotten | None = None
        self.records: dict[tuple[str, str], tuple[list[Tensor], list[int]]] = {}

    def record(self, kind: str, name: str, value: Tensor, place: int) -> None:
        """A value of one position that waits to be fed."""
        values, places = self.records.setdefault((kind, name), ([], []))
        values.append(value)
        places.append(place)

    def controls(self, ids: Sequence[int]) -> None:
        for token in ids:
            self._push(0, token, self.order, (self.cursor,) * 3)
            self.order += 1
            self.cursor += 1.0

    def host(self, token: int) -> None:
        """One more element of the text that stands here. Right behind a text that was given it goes on with that one."""
        span = self.span
        if span is None or span.ran or span.start + span.elements != self.cursor:
            span = Span(self.cursor, 0)
        self.span = span._replace(elements=span.elements + 1)
        self.controls([token])

    def element(
        self, entry: Entry, number: int, token: Tensor, offset: int, coordinate: Sequence[float], time: float = 0.0
    ) -> None:
        """One element of an open item; `order` and `cursor` stay at the item's beginning until `leave`."""
        c, rate = self.start, self.rate
        if entry.kind != "discrete":
            self.record(kind_of(entry), entry.name, token, len(self.ids))
        place = (c + rate * coordinate[0], c + rate * coordinate[1], c + rate * coordinate[2])
        self._push(number, global_id(entry, token), self.order + offset, place, time)

    def given(self, draft: Draft) -> None:
        """Begin with a document's positions."""
        stream, self.span = draft.stream(), draft.span
        self.modality, self.ids, self.orders = stream.modality.tolist(), stream.ids.tolist(), stream.order.tolist()
        self.position = [(a, b, c) for a, b, c in stream.position.tolist()]
        self.times = stream.time.tolist()
        for kind in RECORDS:
            for name, record in getattr(stream, kind).items():
                self.records[kind, name] = (list(record.read), record.index.tolist())
        self.length = len(stream)
        self.order, self.cursor = max(self.orders) + 1, float(stream.position.max()) + 1.0

    def enter(self, order: Order, number: int, grid: Sequence[int]) -> None:
        """Elements of an item of modality `number` come next."""
        (self.start, self.rate), self.span = stretch(order, number, grid, self.cursor, self.span)
        self.entered = self.length

    def forget(self, count: int, by: Tensor) -> None:
        """The oldest elements of the open item leave the cache after the next pass, and the others move by so much."""
        along, across, down = (self.rate * by).tolist()
        self.forgotten = Forgotten(self.entered, count, (along, across, down))
        self.length -= count

    def leave(self, orders: int, extent: float) -> None:
        self.order += orders
        if self.start == self.cursor:
            self.cursor += extent

    def _push(
        self, number: int, token: int, order: int, position: tuple[float, float, float], time: float = 0.0
    ) -> None:
        self.modality.append(number)
        self.ids.append(token)
        self.orders.append(order)
        self.position.append(position)
        self.times.append(time)
        self.length += 1

    def flush(self, read: str | None) -> Feed:
        feed = Feed(
            row=self.row,
            branch=self.branch,
            modality=self.modality,
            ids=self.ids,
            order=self.orders,
            position=self.position,
            time=torch.tensor(self.times) if any(self.times) else None,
            forgotten=self.forgotten,
            records={key: (torch.stack(v), torch.tensor(i)) for key, (v, i) in self.records.items()},
            read=read,
            reset=self.branch > 0 and self.fresh,
        )
        self.fresh = False
        self._clear()
        return feed

    def scratch(
        self, entry: Entry, number: int, content: Tensor, layout: Layout, read: Tensor, keep: bool = False
    ) -> Feed:
        """Positions of an item under way; unless `keep`, the cache has them for this pass only."""
        held, count = holdings(content, layout), len(layout.element)
        self.length += count * keep
        places = torch.arange(count)
        records: Records = {("inject", name): (vectors, places) for name, vectors in layout.inject.items()}
        if entry.kind != "discrete":
            records[kind_of(entry), entry.name] = (held if layout.reads is None else layout.reads, places)
            ids = [-1] * count
        else:
            ids = (held + entry.start).tolist()
        return Feed(
            row=self.row,
            branch=self.branch,
            modality=[number] * count,
            ids=ids,
            order=(layout.order + self.order).tolist(),
            copy=layout.copy.tolist(),
            position=(self.start + self.rate * layout.position).tolist(),
            time=layout.time,
            records=records,
            keep=keep,
            read=read,
        )


def kind_of(entry: Entry) -> str:
    """The kind of record that holds a modality's elements, where they aren't ids."""
    return "codes" if entry.kind == "codes" else "latents"


def global_id(entry: Entry, token: Tensor) -> int:
    """The vocabulary's id of an element; −1 where its content is sub-codes or a vector."""
    return entry.start + int(token) if entry.kind == "discrete" else -1


def gather_records(feeds: Sequence[Feed], lengths: Sequence[int]) -> dict[str, dict[str, Placed]]:
    """Records of all feeds of a pass, by kind and name, at their places in the packed stream."""
    gathered: dict[tuple[str, str], list[Placed]] = {}
    base = 0
    for feed, length in zip(feeds, lengths, strict=True):
        for key, (vectors, index) in feed.records.items():
            gathered.setdefault(key, []).append(Placed(values=vectors, index=index + base))
        base += length
    out: dict[str, dict[str, Placed]] = {}
    for (kind, name), parts in gathered.items():
        out.setdefault(kind, {})[name] = join(parts)
    return out
