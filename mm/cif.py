"""Continuous integrate-and-fire (Dong and Xu 2020), as Paraformer has it: as many vectors as there are units in the sound.

A predictor gives each frame a weight α in (0, 1). Weights are summed along the frames; each time the sum passes a whole number a
vector *fires*: the sum of α·frame since the last one, 1 in all, for which the frame that passes the number is split between the
vector that it ends and the one that it begins. In training the weights are scaled so that they sum to the number of units wanted,
and |Σα − units| is a loss of its own; without it the number is read off the sum, after a tail is added that lets a last unit of
more than half a weight fire. FunASR's loop fires once a frame at the most; here a frame of more than 1, which scaling can make,
gives each of its vectors its share.

Letters in shapes: B batch, T frames, N vectors that fire, D their width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

TAIL = 0.45
"""Weight of the frame of zeros that is put behind a sound whose number of units isn't known (FunASR's `tail_threshold`)."""
SMALLEST = 1e-6
"""Sum of weights that is taken for none when they are scaled."""


class Predictor(nn.Module):
    """α = sigmoid(w · relu(conv(h) + h)), 0 where there is no frame."""

    def __init__(self, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.weight = nn.Linear(width, 1)

    def forward(self, frames: Float[Tensor, "B T D"], real: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        x = frames * real[..., None]
        mixed = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return torch.sigmoid(self.weight(F.relu(mixed + x)).squeeze(-1)) * real


def shares(alpha: Float[Tensor, "B T"], count: int) -> Float[Tensor, "B N T"]:
    """Of each frame's weight, what falls to each of the first `count` vectors: vector n owns the running sum from n to n + 1."""
    end = alpha.double().cumsum(1)[:, None]  # whole numbers are passed at the same frame on any machine
    start = F.pad(end[..., :-1], (1, 0))
    low = torch.arange(count, device=alpha.device, dtype=end.dtype)[:, None]
    return (torch.minimum(end, low + 1) - torch.maximum(start, low)).clamp(min=0).to(alpha.dtype)


def integrate_and_fire(
    frames: Float[Tensor, "B T D"], alpha: Float[Tensor, "B T"], count: int
) -> Float[Tensor, "B N D"]:
    """The first `count` vectors that fire. What is left of the weights after the last whole number is in vector ⌊Σα⌋, if it is
    asked for."""
    return shares(alpha, count) @ frames


def scaled(alpha: Float[Tensor, "B T"], units: Int[Tensor, " B"]) -> Float[Tensor, "B T"]:
    """Weights that sum to the number of units (in training)."""
    return alpha * (units / alpha.sum(1).clamp(min=SMALLEST))[:, None]


def quantity_loss(alpha: Float[Tensor, "B T"], units: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """|Σα − units|, of weights that aren't scaled, over the number of all units."""
    return (alpha.sum(1) - units).abs().sum() / units.sum().clamp(min=1)


def fire(frames: Float[Tensor, "T D"], alpha: Float[Tensor, " T"], tail: float = TAIL) -> Float[Tensor, "N D"]:
    """The vectors of one sound whose number of units isn't known: ⌊Σα + tail⌋, and at least one, which a sound without any unit
    fires with what weight there is."""
    frames, alpha = F.pad(frames, (0, 0, 0, 1)), F.pad(alpha, (0, 1), value=tail)
    return integrate_and_fire(frames[None], alpha[None], max(1, int(alpha.double().sum())))[0]
