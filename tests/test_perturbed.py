"""Copies of sounds with small changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm.audio import Audio
from mm.data.documents import SpeechToText
from mm.data.example import BrokenExample, Lazy, Source
from mm.data.feeds import Part
from mm.data.joined import JoinedSource
from mm.data.module import MultimodalDataModule
from mm.data.perturbed import PerturbedSource
from mm.interfaces import Encoded
from mm.testing import Levels

RATE = 8000


class Tones(Source):
    """Half a second of a tone each: example i at 300 + 100 i Hz."""

    def __init__(self, count: int = 5, **options: Any) -> None:
        super().__init__(**options)
        self._finish([f"tone{number}" for number in range(count)], "tones")

    @property
    def identity(self) -> str:
        return f"tones {self.total}"

    def _fields(self, ordinal: int) -> dict[str, Any]:
        wave = 0.5 * np.sin(2 * np.pi * (300 + 100 * ordinal) * np.arange(RATE // 2) / RATE)
        return {
            "audio": Lazy(lambda: Audio(wave.astype(np.float32), RATE)),
            "text": f"tone {ordinal}",
            "number": ordinal,
        }


def peak(audio: Audio) -> float:
    """Frequency of the strongest tone, in Hz."""
    spectrum = np.abs(np.fft.rfft(audio.samples, 1 << 16))
    return float(spectrum.argmax() * audio.rate / (1 << 16))


def test_first_copies_are_the_sounds_themselves_and_texts_stay() -> None:
    source, plain = PerturbedSource(Tones(), copies=3), Tones()
    assert len(source) == 15
    assert [example["text"] for example in source] == [f"tone {number % 5}" for number in range(15)]
    assert [example["number"] for example in source] == [number % 5 for number in range(15)]
    for index in range(5):
        assert np.array_equal(source[index]["audio"].samples, plain[index]["audio"].samples)
        assert not np.array_equal(source[5 + index]["audio"].samples, plain[index]["audio"].samples)
    assert len({example["key"] for example in source}) == 15


@pytest.mark.parametrize("into", ["key", "text", 3])
def test_fields_that_sounds_may_not_take(into: Any) -> None:
    with pytest.raises(ValueError, match="into is the name of a field beside key and text, got"):
        PerturbedSource(Tones(), into=into)
    with pytest.raises(BrokenExample, match="has a field 'number' already; give another one in into"):
        PerturbedSource(Tones(), into="number")[0]


def test_a_sound_may_go_into_another_field() -> None:
    same, other = PerturbedSource(Tones(), copies=2), PerturbedSource(Tones(), copies=2, into="heard")
    assert other.identity != same.identity == PerturbedSource(Tones(), copies=2, into="audio").identity
    for index in (1, 6):
        assert "audio" not in other[index] and other[index]["text"] == "tone 1"
        assert np.array_equal(other[index]["heard"].samples, same[index]["audio"].samples)


def test_speed_moves_length_and_pitch_together_within_bounds() -> None:
    source = PerturbedSource(Tones(), copies=40, speed=0.2, silence=0.0, gain=0.0, noise=None)
    factors = []
    for index in range(5, 200):
        audio = source[index]["audio"]
        factor = peak(audio) / (300 + 100 * (index % 5))
        assert audio.rate == RATE and len(audio.samples) == pytest.approx(RATE / 2 / factor, rel=0.01)
        assert np.abs(audio.samples[400:-400]).max() == pytest.approx(0.5, abs=0.02)
        factors.append(factor)
    assert 0.795 < min(factors) < 0.83 and 1.17 < max(factors) < 1.205


def test_silence_gain_and_noise_alone() -> None:
    plain = [example["audio"].samples for example in Tones()]
    late = PerturbedSource(Tones(), copies=20, speed=0.0, silence=0.1, gain=0.0, noise=None)
    starts = [len(late[index]["audio"].samples) - RATE // 2 for index in range(5, 100)]
    assert 0 <= min(starts) < 80 and 720 < max(starts) < 800
    assert np.array_equal(late[7]["audio"].samples[starts[2] :], plain[2])
    loud = PerturbedSource(Tones(), copies=20, speed=0.0, silence=0.0, gain=6.0, noise=None)
    gains = [20 * np.log10(np.abs(loud[index]["audio"].samples).max() / 0.5) for index in range(5, 100)]
    assert -6.01 < min(gains) < -5 and 5 < max(gains) < 6.01
    noisy = PerturbedSource(Tones(), copies=20, speed=0.0, silence=0.0, gain=0.0, noise=[10, 20])
    for index in range(5, 100):
        added = noisy[index]["audio"].samples - plain[index % 5]
        ratio = 10 * np.log10(np.square(plain[index % 5]).mean() / np.square(added).mean())
        assert 9.5 < ratio < 20.5


def test_changes_depend_on_seed_and_number_alone() -> None:
    one, same, other = (PerturbedSource(Tones(), seed=seed) for seed in (0, 0, 1))
    assert one.identity == same.identity != other.identity
    assert np.array_equal(one[9]["audio"].samples, same[9]["audio"].samples)
    assert len(one[9]["audio"].samples) != len(other[9]["audio"].samples)
    others = (
        PerturbedSource(Tones(), copies=5),
        PerturbedSource(Tones(), gain=3),
        PerturbedSource(Tones(split="train")),
    )
    assert len({one.identity, *(source.identity for source in others)}) == 4
    # what one setting draws doesn't change with another
    quiet = PerturbedSource(Tones(), silence=0.0, noise=None, gain=0.0)
    plain = PerturbedSource(Tones(), silence=0.0, noise=None)
    assert len(quiet[9]["audio"].samples) == len(plain[9]["audio"].samples)


def test_only_what_the_source_gives_is_copied() -> None:
    source = PerturbedSource(Tones(split="train", holdout_every=2), copies=3)
    assert {example["number"] for example in source} == {1, 3}


def test_texts_are_those_of_the_source() -> None:
    source = Tones(caption="the {number}th tone")
    assert PerturbedSource(source)[0]["text"] == source[0]["text"] == "the 0th tone"
    assert PerturbedSource(source, caption="{number}!")[0]["text"] == "0!"


def test_copies_are_cached_once_for_all_that_read_them(tmp_path: Path) -> None:
    varied = PerturbedSource(Tones(), copies=3)
    pairs = JoinedSource([varied, Tones(3)], field="number", count=20)
    parts = [Part(source=varied, template=SpeechToText()), Part(source=pairs, template=SpeechToText())]
    module = MultimodalDataModule(
        train=parts, cache=str(tmp_path), cached={"audio": "speech"}, to_stream=lambda document, rng: None,
        tokenizers={"speech": Levels(most=4000, rate=RATE)},
    )  # fmt: skip
    module.prepare_data()
    assert len(list(tmp_path.glob("*.json"))) == 2, "of the copies and of the tones"
    encoded = [example["audio"] for example in module._with_caches(parts)[0].source]
    assert all(isinstance(item, Encoded) for item in encoded)
    assert len({len(item) for item in encoded[:5]}) == 1 < len({len(item) for item in encoded[5:]})
    (sound, text) = module._with_caches(parts)[1].template(pairs[0], torch.Generator())
    assert sound.modality == "speech" and text.content == f"tone {pairs[0]['number']}"


def test_sounds_that_are_empty_or_none() -> None:
    with pytest.raises(BrokenExample, match="tones has no field 'sound' to change; it has: audio"):
        PerturbedSource(Tones(), field="sound")[0]

    class Empty(Tones):
        def _fields(self, ordinal: int) -> dict[str, Any]:
            return {"audio": Audio(np.zeros(0, np.float32), RATE) if ordinal else "a word", "text": ""}

    source = PerturbedSource(Empty(2), copies=2, silence=0.0)
    assert len(source[3]["audio"].samples) == 0
    with pytest.raises(BrokenExample, match="is a str, not a sound"):
        source[2]["audio"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"copies": 0}, "copies must be 1 to"),
        ({"copies": 1 << 21}, "copies must be 1 to"),
        ({"speed": 0.6}, "speed is a share"),
        ({"speed": float("nan")}, "speed must be a number, got nan"),
        ({"silence": -1.0}, "silence is 0 to 10"),
        ({"gain": 41.0}, "gain is 0 to 40"),
        ({"noise": [20, 10]}, "the smaller first"),
        ({"noise": [10]}, "two ratios"),
        ({"noise": 15.0}, "two ratios"),
        ({"noise": ("a", "b")}, "two ratios"),
        ({"speed": "0.1"}, "speed must be a number, got '0.1'"),
        ({"copies": 2.5}, "copies must be a whole number, got 2.5"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be"),
        ({"split": "train"}, "give it to the source that is copied"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PerturbedSource(Tones(), **settings)
