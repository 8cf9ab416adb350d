"""Continuous integrate-and-fire, against the loop that it is usually written as."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mm.cif import TAIL, Predictor, fire, integrate_and_fire, quantity_loss, scaled, shares


def slow(frames: Tensor, alpha: Tensor) -> tuple[list[Tensor], Tensor, float]:
    """Vectors that fire, what is left over, and its weight: frame by frame, each firing frame split between its vectors."""
    fired = []
    held, weight = torch.zeros_like(frames[0]), 0.0
    for frame, a in zip(frames, alpha.tolist(), strict=True):
        while weight + a >= 1:
            part = 1 - weight
            fired.append(held + part * frame)
            held, weight, a = torch.zeros_like(frame), 0.0, a - part
        held, weight = held + a * frame, weight + a
    return fired, held, weight


@pytest.mark.parametrize(("seed", "largest"), [(0, 0.4), (1, 0.99), (2, 3.5), (3, 0.05)])
def test_it_fires_as_the_loop_does(seed: int, largest: float) -> None:
    """Also where one frame is enough for several vectors."""
    torch.manual_seed(seed)
    frames, alpha = torch.randn(40, 3, dtype=torch.float64), largest * torch.rand(40, dtype=torch.float64)
    fired, left, weight = slow(frames, alpha)
    made = integrate_and_fire(frames[None], alpha[None], len(fired) + 1)[0]
    torch.testing.assert_close(made, torch.stack([*fired, left]))
    assert (len(fired) > 0) == (seed < 3), "one case has less than a whole vector"
    assert float(alpha.sum()) == pytest.approx(len(fired) + weight)


def test_a_frame_that_fires_is_split() -> None:
    frames = torch.tensor([[1.0], [10.0], [100.0]])
    made = integrate_and_fire(frames[None], torch.tensor([[0.6, 0.6, 0.8]]), 2)[0]
    torch.testing.assert_close(made, torch.tensor([[0.6 * 1 + 0.4 * 10], [0.2 * 10 + 0.8 * 100]]))


def test_no_weight_is_lost() -> None:
    torch.manual_seed(0)
    alpha = 2 * torch.rand(4, 30)
    count = int(alpha.sum(1).max()) + 1
    owned = shares(alpha, count)
    torch.testing.assert_close(owned.sum(1), alpha)
    whole = torch.arange(count) < alpha.sum(1).floor()[:, None]
    torch.testing.assert_close(owned.sum(2)[whole], torch.ones(int(whole.sum())))
    assert (owned >= 0).all()


def test_silence_behind_a_sound_changes_nothing() -> None:
    torch.manual_seed(0)
    frames, alpha = torch.randn(1, 9, 4), torch.rand(1, 9)
    longer = torch.cat((frames, torch.randn(1, 5, 4)), 1), torch.cat((alpha, torch.zeros(1, 5)), 1)
    torch.testing.assert_close(integrate_and_fire(*longer, 4), integrate_and_fire(frames, alpha, 4))


def test_weights_are_scaled_to_the_number_of_units() -> None:
    alpha, units = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.0], [0.3, 0.3, 0.3]]), torch.tensor([2, 1, 0])
    made = scaled(alpha, units)
    torch.testing.assert_close(made[:2], torch.tensor([[1.0, 0.5, 0.5], [0.5, 0.5, 0.0]]))
    assert not made[2].any()
    torch.testing.assert_close(quantity_loss(alpha, units), torch.tensor((1.0 + 0.8 + 0.9) / 3))
    frames = torch.randn(3, 3, 2)
    for row in (0, 1):  # as many as wanted, each of weight 1, although the last sum may be a rounding error short of it
        vectors = integrate_and_fire(frames, made, 2)[row, : units[row]]
        assert len(vectors) == units[row] and vectors.abs().sum() > 0
    torch.testing.assert_close(shares(made, 2).sum(2), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))


def test_gradients_reach_frames_and_weights() -> None:
    torch.manual_seed(0)
    frames = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    alpha = (0.2 + 0.5 * torch.rand(1, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, a: integrate_and_fire(f, scaled(a, torch.tensor([3])), 3), (frames, alpha)
    )
    loss = integrate_and_fire(frames, alpha, 2).square().sum()
    by_frame, by_weight = torch.autograd.grad(loss, (frames, alpha))
    early = alpha.detach().cumsum(1)[0] < 2
    assert early.any() and not early.all()
    assert (by_frame[0, early].abs().sum(1) > 0).all() and (by_weight[0, early].abs() > 0).all()
    assert by_weight[0, -1] == 0, "what comes after the last vector asked for has no part in it"


@pytest.mark.parametrize(("total", "count"), [(0.0, 1), (0.5, 1), (1.54, 1), (1.56, 2), (3.0, 3)])
def test_the_tail_decides_about_the_last_unit(total: float, count: int) -> None:
    assert TAIL == 0.45
    frames, alpha = torch.ones(10, 2), torch.full((10,), total / 10)
    made = fire(frames, alpha)
    assert made.shape == (count, 2)
    torch.testing.assert_close(made.sum(0)[0], torch.tensor(min(total, float(count))))


def test_the_predictor_sees_no_padding() -> None:
    torch.manual_seed(0)
    predictor = Predictor(4)
    frames, real = torch.randn(2, 7, 4), torch.arange(7) < torch.tensor([[7], [4]])
    alpha = predictor(frames, real)
    assert ((alpha > 0) == real).all() and (alpha < 1).all()
    torch.testing.assert_close(alpha[1, :4], predictor(frames[1:, :4], real[1:, :4])[0])
