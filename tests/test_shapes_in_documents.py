"""Shapes in conversations and over HTTP: meshes go in and come out. Tiny random models."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from starlette.testclient import TestClient

from mm.backbone import BackboneConfig
from mm.heads.lm import LMHead
from mm.interfaces import Encoded, Modality
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.raster import Raster
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.pipelines.base import Pipeline
from mm.pipelines.outputs import AnyOutput
from mm.pipelines.text_to_3d import TextTo3DPipeline
from mm.serve.app import create
from mm.serve.gate import Settings
from mm.serve.shelf import Shelf
from mm.shape_files import load_mesh, save_mesh
from mm.shapes import Shape
from mm.testing import Palette, tiny
from mm.tokenizers.text_bytes import TextBytes
from mm.tokenizers.voxel_vq import VoxelVQ
from mm.voxels import iou


def model(pictures: bool = True) -> MultimodalModel:
    """Of text, pictures and shapes."""
    torch.manual_seed(0)
    solids = VoxelVQ.tiny()
    modalities = [Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster())]
    if pictures:
        modalities.append(Modality(name="image", tokenizer=Palette(), head=LMHead(), order=Raster()))
    modalities.append(Modality(name="solid", tokenizer=solids, head=LMHead(), order=Raster()))
    return MultimodalModel(BackboneConfig(width=32, layers=2, heads=4, kv_heads=2), modalities, context=512).eval()


@pytest.fixture(scope="module")
def pipeline() -> AnyToAnyPipeline:
    return AnyToAnyPipeline(model())


def ball() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=2)


# --- in conversations -------------------------------------------------------------------------------------------------


def test_meshes_go_in(pipeline: AnyToAnyPipeline, tmp_path: Path) -> None:
    """From a file, a mesh, a scene or a shape, between texts and pictures: the same tokens."""
    tokenizer = pipeline.tokenizer("solid")
    for name in ("ball.glb", "ball.obj", "ball.STL"):
        save_mesh(tmp_path / name, ball())
    wanted = tokenizer.encode(ball()).content
    picture = Image.new("RGB", (4, 4), "red")
    scene, decoded = trimesh.Scene([ball()]), tokenizer.decode(tokenizer.encode(ball())).value
    for part in (tmp_path / "ball.glb", tmp_path / "ball.obj", tmp_path / "ball.STL", ball(), scene):
        segments = pipeline.encode([["what is this?", part, picture, part]])[0]
        assert [segment.modality for segment in segments] == ["text", "solid", "image", "solid"]
        for place in (1, 3):
            content = segments[place].content
            assert isinstance(content, Encoded) and not segments[place].loss and torch.equal(content.content, wanted)
    again = pipeline.encode([[decoded, Segment("solid", decoded)]])[0]  # what came out
    assert [segment.content for segment in again] and all(isinstance(segment.content, Encoded) for segment in again)
    with (tmp_path / "ball.glb").open("rb") as file:  # of a model without pictures a file is what it has
        made = AnyToAnyPipeline(model(pictures=False)).encode([[file, (tmp_path / "ball.glb").read_bytes()]])[0]
    assert [segment.modality for segment in made] == ["solid", "solid"]
    several: list[Any] = [[ball(), "it is "], [picture, "it is "]]
    out = pipeline(several, free=False, max_tokens=6, seed=0)
    assert len(out.texts) == 2


def test_meshes_come_out(pipeline: AnyToAnyPipeline, tmp_path: Path) -> None:
    document: list[Any] = ["a ball ", ball(), "and a box "]
    out = pipeline(document, to=["solid", "image"], free=False, max_tokens=4, seed=3)
    assert isinstance(out.documents[0][0], Shape) and isinstance(out.documents[0][1], Image.Image)
    assert len(out.meshes) == 1 and out.meshes[0].is_watertight == bool(len(out.meshes[0].faces))
    once = pipeline(["a ball"], to="solid", free=False, max_tokens=1, seed=3)
    alone = TextTo3DPipeline(pipeline.model)("a ball", seed=3)
    assert np.array_equal(once.documents[0][0].occupancy, alone.grids[0])
    shape = pipeline.tokenizer("solid").decode(pipeline.tokenizer("solid").encode(ball())).value
    places = AnyOutput([["a", shape]], 0).save(tmp_path / "out")
    assert [place.name for place in places] == ["01-01.txt", "01-02.glb"]
    assert len(load_mesh(places[1]).faces) == len(shape.mesh.faces)
    goes_on = pipeline([once.documents[0][0], "and "], free=False, max_tokens=2, seed=0)  # an answer is a part again
    assert len(goes_on.documents) == 1


def test_shapes_that_cannot_go_in(pipeline: AnyToAnyPipeline, tmp_path: Path) -> None:
    (tmp_path / "broken.glb").write_bytes(b"glTF broken")
    empty = trimesh.Trimesh()
    for part, message in (
        (tmp_path / "none.obj", "none.obj' is missing"),
        (tmp_path / "broken.glb", "is damaged or can't be used as a mesh"),
        (empty, "the mesh is empty: it has no faces"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline([part])
    with pytest.raises(ValueError, match="no modality of shapes; it has text, image"):
        AnyToAnyPipeline(tiny())([ball()])
    assert len(AnyToAnyPipeline(tiny())(["a"], max_tokens=1).documents) == 1, "without shapes none are asked for"


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app, place = create(Shelf({"painter": Pipeline(tiny(context=96)), "modeller": Pipeline(model())}), Settings())
    with TestClient(app) as made:
        yield made
    place.close()


def opened(item: dict[str, Any], form: str) -> trimesh.Trimesh:
    found: Any = trimesh.load(io.BytesIO(base64.b64decode(item["b64_json"])), file_type=form, force="mesh")
    return found


@pytest.mark.parametrize("form", ["glb", "obj", "stl"])
def test_shapes_of_a_prompt(client: TestClient, form: str) -> None:
    asked = {"prompt": "a tall table", "n": 2, "seed": 3, "format": form}
    answer = client.post("/v1/shapes", json=asked)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["format"] == form and body["seed"] == 3 and len(body["data"]) == 2
    wanted = TextTo3DPipeline(model())("a tall table", num_meshes=2, seed=3)
    for item, mesh, valid in zip(body["data"], wanted.meshes, wanted.valid, strict=True):
        assert item["valid"] == valid and valid and not item["reason"]
        found = opened(item, form)
        assert len(found.faces) == len(mesh.faces) > 0
        assert np.allclose(found.bounds, mesh.bounds, atol=1e-4)
        if form != "stl":  # which has corners of its own for each triangle, rounded
            assert found.is_watertight
    assert client.post("/v1/shapes", json=asked).json()["data"] == body["data"]


def test_a_shape_of_a_picture(client: TestClient) -> None:
    def made(colour: str) -> dict[str, Any]:
        file = io.BytesIO()
        Image.new("RGB", (4, 4), colour).save(file, "PNG")
        image = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        answer = client.post("/v1/shapes", json={"model": "modeller", "image": image, "seed": 0})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["data"][0]
        return found

    red, blue = made("red"), made("blue")
    assert len(opened(red, "glb").faces) > 0 and red == made("red") and red != blue
    both = client.post("/v1/shapes", json={"prompt": "a", "image": "data:image/png;base64,AAAA"})
    assert both.status_code == 400 and "give either prompt or image" in both.json()["error"]["message"]


def test_meshes_there_and_back_keep_their_form(pipeline: AnyToAnyPipeline, tmp_path: Path) -> None:
    """A file that was made is a file that is read: what is inside stays."""
    shape = Shape(VoxelVQ.examples()[2].occupancy)
    save_mesh(tmp_path / "a.glb", shape.mesh)
    tokenizer: Any = pipeline.tokenizer("solid")
    segment = pipeline.encode([[tmp_path / "a.glb"]])[0][0]
    assert iou(tokenizer.decode(segment.content).value.occupancy, shape.occupancy) > 0.5
