"""Diffusion: how data become noise (a process), and how noise becomes data (a plan of steps).

One convention everywhere: time t runs from 0 (data) to 1 (noise), and x_t = a(t)·x0 + s(t)·ε. A network predicts some
mixture y = p·x0 + q·ε; from x_t and y both x0 and ε follow by a 2×2 system, so that every schedule goes with every
prediction and every sampler, except where the system has no solution; those pairs are refused when they are named.

A sampler is a table: step k makes x ← A_k·x + B_k·y + C_k·(the clean estimate of the step before) + D_k·noise. The
numbers are worked out once, in float64; a step costs as many operations as the line says.

The published conventions are special cases: DDPM's step n of N is t = (n + 1)/N; rectified flow from noise to data (τ = 0
noise: NextStep-1, Show-o2, JanusFlow) is t = 1 − τ with the velocity's sign turned.

Letters in shapes: K steps, n rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mm.diffusion_plan import Plan, Step, combine

Schedule = Literal["cosine", "linear", "scaled_linear", "flow"]
Prediction = Literal["epsilon", "x0", "v", "flow"]
Solver = Literal["ddpm", "ddim", "dpm++", "euler", "sde"]
Spacing = Literal["linspace", "leading", "trailing"]

TIME = "denoising_time"
"""Name of what tells a backbone without AdaLN the times of its noisy positions (`TokenStream.inject`)."""
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
"""First and last β (Ho et al. 2020; Rombach et al. 2022)."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """From data to noise, and what a network predicts of it.

    Raises `ValueError` on construction for values outside their range and for pairs that can't work.
    """

    schedule: Schedule = "flow"
    """`flow`: x_t = (1 − t)·x0 + t·ε (Liu et al. 2022). The others are DDPM's with a² + s² = 1 in `train_steps` steps."""
    prediction: Prediction = "flow"
    """`epsilon`: ε; `x0`; `v`: a·ε − s·x0 (Salimans and Ho 2022); `flow`: ε − x0."""
    train_steps: int = 1000
    """Steps of DDPM's schedules; `flow` is continuous."""
    beta_start: float = 0.0
    """First β of `linear` and `scaled_linear`; 0 = the usual one."""
    beta_end: float = 0.0
    """Last β; 0 = the usual one."""
    zero_terminal_snr: bool = False
    """Rescale DDPM's schedule so that nothing of the data is left at t = 1 (Lin et al. 2023, algorithm 1)."""
    training_time: Literal["uniform", "logit_normal"] = "uniform"
    """How t is drawn in training; `logit_normal` (Esser et al. 2024, section 3.1) is for `flow`."""
    shift: float = 1.0
    """t → shift·t / (1 + (shift − 1)·t) in training and sampling of `flow`: above 1, more time is spent in the noise."""

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "linear", "scaled_linear", "flow"):
            raise ValueError(f"schedule must be cosine, linear, scaled_linear or flow, got {self.schedule!r}")
        if self.prediction not in ("epsilon", "x0", "v", "flow"):
            raise ValueError(f"prediction must be epsilon, x0, v or flow, got {self.prediction!r}")
        if self.train_steps < 2:
            raise ValueError(f"train_steps must be at least 2, got {self.train_steps}")
        first, last = self.betas
        if not 0 < first <= last < 1:
            raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {first} and {last}")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift must be a number above 0, got {self.shift}")
        if self.prediction == "epsilon" and (self.schedule == "flow" or self.zero_terminal_snr):
            which = "the flow schedule" if self.schedule == "flow" else "zero terminal SNR"
            raise ValueError(
                f"with {which} x at t = 1 is nothing but ε, so that a prediction of ε says nothing of the data there; "
                "predict v, x0 or flow"
            )
        if self.schedule == "flow" and self.zero_terminal_snr:
            raise ValueError("the flow schedule ends in pure noise by itself; leave zero_terminal_snr out")
        if self.schedule != "flow" and (self.training_time != "uniform" or self.shift != 1.0):
            raise ValueError(
                f"training_time and shift belong to the flow schedule; {self.schedule} has uniform steps and no shift"
            )

    @property
    def betas(self) -> tuple[float, float]:
        first, last = BETAS.get(self.schedule, (1e-4, 0.02))
        return self.beta_start or first, self.beta_end or last

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, " N"]:
        """a² at each of DDPM's steps, float64."""
        steps = self.train_steps
        if self.schedule == "cosine":  # Nichol and Dhariwal 2021, equation 17; β is at most 0.999
            bar = ((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
            alphas = (bar[1:] / bar[:-1]).clamp(min=0.001)
        else:
            first, last = self.betas
            root = 2 if self.schedule == "scaled_linear" else 1
            alphas = 1 - torch.linspace(first ** (1 / root), last ** (1 / root), steps, dtype=torch.float64) ** root
        out = alphas.cumprod(0)
        if self.zero_terminal_snr:
            signal = out.sqrt()
            out = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2
        return out

    @cached_property
    def _tables(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def levels(self, t: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        """(a, s) at each time, float32."""
        if self.schedule == "flow":
            return 1 - t, t
        if t.device not in self._tables:
            squared = torch.cat((torch.ones(1, dtype=torch.float64), self.alphas_cumprod))
            tables = squared.sqrt().float(), (1 - squared).sqrt().float()
            self._tables[t.device] = tables[0].to(t.device), tables[1].to(t.device)
        signal, noise = self._tables[t.device]
        step = (t * self.train_steps).round().long()
        return signal[step], noise[step]

    def draw_time(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
        """Times for training, on the CPU."""
        if self.schedule != "flow":
            return torch.randint(1, self.train_steps + 1, (count,), generator=generator) / self.train_steps
        if self.training_time == "logit_normal":
            t = torch.randn(count, generator=generator).sigmoid()
        else:
            t = torch.rand(count, generator=generator)
        return self.shifted(t)

    def shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Float[Tensor, " n"]) -> Tensor:
        """x_t; `t` has the leading axes of `x0`."""
        a, s = (level.view(*t.shape, *(1,) * (x0.ndim - t.ndim)) for level in self.levels(t))
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Float[Tensor, " n"]) -> Tensor:
        """What the network is to predict."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        if self.prediction == "flow":
            return noise - x0
        a, s = (level.view(*t.shape, *(1,) * (x0.ndim - t.ndim)) for level in self.levels(t))
        return a * noise - s * x0

    def network_time(self, t: Tensor) -> Tensor:
        """The number whose sinusoids the network sees: DDPM's step counted from 0, or 1000·t."""
        return t * self.train_steps - 1 if self.schedule != "flow" else 1000.0 * t

    def split(self, a: float, s: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """x0 and ε as mixtures of x and y, each (factor of x, factor of y), where x = a·x0 + s·ε."""
        p, q = {"epsilon": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-s, a), "flow": (-1.0, 1.0)}[self.prediction]
        d = a * q - s * p
        return (q / d, -s / d), (-p / d, a / d)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """From noise to data.

    Raises `ValueError` on construction for values outside their range; `plan` refuses pairs that can't work.
    """

    solver: Solver = "euler"
    """`ddpm`: ancestral (Ho et al. 2020); `ddim` with `eta` (Song et al. 2020); `dpm++`: DPM-Solver++ of second order,
    multistep, midpoint (Lu et al. 2022, algorithm 2); `euler` and `sde` for the flow schedule: its velocity, or the
    reverse stochastic equation with the noise that keeps every marginal (NextStep-1), the last step without noise."""
    steps: int = 20
    """Evaluations of the network."""
    spacing: Spacing = "trailing"
    """Which of DDPM's steps are taken (Lin et al. 2023, table 2)."""
    eta: float = 0.0
    """Noise of `ddim`: 0 none, 1 as much as `ddpm`."""
    last_step: float = 0.04
    """Length of the last step of `sde`, in t."""
    rho: float = 1.0
    """Times of the flow schedule are evenly spaced in t^(1/rho), as those of Karras et al. 2022 (equation 5, t for σ): above 1,
    steps are shorter near the data, where `dpm++` with few steps needs them. 1.5 suits it."""

    def __post_init__(self) -> None:
        if self.solver not in ("ddpm", "ddim", "dpm++", "euler", "sde"):
            raise ValueError(f"solver must be ddpm, ddim, dpm++, euler or sde, got {self.solver!r}")
        if self.spacing not in ("linspace", "leading", "trailing"):
            raise ValueError(f"spacing must be linspace, leading or trailing, got {self.spacing!r}")
        if self.steps < 1:
            raise ValueError(f"a sampler needs steps >= 1, got {self.steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in 0..1, got {self.eta}")
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta belongs to the solver ddim, got {self.eta} with {self.solver}")
        if not 0 < self.last_step < 1:
            raise ValueError(f"last_step must lie between 0 and 1, got {self.last_step}")
        if not 0.1 <= self.rho <= 10:
            raise ValueError(f"rho must lie in 0.1..10, got {self.rho}")
        if self.rho != 1.0 and self.solver == "sde":
            raise ValueError(f"sde has times of its own, so that rho means nothing to it; got {self.rho}, leave it out")

    def check(self, process: Process) -> None:
        """Raises `ValueError` if this sampler can't run the process backwards."""
        flow = process.schedule == "flow"
        if self.solver in ("euler", "sde") and not flow:
            raise ValueError(
                f"{self.solver} integrates the velocity of the flow schedule; for {process.schedule} use ddpm, ddim or dpm++"
            )
        if not flow and self.rho != 1.0:
            raise ValueError(
                f"rho spaces the times of the flow schedule; for {process.schedule} choose a spacing instead"
            )
        if not flow and self.steps > process.train_steps:
            raise ValueError(f"{self.steps} steps are more than the {process.train_steps} of the schedule")
        if self.solver == "sde" and self.steps < 2:
            raise ValueError("sde takes at least 2 steps, the last of which is without noise; got 1")

    def times(self, process: Process) -> list[float]:
        """The K + 1 times from noise to 0."""
        count, total = self.steps, process.train_steps
        if process.schedule == "flow":
            if self.solver == "sde":
                grid = torch.linspace(1, self.last_step, count, dtype=torch.float64)
                grid = torch.cat((grid, torch.zeros(1, dtype=torch.float64)))
            else:
                grid = torch.linspace(1, 0, count + 1, dtype=torch.float64) ** self.rho
            return process.shifted(grid).clamp(max=1.0).tolist()  # a shift below 1 may round past it
        if self.spacing == "linspace":
            points = count + 1 if self.solver == "dpm++" else count  # as diffusers counts them
            chosen = torch.linspace(0, total - 1, points, dtype=torch.float64).round().flip(0)[:count]
        elif self.spacing == "leading":
            chosen = (torch.arange(count, dtype=torch.float64) * (total // count)).flip(0)
        else:
            chosen = (total - torch.arange(count, dtype=torch.float64) * (total / count)).round() - 1
        return [*((chosen + 1) / total).tolist(), 0.0]

    def plan(self, process: Process, steps: int = 0) -> Plan:
        """The table of coefficients, worked out once for each process. `steps`: another number of them than the sampler's.
        Raises `ValueError` as `check`."""
        return _plan(replace(self, steps=steps) if steps else self, process)

    def _step(
        self,
        process: Process,
        t: float,
        u: float,
        now: tuple[float, float],
        then: tuple[float, float],
        before: tuple[float, float] | None,
    ) -> Step:
        """From time t to u < t."""
        (a, s), (a1, s1) = now, then
        clean, noise = process.split(a, s)
        if self.solver == "euler":
            # dx/dt = ε − x0
            return combine(clean, noise, x=1.0, clean=-(u - t), noise=u - t)
        if self.solver == "sde":
            if u == 0:
                return combine(clean, noise, x=1.0, clean=t, noise=-t)
            # dx = (v + t·score)·dt backwards with noise √(2t·dt), where v = x0 − ε and score = −ε/t
            return combine(clean, noise, x=1.0, clean=t - u, noise=-2 * (t - u), fresh=math.sqrt(2 * t * (t - u)))
        # Kingma et al. 2021, appendix A: q(x_u | x_t, x0) of any schedule
        kept = a / a1
        large = max(s * s - kept * kept * s1 * s1, 0.0)  # variance of q(x_t | x_u)
        small = large * s1 * s1 / (s * s)
        if self.solver == "ddpm":
            made = combine(clean, noise, x=kept * s1 * s1 / (s * s), clean=a1 * large / (s * s), fresh=math.sqrt(small))
            return Step(made.x, made.y, 0.0, made.fresh, made.clean_x, made.clean_y, large, small)
        if self.solver == "ddim":
            variance = self.eta**2 * small
            return combine(
                clean, noise, clean=a1, noise=math.sqrt(max(s1 * s1 - variance, 0.0)), fresh=math.sqrt(variance)
            )
        # DPM-Solver++: with λ = log(a/s) and h the step in it, x ← (s1/s)·x + a1·(1 − e^(−h))·D
        shrink = (a * s1) / (a1 * s)  # e^(−h)
        weight = a1 * (1 - shrink)
        memory = 0.0
        if before is not None and u > 0 and a > 0:  # the first and the last step are of first order
            h = -math.log(shrink)
            h_before = math.inf if before[0] == 0 else math.log(a * before[1] / (s * before[0]))
            memory = -0.5 * weight * h / h_before
        return combine(clean, noise, x=s1 / s, clean=weight - memory, memory=memory)


@lru_cache(maxsize=128)
@torch.inference_mode(False)  # the first to ask may be a generation, and the next a training step
def _plan(sampler: Sampler, process: Process) -> Plan:
    sampler.check(process)
    times = sampler.times(process)
    levels = [_levels(process, t) for t in times]
    steps = []
    for k in range(sampler.steps):
        before = levels[k - 1] if k else None
        steps.append(sampler._step(process, times[k], times[k + 1], levels[k], levels[k + 1], before))
    time = torch.tensor(times[:-1], dtype=torch.float64)
    return Plan(time=time.float(), network_time=process.network_time(time).float(), steps=tuple(steps))


Settings = TypeVar("Settings", Process, Sampler)


def settings(kind: type[Settings], given: Settings | Mapping[str, Any] | None) -> Settings:
    """What a plug-in's constructor is given: the object, its fields (as a checkpoint holds them), or None = the defaults. Raises
    `ValueError` for anything else."""
    if isinstance(given, kind):
        return given
    known = [field.name for field in fields(kind)]
    if not isinstance(given, Mapping | None) or set(given or ()) - set(known):
        raise ValueError(f"{given!r:.80} is no {kind.__name__.lower()}; its settings are {', '.join(known)}")
    return kind(**(given or {}))


def _levels(process: Process, t: float) -> tuple[float, float]:
    """(a, s) in float64."""
    if process.schedule == "flow":
        return 1 - t, t
    step = round(t * process.train_steps)
    squared = float(process.alphas_cumprod[step - 1]) if step else 1.0
    return math.sqrt(squared), math.sqrt(1 - squared)
