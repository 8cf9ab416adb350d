"""Moving clips written as WebDataset shards, each clip without loss: what `mm data moving` calls."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from mm import video
from mm.data.convert import entries_of, write_shards
from mm.data.example import BrokenExample, Example
from mm.data.moving import MovingSource
from mm.safe_io import atomic_file, write_text
from mm.sheet import strips

MEMBER = "video.webp"
"""Member of a sample that holds the clip: an animation that loses nothing."""
SHOWN = 12
"""Clips on the contact sheet."""


def make_moving(
    source: MovingSource,
    out: str | Path,
    *,
    per_shard: int = 10_000,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write `out`/moving-000000.tar and so on, moving.png (a contact sheet of the first clips) and README.md; returns the
    shards. A sample has KEY.video.webp, and KEY.json with the other fields of `MovingSource`.

    Raises `ValueError` if shards of an earlier run would stay beside the new ones.
    """
    paths = write_shards(entries_of(source, _members, progress), out, prefix="moving", per_shard=per_shard)
    first = list(itertools.islice(_whole(source), SHOWN))
    sheet = strips([example["video"].frames for example in first], [example["text"] for example in first], columns=16)
    with atomic_file(Path(out) / "moving.png") as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    write_text(Path(out) / "README.md", readme(source))
    return paths


def _whole(source: MovingSource) -> Iterator[Example]:
    """The clips that can be drawn."""
    for index in range(len(source)):
        example = source[index]
        with contextlib.suppress(BrokenExample):
            example["video"]
            yield example


def _members(source: MovingSource, index: int) -> dict[str, bytes]:
    example = source[index]
    fields = {name: value for name, value in example.items() if name not in ("key", "video", "text")}
    fields["caption"] = example["text"]
    fields["track"] = [own.round(3).tolist() for own in example["track"]]
    return {MEMBER: video.to_webp(example["video"]), "json": json.dumps(fields).encode()}


def readme(source: MovingSource) -> str:
    """What the folder says of itself."""
    names = {"digit": "handwritten digits", "picture": "pictures"}
    given = "\n".join(
        f"- {names[kind]}: {pool.source.what}; the licence of that source holds for these clips"
        for kind, pool in source.pools.items()
    )
    return (
        f"""# Moving things, made by `mm data moving`

{len(source):,} clips of {source.frames} frames of {source.size}×{source.size}, {source.fps:g} a second, with seed {source.seed}.
WebDataset shards: KEY.{MEMBER} (an animation without loss), and KEY.json with caption, kind, motion and motions (what
the first thing, and each, does leg by leg), digit (of the first thing, or -1), things, ground, and track (of each thing:
its centre of mass in each frame, x and y in pixels, modulo the frame). Straight motion goes round the frame: what leaves
on one side comes in on the other.

## What it was made of

- shapes: drawn by the program
- printed digits: drawn in Pillow's built-in typeface (Aileron, CC0)
{given}
""".rstrip()
        + "\n"
    )
