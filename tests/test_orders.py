"""Orders by themselves: layouts, sessions, the masks of diffusers' scheduler, inpainting, statistics."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mm import plugins
from mm.grid import coordinates
from mm.interfaces import Encoded, Sampling, Session
from mm.orders import masked
from mm.orders.masked import Masked, gumbel, least_confident, remaining
from mm.orders.raster import Raster

RNG = torch.Generator


def item(*grid: int) -> Encoded:
    return Encoded(grid=grid, ids=torch.arange(math.prod(grid)) % 8)


def test_coordinates() -> None:
    assert coordinates((3,)).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]  # as text: one dimension
    assert coordinates((2, 2)).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert coordinates((2, 1, 2)).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    with pytest.raises(ValueError, match="one, two or three axes"):
        coordinates((1, 2, 3, 4))


# --- raster ---------------------------------------------------------------------------------------------------------


def test_raster_layout() -> None:
    layout = Raster().layout(item(2, 2), context=False, rng=RNG())
    assert layout.element.tolist() == layout.order.tolist() == [0, 1, 2, 3]
    assert layout.target.tolist() == [1, 2, 3, 4] and layout.enters
    context = Raster(prefix=True).layout(item(2, 2), context=True, rng=RNG())
    assert context.order.tolist() == [0] * 4 and context.target.tolist() == [-1, -1, -1, 4] and not context.enters


def test_raster_session_goes_element_by_element() -> None:
    session, drawn = Raster().session((2, 3), Sampling(), RNG()), []
    while (proposal := session.propose()) is not None:
        assert proposal.autoregressive and proposal.layout is None
        assert proposal.done == pytest.approx(len(drawn) / 6)
        assert session.content().tolist() == drawn
        drawn.append(len(drawn) % 4)
        session.accept(torch.tensor(drawn[-1:]), None)
    assert session.content().tolist() == [0, 1, 2, 3, 0, 1]


def test_raster_keeps_a_given_beginning() -> None:
    content, given_to = torch.tensor([5, 6, 0, 0]), torch.tensor([True, True, False, False])
    session = Raster().session((2, 2), Sampling(), RNG(), (content, given_to))
    assert session.content().tolist() == [5, 6] and session.propose().done == 0.5
    with pytest.raises(ValueError, match="got 2, 1 of them at the start; the masked order fills in between"):
        Raster().session((2, 2), Sampling(), RNG(), (content, torch.tensor([True, False, True, False])))
    for order in (Raster(), Masked()):
        for wrong in ((content, given_to[:3]), (content[:3], given_to), (content.repeat(2), given_to.repeat(2))):
            with pytest.raises(ValueError, match=r"given elements cover \d and \d places, but the grid \(2, 2\) has 4"):
                order.session((2, 2), Sampling(), RNG(), wrong)


# --- masked: training -----------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 10_000))
def test_masked_layout_hides_some_and_predicts_those(count: int, seed: int) -> None:
    layout = Masked().layout(item(1, count), context=False, rng=RNG().manual_seed(seed))
    hidden = layout.time == 1
    assert 1 <= int(hidden.sum()) <= count and bool((layout.time[~hidden] == 0).all())
    assert torch.equal(layout.target, torch.where(hidden, torch.arange(count), -1))
    assert not layout.order.any() and not layout.copy.any() and not layout.enters
    context = Masked().layout(item(1, count), context=True, rng=RNG().manual_seed(seed))
    assert not context.time.any() and bool((context.target == -1).all())


@pytest.mark.parametrize(("schedule", "mean", "below_half"), [("cosine", 2 / math.pi, 1 / 3), ("uniform", 0.5, 0.5)])
def test_share_of_hidden_elements(schedule: str, mean: float, below_half: float) -> None:
    """E cos(πt/2) = 2/π, and cos(πt/2) < 1/2 for t > 2/3 (MaskGIT); every place is hidden equally often."""
    rng, draws = RNG().manual_seed(0), 4000
    order, picture = Masked(schedule=schedule), item(8, 8)
    times = torch.stack([order.layout(picture, context=False, rng=rng).time for _ in range(draws)])
    shares = times.mean(1)
    assert shares.mean().item() == pytest.approx(mean, abs=4 * shares.std().item() / draws**0.5)
    assert (shares < 0.5).float().mean().item() == pytest.approx(below_half, abs=0.04)
    places = times.mean(0)
    assert places.max().item() - places.min().item() < 0.06


def test_masked_arguments() -> None:
    with pytest.raises(ValueError, match="steps >= 1, got 0"):
        Masked(steps=0)
    assert Masked(rate_condition=True, micro=(1.0, 2.0)).conditions == {"mask_rate": 3}
    assert Masked().conditions == {}


@pytest.mark.parametrize("name", sorted(plugins.available("orders")))
def test_wrong_types_are_refused_in_words(name: str) -> None:
    """Most raised a `TypeError` where they compared or counted; some took what they were given, and failed much later."""
    order = plugins.load("orders", name)
    for argument in list(inspect.signature(order.__init__).parameters.values())[1:]:
        wrong = [object(), [None], {"no such": 1}]
        for value in [*wrong, "x"] if argument.annotation != "str" else wrong:
            with pytest.raises(ValueError, match=r"(expected|its settings are|holds numbers)") as caught:
                order(**{argument.name: value})
            assert name in str(caught.value).lower() or "no such" in str(caught.value)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        order(no_such=1)


# --- masked: decoding -----------------------------------------------------------------------------------------------


def play(session: Session, seed: int = 0) -> list[Tensor]:
    """Run a masked session with random draws; the hidden elements before each step."""
    rng, states = RNG().manual_seed(seed), []
    while (proposal := session.propose()) is not None:
        layout = proposal.layout
        assert layout is not None and not proposal.autoregressive
        hidden = layout.time == 1
        assert torch.equal(layout.target >= 0, hidden)
        assert proposal.done == pytest.approx(1 - hidden.float().mean().item())
        states.append(hidden)
        asked = int(hidden.sum())
        before = session.content().clone()
        kept = session.content()
        session.accept(torch.randint(1, 8, (asked,), generator=rng), -torch.rand(asked, generator=rng))
        assert torch.equal(kept, before)  # what was given out is not changed afterwards
        assert torch.equal(session.content()[~hidden], before[~hidden])
    return states


@pytest.mark.parametrize(("side", "steps"), [(4, 1), (4, 16), (4, 40), (4, 7), (1, 5), (8, 12)])
def test_decoding_ends_with_nothing_hidden(side: int, steps: int) -> None:
    session, count = Masked().session((side, side), Sampling(steps=steps), RNG().manual_seed(1)), side * side
    states = play(session)
    assert bool(states[0].all()) and len(states) == min(steps, count)
    for before, after in zip(states, states[1:], strict=False):  # what is decided stays decided, and each step decides
        assert not bool((after & ~before).any()) and int(after.sum()) < int(before.sum())
    assert session.propose() is None and bool((session.content() > 0).all()) and len(session.content()) == count


def test_steps_come_from_the_sampling_or_the_order() -> None:
    assert len(play(Masked(steps=5).session((8, 8), Sampling(), RNG()))) == 5
    assert len(play(Masked(steps=5).session((8, 8), Sampling(steps=3), RNG()))) == 3


@given(st.integers(1, 300), st.integers(1, 60))
def test_remaining_falls_to_zero(count: int, steps: int) -> None:
    hidden, taken = count, 0
    while hidden:
        taken += 1
        left = remaining(count, hidden, taken, steps)
        assert 0 <= left < hidden and (taken < steps or left == 0)
        hidden = left
    assert taken <= min(count, steps)


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 12, 15])
def test_masks_are_those_of_the_amused_scheduler(steps: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same draws, probabilities and noise: the same elements stay hidden after every step, also when only a share was
    hidden at first (`starting_mask_ratio`, inpainting). With more steps than hidden elements ours ends early; theirs
    draws the last element again and again."""
    from diffusers import AmusedScheduler
    from diffusers.schedulers import scheduling_amused

    count, vocab, rng = 64, 20, RNG().manual_seed(steps)
    noises: list[Tensor] = []

    def shared_noise(t: Tensor, generator: RNG | None = None) -> Tensor:
        noises.append(gumbel((count,), rng).float())
        return noises[-1][None]

    monkeypatch.setattr(scheduling_amused, "gumbel_noise", shared_noise)
    scheduler = AmusedScheduler(mask_token_id=vocab)
    scheduler.set_timesteps(steps, temperature=(2, 0))
    truth = torch.randint(0, vocab, (count,), generator=rng)
    hidden = torch.zeros(count, dtype=torch.bool)
    hidden[torch.randperm(count, generator=rng)[: int(share * count)]] = True
    sample = torch.where(hidden, vocab, truth)[None]
    session = Masked(choice_temperature=2.0).session((8, 8), Sampling(steps=steps), RNG(), (truth, ~hidden))
    monkeypatch.setattr(masked, "gumbel", lambda shape, _: noises[-1][sample[0] == vocab])
    for timestep in scheduler.timesteps.tolist():
        proposal = session.propose()
        assert proposal is not None and proposal.layout is not None
        assert torch.equal(proposal.layout.time == 1, sample[0] == vocab)
        logits = 2 * torch.randn(1, count, vocab, generator=rng)
        step = scheduler.step(logits, timestep, sample, starting_mask_ratio=share, generator=rng)
        draws, open_places = step.pred_original_sample[0], sample[0] == vocab
        log_prob = logits[0].log_softmax(-1).gather(-1, draws[:, None])[:, 0]
        if timestep == 0:
            noises.append(torch.zeros(count))  # theirs draws none for the last step
        session.accept(draws[open_places], log_prob[open_places])
        sample = step.prev_sample
    assert session.propose() is None and torch.equal(session.content(), sample[0])
    assert torch.equal(session.content()[~hidden], truth[~hidden])


