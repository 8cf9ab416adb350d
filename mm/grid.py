"""Rotary coordinates of the elements of a grid."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def coordinates(grid: tuple[int, ...]) -> Float[Tensor, "N 3"]:
    """(time, row, column) of every element of a grid, storage order, from 0.

    One axis: a list, whose elements advance on all three axes alike (so that text equals a one-dimensional embedding).
    Two axes: rows and columns at one time. Three: time, rows, columns (video frames, or the depth of a volume).
    """
    if len(grid) == 1:
        return torch.arange(grid[0], dtype=torch.float32)[:, None].expand(-1, 3).contiguous()
    if len(grid) not in (2, 3):
        raise ValueError(f"a grid has one, two or three axes, got {grid}")
    axes = [torch.arange(extent, dtype=torch.float32) for extent in (1, *grid)[-3:]]
    return torch.stack([x.flatten() for x in torch.meshgrid(*axes, indexing="ij")], dim=-1)
