"""Latents of an autoencoder brought to unit spread, which is what diffusion takes data to have.

| kind | vectors become | source |
|---|---|---|
| `none` | what they are | |
| `scale` | x · factor, one number (1 / standard deviation) | Rombach et al. 2022, section G; MAR 0.2325 |
| `channel` | (x − mean) / standard deviation, by channel | |
| `robust` | (x − median) / (0.7413 · interquartile range), by channel: outliers don't count | LCM, section 2.4.1 |
| `token` | each vector by itself: mean 0, variance 1 over its channels (but for eps, 1e-6) | NextStep-1, section 3.3 |

The statistics are buffers: they are saved with whatever holds the normaliser. Where `token` is used the autoencoder's decoder
learns to read normalised vectors, for what was divided out can't be found again.

Letters in shapes: N vectors, D channels.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Kind = Literal["none", "scale", "channel", "robust", "token"]
KINDS: tuple[str, ...] = get_args(Kind)
NORMAL_IQR = 0.7413
"""Standard deviation of a normal distribution ÷ its interquartile range."""
SMALLEST = 1e-6
"""Spread below which a channel is taken to be constant, and only moved."""
MAX_SAMPLE = 1 << 24
"""Numbers that quantiles are taken of, at the most; `torch.quantile` refuses more."""
EPS = 1e-6


class LatentNormalizer(nn.Module):
    """Normalises vectors of width `dim`, and takes it back.

    Args:
        kind: see the table above.
        dim: D.
        factor: of `scale`, where it is known; 0 = from data, by `fit`.

    Raises:
        ValueError: an unknown kind, or a factor that is not one.
    """

    averaged = False
    """`mm.ema.EMA` leaves the statistics alone: they are those of the averaged encoder already."""
    shift: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, kind: Kind = "channel", dim: int = 1, factor: float = 0.0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"a normaliser is one of {', '.join(KINDS)}, got {kind!r:.60}")
        least = 2 if kind == "token" else 1
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < least:
            raise ValueError(f"a normaliser of kind {kind} needs a width of {least} or more, got {dim!r:.60}")
        if not (math.isfinite(factor) and factor >= 0) or (factor and kind != "scale"):
            raise ValueError(f"factor belongs to the kind scale and must be above 0, got {factor} for {kind}")
        self.kind, self.dim = kind, dim
        self.register_buffer("shift", torch.zeros(dim))
        self.register_buffer("scale", torch.full((dim,), 1 / factor if factor else 1.0))
        self.register_buffer("fitted", torch.tensor(bool(factor) or kind in ("none", "token")))

    @property
    def ready(self) -> bool:
        """Whether its statistics are known."""
        return bool(self.fitted)

    @torch.no_grad()
    def fit(self, vectors: Float[Tensor, "N D"]) -> None:
        """Take the statistics from data. Raises `ValueError` for vectors of another width or that are not numbers."""
        if vectors.ndim != 2 or vectors.shape[1] != self.dim or not len(vectors):
            raise ValueError(
                f"a normaliser of width {self.dim} got vectors {tuple(vectors.shape)}; give (N, {self.dim})"
            )
        if not bool(vectors.isfinite().all()):
            raise ValueError("the vectors to be normalised hold values that are not numbers; look at what encoded them")
        if self.kind in ("none", "token"):
            return
        if len(vectors) < 2:
            raise ValueError("one vector has no spread; give at least two to take statistics of")
        x = vectors.double()
        if self.kind == "scale":
            shift, spread = torch.zeros(self.dim), x.std(correction=0).expand(self.dim)
        elif self.kind == "channel":
            shift, spread = x.mean(0), x.std(0, correction=0)
        else:
            some = x
            if x.numel() > MAX_SAMPLE:  # at random: even steps would take the same columns of every picture
                chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: MAX_SAMPLE // self.dim]
                some = x[chosen.to(x.device)]
            low, shift, high = some.quantile(torch.tensor((0.25, 0.5, 0.75), dtype=x.dtype, device=x.device), dim=0)
            spread = NORMAL_IQR * (high - low)
        self.shift.copy_(shift)
        self.scale.copy_(torch.where(spread < SMALLEST, 1.0, spread))
        self.fitted.fill_(True)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Normalised vectors. Raises `ValueError` before `fit`."""
        if self.kind == "none":
            return x
        if self.kind == "token":
            return F.layer_norm(x, (self.dim,), eps=EPS)
        self._check()
        return (x - self.shift) / self.scale

    def inverse(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What the decoder is to read: the original vectors; those of `token` as they are."""
        if self.kind in ("none", "token"):
            return x
        self._check()
        return x * self.scale + self.shift

    def _check(self) -> None:
        if not self.ready:
            raise ValueError(
                f"the latents' normaliser ({self.kind}) has no statistics yet: train or fit the tokenizer first, or give it "
                "the kind none"
            )
