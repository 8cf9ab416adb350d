"""A tokenizer inside another: saved in a folder of its own, with the path of its class, and found again.

A saved tokenizer may come from a stranger, so the class may only be one of this package's own tokenizers.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from mm import safe_io, saved
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


# --- a tokenizer around one other ------------------------------------------------------------------------------------


def save_around(
    path: str | Path, form: str, fingerprint: str, name: str, inner: ModalityTokenizer, others: Mapping[str, Any]
) -> None:
    """Write `config.json` and the folder `name` of the inner tokenizer into the folder `path`, both or neither. Its class stands
    as `name` among the settings."""
    with safe_io.atomic_folder(path, last=saved.CONFIG) as folder:
        settings = {name: save(inner, folder / name), **others}
        safe_io.write_json(folder / saved.CONFIG, {"format": form, "fingerprint": fingerprint, "config": settings})


class Around:
    """What `save_around` wrote, up to the inner tokenizer.

    Args:
        outer: class of the tokenizer; none of its kind may be inside.
        names: of its settings, `name` left out.
        what, inside: how messages call it, and one of its kind inside.

    Raises:
        ValueError: files that are missing or damaged, or not what was saved.
    """

    def __init__(
        self, folder: Path, form: str, name: str, outer: type[Any], names: Set[str], what: str, inside: str
    ) -> None:
        file = safe_io.inside(folder, saved.CONFIG)
        found = safe_io.read_json(file, max_bytes=saved.MAX_CONFIG_BYTES)
        config = found.get("config")
        if found.get("format") != form or not isinstance(config, dict) or set(config) != {name, *names}:
            raise ValueError(f"{file} does not describe {what}: expected format {form!r} and its settings")
        if issubclass(find_class(config[name]), outer):  # told before it is opened: it could go on without end
            raise ValueError(f"{file} has {inside}")
        self.folder, self.name, self.config, self.fingerprint = folder, name, config, found.get("fingerprint")

    def load(self) -> ModalityTokenizer:
        """The inner tokenizer. Raises `ValueError` as `load`."""
        return load(self.config[self.name], safe_io.inside(self.folder, self.name))

    def check(self, fingerprint: str) -> None:
        """Raises `ValueError` where the files were not saved together."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{self.folder} has fingerprint {fingerprint}, its {saved.CONFIG} says {str(self.fingerprint)[:60]!r}: "
                "restore the files that were saved together"
            )
