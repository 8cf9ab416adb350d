"""The diffusion head: equal to MAR's and NextStep-1's on their weights, guided, batched, learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.denoiser import AHEAD, Denoiser
from mm.diffusion import Process, Sampler
from mm.heads.diffusion import DiffusionHead
from mm.interfaces import Draw, Sampling, Spec
from mm.interop.denoiser import load_mlp_adaln

GOLDEN = json.loads((Path(__file__).parent / "golden" / "diffusion_heads.json").read_text())
X, CONDITION, FREE, NOISE = (torch.tensor(GOLDEN[name]) for name in ("x", "condition", "free", "noise"))
DIM, WIDTH, BLOCKS = 3, 16, 2


def filled(names: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights that the golden file was made with; it says how."""
    out = {}
    for number, (name, shape) in enumerate(sorted(names.items())):
        count = torch.Size(shape).numel()
        values = (torch.arange(count, dtype=torch.float64) * (0.61 + 0.013 * number) + number).sin() * 0.3
        out[name] = values.float().view(shape)
    return out


def random_head(seed: int = 0, dim: int = DIM, width: int = 8, **settings: Any) -> DiffusionHead:
    """A head whose every weight matters: those that start at zero are random too."""
    torch.manual_seed(seed)
    head = DiffusionHead(**{"width": WIDTH, "blocks": BLOCKS, **settings})
    head.build(width=width, spec=Spec(kind="continuous", dim=dim))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head


def draw(
    rows: slice, seed: int = 0, *, unconditional: slice | None = None, scale: float = 1.0, **sampling: Any
) -> Draw:
    rng = torch.Generator().manual_seed(seed)
    return Draw(rows=rows, sampling=Sampling(**sampling), generator=rng, unconditional=unconditional, scale=scale)


# --- other projects' weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("project", "out"), [("mar", 2 * DIM), ("nextstep", DIM)])
def test_the_network_is_theirs(project: str, out: int) -> None:
    golden = GOLDEN[project]
    net = load_mlp_adaln(Denoiser(DIM, CONDITION.shape[1], WIDTH, BLOCKS, out), filled(golden["names"]))
    time, wanted = torch.tensor(golden["time"], dtype=torch.float32), torch.tensor(golden["forward"])
    assert torch.allclose(net(X, time, CONDITION), wanted, atol=1e-5)
    step = net.steps(CONDITION, time)
    for k in range(len(time)):
        assert torch.allclose(step(X, k)[k], wanted[k], atol=1e-5)


