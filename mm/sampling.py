"""How tokens are drawn: one object, so that pipelines and commands share names and defaults."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

MAX_STEPS = 10_000
"""Of refinement or of denoising: no order gains from more, and what is worked out for each beforehand takes memory."""
MAX_GUIDANCE = 1_000_000
"""Beyond, logits leave the range of float32, and the weights would be blamed for it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. One object, so that pipelines and commands share names and defaults."""

    temperature: float = 1.0
    """0 = greedy."""
    top_k: int = 0
    """0 = off."""
    top_p: float = 1.0
    steps: int = 0
    """Refinement steps of orders that have them (masked; blocks, where `denoising_steps` is 0); 0 = the order's default."""
    denoising_steps: int = 0
    """Evaluations of a diffusion head for each vector, or of the blocks order for each block; 0 = the default of either."""
    guidance: float = 1.0
    """Classifier-free guidance s in u + s·(c − u); 1 = off (the second branch is not run)."""
    context_guidance: float | None = None
    """Scale of a second condition, for items that follow others (editing, interleaved documents): with u the null condition, i
    the items of the context without its text, and c all of it, u + context_guidance·(i − u) + guidance·(c − i)
    (InstructPix2Pix, section 3.2.1; Orthus; NextStep-1). None: one scale for both."""
    guidance_schedule: Literal["constant", "ramp"] = "constant"
    """`ramp`: from 1 to `guidance` over the item (ELM, MAR)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Fraction of the item within which guidance applies (LlamaGen's cfg_interval)."""

    def __post_init__(self) -> None:
        for name in ("top_k", "steps", "denoising_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} must be a whole number, got {value!r:.60}")
            object.__setattr__(self, name, int(value))  # numpy's own types can't be saved
        for name in ("temperature", "top_p", "guidance", "context_guidance"):
            if name != "context_guidance" or self.context_guidance is not None:
                object.__setattr__(self, name, _finite(name, getattr(self, name)))
        if self.guidance_schedule not in ("constant", "ramp"):
            raise ValueError(f"guidance_schedule must be constant or ramp, got {self.guidance_schedule!r:.60}")
        interval = self.guidance_interval
        if not isinstance(interval, list | tuple) or len(interval) != 2:
            raise ValueError(f"guidance_interval must be two numbers, from and to, got {interval!r:.60}")
        object.__setattr__(self, "guidance_interval", tuple(_finite("guidance_interval", x) for x in interval))
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if max(abs(self.guidance), abs(self.context_guidance or 0.0)) > MAX_GUIDANCE:
            raise ValueError(
                f"guidance and context_guidance must be within ±{MAX_GUIDANCE:,}, got {self.guidance} and "
                f"{self.context_guidance}"
            )
        if min(self.top_k, self.steps, self.denoising_steps) < 0:
            raise ValueError(
                f"top_k, steps and denoising_steps must be >= 0 (0 = off / default), got {self.top_k}, {self.steps} and "
                f"{self.denoising_steps}"
            )
        if max(self.steps, self.denoising_steps) > MAX_STEPS:
            raise ValueError(
                f"steps and denoising_steps must be at most {MAX_STEPS:,}, got {self.steps} and {self.denoising_steps}"
            )
        lo, hi = self.guidance_interval
        if not 0 <= lo <= hi <= 1:
            raise ValueError(f"guidance_interval must satisfy 0 <= from <= to <= 1, got {self.guidance_interval}")

    @property
    def guided(self) -> bool:
        """Whether any branch beside the conditional one is needed."""
        return self.guidance != 1.0 or self.context_guidance not in (None, 1.0)

    def scale(self, done: float) -> float:
        """Guidance scale when the fraction `done` of the item is generated."""
        return self._scheduled(self.guidance, done)

    def context_scale(self, done: float) -> float:
        """Likewise of `context_guidance`."""
        return self._scheduled(self.guidance if self.context_guidance is None else self.context_guidance, done)

    def _scheduled(self, scale: float, done: float) -> float:
        lo, hi = self.guidance_interval
        if not lo <= done <= hi:
            return 1.0
        return 1.0 + (scale - 1.0) * done if self.guidance_schedule == "ramp" else scale


def _finite(name: str, value: Any) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # whole numbers may lie beyond every float
            if math.isfinite(number := float(value)):
                return number
    raise ValueError(f"{name} must be a finite number, got {value!r:.60}")
