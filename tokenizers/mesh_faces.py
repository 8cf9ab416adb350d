"""Shapes as the triangles of their mesh, nine coordinates each (the order of PolyGen, Nash et al. 2020, section 2; coordinates as
plain tokens as in MeshXL, Chen et al. 2024). Nothing is learned.

Corners lie on a lattice of `bins`³ places in the unit cube and are sorted by height, then depth, then width (y, z, x: PolyGen's
z-y-x, whose z is up). Each triangle begins with its lowest corner and keeps its direction; triangles are sorted by their corners.
A list of 9·F ids and one that ends it: after rounding to the lattice nothing is lost.

Letters in shapes: F triangles, K corners, V ids.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mm import saved
from mm.interfaces import Automaton, Decoded, Encoded, ModalityTokenizer, Spec
from mm.shapes import SIZE, Shape, as_shape
from mm.voxels import check_size, occupancy

AXES = [1, 2, 0]
"""Of a corner's tokens: y, z, x."""
MAX_BINS, MAX_FACES = 1024, 4096
TRIES = 6
"""How often a mesh is simplified further because rounding left too many triangles."""


class MeshFaces(ModalityTokenizer):
    """Triangles as lists of coordinates.

    Args:
        bins: places along each side of the cube.
        max_faces: most triangles of a shape; meshes of more are simplified (quadric error metrics, Garland and Heckbert 1997), or
            refused without `simplify`. Decoding leaves out those beyond.
        simplify: whether they are; needs fast-simplification (`pip install 'mm[mesh]'`).
        voxels: cells a side of the grid that a decoded shape is known by.
        grammar: what the automaton holds a model to: `sorted`, whole triangles with three corners in the order above; `faces`,
            whole triangles with three corners; `none`.

    Raises:
        ValueError: settings out of range.
    """

    def __init__(
        self,
        bins: int = 64,
        max_faces: int = 128,
        simplify: bool = True,
        voxels: int = SIZE,
        grammar: Literal["sorted", "faces", "none"] = "sorted",
    ) -> None:
        saved.whole_number("bins", bins, 4, MAX_BINS)
        saved.whole_number("max_faces", max_faces, 1, MAX_FACES)
        check_size(voxels)
        if grammar not in ("sorted", "faces", "none"):
            raise ValueError(f"grammar must be sorted, faces or none, got {grammar!r:.20}")
        self.bins, self.max_faces, self.simplify = bins, max_faces, simplify
        self.voxels, self.grammar = voxels, grammar

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="discrete",
            vocab_size=self.bins + 1,
            stop=self.bins,
            least=10,
            spatial=False,
            voxels=self.voxels,
            fingerprint=f"mesh_faces-1-{self.bins}",
        )

    # ---- there -------------------------------------------------------------------------------------------------------

    def encode(self, raw: Any) -> Encoded:
        """Ids of a shape: its mesh where one was given, else the surface of its grid. Raises `ValueError` for what isn't a shape,
        for an empty one, and for one that has too many triangles or none of the lattice's size."""
        shape = as_shape(raw, self.voxels) if not isinstance(raw, Shape) else raw
        if not len(shape.mesh.faces):
            raise ValueError("an empty shape has no triangles to encode; give one with something inside")
        corners = self.faces(shape.mesh)
        ids = torch.from_numpy(np.append(corners.reshape(-1), self.bins).astype(np.int64))
        return Encoded(grid=(len(ids),), ids=ids)

    def faces(self, mesh: Any) -> Int[np.ndarray, "F 3 3"]:
        """Sorted triangles on the lattice: corners as (y, z, x). Raises `ValueError` as `encode`."""
        found = self._rounded(mesh)
        if len(found) > self.max_faces and not self.simplify:
            raise ValueError(
                f"the mesh has {len(found):,} triangles, at most {self.max_faces:,} are encoded; simplify it"
            )
        wanted = self.max_faces
        for number in range(TRIES):
            if len(found) <= self.max_faces:
                break
            found = self._rounded(simplified(mesh, wanted, min(7 + number, 10)))
            wanted = max(1, wanted * 3 // 4)
        for coarser in (2, 4, 8, 16):  # what holds together in too many places: corners that are near become one
            if len(found) <= self.max_faces:
                break
            found = self._rounded(mesh, coarser)
        if not 1 <= len(found) <= self.max_faces:
            raise ValueError(
                f"the mesh comes to {len(found):,} triangles on a lattice of {self.bins}³ places, expected 1 to "
                f"{self.max_faces:,}; give a larger or a simpler one, or other bins and max_faces"
            )
        return found

    def _rounded(self, mesh: Any, step: int = 1) -> Int[np.ndarray, "F 3 3"]:
        """`step`: only every so many-th place is used."""
        places = np.floor(np.asarray(mesh.vertices, np.float64)[:, AXES] * self.bins).astype(np.int64)
        places = (places // step * step + step // 2).clip(0, self.bins - 1)
        corners, index = np.unique(places, axis=0, return_inverse=True)  # sorted: first axis first
        return corners[sorted_faces(index.reshape(-1)[np.asarray(mesh.faces, np.int64)])]

    # ---- and back ----------------------------------------------------------------------------------------------------

    def decode(self, encoded: Encoded) -> Decoded:
        """A shape with its mesh, as far as ids make whole triangles; what doesn't is left out, with `valid` off."""
        ids = np.zeros(0, np.int64) if encoded.ids is None else encoded.ids.detach().cpu().flatten().numpy()
        reasons = [] if encoded.ids is not None else ["these are not ids"]
        if len(ends := np.flatnonzero(ids == self.bins)):
            ids = ids[: ends[0]]
        if len(ids) % 9:
            reasons.append(f"{len(ids) % 9} coordinates at the end make no triangle")
        corners = ids[: len(ids) // 9 * 9].reshape(-1, 3, 3)
        if len(corners) > self.max_faces:
            reasons.append(f"{len(corners) - self.max_faces} triangles beyond the {self.max_faces} there may be")
            corners = corners[: self.max_faces]
        sound = ((corners >= 0) & (corners < self.bins)).all((1, 2))
        if not sound.all():
            reasons.append(f"{np.count_nonzero(~sound)} triangles with coordinates outside 0..{self.bins - 1}")
        corners = corners[sound]
        places, index = np.unique(corners.reshape(-1, 3), axis=0, return_inverse=True)
        index = index.reshape(-1, 3)
        kept = sorted_faces(index)
        if len(kept) < len(index):
            reasons.append(f"{len(index) - len(kept)} triangles that are none, or there twice")
        shape = self._shape(places, kept)
        reason = "; ".join([*reasons, *filter(None, [shape.reason])])
        return Decoded(value=shape, valid=not reason, reason=reason)

    def _shape(self, places: Int[np.ndarray, "K 3"], faces: Int[np.ndarray, "F 3"]) -> Shape:
        if not len(faces):
            return Shape(np.zeros((self.voxels,) * 3, bool))
        from trimesh import Trimesh

        vertices = np.empty((len(places), 3))
        vertices[:, AXES] = (places + 0.5) / self.bins
        mesh = Trimesh(vertices, faces, process=False)
        return Shape(occupancy(mesh, self.voxels), mesh)

    def automaton(self) -> Automaton | None:
        return None if self.grammar == "none" else Triangles(self.bins, self.max_faces, self.grammar == "sorted")

    @classmethod
    def tiny(cls) -> MeshFaces:
        return cls(bins=16, max_faces=64, simplify=False, voxels=16)

    @classmethod
    def examples(cls) -> list[Shape]:
        """Two boxes and a pyramid."""
        from trimesh import Trimesh
        from trimesh.creation import box

        meshes = [box(bounds=[[0.1, 0.2, 0.3], [0.9, 0.5, 0.7]]), box(bounds=[[0.4, 0.1, 0.4], [0.6, 0.9, 0.6]])]
        base = [[0.1, 0.1, 0.1], [0.9, 0.1, 0.1], [0.9, 0.1, 0.9], [0.1, 0.1, 0.9], [0.5, 0.9, 0.5]]
        meshes.append(Trimesh(base, [[0, 1, 2], [0, 2, 3], [0, 4, 1], [1, 4, 2], [2, 4, 3], [3, 4, 0]]))
        return [Shape(occupancy(mesh, 16), mesh) for mesh in meshes]


def sorted_faces(index: Int[np.ndarray, "F 3"]) -> Int[np.ndarray, "F 3"]:
    """Triangles of numbered corners in order, each turned so that its lowest comes first: none twice, none without area."""
    index = index[(index[:, 0] != index[:, 1]) & (index[:, 1] != index[:, 2]) & (index[:, 2] != index[:, 0])]
    turn = (index.argmin(1)[:, None] + np.arange(3)) % 3
    return np.unique(np.take_along_axis(index, turn, 1), axis=0) if len(index) else index


def simplified(mesh: Any, faces: int, haste: int = 7) -> Any:
    """A mesh of at most about so many triangles; with more `haste` (up to 10) rather so few than so good. Raises `ValueError`
    where the package for it is missing."""
    if len(mesh.faces) <= faces:
        return mesh
    try:
        import fast_simplification  # noqa: F401 - trimesh asks for it
    except ImportError as error:
        raise ValueError(
            f"the mesh has {len(mesh.faces):,} triangles, more than the {faces:,} that are wanted; to simplify it, install "
            "fast-simplification: pip install 'mm[mesh]'"
        ) from error
    return mesh.simplify_quadric_decimation(face_count=faces, aggression=haste)


class Triangles(Automaton):
    """Whole triangles of three different corners, at least one and at most `most`. `ordered`: the first corner of each is its
    lowest, and no lower than that of the one before. Corners are numbered in their order."""

    def __init__(self, bins: int, most: int, ordered: bool) -> None:
        self.bins, self.most, self.ordered = bins, most, ordered
        self.count = 0
        self.before = 0
        """The first corner of the last whole triangle."""
        self.ids: list[int] = []
        """Of the triangle that isn't whole."""
        self.ended = False

    def allowed(self, room: int) -> Bool[Tensor, " V"]:
        out = torch.zeros(self.bins + 1, dtype=torch.bool)
        whole = not self.ids
        if whole and (self.ended or room < 10 or self.count == self.most):
            out[self.bins] = True
            return out
        fits = torch.from_numpy(self._coordinates())
        out[: self.bins] = fits if fits.any() else True  # nothing fits where what was given did not
        out[self.bins] = whole and self.count > 0
        return out

    def _coordinates(self) -> Bool[np.ndarray, " V"]:
        """Of each coordinate, whether a corner that fits begins with those there are and this one."""
        whole, place = divmod(len(self.ids), 3)
        others = [self._number(self.ids[begin : begin + 3]) for begin in range(0, 3 * whole, 3)]
        lowest, highest = 0, self.bins**3 - 1
        if self.ordered:
            lowest = others[0] + 1 if others else self.before
            highest -= 0 if others else 2  # two more come above the first
        size = self.bins ** (2 - place)
        begin = (self._number(self.ids[3 * whole :]) * self.bins + np.arange(self.bins)) * size
        low, high = np.maximum(begin, lowest), np.minimum(begin + size - 1, highest)
        taken = sum(((low <= other) & (other <= high)).astype(np.int64) for other in others)
        return high - low + 1 - taken > 0

    def _number(self, coordinates: list[int]) -> int:
        number = 0
        for value in coordinates:
            number = number * self.bins + value
        return number

    def place(self) -> list[float]:
        """Which coordinate comes next (nine numbers), the corner before it, and the first one of the triangle, or of the last."""
        which = [float(number == len(self.ids)) for number in range(9)]
        square = self.bins**2
        before = [self.before // square, self.before // self.bins % self.bins, self.before % self.bins]
        whole = self.ids[: len(self.ids) // 3 * 3]
        return [
            *which,
            *(2 * value / (self.bins - 1) - 1 for value in (*(whole[-3:] or before), *(whole[:3] or before))),
        ]

    def accept(self, token: int) -> None:
        if self.ended or token == self.bins:
            self.ended, self.ids = True, []
            return
        self.ids.append(min(max(token, 0), self.bins - 1))
        if len(self.ids) == 9:
            self.before = self._number(self.ids[:3])
            self.count, self.ids = self.count + 1, []
