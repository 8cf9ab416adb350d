"""Video in blocks of whole frames: how frames are laid out, prefix noise, frames as prompt, rollouts with a sliding window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.heads.regression import RegressionHead
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.blocks import TIME, Blocks
from mm.stream import TokenStream
from mm.testing import rule, tiny

DIM, STEPS, AREA = 5, 2, 4


class Steps(ModalityTokenizer):
    """Clips of up to `most` frames of 2×2 vectors."""

    def __init__(self, most: int = 6) -> None:
        self.most = most

    @property
    def spec(self) -> Spec:
        return Spec(kind="continuous", dim=DIM, max_grid=(self.most, 2, 2), fps=8.0, fingerprint=f"steps-{self.most}")

    def encode(self, raw: Tensor) -> Encoded:
        return Encoded(grid=(len(raw), 2, 2), latents=raw.flatten(0, 2))

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.latents is not None
        return Decoded(value=encoded.latents.view(*encoded.grid, DIM))


def order(frames: int = 2, **settings: Any) -> Blocks:
    return Blocks(frames=frames, **{"sampler": {"steps": STEPS}, **settings})


def model(
    frames: int = 2, *, most: int = 6, adaln: bool = False, context: int = 256, **settings: Any
) -> MultimodalModel:
    blocks = order(frames, time_condition=not adaln, **settings)
    made = tiny(blocks, tokenizer=Steps(most), head=RegressionHead(), context=context, qk_norm=True, adaln=adaln)
    with torch.no_grad():
        for parameter in made.parameters():  # AdaLN and conditions start at zero, biases too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def clip(frames: int, seed: int = 0) -> Encoded:
    rng = torch.Generator().manual_seed(seed)
    return Encoded(grid=(frames, 2, 2), latents=torch.randn(frames * AREA, DIM, generator=rng))


def text(words: str) -> Segment:
    return Segment("text", words, loss=False)


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