def test_sampling_with_guidance_is_that_of_mar() -> None:
    golden = GOLDEN["mar"]
    net = load_mlp_adaln(Denoiser(DIM, CONDITION.shape[1], WIDTH, BLOCKS, 2 * DIM), filled(golden["names"]))
    head = DiffusionHead(
        Process(schedule="cosine", prediction="epsilon"), Sampler(solver="ddpm", steps=20, spacing="linspace"),
        learned_variance=True,
    )  # fmt: skip
    head.net, head.dim = net, DIM
    plan = head.plan()
    noise = torch.cat((NOISE[:1], 0.9 * NOISE[1:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(plan), "noise", lambda *a, **k: noise)
        guided = draw(slice(0, 4), unconditional=slice(4, 8), scale=3.0)
        ((made, _),) = head.sample(torch.cat((CONDITION, FREE)), [guided])
    assert torch.allclose(made, torch.tensor(golden["sample"]), rtol=1e-4, atol=1e-4)


def test_sampling_with_guidance_is_that_of_nextstep() -> None:
    """Its time runs the other way: τ = 1 − t, and its velocity is ours with the sign turned."""
    golden = GOLDEN["nextstep"]
    net = load_mlp_adaln(Denoiser(DIM, CONDITION.shape[1], WIDTH, BLOCKS), filled(golden["names"]))
    plan = Sampler(solver="sde", steps=20).plan(Process())
    step = net.steps(torch.cat((CONDITION, FREE)), 1 - plan.time)

    def predict(x: Tensor, k: int) -> Tensor:
        given, free = step(torch.cat((x, x)), k).chunk(2)
        return -(free + 2.0 * (given - free))

    made = plan.run(predict, NOISE)
    assert torch.allclose(made, torch.tensor(golden["sample"]), rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit_are_refused() -> None:
    state = filled(GOLDEN["nextstep"]["names"])
    with pytest.raises(ValueError, match="those of 2 blocks, the denoiser has 3"):
        load_mlp_adaln(Denoiser(DIM, CONDITION.shape[1], WIDTH, 3), state)
    with pytest.raises(ValueError, match="has shape"):
        load_mlp_adaln(Denoiser(DIM, CONDITION.shape[1], WIDTH, 2, 2 * DIM), state)
    with pytest.raises(ValueError, match="no weight of a SimpleMLPAdaLN"):
        load_mlp_adaln(Denoiser(DIM, CONDITION.shape[1], WIDTH, 2), {**state, "other.weight": torch.ones(1)})


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, AHEAD])
def test_few_and_many_rows_are_sampled_alike(rows: int) -> None:
    """Few rows get their modulations beforehand, many step by step; both are the network as it is trained."""
    head = random_head()
    plan = head.plan()
    hidden, x = torch.randn(rows, 8), torch.randn(rows, DIM)
    step = head.net.steps(hidden, plan.network_time)
    for k in (0, 4, 9):
        wanted = head.net(x, plan.network_time[k].expand(rows), hidden)
        assert torch.allclose(step(x.clone(), k), wanted, atol=1e-5)


def test_batched_is_one_by_one_with_guidance_on_and_off() -> None:
    head = random_head()
    hidden = torch.randn(6, 8)

    def draws(first: int = 0) -> list[Draw]:
        return [
            draw(slice(0, 2), 1, unconditional=slice(2, 4), scale=2.5),
            draw(slice(4, 5), 2, temperature=0.5),
            draw(slice(5, 6), 3, denoising_steps=4),
        ]

    together = head.sample(hidden, draws())
    for number, (made, density) in enumerate(together):
        ((alone, _),) = head.sample(hidden, [draws()[number]])
        assert density is None and made.shape[1] == DIM
        assert torch.allclose(made, alone, atol=1e-5)


def test_guidance_of_one_is_no_guidance_bit_for_bit() -> None:
    head, hidden = random_head(), torch.randn(4, 8)
    calls: list[int] = []
    steps = head.net.steps

    def counted(condition: Tensor, times: Tensor) -> Any:
        calls.append(len(condition))
        return steps(condition, times)

    head.net.steps = counted  # type: ignore[method-assign]
    plain = head.sample(hidden, [draw(slice(0, 2))])[0][0]
    guided = head.sample(hidden, [draw(slice(0, 2), unconditional=slice(2, 4), scale=1.0)])[0][0]
    assert torch.equal(plain, guided) and calls == [2, 2]
    other = head.sample(hidden, [draw(slice(0, 2), unconditional=slice(2, 4), scale=2.0)])[0][0]
    assert not torch.allclose(plain, other, atol=1e-3) and calls[-1] == 4


@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_temperature_narrows_the_samples(solver: Any) -> None:
    head = random_head(sampler={"solver": solver, "steps": 20})
    hidden = torch.randn(1, 8).expand(500, -1)
    spread = [
        float(head.sample(hidden, [draw(slice(0, 500), temperature=t)])[0][0].std(0).mean()) for t in (0.2, 0.6, 1.0)
    ]
    assert spread[0] < spread[1] < spread[2]


def test_transition_is_a_step_of_the_sampler() -> None:
    head = random_head(sampler={"solver": "sde", "steps": 5})
    plan, hidden = head.plan(), torch.randn(2, 8)
    noise = plan.noise(2, DIM, torch.Generator().manual_seed(0))
    x = noise[0]
    for k in range(5):
        mean, log_variance = head.transition(hidden, x, k)
        x = mean + (0.5 * log_variance).exp() * (noise[k + 1] if k < 4 else 0.0)
    assert bool((log_variance == float("-inf")).all())
    assert torch.allclose(x, plan.run(head.net.steps(hidden, plan.network_time), noise), atol=1e-5)
    with pytest.raises(ValueError, match="no transition of its own"):
        random_head(sampler={"solver": "dpm++", "steps": 5}).transition(hidden, x, 2)


# --- training -------------------------------------------------------------------------------------------------------


def test_loss_is_its_definition_and_stays_in_float32() -> None:
    head = random_head(
        process={"schedule": "cosine", "prediction": "v"}, sampler={"solver": "ddim"}, batch_multiplier=3
    )
    hidden, target = torch.randn(5, 8), torch.randn(5, DIM)
    torch.manual_seed(7)
    loss = head.loss(hidden, target)
    torch.manual_seed(7)
    t = head.process.draw_time(15)
    noise = torch.randn(15, DIM)
    x0 = target.repeat(3, 1)
    made = head.net(head.process.corrupt(x0, noise, t), head.process.network_time(t), hidden.repeat(3, 1))
    wanted = (made - head.process.target(x0, noise, t)).square().mean(1).view(3, 5).mean(0)
    assert torch.allclose(loss, wanted, atol=1e-5)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.loss(hidden, target), loss)


