"""The shipped systems of shapes, small: they train on shapes made as it goes, and their checkpoints work in both directions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trimesh.creation import box

import mm
from mm.cli import main as run_mm
from mm.commands.train import SHIPPED, main
from mm.data.shapes import ShapesSource
from mm.interfaces import Sampling
from mm.shape_files import save_mesh
from mm.tokenizers.triplane_msvq import TriplaneMSVQ
from mm.tokenizers.voxel_vq import VoxelVQ

SMALL = """
trainer:
  max_steps: 2
  val_check_interval: 2
  limit_val_batches: 1
  callbacks:
    - class_path: mm.export.SavePretrained
      init_args: {sampling: {shape: {guidance: 2.0}}}
model:
  init_args:
    backbone: {width: 32, layers: 1, heads: 2}
    sample_prompts: [a tall table]
data:
  init_args:
    batches_per_epoch: 4
"""
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def made(system: str, folder: Path, count: int = 24) -> list[str]:
    """The shipped configuration with fewer shapes, for `mm fit`."""
    shutil.copytree(SHIPPED, folder / "configs")
    file = folder / "configs" / "systems" / f"{system}.yaml"
    text = file.read_text()
    assert "count: 20000" in text
    file.write_text(text.replace("count: 20000", f"count: {count}").replace("count: 6000", f"count: {count // 2}"))
    (folder / "small.yaml").write_text(SMALL)
    return ["fit", "-c", str(file), "-c", "small.yaml", *QUIET]


def triplane(**settings: Any) -> TriplaneMSVQ:
    torch.manual_seed(0)
    small: dict[str, Any] = dict(width=16, depth=1, heads=2, features=8, hidden=8, codebook_size=32, code_dim=8)
    return TriplaneMSVQ(**{**small, **settings}).eval()


def test_sar3d_makes_shapes_and_tells_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    triplane(scales=(1, 2)).save("runs/triplane_msvq/tokenizer")
    assert main(made("sar3d", tmp_path)) == 0
    model = "runs/sar3d/model"
    out = mm.TextTo3DPipeline.from_pretrained(model)("a tall table", seed=0)
    assert out.grids[0].shape == (32, 32, 32) and len(out.tokens[0]) == 15
    seen = mm.ImageTo3DPipeline.from_pretrained(model)(Image.new("RGB", (64, 64), "white"), seed=0)
    assert seen.tokens[0].grid == (3, 2, 2)
    shape = ShapesSource(count=1)[0]["shape"]
    reads = mm.ShapeToTextPipeline.from_pretrained(model)
    assert isinstance(reads(shape, question="how many legs?", scales=1, max_tokens=3).texts[0], str)
    assert list(Path("runs/sar3d").rglob("step-*.png")), "shapes are shown beside the logs"
    save_mesh("box.obj", box((1, 2, 1)))
    Image.new("RGB", (64, 64), "white").save("seen.png")
    for arguments in (
        ["a tall table", "--to", "3d", "--out", "table.glb", "--num", "2", "--scales", "1"],
        ["--to", "3d", "--from", "seen.png", "--out", "seen.png.stl"],
        [
            "how many legs?",
            "--to",
            "text",
            "--from",
            "box.obj",
            "--scales",
            "1",
            "--max-tokens",
            "3",
            "--out",
            "legs.txt",
        ],
    ):
        assert run_mm(["generate", *arguments, "--model", model, "--seed", "0"]) == 0
    for name in ("table-01.glb", "table-02.glb", "table-sheet.png", "seen.png.stl", "legs.txt"):
        assert Path(name).is_file(), name
    for arguments, message in (
        (["--to", "3d"], "--to 3d makes what a prompt says, or what pictures in --from show; give one of the two"),
        (["a", "--to", "3d", "--from", "seen.png"], "give one of the two"),
        (["--to", "image", "--from", "box.obj"], "shapes in --from are told about: use --to text"),
        (["--to", "text", "--from", "box.obj", "seen.png"], "--from has shapes and something else"),
        (["a", "--to", "text", "--scales", "1"], "--scales goes with --to 3d, or with shapes in --from"),
        (["a", "--to", "3d", "--out", "a.max"], "unknown ending '.max'; use one of .glb"),
        (["a", "--to", "video"], "makes text and 3d, not 'video'"),
    ):
        assert run_mm(["generate", *arguments, "--model", model]) != 0
        assert message in capsys.readouterr().err


def test_voxel_lm_makes_shapes_and_tells_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    VoxelVQ(channels=8, multipliers=(1, 1), downsample=8, quantizer="lfq", codebook_size=16, code_dim=4).eval().save(
        "runs/voxel_vq/tokenizer"
    )
    assert main(made("voxel_lm", tmp_path)) == 0
    out = mm.TextTo3DPipeline.from_pretrained("runs/voxel_lm/model")("a tall table", seed=0)
    assert out.grids[0].shape == (32, 32, 32) and len(out.tokens[0]) == 64
    assert isinstance(mm.ShapeToTextPipeline.from_pretrained("runs/voxel_lm/model")(
        np.ones((32, 32, 32), bool), max_tokens=3).texts[0], str)  # fmt: skip


def test_mesh_lm_writes_triangles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*made("mesh_lm", tmp_path), "--trainer.max_steps=1", "--trainer.val_check_interval=1"]) == 0
    pipeline = mm.TextTo3DPipeline.from_pretrained("runs/mesh_lm/model")
    tokens = pipeline.generate(pipeline.encode(["a flat box"]), sampling=Sampling(), seed=0)
    assert (len(tokens[0]) - 1) % 9 == 0, "whole triangles"
    shape = ShapesSource(count=1, sides=6, kinds=["box"])[0]["shape"]
    reads = mm.ShapeToTextPipeline.from_pretrained("runs/mesh_lm/model")
    assert len(reads.encode([shape])[0][0].content) == 12 * 9 + 1
