"""What is counted in a shape itself, without a network: pieces, and legs in slices. A judge that only ever saw whole shapes takes
half a leg for a leg; a count doesn't."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from mm.data.shapes import Plan
from mm.evaluate.results import Figure, share
from mm.voxels import pieces

LEVELS = (0.12, 0.2, 0.28)
"""Of the height, from below: where a table, a stool or a chair is nothing but legs."""
Grid = Bool[np.ndarray, "N N N"]


def legs(grid: Grid) -> list[int]:
    """Parts of each of three slices (`LEVELS`); y, the middle axis, points up."""
    from scipy.ndimage import label

    filled = np.flatnonzero(grid.any(axis=(0, 2)))
    if not len(filled):
        return [0] * len(LEVELS)
    rows = [round(filled[0] + level * (filled[-1] - filled[0])) for level in LEVELS]
    return [int(label(grid[:, row], structure=np.ones((3, 3)))[1]) for row in rows]


def counted(
    family: str, prefix: str, grids: Sequence[Grid], plans: Sequence[Plan], *, control: bool = False
) -> list[Figure]:
    """Whether shapes are in one piece, and have as many legs as their captions say, in every slice."""
    whole = [pieces(grid) == 1 for grid in grids]
    figures = [share(family, f"{prefix}in one piece", whole, control=control)]
    wanted = [(grid, int(plan.facts["legs"])) for grid, plan in zip(grids, plans, strict=True) if "legs" in plan.facts]
    if wanted:
        right = [legs(grid) == [number] * len(LEVELS) for grid, number in wanted]
        figures.append(share(family, f"{prefix}legs, counted", right, control=control, note="in each of three slices"))
    return figures
