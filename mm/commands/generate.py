"""`mm generate`: pictures, speech, video, shapes or text for a prompt."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from mm.commands.common import Bar, check_threads, choose_threads, parser, writable

if TYPE_CHECKING:
    from mm.generation import Event

MOST = 10_000
"""Results of one call: they are held in memory until all are done."""


def arguments(argv: list[str]) -> Namespace:
    command = parser(
        "generate",
        "Generate pictures, speech, video, shapes or text with a checkpoint; says where they went and how long it took.",
    )
    add = command.add_argument
    add("prompt", nargs="?", default="", help="what to generate, what is said, or how the text begins")
    add("--to", default="image", metavar="KIND", help="what comes out: image, speech, video, 3d or text")
    add(
        "--from",
        dest="given",
        nargs="+",
        default=[],
        metavar="FILE",
        help="pictures, sounds, clips or shapes that are given (after the prompt); --to text says what is in them, of a shape "
        "with the prompt as a question; --to video goes on from one, --to 3d makes what a picture shows",
    )
    add("--mask", metavar="FILE", help="white where the picture of --from is drawn anew, black where it is kept")
    add(
        "--unconstrained",
        action="store_true",
        help="of models that write pictures or clips as files: what they write may be broken",
    )
    add("--voice", metavar="NAME", help="of speech: a voice that the model knows, or a sound file that has it")
    add(
        "--duration",
        type=float,
        metavar="S",
        help="of speech: seconds, to the nearest element of the model (about 0.02 s); with --span, exactly those of what "
        "replaces it; default: as long as the model finds right, or as the span",
    )
    add(
        "--stretch",
        type=float,
        metavar="X",
        help="of speech: multiplies the duration that the model chose by 0.1 to 10",
    )
    add(
        "--span",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="seconds of the clip of --from that are spoken anew; the prompt says the text of the whole",
    )
    add(
        "--frames",
        type=int,
        metavar="N",
        help="of video: frames, given ones counted; default: as the model was trained",
    )
    add(
        "--scale",
        type=int,
        metavar="X",
        help="of video: each pixel becomes a square of so many; default: as makes about 256 pixels",
    )
    add(
        "--scales",
        type=int,
        metavar="K",
        help="of 3d, of models that make shapes scale by scale: only the first K; of shapes in --from: only these are shown",
    )
    add(
        "--model",
        help="a shipped checkpoint, a folder, or owner/name on the hub; default: mm-tiny, or where it "
        "hasn't learned this, the shipped one that has",
    )
    add("--out", metavar="PATH", help="file or folder; all but texts have a name made of the prompt by default")
    add("--num", type=int, default=1, metavar="N", help="how many; with several pictures also a contact sheet of them")
    add("--seed", type=int, metavar="S", help="the same seed gives the same result")
    add("--guidance", type=float, metavar="G", help="strength of the prompt, 1 = off; default: the checkpoint's")
    add("--steps", type=int, metavar="K", help="refinement steps of orders that have them; default: the checkpoint's")
    add(
        "--denoising-steps", type=int, metavar="K", help="evaluations of a diffusion head a vector; default: the head's"
    )
    add("--temperature", type=float, metavar="T", help="0 = always the likeliest; default: the checkpoint's")
    add("--top-p", type=float, metavar="P", help="smallest set of tokens that has this probability")
    add("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0 = all")
    add("--max-tokens", type=int, metavar="N", help="of --to text: the longest one; default: 128")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, metavar="N", help="CPU threads; default: 1 for small models, else torch's")
    return command.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit status; raises `ValueError` for what can't be done."""
    args = arguments(argv)
    start = time.perf_counter()
    from mm.commands import making
    from mm.pipelines.abilities import abilities_of
    from mm.pipelines.any_to_any import AnyToAnyPipeline
    from mm.pipelines.media import FILMS, MODELLERS, SPEAKERS

    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    if args.num > MOST:
        raise ValueError(f"--num must be at most {MOST:,}, got {args.num:,}; run mm generate several times")
    if args.threads is not None:
        check_threads(args.threads)
    if args.out:  # what can't be written is refused before the work
        writable(making.place(args.out, args.to))
    check_given(args)
    args.model = args.model or usual(args)
    args.max_tokens = 128 if args.max_tokens is None else args.max_tokens
    pipeline = AnyToAnyPipeline.from_pretrained(args.model, args.device)
    choose_threads(pipeline.model, args.threads)
    loaded = time.perf_counter()
    able = abilities_of(pipeline)
    kinds = ["text"] * able.writes + [kind for medium, kind in making.KINDS.items() if medium in able.makes]
    if args.to not in kinds and args.to != "text":  # of texts the maker says more
        raise ValueError(
            f"{args.model!r} makes {' and '.join(kinds) or 'nothing'}, not {args.to!r}"
            + {"speech": f"; {SPEAKERS}", "video": f"; {FILMS}", "3d": f"; {MODELLERS}"}.get(args.to, "")
        )
    making.check_request(pipeline, args)
    with Bar("generating", args.to) as bar:
        done: dict[int, float] = {}

        def progress(event: Event) -> None:
            done[event.row] = event.share
            bar(sum(done.values()), event.rows)

        output = making.MAKERS[args.to](pipeline, args, progress)
    finished = time.perf_counter()
    count = making.write(output, args)
    what = {"image": "picture", "speech": "sound", "3d": "shape"}.get(args.to, args.to) + ("s" if count != 1 else "")
    print(
        f"{count} {what} in {finished - loaded:.2f} s (model loaded in {loaded - start:.2f} s), seed {output.seed}",
        file=sys.stderr,
    )
    return 0


