"""Settings that the speech tokenizers share: checked before anything is built from them, whoever wrote them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mm import saved
from mm.audio import Audio

RATES = (8_000, 16_000)
FRAMES = 62.5
"""STFT frames a second; a window is four of them long (64 ms)."""
MAX_BLOCKS, MAX_WIDTH, MAX_MELS = 64, 4096, 512
MAX_STRIDE = 8


def check(c: dict[str, Any]) -> None:
    """Raises `ValueError` for sizes out of range or that do not fit each other."""
    if c["rate"] not in RATES:
        raise ValueError(f"rate must be one of {', '.join(map(str, RATES))} samples a second, got {c['rate']!r:.60}")
    saved.whole_number("mels", c["mels"], 1, MAX_MELS)
    for name in ("width", "decoder_width"):
        saved.whole_number(name, c[name], 1, MAX_WIDTH)
    saved.whole_number("expansion", c["expansion"], 1, 16)
    for name in ("strides", "blocks", "decoder_blocks"):
        saved.whole_numbers(name, c[name])
    for stride in c["strides"]:
        saved.whole_number("each of strides", stride, 1, MAX_STRIDE)
    if math.prod(c["strides"]) > MAX_STRIDE:
        raise ValueError(f"strides may join up to {MAX_STRIDE} frames, got {c['strides']}")
    for name in ("blocks", "decoder_blocks"):
        if len(c[name]) != len(c["strides"]) + 1 or not 0 <= min(c[name]) <= max(c[name]) <= MAX_BLOCKS:
            raise ValueError(
                f"{name} must be {len(c['strides']) + 1} numbers in 0..{MAX_BLOCKS}, one more than strides, got {c[name]}"
            )


def hop(rate: int) -> int:
    """Samples from one STFT frame to the next."""
    return round(rate / FRAMES)


def n_fft(rate: int) -> int:
    return 4 * hop(rate)


def examples() -> list[Audio]:
    """Sounds of several rates and lengths, for tests: a rising tone, noise, one sample, 10 ms, silence."""
    t = np.arange(8_000) / 16_000
    rng = np.random.default_rng(0)
    sounds = [
        (0.5 * np.sin(2 * np.pi * (200 + 900 * t) * t), 16_000),
        (0.1 * rng.standard_normal(5_001), 8_000),
        (np.ones(1), 16_000),
        (0.3 * rng.standard_normal(441), 44_100),
        (np.zeros(3_000), 22_050),
    ]
    return [Audio(samples.astype(np.float32), rate) for samples, rate in sounds]
