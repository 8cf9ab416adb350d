"""The regression head: one vector a hidden state, the best guess (VL-GPT, base LCM, AutoTimes).

It can't say that there are several possible vectors: where there are, it returns what lies between them. That is its
known limit, and the reason for `mm.heads.diffusion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mm.heads._vectors import check_continuous, mlp
from mm.interfaces import Draw, Head, Spec


class RegressionHead(Head):
    """A linear map, or a network of `layers` layers, trained with an error: `l1`, `l2` (means over the vector) or `cosine`
    (1 − cosine)."""

    def __init__(self, error: Literal["l1", "l2", "cosine"] = "l2", layers: int = 1) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"a regression head needs layers >= 1, got {layers}")
        self.error, self.layers = error, layers

    def build(self, *, width: int, spec: Spec, controls: int = 0) -> None:
        check_continuous("regression", spec, controls)
        self.net = mlp(width, spec.dim, self.layers)

    def loss(self, hidden: Float[Tensor, "n W"], target: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        made, wanted = self.net(hidden).float(), target.float()
        if self.error == "cosine":
            return 1 - F.cosine_similarity(made, wanted, dim=-1)
        return ((made - wanted).abs() if self.error == "l1" else (made - wanted).square()).mean(-1)

    @torch.no_grad()
    def sample(
        self, hidden: Float[Tensor, "n W"], draws: Sequence[Draw]
    ) -> list[tuple[Tensor, Float[Tensor, " m"] | None]]:
        """The same vector every time; temperature means nothing here."""
        made = self.net(hidden).float()
        return [(draw.guided(made).cpu(), None) for draw in draws]

    def transition(
        self, hidden: Float[Tensor, "n W"], x: Tensor, step: int = 0
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n D"]]:
        """Mean and log-variance of the only step there is: a point."""
        made = self.net(hidden).float()
        return made, torch.full_like(made, float("-inf"))
