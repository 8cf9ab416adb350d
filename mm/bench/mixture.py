"""A task that tells heads of vectors apart: a point of the plane that lies at one of two places, given an angle.

The angle θ is all that a head is told. With u = (cos θ, sin θ), the point is u in two of three cases and −u in the third,
plus normal noise. The mean of the two, u/3, is the best single guess and a point that the data never take. How far samples are
from data is measured by the energy distance at a few angles, each by itself, so that no angle makes up for another.

Letters in shapes: n points, C width of the condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mm.interfaces import Draw, Head, Sampling, Spec

SHARE, SPREAD = 2 / 3, 0.15
"""Share of the points at u, and standard deviation around either place."""
WAVES = 4
"""The condition holds cosines and sines of 1 … `WAVES` times the angle."""
ANGLES = 8
"""Angles at which distances are measured; training draws its own."""

Trained = TypeVar("Trained", bound=Head)


def points(angle: Float[Tensor, " n"], generator: torch.Generator | None = None) -> Float[Tensor, "n 2"]:
    """One point of the data for each angle."""
    side = torch.where(torch.rand(len(angle), 1, generator=generator) < SHARE, 1.0, -1.0)
    return side * torch.stack((angle.cos(), angle.sin()), 1) + SPREAD * torch.randn(len(angle), 2, generator=generator)


def condition(angle: Float[Tensor, " n"]) -> Float[Tensor, "n C"]:
    """What a head is given in place of a hidden state: any smooth function of the angle is nearly linear in it."""
    waves = angle[:, None] * torch.arange(1, WAVES + 1)
    return torch.cat((waves.cos(), waves.sin()), 1)


def train(head: Trained, steps: int = 1500, batch: int = 256, rate: float = 3e-3, seed: int = 0) -> Trained:
    """Build the head and train it on new points in every step: AdamW, the rate falling linearly to 0. The caller's random
    numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head.build(width=2 * WAVES, spec=Spec(kind="continuous", dim=2))
        optimizer = torch.optim.AdamW(head.parameters(), lr=rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(steps):
            angle = 2 * math.pi * torch.rand(batch)
            optimizer.zero_grad()
            head.loss(condition(angle), points(angle)).mean().backward()
            optimizer.step()
            schedule.step()
    return head.eval()


def sampled(
    head: Head, angle: Float[Tensor, " n"], seed: int = 0, sampling: Sampling | None = None
) -> Float[Tensor, "n 2"]:
    """One point of the head for each angle."""
    draw = Draw(
        rows=slice(0, len(angle)), sampling=sampling or Sampling(), generator=torch.Generator().manual_seed(seed)
    )
    return head.sample(condition(angle), [draw])[0][0]


def distance(
    made: Callable[[Float[Tensor, " n"]], Float[Tensor, "n 2"]],
    count: int = 1000,
    seed: int = 0,
    unbiased: bool = False,
    angles: int = ANGLES,
) -> float:
    """Energy distance of `made(angles)` to as many points of the data: `count` at each of `angles` angles, the mean over
    these."""
    rng = torch.Generator().manual_seed(1_000_003 + seed)
    angle = ((torch.arange(angles) + 0.5) * (2 * math.pi / angles)).repeat_interleave(count)
    real, drawn = points(angle, rng).split(count), made(angle).split(count)
    return sum(energy_distance(a, b, unbiased) for a, b in zip(drawn, real, strict=True)) / angles


def energy_distance(a: Float[Tensor, "n D"], b: Float[Tensor, "m D"], unbiased: bool = False) -> float:
    """2·E|a − b| − E|a − a′| − E|b − b′| (Székely and Rizzo 2013), in the unit of the vectors.

    The means run over all pairs (the V-statistic: never below 0, and above 0 for two sets of one distribution, the less the
    larger the sets), or with `unbiased` over pairs of different points (the U-statistic: 0 on average for equal distributions).
    """
    within = [
        torch.cdist(x, x).mean(dtype=torch.float64) * (len(x) / (len(x) - 1) if unbiased else 1.0) for x in (a, b)
    ]
    return float(2 * torch.cdist(a, b).mean(dtype=torch.float64) - within[0] - within[1])
