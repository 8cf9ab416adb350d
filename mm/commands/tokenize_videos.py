"""`mm tokenize` of videos: brought to the tokenizer's rate and size, cut into clips that it holds, encoded, decoded, compared."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.video import MAX_TOTAL, Video, load_video

if TYPE_CHECKING:
    from mm.interfaces import ModalityTokenizer

PROBES = (48, 64)
"""Sides in pixels of the frames by which a tokenizer shows whether its frames have one size."""


def read_clip(file: str, tokenizer: ModalityTokenizer) -> Video:
    """The video at the tokenizer's rate and, where its frames are squares of one size, at that. Raises `ValueError` as
    `load_video`."""
    return load_video(file, fps=tokenizer.spec.fps, size=side_of(tokenizer))


def side_of(tokenizer: ModalityTokenizer) -> int | None:
    """Side of the square frames that a tokenizer gives back, whatever it is given; None where these differ."""
    spec = tokenizer.spec
    if spec.pixels:
        return spec.pixels[0] if spec.pixels[0] == spec.pixels[1] else None
    if not tokenizer.decodes:
        return None
    sizes = set()
    for side in PROBES:
        black = Video(np.zeros((1, side, side, 3), np.uint8), spec.fps)
        sizes.update(tokenizer.decode(tokenizer.encode(black)).value.size)
    return sizes.pop() if len(sizes) == 1 else None


def longest(tokenizer: ModalityTokenizer) -> int:
    """Most frames of a clip that the tokenizer encodes; a list of free length says nothing of it."""
    spec = tokenizer.spec
    return 1 + (spec.max_grid[0] - 1) * spec.frame_stride if spec.max_grid else 1 << 62


def tokenize_clip(clip: Video, tokenizer: ModalityTokenizer, keep: bool) -> tuple[dict[str, Any], Video | None]:
    """Figures, and what was decoded if it is to be kept (`keep`).

    A video longer than the tokenizer's clips is encoded as several, one after the other. What is lost is measured against the
    frames that the tokenizer was given; the raw video, whose size the tokens are compared with, is these at 24 bits a pixel.
    """
    from mm.commands.tokenize import bits

    most = longest(tokenizer)
    size = encoding = decoding = error = 0.0
    grids: list[tuple[int, ...]] = []
    kept: list[Any] = []
    count = values = decoded_frames = tokens = 0
    decoded_size: list[int] = []
    for start in range(0, len(clip), most):
        part = Video(clip.frames[start : start + most], clip.fps)
        began = time.perf_counter()
        encoded = tokenizer.encode(part)
        middle = time.perf_counter()
        encoding += middle - began
        size, tokens = size + bits(tokenizer.spec, encoded), tokens + len(encoded)
        grids.append(encoded.grid)
        if not tokenizer.decodes:
            continue
        decoded = tokenizer.decode(encoded).value
        decoding += time.perf_counter() - middle
        frames = decoded.frames[: len(part)]  # not what fills the last step up
        decoded_frames, decoded_size = decoded_frames + len(frames), list(decoded.size)
        error, values = error + squared_error(part.frames, frames), values + frames.size
        count += len(frames) * decoded.size[0] * decoded.size[1]
        if keep:
            kept.append(frames)
            if count > MAX_TOTAL:
                raise ValueError(
                    "what is decoded is too large to be written; leave out --out, or cut the video into parts"
                )
    raw = 24 * len(clip) * clip.size[0] * clip.size[1]
    figures: dict[str, Any] = {
        "tokens": tokens,
        "grid": list(grids[0]) if len(set(grids)) == 1 else [list(grid) for grid in grids[-2:]],
        "clips": len(grids),
        "bits": round(size, 1),
        "frames": len(clip),
        "fps": round(clip.fps, 4),
        "size": list(clip.size),
    }
    if tokenizer.decodes:
        figures |= {
            "decoded_frames": decoded_frames,
            "decoded_size": decoded_size,
            "lossless": error == 0,
            "psnr_db": round(10 * math.log10(255**2 * values / error), 2) if error else None,
        }
    figures |= {
        "encode_ms": round(1000 * encoding, 2),
        "decode_ms": round(1000 * decoding, 2),
        "bits_per_second": round(size / clip.seconds, 1),
        "bits_per_frame": round(size / len(clip), 1),
        "bits_per_pixel": round(24 * size / raw, 4),
        "raw_bits": raw,
        "compression": round(raw / size, 2) if size else None,
    }
    return figures, Video(np.concatenate(kept), clip.fps) if kept else None


def squared_error(given: Any, decoded: Any) -> float:
    """Sum over all values, at the size of the decoded frames."""
    from PIL import Image

    total = 0.0
    for frame, back in zip(given, decoded, strict=False):
        if frame.shape != back.shape:
            frame = np.asarray(Image.fromarray(frame).resize((back.shape[1], back.shape[0]), Image.Resampling.BICUBIC))
        total += float(((frame.astype(np.float64) - back) ** 2).sum())
    return total
