"""Solids as grids, and back: occupancy and signed distance of any mesh, and the closed surface of a grid.

Axes as in glTF: x right, y up, z towards the viewer. `grid[i, j, k]` is the cell of the cube [0, 1]³ with its centre at
((i + ½)/n, (j + ½)/n, (k + ½)/n).

Letters in shapes: N cells a side, F triangles, P points.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mm.triangles import CHUNK, covered, signed_areas

if TYPE_CHECKING:  # imported where it is used, so that `import mm` stays fast
    from trimesh import Trimesh

MAX_SIZE = 256
"""Most cells a side: 64 MiB an axis while votes are counted."""
MAX_TRUNCATION = 2.0
TRUNCATION = 0.1
"""Distance beyond which cells are all the same, in sides of the cube."""
SHEET = 0.6
"""Half the thickness in cells of a mesh that encloses nothing: enough for a centre to be inside wherever it lies."""
MANY = 1 << 18
"""Samples of a surface beyond which they are thinned out."""
ASIDE = (1.9e-7, 2.3e-7, 3.1e-7)
"""How far from the centre of a cell it is looked at, in cells: edges and faces often pass through the very centre."""


def normalised(mesh: Trimesh, margin: float = 0.05) -> Trimesh:
    """A copy in the middle of the unit cube, its longest side 1 − 2·margin. Raises `ValueError` for an empty mesh or one
    that is a single point."""
    if not isinstance(margin, Real) or not 0 <= margin < 0.5:
        raise ValueError(f"the margin around a shape is at least 0 and below half the cube, got {margin!r:.60}")
    if not len(mesh.faces):
        raise ValueError("an empty mesh has no size; give one with faces")
    used = np.asarray(mesh.vertices)[np.unique(mesh.faces)]
    low, high = used.min(0), used.max(0)
    longest = float((high - low).max())
    if not 0 < longest < np.inf:
        raise ValueError(f"the mesh is {longest:g} wide, which can't be brought to the size of a cube")
    out = mesh.copy()
    out.vertices = (np.asarray(mesh.vertices) - (low + (high - low) / 2)) / longest * (1 - 2 * margin) + 0.5
    return out


# --- a mesh as a grid -----------------------------------------------------------------------------------------------


def occupancy(mesh: Trimesh, n: int = 32, *, surface: bool = False) -> Bool[np.ndarray, "N N N"]:
    """Cells of the unit cube whose centre is inside the mesh, closed or not.

    Along each axis the surface's crossings of every line of cells are counted: with their direction where the faces agree on
    one, so that parts may overlap and holes be nested, else by parity. Lines with a crossing too few (through a hole of an
    open mesh) don't count; what most of the three axes say holds. A mesh that encloses no centre gives the cells that its
    surface passes; with `surface` these are added always, so that thin parts stay.

    Raises `ValueError` for a size that is out of bounds.
    """
    check_size(n)
    inside = _filled(mesh, n)
    return inside | _touched(mesh, n) if surface or not inside.any() else inside


def sdf(mesh: Trimesh, n: int = 32, truncation: float = TRUNCATION) -> Float[np.ndarray, "N N N"]:
    """Distance from the centre of each cell to the surface in sides of the cube, negative inside (as `occupancy` tells), cut off
    at ±`truncation`; float32. A mesh that encloses nothing counts as a sheet, about a cell thick.

    Within the band distances are exact to the triangles nearest by samples half a cell apart. Raises `ValueError` for a size or
    a truncation that is out of bounds.
    """
    from scipy.spatial import cKDTree
    from trimesh.triangles import closest_point

    if not isinstance(truncation, Real) or not 0 < truncation <= MAX_TRUNCATION:
        raise ValueError(
            f"truncation must be above 0 and at most {MAX_TRUNCATION:g} sides of the cube, got {truncation!r:.60}"
        )
    check_size(n)
    inside = _filled(mesh, n)
    thick = 0.0 if inside.any() else SHEET / n
    reach = truncation + thick
    out: Any = np.full(n**3, reach)
    points, owner = _samples(mesh, 2 * n)
    if len(points):
        centres = (np.stack(np.unravel_index(np.arange(n**3), (n, n, n)), 1) + 0.5) / n
        slack = 1.0 / n
        near, which = cKDTree(points).query(centres, k=8, distance_upper_bound=reach + slack)
        rows, places = np.nonzero(np.isfinite(near))
        exact = np.full(near.shape, np.inf)
        triangles = np.asarray(mesh.triangles)
        for start in range(0, len(rows), 1 << 17):
            row, place = rows[start : start + (1 << 17)], places[start : start + (1 << 17)]
            ends = closest_point(triangles[owner[which[row, place]]], centres[row])
            exact[row, place] = np.linalg.norm(ends - centres[row], axis=1)
        # slivers without area have no nearest point; the samples on them have
        exact = np.where(np.isfinite(exact), exact, near)
        out = np.minimum(exact.min(1), reach)
    out = out.reshape(n, n, n).astype(np.float32) - np.float32(thick)
    return np.where(inside, -out, np.clip(out, -truncation, truncation))


def distance_of(occupied: Bool[np.ndarray, "N N N"], truncation: float = TRUNCATION) -> Float[np.ndarray, "N N N"]:
    """Signed distance where only the cells are known: to the nearest cell of the other kind, less half a cell."""
    from scipy.ndimage import distance_transform_edt

    n = len(occupied)
    outside = distance_transform_edt(~occupied) if occupied.any() else np.full(occupied.shape, np.inf)
    # beyond the cube nothing is occupied
    inside = distance_transform_edt(np.pad(occupied, 1))[1:-1, 1:-1, 1:-1]
    signed = np.where(occupied, 0.5 - inside, outside - 0.5) / n
    return np.clip(signed, -truncation, truncation).astype(np.float32)


def check_size(n: int) -> None:
    if not isinstance(n, Integral) or not 2 <= n <= MAX_SIZE:
        raise ValueError(f"grids have 2 to {MAX_SIZE} cells a side, got {n!r:.60}")


def _corners(mesh: Trimesh, n: int) -> Float[np.ndarray, "F 3 3"]:
    """In cells, moved so that looking at centres is looking beside them."""
    return np.asarray(mesh.triangles, np.float64).reshape(-1, 3, 3) * n - np.array(ASIDE)


def _across(axis: int) -> list[int]:
    return [other for other in range(3) if other != axis]


def _along(
    corners: Float[np.ndarray, "F 3 3"], axis: int, n: int
) -> Iterator[tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"], Int[np.ndarray, " P"], Float[np.ndarray, " P"]]]:
    """Where lines through the centres of cells cross triangles: triangle, the two other axes' cells, and place on the line."""
    for face, column, row, weights in covered(corners[..., _across(axis)], n, n):
        yield face, column, row, (weights * corners[face, :, axis]).sum(1)


