"""Vectors as tokens: laid out, learned, generated in both orders, mixed with text, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.generation import Engine, Request
from mm.heads.diffusion import DiffusionHead
from mm.heads.gaussian import GaussianHead
from mm.heads.regression import RegressionHead
from mm.hub import load_pretrained, save_pretrained
from mm.interfaces import Draw, Encoded, Order, Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.stream import pack, unpack
from mm.testing import Uncached, tiny
from mm.tokenizers.image_patches import ImagePatches

DIM = 12
ORDERS = {"raster": Raster, "masked": lambda: Masked(steps=4, choice="random", schedule="normal", least=0.7)}


def model(order: str = "raster", seed: int = 0) -> MultimodalModel:
    head = DiffusionHead(width=16, blocks=2, sampler={"steps": 4})
    return tiny(ORDERS[order](), seed=seed, tokenizer=ImagePatches(size=8, patch=2), head=head, qk_norm=True)


def picture(*grid: int, seed: int = 0) -> Encoded:
    count = grid[0] * grid[1]
    return Encoded(grid=grid, latents=torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)))


def text(words: str) -> Segment:
    return Segment("text", words, loss=False)


def mixed(guidance: float) -> list[Request]:
    """Row 1 writes text while row 2 is inside a picture; one reads a picture first, one draws two; one is short."""
    guided = Sampling(guidance=guidance, guidance_interval=(0.0, 0.9))
    return [
        Request(prompt=[text("tell")], max_tokens=9, seed=1),
        Request(prompt=[text("a cat")], items=[("image", (3, 4))], text=False, sampling=guided, seed=2),
        Request(prompt=[Segment("image", picture(2, 2)), text("?")], max_tokens=5, seed=3),
        Request(prompt=[text("two")], items=[("image", (2, 2)), ("image", (1, 3))], sampling=guided, max_tokens=4, seed=4),
        Request(prompt=[text("x")], items=[("image", (1, 1))], text=False, sampling=guided, seed=5),
        Request(prompt=[text("go on")], free=True, max_tokens=30, seed=6),
    ]  # fmt: skip


def same(a: list[list[Segment]], b: list[list[Segment]]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert [(s.modality, s.content.grid) for s in one] == [(s.modality, s.content.grid) for s in other]
        for left, right in zip(one, other, strict=True):
            assert torch.allclose(left.content.content.float(), right.content.content.float(), atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("order", ORDERS)
def test_cached_is_uncached_and_batched_is_one_by_one(order: str, guidance: float) -> None:
    made = Engine(model(order)).generate(mixed(guidance))
    same(made, Uncached(model(order)).generate(mixed(guidance)))
    same(made, [Engine(model(order)).generate([request])[0] for request in mixed(guidance)])
    pictures = [s for row in made for s in row if s.modality == "image"]
    assert len(pictures) >= 4 and all(s.content.latents.shape[1] == DIM for s in pictures)


def test_generation_sees_what_training_sees() -> None:
    """Raster: the hidden state that each vector is drawn from is that of the teacher-forced forward."""
    one = model()
    seen: list[Tensor] = []
    sample = DiffusionHead.sample

    def watched(self: DiffusionHead, hidden: Tensor, draws: list[Draw]) -> Any:
        seen.extend(hidden[draw.rows] for draw in draws)
        return sample(self, hidden, draws)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionHead, "sample", watched)
        request = Request(prompt=[text("a cat")], items=[("image", (2, 3))], text=False)
        ((made,),) = Engine(one).generate([request])
    stream = one.build_document([text("a cat"), Segment("image", made.content)], torch.Generator())
    with torch.no_grad():
        hidden = one(stream)
    where = (stream.modality[stream.target] == 1) & (stream.target >= 0)
    assert torch.allclose(torch.cat(seen), hidden[where], atol=1e-5)
    assert torch.equal(stream.latents["image"].values, made.content.latents)


def test_the_masked_order_draws_each_vector_once_and_keeps_what_is_given() -> None:
    one, counts = model("masked"), []
    sample = DiffusionHead.sample

    def watched(self: DiffusionHead, hidden: Tensor, draws: list[Draw]) -> Any:
        counts.extend(draw.rows.stop - draw.rows.start for draw in draws)
        return sample(self, hidden, draws)

    given = torch.tensor([True, False, False, True] * 4)
    known = (picture(4, 4).content, given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionHead, "sample", watched)
        request = Request(prompt=[text("a")], items=[("image", (4, 4))], text=False, known=known)
        ((made,),) = Engine(one).generate([request])
    assert len(counts) == 4 and sum(counts) == 8 and counts == sorted(counts)
    assert torch.equal(made.content.latents[given], known[0][given])
    assert not torch.allclose(made.content.latents[~given], known[0][~given])


def test_hidden_vectors_do_not_reach_what_predicts_them() -> None:
    one = model("masked")
    order = one.modalities[1].order
    stream = one.build_document([text("a"), Segment("image", picture(2, 3))], torch.Generator().manual_seed(1))
    values = stream.latents["image"].values.requires_grad_()
    hidden = one(stream)
    asked = stream.target >= 0
    asked &= stream.modality[stream.target.clamp(min=0)] == 1
    (gradient,) = torch.autograd.grad(hidden[asked].sum(), values)
    masked = stream.time[stream.latents["image"].index] == 1
    assert bool(masked.any()) and bool((gradient[masked] == 0).all())
    assert isinstance(order, Order) and bool((gradient[~masked].abs().sum(1) > 0).all())


@pytest.mark.parametrize(
    ("schedule", "least", "mean"), [("normal", 0.7, 0.867), ("uniform", 0.7, 0.85), ("uniform", 0.0, 0.5)]
)
def test_shares_that_are_hidden(schedule: Any, least: float, mean: float) -> None:
    """MAR: normal around 1, deviation 0.25, cut at 0.7; MMAR: even from 0.7 or 0. The means are those of the distributions."""
    order = Masked(schedule=schedule, least=least)
    rates = torch.tensor([order._rate(float(u)) for u in torch.linspace(0, 1, 2001)], dtype=torch.float64)
    assert float(rates.min()) >= least and float(rates.max()) <= 1
    assert float(rates.mean()) == pytest.approx(mean, abs=0.005)


@pytest.mark.parametrize("order", ORDERS)
def test_it_learns(order: str) -> None:
    one = model(order).train()
    rng = torch.Generator().manual_seed(0)
    documents = [[text(f"picture {n}"), Segment("image", picture(2, 2, seed=n))] for n in range(4)]
    optimizer = torch.optim.AdamW(one.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        batch = pack([one.build_document(d, rng) for d in documents])
        report = one.loss(batch)
        optimizer.zero_grad()
        report.total.backward()
        optimizer.step()
        losses.append(float(report.raw["image"]))
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])
    unused = [n for n, p in one.named_parameters() if p.grad is None and not n.startswith(("mask", "heads.text"))]
    assert not unused


def test_packing_keeps_vectors_with_their_documents() -> None:
    one = model()
    rng = torch.Generator().manual_seed(0)
    streams = [one.build_document([text(f"{n}"), Segment("image", picture(2, n + 1, seed=n))], rng) for n in range(3)]
    for before, after in zip(streams, unpack(pack(streams)), strict=True):
        assert torch.equal(before.latents["image"].values, after.latents["image"].values)
        assert torch.equal(before.latents["image"].index, after.latents["image"].index)
    packed = pack(streams).validate()
    with torch.no_grad():
        alone = torch.cat([one(stream) for stream in streams])
        assert torch.allclose(one(packed), alone, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_saved_and_loaded(order: str, tmp_path: Path) -> None:
    one = model(order, seed=3)
    save_pretrained(one, tmp_path / "model")
    other = load_pretrained(tmp_path / "model")
    head = other.head("image")
    assert isinstance(head, DiffusionHead) and head.sampler.steps == 4 and head.process == one.head("image").process
    request = Request(prompt=[text("a")], items=[("image", (2, 2))], text=False, seed=5)
    same(Engine(one).generate([request]), Engine(other).generate([request]))


def test_vectors_that_cannot_be_used_are_refused() -> None:
    one, rng = model(), torch.Generator()
    broken = picture(2, 2)
    broken.content[1, 2] = float("nan")
    with pytest.raises(ValueError, match="not numbers"):
        one.build_document([Segment("image", broken)], rng)
    with pytest.raises(ValueError, match=r"shape \(4, 5\) .* expected 12 numbers"):
        one.build_document([Segment("image", Encoded(grid=(2, 2), latents=torch.zeros(4, 5)))], rng)
    with pytest.raises(ValueError, match="expected 12 numbers"):
        one.build_document([Segment("image", Encoded(grid=(2, 2), ids=torch.zeros(4, dtype=torch.long)))], rng)
    known = (torch.zeros(4, 5), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="finite vectors of width 12"):
        Engine(one).generate([Request(prompt=[text("a")], items=[("image", (2, 2))], text=False, known=known)])


def test_confidence_needs_a_density() -> None:
    head = DiffusionHead(width=16, blocks=1, sampler={"steps": 2})
    one = tiny(Masked(steps=2), tokenizer=ImagePatches(size=8, patch=2), head=head)
    with pytest.raises(ValueError, match="set choice: random"):
        Engine(one).generate([Request(prompt=[text("a")], items=[("image", (2, 2))], text=False)])


def first_vector(model: MultimodalModel, given: list[Segment]) -> Tensor:
    """What the head makes of the state in which a document stands before the first element of a picture of 1×1."""
    vocabulary = model.vocabulary
    opened = vocabulary.opening("image", (1, 1))
    whole = model.build_document(
        [*given, Segment("image", picture(1, 1), loss=False)], torch.Generator().manual_seed(0)
    )
    ids = whole.ids.tolist()
    before = max(i for i in range(len(ids)) if ids[i : i + 3] == opened) + 2
    return model.head("image").net(model(whole)[before])  # type: ignore[operator]


@torch.inference_mode()
def test_text_and_pictures_of_the_context_have_guidance_of_their_own() -> None:
    """u + k·(i − u) + s·(c − i), each from a document of its own."""
    net = tiny(Raster(), seed=3, tokenizer=ImagePatches(size=8, patch=2), head=RegressionHead(), qk_norm=True).eval()
    shown = Segment("image", picture(2, 1, seed=4), loss=False)
    prompt, null = [text("as"), shown, text("but red")], Segment("null", None, loss=False)
    given, items, free = (first_vector(net, segments) for segments in (prompt, [null, shown], [null]))

    def made(**scales: Any) -> Tensor:
        request = Request(prompt=prompt, items=[("image", (1, 1))], text=False, sampling=Sampling(**scales))
        ((segment,),) = Engine(net).generate([request])
        return segment.content.content[0]

    assert float((given - items).abs().max()) > 1e-2 and float((items - free).abs().max()) > 1e-2
    for guidance, context in ((3.0, 2.0), (1.0, 2.5), (4.0, 1.0), (2.0, 0.0), (2.0, 2.0)):
        wanted = free + context * (items - free) + guidance * (given - items)
        assert torch.allclose(made(guidance=guidance, context_guidance=context), wanted, atol=1e-4), (guidance, context)
    assert torch.allclose(made(guidance=2.0), free + 2.0 * (given - free), atol=1e-4)
    assert torch.equal(made(guidance=1.0, context_guidance=1.0), made())


def test_both_guidances_reach_the_diffusion_head() -> None:
    """With equal scales the three branches say what two do; rows of a batch may differ in how many they have."""
    net = model()
    prompt = [text("as"), Segment("image", picture(2, 2), loss=False), text("but red")]

    def asked(seed: int, **scales: Any) -> Request:
        return Request(prompt=prompt, items=[("image", (2, 1))], text=False, sampling=Sampling(**scales), seed=seed)

    kinds = [dict(guidance=3.0), dict(guidance=3.0, context_guidance=1.5), dict(), dict(context_guidance=2.0)]
    requests = [asked(n, **scales) for n, scales in enumerate(kinds)]
    together = Engine(net).generate(requests)
    same(together, [Engine(net).generate([request])[0] for request in requests])
    near = Engine(net).generate([asked(0, guidance=3.0, context_guidance=3.0 + 1e-7)])
    assert torch.allclose(near[0][0].content.content, together[0][0].content.content, atol=1e-4)
    assert not torch.allclose(
        together[1][0].content.content, Engine(net).generate([asked(1)])[0][0].content.content, atol=1e-3
    )


@pytest.mark.parametrize("head", [DiffusionHead(width=16, blocks=1), RegressionHead(), GaussianHead()])
def test_converted_models_learn_and_draw(head: Any) -> None:
    """All of a model in bfloat16: vectors come out in float32, and the loss is a number."""
    net = tiny(Raster(), tokenizer=ImagePatches(size=8, patch=2), head=head, qk_norm=True).to(torch.bfloat16)
    guided = Sampling(guidance=2.0)
    ((made,),) = Engine(net).generate(
        [Request(prompt=[text("a")], items=[("image", (2, 2))], text=False, sampling=guided)]
    )
    assert made.content.content.dtype == torch.float32 and bool(made.content.content.isfinite().all())
    document = net.build_document([text("a"), Segment("image", picture(2, 2))], torch.Generator().manual_seed(0))
    loss = net.loss(document).total
    loss.backward()
    assert bool(loss.isfinite())
