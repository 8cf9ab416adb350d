"""How things move: courses that are free of the size of a thing and of the number of frames, and where they lead.

A course says for any time where a thing is, so that a longer clip begins with the shorter one, frame for frame. Straight
motion goes on for ever: the frame is a torus, what leaves on one side comes in on the other. Bouncing stays inside.
Growing and shrinking end after `GROWTH` seconds, the second leg of a turn never.

Letters in shapes: T frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

MOTIONS = ("straight", "turn", "bounce", "rotate", "scale", "cross")
"""Kinds of motion: in one direction; in one, then another; off the walls; round itself; growing or shrinking; two things
that pass each other."""
DIRECTIONS = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-right": (1, -1),
    "up-left": (-1, -1),
    "down-right": (1, 1),
    "down-left": (-1, 1),
}
"""Name → signs along x (to the right) and y (down)."""
SPEED = (0.30, 0.45)
"""Frame widths a second: 16 frames at 8 fps cover 0.6 to 0.9 of the frame, the 8 of one leg 0.3 to 0.45."""
BOUNCE_SPEED = 1.5
"""Times as fast: a digit then meets a wall within 16 frames at 8 fps, wherever it begins."""
TURN = 1.0
"""Seconds of the first leg of a turn."""
SPIN = (math.radians(60), math.radians(120))
"""Radians a second: 7.5 to 15 degrees a frame at 8 fps."""
GROWTH = 2.0
"""Seconds after which a thing has grown or shrunk."""
SMALLEST = 0.5
"""Size of a thing before it grows, or after it has shrunk, against its own."""

Places = Float[np.ndarray, "T 2"]


@dataclass(frozen=True)
class Course:
    """The motion of one thing. Lengths in frame widths, time in seconds, angles in radians, clockwise as seen."""

    steps: tuple[str, ...]
    """What it does, leg by leg: names of `DIRECTIONS`, "bounces", "clockwise", "anticlockwise", "grows", "shrinks"."""
    start: tuple[float, float]
    """Where it begins, along x and y: share of the room in which it is wholly inside the frame."""
    velocity: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    """Of each leg."""
    spin: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    """At the beginning and from `GROWTH` on."""
    bounces: bool = False


@dataclass(frozen=True)
class Trace:
    """Where a course leads, frame by frame."""

    place: Places
    """Of the thing's centre of mass, (x, y) in pixels, 0 in the middle of the first pixel; beyond the frame where it has
    gone round (modulo the frame's width it is inside)."""
    angle: Float[np.ndarray, " T"]
    scale: Float[np.ndarray, " T"]


def trace(course: Course, reach: Sequence[float], size: int, frames: int, fps: float) -> Trace:
    """`reach`: how far a thing goes from its centre of mass to the left, top, right and bottom, in pixels."""
    time = np.arange(frames) / fps
    largest = max(course.scale)
    left, top, right, bottom = (largest * part for part in reach)
    if course.spin:  # any part may come to any side
        left = top = right = bottom = math.hypot(max(left, right), max(top, bottom))
    low, high = np.array([left, top]), np.array([size - 1 - right, size - 1 - bottom])
    if np.any(low > high):  # too large to turn inside: it stands in the middle
        low = high = np.where(low > high, (low + high) / 2, low)
    place = low + np.array(course.start) * (high - low) + size * travelled(course, time)
    if course.bounces:
        place = reflected(place, low, high)
    grown = np.clip(time / GROWTH, 0.0, 1.0)
    scale = course.scale[0] + (course.scale[1] - course.scale[0]) * grown
    return Trace(place, course.spin * time, scale)


def travelled(course: Course, time: Float[np.ndarray, " T"]) -> Places:
    """Way from the start, in frame widths, without walls."""
    way = np.zeros((len(time), 2))
    for number, velocity in enumerate(course.velocity):
        last = number == len(course.velocity) - 1
        spent = np.clip(time - number * TURN, 0.0, math.inf if last else TURN)
        way += spent[:, None] * np.array(velocity)
    return way


def reflected(place: Places, low: Float[np.ndarray, " 2"], high: Float[np.ndarray, " 2"]) -> Places:
    """The way folded between walls, as light between mirrors."""
    room = np.maximum(high - low, 1e-9)
    turned = np.mod(place - low, 2 * room)
    return low + np.minimum(turned, 2 * room - turned)


def draw_courses(kind: str, rng: np.random.Generator) -> tuple[Course, ...]:
    """One course of a kind, or the two of things that cross, at random."""
    start = (float(rng.uniform()), float(rng.uniform()))
    speed = float(rng.uniform(*SPEED))
    if kind == "straight":
        step = _choice(tuple(DIRECTIONS), rng)
        return (Course((step,), start, (_velocity(step, speed),)),)
    if kind == "turn":
        first = _choice(tuple(DIRECTIONS), rng)
        second = _choice([name for name in DIRECTIONS if name != first], rng)
        return (Course((first, second), start, (_velocity(first, speed), _velocity(second, speed))),)
    if kind == "bounce":
        # clear of the axes, so that it meets all walls
        angle = math.radians(float(rng.uniform(25, 65)) + 90 * int(rng.integers(4)))
        velocity = (BOUNCE_SPEED * speed * math.cos(angle), BOUNCE_SPEED * speed * math.sin(angle))
        return (Course(("bounces",), start, (velocity,), bounces=True),)
    if kind == "rotate":
        step = _choice(("clockwise", "anticlockwise"), rng)
        spin = float(rng.uniform(*SPIN)) * (1 if step == "clockwise" else -1)
        return (Course((step,), start, spin=spin),)
    if kind == "scale":
        step = _choice(("grows", "shrinks"), rng)
        return (Course((step,), start, scale=(SMALLEST, 1.0) if step == "grows" else (1.0, SMALLEST)),)
    assert kind == "cross"
    return _crossing(start, speed, rng)


def _crossing(start: tuple[float, float], speed: float, rng: np.random.Generator) -> tuple[Course, Course]:
    """Two things that come from opposite sides on nearly the same line, so that one covers the other in part."""
    first = _choice(("right", "left", "up", "down"), rng)
    second = {"right": "left", "left": "right", "up": "down", "down": "up"}[first]
    axis = 0 if first in ("right", "left") else 1
    out = []
    for number, step in enumerate((first, second)):
        near = 0.2 * start[axis]
        place = [0.0, 0.0]
        place[axis] = near if DIRECTIONS[step][axis] > 0 else 1 - near
        place[1 - axis] = 0.2 + 0.6 * start[1 - axis] + (float(rng.uniform(-0.2, 0.2)) if number else 0.0)
        out.append(Course((step,), (place[0], place[1]), (_velocity(step, speed),)))
    return out[0], out[1]


def _velocity(step: str, speed: float) -> tuple[float, float]:
    x, y = DIRECTIONS[step]
    length = math.hypot(x, y)
    return speed * x / length, speed * y / length


def _choice(names: Sequence[str], rng: np.random.Generator) -> str:
    return names[int(rng.integers(len(names)))]
