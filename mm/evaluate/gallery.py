"""Real pictures of a source in memory, and the nearest of them to given ones.

Letters in shapes: N pictures, S side in pixels, Q queries, F features, G distinct pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mm import pictures
from mm.data.example import Source, digest, holdout_keys


@dataclass(frozen=True)
class Gallery:
    """Pictures over white as squares, and what is known of each. What a source doesn't say is "" or −1."""

    pixels: UInt8[Tensor, "N 3 S S"]
    keys: list[str]
    captions: list[str]
    styles: list[str]
    kinds: list[str]
    """category/subcategory."""
    digits: list[int]
    held: list[bool]
    """Whether the picture is held out (by its key)."""
    identity: str
    """Of the source, for caches."""

    def __len__(self) -> int:
        return len(self.keys)

    def where(self, held: bool) -> list[int]:
        """Indices of the held-out pictures, or of the others."""
        return [index for index, out in enumerate(self.held) if out == held]

    def subset(self, indices: Sequence[int]) -> Gallery:
        chosen = {
            f.name: [getattr(self, f.name)[i] for i in indices]
            for f in fields(self)
            if f.name not in ("pixels", "identity")
        }
        identity = digest(self.identity, *map(str, indices))
        return Gallery(pixels=self.pixels[list(indices)], identity=identity, **chosen)

    def __add__(self, other: Gallery) -> Gallery:
        joined = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name not in ("pixels", "identity")
        }
        both = torch.cat((self.pixels, other.pixels))
        return Gallery(pixels=both, identity=digest(self.identity, other.identity), **joined)


def load_gallery(source: Source, side: int, holdout_every: int = 20) -> Gallery:
    """Every picture of a source, fitted to `side`×`side`. Broken ones are skipped with the source's counted warning.

    The source must be whole (split "all"): what is held out follows from `holdout_every` here, by the same rule.
    Raises `ValueError` for a part of a source, or one without pictures.
    """
    if source.split != "all":
        raise ValueError(
            f"{source.what} is given as its split {source.split!r}; give the whole source (split='all'), the parts are "
            "taken here"
        )
    held = holdout_keys((source.key(index) for index in range(len(source))), holdout_every)
    pixels: list[Tensor] = []
    rows: list[tuple[str, str, str, str, int, bool]] = []
    for example in source:
        if example.get("image") is None:
            continue
        pixels.append(pictures.to_bytes(pictures.fit_square(example["image"], side)))
        kind = f"{example.get('category', '')}/{example.get('subcategory', '')}"
        caption, style, digit = example.get("caption", ""), example.get("style", ""), example.get("digit", -1)
        rows.append((example["key"], str(caption), str(style), kind, int(digit), example["key"] in held))
    if not pixels:
        raise ValueError(f"{source.what} holds no pictures; give a source of pictures")
    keys, captions, styles, kinds, digits, out = (list(column) for column in zip(*rows, strict=True))
    return Gallery(torch.stack(pixels), keys, captions, styles, kinds, digits, out, source.identity)


@dataclass(frozen=True)
class Match:
    """What is known of the nearest picture. Pixel-identical pictures are one picture with several descriptions."""

    distance: float
    captions: frozenset[str]
    styles: frozenset[str]
    kinds: frozenset[str]
    named: frozenset[tuple[str, str]]
    """(caption, style)."""


class Nearest:
    """Search among the distinct pictures of a gallery by Euclidean distance: between pixels (0 to 255), or between
    feature vectors of length 1 if `features` of every picture are given."""

    def __init__(self, gallery: Gallery, features: Float[Tensor, "N F"] | None = None) -> None:
        if features is not None and len(features) != len(gallery):
            raise ValueError(f"got features of {len(features)} pictures for a gallery of {len(gallery)}; give all")
        self.gallery = gallery
        groups: dict[bytes, list[int]] = {}
        for index, picture in enumerate(gallery.pixels):
            groups.setdefault(picture.numpy().tobytes(), []).append(index)
        self.members = list(groups.values())
        first = [members[0] for members in self.members]
        self.by_features = features is not None
        vectors = gallery.pixels if features is None else features
        self.vectors = self.prepare(vectors[first])

    def prepare(self, vectors: Tensor) -> Float[Tensor, "Q F"]:
        """Features or pictures as the vectors that are compared."""
        flat = vectors.flatten(1).float()
        return F.normalize(flat, dim=-1) if self.by_features else flat - 128.0  # centred: less rounding

    def distances(self, queries: Tensor) -> Float[Tensor, "Q G"]:
        """From each query (pixels, or features where the search is by features) to each distinct picture."""
        return torch.cdist(self.prepare(queries), self.vectors)

    def among(self, styles: Sequence[str]) -> Bool[Tensor, " G"]:
        """Which distinct pictures occur in one of the styles."""
        wanted = set(styles)
        found = [any(self.gallery.styles[i] in wanted for i in members) for members in self.members]
        return torch.tensor(found, dtype=torch.bool)

    def match(self, queries: Tensor) -> list[Match]:
        """The nearest picture of each query."""
        if not len(queries):
            return []
        distance, group = self.distances(queries).min(1)
        return [self.describe(int(g), float(d)) for g, d in zip(group, distance, strict=True)]

    def describe(self, group: int, distance: float) -> Match:
        members, g = self.members[group], self.gallery
        return Match(
            distance=distance,
            captions=frozenset(g.captions[i] for i in members),
            styles=frozenset(g.styles[i] for i in members),
            kinds=frozenset(g.kinds[i] for i in members),
            named=frozenset((g.captions[i], g.styles[i]) for i in members),
        )

    def ranks(self, queries: Tensor, captions: Sequence[str], styles: Sequence[str]) -> Int[Tensor, " Q"]:
        """For each query: how many distinct pictures of its style are strictly nearer than the nearest picture of its
        caption and style (0: it comes first).

        Raises `ValueError` where the gallery has no such picture.
        """
        if not len(queries):
            return torch.zeros(0, dtype=torch.int64)
        place: dict[tuple[str, str], list[int]] = {}
        for group, members in enumerate(self.members):
            for i in members:
                place.setdefault((self.gallery.captions[i], self.gallery.styles[i]), []).append(group)
        inside = {style: self.among([style]) for style in set(styles)}
        out = []
        for row, caption, style in zip(self.distances(queries), captions, styles, strict=True):
            if (caption, style) not in place:
                raise ValueError(f"the gallery has no picture {caption!r} in style {style!r} to look for")
            best = row[place[caption, style]].min()
            out.append(int((row[inside[style]] < best).sum()))
        return torch.tensor(out)