def _filled(mesh: Trimesh, n: int) -> Bool[np.ndarray, "N N N"]:
    """Cells whose centre is inside by most of the axes that can tell."""
    votes = np.zeros((n, n, n), np.int8)
    corners = _corners(mesh, n)
    directed = bool(len(mesh.faces)) and bool(mesh.is_winding_consistent)
    for axis in range(3):
        flat = corners[..., _across(axis)]
        sign = np.where(signed_areas(flat) > 0, 1, -1) if directed else np.ones(len(flat), np.int64)
        crossings = np.zeros((n, n, n + 1), np.int32)
        for face, column, row, depth in _along(corners, axis, n):
            after = np.clip(np.ceil(depth - 0.5), 0, n).astype(np.int64)
            np.add.at(crossings, (column, row, after), sign[face])
        count = np.cumsum(crossings, 2)
        if not directed:
            count %= 2
        vote = np.where(count[..., n:] == 0, np.where(count[..., :n] != 0, 1, -1), 0)
        votes += np.moveaxis(vote.astype(np.int8), 2, axis)
    return votes > 0


def _touched(mesh: Trimesh, n: int) -> Bool[np.ndarray, "N N N"]:
    """Cells that the surface passes: on lines through centres, and along edges, for triangles that no line meets."""
    corners = _corners(mesh, n)
    out = np.zeros((n, n, n), bool)
    for points in _on_edges(corners, n):
        cells = np.floor(points)
        cells = cells[((cells >= 0) & (cells < n)).all(1)].astype(np.int64)
        out[cells[:, 0], cells[:, 1], cells[:, 2]] = True
    for axis in range(3):
        marks = np.zeros((n, n, n), bool)
        for _, column, row, depth in _along(corners, axis, n):
            seen = (depth >= 0) & (depth < n)
            marks[column[seen], row[seen], np.floor(depth[seen]).astype(np.int64)] = True
        out |= np.moveaxis(marks, 2, axis)
    return out


