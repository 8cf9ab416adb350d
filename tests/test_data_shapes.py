"""Shapes made here: what captions say can be told from the grid; shards and folders give the field shape back."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from scipy.ndimage import binary_fill_holes, label

from mm.cli import main
from mm.data.convert import to_shards
from mm.data.part_meshes import part_meshes
from mm.data.shape_captions import FORMS, NUMBERS, captions
from mm.data.shape_documents import Coarse, ImageToShape, ShapeQuestion, ShapeToText, TextToShape
from mm.data.shape_plans import FLOOR, KINDS, draw_thing, turned
from mm.data.shapes import ShapesSource
from mm.data.solids import Part, distance
from mm.data.sources import FolderSource, ShardSource
from mm.data.streaming import StreamingShards
from mm.interfaces import Encoded
from mm.shape_files import save_mesh, to_bytes
from mm.shapes import Shape, to_npz
from mm.voxels import iou, occupancy

SIZE = 32


def drawn(kind: str, count: int = 40) -> list[tuple[dict, np.ndarray]]:
    source = ShapesSource(count=count, kinds=[kind], grid="occupancy")
    return [(source.plan(n).facts, source.draw(source.plan(n)).occupancy) for n in range(count)]


def pieces(cells: np.ndarray) -> int:
    return label(cells)[1]


def level(height: float) -> int:
    return int((FLOOR + height) * SIZE)


def legs(cells: np.ndarray) -> int:
    return pieces(cells[:, level(0.08)])


# --- what captions say can be seen ----------------------------------------------------------------------------------


def test_heights_are_far_apart() -> None:
    for kind in ("table", "stool", "shelf", "mug", "cone", "chair"):
        tops: dict[str, list[int]] = {"tall": [], "short": []}
        for facts, cells in drawn(kind):
            tops[facts["height"]].append(int(np.flatnonzero(cells.any((0, 2))).max()))
        assert len(tops["tall"]) > 5 < len(tops["short"])
        assert min(tops["tall"]) - max(tops["short"]) >= 6


@pytest.mark.parametrize("kind", ["table", "stool", "chair"])
def test_legs_can_be_counted_and_are_thick(kind: str) -> None:
    for facts, cells in drawn(kind):
        assert legs(cells) == facts["legs"]
        parts, count = label(cells[:, level(0.08)])
        for part in range(1, count + 1):
            rows, columns = np.nonzero(parts == part)
            assert np.ptp(rows) >= 1 and np.ptp(columns) >= 1


def test_tops_have_their_form() -> None:
    for facts, cells in drawn("table"):
        top = int(np.flatnonzero(cells.any((0, 2))).max())
        across = np.argwhere(cells[:, top])
        wide, deep = np.ptp(across, axis=0) + 1
        share = len(across) / (wide * deep)
        seen = "long" if wide > 1.5 * deep else "round" if share < 0.9 else "square"
        assert seen == facts["top"]


def test_boards_and_widths_of_shelves() -> None:
    for facts, cells in drawn("shelf"):
        assert pieces(cells[SIZE // 2, :, SIZE // 2]) == facts["boards"]
        assert (np.ptp(np.nonzero(cells)[0]) > 18) == (facts["width"] == "wide")


def test_handles_are_rings_and_mugs_are_hollow() -> None:
    for facts, cells in drawn("mug"):
        front = cells.any(2)  # seen from the front, a handle shows a hole
        holes = label(binary_fill_holes(front) & ~front)[1]
        assert holes == facts["handles"]
        assert pieces(cells) == 1 and not cells[SIZE // 2, level(0.2) :, SIZE // 2].any()


def test_armrests_stand_beside_the_seat() -> None:
    for facts, cells in drawn("chair"):
        # in front of the back and above the seat nothing stands but armrests
        seat = int(np.flatnonzero(cells[SIZE // 2, :, SIZE // 2]).max())
        assert cells[:, seat + 2 :, SIZE // 2].any() == (facts["arms"] == "yes")


@pytest.mark.parametrize(("kind", "euler"), [("sphere", 2), ("torus", 0), ("cone", 2), ("capsule", 2), ("drilled", 0)])
def test_solids_have_the_right_form(kind: str, euler: int) -> None:
    source = ShapesSource(count=6, kinds=[kind])
    for number in range(6):
        plan = source.plan(number)
        mesh = source.draw(plan).mesh
        assert mesh.is_watertight and mesh.euler_number == euler
        assert mesh.volume == pytest.approx(source.mesh(plan, 64).volume, rel=0.05)


def test_every_kind_is_one_piece_on_the_floor() -> None:
    for kind in KINDS:
        for _, cells in drawn(kind, 12):
            assert label(cells, np.ones((3, 3, 3)))[1] == 1
            assert np.flatnonzero(cells.any((0, 2))).min() in (2, 3)  # a ball's lowest cells may miss their centre
            assert not (
                cells[0].any() or cells[-1].any() or cells[:, -1].any() or cells[..., 0].any() or cells[..., -1].any()
            )


def test_formulas_agree_with_meshes() -> None:
    middle = (0.5, 0.5, 0.5)
    turn = trimesh.transformations.rotation_matrix(-np.pi / 2, (1, 0, 0))  # trimesh's stand along z, ours along y
    solids = {
        Part("box", middle, (0.2, 0.3, 0.1)): trimesh.creation.box((0.4, 0.6, 0.2)),
        Part("sphere", middle, (0.3,)): trimesh.creation.icosphere(4, 0.3),
        Part("cylinder", middle, (0.2, 0.3)): trimesh.creation.cylinder(0.2, 0.6, sections=64).apply_transform(turn),
        Part("capsule", middle, (0.15, 0.2)): trimesh.creation.capsule(0.4, 0.15).apply_transform(turn),
        Part("torus", middle, (0.25, 0.1)): trimesh.creation.torus(0.25, 0.1).apply_transform(turn),
        Part("cone", middle, (0.3, 0.3)): trimesh.creation.cone(0.3, 0.6, sections=64)
        .apply_translation((0, 0, -0.3))
        .apply_transform(turn),
    }
    for part, mesh in solids.items():
        values = distance([part], 24, 1.0)
        assert iou(values < 0, occupancy(mesh.apply_translation(middle), 24)) > 0.93, part.kind
        steps = [np.abs(np.diff(values, axis=axis)).max() for axis in range(3)]
        assert max(steps) <= 1 / 24 + 1e-5, part.kind  # a distance changes no faster than the place does
    cut = distance([Part("box", middle, (0.3,) * 3), Part("sphere", middle, (0.2,), cut=True)], 24, 1.0)
    assert cut[12, 12, 12] > 0 > cut[6, 6, 6]


def test_turns_by_quarters() -> None:
    rng = np.random.default_rng(3)
    for kind in KINDS:
        thing = draw_thing(kind, rng)
        before = distance(thing.parts, 24, 0.1)
        after = distance(turned(thing, 1).parts, 24, 0.1)
        assert np.allclose(np.rot90(before, -1, (0, 2)), after, atol=1e-5) or np.allclose(
            np.rot90(before, 1, (0, 2)), after, atol=1e-5
        )
        assert np.allclose(distance(turned(thing, 4).parts, 24, 0.1), before, atol=1e-5)


# --- the source -----------------------------------------------------------------------------------------------------


def test_examples_depend_on_seed_and_number_alone() -> None:
    few, many, other = ShapesSource(count=3), ShapesSource(count=50), ShapesSource(count=3, seed=1)
    assert [few[n]["caption"] for n in range(3)] == [many[n]["caption"] for n in range(3)]
    assert (few[2]["shape"].grid == many[2]["shape"].grid).all()
    assert any((few[n]["shape"].grid != other[n]["shape"].grid).any() for n in range(3))
    assert few.identity != many.identity != other.identity


def test_fields_say_the_same() -> None:
    source = ShapesSource(count=60)
    kinds: Counter[str] = Counter()
    for example in source:
        kinds[example["kind"]] += 1
        assert isinstance(example["shape"], Shape) and example["shape"].size == SIZE and example["shape"].valid
        assert [example["question"], example["answer"]] in example["questions"]
        answers = dict(example["questions"])
        if "legs" in example["attributes"]:
            assert answers["how many legs?"] == NUMBERS[example["attributes"]["legs"]]
        assert example["text"] == example["caption"]
    assert len(kinds) > 8
    plain = ShapesSource(count=60, varied=False)
    assert all(plain[n]["caption"] == plain[n]["plain"] == source[n]["plain"] for n in range(60))
    assert sum(source[n]["caption"] != source[n]["plain"] for n in range(60)) > 10


def test_captions_of_different_facts_differ() -> None:
    said: dict[str, tuple] = {}
    rng = np.random.default_rng(0)
    for kind in KINDS:
        assert len(set(FORMS[kind])) == len(FORMS[kind]) > 1
        for _ in range(60):
            thing = draw_thing(kind, rng)
            for words in captions(thing):
                # the legs of a chair are always four, and aren't told
                told = [item for item in sorted(thing.facts.items()) if (kind, item[0]) != ("chair", "legs")]
                facts = (kind, *told)
                assert said.setdefault(words, facts) == facts, words
                assert "{" not in words


def test_held_out_by_caption() -> None:
    rare = "a tall table with three legs and a round top"
    kept = ShapesSource(count=400, kinds=["table"], split="train", holdout_where={"plain": [rare]})
    held = ShapesSource(count=400, kinds=["table"], split="holdout", holdout_where={"plain": [rare]})
    assert len(kept) + len(held) == 400 and len(held) > 5
    assert {held[n]["plain"] for n in range(len(held))} == {rare}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["tabel"]}, "kinds holds 'tabel'"),
        ({"kinds": []}, "give a list"),
        ({"kinds": "table"}, "give a list"),
        ({"count": 0}, "count must be 1"),
        ({"size": 8}, "16 to 128 cells"),
        ({"grid": "mesh"}, "one of sdf, occupancy"),
    ],
)
def test_bad_settings(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesSource(**options)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["sdf", "occupancy"])
def test_shards_hold_what_was_made(grid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    assert (
        main(["data", "shapes", "--out", str(out), "--count", "6", "--seed", "2", "--size", "16", "--grid", grid]) == 0
    )
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "shapes-000000.tar", "shapes.png"]
    source, made = ShapesSource(count=6, seed=2, size=16, grid=grid), ShardSource(out / "shapes-000000.tar")
    stream = list(StreamingShards([str(out / "shapes-000000.tar")], shuffle=1))
    assert len(made) == len(stream) == 6
    for number in range(6):
        for again in (made[number], stream[number]):
            assert again["shape"].grid.dtype == source[number]["shape"].grid.dtype
            assert (again["shape"].grid == source[number]["shape"].grid).all()
            for name in ("text", "plain", "kind", "attributes", "question", "answer", "questions"):
                assert again[name] == source[number][name]


def test_meshes_in_folders_and_shards(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(2, 3.0)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_mesh(folder / "a.obj", ball)
    (folder / "a.txt").write_text("a ball")
    save_mesh(folder / "b.glb", ball)
    (folder / "b.json").write_text(json.dumps({"caption": "another"}))
    (folder / "c.shape.npz").write_bytes(to_npz(Shape(np.ones((16, 16, 16), bool))))
    (folder / "c.txt").write_text("a block")
    (folder / "d.ply").write_bytes(b"ply\nrubbish")
    source = FolderSource(folder, shape_size=16)
    assert [source[n]["key"] for n in range(4)] == ["a", "b", "c", "d"]
    with pytest.warns(UserWarning, match="d.ply"):
        examples = list(source)
    assert [example["text"] for example in examples] == ["a ball", "another", "a block"]
    assert all(example["shape"].size == 16 for example in examples)
    with pytest.warns(UserWarning, match="1 of 4 examples as broken.*: d: the mesh is damaged"):
        (shard,) = to_shards(source, tmp_path / "out")
    back = ShardSource(shard, shape_size=16)
    for before, after in zip(examples, back, strict=True):
        assert (before["shape"].grid == after["shape"].grid).all() and before["text"] == after["text"]
    with tarfile.open(shard) as tar:
        names = sorted(tar.getnames())
        assert {"a.obj", "b.glb", "c.shape.npz"} < set(names)


def test_members_of_a_hostile_shard_are_refused_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    members = {
        "a.glb": b"glTF" + bytes(40),
        "b.shape.npz": b"PK\x03\x04",
        "c.stl": to_bytes(trimesh.creation.box(), "stl"),
    }
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.warns(UserWarning, match="2 of 3"):
        assert [example["key"] for example in ShardSource(path, caption="{key}")] == ["c"]


def test_documents() -> None:
    example, rng = ShapesSource(count=1)[0], torch.Generator().manual_seed(0)
    made = TextToShape(drop=0)(example, rng)
    assert [(own.modality, own.loss) for own in made] == [("text", False), ("shape", True)]
    told = ShapeToText()(example, rng)
    assert [(own.modality, own.loss) for own in told] == [("shape", False), ("text", True)]
    asked = ShapeQuestion()(example, rng)
    assert [(own.modality, own.loss) for own in asked] == [("shape", False), ("text", False), ("text", True)]
    assert [asked[1].content, asked[2].content] in example["questions"]
    drawn = {ShapeQuestion()(example, rng)[1].content for _ in range(50)}
    assert drawn == {question for question, _ in example["questions"]}, "one of all is drawn each time"
    alone = {name: example[name] for name in ("shape", "question", "answer")}
    assert [part.content for part in ShapeQuestion()(alone, rng)[1:]] == [example["question"], example["answer"]]
    assert ShapeQuestion(drop=1)(example, rng)[0].modality != "shape"
    with pytest.raises(ValueError, match="probability"):
        ShapeQuestion(drop=2)


def test_pictures_of_shapes() -> None:
    source = ShapesSource(count=4, picture=32)
    plain = ShapesSource(count=4)
    assert source[1]["image"].size == (32, 32) and "image" not in plain[1]
    assert source[1]["image"].tobytes() == ShapesSource(count=9, picture=32)[1]["image"].tobytes()
    assert len({np.asarray(source.image(1, source[1]["shape"], 64)).tobytes(), source[1]["image"].tobytes()}) == 2
    assert (np.asarray(source[1]["image"]) < 255).any(), "something is seen"
    assert source.identity != plain.identity and np.array_equal(source[1]["shape"].grid, plain[1]["shape"].grid)
    made = ImageToShape(drop=0)(source[0], torch.Generator())
    assert [(own.modality, own.loss) for own in made] == [("image", False), ("shape", True)]
    with pytest.raises(ValueError, match="pictures have 8 to 2048 pixels a side"):
        ShapesSource(count=4, picture=3)


def test_what_is_given_is_shown_coarsely() -> None:
    scales = ((1, 1, 1), (2, 2, 2), (3, 3, 3))
    item = Encoded(grid=scales[-1], scales=scales, ids=torch.arange(36))
    example, rng = {"shape": item, "text": "a box"}, torch.Generator().manual_seed(0)
    shown = [Coarse(ShapeToText(), 0.5)(example, rng)[0].content for _ in range(60)]
    counts = [len(one.scales) for one in shown]
    assert set(counts) == {1, 2, 3} and 15 < counts.count(3) < 45
    assert all(torch.equal(one.content, item.content[: len(one)]) and one.grid == one.scales[-1] for one in shown)
    whole = Coarse(TextToShape(drop=0), 1)(example, rng)
    assert whole[1].content is item, "what is learned stays whole"
    assert Coarse(ShapeToText(drop=1), 1)(example, rng)[0].content is None
    list_ = Encoded(grid=(3,), ids=torch.arange(3))
    assert Coarse(ShapeToText(), 1)({**example, "shape": list_}, rng)[0].content is list_
    with pytest.raises(ValueError, match="shape is a Shape; name its field in the data module's cached"):
        Coarse(ShapeToText(), 1)(ShapesSource(count=1)[0], rng)


def test_meshes_put_together_of_parts() -> None:
    source = ShapesSource(count=40, sides=6, kinds=["table", "stack", "capsule", "cone", "torus", "sphere", "shelf"])
    for number in range(30):
        plan, shape = source.plan(number), source[number]["shape"]
        assert shape.given is not None and len(shape.given.faces) <= 128
        for part in plan.thing.parts:
            own = part_meshes([part], 24)
            assert own.is_watertight and own.volume > 0, "closed, and its outside is outside"
        fine = occupancy(part_meshes(plan.thing.parts, 24), SIZE)
        assert iou(fine, shape.occupancy) > 0.9, (plan.kind, plan.plain)
    plain = ShapesSource(count=40, kinds=source.kinds)
    assert np.array_equal(plain[3]["shape"].grid, source[3]["shape"].grid) and plain.identity != source.identity
    with pytest.raises(ValueError, match="something is cut out of a mug"):
        ShapesSource(sides=6)
    with pytest.raises(ValueError, match="what is round has 3 to 64 sides"):
        ShapesSource(sides=2, kinds=["cone"])
    with pytest.raises(ValueError, match="what is cut out of a shape has no mesh of its own"):
        part_meshes([Part("sphere", (0.5, 0.5, 0.5), (0.2,), cut=True)], 6)
