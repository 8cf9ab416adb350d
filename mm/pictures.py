"""Pictures in and out: hostile or odd files become plain square RGB, tensors become pictures.

Letters in shapes: B batch, H rows, W columns.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from mm.media import load_image


def to_rgb(image: Image.Image) -> Image.Image:
    """The first frame as upright 8-bit RGB, transparency over white (`mm.media.load_image`).

    Raises:
        ValueError: not a picture, more than `mm.media.MAX_PIXELS` pixels, or a file that ends early.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"expected a PIL picture, got {type(image).__name__}: open the file with mm.media.load_image")
    return load_image(image)


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """RGB of `size`×`size`: scaled so that the longer side fits, centred on white. Raises as `to_rgb`."""
    return fit(image, size, size)


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """RGB of this size: scaled so that all of it fits, centred on white. Raises as `to_rgb`."""
    rgb = to_rgb(image)
    scale = min(height / rgb.height, width / rgb.width)
    inner = max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))
    if inner != rgb.size:
        rgb = rgb.resize(inner, Image.Resampling.BICUBIC)
    if inner == (width, height):
        return rgb
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    canvas.paste(rgb, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def to_bytes(image: Image.Image) -> UInt8[Tensor, "3 H W"]:
    """An RGB picture as bytes."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def to_unit(pixels: UInt8[Tensor, "*B 3 H W"]) -> Float[Tensor, "*B 3 H W"]:
    """Bytes as float32 in [−1, 1]."""
    return pixels.float().mul_(2 / 255).sub_(1)


def from_unit(pixels: Float[Tensor, "*B 3 H W"]) -> UInt8[Tensor, "*B 3 H W"]:
    """[−1, 1] as bytes, clipped and rounded; not-a-number becomes black."""
    return pixels.float().nan_to_num(-1.0).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def to_image(pixels: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """Bytes as an RGB picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())
