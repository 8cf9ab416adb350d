"""The whole evaluation of one model, from Python."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mm.data.example import Source
from mm.data.moving import MovingSource
from mm.data.shapes import ShapesSource
from mm.evaluate.bytes import KINDS, evaluate_bytes
from mm.evaluate.command import FAMILIES
from mm.evaluate.crossing import FAMILY as CROSSING
from mm.evaluate.crossing import CrossingSubject, evaluate_crossing
from mm.evaluate.digits import evaluate_digits
from mm.evaluate.emoji import evaluate_emoji
from mm.evaluate.gallery import Gallery, load_gallery
from mm.evaluate.general import evaluate_generation
from mm.evaluate.networks import Say
from mm.evaluate.protocol import Protocol
from mm.evaluate.recordings import load_recordings
from mm.evaluate.results import Figure, Report
from mm.evaluate.shapes import SHAPES, ShapeSubject, evaluate_shapes
from mm.evaluate.speech_subject import CLEAR, PARTS, REAL, SpeechSubject, evaluate_speech
from mm.evaluate.subject import Outcome, Subject, fingerprint
from mm.evaluate.tokenizer import evaluate_tokenizer
from mm.evaluate.video import MOVING, VideoSubject, evaluate_video
from mm.interfaces import ModalityTokenizer

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
            `ShapeSubject` (whose sampling and batch then hold); or a tokenizer of sound or of shapes by itself.
        sources: whole sources (split "all") by kind: "digits" (field `digit`), "emoji" (fields `caption`, `style`, and
            `category`, `subcategory` if there are any; one key a concept), "missing" (emoji in styles that the model
            has not seen), "speech" and "spoken" as for `evaluate_speech`, "moving" (a `MovingSource`, for models of video),
            "shapes" (a `ShapesSource`, for models of shapes), and any other name for pictures of which only the tokenizer is
            measured. With "spoken" and "digits" a model of both is asked to draw what it hears and to say what it sees.
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
    this = _Evaluation(
        model=model,
        sources=sources,
        protocol=protocol,
        folder=None if folder is None else Path(folder),
        only=only,
        sampling=sampling,
        name=name,
        say=say,
        held=getattr(model, "model", model),
    )
    for part in (this.speech, this.video, this.shapes, this.pictures, this.crossing):
        part()
    held = this.held
    facts = {
        "protocol": asdict(protocol),
        "sampling": this.sampled,
        "data": {
            kind: {"what": source.what, "examples": len(source), "identity": source.identity}
            for kind, source in sources.items()
        },
        "parameters": sum(p.numel() for p in held.parameters()) if isinstance(held, torch.nn.Module) else 0,
        "threads": torch.get_num_threads(),
        "versions": {"mm": __version__, "torch": torch.__version__},
    }
    return Report(
        model=this.name,
        fingerprint=held.spec.fingerprint if isinstance(held, ModalityTokenizer) else fingerprint(held),
        facts=facts,
        figures=this.figures,
        seconds=time.perf_counter() - started,
    )


@dataclass
class _Evaluation:
    """What is measured with what, and what has been found so far."""

    model: Any
    sources: Mapping[str, Source]
    protocol: Protocol
    folder: Path | None
    only: Sequence[str]
    sampling: Mapping[str, Any] | None
    name: str
    say: Say
    held: Any
    """The model itself, once a subject has found it."""
    figures: list[Figure] = field(default_factory=list)
    sampled: dict[str, Any] = field(default_factory=dict)

    @property
    def judges(self) -> Path | None:
        return None if self.folder is None else self.folder / "judges"

    def _subject(self, kind: type[Any]) -> Any:
        """The model as one of these: as it was given, or made of it."""
        if isinstance(self.model, kind):
            return self.model
        return kind(self.model, name=self.name, sampling=self.sampling, batch=self.protocol.batch)

    def _found(self, subject: Any, **sampled: Any) -> None:
        self.held, self.name = subject.model, subject.name
        self.sampled |= {name: asdict(sampling) for name, sampling in sampled.items()}

    def speech(self) -> None:
        if CLEAR not in self.sources and REAL not in self.sources:
            return
        parts = [name for name in self.only if name in PARTS]
        if not parts:
            return
        tested = self.model if isinstance(self.model, ModalityTokenizer) else self._subject(SpeechSubject)
        self.figures += evaluate_speech(
            tested, self.sources, protocol=self.protocol, judges=self.judges, only=parts, say=self.say
        )
        if isinstance(tested, SpeechSubject):
            self._found(tested, sound=tested.sampling)

    def video(self) -> None:
        moving = self.sources.get(MOVING)
        if moving is None or "video" not in self.only:
            return
        if not isinstance(moving, MovingSource):
            raise ValueError(f"the source 'moving' is {moving.what}; give a MovingSource, which knows what moves how")
        films = self._subject(VideoSubject)
        self.figures += evaluate_video(films, moving, self.protocol, self.folder, self.judges, self.say)
        self._found(films, video=films.sampling)

    def shapes(self) -> None:
        solids = self.sources.get(SHAPES)
        if solids is None or "shapes" not in self.only:
            return
        if not isinstance(solids, ShapesSource):
            raise ValueError(f"the source 'shapes' is {solids.what}; give a ShapesSource, which knows what stands how")
        makes = self.model if isinstance(self.model, ModalityTokenizer) else self._subject(ShapeSubject)
        self.figures += evaluate_shapes(makes, solids, self.protocol, self.folder, self.judges, self.say)
        if isinstance(makes, ShapeSubject):
            self._found(makes, shape=makes.sampling)

    def pictures(self) -> None:
        sources = {kind: s for kind, s in self.sources.items() if kind not in (CLEAR, REAL, MOVING, SHAPES)}
        if not sources or set(self.only) <= {CROSSING}:
            return
        subject = self._subject(Subject)
        self.figures += self._pictures(subject, sources)
        self._found(subject, picture=subject.sampling, text=subject.text_sampling)

    def _pictures(self, subject: Subject, sources: Mapping[str, Source]) -> list[Figure]:
        protocol, folder, judges, only, say = self.protocol, self.folder, self.judges, self.only, self.say
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
        if (
            "bytes" in only
            and KINDS & set(galleries)
            and (subject.tokenizer.spec.is_free or set(only) != set(FAMILIES))
        ):
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

    def crossing(self) -> None:
        """Of models of pictures and of sound."""
        if CROSSING not in self.only or not {REAL, "digits"} <= set(self.sources):
            return
        subject = self._subject(CrossingSubject)
        gallery = load_gallery(self.sources["digits"], self._subject(Subject).side, self.protocol.holdout_every)
        clips = load_recordings(self.sources[REAL], self.protocol.holdout_every)
        self.figures += evaluate_crossing(subject, gallery, clips, self.protocol, self.judges, self.say)


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
