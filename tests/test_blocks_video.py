"""Video in blocks of whole frames: how frames are laid out, noise on what they follow, frames as prompt. Rollouts beyond the
training have a file of their own (`test_rollouts`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.generation import Engine, Request
from mm.heads.regression import RegressionHead
from mm.interfaces import Encoded, Proposal, Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.blocks import TIME, Blocks, BlocksSession
from mm.stream import Placed, TokenStream
from mm.testing import Clips, Uncached, rule, tiny
from mm.tracks import Feed

DIM, STEPS, AREA = 5, 2, 4


def order(frames: int = 2, **settings: Any) -> Blocks:
    return Blocks(frames=frames, **{"sampler": {"steps": STEPS}, **settings})


def model(
    frames: int = 2, *, most: int = 6, adaln: bool = False, context: int = 256, **settings: Any
) -> MultimodalModel:
    blocks = order(frames, time_condition=not adaln, **settings)
    made = tiny(blocks, tokenizer=Clips(DIM, most), head=RegressionHead(), context=context, qk_norm=True, adaln=adaln)
    with torch.no_grad():
        for parameter in made.parameters():  # AdaLN and conditions start at zero, biases too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def clip(frames: int, seed: int = 0) -> Encoded:
    rng = torch.Generator().manual_seed(seed)
    return Encoded(grid=(frames, 2, 2), latents=torch.randn(frames * AREA, DIM, generator=rng))


def text(words: str) -> Segment:
    return Segment("text", words, loss=False)


def ask(frames: int, given: int = 0, words: str = "ab", **settings: Any) -> Request:
    """A clip that begins with `given` frames."""
    known = None
    if given:
        known = (clip(frames, seed=9).content, torch.arange(frames * AREA) < given * AREA)
    return Request(prompt=[text(words)], items=[("image", (frames, 2, 2))], known=known, **{"text": False, **settings})


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_block_is_whole_frames_whatever_their_size() -> None:
    for rows, columns in ((1, 1), (2, 3), (4, 4)):
        area = rows * columns
        item = Encoded(grid=(5, rows, columns), latents=torch.zeros(5 * area, DIM))
        made = order(2, shift=False).layout(item, context=False, rng=torch.Generator())
        wanted = [block for block in (0, 0, 1, 1, 2) for _ in range(area)]
        assert made.order.tolist() == wanted * 2 and made.copy.tolist() == [0] * 5 * area + [1] * 5 * area
        assert made.position[: 5 * area, 0].tolist() == [float(frame) for frame in range(5) for _ in range(area)]
        times = made.time[5 * area :].view(5, area)
        assert bool((times == times[:, :1]).all()) and times[0, 0] == times[1, 0] and len(times.unique()) == 3
    rng, one = torch.Generator().manual_seed(0), order(3)
    seen = {tuple(one.layout(clip(5), context=False, rng=rng).order[: 5 * AREA : AREA].tolist()) for _ in range(50)}
    assert seen == {(0, 0, 0, 1, 1), (0, 0, 1, 1, 1), (0, 1, 1, 1, 2)}, "chunks begin at any frame, never inside one"
    words = Encoded(grid=(5,), latents=torch.zeros(5, DIM))
    assert order(2, shift=False).layout(words, context=True, rng=rng).order.tolist() == [0, 0, 1, 1, 2]


def test_spans_to_fill_in_are_whole_frames() -> None:
    rng, one, seen = torch.Generator().manual_seed(0), order(2, infill=1.0), set()
    for _ in range(100):
        made = one.layout(clip(3), context=False, rng=rng)
        learned = made.element[made.copy == 1].view(-1, AREA)
        frames = learned[:, 0] // AREA
        assert torch.equal(learned, frames[:, None] * AREA + torch.arange(AREA))
        seen.add(tuple(frames.tolist()))
    assert seen == {(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)}


def test_causal_over_time_and_full_within_a_chunk() -> None:
    one = model(2, shift=False)
    stream = one.build_document([text("ab"), Segment("image", clip(5))], torch.Generator().manual_seed(0))
    index = stream.latents["image"].index
    frame = torch.arange(5).repeat_interleave(AREA)
    seen = rule(stream)[index[:, None], index]
    chunk = torch.cat((frame, frame)) // 2
    noisy = torch.arange(10 * AREA) >= 5 * AREA
    wanted = (chunk < chunk[:, None]) & ~noisy | (chunk == chunk[:, None]) & (noisy == noisy[:, None])
    assert torch.equal(seen, wanted)


def both(**settings: Any) -> tuple[TokenStream, TokenStream, MultimodalModel, MultimodalModel]:
    """A document as training sees it without and with prefix noise, from models of the same weights."""
    plain, noised = model(shift=False, **settings), model(shift=False, augment=0.2, **settings)
    document = [text("ab"), Segment("image", clip(5))]
    streams = [one.build_document(document, torch.Generator().manual_seed(1)) for one in (plain, noised)]
    return streams[0], streams[1], plain, noised


@pytest.mark.parametrize("adaln", [False, True])
def test_prefix_noise_changes_what_later_blocks_read_and_nothing_else(adaln: bool) -> None:
    plain, noised, one, other = both(adaln=adaln)
    for name in ("modality", "ids", "order", "copy", "position", "target", "weight"):
        assert torch.equal(getattr(plain, name), getattr(noised, name)), name
    index = plain.latents["image"].index
    clean, noisy = index[: 5 * AREA], index[5 * AREA :]
    assert torch.equal(plain.latents["image"].values, noised.latents["image"].values), "the truth stays"
    assert torch.equal(plain.time[noisy], noised.time[noisy]) and not bool(plain.time[clean].any())
    times = noised.time[clean].view(5, AREA)
    assert bool(((times > 0) & (times <= 0.2)).all()) and len(times.unique()) == 3, "one time a block"
    told = {0: plain, 1: noised}
    if not adaln:
        assert all(torch.equal(s.inject[TIME].values[:, 0], s.time[s.inject[TIME].index]) for s in told.values())
    torch.manual_seed(0)
    noise = one.draw_noise(plain)
    values, rows = plain.latents["image"].values, noised.time[index]
    mixed = (1 - rows[:, None]) * values + rows[:, None] * noise["image"]
    read = replace(noised, latents={"image": replace(noised.latents["image"], values=mixed)})
    with torch.no_grad():
        hidden, before = other(noised, noise=noise), one(plain, noise=noise)
        assert torch.allclose(hidden, other(read), atol=1e-5), "what is read is the process at that time"
    same = torch.isclose(hidden, before, atol=1e-5).all(1)
    assert bool(same[: int(clean[0])].all()) and bool(same[noisy[: 2 * AREA]].all()), (
        "nothing is before the first block"
    )
    assert not bool(same[noisy[2 * AREA :]].any())
    truth = other.truth(noised, 1, noisy, noise)
    assert torch.allclose(truth, (noise["image"] - values)[5 * AREA :], atol=1e-6), "what is learned stays, too"


def test_prompts_are_read_as_they_are() -> None:
    one = model(augment=0.3)
    stream = one.build_document([Segment("image", clip(3), loss=False), Segment("text", "ab")], torch.Generator())
    assert not bool(stream.time.any()) and not bool(stream.copy.any())


def test_without_prefix_noise_nothing_is_drawn() -> None:
    """Frames are only another way to count a block, and noise for them is drawn after all else."""
    rngs = [torch.Generator().manual_seed(3) for _ in range(3)]
    orders = Blocks(2 * AREA, shift=False), order(2, shift=False), order(2, shift=False, augment=0.1)
    by_elements, by_frames, noised = (
        o.layout(clip(5), context=False, rng=rng) for o, rng in zip(orders, rngs, strict=True)
    )
    for name in ("element", "order", "position", "time", "copy", "target"):
        assert torch.equal(getattr(by_elements, name), getattr(by_frames, name)), name
    assert torch.equal(by_frames.time[5 * AREA :], noised.time[5 * AREA :])
    states = [rng.get_state() for rng in rngs]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="got block 2 and frames 1"):
        Blocks(2, frames=1)
    with pytest.raises(ValueError, match="at least one element"):
        Blocks(frames=-1)
    for augment, sampling in ((0.0, 0.1), (1.0, 0.0), (0.1, 0.2), (-0.1, -0.1)):
        with pytest.raises(ValueError, match="at no later one than in training"):
            Blocks(augment=augment, augment_sampling=sampling)
    with pytest.raises(ValueError, match="lead is of blocks of frames"):
        Blocks(lead=1)
    for settings in ({"frames": 2, "lead": -1}, {"frames": 2, "lead": 3}, {"frames": 2, "lead": 1, "shift": False}):
        with pytest.raises(ValueError, match="the first block has 1 to"):
            Blocks(**settings)  # type: ignore[arg-type]


# --- generation -------------------------------------------------------------------------------------------------------


def same(a: list[list[Segment]], b: list[list[Segment]]) -> None:
    for one, other in zip(a, b, strict=True):
        for left, right in zip(one, other, strict=True):
            assert left.modality == right.modality and left.content.grid == right.content.grid
            assert torch.allclose(left.content.content.float(), right.content.content.float(), atol=1e-4)


@pytest.mark.parametrize("adaln", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_clips_as_long_as_training_are_cached(guidance: float, adaln: bool) -> None:
    """Without a window, and where none is needed: cached is uncached, and a batch is its rows."""
    short = [
        ask(6, seed=1, sampling=Sampling(guidance=guidance)),
        ask(5, given=3, words="longer", seed=2, text=True, max_tokens=4),
    ]
    for window in (0, 4):
        one = model(adaln=adaln, window=window, augment=0.2, augment_sampling=0.1)
        made = Engine(one).generate(short)
        same(made, Uncached(one).generate(short))
        same(made, [Engine(one).generate([request])[0] for request in short])
        assert len(made[1]) == 2 and made[1][1].modality == "text"


@pytest.mark.parametrize("given", [0, 1, 3, 4])
def test_frames_as_prompt_stay_and_are_seen_as_in_training(given: int) -> None:
    """Step by step, velocities are what training computes in a clip whose blocks begin so that the given frames fill some."""
    one = model()
    request = ask(6, given=given, seed=2)
    with Watched() as watched:
        ((made,),) = Engine(one).generate([request])
    if request.known is not None:
        assert torch.equal(made.content.latents[: given * AREA], request.known[0][: given * AREA]), "bit by bit"
    rng = torch.Generator().manual_seed(0)
    begin = -given % 2
    wanted = (torch.arange(6 * AREA) // AREA + begin) // 2
    while True:  # until training begins its blocks there
        stream = one.build_document([text("ab"), Segment("image", made.content)], rng)
        index = stream.latents["image"].index
        if torch.equal(stream.order[index[: 6 * AREA]] - stream.order[index[0]], wanted):
            break
    assert len(watched.asked) == STEPS * -(-(6 - given) // 2)
    for proposal, velocity in zip(watched.asked, watched.answers, strict=True):
        assert proposal.layout is not None and proposal.content is not None
        element, time = proposal.layout.element, float(proposal.layout.time[0])
        rows = 6 * AREA + element
        values, times, facts = (
            t.clone() for t in (stream.latents["image"].values, stream.time, stream.inject[TIME].values)
        )
        values[rows], times[index[rows]], facts[rows] = proposal.content[element], time, time
        latents, inject = Placed(values=values, index=index), Placed(values=facts, index=stream.inject[TIME].index)
        with torch.no_grad():
            hidden = one(replace(stream, latents={"image": latents}, inject={TIME: inject}, time=times))
            assert torch.allclose(one.head("image").net(hidden[index[rows]]), velocity, atol=1e-5)  # type: ignore[operator]


class Watched:
    """Within it, what sessions propose and what the head answers is written down."""

    def __enter__(self) -> Watched:
        self.asked: list[Proposal] = []
        self.answers: list[Tensor] = []
        self.patch = pytest.MonkeyPatch()
        propose, accept = BlocksSession.propose, BlocksSession.accept

        def proposing(session: BlocksSession) -> Proposal | None:
            made = propose(session)
            self.asked.extend([] if made is None else [made])
            return made

        def accepting(session: BlocksSession, sample: Tensor, log_prob: Tensor | None) -> None:
            self.answers.append(sample)
            accept(session, sample, log_prob)

        self.patch.setattr(BlocksSession, "propose", proposing)
        self.patch.setattr(BlocksSession, "accept", accepting)
        return self

    def __exit__(self, *_: Any) -> None:
        self.patch.undo()


@pytest.mark.parametrize("window", [0, 4])
def test_a_clip_may_begin_as_a_picture(window: int) -> None:
    """With `lead` 1 the first block is the first frame; given frames are gone on from as without."""
    one, plain = model(lead=1, window=window), model(window=window)
    plain.load_state_dict(one.state_dict())
    request = ask(5, seed=3)
    with Watched() as watched:
        ((made,),) = Engine(one).generate([request])
    sizes = [len(p.layout.element) for p in watched.asked[::STEPS] if p.layout is not None]
    assert sizes == [AREA, 2 * AREA, 2 * AREA]
    same([[made]], Uncached(one).generate([request]))
    assert not torch.equal(made.content.latents, Engine(plain).generate([request])[0][0].content.latents)
    given = ask(5, given=2, seed=3)
    same(Engine(one).generate([given]), Engine(plain).generate([given]))


def test_frames_that_are_not_whole_or_not_first_cannot_be_given() -> None:
    for given, one in ((1, model(shift=False)), (3, model(shift=False))):
        with pytest.raises(ValueError, match="whole blocks at the start"):
            Engine(one).generate([ask(6, given=given)])
    content = clip(6).content
    for known in (torch.arange(6 * AREA) < 5, torch.arange(6 * AREA) >= 5 * AREA):
        with pytest.raises(ValueError, match="whole blocks at the start"):
            Engine(model()).generate([replace(ask(6), known=(content, known))])


@pytest.mark.parametrize("adaln", [False, True])
def test_generated_frames_enter_the_cache_with_noise_and_given_ones_without(adaln: bool) -> None:
    one = model(adaln=adaln, augment=0.2, augment_sampling=0.1)
    plain = model(adaln=adaln)
    request = ask(6, given=1, seed=3)
    fed: list[Feed] = []
    patch = pytest.MonkeyPatch()
    forward = Engine._forward

    def watching(engine: Engine, feeds: list[Feed], *rest: Any) -> Tensor:
        fed.extend(feed for feed in feeds if feed.keep and ("latents", "image") in feed.records)
        return forward(engine, feeds, *rest)

    with patch.context() as within:
        within.setattr(Engine, "_forward", watching)
        ((made,),) = Engine(one).generate([request])
    frames = made.content.latents
    told = [[] if feed.time is None else sorted(set(feed.time.tolist())) for feed in fed]
    assert told[0] == [] and all(times == [pytest.approx(0.1)] for times in told[1:])
    read = torch.cat([feed.records["latents", "image"][0] for feed in fed])
    assert torch.equal(read[:AREA], frames[:AREA])
    noise = (read[AREA:] - 0.9 * frames[AREA : len(read)]) / 0.1
    assert 0.6 < float(noise.std()) < 1.4 and abs(float(noise.mean())) < 0.4
    if not adaln:
        facts = torch.cat([feed.records["inject", TIME][0] for feed in fed[1:]])
        assert torch.allclose(facts, torch.full_like(facts, 0.1))
    ((again,),), ((other,),) = Engine(one).generate([request]), Engine(plain).generate([request])
    assert torch.equal(again.content.latents, frames), "a seed means the same again"
    second = 3 * AREA  # a given frame, and a block that follows nothing else
    assert torch.equal(other.content.latents[:second], frames[:second])
    assert not torch.isclose(other.content.latents[second:], frames[second:]).all(1).any()
