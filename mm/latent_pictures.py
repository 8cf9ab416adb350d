"""What tokenizers share that turn a picture into a grid of vectors and back, beyond `mm.latent_grids`: fitting, and packing of
latents. A tokenizer file adds its network.

Letters in shapes: B batch, H and W rows and columns of pixels, h and w of the grid, C channels of the network's latents,
D = C · pack² width of a token, N tokens of one picture.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mm import pictures, saved
from mm.interfaces import Spec
from mm.latent_grids import BATCH_PIXELS, MAX_AXIS, LatentGrids, TrainedGrids
from mm.latents import LatentNormalizer

MAX_PACK = 16


def check_pack(pack: Any) -> None:
    """Raises `ValueError` for a `pack` that is none; ask before a normaliser is made, whose width grows with its square."""
    saved.whole_number("pack", pack, 1, MAX_PACK)


class LatentPictures(LatentGrids):
    """Pictures ↔ vectors: `latents` takes (B, 3, H, W) with sides that `downsample` divides, and gives (B, C, h, w); `pixels` is
    the way back. A subclass's constructor calls `fit_to` once it knows its sizes.

    `encode` takes a picture (fitted to the square of `size`, over white), or a float tensor (3, H, W) in [−1, 1] whose sides
    `downsample · pack` divides and that is no larger than that square. `pack` joins squares of pack×pack latents to one token,
    channel by channel and then row by row (MAR, NextStep-1).
    """

    def fit_to(self, size: int, downsample: int, channels: int, normalizer: LatentNormalizer, pack: int = 1) -> None:
        """Side of the square that pictures are fitted to, pixels a latent along a side, and C."""
        check_pack(pack)
        saved.whole_number("size", size)
        step = downsample * pack
        if size < step or size % step or size // step > MAX_AXIS:
            raise ValueError(
                f"size must be a multiple of {step} (downsample · pack) up to {step * MAX_AXIS}, got {size} with pack {pack}"
            )
        self.size, self.downsample, self.channels, self.pack = size, downsample, channels, pack
        self.normalizer = normalizer

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="continuous", dim=self.width, max_grid=self.largest, spatial=self.spatial, fingerprint=self.fingerprint
        )

    @property
    def largest(self) -> tuple[int, ...]:
        """Rows and columns of the grid of a whole picture."""
        side = self.size // (self.downsample * self.pack)
        return side, side

    @property
    def width(self) -> int:
        return self.channels * self.pack**2

    def rows(self, z: Float[Tensor, "B C h w"]) -> tuple[tuple[int, ...], Float[Tensor, "B N D"]]:
        packed = F.pixel_unshuffle(z, self.pack) if self.pack > 1 else z
        return tuple(packed.shape[2:]), packed.flatten(2).transpose(1, 2)

    def map(self, rows: Float[Tensor, "B N D"], grid: tuple[int, ...]) -> Float[Tensor, "B C h w"]:
        packed = rows.transpose(1, 2).unflatten(2, grid)
        return F.pixel_shuffle(packed, self.pack) if self.pack > 1 else packed

    def _given(self, raw: Image.Image | Tensor) -> Float[Tensor, "3 H W"]:
        if not isinstance(raw, Tensor):
            return pictures.to_unit(pictures.to_bytes(pictures.fit_square(raw, self.size)))
        if raw.ndim != 3 or raw.shape[0] != 3 or not raw.is_floating_point():
            raise ValueError(
                f"expected a float tensor (3, H, W) in [-1, 1], got {raw.dtype} {tuple(raw.shape)}: convert it"
            )
        step, sides = self.downsample * self.pack, tuple(raw.shape[1:])
        if min(sides) < 1 or max(sides) > self.size or any(side % step for side in sides):
            raise ValueError(
                f"expected sides that are multiples of {step} up to {self.size}, got {sides}: resize or pad the picture"
            )
        return raw.float()

    def _value(self, pixels: Float[Tensor, "3 H W"]) -> Image.Image:
        return pictures.to_image(pictures.from_unit(pixels))

    def _expected(self, grid: tuple[int, ...]) -> str:
        most = self.largest
        if len(grid) == 2 and all(1 <= extent <= limit for extent, limit in zip(grid, most, strict=True)):
            return ""
        return f"rows and columns within {most[0]}×{most[1]}"

    def _at_once(self, shape: tuple[int, ...]) -> int:
        return max(1, BATCH_PIXELS // self.size**2)


class TrainedPictures(TrainedGrids, LatentPictures):
    """Those that `mm fit` trains."""
