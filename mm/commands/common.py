"""What several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from mm.model import MultimodalModel


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that shows defaults, where there are any."""
    return _Parser(prog=f"mm {command}", description=description, formatter_class=_Help)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default in ("", [])
        return action.help if none or "default" in (action.help or "") else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.endswith(("expected one argument", "expected at least one argument")):
            message += " (the name of a file that begins with a dash is written as ./-name)"
        super().error(message)


def choose_threads(model: MultimodalModel, wanted: int | None = None) -> None:
    """CPU threads for generation: as wanted, or else one for small models. A step of theirs is over before a second thread
    has woken up, and beside other programs waiting for that takes a hundred times longer."""
    import torch

    if wanted is not None:
        check_threads(wanted)
    small = sum(parameter.numel() for parameter in model.parameters()) < 30_000_000
    if wanted is not None or (small and "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(wanted or 1)


def check_threads(wanted: int) -> None:
    """Raises `ValueError` for a number that is no use, or that the machine could choke on."""
    if wanted < 1:
        raise ValueError(f"--threads must be at least 1, got {wanted}")
    cores = os.cpu_count() or 1
    if wanted > 4 * cores:
        raise ValueError(f"--threads must be at most {4 * cores} (4 times the {cores} cores), got {wanted}")


def writable(file: Path) -> Path:
    """The file, if it could be written; for a look before the work. Nothing is left behind.

    Raises `ValueError` naming the file.
    """
    if file.is_dir():
        raise ValueError(f"can't write {str(file)!r}: it is a folder; give the name of a file")
    check_folder(file.parent, f"can't write {str(file)!r}")
    return file


def check_folder(folder: Path, what: str) -> None:
    """Raises `ValueError` beginning with `what`, unless files can be written into the folder, which need not exist."""
    import tempfile

    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{what}: {str(there)!r} is not a folder; give another place")
    try:  # permissions alone don't tell: /proc and read-only media have them too
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"{what}: in {str(there)!r} nothing can be written; give another place") from error


class Bar:
    """A progress bar on standard error that appears only when something takes longer than a second."""

    def __init__(self, text: str, unit: str) -> None:
        self.text, self.unit = text, unit
        self.bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __call__(self, done: float, total: float) -> None:
        if self.bar is None:
            from tqdm import tqdm

            form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            self.bar = tqdm(total=total, desc=self.text, unit=self.unit, delay=1.0, leave=False, bar_format=form)
        self.bar.total = total  # more may have come to light
        self.bar.update(done - self.bar.n)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
