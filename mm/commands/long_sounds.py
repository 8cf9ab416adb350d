"""`mm tokenize` of sounds too long for one piece: encoded, decoded and measured piece by piece, however long they are."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.audio import MAX_SAMPLES, MAX_SECONDS, Audio, read_chunks

if TYPE_CHECKING:
    from mm.interfaces import ModalityTokenizer

PIECE = 60.0
"""Seconds of a piece, whole elements of most tokenizers."""


def sound_or_pieces(file: str) -> Audio | Iterator[Audio]:
    """A sound of up to `MAX_SECONDS` as a whole, a longer one as its pieces. Raises `ValueError` as `read_chunks`."""
    pieces = read_chunks(file, PIECE)
    first: list[Audio] = []
    for piece in pieces:
        first.append(piece)
        samples = sum(len(one.samples) for one in first)
        if samples > min(MAX_SECONDS * piece.rate, MAX_SAMPLES):
            return chain(first, pieces)
    return Audio(np.concatenate([one.samples for one in first]), first[0].rate)


def tokenize_pieces(
    pieces: Iterator[Audio], tokenizer: ModalityTokenizer, keep: bool
) -> tuple[dict[str, Any], Audio | None]:
    """Figures as those of a whole sound, and what was decoded if it is to be kept (`keep`).

    Counts are sums over the pieces, and what is lost is the mean over them by their seconds.

    Raises:
        ValueError: damage in the midst of the file, or a decoded sound too long to keep.
    """
    from mm.commands.tokenize import bits, lost_sound, waveform

    spec = tokenizer.spec
    size = encoding = decoding = 0.0
    grids: list[tuple[int, ...]] = []
    each: list[dict[str, Any]] = []
    kept: list[Any] = []
    for piece in pieces:
        start = time.perf_counter()
        encoded = tokenizer.encode(piece)
        middle = time.perf_counter()
        grids.append(encoded.grid)
        size, encoding = size + bits(spec, encoded), encoding + middle - start
        figures: dict[str, Any] = {}
        if tokenizer.decodes:
            decoded = tokenizer.decode(encoded).value
            decoding += time.perf_counter() - middle
            figures = lost_sound(piece, decoded, waveform(tokenizer))
            samples = decoded.samples[: round(piece.seconds * decoded.rate)]  # not what fills the last element up
            figures["decoded_seconds"] = len(samples) / decoded.rate
            if keep:
                kept.append(samples)
        each.append(figures | {"seconds": piece.seconds})
        if sum(map(len, kept)) > MAX_SAMPLES:
            raise ValueError(
                f"what is decoded is longer than the {MAX_SAMPLES / spec.sample_rate:g} s that --out writes; leave it out, "
                "or cut the sound into parts"
            )
    count = sum(grid[0] for grid in grids)
    figures = {
        "tokens": count * math.prod(grids[0][1:]),
        "grid": [count, *grids[0][1:]],
        "pieces": len(each),
        "bits": round(size, 1),
        **together(each),
        "encode_ms": round(1000 * encoding, 2),
        "decode_ms": round(1000 * decoding, 2),
        "bits_per_second": round(size / sum(piece["seconds"] for piece in each), 1),
    }
    return figures, Audio(np.concatenate(kept), spec.sample_rate) if kept else None


def together(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of pieces as those of the whole: seconds are sums, rates are equal, what else there is are means by seconds."""
    out = dict(each[0])
    for name in out:
        values = [(one[name], one["seconds"]) for one in each if one[name] is not None]
        if name in ("seconds", "decoded_seconds"):
            out[name] = round(sum(value for value, _ in values), 4)
        elif not name.endswith("sample_rate"):
            total = sum(seconds for _, seconds in values)
            out[name] = round(sum(value * seconds for value, seconds in values) / total, 4) if values else None
    return out
