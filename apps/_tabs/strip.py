"""A document's token stream as a picture: a coloured cell a position, and who sees whom. HTML and SVG made here, nothing fetched.

Letters in shapes: T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import torch

from mm.apps._tabs.look import COLOURS
from mm.attention import dense

if TYPE_CHECKING:
    from PIL import Image

    from mm.interfaces import Modality
    from mm.stream import TokenStream
    from mm.vocabulary import Vocabulary

MOST = 192
"""Positions that are shown; what follows is said in words."""


@dataclass(frozen=True)
class Cell:
    """A position as it is shown."""

    medium: str
    """Whose colour it has."""
    label: str
    order: int
    copy: int
    time: float
    target: int
    colour: str = ""
    """Of the part of a picture that it stands for."""


def cells(
    stream: TokenStream, modalities: Sequence[Modality], vocabulary: Vocabulary, picture: Image.Image | None = None
) -> list[Cell]:
    """The first positions of a stream. `picture`: what an item with rows and columns shows, for the colours of its cells."""
    media = [medium(modality) for modality in modalities]
    places = colours(stream, picture)
    out = []
    for at in range(min(len(stream), MOST)):
        owner, token = int(stream.modality[at]), int(stream.ids[at])
        host = vocabulary.host
        control = owner == 0 and token >= host.stop
        if control:
            label = vocabulary.describe(token).strip("<>")
        elif owner == 0:
            label = letters(modalities[0], token)
        else:
            label = str(token - vocabulary.entries[owner].start) if token >= 0 else "∿"
        out.append(
            Cell(
                medium="control" if control else media[owner],
                label=label,
                order=int(stream.order[at]),
                copy=int(stream.copy[at]),
                time=round(float(stream.time[at]), 2),
                target=int(stream.target[at]),
                colour=places.get(at, ""),
            )
        )
    return out


def medium(modality: Modality) -> str:
    from mm.pipelines.media import medium_of

    return medium_of(modality.tokenizer.spec) or "text"


def letters(host: Modality, token: int) -> str:
    """A token of text as one reads it."""
    text = str(host.tokenizer.decode(host.tokenizer.spec.item(torch.tensor([token]), (1,))).value)
    return "␣" if text == " " else text.strip() or "·"


def colours(stream: TokenStream, picture: Image.Image | None) -> dict[int, str]:
    """Position → colour of the part of the picture at its coordinates."""
    found: dict[int, str] = {}
    if picture is None:
        return found
    for owner in range(1, int(stream.modality.max()) + 1):
        mine = (stream.modality == owner).nonzero().flatten()
        if not len(mine):
            continue
        place = stream.position[mine][:, 1:]
        place = place - place.floor().min(0).values
        extent = place.max(0).values.floor() + 1
        if float(extent.min()) < 2:  # a list
            continue
        for at, (row, column) in zip(mine.tolist(), (place + 0.5).div(extent).clamp(0, 0.999).tolist(), strict=True):
            pixel = picture.getpixel((int(column * picture.width), int(row * picture.height)))
            assert isinstance(pixel, tuple)
            found[at] = "#{:02x}{:02x}{:02x}".format(*pixel[:3])
    return found


def strip(shown: Sequence[Cell]) -> str:
    """The positions side by side, wrapped as text is: content, order, and copy and time where they aren't 0."""
    out = []
    for at, cell in enumerate(shown):
        swatch = (
            f'<span class="swatch" style="background:{mixed(cell.colour, cell.time)}"></span>' if cell.colour else ""
        )
        more = (f"c{cell.copy} " if cell.copy else "") + (f"t{cell.time:.1f}".replace("0.", ".") if cell.time else "")
        title = f"position {at}: {cell.medium} {cell.label}, order {cell.order}, copy {cell.copy}, time {cell.time:g}"
        title += f", predicts position {cell.target}" if cell.target >= 0 else ", predicts nothing"
        held = "?" if cell.time == 1 else short(cell.label)
        noisy = ' class="noisy"' if cell.time or cell.copy else ""
        out.append(
            f'<div{noisy} style="background:{COLOURS[cell.medium]}" title="{escape(title)}">'
            f"<b>{escape(held)}</b>{swatch}{cell.order}<br>{more or '&nbsp;'}</div>"
        )
    return f'<div class="strip">{"".join(out)}</div>'


def legend(shown: Sequence[Cell]) -> str:
    parts = [
        f'<span><i style="background:{COLOURS[name]}"></i>{name}</span>'
        for name in COLOURS
        if any(cell.medium == name for cell in shown)
    ]
    if any(cell.time or cell.copy for cell in shown):
        parts.append('<span><i style="outline:2px dashed #f43f5e"></i>read noisy or masked</span>')
    parts.append("<span>number: order; c: copy; t: time</span>")
    return f'<div class="legend">{"".join(parts)}</div>'


def matrix(stream: TokenStream, shown: Sequence[Cell]) -> str:
    """Who sees whom, as SVG: row i is coloured where position i sees position j, in the colour of j's modality."""
    count = len(shown)
    seen = dense(stream)[:count, :count].tolist()
    drawn = []
    for row, sees in enumerate(seen):
        start = 0
        for column in range(1, count + 1):
            if column < count and sees[column] == sees[start] and shown[column].medium == shown[start].medium:
                continue
            if sees[start]:
                colour = COLOURS[shown[start].medium]
                drawn.append(
                    f'<rect x="{start + 2}" y="{row + 2}" width="{column - start}" height="1" fill="{colour}"/>'
                )
            start = column
    for at, cell in enumerate(shown):  # whose rows and columns these are
        colour = COLOURS[cell.medium]
        drawn.append(f'<rect x="{at + 2}" y="0" width="1" height="1.4" fill="{colour}"/>')
        drawn.append(f'<rect x="0" y="{at + 2}" width="1.4" height="1" fill="{colour}"/>')
    label = f"Visibility of {count} positions: row i is coloured where position i sees position j"
    size = count + 2
    return (
        f'<div class="matrix"><svg viewBox="0 0 {size} {size}" role="img" aria-label="{label}" '
        f'shape-rendering="crispEdges" xmlns="http://www.w3.org/2000/svg">{"".join(drawn)}</svg></div>'
    )


def short(label: str) -> str:
    """A label that fits a cell: controls have signs."""
    first, _, rest = label.partition(" ")
    return {"begin": "▶", "end": "■", "size": rest}.get(first, label)[:4] if rest else label[:4]


def mixed(colour: str, time: float) -> str:
    """A colour under so much grey as there is noise."""
    parts = [round((1 - time) * int(colour[at : at + 2], 16) + time * 128) for at in (1, 3, 5)]
    return "#{:02x}{:02x}{:02x}".format(*parts)