def usual(args: Namespace) -> str:
    """The shipped checkpoint for what goes in and what comes out."""
    from mm.commands import making
    from mm.hub import usual
    from mm.pipelines.media import CLIPS, SOUNDS

    given = "text"
    if args.to == "3d" and args.given:
        given = "image"
    if args.to == "text" and args.given:
        ending = Path(args.given[0]).suffix.lower()
        given = "shape" if making.solids(args) else "speech" if ending in SOUNDS else "image"
        given = "video" if ending in CLIPS - SOUNDS else given
    return usual(given, {"3d": "shape"}.get(args.to, args.to))


def check_given(args: Namespace) -> None:
    """Raises `ValueError` for an empty prompt where one is needed, for a prompt that `--from` took for a file, and for options
    that would have no effect."""
    from mm.commands.making import solids
    from mm.pipelines.media import CLIPS, SHAPES, SOUNDS
    from mm.pipelines.outputs import PICTURES
    from mm.video_encoding import MAX_SCALE

    odd = next((c for c in args.prompt or "" if unicodedata.category(c) == "Cc" and c not in "\n\r\t"), None)
    if odd is not None:
        raise ValueError(f"the prompt has the control character U+{ord(odd):04X}; leave it out")
    heard = next((name for name in args.given if Path(name).suffix.lower() in SOUNDS - CLIPS), None)
    if heard is not None and args.to in ("video", "3d"):
        takes = "a picture or a clip" if args.to == "video" else "pictures"
        raise ValueError(f"--to {args.to} takes {takes} in --from, got the sound {heard!r}")
    for name in ("frames", "scales", "steps", "denoising_steps", "max_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} must be at least 1, got {value}; leave it out for the usual number")
    for name in ("voice", "duration", "stretch", "span"):
        if getattr(args, name) is not None and args.to != "speech":
            raise ValueError(f"--{name} goes with --to speech")
    for name in ("frames", "scale"):
        if getattr(args, name) is not None and args.to != "video":
            raise ValueError(f"--{name} goes with --to video")
    if args.scale is not None and not 1 <= args.scale <= MAX_SCALE:
        raise ValueError(f"--scale is from 1 to {MAX_SCALE}, got {args.scale}")
    if args.to == "video" and len(args.given) > 1:
        raise ValueError(f"--to video goes on from one picture or clip, got {len(args.given)} in --from")
    if args.to == "video" and not args.prompt.strip() and not args.given:
        raise ValueError("the prompt is empty; say what the video shows")
    shapes = solids(args)
    if args.scales is not None and args.to != "3d" and not shapes:
        raise ValueError("--scales goes with --to 3d, or with shapes in --from")
    if args.to == "3d" and bool(args.prompt.strip()) == bool(args.given):
        raise ValueError("--to 3d makes what a prompt says, or what pictures in --from show; give one of the two")
    if args.max_tokens is not None and args.to != "text":
        raise ValueError("--max-tokens goes with --to text")
    if args.mask and (args.to != "image" or len(args.given) != 1):
        raise ValueError("--mask goes with --to image and one picture in --from")
    if args.unconstrained and args.to != "video" and (args.to != "image" or (args.given and not args.mask)):
        raise ValueError("--unconstrained goes with --to image and a prompt or --mask, or with --to video")
    if args.stretch is not None and not 0.1 <= args.stretch <= 10:
        raise ValueError(f"--stretch multiplies durations by 0.1 to 10, got {args.stretch:g}")
    if args.stretch is not None and (args.duration is not None or args.span):
        raise ValueError(
            "--stretch multiplies the duration that the model chose; leave it out beside --duration and --span"
        )
    if args.to == "speech" and not args.prompt.strip() and (args.span or not args.given):
        raise ValueError("the prompt is empty; say what is to be spoken")
    if args.span and len(args.given) != 1:
        raise ValueError("--span goes with one sound in --from")
    if (
        args.given
        and not args.span
        and any(getattr(args, name) is not None for name in ("voice", "duration", "stretch"))
    ):
        raise ValueError(
            "--voice, --duration and --stretch go with a prompt alone; leave --from out, or edit its clip with --span"
        )
    if args.to == "image" and not args.prompt.strip() and not (args.given and not args.mask):
        raise ValueError("the prompt is empty; say what the picture shows")
    for name in args.given if not args.prompt else ():
        if Path(name).suffix.lower() not in {*PICTURES, *SOUNDS, *CLIPS, *SHAPES} and not os.path.exists(name):
            raise ValueError(
                f"the file {name!r} is missing; --from takes all that follows it, so a prompt goes before it: "
                f"mm generate {name!r} --from FILE"
            )
