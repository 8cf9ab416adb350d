"""What `mm generate` makes, kind by kind, and how it is written."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm.pipelines.base import Pipeline
    from mm.pipelines.media import Medium
    from mm.pipelines.outputs import MeshOutput, VideoOutput

KINDS: dict[Medium, str] = {"picture": "image", "sound": "speech", "video": "video", "shape": "3d"}
"""Medium → what `--to` calls it."""
SAMPLING = ("guidance", "steps", "denoising_steps", "temperature", "top_p", "top_k")
SIDE = 256
"""Pixels that small clips are enlarged to about, so that one sees them in a player."""


def place(path: str, kind: str) -> Path:
    """Where one result would go. Raises `ValueError` for an ending that can't be written."""
    from mm.pipelines.outputs import MESHES, PICTURES, SHOWN, SOUNDS, TEXTS, numbered, video_endings
    from mm.video_encoding import FFMPEG
    from mm.video_files import require_av

    endings = {"image": PICTURES, "speech": SOUNDS, "video": video_endings(), "3d": (*MESHES, *SHOWN)}.get(kind, TEXTS)
    where = numbered(path, 1, "out", endings)[0]
    if kind == "video" and where.suffix.lower() in FFMPEG:
        require_av(f"can't write {str(where)!r} without FFmpeg", "or write a .gif")
    return where


def _options(args: Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}


def images(pipeline: Pipeline, args: Namespace, progress: Any) -> Any:
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
        constrained=not args.unconstrained,
        seed=args.seed,
        callback=progress,
        **_options(args),
    )


def speech(pipeline: Pipeline, args: Namespace, progress: Any) -> Any:
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


def videos(pipeline: Pipeline, args: Namespace, progress: Any) -> Any:
    """Clips for the prompt, each from the given picture or clip on."""
    from mm.pipelines.media import CLIPS
    from mm.pipelines.outputs import PICTURES
    from mm.pipelines.text_to_video import TextToVideoPipeline

    given: dict[str, Any] = {}
    filmer = TextToVideoPipeline(pipeline.model, pipeline.recommended)
    if args.given:
        ending = Path(args.given[0]).suffix.lower()
        moves = ending == ".gif" or (ending in CLIPS and ending not in PICTURES) or Path(args.given[0]).is_dir()
        given = {"video" if moves else "image": args.given[0]}
        if moves:
            clip = filmer.load_video(args.given[0])
            given["video"] = filmer.ending(clip, args.frames)
            if (kept := len(given["video"])) < len(clip):
                whole = f"{args.given[0]} has {len(clip):,} frames at {clip.fps:g} a second"
                print(f"{whole}, more than can be gone on from: its last {kept} are given", file=sys.stderr)
    return filmer(
        args.prompt if args.prompt.strip() else None,
        num_videos=args.num,
        num_frames=args.frames,
        constrained=not args.unconstrained,
        seed=args.seed,
        callback=progress,
        **given,
        **_options(args),
    )


def meshes(pipeline: Pipeline, args: Namespace, progress: Any) -> Any:
    """Shapes for the prompt, or of what pictures show."""
    from mm.pipelines.image_to_3d import ImageTo3DPipeline
    from mm.pipelines.text_to_3d import TextTo3DPipeline

    options: dict[str, Any] = dict(
        num_meshes=args.num, scales=args.scales, seed=args.seed, callback=progress, **_options(args)
    )
    if args.given:
        return ImageTo3DPipeline(pipeline.model, pipeline.recommended)(args.given, **options)
    return TextTo3DPipeline(pipeline.model, pipeline.recommended)(args.prompt, **options)


def solids(args: Namespace) -> bool:
    """Whether shapes are given. Raises `ValueError` where something else is given too."""
    from mm.pipelines.media import SHAPES

    shapes = [Path(name).suffix.lower() in {*SHAPES, ".npz"} for name in args.given]
    if any(shapes) and not all(shapes):
        raise ValueError("--from has shapes and something else; run mm generate for each kind")
    if any(shapes) and args.to != "text":
        raise ValueError(f"shapes in --from are told about: use --to text, not {args.to}")
    return any(shapes)


def texts(pipeline: Pipeline, args: Namespace, progress: Any) -> Any:
    """Texts of given pictures, clips, sounds or shapes, or the continuation of the prompt."""
    from mm.pipelines.any_to_any import AnyToAnyPipeline
    from mm.pipelines.image_to_text import ImageToTextPipeline
    from mm.pipelines.outputs import TextOutput

    if _heard(pipeline, args):
        return _transcripts(pipeline, args, progress)
    if solids(args):
        return _told(pipeline, args, progress)
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
        raise ValueError("there is nothing to continue; give a prompt, or pictures, sounds or clips with --from")
    assert isinstance(pipeline, AnyToAnyPipeline)
    sampling = pipeline.sampling(pipeline.text, _options(args))
    if args.num > 1 and sampling.temperature == 0:
        raise ValueError(f"--num {args.num} at temperature 0 gives equal texts; set --temperature above 0")
    if sampling.guidance != 1:
        raise ValueError(f"text is generated without guidance; leave guidance out, got {sampling.guidance}")
    out = pipeline(
        [[args.prompt]] * args.num,
        free=False,
        max_tokens=args.max_tokens + 1,  # and the end
        sampling={pipeline.text: sampling},
        seed=args.seed,
        callback=progress,
    )
    return TextOutput(["".join(map(str, parts)) for parts in out.documents], [], out.seed)


