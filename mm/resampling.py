"""Other rates of sound, band-limited: what lies above half of the lower rate is taken out, not folded down.

`torchaudio`'s windowed sinc with a long Kaiser window (flat up to 95 % of the band). It runs in blocks whose seams don't
show, so that a sound of any length takes little memory; filters are kept.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

Samples = np.ndarray[Any, np.dtype[np.float32]]

CROSSINGS, ROLLOFF, BETA = 64, 0.9475937167399596, 14.769656459379492
"""Zero crossings to each side, share of the band that is kept, and the window's shape: torchaudio's "kaiser best"."""
FINEST = 1 << 21
"""Largest product of the two whole numbers that stand for a ratio of rates (44,100 to 16,000 is 441 to 160)."""
LONGEST = 1 << 24
"""Most weights of a filter (64 MiB)."""
STEP = 1 << 17
"""Input samples at a time, about."""


class Resampler:
    """A stream of samples at another rate: `feed` gives what is certain so far, `finish` the rest.

    S samples become ⌈S · new / old⌉. Of rates without a small common ratio (44,101 and 16,000) the nearest ratio of small
    whole numbers is taken; it differs by less than one in a million. Raises `ValueError` for rates too far apart.
    """

    def __init__(self, old: int, new: int) -> None:
        ratio = _ratio(old, new)
        self.up, self.down = ratio.numerator, ratio.denominator
        self._filter = _filter(self.down, self.up)
        width = int(self._filter.width)
        # Samples before and after a block that its filter reaches; whole steps, so that phases agree.
        self._reach = -(-width // self.down) * self.down
        self._step = -(-STEP // self.down) * self.down
        self._waiting = np.zeros(self._reach, np.float32)
        """What comes next, with its reach before it."""
        self._given, self._taken = 0, 0

    def feed(self, samples: Samples) -> Samples:
        self._taken += len(samples)
        self._waiting = np.concatenate([self._waiting, samples])
        return self._run()

    def finish(self) -> Samples:
        """Raises nothing; the resampler is used up."""
        rest = len(self._waiting) - self._reach
        padded = -(-rest // self._step) * self._step + self._reach + self.down - rest
        self._waiting = np.concatenate([self._waiting, np.zeros(padded, np.float32)])
        total = -(-self._taken * self.up // self.down)
        before = self._given
        return self._run()[: max(0, total - before)]

    def _run(self) -> Samples:
        import torch

        out: list[Samples] = []
        window = self._reach + self._step + self._reach + self.down
        first = self._reach // self.down * self.up
        start = 0
        with torch.inference_mode():
            while len(self._waiting) - start >= window:
                part = torch.from_numpy(self._waiting[start : start + window].copy())
                out.append(self._filter(part)[first : first + self._step // self.down * self.up].numpy())
                start += self._step
        self._waiting = self._waiting[start:]
        joined = np.concatenate(out) if out else np.zeros(0, np.float32)
        self._given += len(joined)
        return joined


def resample(samples: Samples, old: int, new: int) -> Samples:
    """Samples [S] at rate `old` → [⌈S · new / old⌉] at rate `new`. Raises `ValueError` for rates too far apart."""
    if old == new:
        return samples
    stream = Resampler(old, new)
    return np.concatenate([stream.feed(samples), stream.finish()])


def _ratio(old: int, new: int) -> Fraction:
    """new / old, or near it: a filter has as many phases as the numerator says, each as long as the denominator."""
    ratio = Fraction(new, old)
    limit = max(ratio.numerator, ratio.denominator)
    while ratio.numerator * ratio.denominator > FINEST:
        limit = limit * 3 // 4
        near = Fraction(new, old)
        ratio = near.limit_denominator(limit) if near < 1 else 1 / (1 / near).limit_denominator(limit)
    return ratio


@lru_cache(maxsize=8)
def _filter(down: int, up: int) -> Any:
    import torchaudio

    width = math.ceil(CROSSINGS * down / (min(down, up) * ROLLOFF))
    if up * (2 * width + down) > LONGEST:
        raise ValueError(
            f"the rates are too far apart to resample ({down:,} samples to {up:,}); is the sound's rate right?"
        )
    return torchaudio.transforms.Resample(
        down,
        up,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=CROSSINGS,
        rolloff=ROLLOFF,
        beta=BETA,
    )
