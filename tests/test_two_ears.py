"""A model that speaks with one tokenizer and hears with another: which of them each pipeline uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mm.audio import Audio
from mm.backbone import BackboneConfig
from mm.heads.lm import LMHead
from mm.heads.regression import RegressionHead
from mm.hub import load_pretrained, save_pretrained
from mm.interfaces import Modality
from mm.model import MultimodalModel
from mm.orders.delay import Delay
from mm.orders.raster import Raster
from mm.pipelines.abilities import abilities_of, check_learned
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.pipelines.speech_to_text import SpeechToTextPipeline
from mm.pipelines.text_to_speech import TextToSpeechPipeline
from mm.tokenizers.speech_codec import SpeechCodec
from mm.tokenizers.speech_ctc import SpeechCTC
from mm.tokenizers.text_bytes import TextBytes

LEARNED = frozenset({("text", "speech"), ("ear", "text")})


def model(directions: frozenset[tuple[str, str]] | None) -> MultimodalModel:
    torch.manual_seed(0)
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="speech", tokenizer=SpeechCodec.tiny(), head=LMHead(), order=Delay()),
        Modality(name="ear", tokenizer=SpeechCTC.tiny(), head=RegressionHead(), order=Raster(prefix=True)),
    ]
    made = MultimodalModel(BackboneConfig(width=32, layers=1, heads=2), modalities, context=256).eval()
    made.directions = directions
    return made


def sound() -> Audio:
    return Audio(0.3 * np.sin(np.arange(8000) * 0.3).astype(np.float32), 16000)


@pytest.mark.parametrize(
    ("directions", "hears"),
    [(LEARNED, "ear"), (None, "speech"), (frozenset({("text", "speech"), ("speech", "text")}), "speech")],
)
def test_given_sounds_go_where_training_showed_them(directions: frozenset[tuple[str, str]] | None, hears: str) -> None:
    made = model(directions)
    assert AnyToAnyPipeline(made).hearing() == hears
    assert [segment.modality for segment in AnyToAnyPipeline(made).encode([[sound(), "a"]])[0]] == [hears, "text"]
    assert SpeechToTextPipeline(made).encode([sound()])[0][0].modality == hears
    assert len(SpeechToTextPipeline(made)(sound(), max_tokens=3).texts) == 1


def test_what_is_made_of_its_own_medium_is_no_hearing() -> None:
    """Mega-TTS hears a timbre, to speak in it."""
    assert AnyToAnyPipeline(model(frozenset({("text", "speech"), ("ear", "speech")}))).hearing() == "speech"


def test_it_speaks_with_the_codec() -> None:
    made = model(LEARNED)
    speaker = TextToSpeechPipeline(made)
    assert speaker.speech == "speech" and speaker("a", duration=0.2, seed=0).audios[0].size
    assert [segment.modality for segment in speaker.encode_voice(sound())] == ["speech"]
    able = abilities_of(speaker)
    assert able.makes == {"sound"} and able.reads == {"sound"} and able.modalities == {"sound": "speech"}


def test_it_is_saved_whole(tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = model(LEARNED)
    save_pretrained(made, tmp_path / "model", storage="float16")
    again = load_pretrained(tmp_path / "model")
    assert SpeechToTextPipeline(again).hearing() == "ear"
    assert again.directions == LEARNED


def test_sounds_are_heard_as_what_is_made_of_them_was_learned() -> None:
    pipeline = AnyToAnyPipeline(model(LEARNED))
    assert pipeline.hearing("speech") == "speech", "training showed no sound behind the ear"
    assert pipeline.encode([[sound()]], "speech")[0][0].modality == "speech"
    both = AnyToAnyPipeline(model(frozenset({("speech", "text"), ("ear", "text")})))
    assert both.hearing() == "ear"
    assert abilities_of(AnyToAnyPipeline(model(frozenset({("text", "ear"), ("ear", "text")})))).makes == set()


def test_sounds_of_sounds_are_refused_where_it_never_spoke_what_it_heard() -> None:
    """It answered with anything."""
    pipeline = AnyToAnyPipeline(model(LEARNED))
    with pytest.raises(
        ValueError, match="^training showed this model no sounds of sounds; it makes sounds of text, and"
    ):
        check_learned(pipeline, "sound", "sound")
    assert "sound" in abilities_of(pipeline).takes
    check_learned(AnyToAnyPipeline(model(None)), "sound", "sound")
    timbre = AnyToAnyPipeline(model(frozenset({("text", "speech"), ("ear", "speech")})))
    check_learned(timbre, "sound", "sound")
    assert "sound" not in abilities_of(timbre).takes
