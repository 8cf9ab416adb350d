"""Sources made of others: pairs that agree in a field, rows of examples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm.data.documents import Interleaved
from mm.data.example import BrokenExample, Lazy, Source
from mm.data.feeds import Part
from mm.data.joined import JoinedSource, RowsSource
from mm.data.module import MultimodalDataModule
from mm.data.sources import DigitsSource, FolderSource
from mm.interfaces import Encoded
from mm.testing import Palette


class Said(Source):
    """Ten examples for each of some digits, with a sound that is only a word here; the last one is broken."""

    def __init__(self, digits: tuple[int, ...], **options: Any) -> None:
        super().__init__(**options)
        self.digits = digits
        self._finish([f"{digit}_{take}" for digit in digits for take in range(10)], "said digits")

    @property
    def identity(self) -> str:
        return f"said {self.digits}"

    def _fields(self, ordinal: int) -> dict[str, Any]:
        if ordinal == self.total - 1:
            raise BrokenExample("no sound")
        digit = self.digits[ordinal // 10]
        return {"audio": Lazy(lambda: f"sound {ordinal}"), "digit": digit, "take": ordinal % 10, "text": "said"}


@pytest.fixture
def drawn(tmp_path: Path) -> DigitsSource:
    labels = np.arange(60) % 10
    images = (labels[:, None, None] * 20 + np.zeros((60, 8, 8))).astype(np.uint8)
    np.savez(tmp_path / "digits.npz", images=images, labels=labels)
    return DigitsSource(tmp_path / "digits.npz", size=8, split="train", holdout_every=6)


def test_pairs_agree_and_all_values_come(drawn: DigitsSource) -> None:
    source = JoinedSource([Said((1, 3, 7)), drawn], field="digit", count=300)
    assert source.shared == ["1", "3", "7"] and len(source) == 300
    seen = Counter(example["digit"] for example in source)
    assert set(seen) == {1, 3, 7} and min(seen.values()) > 70
    for example in list(source)[:20]:
        assert int(example["audio"].split()[1]) // 10 == (1, 3, 7).index(example["digit"])
        assert np.asarray(example["image"])[0, 0, 0] == 255 - 20 * example["digit"]
        assert example["caption"].endswith(("one", "three", "seven"))
    assert len({example["take"] for example in source}) == 10
    document = Interleaved(["audio", "image"], {"audio": "speech"}, context=["audio"])(source[0], torch.Generator())
    assert [(segment.modality, segment.loss) for segment in document] == [("speech", False), ("image", True)]


def test_what_is_drawn_depends_on_seed_and_number_only(drawn: DigitsSource) -> None:
    def make(**settings: Any) -> JoinedSource:
        return JoinedSource([Said((1, 3)), drawn], field="digit", **{"count": 50, **settings})

    def tags(source: Source) -> list[tuple[Any, ...]]:
        return [(e["audio"], np.asarray(e["image"])[0, 0, 0], e["take"]) for e in source]

    assert tags(make()) == tags(make()) and make().identity == make().identity
    assert tags(make(count=20)) == tags(make())[:20]
    assert tags(make(seed=1)) != tags(make())
    others = [make(seed=1), make(count=20), JoinedSource([Said((1, 3)), drawn.whole()], field="digit", count=50)]
    assert len({make().identity, *(other.identity for other in others)}) == 4


def test_nothing_that_a_member_holds_out_gets_in(drawn: DigitsSource) -> None:
    held = {drawn.whole().key(i) for i in range(60)} - {drawn.key(i) for i in range(len(drawn))}
    source = JoinedSource([drawn, Said((1, 3, 7))], field="digit", count=400, caption="{name}")
    assert held and source[3]["text"] in ("one", "three", "seven")
    inner = {drawn.key(int(index)) for having in source._having[0].values() for index in having}
    assert not inner & held


def test_joins_that_cannot_be(drawn: DigitsSource) -> None:
    with pytest.raises(ValueError, match="at least two sources, got 1"):
        JoinedSource([drawn], field="digit")
    with pytest.raises(ValueError, match="no value of 'take' is in all sources"):
        JoinedSource([Said((1, 2)), drawn], field="take")
    with pytest.raises(ValueError, match="count must be 1 to"):
        JoinedSource([Said((1, 2)), drawn], field="digit", count=0)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        JoinedSource([Said((1, 2)), drawn], field="digit", seed=-1)


@pytest.fixture
def pictures(tmp_path: Path) -> FolderSource:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8), (number * 40, 0, 0)).save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text(f"picture {number}")
    return FolderSource(folder)


def test_rows_are_captions_and_pictures_by_turns(pictures: FolderSource) -> None:
    source = RowsSource(pictures, least=2, most=4, count=40)
    lengths = Counter(example["length"] for example in source)
    assert set(lengths) == {2, 3, 4}
    for example in source:
        document = Interleaved(["rows"])(example, torch.Generator())
        assert [segment.modality for segment in document] == ["text", "image"] * example["length"]
        told = [segment.content for segment in document]
        for words, picture in zip(told[::2], told[1::2], strict=True):
            assert words == f"picture {np.asarray(picture)[0, 0, 0] // 40}"
        assert len(set(told[::2])) == example["length"], "each once"
    assert source.identity != RowsSource(pictures, least=2, most=4, count=40, seed=1).identity


def test_members_are_cached_in_place_of_what_is_made_of_them(
    drawn: DigitsSource, pictures: FolderSource, tmp_path: Path
) -> None:
    pair = JoinedSource([Said((1, 3)), drawn], field="digit", count=30)
    parts = [
        Part(source=pair, template=Interleaved(["take", "image"], {"take": "text"})),
        Part(source=RowsSource(pictures), template=Interleaved(["rows"])),
    ]
    module = MultimodalDataModule(
        train=parts, cache=str(tmp_path / "cache"), cached={"image": "image"}, to_stream=lambda document, rng: None,
        tokenizers={"image": Palette(8)},
    )  # fmt: skip
    module.prepare_data()
    assert len(list((tmp_path / "cache").glob("*.json"))) == 2, "of the digits and of the pictures, each once"
    for part in module._with_caches(parts):
        for segment in part.template(part.source[0], torch.Generator()):
            assert segment.modality == "text" or isinstance(segment.content, Encoded)
    assert isinstance(parts[1].source[0]["rows"][1], Image.Image), "what was given stays as it was"


def test_rows_that_cannot_be(pictures: FolderSource) -> None:
    for settings in ({"least": 0}, {"most": 7}, {"least": 3, "most": 2}):
        with pytest.raises(ValueError, match="a row has 1 to 6 examples"):
            RowsSource(pictures, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fields is a list"):
        RowsSource(pictures, fields="text")
