"""docs/stream.md: its pictures are those that the code makes, and what it says of each order holds."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from mm.attention import dense
from mm.stream import TokenStream
from mm.testing import rule

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = " ".join((DOCS / "stream.md").read_text(encoding="utf-8").replace("\n> ", "\n").split())


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    """docs/figures/stream.py."""
    spec = importlib.util.spec_from_file_location("stream_figures", DOCS / "figures" / "stream.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_those_that_the_code_makes(figures: ModuleType, tmp_path: Path) -> None:
    made = figures.main(["--out", str(tmp_path)])
    shown = re.findall(r"!\[[^]]+\]\((stream-[a-z]+\.svg)\)", PAGE)
    assert sorted(path.name for path in made) == sorted(shown), "each is shown once"
    for path in made:
        drawn = path.read_text(encoding="utf-8")
        ElementTree.fromstring(drawn)
        assert drawn == (DOCS / path.name).read_text(encoding="utf-8"), (
            f"run the command that the page names: {path.name}"
        )
    assert "`python docs/figures/stream.py`" in PAGE


def test_unknown_pictures_are_refused(figures: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        figures.main(["spiral"])
    assert "no picture 'spiral'; there are raster, masked" in capsys.readouterr().err


# --- what the page says -----------------------------------------------------------------------------------------------


def among(sees: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return sees[rows.nonzero()[:, 0]][:, columns.nonzero()[:, 0]]


def raster(stream: TokenStream, sees: Tensor) -> bool:
    return bool((sees == torch.ones_like(sees).tril()).all())


def masked(stream: TokenStream, sees: Tensor) -> bool:
    picture = stream.modality == 1
    before = torch.arange(len(stream)) < int(picture.nonzero()[0])
    hidden, own = stream.time == 1, torch.arange(len(stream))
    themselves = bool((stream.target[hidden] == own[hidden]).all()) and bool(
        (stream.target[picture & ~hidden] < 0).all()
    )
    whole = bool(among(sees, picture, picture | before).all())
    return whole and themselves and 0 < int(hidden.sum()) < int(picture.sum())


def scales(stream: TokenStream, sees: Tensor) -> bool:
    picture = stream.modality == 1
    number = torch.tensor([0] + [1] * 4 + [2] * 9)
    return bool((among(sees, picture, picture) == (number[:, None] >= number)).all())


def blocks(stream: TokenStream, sees: Tensor) -> bool:
    picture = stream.modality == 1
    clean, noisy = picture & (stream.copy == 0), picture & (stream.copy == 1)
    row = torch.arange(9) // 3
    earlier, own = row[:, None] > row, row[:, None] == row
    outside = ~noisy
    return (
        bool((among(sees, noisy, clean) == earlier).all())
        and bool((among(sees, noisy, noisy) == own).all())
        and bool((among(sees, clean, clean) == (earlier | own)).all())
        and not bool(among(sees, outside, noisy).any())
        and bool((stream.order[clean] == stream.order[noisy]).all())
    )


def delay(stream: TokenStream, sees: Tensor) -> bool:
    held = stream.codes["sound"].values
    staggered = all(
        bool((held[:q, q] < 0).all()) and bool((held[q : q + 4, q] >= 0).all()) and bool((held[q + 4 :, q] < 0).all())
        for q in range(3)
    )
    return staggered and raster(stream, sees)


def interleaved(stream: TokenStream, sees: Tensor) -> bool:
    after = torch.arange(len(stream)) == len(stream) - 1
    return bool((sees[after][0] == (stream.copy == 0)).all()) and len(set(stream.modality.tolist())) == 3


def packed(stream: TokenStream, sees: Tensor) -> bool:
    apart = stream.document[:, None] != stream.document
    return stream.num_documents == 3 and not bool(sees[apart].any())


SAID: dict[str, tuple[str, Callable[[TokenStream, Tensor], bool]]] = {
    "raster": ("Every position sees itself and all that came before, and predicts the next one", raster),
    "masked": (
        "They all see each other, and the whole text before them. Some are masked, and predict themselves",
        masked,
    ),
    "scales": ("A position sees its own scale and all coarser ones.", scales),
    "blocks": (
        "A noisy block sees itself and the clean blocks before it, never its own clean copy, and nobody else sees a noisy block",
        blocks,
    ),
    "delay": ("It is causal as raster is, but sub-code q of a frame stands q positions late", delay),
    "interleaved": ("What comes after an item sees its clean positions, whatever its order was.", interleaved),
    "packed": ("A document sees nothing of the others.", packed),
}


@pytest.mark.parametrize("name", SAID)
def test_what_it_says_of_an_order_holds(name: str, figures: ModuleType) -> None:
    sentence, holds = SAID[name]
    assert sentence in PAGE
    stream = figures.DOCUMENTS[name]().stream
    sees = dense(stream)
    assert holds(stream, sees)
    assert not holds(stream, ~sees), "what is said is no truism"


def test_the_rule_stands_on_the_page_and_makes_the_pictures(figures: ModuleType) -> None:
    said = "either j is clean (copy 0) and has a smaller order, or both have the same order and the same copy"
    assert said in PAGE
    for made in figures.DOCUMENTS.values():
        stream = made().stream
        assert torch.equal(dense(stream), rule(stream))
