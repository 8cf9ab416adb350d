"""Masked order: all elements at once, a random part of them hidden (MaskGIT, Meissonic, Show-o; MAR for vectors).

Training (MaskGIT, Chang et al. 2022, section 3.2): t ~ U(0, 1), a share cos(πt/2) of the elements is hidden, the loss is on
those. Decoding: T parallel steps; after step i the floor(N·cos(π/2·(i + 1)/T)) elements of least confidence are hidden
again, where confidence = log p(drawn) + τ·Gumbel noise and τ anneals linearly to 0 (as in aMUSEd).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.grid import coordinates
from mm.interfaces import Encoded, Layout, Order, Proposal, Sampling, Session

RATE = "mask_rate"


class Masked(Order):
    """`schedule`: how the hidden share is drawn in training; `rate_condition`: the backbone is told the share, with
    `micro` facts about the item beside it (Meissonic); `micro` is the default used when generating."""

    def __init__(
        self,
        schedule: Literal["cosine", "uniform"] = "cosine",
        steps: int = 12,
        choice_temperature: float = 2.0,
        rate_condition: bool = False,
        micro: tuple[float, ...] = (),
    ) -> None:
        if steps < 1:
            raise ValueError(f"masked order needs steps >= 1, got {steps}")
        self.schedule, self.default_steps, self.choice_temperature = schedule, steps, choice_temperature
        self.rate_condition, self.micro = rate_condition, tuple(micro)
        if self.micro and not rate_condition:
            raise ValueError("micro-conditions need rate_condition=True; they travel together")

    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        count = len(encoded)
        hidden = torch.zeros(count, dtype=torch.bool)
        if not context and count:
            draw = float(torch.rand((), generator=rng))
            rate = math.cos(draw * math.pi / 2) if self.schedule == "cosine" else draw
            chosen = torch.randperm(count, generator=rng)[: max(1, round(count * rate))]
            hidden[chosen] = True
        return self._positions(encoded.grid, hidden, encoded.micro or self.micro)

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
    ) -> Session:
        return MaskedSession(self, grid, sampling.steps or self.default_steps, rng, known)


class MaskedSession(Session):
    """MaskGIT decoding; given elements are never hidden."""

    def __init__(
        self,
        order: Masked,
        grid: tuple[int, ...],
        steps: int,
        rng: torch.Generator,
        known: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.order, self.grid, self.steps, self.rng = order, grid, steps, rng
        self.count = math.prod(grid)
        self.step = 0
        self.values: Tensor | None = None
        self.hidden = torch.ones(self.count, dtype=torch.bool)
        if known is not None:
            content, given = known
            if len(given) != self.count or len(content) != self.count:
                raise ValueError(
                    f"given elements cover {len(content)} and {len(given)} places, but the grid {grid} has {self.count}"
                )
            self.values, self.hidden = content.clone(), ~given
        self.unknown = int(self.hidden.sum())

    def propose(self) -> Proposal | None:
        if not bool(self.hidden.any()):
            return None
        return Proposal(
            autoregressive=False,
            done=1.0 - float(self.hidden.float().mean()),
            content=self.content(),
            layout=self.order._positions(self.grid, self.hidden, self.order.micro),
        )

    def accept(self, sample: Tensor, log_prob: Float[Tensor, " n"] | None) -> None:
        if log_prob is None:
            raise ValueError("the masked order ranks draws by log-probability; this head gives none")
        if self.values is None:
            self.values = torch.zeros((self.count, *sample.shape[1:]), dtype=sample.dtype)
        self.values = self.values.clone()  # what `content` gave out before stays as it was
        open_places = self.hidden.nonzero()[:, 0]
        self.values[open_places] = sample
        self.step += 1
        keep_hidden = remaining(self.unknown, len(open_places), self.step, self.steps)
        temperature = self.order.choice_temperature * (1.0 - (self.step - 1) / max(self.steps - 1, 1))
        noise = gumbel((len(open_places),), self.rng)
        worst = least_confident(log_prob, noise, temperature, keep_hidden)
        self.hidden = torch.zeros_like(self.hidden)
        self.hidden[open_places[worst]] = True

    def content(self) -> Tensor:
        return torch.zeros(self.count, dtype=torch.int64) if self.values is None else self.values


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
