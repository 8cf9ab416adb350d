"""What several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import TracebackType
from typing import Any


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that shows defaults."""
    return argparse.ArgumentParser(
        prog=f"mm {command}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


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
