"""Runs a page of docs/tutorials as its reader would, in the current folder: `python run_page.py PAGE`.

A block after a line that is a name and a colon is written to that file, one after `<!-- not run: WHY -->` is left out, and the
others run one after the other: Python as it stands, of the shell `mm …` and `python FILE`. All in one process, so that what takes
seconds to import is imported once. What `pip install -e .` would do of a `pyproject.toml` on the page is done in the folder.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FENCE = re.compile(
    r"(?:^`(?P<file>[\w./-]+)`:\n\n|<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.M | re.S,
)


class Block(NamedTuple):
    """A fenced block of a page."""

    how: str
    """`file`, `not run`, or `run`."""
    what: str
    """The name of the file, or why it isn't run."""
    language: str
    code: str


def blocks(page: str) -> Iterator[Block]:
    for found in FENCE.finditer(page):
        file, why = found["file"], found["why"]
        how = "file" if file else "not run" if why else "run"
        yield Block(how, file or why or "", found["language"], found["code"])


def run(block: Block) -> None:
    """Raises `ValueError` for what can't be run, and whatever the block raises."""
    if block.how == "not run":
        return
    if block.how == "file":
        Path(block.what).write_text(block.code, encoding="utf-8")
        if block.what == "pyproject.toml":
            installed(tomllib.loads(block.code)["project"])
    elif block.language == "python":
        exec(compile(block.code, "a block of the page", "exec"), {"__name__": "page"})
    elif block.language == "bash":
        for line in block.code.replace("\\\n", " ").splitlines():
            command(shlex.split(line, comments=True))
    else:
        raise ValueError(f"a block of {block.language} can't be run; give it a file, or say why it isn't run")


def command(words: list[str]) -> None:
    match words:
        case []:
            return
        case ["python", file]:
            runpy.run_path(file, run_name="__main__")
        case ["mm", *arguments]:
            from mm.cli import main

            if status := main(arguments):
                raise ValueError(f"{shlex.join(words)} ended with {status}")
        case _:
            raise ValueError(f"{shlex.join(words)} can't be run here")


def installed(project: dict[str, Any]) -> None:
    """The project's entry points, as pip would leave them."""
    folder = Path(f"{project['name'].replace('-', '_')}-{project['version']}.dist-info")
    folder.mkdir()
    Path(folder, "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    Path(folder, "entry_points.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    for each in blocks(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(each)
