"""The whole evaluation of one model, from Python."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mm.data.example import Source
from mm.data.moving import MovingSource
from mm.data.shapes import ShapesSource
from mm.evaluate.bytes import KINDS, evaluate_bytes
from mm.evaluate.digits import evaluate_digits
from mm.evaluate.emoji import evaluate_emoji
from mm.evaluate.gallery import Gallery, load_gallery
from mm.evaluate.general import evaluate_generation
from mm.evaluate.networks import Say
from mm.evaluate.protocol import Protocol
from mm.evaluate.results import Figure, Report
from mm.evaluate.shapes import SHAPES, ShapeSubject, evaluate_shapes
from mm.evaluate.speech_subject import CLEAR, PARTS, REAL, SpeechSubject, evaluate_speech
from mm.evaluate.subject import Outcome, Subject, fingerprint
from mm.evaluate.tokenizer import evaluate_tokenizer
from mm.evaluate.video import MOVING, VideoSubject, evaluate_video
from mm.interfaces import ModalityTokenizer

FAMILIES = (
    "tokenizer", "digits", "emoji", "speaking", "pace", "editing", "hearing", "listening", "video", "shapes", "bytes",
)  # fmt: skip
SHOWN = 40
"""Pictures on a contact sheet: the first ones, not the best."""


def evaluate(
    model: Any,
    sources: Mapping[str, Source],
    *,
    protocol: Protocol | None = None,
    folder: str | Path | None = None,
    only: Sequence[str] = FAMILIES,
    sampling: Mapping[str, Any] | None = None,
    name: str = "model",
    say: Say = lambda line: None,
) -> Report:
    """Every figure that the given sources allow.

    Args:
        model: a `MultimodalModel`, a pipeline, a training module, or a `Subject`, `SpeechSubject`, `VideoSubject` or
            `ShapeSubject` (whose sampling and batch then hold); or a tokenizer of sound by itself.
        sources: whole sources (split "all") by kind: "digits" (field `digit`), "emoji" (fields `caption`, `style`, and
            `category`, `subcategory` if there are any; one key a concept), "missing" (emoji in styles that the model
            has not seen), "speech" and "spoken" as for `evaluate_speech`, "moving" (a `MovingSource`, for models of video),
            "shapes" (a `ShapesSource`, for models of shapes), and any other name for pictures of which only the tokenizer is
            measured.
        protocol: what is drawn and how it is judged.
        folder: where judges are kept (`judges/`) and contact sheets written; None: nowhere.
        only: families to measure, of `FAMILIES`.
        sampling: fields of `Sampling` for pictures, sounds, video and shapes, instead of what the checkpoint recommends.
        name: what the results call the model.
        say: told what is going on, a line at a time.

    Raises:
        ValueError: a source that lacks what its kind needs, is given as a part, or an unknown family.
    """
    import torch

    from mm import __version__

    started = time.perf_counter()
    protocol = protocol or Protocol()
    if unknown := sorted(set(only) - set(FAMILIES)):
        raise ValueError(f"there is no family of figures {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    if not sources:
        raise ValueError(
            "there is nothing to evaluate on; give at least one source of pictures, speech, clips or shapes"
        )
    folder = None if folder is None else Path(folder)
    judges = None if folder is None else folder / "judges"
    pictures = {kind: source for kind, source in sources.items() if kind not in (CLEAR, REAL, MOVING, SHAPES)}
    moving = sources.get(MOVING)
    figures: list[Figure] = []
    sampled: dict[str, Any] = {}
    held: Any = getattr(model, "model", model)
    if CLEAR in sources or REAL in sources:
        tested: Any = model
        if not isinstance(model, SpeechSubject | ModalityTokenizer):
            tested = SpeechSubject(model, name=name, sampling=sampling, batch=protocol.batch)
        parts = [name for name in only if name in PARTS]
        figures += evaluate_speech(tested, sources, protocol=protocol, judges=judges, only=parts, say=say)
        if isinstance(tested, SpeechSubject):
            held, name, sampled["sound"] = tested.model, tested.name, asdict(tested.sampling)
    if moving is not None and "video" in only:
        if not isinstance(moving, MovingSource):
            raise ValueError(f"the source 'moving' is {moving.what}; give a MovingSource, which knows what moves how")
        films = model
        if not isinstance(films, VideoSubject):
            films = VideoSubject(model, name=name, sampling=sampling, batch=protocol.batch)
        figures += evaluate_video(films, moving, protocol, folder, judges, say)
        held, name, sampled["video"] = films.model, films.name, asdict(films.sampling)
    if SHAPES in sources and "shapes" in only:
        solids = sources[SHAPES]
        if not isinstance(solids, ShapesSource):
            raise ValueError(f"the source 'shapes' is {solids.what}; give a ShapesSource, which knows what stands how")
        makes = model
        if not isinstance(makes, ShapeSubject):
            makes = ShapeSubject(model, name=name, sampling=sampling, batch=protocol.batch)
        figures += evaluate_shapes(makes, solids, protocol, folder, judges, say)
        held, name, sampled["shape"] = makes.model, makes.name, asdict(makes.sampling)
    if pictures:
        subject = model if isinstance(model, Subject) else _subject(model, name, sampling, protocol)
        figures += _evaluate_pictures(subject, pictures, protocol, folder, judges, only, say)
        held, name = subject.model, subject.name
        sampled |= {"picture": asdict(subject.sampling), "text": asdict(subject.text_sampling)}
    facts = {
        "protocol": asdict(protocol),
        "sampling": sampled,
        "data": {
            kind: {"what": source.what, "examples": len(source), "identity": source.identity}
            for kind, source in sources.items()
        },
        "parameters": sum(p.numel() for p in held.parameters()) if isinstance(held, torch.nn.Module) else 0,
        "threads": torch.get_num_threads(),
        "versions": {"mm": __version__, "torch": torch.__version__},
    }
    return Report(
        model=name,
        fingerprint=held.spec.fingerprint if isinstance(held, ModalityTokenizer) else fingerprint(held),
        facts=facts,
        figures=figures,
        seconds=time.perf_counter() - started,
    )


def _evaluate_pictures(
    subject: Subject,
    sources: Mapping[str, Source],
    protocol: Protocol,
    folder: Path | None,
    judges: Path | None,
    only: Sequence[str],
    say: Say,
) -> list[Figure]:
    galleries: dict[str, Gallery] = {}
    for kind, source in sources.items():
        say(f"{kind}: reading {source.what}")
        galleries[kind] = load_gallery(source, subject.side, 0 if kind == "missing" else protocol.holdout_every)
    missing = galleries.pop("missing", None)
    if missing is not None and "emoji" not in galleries:
        raise ValueError("missing emoji are measured among emoji; give the source 'emoji' too")
    figures: list[Figure] = []
    outcomes: list[Outcome] = []
    if "tokenizer" in only and galleries:
        say("tokenizer: there and back")
        figures += evaluate_tokenizer(subject, galleries, protocol)
    if "digits" in only and "digits" in galleries:
        outcomes.append(evaluate_digits(subject, galleries["digits"], protocol, judges, say))
    if "emoji" in only and "emoji" in galleries:
        outcomes.append(evaluate_emoji(subject, galleries["emoji"], protocol, judges, missing, say))
    if "bytes" in only and KINDS & set(galleries) and (subject.tokenizer.spec.is_free or set(only) != set(FAMILIES)):
        # of models without files only where it is asked for, to stand beside one with
        outcomes += evaluate_bytes(subject, galleries, protocol, judges, say)
    for outcome in outcomes:
        figures += outcome.figures
        if folder is not None:
            write_sheet(outcome, folder / f"{outcome.name or outcome.figures[0].family}.png")
    if outcomes:
        say("generation: seconds")
        figures += evaluate_generation(subject, outcomes, protocol)
    return figures


def _subject(model: Any, name: str, sampling: Mapping[str, Any] | None, protocol: Protocol) -> Subject:
    return Subject(model, name=name, sampling=sampling, batch=protocol.batch)


def write_sheet(outcome: Outcome, path: Path) -> None:
    """The first generated pictures with their prompts, as one PNG."""
    from mm.pictures import to_image
    from mm.safe_io import atomic_file
    from mm.sheet import grid

    count = min(SHOWN, len(outcome.prompts))
    if count:
        shown = [to_image(pixels) for pixels in outcome.shown.pixels[:count]]
        with atomic_file(path) as temporary:
            grid(shown, columns=min(10, count), captions=outcome.prompts[:count]).save(temporary)
