"""Video: do generated clips show the digit that was asked for, moving as it was asked for, and for how long.

Prompts are captions of held-out clips of `mm.data.moving.MovingSource`. The digit is told by a network trained here on digits
that are not held out (`moving_digits`), in the first frame and in the last; the motion is measured from the frames
(`motion`). The same measures of the true clips, and of these after the tokenizer, stand beside the figures as controls.

A rollout is a clip of several times the model's own length; what it should look like is known too, since true clips go on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from typing import Protocol as Shape

import numpy as np

from mm.data.example import BrokenExample
from mm.data.moving import MovingSource, Plan
from mm.data.moving_captions import caption
from mm.data.moving_paths import DIRECTIONS
from mm.evaluate.motion import Frames, moves_as
from mm.evaluate.moving_digits import frame_recogniser, recognised
from mm.evaluate.networks import Judge, Say
from mm.evaluate.protocol import Protocol
from mm.evaluate.results import Figure, mean, share
from mm.evaluate.subject import Tested
from mm.interfaces import ModalityTokenizer
from mm.pipelines.text_to_video import TextToVideoPipeline
from mm.video import Video

FAMILY = "video"
MOVING = "moving"
"""Kind of the source."""
UPRIGHT = ("straight", "turn", "bounce")
"""Motions through which a digit stays what it is: turned by half, a six is a nine; small, neither can be read."""
ENDS = 4
"""Frames at both ends of a clip whose brightness is compared."""
SHOWN = 16
"""Clips on a contact sheet."""


@dataclass(frozen=True)
class Filmed:
    """Generated clips."""

    clips: list[Frames]
    fps: float
    valid: list[bool]
    seconds: float
    """Of generating and decoding them all."""


class Films(Shape):
    """What is evaluated: `VideoSubject`, or what looks like it."""

    def film(self, prompts: Sequence[str], seed: int, num_frames: int | None = None) -> Filmed: ...

    def reaches(self, num_frames: int) -> str:
        """Why clips of so many frames can't be made; "" if they can."""

    def reconstruct(self, clips: Sequence[Video]) -> list[Frames]: ...


class VideoSubject(Tested):
    """A model with text and video, used the way its pipeline uses it."""

    def _open(self) -> None:
        held, recommended, batch = self.model, self.recommended, self.batch
        self.films = TextToVideoPipeline(held, recommended, batch)
        self.sampling = self.films.sampling(self.films.video, self.options)

    @property
    def tokenizer(self) -> ModalityTokenizer:
        return self.films.tokenizer(self.films.video)

    def film(self, prompts: Sequence[str], seed: int, num_frames: int | None = None) -> Filmed:
        """One clip a prompt; equal prompts give different ones."""
        started = time.perf_counter()
        made = self.films(list(prompts), seed=seed, num_frames=num_frames, **self.options)
        return Filmed(list(made.videos), made.fps, list(made.valid), time.perf_counter() - started)

    def reaches(self, num_frames: int) -> str:
        try:
            self.films.grid(num_frames)
        except ValueError as error:
            return str(error)
        return ""

    def reconstruct(self, clips: Sequence[Video]) -> list[Frames]:
        """What is left of clips after the tokenizer, there and back, in as many frames."""
        return [self.tokenizer.decode(self.tokenizer.encode(clip)).value.frames[: len(clip)] for clip in clips]


@dataclass(frozen=True)
class Asked:
    """What the prompts are made of."""

    plans: list[Plan]
    prompts: list[str]

    @property
    def steps(self) -> list[tuple[str, ...]]:
        return [plan.courses[0].steps for plan in self.plans]


