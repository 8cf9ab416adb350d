"""The blocks order and the backbone as denoiser: who sees whom, what is learned, cached generation, refusals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.generation import Engine, Request
from mm.heads.regression import RegressionHead
from mm.hub import load_pretrained, save_pretrained
from mm.interfaces import Encoded, Layout, Proposal, Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.blocks import TIME, Blocks
from mm.stream import Placed, TokenStream, pack
from mm.testing import Frames, Palette, Uncached, rule, tiny
from mm.tokenizers.image_patches import ImagePatches

DIM, STEPS = 12, 3


def order(block: int = 2, **settings: Any) -> Blocks:
    return Blocks(block, **{"sampler": {"steps": STEPS}, **settings})


def model(block: int = 2, *, adaln: bool = False, **settings: Any) -> MultimodalModel:
    tokenizer = ImagePatches(size=16, patch=2)
    made = tiny(
        order(block, time_condition=not adaln, **settings), tokenizer=tokenizer, head=RegressionHead(), qk_norm=True, adaln=adaln
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():  # AdaLN and conditions start at zero, biases too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def picture(*grid: int, seed: int = 0) -> Encoded:
    rng = torch.Generator().manual_seed(seed)
    return Encoded(grid=grid, latents=torch.randn(grid[0] * grid[1], DIM, generator=rng))


def text(words: str) -> Segment:
    return Segment("text", words, loss=False)


def trained_on(one: MultimodalModel, *grid: int, seed: int = 0) -> TokenStream:
    """Text and a picture as training sees them."""
    return one.build_document([text("ab"), Segment("image", picture(*grid))], torch.Generator().manual_seed(seed))


def parts(one: MultimodalModel, stream: TokenStream) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the clean copy, those of the noisy one, and the block of each element."""
    index = stream.latents["image"].index
    count = len(index) // 2
    block = stream.order[index[:count]] - stream.order[index[0]]
    return index[:count], index[count:], block


def test_layout_by_hand() -> None:
    made = order(2, shift=False).layout(picture(1, 5), context=False, rng=torch.Generator().manual_seed(0))
    assert made.element.tolist() == [0, 1, 2, 3, 4] * 2
    assert made.order.tolist() == [0, 0, 1, 1, 2] * 2
    assert made.copy.tolist() == [0] * 5 + [1] * 5
    assert made.target.tolist() == [-1] * 5 + [5, 6, 7, 8, 9]
    assert made.time[:5].tolist() == [0.0] * 5 and bool((made.time[5:] > 0).all())
    assert made.time[5] == made.time[6] and made.time[7] == made.time[8] and made.time[5] != made.time[7]
    assert torch.equal(made.position[:5], made.position[5:]) and torch.equal(made.inject[TIME][:, 0], made.time)
    given = order(2).layout(picture(1, 5), context=True, rng=torch.Generator())
    assert given.copy.tolist() == [0] * 5 and given.target.tolist() == [-1] * 5 and not bool(given.time.any())


def test_blocks_begin_anywhere_in_training() -> None:
    rng = torch.Generator().manual_seed(0)
    seen = {tuple(order(3).layout(picture(1, 5), context=False, rng=rng).order[:5].tolist()) for _ in range(50)}
    assert seen == {(0, 0, 0, 1, 1), (0, 0, 1, 1, 1), (0, 1, 1, 1, 2)}
    whole = order(0).layout(picture(1, 5), context=False, rng=rng)
    assert whole.order.tolist() == [0] * 10 and len(set(whole.time[5:].tolist())) == 1


@pytest.mark.parametrize("adaln", [False, True])
def test_a_noisy_block_sees_what_is_before_it_and_itself_only(adaln: bool) -> None:
    one = model(adaln=adaln)
    stream = trained_on(one, 2, 3)
    clean, noisy, block = parts(one, stream)
    values = stream.latents["image"].values.clone().requires_grad_()
    stream = replace(stream, latents={"image": Placed(values=values, index=stream.latents["image"].index)})
    hidden = one(stream, noise={"image": torch.randn_like(values)})
    count = len(clean)
    for number in range(int(block.max()) + 1):
        (gradient,) = torch.autograd.grad(hidden[noisy[block == number]].sum(), values, retain_graph=True)
        size = gradient.abs().sum(1)
        of_clean, of_noisy = size[:count], size[count:]
        assert bool((of_clean[block >= number] == 0).all()), (
            "a noisy block must not see its own clean copy, or later ones"
        )
        assert bool((of_noisy[block != number] == 0).all()), "nobody sees other noisy blocks"
        assert bool((of_clean[block < number] > 0).all()) and bool((of_noisy[block == number] > 0).all())
    seen = rule(stream)
    after = int(max(noisy)) + 1
    assert not bool(seen[after:, noisy].any()) and bool(seen[after:, clean].all())


