"""The README keeps its promises: its commands and its code run, in the order in which a reader meets them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?P<note><!-- not run: [^>]+ -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks() -> list[tuple[str, str]]:
    """Language and code of every fenced block that is to be run."""
    return [(m["language"], m["code"]) for m in BLOCK.finditer(TEXT) if not m["note"]]


def test_there_is_something_to_run() -> None:
    languages = [language for language, _ in blocks()]
    assert languages.count("bash") >= 1 and languages.count("python") >= 2
    assert set(languages) <= {"bash", "python"}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the commands are written for a POSIX shell")
def test_it_runs(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, code in blocks():
        command = ["sh", "-e"] if language == "bash" else [sys.executable, "-"]
        done = subprocess.run(
            command,
            input=code,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "mushrooms.png").stat().st_size > 0
    assert (tmp_path / "heart.png").stat().st_size > 0
    made = {"said.wav", "said-01.wav", "said-02.wav", "seven.gif", "moves.gif", "mug.glb", "chair.glb"}
    assert made <= {path.name for path in tmp_path.iterdir()}


def test_its_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    # Only in code, so that prose such as "make them" is not taken for a target.
    code = re.findall(r"`([^`\n]+)`", TEXT) + [m["code"] for m in BLOCK.finditer(TEXT)]
    named = {name for part in code for name in re.findall(r"^make ([a-z-]+)", part, re.M)}
    assert {"demo", "test", "lint"} <= named
    assert named <= targets


def test_its_local_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_files_it_names_exist() -> None:
    named = set(re.findall(r"`((?:mm|tests|configs|tokenizers|heads|apps)/[\w/.-]*)`", TEXT))
    assert "mm/interfaces.py" in named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_systems_it_lists_have_configurations() -> None:
    rows = re.findall(r"^\| \[([\w-]+)\]\(docs/systems/", TEXT, re.M)
    assert "Liquid" in rows
    assert [
        row for row in rows if not (ROOT / "configs" / "systems" / f"{row.lower().replace('-', '_')}.yaml").exists()
    ] == []
