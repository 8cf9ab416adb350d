"""Tokenizers of shapes: cubes as codes, planes of codes at several scales, triangles as coordinates; how they are trained.

(What all tokenizers have in common: test_tokenizers_contract.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from trimesh import Trimesh
from trimesh.creation import icosphere

from mm.data.example import BrokenExample, Source
from mm.data.shape_batches import ShapeBatch, ShapeDataModule
from mm.data.shapes import ShapesSource
from mm.interfaces import Encoded
from mm.shape_tokenizer import pictures_of, solidity
from mm.shape_views import DISTANCE
from mm.shapes import Shape, from_mesh
from mm.tokenizers.mesh_faces import MeshFaces
from mm.tokenizers.triplane_msvq import TriplaneMSVQ
from mm.tokenizers.voxel_vq import VoxelVQ
from mm.training_shapes import ShapeTokenizerModule
from mm.triplane import PLANES, Planes, columns, from_columns
from mm.volume import Rendering
from mm.voxel_autoencoder import from_blocks, to_blocks
from mm.voxels import iou

KINDS = ["box", "table", "mug"]


@pytest.fixture(scope="module")
def shapes() -> list[Shape]:
    source = ShapesSource(count=12, size=16, kinds=KINDS)
    return [source[i]["shape"] for i in range(12)]


@pytest.fixture(scope="module")
def batch(shapes: list[Shape]) -> torch.Tensor:
    return torch.stack([solidity(shape) for shape in shapes])


def made(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    if kind == "voxel":
        return VoxelVQ(
            **{"size": 16, "channels": 16, "codebook_size": 64, "code_dim": 8, "dead_below": 0.0, **settings}
        )
    small: dict[str, Any] = dict(size=16, scales=[1, 2, 4], width=32, depth=1, heads=2, features=16, hidden=16)
    return TriplaneMSVQ(**{**small, "codebook_size": 64, "code_dim": 8, "dead_below": 0.0, **settings})


# --- solidity, blocks, planes ---------------------------------------------------------------------------------------


def test_solidity_is_the_distance_with_the_other_sign_and_cut_off() -> None:
    grid = np.full((4, 4, 4), 0.3, np.float32)
    grid[0, 0, :3] = -0.05, 0.02, -0.7
    values = solidity(Shape(grid))
    assert values[0, 0].tolist() == pytest.approx([0.5, -0.2, 1.0, -1.0])


def test_blocks_hold_their_cells_and_come_back() -> None:
    x = torch.randn(2, 3, 8, 8, 8)
    blocks = to_blocks(x, 4)
    assert blocks.shape == (2, 192, 2, 2, 2)
    assert torch.equal(from_blocks(blocks, 4), x)
    assert torch.equal(blocks[1, 64:128, 1, 0, 1].view(4, 4, 4), x[1, 1, 4:, :4, 4:])


@pytest.mark.parametrize("axis", range(3))
def test_a_plane_sees_what_stands_over_its_place(axis: int) -> None:
    x = torch.zeros(1, 8, 8, 8)
    cell = (6, 1, 4)
    x[(0, *cell)] = 1
    seen = columns(x, 2)[axis][0].sum(1).view(2, 2)
    rows, column = PLANES[axis]
    assert seen.nonzero().tolist() == [[cell[rows] // 4, cell[column] // 4]]
    y = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(from_columns(columns(y, 2), 2), 3 * y)


def test_points_and_cells_say_the_same() -> None:
    tokenizer = made("triplane")
    torch.nn.init.normal_(tokenizer.decoder.last.weight)
    planes = Planes(torch.randn(2, 3, 16, 16, 16), torch.randn(2, 16, 16, 16))
    kept = [torch.tensor([0, 3, 15]), torch.tensor([2, 9]), torch.tensor([1, 7, 8, 14])]
    cells = tokenizer.decoder.at_cells(planes, tuple(kept))
    centres = (torch.cartesian_prod(*kept) + 0.5) / 16
    points = tokenizer.decoder.at_points(planes, centres.expand(2, -1, -1))
    torch.testing.assert_close(points.view(2, 3, 2, 4), cells, rtol=1e-4, atol=1e-5)


def test_points_of_ids_come_in_parts(monkeypatch: pytest.MonkeyPatch, batch: torch.Tensor) -> None:
    tokenizer = made("triplane").eval()
    ids, points = tokenizer.ids_of(batch[:2]), torch.rand(2, 50, 3)
    whole, cube = tokenizer.solidity_at(ids, points), tokenizer.solidity_of(ids)
    monkeypatch.setattr("mm.tokenizers.triplane_msvq.CHUNK", 16 * 32)
    torch.testing.assert_close(tokenizer.solidity_at(ids, points), whole)
    torch.testing.assert_close(tokenizer.solidity_of(ids), cube)


def test_pictures_have_colour_depth_and_rays() -> None:
    ball = from_mesh(icosphere(subdivisions=3), 16)
    views = pictures_of(ball, 2, 17)
    assert views.shape == (2, 10, 17, 17) and views[:, :3].abs().max() <= 1
    middle = views[:, :, 8, 8]
    assert middle[:, 3] == pytest.approx([-0.45, -0.45], abs=0.02), "the near side of a ball of radius 0.45"
    assert views[:, 3, 0, 0].tolist() == [1, 1], "nothing is far off"
    assert middle[:, 4:7].norm(dim=1).tolist() == pytest.approx([1, 1])
    assert middle[:, 7:].abs().max() < 1e-5, "the ray through the middle of the cube has no moment about it"
    assert DISTANCE * views[:, 7:, 0].norm(dim=1).min() > 0.5


# --- what both learn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["voxel", "triplane"])
def test_they_learn_shapes(kind: str, batch: torch.Tensor, shapes: list[Shape]) -> None:
    tokenizer = made(kind).train()
    module = ShapeTokenizerModule(tokenizer)
    tokenizer.warm_start(batch)

    def overlap() -> float:
        return float(
            np.mean([iou(tokenizer.decode(tokenizer.encode(one)).value.occupancy, one.occupancy) for one in shapes])
        )

    before = overlap()
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    for _ in range(24):
        out = tokenizer.learn(batch, batch)
        loss = torch.stack(list(module.losses(out.output, out.target).values())).sum() + out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.weights_changed()
    assert overlap() > before + 0.03 and overlap() > 0.75


def test_a_closed_form_is_where_voxel_vq_begins(batch: torch.Tensor) -> None:
    tokenizer = made("voxel", codebook_size=512, code_dim=64)
    tokenizer.warm_start(batch)
    before = tokenizer.quantizer(tokenizer.encoder(batch[:, None]).flatten(3))
    latents = tokenizer.encoder(batch[:, None])
    torch.testing.assert_close(tokenizer.decoder(latents)[:, 0], batch, rtol=1e-3, atol=1e-3)
    assert before.ids.unique().numel() > 100


@pytest.mark.parametrize("quantizer", ["fsq", "lfq", "bsq"])
def test_voxel_vq_with_other_quantizers(quantizer: str, batch: torch.Tensor, tmp_path: Path) -> None:
    tokenizer = made("voxel", quantizer=quantizer, levels=[5, 4, 3]).train()
    tokenizer.warm_start(batch)
    out = tokenizer.learn(batch, batch)
    out.output.square().mean().backward()
    assert tokenizer.encoder.linear.weight.grad.abs().sum() > 0, "the gradient passes the quantiser"
    tokenizer.save(tmp_path / "saved")
    again = VoxelVQ.from_directory(tmp_path / "saved")
    assert again.spec == tokenizer.spec and again.spec.vocab_size == (60 if quantizer == "fsq" else 64)


def test_eight_cells_a_token(batch: torch.Tensor) -> None:
    tokenizer = made("voxel", downsample=8, multipliers=[1, 2])
    assert tokenizer.spec.max_grid == (2, 2, 2)
    assert tokenizer.reconstruct(batch[:2]).output.shape == (2, 16, 16, 16)


def test_the_decoder_may_be_trained_further(batch: torch.Tensor) -> None:
    for tokenizer in (made("voxel"), made("triplane")):
        before = tokenizer.fingerprint
        with torch.no_grad():
            tokenizer.decoder.last.weight.add_(0.1)
        tokenizer.weights_changed()
        assert tokenizer.fingerprint == before
        with torch.no_grad():
            next(tokenizer.encoder.parameters()).add_(0.1)
        tokenizer.weights_changed()
        assert tokenizer.fingerprint != before


# --- decoding is total ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["voxel", "triplane"])
def test_nothing_inside_is_an_empty_mesh_that_says_so(kind: str) -> None:
    tokenizer = made(kind).eval()
    torch.nn.init.zeros_(tokenizer.decoder.last.weight)
    bias = tokenizer.decoder.linear.bias if kind == "voxel" else tokenizer.decoder.last.bias
    torch.nn.init.constant_(bias, -100.0)
    if kind == "voxel":
        torch.nn.init.zeros_(tokenizer.decoder.linear.weight)
    spec = tokenizer.spec
    ids = torch.zeros(spec.count(spec.max_grid), dtype=torch.long)
    decoded = tokenizer.decode(spec.item(ids, spec.max_grid))
    assert not decoded.valid and decoded.reason == "nothing is inside: every cell of the grid is empty"
    assert len(decoded.value.mesh.faces) == 0 and decoded.value.size == 16
    torch.nn.init.constant_(bias, float("nan"))
    assert not tokenizer.decode(spec.item(ids, spec.max_grid)).valid


def test_a_smaller_grid_is_the_part_at_the_origin(batch: torch.Tensor) -> None:
    tokenizer = made("voxel").eval()
    torch.nn.init.constant_(tokenizer.decoder.linear.bias, 100.0)
    decoded = tokenizer.decode(Encoded(grid=(2, 1, 3), ids=torch.zeros(6, dtype=torch.long)))
    expected = np.zeros((16, 16, 16), bool)
    expected[:8, :4, :12] = True
    assert decoded.valid and np.array_equal(decoded.value.occupancy, expected)


def test_first_scales_decode_at_full_size(batch: torch.Tensor, shapes: list[Shape]) -> None:
    tokenizer = TriplaneMSVQ.tiny()
    item = tokenizer.encode(shapes[0])
    assert item.grid == (3, 4, 4) and len(item) == 63 and tokenizer.spec.scales == ((3, 1, 1), (3, 2, 2), (3, 4, 4))
    for grid in tokenizer.spec.scales:
        assert item.ids is not None
        part = tokenizer.decode(tokenizer.spec.item(item.ids[: tokenizer.spec.count(grid)], grid))
        assert part.value.size == 16 and part.valid == part.value.valid
    inputs = tokenizer.scale_inputs(item.ids[:15])
    assert inputs.shape == (63, 4) and not inputs[:3].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(size=18), "size must be a multiple of 4 from 16 to 128, got 18"),
        (dict(downsample=8), "downsample 8 after blocks of 4 has 2 levels, got 1 multipliers"),
        (dict(quantizer="residual"), "quantizer must be one of vq, fsq, lfq, bsq, got 'residual'"),
        (dict(channels=0), "widths must be in 1..1024"),
    ],
)
def test_voxel_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VoxelVQ(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(scales=[1, 5]), "the last scale must divide size, 32, got 5"),
        (dict(heads=3), "heads must divide the widths 128 and 128, got 3"),
        (dict(views=[6, 60]), "a multiple of 8 up to 128, or \\[0, 0\\]; got \\[6, 60\\]"),
        (dict(cells=33), "cells must be a whole number in 1..32, got 33"),
    ],
)
def test_triplane_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TriplaneMSVQ(**settings)


@pytest.mark.parametrize(
    "tokenizer", [VoxelVQ.tiny(), TriplaneMSVQ.tiny(), MeshFaces.tiny()], ids=lambda t: type(t).__name__
)
def test_what_is_no_shape_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        tokenizer.encode(Trimesh())
    with pytest.raises(ValueError, match="missing"):
        tokenizer.encode("nowhere.obj")
    if not isinstance(tokenizer, MeshFaces):
        with pytest.raises(ValueError, match="16³ cells is wanted, got 8³"):
            tokenizer.encode(np.zeros((8, 8, 8), bool))


# --- pictures instead of the cube -----------------------------------------------------------------------------------


def test_pictures_are_read_instead(shapes: list[Shape], batch: torch.Tensor, tmp_path: Path) -> None:
    tokenizer = made("triplane", views=[2, 16]).train()
    views = tokenizer.inputs(shapes[:4])
    tokenizer.warm_start(views)
    latents = tokenizer.encoder(views)
    assert latents.std(0).mean() > 0.5 * latents.std(), "what is seen counts, not only where"
    out = tokenizer.learn(views, batch[:4])
    (out.output - out.target).square().mean().backward()
    assert tokenizer.encoder.enter.weight.grad.abs().sum() > 0
    tokenizer.save(tmp_path / "saved")
    again, item = TriplaneMSVQ.from_directory(tmp_path / "saved"), tokenizer.encode(shapes[0])
    assert again.looks == (2, 16) and torch.equal(again.encode(shapes[0]).content, item.content)
    module = ShapeTokenizerModule(tokenizer)
    with pytest.raises(ValueError, match=r"reads views \(2, 16\), the data gives None; set views alike"):
        module.training_step(ShapeBatch(batch, torch.zeros(12, dtype=torch.long)), 0)


# --- training -------------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    module = ShapeTokenizerModule(made("voxel"), near=3.0, positive=2.0, sharpness=1.0)
    target = torch.tensor([[1.0, -1.0, 0.5, -0.5]])
    perfect = module.losses(torch.tensor([[5.0, -5.0, 0.5, -0.5]]), target)
    assert float(perfect["distance"]) == 0, "beyond the band only the side counts"
    off = module.losses(torch.tensor([[0.0, -2.0, 0.5, 0.5]]), target)
    assert float(off["distance"]) == pytest.approx((1 * 1.0 + 3 * 1.0) / (1 + 1 + 3 + 3))
    share = torch.tensor([0.0, -2.0, 0.5, 0.5]).sigmoid()
    inside = torch.tensor([1.0, 0.0, 1.0, 0.0])
    bce = -(2 * inside * share.log() + (1 - inside) * (1 - share).log()).mean()
    assert float(off["bce"]) == pytest.approx(float(bce))
    dice = 1 - (2 * (share[0] + share[2]) + 1) / (share.sum() + 2 + 1)
    assert float(off["dice"]) == pytest.approx(float(dice))
    with pytest.raises(ValueError, match="loss weights must not be negative, and one positive"):
        ShapeTokenizerModule(made("voxel"), distance=0, bce=0, dice=0)
    blind = ShapeTokenizerModule(made("voxel"), rendering=Rendering())
    with pytest.raises(ValueError, match=r"the data gives none; set views of the data"):
        blind._pictures(ShapeBatch(torch.zeros(1, 16, 16, 16), torch.zeros(1)))


@pytest.mark.parametrize("pictures", [False, True], ids=["cells", "pictures too"])
def test_fit_measures_and_saves(pictures: bool, tmp_path: Path) -> None:
    source = ShapesSource(count=64, size=16, kinds=KINDS)
    views = [2, 16] if pictures else [0, 0]
    data = ShapeDataModule(
        source, ShapesSource(count=8, seed=1, size=16, kinds=KINDS), size=16, views=views, batch_size=4, held_out=6
    )
    rendering = Rendering(rays=16, coarse=8, fine=4) if pictures else None
    module = ShapeTokenizerModule(made("voxel"), rendering=rendering, warm_start=16, save_to=str(tmp_path / "saved"))
    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=3, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)
    figures = trainer.callback_metrics
    terms = {"train/alpha", "train/depth", "train/colour"}
    assert terms <= set(figures) if pictures else terms.isdisjoint(figures)
    assert 0 < float(figures["val/iou"]) <= 1 and 0 < float(figures["val/usage"]) <= 1
    again = VoxelVQ.from_directory(tmp_path / "saved")
    overlap = []
    for shape in data.shapes(data.validation, range(6)):
        overlap.append(iou(again.decode(again.encode(shape)).value.occupancy, shape.occupancy))
    assert np.mean(overlap) == pytest.approx(float(figures["val/iou"]), abs=1e-3), "the figure is of what was saved"


class Broken(Source):
    """Every second shape is of another size, without a mesh."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._finish([str(i) for i in range(4)], "broken shapes")

    @property
    def identity(self) -> str:
        return "broken"

    def _fields(self, ordinal: int) -> dict[str, Any]:
        return {"shape": Shape(np.ones((16 - 8 * (ordinal % 2),) * 3, bool)), "number": ordinal}


