"""What the machine can do at most: how fast it multiplies matrices, and how fast it reads them."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from mm.bench import seconds

STREAMED = 256 << 20
"""Bytes of weights that are read in turn: several times the largest cache, so that they come from memory."""


def matrix_rate(width: int, positions: int = 1024, rounds: int = 9) -> float:
    """GFLOP/s of float32 products of `positions`×`width` and `width`×4·`width` matrices: the best of several rounds, for
    a limit is what nothing exceeds."""
    x, weight = torch.randn(positions, width), torch.randn(width, 4 * width)
    out = torch.empty(positions, 4 * width)
    repeat = max(1, int(2e9 / (2 * x.numel() * 4 * width)))

    def run() -> None:
        for _ in range(repeat):
            torch.mm(x, weight, out=out)

    run()
    return repeat * 2 * x.numel() * 4 * width / min(seconds(run) for _ in range(rounds)) / 1e9


def bandwidth(width: int, rounds: int = 5) -> float:
    """GB/s at which products of a vector with `width`×`width` matrices read them, as decoding does: the median of
    several rounds over `STREAMED` bytes."""
    weights = [torch.randn(width, width) for _ in range(max(1, STREAMED // (4 * width * width)))]
    x = torch.randn(1, width)

    def run() -> Tensor:
        with torch.inference_mode():
            for weight in weights:
                out = torch.mm(x, weight)
        return out

    run()
    total = sum(weight.numel() * 4 for weight in weights)
    return total / statistics.median(seconds(run) for _ in range(rounds)) / 1e9
