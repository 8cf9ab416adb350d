"""The small network of a diffusion head: predicts what a process asks for, from a noisy vector, a time and a condition.

That of MAR (Li et al. 2024, section 3.2) and NextStep-1: a residual MLP, every block of it shifted, scaled and gated by time
and condition (AdaLN-zero). `mm.interop.denoiser` loads their weights.

In training it is called; in sampling `steps` gives a function of (x, step) in which everything that doesn't change from
step to step is worked out beforehand, for few rows even what time and condition do to every block at every step.

Letters in shapes: n rows, D width of a vector, C width of the condition, W width inside, B blocks, K steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

BANDS, PERIOD, EPS = 128, 10000.0, 1e-6
AHEAD = 1024
"""Rows × steps up to which all modulations are worked out at once: one product instead of many that wait for memory."""


class Denoiser(nn.Module):
    """(x, time, condition) → prediction.

    Args:
        dim: D.
        condition: C.
        width: W.
        blocks: B.
        out: width of the prediction: D, or 2·D if the variance is predicted too.
    """

    def __init__(self, dim: int, condition: int, width: int = 256, blocks: int = 3, out: int | None = None) -> None:
        super().__init__()
        self.dim, self.width, self.depth = dim, width, blocks
        self.time_up, self.time_down = nn.Linear(2 * BANDS, width), nn.Linear(width, width)
        self.condition, self.enter = nn.Linear(condition, width), nn.Linear(dim, width)
        self.modulation = nn.Linear(width, (3 * blocks + 2) * width)
        """Rows: shift, scale and gate of each block; shift and scale of the end."""
        self.blocks = nn.ModuleList(DenoiserBlock(width) for _ in range(blocks))
        self.leave = nn.Linear(width, out or dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier; the network of the time Normal(0, 0.02); modulation and output zero, so that it starts by predicting 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.time_up, self.time_down):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (self.modulation, self.leave):
            nn.init.zeros_(linear.weight)

    def forward(
        self, x: Float[Tensor, "n D"], time: Float[Tensor, " n"], condition: Float[Tensor, "n C"]
    ) -> Float[Tensor, "n O"]:
        """`time` as `Process.network_time` gives it."""
        return self.predict(x, self.embed_time(time), self.condition(condition))

    def predict(self, x: Tensor, time: Float[Tensor, "n W"], condition: Float[Tensor, "n W"]) -> Tensor:
        """The same with time and condition embedded already."""
        modulation = self.modulation(F.silu(time + condition)).chunk(3 * self.depth + 2, dim=-1)
        h = self.enter(x)
        for number, block in enumerate(cast("Iterable[DenoiserBlock]", self.blocks)):
            h = block(h, *modulation[3 * number : 3 * number + 3])
        shift, scale = modulation[-2:]
        return self.leave(torch.addcmul(shift, F.layer_norm(h, (self.width,), eps=EPS), 1 + scale))

    def embed_time(self, time: Float[Tensor, " n"]) -> Float[Tensor, "n W"]:
        """Cosines, then sines; then two layers."""
        bands = torch.arange(BANDS, device=time.device, dtype=torch.float32)
        angle = time.float()[:, None] * torch.exp(-math.log(PERIOD) / BANDS * bands)
        features = torch.cat((angle.cos(), angle.sin()), -1).to(self.time_up.weight.dtype)
        return self.time_down(F.silu(self.time_up(features)))

    @torch.no_grad()
    def steps(self, condition: Float[Tensor, "n C"], times: Float[Tensor, " K"]) -> Callable[[Tensor, int], Tensor]:
        """`predict(x, k)` at time k for these conditions; x is (n, D)."""
        rows, width, depth = len(condition), self.width, self.depth
        table, embedded = self.embed_time(times.to(condition.device)), self.condition(condition)
        # 1 + scale, once and for all
        bias = self.modulation.bias.clone().view(-1, width)
        scales = [*range(1, 3 * depth, 3), 3 * depth + 1]
        bias[scales] += 1
        bias, weight = bias.flatten(), self.modulation.weight.t()
        ahead = None
        if rows * len(times) <= AHEAD:
            everything = F.silu(table[:, None] + embedded).flatten(0, 1)
            ahead = torch.addmm(bias, everything, weight).view(len(times), rows, 3 * depth + 2, width).unbind(0)
        blocks = [
            (b.norm.weight, b.norm.bias, b.up.bias, b.up.weight.t(), b.down.bias, b.down.weight.t())
            for b in cast("Iterable[DenoiserBlock]", self.blocks)
        ]
        shape, addmm, norm = (width,), torch.addmm, F.layer_norm
        enter, leave = (self.enter.bias, self.enter.weight.t()), (self.leave.bias, self.leave.weight.t())

        @torch.no_grad()
        def predict(x: Tensor, k: int) -> Tensor:
            if ahead is None:
                modulation = addmm(bias, F.silu(table[k] + embedded), weight).view(rows, 3 * depth + 2, width).unbind(1)
            else:
                modulation = ahead[k].unbind(1)
            h = addmm(enter[0], x, enter[1])
            at = 0
            for norm_weight, norm_bias, up_bias, up, down_bias, down in blocks:
                inner = torch.addcmul(modulation[at], norm(h, shape, norm_weight, norm_bias, EPS), modulation[at + 1])
                h = h.addcmul_(
                    addmm(down_bias, F.silu(addmm(up_bias, inner, up), inplace=True), down), modulation[at + 2]
                )
                at += 3
            return addmm(
                leave[0], torch.addcmul(modulation[at], norm(h, shape, None, None, EPS), modulation[at + 1]), leave[1]
            )

        return predict


class DenoiserBlock(nn.Module):
    """x + gate·down(silu(up(norm(x)·(1 + scale) + shift)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x, self.down(F.silu(self.up(torch.addcmul(shift, self.norm(x), 1 + scale)))), gate)
