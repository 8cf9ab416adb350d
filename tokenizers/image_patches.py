"""Pictures as the pixels of small squares: continuous, without weights and without loss but for the size they are fitted to.

MAR generates from such tokens too (its authors report 64×64 pixels in patches of 4×4), and they are the plainest way to a
continuous system: nothing has to be trained before it. The numbers are pixels in [−1, 1] times `scale`, row by row and
colour last; with `scale` 2 their spread is about 1 on pictures with a white ground.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mm import pictures
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec


class ImagePatches(ModalityTokenizer):
    """A picture of `size`×`size` as (size / patch)² vectors of 3·patch² numbers.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(self, size: int = 32, patch: int = 4, scale: float = 1.0) -> None:
        if patch < 1 or size < patch or size % patch:
            raise ValueError(f"size must be a multiple of patch, got {size} and {patch}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a number above 0, got {scale}")
        self.size, self.patch, self.scale = size, patch, scale

    @classmethod
    def tiny(cls) -> ImagePatches:
        return cls(size=8, patch=4)

    @property
    def spec(self) -> Spec:
        side = self.size // self.patch
        name = f"image_patches-1-{self.size}-{self.patch}-{self.scale:g}"
        return Spec(kind="continuous", dim=3 * self.patch**2, max_grid=(side, side), fingerprint=name)

    def encode(self, raw: Image.Image) -> Encoded:
        """Vectors of a picture, which is fitted to the square over white."""
        pixels = pictures.to_unit(pictures.to_bytes(pictures.fit_square(raw, self.size)))
        side = self.size // self.patch
        return Encoded(grid=(side, side), latents=self.cut(pixels) * self.scale)

    def decode(self, encoded: Encoded) -> Decoded:
        """An RGB picture of the grid's size × `patch`; what lies outside [−1, 1] is clipped, not-a-number becomes black."""
        latents = encoded.latents
        if latents is None or len(encoded.grid) != 2 or not len(latents) or latents.shape[1] != self.spec.dim:
            blank = Image.new("RGB", (self.size, self.size))
            return Decoded(value=blank, valid=False, reason=f"no vectors of width {self.spec.dim} on a grid to decode")
        reason = "" if bool(latents.isfinite().all()) else "the vectors hold values that are not numbers"
        pixels = self.join(latents.float() / self.scale, encoded.grid)
        return Decoded(value=pictures.to_image(pictures.from_unit(pixels)), valid=not reason, reason=reason)

    def cut(self, pixels: Float[Tensor, "3 H W"]) -> Float[Tensor, "N D"]:
        p = self.patch
        rows, columns = pixels.shape[1] // p, pixels.shape[2] // p
        return pixels.view(3, rows, p, columns, p).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)

    def join(self, vectors: Float[Tensor, "N D"], grid: tuple[int, ...]) -> Float[Tensor, "3 H W"]:
        p, (rows, columns) = self.patch, grid
        return vectors.view(rows, columns, p, p, 3).permute(4, 0, 2, 1, 3).reshape(3, rows * p, columns * p)
