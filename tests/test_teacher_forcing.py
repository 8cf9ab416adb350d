"""Training and generation agree: step-by-step cached generation sees the logits of the teacher-forced forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from jaxtyping import Bool
from torch import Tensor

from mm.backbone import BackboneConfig
from mm.generation import Engine, Request
from mm.heads.lm import LMHead
from mm.interfaces import Draw, Encoded, Layout, Modality, Proposal, Sampling, Session
from mm.layout import NULL, Segment
from mm.model import MultimodalModel
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.stream import TokenStream
from mm.testing import Palette, tiny
from mm.tokenizers.text_bytes import TextBytes

GRID = (3, 2)
START: dict[str, Any] = {
    "prompt": [Segment("text", "draw it", loss=False)],
    "items": [("image", GRID)],
    "max_tokens": 5,
}


class Recording(LMHead):
    """Remembers the logits it draws from: (conditional, unconditional or None) a call."""

    seen: list[tuple[Tensor, Tensor | None]]

    def sample(self, hidden: Tensor, draws: Sequence[Draw]) -> list[tuple[Tensor, Tensor | None]]:
        logits = self.logits(hidden)
        for draw in draws:
            self.seen.append((logits[draw.rows], None if draw.unconditional is None else logits[draw.unconditional]))
        return super().sample(hidden, draws)


def record(model: MultimodalModel) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
    for head in model.heads.values():
        head.__class__ = Recording
        head.seen = []
    return {name: head.seen for name, head in model.heads.items()}


class Watched(Masked):
    """Remembers what its session proposes."""

    def session(self, *args: Any, **kwargs: Any) -> Session:
        session = super().session(*args, **kwargs)
        self.proposals: list[Proposal] = []
        propose = session.propose

        def watched() -> Proposal | None:
            proposal = propose()
            self.proposals += [] if proposal is None else [proposal]
            return proposal

        session.propose = watched  # type: ignore[method-assign]
        return session


class Frozen(Masked):
    """The masked order with what is hidden given, not drawn."""

    def __init__(self, like: Masked, hidden: Bool[Tensor, " N"]) -> None:
        super().__init__(rate_condition=like.rate_condition, micro=like.micro)
        self.given = hidden

    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        return self._positions(encoded.grid, self.given, self.micro)


def forced(model: MultimodalModel, *segments: Segment) -> TokenStream:
    return model.build_document(segments, torch.Generator()).validate()


@torch.no_grad()
def predictions(model: MultimodalModel, tokens: TokenStream, name: str) -> Tensor:
    """Teacher-forced logits of every prediction of this modality, in the order of what is predicted."""
    owner = model.vocabulary.index[name]
    places = [p for p, t in enumerate(tokens.target.tolist()) if t >= 0 and int(tokens.modality[t]) == owner]
    return model.logits(tokens, name)[sorted(places, key=lambda p: int(tokens.target[p]))]


def close(mine: list[Tensor], reference: Tensor) -> None:
    torch.testing.assert_close(torch.cat(mine), reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "adaln": True}])
def test_raster(guidance: float, options: dict[str, bool]) -> None:
    model = tiny(**options)
    seen = record(model)
    (made,) = Engine(model).generate([Request(**START, sampling=Sampling(guidance=guidance), seed=3)])
    picture, text = made
    assert picture.content.grid == GRID and 0 < len(text.content) <= 5
    document = forced(model, *START["prompt"], picture, text)
    close([conditional for conditional, _ in seen["image"]], predictions(model, document, "image"))
    # the text that follows; the controls before it were certain and never asked for
    wanted = predictions(model, document, "text")[4:]
    close([conditional for conditional, _ in seen["text"]], wanted[: len(seen["text"])])
    assert len(wanted) >= len(seen["text"]) >= len(text.content)
    twins = [free for _, free in seen["image"] if free is not None]
    assert len(twins) == (6 if guidance != 1.0 else 0)
    if twins:
        close(twins, predictions(model, forced(model, Segment(NULL), picture), "image"))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("conditions", [{}, {"rate_condition": True, "micro": (0.5, 2.0)}], ids=["plain", "conditions"])
def test_masked(conditions: dict, guidance: float) -> None:
    order = Watched(steps=4, **conditions)
    model = tiny(order)
    seen = record(model)
    (made,) = Engine(model).generate([Request(**START, sampling=Sampling(guidance=guidance), seed=5)])
    picture, text = made
    assert len(order.proposals) == 4 == len(seen["image"])
    for proposal, (conditional, free) in zip(order.proposals, seen["image"], strict=True):
        assert proposal.layout is not None and proposal.content is not None
        hidden = proposal.layout.time == 1
        assert len(conditional) == int(hidden.sum())
        assert torch.equal(proposal.content[~hidden], picture.content.ids[~hidden])
        model.modalities[1].order = Frozen(order, hidden)
        given = Segment("image", Encoded(grid=GRID, ids=proposal.content))
        close([conditional], predictions(model, forced(model, *START["prompt"], given), "image"))
        if guidance != 1.0:
            assert free is not None
            close([free], predictions(model, forced(model, Segment(NULL), given), "image"))
    model.modalities[1].order = order
    # afterwards the picture stands in the cache, clean, and the text that follows sees it so
    document = forced(model, *START["prompt"], Segment("image", picture.content, loss=False), text)
    wanted = predictions(model, document, "text")
    close([conditional for conditional, _ in seen["text"]], wanted[: len(seen["text"])])
    assert len(seen["text"]) >= len(text.content) > 0


def test_two_pictures_and_inpainting_in_the_second_place() -> None:
    """Each guided item has a twin of its own; given elements are read from the first step on."""
    model = tiny()
    seen = record(model)
    content, given = torch.tensor([1, 2, 3, 0, 0, 0]), torch.tensor([True] * 3 + [False] * 3)
    request = Request(
        prompt=START["prompt"],
        items=[("image", GRID), ("image", (2, 2))],
        text=False,
        sampling=Sampling(guidance=2.0),
        known=(content, given),
    )
    (made,) = Engine(model).generate([request])
    first, second = made
    assert first.content.ids[:3].tolist() == [1, 2, 3] and second.content.grid == (2, 2)
    wanted = predictions(model, forced(model, *START["prompt"], first, second), "image")
    close([conditional for conditional, _ in seen["image"]], wanted[3:])
    twins = [free for _, free in seen["image"] if free is not None]
    close(twins[:3], predictions(model, forced(model, Segment(NULL), first), "image")[3:])
    close(twins[3:], predictions(model, forced(model, Segment(NULL), second), "image"))


def test_prefix_lm_prompts_are_read_both_ways() -> None:
    torch.manual_seed(0)
    text = Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster(prefix=True))
    image = Modality(name="image", tokenizer=Palette(), head=LMHead(), order=Raster())
    model = MultimodalModel(BackboneConfig(width=32, layers=3, heads=4, kv_heads=2), [text, image]).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    seen = record(model)
    (made,) = Engine(model).generate([Request(**START, seed=1)])
    document = forced(model, *START["prompt"], *made)
    assert document.order[1:8].tolist() == [1] * 7
    close([conditional for conditional, _ in seen["image"]], predictions(model, document, "image"))
    model.modalities[0].order = Raster()  # not vacuous: a causal reading of the prompt gives other logits
    causal = predictions(model, forced(model, *START["prompt"], *made), "image")
    assert (causal - predictions(model, document, "image")).abs().max() > 1e-2
