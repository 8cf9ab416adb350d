"""Emoji in a style that the model has never seen them in.

Some concepts have a picture in one style only. Their picture in the missing style is nowhere in the training data, so
whether the model drew *it* can't be told from that data. What can be told:

- whether the result is in the asked style, to a network's eye and by its nearest real picture;
- whether it shows the concept: the rank of the concept's *other* picture, the one that exists, among all pictures of
  that other style. This asks a distance to see through the style, which none does fully; so the same is measured on
  real pictures (`controls`, kept from the network) and on pictures generated in seen styles, to compare with;
- whether the model merely repeats the picture it knows: the nearest of all real pictures is the concept in its known
  style.

Where somebody has the missing pictures (`references`), the real question is answered too: the rank of the true picture
among all pictures of the asked style, top-1 and top-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.evaluate.emoji_judge import DISTANCES, EmojiJudge, by_concept
from mm.evaluate.gallery import Gallery, Nearest
from mm.evaluate.networks import Say
from mm.evaluate.protocol import Protocol
from mm.evaluate.results import Figure, share
from mm.evaluate.subject import Drawn, Subject

FAMILY = "emoji"
TOPS = (1, 5)


@dataclass(frozen=True)
class Missing:
    """A concept to be asked for in a style it doesn't have."""

    row: int
    """Its picture in a style that it has."""
    style: str
    """The style it lacks."""


def missing_styles(gallery: Gallery, rows: Sequence[int]) -> list[Missing]:
    """Every style that a concept among `rows` lacks, by key."""
    styles, allowed = sorted(set(gallery.styles)), set(rows)
    return [
        Missing(row, style)
        for _, places in sorted(by_concept(gallery).items())
        for row in [next(iter(places.values()))]
        for style in styles
        if style not in places and row in allowed
    ]


def missing_style_figures(
    subject: Subject,
    judge: EmojiJudge,
    seen: Sequence[int],
    protocol: Protocol,
    references: Gallery | None = None,
    say: Say = lambda line: None,
) -> tuple[list[Figure], list[Drawn]]:
    """Figures of concepts asked for in the style they lack; none where every concept has every style.

    Raises `ValueError` for references that are not at the size of the gallery.
    """
    gallery = judge.gallery
    figures = control_figures(judge)
    asked = missing_styles(gallery, seen)
    if not asked:
        return figures, []
    prompts = [protocol.emoji_prompt.format(caption=gallery.captions[m.row], style=m.style) for m in asked]
    say(f"emoji: drawing {len(prompts)} in the missing style")
    drawn = subject.draw(prompts, protocol.seed + 3)
    rows, styles = [m.row for m in asked], [m.style for m in asked]
    name = "missing style"
    figures.append(share(FAMILY, f"{name}: network sees the asked style", judge.looks_like(drawn.pixels, styles)))
    queries = judge.queries(drawn.pixels)
    for distance in DISTANCES:
        pairs = list(zip(judge.searches[distance].match(queries[distance]), asked, strict=True))
        fits = [m.style in got.styles for got, m in pairs]
        figures.append(share(FAMILY, f"{name}: nearest has the asked style, {distance}", fits))
        repeated = [(gallery.captions[m.row], gallery.styles[m.row]) in got.named for got, m in pairs]
        figures.append(share(FAMILY, f"{name}: nearest is the known style's picture, {distance}", repeated))
        kind = [gallery.kinds[m.row] in got.kinds for got, m in pairs]
        figures.append(share(FAMILY, f"{name}: nearest is of the subcategory, {distance}", kind))
    figures += rank_figures(judge, name, drawn.pixels, rows)
    if references is not None:
        figures += reference_figures(subject, judge, drawn.pixels, asked, references)
    return figures, [drawn]


def rank_figures(judge: EmojiJudge, name: str, pixels: Tensor, rows: Sequence[int], **more: bool) -> list[Figure]:
    """Top-1 and top-5 of the picture of `rows` among all pictures of its style, by each distance."""
    gallery, queries = judge.gallery, judge.queries(pixels)
    captions, styles = [gallery.captions[row] for row in rows], [gallery.styles[row] for row in rows]
    figures = []
    for distance in DISTANCES:
        ranks = judge.searches[distance].ranks(queries[distance], captions, styles)
        for top in TOPS:
            title = f"{name}: concept's picture in the other style, top-{top}, {distance}"
            figures.append(share(FAMILY, title, (ranks < top).tolist(), **more))
    return figures


def other_style_figures(
    judge: EmojiJudge, name: str, pixels: Tensor, rows: Sequence[int], **more: bool
) -> list[Figure]:
    """`rank_figures` for pictures that show those of `rows`: the rank of the concept's picture in another style.
    Concepts of one style are left out."""
    gallery, concepts = judge.gallery, by_concept(judge.gallery)
    kept, others = [], []
    for number, row in enumerate(rows):
        for style, other in sorted(concepts[gallery.keys[row]].items()):
            if style != gallery.styles[row]:
                kept.append(number)
                others.append(other)
                break
    return rank_figures(judge, name, pixels[kept], others, **more) if kept else []


def control_figures(judge: EmojiJudge) -> list[Figure]:
    """What network and distances say of real pictures whose concepts the network knows in another style only."""
    if not judge.controls:
        return []
    pixels = judge.gallery.pixels[judge.controls]
    styles = [judge.gallery.styles[row] for row in judge.controls]
    name = "real pictures unseen by the network"
    verdict = share(FAMILY, f"{name}: sees their style", judge.looks_like(pixels, styles), control=True)
    return [verdict, *other_style_figures(judge, name, pixels, judge.controls, control=True)]


def reference_figures(
    subject: Subject, judge: EmojiJudge, pixels: Tensor, asked: Sequence[Missing], references: Gallery
) -> list[Figure]:
    """Top-1 and top-5 of the true picture among all pictures of the asked style (the gallery's and the references'),
    for generated pictures and, as a control, for the true ones after the tokenizer. Concepts without a reference are
    left out; so are these figures where none has one."""
    gallery = judge.gallery
    if references.pixels.shape[1:] != gallery.pixels.shape[1:]:
        raise ValueError(
            f"references have pictures {tuple(references.pixels.shape[1:])}, the gallery "
            f"{tuple(gallery.pixels.shape[1:])}; load both at one size"
        )
    names = zip(references.captions, references.styles, strict=True)
    held = {pair: index for index, pair in enumerate(names)}
    kept = [number for number, m in enumerate(asked) if (gallery.captions[m.row], m.style) in held]
    if not kept:
        return []
    captions, styles = [gallery.captions[asked[n].row] for n in kept], [asked[n].style for n in kept]
    true = references.pixels[[held[pair] for pair in zip(captions, styles, strict=True)]]
    together = gallery + references
    features = torch.cat((judge.known, judge.features(references.pixels)))
    searches = {"pixel": Nearest(together), "feature": Nearest(together, features)}
    figures = []
    for name, shown, control in (
        ("missing style", pixels[kept], False),
        ("missing style, true after the tokenizer", subject.reconstruct(true), True),
    ):
        queries = judge.queries(shown)
        for distance, search in searches.items():
            ranks = search.ranks(queries[distance], captions, styles)
            for top in TOPS:
                title = f"{name}: true picture, top-{top}, {distance}"
                figures.append(share(FAMILY, title, (ranks < top).tolist(), control=control))
    return figures
