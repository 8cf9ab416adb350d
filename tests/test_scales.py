"""The scales order: layout, VAR's mask, cached generation = teacher-forced forward, given scales, guidance, requests, caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mm.attention import visible
from mm.data.cache import TokenCache
from mm.generation import Engine, Event, Request
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Sampling, Spec
from mm.layout import NULL, Segment
from mm.model import MultimodalModel
from mm.multiscale import MultiScaleQuantizer, first_scales
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.orders.scales import Scales, centres
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.plugins import load
from mm.stream import pack
from mm.testing import Palette, Uncached, predictors, tiny, watch
from mm.tokenizers.image_msvq import ImageMSVQ

TEXT = Segment("text", "a red one", loss=False)


class Pyramid(ModalityTokenizer):
    """Random codes at the scales 1, 2, 4, of one map or of several planes; decodes to the last scale's latents."""

    def __init__(self, planes: int = 0, scales: Sequence[int] = (1, 2, 4)) -> None:
        torch.manual_seed(3)
        self.quantizer = MultiScaleQuantizer(scales, planes=planes, codebook_size=8, code_dim=3, residual=0.0).eval()

    @property
    def spec(self) -> Spec:
        grids = self.quantizer.grids
        return Spec(
            kind="discrete", vocab_size=8, max_grid=grids[-1], scales=grids, scale_dim=3, spatial=False, fingerprint="p"
        )

    def encode(self, raw: Tensor) -> Encoded:
        return self.spec.item(self.quantizer(raw[None]).ids[0], self.spec.max_grid)

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.ids is not None
        return Decoded(value=Image.new("RGB", (4, 4), (int(encoded.ids.sum()) % 256, len(encoded), 0)))

    def scale_inputs(self, ids: Tensor, *, own: bool = False) -> Tensor:
        return self.quantizer.scale_inputs(ids[None], own=own)[0]


def model(planes: int = 0, **options: Any) -> MultimodalModel:
    return tiny(Scales(), tokenizer=Pyramid(planes), **options)


def item(planes: int = 0, scales: int = 3, seed: int = 0) -> Encoded:
    spec = Pyramid(planes).spec
    rng = torch.Generator().manual_seed(seed)
    whole = spec.item(torch.randint(8, (spec.count(spec.max_grid),), generator=rng), spec.max_grid)
    return first_scales(whole, scales)


def image(content: Encoded, loss: bool = True) -> Segment:
    return Segment("image", content, loss=loss)


# --- layout -----------------------------------------------------------------------------------------------------------


def test_layout() -> None:
    order = Scales()
    order.attach(Pyramid())
    content = item()
    layout = order.layout(content, context=False, rng=torch.Generator())
    assert layout.order.tolist() == [0] + [1] * 4 + [2] * 16
    assert layout.target.tolist() == layout.element.tolist() == list(range(21))
    assert bool((layout.time == 1).all()) and not layout.copy.any() and not layout.enters
    read = layout.inject["coarser"]
    assert read.shape == (21, 3 + 3) and not read[0, :3].any(), "the first scale reads no more than which one it is"
    assert read[:, 3:].argmax(1).tolist() == layout.order.tolist() and bool((read[:, 3:].sum(1) == 1).all())
    # by hand, without the convolution: what the first scale's code, spread over everything, is at the second
    assert content.ids is not None
    quantizer = order.tokenizer.quantizer  # type: ignore[attr-defined]
    torch.testing.assert_close(read[1:5, :3], quantizer.codebook[content.ids[0]].expand(4, -1))


def test_a_prompt_is_read_with_its_own_elements() -> None:
    order = Scales()
    order.attach(Pyramid())
    content = item()
    layout = order.layout(content, context=True, rng=torch.Generator())
    assert not layout.time.any() and bool((layout.target == -1).all())
    less = order.layout(first_scales(content, 2), context=True, rng=torch.Generator())
    assert len(less.element) == 5
    for name in ("order", "position", "time", "element"):
        assert torch.equal(getattr(less, name), getattr(layout, name)[:5]), "fewer scales are the beginning of all"
    assert torch.equal(less.inject["coarser"], layout.inject["coarser"][:5])
    assert not torch.equal(
        layout.inject["coarser"], order.layout(content, context=False, rng=torch.Generator()).inject["coarser"]
    )


