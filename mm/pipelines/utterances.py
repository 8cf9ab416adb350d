"""Texts to be spoken: how long they may take, and how long ones are divided into parts that an item each can hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from mm.interfaces import ModalityTokenizer

FASTEST, SLOWEST = 1 / 40, 3.0
"""Seconds a character between which a text can be spoken: the fastest speakers reach 30 characters a second."""
USUAL = 12.0
"""Characters a second by which room for a text is planned: slow reading, so that hardly any text needs more."""
WORD = 32
"""Characters up to which a word isn't cut where the duration is given."""
SENTENCES = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？]+")
CLAUSES = re.compile(r"[,;:—–]+\s+|[、，；：،]+")
SPACES = re.compile(r"\s+")


def as_seconds(value: Any, what: str) -> float:
    """A number of seconds. Raises `ValueError` for what is none."""
    try:
        seconds = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number beyond all floats
        seconds = math.inf
    if not math.isfinite(seconds):
        raise ValueError(f"{what} is a number of seconds, got {value!r:.60}")
    return seconds


def check_speed(seconds: float, text: str) -> None:
    """Raises `ValueError` where a text can't be spoken so fast."""
    if seconds < FASTEST * len(text):
        raise ValueError(
            f"the {len(text)} characters of {text[:40]!r} can't be spoken in {seconds:g} s; leave them "
            f"{math.ceil(100 * FASTEST * len(text)) / 100:g} s or more"
        )


def check_duration(duration: Any, text: str, tokenizer: ModalityTokenizer) -> int:
    """Elements of a duration in seconds. Raises `ValueError` for what is none, and for what can't be spoken in it."""
    rate, most_elements = tokenizer.spec.frame_rate, tokenizer.spec.max_grid[0]
    seconds = as_seconds(duration, "a duration")
    most = most_elements
    if text:  # a long one is divided, but not inside a word
        word = max((len(word) for word in text.split() if len(word) <= WORD), default=1)
        most = math.floor(min(SLOWEST * len(text) * rate, most_elements * len(text) / word))
    least = max(0.5 / rate, FASTEST * len(text))
    if not least <= seconds <= most / rate:
        what = f"the {len(text)} characters of {text[:40]!r}" if text else "a sound without text"
        raise ValueError(
            f"{what} can't take {seconds:g} s; give a duration from {math.ceil(100 * least) / 100:g} to "
            f"{math.floor(100 * most / rate) / 100:g} s, or none"
        )
    return max(1, min(round(seconds * rate), most))


def bounds(text: str, tokenizer: ModalityTokenizer) -> range:
    """Numbers of elements in which a text can be spoken."""
    spec = tokenizer.spec
    most = spec.max_grid[0]
    least = max(1, min(math.ceil(FASTEST * len(text) * spec.frame_rate), most))
    return range(least, max(least, min(most, math.floor(SLOWEST * len(text) * spec.frame_rate))) + 1)


def shares(text: str, total: int) -> list[tuple[str, int]]:
    """The words of a text, and how many of `total` elements each gets: by its characters, at least one. Raises `ValueError`
    for fewer elements than words."""
    words = text.split()
    if total < len(words):
        raise ValueError(f"{len(words)} words can't be spoken in {total} elements of the model; give a longer duration")
    weights = [len(word) + 1 for word in words]
    out, left, heavy = [], total, sum(weights)
    for number, (word, weight) in enumerate(zip(words, weights, strict=True), 1):
        share = max(1, min(round(left * weight / heavy), left - (len(words) - number)))
        out.append((word, share))
        left, heavy = left - share, heavy - weight
    return out


def divide(text: str, most: int, fits: Callable[[str], bool]) -> list[str]:
    """A text in parts of at most `most` characters that fit, divided where it is best. Raises `ValueError` where not even one
    character fits."""
    parts, rest = [], text.strip()
    while rest:
        low, high = 0, min(len(rest), most)
        if fits(rest[:high]):
            low = high
        while high - low > 1:  # the longest beginning that fits
            middle = (low + high) // 2
            low, high = (middle, high) if fits(rest[:middle]) else (low, middle)
        if not low:
            raise ValueError(
                f"the model's context has no room for a piece of {text[:40]!r} and its sound; give a shorter voice clip, or use "
                "a model with more context"
            )
        cut = low if low == len(rest) else _place(rest, low)
        parts.append(rest[:cut].strip())
        rest = rest[cut:].strip()
    return parts


def _place(text: str, most: int) -> int:
    """Where to divide a text that is longer than `most`: after a sentence or a part of one, unless that leaves less than a
    third; between words; anywhere."""
    for end in (SENTENCES, CLAUSES, SPACES):
        found = (match.end() for match in end.finditer(text, 0, most + 1))
        places = [place for place in found if place <= most or text[most:place].isspace()]
        least = most // 3 if end is not SPACES else 0
        if places and places[-1] > least:
            return places[-1]  # beyond `most` stands white space only, which is taken off
    return most


def share(total: int, parts: Sequence[str]) -> list[int]:
    """Elements of each part: proportional to its characters, one at least, all together `total`."""
    out, said, given = [], 0, 0
    for number, part in enumerate(parts, 1):
        said += len(part)
        until = max(given + 1, min(round(total * said / sum(map(len, parts))), total - len(parts) + number))
        out.append(until - given)
        given = until
    return out


def divided(text: str, total: int, most: int, fits: Callable[[str], bool]) -> list[tuple[str, int]]:
    """Parts of a text, and of its `total` elements, of which a part may have `most`."""
    characters = max(1, len(text) * most // total)
    while True:
        parts = divide(text, characters, fits)
        shares = share(total, parts)
        if max(shares) <= most or characters == 1:
            return [(part, min(number, most)) for part, number in zip(parts, shares, strict=True)]
        characters = max(
            1, characters * 9 // 10
        )  # white space between the parts takes no time, and the rest takes more
