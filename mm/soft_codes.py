"""How the backbone reads vectors by way of a codebook: a soft lookup (Orthus, Kou et al. 2025, section 3.2).

h = Σ_j softmax_j(−‖v − c_j‖² / τ) · w_j: each code c_j has a row w_j of width W, as in a model of ids, and a vector reads a
mixture of the rows of the codes that lie near it. With τ → 0 it is the row of the nearest code, so that a model trained on ids
is where a model of vectors can start from. Distances are computed in float32, also inside autocast: what they differ in is lost
in bfloat16.

Letters in shapes: N vectors, D their width, K codes, W backbone width.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

COLDEST = 1e-30
"""Lowest temperature that is divided by: below, float32 has too few digits left."""


class SoftCodebook(nn.Module):
    """Vectors → width. Codes and rows are trained.

    Args:
        codes: c, in the units of the autoencoder.
        width: W.
        temperature: τ, in the same units squared; 0 = the nearest code.
        shift, scale: v = x · scale + shift takes a token x to those units (what a normaliser did, taken back).
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        codes: Float[Tensor, "K D"],
        width: int,
        temperature: float,
        shift: Float[Tensor, " D"],
        scale: Float[Tensor, " D"],
    ) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"the temperature of a soft codebook must be a number of at least 0, got {temperature}")
        self.temperature = temperature
        self.codes = nn.Parameter(codes.detach().clone().float())
        self.rows = nn.Embedding(len(codes), width)
        nn.init.normal_(self.rows.weight, std=0.02)
        self.register_buffer("shift", shift.detach().clone().float())
        self.register_buffer("scale", scale.detach().clone().float())

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N W"]:
        with torch.autocast(x.device.type, enabled=False):
            v = x.float() * self.scale + self.shift
            if self.temperature == 0:
                return self.rows(self.nearest(v))
            return self.weights(v).to(self.rows.weight.dtype) @ self.rows.weight

    def weights(self, v: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
        """The softmax. ‖v‖² is the same for all codes of a vector and left out."""
        codes = self.codes.float()
        nearness = 2 * v @ codes.t() - codes.square().sum(-1)
        # the largest becomes 0 before it is divided, so that no temperature makes infinities of all
        return ((nearness - nearness.amax(-1, keepdim=True)) / max(self.temperature, COLDEST)).softmax(-1)

    @torch.no_grad()
    def nearest(self, v: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
        codes = self.codes.float()
        return (2 * v @ codes.t() - codes.square().sum(-1)).argmax(-1)
