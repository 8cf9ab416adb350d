"""Pictures in and out: hostile or odd files become plain square RGB, tensors become pictures.

Letters in shapes: B batch, H rows, W columns.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

MAX_PIXELS = 64_000_000
"""Pictures with more pixels are refused by their header, before anything is decoded."""


def to_rgb(image: Image.Image) -> Image.Image:
    """The first frame as RGB; transparency over white, 16-bit grey scaled to 8.

    Raises:
        ValueError: not a picture, more than `MAX_PIXELS` pixels, or a file that ends early.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"expected a PIL image, got {type(image).__name__}: open the file with PIL.Image.open")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"a picture of {image.width}×{image.height} is too large, at most {MAX_PIXELS} pixels: make it smaller"
        )
    if image.width < 1 or image.height < 1:
        raise ValueError(f"a picture of {image.width}×{image.height} has no pixels")
    try:
        if image.mode.startswith("I") or image.mode == "F":
            # PIL would clip these to 255; 16-bit files use the whole range.
            grey = np.asarray(image, dtype=np.float32)
            top = 65535.0 if image.mode.startswith("I") else max(float(np.nanmax(grey)), 1e-12)
            grey = np.nan_to_num(grey / top).clip(0, 1)
            return Image.fromarray((grey * 255 + 0.5).astype(np.uint8)).convert("RGB")
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
            layer = image.convert("RGBA")
            white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, layer).convert("RGB")
        return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the picture can't be decoded ({error}): the file is damaged or ends early") from error


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """RGB of `size`×`size`: scaled so that the longer side fits, centred on white. Raises as `to_rgb`."""
    rgb = to_rgb(image)
    scale = size / max(rgb.size)
    width, height = max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))
    if (width, height) != rgb.size:
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    if (width, height) == (size, size):
        return rgb
    canvas = Image.new("RGB", (size, size), (255, 255, 255))
    canvas.paste(rgb, ((size - width) // 2, (size - height) // 2))
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
