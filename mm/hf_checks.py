"""What a stranger's `tokenizer.json` may ask of the library, which panics, or aborts the process, where it should refuse."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GROWTH = 256
"""How many times as long a text may become by what is put into it, and the bytes that a `Precompiled` map makes of a letter."""


@contextmanager
def library(what: str) -> Iterator[None]:
    """What `tokenizers` raises as `ValueError`: it raises plain `Exception`, and its panics are none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())[:200]}") from None


def check_parts(settings: Any) -> None:
    """Raises `ValueError` for a tokenizer that would make texts more than `GROWTH` times as long, or whose `Precompiled` map is
    damaged."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1.0
        for part in _parts(settings.get(name) if isinstance(settings, dict) else None):
            if part.get("type") == "Replace":
                growth *= _growth(part.get("pattern"), str(part.get("content", "")))
            if part.get("type") == "Precompiled":
                _check_map(part.get("precompiled_charsmap"))
            if growth > GROWTH:
                raise ValueError(f"its {name} makes texts {growth:,.0f} times as long, at most {GROWTH} is taken")


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """All parts, those of sequences too, without recursion: a file may nest them as deep as it likes."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _growth(pattern: Any, content: str) -> float:
    found = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(found, str):
        return 1.0 + len(content)  # a regular expression may match nothing, between any two letters
    if not found:
        raise ValueError("it replaces the empty text, which is everywhere")
    return max(1.0, len(content) / len(found))


def _check_map(text: Any) -> None:
    """sentencepiece's: the size of a table (four bytes), the table, and strings that end with 0."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        data = b""
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or not 0 < size <= len(data) - 4:
        raise ValueError("its Precompiled map is damaged")
    if max(map(len, data[4 + size :].split(b"\0"))) > GROWTH:
        raise ValueError(f"its Precompiled map makes more than {GROWTH} bytes of a letter")
