"""Processes and samplers: equal to diffusers and to MAR, right in distribution, refused where they can't work."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from mm.diffusion import Process, Sampler

GOLDEN = Path(__file__).parent / "golden" / "mar_diffusion.json"
PEER_NAMES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
PEER_BETAS = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled_linear": "scaled_linear"}


def network(x: Tensor, time: float) -> Tensor:
    """Something smooth that depends on both."""
    return torch.tanh(0.7 * x + 0.3 * math.sin(5.0 * time)) - 0.1 * x


def peer_settings(process: Process) -> dict[str, Any]:
    first, last = process.betas
    return {
        "num_train_timesteps": process.train_steps,
        "beta_schedule": PEER_BETAS[process.schedule],
        "beta_start": first,
        "beta_end": last,
        "prediction_type": PEER_NAMES[process.prediction],
    }


PAIRS = [
    Process(schedule=schedule, prediction=prediction, zero_terminal_snr=zero)
    for schedule in ("cosine", "linear", "scaled_linear")
    for prediction in ("epsilon", "x0", "v")
    for zero in (False, True)
    if not (zero and prediction == "epsilon")
]
NAMES = [f"{p.schedule}-{p.prediction}{'-zero' if p.zero_terminal_snr else ''}" for p in PAIRS]


def run_both(process: Process, sampler: Sampler, peer: Any, **step: Any) -> tuple[Tensor, Tensor]:
    """Both from the same noise with the same network; the peer's fresh noise is ours, and so is its table, which it makes in
    float32 (`test_levels_…` compares the tables)."""
    if hasattr(peer, "alphas_cumprod"):
        peer.alphas_cumprod = process.alphas_cumprod
    plan = sampler.plan(process)
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(plan.draws, 5, 3, generator=rng, dtype=torch.float64)
    steps = (plan.network_time if process.schedule != "flow" else plan.time).tolist()
    mine = plan.run(lambda x, k: network(x, steps[k] / process.train_steps), noise)
    x, given = noise[0], iter(noise[1:])
    assert [float(t) for t in peer.timesteps] == pytest.approx(
        (plan.network_time if process.schedule != "flow" else plan.time * 1000).tolist(), abs=1e-3
    )
    for t, value in zip(peer.timesteps, steps, strict=True):
        y = network(x, value / process.train_steps)
        with pytest.MonkeyPatch.context() as patch:
            for module in ("ddpm", "ddim"):
                patch.setattr(
                    f"diffusers.schedulers.scheduling_{module}.randn_tensor",
                    lambda *a, **k: next(given, torch.zeros(())),
                )
            x = peer.step(y, t, x, return_dict=False, **step)[0]
    return mine, x


@pytest.mark.parametrize("process", PAIRS, ids=NAMES)
def test_levels_and_targets_are_those_of_diffusers(process: Process) -> None:
    peer = diffusers.DDIMScheduler(**peer_settings(process), rescale_betas_zero_snr=process.zero_terminal_snr)
    x0, noise = torch.randn(2, 7, 4)
    step = torch.tensor([0, 1, 10, 250, 500, 998, 999])
    t = (step + 1) / process.train_steps
    assert torch.allclose(process.corrupt(x0, noise, t), peer.add_noise(x0, noise, step), atol=1e-5)
    assert process.network_time(t).round().long().tolist() == step.tolist()
    if process.prediction == "v":
        # the peer works out its tables in float32: 1 - a² near the data has few digits left
        assert torch.allclose(process.target(x0, noise, t), peer.get_velocity(x0, noise, step), atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("process", PAIRS, ids=NAMES)
def test_ddim(process: Process, eta: float, spacing: Any) -> None:
    peer = diffusers.DDIMScheduler(
        **peer_settings(process), rescale_betas_zero_snr=process.zero_terminal_snr, clip_sample=False,
        timestep_spacing=spacing,
    )  # fmt: skip
    peer.set_timesteps(100)
    mine, theirs = run_both(process, Sampler(solver="ddim", steps=100, eta=eta, spacing=spacing), peer, eta=eta)
    assert torch.allclose(mine, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("process", PAIRS, ids=NAMES)
def test_ddpm(process: Process, spacing: Any) -> None:
    peer = diffusers.DDPMScheduler(
        **peer_settings(process), rescale_betas_zero_snr=process.zero_terminal_snr, clip_sample=False,
        timestep_spacing=spacing,
    )  # fmt: skip
    peer.set_timesteps(100)
    mine, theirs = run_both(process, Sampler(solver="ddpm", steps=100, spacing=spacing), peer)
    assert torch.allclose(mine, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize(
    "process", [p for p in PAIRS if not p.zero_terminal_snr], ids=lambda p: f"{p.schedule}-{p.prediction}"
)
def test_dpm(process: Process, spacing: Any, steps: int) -> None:
    peer = diffusers.DPMSolverMultistepScheduler(**peer_settings(process), timestep_spacing=spacing)
    peer.set_timesteps(steps)
    mine, theirs = run_both(process, Sampler(solver="dpm++", steps=steps, spacing=spacing), peer)
    assert torch.allclose(mine, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 20, 100])
def test_euler(shift: float, steps: int) -> None:
    process = Process(shift=shift)
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    mine, theirs = run_both(process, Sampler(solver="euler", steps=steps), peer)
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_on_the_flow_schedule_ddim_is_euler() -> None:
    noise = torch.randn(1, 5, 3)
    a, b = (
        Sampler(solver=solver, steps=9).plan(Process(shift=2.0)).run(lambda x, k: network(x, k / 9), noise)
        for solver in ("ddim", "euler")
    )
    assert torch.allclose(a, b, atol=1e-6)


# --- MAR ------------------------------------------------------------------------------------------------------------


def test_tables_are_those_of_mar() -> None:
    """Coefficients of 100 respaced steps of its cosine schedule, and one whole chain with a predicted variance. The file says
    how it was made."""
    golden = json.loads(GOLDEN.read_text())
    process, sampler = (
        Process(schedule="cosine", prediction="epsilon"),
        Sampler(solver="ddpm", steps=100, spacing="linspace"),
    )
    assert np.allclose(process.alphas_cumprod[golden["at"]], golden["alphas_cumprod"], rtol=1e-6)
    plan = sampler.plan(process)
    assert plan.network_time.round().long().tolist() == golden["timestep_map"][::-1]
    for k, step in enumerate(plan.steps):
        n = 99 - k
        c1, c2 = golden["posterior_mean_coef1"][n], golden["posterior_mean_coef2"][n]
        r, m = golden["sqrt_recip_alphas_cumprod"][n], golden["sqrt_recipm1_alphas_cumprod"][n]
        assert step.x == pytest.approx(c1 * r + c2, rel=1e-6)
        assert step.y == pytest.approx(-c1 * m, rel=1e-6)
        if n:
            assert math.log(step.small) == pytest.approx(golden["posterior_log_variance_clipped"][n], rel=1e-6)
            assert math.log(step.large) == pytest.approx(math.log(golden["betas"][n]), rel=1e-6)
    noise = torch.tensor(golden["noise"])
    weight = torch.tensor(golden["weight"])

    def predict(x: Tensor, k: int) -> Tensor:
        return torch.tanh(torch.cat((x, plan.network_time[k].expand(len(x), 1) / 1000), -1) @ weight)

    made = plan.run(predict, torch.cat((noise[:1], 0.9 * noise[1:])))  # temperature 0.9
    assert torch.allclose(made, torch.tensor(golden["sample"]), atol=1e-4)


# --- in distribution ------------------------------------------------------------------------------------------------

GAUSS = (1.5, 0.4)
"""Mean and deviation of the data: the best prediction is known in closed form."""


def best(process: Process, plan_times: Tensor) -> Callable[[Tensor, int], Tensor]:
    mean, deviation = GAUSS

    def predict(x: Tensor, k: int) -> Tensor:
        a, s = (float(level) for level in process.levels(plan_times[k]))
        total = a * a * deviation**2 + s * s
        x0 = mean + a * deviation**2 / total * (x - a * mean)
        noise = s / total * (x - a * mean)
        return process.target(x0, noise, plan_times[k].expand(len(x)))

    return predict


SAMPLERS = [
    (Process(), Sampler(solver="euler", steps=50)),
    (Process(shift=3.0), Sampler(solver="sde", steps=200)),
    (Process(prediction="v"), Sampler(solver="ddim", steps=200, eta=1.0)),
    (Process(prediction="x0"), Sampler(solver="ddpm", steps=200)),
    (Process(), Sampler(solver="dpm++", steps=20)),
    (Process(schedule="cosine", prediction="v"), Sampler(solver="ddim", steps=100)),
    (Process(schedule="cosine", prediction="epsilon"), Sampler(solver="ddpm", steps=200)),
    (Process(schedule="linear", prediction="x0", zero_terminal_snr=True), Sampler(solver="dpm++", steps=60)),
    (Process(schedule="linear", prediction="flow"), Sampler(solver="ddim", steps=100)),
]


@pytest.mark.parametrize(("process", "sampler"), SAMPLERS, ids=lambda value: getattr(value, "solver", ""))
def test_every_sampler_gives_the_data(process: Process, sampler: Sampler) -> None:
    plan = sampler.plan(process)
    noise = torch.randn(plan.draws, 4000, 1, generator=torch.Generator().manual_seed(0))
    made = plan.run(best(process, plan.time), noise)
    assert float(made.mean()) == pytest.approx(GAUSS[0], abs=0.03)
    assert float(made.std()) == pytest.approx(GAUSS[1], rel=0.06)


@pytest.mark.parametrize(("process", "sampler"), SAMPLERS, ids=lambda value: getattr(value, "solver", ""))
def test_temperature_narrows(process: Process, sampler: Sampler) -> None:
    plan = sampler.plan(process)
    spread = []
    for temperature in (0.3, 0.6, 1.0):
        noise = plan.noise(2000, 1, torch.Generator().manual_seed(0), temperature)
        spread.append(float(plan.run(best(process, plan.time), noise).std()))
    assert spread[0] < spread[1] < spread[2]


def test_v_is_the_safe_prediction_in_bfloat16() -> None:
    """MMAR's claim: with the prediction rounded to bfloat16, 100 steps of DDIM lose far less with v than with ε."""
    error = {}
    for prediction in ("epsilon", "v", "x0"):
        process = Process(schedule="cosine", prediction=prediction)
        plan = Sampler(solver="ddim", steps=100).plan(process)
        exact = best(process, plan.time.double())
        noise = torch.randn(1, 2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def rounded(x: Tensor, k: int, exact: Callable[[Tensor, int], Tensor] = exact) -> Tensor:
            return exact(x, k).bfloat16().double()

        error[prediction] = float((plan.run(rounded, noise) - plan.run(exact, noise)).square().mean().sqrt())
    assert error["epsilon"] > 10 * error["v"] and error["x0"] > error["v"]


# --- training -------------------------------------------------------------------------------------------------------


def test_training_times() -> None:
    rng = torch.Generator().manual_seed(0)
    steps = Process(schedule="cosine", prediction="v", train_steps=8).draw_time(4000, rng)
    assert set((steps * 8).tolist()) == {1, 2, 3, 4, 5, 6, 7, 8}
    uniform, normal = Process().draw_time(4000, rng), Process(training_time="logit_normal").draw_time(4000, rng)
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert float(normal.logit().std()) == pytest.approx(1.0, abs=0.05)
    assert float(Process(shift=3.0).draw_time(4000, rng).mean()) > 0.6
    assert 0 <= float(uniform.min()) and float(uniform.max()) <= 1


@pytest.mark.parametrize("process", [*PAIRS, Process(), Process(prediction="v"), Process(prediction="x0")])
def test_split_undoes_the_mixture(process: Process) -> None:
    x0, noise = torch.randn(2, 6, 3, dtype=torch.float64)
    for t in (0.001, 0.5, 0.9):
        a, s = (float(level) for level in process.levels(torch.tensor(t)))
        time = torch.full((6,), t)
        x, y = process.corrupt(x0, noise, time), process.target(x0, noise, time)
        for truth, (of_x, of_y) in zip((x0, noise), process.split(a, s), strict=True):
            assert torch.allclose(of_x * x + of_y * y, truth, atol=1e-5 / min(a, s))


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prediction": "epsilon"}, "says nothing of the data"),
        ({"schedule": "linear", "prediction": "epsilon", "zero_terminal_snr": True}, "zero terminal SNR"),
        ({"zero_terminal_snr": True}, "leave zero_terminal_snr out"),
        ({"schedule": "cosine", "prediction": "v", "shift": 2.0}, "belong to the flow schedule"),
        ({"schedule": "cosine", "prediction": "v", "training_time": "logit_normal"}, "belong to the flow schedule"),
        ({"schedule": "sigmoid"}, "schedule must be"),
        ({"prediction": "noise"}, "prediction must be"),
        ({"train_steps": 1}, "train_steps"),
        ({"schedule": "linear", "prediction": "v", "beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
        ({"shift": 0.0}, "shift must be"),
        ({"shift": float("nan")}, "shift must be"),
    ],
)
def test_processes_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Process(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps >= 1"),
        ({"solver": "heun"}, "solver must be"),
        ({"spacing": "karras"}, "spacing must be"),
        ({"solver": "ddim", "eta": 2.0}, "eta must lie"),
        ({"eta": 0.5}, "belongs to the solver ddim"),
        ({"last_step": 1.0}, "last_step"),
    ],
)
def test_samplers_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampler(**settings)


def test_pairs_that_cannot_work_are_refused() -> None:
    cosine = Process(schedule="cosine", prediction="v")
    for solver in ("euler", "sde"):
        with pytest.raises(ValueError, match="integrates the velocity"):
            Sampler(solver=solver).plan(cosine)
    with pytest.raises(ValueError, match="more than the 1000"):
        Sampler(solver="ddim", steps=1001).plan(cosine)
    with pytest.raises(ValueError, match="at least 2 steps"):
        Sampler(solver="sde", steps=1).plan(Process())
