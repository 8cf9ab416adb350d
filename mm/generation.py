"""The generation engine: one state machine a row, one packed backbone pass a step, rows of a batch in different modes.

A row writes text (host tokens) until the grammar or the model opens an item; states its extent; generates the item by the step
plan of its order; closes it; goes on with text, or is done. The grammar is certain, not learned: what the row may emit next is
decided here, for every row independently. Guidance runs an unconditional twin of a row (`bos null`, then the item), opened with
the item and dropped at its end. Each row has its own random generator, so a seed means the same in any batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mm.cache import Chunk, KVCache
from mm.decoding import SingleStep
from mm.fusion import Given
from mm.interfaces import Draw, Encoded, Sampling
from mm.layout import NULL, Segment
from mm.model import MultimodalModel
from mm.rows import Row
from mm.stream import TokenStream
from mm.tracks import Feed, gather_records

Grid = tuple[int, ...] | range | None
"""Extents of an item: given, chosen by the model within a range (of a list), or chosen by the model. A list of free length has
none to be given, `()`; `range(1, N + 1)` cuts it off at N elements."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one row is asked for."""

    prompt: Sequence[Segment]
    """What is given, in document order."""
    items: Sequence[tuple[str, Grid] | Segment] = ()
    """Items to open first, one after the other, each with its grid: [("image", (8, 8))]; between them may stand texts that are
    given. Without a grid, None, the model chooses the
    extents, sampling as for text; of a list within a range, if that is given: [("speech", range(8, 65))]."""
    stretch: float = 1.0
    """Extents of `items` that the model chose are multiplied by this, a number above 0, and rounded."""
    text: bool = True
    """After `items`: go on with text until `eos` (which may open items by itself, if `free`)."""
    free: bool = False
    """The model may open items of any non-host modality inside its text."""
    max_tokens: int = 256
    """Positions generated at the most, the end of the text (`eos`) one of them; items that would not fit are not opened."""
    sampling: Sampling = field(default_factory=Sampling)
    by_modality: dict[str, Sampling] = field(default_factory=dict)
    """Sampling for one modality, where it differs."""
    seed: int = 0
    known: tuple[Tensor, Tensor] | None = None
    """Given elements of the first item: (content, which are given). A list of free length goes on behind those that are given."""
    constrained: bool = True
    """Items of free length are written as their tokenizer's automaton allows, if it has one. Otherwise any id may follow any, and
    an item that hasn't ended where its room is used up is cut off (its last id isn't `Spec.stop`)."""
    alongside: Mapping[str, Given] = field(default_factory=dict)
    """By modality, what comes from elsewhere while its items are generated: {"speech": {"listening": rows}}, or a function in
    the place of the rows, which is asked for those of element 0, 1, … as their turn comes (live). A second item of the modality
    goes on with the row behind the last of the first. Where the model chooses the extent, it chooses none without rows."""


@dataclass(frozen=True)
class Event:
    """Progress of one row after a step."""

    row: int
    modality: str
    content: Tensor
    """Local ids, or vectors, of the segment so far."""
    done: float
    """Fraction of the segment."""
    final: int = 0
    """Leading elements that won't change any more."""
    share: float = 0.0
    """Fraction of the row, as far as its end is known: of all items that were asked for, and the text behind them."""
    rows: int = 0
    """All rows of the call, as far as they are known; 0: not said."""


