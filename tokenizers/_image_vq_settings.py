"""The saved settings of `mm.tokenizers.image_vq`: checked before anything is built from them, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm import saved
from mm.quantizers import codebook_numbers

FORMAT, WHAT = "mm.tokenizers.image_vq", "image tokenizer"


def read(folder: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings in a folder, exactly these names, each of its type.

    Raises:
        ValueError: missing, damaged, or not an image tokenizer's.
    """
    config = saved.read(folder, FORMAT, defaults, f"an {WHAT}")
    check_codebook(folder, config)
    return config


def check_codebook(folder: Path, c: dict[str, Any]) -> None:
    """Raises `ValueError` for a codebook larger than the weights file, before the memory is taken."""
    if c["quantizer"] not in ("vq", "residual"):  # the others have none, and take no more than their `levels` say
        return
    file = folder / saved.WEIGHTS
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is missing: restore the pair of files that was saved together")
    held = file.stat().st_size
    numbers = codebook_numbers(c["quantizer"], c["codebook_size"], c["code_dim"], c["num_codes"])
    if numbers > held + (1 << 22):  # a file that was cut short is told by its reader
        raise ValueError(
            f"{folder / saved.CONFIG} asks for a codebook of {numbers:,} numbers, but {saved.WEIGHTS} has {held:,} bytes: "
            "restore the pair of files that was saved together"
        )
