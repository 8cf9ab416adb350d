"""Templates: which segments a document has, which are learned, and how often the condition is dropped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image

from mm.data.documents import ImageToText, Interleaved, Mixture, Template, TextOnly, TextToImage
from mm.data.example import Example, Lazy
from mm.layout import Segment

PICTURE = Image.new("RGB", (2, 2))
EXAMPLE = Example(key="k", text="a red apple", image=PICTURE)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_text_to_image() -> None:
    expected = [Segment("text", "a red apple", loss=False), Segment("image", PICTURE, loss=True)]
    assert TextToImage(drop=0)(EXAMPLE, rng()) == expected
    assert TextToImage(drop=0, text_loss=True)(EXAMPLE, rng())[0].loss
    assert TextToImage(drop=1)(EXAMPLE, rng()) == [Segment("null", None, loss=False), expected[1]]


def test_image_to_text() -> None:
    expected = [Segment("image", PICTURE, loss=False), Segment("text", "a red apple", loss=True)]
    assert ImageToText()(EXAMPLE, rng()) == expected
    assert ImageToText(drop=1)(EXAMPLE, rng()) == [Segment("null", None, loss=False), expected[1]]


def test_names_can_be_chosen() -> None:
    example = Example(key="k", title="t", photo=PICTURE)
    template = TextToImage(drop=0, text="words", image="vq", text_field="title", image_field="photo")
    assert [segment.modality for segment in template(example, rng())] == ["words", "vq"]
    with pytest.raises(ValueError, match="example 'k' has no field 'text'; it has: key, photo, title"):
        TextOnly()(example, rng())


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("kind", ["text to image", "image to text", "interleaved"])
def test_the_condition_is_dropped_with_frequency_p(p: float, kind: str) -> None:
    """p is the frequency of dropping, not of keeping: 4 standard errors, which tells 0.1 from 0.9 with certainty."""
    templates: dict[str, Template] = {
        "text to image": TextToImage(drop=p),
        "image to text": ImageToText(drop=p),
        "interleaved": Interleaved(["text", "image"], context=["text"], drop=p),
    }
    template, n, generator = templates[kind], 10_000, rng(1)
    dropped = sum(template(EXAMPLE, generator)[0].modality == "null" for _ in range(n))
    assert abs(dropped / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_a_dropped_condition_is_not_even_read() -> None:
    def fail() -> str:
        raise AssertionError("read")

    example = Example(key="k", text=Lazy(fail), image=PICTURE)
    assert TextToImage(drop=1)(example, rng())[0].modality == "null"


def test_a_draw_is_taken_whatever_p() -> None:
    """Otherwise changing p would change everything that is drawn after it."""
    after = []
    for p in (0.0, 0.5, 1.0):
        generator = rng()
        TextToImage(drop=p)(EXAMPLE, generator)
        after.append(float(torch.rand((), generator=generator)))
    assert len(set(after)) == 1


def test_interleaved() -> None:
    example = Example(key="k", texts=["one", None, "two"], pictures=[PICTURE, None], text="end", wav=b"...")
    template = Interleaved(["texts", "pictures", "wav", "text"], modalities={"wav": "speech"}, context=["texts"])
    assert template(example, rng()) == [
        Segment("text", "one", loss=False),
        Segment("text", "two", loss=False),
        Segment("image", PICTURE, loss=True),
        Segment("speech", b"...", loss=True),
        Segment("text", "end", loss=True),
    ]
    dropped = Interleaved(["texts", "text"], context=["texts"], drop=1)(example, rng())
    assert [segment.modality for segment in dropped] == ["null", "text"]
    with pytest.raises(ValueError, match=r"'k' has nothing in the fields \['none'\]"):
        Interleaved(["none"])(Example(key="k", none=[None]), rng())
    with pytest.raises(ValueError, match=r"context names \['other'\]"):
        Interleaved(["text"], context=["other"])


class Constant(Template):
    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        return [Segment("text", self.text, loss=True)]


def test_mixture_frequencies() -> None:
    weights = [1.0, 0.0, 3.0, 6.0]
    template, n, generator = Mixture([Constant(name) for name in "abcd"], weights), 10_000, rng(2)
    drawn = [template(EXAMPLE, generator)[0].content for _ in range(n)]
    for name, weight in zip("abcd", weights, strict=True):
        p = weight / 10
        assert abs(drawn.count(name) / n - p) <= 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 2.0], [0.0, 0.0], [float("inf"), 1.0]])
def test_mixture_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="Mixture got 2 templates and the weights"):
        Mixture([TextOnly(), TextOnly()], weights)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_probabilities(p: float) -> None:
    with pytest.raises(ValueError, match="drop is a probability between 0 and 1"):
        TextToImage(drop=p)
