"""The language-model head: loss, sub-codes, and sampling against slow references and statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm.heads.lm import LMHead, sample_logits, truncate
from mm.interfaces import Draw, Sampling, Spec

CHI_SQUARE_999 = {3: 16.27, 5: 20.52, 7: 24.32, 8: 26.12}  # 99.9 % quantiles by degrees of freedom


def head(spec: Spec, controls: int = 0, **options: float | bool) -> LMHead:
    torch.manual_seed(0)
    made = LMHead(**options)  # type: ignore[arg-type]
    made.build(width=12, spec=spec, controls=controls)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5)
    return made


DISCRETE = Spec(kind="discrete", vocab_size=9)


def chi_square(draws: Tensor, probability: Tensor) -> float:
    """Pearson's statistic of draws against a distribution (ids of probability 0 must not occur)."""
    counts = torch.bincount(draws, minlength=len(probability)).double()
    possible = probability > 0
    assert not counts[~possible].any()
    wanted = probability[possible].double() * len(draws)
    return float(((counts[possible] - wanted).square() / wanted).sum())


# --- loss -----------------------------------------------------------------------------------------------------------


def test_loss_is_cross_entropy() -> None:
    made, hidden, target = head(DISCRETE, controls=3), torch.randn(7, 12), torch.randint(0, 12, (7,))
    assert made.logits(hidden).shape == (7, 12)
    wanted = F.cross_entropy(hidden @ made.weight.T, target, reduction="none")
    torch.testing.assert_close(made.loss(hidden, target), wanted)
    one = head(Spec(kind="codes", vocab_size=12, num_codes=1))  # one sub-code is a plain id
    wanted = F.cross_entropy(hidden @ one.weight.T, target, reduction="none")
    torch.testing.assert_close(one.loss(hidden, target[:, None]), wanted)


def test_label_smoothing_z_loss_and_bias() -> None:
    hidden, target = torch.randn(5, 12), torch.randint(0, 9, (5,))
    made = head(DISCRETE, z_loss=0.1, label_smoothing=0.2, bias=True)
    logits = hidden @ made.weight.T + made.bias
    log_p = logits.log_softmax(-1)
    wanted = -0.8 * log_p.gather(-1, target[:, None])[:, 0] - 0.2 * log_p.mean(-1)
    torch.testing.assert_close(made.loss(hidden, target), wanted + 0.1 * logits.logsumexp(-1).square())


def test_sub_codes_are_a_distribution_over_their_product() -> None:
    """Every tuple of sub-codes is one joint code (ELM): their probabilities, exp(−K·loss), sum to 1."""
    made, hidden = head(Spec(kind="codes", vocab_size=3, num_codes=4)), torch.randn(1, 12)
    tuples = torch.tensor(list(itertools.product(range(3), repeat=4)))
    loss = made.loss(hidden.expand(81, -1), tuples)
    assert len(tuples.unique(dim=0)) == 81
    assert torch.exp(-4 * loss).sum().item() == pytest.approx(1.0, abs=1e-5)


def test_invalid_sub_codes_count_nothing() -> None:
    made, hidden = head(Spec(kind="codes", vocab_size=5, num_codes=3), z_loss=0.05), torch.randn(4, 12)
    target = torch.tensor([[0, 1, 2], [4, -1, 3], [-1, -1, 0], [-1, -1, -1]])
    logits = made.logits(hidden)
    assert logits.shape == (4, 3, 5)
    wanted = []
    for row, codes in zip(logits, target.tolist(), strict=True):
        terms = [0.05 * r.logsumexp(-1) ** 2 - r.log_softmax(-1)[c] for r, c in zip(row, codes, strict=True) if c >= 0]
        wanted.append(torch.stack(terms).mean() if terms else torch.zeros(()))
    loss = made.loss(hidden, target)
    torch.testing.assert_close(loss, torch.stack(wanted))
    loss.sum().backward()
    assert made.weight.grad is not None
    per_code = made.weight.grad.view(3, 5, 12).abs().sum((1, 2))
    only = made.loss(hidden[2:3], target[2:3]).sum()
    made.zero_grad()
    only.backward()
    assert per_code.all() and made.weight.grad.view(3, 5, 12).abs().sum((1, 2)).bool().tolist() == [False, False, True]


def test_what_the_head_cannot_predict_is_refused() -> None:
    with pytest.raises(ValueError, match="this tokenizer is continuous"):
        LMHead().build(width=4, spec=Spec(kind="continuous", dim=3))
    with pytest.raises(ValueError, match="host modality must be discrete"):
        LMHead().build(width=4, spec=Spec(kind="codes", vocab_size=3, num_codes=2), controls=5)


# --- truncation -----------------------------------------------------------------------------------------------------


