"""The command `mm evaluate`: reads its options and sources, prints the table or JSON, writes the results."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.commands.common import check_folder, check_threads

SAMPLING: dict[str, type] = {
    "guidance": float, "temperature": float, "top_p": float, "top_k": int, "steps": int, "denoising_steps": int,
}  # fmt: skip
"""Fields of `mm.interfaces.Sampling` that have an option."""
FAMILIES = (
    "tokenizer", "digits", "emoji", "speaking", "pace", "editing", "hearing", "listening", "video", "shapes", "bytes",
    "crossing",
)  # fmt: skip
"""Of figures, in the order of the table."""
EPILOG = """\
data is KIND:PATH[,PATH ...]:
  digits:FILE.npz                handwritten digits (images uint8[n, h, w], labels [n])
  emoji:ONE.tar,TWO.tar          shards or a folder of pictures with caption and style; all styles in one argument
  missing:PATH                   emoji in styles that the model has not seen: adds top-1 and top-5 of the true picture
  speech:ONE.tar,TWO.tar         what `mm data speech` made: texts under a grammar, voices
  spoken:FILE.tar                recordings of single digits (text, speaker, index): judged by networks trained here
  moving:digits=FILE.npz,...     clips that are made as they are needed, for models of video; settings of MovingSource:
                                 digits, pictures, motions=straight+turn, things, size, frames, grounds, inks, varied
  shapes:count=20000,...         shapes that are made as they are needed, for models of shapes; settings of ShapesSource as in
                                 the training: count, seed, size, kinds=table+chair, turned, sides, holdout_every
  NAME:PATH                      any other pictures (shards, folder): the tokenizer's figures only

example: mm evaluate --model mm-tiny --data emoji:noto.tar,twemoji.tar digits:digits.npz --out results
"""


def parser() -> argparse.ArgumentParser:
    from mm.evaluate.protocol import Protocol

    default = Protocol()
    out = argparse.ArgumentParser(
        prog="mm evaluate",
        description="Measure every quality figure of a model: a table, and JSON.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--model", default="mm-tiny", help="shipped name, checkpoint folder or hub name (%(default)s)")
    out.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="a tokenizer of sound or of shapes by itself, as in mm tokenize; not a model",
    )
    out.add_argument("--data", nargs="+", action="extend", required=True, metavar="KIND:PATH", help="see below")
    out.add_argument("--json", action="store_true", help="print JSON instead of the table")
    out.add_argument(
        "--out",
        default="evaluation",
        metavar="DIR",
        help="folder for results.json, contact sheets and trained judges (%(default)s); '' writes nothing",
    )
    out.add_argument("--only", nargs="+", choices=FAMILIES, help="families to measure (all)")
    out.add_argument("--samples", type=int, default=default.samples, help="pictures a figure (%(default)s)")
    out.add_argument("--seed", type=int, default=default.seed, help="of everything that is drawn (%(default)s)")
    out.add_argument("--batch", type=int, default=default.batch, help="rows generated at once (%(default)s)")
    out.add_argument("--holdout-every", type=int, default=default.holdout_every, metavar="N", help="(%(default)s)")
    out.add_argument(
        "--trained-on",
        choices=("train", "all"),
        default=default.trained_on,
        help="what the model has seen: all but the held-out keys, or all (%(default)s)",
    )
    out.add_argument("--emoji-prompt", default=default.emoji_prompt, metavar="FORMAT", help="(%(default)s)")
    out.add_argument("--digit-prompt", default=default.digit_prompt, metavar="FORMAT", help="(%(default)s)")
    out.add_argument("--threads", type=int, default=1, help="of torch (%(default)s); more change the last digits")
    for name, kind in SAMPLING.items():
        option = name.replace("_", "-")
        out.add_argument(f"--{option}", type=kind, help="of pictures, instead of what the checkpoint recommends")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Raises `ValueError` for what the user can mend."""
    options = parser().parse_args(argv)
    given = parse_data(options.data)
    check_threads(options.threads)
    if options.out:  # before hours of work
        check_folder(Path(options.out), f"can't write into {options.out!r}")

    import torch

    from mm import safe_io
    from mm.data.example import Caption
    from mm.evaluate.protocol import Protocol
    from mm.evaluate.run import evaluate
    from mm.pipelines.base import Pipeline
    from mm.runtime import tune_cpu

    for template, names in ((options.emoji_prompt, {"caption", "style"}), (options.digit_prompt, {"name"})):
        if unknown := set(Caption(template).names) - names:
            raise ValueError(f"the prompt {template!r} uses {{{min(unknown)}}}; it may use {', '.join(sorted(names))}")
    tune_cpu()
    torch.set_num_threads(options.threads)
    protocol = replace(
        Protocol(),
        seed=options.seed,
        samples=options.samples,
        batch=options.batch,
        holdout_every=options.holdout_every,
        trained_on=options.trained_on,
        emoji_prompt=options.emoji_prompt,
        digit_prompt=options.digit_prompt,
    )
    sampling = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    sources = {kind: open_source(kind, paths) for kind, paths in given.items()}
    started = time.perf_counter()
    if options.tokenizer:
        from mm.commands.tokenize import find

        subject: Any = find(options.tokenizer, "sound", "shape")
    else:
        subject = Pipeline.from_pretrained(options.model)
    report = evaluate(
        subject,
        sources,
        protocol=protocol,
        folder=options.out or None,
        only=options.only or FAMILIES,
        sampling=sampling,
        name=Path(options.tokenizer or options.model).name,
        say=lambda line: print(f"{time.perf_counter() - started:6.1f} s  {line}", file=sys.stderr, flush=True),
    )
    if options.out:
        safe_io.write_json(Path(options.out) / "results.json", report.to_dict())
    if options.json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        from rich.console import Console

        width = None if sys.stdout.isatty() else 150  # of a pipe or a file nobody knows one
        Console(width=width).print(report.table())
    return 0


def parse_data(arguments: Sequence[str]) -> dict[str, list[str]]:
    """`KIND:PATH,PATH` → paths by kind. A kind given twice adds its paths. Raises `ValueError` for anything else."""
    found: dict[str, list[str]] = {}
    for argument in arguments:
        kind, colon, rest = argument.partition(":")
        paths = [path for path in rest.split(",") if path]
        made = argument in ("moving", "shapes")  # as it is needed: no file
        if not made and (not colon or not kind.isidentifier() or not paths):
            raise ValueError(f"data {argument!r} is not KIND:PATH[,PATH ...], such as digits:digits.npz")
        found.setdefault(kind, []).extend(paths)
    return found


def open_source(kind: str, paths: Sequence[str]) -> Any:
    """The whole source of a kind. Raises `ValueError` for paths that don't fit it."""
    from mm.data.sources import DigitsSource, FolderSource, ShardSource

    if kind == "moving":
        from mm.evaluate.video import open_moving

        return open_moving(paths)
    if kind == "shapes":
        from mm.evaluate.shapes import open_shapes

        return open_shapes(paths)
    if kind == "digits":
        if len(paths) != 1:
            raise ValueError(f"digits are one .npz file, got {len(paths)} paths")
        return DigitsSource(paths[0])
    if len(paths) == 1 and Path(paths[0]).is_dir():
        return FolderSource(paths[0])
    for path in paths:
        if not path.endswith(".tar"):
            raise ValueError(f"{kind}: {path!r} is neither a .tar shard nor a folder; several paths must all be shards")
    return ShardSource(list(paths))
