"""Solids made of simple parts, and their signed distance on a grid, by formula.

Axes and cells as in `mm.voxels`: the cube [0, 1]³, x right, y up. Letters in shapes: N cells a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

X, Y, Z = 0, 1, 2


@dataclass(frozen=True)
class Part:
    """A solid that is added to what the parts before it make up, or cut out of it."""

    kind: str
    """Of `FORMS`."""
    centre: tuple[float, float, float]
    sizes: tuple[float, ...]
    """What the form of this kind takes, in sides of the cube."""
    axis: int = Y
    """Along which it stands, where it is round."""
    cut: bool = False


def distance(parts: Sequence[Part], n: int, truncation: float) -> Float[np.ndarray, "N N N"]:
    """Signed distance of each cell's centre in sides of the cube, negative inside, cut off at ±`truncation`; float32.

    The sign is exact. So is the distance to each part; to what several make up it is never more than the true one outside.
    """
    line = ((np.arange(n) + 0.5) / n).astype(np.float32)
    total: Any = None
    for part in parts:
        along = [
            (line - np.float32(centre)).reshape([-1 if axis == own else 1 for own in range(3)])
            for axis, centre in enumerate(part.centre)
        ]
        # forms stand along their second axis
        across = [axis for axis in range(3) if axis != part.axis]
        own = FORMS[part.kind](along[across[0]], along[part.axis], along[across[1]], *part.sizes)
        if total is None:
            total = np.inf if part.cut else own
        else:
            total = np.maximum(total, -own) if part.cut else np.minimum(total, own)
    return np.broadcast_to(np.clip(total, -truncation, truncation), (n, n, n)).astype(np.float32)


def box(x: Any, y: Any, z: Any, a: float, b: float, c: float) -> Any:
    """Half sides a, b (along the axis), c."""
    x, y, z = np.abs(x) - np.float32(a), np.abs(y) - np.float32(b), np.abs(z) - np.float32(c)
    outside = np.sqrt(_square(x) + _square(y) + _square(z))
    return outside + np.minimum(np.maximum(np.maximum(x, y), z), 0)


def sphere(x: Any, y: Any, z: Any, radius: float) -> Any:
    return np.sqrt(x * x + y * y + z * z) - np.float32(radius)


def cylinder(x: Any, y: Any, z: Any, radius: float, half: float) -> Any:
    """`half`: half its height."""
    aside, above = np.sqrt(x * x + z * z) - np.float32(radius), np.abs(y) - np.float32(half)
    return np.sqrt(_square(aside) + _square(above)) + np.minimum(np.maximum(aside, above), 0)


def capsule(x: Any, y: Any, z: Any, radius: float, half: float) -> Any:
    """`half`: half the length between the centres of its round ends."""
    above = np.maximum(np.abs(y) - np.float32(half), 0)
    return np.sqrt(x * x + above * above + z * z) - np.float32(radius)


def torus(x: Any, y: Any, z: Any, radius: float, tube: float) -> Any:
    """`radius`: of the circle in the middle of the tube, which lies across the axis."""
    aside = np.sqrt(x * x + z * z) - np.float32(radius)
    return np.sqrt(aside * aside + y * y) - np.float32(tube)


def cone(x: Any, y: Any, z: Any, radius: float, half: float) -> Any:
    """Its base at -`half`, its tip at +`half`."""
    aside = np.sqrt(x * x + z * z)
    # to the nearest point of the base, and of the slope
    base = np.maximum(aside - np.float32(radius), 0)
    below = y + np.float32(half)
    length = math.hypot(radius, 2 * half)
    right, up = np.float32(-radius / length), np.float32(2 * half / length)
    share = np.clip((aside - np.float32(radius)) * right + below * up, 0, np.float32(length))
    slope = np.sqrt((aside - np.float32(radius) - share * right) ** 2 + (below - share * up) ** 2)
    nearest = np.minimum(np.sqrt(base * base + below * below), slope)
    inside = (below > 0) & ((aside - np.float32(radius)) * up - below * right < 0)
    return np.where(inside, -nearest, nearest)


def _square(value: Any) -> Any:
    value = np.maximum(value, 0)
    return value * value


FORMS: dict[str, Callable[..., Any]] = {own.__name__: own for own in (box, sphere, cylinder, capsule, torus, cone)}
