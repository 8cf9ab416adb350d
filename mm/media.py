"""Pictures from strangers: one loader that bounds what it decodes and always returns the same kind of picture."""

from __future__ import annotations

import io
import os
import re
from typing import TYPE_CHECKING, Any

from mm import file_sources

if TYPE_CHECKING:  # Pillow and NumPy are imported where they are used, so that `import mm` stays fast
    import numpy as np
    from PIL import Image

SAID = file_sources.Said("picture", "a picture file", "a path, bytes, a binary file, a PIL picture or an array")

MAX_PIXELS = 1 << 26
"""Largest width × height that is decoded (8192 × 8192)."""
MAX_BYTES = 1 << 28
"""Largest file that is read (256 MiB)."""
MAX_SIDE = 65_535
"""Longest side that is decoded: Pillow's scaling takes memory by the side, not by the pixels, and fails far beyond."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is tried. Left out on purpose: formats whose reader starts other programs (EPS) or that are not pictures."""
EXTENSIONS = frozenset(
    ("png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "avif")
)
"""File name endings (lower case, no dot) that folders and shards take for pictures."""

ORIENTATION_TAG = 0x0112


def load_image(
    source: file_sources.FileSource | Image.Image | np.ndarray[Any, Any],
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Image.Image:
    """A picture as 8-bit RGB, upright, with transparency composited over white.

    Takes a path, the bytes of a file, an open binary file, a PIL picture, or an array as `array_pixels`. Any size from
    1×1 to `max_pixels`, with sides up to `MAX_SIDE`; CMYK, palette, grey and 16-bit pictures are converted (16 bits keep
    their upper 8), of an animation the first frame is taken, EXIF orientation is applied. Sizes are checked against the
    header before anything is decoded; Pillow's own process-wide limit (`PIL.Image.MAX_IMAGE_PIXELS`) applies too and is
    left as it is.

    Raises `ValueError`, one sentence, for a file that is missing, too large, truncated or not a picture.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, np.ndarray):
        if source.ndim in (2, 3):  # others are refused by their shape
            _check_size("the picture", (source.shape[1], source.shape[0]), max_pixels)
        values = array_pixels(source, "an array of a picture")
        source = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    if isinstance(source, Image.Image):
        name = "the picture"
        _check_size(name, source.size, max_pixels)
        return _to_rgb(source, name)
    name = f"the picture {os.fspath(source)!r}" if isinstance(source, str | os.PathLike) else "the picture"
    data = file_sources.content(source, name, SAID, max_bytes)
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = re.search(r"\d+", str(error))
        pixels = f"{int(count[0]):,}" if count else "too many"
        raise ValueError(
            f"{name} has {pixels} pixels, but at most {max_pixels:,} are decoded; scale it down before loading it"
        ) from error
    except Exception as error:  # a parser fed with a stranger's bytes may raise anything
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {_short(error)}"
        raise ValueError(f"{name} is damaged or not a picture (known: {', '.join(FORMATS)}){detail}") from error
    with picture:
        _check_size(name, picture.size, max_pixels)
        try:
            picture.load()
        except Exception as error:
            raise ValueError(f"{name} is truncated or damaged ({picture.format}): {_short(error)}") from error
        return _to_rgb(picture, name)


def array_pixels(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture in an array as uint8 [H, W, C]: of [H, W], or [H, W, C] with C = 1 (grey), 3 (red, green, blue) or 4 (and
    alpha); whole numbers of 8 bits, truth values, or floating-point numbers from 0 to 1.

    Raises `ValueError` that begins with `name` for another shape, type or range.
    """
    import numpy as np

    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise ValueError(f"{name} has the shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {list(values.shape)}")
    if values.dtype != np.uint8 and values.dtype.kind not in "fb":
        raise ValueError(f"{name} holds uint8, bool, or floating-point numbers from 0 to 1, got {values.dtype}")
    if values.dtype.kind == "f" and not ((values >= 0) & (values <= 1)).all():  # NaN isn't
        raise ValueError(f"{name} holds floating-point numbers beyond 0 to 1; scale them, or give uint8")
    if values.dtype != np.uint8:
        values = (values * np.float32(255)).round().astype(np.uint8)
    return np.ascontiguousarray(values.reshape(*values.shape[:2], -1))


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} is {width}×{height}, so it has no pixels; give at least 1×1")
    if width * height > max_pixels:
        raise ValueError(
            f"{name} is {width}×{height} = {width * height:,} pixels, but at most {max_pixels:,} are decoded; "
            "scale it down or raise max_pixels"
        )
    if max(width, height) > MAX_SIDE:
        raise ValueError(
            f"{name} is {width}×{height}, but sides of at most {MAX_SIDE:,} pixels are decoded; crop it or scale it down"
        )


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    try:
        picture = _upright(picture)
        if picture.mode == "I" or picture.mode.startswith("I;16"):
            out = _from_16_bit(picture, name)
        elif picture.mode == "F":
            raise ValueError(f"{name} holds floating-point values, whose range is unknown; save it with 8 or 16 bits")
        elif picture.has_transparency_data:
            rgba = picture.convert("RGBA")
            out = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        else:
            out = picture.convert("RGB")
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name} has colour mode {picture.mode!r}, which can't become RGB: {_short(error)}") from error
    except Exception as error:
        raise ValueError(f"{name} is truncated or damaged: {_short(error)}") from error
    if out is picture:
        out = picture.copy()
    out.info = {}
    return out


def _upright(picture: Image.Image) -> Image.Image:
    """Apply EXIF orientation. Damaged EXIF is common and harmless: the picture is then taken as it is stored."""
    from PIL import Image

    try:
        orientation = picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        return picture
    moves = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    move = moves.get(orientation) if isinstance(orientation, int) else None
    return picture if move is None else picture.transpose(move)


def _from_16_bit(picture: Image.Image, name: str) -> Image.Image:
    """Upper 8 of 16 bits. Pillow's own conversion clips at 255 instead, which turns most pictures white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} holds values beyond 0..65535, whose range is unknown; save it with 8 or 16 bits")
    grey = (values >> 8).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0][:200] if text else type(error).__name__).rstrip(".")
