"""What the machine can do at most: how fast it multiplies matrices, and how fast it reads them."""

from __future__ import annotations

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
    """GB/s at which memory gives weights away: the best of several rounds over `STREAMED` bytes, of three ways to read them
    (products of a vector with `width`×`width` matrices stored by rows or by columns, and plain sums), for a limit is what
    nothing exceeds."""
    weights = [torch.randn(width, width) for _ in range(max(1, STREAMED // (4 * width * width)))]
    x = torch.randn(1, width)

    def by_rows() -> list[Tensor]:
        return [torch.mm(x, weight) for weight in weights]

    def by_columns() -> list[Tensor]:
        return [torch.mm(x, weight.t()) for weight in weights]

    def sums() -> list[Tensor]:
        return [weight.sum() for weight in weights]

    total = sum(weight.numel() * 4 for weight in weights)
    with torch.inference_mode():
        for run in (ways := (by_rows, by_columns, sums)):
            run()
        return total / min(seconds(run) for run in ways for _ in range(rounds)) / 1e9