@given(st.integers(0, 5000))
def test_inpainting_keeps_what_is_given(seed: int) -> None:
    rng = RNG().manual_seed(seed)
    content, kept = torch.randint(0, 8, (24,), generator=rng), torch.rand(24, generator=rng) < 0.6
    original = content.clone()
    session = Masked().session((4, 6), Sampling(steps=5), rng, (content, kept))
    states = play(session, seed)
    assert all(not bool((state & kept).any()) for state in states)
    assert len(states) == min(5, int((~kept).sum()))
    assert torch.equal(session.content()[kept], original[kept]) and torch.equal(content, original)
    assert bool((session.content()[~kept] > 0).all())


def test_nothing_to_fill_in_is_done_at_once() -> None:
    content = torch.arange(4)
    session = Masked().session((2, 2), Sampling(), RNG(), (content, torch.ones(4, dtype=torch.bool)))
    assert session.propose() is None and torch.equal(session.content(), content)


def test_sub_codes_are_decided_together() -> None:
    session = Masked().session((2, 2), Sampling(steps=2), RNG(), num_codes=3)
    assert session.content().shape == (4, 3)
    session.accept(torch.arange(12).view(4, 3), torch.tensor([-1.0, -9, -2, -8]))
    assert session.content().shape == (4, 3)
    with pytest.raises(ValueError, match="this head gives none"):
        session.accept(torch.zeros(2, 3), None)


def test_the_least_confident_are_hidden_again() -> None:
    log_prob = torch.tensor([-1.0, -5.0, -0.1, -3.0])
    assert sorted(least_confident(log_prob, torch.randn(4), 0.0, 2).tolist()) == [1, 3]
    assert sorted(least_confident(log_prob, torch.tensor([0.0, 4.5, 0, -9]), 1.0, 2).tolist()) == [0, 3]


def test_gumbel_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel((100_000,), RNG().manual_seed(0))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert (noise < 0).double().mean().item() == pytest.approx(math.exp(-1), abs=0.01)
    assert bool(noise.isfinite().all())
