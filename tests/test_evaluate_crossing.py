"""From sound to picture and back: a model that knows all answers, one that knows none, and a real one of random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mm.audio import Audio
from mm.data.sources import DIGIT_NAMES
from mm.evaluate import speech_judges
from mm.evaluate.crossing import CrossingSubject, evaluate_crossing
from mm.evaluate.gallery import Gallery
from mm.evaluate.protocol import Protocol
from mm.evaluate.recordings import Recordings
from mm.evaluate.speech_judges import SoundRecipe
from mm.testing import Palette, tiny

SPEAKERS = ("high", "low")


def tone(digit: int, speaker: str, take: int) -> Audio:
    """A digit is a pitch, a speaker an overtone; takes differ by noise."""
    rng = np.random.default_rng([digit, SPEAKERS.index(speaker), take])
    phase = 2 * np.pi * 200 * 2 ** (0.3 * digit) * np.arange(4800) / 8000
    samples = 0.3 * np.sin(phase) + 0.005 * rng.standard_normal(4800)
    samples += 0.15 * np.sin(2 * phase) * (speaker == "high")
    return Audio(samples.astype("float32"), 8000)


def blob(digit: int, take: int) -> Tensor:
    """A digit is a place."""
    rng = np.random.default_rng([digit, take])
    pixels = np.full((3, 16, 16), 255, np.uint8)
    top, left = 8 * (digit // 5), 3 * (digit % 5)
    pixels[:, top : top + 5, left : left + 3] = rng.integers(0, 40)
    return torch.from_numpy(pixels)


@pytest.fixture(scope="module")
def clips() -> Recordings:
    rows = [(digit, speaker, take) for digit in range(10) for speaker in SPEAKERS for take in (4, 5, 6, 7)]
    return Recordings(
        audios=[tone(*row) for row in rows],
        texts=[DIGIT_NAMES[digit] for digit, _, _ in rows],
        speakers=[speaker for _, speaker, _ in rows],
        kinds=["digits"] * len(rows),
        held=[take in (5, 6) for _, _, take in rows],
        identity="tones",
    )


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    rows = [(digit, take) for digit in range(10) for take in range(8)]
    return Gallery(
        pixels=torch.stack([blob(*row) for row in rows]),
        captions=[f"handwritten digit {DIGIT_NAMES[digit]}" for digit, _ in rows],
        styles=[""] * len(rows),
        keys=[f"{digit}_{take}" for digit, take in rows],
        digits=[digit for digit, _ in rows],
        kinds=["/"] * len(rows),
        held=[take < 2 for _, take in rows],
        identity="blobs",
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where judges stay from one test to the next."""
    return tmp_path_factory.mktemp("judges")


class Knowing:
    """Turns what it is given into the digit that stands `off` behind it, by the order in which digits are given."""

    def __init__(self, heard: Sequence[int], seen: Sequence[int], off: int = 0) -> None:
        self.heard, self.seen, self.off = heard, seen, off

    def draw_heard(self, audios: Sequence[Audio], seed: int) -> list[Any]:
        assert len(audios) == len(self.heard)
        digits = [(digit + self.off) % 10 for digit in self.heard]
        return [Image.fromarray(blob(digit, 9).permute(1, 2, 0).numpy()) for digit in digits]

    def speak_seen(self, pixels: Tensor, seed: int) -> list[Audio]:
        assert len(pixels) == len(self.seen)
        return [tone((digit + self.off) % 10, "low", 9) for digit in self.seen]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SoundRecipe(epochs=30, batch=16, widths=(8, 16, 16), features=32, dropout=0.0)
    monkeypatch.setattr(speech_judges, "DIGITS", small)


@pytest.mark.parametrize(("off", "expected"), [(0, 1.0), (3, 0.0)])
def test_what_comes_out_is_judged(gallery: Gallery, clips: Recordings, kept: Path, off: int, expected: float) -> None:
    heard = [DIGIT_NAMES.index(text) for text in clips.subset(clips.where(held=True)).texts]
    seen = gallery.subset(gallery.where(held=True)).digits
    protocol = Protocol(samples=100)
    figures = evaluate_crossing(Knowing(heard, seen, off), gallery, clips, protocol, kept)
    assert [figure.control for figure in figures] == [True, True, False, False]
    assert min(figure.value for figure in figures[:2]) >= 0.9, "the judges know what is given"
    for figure in figures[2:]:
        assert figure.family == "crossing" and abs(figure.value - expected) <= 0.1
        assert sum(tries for _, tries in figure.detail.values()) == figure.n
    assert {figure.n for figure in figures} == {40, 20}


def test_sources_that_hold_nothing_out(gallery: Gallery, clips: Recordings) -> None:
    with pytest.raises(ValueError, match="0 recordings and 20 pictures"):
        evaluate_crossing(Knowing([], []), gallery, clips.subset(clips.where(held=False)), Protocol())


def test_a_model_is_asked_for_the_other_and_nothing_else() -> None:
    """Of random weights: a picture for a sound, a sound for a picture, equal for equal seeds."""
    model = tiny_of_both()
    subject = CrossingSubject(model)
    sounds = [tone(1, "low", 0), tone(2, "low", 0)]
    made = subject.draw_heard(sounds, 0)
    assert [picture.size for picture in made] == [(4, 4)] * 2
    assert [np.asarray(p).tolist() for p in made] == [np.asarray(p).tolist() for p in subject.draw_heard(sounds, 0)]
    spoken = subject.speak_seen(torch.stack([blob(1, 0), blob(2, 0)]), 0)
    assert all(isinstance(sound, Audio) for sound in spoken) and len(spoken) == 2
    assert subject.draw_heard([], 0) == []
    with pytest.raises(ValueError, match="sound"):
        CrossingSubject(tiny(tokenizer=Palette()))


def tiny_of_both() -> Any:
    from mm.backbone import BackboneConfig
    from mm.heads.lm import LMHead
    from mm.model import Modality, MultimodalModel
    from mm.orders.raster import Raster
    from mm.tokenizers.speech_codec import SpeechCodec
    from mm.tokenizers.text_bytes import TextBytes

    torch.manual_seed(0)
    kinds = {"text": TextBytes(), "image": Palette(), "speech": SpeechCodec.tiny()}
    modalities = [Modality(name=n, tokenizer=t, head=LMHead(), order=Raster()) for n, t in kinds.items()]
    return MultimodalModel(BackboneConfig(width=32, layers=1, heads=2), modalities, context=256)
