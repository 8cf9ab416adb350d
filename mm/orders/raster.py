"""Raster order: one element after another, each predicted by the position before it (Liquid, LlamaGen, Chameleon, Orthus)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from mm.grid import coordinates, given_prefix
from mm.interfaces import Encoded, Layout, Order, Proposal, Sampling, Session, Spec


class Raster(Order):
    """x1 … xn in storage order, causal. `prefix=True` gives the elements of a *context* item one order, so that they see each
    other (prefix-LM: Parti's bidirectional prompt); items to be learned stay causal. `along`: as `Order.along`."""

    free = True

    def __init__(self, prefix: bool = False, along: bool = False) -> None:
        self.prefix, self.along = prefix, along

    def check(self, spec: Spec) -> None:
        super().check(spec)
        if spec.is_free and self.along:
            raise ValueError(
                "a list of free length can't run along a text, for its extent isn't known; leave along out"
            )

    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        count = len(encoded)
        together = self.prefix and context
        element = torch.arange(count)
        target = element + 1
        if together:
            target = torch.where(target == count, target, -1)
        return Layout(
            element=element,
            order=torch.zeros_like(element) if together else element,
            position=coordinates(encoded.grid),
            time=torch.zeros(count),
            copy=torch.zeros_like(element),
            target=target,
            enters=not together,
        )

    def session(
        self,
        grid: tuple[int, ...],
        sampling: Sampling,
        rng: torch.Generator,
        known: tuple[Tensor, Bool[Tensor, " N"]] | None = None,
        dim: int = 0,
        num_codes: int = 0,
    ) -> Session:
        return RasterSession(grid, known)


class RasterSession(Session):
    """Element by element; given elements must be a prefix, and are accepted without being sampled. Without a grid it goes on to
    `stop`, or as far as there is room."""

    def __init__(self, grid: tuple[int, ...], known: tuple[Tensor, Tensor] | None) -> None:
        self.grid = grid
        self.drawn: list[Tensor] = []
        if known is not None:
            first = given_prefix(known, grid)
            self.drawn = [first[i : i + 1] for i in range(len(first))]

    def propose(self) -> Proposal | None:
        made, count = len(self.drawn), math.prod(self.grid) if self.grid else self.most
        if made >= count or (not self.grid and made and int(self.drawn[-1]) == self.stop):
            return None
        return Proposal(autoregressive=True, done=made / count)

    def accept(self, sample: Tensor, log_prob: Tensor | None) -> None:
        self.drawn.append(sample)

    def content(self) -> Tensor:
        return torch.cat(self.drawn) if self.drawn else torch.zeros(0, dtype=torch.int64)

    def final(self) -> int:
        return len(self.drawn)
