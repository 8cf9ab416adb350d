"""What training notes of what a model is shown, and who is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mm import hub
from mm.apps._tabs import shelf as app
from mm.backbone import BackboneConfig
from mm.data.documents import ImageToText, Interleaved, Template, TextOnly, TextToImage, TextToSpeech
from mm.directions import shown
from mm.heads.lm import LMHead
from mm.interfaces import Encoded, Modality, Spec
from mm.model import MultimodalModel
from mm.orders.delay import Delay
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.pipelines.abilities import abilities
from mm.pipelines.base import Pipeline
from mm.serve.shelf import Served
from mm.stream import TokenStream, pack
from mm.testing import Levels, Palette
from mm.tokenizers.text_bytes import TextBytes

EXAMPLE = {
    "key": "k",
    "speaker": "slt",
    "text": "red one",
    "image": Image.fromarray(np.full((4, 4, 3), 255, np.uint8)),
    "audio": Encoded(grid=(20,), codes=torch.randint(8, (20, 4), generator=torch.Generator().manual_seed(0))),
    "words": [["red", 0.1, 0.3], ["one", 0.3, 0.75]],
}
BY_WORD = TextToSpeech(drop=0.0, by_word=True, frame_rate=25.0)


def model(masked: bool = False) -> MultimodalModel:
    torch.manual_seed(0)
    parts = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="image", tokenizer=Palette(), head=LMHead(), order=Masked() if masked else Raster()),
        Modality(name="speech", tokenizer=Levels(), head=LMHead(), order=Delay(along=True)),
    ]
    return MultimodalModel(BackboneConfig(width=16, layers=1, heads=2), parts, context=256)


def batch(made: MultimodalModel, *templates: Template) -> TokenStream:
    rng = torch.Generator().manual_seed(1)
    return pack([made.build_document(template(EXAMPLE, rng), rng) for template in templates])


@pytest.mark.parametrize("masked", [False, True])
def test_pairs_are_what_comes_first_and_what_is_learned(masked: bool) -> None:
    made = model(masked)

    def pairs(*templates: Template) -> set[tuple[str, str]]:
        return set(shown(batch(made, *templates), made.vocabulary))

    assert pairs(TextToImage(drop=0.0)) == {("text", "image")}
    assert pairs(TextToImage(drop=0.0, text_loss=True)) == {("text", "image"), ("text", "text")}
    assert pairs(TextToImage(drop=1.0)) == {("image", "image")}  # of nothing
    assert pairs(TextOnly()) == {("text", "text")}
    asked = Interleaved(["speaker", "text", "image"], context=["speaker"])
    assert pairs(asked) == {("text", "text"), ("text", "image")}  # an answer to a question
    assert pairs(ImageToText()) == {("image", "text")}
    assert pairs(TextToImage(drop=0.0), ImageToText()) == {("text", "image"), ("image", "text")}  # documents don't mix
    assert pairs(BY_WORD) == {("text", "speech")}  # the words between the sounds are given
    heard = Interleaved(["audio", "image"], {"audio": "speech"}, context=["audio"])
    assert pairs(heard) == {("speech", "image")}


def test_what_is_known_is_saved_and_decides_what_is_offered(tmp_path: Path) -> None:
    made = model()
    hub.save_pretrained(made, tmp_path / "unknown")
    assert hub.load_pretrained(tmp_path / "unknown").directions is None
    made.directions = shown(batch(made, TextToImage(), BY_WORD), made.vocabulary)
    hub.save_pretrained(made, tmp_path / "known")
    loaded = hub.load_pretrained(tmp_path / "known")
    assert loaded.directions == {("text", "image"), ("text", "speech")}

    served = Served("known", Pipeline(loaded), None)  # type: ignore[arg-type]
    assert [served.can(task) for task in ("chat", "image", "speech", "transcription")] == [False, True, True, False]
    unknown = Served("unknown", Pipeline(hub.load_pretrained(tmp_path / "unknown")), None)  # type: ignore[arg-type]
    assert all(unknown.can(task) for task in ("chat", "image", "speech", "transcription"))

    assert app._described(str(tmp_path / "known")) == app._known(Pipeline(loaded))
    assert app._known(Pipeline(loaded)).reads == frozenset()
    assert app._known(Pipeline(hub.load_pretrained(tmp_path / "unknown"))).reads == {"picture", "sound"}
    loaded.directions = frozenset({("speech", "image"), ("image", "text")})
    told = app._known(Pipeline(loaded))
    assert (told.makes, told.reads, told.takes) == ({"picture"}, {"picture"}, {"picture", "sound"})


def test_a_text_alone_is_written_and_a_picture_alone_is_made() -> None:
    """Of a language model that learns to draw, beside text that it is to remember, it was said that it writes no text; and of one
    of pictures without captions that it makes nothing."""
    made = model()
    made.directions = shown(batch(made, TextToImage(drop=0.0), TextOnly()), made.vocabulary)
    served = Served("both", Pipeline(made), None)  # type: ignore[arg-type]
    assert [served.can(task) for task in ("chat", "image", "speech")] == [True, True, False]
    made.directions = shown(batch(made, TextToImage(drop=1.0)), made.vocabulary)
    assert [Served("it", Pipeline(made), None).can(task) for task in ("chat", "image")] == [False, True]  # type: ignore[arg-type]
    told = app._known(Pipeline(made))
    assert (told.makes, told.reads, told.takes) == ({"picture"}, set(), set())


def test_directions_of_strangers_are_checked(tmp_path: Path) -> None:
    for bad in ("text", [["text"]], [["text", "smell"]], [[1, 2]], 7, [["text", "image"]] * 50):
        with pytest.raises(ValueError, match="directions"):
            hub.check_directions(bad, ["text", "image"], "the checkpoint")


def test_a_shipped_model_that_learned_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SHIPPED", tmp_path)
    assert hub.usual("text", "image") == "mm-tiny", "which then says that there is none"
    made = model()
    for name, pairs in (("a", None), ("b", {("text", "speech"), ("text", "image")}), ("mm-tiny", {("text", "image")})):
        made.directions = None if pairs is None else frozenset(pairs)
        hub.save_pretrained(made, tmp_path / name)
    assert hub.usual("text", "image") == "mm-tiny"
    assert hub.usual("text", "speech") == "b"
    assert hub.usual("speech", "text") == "mm-tiny"


def test_what_a_model_can_be_asked_for() -> None:
    """The first modality of a medium counts, which is the one that pipelines use; what is only read isn't made; vectors of no
    place are made where they are pictures, clips or shapes."""

    class Ear(Levels):
        decodes = False

    class Scales(Palette):
        @property
        def spec(self) -> Spec:
            return replace(super().spec, voxels=8, spatial=False)

    parts = [("speech", Levels()), ("shape", Scales()), ("image", Palette())]
    able = abilities("text", parts)
    assert able.modalities == {"sound": "speech", "shape": "shape", "picture": "image"}
    assert able.makes == able.reads == able.takes == {"sound", "shape", "picture"} and able.writes
    assert len(able.follows) == 12, "each of four of each other"
    able = abilities("text", parts, by_word=True)
    assert (
        able.makes == {"sound", "shape", "picture"} and able.reads == able.takes == {"shape", "picture"} and able.writes
    )
    assert not abilities("text", parts[:1], by_word=True).writes, "of sounds alone, word by word: it speaks"
    assert "sound" not in abilities("text", [("ear", Ear()), *parts]).makes, "pipelines would speak with the ear"

    shown = frozenset({("text", "speech"), ("shape", "text"), ("speech", "image"), ("image", "image")})
    able = abilities("text", parts, shown)
    assert (able.makes, able.reads, able.takes) == ({"sound", "picture"}, {"shape"}, {"sound", "shape"}) and able.writes
    assert able.follows == {("text", "sound"), ("shape", "text"), ("sound", "picture")}
    assert not abilities("text", parts, frozenset({("text", "shape")})).writes
    assert abilities("text", parts, frozenset()) == abilities("text", parts), "nothing shown: nothing known"
