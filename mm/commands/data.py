"""`mm data`: make and convert data sets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.commands.common import Bar, parser

if TYPE_CHECKING:
    from mm.data.example import Source


def main(argv: list[str]) -> int:
    """Returns the exit status; raises `ValueError` for data that can't be used."""
    command = parser("data", "Make or convert data sets; everything is written as WebDataset shards.")
    names = command.add_subparsers(dest="name", required=True, metavar="NAME")
    digits = names.add_parser("digits", help="digits with captions: drawn here, or from an .npz with images and labels")
    digits.add_argument("--npz", metavar="FILE", help="handwritten digits: arrays images uint8[n, h, w] and labels[n]")
    digits.add_argument("--count", type=int, default=2000, help="how many are drawn (2000)")
    digits.add_argument("--size", type=int, default=32, help="side in pixels (32)")
    digits.add_argument("--seed", type=int, default=0, help="the same seed draws the same (0)")
    shards = names.add_parser(
        "shards", help="a folder of pictures or sounds, a `datasets` directory or shards → shards"
    )
    shards.add_argument("source", help="folder, datasets directory, .tar or .npz")
    shards.add_argument("--caption", metavar="FORMAT", help='how captions are made of fields: "{caption}, {style}"')
    shards.add_argument("--per-shard", type=int, default=10_000, help="examples in a shard (10000)")
    bpe = names.add_parser("bpe", help="train a byte-level BPE on captions; for the tokenizer text_hf")
    bpe.add_argument("source", help="folder, datasets directory, .tar or .npz")
    bpe.add_argument("--caption", metavar="FORMAT", help="as for shards")
    bpe.add_argument("--vocab-size", type=int, default=1024, help="ids (1024)")
    speech = names.add_parser("speech", help="spoken digits and commands with word times, made here by flite")
    speech.add_argument("--hours", type=float, default=1.0, help="of sound (1)")
    speech.add_argument("--seed", type=int, default=0, help="the same seed says the same (0)")
    speech.add_argument("--voices", nargs="+", metavar="VOICE", help="of `flite -lv` (kal16 awb rms slt)")
    moving = names.add_parser("moving", help="captioned clips of digits, shapes and pictures that move, made here")
    moving.add_argument("--count", type=int, default=1000, help="clips (1000)")
    moving.add_argument("--digits", metavar="FILE", help="handwritten digits (.npz); without, digits of a typeface")
    moving.add_argument("--pictures", metavar="PATH", help="captioned pictures that move too: folder or .tar")
    moving.add_argument("--size", type=int, default=32, help="side in pixels (32)")
    moving.add_argument("--frames", type=int, default=16, help="of a clip (16)")
    moving.add_argument("--fps", type=float, default=8.0, help="frames a second (8)")
    moving.add_argument("--motions", nargs="+", metavar="KIND", help="straight turn bounce rotate scale cross (all)")
    moving.add_argument("--things", nargs="+", metavar="KIND", help="digits shapes pictures (all there are)")
    moving.add_argument("--seed", type=int, default=0, help="the same seed makes the same (0)")
    shapes = names.add_parser("shapes", help="captioned solids and furniture, with questions and answers, made here")
    shapes.add_argument("--count", type=int, default=1000, help="shapes (1000)")
    shapes.add_argument("--size", type=int, default=32, help="cells a side (32)")
    shapes.add_argument("--grid", default="sdf", help="sdf: signed distances; occupancy: which cells are inside (sdf)")
    shapes.add_argument("--kinds", nargs="+", metavar="KIND", help="table chair mug sphere … (all)")
    shapes.add_argument("--seed", type=int, default=0, help="the same seed makes the same (0)")
    for name in (digits, shards, bpe, speech, moving, shapes):
        name.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    args = command.parse_args(argv)
    if args.name == "bpe":
        from mm.data.bpe import train_bpe

        source = open_source(args.source, args.caption)
        with Bar("reading", "caption") as bar:
            file = train_bpe(_texts(source, bar), args.out, args.vocab_size)
        print(f"wrote {file}")
        return 0
    if args.name == "speech":
        from mm.data.speech_corpus import VOICES, make_speech

        with Bar("speaking", "second") as bar:
            made = make_speech(args.out, hours=args.hours, seed=args.seed, voices=args.voices or VOICES, progress=bar)
        for path, (split, clips) in zip(made.paths, made.clips.items(), strict=True):
            print(f"wrote {path}: {clips:,} clips, {made.seconds[split] / 60:.1f} minutes")
        print(f"left out: {made.unaligned} unaligned, {made.too_long} too long")
        return 0
    if args.name in ("moving", "shapes"):
        paths = _moving(args) if args.name == "moving" else _shapes(args)
        print(f"wrote {paths[0]}" + (f" … {paths[-1].name}" if len(paths) > 1 else ""))
        return 0
    from mm.data.convert import make_digits, to_shards

    with Bar("writing", "example") as bar:
        if args.name == "digits":
            paths = make_digits(args.out, npz=args.npz, count=args.count, size=args.size, seed=args.seed, progress=bar)
        else:
            source = open_source(args.source, args.caption)
            paths = to_shards(source, args.out, per_shard=args.per_shard, progress=bar)
    print(f"wrote {paths[0]}" + (f" … {paths[-1].name}" if len(paths) > 1 else ""))
    return 0


def _moving(args: argparse.Namespace) -> list[Path]:
    from mm.data.moving import MovingSource
    from mm.data.moving_paths import MOTIONS
    from mm.data.moving_shards import make_moving

    source = MovingSource(
        args.digits,
        args.pictures,
        count=args.count,
        seed=args.seed,
        size=args.size,
        frames=args.frames,
        fps=args.fps,
        motions=args.motions or MOTIONS,
        things=args.things,
    )
    with Bar("drawing", "clip") as bar:
        return make_moving(source, args.out, progress=bar)


def _shapes(args: argparse.Namespace) -> list[Path]:
    from mm.data.shape_shards import make_shapes
    from mm.data.shapes import ShapesSource

    source = ShapesSource(count=args.count, seed=args.seed, size=args.size, grid=args.grid, kinds=args.kinds)
    with Bar("making", "shape") as bar:
        return make_shapes(source, args.out, progress=bar)


def open_source(path: str, caption: str | None) -> Source:
    """Random access to what a path holds."""
    from mm.data.sources import DigitsSource, FolderSource, HFSource, ShardSource

    place = Path(path)
    if place.suffix == ".npz":
        return DigitsSource(place, caption=caption)
    if place.suffix == ".tar":
        return ShardSource(place, caption=caption)
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        return HFSource(place, caption=caption)
    return FolderSource(place, caption=caption)


def _texts(source: Source, progress: Any) -> list[str]:
    """Broken examples are skipped with one counted warning, as for shards."""
    from mm.data.example import BrokenExample, warn_skipped

    out: list[str] = []
    skipped: list[str] = []
    for index in range(len(source)):
        try:
            out.append(str(source[index]["text"]))
        except BrokenExample as error:
            skipped.append(str(error))
        progress(index + 1, len(source))
    if skipped:
        warn_skipped(source.what, len(skipped), len(source), skipped[0])
    return out
