"""What the picture tokenizer keeps (PSNR on pictures it has not seen) and how much of its codebook it uses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mm.evaluate.gallery import Gallery
from mm.evaluate.protocol import Protocol
from mm.evaluate.results import Figure, mean
from mm.evaluate.subject import Subject
from mm.interfaces import Encoded
from mm.pictures import to_unit
from mm.reconstruction import psnr, usage_and_perplexity

FAMILY = "tokenizer"


def evaluate_tokenizer(subject: Subject, galleries: Mapping[str, Gallery], protocol: Protocol) -> list[Figure]:
    """PSNR (mean over pictures, dB, 8-bit RGB at the tokenizer's size) of each source and each of its styles, on
    held-out pictures; codebook usage and perplexity on these and on an even choice of all pictures.

    Usage is the share of codes that occur at all; perplexity is exp(entropy) of their frequencies; both are averaged
    over the sub-codebooks, if there are several. A continuous tokenizer has neither.
    """
    figures, counted = [], []
    for name, gallery in galleries.items():
        held = gallery.where(held=True)
        what = "held-out" if held else "all (nothing is held out)"
        chosen = gallery.subset(held or range(len(gallery)))
        back = subject.reconstruct(chosen.pixels)
        quality = psnr(to_unit(chosen.pixels), to_unit(back))
        figures.append(mean(FAMILY, f"PSNR, {what} {name}", quality.tolist(), "dB"))
        styles = sorted(set(chosen.styles))
        for style in styles if len(styles) > 1 else []:
            rows = [i for i, own in enumerate(chosen.styles) if own == style]
            figures.append(mean(FAMILY, f"PSNR, {what} {name}, {style}", quality[rows].tolist(), "dB"))
        counted.append(chosen.pixels)
        step = max(1, len(gallery) // protocol.pictures_for_codes)
        counted.append(gallery.pixels[::step][: protocol.pictures_for_codes])
    return figures + code_figures(subject, torch.cat(counted))


def code_figures(subject: Subject, pixels: Tensor) -> list[Figure]:
    """Codebook usage and perplexity over pictures."""
    spec = subject.tokenizer.spec
    if spec.kind == "continuous":
        return []
    counts = count_codes(subject.encode(pixels), spec.num_codes if spec.kind == "codes" else 1, spec.vocab_size)
    used, perplexity = usage_and_perplexity(counts)
    tokens = int(counts[0].sum())
    note = f"of {spec.vocab_size:,} codes, {tokens:,} tokens"
    n = len(pixels)
    return [
        Figure(family=FAMILY, name="codebook usage", value=used, unit="share", n=n, note=note),
        Figure(family=FAMILY, name="codebook perplexity", value=perplexity, unit="codes", n=n),
    ]


def count_codes(items: list[Encoded], books: int, vocab: int) -> Tensor:
    """How often each code occurs, (K, V)."""
    counts = torch.zeros(books, vocab, dtype=torch.int64)
    for item in items:
        content = item.content.reshape(-1, books)
        for book in range(books):
            counts[book] += torch.bincount(content[:, book], minlength=vocab)
    return counts
