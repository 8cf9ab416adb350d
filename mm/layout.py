"""From a document (text, picture, text …) to a `TokenStream`: controls around the items, orders, positions, targets.

A document is `bos`, its segments, `eos`. A host segment (text) is its elements. Any other segment is an item: begin, the
extent of each axis, the elements as the item's order lays them out, end. Rotary coordinates run on from segment to segment: an
item with axes starts at the cursor on all three, and what follows continues after its largest coordinate (as in Qwen2-VL).
Where an item runs along the text before it (`Order.along`), its N elements stand at start + i·η with η = elements of the text / N
(ARDiT, section 3.2), and what follows continues after the item's opening. An item of another modality that
follows one that ran along a text, and has such an order too, runs along the same text (prosody, then the sound that has it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.fusion import check_alongside
from mm.interfaces import Encoded, Layout, Modality, Order
from mm.stream import Placed, TokenStream, join
from mm.vocabulary import Vocabulary

NULL = "null"


class Span(NamedTuple):
    """A text that the next item may run along."""

    start: float
    """Where it begins on the rotary axes."""
    elements: int
    """How many it has."""
    ran: frozenset[int] = frozenset()
    """Modalities whose items ran along it already: each does once."""


def stretch(
    order: Order, number: int, grid: Sequence[int], cursor: float, span: Span | None
) -> tuple[tuple[float, float], Span | None]:
    """Where an item of modality `number` begins on the rotary axes, and how far apart its elements stand: 1, unless it runs along
    the text before; and what the next item may run along."""
    if not order.along or span is None or len(grid) != 1 or not grid[0] or not span.elements or number in span.ran:
        return (cursor, 1.0), None
    return (span.start, span.elements / grid[0]), span._replace(ran=span.ran | {number})


def holdings(content: Tensor, layout: Layout) -> Tensor:
    """What each position of an item holds."""
    return content[layout.element] if layout.held is None else layout.held


def with_rows(layout: Layout, rows: dict[str, Tensor]) -> Layout:
    """The layout with what comes alongside its elements: each position reads the row of the element that it holds."""
    return replace(layout, inject=layout.inject | {name: values[layout.element] for name, values in rows.items()})


@dataclass(frozen=True)
class Segment:
    """One part of a document. `content` is raw data or `Encoded`; modality `"null"` (no content) is the absent condition."""

    modality: str
    content: Any = None
    loss: bool = True
    """False: given, not learned (a prompt)."""


class DocumentBuilder:
    """Turns documents into streams for one list of modalities."""

    def __init__(self, modalities: Sequence[Modality], vocabulary: Vocabulary) -> None:
        self.modalities, self.vocabulary = list(modalities), vocabulary

    def encode(self, segment: Segment) -> Encoded:
        if isinstance(segment.content, Encoded):
            return segment.content
        return self.modalities[self.vocabulary.index[segment.modality]].tokenizer.encode(segment.content)

    def _check_width(self, modality: Modality, encoded: Encoded) -> None:
        spec, content = modality.tokenizer.spec, encoded.content
        wanted = spec.dim if spec.kind == "continuous" else spec.num_codes
        fits = content.ndim == 2 and content.shape[1] == wanted and content.is_floating_point() == (spec.dim > 0)
        if not fits:
            raise ValueError(
                f"{modality.name}: its content has shape {tuple(content.shape)} of {content.dtype}, expected {wanted} "
                f"{'numbers' if spec.dim else 'sub-codes'} an element"
            )
        if spec.kind == "codes" and len(content):
            low, high = (int(x) for x in content.aminmax())
            if low < 0 or high >= spec.vocab_size:
                raise ValueError(
                    f"{modality.name}: sub-codes span {low}..{high}, but its tokenizer has 0..{spec.vocab_size - 1}"
                )
        if spec.kind == "continuous" and not bool(content.isfinite().all()):
            raise ValueError(
                f"{modality.name}: its vectors hold values that are not numbers; look at what encoded them"
            )

    def __call__(self, document: Sequence[Segment], rng: torch.Generator, *, close: bool = True) -> TokenStream:
        """The stream of one document. `close=False` leaves out `eos` (a prompt to be continued)."""
        return self.draft(document, rng, close=close).stream()

    def draft(self, document: Sequence[Segment], rng: torch.Generator, *, close: bool = True) -> Draft:
        """The document's positions before they become a stream."""
        draft = Draft(self.vocabulary)
        draft.controls([self.vocabulary.control("bos")], 0.0)
        for segment in document:
            if segment.modality == NULL:
                draft.controls([self.vocabulary.control("null")], 0.0)
                draft.span = None
                continue
            entry = self.vocabulary[segment.modality]
            number = self.vocabulary.index[segment.modality]
            modality = self.modalities[number]
            encoded = self.encode(segment)
            if entry.kind != "discrete":
                self._check_width(modality, encoded)
            host_weight = self.modalities[0].weight if segment.loss else 0.0
            if number:
                told = modality.order.announced(encoded.grid)
                draft.controls(self.vocabulary.opening(entry.name, told), host_weight)
            layout = modality.order.layout(encoded, context=not segment.loss, rng=rng)
            if encoded.alongside:
                check_alongside(encoded, modality.tokenizer.spec, entry.name)
                layout = with_rows(layout, encoded.alongside)
            if number:
                place, draft.span = stretch(modality.order, number, encoded.grid, draft.cursor, draft.span)
            else:
                place, draft.span = (draft.cursor, 1.0), Span(draft.cursor, len(encoded))
            draft.item(number, encoded.content, layout, modality.weight if segment.loss else 0.0, *place)
            if number:
                draft.controls([self.vocabulary.end(entry.name)], host_weight)
        if close:
            learned = bool(document) and document[-1].loss and document[-1].modality != NULL
            draft.controls([self.vocabulary.control("eos")], self.modalities[0].weight if learned else 0.0)
        return draft


