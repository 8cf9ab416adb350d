"""A tokenizer inside another: saved in a folder of its own, with the path of its class, and found again.

A saved tokenizer may come from a stranger, so the class may only be one of this package's own tokenizers.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from mm.interfaces import ModalityTokenizer

OWN = re.compile(r"(mm\.tokenizers\.[a-z][a-z0-9_]{0,60})\.([A-Z][A-Za-z0-9]{0,60})")


def find_class(path: Any) -> type[Any]:
    """The class of a tokenizer of this package. Raises `ValueError` for anything else."""
    match = OWN.fullmatch(path) if isinstance(path, str) else None
    try:
        cls = getattr(importlib.import_module(match[1]), match[2], None) if match else None
    except ModuleNotFoundError:
        cls = None
    if not isinstance(cls, type) or not issubclass(cls, ModalityTokenizer):
        raise ValueError(f"{str(path)[:80]!r} is no tokenizer of this package; expected mm.tokenizers.NAME.CLASS")
    return cls


def save(tokenizer: ModalityTokenizer, folder: Path) -> str:
    """Write it into a folder; returns the path of its class. Raises `ValueError` for one that could not be found again."""
    cls = type(tokenizer)
    path = f"{cls.__module__}.{cls.__qualname__}"
    if find_class(path) is not cls or not hasattr(tokenizer, "save") or not hasattr(cls, "from_directory"):
        raise ValueError(
            f"{cls.__name__} can't be saved inside another tokenizer: it has no save() and from_directory()"
        )
    tokenizer.save(folder)
    return path


def load(path: Any, folder: Path) -> ModalityTokenizer:
    """What `save` wrote. Raises `ValueError` for files that are missing or damaged, and for other classes."""
    cls = find_class(path)
    if not hasattr(cls, "from_directory"):
        raise ValueError(f"{cls.__name__} is not saved in a folder, so it can't be inside another tokenizer")
    loaded: ModalityTokenizer = cls.from_directory(folder)
    return loaded
