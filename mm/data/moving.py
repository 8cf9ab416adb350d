"""Clips of things that move, made here without end: digits, shapes and pictures, with captions and true tracks.

Clip n depends on the settings, the seed and n alone; nothing is read but the digits and pictures that are given. A clip
of more frames begins with the clip of fewer (`moving_paths`), so the true continuation of every clip is known.

Letters in shapes: T frames, S side of a frame in pixels, N points.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8

from mm.data.example import Lazy, Source, digest
from mm.data.moving_captions import caption
from mm.data.moving_paths import MOTIONS, Course, Trace, draw_courses, trace
from mm.data.moving_things import (
    COLOURS,
    SHAPES,
    Sprite,
    Thing,
    draw_printed,
    draw_shape,
    open_pool,
    printed_sprite,
    shape_sprite,
)
from mm.video import MAX_FPS, MIN_FPS, Video

THINGS = ("digits", "shapes", "pictures")
MAX_COUNT = 1 << 22
"""Clips of a source: their keys are held in memory."""
MAX_FRAMES = 1 << 14
SIDES = (16, 512)
"""Smallest and largest side of a frame in pixels."""
MAX_ELEMENTS = 1 << 26
"""Pixels of one clip, all frames together: 1 GiB while it is drawn."""


@dataclass(frozen=True)
class Plan:
    """All that was drawn for one clip."""

    kind: str
    """Of `MOTIONS`."""
    things: tuple[Thing, ...]
    """One, or two that cross; the later is in front."""
    courses: tuple[Course, ...]
    ground: str
    caption: str


class MovingSource(Source):
    """Captioned clips. Fields: `video`, `caption`, `kind` (of `MOTIONS`), `motion` (what the first thing does, leg by leg:
    directions such as "up-right", or "bounces", "clockwise", "anticlockwise", "grows", "shrinks"), `digit` (of the first
    thing, or −1), `things` (words), `motions` (of each thing), `ground`, and `track` (of each thing, float [T, 2]: its centre
    of mass in pixels, modulo the frame).

    Args:
        digits: handwritten digits: the path of an `.npz` with `images` and `labels`, of shards or of a folder whose
            pictures are dark on white and have a field `digit`, or a whole source of such. Without, digits are drawn in a
            typeface under random strokes, tilts and slants, and called printed.
        pictures: captioned pictures that move, such as emoji: shards, a folder, or a whole source.
        count: clips of the source; an epoch is as many. What clip n is doesn't depend on it.
        seed: another seed, other clips.
        size: side of the frames in pixels.
        frames: of a clip.
        fps: frames a second; how far things move in a second doesn't depend on it.
        motions: kinds to choose from; a kind named twice comes twice as often.
        things: of "digits", "shapes" and "pictures", likewise. By default digits and shapes, and pictures where given.
        grounds: names of `COLOURS`, likewise. Captions name every ground but black.
        inks: colours of digits, likewise; captions name every ink but white. Shapes have any colour but the ground's.
        varied: half the captions are one of several sentences that say the same; otherwise all are the plain one.
        options: of every source. Clips that are held out by their key show digits and pictures that no other clip shows
            (each `holdout_every`-th of these); with `holdout_where`, all clips share them.
    """

    def __init__(
        self,
        digits: str | Sequence[str] | Source | None = None,
        pictures: str | Sequence[str] | Source | None = None,
        count: int = 100_000,
        seed: int = 0,
        size: int = 32,
        frames: int = 16,
        fps: float = 8.0,
        motions: Sequence[str] = MOTIONS,
        things: Sequence[str] | None = None,
        grounds: Sequence[str] = ("black",),
        inks: Sequence[str] = ("white",),
        varied: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if things is None:
            things = ("digits", "shapes") if pictures is None else THINGS
        _check_choices("motions", motions, MOTIONS)
        _check_choices("things", things, THINGS)
        _check_choices("grounds", grounds, COLOURS)
        _check_choices("inks", inks, COLOURS)
        if "pictures" in things and pictures is None:
            raise ValueError("things names pictures, but none are given; give pictures: a folder or shards")
        if "digits" in things and set(inks) & set(grounds):
            both = min(set(inks) & set(grounds))
            raise ValueError(f"digits in {both} can't be seen on {both}; take it out of inks or of grounds")
        if not 1 <= count <= MAX_COUNT or seed < 0:
            raise ValueError(f"count must be 1 to {MAX_COUNT:,} and seed at least 0, got {count:,} and {seed}")
        if not SIDES[0] <= size <= SIDES[1] or not MIN_FPS <= fps <= MAX_FPS:
            raise ValueError(
                f"size must be {SIDES[0]} to {SIDES[1]} and fps {MIN_FPS:g} to {MAX_FPS:g}; got {size} and {fps:g}"
            )
        self.count, self.seed, self.size, self.frames, self.fps = count, seed, size, frames, float(fps)
        check_frames(frames, size)
        self.motions, self.things, self.grounds, self.inks = tuple(motions), tuple(things), tuple(grounds), tuple(inks)
        self.varied = varied
        self._every = 0 if self.holdout_where else self.holdout_every
        self.pools = {
            kind: open_pool(given, kind, self._every)
            for name, kind, given in (("digits", "digit", digits), ("pictures", "picture", pictures))
            if given is not None and name in self.things
        }
        self._finish([f"{number:08d}" for number in range(count)], f"moving {', '.join(sorted(set(self.things)))}")

    @property
    def identity(self) -> str:
        settings = (
            *(self.count, self.seed, self.size, self.frames, self.fps, self.varied, self._every),
            *(self.motions, self.things, self.grounds, self.inks),
        )
        return digest("moving 1", *map(str, settings), *(pool.source.identity for pool in self.pools.values()))

    def longer(self, frames: int) -> MovingSource:
        """The same clips with another number of frames."""
        check_frames(frames, self.size)
        out = copy.copy(self)
        out.frames = frames
        return out

    def plan(self, number: int) -> Plan:
        """What clip `number` shows, of any number from 0: also beyond `count`."""
        rng = np.random.default_rng([self.seed, number])
        held = bool(self._every) and number % self._every == 0
        kind, ground = _one_of(self.motions, rng), _one_of(self.grounds, rng)
        courses = draw_courses(kind, rng)
        things = tuple(self._thing(place, kind, ground, held, number, rng) for place in range(len(courses)))
        words = caption(things, courses, ground, rng if self.varied else None)
        return Plan(kind, things, courses, ground, words)

    def _thing(self, place: int, motion: str, ground: str, held: bool, number: int, rng: np.random.Generator) -> Thing:
        which = _one_of(self.things, rng)
        ink = _one_of(self.inks, rng)
        if which == "pictures":
            return self.pools["picture"].draw(rng, held, ink)
        if which == "digits" and "digit" in self.pools:
            return self.pools["digit"].draw(rng, held, ink)
        if which == "digits":
            return draw_printed(rng, ink, (self.seed, number, place))
        inks = [name for name in COLOURS if name != ground]
        # that a circle turns can't be seen
        shapes = [name for name in SHAPES if motion != "rotate" or name != "circle"]
        return draw_shape(rng, _one_of(inks, rng), shapes)

    def sprite(self, thing: Thing) -> Sprite:
        """Raises `BrokenExample` for a picture that can't be used."""
        if thing.index >= 0:
            return self.pools[thing.kind].sprite(thing, self.size)
        if thing.kind == "digit":
            return printed_sprite(thing, self.size)
        return shape_sprite(thing.noun, thing.ink, thing.side * self.size)

    def traces(self, plan: Plan, frames: int | None = None) -> list[Trace]:
        """Where the things of a clip go."""
        frames = self.frames if frames is None else frames
        return [
            trace(course, self.sprite(thing).reach, self.size, frames, self.fps)
            for thing, course in zip(plan.things, plan.courses, strict=True)
        ]

    def draw(self, plan: Plan, frames: int | None = None) -> Video:
        """The clip of a plan, with another number of frames where given."""
        frames = self.frames if frames is None else frames
        check_frames(frames, self.size)
        sprites = [self.sprite(thing) for thing in plan.things]
        traces = [
            trace(course, sprite.reach, self.size, frames, self.fps)
            for course, sprite in zip(plan.courses, sprites, strict=True)
        ]
        return Video(frames=render(sprites, traces, COLOURS[plan.ground], self.size), fps=self.fps)

    def _fields(self, ordinal: int) -> dict[str, Any]:
        plan = self.plan(ordinal)
        return {
            "video": Lazy(lambda: self.draw(plan)),
            "caption": plan.caption,
            "kind": plan.kind,
            "motion": list(plan.courses[0].steps),
            "motions": [list(course.steps) for course in plan.courses],
            "digit": plan.things[0].digit,
            "things": [thing.name("") for thing in plan.things],
            "ground": plan.ground,
            "track": Lazy(lambda: [np.mod(own.place, self.size) for own in self.traces(plan)]),
        }