def check_request(pipeline: Pipeline, args: Namespace) -> None:
    """Raises `ValueError` for a model whose training showed it nothing of the kind: it would answer with nothing, or anything."""
    from mm.pipelines import abilities
    from mm.pipelines.any_to_any import AnyToAnyPipeline

    assert isinstance(pipeline, AnyToAnyPipeline)
    made: abilities.Kind = next((medium for medium, kind in KINDS.items() if kind == args.to), "text")
    able = abilities.abilities_of(pipeline)
    if made == "text" and not (args.given or able.writes):
        instead = [f"--to {kind}" for medium, kind in KINDS.items() if ("text", medium) in able.follows]
        raise ValueError(
            f"training showed {args.model!r} no text to write; use {' or '.join([*instead, 'another model'])}"
        )
    if args.given and (made == "video" or args.mask or args.span):
        return  # what is given is the beginning, or the rest, of what is made
    if made != "text" and not args.given:
        abilities.check_learned(pipeline, "text", made, repr(args.model))
    for given in dict.fromkeys(pipeline.medium(Path(name)) for name in args.given):
        abilities.check_learned(pipeline, given, made, repr(args.model))


def _heard(pipeline: Pipeline, args: Namespace) -> bool:
    """Whether sounds are given. Raises `ValueError` where pictures are given too."""
    from mm.pipelines.media import CLIPS, SOUNDS

    seen = CLIPS if "video" in pipeline.media else frozenset[str]()
    sounds = [Path(name).suffix.lower() in SOUNDS - seen for name in args.given]
    if any(sounds) and not all(sounds):
        raise ValueError("--to text reads either pictures or sounds, got both in --from; run mm generate for each kind")
    return any(sounds)


def _transcripts(pipeline: Pipeline, args: Namespace, progress: Any) -> Any:
    from mm.pipelines.speech_to_text import SpeechToTextPipeline

    if args.prompt or args.num > 1:
        raise ValueError("sounds are written down once, and without a prompt; leave the prompt and --num out")
    listener = SpeechToTextPipeline(pipeline.model, pipeline.recommended)
    return listener(args.given, max_tokens=args.max_tokens, seed=args.seed, callback=progress, **_options(args))


def _told(pipeline: Pipeline, args: Namespace, progress: Any) -> Any:
    """What shapes are, or the answer to the question that is the prompt."""
    from mm.pipelines.shape_to_text import ShapeToTextPipeline

    return ShapeToTextPipeline(pipeline.model, pipeline.recommended)(
        args.given,
        question=args.prompt,
        scales=args.scales,
        num_texts=args.num,
        max_tokens=args.max_tokens,
        seed=args.seed,
        callback=progress,
        **_options(args),
    )


def write(output: Any, args: Namespace) -> int:
    """Save what was generated and say where; texts also go to standard output."""
    from mm.pipelines.outputs import (
        PICTURES,
        AudioOutput,
        ImageOutput,
        MeshOutput,
        VideoOutput,
        numbered,
        save_picture,
    )

    if isinstance(output, VideoOutput):
        return _write_videos(output, args)
    if isinstance(output, MeshOutput):
        return _write_meshes(output, args)
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


def _write_videos(output: VideoOutput, args: Namespace) -> int:
    from mm.pipelines.outputs import save_picture, video_endings

    side = max(output.videos[0].shape[1:3])
    scale = args.scale or max(1, SIDE // side)
    places = output.save(args.out or unused(slug(args.prompt, "video") + video_endings()[0]), scale=scale)
    for file, frames, valid, reason in zip(places, output.videos, output.valid, output.reasons, strict=True):
        count, height, width, _ = frames.shape
        size = f"{width * scale}×{height * scale}"
        print(f"wrote {file} ({count} frames, {count / output.fps:.2f} s, {size})" + ("" if valid else f"; {reason}"))
    if len(places) > 1:
        sheet = places[0].with_name(f"{places[0].stem.rpartition('-')[0]}-sheet.png")
        save_picture(output.sheet(), sheet)
        print(f"all of them are in {sheet}")
    return len(places)


def _write_meshes(output: MeshOutput, args: Namespace) -> int:
    from mm.pipelines.outputs import save_picture
    from mm.voxels import pieces

    places = output.save(args.out or unused(slug(args.prompt, "shape") + ".glb"))
    results = zip(places, output.meshes, output.grids, output.valid, output.reasons, strict=True)
    for file, mesh, grid, valid, reason in results:
        closed = "closed" if len(mesh.faces) and mesh.is_watertight else "open"
        if (count := pieces(grid)) > 1:
            closed += f", in {count} pieces"
        print(f"wrote {file} ({len(mesh.faces):,} faces, {closed})" if valid else f"wrote {file}; {reason}")
    if len(places) > 1:
        sheet = places[0].with_name(f"{places[0].stem.rpartition('-')[0]}-sheet.png")
        save_picture(output.sheet(), sheet)
        print(f"all of them are in {sheet}")
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


MAKERS: dict[str, Callable[[Pipeline, Namespace, Any], Any]] = {
    "image": images,
    "speech": speech,
    "video": videos,
    "3d": meshes,
    "text": texts,
}
