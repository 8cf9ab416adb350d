"""Regression and Gaussian heads: their losses by hand, guided, learned, and what each can't do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mm.heads.gaussian import GaussianHead
from mm.heads.regression import RegressionHead
from mm.interfaces import Draw, Head, Sampling, Spec

DIM = 4


def built(head: Any) -> Any:
    torch.manual_seed(0)
    head.build(width=6, spec=Spec(kind="continuous", dim=DIM))
    return head


def draw(rows: slice, twin: slice | None = None, scale: float = 1.0, temperature: float = 1.0) -> Draw:
    rng = torch.Generator().manual_seed(3)
    return Draw(rows=rows, sampling=Sampling(temperature=temperature), generator=rng, unconditional=twin, scale=scale)


@pytest.mark.parametrize("error", ["l1", "l2", "cosine"])
def test_regression_loss(error: Any) -> None:
    head = built(RegressionHead(error, layers=2))
    hidden, target = torch.randn(5, 6), torch.randn(5, DIM)
    made = head.net(hidden)
    wanted = {
        "l1": (made - target).abs().mean(1),
        "l2": (made - target).square().mean(1),
        "cosine": 1 - (F.normalize(made, dim=1) * F.normalize(target, dim=1)).sum(1),
    }
    assert torch.allclose(head.loss(hidden, target), wanted[error], atol=1e-6)
    ((vectors, density),) = head.sample(hidden, [draw(slice(0, 2), slice(2, 4), 3.0)])
    assert density is None and torch.allclose(vectors, made[2:4] + 3.0 * (made[:2] - made[2:4]), atol=1e-5)
    mean, log_variance = head.transition(hidden, hidden)
    assert torch.equal(mean, made) and bool((log_variance == float("-inf")).all())


def test_gaussian_loss() -> None:
    head = built(GaussianHead(kl=0.3, layers=2))
    hidden, target = torch.randn(5, 6), torch.randn(5, DIM)
    mean, log_variance = head.parameters_of(hidden).chunk(2, dim=-1)
    deviation = (0.5 * log_variance).exp()
    torch.manual_seed(1)
    loss = head.loss(hidden, target)
    torch.manual_seed(1)
    z = mean + deviation * torch.randn(5, DIM)
    off = z + head.refine(z) - target
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(mean, deviation), normal(target, torch.ones(())))
    wanted = off.abs().mean(1) + off.square().mean(1) + 0.3 * divergence.sum(1)
    assert torch.allclose(loss, wanted, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(head.transition(hidden, hidden), (mean, log_variance), strict=True))


def test_gaussian_samples_have_its_mean_and_narrow_with_temperature() -> None:
    head = built(GaussianHead(layers=0))
    hidden = torch.randn(1, 6).expand(4000, -1)
    mean, log_variance = (row[0] for row in head.distribution(hidden))
    made = [head.sample(hidden, [draw(slice(0, 4000), temperature=t)])[0][0] for t in (1.0, 0.5, 0.0)]
    assert torch.allclose(made[0].mean(0), mean, atol=0.1)
    assert torch.allclose(made[0].std(0), (0.5 * log_variance).exp(), rtol=0.1)
    assert torch.allclose(made[1].std(0), 0.5 * made[0].std(0), rtol=0.1)
    assert torch.allclose(made[2], mean.expand(4000, -1))


@pytest.mark.parametrize("make", [RegressionHead, GaussianHead])
def test_between_two_modes_they_return_what_lies_between(make: Any) -> None:
    """The picture of their limit: data at +1 and −1, draws near 0 or as wide as the gap, never two clusters."""
    head = built(make())
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    hidden = torch.ones(256, 6)
    for _ in range(300):
        target = (torch.randint(2, (256, 1)) * 2.0 - 1).expand(-1, DIM)
        optimizer.zero_grad()
        head.loss(hidden, target).mean().backward()
        optimizer.step()
    made = head.sample(hidden, [draw(slice(0, 256))])[0][0]
    assert abs(float(made.mean())) < 0.3
    at_a_mode = ((made.abs() - 1).abs().mean(1) < 0.15).float().mean()
    assert float(at_a_mode) < 0.2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RegressionHead("huber"), "has error .huber., expected one of l1, l2, cosine"),  # type: ignore[arg-type]
        (lambda: RegressionHead(layers=0), "layers >= 1"),
        (lambda: GaussianHead(kl=-1.0), "kl >= 0"),
        (lambda: GaussianHead(layers=-1), "layers >= 0"),
    ],
)
def test_settings_that_cannot_be_used(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("make", [RegressionHead, GaussianHead])
def test_tokens_that_are_no_vectors_are_refused(make: Any) -> None:
    head: Head = make()
    with pytest.raises(ValueError, match="predicts vectors"):
        head.build(width=4, spec=Spec(kind="discrete", vocab_size=3))
    with pytest.raises(ValueError, match="must be discrete"):
        head.build(width=4, spec=Spec(kind="continuous", dim=3), controls=5)
