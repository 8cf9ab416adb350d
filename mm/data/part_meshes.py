"""Solids made of parts as meshes of few triangles: each part a closed mesh of its own, whether they overlap or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.data.solids import Part, Y

if TYPE_CHECKING:  # imported where it is used, so that `import mm` stays fast
    from trimesh import Trimesh

SIDES = (3, 64)
"""Fewest and most sides of what is round."""


def part_meshes(parts: Sequence[Part], sides: int) -> Trimesh:
    """What is round has `sides` sides, and about the volume that it had. Raises `ValueError` for a part that is cut out."""
    from trimesh.util import concatenate

    if any(part.cut for part in parts):
        raise ValueError("what is cut out of a shape has no mesh of its own; take a shape that parts only add to")
    whole: Any = concatenate([_mesh(part, sides) for part in parts])
    return whole


def _mesh(part: Part, sides: int) -> Any:
    from trimesh import creation

    # as much area as the circle around which it stands
    wider = math.sqrt(2 * math.pi / (sides * math.sin(2 * math.pi / sides)))
    size = part.sizes
    match part.kind:
        case "box":
            mesh = creation.box([2 * size[0], 2 * size[2], 2 * size[1]])
        case "cylinder":
            mesh = creation.cylinder(wider * size[0], 2 * size[1], sections=sides)
        case "cone":
            mesh = creation.cone(wider * size[0], 2 * size[1], sections=sides)
        case "sphere":
            mesh = creation.uv_sphere(wider * size[0], count=[max(3, sides * 2 // 3), sides])
        case "capsule":
            mesh = creation.capsule(2 * size[1], wider * size[0], count=[max(4, sides // 2 * 2), sides])
        case _:
            mesh = creation.torus(size[0], wider * size[1], major_sections=sides + 2, minor_sections=max(3, sides - 2))
    # theirs stand along z, parts along their axis: x, y, z of theirs go along these axes of ours
    across = [axis for axis in range(3) if axis != part.axis]
    local = np.asarray(mesh.vertices) - mesh.bounds.mean(0)
    places = np.empty_like(local)
    places[:, [across[0], across[1], part.axis]] = local
    faces = np.asarray(mesh.faces)
    mirrored = part.axis == Y  # x, z, y is a left hand
    mesh = type(mesh)(places + np.asarray(part.centre), faces[:, ::-1] if mirrored else faces, process=False)
    mesh.merge_vertices()
    mesh.update_faces(mesh.nondegenerate_faces())
    return mesh