def evaluate_video(
    subject: Films,
    source: MovingSource,
    protocol: Protocol,
    folder: Path | None = None,
    judges: Path | None = None,
    say: Say = lambda line: None,
) -> list[Figure]:
    """All figures of video; contact sheets go into `folder`.

    Args:
        source: whole (split "all"); its motions and things are what is asked for. Things that cross are left out.

    Raises:
        ValueError: a source that is a part, or one with nothing that can be judged.
    """
    asked = ask(source, protocol.samples)
    judge = (
        frame_recogniser(source, protocol, judges, say) if any(p.things[0].digit >= 0 for p in asked.plans) else None
    )
    say(f"video: making {len(asked.prompts)} clips")
    made = subject.film(asked.prompts, protocol.seed)
    length = len(made.clips[0])
    say("video: true clips, and these after the tokenizer")
    true = [source.draw(plan, length) for plan in asked.plans]
    figures = clip_figures(judge, [clip.frames for clip in true], source.fps, asked, "true clips: ", control=True)
    back = subject.reconstruct([Video(clip.frames[:length], made.fps) for clip in true])
    errors = [psnr(own.frames, left) for own, left in zip(true, back, strict=True)]
    figures.append(mean(FAMILY, "true clips after the tokenizer: PSNR", errors, "dB", control=True))
    figures += clip_figures(judge, back, source.fps, asked, "true clips after the tokenizer: ", control=True)
    figures += clip_figures(judge, made.clips, made.fps, asked, "")
    figures.append(share(FAMILY, "clips valid", made.valid))
    each = made.seconds / len(made.clips)
    note = f"{length} frames, in batches"
    figures.append(Figure(family=FAMILY, name="seconds a clip", value=each, unit="s", n=len(made.clips), note=note))
    sheet(folder, "video", asked, made.clips)
    longer = protocol.rollout * length
    if problem := subject.reaches(longer):
        say(f"video: no rollout of {longer} frames: {problem}")
        return figures
    return figures + rollout_figures(subject, source, judge, asked, longer, protocol, folder, say)


def rollout_figures(
    subject: Films,
    source: MovingSource,
    judge: Judge | None,
    asked: Asked,
    length: int,
    protocol: Protocol,
    folder: Path | None,
    say: Say,
) -> list[Figure]:
    """Of clips longer than the model's own: the same figures, and what drifts."""
    say(f"video: making {len(asked.prompts)} rollouts of {length} frames")
    made = subject.film(asked.prompts, protocol.seed + 1, length)
    true = [source.draw(plan, length).frames for plan in asked.plans]
    figures = clip_figures(judge, true, source.fps, asked, "true rollouts: ", control=True)
    figures += drift_figures(true, "true rollouts: ", control=True)
    own = clip_figures(judge, made.clips, made.fps, asked, "rollout: ", note=f"{length} frames")
    figures += own + drift_figures(made.clips, "rollout: ")
    ends = {figure.name: figure for figure in own}
    first, last = (ends.get(f"rollout: digit recognised, {which} frame") for which in ("first", "last"))
    if first is not None and last is not None and first.value:
        name, n = "rollout: digits recognised, last ÷ first frame", last.n
        figures.append(Figure(family=FAMILY, name=name, value=last.value / first.value, unit="share", n=n))
    sheet(folder, "video-rollout", asked, made.clips)
    return figures


def ask(source: MovingSource, count: int) -> Asked:
    """The first held-out clips with one thing (all, if none is held out), called by their plain captions, or by those of
    the source if it varies them."""
    if source.split != "all":
        raise ValueError(f"{source.what} is the split {source.split!r}; give the whole source, split 'all'")
    if set(source.motions) <= {"cross"}:
        raise ValueError("things that cross can't be judged; give a source with other motions too")
    plans: list[Plan] = []
    number = 0
    while len(plans) < count:
        try:
            plan = source.plan(number * max(1, source.holdout_every))
            source.traces(plan, 1)
        except BrokenExample:
            plan = None
        if plan is not None and len(plan.things) == 1:
            plans.append(plan)
        number += 1
        if number > 100 * count + 1000:
            raise ValueError(f"{source.what} has no clips that can be drawn; look at its pictures")
    plain = [caption(plan.things, plan.courses, plan.ground) for plan in plans]
    return Asked(plans, [plan.caption for plan in plans] if source.varied else plain)


