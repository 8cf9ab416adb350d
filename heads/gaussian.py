"""The Gaussian head: a normal distribution over vectors, refined by a small network (MELLE, Meng et al. 2024, section 3.3).

(μ, log σ²) = linear(h); z = μ + σ·ε; y = z + network(z). The loss is |y − target| + (y − target)², means over the vector,
plus `kl`·KL(N(μ, σ²) ‖ N(target, 1)), half the sum over the vector of σ² + (μ − target)² − 1 − log σ².

MELLE's flux term, which compares neighbouring frames, is not here: a head sees positions one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm.heads._vectors import check_continuous, mlp
from mm.interfaces import Draw, Head, Spec


class GaussianHead(Head):
    """`kl`: weight of the divergence; `layers`: of the network that refines the draw (0: none)."""

    def __init__(self, kl: float = 0.1, layers: int = 3) -> None:
        super().__init__()
        if not (math.isfinite(kl) and kl >= 0) or layers < 0:
            raise ValueError(f"a Gaussian head needs kl >= 0 and layers >= 0, got {kl} and {layers}")
        self.kl, self.layers = kl, layers

    def build(self, *, width: int, spec: Spec, controls: int = 0) -> None:
        check_continuous("Gaussian", spec, controls)
        self.parameters_of = nn.Linear(width, 2 * spec.dim)
        self.refine = mlp(spec.dim, spec.dim, self.layers) if self.layers else None

    def distribution(self, hidden: Float[Tensor, "n W"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n D"]]:
        """μ and log σ²."""
        mean, log_variance = self.parameters_of(hidden).float().chunk(2, dim=-1)
        return mean, log_variance

    def refined(self, z: Tensor) -> Tensor:
        return z if self.refine is None else z + self.refine(z.to(self.parameters_of.weight.dtype)).to(z.dtype)

    def loss(self, hidden: Float[Tensor, "n W"], target: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        wanted = target.float()
        mean, log_variance = self.distribution(hidden)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        off = self.refined(z).float() - wanted
        divergence = 0.5 * (log_variance.exp() + (mean - wanted).square() - 1 - log_variance).sum(-1)
        return off.abs().mean(-1) + off.square().mean(-1) + self.kl * divergence

    @torch.no_grad()
    def sample(
        self, hidden: Float[Tensor, "n W"], draws: Sequence[Draw]
    ) -> list[tuple[Tensor, Float[Tensor, " m"] | None]]:
        """Vectors; temperature scales σ, guidance moves μ."""
        mean, log_variance = self.distribution(hidden)
        out: list[tuple[Tensor, Tensor | None]] = []
        for draw in draws:
            deviation = (0.5 * log_variance[draw.rows]).exp() * draw.sampling.temperature
            noise = torch.randn(deviation.shape, generator=draw.generator).to(deviation.device)
            out.append((self.refined(draw.guided(mean) + deviation * noise).cpu(), None))
        return out

    def transition(
        self, hidden: Float[Tensor, "n W"], x: Tensor, step: int = 0
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n D"]]:
        """Mean and log-variance of z, before it is refined."""
        return self.distribution(hidden)