def test_coordinates_are_the_cells_centres_on_the_finest_grid() -> None:
    assert centres((2, 2), (2, 2)).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert centres((1, 1), (8, 8)).tolist() == [[0, 3.5, 3.5]]
    assert centres((2, 2), (8, 8)).tolist() == [[0, 1.5, 1.5], [0, 1.5, 5.5], [0, 5.5, 1.5], [0, 5.5, 5.5]]
    assert centres((2, 1, 1), (2, 4, 4)).tolist() == [[0, 1.5, 1.5], [1, 1.5, 1.5]]
    assert centres((2,), (4,)).tolist() == [[0.5] * 3, [2.5] * 3]


def test_planes_are_told_apart() -> None:
    order = Scales()
    order.attach(Pyramid(planes=3))
    layout = order.layout(item(planes=3), context=False, rng=torch.Generator())
    assert layout.order.tolist() == [0] * 3 + [1] * 12 + [2] * 48
    plane = layout.inject["coarser"][:, 6:]
    assert plane.shape == (63, 3) and plane.argmax(1).tolist() == layout.position[:, 0].long().tolist()
    assert plane[:3].argmax(1).tolist() == [0, 1, 2] and plane[3:15].argmax(1).tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("planes", [0, 2])
def test_the_mask_is_var_s(planes: int) -> None:
    """VAR: a position sees those of its own scale and of the scales before (`attn_bias_for_masking`: level of the query >= that
    of the key)."""
    order = Scales()
    order.attach(Pyramid(planes))
    layout = order.layout(item(planes), context=False, rng=torch.Generator())
    level = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 16]) * max(planes, 1))
    expected = level[:, None] >= level[None, :]
    assert torch.equal(visible(layout.order, layout.copy, layout.order, layout.copy), expected)
    made = model(planes)
    stream = made.build_document([TEXT, image(item(planes))], torch.Generator())
    own = (stream.modality == 1).nonzero()[:, 0]
    assert torch.equal(visible(stream.order, stream.copy, stream.order, stream.copy)[own][:, own], expected)


def test_what_fits_no_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="the scales order is for items of several scales"):
        tiny(Scales(), tokenizer=Palette())
    for other in (Raster(), Masked()):
        with pytest.raises(ValueError, match="makes items of one grid, this tokenizer's have several; use scales"):
            tiny(other, tokenizer=Pyramid())
    made = model()
    with pytest.raises(ValueError, match=r"an item ends with one of the scales .*, got \(3, 3\); give one of them"):
        Engine(made).generate([Request(prompt=[TEXT], items=[("image", (3, 3))])])
    odd = Encoded(grid=(4, 4), scales=((2, 2), (4, 4)), ids=torch.zeros(20, dtype=torch.int64))
    flat = Encoded(grid=(4, 4), ids=torch.zeros(16, dtype=torch.int64))
    for wrong in (odd, flat):
        with pytest.raises(ValueError, match="this scales order lays out ids of the first of the scales"):
            made.build_document([image(wrong)], torch.Generator())
    far = replace(item(), ids=torch.full((21,), 8))
    with pytest.raises(ValueError, match=r"ids span 8\.\.8, but the tokenizer has 0\.\.7"):
        made.build_document([image(far)], torch.Generator())
    with pytest.raises(ValueError, match="another modality has 'coarser', too; give each a name of its own"):
        both(Scales(), Scales())
    both(Scales(), Scales(name="other"))


def both(one: Scales, two: Scales) -> MultimodalModel:
    from mm.backbone import BackboneConfig
    from mm.interfaces import Modality

    lm, text = load("heads", "lm"), load("tokenizers", "text_bytes")
    return MultimodalModel(
        BackboneConfig(width=16, layers=1, heads=2),
        [
            Modality(name="text", tokenizer=text(), head=lm(), order=Raster()),
            Modality(name="image", tokenizer=Pyramid(), head=lm(), order=one),
            Modality(name="shape", tokenizer=Pyramid(planes=3), head=lm(), order=two),
        ],
    )


