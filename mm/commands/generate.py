"""`mm generate`: pictures, speech or text for a prompt."""

from __future__ import annotations

import os
import re
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.commands.common import Bar, check_threads, choose_threads, parser, writable

if TYPE_CHECKING:
    from mm.generation import Event
    from mm.pipelines.base import Pipeline

MOST = 10_000
"""Results of one call: they are held in memory until all are done."""
SAMPLING = ("guidance", "steps", "denoising_steps", "temperature", "top_p", "top_k")


def arguments(argv: list[str]) -> Namespace:
    command = parser(
        "generate", "Generate pictures, speech or text with a checkpoint; says where they went and how long it took."
    )
    add = command.add_argument
    add("prompt", nargs="?", default="", help="what to generate, what is said, or how the text begins")
    add("--to", default="image", metavar="KIND", help="what comes out: image, speech or text")
    add(
        "--from",
        dest="given",
        nargs="+",
        default=[],
        metavar="FILE",
        help="pictures or sounds that are given (after the prompt); --to text says what is in them",
    )
    add("--mask", metavar="FILE", help="white where the picture of --from is drawn anew, black where it is kept")
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
        "--model",
        help="a shipped checkpoint, a folder, or owner/name on the hub; default: mm-tiny, or mm-speech for --to speech",
    )
    add("--out", metavar="PATH", help="file or folder; pictures and sounds have a name made of the prompt by default")
    add("--num", type=int, default=1, metavar="N", help="how many; with several pictures also a contact sheet of them")
    add("--seed", type=int, metavar="S", help="the same seed gives the same result")
    add("--guidance", type=float, metavar="G", help="strength of the prompt, 1 = off; default: the checkpoint's")
    add("--steps", type=int, metavar="K", help="refinement steps of orders that have them; default: the checkpoint's")
    add(
        "--denoising-steps", type=int, metavar="K", help="evaluations of a diffusion head a vector; default: the head's"
    )
    add("--temperature", type=float, metavar="T", help="0 = always the likeliest; default: the checkpoint's")
    add("--top-p", type=float, metavar="P", help="smallest set of tokens that has this probability")
    add("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    add("--max-tokens", type=int, metavar="N", help="of --to text: the longest one; default: 128")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, metavar="N", help="CPU threads; default: 1 for small models, else torch's")
    return command.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit status; raises `ValueError` for what can't be done."""
    args = arguments(argv)
    start = time.perf_counter()
    from mm.pipelines.any_to_any import AnyToAnyPipeline
    from mm.pipelines.base import SPEAKERS
    from mm.pipelines.outputs import PICTURES, SOUNDS, TEXTS, numbered

    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    if args.num > MOST:
        raise ValueError(f"--num must be at most {MOST:,}, got {args.num:,}; run mm generate several times")
    if args.threads is not None:
        check_threads(args.threads)
    if args.out:  # what can't be written is refused before the work
        endings = {"image": PICTURES, "speech": SOUNDS}.get(args.to, TEXTS)
        writable(numbered(args.out, 1, "out", endings)[0])
    check_given(args)
    args.model = args.model or ("mm-speech" if args.to == "speech" else "mm-tiny")
    args.max_tokens = 128 if args.max_tokens is None else args.max_tokens
    pipeline = AnyToAnyPipeline.from_pretrained(args.model, args.device)
    choose_threads(pipeline.model, args.threads)
    loaded = time.perf_counter()
    kinds = ["text"]
    if any(len(entry.max_grid) == 2 for entry in pipeline.model.vocabulary.entries):
        kinds.append("image")
    specs = [modality.tokenizer.spec for modality in pipeline.model.modalities[1:]]
    if any(spec.sample_rate and spec.spatial for spec in specs):  # not where sounds are only read
        kinds.append("speech")
    if args.to not in kinds:
        raise ValueError(
            f"{args.model!r} makes {' and '.join(kinds)}, not {args.to!r}"
            + (f"; {SPEAKERS}" if args.to == "speech" else "")
        )
    with Bar("generating", args.to) as bar:
        done: dict[int, float] = {}

        def progress(event: Event) -> None:
            done[event.row] = event.done
            rows = args.num * max(1, len(args.given) if args.to == "text" else 1)
            bar(sum(done.values()), max(rows, len(done)))

        output = {"image": _images, "speech": _speech, "text": _texts}[args.to](pipeline, args, progress)
    finished = time.perf_counter()
    count = _write(output, args)
    what = {"image": "picture", "speech": "sound", "text": "text"}[args.to] + ("s" if count != 1 else "")
    print(
        f"{count} {what} in {finished - loaded:.2f} s (model loaded in {loaded - start:.2f} s), seed {output.seed}",
        file=sys.stderr,
    )
    return 0


def check_given(args: Namespace) -> None:
    """Raises `ValueError` for an empty prompt where one is needed, for a prompt that `--from` took for a file, and for options
    that would have no effect."""
    from mm.pipelines.base import SOUNDS
    from mm.pipelines.outputs import PICTURES

    for name in ("voice", "duration", "stretch", "span"):
        if getattr(args, name) is not None and args.to != "speech":
            raise ValueError(f"--{name} goes with --to speech")
    if args.max_tokens is not None and args.to != "text":
        raise ValueError("--max-tokens goes with --to text")
    if args.mask and (args.to != "image" or len(args.given) != 1):
        raise ValueError("--mask goes with --to image and one picture in --from")
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
        if Path(name).suffix.lower() not in {*PICTURES, *SOUNDS} and not os.path.exists(name):
            raise ValueError(
                f"the file {name!r} is missing; --from takes all that follows it, so a prompt goes before it: "
                f"mm generate {name!r} --from FILE"
            )


def _options(args: Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}


def _images(pipeline: Pipeline, args: Namespace, progress: Any) -> Any:
    """Pictures for the prompt; a picture redrawn in part; or a picture after the prompt and the given pictures."""
    from mm.pipelines.any_to_any import AnyToAnyPipeline
    from mm.pipelines.outputs import ImageOutput
    from mm.pipelines.text_to_image import TextToImagePipeline

    if args.given and not args.mask:
        assert isinstance(pipeline, AnyToAnyPipeline)
        document = [*([args.prompt] if args.prompt else []), *map(Path, args.given)]
        out = pipeline(
            [document] * args.num,
            to=[pipeline.picture],
            max_tokens=1,
            sampling={pipeline.picture: pipeline.sampling(pipeline.picture, _options(args))},
            seed=args.seed,
            callback=progress,
        )
        return ImageOutput(out.images, [args.prompt] * len(out.images), [], out.seed)
    painter = TextToImagePipeline(pipeline.model, pipeline.recommended)
    return painter(
        args.prompt,
        num_images=args.num,
        image=args.given[0] if args.mask else None,
        mask=args.mask,
        seed=args.seed,
        callback=progress,
        **_options(args),
    )


def _speech(pipeline: Pipeline, args: Namespace, progress: Any) -> Any:
    """The prompt spoken; a clip of which a span is spoken anew; or a sound after the prompt and what is given."""
    from mm.interfaces import Sampling
    from mm.pipelines.any_to_any import AnyToAnyPipeline
    from mm.pipelines.outputs import AudioOutput
    from mm.pipelines.text_to_speech import Edit, TextToSpeechPipeline

    if args.given and not args.span:
        assert isinstance(pipeline, AnyToAnyPipeline)
        document = [*([args.prompt] if args.prompt else []), *map(Path, args.given)]
        out = pipeline(
            [document] * args.num,
            to=[pipeline.speech],
            max_tokens=1,
            sampling={
                pipeline.speech: pipeline.sampling(pipeline.speech, _options(args)),
                pipeline.text: Sampling(temperature=0.0),  # the likeliest duration
            },
            seed=args.seed,
            callback=progress,
        )
        sounds = out.audios
        return AudioOutput([s.samples for s in sounds], sounds[0].rate, [args.prompt] * len(sounds), [], out.seed)
    speaker = TextToSpeechPipeline(pipeline.model, pipeline.recommended)
    return speaker(
        args.prompt,
        voice=args.voice,
        duration=args.duration,
        stretch=1.0 if args.stretch is None else args.stretch,
        edit=Edit(args.given[0], *args.span) if args.span else None,
        num_audios=args.num,
        seed=args.seed,
        callback=progress,
        **_options(args),
    )


def _texts(pipeline: Pipeline, args: Namespace, progress: Any) -> Any:
    """Texts of given pictures or sounds, or the continuation of the prompt."""
    from mm.pipelines.any_to_any import AnyToAnyPipeline
    from mm.pipelines.image_to_text import ImageToTextPipeline
    from mm.pipelines.outputs import TextOutput

    if _heard(args):
        return _transcripts(pipeline, args, progress)
    if args.given:
        reader = ImageToTextPipeline(pipeline.model, pipeline.recommended)
        return reader(
            args.given,
            prompt=args.prompt,
            num_texts=args.num,
            max_tokens=args.max_tokens,
            seed=args.seed,
            callback=progress,
            **_options(args),
        )
    if not args.prompt:
        raise ValueError("there is nothing to continue; give a prompt, or pictures with --from")
    assert isinstance(pipeline, AnyToAnyPipeline)
    sampling = pipeline.sampling(pipeline.text, _options(args))
    if args.num > 1 and sampling.temperature == 0:
        raise ValueError(f"--num {args.num} at temperature 0 gives equal texts; set --temperature above 0")
    if sampling.guidance != 1:
        raise ValueError(f"text is generated without guidance; leave guidance out, got {sampling.guidance}")
    out = pipeline(
        [[args.prompt]] * args.num,
        free=False,
        max_tokens=args.max_tokens,
        sampling={pipeline.text: sampling},
        seed=args.seed,
        callback=progress,
    )
    return TextOutput(["".join(map(str, parts)) for parts in out.documents], [], out.seed)


def _heard(args: Namespace) -> bool:
    """Whether sounds are given. Raises `ValueError` where pictures are given too."""
    from mm.pipelines.base import SOUNDS

    sounds = [Path(name).suffix.lower() in SOUNDS for name in args.given]
    if any(sounds) and not all(sounds):
        raise ValueError("--to text reads either pictures or sounds, got both in --from; run mm generate for each kind")
    return any(sounds)


def _transcripts(pipeline: Pipeline, args: Namespace, progress: Any) -> Any:
    from mm.pipelines.speech_to_text import SpeechToTextPipeline

    if args.prompt or args.num > 1:
        raise ValueError("sounds are written down once, and without a prompt; leave the prompt and --num out")
    listener = SpeechToTextPipeline(pipeline.model, pipeline.recommended)
    return listener(args.given, max_tokens=args.max_tokens, seed=args.seed, callback=progress, **_options(args))


def _write(output: Any, args: Namespace) -> int:
    """Save what was generated and say where; texts also go to standard output."""
    from mm.pipelines.outputs import PICTURES, AudioOutput, ImageOutput, numbered, save_picture

    if isinstance(output, AudioOutput):
        places = output.save(args.out or unused(slug(args.prompt, "speech") + ".wav"))
        for file, samples in zip(places, output.audios, strict=True):
            print(f"wrote {file} ({len(samples) / output.sample_rate:.2f} s)")
        return len(places)
    if not isinstance(output, ImageOutput):
        several = len(args.given) > 1
        for number, text in enumerate(output.texts):
            print(f"{args.given[number // args.num]}: {text}" if several else text)
        if args.out:
            places = output.save(args.out)
            print(f"wrote {places[0]}" + (f" … {places[-1].name}" if len(places) > 1 else ""), file=sys.stderr)
        return len(output.texts)
    place = args.out or unused(slug(args.prompt) + ".png")
    places = output.save(place)
    if len(places) == 1:
        print(f"wrote {places[0]}")
    else:
        sheet = places[0].with_name("sheet.png") if Path(place).is_dir() else numbered(place, 1, "image", PICTURES)[0]
        save_picture(output.sheet(), sheet)
        print(f"wrote {places[0]} … {places[-1].name}, all of them in {sheet}")
    return len(places)


def slug(text: str, otherwise: str = "picture") -> str:
    """A file name for a prompt; `otherwise` for one without a letter that file names may have."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or otherwise


def unused(name: str) -> str:
    """The name, with a number where it is taken: only `--out` may replace a file."""
    path, number = Path(name), 1
    while path.exists() or path.with_name(f"{path.stem}-01{path.suffix}").exists():
        number += 1
        path = Path(name).with_name(f"{Path(name).stem}-{number}{Path(name).suffix}")
    return str(path)
