"""The elements of a grid: their rotary coordinates, and which of them are given."""

from __future__ import annotations

import math

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


def given_prefix(known: tuple[Tensor, Tensor], grid: tuple[int, ...]) -> Tensor:
    """The given elements of (content, which are given), for orders that keep the first ones only; of an empty grid, whose extent
    isn't known, as many as there are. Raises `ValueError` where others are given, or where they are of another grid."""
    content, given = known
    count = math.prod(grid) if grid else len(content)
    if len(given) != count or len(content) != count:
        raise ValueError(
            f"given elements cover {len(content)} and {len(given)} places, but the grid {grid} has {count}"
        )
    prefix = int(given.long().cumprod(0).sum())
    if prefix != int(given.sum()):
        raise ValueError(
            f"this order can keep given elements only at the start: got {int(given.sum())}, {prefix} of them at the start; the "
            "masked order fills in between"
        )
    return content[:prefix]
