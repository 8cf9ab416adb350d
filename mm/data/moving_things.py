"""What moves: handwritten or drawn digits, plain shapes, and pictures, each as a sprite with transparency.

Letters in shapes: H, W sides of a sprite in pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mm.data.example import BrokenExample, Example, Source, holdout_keys
from mm.data.shards import ShardSource
from mm.data.sources import DIGIT_NAMES, DigitsSource, FolderSource
from mm.media import FORMATS, load_image

COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (230, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 235),
    "yellow": (245, 215, 50),
    "orange": (245, 140, 30),
    "purple": (150, 60, 190),
    "cyan": (60, 205, 215),
}
"""Name → red, green, blue, of grounds and inks."""
SHAPES = ("square", "circle", "triangle", "diamond", "star")
SIZES = {"small": 0.22, "": 0.34, "large": 0.48}
"""Word → longer side of a shape, in frame widths."""
DIGIT_SIDES = (0.44, 0.56)
"""Height or width of a digit, whichever is more, in frame widths."""
PICTURE_SIDES = (0.40, 0.50)
KINDS = ("digit", "shape", "picture")
FAINT = 16
"""Ink weaker than this is taken for paper where digits are cut out."""


@dataclass(frozen=True)
class Sprite:
    """A thing as it is put onto a ground."""

    pixels: Float[np.ndarray, "4 H W"]
    """Red, green, blue, each times the cover, and the cover itself, 0 to 1."""
    centre: tuple[float, float]
    """Centre of mass of the cover, (x, y) in pixels from the middle of the first."""

    @property
    def reach(self) -> tuple[float, float, float, float]:
        """From the centre to the left, top, right and bottom, in pixels."""
        height, width = self.pixels.shape[1:]
        x, y = self.centre
        return x, y, width - 1 - x, height - 1 - y


@dataclass(frozen=True)
class Thing:
    """A thing chosen for a clip; its sprite is made when the clip is drawn."""

    kind: str
    noun: str
    """As in "a NOUN moves right"; of a picture its caption, which takes no article."""
    side: float
    """Longer side in frame widths."""
    ink: str = "white"
    """Of `COLOURS`; pictures have their own."""
    digit: int = -1
    index: int = -1
    """Of the picture in its source, where there is one."""
    seed: tuple[int, ...] = ()
    """Of a digit that is drawn here."""
    size_word: str = ""

    def name(self, article: str) -> str:
        """The thing with an article ("a" becomes "an" where it must, "" leaves it out), its size and its colour."""
        if self.kind == "picture":
            return self.noun
        colour = self.ink if self.kind == "shape" or self.ink != "white" else ""
        words = " ".join(word for word in (self.size_word, colour, self.noun) if word)
        if article == "a" and words[0] in "aeiou":
            article = "an"
        return f"{article} {words}".strip()


class Pool:
    """The pictures of a source that may become things: those that are held out go into held-out clips alone.

    Raises `ValueError` for a source that is a part, or of which one side would be empty.
    """

    def __init__(self, source: Source, kind: str, holdout_every: int) -> None:
        if source.split != "all":
            raise ValueError(f"{source.what} is given as its split {source.split!r}; give the whole source")
        self.source, self.kind = source, kind
        held = holdout_keys((source.key(index) for index in range(len(source))), holdout_every)
        out = np.array([source.key(index) in held for index in range(len(source))])
        self.rows = {False: np.flatnonzero(~out), True: np.flatnonzero(out) if holdout_every else np.flatnonzero(~out)}
        """Held out or not → indices."""
        if not len(self.rows[False]):
            raise ValueError(f"{source.what} is too small to hold {kind}s out of it; give more, or holdout_every 0")

    def draw(self, rng: np.random.Generator, held: bool, ink: str) -> Thing:
        """One at random. Raises `BrokenExample`."""
        rows = self.rows[held]
        return self.thing(int(rows[int(rng.integers(len(rows)))]), rng, ink)

    def thing(self, index: int, rng: np.random.Generator, ink: str) -> Thing:
        """A given one, of a size at random. Raises `BrokenExample`."""
        example = self.source[index]
        if self.kind == "picture":
            side = float(rng.uniform(*PICTURE_SIDES))
            return Thing("picture", str(example["text"]), side, index=index)
        digit = example.get("digit", -1)
        if not isinstance(digit, int) or not 0 <= digit <= 9:
            raise BrokenExample(f"example {example['key']!r} has no field 'digit' from 0 to 9")
        side = float(rng.uniform(*DIGIT_SIDES))
        return Thing("digit", f"handwritten {DIGIT_NAMES[digit]}", side, ink, digit, index)

    def sprite(self, thing: Thing, size: int) -> Sprite:
        """`size`: of the frame in pixels."""
        if self.kind == "digit":
            return inked(255 - np.asarray(self.source[thing.index]["image"].convert("L")), thing, size)
        return _scaled(with_cover(self.source, thing.index), thing.side * size)


def open_pool(given: str | Sequence[str] | Source, kind: str, holdout_every: int) -> Pool:
    """The pool of a source, an `.npz` of digits, shards, or a folder."""
    if isinstance(given, Source):
        return Pool(given, kind, holdout_every)
    paths = [given] if isinstance(given, str) else list(given)
    if len(paths) == 1 and paths[0].endswith(".npz"):
        return Pool(DigitsSource(paths[0]), kind, holdout_every)
    if all(path.endswith(".tar") for path in paths) and paths:
        return Pool(ShardSource(paths), kind, holdout_every)
    if len(paths) == 1 and Path(paths[0]).is_dir():
        return Pool(FolderSource(paths[0]), kind, holdout_every)
    raise ValueError(f"got {given!r} as the source of {kind}s; give an .npz of digits, .tar shards, or a folder")


def draw_printed(rng: np.random.Generator, ink: str, seed: tuple[int, ...]) -> Thing:
    """A digit in Pillow's own typeface, its strokes, tilt and slant by `seed`."""
    digit = int(rng.integers(10))
    return Thing("digit", f"printed {DIGIT_NAMES[digit]}", float(rng.uniform(*DIGIT_SIDES)), ink, digit, seed=seed)


