"""A sampler's plan: each step a line of numbers, worked out before anything is generated.

Step k makes x ← A_k·x + B_k·y + C_k·(the clean estimate of the step before) + D_k·noise, where y is what the network says at
step k; `mm.diffusion` works the numbers out.

Letters in shapes: K steps, n rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sampler's steps for one process, worked out."""

    time: Float[Tensor, " K"]
    network_time: Float[Tensor, " K"]
    """What `Process.network_time` gives for each step; a head embeds all of them at once."""
    steps: Sequence[Step]

    @property
    def draws(self) -> int:
        """Tensors of noise that `run` takes: the beginning, and one for each step that adds noise."""
        return 1 + sum(step.fresh > 0 for step in self.steps)

    def noise(
        self, rows: int, dim: int, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Float[Tensor, "draws n D"]:
        """All that `run` takes, on the CPU. `temperature` scales the noise that is added on the way (MAR); where none is, that
        of the beginning."""
        noise = torch.randn(self.draws, rows, dim, generator=generator)
        if temperature != 1.0:
            noise[min(1, self.draws - 1) :] *= temperature
        return noise

    def run(
        self,
        predict: Callable[[Float[Tensor, "n D"], int], Tensor],
        noise: Sequence[Float[Tensor, "n D"]] | Float[Tensor, "draws n D"],
    ) -> Float[Tensor, "n D"]:
        """From noise to data. `predict(x, k)` is the network at step k: (n, D), or (n, 2·D) if it predicts the variance too."""
        given = iter(noise)
        x, clean = next(given), None
        for k in range(len(self.steps)):
            x, clean = self.advance(k, x, predict(x, k), clean, given)
        return x

    def advance(
        self, k: int, x: Float[Tensor, "n D"], y: Tensor, clean: Tensor | None, noise: Iterator[Tensor]
    ) -> tuple[Float[Tensor, "n D"], Tensor | None]:
        """Step k: x after it, and the clean estimate if the next step needs it. `clean`: that of the step before."""
        step, extra = self.steps[k], None
        if y.shape[-1] != x.shape[-1]:
            y, extra = y.split(x.shape[-1], dim=-1)
        moved = (x * step.x).add_(y, alpha=step.y)
        if step.memory:
            assert clean is not None
            moved.add_(clean, alpha=step.memory)
        remembered = None
        if k + 1 < len(self.steps) and self.steps[k + 1].memory:
            remembered = (x * step.clean_x).add_(y, alpha=step.clean_y)
        if step.fresh:
            fresh = next(noise)
            if extra is None:
                moved.add_(fresh, alpha=step.fresh)
            else:
                moved.addcmul_(fresh, _deviation(extra, step))
        return moved, remembered

    def transition(
        self, predict: Callable[[Tensor, int], Tensor], x: Float[Tensor, "n D"], k: int
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n D"]]:
        """Mean and log-variance of x after step k. Raises `ValueError` for a step that needs the one before."""
        step = self.steps[k]
        if step.memory:
            raise ValueError("a multistep solver has no transition of its own; take ddpm, ddim, euler or sde")
        y = predict(x, k)
        y, extra = y[..., : x.shape[-1]], y[..., x.shape[-1] :]
        mean = (x * step.x).add_(y, alpha=step.y)
        if step.fresh and extra.shape[-1]:
            return mean, 2 * _deviation(extra, step).log()
        return mean, torch.full_like(mean, 2 * math.log(step.fresh) if step.fresh else float("-inf"))


@dataclass(frozen=True)
class Step:
    """x ← x·X + y·Y + memory·(clean estimate of the step before) + fresh·noise."""

    x: float
    y: float
    memory: float
    fresh: float
    clean_x: float
    clean_y: float
    """The clean estimate is clean_x·x + clean_y·y."""
    large: float = 0.0
    small: float = 0.0
    """Bounds of the variance for networks that predict it (Nichol and Dhariwal 2021, section 3.1); of `ddpm` only."""


def combine(
    of_clean: tuple[float, float],
    of_noise: tuple[float, float],
    *,
    x: float = 0.0,
    clean: float = 0.0,
    noise: float = 0.0,
    memory: float = 0.0,
    fresh: float = 0.0,
) -> Step:
    """x·x + clean·x0 + noise·ε + …, with x0 and ε put as mixtures of x and y."""
    factor = x + clean * of_clean[0] + noise * of_noise[0]
    return Step(factor, clean * of_clean[1] + noise * of_noise[1], memory, fresh, *of_clean)


def _deviation(extra: Tensor, step: Step) -> Tensor:
    """√variance between the two bounds in the logarithm; −1 is the small one, 1 the large one."""
    low, high = math.log(step.small), math.log(step.large)
    return (extra * (0.25 * (high - low)) + 0.25 * (high + low)).exp()
