"""Multi-scale residual quantisation (VAR, Tian et al. 2024, arXiv 2404.02905): a feature map as ids on ever finer grids.

At each scale what is left of the map is shrunk (mean over areas), quantised with the one codebook of all scales, enlarged
(bicubic), passed through a convolution φ and taken off. The sum of what was taken off so far is what the positions of the next
scale read, shrunk to that scale: computed by the same operations from the ids of a whole item as while it is generated.

Several planes (a triplane, SAR3D) are quantised side by side, each by itself.

Letters in shapes: B batch, P planes, D channels, H rows, W columns, V codes, N ids of all scales, n of the first ones, F maps
(pictures, or all planes of a batch).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.interfaces import Encoded
from mm.quantizers import MAX_CODE_DIM, MAX_CODEBOOK, MAX_CODES, Quantized, kmeans

MAX_SCALES = 32


class MultiScaleQuantizer(nn.Module):
    """A quantiser of square maps, or of square planes.

    Args:
        scales: sides of the grids, growing; the last is the side of the map.
        planes: of an item, side by side in its ids of a scale; 0 = it is one map, without an axis of planes.
        codebook_size, code_dim: V and D.
        phis: convolutions φ, each for neighbouring scales; 1 = one for all, 0 = one each (VAR: 4).
        residual: share of φ in what it gives; the rest is its input as it is. 0 = no convolution.
        commitment: weight of the commitment loss, beside the loss of codes and convolutions at weight 1.
        decay: of the averages that the codes follow; 0 = they are learned by gradient, as in VAR.
        dead_below: a code that a batch takes less often than this on average is replaced by an input vector; 0 = never.
        normalize: the nearest code is the one of the most similar direction.

    Raises:
        ValueError: for sizes that do not fit each other.
    """

    size: Tensor
    sums: Tensor

    def __init__(
        self,
        scales: Sequence[int] = (1, 2, 4, 8),
        *,
        planes: int = 0,
        codebook_size: int = 1024,
        code_dim: int = 8,
        phis: int = 4,
        residual: float = 0.5,
        commitment: float = 0.25,
        decay: float = 0.99,
        dead_below: float = 0.5,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        sides = list(scales)
        growing = all(a < b for a, b in itertools.pairwise(sides))
        if not 1 <= len(sides) <= MAX_SCALES or min(sides) < 1 or not growing or sides[-1] > 256:
            raise ValueError(f"scales are up to {MAX_SCALES} growing sides of grids, from 1 to 256, got {sides!r:.100}")
        if (
            not 2 <= codebook_size <= MAX_CODES
            or not 1 <= code_dim <= MAX_CODE_DIM
            or codebook_size * code_dim > MAX_CODEBOOK
        ):
            raise ValueError(
                f"a codebook has 2..{MAX_CODES} codes of width 1..{MAX_CODE_DIM}, and {MAX_CODEBOOK:,} numbers at the most; got "
                f"{codebook_size} codes of width {code_dim}"
            )
        if not 0 <= phis <= MAX_SCALES or not 0 <= planes <= 256 or not 0 <= residual <= 1 or not 0 <= decay < 1:
            raise ValueError(
                f"phis must be in 0..{MAX_SCALES}, planes in 0..256, residual in 0..1 and decay in 0..1, below 1; got {phis}, "
                f"{planes}, {residual} and {decay}"
            )
        self.sides, self.planes, self.maps = sides, planes, max(planes, 1)
        self.codebook_size, self.dim = codebook_size, code_dim
        self.residual, self.commitment, self.decay = residual, commitment, decay
        self.dead_below, self.normalize, self.shared = dead_below, normalize, False
        axes = (planes,) if planes else ()
        self.grids: tuple[tuple[int, ...], ...] = tuple((*axes, side, side) for side in sides)
        """The scales as grids, for `Spec.scales`."""
        self.ends = list(itertools.accumulate(self.maps * side**2 for side in sides))
        """Ids of the first scale, of the first two, and so on."""
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim), requires_grad=not decay)
        self.register_buffer("size", torch.ones(codebook_size))  # how often a batch takes each code, on average
        self.register_buffer("sums", self.codebook.detach().clone())  # and the sum of the vectors that did
        count = phis or len(sides)
        self.phi = nn.ModuleList(nn.Conv2d(code_dim, code_dim, 3, padding=1) for _ in range(count * bool(residual)))
        for phi in self.phi:  # begins as no convolution at all, so that the sum is one of plain residuals
            assert isinstance(phi, nn.Conv2d) and phi.bias is not None
            nn.init.dirac_(phi.weight)
            nn.init.zeros_(phi.bias)
        self.chosen = [chosen_phi(scale, len(sides), count) for scale in range(len(sides))]

    @property
    def count(self) -> int:
        """N, ids of an item of all scales."""
        return self.ends[-1]

    # ---- there -------------------------------------------------------------------------------------------------------

    def forward(self, latents: Float[Tensor, "B *P D H W"]) -> Quantized:
        """Latents as they come back, with the gradient passed straight through; ids (B, N); loss: the mean over scales of the
        squared error of the sum so far, once for the codes and φ and once, weighted, for the encoder. Raises `ValueError` for
        maps of another size."""
        shape = (*((self.planes,) if self.planes else ()), self.dim, self.sides[-1], self.sides[-1])
        if tuple(latents.shape[1:]) != shape:
            raise ValueError(f"expected latents of shape (B, {', '.join(map(str, shape))}), got {tuple(latents.shape)}")
        # ids must not depend on the precision around them
        with torch.autocast(latents.device.type, enabled=False):
            maps = latents.float().flatten(0, -4)
            truth, total, losses = maps.detach(), torch.zeros_like(maps), []
            left, seen, ids = truth.clone(), [], []
            for scale in range(len(self.sides)):
                vectors, nearest = self._nearest(left, scale)
                part = self._enlarged(nearest, scale)
                total = total + part
                left = left - part.detach()
                losses.append(self.commitment * F.mse_loss(total.detach(), maps) + F.mse_loss(total, truth))
                seen.append(vectors)
                ids.append(nearest)
            if self.training:
                self._follow(torch.cat(seen), torch.cat([one.flatten() for one in ids]))
            through = maps + (total - maps).detach() if self.training else total
            loss = torch.stack(losses).mean() if self.training else maps.new_zeros(())
        flat = torch.cat([one.reshape(len(latents), -1) for one in ids], dim=1)
        return Quantized(through.reshape(latents.shape), flat, loss)

    def _nearest(self, left: Float[Tensor, "F D H W"], scale: int) -> tuple[Float[Tensor, "n D"], Int[Tensor, "F h w"]]:
        """Vectors of what is left at one scale, and the code of each."""
        side, codes = self.sides[scale], self.codebook.detach().float()
        vectors = shrunk(left, side).permute(0, 2, 3, 1).reshape(-1, self.dim)
        compared = vectors
        if self.normalize:
            compared, codes = F.normalize(vectors, dim=-1), F.normalize(codes, dim=-1)
        distance = codes.square().sum(1) - 2 * compared @ codes.T
        return vectors, distance.argmin(1).view(len(left), side, side)

    @torch.no_grad()
    def _follow(self, vectors: Float[Tensor, "n D"], ids: Int[Tensor, " n"]) -> None:
        """Let the codes follow the vectors that took them, and the dead ones begin anew, alike on all ranks."""
        counts = torch.bincount(ids, minlength=self.codebook_size).float()
        sums = torch.zeros_like(self.sums).index_add_(0, ids, vectors)
        fresh = vectors[torch.randint(len(vectors), (self.codebook_size,), device=vectors.device)]
        if self.shared:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            dist.broadcast(fresh, 0)
        decay = self.decay or 0.99
        self.size.lerp_(counts, 1 - decay)
        if self.decay:
            self.sums.lerp_(sums, 1 - decay)
            smoothed = (self.size + 1e-5) / (self.size.sum() + 1e-5 * self.codebook_size) * self.size.sum()
            self.codebook.copy_(self.sums / smoothed[:, None])
        dead = self.size < self.dead_below
        if bool(dead.any()):
            begin = max(1.0, self.dead_below)
            self.codebook[dead], self.size[dead], self.sums[dead] = fresh[dead], begin, begin * fresh[dead]

    # ---- and back ----------------------------------------------------------------------------------------------------

    def _enlarged(self, ids: Int[Tensor, "F h w"], scale: int) -> Float[Tensor, "F D H W"]:
        """What the ids of one scale add to the sum."""
        codes = self.codebook if self.codebook.requires_grad else self.codebook.detach()
        part = F.embedding(ids, codes).float().permute(0, 3, 1, 2)
        if scale < len(self.sides) - 1:
            part = F.interpolate(part, size=(self.sides[-1], self.sides[-1]), mode="bicubic")
        part = part.contiguous()
        if not self.phi:
            return part
        phi = cast(nn.Conv2d, self.phi[self.chosen[scale]])
        bias = None if phi.bias is None else phi.bias.float()
        # in float32, whatever the type of the weights: so that ids mean the same everywhere
        return part * (1 - self.residual) + F.conv2d(part, phi.weight.float(), bias, padding=1) * self.residual

    def _nothing(self, batch: int) -> Float[Tensor, "F D H W"]:
        shape = (batch * self.maps, self.dim, self.sides[-1], self.sides[-1])
        return torch.zeros(shape, device=self.codebook.device)

    def sums_of(self, ids: Int[Tensor, "B n"]) -> Iterator[Float[Tensor, "F D H W"]]:
        """The sum after each scale, of ids of the first scales. Raises `ValueError` for ids that end within a scale."""
        if ids.shape[1] not in (0, *self.ends):
            raise ValueError(
                f"got {ids.shape[1]} ids, but the scales end with the ids {self.ends}; give those of whole scales"
            )
        total = self._nothing(len(ids))
        for scale, (begin, end) in enumerate(itertools.pairwise((0, *self.ends))):
            if end > ids.shape[1]:
                return
            side = self.sides[scale]
            total = total + self._enlarged(ids[:, begin:end].reshape(-1, side, side), scale)
            yield total

    @torch.no_grad()
    def lookup(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B *P D H W"]:
        """The latents that ids of the first scales stand for; of all scales, exactly what `forward` returned with them in
        evaluation. Raises `ValueError` for ids that end within a scale."""
        total = self._nothing(len(ids))
        for later in self.sums_of(ids):
            total = later
        return total.unflatten(0, (-1, self.planes)) if self.planes else total

    @torch.no_grad()
    def scale_inputs(self, ids: Int[Tensor, "B n"], *, own: bool = False) -> Float[Tensor, "B m D"]:
        """As `ModalityTokenizer.scale_inputs`, on the CPU. Raises `ValueError` for ids that end within a scale."""
        sides = self.sides if own else self.sides[1:]
        first = self.codebook.new_zeros(len(ids), self.maps * self.sides[0] ** 2, self.dim)
        rows = [first[:, :0] if own else first]
        for side, total in zip(sides, self.sums_of(ids), strict=False):
            cells = shrunk(total, side).flatten(2).transpose(1, 2)
            rows.append(cells.reshape(len(ids), -1, self.dim))
        return torch.cat(rows, dim=1).float().cpu()

    def repaired(self, item: Encoded) -> tuple[Int[Tensor, " n"], str]:
        """Ids of whole scales, at least of the first, that can be looked up, and what of the item had to be replaced for it."""
        if item.ids is None or len(item) < self.ends[0]:
            return torch.zeros(self.ends[0], dtype=torch.int64), f"no ids of a scale to decode, grid {item.grid}"
        ids, reasons = item.ids.detach().cpu().long(), []
        whole = max(end for end in self.ends if end <= len(ids))
        if whole != len(ids) or item.scales != self.grids[: len(item.scales)]:
            reasons.append(f"{len(ids)} ids for scales {item.scales or item.grid}, took {whole} of them")
        bad = (ids < 0) | (ids >= self.codebook_size)
        if bad.any():
            reasons.append(f"{int(bad.sum())} ids outside 0..{self.codebook_size - 1}")
        return ids[:whole].clamp(0, self.codebook_size - 1), "; ".join(reasons)

    # ---- training ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def warm_start(self, latents: Float[Tensor, "B *P D H W"], rounds: int = 3, limit: int = 131_072) -> None:
        """Fit the codebook to these latents: k-means of their means over areas, and again of what is left at each scale with
        the codes found."""
        maps = latents.float().flatten(0, -4)
        for number in range(rounds):
            left, seen = maps, []
            for scale, side in enumerate(self.sides):
                if number:
                    vectors, nearest = self._nearest(left, scale)
                    left = left - self._enlarged(nearest, scale)
                else:
                    vectors = shrunk(left, side).permute(0, 2, 3, 1).reshape(-1, self.dim)
                seen.append(vectors)
            found = torch.cat(seen)
            centres, counts = kmeans(found, self.codebook_size, limit=limit)
            self.codebook.copy_(centres)
            # averages are of counts a batch, whose size is unknown here: one a code on average is the right order
            self.size.copy_((counts * self.codebook_size / counts.sum()).clamp_min(max(0.01, self.dead_below)))
            self.sums.copy_(centres * self.size[:, None])

    def synchronise(self, enabled: bool) -> None:
        """Share counts, sums and replacements of dead codes over the ranks of the running process group, or stop to."""
        self.shared = enabled


def shrunk(maps: Float[Tensor, "F D H W"], side: int) -> Float[Tensor, "F D h w"]:
    """Means over areas."""
    return F.interpolate(maps, size=(side, side), mode="area") if side != maps.shape[-1] else maps


def chosen_phi(scale: int, scales: int, count: int) -> int:
    """Which of `count` convolutions serves a scale: the one whose place in 0..1 is nearest to the scale's (as in VAR's
    `models/quant.py`, where of four the outer ones stand nearer to the ends)."""
    margin = (1 / 3 if count == 4 else 1 / 2) / count
    places = np.linspace(margin, 1 - margin, count)  # as VAR: where two are as near, rounding decides
    return int(np.abs(places - scale / max(scales - 1, 1)).argmin())


def first_scales(item: Encoded, number: int) -> Encoded:
    """The first scales of an item, as an item (a prompt that shows less). Raises `ValueError` where it hasn't as many."""
    if item.ids is None or not 1 <= number <= len(item.scales):
        raise ValueError(f"number must be from 1 to the item's {len(item.scales)} scales, got {number}")
    scales = item.scales[:number]
    return Encoded(grid=scales[-1], scales=scales, ids=item.ids[: sum(math.prod(scale) for scale in scales)])
