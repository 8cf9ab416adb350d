"""Contact sheets: pictures side by side on white, or frames of clips, with captions below."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

GAP = 4
"""Pixels between neighbours and around the sheet."""
MAX_SIDE = 16_384
"""Longest side of a sheet."""


def grid(
    images: Sequence[Image.Image],
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """One RGB picture of many.

    Args:
        images: any sizes and modes; each stands centred in a cell as large as the largest.
        columns: pictures in a row; by default about as many as rows.
        captions: one a picture, cut to the width of its cell with "…" when too long.
        scale: whole factor by which pictures are enlarged, each pixel to a square; by default small ones are enlarged
            to about 96 pixels if there are captions, else left as they are.

    Raises:
        ValueError: no pictures, captions of another number, or a sheet larger than `MAX_SIDE`.
    """
    if not images:
        raise ValueError("a sheet needs at least one picture, got none")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"got {len(captions)} captions for {len(images)} pictures; give one a picture")
    if columns is not None and columns < 1:
        raise ValueError(f"a sheet needs at least one column, got {columns}")
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    if scale is None:
        scale = max(1, round(96 / max(width, height))) if captions is not None else 1
    if scale < 1:
        raise ValueError(f"scale must be a whole number from 1, got {scale}")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(size=11) if captions is not None else None
    text = 0
    if font is not None:
        ascent = font.getbbox("Åy")
        text = math.ceil(ascent[3]) + 3
    cell = (width * scale + GAP, height * scale + text + GAP)
    size = (columns * cell[0] + GAP, rows * cell[1] + GAP)
    if max(size) > MAX_SIDE:
        raise ValueError(
            f"the sheet would be {size[0]}×{size[1]} pixels, at most {MAX_SIDE} a side; give fewer pictures"
        )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        left, top = GAP + number % columns * cell[0], GAP + number // columns * cell[1]
        shown = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        sheet.paste(shown, (left + (width * scale - shown.width) // 2, top + (height * scale - shown.height) // 2))
        if captions is not None and font is not None:
            words = shorten(captions[number], width * scale, font)
            place = (left + (width * scale - font.getlength(words)) / 2, top + height * scale + 1)
            draw.text(place, words, fill="black", font=font)
    return sheet


def strips(
    clips: Sequence[UInt8[np.ndarray, "T H W 3"]],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    scale: int | None = None,
) -> Image.Image:
    """One RGB picture of many clips, each a row of at most `columns` of its frames, spread evenly from its first to its last;
    `captions` and `scale` as in `grid`, by default about 64 pixels a frame. Raises `ValueError` as `grid`, and for a clip
    without frames."""
    if any(not len(clip) for clip in clips):
        raise ValueError("a clip has no frames to show; leave it out")
    if columns < 1:
        raise ValueError(f"a sheet needs at least one column, got {columns}")
    rows = []
    for clip in clips:
        count = min(columns, len(clip))
        frames = clip[np.linspace(0, len(clip) - 1, count).round().astype(int)]
        spaced = np.full((count, frames.shape[1], frames.shape[2] + 1, 3), 255, dtype=np.uint8)  # a line between frames
        spaced[:, :, :-1] = frames
        rows.append(Image.fromarray(np.concatenate(list(spaced), axis=1)[:, :-1]))
    if scale is None and clips:
        scale = max(1, round(64 / max(max(clip.shape[1:3]) for clip in clips)))
    return grid(rows, 1, captions, scale)


def shorten(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text in one line, cut with "…" where it is wider than `width` pixels.

    Pillow's own font has ASCII only: accents are dropped, and other characters become "?".
    """
    text = " ".join(text.split())[:1000]
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = bare.encode("ascii", "replace").decode()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
