"""Shapes from files, meshes and grids as one kind of thing: a solid in the unit cube, known cell by cell.

Axes as in glTF (`mm.voxels`): x right, y up, z towards the viewer. Letters in shapes: N cells a side.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from dataclasses import dataclass
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from mm import safe_io
from mm.voxels import MAX_SIZE, TRUNCATION, check_size, distance_of, mesh_from_grid, normalised, sdf

if TYPE_CHECKING:  # imported where it is used, so that `import mm` stays fast
    from trimesh import Trimesh

SIZE = 32
"""Cells a side, by default."""
INSIDE = 0.01
"""Room that a mesh leaves to each side of the cube that it stands in."""
MAX_NPZ = 1 << 28
"""Largest `.npz` that is read (256 MiB)."""


@dataclass(frozen=True, eq=False)
class Shape:
    """A solid. Raises `ValueError` for a grid of another form."""

    grid: Bool[np.ndarray, "N N N"] | Float[np.ndarray, "N N N"]
    """bool: which cells have their centre inside; or float32: signed distance of the centre to the surface, in sides of the
    cube and negative inside. Indexed [x, y, z]."""
    given: Trimesh | None = None
    """The mesh that it was made of, in the unit cube; None where the grid came first."""

    def __post_init__(self) -> None:
        grid = np.asarray(self.grid)
        cube = grid.ndim == 3 and len(set(grid.shape)) == 1
        if not cube or (grid.dtype != bool and grid.dtype.kind != "f"):
            raise ValueError(
                f"a shape is a grid [N, N, N] of bool (what is inside) or float (signed distance, negative inside), got "
                f"{grid.dtype} {list(grid.shape)}"
            )
        check_size(len(grid))
        if grid.dtype != bool:
            with np.errstate(over="ignore"):  # too large for 32 bits is infinite, and refused as that
                grid = grid.astype(np.float32, copy=False)
            if not np.isfinite(grid).all():
                raise ValueError("a shape's distances must be finite numbers, got NaN or infinity among them")
        object.__setattr__(self, "grid", grid)

    @property
    def size(self) -> int:
        """Cells a side."""
        return len(self.grid)

    @cached_property
    def occupancy(self) -> Bool[np.ndarray, "N N N"]:
        return self.grid if self.grid.dtype == bool else self.grid < 0

    @cached_property
    def distance(self) -> Float[np.ndarray, "N N N"]:
        """Signed distance, negative inside; where only the cells are known, from these, cut off at ±`TRUNCATION`."""
        return distance_of(self.grid) if self.grid.dtype == bool else self.grid

    @cached_property
    def mesh(self) -> Trimesh:
        """The mesh that was given, or the closed surface of the grid; an empty one for an empty grid."""
        return self._surface[0] if self.given is None else self.given

    @property
    def valid(self) -> bool:
        """Whether anything is inside."""
        return bool(self.occupancy.any())

    @property
    def reason(self) -> str:
        """Why it isn't valid; empty for one that is."""
        return "" if self.valid else self._surface[2]

    @cached_property
    def _surface(self) -> tuple[Trimesh, bool, str]:
        return mesh_from_grid(self.grid) if self.grid.dtype == bool else mesh_from_grid(-self.grid, 0.0)


ShapeSource = str | os.PathLike[str] | bytes | IO[bytes] | Shape | np.ndarray[Any, Any]
"""A path, the bytes of a file, an open binary file, a shape, a grid; and any `trimesh.Trimesh` or `trimesh.Scene`."""


def from_mesh(mesh: Trimesh, size: int = SIZE, *, margin: float = 0.05, truncation: float = TRUNCATION) -> Shape:
    """A mesh, brought into the cube, with its signed distances. Raises `ValueError` for one without faces or extent."""
    mesh = normalised(mesh, margin)
    return Shape(sdf(mesh, size, truncation), mesh)