def test_a_spec_says_what_its_scales_are() -> None:
    spec = Pyramid(planes=2).spec
    assert spec.count((2, 4, 4)) == 42 and spec.count((2, 2, 2)) == 10 and spec.upto((2, 1, 1)) == ((2, 1, 1),)
    assert Palette().spec.upto((3, 2)) == () and Palette().spec.count((3, 2)) == 6
    with pytest.raises(ValueError, match="scales are of ids, with a scale_dim, and end with max_grid"):
        replace(spec, max_grid=(2, 2, 2))
    with pytest.raises(ValueError, match="of which the last must be its grid"):
        Encoded(grid=(1, 1), scales=((1, 1), (2, 2)), ids=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Encoded holds 4 elements, but \(\(1, 1\), \(2, 2\)\) are 5"):
        Encoded(grid=(2, 2), scales=((1, 1), (2, 2)), ids=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="Palette has no scales"):
        Palette().scale_inputs(torch.zeros(1, dtype=torch.int64))


# --- training and generation agree ------------------------------------------------------------------------------------


class Counted(Engine):
    """Counts passes through the backbone."""

    passes = 0

    def _forward(self, *args: Any) -> Tensor:
        self.passes += 1
        return super()._forward(*args)


@pytest.mark.parametrize("planes", [0, 3])
def test_cached_scales_see_the_teacher_forced_forward(planes: int) -> None:
    """Text before and after; one pass a scale; and what the heads get is what the whole document at once would give them."""
    made, spec = model(planes), Pyramid(planes).spec
    seen, engine = watch(made), Counted(made)
    request = Request(prompt=[TEXT], items=[("image", spec.max_grid)], max_tokens=6, sampling=Sampling(top_k=4), seed=1)
    (segments,) = engine.generate([request])
    drawn, written = segments[0].content, segments[1].content
    assert drawn.scales == spec.scales and len(set(drawn.ids.tolist())) > 1
    assert [len(hidden) for hidden, *_ in seen["image"]] == [n * max(planes, 1) for n in (1, 4, 16)], "a pass a scale"
    assert engine.passes == 1 + 3 + len(seen["text"]), "the prompt, the scales, the text"
    stream = made.build_document([TEXT, image(drawn), Segment("text", written)], torch.Generator())
    opening = 1 + len(spec.max_grid)  # which is certain, and not asked for
    for name, skipped in (("image", 0), ("text", opening)):
        hidden = torch.cat([h for h, *_ in seen[name]])
        expected = predictors(made, stream, name)[skipped : skipped + len(hidden)]
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


def test_packed_documents_see_nothing_of_each_other() -> None:
    made = model()
    documents = [[TEXT, image(item(seed=n)), Segment("text", "b")] for n in range(2)] + [
        [image(item(seed=5), loss=False), Segment("text", "an apple")]
    ]
    streams = [made.build_document(d, torch.Generator()).validate() for d in documents]
    with torch.no_grad():
        together = made(pack(streams)).split([len(s) for s in streams])
        for one, alone in zip(together, streams, strict=True):
            torch.testing.assert_close(one, made(alone), rtol=1e-4, atol=1e-5)


def test_it_learns_from_both_directions() -> None:
    """Every element of a picture is predicted, once, from positions that don't hold it; of a prompt none is."""
    made = model()
    stream = made.build_document([TEXT, image(item())], torch.Generator())
    own = stream.modality == 1
    assert torch.equal(stream.target[own], own.nonzero()[:, 0]) and bool((stream.weight[own] == 1).all())
    report = made.loss(
        pack([stream, made.build_document([image(item(), loss=False), Segment("text", "x")], torch.Generator())])
    )
    assert report.count["image"] == 21
    report.total.backward()
    for part in (made.inject["coarser"], made.mask, made.embedding):
        assert any(bool(p.grad.any()) for p in part.parameters() if p.grad is not None)


def test_a_position_does_not_see_its_own_scale_s_elements() -> None:
    made, content = model(), item()
    assert content.ids is not None
    for first, last, scale in ((0, 1, 0), (1, 5, 1), (5, 21, 2)):
        other = content.ids.clone()
        other[first:last] = (other[first:last] + 1) % 8
        streams = [
            made.build_document([TEXT, image(replace(content, ids=ids))], torch.Generator())
            for ids in (content.ids, other)
        ]
        one, two = (predictors(made, stream, "image") for stream in streams)
        assert torch.equal(one[:last], two[:last]), f"scale {scale} sees those before it only"
        assert last == 21 or not torch.allclose(one[last:], two[last:])


# --- requests ---------------------------------------------------------------------------------------------------------

RAMP = Sampling(guidance=3.0, guidance_schedule="ramp", top_k=5, top_p=0.9)


def requests() -> list[Request]:
    known = (item(seed=2).ids, torch.arange(21) < 5)
    assert known[0] is not None
    return [
        Request(prompt=[TEXT], items=[("image", (4, 4))], max_tokens=4, sampling=RAMP, seed=1),
        Request(prompt=[Segment("text", "only text")], max_tokens=7, seed=2),
        Request(prompt=[TEXT], items=[("image", (4, 4))], text=False, known=known, seed=3),  # type: ignore[arg-type]
        Request(
            prompt=[image(item(scales=2)), TEXT], items=[("image", (2, 2)), ("image", (4, 4))], max_tokens=3, seed=4
        ),
        Request(prompt=[Segment(NULL)], items=[("image", (4, 4))], text=False, sampling=RAMP, seed=5),
    ]


def contents(segments: Sequence[Segment]) -> list[tuple[str, tuple[int, ...], list[int]]]:
    return [(s.modality, s.content.grid, s.content.content.tolist()) for s in segments]


def test_rows_in_different_modes_are_as_alone_and_without_a_cache() -> None:
    made = model()
    together = Engine(made).generate(requests())
    assert [contents(s) for s in together] == [contents(Engine(made).generate([one])[0]) for one in requests()]
    assert [contents(s) for s in together] == [contents(s) for s in Uncached(made).generate(requests())]
    assert [s.content.grid for s in together[3][:2]] == [(2, 2), (4, 4)], "as fine as it is asked for"


def test_guidance_grows_over_the_scales_as_in_var() -> None:
    made = model()
    seen = watch(made)
    Engine(made).generate([replace(requests()[0], text=False)])
    cfg, last = RAMP.guidance - 1, 2
    for scale, (_, draw, _) in enumerate(seen["image"]):
        assert draw.scale == pytest.approx(1 + cfg * scale / last)  # (1 + t) c − t u with t = cfg · scale / last
    assert [draw.is_guided for _, draw, _ in seen["image"]] == [False, True, True]


@pytest.mark.parametrize("kept", ["scales", "places", "last", "all"])
def test_given_elements_are_kept_anywhere(kept: str) -> None:
    made, ids = model(), item(seed=7).ids
    assert ids is not None
    places = torch.arange(21)
    given = {"scales": places < 5, "places": places % 3 == 0, "last": places >= 5, "all": places >= 0}[kept]
    request = Request(prompt=[TEXT], items=[("image", (4, 4))], max_tokens=3, known=(ids, given), seed=2)
    seen, engine = watch(made), Counted(made)
    (segments,) = engine.generate([request])
    made_ids = segments[0].content.ids
    assert torch.equal(made_ids[given], ids[given])
    assert len(seen["image"]) == {"scales": 1, "places": 2, "last": 2, "all": 0}[kept], "what is given isn't asked for"
    assert contents(segments) == contents(Uncached(made).generate([request])[0])
    stream = made.build_document([TEXT, segments[0], Segment("text", segments[1].content)], torch.Generator())
    hidden = torch.cat([h for h, *_ in seen["text"]])[:1]
    torch.testing.assert_close(hidden[0], predictors(made, stream, "text")[3], rtol=1e-4, atol=1e-5)


def test_given_elements_of_another_number_are_refused() -> None:
    request = Request(prompt=[TEXT], items=[("image", (2, 2))], known=(torch.zeros(21).long(), torch.ones(21).bool()))
    with pytest.raises(ValueError, match="given elements cover 21 and 21 places, but the 2 scales have 5"):
        Engine(model()).generate([request])


def test_a_caption_from_the_first_scales() -> None:
    """What is told of the prompt's extent is that of its last scale, and the text sees no other."""
    made = model()
    for number, side in ((1, 1), (2, 2), (3, 4)):
        prompt = [image(item(scales=number), loss=False)]
        stream = made.build_document(prompt, torch.Generator(), close=False)
        assert int((stream.modality == 1).sum()) == (1, 5, 21)[number - 1]
        assert stream.ids[2:4].tolist() == [made.vocabulary.extent(side)] * 2
        (segments,) = Engine(made).generate([Request(prompt=prompt, max_tokens=5, seed=3)])
        assert contents(segments) == contents(
            Uncached(made).generate([Request(prompt=prompt, max_tokens=5, seed=3)])[0]
        )


def test_the_model_opens_items_of_all_scales() -> None:
    made, found = model(context=400), []
    for seed in range(4):
        request = Request(prompt=[TEXT], free=True, max_tokens=300, seed=seed, sampling=Sampling(temperature=8.0))
        (segments,) = Engine(made).generate([request])
        found += [s for s in segments if s.modality == "image"]
    assert found and all(len(s.content) == 21 and s.content.grid == (4, 4) for s in found)
    small = Request(prompt=[TEXT], free=True, max_tokens=20, seed=0, sampling=Sampling(temperature=8.0))
    assert all(s.modality == "text" for s in Engine(made).generate([small])[0]), "there is no room for 21 elements"


def test_events_and_previews_grow_finer() -> None:
    made = model()
    events: list[Event] = []
    Engine(made).generate([replace(requests()[0], text=False)], on_step=events.append)
    assert [(len(e.content), e.final) for e in events] == [(1, 1), (5, 5), (21, 21)]
    pipeline = TextToImagePipeline(made)
    assert [pipeline.preview(e.content).getpixel((0, 0)) for e in events] == [
        (int(e.content.sum()) % 256, len(e.content), 0) for e in events
    ]
    tokens = pipeline("red", num_images=2, seed=0).tokens
    assert all(one.scales == Pyramid().spec.scales for one in tokens)


def test_token_caches_hold_items_of_several_scales(tmp_path: Path) -> None:
    spec, items = Pyramid().spec, [item(), item(scales=2, seed=1), item(scales=1, seed=2)]
    content = torch.cat([one.content for one in items])
    grids = torch.tensor([one.grid for one in items])
    cache = TokenCache(spec, content, torch.tensor([0, 21, 26, 27]), grids)
    for number, one in enumerate(items):
        again = cache[number]
        assert again.grid == one.grid and again.scales == one.scales and torch.equal(again.content, one.content)
    with pytest.raises(ValueError, match="the grids and the offsets of its items don't agree"):
        TokenCache(spec, content, torch.tensor([0, 16, 26, 27]), grids)


def test_a_saved_model_draws_the_same(tmp_path: Path) -> None:
    made = TextToImagePipeline(tiny(Scales(name="finer"), tokenizer=ImageMSVQ.tiny()))
    made.save_pretrained(tmp_path / "model")
    again = TextToImagePipeline.from_pretrained(str(tmp_path / "model"))
    one, two = (p("red", seed=0, guidance=3.0, guidance_schedule="ramp").tokens[0] for p in (made, again))
    assert torch.equal(one.content, two.content) and one.scales == two.scales and len(one) == 21
    with pytest.raises(ValueError, match="stand for whole pictures, not for places in them"):
        made("red", image=Image.new("RGB", (16, 16)), mask=Image.new("L", (16, 16), 255))
