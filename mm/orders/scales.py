"""Scales: an item as ever finer grids, all elements of a grid at once, coarsest first (VAR, Tian et al. 2024; SAR3D for planes).

A position predicts its own element. It doesn't read it, but what the scales before have made up, shrunk to its own scale: a
vector that the tokenizer works out of their ids (`ModalityTokenizer.scale_inputs`), beside which stand its scale and its plane;
at the first scale, where there is nothing yet, these alone are the learned start. One order number a scale: a scale sees all of
those before it and itself.

In generation each scale is one pass, whose positions stay in the cache: they are those of training, since they read nothing of
their own scale. So what comes after an item sees all of its scales but what was drawn at the last one. An item that is given (a
prompt) is read whole: its elements, and what the scales up to and with theirs make up; it may end with any scale.

Letters in shapes: N elements of all scales, P positions, D width of the tokenizer's vectors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.grid import coordinates
from mm.interfaces import Encoded, Layout, ModalityTokenizer, Order, Proposal, Sampling, Session, Spec


class Scales(Order):
    """Scale by scale. With `Sampling(guidance=1 + cfg, guidance_schedule="ramp")` guidance grows over the scales as in VAR.

    Args:
        name: of what positions read, among what is injected: two modalities of one model that have scales need two names.
    """

    scaled = True

    def __init__(self, name: str = "coarser") -> None:
        self.name = name
        self.vectors: Mapping[str, int] = {}

    def check(self, spec: Spec) -> None:
        if not spec.scales:
            raise ValueError(
                "the scales order is for items of several scales, those of this tokenizer have one grid; use raster or masked"
            )

    def attach(self, tokenizer: ModalityTokenizer) -> None:
        spec = tokenizer.spec
        self.check(spec)
        self.tokenizer, self.spec = tokenizer, spec
        shared = len({scale[0] for scale in spec.scales}) == 1 and len(spec.max_grid) > 2
        self.planes = spec.max_grid[0] if shared else 1
        self.until = list(itertools.accumulate(math.prod(scale) for scale in spec.scales))
        self.place = torch.cat([centres(scale, spec.max_grid) for scale in spec.scales])
        number = torch.arange(len(spec.scales)).repeat_interleave(torch.tensor([0, *self.until]).diff())
        plane = torch.cat([torch.arange(n) * self.planes // n for n in map(math.prod, spec.scales)])
        self.number = number
        facts = [F.one_hot(number, len(spec.scales))]
        facts += [F.one_hot(plane, self.planes)] if self.planes > 1 else []
        self.facts = torch.cat(facts, dim=1).float()
        self.vectors = {self.name: spec.scale_dim + self.facts.shape[1]}

    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        ids, known = encoded.ids, self.spec.scales[: len(encoded.scales)]
        if ids is None or not encoded.scales or encoded.scales != known:
            raise ValueError(
                f"this scales order lays out ids of the first of the scales {self.spec.scales}, got {encoded.scales}"
            )
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= self.spec.vocab_size:
            raise ValueError(f"ids span {low}..{high}, but the tokenizer has 0..{self.spec.vocab_size - 1}")
        return self.positions(self.tokenizer.scale_inputs(ids.long(), own=context), 0, len(known), given=context)

    def positions(self, read: Float[Tensor, "n D"], first: int, last: int, *, given: bool = False) -> Layout:
        """Scales from `first` up to, without, `last`; `read`: what those of the scales from 0 on read."""
        element = torch.arange(self.begin(first), self.begin(last))
        return Layout(
            element=element,
            order=self.number[element],
            position=self.place[element],
            time=torch.full((len(element),), 0.0 if given else 1.0),
            copy=torch.zeros_like(element),
            target=torch.full_like(element, -1) if given else torch.arange(len(element)),
            enters=False,
            inject={self.name: torch.cat((read[element], self.facts[element]), dim=1)},
        )

    def begin(self, scale: int) -> int:
        """The first element of a scale."""
        return self.until[scale - 1] if scale else 0

    def session(
        self,
        grid: tuple[int, ...],
        sampling: Sampling,
        rng: torch.Generator,
        known: tuple[Tensor, Bool[Tensor, " N"]] | None = None,
        dim: int = 0,
        num_codes: int = 0,
    ) -> Session:
        return ScalesSession(self, len(self.spec.upto(grid)), known)


class ScalesSession(Session):
    """One pass a scale. Elements that are given take the place of those that are drawn, anywhere; scales that are given whole
    aren't asked for."""

    def __init__(self, order: Scales, total: int, known: tuple[Tensor, Tensor] | None) -> None:
        self.order, self.total, count = order, total, order.begin(total)
        self.ids = torch.zeros(count, dtype=torch.int64)
        self.given = torch.zeros(count, dtype=torch.bool)
        if known is not None:
            content, given = known
            if len(given) != count or len(content) != count:
                raise ValueError(
                    f"given elements cover {len(content)} and {len(given)} places, but the {total} scales have {count}"
                )
            self.ids, self.given = torch.where(given, content.long(), 0), given.bool()
        self.made, self.told = 0, 0
        self._skip()

    def _skip(self) -> None:
        """Past the scales that leave nothing to be drawn."""
        while self.made < self.total and bool(self.given[self._of(self.made)].all()):
            self.made += 1

    def _of(self, scale: int) -> slice:
        """The elements of a scale."""
        return slice(self.order.begin(scale), self.order.begin(scale + 1))

    def _read(self, scales: int) -> Float[Tensor, "n D"]:
        """What the positions of the first scales and of the next one read."""
        return self.order.tokenizer.scale_inputs(self.ids[: self.order.begin(scales)])

    def propose(self) -> Proposal | None:
        if self.made == self.total:
            return None
        return Proposal(
            autoregressive=False,
            done=self.made / max(self.total - 1, 1),
            content=self.ids,
            layout=self.order.positions(self._read(self.made), self.made, self.made + 1),
            keep=True,
        )

    def accept(self, sample: Tensor, log_prob: Tensor | None) -> None:
        self.ids, place = self.ids.clone(), self._of(self.made)  # what was given out before stays as it was
        self.ids[place] = torch.where(self.given[place], self.ids[place], sample.to(self.ids))
        self.made += 1
        self.told = self.made  # its pass stays in the cache
        self._skip()

    def settled(self) -> Layout | None:
        if self.told == self.made:
            return None
        first, self.told = self.told, self.made
        return self.order.positions(self._read(self.made - 1), first, self.made)

    def content(self) -> Int[Tensor, " N"]:
        """The elements of the scales that are there."""
        return self.ids[: self.final()]

    def final(self) -> int:
        return self.order.begin(self.made)


def centres(scale: tuple[int, ...], finest: tuple[int, ...]) -> Float[Tensor, "P 3"]:
    """Rotary coordinates of a scale's cells: their centres on the finest grid, whose own cells have whole numbers."""
    ratio = torch.tensor([1.0, 1.0] + [whole / own for own, whole in zip(scale, finest, strict=True)])[-3:]
    return (coordinates(scale) + 0.5) * (ratio if len(scale) > 1 else ratio[-1:]) - 0.5