def render(
    sprites: Sequence[Sprite], traces: Sequence[Trace], ground: tuple[int, int, int], size: int
) -> UInt8[np.ndarray, "T S S 3"]:
    """Sprites laid over the ground in turn, at places between pixels, on a torus."""
    count = len(traces[0].scale)
    frames = torch.tensor(ground, dtype=torch.float32).div(255)[None, :, None, None].expand(count, 3, size, size)
    for sprite, own in zip(sprites, traces, strict=True):
        seen = _placed(sprite, own, size)
        frames = seen[:, :3] + frames * (1 - seen[:, 3:])
    return frames.mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _placed(sprite: Sprite, own: Trace, size: int) -> Float[torch.Tensor, "T 4 S S"]:
    """The sprite in each frame by bilinear interpolation; nothing where it is not."""
    pixels = torch.from_numpy(sprite.pixels)
    place, angle, scale = (torch.from_numpy(np.asarray(values, np.float64)) for values in dataclasses.astuple(own))
    axis = torch.arange(size, dtype=torch.float64)
    # from the centre of mass to each column and row, the shorter way round
    away = torch.remainder(axis - place[..., None] + size / 2, size) - size / 2
    across, down = away[:, 0, None, :], away[:, 1, :, None]
    cosine, sine = (angle.cos() / scale)[:, None, None], (angle.sin() / scale)[:, None, None]
    height, width = pixels.shape[1:]
    x = sprite.centre[0] + cosine * across + sine * down
    y = sprite.centre[1] - sine * across + cosine * down
    spots = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1).float()
    many = pixels[None].expand(len(spots), -1, -1, -1)
    return F.grid_sample(many, spots, mode="bilinear", padding_mode="zeros", align_corners=False)


def check_frames(frames: int, size: int) -> None:
    """Raises `ValueError` for a number of frames that can't be drawn."""
    if not 1 <= frames <= MAX_FRAMES or frames * size * size > MAX_ELEMENTS:
        most = min(MAX_FRAMES, MAX_ELEMENTS // (size * size))
        raise ValueError(f"clips of {size}×{size} have 1 to {most:,} frames, got {frames:,}")


def _check_choices(what: str, given: Sequence[str], known: Any) -> None:
    if isinstance(given, str) or not given or (unknown := [name for name in given if name not in known]):
        wrong = repr(given) if isinstance(given, str) or not given else repr(unknown[0])
        raise ValueError(f"{what} holds {wrong}; give a list of one or more of {', '.join(known)}")


def _one_of(names: Sequence[str], rng: np.random.Generator) -> str:
    return names[int(rng.integers(len(names)))]