def draw_shape(rng: np.random.Generator, ink: str, kinds: Sequence[str] = SHAPES) -> Thing:
    word = list(SIZES)[int(rng.integers(len(SIZES)))]
    return Thing("shape", kinds[int(rng.integers(len(kinds)))], SIZES[word], ink, size_word=word)


def printed_sprite(thing: Thing, size: int) -> Sprite:
    from mm.data.convert import draw_digit

    drawn = draw_digit(thing.digit, 64, np.random.default_rng(list(thing.seed)))
    return inked(255 - np.asarray(drawn.convert("L")), thing, size)


def inked(ink: Any, thing: Thing, size: int) -> Sprite:
    """The sprite of bright ink on black, uint8 [h, w], cut out. Raises `BrokenExample` for a blank picture."""
    from PIL import Image

    rows, columns = np.flatnonzero((ink > FAINT).any(1)), np.flatnonzero((ink > FAINT).any(0))
    if not len(rows):
        raise BrokenExample(f"the picture of digit {thing.digit} is blank")
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    cover = Image.fromarray(cut)
    rgba = Image.new("RGBA", cover.size, COLOURS[thing.ink])
    rgba.putalpha(cover)
    return _scaled(rgba, thing.side * size)


@lru_cache(maxsize=512)
def shape_sprite(noun: str, ink: str, side: float) -> Sprite:
    """A plain shape, its longer side `side` pixels."""
    from PIL import Image, ImageDraw

    large = 128
    cover = Image.new("L", (large, large))
    draw = ImageDraw.Draw(cover)
    box, middle = (0, 0, large - 1, large - 1), large / 2
    if noun == "circle":
        draw.ellipse(box, fill=255)
    elif noun == "square":
        draw.rectangle(box, fill=255)
    elif noun == "triangle":
        draw.polygon([(middle, 0), (large - 1, large - 1), (0, large - 1)], fill=255)
    elif noun == "diamond":
        draw.polygon([(middle, 0), (large - 1, middle), (middle, large - 1), (0, middle)], fill=255)
    else:
        assert noun == "star"
        corners = [
            (
                middle + (middle if k % 2 == 0 else 0.4 * middle) * math.sin(k * math.pi / 5),
                middle - (middle if k % 2 == 0 else 0.4 * middle) * math.cos(k * math.pi / 5),
            )
            for k in range(10)
        ]
        draw.polygon(corners, fill=255)
    rgba = Image.new("RGBA", cover.size, COLOURS[ink])
    rgba.putalpha(cover)
    return _scaled(rgba, side)


def with_cover(source: Source, index: int) -> Any:
    """A picture as RGBA. What the file says of transparency is kept; where it says nothing, the picture is a square."""
    from PIL import Image

    example: Example = source[index]
    shown = example["image"]  # bounded and checked by the source
    raw = source.raw_picture(index)
    if isinstance(raw, bytes):
        load_image(raw, max_pixels=source.max_pixels)  # the same bounds hold for what is opened next
        with Image.open(io.BytesIO(raw), formats=FORMATS) as picture:
            if picture.has_transparency_data and picture.size == shown.size:
                return picture.convert("RGBA")
    return shown.convert("RGBA")


def _scaled(rgba: Any, side: float) -> Sprite:
    """Cut to what is not transparent, then its longer side to `side` pixels."""
    from PIL import Image

    box = rgba.getchannel("A").getbbox()
    if box is None:
        raise BrokenExample("a picture is wholly transparent")
    rgba = rgba.crop(box)
    factor = side / max(rgba.size)
    shape = tuple(max(2, round(length * factor)) for length in rgba.size)
    # Premultiplied, or the colour of what is transparent would bleed in.
    small = np.asarray(rgba.convert("RGBa").resize(shape, Image.Resampling.BICUBIC), np.float32) / 255
    pixels = np.ascontiguousarray(small.transpose(2, 0, 1))
    cover = pixels[3]
    total = float(cover.sum())
    x = float((cover.sum(0) * np.arange(cover.shape[1])).sum()) / total
    y = float((cover.sum(1) * np.arange(cover.shape[0])).sum()) / total
    return Sprite(pixels, (x, y))
