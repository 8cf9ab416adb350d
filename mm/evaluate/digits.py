"""Handwritten digits: are generated ones what was asked for, are real ones named right.

The recogniser is a small network trained here on the real digits that are not held out; it never sees a generated
one. Its own accuracy on held-out real digits, and on those after the picture tokenizer, stand beside the figures as
controls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mm.data.sources import DIGIT_NAMES
from mm.evaluate.frechet import frechet_distance
from mm.evaluate.gallery import Gallery
from mm.evaluate.networks import Judge, Say, obtain
from mm.evaluate.protocol import Protocol
from mm.evaluate.results import Figure, mean, share
from mm.evaluate.subject import Outcome, Subject, Written

FAMILY = "digits"


def recogniser(digits: Gallery, protocol: Protocol, folder: Path | None, say: Say = lambda line: None) -> Judge:
    """Trained on the digits that are not held out (all, if none is)."""
    seen = digits.subset(digits.where(held=False))
    return obtain(
        "digits",
        seen.pixels,
        {"digit": torch.tensor(seen.digits)},
        {"digit": len(DIGIT_NAMES)},
        protocol.digit_judge,
        side=protocol.side,
        seed=protocol.seed,
        folder=folder,
        identity=(seen.identity, str(digits.pixels.shape[-1])),
        say=say,
    )


def evaluate_digits(
    subject: Subject, digits: Gallery, protocol: Protocol, folder: Path | None = None, say: Say = lambda line: None
) -> Outcome:
    """All figures of digits. Raises `ValueError` for a source without digits."""
    if min(digits.digits) < 0:
        raise ValueError("the source of digits has pictures without a field 'digit' from 0 to 9; give digits")
    judge = recogniser(digits, protocol, folder, say)
    held = digits.subset(digits.where(held=True) or range(len(digits)))
    truth = torch.tensor(held.digits)
    where = "held-out" if any(held.held) else "training"
    figures = [
        share(FAMILY, f"recogniser, {where} real digits", right(judge, held.pixels, truth), control=True),
        share(
            FAMILY,
            f"recogniser, {where} digits after the tokenizer",
            right(judge, subject.reconstruct(held.pixels), truth),
            control=True,
        ),
    ]
    asked = [number % len(DIGIT_NAMES) for number in range(protocol.samples)]
    prompts = [protocol.digit_prompt.format(name=DIGIT_NAMES[digit]) for digit in asked]
    say(f"digits: drawing {len(prompts)}")
    drawn = subject.draw(prompts, protocol.seed)
    hits = right(judge, drawn.pixels, torch.tensor(asked))
    detail = {
        name: [sum(h for h, a in zip(hits, asked, strict=True) if a == digit), asked.count(digit)]
        for digit, name in enumerate(DIGIT_NAMES)
    }
    figures.append(share(FAMILY, "generated, recognised", hits, detail=detail))
    figures += variety(drawn.pixels, asked, digits)
    figures += distances(judge, drawn.pixels, digits, held)
    captions, written = caption_figures(subject, held, where, protocol, say)
    return Outcome(figures + captions, prompts, drawn, [drawn], written)


def right(judge: Judge, pixels: Tensor, truth: Tensor) -> list[bool]:
    return [bool(hit) for hit in judge.classify(pixels, "digit") == truth]


def variety(pixels: Tensor, asked: Sequence[int], digits: Gallery) -> list[Figure]:
    """Root-mean-square difference between two pictures of one digit, generated ÷ real: near 0, the model draws one
    picture of each digit again and again; near 1, it varies as people do. As many real ones as were generated."""
    ratios = []
    for digit in sorted(set(asked)):
        made = pixels[[i for i, own in enumerate(asked) if own == digit]]
        real = digits.pixels[[i for i, own in enumerate(digits.digits) if own == digit][: len(made)]]
        if len(made) > 1 and len(real) > 1 and float(_spread(real)):
            ratios.append(float(_spread(made) / _spread(real)))
    if not ratios:
        return []
    note = "generated ÷ real, by digit"
    return [mean(FAMILY, "variety within a digit", ratios, "ratio", note=note)]


def distances(judge: Judge, pixels: Tensor, digits: Gallery, held: Gallery) -> list[Figure]:
    """Fréchet distance of the recogniser's features, generated to held-out digits; and between real ones the model may have seen
    and the same held-out ones, as many: what a perfect model would get."""
    count = min(len(pixels), len(held))
    seen = digits.subset(digits.where(held=False) or range(len(digits)))
    step = max(1, len(seen) // count)
    other = seen.subset(range(0, step * count, step)) if len(seen) >= count else seen
    if count < 2 or len(other) < count:
        return []
    real = judge.features(held.pixels[:count])
    note = f"of the recogniser's {real.shape[1]} features, to {count} held-out digits"
    return [
        Figure(
            family=FAMILY, name=name, value=frechet_distance(judge.features(made), real), unit="distance", n=count,
            control=control, note=note,
        )
        for name, made, control in (
            ("generated, Fréchet distance", pixels[:count], False),
            ("training digits, Fréchet distance", other.pixels, True),
        )
    ]  # fmt: skip


def _spread(pixels: Tensor) -> Tensor:
    """√(mean over pairs of different pictures of their mean squared difference) = √(2 · variance)."""
    return (2 * pixels.float().var(0).mean()).sqrt()


def caption_figures(
    subject: Subject, held: Gallery, where: str, protocol: Protocol, say: Say
) -> tuple[list[Figure], list[Written]]:
    """Captions of real digits: equal to the training caption to the letter; and naming the right digit and no other."""
    if not subject.learned_captions:
        say("digits: no captions, training showed the model none")
        return [], []
    chosen = held.subset(range(min(len(held), protocol.captioned)))
    say(f"digits: captioning {len(chosen)}")
    written = subject.write(chosen.pixels, protocol.seed, protocol.caption_tokens)
    exact, named = [], []
    for text, digit in zip(written.texts, chosen.digits, strict=True):
        exact.append(text.strip() == protocol.digit_prompt.format(name=DIGIT_NAMES[digit]))
        named.append(digit_words(text) == {DIGIT_NAMES[digit]})
    figures = [
        share(FAMILY, f"captions of {where} digits, exact", exact),
        share(FAMILY, f"captions of {where} digits, right digit word", named),
    ]
    return figures, [written]


def digit_words(text: str) -> set[str]:
    """The names of digits in a text."""
    return set(re.findall(r"[a-z]+", text.lower())) & set(DIGIT_NAMES)
