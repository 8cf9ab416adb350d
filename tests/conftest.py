"""What every test shares. Nothing of mm is imported here: the shape checks are hooked in before its first import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def everything() -> Any:
    """A random model that reads and makes text, pictures, sound (8 kHz), video and shapes."""
    import numpy as np
    import torch

    from mm.backbone import BackboneConfig
    from mm.heads.lm import LMHead
    from mm.heads.regression import RegressionHead
    from mm.interfaces import Decoded, Encoded, Modality, ModalityTokenizer, Spec
    from mm.model import MultimodalModel
    from mm.orders.raster import Raster
    from mm.shapes import Shape, load_shape
    from mm.testing import Frames, Palette
    from mm.tokenizers.text_bytes import TextBytes
    from mm.tokenizers.video_frames import VideoFrames

    class Cubes(ModalityTokenizer):
        """A shape of 8³ cells as which of its 4³ cubes are full, an id each."""

        spec = Spec(kind="discrete", vocab_size=2, max_grid=(4, 4, 4), voxels=8, fingerprint="cubes")

        def encode(self, raw: Any) -> Encoded:
            full = load_shape(raw, 8).occupancy.reshape(4, 2, 4, 2, 4, 2).mean((1, 3, 5)) >= 0.5
            return Encoded(grid=(4, 4, 4), ids=torch.tensor(full).long().flatten())

        def decode(self, encoded: Encoded) -> Decoded:
            full = encoded.content.view(4, 4, 4).numpy() > 0
            return Decoded(value=Shape(np.kron(full, np.ones((2, 2, 2), bool))))

    torch.manual_seed(0)
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="image", tokenizer=Palette(8), head=LMHead(), order=Raster()),
        Modality(name="speech", tokenizer=Frames(160, 64, 8000), head=RegressionHead(), order=Raster()),
        Modality(name="video", tokenizer=VideoFrames.tiny(), head=LMHead(), order=Raster()),
        Modality(name="shape", tokenizer=Cubes(), head=LMHead(), order=Raster()),
    ]
    config = BackboneConfig(width=32, layers=2, heads=4, kv_heads=2)
    model = MultimodalModel(config, modalities, context=1024)
    for parameter in model.parameters():  # zero-initialised layers would hide mistakes
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
