"""One row of the engine: its state machine {text, extents, item, done}, and what it feeds in each pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.fusion import Alongside
from mm.grid import coordinates
from mm.interfaces import Automaton, Encoded, Layout, Proposal, Sampling, Session
from mm.layout import Segment, Span, holdings
from mm.limits import Limits
from mm.request_checks import check_request
from mm.tracks import Feed, Track
from mm.twins import open_twins

if TYPE_CHECKING:
    from mm.generation import Grid, Request
    from mm.model import MultimodalModel
    from mm.vocabulary import Entry

ALLOWED, FORBIDDEN = torch.tensor(0.0), torch.tensor(float("-inf"))


class Row:
    def __init__(self, model: MultimodalModel, number: int, request: Request) -> None:
        check_request(model, request)
        self.model, self.number, self.request = model, number, request
        self.vocabulary, self.grammar, self.limits = model.vocabulary, model.grammar, Limits(model, request)
        self.generator = torch.Generator().manual_seed(request.seed)
        self.main = Track(number)
        self.twins: list[Track] = []
        self.segments: list[Segment] = []
        self.text: list[int] = []
        self.forced = [self._encoded(item) if isinstance(item, Segment) else item for item in request.items]
        self.texts = int(request.text and request.max_tokens > 1)
        self.parts, self.share = max(1, self._left() + self.texts), 0.0
        self.known = request.known
        self.owing = True
        """Whether items that were asked for may still come."""
        self.session: Session | None = None
        self.proposal: Proposal | None = None
        self.state = "text"
        self.news: tuple[str, Callable[[], Tensor], float, int] | None = None
        self.head, self.item = 0, 0
        self.grid: tuple[int, ...] = ()
        self.within: range | None = None
        """Bounds of the extent that is being asked for, or of an item of free length, and what the extent is multiplied by."""
        self.stretch = 1.0
        self.alongside: Alongside | None = None
        """Of the open item."""
        self.automaton: Automaton | None = None
        """Of the open item, if it has one."""
        self.passed: dict[str, int] = {}
        """By modality, elements of items that are complete: what comes alongside goes on behind them."""
        for name in request.alongside:
            self._alongside(name).check(self.limits.least(name, self.forced))  # refused now, if it has to be
        self._prompt()
        forced = most = 0
        for item in self.forced:
            needed = self.limits.needed(item)
            forced, most = forced + needed[0], most + needed[1]
        limit = self.main.length + most + (request.max_tokens if request.text else 0)
        if self.main.length + forced + bool(request.text) > model.context:
            raise ValueError(
                f"the prompt takes {self.main.length} positions and what is asked for {forced + bool(request.text)}, but the "
                f"context holds {model.context}; shorten the prompt"
            )
        self.limit = min(limit, model.context)
        free = self.limits.openable() if request.free else []
        names = [item[0] for item in self.forced if not isinstance(item, Segment)] + free
        # a twin adds `bos null` to an item that fits the row; some items are evaluated once more beside themselves
        self.need = self.limit + 2 + self.limits.beside(self.forced, free, self.limit)
        samplings = [self._sampling(name) for name in names]
        self.guided = any(sampling.guided for sampling in samplings)
        self.most_twins = max(((1 if s.context_guidance is None else 2) * s.guided for s in samplings), default=0)
        self._advance()

    def _sampling(self, name: str) -> Sampling:
        return self.request.by_modality.get(name, self.request.sampling)

    def _encoded(self, given: Segment) -> Segment:
        """A text that is given between items, as tokens."""
        if given.modality != self.vocabulary.host.name:
            raise ValueError(f"only texts can be given between items, got {given.modality}; put it into the prompt")
        return replace(given, content=self.model.build_document.encode(given), loss=False)

    def _alongside(self, name: str) -> Alongside:
        return self.limits.alongside(name, self.passed.get(name, 0))

    def _prompt(self) -> None:
        given = [replace(segment, loss=False) for segment in self.request.prompt]  # clean, whatever the default
        draft = self.model.build_document.draft(given, torch.Generator().manual_seed(0), close=False)
        stream = draft.stream()
        if len(stream) > self.model.context:
            raise ValueError(
                f"the prompt takes {len(stream)} positions, but the context holds {self.model.context}; shorten the prompt"
            )
        self.main.given(draft)

    # --- the state machine --------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Take every step that needs no model: forced openings, forced ends, the next state."""
        if self.session is not None:
            self.proposal = self.session.propose()
            if self.proposal is not None:
                return
            self._close()
        item = self.forced.pop(0) if self.forced else None
        while isinstance(item, Segment):
            self._give(item)
            item = self.forced.pop(0) if self.forced else None
        if item is not None:
            self._open_item(*item, self.request.stretch)
        elif not self.request.text:
            self.state = "done"
        else:
            self.state, self.head = "text", 0
            if self.owing:  # what is left of the room for items isn't for text
                self.owing, self.limit = False, min(self.limit, self.main.length + self.request.max_tokens)
            if self.limit - self.main.length < 2:  # what is left is `eos`, which needs no asking
                self._finish()

    def _give(self, text: Segment) -> None:
        """A text that stands between items."""
        ids = text.content.ids.tolist()
        self.main.span = Span(self.main.cursor, len(ids))
        self.main.controls(ids)
        self.segments.append(text)

    def _open(self, name: str) -> None:
        self._end_text()
        self.item = self.vocabulary.index[name]
        self.main.controls([self.vocabulary.begin(name)])
        context = [*self.request.prompt, *self.segments]
        self.twins = open_twins(self.model, self.number, context, self._sampling(name))
        for twin in self.twins:
            twin.controls([self.vocabulary.begin(name)])

    def _open_item(self, name: str, grid: Grid, stretch: float) -> None:
        """An item of these extents, of all of its scales, or of extents that are asked for next, if it has any."""
        self._open(name)
        spec, order = self.limits.spec(name), self.limits.modality(name).order
        if grid is None and spec.scales:
            grid = spec.max_grid
        self.grid, self.within = (grid, None) if isinstance(grid, tuple) else ((), grid)
        self.stretch = stretch
        if self.grid:
            self._extents(self.vocabulary.opening(name, order.announced(self.grid))[1:])
        if self.grid or spec.is_free:
            self._begin_session()
        else:
            self.state, self.head = "extent", 0

    def _extents(self, ids: Sequence[int]) -> None:
        for track in self._tracks():
            track.controls(ids)

    def _begin_session(self) -> None:
        modality = self.model.modalities[self.item]
        known, self.known = self.known, None
        spec, sampling = modality.tokenizer.spec, self._sampling(modality.name)
        num_codes = spec.num_codes if spec.kind == "codes" else 0
        self.session = modality.order.session(self.grid, sampling, self.generator, known, spec.dim, num_codes)
        self.session.stop = spec.stop
        self.alongside, self.automaton = self._alongside(modality.name), None
        if spec.is_free:
            self.session.most = self._most(known)
            self.places = coordinates((self.session.most,)).tolist()
            self.automaton = modality.tokenizer.automaton() if self.request.constrained else None
        else:
            self.alongside.check(spec.count(self.grid))
            self.places = coordinates(self.grid).tolist()
        for track in self._tracks():
            track.enter(modality.order, self.item, self.grid)
        self.state, self.head, self.fed, self.orders, self.extent = "item", self.item, 0, 0, 0.0
        self._settle()
        self.proposal = self.session.propose()
        if self.proposal is None:
            self._advance()
            return
        if self.proposal.autoregressive and not self.session.lays_out:
            for token in self.session.content():
                self._feed_element(token)

    def _most(self, known: tuple[Tensor, Tensor] | None) -> int:
        """Elements that there is room for in the open list of free length. Raises `ValueError` where as many are given."""
        most = self._inside() if self.within is None else min(self._inside(), self.within[-1])
        if known is not None and len(known[0]) >= most:
            raise ValueError(
                f"{len(known[0])} elements of {self.entry.name} are given, but there is room for {most}, of which one is to be "
                "generated; give fewer, or shorten the prompt"
            )
        return most

    def _settle(self) -> None:
        """What has become final before its item is complete enters the cache with the next pass."""
        assert self.session is not None
        layout = self.session.settled()
        if layout is not None:
            told = layout.reads is not None or layout.held is not None  # then nobody asks for the content
            content = torch.zeros(0) if told else self.session.content()
            for track in self._tracks():
                self._feed_layout(track, content, layout)
            self._entered(layout)
            if self.automaton is not None:
                for token in content[layout.element].tolist():
                    self.automaton.accept(token)
            if (left := self.session.forgets()) is not None:
                for track in self._tracks():
                    track.forget(*left)

    def _entered(self, layout: Layout) -> None:
        """These positions of the open item are in the cache with the next pass."""
        self.fed += len(layout.element)
        self.orders = max(self.orders, int(layout.order.max()) + 1)
        self.extent = max(self.extent, float(layout.position.max()) + 1.0)

    def _injecting(self, layout: Layout) -> Layout:
        """Positions of the open item, with what comes alongside its elements."""
        assert self.alongside is not None
        if not self.alongside.given:
            return layout
        elements, inverse = layout.element.unique(return_inverse=True)
        rows = self.alongside.at(elements.tolist())
        return replace(layout, inject=layout.inject | {name: values[inverse] for name, values in rows.items()})

    def _feed_layout(self, track: Track, content: Tensor, layout: Layout) -> None:
        """Clean elements of the open item, and what is injected beside them."""
        first, layout = len(track.ids), self._injecting(layout)
        held = holdings(content, layout) if layout.reads is None else layout.reads
        places = zip(held, layout.order.tolist(), layout.position.tolist(), layout.time.tolist(), strict=True)
        for token, order, place, time in places:
            track.element(self.entry, self.item, token, order, place, time)
        for name, vectors in layout.inject.items():
            for where, vector in enumerate(vectors, first):
                track.record("inject", name, vector, where)

    @property
    def entry(self) -> Entry:
        """The vocabulary's entry of the open item."""
        return self.vocabulary.entries[self.item]

    def _feed_element(self, token: Tensor) -> None:
        assert self.alongside is not None
        rows = self.alongside.at([self.fed])
        for track in self._tracks():
            for name, vectors in rows.items():
                track.record("inject", name, vectors[0], len(track.ids))
            track.element(self.entry, self.item, token, self.fed, self.places[self.fed])
        if self.automaton is not None:
            self.automaton.accept(int(token))
        self.extent = max(self.extent, max(self.places[self.fed]) + 1.0)
        self.fed += 1
        self.orders = self.fed

    def _close(self) -> None:
        """The item is complete: keep it clean in the cache, end it, drop the twin."""
        assert self.session is not None
        modality, content = self.model.modalities[self.item], self.session.content()
        spec, self.twins = modality.tokenizer.spec, []
        assert self.alongside is not None
        grid, rows = (len(content),) if spec.is_free else self.grid, self.alongside.of(len(content))
        micro, ended = getattr(modality.order, "micro", ()), len(content) < math.prod(grid)
        encoded = spec.item(content, grid, micro=micro, ended=ended, alongside=rows)
        self.segments.append(Segment(modality.name, encoded))
        self.passed[modality.name] = self.passed.get(modality.name, 0) + len(content)
        if not self.fed:
            layout = modality.order.layout(encoded, context=True, rng=self.generator)
            self._feed_layout(self.main, content, layout)
            self._entered(layout)
        self.main.leave(self.orders, self.extent)
        self.main.controls([self.vocabulary.end(modality.name)])
        self.session = self.proposal = self.automaton = None

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
        content = proposal.content
        assert proposal.layout is not None and content is not None
        layout = self._injecting(proposal.layout)
        read = (layout.target >= 0).nonzero()[:, 0]
        if proposal.keep:
            self._entered(layout)
        return [t.scratch(self.entry, self.item, content, layout, read, proposal.keep) for t in self._tracks()]

    def sampling(self, head: int) -> Sampling:
        sampling = self._sampling(self.model.modalities[head].name)
        greedy = self.state == "item" and self.proposal is not None and self.proposal.greedy
        return replace(sampling, temperature=0.0) if greedy else sampling

    def bias(self) -> Tensor | None:
        """The grammar's bias on the head's logits, or None where every id is allowed."""
        room = self.limit - self.main.length
        if self.state == "text":
            names = self.limits.openable() if self.request.free else []
            openable = [n for n in names if self.limits.fits(n, room, self._alongside(n).room)]
            return self.grammar.text(tuple(openable), room > 1).to(self.model.device)
        if self.state == "extent":
            largest = self._largest_extent()
            lo, hi = (1, largest) if self.within is None else (self.within.start, min(self.within.stop - 1, largest))
            return self.grammar.extent(hi, min(lo, hi)).to(self.model.device)
        if self.automaton is not None:
            assert self.session is not None
            allowed = self.automaton.allowed(self.session.most - self.fed)
            return torch.where(allowed, ALLOWED, FORBIDDEN).to(self.model.device)
        return None

    def _inside(self) -> int:
        """The most elements of the open item, so that it fits, and those that are still to be opened."""
        name, room = self.entry.name, self.limit - self.main.length
        return self.limits.inside(name, len(self.grid), room, self.forced, self._alongside(name).room)

    def _largest_extent(self) -> int:
        """What the open item's next axis may be."""
        return self.grammar.largest(self.entry.name, self.grid, self._inside())

    def given(self) -> Tensor | None:
        """Sub-codes that the head needn't draw."""
        return None if self.state != "item" or self.proposal is None else self.proposal.given

    def accept(self, tokens: Tensor, log_prob: Tensor | None) -> None:
        """What the head drew for this row."""
        if self.state == "text":
            self._accept_text(int(tokens[0]))
        elif self.state == "extent":
            extent = int(tokens[0]) - self.vocabulary.extent(1) + 1
            if self.stretch != 1.0:
                extent = max(1, min(round(extent * self.stretch), self._largest_extent()))
            self.grid = (*self.grid, extent)
            self._extents([self.vocabulary.extent(extent)])
            if len(self.grid) == len(self.vocabulary.entries[self.item].max_grid):
                self._begin_session()
        else:
            assert self.session is not None
            session, name = self.session, self.vocabulary.entries[self.item].name
            before = max(0, self.parts - self.texts - self._left() - 1)
            session.accept(tokens, log_prob)
            if self.proposal is not None and self.proposal.autoregressive and not session.lays_out:
                self._feed_element(tokens[0])
            self._settle()
            self._advance()
            done = self.proposal.done if self.session is session and self.proposal is not None else 1.0
            self._share(before, done)
            self.news = (name, session.content, done, session.final())

    def _accept_text(self, token: int) -> None:
        if token < self.vocabulary.host.size:
            self.text.append(token)
            self.main.host(token)
            done = len(self.text) / max(1, self.request.max_tokens)
            self._share(self.parts - 1, done)
            self.news = (self.vocabulary.host.name, partial(torch.tensor, self.text), done, len(self.text))
            if self.limit - self.main.length < 2:  # what is left is `eos`, which needs no asking
                self._finish()
        elif token == self.vocabulary.control("eos"):
            self._finish()
        else:
            name = next(n for n in self.limits.openable() if self.vocabulary.begin(n) == token)
            self._open_item(name, None, 1.0)

    def _left(self) -> int:
        """Items that are still to be opened."""
        return sum(not isinstance(item, Segment) for item in self.forced)

    def _share(self, before: int, done: float) -> None:
        """So many parts of the row are complete, and this much of the next; what comes unasked takes nothing back."""
        self.share = max(self.share, min(1.0, (before + done) / self.parts))

    def event(self) -> tuple[str, Tensor, float, int, float] | None:
        """(modality, content so far, fraction done, elements that are final, fraction of the whole row) of what the last pass
        drew, once, for a progress callback."""
        if self.news is None:
            return None
        (name, content, done, final), self.news = self.news, None
        return name, content(), done, final, self.share
