"""The saved settings of `mm.tokenizers.text_concepts`: checked before anything is built from them, whoever wrote them.

Beside the two files of `mm.saved` lies `words.json`: the merges of the subwords, and the bank. `config.json` holds its hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from mm import safe_io, saved

FORMAT, WHAT = "mm.tokenizers.text_concepts", "a tokenizer of sentences"
WORDS = "words.json"
MAX_WORDS_BYTES = 1 << 26
MAX_BANK = 1 << 20
"""Sentences that a bank may have."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
BOUNDS = {
    "dim": (1, 4096), "width": (1, 4096), "layers": (1, 64), "heads": (1, 256), "vocab_size": (256, 1 << 16),
    "max_bytes": (8, 4096), "sentences": (1, 256),
}  # fmt: skip


def check(c: dict[str, Any]) -> None:
    """Raises `ValueError` for sizes out of range or that do not fit each other."""
    for name, (least, most) in BOUNDS.items():
        saved.whole_number(name, c[name], least, most)
    if c["width"] % c["heads"]:
        raise ValueError(f"width must be a multiple of heads, got {c['width']} and {c['heads']}")


def check_bank(bank: Any) -> list[str]:
    """The sentences of a bank. Raises `ValueError` where it isn't one."""
    if not isinstance(bank, list) or len(bank) > MAX_BANK or not all(isinstance(s, str) and s.strip() for s in bank):
        raise ValueError(
            f"a bank is a list of at most {MAX_BANK:,} sentences, none of them empty, got {str(bank)[:60]!r}; "
            "leave out what is no sentence"
        )
    return [" ".join(check_text(sentence).split()) for sentence in bank]


def check_lengths(bank: list[str], c: dict[str, Any]) -> None:
    """Raises `ValueError` for a sentence that the autoencoder of these settings can't read; other encoders read any."""
    for number, sentence in enumerate(bank):
        if not c["encoder"] and len(sentence.encode()) > c["max_bytes"]:
            raise ValueError(
                f"sentence {number} of the bank has {len(sentence.encode())} bytes, expected up to max_bytes "
                f"({c['max_bytes']}): shorten it, or raise max_bytes"
            )


def check_text(text: Any) -> str:
    """Raises `ValueError` for what is no text."""
    if not isinstance(text, str):
        raise ValueError(f"got {type(text).__name__}, expected text (str); decode bytes with .decode('utf-8') first")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds half a surrogate pair at index {error.start}, which is not a character; "
            "it was read with the wrong encoding, read it as UTF-8"
        ) from error
    return text


def numbers(c: dict[str, Any]) -> int:
    """How many weights networks of these settings have, at the least."""
    if c["encoder"]:
        return 2 * c["dim"]
    return 24 * c["layers"] * c["width"] ** 2 + 2 * (c["vocab_size"] + c["max_bytes"]) * c["width"]


def read(folder: Path, defaults: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]], list[str]]:
    """Settings (the names of `defaults`), merges of the subwords, and bank of a folder that `write` filled.

    Raises:
        ValueError: missing, damaged, not a tokenizer of sentences, or of networks larger than their weights file.
    """
    config = saved.read(folder, FORMAT, {**defaults, "words": ""}, WHAT)
    file, words = folder / saved.CONFIG, read_words(folder)
    digest = config.pop("words")
    try:
        check(config)
        bank = check_bank(words.get("bank"))
        check_lengths(bank, config)
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} is damaged: {error}") from error
    if config["encoder"] and not HUB_NAME.fullmatch(config["encoder"]):
        raise ValueError(
            f"{str(file)!r} names the encoder {config['encoder'][:80]!r}; a saved tokenizer may only name one of the hub, "
            "not a path"
        )
    merges = words.get("merges")
    if (
        not isinstance(merges, list)
        or len(merges) > config["vocab_size"] - 256
        or not all(isinstance(m, list) and len(m) == 2 and all(isinstance(part, str) for part in m) for m in merges)
    ):
        raise ValueError(f"{str(folder / WORDS)!r} has wrong merges of subwords; save the tokenizer again")
    if hash_words(merges, bank) != digest:
        raise ValueError(f"{str(folder / WORDS)!r} is not what was saved: restore the files that were saved together")
    weights = folder / saved.WEIGHTS
    held = weights.stat().st_size if weights.is_file() else 0
    if numbers(config) > held:  # each takes two bytes or more
        raise ValueError(
            f"{str(file)!r} asks for {numbers(config):,} weights, but {saved.WEIGHTS} has {held:,} bytes: "
            "restore the files that were saved together"
        )
    return config, merges, bank


def read_words(folder: Path) -> dict[str, Any]:
    return safe_io.read_json(folder / WORDS, max_bytes=MAX_WORDS_BYTES)


def hash_words(merges: Any, bank: list[str]) -> str:
    value = [[list(pair) for pair in merges], bank]
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]