def _on_edges(corners: Float[np.ndarray, "F 3 3"], n: int) -> Iterator[Float[np.ndarray, "P 3"]]:
    """Points on the edges of triangles, half a cell apart; in parts."""
    begin, along = corners.reshape(-1, 3), (np.roll(corners, -1, 1) - corners).reshape(-1, 3)
    # of edges that leave the cube, as many as fit into it several times over
    steps = np.clip(np.ceil(2 * np.linalg.norm(along, axis=1)), 1, 16 * n).astype(np.int64)
    ends = np.cumsum(steps)
    start = 0
    while start < len(steps):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + CHUNK, side="right")), start + 1)
        edge = np.repeat(np.arange(start, stop), steps[start:stop])
        step = np.arange(len(edge)) - (ends - steps)[edge] + before
        yield begin[edge] + along[edge] * (step / steps[edge])[:, None]
        start = stop


def _samples(mesh: Trimesh, n: int) -> tuple[Float[np.ndarray, "P 3"], Int[np.ndarray, " P"]]:
    """Points on the surface in the cube, at most a cell apart, and their triangles."""
    corners = _corners(mesh, n)
    points = [corners.mean(1)] + [corners[:, place] for place in range(3)]
    owners = [np.arange(len(corners))] * 4
    for axis in range(3):
        for face, column, row, depth in _along(corners, axis, n):
            points.append(np.insert(np.stack((column, row), 1) + 0.5, axis, depth, axis=1))
            owners.append(face)
    every, owner = (np.concatenate(points) + np.array(ASIDE)) / n, np.concatenate(owners)
    kept = ((every > -1) & (every < 2)).all(1)
    every, owner = every[kept], owner[kept]
    if len(every) > MANY:  # one of those that are close together will do
        fine = np.floor((every + 1) * 4 * n).astype(np.int64)
        first = np.unique((fine[:, 0] * 12 * n + fine[:, 1]) * 12 * n + fine[:, 2], return_index=True)[1]
        every, owner = every[first], owner[first]
    return every, owner


# --- a grid as a mesh -----------------------------------------------------------------------------------------------


def mesh_from_grid(values: Any, level: float = 0.5) -> tuple[Trimesh, bool, str]:
    """The closed surface around what lies above `level`, its normals outward, by marching cubes; whether there is one; and if
    not, why. For signed distances give them with the other sign, and level 0.

    Never raises on numbers: what isn't finite counts as outside, nothing above the level gives an empty mesh, and where the
    inside reaches the side of the cube it is closed there.

    Raises `ValueError` for anything but three axes of 1 to `MAX_SIZE` cells each.
    """
    from skimage.measure import marching_cubes
    from trimesh import Trimesh

    values = np.asarray(values)
    if values.ndim != 3 or not values.size or max(values.shape) > MAX_SIZE or values.dtype.kind not in "biuf":
        raise ValueError(
            f"a grid has three axes of 1 to {MAX_SIZE} cells and numbers in it, got {values.dtype} {list(values.shape)}"
        )
    if not isinstance(level, Real):
        raise ValueError(f"the level of a surface is a number, got {level!r:.60}")
    n = max(values.shape)
    field = np.clip(np.nan_to_num(values.astype(np.float64) - level, nan=-1, posinf=1, neginf=-1), -1e6, 1e6)
    if not (field > 0).any():
        return Trimesh(), False, "nothing is inside: every cell of the grid is empty"
    # a value at the level itself would make triangles without area
    tiny = 1e-3 * max(float(np.abs(field).max()), 1e-9)
    field = np.where(np.abs(field) < tiny, np.where(field > 0, tiny, -tiny), field)
    padded = np.pad(field, 1, mode="edge")
    rim = np.ones(padded.shape, bool)
    rim[1:-1, 1:-1, 1:-1] = False
    padded[rim] = -np.abs(padded[rim])
    # Lewiner's tables, the default, let four faces share an edge; with Lorensen's it is always two
    vertices, faces, _, _ = marching_cubes(
        padded.astype(np.float32), 0.0, gradient_direction="ascent", method="lorensen"
    )
    return Trimesh((vertices - 0.5) / n, faces), True, ""


def iou(a: Bool[np.ndarray, "N N N"], b: Bool[np.ndarray, "N N N"]) -> float:
    """Cells in both over cells in either; 1 for two empty grids."""
    either = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / either if either else 1.0


def pieces(occupied: Bool[np.ndarray, "N N N"]) -> int:
    """Parts that touch nowhere, not even at a corner."""
    from scipy.ndimage import label

    return int(label(occupied, structure=np.ones((3, 3, 3)))[1])
