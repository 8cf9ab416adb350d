"""Captioned shapes made here without end: simple solids, two of them together, and furniture, with questions and answers.

Shape n depends on the settings, the seed and n alone; nothing is read. Letters in shapes: N cells a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.data.example import Lazy, Source, digest
from mm.data.part_meshes import SIDES, part_meshes
from mm.data.shape_captions import caption, questions
from mm.data.shape_plans import KINDS, Facts, Thing, draw_thing, turned
from mm.data.solids import distance
from mm.shape_views import MAX_SIDE, draw, pose_at
from mm.shapes import SIZE, Shape
from mm.voxels import TRUNCATION, mesh_from_grid

if TYPE_CHECKING:
    from PIL import Image
    from trimesh import Trimesh

MAX_COUNT = 1 << 22
"""Shapes of a source: their keys are held in memory."""
SIZES = (16, 128)
"""Fewest and most cells a side; what captions say is made for 32 and more."""
GRIDS = ("sdf", "occupancy")


@dataclass(frozen=True)
class Plan:
    """All that was drawn for one shape."""

    thing: Thing
    caption: str
    plain: str
    asked: int
    """Which of its questions is the example's."""

    @property
    def kind(self) -> str:
        return self.thing.kind

    @property
    def facts(self) -> Facts:
        return self.thing.facts

    @property
    def questions(self) -> list[tuple[str, str]]:
        return questions(self.thing)


class ShapesSource(Source):
    """Captioned shapes. Fields: `shape` (`mm.shapes.Shape`), `caption`, `plain` (the plain caption), `kind` (of
    `mm.data.shape_plans.KINDS`), `attributes` (fact → value: `height`, `legs`, `top`, …), `question` and `answer` (one of the
    shape's, drawn at random), `questions` (all, each with its answer), and with `picture` also `image` (PIL): the shape from
    somewhere in front and above.

    Args:
        count: shapes of the source; an epoch is as many. What shape n is doesn't depend on it.
        seed: another seed, other shapes.
        size: cells a side.
        grid: "sdf" for signed distances, rounded to 16 bits, or "occupancy" for which cells are inside.
        kinds: to choose from; a kind named twice comes twice as often. By default all, furniture twice as often.
        varied: half the captions are one of several that say the same; otherwise all are the plain one.
        turned: turn shapes about the vertical by quarters at random; otherwise they all face the viewer.
        picture: side of the pictures in pixels; 0: there are none.
        sides: shapes come with a mesh of few triangles (`Shape.given`, see `mm.data.part_meshes`) whose round parts have so many
            sides; 0: with none. Not for kinds of which something is cut out.
        options: of every source. `holdout_where: {plain: ["a tall table with three legs and a round top"]}` holds out what
            is so called.
    """

    def __init__(
        self,
        count: int = 100_000,
        seed: int = 0,
        size: int = SIZE,
        grid: str = "sdf",
        kinds: Sequence[str] | None = None,
        varied: bool = True,
        turned: bool = False,
        picture: int = 0,
        sides: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        kinds = (*KINDS, *list(KINDS)[:5]) if kinds is None else kinds
        if isinstance(kinds, str) or not kinds or (unknown := [name for name in kinds if name not in KINDS]):
            wrong = repr(kinds) if isinstance(kinds, str) or not kinds else repr(unknown[0])
            raise ValueError(f"kinds holds {wrong:.60}; give a list of one or more of {', '.join(KINDS)}")
        if not 1 <= count <= MAX_COUNT or seed < 0:
            raise ValueError(f"count must be 1 to {MAX_COUNT:,} and seed at least 0, got {count:,} and {seed}")
        if not SIZES[0] <= size <= SIZES[1]:
            raise ValueError(f"shapes have {SIZES[0]} to {SIZES[1]} cells a side, got {size}")
        if grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {grid!r:.60}")
        self.count, self.seed, self.size, self.grid = count, seed, size, grid
        if picture and not 8 <= picture <= MAX_SIDE:
            raise ValueError(f"pictures have 8 to {MAX_SIDE} pixels a side (0: none), got {picture}")
        if sides and not SIDES[0] <= sides <= SIDES[1]:
            raise ValueError(f"what is round has {SIDES[0]} to {SIDES[1]} sides (0: no meshes), got {sides}")
        if sides and (hollow := [name for name in kinds if _hollow(name)]):
            raise ValueError(
                f"something is cut out of a {hollow[0]}, so that it has no mesh of parts; leave it out of kinds"
            )
        self.kinds, self.varied, self.turned = tuple(kinds), varied, turned
        self.picture, self.sides = picture, sides
        self._finish([f"{number:08d}" for number in range(count)], f"shapes {', '.join(sorted(set(kinds)))}")

    @property
    def identity(self) -> str:
        settings = (self.count, self.seed, self.size, self.grid, *self.kinds, self.varied, self.turned)
        more = [f"{name} {value}" for name, value in (("picture", self.picture), ("sides", self.sides)) if value]
        return digest("shapes 1", *map(str, settings), *more)

    def plan(self, number: int) -> Plan:
        """What shape `number` is, of any number from 0: also beyond `count`."""
        rng = np.random.default_rng([self.seed, number])
        thing = draw_thing(self.kinds[int(rng.integers(len(self.kinds)))], rng)
        quarters = int(rng.integers(4))
        words = caption(thing, rng if self.varied else None)
        asked = int(rng.integers(len(questions(thing))))
        return Plan(turned(thing, quarters if self.turned else 0), words, caption(thing), asked)

    def draw(self, plan: Plan, size: int | None = None) -> Shape:
        """The shape of a plan, with another number of cells where given."""
        values = distance(plan.thing.parts, size or self.size, TRUNCATION)
        given = part_meshes(plan.thing.parts, self.sides) if self.sides else None
        if self.grid == "occupancy":
            return Shape(values < 0, given)
        # rounding to 16 bits keeps the sign of all but the tiniest; those count as outside, as zero does
        return Shape(values.astype(np.float16).astype(np.float32), given)

    def mesh(self, plan: Plan, size: int = 96) -> Trimesh:
        """Its closed surface, by marching cubes of a finer grid."""
        return mesh_from_grid(-distance(plan.thing.parts, size, TRUNCATION), 0.0)[0]

    def image(self, number: int, shape: Shape, size: int | None = None) -> Image.Image:
        """The picture of shape `number`; from where depends on the seed and the number alone."""
        from PIL import Image

        rng = np.random.default_rng([self.seed, number, 1])
        turn, height = np.radians(rng.uniform((-60, 10), (60, 45)))
        return Image.fromarray(draw(shape.mesh, pose_at(float(turn), float(height)), size or self.picture)[0])

    def _fields(self, ordinal: int) -> dict[str, Any]:
        plan = self.plan(ordinal)
        asked = plan.questions
        pictures = {"image": Lazy(lambda: self.image(ordinal, self.draw(plan)))} if self.picture else {}
        return {
            **pictures,
            "shape": Lazy(lambda: self.draw(plan)),
            "caption": plan.caption,
            "plain": plan.plain,
            "kind": plan.kind,
            "attributes": dict(plan.facts),
            "question": asked[plan.asked][0],
            "answer": asked[plan.asked][1],
            "questions": [list(pair) for pair in asked],
        }


def _hollow(kind: str) -> bool:
    """Whether something is cut out of such shapes."""
    return any(part.cut for part in draw_thing(kind, np.random.default_rng(0)).parts)
