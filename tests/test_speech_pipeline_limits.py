"""What pipelines of speech refuse before they compute, and where they cut."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mm.audio import Audio, load_audio
from mm.commands.generate import arguments, check_given
from mm.edits import edit_distance
from mm.media import load_image
from mm.pipelines.sound_editing import Edit, plan
from mm.pipelines.speech_to_text import cut_quietly
from mm.pipelines.utterances import check_duration, divide
from mm.tokenizers.speech_codec import SpeechCodec

LONG = "x" * 5000


@pytest.fixture(scope="module")
def codec() -> SpeechCodec:
    return SpeechCodec.tiny()


def noise(count: int, rate: int = 16_000) -> Audio:
    return Audio(np.random.default_rng(0).uniform(-0.5, 0.5, count).astype(np.float32), rate)


# --- durations ------------------------------------------------------------------------------------------------------


def test_edits_whose_text_does_not_fit(codec: SpeechCodec) -> None:
    clip = noise(8000)
    with pytest.raises(ValueError, match=r"the 340 characters of 'xxx.* can't be spoken in 0.401 s; leave them 8.5 s"):
        plan(Edit(clip, 0.2, 0.3), 0.001, 0, codec, "x" * 340)
    assert plan(Edit(clip, 0.2, 0.3), 0.1, 0, codec, "x" * 20).made == 1600
    assert plan(Edit(clip, 0.2, 0.3), 0.001, 0, codec).made == 16  # anything may be said


@pytest.mark.parametrize("seconds", [1e300, 1e308, 10**400, float("inf"), -1.0, float("nan")])
def test_durations_beyond_all_bounds(codec: SpeechCodec, seconds: float) -> None:
    with pytest.raises(ValueError):
        plan(Edit(noise(8000), 0.1, 0.2), seconds, 0, codec)
    with pytest.raises(ValueError):
        plan(Edit(noise(8000), 0.1, seconds), None, 0, codec)
    with pytest.raises(ValueError):
        check_duration(seconds, "seven", codec)


# --- names of files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LONG + ".wav", "a\0b.wav", Path(LONG)])
def test_names_that_no_file_can_have(name: str | Path) -> None:
    for load in (load_audio, load_image):
        with pytest.raises(ValueError, match="is missing; give the path") as caught:
            load(name)  # type: ignore[operator]
        assert load is load_image or len(str(caught.value)) < 500
    with pytest.raises(ValueError, match="--from takes all that follows it"):
        check_given(arguments(["--to", "text", "--from", os.fspath(name).removesuffix(".wav")]))


# --- where texts and sounds are cut ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "most"), [("あ" * 10 + "。" + "い" * 5, 10), ("ああ。。いい", 3), ("あ" * 9 + "、あ", 9)]
)
def test_no_part_is_longer_than_what_was_tried(text: str, most: int) -> None:
    tried: set[str] = set()

    def fits(part: str) -> bool:
        tried.add(part)
        return len(part) <= most

    parts = divide(text, 100, fits)
    assert "".join(parts) == text and max(map(len, parts)) <= most
    assert max(map(len, divide(text, most, lambda _: True))) <= most


@pytest.mark.parametrize("extra", [1, 268, 800, 5000])
@pytest.mark.parametrize("size", [1600, 128_001])
def test_no_crumbs_are_left(extra: int, size: int) -> None:
    rate = 16_000
    samples = noise(128_000 + extra).samples.copy()
    samples[127_500:] = 0  # the quietest place is the last
    chunks = (Audio(samples[at : at + size], rate) for at in range(0, len(samples), size))
    pieces = [len(piece.samples) for piece in cut_quietly(chunks, 8.0)]
    assert sum(pieces) == len(samples) and len(pieces) == 2
    assert min(pieces) >= rate // 4 and max(pieces) <= 128_000
    assert [len(p.samples) for p in cut_quietly(iter([noise(20)]), 8.0)] == [20]  # all there is


# --- edits ----------------------------------------------------------------------------------------------------------


def test_edit_distance_of_texts_and_lists() -> None:
    for one, other, edits in (
        ("", "", 0),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("ab", "ba", 2),
        ("aé\U0001f600", "a", 2),
    ):
        assert edit_distance(one, other) == edit_distance(other, one) == edits
    assert edit_distance("one two three".split(), "one one two four three".split()) == 2
