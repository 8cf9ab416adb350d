"""Figures of speech that is asked for more exactly: faster or slower, and anew within a span of a clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mm.audio import Audio, resample
from mm.evaluate.networks import Say
from mm.evaluate.recordings import Recordings
from mm.evaluate.results import Figure, mean, share
from mm.evaluate.speech import log_mel_at_16k, recognise, word_error
from mm.evaluate.speech_figures import Spoken, error_figures
from mm.pipelines.sound_editing import Edit

PACE, EDITING = "pace", "editing"
"""Families of figures."""
STRETCHES = (0.8, 1.25)
"""Durations, times the one that the model chooses."""
SPAN = (1 / 3, 2 / 3)
"""Part of a clip that is spoken anew."""


class Controlled(Protocol):
    """What speaks at a pace, and edits."""

    def paced(self, texts: Sequence[str], voices: Sequence[str], seed: int, stretch: float) -> list[Audio]:
        """One sound a text, the chosen duration multiplied by `stretch`."""
        ...

    def edited(self, clips: Recordings, edits: Sequence[Edit], seed: int) -> list[Audio]:
        """The clips with their spans spoken anew."""
        ...


def pace_figures(
    subject: Controlled, spoken: Spoken, samples: int = 200, seed: int = 0, say: Say = lambda line: None
) -> list[Figure]:
    """Length and word errors of held-out digit strings at other paces, beside the model's own."""
    assert spoken.clear is not None
    clips = spoken.held_clear(len(spoken.clear))
    clips = clips.subset([i for i, kind in enumerate(clips.kinds) if kind == "digits"]).spread(samples)
    figures: list[Figure] = []
    usual: list[float] = []
    for stretch in (1.0, *STRETCHES):
        say(f"pace: {len(clips)} texts at {stretch:g} times the duration")
        made = subject.paced(clips.texts, clips.speakers, seed, stretch)
        seconds = [audio.seconds for audio in made]
        usual = usual or seconds
        if stretch != 1.0:
            ratios = [mine / own / stretch for mine, own in zip(seconds, usual, strict=True)]
            figures.append(mean(PACE, f"duration at {stretch:g}, ÷ what was asked", ratios, "ratio"))
        errors = word_error(clips.texts, recognise(made, "digits"))
        figures += error_figures(PACE, f"digits at {stretch:g}", errors)
    return figures


def editing_figures(
    subject: Controlled, spoken: Spoken, samples: int = 200, seed: int = 0, say: Say = lambda line: None
) -> list[Figure]:
    """The middle third of held-out clips, spoken anew: its mel distance from what was there, beside that of the clip's mean
    spectrum and of a copy of what stands before the span; whether every sample outside is as it was; and the words of the
    whole."""
    assert spoken.clear is not None
    clips = spoken.held_clear(samples)
    say(f"editing: {len(clips)} clips")
    edits = [Edit(audio, SPAN[0] * audio.seconds, SPAN[1] * audio.seconds) for audio in clips.audios]
    made = subject.edited(clips, edits, seed)
    found: dict[str, list[float]] = {"spoken anew": [], "mean of the rest": [], "copy of what is before": []}
    outside: list[bool] = []
    for audio, edit, new in zip(clips.audios, edits, made, strict=True):
        old = resample(audio, new.rate)
        first, last = round(edit.start * new.rate), round(edit.end * new.rate)
        kept = len(old.samples) == len(new.samples)
        outside.append(
            kept
            and np.array_equal(old.samples[:first], new.samples[:first])
            and np.array_equal(old.samples[last:], new.samples[last:])
        )
        truth, mine = log_mel_at_16k(old), log_mel_at_16k(new)
        frames = truth.shape[1]
        begin, end = round(SPAN[0] * frames), round(SPAN[1] * frames)
        span, length = truth[:, begin:end], end - begin
        rest = np.concatenate((truth[:, :begin], truth[:, end:]), axis=1).mean(1, keepdims=True)
        before = truth[:, max(0, begin - length) : begin]
        copied = np.resize(before.T, (length, len(truth))).T
        for name, guess in zip(found, (mine[:, begin:end], rest, copied), strict=True):
            width = min(length, guess.shape[1]) if guess.shape[1] > 1 else length
            found[name].append(float(np.abs(guess[:, :width] - span[:, :width]).mean()))
    figures = [
        mean(EDITING, f"mel distance inside, {name}", values, "nat", control=name != "spoken anew")
        for name, values in found.items()
    ]
    figures.append(share(EDITING, "samples outside identical", outside))
    for kind in sorted(set(clips.kinds)):
        rows = [i for i, own in enumerate(clips.kinds) if own == kind]
        errors = word_error([clips.texts[i] for i in rows], recognise([made[i] for i in rows], kind))
        figures += error_figures(EDITING, f"{kind}, edited", errors)
    return figures
