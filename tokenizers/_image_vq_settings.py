"""The saved settings of `mm.tokenizers.image_vq`: checked before anything is built from them, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mm import safe_io, saved
from mm.quantizers import codebook_numbers

FORMAT, WHAT = "mm.tokenizers.image_vq", "image tokenizer"
CODEBOOK = "quantizer.layer._codebook.embed"
"""Among the weights of one with the quantizer vq: 1 × codes × width."""


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


def read_whole(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Settings, weights and fingerprint of a tokenizer that `ImageVQ.save` wrote (folder, or shipped name), as they were saved
    together. Raises `ValueError` for what is missing, damaged or foreign."""
    folder = saved.find(source, WHAT, FORMAT)
    said = safe_io.read_json(folder / saved.CONFIG, max_bytes=saved.MAX_CONFIG_BYTES)
    config = said.get("config")
    if said.get("format") != FORMAT or not isinstance(config, dict):
        raise ValueError(f"{folder / saved.CONFIG} does not describe an {WHAT}: expected format '{FORMAT}'")
    weights = safe_io.read_tensors(folder / saved.WEIGHTS, max_bytes=saved.MAX_WEIGHT_BYTES)
    if said.get("digest") != saved.digest(config, weights):
        raise ValueError(f"{folder}: settings and weights differ; restore the pair of files that was saved together")
    return config, weights, str(said.get("fingerprint"))
