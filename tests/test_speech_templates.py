"""Templates of speech: voice, text and sound; reference clips; what is learned, the number of frames among it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from mm.audio import Audio
from mm.data.documents import SpeechToText, TextToSpeech, voice_segment
from mm.data.example import BrokenExample, Example, Lazy, Source
from mm.heads.regression import RegressionHead
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.blocks import Blocks
from mm.testing import Frames, tiny

RATE = 100


def sound(frames: int, level: float = 0.5) -> Audio:
    return Audio(np.full(2 * frames, level, np.float32), RATE)


SOUND = sound(3)
EXAMPLE = Example(key="k", text="seven", speaker="theo", audio=SOUND)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Clips(Source):
    """Six clips: three of `theo`, two of `ann`, one of nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[int] = []
        self._finish([f"{number}" for number in range(6)], "clips")

    @property
    def identity(self) -> str:
        return "clips"

    def raw_picture(self, index: int) -> Any:
        return None

    def _fields(self, ordinal: int) -> dict[str, Any]:
        def load() -> Audio:
            self.loaded.append(ordinal)
            return sound(1 + ordinal)

        fields: dict[str, Any] = {"text": f"word {ordinal}", "audio": Lazy(load)}
        return fields if ordinal == 5 else fields | {"speaker": "theo" if ordinal < 3 else "ann"}


def speaking(**settings: Any) -> MultimodalModel:
    return tiny(Blocks(2, **settings), tokenizer=Frames(), head=RegressionHead())


def test_voice_text_and_sound() -> None:
    made = TextToSpeech(drop=0)(EXAMPLE, rng())
    assert made == [
        Segment("text", "theo: ", loss=False),
        Segment("text", "seven", loss=False),
        Segment("speech", SOUND, loss=True),
    ]
    assert made[0] == voice_segment("theo")
    assert TextToSpeech(drop=0, speaker_field=None)(EXAMPLE, rng()) == made[1:]
    assert TextToSpeech(drop=1)(EXAMPLE, rng()) == [Segment("null", None, loss=False), made[2]]
    renamed = TextToSpeech(drop=0, text="words", speech="sound")(EXAMPLE, rng())
    assert [segment.modality for segment in renamed] == ["words", "words", "sound"]


def test_sound_and_text() -> None:
    expected = [Segment("speech", SOUND, loss=False), Segment("text", "seven", loss=True)]
    assert SpeechToText()(EXAMPLE, rng()) == expected
    assert SpeechToText(drop=1)(EXAMPLE, rng()) == [Segment("null", None, loss=False), expected[1]]


def test_reference_clips_are_others_of_the_same_speaker() -> None:
    source = Clips()
    template, generator = TextToSpeech(drop=0, reference=1, source=source), rng()
    seen: Counter[int] = Counter()
    for _ in range(200):
        clip, text, speech = template(source[1], generator)
        assert (clip.modality, clip.loss, text.content, speech.loss) == ("speech", False, "word 1", True)
        assert len(speech.content.samples) == 4
        seen[len(clip.content.samples) // 2 - 1] += 1
    assert set(seen) == {0, 2} and min(seen.values()) > 60, "each other clip of theo, never the clip itself"
    assert 3 not in source.loaded and 5 not in source.loaded, "nothing is loaded only to see who speaks"
    lonely = Example(key="other", text="one", speaker="nobody else", audio=SOUND)
    assert template(lonely, rng())[0] == voice_segment("nobody else")
    share = sum(
        s[0].modality == "speech"
        for s in (TextToSpeech(drop=0, reference=0.25, source=source)(source[0], rng(n)) for n in range(400))
    )
    assert 60 < share < 140


def test_draws_are_taken_whatever_the_probabilities() -> None:
    after = set()
    for settings in ({"drop": 0}, {"drop": 1}, {"drop": 0, "reference": 1, "source": Clips()}):
        generator = rng()
        TextToSpeech(**settings)(EXAMPLE, generator)  # type: ignore[arg-type]
        after.add(float(torch.rand((), generator=generator)))
    assert len(after) == 1


def test_what_is_dropped_is_not_read_and_what_lacks_is_said() -> None:
    def fail() -> str:
        raise AssertionError("read")

    lazy = Example(key="k", text=Lazy(fail), speaker=Lazy(fail), audio=SOUND)
    assert len(TextToSpeech(drop=1)(lazy, rng())) == 2
    with pytest.raises(BrokenExample, match="no field 'speaker'"):
        TextToSpeech(drop=0)(Example(key="k", text="a", audio=SOUND), rng())
    with pytest.raises(ValueError, match="give source"):
        TextToSpeech(reference=0.5)
    with pytest.raises(ValueError, match="give source, and the speaker_field"):
        TextToSpeech(reference=0.5, source=Clips(), speaker_field=None)
    with pytest.raises(ValueError, match="reference is a probability"):
        TextToSpeech(reference=2)


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_the_number_of_frames_is_learned(drop: float) -> None:
    """begin, extent and end of the sound are predicted, by what stands right before them; the texts are not."""
    model = speaking()
    template = TextToSpeech(drop=drop, speech="image")
    stream = model.build_document(template(EXAMPLE, rng()), rng()).validate()
    words = model.vocabulary
    begin = stream.ids.tolist().index(words.begin("image"))
    assert int(stream.ids[begin + 1]) == words.extent(3)
    for place in (begin, begin + 1):
        assert int(stream.target[place - 1]) == place and float(stream.weight[place - 1]) == 1.0
    assert not bool((stream.target[: begin - 1] >= 0).any()), "what is given is not learned"
    hidden = model(stream, noise=model.draw_noise(stream))
    predicted = dict(
        (name, source.tolist()) for name, source, _ in model.losses(stream, hidden, model.draw_noise(stream))
    )
    assert {begin - 1, begin} <= set(predicted["text"]) and len(predicted["image"]) == 3
