"""`mm tokenize` of shapes: brought to the tokenizer's grid, encoded, decoded, compared."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.shapes import Shape, load_shape
from mm.voxels import iou

if TYPE_CHECKING:
    from mm.interfaces import ModalityTokenizer

POINTS = 4096
"""Points on each surface between which the chamfer distance is measured."""


def read_shape(file: str, tokenizer: ModalityTokenizer) -> Shape:
    """The mesh or grid of a file, at the tokenizer's size. Raises `ValueError` as `mm.shapes.load_shape`."""
    return load_shape(file, tokenizer.spec.voxels)


def tokenize_shape(shape: Shape, tokenizer: ModalityTokenizer) -> tuple[dict[str, Any], Shape]:
    """Figures, and what was decoded. Volumes and surfaces are those of the mesh that was given, in the unit cube, and of the
    mesh that came back."""
    from mm.commands.tokenize import bits

    start = time.perf_counter()
    encoded = tokenizer.encode(shape)
    middle = time.perf_counter()
    decoded = tokenizer.decode(encoded)
    end = time.perf_counter()
    size = bits(tokenizer.spec, encoded)
    report = shape.mesh.metadata.get("report")
    figures: dict[str, Any] = {
        "tokens": len(encoded),
        "grid": list(encoded.grid),
        "bits": size,
        "cells": shape.size,
        "faces": len(shape.mesh.faces),
        "watertight": bool(report.watertight if report else shape.mesh.is_watertight),
    }
    if tokenizer.decodes:
        figures |= {"valid": decoded.valid, **lost_shape(shape, decoded.value)}
        if decoded.reason:
            figures["reason"] = decoded.reason
    figures |= {
        "encode_ms": round(1000 * (middle - start), 2),
        "decode_ms": round(1000 * (end - middle), 2),
        "bits_per_cell": round(size / shape.size**3, 5),
        "raw_bits": shape.size**3,
    }
    return figures, decoded.value


def lost_shape(given: Shape, back: Shape) -> dict[str, Any]:
    """Intersection over union of the cells, how much the volume changed, and the chamfer distance between the surfaces in sides
    of the cube; None where there is no volume or no surface to compare."""
    same = given.size == back.size
    volume = abs(float(given.mesh.volume))
    error = abs(float(back.mesh.volume)) / volume - 1 if volume and len(back.mesh.faces) else None
    distance = chamfer(given, back)
    return {
        "iou": round(iou(given.occupancy, back.occupancy), 4) if same else None,
        "volume_error": None if error is None else round(error, 4),
        "chamfer": None if distance is None else round(distance, 5),
        "decoded_faces": len(back.mesh.faces),
        "decoded_watertight": bool(back.mesh.is_watertight),
        "decoded_euler": int(back.mesh.euler_number),
    }


def chamfer(a: Shape, b: Shape, points: int = POINTS) -> float | None:
    """Mean distance from points on each surface to the nearest point on the other, both ways; None if one has no surface."""
    from scipy.spatial import cKDTree
    from trimesh.sample import sample_surface

    if not len(a.mesh.faces) or not len(b.mesh.faces):
        return None
    first, second = (np.asarray(sample_surface(shape.mesh, points, seed=0)[0]) for shape in (a, b))
    return float((cKDTree(second).query(first)[0].mean() + cKDTree(first).query(second)[0].mean()) / 2)
