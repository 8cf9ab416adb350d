"""The tutorials run: every block of docs/tutorials in its order, in an empty folder. What they promise they assert themselves."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
RUNNER = Path(__file__).resolve().parent / "run_page.py"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """tests/run_page.py."""
    spec = importlib.util.spec_from_file_location("run_page", RUNNER)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_asserts_what_it_promises(page: Path, runner: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    found = list(runner.blocks(text))
    assert len(found) == len(re.findall(r"^```\w+$", text, re.M)), "every block is understood"
    assert sum(block.how == "file" for block in found) == len(re.findall(r"^`[^`]+`:$", text, re.M)) >= 1
    ran = [block for block in found if block.how == "run"]
    assert any(block.code.startswith("mm fit") for block in ran if block.language == "bash")
    assert any("\nassert " in block.code for block in ran if block.language == "python")


QUICK = ("add_a_modality",)  # half a minute each: one is run every time, all of them with -m "slow or long"


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow if p.stem in QUICK else pytest.mark.long, id=p.stem) for p in PAGES],
)
def test_it_runs(page: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(page)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def test_what_cannot_be_run_is_refused(runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code, message in (("rm -rf x\n", "rm -rf x can't be run"), ("mm nonsense\n", "mm nonsense ended with 2")):
        with pytest.raises(ValueError, match=message):
            runner.run(runner.Block("run", "", "bash", code))
    with pytest.raises(ValueError, match="a block of yaml can't be run"):
        runner.run(runner.Block("run", "", "yaml", "a: 1\n"))
    with pytest.raises(AssertionError):
        runner.run(runner.Block("run", "", "python", "assert 1 > 2\n"))
    page = "`a.txt`:\n\n```text\nhello\n```\n\n<!-- not run: it would fail -->\n```python\nassert False\n```\n"
    for block in runner.blocks(page):
        runner.run(block)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and Path("a.txt").read_text() == "hello\n"
