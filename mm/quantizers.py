"""Quantisers of feature maps behind one interface, on `vector-quantize-pytorch` with every setting that matters explicit.

| name | codes | source |
|---|---|---|
| `vq` | a codebook kept by exponential moving averages, dead codes replaced | van den Oord et al. 2017, appendix A.1 |
| `fsq` | each of a few channels rounded to a few levels | Mentzer et al. 2023, "Finite Scalar Quantization" |
| `lfq` | the signs of log2(K) channels | Yu et al. 2023, "Language Model Beats Diffusion" (MAGVIT-v2) |
| `bsq` | the same on the unit sphere | Zhao et al. 2024, "Binary Spherical Quantization" |
| `residual` | K codebooks, each of what the former ones left | Zeghidour et al. 2021, "SoundStream" |

Letters in shapes: B batch, D latent channels, H rows, W columns, K sub-codes.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from types import ModuleType
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

QuantizerName = Literal["vq", "fsq", "lfq", "bsq", "residual"]

MAX_CODES = 1 << 18
"""Largest vocabulary: the package builds tables of positions × codes, impractical beyond."""
MAX_CODE_DIM, MAX_CODEBOOK = 4096, 1 << 28
"""Widest code, and most numbers in all codebooks together (1 GiB, and as much for their averages)."""


def codebook_numbers(name: str, codebook_size: int, code_dim: int, num_codes: int) -> int:
    """Numbers in all codebooks together, for the quantisers that have any (`vq`, `residual`)."""
    return codebook_size * code_dim * (num_codes if name == "residual" else 1)


@dataclass(frozen=True)
class Quantized:
    """What a quantiser makes of a feature map."""

    latents: Float[Tensor, "B D H W"] | Float[Tensor, "B P D H W"]
    """The nearest codes; gradients pass straight through to the input. P: planes, where there are several."""
    ids: Int[Tensor, "B N"] | Int[Tensor, "B H W"] | Int[Tensor, "B H W K"]
    """int64."""
    loss: Float[Tensor, ""]
    """Commitment and entropy terms, already weighted; 0 in evaluation."""


class Quantizer(nn.Module):
    """One of the quantisers in the table above.

    Args:
        name: which one.
        codebook_size: ids a (sub-)code can take; for `fsq` it must equal the product of `levels` (or be 0).
        code_dim: D of `vq` and `residual`; the others derive it.
        levels: levels of each channel of `fsq`.
        num_codes: sub-codes of `residual`.
        decay: of the moving averages of `vq` and `residual` (van den Oord: 0.99).
        dead_below: a code whose average count a batch falls below this is replaced by an input vector; 0 = never.
        commitment: weight of the commitment loss (van den Oord's β) of `vq`, `residual`, `lfq` and `bsq`.
        entropy: weight of the entropy loss of `lfq` and `bsq`.

    Raises:
        ValueError: for a name or sizes that do not fit each other.
    """

    def __init__(
        self,
        name: QuantizerName = "vq",
        *,
        codebook_size: int = 1024,
        code_dim: int = 8,
        levels: Sequence[int] = (8, 5, 5, 5),
        num_codes: int = 4,
        decay: float = 0.99,
        dead_below: float = 0.5,
        commitment: float = 0.25,
        entropy: float = 0.1,
    ) -> None:
        super().__init__()
        if name == "fsq":
            product = math.prod(levels)
            if not levels or min(levels) < 3:
                raise ValueError(f"fsq needs levels of at least 3 each, got {list(levels)}")
            if codebook_size not in (0, product):
                raise ValueError(
                    f"fsq levels {list(levels)} make {product} codes, got codebook_size {codebook_size}: "
                    f"set it to {product} or 0"
                )
            codebook_size = product
        if not 2 <= codebook_size <= MAX_CODES:
            raise ValueError(f"codebook_size must be between 2 and {MAX_CODES}, got {codebook_size}")
        if code_dim < 1 or num_codes < 1:
            raise ValueError(f"code_dim and num_codes must be at least 1, got {code_dim} and {num_codes}")
        numbers = codebook_numbers(name, codebook_size, code_dim, num_codes)
        if name in ("vq", "residual") and (code_dim > MAX_CODE_DIM or numbers > MAX_CODEBOOK):
            raise ValueError(
                f"code_dim may be up to {MAX_CODE_DIM}, and all codebooks together may hold {MAX_CODEBOOK:,} numbers, got "
                f"code_dim {code_dim} and {numbers:,}: set code_dim, codebook_size or num_codes lower"
            )
        if name in ("lfq", "bsq") and codebook_size & (codebook_size - 1):
            raise ValueError(f"{name} needs a codebook_size that is a power of two, got {codebook_size}")
        self.name = name
        self.codebook_size = codebook_size
        self.num_codes = num_codes if name == "residual" else 1
        # Two settings are off or resolved behind one's back by default: the replacement of dead codes, and the
        # synchronisation over ranks, which the package decides when the module is built, before Lightning has set up
        # any ranks. `synchronise` turns it on when training starts.
        moving: dict[str, Any] = dict(
            decay=decay,
            eps=1e-5,
            kmeans_init=True,
            kmeans_iters=10,
            sync_kmeans=True,
            use_cosine_sim=False,
            threshold_ema_dead_code=dead_below,
            commitment_weight=commitment,
            rotation_trick=False,
            sync_codebook=False,
            ema_update=True,
            learnable_codebook=False,
            stochastic_sample_codes=False,
        )
        self.layer: nn.Module
        if name == "vq":
            self.dim = code_dim
            self.layer = _package().VectorQuantize(
                dim=code_dim, codebook_size=codebook_size, codebook_dim=code_dim, **moving
            )
        elif name == "residual":
            self.dim = code_dim
            self.layer = _package().ResidualVQ(
                dim=code_dim,
                num_quantizers=num_codes,
                codebook_size=codebook_size,
                codebook_dim=code_dim,
                shared_codebook=False,
                # Every id must be a real one: dropped stages are marked −1, which nothing downstream could embed.
                quantize_dropout=False,
                **moving,
            )
        elif name == "fsq":
            self.dim = len(levels)
            self.layer = _package().FSQ(
                levels=list(levels),
                dim=self.dim,
                num_codebooks=1,
                keep_num_codebooks_dim=False,
                preserve_symmetry=False,
                noise_dropout=0.0,
                force_quantization_f32=True,
                return_indices=True,
            )
        elif name in ("lfq", "bsq"):
            self.dim = int(math.log2(codebook_size))
            self.layer = _package().LFQ(
                dim=self.dim,
                codebook_size=codebook_size,
                num_codebooks=1,
                keep_num_codebooks_dim=False,
                entropy_loss_weight=entropy,
                commitment_loss_weight=commitment,
                diversity_gamma=1.0,
                frac_per_sample_entropy=1.0,
                spherical=name == "bsq",
                force_quantization_f32=True,
            )
        else:
            raise ValueError(f"quantizer must be one of vq, fsq, lfq, bsq, residual, got '{name}'")
        random = torch.Generator().manual_seed(0)
        for module in self.codebooks():  # the package's are zeros until it fits them to whatever comes first
            codebook = cast(Any, module)
            codebook.embed.normal_(generator=random)
            codebook.embed_avg.copy_(codebook.embed)
            codebook.init_embed_ = partial(_fit_in_training, codebook)  # unlike a bound method, it can be pickled

    def forward(self, latents: Float[Tensor, "B D H W"]) -> Quantized:
        batch, _, rows, columns = latents.shape
        # Autocast on the CPU is not switched off inside the package: ids must not depend on the precision around them.
        with torch.autocast(latents.device.type, enabled=False):
            flat = latents.float().permute(0, 2, 3, 1).reshape(batch, rows * columns, self.dim)
            out = self.layer(flat)
        quantized = out[0]
        if self.name == "residual":
            # Each stage passes the gradient on by itself, and together they would multiply it by their number.
            quantized = flat + (quantized - flat).detach() if self.training else quantized
        loss = out[2].sum() if len(out) > 2 else flat.new_zeros(())
        ids = out[1].long().reshape(batch, rows, columns, *out[1].shape[2:])
        return Quantized(self._as_map(quantized, rows, columns), ids, loss)

    def lookup(self, ids: Int[Tensor, "B H W"] | Int[Tensor, "B H W K"]) -> Float[Tensor, "B D H W"]:
        """The latents that ids stand for: exactly what `forward` returned with them in evaluation."""
        batch, rows, columns = ids.shape[:3]
        flat = ids.reshape(batch, rows * columns, *ids.shape[3:])
        if self.name == "residual":
            latents = self.stages(flat).sum(0)
        elif self.name == "vq":
            latents = cast(Any, self.layer).get_output_from_indices(flat)
        else:
            latents = cast(Any, self.layer).indices_to_codes(flat)
        return self._as_map(latents, rows, columns)

    def stages(self, ids: Int[Tensor, "B N K"]) -> Float[Tensor, "K B N D"]:
        """What each codebook of `residual` adds."""
        books = [cast(Any, book).embed[0] for book in self.codebooks()]
        return torch.stack([book[ids[..., k]] for k, book in enumerate(books)])

    def _as_map(self, flat: Float[Tensor, "B N D"], rows: int, columns: int) -> Float[Tensor, "B D H W"]:
        return flat.reshape(len(flat), rows, columns, self.dim).permute(0, 3, 1, 2)

    @torch.no_grad()
    def warm_start(self, latents: Float[Tensor, "B D H W"], iterations: int = 10, limit: int = 131_072) -> None:
        """Fit the codebook of `vq` to these latents by k-means (Lloyd 1982), from distinct vectors, at most `limit` of
        them. The other quantisers are left as they are: `residual` fits its codebooks to the first batch it trains on.
        """
        if self.name != "vq":
            return
        centres, counts = kmeans(
            latents.float().permute(0, 2, 3, 1).reshape(-1, self.dim), self.codebook_size, iterations, limit
        )
        codebook = cast(Any, self.codebooks()[0])
        # The averages are of counts a batch, whose size is unknown here: one a code on average is the right order.
        size = (counts * self.codebook_size / counts.sum()).clamp_min(codebook.threshold_ema_dead_code)
        codebook.embed.copy_(centres[None])
        codebook.cluster_size.copy_(size[None])
        codebook.embed_avg.copy_((centres * size[:, None])[None])
        codebook.initted.fill_(True)

    def codebooks(self) -> list[nn.Module]:
        """The codebook modules of `vq` and `residual` (buffers `embed`, `embed_avg`, `cluster_size`)."""
        return [m for m in self.modules() if hasattr(m, "threshold_ema_dead_code")]

    def synchronise(self, enabled: bool) -> None:
        """Share counts, sums and replacements of dead codes over the ranks of the running process group, or stop to.

        Call it once the group exists; afterwards every rank holds bit-identical codebooks after every step.
        """
        package = _package().vector_quantize_pytorch

        draw = package.sample_vectors_distributed if enabled else package.batched_sample_vectors
        reduce = torch.distributed.all_reduce if enabled else package.noop
        for module in self.codebooks():
            codebook = cast(Any, module)
            codebook.use_ddp = enabled
            codebook.sample_fn = codebook.replace_sample_fn = draw
            codebook.all_reduce_fn = codebook.kmeans_all_reduce_fn = reduce


class _Later(ModuleType):
    """Stands for a module that is imported when one of its functions is first called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import machinery asks for
            raise AttributeError(name)
        return lambda *args, **options: getattr(importlib.import_module(self.__name__), name)(*args, **options)


_importing = Lock()


def _package() -> Any:
    """`vector_quantize_pytorch`, without `einx`, which it imports for what isn't used here (masks) and which loads sympy and
    torch's compiler: two thirds of the time that the smallest checkpoint takes to load."""
    with _importing:
        if "vector_quantize_pytorch" in sys.modules or "einx" in sys.modules:
            return importlib.import_module("vector_quantize_pytorch")
        sys.modules["einx"] = _Later("einx")  # whoever imports it in another thread meanwhile gets functions that work
        try:
            return importlib.import_module("vector_quantize_pytorch")
        finally:
            sys.modules.pop("einx", None)


def _fit_in_training(codebook: Any, data: Tensor, mask: Tensor | None = None) -> None:
    """Fit an untrained codebook to the first batch of training, and never to what is encoded: ids would mean another thing after
    the first call, and a tokenizer's fingerprint something that is gone."""
    if codebook.training:
        type(codebook).init_embed_(codebook, data, mask)


@torch.no_grad()
def kmeans(
    x: Float[Tensor, "N D"], size: int, iterations: int = 10, limit: int = 131_072
) -> tuple[Float[Tensor, "K D"], Float[Tensor, " K"]]:
    """Centres of `size` clusters (Lloyd 1982), from distinct vectors, at most `limit` of them, and how many each has."""
    x = x[torch.randperm(len(x), device=x.device)[:limit]]
    # Plain areas repeat the same vector thousands of times: drawn as centres they would be born dead.
    distinct = x.mul(64).round().unique(dim=0) / 64
    centres = distinct[torch.randperm(len(distinct), device=x.device)[:size]]
    short = size - len(centres)
    if short:
        extra = centres[torch.randint(len(centres), (short,), device=x.device)]
        centres = torch.cat([centres, extra + 0.01 * torch.randn_like(extra)])
    counts = x.new_ones(size)
    for _ in range(iterations):
        nearest = torch.cat([(centres.square().sum(1) - 2 * part @ centres.T).argmin(1) for part in x.split(8192)])
        counts = torch.bincount(nearest, minlength=size).to(x)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        drawn = x[torch.randint(len(x), (size,), device=x.device)]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), drawn)
    return centres, counts
