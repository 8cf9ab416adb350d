"""Figures of pace and of editing, with stand-ins whose figures are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mm.audio import Audio
from mm.evaluate.recordings import Recordings
from mm.evaluate.results import Figure
from mm.evaluate.speech_control import editing_figures, pace_figures
from mm.evaluate.speech_figures import Spoken
from mm.pipelines.sound_editing import Edit

pytest.importorskip("pocketsphinx", reason="the recogniser comes with the extra `speech`")
TEXTS = ["one two", "three four"]


def noise(seconds: float, seed: int) -> Audio:
    rng = np.random.default_rng(seed)
    count = round(seconds * 16_000)
    envelope = 0.1 + 0.1 * np.sin(np.arange(count) / 1000)
    return Audio((rng.standard_normal(count) * envelope).astype(np.float32), 16_000)


@pytest.fixture
def spoken() -> Spoken:
    clips = Recordings([noise(0.9, 0), noise(1.2, 1)], TEXTS, ["a", "b"], ["digits"] * 2, [True] * 2, "x")
    return Spoken(clips, None, None, None)


class Subject:
    """Noise of the asked duration; edits leave all, or everything but the outside, as it was."""

    def __init__(self, damage: bool = False, off: float = 1.0) -> None:
        self.damage, self.off = damage, off

    def paced(self, texts: Sequence[str], voices: Sequence[str], seed: int, stretch: float) -> list[Audio]:
        factor = 1.0 if stretch == 1.0 else stretch * self.off
        return [noise(factor * len(text) / 10, seed) for text in texts]

    def edited(self, clips: Recordings, edits: Sequence[Edit], seed: int) -> list[Audio]:
        out = []
        for audio in clips.audios:
            samples = audio.samples.copy()
            samples[0] += 0.5 * self.damage
            out.append(Audio(samples, audio.rate))
        return out


def by_name(figures: list[Figure]) -> dict[str, float]:
    return {figure.name: figure.value for figure in figures}


@pytest.mark.parametrize("off", [1.0, 1.1])
def test_pace_compares_lengths_with_what_was_asked(spoken: Spoken, off: float) -> None:
    found = by_name(pace_figures(Subject(off=off), spoken))
    assert found["duration at 0.8, ÷ what was asked"] == pytest.approx(off, rel=1e-3)
    assert found["duration at 1.25, ÷ what was asked"] == pytest.approx(off, rel=1e-3)
    assert {f"word errors, digits at {x}" for x in ("1", "0.8", "1.25")} <= set(found)


@pytest.mark.parametrize("damage", [False, True])
def test_editing_sees_every_sample_outside(spoken: Spoken, damage: bool) -> None:
    found = by_name(editing_figures(Subject(damage), spoken))
    assert found["samples outside identical"] == (0.0 if damage else 1.0)
    # the span was not touched, so its distance is none, and that of the guesses is some
    assert found["mel distance inside, spoken anew"] < 1e-6
    assert found["mel distance inside, mean of the rest"] > 0.1
    assert found["mel distance inside, copy of what is before"] > 0.1
