"""`mm tokenize` of shapes: what is measured, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

from mm.cli import main
from mm.commands import tokenize
from mm.commands.tokenize_shapes import chamfer, lost_shape, tokenize_shape
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec
from mm.shape_files import load_mesh, save_mesh
from mm.shapes import Shape, as_shape, from_mesh, to_npz


class Blocks(ModalityTokenizer):
    """Eight cells an id: nothing of the cells is lost."""

    def __init__(self, size: int = 16) -> None:
        self.size = size

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=256, max_grid=(self.size // 2,) * 3, voxels=self.size)

    def encode(self, raw: Any) -> Encoded:
        half = self.size // 2
        cells = as_shape(raw, self.size).occupancy.reshape(half, 2, half, 2, half, 2).transpose(0, 2, 4, 1, 3, 5)
        packed = np.packbits(cells.reshape(half**3, 8), axis=1)[:, 0]
        return Encoded(grid=(half,) * 3, ids=torch.from_numpy(packed.astype(np.int64)))

    def decode(self, encoded: Encoded) -> Decoded:
        half = self.size // 2
        assert encoded.ids is not None
        cells = np.unpackbits(encoded.ids.numpy().astype(np.uint8)[:, None], axis=1).astype(bool)
        cells = cells.reshape(half, half, half, 2, 2, 2).transpose(0, 3, 1, 4, 2, 5)
        shape = Shape(cells.reshape((self.size,) * 3))
        return Decoded(value=shape, valid=shape.valid, reason=shape.reason)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Blocks:
    made = Blocks()
    monkeypatch.setattr(tokenize, "find", lambda name, *kinds: made)
    return made


def test_a_mesh_is_measured_and_written(blocks: Blocks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_mesh(tmp_path / "ball.obj", trimesh.creation.icosphere(3, 7.0))
    out = tmp_path / "back.glb"
    assert main(["tokenize", str(tmp_path / "ball.obj"), "--tokenizer", "x", "--json", "--out", str(out)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["tokens"], figures["bits"], figures["raw_bits"]) == (512, 4096, 4096)
    assert figures["iou"] == 1 and abs(figures["volume_error"]) < 0.05 and figures["chamfer"] < 0.5 / 16
    assert figures["watertight"] and figures["decoded_watertight"] and figures["decoded_euler"] == 2
    assert load_mesh(out).is_watertight


def test_grids_and_empty_shapes(blocks: Blocks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.shape.npz").write_bytes(to_npz(Shape(np.zeros((16, 16, 16), bool))))
    assert main(["tokenize", str(tmp_path / "a.shape.npz"), "--tokenizer", "x", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert not figures["valid"] and "every cell" in figures["reason"] and figures["chamfer"] is None


def test_what_is_lost_grows_with_the_difference() -> None:
    small, large = (from_mesh(trimesh.creation.icosphere(3, 1.0), 16, margin=margin) for margin in (0.1, 0.15))
    same, other = lost_shape(small, small), lost_shape(small, large)
    assert same["iou"] == 1 and same["volume_error"] == 0 and same["chamfer"] < 0.02
    assert other["iou"] < 0.8 and other["volume_error"] < -0.2 and other["chamfer"] == pytest.approx(0.05, rel=0.2)
    assert chamfer(small, Shape(np.zeros((16, 16, 16), bool))) is None
    assert tokenize_shape(small, Blocks())[1].size == 16


def test_refusals(blocks: Blocks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.obj").write_text("nothing")
    (tmp_path / "a.txt").write_text("nothing")
    for file, message in (("a.obj", "none of GLB"), ("b.ply", "is missing"), ("a.txt", "is a tokenizer of shapes")):
        assert main(["tokenize", str(tmp_path / file), "--tokenizer", "x"]) != 0
        assert message in capsys.readouterr().err
    save_mesh(tmp_path / "a.obj", trimesh.creation.box())
    assert main(["tokenize", str(tmp_path / "a.obj"), "--tokenizer", "x", "--out", "x.png"]) != 0
    assert "unknown ending '.png'" in capsys.readouterr().err