def test_it_learns_two_modes_where_a_mean_would_fail() -> None:
    """Energy distance to new data at most twice that between two real sets; the mean of the data fails by far."""
    torch.manual_seed(0)

    def data(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        side = torch.randint(2, (count, 1), generator=rng) * 2.0 - 1
        condition = torch.rand(count, 2, generator=rng) * 2 - 1
        return condition, condition * 0.5 + side * torch.tensor([1.0, -0.5]) + 0.1 * torch.randn(
            count, 2, generator=rng
        )

    rng = torch.Generator().manual_seed(0)
    head = DiffusionHead(width=64, blocks=2, sampler={"solver": "dpm++", "steps": 10})
    head.build(width=2, spec=Spec(kind="continuous", dim=2))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 600)
        condition, vectors = data(256, rng)
        optimizer.zero_grad()
        head.loss(condition, vectors).mean().backward()
        optimizer.step()
    condition, real = data(1500, rng)
    made = head.sample(condition, [draw(slice(0, 1500))])[0][0]
    joint, joint_made = torch.cat((condition, real), 1), torch.cat((condition, made), 1)
    other = torch.cat(data(1500, rng), 1)
    floor, ours = energy(joint, other), energy(joint_made, other)
    mean = energy(torch.cat((condition, condition * 0.5), 1), other)
    assert ours < 2 * max(floor, 2e-3) and mean > 10 * max(floor, 2e-3)


def energy(a: Tensor, b: Tensor) -> float:
    """Energy distance (Székely and Rizzo 2013) of two sets."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"process": {"prediction": "epsilon"}}, "says nothing of the data"),
        ({"process": {"schedule": "cosine", "prediction": "v"}}, "integrates the velocity"),
        ({"sampler": {"steps": 0}}, "steps >= 1"),
        ({"blocks": 0}, "blocks >= 1"),
        ({"batch_multiplier": 0}, "batch_multiplier >= 1"),
        ({"learned_variance": True}, "belongs to the solver ddpm"),
    ],
)
def test_heads_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DiffusionHead(**settings)


def test_tokens_that_are_no_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="predicts vectors, but this tokenizer is discrete"):
        DiffusionHead().build(width=8, spec=Spec(kind="discrete", vocab_size=4))
    with pytest.raises(ValueError, match="host modality must be discrete"):
        DiffusionHead().build(width=8, spec=Spec(kind="continuous", dim=4), controls=3)