def stands(mesh: Trimesh) -> bool:
    """Whether a mesh has its place in the unit cube already, as those have that were written here: `INSIDE` from its sides, a
    quarter of it long or more, and over or under its middle. Size and place say what would be lost ("big", on the floor)."""
    low, high = mesh.bounds
    middle = (low + high)[[0, 2]] / 2
    return bool(
        low.min() >= INSIDE
        and high.max() <= 1 - INSIDE
        and (high - low).max() >= 0.25
        and (np.abs(middle - 0.5) <= 0.15).all()
    )


def as_shape(raw: ShapeSource | Any, size: int = SIZE) -> Shape:
    """What a tokenizer of shapes is given, as a shape of its size.

    Meshes and their files (`mm.shape_files.load_mesh`) are brought into the cube, unless they stand in it (`stands`), and
    measured; a shape of another size is measured anew if it was made of a mesh.

    Raises:
        ValueError: for a grid of another size, a file that isn't a mesh, and whatever isn't a shape.
    """
    if isinstance(raw, np.ndarray):
        raw = Shape(raw)
    if isinstance(raw, Shape):
        if raw.size == size:
            return raw
        if raw.given is None:
            raise ValueError(f"a grid of {size}³ cells is wanted, got {raw.size}³; give its mesh, which fits any")
        return Shape(sdf(raw.given, size), raw.given)
    from mm.shape_files import load_mesh

    mesh = load_mesh(raw)
    return Shape(sdf(mesh, size), mesh) if stands(mesh) else from_mesh(mesh, size)


# --- grids as files -------------------------------------------------------------------------------------------------


def to_npz(shape: Shape) -> bytes:
    """The grid as an `.npz` file with the array `grid`, without loss; distances take 16 bits where these suffice. The mesh that
    it was made of is left out."""
    grid = shape.grid
    if grid.dtype != bool:
        with np.errstate(over="ignore"):
            short = grid.astype(np.float16)
        grid = short if np.array_equal(short, grid) else grid
    file = io.BytesIO()
    np.savez_compressed(file, grid=grid)
    return file.getvalue()


def load_shape(source: ShapeSource | Any, size: int = SIZE) -> Shape:
    """As `as_shape`, and `.npz` files with an array `grid` (`to_npz`) too, whose size is their own.

    Nothing is unpickled, and no more is unpacked than the largest grid takes. Raises `ValueError` as `as_shape`.
    """
    name, data = "the grid", source
    if isinstance(source, str | os.PathLike) and str(source).lower().endswith(".npz"):
        name, data = repr(str(source)), safe_io.read_bytes(source, max_bytes=MAX_NPZ)
    if isinstance(data, bytes) and data[:4] == b"PK\x03\x04":
        try:
            return Shape(_grid(data))
        except Exception as error:  # a stranger's bytes may raise anything in the unpackers
            raise ValueError(f"{name:.400} can't be used as an .npz file with an array `grid`: {error}") from error
    return as_shape(source, size)


def _grid(data: bytes) -> np.ndarray[Any, Any]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive, archive.open("grid.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its array is of an unknown version")
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
        if (
            dtype.kind not in "bf"
            or dtype.itemsize > 8
            or len(shape) != 3
            or not all(0 < own <= MAX_SIZE for own in shape)
        ):
            raise ValueError(f"its array is {dtype} {list(shape)}; expected three axes of at most {MAX_SIZE} cells")
        size = math.prod(shape) * dtype.itemsize
        values = file.read(size + 1)  # no more than that is unpacked
        if len(values) != size:
            raise ValueError(f"its array doesn't hold the {dtype} {list(shape)} that its header promises")
    # any byte but 0 is true: a bool that is another number than 1 would be counted as that number
    array = np.frombuffer(values, np.uint8) != 0 if dtype.kind == "b" else np.frombuffer(values, dtype)
    return array.reshape(shape, order="F" if columns_first else "C")
