"""Sound from strangers: one loader that bounds what it decodes and always returns the same kind of sound."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Audio:
    """Mono sound. Raises `ValueError` for samples that are not a finite float array of one axis."""

    samples: np.ndarray[Any, np.dtype[np.float32]]
    """float32 [n], full scale ±1 (what lies beyond is kept until it is written)."""
    rate: int
    """Samples a second."""

    def __post_init__(self) -> None:
        samples = np.asarray(self.samples, dtype=np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise ValueError(
                f"sound has samples of shape {samples.shape}, finite or not; give one axis of finite numbers (mono)"
            )
        if isinstance(self.rate, bool) or not isinstance(self.rate, int) or not 1 <= self.rate <= 768_000:
            raise ValueError(f"the rate of a sound is 1 to 768,000 samples a second, got {self.rate!r:.60}")
        object.__setattr__(self, "samples", samples)

    @cached_property
    def seconds(self) -> float:
        return len(self.samples) / self.rate