def test_text_before_a_picture_is_as_without_it() -> None:
    one = model()
    words = [Segment("text", "a few words")]
    alone = one.build_document(words, torch.Generator(), close=False)
    both = one.build_document([*words, Segment("image", picture(2, 2))], torch.Generator())
    with torch.no_grad():
        assert torch.allclose(one(both, noise=one.draw_noise(both))[: len(alone)], one(alone), atol=1e-5)


def test_the_loss_is_that_of_the_process() -> None:
    one = model()
    stream = trained_on(one, 2, 3)
    clean, noisy, _ = parts(one, stream)
    torch.manual_seed(5)
    report = one.loss(stream)
    torch.manual_seed(5)
    noise = one.draw_noise(stream)["image"]
    values, t = stream.latents["image"].values, stream.time[stream.latents["image"].index]
    mixed = torch.where(t[:, None] > 0, (1 - t[:, None]) * values + t[:, None] * noise, values)
    given = replace(stream, latents={"image": Placed(values=mixed, index=stream.latents["image"].index)})
    with torch.no_grad():
        made = one.head("image").net(one(given)[noisy])
    wanted = (made - (noise - values)[len(clean) :]).square().mean()
    assert torch.allclose(report.raw["image"], wanted, atol=1e-5)


# --- generation -----------------------------------------------------------------------------------------------------


def mixed(guidance: float) -> list[Request]:
    guided = Sampling(guidance=guidance)
    return [
        Request(prompt=[text("tell")], max_tokens=9, seed=1),
        Request(prompt=[text("a cat")], items=[("image", (3, 3))], text=False, sampling=guided, seed=2),
        Request(prompt=[Segment("image", picture(2, 2)), text("?")], max_tokens=5, seed=3),
        Request(prompt=[text("two")], items=[("image", (2, 2)), ("image", (1, 3))], sampling=guided, max_tokens=4, seed=4),
    ]  # fmt: skip


def same(a: list[list[Segment]], b: list[list[Segment]]) -> None:
    for one, other in zip(a, b, strict=True):
        for left, right in zip(one, other, strict=True):
            assert left.modality == right.modality and left.content.grid == right.content.grid
            assert torch.allclose(left.content.content.float(), right.content.content.float(), atol=1e-4)


