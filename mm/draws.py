"""What a row of the engine asks of a head.

Letters in shapes: n hidden states, m of them of one row, V ids, K sub-codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one row asks of a head: which hidden states, how to sample, whose randomness."""

    rows: slice
    """Hidden states of the row among those given to `Head.sample`."""
    sampling: Sampling
    generator: torch.Generator
    unconditional: slice | None = None
    """Hidden states of the row's unconditional twin, when guidance is on."""
    scale: float = 1.0
    """Guidance scale s in u + s·(c − u)."""
    context: slice | None = None
    """Hidden states of the twin that sees the items of the context without its text, when these have a scale of their own."""
    context_scale: float = 1.0
    """Its scale k in u + k·(i − u) + s·(c − i)."""
    bias: Float[Tensor, " V"] | None = None
    """Added to the logits: −inf where the grammar forbids an id."""
    given: Int[Tensor, "m K"] | None = None
    """As `Proposal.given`: for heads that draw one sub-code after another, each given those before it."""

    @property
    def is_guided(self) -> bool:
        """Whether a twin has any say: at scales of 1 none has, and its rows are not evaluated."""
        return self.unconditional is not None and (
            self.scale != 1.0 or (self.context is not None and self.context_scale != 1.0)
        )

    def guided(self, made: Float[Tensor, "n ..."]) -> Float[Tensor, "m ..."]:
        """Of what a head predicts for all its hidden states, this draw's rows, guided."""
        own = made[self.rows]
        if not self.is_guided or self.unconditional is None:
            return own
        start = between = made[self.unconditional]
        if self.context is not None:
            between = made[self.context]
            start = start + self.context_scale * (between - start)
        return start + self.scale * (own - between)