class Draft:
    """Positions of one document while it is being laid out. `span` is the text that the next item may run along, if any;
    `predictor` is the position whose hidden state predicts what comes next, or −1 where nothing does (after a masked picture)."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.parts: dict[str, list[Tensor]] = {}
        self.links: list[tuple[int, int, float]] = []
        self.records: dict[str, dict[str, list[Placed]]] = {"codes": {}, "latents": {}, "inject": {}}
        self.length = self.order = 0
        self.cursor = 0.0
        self.span: Span | None = None
        self.predictor = -1

    def controls(self, ids: Sequence[int], weight: float) -> None:
        for offset in range(len(ids)):
            if self.predictor >= 0 and weight:
                self.links.append((self.predictor, self.length + offset, weight))
            self.predictor = self.length + offset
        count = len(ids)
        steps = torch.arange(count)
        self._append(
            modality=torch.zeros(count, dtype=torch.int64),
            ids=torch.tensor(ids, dtype=torch.int64),
            order=self.order + steps,
            copy=torch.zeros(count, dtype=torch.int64),
            position=(self.cursor + steps).float()[:, None].expand(-1, 3),
            time=torch.zeros(count),
            target=torch.full((count,), -1),
            weight=torch.zeros(count),
        )
        self.length += count
        self.order += count
        self.cursor += count

    def item(self, number: int, content: Tensor, layout: Layout, weight: float, start: float, rate: float) -> None:
        """The elements of one item, `rate` apart from `start` on (rotary coordinates)."""
        count = len(layout.element)
        if not count:
            return
        entry, held = self.vocabulary.entries[number], holdings(content, layout)
        ids, places = torch.full((count,), -1), self.length + torch.arange(count)
        if entry.kind == "discrete":
            low, high = (int(x) for x in content.aminmax())
            if low < 0 or high >= entry.size:
                raise ValueError(f"{entry.name}: ids span {low}..{high}, but its tokenizer has 0..{entry.size - 1}")
            ids = held.long() + entry.start
        else:
            kind = "codes" if entry.kind == "codes" else "latents"
            record = Placed(values=held.long() if kind == "codes" else held, index=places, reads=layout.reads)
            self.records[kind].setdefault(entry.name, []).append(record)
        for name, vectors in layout.inject.items():
            self.records["inject"].setdefault(name, []).append(Placed(values=vectors, index=places))
        if layout.enters and weight and self.predictor >= 0:
            self.links.append((self.predictor, self.length, weight))
        inside = (layout.target >= 0) & (layout.target < count) if weight else torch.zeros(count, dtype=torch.bool)
        self._append(
            modality=torch.full((count,), number),
            ids=ids,
            order=self.order + layout.order,
            copy=layout.copy,
            position=start + rate * layout.position,
            time=layout.time,
            target=torch.where(inside, layout.target + self.length, -1),
            weight=torch.where(inside, weight, 0.0),
        )
        leaving = (layout.target == count).nonzero()
        self.predictor = self.length + int(leaving[0]) if len(leaving) else -1
        self.length += count
        self.order += int(layout.order.max()) + 1
        if start == self.cursor:
            self.cursor += float(layout.position.max()) + 1.0

    def _append(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.parts.setdefault(name, []).append(value)

    def stream(self) -> TokenStream:
        merged: dict[str, Any] = {name: torch.cat(values) for name, values in self.parts.items()}
        if self.links:
            where, target, weight = zip(*self.links, strict=True)
            index = torch.tensor(where)
            merged["target"][index] = torch.tensor(target)
            merged["weight"][index] = torch.tensor(weight)
        records = {kind: {name: join(parts) for name, parts in named.items()} for kind, named in self.records.items()}
        stream = TokenStream(document=torch.zeros(self.length, dtype=torch.int64), **merged | records)
        stream.__dict__["lengths"] = [self.length]
        return stream