def test_batches_of_shapes() -> None:
    source = ShapesSource(count=20, size=16, kinds=KINDS)
    data = ShapeDataModule(source, source, size=16, views=[2, 16], batch_size=4, held_out=6)
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 5 and batches[0].views is not None and batches[0].views.shape == (4, 2, 10, 16, 16)
    assert [len(batch.solidity) for batch in data.val_dataloader()] == [4, 2]
    assert torch.equal(next(iter(data.val_dataloader())).solidity[1], solidity(source[1]["shape"]))
    with pytest.raises(ValueError, match="has 20 shapes to train on, fewer than one batch of 21"):
        ShapeDataModule(source, source, batch_size=21).setup()
    with pytest.raises(ValueError, match="views two numbers"):
        ShapeDataModule(source, source, views=[2])


def test_a_broken_shape_gives_its_place_to_the_next() -> None:
    data = ShapeDataModule(Broken(), Broken(), size=16, batch_size=2)
    with pytest.warns(
        UserWarning, match="skipped a broken example: example '1': a grid of 16³ cells is wanted, got 8³"
    ):
        assert len(data.shapes(data.train, [1, 2])) == 2
    with pytest.raises(BrokenExample, match="got 8³"):
        data.shape(data.train, 1)
    strict = Broken(strict=True)
    with pytest.raises(ValueError, match="broken shapes: example '1'"):
        data.shapes(strict, [1])


@pytest.mark.parametrize("made", [VoxelVQ, TriplaneMSVQ])
@pytest.mark.parametrize("wrong", [None, [1], {}, "much", True])
def test_settings_that_are_no_numbers(made: Any, wrong: object) -> None:
    for name in ("decay", "dead_below", "commitment"):
        with pytest.raises(ValueError, match=f"{name} must be a number"):
            made(**{name: wrong})
