"""Generated shapes written as WebDataset shards, without loss: what `mm data shapes` calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mm.data.convert import entries_of, write_shards
from mm.data.shapes import ShapesSource
from mm.safe_io import atomic_file, write_text
from mm.shape_views import turntable
from mm.shapes import to_npz
from mm.sheet import strips

MEMBER = "shape.npz"
"""Member of a sample that holds the grid."""
SHOWN, VIEWS, SIDE = 12, 4, 64
"""Shapes on the contact sheet, and how often and how large each is shown."""


def make_shapes(
    source: ShapesSource,
    out: str | Path,
    *,
    per_shard: int = 10_000,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write `out`/shapes-000000.tar and so on, shapes.png (a contact sheet of the first shapes) and README.md; returns the
    shards. A sample has KEY.shape.npz, and KEY.json with the other fields of `ShapesSource`.

    Raises `ValueError` if shards of an earlier run would stay beside the new ones.
    """
    paths = write_shards(entries_of(source, _members, progress), out, prefix="shapes", per_shard=per_shard)
    first = [source[index] for index in range(min(SHOWN, len(source)))]
    pictures = [np.asarray(turntable(example["shape"].mesh, VIEWS, SIDE)) for example in first]
    sheet = strips(pictures, [example["text"] for example in first], columns=VIEWS)
    with atomic_file(Path(out) / "shapes.png") as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    write_text(Path(out) / "README.md", readme(source))
    return paths


def _members(source: ShapesSource, index: int) -> dict[str, bytes]:
    example = source[index]
    fields = {name: value for name, value in example.items() if name not in ("key", "shape", "text")}
    fields["caption"] = example["text"]
    return {MEMBER: to_npz(example["shape"]), "json": json.dumps(fields).encode()}


def readme(source: ShapesSource) -> str:
    """What the folder says of itself."""
    grid = (
        "float16 signed distance of each cell's centre to the surface, in sides of the cube and negative inside"
        if source.grid == "sdf"
        else "bool: whether each cell's centre is inside"
    )
    return f"""# Shapes, made by `mm data shapes`

{len(source):,} shapes in cubes of {source.size}³ cells, with seed {source.seed}: {", ".join(sorted(set(source.kinds)))}.
WebDataset shards: KEY.{MEMBER} (array `grid`, {grid}; indexed x, y, z with y up), and KEY.json with caption, plain (the
plain caption), kind, attributes, question and answer, and questions (all, each with its answer). All was drawn by the program.
"""
