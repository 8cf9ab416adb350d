"""Masked order: all elements at once, a random part of them hidden (MaskGIT, Meissonic, Show-o; MAR, MMAR for vectors).

Training (MaskGIT, Chang et al. 2022, section 3.2): t ~ U(0, 1), a share cos(πt/2) of the elements is hidden, the loss is on
those. Decoding: T parallel steps; after step i the floor(N·cos(π/2·(i + 1)/T)) elements of least confidence are hidden
again, where confidence = log p(drawn) + τ·Gumbel noise and τ anneals linearly to 0 (as in aMUSEd).

MAR (Li et al. 2024, section 3.3 and appendix B) draws the hidden share from a normal distribution around 1 with deviation
0.25, cut to 0.7 … 1; MMAR evenly from 0.7 … 1, later from 0 … 1. They generate in an order drawn beforehand: each step
draws those elements only that it keeps, as heads without densities must.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.grid import coordinates
from mm.interfaces import Encoded, Layout, Order, Proposal, Sampling, Session

RATE = "mask_rate"


class Masked(Order):
    """One order for all elements of an item.

    Args:
        schedule: how the hidden share is drawn in training: `cosine`; `uniform` from `least` to 1; `normal` around 1, cut
            to `least` … 1.
        steps: passes in which an item is generated.
        choice_temperature: noise in the choice of what is kept, at the first step.
        rate_condition: the backbone is told the share, with `micro` facts about the item beside it (Meissonic); `micro` is
            the default used when generating.
        least: smallest share of `uniform` and `normal`.
        choice: what a step keeps: the most confident draws, or the next elements of a random order.
    """

    def __init__(
        self,
        schedule: Literal["cosine", "uniform", "normal"] = "cosine",
        steps: int = 12,
        choice_temperature: float = 2.0,
        rate_condition: bool = False,
        micro: tuple[float, ...] = (),
        least: float = 0.0,
        choice: Literal["confidence", "random"] = "confidence",
    ) -> None:
        if steps < 1:
            raise ValueError(f"masked order needs steps >= 1, got {steps}")
        if not 0 <= least < 1:
            raise ValueError(f"least is the smallest share that is hidden in training, from 0 to below 1; got {least}")
        self.schedule, self.default_steps, self.choice_temperature = schedule, steps, choice_temperature
        self.least, self.choice = least, choice
        self.rate_condition, self.micro = rate_condition, tuple(micro)
        if self.micro and not rate_condition:
            raise ValueError("micro-conditions need rate_condition=True; they travel together")

    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        count = len(encoded)
        hidden = torch.zeros(count, dtype=torch.bool)
        if not context and count:
            rate = self._rate(float(torch.rand((), generator=rng)))
            chosen = torch.randperm(count, generator=rng)[: max(1, round(count * rate))]
            hidden[chosen] = True
        return self._positions(encoded.grid, hidden, encoded.micro or self.micro)

    def _rate(self, draw: float) -> float:
        """The hidden share from a uniform number."""
        if self.schedule == "cosine":
            return math.cos(draw * math.pi / 2)
        if self.schedule == "uniform":
            return self.least + (1 - self.least) * draw
        # the normal distribution's lower half, cut at `least`, by inverting its cumulative distribution
        deviation, root = 0.25, math.sqrt(2.0)
        low = 0.5 * (1 + math.erf((self.least - 1) / (deviation * root)))
        quantile = low + (0.5 - low) * draw
        return min(
            1.0, max(self.least, 1 + deviation * root * float(torch.special.erfinv(torch.tensor(2 * quantile - 1))))
        )

    def _positions(self, grid: tuple[int, ...], hidden: Bool[Tensor, " N"], micro: tuple[float, ...]) -> Layout:
        element = torch.arange(len(hidden))
        inject = {}
        if self.rate_condition:
            if len(micro) != len(self.micro):
                raise ValueError(
                    f"this order conditions on {len(self.micro)} micro-conditions, the item has {len(micro)}"
                )
            facts = torch.tensor([float(hidden.float().mean()), *micro])
            inject[RATE] = facts.expand(len(hidden), -1)
        return Layout(
            element=element,
            order=torch.zeros_like(element),
            position=coordinates(grid),
            time=hidden.float(),
            copy=torch.zeros_like(element),
            target=torch.where(hidden, element, -1),
            enters=False,
            inject=inject,
        )

    @property
    def conditions(self) -> dict[str, int]:
        """Injected vectors by name and width."""
        return {RATE: 1 + len(self.micro)} if self.rate_condition else {}

    def session(
        self,
        grid: tuple[int, ...],
        sampling: Sampling,
        rng: torch.Generator,
        known: tuple[Tensor, Bool[Tensor, " N"]] | None = None,
        dim: int = 0,
        num_codes: int = 0,
    ) -> Session:
        return MaskedSession(self, grid, sampling.steps or self.default_steps, rng, known, dim, num_codes)


class MaskedSession(Session):
    """MaskGIT decoding; given elements are never hidden."""

    def __init__(
        self,
        order: Masked,
        grid: tuple[int, ...],
        steps: int,
        rng: torch.Generator,
        known: tuple[Tensor, Tensor] | None,
        dim: int,
        num_codes: int = 0,
    ) -> None:
        self.order, self.grid, self.steps, self.rng = order, grid, steps, rng
        self.count = math.prod(grid)
        self.step = 0
        shape = (self.count, num_codes) if num_codes else (self.count,)
        self.values = torch.zeros(self.count, dim) if dim else torch.zeros(shape, dtype=torch.int64)
        self.hidden = torch.ones(self.count, dtype=torch.bool)
        if known is not None:
            content, given = known
            if len(given) != self.count or len(content) != self.count:
                raise ValueError(
                    f"given elements cover {len(content)} and {len(given)} places, but the grid {grid} has {self.count}"
                )
            self.values, self.hidden = content.clone(), ~given
        self.unknown = int(self.hidden.sum())
        self.turn = torch.randperm(self.count, generator=rng) if order.choice == "random" else None

    def _asked(self) -> Bool[Tensor, " N"]:
        """Which hidden elements the next step draws: all, or those that it keeps."""
        if self.turn is None:
            return self.hidden
        places = self.turn[self.hidden[self.turn]]
        kept = len(places) - remaining(self.unknown, len(places), self.step + 1, self.steps)
        asked = torch.zeros_like(self.hidden)
        asked[places[:kept]] = True
        return asked

    def propose(self) -> Proposal | None:
        if not bool(self.hidden.any()):
            return None
        layout = self.order._positions(self.grid, self.hidden, self.order.micro)
        if self.turn is not None:
            layout = replace(layout, target=torch.where(self._asked(), layout.element, -1))
        done = 1.0 - float(self.hidden.float().mean())
        return Proposal(autoregressive=False, done=done, content=self.content(), layout=layout)

    def accept(self, sample: Tensor, log_prob: Float[Tensor, " n"] | None) -> None:
        self.values = self.values.clone()  # what `content` gave out before stays as it was
        asked = self._asked()
        open_places = asked.nonzero()[:, 0]
        self.values[open_places] = sample.to(self.values.dtype)
        self.step += 1
        if self.turn is not None:
            self.hidden = self.hidden & ~asked
            return
        if log_prob is None:
            raise ValueError(
                "the masked order ranks draws by log-probability, and this head gives none; set choice: random"
            )
        keep_hidden = remaining(self.unknown, len(open_places), self.step, self.steps)
        temperature = self.order.choice_temperature * (1.0 - (self.step - 1) / max(self.steps - 1, 1))
        noise = gumbel((len(open_places),), self.rng)
        worst = least_confident(log_prob, noise, temperature, keep_hidden)
        self.hidden = torch.zeros_like(self.hidden)
        self.hidden[open_places[worst]] = True

    def content(self) -> Tensor:
        return self.values


def remaining(count: int, hidden: int, step: int, steps: int) -> int:
    """Elements still hidden after `step` of `steps`: floor(count·cos(π/2·step/steps)), at least 1 and at least one
    fewer than before, 0 after the last step. `count`: hidden before the first step. In float32, which decides where the
    product is a whole number but for rounding, as in diffusers."""
    if step >= steps:
        return 0
    share = torch.cos(torch.tensor(step / steps, dtype=torch.float32) * math.pi / 2)
    return max(min(int((count * share).floor()), hidden - 1), min(1, hidden - 1))


def least_confident(
    log_prob: Float[Tensor, " n"], noise: Float[Tensor, " n"], temperature: float, keep: int
) -> Int[Tensor, " k"]:
    """Indices of the `keep` draws of lowest log p + temperature·noise."""
    return (log_prob + temperature * noise).argsort()[:keep]


def gumbel(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Standard Gumbel noise, drawn in float64 (float32 lowers the effective temperature)."""
    uniform = torch.rand(shape, generator=rng, dtype=torch.float64).clamp_(min=1e-12)
    return -(-uniform.log()).clamp_(min=1e-12).log()