class Engine:
    """Generates for batches of requests with one model."""

    def __init__(self, model: MultimodalModel) -> None:
        self.model = model

    def generate(
        self, requests: Sequence[Request], on_step: Callable[[Event], None] | None = None
    ) -> list[list[Segment]]:
        """The segments each row generated (content `Encoded`). Raises `ValueError` for a prompt longer than the context."""
        if not requests:
            return []
        model = self.model
        training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                made = self._run(requests, on_step)
        finally:
            model.train(training)
        # copies made outside inference mode are ordinary tensors, which training may use
        return [[replace(s, content=ordinary(s.content)) for s in row] for row in made]

    def _run(self, requests: Sequence[Request], on_step: Callable[[Event], None] | None) -> list[list[Segment]]:
        model, count = self.model, len(requests)
        rows = [Row(model, number, request) for number, request in enumerate(requests)]
        twins = max(row.most_twins for row in rows)
        if model.null_seen is False and any(row.guided for row in rows):
            warnings.warn(
                "guidance is on, but this model was trained without dropping its condition, so that what it is led away from "
                "means nothing; set guidance to 1, or train with templates that drop the condition (drop: 0.1)",
                stacklevel=4,
            )
        capacity = max(row.need for row in rows)
        cache = KVCache(
            model.backbone.config, count * (1 + twins), capacity, model.device, model.embedding.weight.dtype
        )
        step = SingleStep(model.backbone, cache) if SingleStep.fits(model.backbone) else None
        while self._pass(rows, cache, count, step):
            if on_step is not None:
                for row in rows:
                    event = row.event()
                    if event is not None:
                        on_step(Event(row.number, *event))
        return [row.segments for row in rows]

    def _pass(self, rows: list[Row], cache: KVCache, count: int, step: SingleStep | None) -> bool:
        """One pass of the rows, each at the place of its number; their twins begin at row `count` of the cache. False: nothing is
        left to do."""
        feeds = [feed for row in rows for feed in row.feeds()]
        if not feeds:
            return False
        for feed in feeds:
            if feed.reset:
                cache.reset(feed.slot(count))
        feeds.sort(key=lambda f: f.slot(count))
        hidden = self._forward(feeds, cache, count, step)
        for feed in feeds:
            if feed.forgotten is not None:
                cache.forget(feed.slot(count), feed.forgotten, self.model.backbone.rotary)
        self._sample(rows, feeds, hidden)
        return True

    def _forward(self, feeds: list[Feed], cache: KVCache, count: int, step: SingleStep | None) -> Tensor:
        chunks = [Chunk(feed.slot(count), feed.order, feed.copy, feed.keep) for feed in feeds]
        neighbours = chunks[-1].row - chunks[0].row == len(chunks) - 1
        if step is not None and neighbours and all(feed.plain for feed in feeds):
            position, every, late = torch.tensor([feed.position[0] for feed in feeds]), None, None
            if any(feed.records for feed in feeds):
                stream = assemble(feeds, self.model.device)
                x, late = self.model.embed(stream), self.model.injected(stream, "late")
                if (middle := self.model.injected(stream, "middle")) is not None:
                    every = self.model.added(torch.zeros_like(x), middle)
            else:
                x = self.model.embedding(torch.tensor([feed.ids[0] for feed in feeds]))
            hidden = self.model.added(step(x, position, chunks[0].row, every), late)
        else:
            hidden = self.model(assemble(feeds, self.model.device), cache.plan(chunks))
        cache.commit(chunks)
        return hidden

    def _sample(self, rows: list[Row], feeds: list[Feed], hidden: Tensor) -> None:
        """Give every row that reads its hidden states the tokens its head draws: one call a head for the whole batch."""
        base = 0
        wanted: dict[int, list[tuple[Row, Feed, Tensor]]] = {}
        twins: dict[tuple[int, int], Tensor] = {}
        for feed in feeds:
            length = len(feed.order)
            if feed.read is not None:
                states = (
                    hidden[base + length - 1 : base + length]
                    if isinstance(feed.read, str)
                    else hidden[base + feed.read]
                )
                if feed.branch:
                    twins[feed.row, feed.branch] = states
                else:
                    row = rows[feed.row]
                    wanted.setdefault(row.head, []).append((row, feed, states))
            base += length
        for head, asking in wanted.items():
            parts: list[Tensor] = []
            draws: list[Draw] = []
            at = 0
            for row, feed, own in asking:
                place = slice(at, at + len(own))
                parts.append(own)
                at += len(own)
                scale, context_scale = row.scales()
                beside: list[slice | None] = [None, None]
                for branch in (1, 2) if (scale, context_scale) != (1.0, 1.0) else ():
                    if (twin := twins.get((feed.row, branch))) is not None:
                        parts.append(twin)
                        beside[branch - 1] = slice(at, at + len(twin))
                        at += len(twin)
                draws.append(
                    Draw(
                        rows=place,
                        sampling=row.sampling(head),
                        generator=row.generator,
                        unconditional=beside[0],
                        scale=scale,
                        context=beside[1],
                        context_scale=context_scale,
                        bias=row.bias(),
                        given=row.given(),
                    )
                )
            name = self.model.modalities[head].name
            together = parts[0] if len(parts) == 1 else torch.cat(parts)
            for (row, _, _), (tokens, log_prob) in zip(
                asking, self.model.head(name).sample(together, draws), strict=True
            ):
                row.accept(tokens, log_prob)


def ordinary(content: Encoded) -> Encoded:
    """What inference mode made as tensors that can be used outside it."""
    made: dict[str, Any] = {}
    for name in ("ids", "codes", "latents"):
        if (value := getattr(content, name)) is not None:
            made[name] = value.clone()
    made["alongside"] = {name: rows.clone() for name, rows in content.alongside.items()}
    return replace(content, **made)


def assemble(feeds: Sequence[Feed], device: torch.device) -> TokenStream:
    """The positions of one pass as a stream (document = place in the pass)."""
    lengths = [len(feed.order) for feed in feeds]
    total = sum(lengths)
    zero = torch.zeros(total, dtype=torch.int64)
    if all(feed.time is None for feed in feeds):
        time = torch.zeros(total)
    else:
        time = torch.cat([torch.zeros(n) if f.time is None else f.time for f, n in zip(feeds, lengths, strict=True)])
    stream = TokenStream(
        modality=torch.tensor([m for feed in feeds for m in feed.modality]),
        ids=torch.tensor([i for feed in feeds for i in feed.ids]),
        document=torch.repeat_interleave(torch.arange(len(feeds)), torch.tensor(lengths))
        if len(feeds) < total
        else zero,
        order=zero,
        copy=zero,
        position=torch.tensor([p for feed in feeds for p in feed.position]),
        time=time,
        target=zero - 1,
        weight=torch.zeros(total),
        **gather_records(feeds, lengths),
    )
    return stream if device.type == "cpu" else stream.to(device)


__all__ = ["NULL", "Encoded", "Engine", "Event", "Request", "assemble"]
