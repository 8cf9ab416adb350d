"""The saved settings of `mm.tokenizers.image_vq`: checked before anything is built from them, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mm
from mm import safe_io
from mm.autoencoder import BLOCKS
from mm.quantizers import codebook_numbers

FORMAT = "mm.tokenizers.image_vq"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAX_CONFIG_BYTES, MAX_WEIGHT_BYTES = 1 << 16, 1 << 31
MAX_SIDE_TOKENS = 256
MAX_NUMBER = 1 << 30
"""Largest number among the settings; JSON has larger ones, and readers make infinity of some."""
SHIPPED = Path(mm.__file__).resolve().parent / "checkpoints"

FLOATS = ("decay", "dead_below", "commitment", "entropy")
TEXTS = ("quantizer", "block")
LISTS = ("multipliers", "levels")


def check(c: dict[str, Any]) -> None:
    """Raises `ValueError` for sizes that do not fit each other; the quantiser checks its own."""
    if c["downsample"] not in (4, 8, 16):
        raise ValueError(f"downsample must be 4, 8 or 16, got {c['downsample']}")
    if c["patch"] not in (1, 2, 4):
        raise ValueError(f"patch must be 1, 2 or 4, got {c['patch']}")
    largest = MAX_SIDE_TOKENS * c["downsample"]
    if c["size"] < c["downsample"] or c["size"] % c["downsample"] or c["size"] > largest:
        raise ValueError(f"size must be a multiple of {c['downsample']} up to {largest}, got {c['size']}")
    levels = (c["downsample"] // c["patch"]).bit_length()
    if len(c["multipliers"]) != levels:
        raise ValueError(
            f"downsample {c['downsample']} after patches of {c['patch']} has {levels} levels, "
            f"got {len(c['multipliers'])} multipliers: give one a level, finest first"
        )
    widths = [w * m for w in (c["channels"], c["decoder_channels"]) for m in c["multipliers"]]
    if min(widths) < 1 or max(widths) > 4096 or not 1 <= c["blocks"] <= 64 or not 1 <= c["decoder_blocks"] <= 64:
        raise ValueError(
            f"widths must be in 1..4096 and blocks in 1..64, got {widths}, {c['blocks']} and {c['decoder_blocks']}"
        )
    if c["block"] not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got '{c['block']}'")
    heads = c["attention_heads"]
    if heads < 0 or (heads and any(w * c["multipliers"][-1] % heads for w in (c["channels"], c["decoder_channels"]))):
        raise ValueError(f"attention_heads must divide the coarsest width, got {heads}")


def find(pretrained: str) -> Path:
    """The folder of a saved tokenizer: a path, or the name of one that ships with the package."""
    folders = [Path(pretrained)]
    if pretrained and len(Path(pretrained).parts) == 1 and pretrained != "..":
        folders.append(SHIPPED / pretrained)
    for folder in folders:
        if (folder / CONFIG).is_file():
            return folder
    shipped = sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG}")) if SHIPPED.is_dir() else []
    raise ValueError(
        f"no saved image tokenizer in '{pretrained}' ({CONFIG} is missing): give a folder that ImageVQ.save wrote, "
        f"or one of the shipped names {shipped}"
    )


def read(folder: Path, names: set[str]) -> dict[str, Any]:
    """The settings in a folder, exactly these names, each of its type.

    Raises:
        ValueError: missing, damaged, or not an image tokenizer's.
    """
    file = folder / CONFIG
    saved = safe_io.read_json(file, max_bytes=MAX_CONFIG_BYTES)
    if saved.get("format") != FORMAT:
        raise ValueError(f"{file} does not describe an image tokenizer: expected format '{FORMAT}'")
    config = saved.get("config")
    if not isinstance(config, dict) or set(config) != names:
        odd = sorted(names ^ set(config)) if isinstance(config, dict) else "config"
        raise ValueError(f"{file} has missing or unknown settings ({odd}): it was saved by another version")
    for name, value in config.items():
        many = name in LISTS
        values = value if many and isinstance(value, list) and 0 < len(value) <= 32 else [value]
        kind = str if name in TEXTS else (int, float) if name in FLOATS else int
        if (many and values is not value) or any(
            isinstance(v, bool) or not isinstance(v, kind) or (not isinstance(v, str) and not abs(v) <= MAX_NUMBER)
            for v in values
        ):
            raise ValueError(f"{file} has a wrong value for {name}: {str(value)[:60]!r}")
    check_codebook(folder, config)
    return config


def check_codebook(folder: Path, c: dict[str, Any]) -> None:
    """Raises `ValueError` for a codebook larger than the weights file, before the memory is taken."""
    if c["quantizer"] not in ("vq", "residual"):  # the others have none, and take no more than their `levels` say
        return
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is missing: restore the pair of files that was saved together")
    held = file.stat().st_size
    numbers = codebook_numbers(c["quantizer"], c["codebook_size"], c["code_dim"], c["num_codes"])
    if numbers > held + (1 << 22):  # a file that was cut short is told by its reader
        raise ValueError(
            f"{folder / CONFIG} asks for a codebook of {numbers:,} numbers, but {WEIGHTS} has {held:,} bytes: "
            "restore the pair of files that was saved together"
        )


def write(folder: Path, config: dict[str, Any], fingerprint: str, digest: str) -> None:
    """`fingerprint` says what ids mean, `digest` what settings and weights were saved together."""
    value = {"format": FORMAT, "fingerprint": fingerprint, "digest": digest, "config": config}
    safe_io.write_json(folder / CONFIG, value)


def check_whole(folder: Path, fingerprint: str, digest: str) -> None:
    """Raises `ValueError` where the weights are not those that the settings were saved with."""
    saved = safe_io.read_json(folder / CONFIG, max_bytes=MAX_CONFIG_BYTES)
    for name, found in (("fingerprint", fingerprint), ("digest", digest)):
        if saved.get(name) != found:
            raise ValueError(
                f"{folder} has {name} {found}, its {CONFIG} says {str(saved.get(name))[:60]!r}: "
                "restore the pair of files that was saved together"
            )
