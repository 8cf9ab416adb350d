"""The pictures of docs/stream.md: `python docs/figures/stream.py [NAME …] [--out FOLDER]` writes docs/stream-NAME.svg.

Each shows a document as it is laid out for training: a column a position, what it holds, the integers that decide who sees whom,
what it predicts; and below, who sees whom. Nothing is drawn by hand: the documents come from `mm.layout`, the matrix from
`mm.attention`, labels and colours from the app's page on how it works. Takes a second.

Letters in shapes: T positions, K sub-codes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm.apps._tabs.look import COLOURS
from mm.apps._tabs.strip import Cell, cells, mixed, short
from mm.attention import dense
from mm.audio import Audio
from mm.heads.lm import LMHead
from mm.interfaces import Modality, ModalityTokenizer, Order
from mm.layout import DocumentBuilder, Segment
from mm.orders.blocks import Blocks
from mm.orders.delay import Delay
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.orders.scales import Scales
from mm.patterns import NONE
from mm.stream import TokenStream, pack
from mm.testing import Frames, Levels, Palette
from mm.tokenizers.image_msvq import ImageMSVQ
from mm.tokenizers.image_patches import ImagePatches
from mm.tokenizers.text_bytes import TextBytes
from mm.vocabulary import Vocabulary

DOCS = Path(__file__).parent.parent
FLAG = ("#dc2626", "#f8fafc", "#2563eb", "#facc15", "#16a34a", "#facc15", "#2563eb", "#f8fafc", "#dc2626")
"""A picture of 3×3 pixels."""


@dataclass(frozen=True)
class Drawn:
    """A stream and its positions as they are shown."""

    stream: TokenStream
    cells: Sequence[Cell]


# --- the documents ----------------------------------------------------------------------------------------------------


def raster() -> Drawn:
    return text_and(Palette(3), Raster(), flag())


def masked() -> Drawn:
    return text_and(Palette(3), Masked(), flag(), seed=1)


def scales() -> Drawn:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = ImageMSVQ(size=12, scales=[1, 2, 3], channels=8, codebook_size=16, code_dim=4).eval()
    return text_and(tokenizer, Scales(), flag())


def blocks() -> Drawn:
    return text_and(ImagePatches(size=3, patch=1), Blocks(block=3, shift=False), flag())


def delay() -> Drawn:
    return text_and(Levels(num_codes=3), Delay(), melody(12), name="sound")


def interleaved() -> Drawn:
    """A text, a picture, a text, a sound, each in an order of its own."""
    modalities = [
        modality("text", TextBytes(), Raster()),
        modality("image", Palette(2), Masked()),
        modality("sound", Frames(dim=2), Blocks(block=2, shift=False)),
    ]
    parts = [("text", "see"), ("image", flag().crop((0, 0, 2, 2))), ("text", "hear"), ("sound", melody(8))]
    return laid_out(modalities, [Segment(name, content) for name, content in parts], flag().crop((0, 0, 2, 2)), seed=2)


def packed() -> Drawn:
    """Three documents in one pack."""
    modalities = [modality("text", TextBytes(), Raster()), modality("image", Palette(2), Masked())]
    small = flag().crop((0, 0, 2, 2))
    documents: list[list[tuple[str, Any]]] = [
        [("text", "a"), ("image", small)],
        [("text", "words")],
        [("image", small), ("text", "b")],
    ]
    drawn = [
        laid_out(modalities, [Segment(name, content) for name, content in document], small, seed=number)
        for number, document in enumerate(documents)
    ]
    return Drawn(pack([one.stream for one in drawn]), [cell for one in drawn for cell in one.cells])


DOCUMENTS: dict[str, Callable[[], Drawn]] = {
    made.__name__: made for made in (raster, masked, scales, blocks, delay, interleaved, packed)
}


def text_and(tokenizer: ModalityTokenizer, order: Order, item: Any, *, name: str = "image", seed: int = 0) -> Drawn:
    """A given text, and an item that is learned."""
    modalities = [modality("text", TextBytes(), Raster()), modality(name, tokenizer, order)]
    picture = item if isinstance(item, Image.Image) else None
    return laid_out(modalities, [Segment("text", "flag", loss=False), Segment(name, item)], picture, seed=seed)


def modality(name: str, tokenizer: ModalityTokenizer, order: Order) -> Modality:
    order.check(tokenizer.spec)
    order.attach(tokenizer)
    return Modality(name=name, tokenizer=tokenizer, head=LMHead(), order=order)


def laid_out(
    modalities: Sequence[Modality], document: Sequence[Segment], picture: Image.Image | None, seed: int = 0
) -> Drawn:
    vocabulary = Vocabulary([(one.name, one.tokenizer.spec) for one in modalities])
    stream = DocumentBuilder(modalities, vocabulary)(document, torch.Generator().manual_seed(seed)).validate()
    shown = cells(stream, modalities, vocabulary, picture)
    return Drawn(stream, [cell if cell.medium == "picture" else replace(cell, colour="") for cell in shown])


def flag() -> Image.Image:
    picture = Image.new("RGB", (3, 3))
    for at, colour in enumerate(FLAG):
        rgb = tuple(int(colour[n : n + 2], 16) for n in (1, 3, 5))
        picture.putpixel((at % 3, at // 3), rgb)
    return picture


def melody(count: int) -> Audio:
    return Audio(np.sin(np.arange(count) * 1.1).astype(np.float32), 100)


# --- the drawing ------------------------------------------------------------------------------------------------------

SIDE, ROW, LINE, LEFT, TOP = 25, 16, 15, 96, 8
"""Pixels: of a column, of a row of the matrix, of a line of text, of the words on the left, of the space above."""
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
NOISY = "#e11d48"


def svg(drawn: Drawn) -> str:
    """Content, integers and targets of each position, and below, aligned with them, who sees whom."""
    stream, shown = drawn.stream, drawn.cells
    count, lines = len(shown), contents(stream, shown)
    height = LINE * max(map(len, lines)) + 12
    parts: list[str] = []

    y = TOP
    parts.append(words(LEFT - 8, y + height / 2 + 4, "holds", "end"))
    for at, cell in enumerate(shown):
        parts.append(box(LEFT + at * SIDE, y, height, cell, lines[at]))
    y += height + 4
    for name, row in integers(stream, shown).items():
        parts.append(words(LEFT - 8, y + LINE - 4, name, "end"))
        parts += [words(LEFT + (at + 0.5) * SIDE, y + LINE - 4, text, "middle") for at, text in enumerate(row) if text]
        y += LINE
    y += 8
    parts.append(words(LEFT - 8, y + SIDE / 2 + 8, "who sees ↓", "end"))
    parts.append(words(LEFT - 8, y + SIDE / 2 + 8 + LINE, "whom →", "end"))
    parts += matrix(stream, shown, y)
    y += count * ROW
    width, total = LEFT + count * SIDE + 10, round(y + 10)
    label = f"{count} positions, what each holds and predicts, and who sees whom"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}" role="img" '
        f'aria-label="{label}" font-family="{FONT}" font-size="11">\n<rect width="{width}" height="{total}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def contents(stream: TokenStream, shown: Sequence[Cell]) -> list[list[str]]:
    """What is written in each position's box: what the backbone reads there, a line a sub-code."""
    out = [["?" if cell.time == 1 else short(cell.label)] for cell in shown]
    for record in stream.codes.values():
        for at, row in zip(record.index.tolist(), record.values.tolist(), strict=True):
            out[at] = ["–" if code == NONE else str(code) for code in row]
    return out