def slow_truncate(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """Ids kept, by the definition: the k likeliest; of those the fewest whose share of the probability reaches p."""
    ranked = sorted(range(len(logits)), key=lambda n: -logits[n])
    if top_k:
        ranked = ranked[:top_k]
    total, mass, kept = sum(math.exp(logits[n]) for n in ranked), 0.0, set()
    for n in ranked:
        if kept and top_p < 1 and mass >= top_p:
            break
        kept.add(n)
        mass += math.exp(logits[n]) / total
    return kept


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(0, 14), st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]))
@settings(max_examples=60)
def test_truncation_equals_the_slow_reference(seed: int, size: int, top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cut = truncate(logits, top_k, top_p)
    for row, original in zip(cut, logits, strict=True):
        kept = slow_truncate(original.tolist(), top_k, top_p)
        assert set((row > float("-inf")).nonzero()[:, 0].tolist()) == kept
        assert all(row[n] == original[n] for n in kept)


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(temperature=2.0), Sampling(top_k=6), Sampling(top_p=0.9)],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    logits, count = torch.tensor([1.0, 0.3, -0.5, 2.0, 0.0, -1.5, 1.5, 0.7, -2.0]), 20_000
    rng = torch.Generator().manual_seed(5)
    draws, log_prob = sample_logits(logits.expand(count, -1), sampling, rng)
    wanted = truncate(logits[None] / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)[0]
    freedom = int((wanted > 0).sum()) - 1
    assert chi_square(draws, wanted) < CHI_SQUARE_999.get(freedom, 26.12)
    torch.testing.assert_close(log_prob, logits.log_softmax(-1)[draws])  # at temperature 1, untruncated


def test_temperature_zero_is_the_likeliest() -> None:
    logits = torch.randn(50, 9)
    draws, log_prob = sample_logits(logits, Sampling(temperature=0), torch.Generator())
    assert torch.equal(draws, logits.argmax(-1))
    torch.testing.assert_close(log_prob, logits.log_softmax(-1).amax(-1))


def test_sub_codes_are_drawn_independently_and_their_log_probabilities_add_up() -> None:
    logits = torch.randn(3, 4).expand(20_000, 3, 4)
    draws, log_prob = sample_logits(logits, Sampling(), torch.Generator().manual_seed(1))
    assert draws.shape == (20_000, 3) and log_prob.shape == (20_000,)
    for code in range(3):
        assert chi_square(draws[:, code], logits[0, code].softmax(-1)) < CHI_SQUARE_999[3]
    joint = draws[:, 0] * 4 + draws[:, 1]
    product = (logits[0, 0].softmax(-1)[:, None] * logits[0, 1].softmax(-1)).flatten()
    assert chi_square(joint, product) < 37.7  # 15 degrees of freedom
    wanted = logits.log_softmax(-1).gather(-1, draws[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(log_prob, wanted)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_forbidden_ids_are_never_drawn(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when the uniform number is the smallest or largest there is, or what is allowed all but impossible."""
    bias = torch.tensor([float("-inf"), 0, 0, float("-inf"), 0, float("-inf")])
    logits = torch.tensor([[9.0, -80, 3, 50, -90, 99], [9.0, -95, -95, 50, -95, 99]]) + bias
    free, _ = sample_logits(logits.repeat(500, 1), Sampling(), torch.Generator().manual_seed(0))
    assert set(free.tolist()) <= {1, 2, 4}
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, uniform, dtype=torch.float64))
    for sampling in (Sampling(), Sampling(top_k=2), Sampling(top_k=5, top_p=0.5), Sampling(temperature=0.01)):
        draws, log_prob = sample_logits(logits, sampling, torch.Generator())
        assert set(draws.tolist()) <= {1, 2, 4} and bool(log_prob.isfinite().all())


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    made, hidden = head(DISCRETE), torch.randn(40, 12)

    def draw(start: int, end: int, seed: int) -> Draw:
        return Draw(rows=slice(start, end), sampling=Sampling(), generator=torch.Generator().manual_seed(seed))

    together = made.sample(hidden, [draw(0, 10, 1), draw(10, 11, 2), draw(11, 40, 3)])
    for (tokens, log_prob), (start, end, seed) in zip(together, [(0, 10, 1), (10, 11, 2), (11, 40, 3)], strict=True):
        (alone,) = made.sample(hidden[start:end], [draw(0, end - start, seed)])
        assert torch.equal(tokens, alone[0]) and tokens.shape == (end - start,)
        assert log_prob is not None and alone[1] is not None
        torch.testing.assert_close(log_prob, alone[1])
    again = made.sample(hidden, [draw(11, 40, 3)])
    other = made.sample(hidden, [draw(11, 40, 4)])
    assert torch.equal(again[0][0], together[2][0]) and not torch.equal(other[0][0], again[0][0])


def test_guidance_and_bias_shape_the_distribution() -> None:
    made, pair = head(DISCRETE), torch.randn(2, 12)
    bias = torch.zeros(9)
    bias[4] = float("-inf")
    count = 20_000
    hidden = torch.cat((pair[:1].expand(count, -1), pair[1:].expand(count, -1)))
    one = Draw(
        rows=slice(0, count),
        unconditional=slice(count, 2 * count),
        scale=1.7,
        bias=bias,
        sampling=Sampling(),
        generator=torch.Generator().manual_seed(0),
    )
    ((draws, log_prob),) = made.sample(hidden, [one])
    conditional, free = made.logits(pair)
    mixed = free + 1.7 * (conditional - free) + bias
    assert chi_square(draws, mixed.softmax(-1).detach()) < CHI_SQUARE_999[7]
    assert log_prob is not None
    torch.testing.assert_close(log_prob, mixed.log_softmax(-1)[draws])


def test_one_sub_code_keeps_its_axis() -> None:
    made = head(Spec(kind="codes", vocab_size=5, num_codes=1))
    one = Draw(rows=slice(0, 3), sampling=Sampling(), generator=torch.Generator())
    ((tokens, log_prob),) = made.sample(torch.randn(3, 12), [one])
    assert tokens.shape == (3, 1) and log_prob is not None and log_prob.shape == (3,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0, got -1.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
        ({"top_k": -1}, "top_k.* must be"),
        ({"steps": -1}, "got 0, -1 and 0"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval must satisfy"),
    ],
)
def test_impossible_sampling_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
