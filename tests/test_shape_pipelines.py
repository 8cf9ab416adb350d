"""Pipelines of shapes with tiny random models: numbers, scales, files, pictures as conditions, captions, questions, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

import mm
from mm.backbone import BackboneConfig
from mm.heads.lm import LMHead
from mm.heads.regression import RegressionHead
from mm.interfaces import Decoded, Encoded, Modality, ModalityTokenizer, Order, Spec
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.raster import Raster
from mm.orders.scales import Scales
from mm.pipelines.image_to_3d import ImageTo3DPipeline
from mm.pipelines.media import medium_of
from mm.pipelines.outputs import MeshOutput
from mm.pipelines.shape_to_text import ShapeToTextPipeline
from mm.pipelines.text_to_3d import TextTo3DPipeline
from mm.shape_files import load_mesh, save_mesh
from mm.shapes import Shape, as_shape, to_npz
from mm.stream import pack
from mm.testing import Palette, tiny
from mm.tokenizers.image_features import ImageFeatures
from mm.tokenizers.text_bytes import TextBytes
from mm.training import ModelTraining
from mm.voxels import iou

SIDE, CELLS = 8, 4
"""Of the toy tokenizers: cells of a shape and of the finest grid."""


def halves(cells: Any, side: int) -> torch.Tensor:
    """Which of side³ blocks are filled by half or more."""
    step = len(cells) // side
    share = np.asarray(cells, np.float32).reshape(side, step, side, step, side, step).mean((1, 3, 5))
    return torch.tensor(share >= 0.5).long().flatten()


def blocks(ids: torch.Tensor, side: int) -> Shape:
    """The shape of filled blocks."""
    cells = ids.clamp(0, 1).view(side, side, side).numpy().astype(bool)
    return Shape(cells.repeat(SIDE // side, 0).repeat(SIDE // side, 1).repeat(SIDE // side, 2))


class Octants(ModalityTokenizer):
    """A shape as blocks of three sizes, each filled or not."""

    sides = (1, 2, CELLS)

    @property
    def spec(self) -> Spec:
        scales = tuple((side,) * 3 for side in self.sides)
        return Spec(
            kind="discrete", vocab_size=2, max_grid=scales[-1], scales=scales, scale_dim=1, voxels=SIDE, spatial=False,
            fingerprint="octants",
        )  # fmt: skip

    def encode(self, raw: Any) -> Encoded:
        cells = as_shape(raw, SIDE).occupancy
        return self.spec.item(torch.cat([halves(cells, side) for side in self.sides]), (CELLS,) * 3)

    def decode(self, encoded: Encoded) -> Decoded:
        side = encoded.grid[0]
        shape = blocks(encoded.content[-(side**3) :], side)
        return Decoded(value=shape, valid=shape.valid, reason=shape.reason)

    def scale_inputs(self, ids: torch.Tensor, *, own: bool = False) -> torch.Tensor:
        rows, begin = [torch.zeros(1, 1)], 0
        for number, side in enumerate(self.sides):
            if begin + side**3 > len(ids):
                break
            cells = ids[begin : begin + side**3].view(side, side, side).float()
            begin += side**3
            if own:
                rows.append(cells.view(-1, 1))
            elif number + 1 < len(self.sides):
                for axis in range(3):
                    cells = cells.repeat_interleave(2, axis)
                rows.append(cells.view(-1, 1))
        return torch.cat(rows[own:])


class Listed(ModalityTokenizer):
    """A shape as a list of free length of the blocks that are filled."""

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="discrete", vocab_size=CELLS**3 + 1, stop=CELLS**3, voxels=SIDE, spatial=False, fingerprint="list"
        )

    def encode(self, raw: Any) -> Encoded:
        found = halves(as_shape(raw, SIDE).occupancy, CELLS).nonzero()[:, 0]
        return Encoded(grid=(len(found) + 1,), ids=torch.cat((found, torch.tensor([self.spec.stop]))))

    def decode(self, encoded: Encoded) -> Decoded:
        filled = torch.zeros(CELLS**3 + 1).long()
        filled[encoded.content] = 1
        shape = blocks(filled[:-1], CELLS)
        return Decoded(value=shape, valid=shape.valid, reason=shape.reason)


class Reader(Octants):
    decodes = False


def model(tokenizer: ModalityTokenizer, order: Order, pictures: ModalityTokenizer | None = None) -> MultimodalModel:
    torch.manual_seed(0)
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="solid", tokenizer=tokenizer, head=LMHead(), order=order),
    ]
    if pictures is not None:
        head = RegressionHead() if pictures.spec.kind == "continuous" else LMHead()
        modalities.insert(1, Modality(name="seen", tokenizer=pictures, head=head, order=Raster(prefix=True)))
    config = BackboneConfig(width=32, layers=2, heads=4, kv_heads=2)
    made = MultimodalModel(config, modalities, context=256)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.fixture(scope="module")
def held() -> MultimodalModel:
    return model(Octants(), Scales(), ImageFeatures.tiny())


def ball() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=2)


# --- text to shapes -------------------------------------------------------------------------------------------------


def test_what_a_modality_of_shapes_is() -> None:
    assert medium_of(Octants().spec) == medium_of(Listed().spec) == "shape"
    assert medium_of(ImageFeatures.tiny().spec) == "picture" and medium_of(TextBytes().spec) is None
    assert mm.TextTo3DPipeline is TextTo3DPipeline and mm.ShapeToTextPipeline is ShapeToTextPipeline
    assert mm.ImageTo3DPipeline is ImageTo3DPipeline


def test_shapes_for_prompts(held: MultimodalModel) -> None:
    pipeline = TextTo3DPipeline(held)
    out = pipeline(["a tall table", None], num_meshes=2, seed=3)
    assert isinstance(out, MeshOutput) and len(out.meshes) == len(out.grids) == len(out.tokens) == 4
    assert out.captions == ["a tall table", "a tall table", "", ""] and out.seed == 3
    for mesh, grid, tokens, valid, reason in zip(
        out.meshes, out.grids, out.tokens, out.valid, out.reasons, strict=True
    ):
        assert grid.dtype == bool and grid.shape == (SIDE,) * 3 and len(tokens) == 1 + 8 + 64
        assert valid == grid.any() == (len(mesh.faces) > 0) and valid != bool(reason)
        assert not valid or mesh.is_watertight
    assert any(out.valid), "or nothing was looked at"
    assert not torch.equal(out.tokens[0].content, out.tokens[1].content), "equal prompts give different shapes"
    again = pipeline("a tall table", num_meshes=1, seed=3)
    assert torch.equal(again.tokens[0].content, out.tokens[0].content), "the others don't matter"
    coarse = pipeline("a tall table", scales=2, seed=3)
    assert coarse.tokens[0].grid == (2, 2, 2) and len(coarse.tokens[0]) == 9
    seen: list[int] = []
    pipeline(["a", "b"], seed=0, callback=lambda event: seen.append(event.row))
    assert set(seen) == {0, 1}


def test_words_that_no_model_knows_make_some_shape(held: MultimodalModel) -> None:
    out = TextTo3DPipeline(held)(["qwertz zxcvb", "☃☃☃ \U0001f98a", "x" * 150], seed=0)
    assert len(out.meshes) == 3


def test_lists_of_free_length() -> None:
    out = TextTo3DPipeline(model(Listed(), Raster()))(["a box"] * 3, seed=1)
    assert len({len(tokens) for tokens in out.tokens}) > 1, "the model says how long each is"
    assert all(grid.shape == (SIDE,) * 3 for grid in out.grids)


def test_an_empty_shape_is_an_empty_mesh(held: MultimodalModel, tmp_path: Path) -> None:
    pipeline = TextTo3DPipeline(held)
    nothing = held.modalities[2].tokenizer.spec.item(torch.zeros(73).long(), (CELLS,) * 3)
    full = held.modalities[2].tokenizer.spec.item(torch.ones(73).long(), (CELLS,) * 3)
    out = pipeline.output([nothing, full], ["nothing", "all"], 0)
    assert out.valid == [False, True] and len(out.meshes[0].faces) == 0 and out.reasons[0] and not out.reasons[1]
    for ending in ("glb", "obj", "stl", "ply", "off", "png"):
        first, second = out.save(tmp_path / f"two.{ending}")
        assert first.name == f"two-01.{ending}" and first.stat().st_size and second.stat().st_size
    assert load_mesh(tmp_path / "two-02.glb").is_watertight
    with pytest.raises(ValueError, match="is empty"):
        load_mesh(tmp_path / "two-01.ply")
    with Image.open(tmp_path / "two-02.png") as picture:
        assert picture.size == (256, 256) and np.asarray(picture).min() < 200
    out.save(tmp_path / "round.gif")
    with Image.open(tmp_path / "round-02.gif") as film:
        assert film.n_frames == 24  # type: ignore[attr-defined]
    sheet = out.sheet()
    assert sheet.width > 2 * 128 and np.asarray(sheet).min() < 200
    (tmp_path / "folder").mkdir()
    assert [place.name for place in out.save(tmp_path / "folder")] == ["shape-01.glb", "shape-02.glb"]
    with pytest.raises(ValueError, match=r"unknown ending '.max'; use one of .glb, .obj, .stl, .ply, .off, .gif, .png"):
        out.save(tmp_path / "x.max")


def test_what_cannot_be_made(held: MultimodalModel) -> None:
    pipeline = TextTo3DPipeline(held)
    for call, message in (
        (lambda: pipeline("  "), "the prompt is empty; say what the shape shows"),
        (lambda: pipeline(3), "got a int for a prompt; give a string, None"),  # type: ignore[arg-type]
        (lambda: pipeline("a", num_meshes=0), "num_meshes must be at least 1, got 0"),
        (lambda: pipeline("a", num_meshes=10**6), "num_meshes is 1,000,000, and one call makes up to 100,000"),
        (lambda: pipeline("a", scales=4), "scales is 4, and this model has 3 scales; leave it out, or ask for fewer"),
        (lambda: pipeline("a", scales=0), "scales must be at least 1, got 0"),
        (lambda: pipeline("a", seed=-1), "seed must be a whole number from 0"),
        (lambda: pipeline("a", colour=1), "unknown option 'colour'"),  # type: ignore[call-arg]
        (lambda: pipeline("x" * 400), "context"),
        (
            lambda: TextTo3DPipeline(model(Listed(), Raster()))("a", scales=1),
            "scales is 1, and this model makes shapes in one go",
        ),
        (lambda: TextTo3DPipeline(model(Reader(), Scales()))("a"), "this model reads 'solid' and can't make it"),
        (
            lambda: TextTo3DPipeline(tiny())("a"),
            "no modality of shapes; it has text, image; models of shapes are mm-tiny, which comes along, and those",
        ),
        (lambda: ShapeToTextPipeline(tiny())(ball()), "no modality of shapes; it has text, image"),
        (lambda: ImageTo3DPipeline(tiny())(Image.new("RGB", (4, 4))), "no modality of shapes"),
        (
            lambda: ImageTo3DPipeline(model(Octants(), Scales()))(Image.new("RGB", (4, 4))),
            "this model has no modality of pictures; it has text, solid",
        ),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            call()


# --- pictures to shapes ---------------------------------------------------------------------------------------------


def test_shapes_for_pictures(held: MultimodalModel, tmp_path: Path) -> None:
    pipeline = ImageTo3DPipeline(held)
    red, blue = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    red.save(tmp_path / "red.png")
    out = pipeline([tmp_path / "red.png", red, blue], num_meshes=2, seed=0)
    assert out.captions == [str(tmp_path / "red.png")] * 2 + [""] * 4
    first = [tokens.content for tokens in out.tokens]
    assert torch.equal(pipeline(red, num_meshes=2, seed=0).tokens[1].content, first[1])
    assert not torch.equal(first[0], first[4]), "another picture, another shape"
    with pytest.raises(ValueError, match="got a int for a picture"):
        pipeline(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="missing"):
        pipeline("missing.png")


def test_pictures_of_codes_are_conditions_too() -> None:
    made = ImageTo3DPipeline(model(Octants(), Scales(), Palette(4)))(Image.new("RGB", (4, 4), "red"), seed=0)
    assert made.grids[0].shape == (SIDE,) * 3


# --- shapes to text -------------------------------------------------------------------------------------------------


def test_texts_of_shapes(held: MultimodalModel, tmp_path: Path) -> None:
    pipeline = ShapeToTextPipeline(held)
    mesh, box = ball(), trimesh.creation.box((1, 2, 1))
    for name in ("one.obj", "one.glb", "one.stl", "one.ply", "one.off"):
        save_mesh(tmp_path / name, mesh)
    shape = as_shape(mesh, SIDE)
    (tmp_path / "grid.npz").write_bytes(to_npz(shape))
    same = [
        *(tmp_path / name for name in ("one.obj", "one.glb", "one.stl", "one.ply", "one.off", "grid.npz")),
        (tmp_path / "one.obj").read_bytes(),
        mesh,
        mesh.scene(),
        shape,
        shape.grid,
        shape.occupancy,
    ]
    one = pipeline(mesh, max_tokens=6)
    out = pipeline(same, max_tokens=6)
    assert len(out.texts) == len(same) and {text == one.texts[0] for text in out.texts} == {True}
    assert pipeline(str(tmp_path / "one.obj"), max_tokens=6).texts == one.texts
    with (tmp_path / "one.glb").open("rb") as file:
        assert pipeline(file, max_tokens=6).texts == one.texts
    asked = pipeline.encode([mesh, box], "how many legs?")
    assert [[segment.modality for segment in prompt] for prompt in asked] == [["solid", "text"]] * 2
    assert not torch.equal(asked[0][0].content.content, asked[1][0].content.content)
    assert TextBytes().decode(asked[0][1].content).value == "how many legs?"
    several = pipeline(mesh, num_texts=2, temperature=1.0, seed=0, max_tokens=6)
    assert several.texts[0] != several.texts[1]


def test_only_the_first_scales_are_shown(held: MultimodalModel) -> None:
    pipeline = ShapeToTextPipeline(held)
    mesh = ball()
    whole = pipeline.encode([mesh])[0][0].content
    for scales, count in ((1, 1), (2, 9), (3, 73)):
        item = pipeline.encode([mesh], scales=scales)[0][0].content
        assert len(item.scales) == scales and torch.equal(item.content, whole.content[:count])
        assert pipeline(mesh, scales=scales, max_tokens=4).texts
    for wrong, message in ((4, "scales is 4, and this model has 3 scales"), (0, "at least 1"), (1.5, "whole number")):
        with pytest.raises(ValueError, match=message):
            pipeline(mesh, scales=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scales is 1, and this model has shapes of one scale"):
        ShapeToTextPipeline(model(Listed(), Raster()))(mesh, scales=1)


def test_shapes_that_nothing_can_be_said_of(held: MultimodalModel, tmp_path: Path) -> None:
    pipeline = ShapeToTextPipeline(held)
    (tmp_path / "nan.obj").write_text("v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    (tmp_path / "empty.obj").write_text("v 0 0 0\n")
    (tmp_path / "many.obj").write_bytes(b"v 0 0 0\nv 1 0 0\nv 0 1 0\n" + b"f 1 2 3\n" * 1_000_001)
    (tmp_path / "bomb.glb").write_bytes(b"glTF" + (2).to_bytes(4, "little") + (2**31).to_bytes(4, "little"))
    (tmp_path / "text.obj").write_text("hello")
    for given, message in (
        (tmp_path / "nan.obj", "is empty: it has 1 faces, but none has an area"),
        (tmp_path / "empty.obj", "is empty: it has no faces"),
        (tmp_path / "many.obj", "1,000,00"),
        (tmp_path / "bomb.glb", "can't be used as a mesh"),
        (tmp_path / "text.obj", "can't be used as a mesh"),
        (tmp_path / "none.obj", "is missing"),
        (b"", "is an empty file"),
        (trimesh.Trimesh(), "is empty"),
        (np.zeros((4, 4, 4), bool), "a grid of 8³ cells is wanted, got 4³"),
        (np.zeros((8, 8), bool), "a shape is a grid"),
        (np.full((8, 8, 8), np.nan), "must be finite numbers"),
        (7, "got a int for a shape; give a path, bytes, a binary file, a grid, a mesh"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(given)
    triangle = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
    assert pipeline([triangle, np.zeros((8, 8, 8), bool)], max_tokens=2).tokens, "what is thin or empty is a shape"
    with pytest.raises(ValueError, match="text is generated without guidance"):
        pipeline(ball(), guidance=2.0)
    with pytest.raises(ValueError, match="num_texts=2 at temperature 0 gives equal texts"):
        pipeline(ball(), num_texts=2)


# --- a model learns both directions ---------------------------------------------------------------------------------


def test_one_model_learns_both_directions() -> None:
    """Two shapes and their names, by heart: from the name, from a picture, and back, also from two scales."""
    torch.manual_seed(0)
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="seen", tokenizer=Palette(2), head=LMHead(), order=Raster(prefix=True)),
        Modality(name="solid", tokenizer=Octants(), head=LMHead(), order=Scales()),
    ]
    module = ModelTraining(BackboneConfig(width=48, layers=2, heads=4), modalities, context=160)
    held, rng = module.model, torch.Generator().manual_seed(0)
    grids = np.zeros((2, SIDE, SIDE, SIDE), bool)
    grids[0, :, :4], grids[1, :4] = True, True
    names, pictures = ["a slab", "a wall"], [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    reads = ShapeToTextPipeline(held)
    documents: list[list[Segment]] = []
    for grid, name, picture in zip(grids, names, pictures, strict=True):
        solid, text = Segment("solid", Shape(grid)), Segment("text", name)
        documents += [[Segment("text", name, loss=False), solid], [Segment("seen", picture, loss=False), solid]]
        documents += [[*reads.encode([grid], scales=scales)[0], text] for scales in (2, 3)]
    batch = pack([held.build_document(document, rng) for document in documents])
    optimizer = torch.optim.AdamW(held.parameters(), lr=6e-3)
    for _ in range(90):
        loss = held.loss(batch, None).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held.eval()
    from_text = TextTo3DPipeline(held)(names, seed=0, temperature=0.0)
    assert [iou(made, true) for made, true in zip(from_text.grids, grids, strict=True)] == [1.0, 1.0]
    from_pictures = ImageTo3DPipeline(held)(pictures, seed=0, temperature=0.0)
    assert [iou(made, true) for made, true in zip(from_pictures.grids, grids, strict=True)] == [1.0, 1.0]
    for scales in (2, 3, None):
        assert reads(list(grids), scales=scales).texts == names


def test_samples_of_shapes_are_logged(tmp_path: Path, held: MultimodalModel) -> None:
    module = ModelTraining(
        BackboneConfig(width=32, layers=1, heads=4), model(Octants(), Scales()).modalities, context=160,
        sample_prompts=["a box", "a ball"],
    )  # fmt: skip
    module.log_samples(str(tmp_path))
    with Image.open(tmp_path / "samples" / "step-000000.png") as sheet:
        assert sheet.width > 200