@pytest.mark.parametrize("adaln", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_cached_is_uncached_and_batched_is_one_by_one(block: int, guidance: float, adaln: bool) -> None:
    one = model(block, adaln=adaln)
    made = Engine(one).generate(mixed(guidance))
    same(made, Uncached(one).generate(mixed(guidance)))
    same(made, [Engine(one).generate([request])[0] for request in mixed(guidance)])


class Watched:
    """Within it, what sessions propose and what the head answers is written down."""

    def __enter__(self) -> Watched:
        self.seen: list[Tensor] = []
        self.asked: list[Proposal] = []
        self.patch = pytest.MonkeyPatch()
        sample, session = RegressionHead.sample, Blocks.session

        def sampling(head: RegressionHead, hidden: Tensor, draws: Any) -> Any:
            out = sample(head, hidden, draws)
            self.seen.extend(vectors for vectors, _ in out)
            return out

        def opening(order: Blocks, *args: Any, **kwargs: Any) -> Any:
            made = session(order, *args, **kwargs)
            propose = made.propose

            def proposing() -> Proposal | None:
                proposal = propose()
                self.asked.extend([] if proposal is None else [proposal])
                return proposal

            made.propose = proposing  # type: ignore[method-assign]
            return made

        self.patch.setattr(RegressionHead, "sample", sampling)
        self.patch.setattr(Blocks, "session", opening)
        return self

    def __exit__(self, *_: Any) -> None:
        self.patch.undo()

    def compare(self, one: MultimodalModel, stream: TokenStream, count: int, learned: list[int]) -> None:
        """The velocities are those of the training layout with the same noisy block in it. Elements have `count` clean rows, and
        then a noisy row each that is learned."""
        index = stream.latents["image"].index
        assert len(index) == count + len(learned)
        for proposal, velocity in zip(self.asked, self.seen, strict=True):
            assert proposal.layout is not None and proposal.content is not None
            element, time = proposal.layout.element, float(proposal.layout.time[0])
            rows = torch.tensor([count + learned.index(number) for number in element.tolist()])
            values, times, facts = (
                stream.latents["image"].values.clone(),
                stream.time.clone(),
                stream.inject[TIME].values.clone(),
            )
            values[rows], times[index[rows]], facts[rows] = proposal.content[element], time, time
            inject = {TIME: Placed(values=facts, index=stream.inject[TIME].index)}
            latents = {"image": Placed(values=values, index=index)}
            with torch.no_grad():
                hidden = one(replace(stream, latents=latents, inject=inject, time=times))
                assert torch.allclose(one.head("image").net(hidden[index[rows]]), velocity, atol=1e-5)


@pytest.mark.parametrize("block", [0, 2])
def test_generation_sees_what_training_sees(block: int) -> None:
    """Step by step from the cache, velocities are what training computes for the same noisy block."""
    one = model(block, shift=False)
    request = Request(prompt=[text("ab")], items=[("image", (1, 5))], text=False, seed=2)
    with Watched() as watched:
        ((made,),) = Engine(one).generate([request])
    assert len(watched.asked) == STEPS * (3 if block else 1)
    stream = one.build_document([text("ab"), Segment("image", made.content)], torch.Generator())
    watched.compare(one, stream, 5, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("infill", [False, True])
@pytest.mark.parametrize("frames", [8, 10, 13])
def test_a_sound_along_a_text_sees_what_training_sees(frames: int, infill: bool) -> None:
    """Whatever number of frames is asked for, they are spread over the text, in generation as in training."""
    settings = {"block": 4, "shift": False, "along": True, "infill": float(infill)}
    one = tiny(order(**settings), tokenizer=Frames(dim=DIM), head=RegressionHead(), qk_norm=True)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prompt = [text("ann: "), text("ten signs.")]
    known = None
    learned = list(range(frames))
    if infill:
        learned = learned[2:-1]
        rng = torch.Generator().manual_seed(1)
        known = (torch.randn(frames, DIM, generator=rng), torch.tensor([n not in learned for n in range(frames)]))
    request = Request(prompt=prompt, items=[("image", (frames,))], text=False, known=known, seed=2)
    with Watched() as watched:
        ((made,),) = Engine(one).generate([request])
    assert made.content.grid == (frames,) and len(watched.asked) == STEPS * -(-len(learned) // 4)
    rng = torch.Generator().manual_seed(0)
    while True:  # until the span that training draws is this one
        stream = one.build_document([*prompt, Segment("image", made.content)], rng)
        index = stream.latents["image"].index
        if torch.equal(stream.position[index[frames:]], stream.position[index[learned]]):
            break
    start = 6.0  # after `bos` and the voice
    wanted = start + torch.arange(frames) * (10 / frames)
    assert torch.allclose(stream.position[index[:frames]], wanted[:, None].expand(-1, 3), atol=1e-5)
    watched.compare(one, stream, frames, learned)


def test_given_blocks_stay_and_the_rest_goes_on_from_them() -> None:
    one = model(2)
    content, given = picture(1, 6).content, torch.tensor([True] * 4 + [False] * 2)
    request = Request(prompt=[text("a")], items=[("image", (1, 6))], text=False, known=(content, given), seed=1)
    ((made,),) = Engine(one).generate([request])
    assert torch.equal(made.content.latents[:4], content[:4])
    other = replace(request, known=(content + 1.0, given))
    ((moved,),) = Engine(one).generate([other])
    assert not torch.allclose(made.content.latents[4:], moved.content.latents[4:], atol=1e-3)
    scattered = replace(request, known=(content, torch.tensor([True, False] * 3)))
    with pytest.raises(ValueError, match="whole blocks at the start"):
        Engine(one).generate([scattered])


def test_more_steps_come_closer_and_are_a_choice() -> None:
    one = model(0)
    request = Request(prompt=[text("a")], items=[("image", (2, 2))], text=False, seed=1)
    made = {
        steps: Engine(one).generate([replace(request, sampling=Sampling(denoising_steps=steps))])[0][0].content.latents
        for steps in (2, 64, 128)
    }
    by_steps = replace(request, sampling=Sampling(steps=64))  # what other orders call theirs
    assert torch.equal(Engine(one).generate([by_steps])[0][0].content.latents, made[64])
    both = replace(request, sampling=Sampling(steps=2, denoising_steps=64))
    assert torch.equal(Engine(one).generate([both])[0][0].content.latents, made[64])
    assert (made[64] - made[128]).norm() < (made[2] - made[128]).norm()


@pytest.mark.parametrize("adaln", [False, True])
def test_it_learns(adaln: bool) -> None:
    one = model(2, adaln=adaln).train()
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    documents = [[text(f"picture {n}"), Segment("image", picture(2, 2, seed=n))] for n in range(3)]
    optimizer = torch.optim.AdamW(one.parameters(), lr=3e-3)
    losses = []
    for _ in range(200):
        report = one.loss(pack([one.build_document(d, rng) for d in documents]))
        optimizer.zero_grad()
        report.total.backward()
        optimizer.step()
        losses.append(float(report.raw["image"]))
    assert sum(losses[-30:]) < 0.75 * sum(losses[:30])


def test_saved_and_loaded(tmp_path: Path) -> None:
    one = model(2, process={"schedule": "flow", "shift": 2.0})
    save_pretrained(one, tmp_path / "model")
    other = load_pretrained(tmp_path / "model")
    kept = other.modalities[1].order
    assert isinstance(kept, Blocks) and kept.process.shift == 2.0 and kept.sampler.steps == STEPS
    request = Request(prompt=[text("a")], items=[("image", (2, 2))], text=False, seed=5)
    same(Engine(one).generate([request]), Engine(other).generate([request]))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one element"):
        Blocks(-1)
    with pytest.raises(ValueError, match="integrates the velocity"):
        Blocks(process={"schedule": "cosine", "prediction": "v"})
    ids = tiny(Blocks(), tokenizer=Palette(4))
    with pytest.raises(ValueError, match="the blocks order makes vectors"):
        Engine(ids).generate([Request(prompt=[text("a")], items=[("image", (2, 2))], text=False)])


# --- filling in the middle --------------------------------------------------------------------------------------------


def test_infill_layout_by_hand() -> None:
    """Six elements of which the span 2..4 is learned, in blocks of two: 0 and 1 and 5 are given."""
    made = infilled(order(2, shift=False, infill=1.0), 6, (2, 3))
    assert made.element.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert made.order.tolist() == [0, 0, 1, 1, 2, 0, 1, 1, 2]
    assert made.copy.tolist() == [0] * 6 + [1] * 3
    assert made.target.tolist() == [-1] * 6 + [6, 7, 8]
    assert not bool(made.time[:6].any()) and bool((made.time[6:] > 0).all())
    assert made.time[6] == made.time[7] != made.time[8]
    assert torch.equal(made.position[6:], made.position[2:5]) and torch.equal(made.inject[TIME][:, 0], made.time)


def infilled(one: Blocks, count: int, span: tuple[int, int]) -> Layout:
    """The first layout whose learned span is (start, length)."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(1000):
        made = one.layout(picture(1, count), context=False, rng=rng)
        learned = made.element[made.copy == 1].tolist()
        if (learned[0], len(learned)) == span:
            return made
    raise AssertionError(f"no span {span} in 1000 draws")


def test_spans_are_drawn_evenly() -> None:
    rng, one, count = torch.Generator().manual_seed(0), order(2, infill=0.5), 4
    seen: Counter[tuple[int, int]] = Counter()
    draws = 4000
    for _ in range(draws):
        made = one.layout(picture(1, count), context=False, rng=rng)
        learned = made.element[made.copy == 1].tolist()
        assert learned == list(range(learned[0], learned[-1] + 1))
        seen[learned[0], len(learned)] += 1
    for length in range(1, count + 1):
        for start in range(count - length + 1):
            p = 0.5 / count / (count - length + 1) + 0.5 * (length == count)  # without infill all is learned
            assert abs(seen[start, length] / draws - p) < 4 * (p * (1 - p) / draws) ** 0.5


def test_what_is_given_is_seen_by_all_and_sees_only_itself() -> None:
    one = model(2, infill=1.0)
    rng = torch.Generator().manual_seed(0)
    stream = one.build_document([text("ab"), Segment("image", picture(1, 7))], rng)
    while (
        len(stream.latents["image"].index) != 11
    ):  # a span of four, so that there are three given and two blocks or more
        stream = one.build_document([text("ab"), Segment("image", picture(1, 7))], rng)
    clean, noisy = stream.latents["image"].index.split([7, 4])
    first = int(stream.order[clean].min())
    given, learned = clean[stream.order[clean] == first], clean[stream.order[clean] > first]
    values = stream.latents["image"].values.clone().requires_grad_()
    stream = replace(stream, latents={"image": Placed(values=values, index=stream.latents["image"].index)})
    hidden = one(stream, noise={"image": torch.randn_like(values)})

    def reach(places: Tensor) -> Tensor:
        """Positions with vectors that these hidden states depend on."""
        (gradient,) = torch.autograd.grad(hidden[places].sum(), values, retain_graph=True)
        return stream.latents["image"].index[gradient.abs().sum(1) > 0]

    assert len(given) == 3 and set(reach(given[:1]).tolist()) == set(given.tolist())
    for number in set(stream.order[noisy].tolist()):
        own, before = noisy[stream.order[noisy] == number], learned[stream.order[learned] < number]
        assert set(reach(own).tolist()) == {*given.tolist(), *before.tolist(), *own.tolist()}
        same = learned[stream.order[learned] == number]
        assert set(reach(same).tolist()) == {*given.tolist(), *before.tolist(), *same.tolist()}
    assert set(reach(torch.tensor([len(stream) - 1])).tolist()) == set(clean.tolist())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_filling_in_is_cached_and_keeps_what_is_given(guidance: float) -> None:
    one = model(2, infill=0.5)
    content = picture(1, 7).content
    for given in ([1, 1, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0]):
        known = (content, torch.tensor(given).bool())
        request = Request(
            prompt=[text("a")], items=[("image", (1, 7))], max_tokens=3, known=known, seed=1, sampling=Sampling(guidance=guidance)
        )  # fmt: skip
        made = Engine(one).generate([request])
        same(made, Uncached(one).generate([request]))
        vectors = made[0][0].content.latents
        assert torch.equal(vectors[known[1]], content[known[1]]), "bit by bit"
        assert not torch.isclose(vectors[~known[1]], content[~known[1]]).any()
        changed = (content + known[1][:, None], known[1])
        ((moved, *_),) = Engine(one).generate([replace(request, known=changed)])
        far = (moved.content.latents - vectors)[~known[1]].abs().amax(1)
        assert bool((far > 1e-4).all()), "each unknown element depends on what is given, behind it too"


@pytest.mark.parametrize("learned", [[2, 3, 4], [4, 5]], ids=str)
def test_filling_in_sees_what_training_sees(learned: list[int]) -> None:
    """Step by step from the cache, the velocities are those of the training layout with the same noisy block in it; also where
    what is given would fill the first blocks, which training by spans alone never shows one by one."""
    one = model(2, shift=False, infill=1.0)
    given = torch.tensor([number not in learned for number in range(6)])
    request = Request(
        prompt=[text("ab")], items=[("image", (1, 6))], text=False, known=(picture(1, 6).content, given), seed=2
    )
    with Watched() as watched:
        ((made,),) = Engine(one).generate([request])
    assert len(watched.asked) == -(-len(learned) // 2) * STEPS
    rng = torch.Generator().manual_seed(0)
    while True:  # until the span that training draws is this one
        stream = one.build_document([text("ab"), Segment("image", made.content)], rng)
        index = stream.latents["image"].index
        if torch.equal(stream.position[index[6:]], stream.position[index[learned]]):
            break
    watched.compare(one, stream, 6, learned)
    for number in (0, 6):  # nothing is given, or all
        known = (picture(1, 6).content, torch.arange(6) < number)
        ((made,),) = Engine(one).generate([replace(request, known=known)])
        assert int((made.content.latents == known[0]).all(1).sum()) == number
