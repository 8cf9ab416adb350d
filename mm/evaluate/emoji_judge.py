"""The network that judges emoji, and what it knows of the real pictures.

It is trained on the real pictures themselves to tell which caption a picture has (in whatever style), which category
and subcategory, and which style. Distance "by features" is Euclidean between its penultimate features scaled to length
1. Because it knows each caption in both styles, pictures of one concept in two styles lie near each other.

Of some concepts that have every style (`controls`) one picture is kept from it: what it says of these pictures tells
how far it can be trusted about a concept in a style that it has never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mm.evaluate.gallery import Gallery, Nearest
from mm.evaluate.networks import Judge, Say, obtain
from mm.evaluate.protocol import Protocol

DISTANCES = ("pixel", "feature")


@dataclass(frozen=True)
class EmojiJudge:
    """A gallery, the trained network, and both searches."""

    gallery: Gallery
    judge: Judge
    styles: list[str]
    controls: list[int]
    """Indices of the pictures that the network was not trained on."""

    def features(self, pixels: UInt8[Tensor, "N 3 S S"]) -> Float[Tensor, "N F"]:
        return self.judge.features(pixels)

    @cached_property
    def known(self) -> Float[Tensor, "N F"]:
        """Features of the gallery."""
        return self.features(self.gallery.pixels)

    @cached_property
    def searches(self) -> dict[str, Nearest]:
        """By pixels and by features."""
        return {"pixel": Nearest(self.gallery), "feature": Nearest(self.gallery, self.known)}

    def queries(self, pixels: UInt8[Tensor, "N 3 S S"]) -> dict[str, Tensor]:
        """What each search asks with."""
        return {"pixel": pixels, "feature": self.features(pixels)}

    def looks_like(self, pixels: UInt8[Tensor, "N 3 S S"], styles: Sequence[str]) -> list[bool]:
        """Whether the network takes each picture for its style."""
        said = self.judge.classify(pixels, "style").tolist()
        return [self.styles[number] == style for number, style in zip(said, styles, strict=True)]


def emoji_judge(gallery: Gallery, protocol: Protocol, folder: Path | None, say: Say = lambda line: None) -> EmojiJudge:
    """Trained on all pictures but the controls; the model under test has no part in it."""
    controls = choose_controls(gallery, protocol)
    kept = set(controls)
    rows = [index for index in range(len(gallery)) if index not in kept]
    labels, classes = {}, {}
    names = {"caption": gallery.captions, "kind": gallery.kinds, "style": gallery.styles}
    for question, values in names.items():
        known = {value: number for number, value in enumerate(sorted(set(values)))}
        labels[question] = torch.tensor([known[values[row]] for row in rows])
        classes[question] = len(known)
    judge = obtain(
        "emoji",
        gallery.pixels[rows],
        labels,
        classes,
        protocol.emoji_judge,
        side=protocol.side,
        seed=protocol.seed,
        folder=folder,
        identity=(gallery.identity, str(gallery.pixels.shape[-1])),
        say=say,
    )
    return EmojiJudge(gallery, judge, sorted(set(gallery.styles)), controls)


def by_concept(gallery: Gallery) -> dict[str, dict[str, int]]:
    """Key → style → index. A concept has one key in all styles."""
    found: dict[str, dict[str, int]] = {}
    for index, (key, style) in enumerate(zip(gallery.keys, gallery.styles, strict=True)):
        found.setdefault(key, {}).setdefault(style, index)
    return found


def choose_controls(gallery: Gallery, protocol: Protocol) -> list[int]:
    """One picture, its style in turn, of each of up to `protocol.controls` concepts that have every style: at most a
    tenth of these, without skin tones (whose variants would give the concept away)."""
    styles = sorted(set(gallery.styles))
    if len(styles) < 2:
        return []
    whole = [
        places
        for places in by_concept(gallery).values()
        if len(places) == len(styles) and protocol.skin_tone not in gallery.captions[next(iter(places.values()))]
    ]
    rng = torch.Generator().manual_seed(protocol.seed)
    chosen = torch.randperm(len(whole), generator=rng)[: min(protocol.controls, len(whole) // 10)]
    return [whole[place][styles[number % len(styles)]] for number, place in enumerate(chosen.tolist())]