def clip_figures(
    judge: Judge | None,
    clips: Sequence[Frames],
    fps: float,
    asked: Asked,
    prefix: str,
    *,
    control: bool = False,
    note: str = "",
) -> list[Figure]:
    """Digits in the first and the last frame, and motion: as captioned or not."""
    more: dict[str, Any] = {"control": control, "note": note}
    figures = []
    rows = [n for n, plan in enumerate(asked.plans) if plan.things[0].digit >= 0 and plan.kind in UPRIGHT]
    if judge is not None and rows:
        truth = [asked.plans[n].things[0].digit for n in rows]
        told = {
            which: recognised(judge, [clips[n] for n in rows], place) for which, place in (("first", 0), ("last", -1))
        }
        for which, found in told.items():
            hits = [own == digit for own, digit in zip(found, truth, strict=True)]
            figures.append(share(FAMILY, f"{prefix}digit recognised, {which} frame", hits, **more))
        same = [a == b for a, b in zip(*told.values(), strict=True)]
        figures.append(share(FAMILY, f"{prefix}the same digit in the first and the last frame", same, **more))
    right = [moves_as(clip, fps, steps) for clip, steps in zip(clips, asked.steps, strict=True)]
    straight = [hit for hit, steps in zip(right, asked.steps, strict=True) if steps[0] in DIRECTIONS]
    if straight:
        figures.append(share(FAMILY, f"{prefix}direction as captioned", straight, **more))
    kinds = sorted({plan.kind for plan in asked.plans})
    detail = {kind: [hit for hit, plan in zip(right, asked.plans, strict=True) if plan.kind == kind] for kind in kinds}
    counts = {kind: [sum(hits), len(hits)] for kind, hits in detail.items()}
    figures.append(share(FAMILY, f"{prefix}motion as captioned", right, detail=counts, **more))
    return figures


def drift_figures(clips: Sequence[Frames], prefix: str, *, control: bool = False) -> list[Figure]:
    """Brightness (mean of all values, of 255) and contrast (their standard deviation) of the last frames against the first."""
    begin, end = ([_part(clip, last) for clip in clips] for last in (False, True))
    shift = [float(b.mean() - a.mean()) for a, b in zip(begin, end, strict=True)]
    contrast = [_spread(b) / max(_spread(a), 1e-6) for a, b in zip(begin, end, strict=True)]
    note = f"the last {ENDS} frames against the first {ENDS}"
    return [
        mean(FAMILY, f"{prefix}brightness drift", shift, "of 255", control=control, note=note),
        mean(
            FAMILY, f"{prefix}brightness drift, absolute", [abs(s) for s in shift], "of 255", control=control, note=note
        ),
        mean(FAMILY, f"{prefix}contrast, last ÷ first frames", contrast, "ratio", control=control, note=note),
    ]


def _part(clip: Frames, last: bool) -> np.ndarray[Any, Any]:
    return (clip[-ENDS:] if last else clip[:ENDS]).astype(np.float64)


def _spread(frames: np.ndarray[Any, Any]) -> float:
    """Mean over the frames of the standard deviation within a frame."""
    return fmean(float(frame.std()) for frame in frames)


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal to noise of a whole clip in dB, of at most 100."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return float(min(100.0, 10 * np.log10(255**2 / error))) if error else 100.0


def sheet(folder: Path | None, name: str, asked: Asked, clips: Sequence[Frames]) -> None:
    """The first clips, not the best, with their prompts."""
    from mm.safe_io import atomic_file
    from mm.sheet import strips

    if folder is not None:
        with atomic_file(folder / f"{name}.png") as temporary:
            strips(list(clips[:SHOWN]), asked.prompts[:SHOWN], columns=16).save(temporary, format="PNG")


OPTIONS: Mapping[str, type] = {
    "digits": str, "pictures": str, "size": int, "frames": int, "fps": float, "seed": int, "holdout_every": int,
    "motions": list, "things": list, "grounds": list, "inks": list, "varied": bool,
}  # fmt: skip
"""Settings of `MovingSource` that `open_moving` takes."""


def open_moving(settings: Sequence[str]) -> MovingSource:
    """The source that `moving:SETTING=VALUE,…` names; several values of a setting are joined with "+". A value without a name
    is the path of handwritten digits. By default digits alone go straight, turn and bounce, called by plain captions.

    Raises `ValueError` for an unknown setting or an impossible value.
    """
    given: dict[str, Any] = {"things": ["digits"], "motions": list(UPRIGHT), "varied": False}
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign:
            name, value = "digits", setting
        kind = OPTIONS.get(name)
        if kind is None:
            raise ValueError(f"moving has no setting {name!r}; there are {', '.join(OPTIONS)}")
        try:
            if kind is bool and value not in ("true", "false"):
                raise ValueError("it is true or false")
            given[name] = value.split("+") if kind is list else value == "true" if kind is bool else kind(value)
        except ValueError as error:
            raise ValueError(f"moving: {name} can't be {value!r}: {error}") from error
    return MovingSource(**given)
