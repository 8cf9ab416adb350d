"""What moves in a clip, and how: measured from the frames alone, on a torus.

The ground is the colour that most of the clip has; ink is what differs from it. A thing's place is the phase of the
first Fourier component of the ink along each axis: a shift that goes round the frame turns it by exactly that shift,
whatever the thing looks like.

Letters in shapes: T frames, S side in pixels, R rings, A angles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8

from mm.data.moving_paths import DIRECTIONS, TURN

FAINT = 0.12
"""Ink below is taken for noise of the ground."""
LEAST_WAY = 0.1
"""Frame widths that a thing must go at the least to have a direction."""
GROWN = 1.6
"""Ink at the end ÷ at the beginning from which a thing has grown (and 1 ÷ this from which it has shrunk)."""
LEAST_TURN = math.radians(2)
"""A frame, from which on a thing turns."""
RINGS, ANGLES = 8, 72

Frames = UInt8[np.ndarray, "T S S 3"]
Ink = Float[np.ndarray, "T S S"]


def ink(frames: Frames) -> Ink:
    """How far each pixel is from the ground, 0 to 1, at its most different colour; 0 where it is faint."""
    ground = np.median(frames.reshape(-1, 3), axis=0)
    away = np.abs(frames.astype(np.float64) - ground).max(-1) / 255
    return np.where(away < FAINT, 0.0, away)


def places(weights: Ink) -> Float[np.ndarray, "T 2"]:
    """Where the ink is in each frame, (x, y) in pixels, unrolled so that no step is longer than half the frame. Only
    differences mean anything. A frame without ink is where the one before it was."""
    count, size = len(weights), weights.shape[-1]
    turn = np.exp(2j * np.pi * np.arange(size) / size)
    waves = np.stack((weights.sum(1) @ turn, weights.sum(2) @ turn), -1)
    for number in range(1, count):
        if not np.abs(waves[number]).min():
            waves[number] = waves[number - 1]
    steps = np.angle(waves[1:] * waves[:-1].conj()) * size / (2 * np.pi)
    return np.concatenate((np.zeros((1, 2)), steps.cumsum(0)))


def direction(way: Float[np.ndarray, " 2"], size: int) -> str:
    """The direction nearest to a way in pixels; "" for one that is too short."""
    if math.hypot(*way) < LEAST_WAY * size:
        return ""
    return max(DIRECTIONS, key=lambda name: float(np.dot(way, DIRECTIONS[name])) / math.hypot(*DIRECTIONS[name]))


def directions(frames: Frames, fps: float, legs: int) -> tuple[str, ...]:
    """The direction of each leg; all but the last leg take `TURN` seconds."""
    place = places(ink(frames))
    turn = round(TURN * fps)
    ends = [min(number * turn, len(place) - 1) for number in range(legs)] + [len(place) - 1]
    return tuple(direction(place[ends[n + 1]] - place[ends[n]], frames.shape[1]) for n in range(legs))


def bounces(frames: Frames) -> bool:
    """Whether the motion turns back along an axis: a frame at least to each side, in steps of a third of the usual one."""
    steps = np.diff(places(ink(frames)), axis=0)
    usual = np.median(np.hypot(*steps.T)) if len(steps) else 0.0
    if usual < LEAST_WAY:
        return False
    return bool(((steps > usual / 4).any(0) & (steps < -usual / 4).any(0)).any())


def grows(frames: Frames) -> str:
    """ "grows", "shrinks" or "", by the ink of the first and the last two frames."""
    total = ink(frames).sum((1, 2))
    begin, end = float(total[:2].mean()), float(total[-2:].mean())
    if not begin or not end:
        return ""
    return "grows" if end / begin > GROWN else "shrinks" if begin / end > GROWN else ""


def turns(frames: Frames) -> str:
    """ "clockwise", "anticlockwise" or "": the shift between rings of ink about the centre, in neighbouring frames, that
    fits best over the whole clip."""
    weights = ink(frames)
    rings = np.stack([_rings(frame, place) for frame, place in zip(weights, _middles(weights), strict=True)])
    waves = np.fft.rfft(rings - rings.mean(-1, keepdims=True), axis=-1)
    fit = np.fft.irfft((waves[1:] * waves[:-1].conj()).sum((0, 1)), n=ANGLES)
    shifts = np.fft.fftfreq(ANGLES, 1 / ANGLES)
    near = np.abs(shifts) <= ANGLES // 8  # an eighth of a turn: beyond, a square would do as well the other way
    best = shifts[near][fit[near].argmax()] * 2 * np.pi / ANGLES
    return "" if abs(best) < LEAST_TURN else "clockwise" if best > 0 else "anticlockwise"


def _middles(weights: Ink) -> Float[np.ndarray, "T 2"]:
    """Centre of mass of each frame on the torus, found round the place of the first Fourier component."""
    size = weights.shape[-1]
    turn = np.exp(2j * np.pi * np.arange(size) / size)
    near = np.angle(np.stack((weights.sum(1) @ turn, weights.sum(2) @ turn), -1)) * size / (2 * np.pi)
    axis = np.arange(size)
    away = np.mod(axis - near[..., None] + size / 2, size) - size / 2
    mass = np.stack((weights.sum(1), weights.sum(2)), 1)
    return near + (away * mass).sum(-1) / np.maximum(mass.sum(-1), 1e-9)


def centred(frames: Frames) -> UInt8[np.ndarray, "T S S 3"]:
    """The ink alone, white on black, rolled so that the thing stands in the middle."""
    weights = ink(frames)
    size = weights.shape[-1]
    out = np.empty_like(frames)
    for number, (frame, (x, y)) in enumerate(zip(weights, _middles(weights), strict=True)):
        rolled = np.roll(frame, (size // 2 - round(y), size // 2 - round(x)), (0, 1))
        brightest = rolled.max()
        out[number] = np.round(255 * rolled / brightest if brightest else rolled)[..., None]
    return out


def _rings(frame: Float[np.ndarray, "S S"], middle: Float[np.ndarray, " 2"]) -> Float[np.ndarray, "R A"]:
    size = frame.shape[-1]
    wide = torch.from_numpy(np.tile(frame, (3, 3)))[None, None]
    angle = 2 * np.pi * np.arange(ANGLES) / ANGLES
    radius = size / 2 * (np.arange(RINGS) + 0.5) / RINGS
    x = np.mod(middle[0], size) + size + radius[:, None] * np.cos(angle)
    y = np.mod(middle[1], size) + size + radius[:, None] * np.sin(angle)
    spots = torch.from_numpy(np.stack((2 * x + 1, 2 * y + 1), -1) / (3 * size) - 1)[None]
    rings = F.grid_sample(wide, spots, mode="bilinear", align_corners=False)[0, 0].numpy()
    return rings * np.sqrt(radius)[:, None]


def moves_as(frames: Frames, fps: float, steps: Sequence[str]) -> bool:
    """Whether a clip of one thing moves as its caption says: `steps` as in `mm.data.moving_paths.Course`."""
    if steps[0] in DIRECTIONS:
        return directions(frames, fps, len(steps)) == tuple(steps)
    if steps[0] == "bounces":
        return bounces(frames)
    if steps[0] in ("grows", "shrinks"):
        return grows(frames) == steps[0]
    if steps[0] in ("clockwise", "anticlockwise"):
        return turns(frames) == steps[0]
    raise ValueError(f"got the motion {steps[0]!r}, which can't be measured")
