"""The followed order: what its positions are told of the format, in training and in generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mm.generation import Engine, Request
from mm.interfaces import Encoded, Sampling
from mm.jpeg_codes import Bits
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.followed import Followed
from mm.testing import Brackets, Palette, Uncached, predictors, tiny, watch
from mm.tokenizers.jpeg_bytes import JpegBytes


def picture(seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((32, 16), Image.Resampling.BICUBIC)


def files(**settings: str | int | bool) -> JpegBytes:
    options = {"size": (16, 32), "quality": 10, "huffman": "aligned", "strip_header": True, "vocab": 270, **settings}
    tokenizer = JpegBytes(**options)  # type: ignore[arg-type]
    tokenizer.fit(tokenizer.file(picture(n)) for n in range(8))
    return tokenizer


def built(tokenizer: JpegBytes) -> MultimodalModel:
    return tiny(Followed(), tokenizer=tokenizer, context=200)


ASK = Request(prompt=[Segment("text", "a file", loss=False)], items=[("image", ())], text=False)


@pytest.mark.parametrize("settings", [{}, {"huffman": "standard", "quality": 25}, {"strip_header": False}], ids=str)
def test_each_position_is_told_where_the_next_id_stands(settings: dict[str, str | int | bool]) -> None:
    tokenizer, order = files(**settings), Followed()
    order.attach(tokenizer)
    encoded = tokenizer.encode(picture())
    layout = order.layout(encoded, context=False, rng=torch.Generator())
    assert encoded.ids is not None and layout.target.tolist() == list(range(1, len(encoded) + 1)) and layout.enters
    rows, machine = layout.inject["place"], tokenizer.machine()
    assert rows.shape == (len(encoded), order.vectors["place"]) and bool(((rows >= -1) & (rows <= 1)).all())
    state, told = machine.start, set()
    for token, row in zip(encoded.ids.tolist()[:-1], rows, strict=False):
        state, _ = machine.run(tokenizer.bpe.table[token], state)
        assert row.tolist() == torch.tensor(machine.place(state)).tolist()
        if isinstance(state.inner, Bits) and state.mode == "codes":
            # one of six modes, one of 2 rows (the last: all is done) and of 2 columns, one of six blocks, one of 65 coefficients
            parts = [part.nonzero()[:, 0].tolist() for part in row.split([6, 2, 2, 6, 65, 5])[:5]]
            assert parts == [[1], [0], [2 - state.inner.left], [state.inner.block], [state.inner.k]]
            told.add((state.inner.left, state.inner.block))
    assert len(told) > 6, "and not in one block only"
    assert rows[-2].split([6, 80])[0].tolist() == [0, 0, 0, 0, 0, 1], "the end of the file"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("constrained", [True, False])
def test_generation_sees_what_training_sees(guidance: float, constrained: bool) -> None:
    tokenizer = files()
    model = built(tokenizer)
    seen = watch(model)
    request = Request(
        prompt=ASK.prompt,
        items=ASK.items,
        text=False,
        sampling=Sampling(guidance=guidance),
        constrained=constrained,
        known=(tokenizer.prefix(picture(), 1.0).content[:20], torch.ones(20).bool()),
    )
    (row,) = Engine(model).generate([request])
    content = row[-1].content
    assert not constrained or tokenizer.decode(content).valid
    assert content.ids[:20].tolist() == tokenizer.encode(picture()).content[:20].tolist()
    stream = model.build_document([*ASK.prompt, *row], torch.Generator())
    mine = torch.cat([hidden[draw.rows] for hidden, draw, _ in seen["image"]])
    torch.testing.assert_close(mine, predictors(model, stream, "image")[20:][: len(mine)], atol=2e-5, rtol=1e-4)
    assert len(mine) == len(content) - 20
    (again,) = Uncached(built(tokenizer)).generate([request])
    assert again[-1].content.ids.tolist() == content.ids.tolist()


def test_what_is_told_matters() -> None:
    model = built(files())
    stream = model.build_document([*ASK.prompt, Segment("image", picture())], torch.Generator())
    before = predictors(model, stream, "image")
    with torch.no_grad():
        for weight in model.inject["place"].parameters():
            weight.zero_()
    after = predictors(model, stream, "image")
    assert torch.equal(before[0], after[0]), "no element came yet"
    assert not torch.allclose(before[1:], after[1:], atol=0.1)


def test_what_can_not_be_followed_is_refused() -> None:
    with pytest.raises(
        ValueError, match="JpegBytes has no automaton with these settings, which the followed order asks"
    ):
        built(files(grammar="none"))
    with pytest.raises(ValueError, match="the automaton of JpegBytes doesn't say where the next id stands; use raster"):
        built(files(grammar="markers"))
    with pytest.raises(ValueError, match="the automaton of Brackets doesn't say where the next id stands; use raster"):
        tiny(Followed(), tokenizer=Brackets())
    with pytest.raises(ValueError, match="the followed order is for lists of free length; use raster"):
        tiny(Followed(), tokenizer=Palette())


def test_any_ids_can_be_laid_out() -> None:
    """Those that the automaton doesn't allow, too: a prompt may hold a damaged file."""
    tokenizer, order = files(), Followed()
    order.attach(tokenizer)
    ids = torch.randint(0, tokenizer.stop + 1, (100,), generator=torch.Generator().manual_seed(0))
    layout = order.layout(Encoded(grid=(100,), ids=ids), context=True, rng=torch.Generator())
    assert layout.inject["place"].shape == (100, order.vectors["place"])
