"""Which pixel centres triangles cover: what voxels, distances and rendered views are made of, in bounded memory.

Letters in shapes: F triangles, P covered pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

CHUNK = 1 << 19
"""Pixels looked at in one go: about 100 MB."""


def covered(
    corners: Float[np.ndarray, "F 3 2"], width: int, height: int
) -> Iterator[tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"], Int[np.ndarray, " P"], Float[np.ndarray, "P 3"]]]:
    """Of triangles in the plane, in pixels, each pixel whose centre (column + ½, row + ½) lies in one, its edge included: the
    triangle, column, row, and barycentric weights. In parts; triangles without area cover nothing."""
    limits = np.array([width, height])
    low = np.clip(np.ceil(corners.min(1) - 0.5), 0, limits).astype(np.int64)
    high = np.clip(np.floor(corners.max(1) - 0.5) + 1, 0, limits).astype(np.int64)
    spans = np.maximum(high - low, 0)
    counts = spans.prod(1)
    some = np.flatnonzero(counts)
    ends = np.cumsum(counts[some])
    begin = 0
    while begin < len(some):
        before = ends[begin - 1] if begin else 0
        end = max(int(np.searchsorted(ends, before + CHUNK, side="right")), begin + 1)
        faces = some[begin:end]
        begin = end
        face = np.repeat(faces, counts[faces])
        place = np.arange(len(face)) - np.repeat(np.cumsum(counts[faces]) - counts[faces], counts[faces])
        column = low[face, 0] + place // spans[face, 1]
        row = low[face, 1] + place % spans[face, 1]
        point = np.stack((column, row), 1) + 0.5
        a, b, c = (corners[face, corner] - point for corner in range(3))
        weights = np.stack((_cross(b, c), _cross(c, a), _cross(a, b)), 1)
        total = weights.sum(1)
        inside = ((weights >= 0).all(1) & (total > 0)) | ((weights <= 0).all(1) & (total < 0))
        yield face[inside], column[inside], row[inside], weights[inside] / total[inside, None]


def signed_areas(corners: Float[np.ndarray, "F 3 2"]) -> Float[np.ndarray, " F"]:
    """Positive for corners that go round anticlockwise where the second axis points up."""
    return _cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) / 2


def _cross(a: Float[np.ndarray, "P 2"], b: Float[np.ndarray, "P 2"]) -> Float[np.ndarray, " P"]:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
