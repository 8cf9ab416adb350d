"""The diffusion head: a distribution over vectors, given a hidden state (MAR, MMAR, Orthus, NextStep-1, Fluid).

A small network (`mm.denoiser`) learns to undo the noise of a process (`mm.diffusion`) with the hidden state as its
condition. The backbone runs once a token; the network runs once a step of the sampler.

Letters in shapes: n positions, W backbone width, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm.denoiser import Denoiser
from mm.diffusion import Plan, Process, Sampler, settings
from mm.heads._vectors import check_continuous
from mm.interfaces import Draw, Head, Sampling, Spec

FEW_STEPS = Sampler(solver="dpm++", steps=10, rho=1.5)
"""For the flow schedule: as near to the data as 100 ancestral steps on a mixture (`mm bench heads`, docs/heads.md)."""


class DiffusionHead(Head):
    """Learns and samples vectors.

    Args:
        process: from data to noise, and what the network predicts.
        sampler: from noise to data, unless `Sampling.denoising_steps` asks for another number of steps. On the flow schedule
            `FEW_STEPS` where none is given; other schedules need one named.
        width: width inside the network; 0 = the backbone's.
        blocks: its residual blocks.
        batch_multiplier: times and noises drawn for each vector in training (MAR: 4): the backbone's work serves them all.
        learned_variance: the network also predicts the variance of each `ddpm` step. For weights of MAR; it is sampled
            with, and not trained here.
    """

    net: Denoiser

    def __init__(
        self,
        process: Process | Mapping[str, Any] | None = None,
        sampler: Sampler | Mapping[str, Any] | None = None,
        width: int = 0,
        blocks: int = 3,
        batch_multiplier: int = 4,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        self.process = settings(Process, process)
        self.sampler = FEW_STEPS if sampler is None and self.process.schedule == "flow" else settings(Sampler, sampler)
        self.plan()  # a pair that can't work is refused now, not after hours of training
        if width < 0 or blocks < 1 or batch_multiplier < 1:
            raise ValueError(
                f"a diffusion head needs width >= 0, blocks >= 1 and batch_multiplier >= 1, got {width}, {blocks} and "
                f"{batch_multiplier}"
            )
        if learned_variance and self.sampler.solver != "ddpm":
            raise ValueError(f"learned_variance belongs to the solver ddpm, got {self.sampler.solver}")
        self.width, self.blocks, self.batch_multiplier = width, blocks, batch_multiplier
        self.learned_variance = learned_variance

    def build(self, *, width: int, spec: Spec, controls: int = 0) -> None:
        check_continuous("diffusion", spec, controls)
        self.dim = spec.dim
        out = spec.dim * (2 if self.learned_variance else 1)
        self.net = Denoiser(spec.dim, width, self.width or width, self.blocks, out)

    @property
    def dtype(self) -> torch.dtype:
        """Of the network: float32, unless the whole model was converted."""
        return self.net.enter.weight.dtype

    def plan(self, steps: int = 0) -> Plan:
        """The sampler's steps, or another number of them."""
        return self.sampler.plan(self.process, steps)

    def loss(self, hidden: Float[Tensor, "n W"], target: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        """Mean squared error of the prediction, over the vector and `batch_multiplier` draws. In float32, also inside
        autocast."""
        if self.learned_variance:
            raise ValueError("a head with learned_variance is for sampling with given weights; train one without it")
        with torch.autocast(hidden.device.type, enabled=False):
            count, times = self.batch_multiplier, self.batch_multiplier * len(target)
            x0 = target.float().repeat(count, 1)
            condition = self.net.condition(hidden.to(self.dtype)).repeat(count, 1)
            t = self.process.draw_time(times).to(x0.device)
            noise = torch.randn_like(x0)
            made = self.net.predict(
                self.process.corrupt(x0, noise, t).to(self.dtype),
                self.net.embed_time(self.process.network_time(t)),
                condition,
            )
            wanted = self.process.target(x0, noise, t)
            return (made.float() - wanted).square().mean(-1).view(count, -1).mean(0)

    @torch.no_grad()
    def sample(self, hidden: Float[Tensor, "n W"], draws: Sequence[Draw]) -> list[tuple[Tensor, Tensor | None]]:
        """Vectors. Rows with guidance have a second row whose noise and x are the same: ŷ = u + scale·(c − u)."""
        out: dict[int, tuple[Tensor, Tensor | None]] = {}
        hidden = hidden.to(self.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for steps in dict.fromkeys(draw.sampling.denoising_steps for draw in draws):
                chosen = [n for n, draw in enumerate(draws) if draw.sampling.denoising_steps == steps]
                made = self._together(hidden, [draws[n] for n in chosen], self.plan(steps))
                for number, part in zip(chosen, made, strict=True):
                    out[number] = (part, None)
        return [out[number] for number in range(len(draws))]

    def _together(self, hidden: Tensor, draws: Sequence[Draw], plan: Plan) -> list[Tensor]:
        """All rows in one batch, the unconditional ones behind."""
        noises, conditions, free, between, guides = [], [], [], [], []
        at = 0
        for draw in draws:
            own = hidden[draw.rows]
            noises.append(plan.noise(len(own), self.dim, draw.generator, draw.sampling.temperature))
            conditions.append(own)
            if draw.is_guided:
                free.append(hidden[draw.unconditional])
                between.append(hidden[draw.context] if draw.context is not None else own[:0])
                guides.append((at, len(own), draw))
            at += len(own)
        noise = torch.cat(noises, dim=1).to(hidden.device)
        predict = self._network(torch.cat([*conditions, *free, *between]), plan)
        if guides:
            predict = self._guided(predict, guides, at)

        made = plan.run(predict, noise)
        # random numbers come from the CPU, so that a seed means one thing everywhere; vectors go back to it
        return [part.cpu() for part in made.split([len(c) for c in conditions])]

    def _network(self, condition: Float[Tensor, "n W"], plan: Plan) -> Callable[[Tensor, int], Tensor]:
        """The network at each step. What is sampled stays in float32, also where a converted model predicts in less."""
        predict = self.net.steps(condition, plan.network_time)
        if self.dtype == torch.float32:
            return predict
        return lambda x, k: predict(x.to(self.dtype), k).float()

    def _guided(
        self, predict: Callable[[Tensor, int], Tensor], guides: Sequence[tuple[int, int, Draw]], rows: int
    ) -> Callable[[Tensor, int], Tensor]:
        """`predict` for the conditional rows, which has the twins evaluated beside them: those of the null condition, then
        those of the context's items. `guides`: first row and number of rows of each guided draw."""
        own = torch.cat([torch.arange(at, at + count) for at, count, _ in guides])
        three = torch.cat([torch.full((count,), draw.context is not None) for _, count, draw in guides])
        scale = torch.cat([torch.full((count, 1), draw.scale) for _, count, draw in guides])
        context_scale = torch.cat([torch.full((count, 1), draw.context_scale) for _, count, draw in guides])[three]
        device = self.net.enter.weight.device
        own, three = own.to(device), three.nonzero()[:, 0].to(device)
        scale, context_scale = scale.to(device), context_scale.to(device)
        again, some = torch.cat((own, own[three])), len(three) > 0

        def guided(x: Tensor, k: int) -> Tensor:
            made = predict(torch.cat((x, x[again])), k)
            # what is predicted of the variance is not guided (MAR)
            given, start = made[:rows], made[rows : rows + len(own), : self.dim]
            moved = given[own, : self.dim]
            if some:
                middle, between = made[rows + len(own) :, : self.dim], start.clone()
                between[three] = middle
                start[three] = torch.lerp(start[three], middle, context_scale)
                moved = start + scale * (moved - between)
            else:
                moved = torch.lerp(start, moved, scale)
            given[own, : self.dim] = moved
            return given

        return guided

    def transition(
        self, hidden: Float[Tensor, "n W"], x: Float[Tensor, "n D"], step: int, sampling: Sampling | None = None
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n D"]]:
        """Mean and log-variance of one step of the sampler from x (speculative decoding compares two models' chains by
        them). A step without noise has log-variance −∞."""
        plan = self.plan(sampling.denoising_steps if sampling else 0)
        return plan.transition(self._network(hidden.to(self.dtype), plan), x.float(), step)
