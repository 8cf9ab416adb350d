"""One row of the engine: its state machine {text, extents, item, done}, and what it feeds in each pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.grid import coordinates
from mm.interfaces import Encoded, Layout, Proposal, Sampling, Session
from mm.layout import NULL, Segment
from mm.tracks import Feed, Track

if TYPE_CHECKING:
    from mm.generation import Request
    from mm.model import MultimodalModel
    from mm.vocabulary import Entry


class Row:
    def __init__(self, model: MultimodalModel, number: int, request: Request) -> None:
        self.model, self.number, self.request = model, number, request
        self.vocabulary, self.grammar = model.vocabulary, model.grammar
        self.generator = torch.Generator().manual_seed(request.seed)
        self.main = Track(number)
        self.twins: list[Track] = []
        self.segments: list[Segment] = []
        self.text: list[int] = []
        self.forced = list(request.items)
        self.known = request.known
        self.session: Session | None = None
        self.proposal: Proposal | None = None
        self.state = "text"
        self.news: tuple[str, Callable[[], Tensor], float] | None = None
        self.head, self.item = 0, 0
        self.grid: tuple[int, ...] = ()
        self._prompt()
        forced = 0
        for name, grid in self.forced:
            self._check_item(name, grid)
            forced += self.grammar.overhead(name) + math.prod(grid)
        if self.known is not None:
            self._check_known(self.known[0])
        limit = self.main.length + forced + (request.max_tokens if request.text else 0)
        if self.main.length + forced + bool(request.text) > model.context:
            raise ValueError(
                f"the prompt takes {self.main.length} positions and what is asked for {forced + bool(request.text)}, but the "
                f"context holds {model.context}; shorten the prompt"
            )
        self.limit = min(limit, model.context)
        self.need = self.limit + 2  # a twin adds `bos null` to an item that fits the row
        names = [name for name, _ in self.forced] + (self._openable_names() if request.free else [])
        samplings = [self._sampling(name) for name in names]
        self.guided = any(sampling.guided for sampling in samplings)
        self.most_twins = max(((1 if s.context_guidance is None else 2) * s.guided for s in samplings), default=0)
        self._advance()

    def _sampling(self, name: str) -> Sampling:
        return self.request.by_modality.get(name, self.request.sampling)

    def _check_item(self, name: str, grid: tuple[int, ...]) -> None:
        """Refuse what cannot be generated before anything runs."""
        entry = self.vocabulary[name]
        if entry is self.vocabulary.host:
            raise ValueError(f"{name} is written as text, not opened as an item; leave it out of `items`")
        if entry.kind == "codes":
            raise ValueError(f"this engine does not generate items of sub-codes yet, got {name}")
        self.vocabulary.opening(name, grid)

    def _check_known(self, content: Tensor) -> None:
        if not self.forced:
            raise ValueError("`known` gives elements of the first of `items`, but `items` is empty; name item and grid")
        entry = self.vocabulary[self.forced[0][0]]
        if entry.kind == "continuous":
            dim = self.model.modalities[self.vocabulary.index[entry.name]].tokenizer.spec.dim
            if content.ndim != 2 or content.shape[1] != dim or not bool(content.isfinite().all()):
                raise ValueError(
                    f"`known` has shape {tuple(content.shape)}; {entry.name} needs finite vectors of width {dim}"
                )
            return
        low, high = (int(x) for x in content.aminmax()) if len(content) else (0, 0)
        if low < 0 or high >= entry.size:
            raise ValueError(f"`known` holds ids {low}..{high}; those of {entry.name} are 0..{entry.size - 1}")

    def _prompt(self) -> None:
        given = [replace(segment, loss=False) for segment in self.request.prompt]  # clean, whatever the default
        draft = self.model.build_document.draft(given, torch.Generator().manual_seed(0), close=False)
        stream = draft.stream()
        if len(stream) > self.model.context:
            raise ValueError(
                f"the prompt takes {len(stream)} positions, but the context holds {self.model.context}; shorten the prompt"
            )
        if stream.codes:
            raise ValueError("prompts with sub-codes are not supported by this engine yet")
        self.main.given(draft)

    # --- the state machine --------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Take every step that needs no model: forced openings, forced ends, the next state."""
        if self.session is not None:
            self.proposal = self.session.propose()
            if self.proposal is not None:
                return
            self._close()
        if self.forced:
            name, self.grid = self.forced.pop(0)
            self._open(name)
            self._extents(self.vocabulary.opening(name, self.grid)[1:])
            self._begin_session()
        elif not self.request.text:
            self.state = "done"
        else:
            self.state, self.head = "text", 0
            if self.limit - self.main.length < 2:  # what is left is `eos`, which needs no asking
                self._finish()

    def _open(self, name: str) -> None:
        self._end_text()
        self.item = self.vocabulary.index[name]
        self.main.controls([self.vocabulary.begin(name)])
        self._open_twins(self._sampling(name))
        for twin in self.twins:
            twin.controls([self.vocabulary.begin(name)])

    def _open_twins(self, sampling: Sampling) -> None:
        """For guidance, what the item would be without the context: after `bos null`; and where the items of the context have
        a scale of their own, after `bos null` and those items."""
        self.twins = []
        if not sampling.guided:
            return
        scale, host = sampling.context_guidance, self.vocabulary.host.name
        items = [
            replace(s, loss=False) for s in (*self.request.prompt, *self.segments) if s.modality not in (host, NULL)
        ]
        apart = scale is not None and scale != sampling.guidance and bool(items)
        if sampling.guidance == 1.0 and not apart:
            return
        contexts = [[], items] if apart and scale != 1.0 else [items] if apart else [[]]
        for branch, context in enumerate(contexts, 1):
            twin = Track(self.number, branch)
            document = [Segment(NULL, None, loss=False), *context]
            twin.given(self.model.build_document.draft(document, torch.Generator().manual_seed(0), close=False))
            self.twins.append(twin)

    def _extents(self, ids: Sequence[int]) -> None:
        for track in self._tracks():
            track.controls(ids)

    def _begin_session(self) -> None:
        modality = self.model.modalities[self.item]
        known, self.known = self.known, None
        dim, sampling = modality.tokenizer.spec.dim, self._sampling(modality.name)
        self.session = modality.order.session(self.grid, sampling, self.generator, known, dim)
        self.places = coordinates(self.grid).tolist()
        for track in self._tracks():
            track.enter(modality.order, self.grid)
        self.state, self.head, self.fed, self.orders = "item", self.item, 0, 0
        self._settle()
        self.proposal = self.session.propose()
        if self.proposal is None:
            self._advance()
            return
        if self.proposal.autoregressive:
            for token in self.session.content():
                self._feed_element(token)

    def _settle(self) -> None:
        """What has become final before its item is complete enters the cache with the next pass."""
        assert self.session is not None
        layout = self.session.settled()
        if layout is not None:
            for track in self._tracks():
                self._feed_layout(track, self.session.content(), layout)
            self.fed += len(layout.element)
            self.orders = max(self.orders, int(layout.order.max()) + 1)

    def _feed_layout(self, track: Track, content: Tensor, layout: Layout) -> None:
        """Clean elements of the open item, and what is injected beside them."""
        first = len(track.ids)
        places = zip(content[layout.element], layout.order.tolist(), layout.position.tolist(), strict=True)
        for token, order, place in places:
            track.element(self.entry, self.item, token, order, place)
        for name, vectors in layout.inject.items():
            for where, vector in enumerate(vectors, first):
                track.record("inject", name, vector, where)

    @property
    def entry(self) -> Entry:
        """The vocabulary's entry of the open item."""
        return self.vocabulary.entries[self.item]

    def _feed_element(self, token: Tensor) -> None:
        for track in self._tracks():
            track.element(self.entry, self.item, token, self.fed, self.places[self.fed])
        self.fed += 1
        self.orders = self.fed

    def _close(self) -> None:
        """The item is complete: keep it clean in the cache, end it, drop the twin."""
        assert self.session is not None
        modality, content = self.model.modalities[self.item], self.session.content()
        self.twins = []
        micro = getattr(modality.order, "micro", ())
        if self.entry.kind == "continuous":
            encoded = Encoded(grid=self.grid, latents=content, micro=micro)
        else:
            encoded = Encoded(grid=self.grid, ids=content, micro=micro)
        self.segments.append(Segment(modality.name, encoded))
        orders = self.orders
        if not self.fed:
            layout = modality.order.layout(encoded, context=True, rng=self.generator)
            self._feed_layout(self.main, content, layout)
            orders = int(layout.order.max()) + 1
        self.main.leave(orders, max(max(place) for place in self.places) + 1.0)
        self.main.controls([self.vocabulary.end(modality.name)])
        self.session = self.proposal = None

    def _end_text(self) -> None:
        if self.text:
            ids = torch.tensor(self.text)
            self.segments.append(Segment(self.vocabulary.host.name, Encoded(grid=(len(ids),), ids=ids)))
            self.text = []

    def _finish(self) -> None:
        self._end_text()
        self.state = "done"

    def scales(self) -> tuple[float, float]:
        """Guidance scales of the current step: of the whole context, and of its items."""
        if not self.twins or self.proposal is None:
            return 1.0, 1.0
        sampling, done = self._sampling(self.model.modalities[self.item].name), self.proposal.done
        scale = sampling.scale(done)
        return scale, (sampling.context_scale(done) if len(self.twins) > 1 else scale)

    # --- what the engine asks -----------------------------------------------------------------------------------------

    def _tracks(self) -> list[Track]:
        return [self.main, *self.twins]

    def feeds(self) -> list[Feed]:
        if self.state == "done":
            return []
        proposal = self.proposal
        if proposal is None or proposal.autoregressive:
            return [track.flush("last") for track in self._tracks()]
        if self.main.ids:  # context first; the item under way is evaluated in the next pass
            return [track.flush(None) for track in self._tracks()]
        layout, content = proposal.layout, proposal.content
        assert layout is not None and content is not None
        read = (layout.target >= 0).nonzero()[:, 0]
        return [track.scratch(self.entry, self.item, content, layout, read) for track in self._tracks()]

    def sampling(self, head: int) -> Sampling:
        return self._sampling(self.model.modalities[head].name)

    def bias(self) -> Tensor | None:
        """The grammar's bias on the head's logits, or None where every id is allowed."""
        room = self.limit - self.main.length
        if self.state == "text":
            openable = tuple(n for n in self._openable_names() if room >= self.grammar.overhead(n) + 2)
            return self.grammar.text(openable if self.request.free else (), room > 1).to(self.model.device)
        if self.state == "extent":
            name = self.vocabulary.entries[self.item].name
            inside = room - self.grammar.overhead(name) + 1 + len(self.grid)
            return self.grammar.extent(self.grammar.largest(name, self.grid, inside)).to(self.model.device)
        return None

    def _openable_names(self) -> list[str]:
        return [entry.name for entry in self.vocabulary.entries[1:] if entry.max_grid and entry.kind != "codes"]

    def accept(self, tokens: Tensor, log_prob: Tensor | None) -> None:
        """What the head drew for this row."""
        if self.state == "text":
            self._accept_text(int(tokens[0]))
        elif self.state == "extent":
            self.grid = (*self.grid, int(tokens[0]) - self.vocabulary.extent(1) + 1)
            self._extents([int(tokens[0])])
            if len(self.grid) == len(self.vocabulary.entries[self.item].max_grid):
                self._begin_session()
        else:
            assert self.session is not None
            session, name = self.session, self.vocabulary.entries[self.item].name
            session.accept(tokens, log_prob)
            if self.proposal is not None and self.proposal.autoregressive:
                self._feed_element(tokens[0])
            self._settle()
            self._advance()
            done = self.proposal.done if self.session is session and self.proposal is not None else 1.0
            self.news = (name, session.content, done)

    def _accept_text(self, token: int) -> None:
        if token < self.vocabulary.host.size:
            self.text.append(token)
            start = self.main.span[0] if self.main.span and len(self.text) > 1 else self.main.cursor
            self.main.span = (start, len(self.text))
            self.main.controls([token])
            done = len(self.text) / max(1, self.request.max_tokens)
            self.news = (self.vocabulary.host.name, partial(torch.tensor, self.text), done)
            if self.limit - self.main.length < 2:  # what is left is `eos`, which needs no asking
                self._finish()
        elif token == self.vocabulary.control("eos"):
            self._finish()
        else:
            name = next(n for n in self._openable_names() if self.vocabulary.begin(n) == token)
            self._open(name)
            self.grid, self.state, self.head = (), "extent", 0

    def event(self) -> tuple[str, Tensor, float] | None:
        """(modality, content so far, fraction done) of what the last pass drew, once, for a progress callback."""
        if self.news is None:
            return None
        (name, content, done), self.news = self.news, None
        return name, content(), done
