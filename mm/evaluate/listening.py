"""Whether a model that listens while it speaks stops when it is interrupted, and only then (LSLM, section 4).

Held-out texts are spoken in three rooms: somebody interrupts (with noise around, or none), there is noise only, there is silence.
The item has the extent of the real clip, so that the model can't know from it what comes. An interruption counts as answered
when the model stops within `WITHIN` seconds of its beginning; stopping before it, or where nobody interrupts, is a false alarm.
The whole distribution stands in the figures' detail, so that any other definition can be read off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mm.data.dialogues import MARGIN, Channel, Heard
from mm.data.documents import voice_segment
from mm.evaluate.networks import Say
from mm.evaluate.recordings import Recordings
from mm.evaluate.results import Figure, mean, share
from mm.generation import Engine, Request
from mm.interfaces import Sampling
from mm.layout import Segment
from mm.listening import NAME, Ear
from mm.model import MultimodalModel

LISTENING = "listening"
"""Family of figures."""
WITHIN = 0.5
"""Seconds from the beginning of an interruption within which the model has to stop."""
Room = Literal["interrupted", "noise", "silence"]


@dataclass(frozen=True)
class Case:
    """One item that is spoken, and what is heard meanwhile."""

    text: str
    speaker: str
    elements: int
    """Extent of the item."""
    heard: Heard


def cases(clips: Recordings, room: Room, count: int, frame_rate: float, most: int, seed: int) -> list[Case]:
    """So many cases, the clips in turn. Interruptions begin early enough for `WITHIN` to end before the clip does; clips that
    are too short for that are left out. Raises `ValueError` where all of them are."""
    long = [i for i, audio in enumerate(clips.audios) if audio.seconds > WITHIN + 2 * MARGIN]
    if not long:
        raise ValueError(
            f"no clip is longer than {WITHIN + 2 * MARGIN:g} s, so none can be interrupted; give longer ones"
        )
    channel = Channel(
        lambda number: clips.audios[number],
        len(clips),
        interruption=float(room == "interrupted"),
        noise={"interrupted": 0.5, "noise": 1.0, "silence": 0.0}[room],
        reaction=WITHIN,
    )
    rng = np.random.default_rng(seed)
    out = []
    for number in range(count):
        clip = long[number % len(long)]
        elements = min(most, int(np.ceil(clips.audios[clip].seconds * frame_rate)))
        heard = channel(elements / frame_rate, rng)
        out.append(Case(clips.texts[clip], clips.speakers[clip], elements, heard))
    return out


def stops(
    model: MultimodalModel,
    asked: Sequence[Case],
    *,
    speech: str,
    sampling: Sampling,
    batch: int = 32,
    seed: int = 0,
    say: Say = lambda line: None,
) -> list[float | None]:
    """When the model stops in each case, in seconds; None where it speaks to the end."""
    text = model.vocabulary.host.name
    spec = model.modalities[model.vocabulary.index[speech]].tokenizer.spec
    ear = ear_of(model, speech)
    requests = []
    for number, case in enumerate(asked):
        voice = [voice_segment(case.speaker, text)] if model.voices else []
        rows = ear.rows(case.heard.audio, case.elements)
        requests.append(
            Request(
                prompt=[*voice, Segment(text, case.text, loss=False)],
                items=[(speech, (case.elements,))],
                alongside={speech: {NAME: rows}},
                text=False,
                by_modality={speech: sampling},
                seed=seed + number,
            )
        )
    out: list[float | None] = []
    engine = Engine(model)
    for first in range(0, len(requests), batch):
        for (item,) in engine.generate(requests[first : first + batch]):
            codes = item.content.codes
            found = (codes[:, 0] == spec.stop).nonzero()
            out.append(int(found[0]) / spec.frame_rate if len(found) else None)
        say(f"listening: {len(out)} of {len(requests)} spoken")
    return out


def ear_of(model: MultimodalModel, speech: str) -> Ear:
    """How the modality hears. Raises `ValueError` for one that doesn't."""
    ear = getattr(model.modalities[model.vocabulary.index[speech]].tokenizer, "ear", None)
    if not isinstance(ear, Ear):
        raise ValueError(f"{speech} of this model hears nothing while it speaks; give a model that listens")
    return ear


def listening_figures(
    model: MultimodalModel,
    clips: Recordings,
    *,
    speech: str,
    sampling: Sampling,
    count: int = 200,
    batch: int = 32,
    seed: int = 0,
    say: Say = lambda line: None,
) -> list[Figure]:
    """So many cases in each of the three rooms."""
    spec = model.modalities[model.vocabulary.index[speech]].tokenizer.spec
    fusion = model.modalities[model.vocabulary.index[speech]].fusion
    figures = []
    rooms: tuple[Room, ...] = ("interrupted", "noise", "silence")
    for number, room in enumerate(rooms):
        asked = cases(clips, room, count, spec.frame_rate, spec.max_grid[0], seed + number)
        stopped = stops(model, asked, speech=speech, sampling=sampling, batch=batch, seed=seed, say=say)
        if room != "interrupted":
            figures.append(
                false_alarms(
                    f"stopped without reason, {room} only",
                    [at is not None for at in stopped],
                    note=f"{fusion} fusion",
                    detail={"by_noise": by_noise(asked, [at is not None for at in stopped])},
                )
            )
            continue
        delays = [
            None if at is None else at - float(case.heard.start or 0.0) for at, case in zip(stopped, asked, strict=True)
        ]
        hits = [delay is not None and 0 <= delay <= WITHIN for delay in delays]
        after = [delay for delay in delays if delay is not None and delay >= 0]
        detail = {
            "delays": [None if delay is None else round(delay, 4) for delay in delays],
            "never": delays.count(None),
            "before": sum(delay is not None and delay < 0 for delay in delays),
            "quantiles": dict(zip(("5%", "50%", "95%"), np.quantile(after, (0.05, 0.5, 0.95)).tolist(), strict=True))
            if after
            else {},
            "by_noise": by_noise(asked, hits),
        }
        figures.append(
            share(
                LISTENING,
                f"stopped within {WITHIN:g} s of an interruption",
                hits,
                note=f"{fusion} fusion",
                detail=detail,
            )
        )
        before = [delay is not None and delay < 0 for delay in delays]
        figures.append(false_alarms("stopped before the interruption", before))
        if after:
            figures.append(mean(LISTENING, "seconds from interruption to stop", after, "s"))
    return figures


def false_alarms(name: str, found: Sequence[bool], **more: Any) -> Figure:
    """A share of which less is better."""
    return replace(share(LISTENING, name, found, **more), unit="error")


def by_noise(asked: Sequence[Case], hits: Sequence[bool]) -> dict[str, list[int]]:
    """Hits and cases, by the kind of noise."""
    out: dict[str, list[int]] = {}
    for case, hit in zip(asked, hits, strict=True):
        entry = out.setdefault(case.heard.noise or "none", [0, 0])
        entry[0] += int(hit)
        entry[1] += 1
    return out
