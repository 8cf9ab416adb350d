"""What every test shares. Nothing of mm is imported here: the shape checks are hooked in before its first import."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests never reach out, and two workers share two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    from hypothesis import settings

    # A failure must come back when the test is run again, and slow machines are not failures.
    settings.register_profile("mm", deadline=None, derandomize=True, database=None)
    settings.load_profile("mm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Tests that draw without a generator of their own draw the same numbers every time."""
    import sys

    torch = sys.modules.get("torch")  # tests that do without torch should not pay for importing it
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the small generated digits that `configs/debug.yaml` names."""
    from mm.data.convert import make_digits

    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder / "data" / "debug", count=60, size=8)
    return folder


@pytest.fixture
def here(digits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the current folder."""
    monkeypatch.chdir(digits)
    return digits
