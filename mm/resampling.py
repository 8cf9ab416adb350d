"""Other rates of sound, band-limited: what lies above half of the lower rate is taken out, not folded down.

A sinc under a long Kaiser window (flat up to 95 % of the band), in blocks whose seams don't show, so that a sound of any
length takes little memory. Rates with a small common ratio go through `torchaudio`, whose filters are kept; others
(44,101 and 16,000) through the same filter read from a table.

Letters in shapes: S samples.
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
SMALL = 1 << 21
"""Largest product of the two whole numbers of a small ratio (44,100 to 16,000 is 441 to 160)."""
LONG = 1 << 20
"""Weights of a filter beyond which the table takes its place if it can: one sample a second would become 16,000 by
2,192,000 weights, in gigabytes."""
LONGEST = 1 << 24
"""Most weights of a filter (64 MiB)."""
WIDEST = 1 << 13
"""Most weights for one sample where the ratio isn't small."""
STEP = 1 << 17
"""Samples at a time, about, before or after: whichever are more."""
FINE = 512
"""Places between two input samples that the table holds the filter for; linear between them it is exact to 2·10⁻⁶."""


class Resampler:
    """A stream of samples at another rate: `feed` gives what is certain so far, `finish` the rest.

    S samples become ⌈S · new / old⌉. Raises `ValueError` for rates too far apart.
    """

    def __init__(self, old: int, new: int) -> None:
        ratio = Fraction(new, old)
        self.up, self.down = ratio.numerator, ratio.denominator
        width = math.ceil(CROSSINGS * self.down / (min(self.up, self.down) * ROLLOFF))
        weights, fits = self.up * (2 * width + self.down), 2 * width <= WIDEST
        small = self.up * self.down <= SMALL and (weights <= LONG or not fits)
        if weights > LONGEST if small else not fits:
            raise ValueError(
                f"the rates are too far apart to resample ({old:,} to {new:,} samples a second); is the sound's right?"
            )
        self._filter = _filter(self.down, self.up) if small else None
        # Samples before and after a block that its filter reaches; whole steps, so that phases agree.
        self._reach = -(-width // self.down) * self.down if small else width
        self._waiting = np.zeros(self._reach, np.float32)
        """What comes next, with its reach before it."""
        self._next = 0
        """Of which input sample the first of `_waiting` after the reach is."""
        self._given, self._taken = 0, 0

    @property
    def piece(self) -> int:
        """Input samples that become about `STEP`: feeding more at once makes the result as large as that."""
        return max(1, STEP * self.down // max(self.up, self.down))

    def feed(self, samples: Samples) -> Samples:
        self._taken += len(samples)
        self._waiting = np.concatenate([self._waiting, samples])
        return self._run()

    def finish(self) -> Samples:
        """The resampler is used up."""
        left = -(-self._taken * self.up // self.down) - self._given
        silence = self._reach + 1 if self._filter is None else 2 * self._reach + 2 * self.down + self._step()
        self._waiting = np.concatenate([self._waiting, np.zeros(silence, np.float32)])
        return self._run()[:left]

    def _step(self) -> int:
        return max(1, STEP // max(self.up, self.down)) * self.down if self._filter is not None else 0

    def _run(self) -> Samples:
        out = self._by_table() if self._filter is None else self._by_filter()
        joined = np.concatenate(out) if out else np.zeros(0, np.float32)
        self._given += len(joined)
        return joined

    def _by_filter(self) -> list[Samples]:
        import torch

        out: list[Samples] = []
        step = self._step()
        window = self._reach + step + self._reach + self.down
        first, count = self._reach // self.down * self.up, step // self.down * self.up
        start = 0
        with torch.inference_mode():
            while len(self._waiting) - start >= window:
                part = torch.from_numpy(self._waiting[start : start + window].copy())
                out.append(self._filter(part)[first : first + count].numpy())  # type: ignore[misc]
                start += step
        self._waiting = self._waiting[start:]
        return out

    def _by_table(self) -> list[Samples]:
        """Output m lies at input m · down / up, which is computed in whole numbers: nothing drifts."""
        out: list[Samples] = []
        filters = _table(min(1.0, self.up / self.down) * ROLLOFF, self._reach)
        end = self._next + len(self._waiting) - self._reach
        stop = max(self._given, ((end - self._reach) * self.up - 1) // self.down + 1)
        if stop > self._given:
            windows = np.lib.stride_tricks.sliding_window_view(self._waiting, 2 * self._reach)
        size = (1 << 18) // self._reach
        for start in range(self._given, stop, size):
            at = np.arange(start, min(start + size, stop)) * self.down
            taps = windows[at // self.up + 1 - self._next]
            row, part = np.divmod(at % self.up * (FINE / self.up), 1)
            row = row.astype(np.int64)
            before, after = (np.einsum("ij,ij->i", taps, filters[row + n]) for n in (0, 1))
            out.append((before + part * (after - before)).astype(np.float32))
        following = max(self._next, stop * self.down // self.up)
        self._waiting = self._waiting[following - self._next :]
        self._next = following
        return out


def resample(samples: Samples, old: int, new: int) -> Samples:
    """Samples [S] at rate `old` → [⌈S · new / old⌉] at rate `new`. Raises `ValueError` for rates too far apart."""
    if old == new:
        return samples
    stream = Resampler(old, new)
    return np.concatenate([stream.feed(samples), stream.finish()])


@lru_cache(maxsize=8)
def _filter(down: int, up: int) -> Any:
    import torchaudio

    return torchaudio.transforms.Resample(
        down,
        up,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=CROSSINGS,
        rolloff=ROLLOFF,
        beta=BETA,
    )


@lru_cache(maxsize=4)
def _table(scale: float, reach: int) -> Samples:
    """The filter at 0, 1/FINE … 1 input samples after an input sample: float32 [FINE + 1, 2 · reach], for the inputs from
    reach − 1 before that sample to reach after it."""
    places = (np.arange(1 - reach, reach + 1) - np.arange(FINE + 1)[:, None] / FINE) * scale
    window = np.sqrt(np.maximum(0, 1 - (places / CROSSINGS) ** 2))
    weights = np.sinc(places) * np.i0(BETA * window) / np.i0(BETA) * scale
    return np.where(np.abs(places) < CROSSINGS, weights, 0).astype(np.float32)