def integers(stream: TokenStream, shown: Sequence[Cell]) -> dict[str, list[str]]:
    """A line a field of the stream; fields that are 0 everywhere are left out."""
    document = stream.document.tolist()
    rows = {
        "document": [str(number) for number in document] if stream.num_documents > 1 else [],
        "order": [str(cell.order) for cell in shown],
        "copy": [str(cell.copy) for cell in shown] if any(cell.copy for cell in shown) else [],
        "time": [f"{cell.time:.2g}".removeprefix("0") or "0" for cell in shown]
        if any(cell.time for cell in shown)
        else [],
        "predicts": [predicts(at, target) for at, target in enumerate(stream.target.tolist())],
    }
    return {name: row for name, row in rows.items() if row}


def predicts(at: int, target: int) -> str:
    """The next position, itself, nothing; or how far ahead."""
    return {-1: "", at: "↺", at + 1: "→"}.get(target, f"+{target - at}")


def box(x: float, y: float, height: float, cell: Cell, lines: Sequence[str]) -> str:
    colour, marked = COLOURS[cell.medium], bool(cell.time or cell.copy)
    edge = f' stroke="{NOISY}" stroke-width="2" stroke-dasharray="3 2"' if marked else ""
    out = [
        f'<rect x="{x + 1:g}" y="{y:g}" width="{SIDE - 2}" height="{height:g}" rx="4" fill="{colour}"{edge}/>',
    ]
    for number, line in enumerate(lines):
        out.append(words(x + SIDE / 2, y + LINE * (number + 1) - 3, line, "middle", "#ffffff", "bold"))
    if cell.colour:
        out.append(
            f'<rect x="{x + 5:g}" y="{y + height - 11:g}" width="{SIDE - 10}" height="8" rx="2" '
            f'fill="{mixed(cell.colour, cell.time)}"/>'
        )
    return "".join(out)


def words(x: float, y: float, text: str, anchor: str, colour: str = "#334155", weight: str = "normal") -> str:
    bold = f' font-weight="{weight}"' if weight != "normal" else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}"{bold}>{escape(text)}</text>'


def matrix(stream: TokenStream, shown: Sequence[Cell], top: float) -> list[str]:
    """Row i is filled where position i sees position j, in the colour of j's medium; paler where j is noisy or masked."""
    out, filled = [], defaultdict[tuple[str, bool], list[str]](list)
    width = len(shown) * SIDE
    for row, sees in enumerate(dense(stream).tolist()):
        y = top + row * ROW
        colour = COLOURS[shown[row].medium]
        out.append(f'<rect x="{LEFT}" y="{y + 1:g}" width="{width}" height="{ROW - 2}" fill="#f1f5f9"/>')
        out.append(f'<rect x="{LEFT - 6}" y="{y + 1:g}" width="4" height="{ROW - 2}" fill="{colour}"/>')
        for column, seen in enumerate(sees):
            if seen:
                cell = shown[column]
                place = f"M{LEFT + column * SIDE + 1} {y + 1:g}h{SIDE - 2}v{ROW - 2}h{2 - SIDE}z"
                filled[COLOURS[cell.medium], bool(cell.copy or cell.time)].append(place)
    for (colour, noisy), places in filled.items():
        pale = ' fill-opacity="0.5"' if noisy else ""
        out.append(f'<path fill="{colour}"{pale} d="{"".join(places)}"/>')
    return out


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DOCUMENTS))
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(DOCUMENTS)):
        parser.error(f"no picture {unknown[0]!r}; there are {', '.join(DOCUMENTS)}")
    places = []
    for name in options.names or DOCUMENTS:
        places.append(options.out / f"stream-{name}.svg")
        places[-1].write_text(svg(DOCUMENTS[name]()), encoding="utf-8")
    return places


if __name__ == "__main__":
    main()
