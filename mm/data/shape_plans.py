"""What generated shapes are: parts with sizes drawn at random, and the facts that captions and questions tell.

Whatever a caption says can be told from a grid of 32 cells: tall and short are far apart, legs, boards, walls and handles are two
cells thick or more, and everything stands on the floor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mm.data.solids import Part, X, Y, Z

FLOOR = 0.06
"""Height on which everything stands."""
TALL, SHORT = (0.74, 0.88), (0.34, 0.46)
"""Heights of what is called so."""
MIDDLE = 0.5
Facts = dict[str, str | int]


@dataclass(frozen=True)
class Thing:
    """One shape."""

    kind: str
    """Of `KINDS`."""
    facts: Facts
    """What can be said of it, by name: `height` (tall, short), `legs`, `top`, `boards`, …"""
    parts: tuple[Part, ...]


def draw_thing(kind: str, rng: np.random.Generator) -> Thing:
    """A shape of one of `KINDS`."""
    facts, parts = KINDS[kind](rng)
    return Thing(kind, facts, tuple(parts))


def turned(thing: Thing, quarters: int) -> Thing:
    """Turned about the vertical by quarters."""
    parts = thing.parts
    for _ in range(quarters % 4):
        parts = tuple(_quarter(part) for part in parts)
    return dataclasses.replace(thing, parts=parts)


def _quarter(part: Part) -> Part:
    x, y, z = part.centre
    axis = {X: Z, Y: Y, Z: X}[part.axis]
    # sizes of a box stand along the first axis across, along its own, and along the second across
    swaps = part.kind == "box" and part.axis == Y
    sizes = part.sizes[::-1] if swaps else part.sizes
    return dataclasses.replace(part, centre=(z, y, 1 - x), axis=axis, sizes=sizes)


# --- furniture ------------------------------------------------------------------------------------------------------


def table(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    height, tall = _height(rng)
    top = _one(rng, "round", "square", "long")
    legs = int(_one(rng, "1", "3", "4"))
    thick = _in(rng, 0.075, 0.1)
    width = _in(rng, 0.33, 0.42)
    depth = _in(rng, 0.16, 0.2) if top == "long" else width
    board = _board(top, width, depth, FLOOR + height - thick / 2, thick)
    return {"height": tall, "legs": legs, "top": top}, [board, *_legs(rng, legs, top, width, depth, height - thick / 2)]


def stool(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    height, tall = _height(rng)
    top, legs = _one(rng, "round", "square"), int(_one(rng, "3", "4"))
    thick = _in(rng, 0.09, 0.12)
    width = _in(rng, 0.19, 0.23)
    board = _board(top, width, width, FLOOR + height - thick / 2, thick)
    return {"height": tall, "legs": legs, "top": top}, [board, *_legs(rng, legs, top, width, width, height - thick / 2)]


def chair(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    """It faces z."""
    tall = _one(rng, "tall", "short")
    total = _in(rng, 0.8, 0.88) if tall == "tall" else _in(rng, 0.48, 0.55)
    seat = total * _in(rng, 0.46, 0.52)
    arms = _one(rng, "yes", "no")
    thick = _in(rng, 0.075, 0.09)
    width, depth = _in(rng, 0.2, 0.26), _in(rng, 0.2, 0.25)
    back = _in(rng, 0.035, 0.045)
    parts = [_board("square", width, depth, FLOOR + seat - thick / 2, thick)]
    parts += _legs(rng, 4, "square", width, depth, seat - thick / 2)
    parts.append(
        _box(
            MIDDLE,
            FLOOR + (seat + total) / 2 - thick / 4,
            MIDDLE - depth + back,
            width,
            (total - seat) / 2 + thick / 4,
            back,
        )
    )
    if arms == "yes":
        rise = (total - seat) * _in(rng, 0.5, 0.6)
        for side in (-1, 1):
            x = MIDDLE + side * (width - 0.035)
            parts.append(_box(x, FLOOR + seat + rise - 0.035, MIDDLE, 0.035, 0.035, depth))
            parts.append(_box(x, FLOOR + seat + rise / 2 - 0.02, MIDDLE + depth - 0.035, 0.035, rise / 2, 0.035))
    return {"height": tall, "arms": arms, "legs": 4}, parts


def shelf(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    """It faces z."""
    height, tall = _height(rng)
    boards = int(rng.integers(2, 6)) if tall == "tall" else int(rng.integers(2, 4))
    wide = _one(rng, "wide", "narrow")
    width = _in(rng, 0.36, 0.43) if wide == "wide" else _in(rng, 0.19, 0.23)
    depth, half = _in(rng, 0.12, 0.18), 0.035
    parts = [
        _box(MIDDLE + side * (width - half), FLOOR + height / 2, MIDDLE, half, height / 2, depth) for side in (-1, 1)
    ]
    for y in np.linspace(FLOOR + half, FLOOR + height - half, boards):
        parts.append(_box(MIDDLE, float(y), MIDDLE, width, half, depth))
    return {"height": tall, "boards": boards, "width": wide}, parts


def mug(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    """A handle points to x, a second the other way."""
    height, tall = _height(rng)
    handles = int(rng.integers(0, 3))
    radius, wall = _in(rng, 0.2, 0.25), _in(rng, 0.07, 0.08)
    ring, tube = min(_in(rng, 0.11, 0.13), 0.3 * height), _in(rng, 0.036, 0.042)
    centre = FLOOR + height * 0.52
    parts = [_upright("cylinder", FLOOR, height, radius)]
    for side in (1, -1)[:handles]:
        parts.append(Part("torus", (MIDDLE + side * (radius + 0.3 * ring), centre, MIDDLE), (ring, tube), Z))
    inner = height - wall
    parts.append(dataclasses.replace(_upright("cylinder", FLOOR + wall, inner + 0.1, radius - wall), cut=True))
    return {"height": tall, "handles": handles}, parts


# --- simple solids --------------------------------------------------------------------------------------------------


def sphere(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    size = _one(rng, "big", "small")
    radius = _in(rng, 0.33, 0.43) if size == "big" else _in(rng, 0.13, 0.2)
    return {"size": size}, [Part("sphere", (MIDDLE, FLOOR + radius, MIDDLE), (radius,))]


def box(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    form = _one(rng, "tall", "flat", "cubic")
    height, width = {"tall": (0.8, 0.17), "flat": (0.15, 0.37), "cubic": (0.5, 0.25)}[form]
    scale = _in(rng, 0.9, 1.1)
    depth = width * (1.0 if form == "cubic" else _in(rng, 0.8, 1.0))
    part = _box(MIDDLE, FLOOR + scale * height / 2, MIDDLE, width * scale, height * scale / 2, depth * scale)
    return {"form": form}, [part]


def cylinder(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    form = _one(rng, "tall", "flat")
    height, radius = (
        (_in(rng, 0.7, 0.88), _in(rng, 0.14, 0.22)) if form == "tall" else (_in(rng, 0.12, 0.2), _in(rng, 0.3, 0.42))
    )
    return {"form": form}, [_upright("cylinder", FLOOR, height, radius)]


def cone(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    height, tall = _height(rng)
    return {"height": tall}, [_upright("cone", FLOOR, height, _in(rng, 0.25, 0.38))]


def torus(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    pose, thickness = _one(rng, "lying", "standing"), _one(rng, "thick", "thin")
    tube = _in(rng, 0.11, 0.13) if thickness == "thick" else _in(rng, 0.06, 0.07)
    radius = _in(rng, 0.25, 0.3)
    middle = FLOOR + tube + (radius if pose == "standing" else 0)
    return {"pose": pose, "thickness": thickness}, [
        Part("torus", (MIDDLE, middle, MIDDLE), (radius, tube), Z if pose == "standing" else Y)
    ]


def capsule(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    pose = _one(rng, "lying", "standing")
    radius, half = _in(rng, 0.12, 0.17), _in(rng, 0.2, 0.27)
    middle = FLOOR + radius + (half if pose == "standing" else 0)
    return {"pose": pose}, [Part("capsule", (MIDDLE, middle, MIDDLE), (radius, half), Y if pose == "standing" else X)]


# --- of two solids --------------------------------------------------------------------------------------------------


def drilled(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    """A body with a hole through it, round or square, from front to back or from above."""
    body, hole, way = _one(rng, "box", "cylinder"), _one(rng, "round", "square"), _one(rng, "front", "top")
    height, width = _in(rng, 0.5, 0.62), _in(rng, 0.27, 0.33)
    middle = (MIDDLE, FLOOR + height / 2, MIDDLE)
    whole = (
        Part("box", middle, (width, height / 2, width))
        if body == "box"
        else Part("cylinder", middle, (width, height / 2))
    )
    gap = _in(rng, 0.12, 0.15)
    axis = Z if way == "front" else Y
    cut = Part("cylinder", middle, (gap, 0.6), axis, cut=True)
    if hole == "square":
        cut = Part("box", middle, (gap, 0.6, gap), axis, cut=True)
    return {"body": body, "hole": hole, "way": way}, [whole, cut]


def stack(rng: np.random.Generator) -> tuple[Facts, list[Part]]:
    """One solid on another."""
    lower, upper = _one(rng, "box", "cylinder"), _one(rng, "sphere", "box", "cone", "cylinder")
    height, width = _in(rng, 0.24, 0.36), _in(rng, 0.3, 0.36)
    size = _in(rng, 0.16, 0.22)
    top = FLOOR + height - 0.01
    base = (
        _box(MIDDLE, FLOOR + height / 2, MIDDLE, width, height / 2, width)
        if lower == "box"
        else _upright("cylinder", FLOOR, height, width)
    )
    over = {
        "sphere": Part("sphere", (MIDDLE, top + size, MIDDLE), (size,)),
        "box": _box(MIDDLE, top + size, MIDDLE, size, size, size),
        "cone": _upright("cone", top, 2 * size, size),
        "cylinder": _upright("cylinder", top, 2 * size, size),
    }[upper]
    return {"lower": lower, "upper": upper}, [base, over]


KINDS: dict[str, Callable[[np.random.Generator], tuple[Facts, list[Part]]]] = {
    own.__name__: own
    for own in (table, chair, stool, shelf, mug, sphere, box, cylinder, cone, torus, capsule, drilled, stack)
}


# --- parts ----------------------------------------------------------------------------------------------------------


def _box(x: float, y: float, z: float, a: float, b: float, c: float) -> Part:
    return Part("box", (x, y, z), (a, b, c))


def _upright(kind: str, bottom: float, height: float, radius: float) -> Part:
    return Part(kind, (MIDDLE, bottom + height / 2, MIDDLE), (radius, height / 2))


def _board(top: str, width: float, depth: float, y: float, thick: float) -> Part:
    if top == "round":
        return Part("cylinder", (MIDDLE, y, MIDDLE), (width, thick / 2))
    return _box(MIDDLE, y, MIDDLE, width, thick / 2, depth)


def _legs(rng: np.random.Generator, count: int, top: str, width: float, depth: float, height: float) -> list[Part]:
    """From the floor into the board, all alike, round or square; a single one is thicker."""
    half = _in(rng, 0.06, 0.08) if count == 1 else _in(rng, 0.037, 0.046)
    round_ = bool(rng.integers(2))
    inset = half + 0.005
    if count == 1:
        spots = [(0.0, 0.0)]
    elif count == 4:
        reach = (width - inset) * math.sqrt(0.5) if top == "round" else width - inset
        far = (width - inset) * math.sqrt(0.5) if top == "round" else depth - inset
        spots = [(a * reach, b * far) for a in (-1, 1) for b in (-1, 1)]
    else:  # two at the back, one in front
        wide, far = width - inset, depth - inset
        if top == "round":
            wide, far = wide * math.sqrt(0.75), far
            spots = [(-wide, -far / 2), (wide, -far / 2), (0.0, far)]
        else:
            spots = [(-wide, -far), (wide, -far), (0.0, far)]
    out = []
    for x, z in spots:
        if round_:
            out.append(Part("cylinder", (MIDDLE + x, FLOOR + height / 2, MIDDLE + z), (half, height / 2)))
        else:
            out.append(_box(MIDDLE + x, FLOOR + height / 2, MIDDLE + z, half, height / 2, half))
    return out


def _height(rng: np.random.Generator) -> tuple[float, str]:
    tall = _one(rng, "tall", "short")
    return _in(rng, *(TALL if tall == "tall" else SHORT)), tall


def _in(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def _one(rng: np.random.Generator, *choices: str) -> str:
    return choices[int(rng.integers(len(choices)))]
