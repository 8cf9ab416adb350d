"""What a tokenizer with weights is saved as: `config.json` and `model.safetensors` in one folder, both or neither.

The settings are checked before anything is built from them, whoever wrote them: each of the type that the tokenizer's own
argument has, none missing, none too many. A fingerprint says what tokens mean, a digest what was saved together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm import safe_io

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAX_CONFIG_BYTES, MAX_WEIGHT_BYTES = 1 << 16, 1 << 31
MAX_NUMBER = 1 << 30
"""Largest number among the settings; JSON has larger ones, and readers make infinity of some."""
MAX_LIST, MAX_TEXT = 32, 256
SHIPPED = Path(__file__).resolve().parent / "checkpoints"


def find(pretrained: str, what: str) -> Path:
    """The folder of a saved tokenizer: a path, or the name of one that ships with the package. Raises `ValueError`."""
    folders = [Path(pretrained)]
    if pretrained and len(Path(pretrained).parts) == 1 and pretrained != "..":
        folders.append(SHIPPED / pretrained)
    for folder in folders:
        if (folder / CONFIG).is_file():
            return folder
    shipped = sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG}")) if SHIPPED.is_dir() else []
    raise ValueError(
        f"no saved {what} in '{pretrained}' ({CONFIG} is missing): give a folder that its save() wrote, "
        f"or one of the shipped names {shipped}"
    )


def read(folder: Path, form: str, defaults: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The settings in a folder: exactly the names of `defaults`, each of the type that its default has.

    Raises:
        ValueError: missing, damaged, or not saved as `form`.
    """
    file = folder / CONFIG
    saved = safe_io.read_json(file, max_bytes=MAX_CONFIG_BYTES)
    if saved.get("format") != form:
        raise ValueError(f"{file} does not describe {what}: expected format '{form}'")
    config = saved.get("config")
    if not isinstance(config, dict) or set(config) != set(defaults):
        odd = sorted(set(defaults) ^ set(config)) if isinstance(config, dict) else "config"
        raise ValueError(f"{file} has missing or unknown settings ({odd}): it was saved by another version")
    for name, value in config.items():
        if not _like(value, defaults[name]):
            raise ValueError(f"{file} has a wrong value for {name}: {str(value)[:60]!r}")
    return config


def _like(value: Any, default: Any) -> bool:
    """Of the default's type; a whole number will do for any number, lists are short and hold numbers of one type."""
    if isinstance(default, list | tuple):
        inner = default[0] if default else 0
        return isinstance(value, list) and 0 < len(value) <= MAX_LIST and all(_like(v, inner) for v in value)
    if isinstance(default, str):
        return isinstance(value, str) and len(value) <= MAX_TEXT
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    kinds = (int, float) if isinstance(default, float) else int
    return isinstance(value, kinds) and abs(value) <= MAX_NUMBER


def write(folder: Path, form: str, config: Mapping[str, Any], state: Mapping[str, Tensor], fingerprint: str) -> None:
    """Both files into a folder that exists (see `safe_io.atomic_folder`)."""
    safe_io.write_tensors(folder / WEIGHTS, state)
    value = {"format": form, "fingerprint": fingerprint, "digest": digest(config, state), "config": dict(config)}
    safe_io.write_json(folder / CONFIG, value)


def read_weights(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, of the names, shapes and types of `expected`. Raises `ValueError`."""
    return safe_io.read_tensors(folder / WEIGHTS, expected, max_bytes=MAX_WEIGHT_BYTES)


def check_whole(folder: Path, fingerprint: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` where the weights are not those that the settings were saved with."""
    saved = safe_io.read_json(folder / CONFIG, max_bytes=MAX_CONFIG_BYTES)
    for name, found in (("fingerprint", fingerprint), ("digest", digest(config, state))):
        if saved.get(name) != found:
            raise ValueError(
                f"{folder} has {name} {found}, its {CONFIG} says {str(saved.get(name))[:60]!r}: "
                "restore the pair of files that was saved together"
            )


def digest(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that change with any setting or weight."""
    found = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
