"""The task that tells heads of vectors apart, and what each head makes of it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.bench.mixture import SHARE, SPREAD, condition, distance, energy_distance, points, sampled, train
from mm.diffusion import Process, Sampler
from mm.heads.diffusion import DiffusionHead
from mm.heads.gaussian import GaussianHead
from mm.heads.regression import RegressionHead
from mm.interfaces import Head

FEW = Sampler(solver="dpm++", steps=10, rho=1.5)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean_distance(made: Any, count: int = 500, sets: int = 4) -> float:
    return sum(distance(partial(made, seed=seed), count, seed) for seed in range(sets)) / sets


def data(angle: Tensor, seed: int) -> Tensor:
    return points(angle, rng(seed))


def trained(head: Head, steps: int) -> float:
    return mean_distance(partial(sampled, train(head, steps)))


# --- the task -------------------------------------------------------------------------------------------------------


def test_points_lie_at_two_places() -> None:
    angle = torch.full((20_000,), 0.7)
    made = points(angle, rng(0)) @ torch.tensor([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]])
    first = made[:, 0] > 0
    assert float(first.float().mean()) == pytest.approx(SHARE, abs=0.01)
    assert float(made[first, 0].mean()) == pytest.approx(1.0, abs=0.01)
    assert float(made[~first, 0].mean()) == pytest.approx(-1.0, abs=0.01)
    assert float(made[:, 1].std()) == pytest.approx(SPREAD, rel=0.03)
    assert torch.equal(points(angle, rng(1)), points(angle, rng(1)))
    turned = condition(torch.tensor([0.2, 0.2 + math.tau]))
    assert torch.allclose(turned[0], turned[1], atol=1e-5)


def test_energy_distance_is_its_definition() -> None:
    a, b = torch.randn(5, 2), torch.randn(4, 2) + 1

    def mean(x: Tensor, y: Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (same and i == j)]
        return sum(float((x[i] - y[j]).norm()) for i, j in pairs) / len(pairs)

    for unbiased in (False, True):
        wanted = 2 * mean(a, b, False) - mean(a, a, unbiased) - mean(b, b, unbiased)
        assert energy_distance(a, b, unbiased) == pytest.approx(wanted, abs=1e-5)
    assert energy_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_unbiased_distance_of_equal_distributions_is_zero_on_average() -> None:
    both = torch.tensor([
        [energy_distance(torch.randn(40, 2), torch.randn(40, 2), unbiased) for unbiased in (False, True)]
        for _ in range(200)
    ])  # fmt: skip
    biased, unbiased = both.unbind(1)
    assert abs(float(unbiased.mean())) < 4 * float(unbiased.std()) / 200**0.5
    assert float(biased.min()) > 0 and float(biased.mean()) > 10 * abs(float(unbiased.mean()))


def test_training_leaves_the_callers_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    one, other = (train(RegressionHead(), 3, seed=4) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# --- the heads ------------------------------------------------------------------------------------------------------


def test_the_diffusion_head_learns_both_places_and_the_others_do_not() -> None:
    """At most twice the distance between two sets of the data; a guess of one point is far beyond it, and a normal
    distribution about one point too."""
    real = mean_distance(data)
    assert trained(DiffusionHead(sampler=FEW, width=64, blocks=2), 500) < 2 * real
    assert trained(RegressionHead(layers=3), 300) > 50 * real
    assert trained(GaussianHead(), 300) > 20 * real


@pytest.mark.long
def test_few_steps_do_what_a_hundred_do() -> None:
    """The same head, 10 steps beside 100 ancestral ones, as far as a few sets can tell; evenly spaced times are worse."""
    head = train(DiffusionHead(width=64, blocks=3), 1000)
    found = {}
    for name, sampler in {
        "many": Sampler(solver="ddpm", steps=100), "few": FEW, "even": Sampler(solver="dpm++", steps=10),
    }.items():  # fmt: skip
        head.sampler = sampler
        found[name] = mean_distance(partial(sampled, head))
    assert found["few"] < 1.5 * found["many"] and found["few"] < found["even"]


# --- spacing of the flow schedule ---------------------------------------------------------------------------------


def test_rho_is_the_spacing_of_karras() -> None:
    """(σ_max^(1/ρ) + k/K·(σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ with t for σ, from 1 to 0."""
    wanted = [(1 - k / 8) ** 1.5 for k in range(9)]
    for solver in ("dpm++", "euler", "ddim"):
        assert Sampler(solver=solver, steps=8, rho=1.5).times(Process()) == pytest.approx(wanted)  # type: ignore[arg-type]
    assert Sampler(steps=8).times(Process()) == pytest.approx([1 - k / 8 for k in range(9)])


@pytest.mark.parametrize("shift", [0.2, 0.3, 0.7])
def test_shifted_times_end_at_one(shift: float) -> None:
    """A shift below 1 may round t beyond 1, where the flow schedule has no level."""
    plan = Sampler(solver="dpm++", steps=10).plan(Process(shift=shift))
    assert float(plan.time.max()) == 1.0


@pytest.mark.parametrize(
    ("settings", "process", "said"),
    [
        ({"rho": 0.0}, {}, "rho must lie in 0.1..10, got 0.0"),
        ({"rho": float("nan")}, {}, "rho must lie"),
        ({"rho": 2.0, "solver": "sde"}, {}, "sde has times of its own"),
        (
            {"rho": 2.0, "solver": "dpm++"},
            {"schedule": "cosine", "prediction": "v"},
            "for cosine choose a spacing instead",
        ),
    ],
)
def test_spacings_that_cannot_be_used_are_refused(settings: dict[str, Any], process: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampler(**settings).plan(Process(**process))
