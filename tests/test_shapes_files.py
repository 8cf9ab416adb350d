"""Meshes from strangers: every format read and written, what is odd cleaned, what is hostile refused in one sentence."""

from __future__ import annotations

import io
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import trimesh

from mm import glb
from mm.shape_files import EXTENSIONS, MeshReport, file_kind, load_mesh, save_mesh, to_bytes
from mm.shapes import as_shape
from mm.voxels import occupancy


def ball() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(2, 0.4)


def scene() -> trimesh.Scene:
    out = trimesh.Scene()
    out.add_geometry(ball())
    out.add_geometry(ball(), transform=trimesh.transformations.translation_matrix((3, 0, 0)))
    return out


FILES: dict[str, Callable[[], bytes]] = {
    **{ending: (lambda ending=ending: to_bytes(ball(), ending)) for ending in sorted(EXTENSIONS)},
    "stl text": lambda: ball().export(file_type="stl_ascii").encode(),
    "ply text": lambda: ball().export(file_type="ply", encoding="ascii"),
    "glb of trimesh": lambda: ball().export(file_type="glb"),
    "obj with all": lambda: b"mtllib ../../etc/passwd\no a\n" + to_bytes(ball(), "obj") + b"usemtl x\nvt 0 0\nl 1 2\n",
}


# --- in and out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_format_comes_back(name: str, tmp_path: Path) -> None:
    data = FILES[name]()
    assert file_kind(data) == name.split()[0]
    path = tmp_path / "wrong-name.bin"
    path.write_bytes(data)
    for source in (data, path, str(path), io.BytesIO(data)):
        mesh = load_mesh(source)
        assert mesh.is_watertight and mesh.euler_number == 2 and mesh.volume == pytest.approx(ball().volume, rel=1e-4)
        assert mesh.metadata["report"] == MeshReport(
            faces=320, vertices=162, dropped=0, watertight=True, consistent=True
        )


@pytest.mark.parametrize("text", [False, True])
def test_faces_of_ply_may_have_places_in_a_texture(text: bool) -> None:
    """Which are lists like those of corners; one of 200 faces has 1,800 entries."""
    lines = "element vertex 3|property float x|property float y|property float z|element face 200"
    lines += "|property list uchar int vertex_indices"
    head = f"ply|format {'ascii' if text else 'binary_little_endian'} 1.0|{lines}|property list uchar float texcoord|end_header|"
    if text:
        body = b"0 0 0\n1 0 0\n0 1 0\n" + b"3 0 1 2 6 0 0 0 0 0 0\n" * 200
    else:
        body = struct.pack("<9f", 0, 0, 0, 1, 0, 0, 0, 1, 0) + struct.pack("<B3iB6f", 3, 0, 1, 2, 6, *[0.0] * 6) * 200
    assert len(load_mesh(head.replace("|", "\n").encode() + body, max_faces=1000).faces) >= 1


@pytest.mark.parametrize(
    "line", ["format ascii 1.0", "xproperty list int uchar vertex_indices", "property list int quad vertex_indices"]
)
def test_headers_of_ply_that_could_be_read_two_ways_are_refused(line: str) -> None:
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex 1\nproperty float x\nelement face 1\n{line}\nend_header\n"
    with pytest.raises(ValueError, match="its header has the line"):
        load_mesh(head.encode() + bytes(100))


@pytest.mark.parametrize("ending", sorted(EXTENSIONS))
def test_files_are_written_whole_or_not_at_all(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"mesh.{ending.upper()}"
    save_mesh(path, ball())
    assert load_mesh(path).is_watertight and [own.name for own in path.parent.iterdir()] == [path.name]
    save_mesh(path, trimesh.Trimesh())
    with pytest.raises(ValueError, match="empty|none of"):
        load_mesh(path)
    with pytest.raises(ValueError, match="written as .glb, .obj"):
        save_mesh(tmp_path / "mesh.fbx", ball())


def test_glb_is_what_viewers_show() -> None:
    document, binary = glb._chunks(to_bytes(ball(), "glb"))
    primitive = document["meshes"][0]["primitives"][0]
    assert primitive["attributes"].keys() == {"POSITION", "NORMAL"} and document["materials"][0]["doubleSided"]
    assert document["buffers"][0]["byteLength"] == len(binary)
    shown = trimesh.load(io.BytesIO(to_bytes(ball(), "glb")), file_type="glb").to_mesh()
    assert (shown.vertex_normals * shown.vertices).sum(1).min() > 0  # outward
    empty = trimesh.load(io.BytesIO(to_bytes(trimesh.Trimesh(), "glb")), file_type="glb")
    assert not empty.geometry


def test_scenes_are_merged_where_they_stand() -> None:
    for source in (scene(), scene().export(file_type="glb")):
        mesh = load_mesh(source)
        assert mesh.body_count == 2 and mesh.bounds[1, 0] == pytest.approx(3.4, abs=1e-3)
        assert mesh.metadata["report"].faces == 640
    assert load_mesh(ball()).metadata["report"].watertight


def test_polygons_and_counting_backwards() -> None:
    square = b"v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf -4/1/1 -3//2 \\\n-2 -1\n"
    mesh = load_mesh(square)
    assert len(mesh.faces) == 2 and mesh.area == pytest.approx(1)
    assert "not closed" in str(mesh.metadata["report"])


def test_broken_faces_are_dropped_and_counted() -> None:
    mesh = ball()
    vertices = np.vstack([mesh.vertices, [[np.nan, 0, 0], [np.inf, 0, 0], [1e300, 0, 0]]])
    count = len(mesh.vertices)
    faces = np.vstack([mesh.faces, [[0, 1, count], [0, 1, count + 1], [0, 1, count + 2], [3, 3, 4], [5, 6, 5]]])
    cleaned = load_mesh(trimesh.Trimesh(vertices, faces, process=False))
    report = cleaned.metadata["report"]
    assert (report.faces, report.dropped, report.watertight) == (320, 5, True)
    assert "5 broken faces dropped" in str(report)


def test_a_single_triangle_has_voxels() -> None:
    shape = as_shape(b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", 16)
    assert shape.valid and not shape.given.metadata["report"].watertight


@pytest.mark.slow
def test_a_million_faces() -> None:
    mesh = trimesh.creation.icosphere(8, 0.4).apply_translation((0.5,) * 3)
    with pytest.raises(ValueError, match="has 1,310,720 faces, but at most 1,000,000"):
        load_mesh(mesh)
    with bounded(3 << 30):
        assert occupancy(mesh, 32).mean() == pytest.approx(mesh.volume, rel=0.02)


# --- hostile --------------------------------------------------------------------------------------------------------


@contextmanager
def bounded(more: int = 1 << 30) -> Iterator[None]:
    """No more than so much memory beyond what is in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def changed(change: Callable[[dict], None]) -> bytes:
    document, binary = glb._chunks(to_bytes(ball(), "glb"))
    change(document)
    return glb.packed(document, binary)


def laughing(document: dict) -> None:
    """Each node names the next one twice."""
    document["nodes"] = [{"children": [n + 1, n + 1]} for n in range(40)] + [{"mesh": 0}]


def deep(document: dict) -> None:
    document["nodes"] = [{"children": [n + 1]} for n in range(5000)] + [{"mesh": 0}]


def crowded(document: dict) -> None:
    document["nodes"] = [{"mesh": 0} for _ in range(5000)]
    document["scenes"] = [{"nodes": list(range(5000))}]


def put(*path: str | int, value: object) -> Callable[[dict], None]:
    def change(document: dict) -> None:
        place = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


def with_corners(nodes: int, parts: int, corners: int = 1 << 21) -> bytes:
    """Two million corners, of which each of many parts or nodes shows three."""
    document, binary = glb._chunks(to_bytes(ball(), "glb"))
    document["bufferViews"].append({"buffer": 0, "byteOffset": len(binary), "byteLength": 12 * corners})
    document["accessors"].append({"bufferView": 3, "componentType": 5126, "count": corners, "type": "VEC3"})
    document["accessors"].append({"bufferView": 2, "componentType": 5125, "count": 3, "type": "SCALAR"})
    document["meshes"] = [{"primitives": [{"attributes": {"POSITION": 3}, "indices": 4}] * parts}]
    document["nodes"] = [{"mesh": 0}] * nodes
    document["scenes"] = [{"nodes": list(range(nodes))}]
    own = np.zeros((corners, 3), "<f4")
    own[: len(ball().vertices)] = ball().vertices
    return glb.packed(document, binary + own.tobytes())


def overlapping(document: dict) -> None:
    """Matrices that begin at each byte, which nothing uses."""
    document["bufferViews"].append({"buffer": 0, "byteOffset": 0, "byteLength": 4000, "byteStride": 1})
    unused = {"bufferView": 3, "componentType": 5126, "count": 3000, "type": "MAT4"}
    document["accessors"] += [unused] * 10000 + [{"componentType": 5126, "count": 1 << 38, "type": "MAT4"}]


def no_view(document: dict) -> None:
    document["accessors"][0] = {"componentType": 5126, "count": 1 << 38, "type": "VEC3"}


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "empty file"),
    "text": (lambda: b"hello", "none of GLB, OBJ"),
    "no faces": (lambda: b"v 0 0 0\n", "no faces"),
    "all NaN": (lambda: b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "empty: it has 1 faces, but none"),
    "vertex beyond": (lambda: b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 4\n", "names vertex 4, but there are 3"),
    "vertex before": (lambda: b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 -4\n", "before the first"),
    "face of words": (lambda: b"v 0 0 0\nf a b c\n", "damaged"),
    "too many faces": (lambda: b"v 0 0 0\n" + b"f 1 1 1\n" * 1_000_001, "at most 1,000,000"),
    "long number": (lambda: b"v " + b"1" * 1000 + b" 0 0\nf 1 1 1\n", "no three coordinates"),
    "ply of promises": (
        lambda: (
            b"ply\nformat binary_little_endian 1.0\nelement vertex 900000000000\nproperty float x\nelement face 1\n"
            b"property list uchar int vertex_indices\nend_header\n" + bytes(64)
        ),
        "promises at least",
    ),
    "ply of unknowns": (
        lambda: b"ply\nformat ascii 1.0\nelement vertex 1\nproperty quad x\nend_header\n0\n",
        "has the line",
    ),
    "ply of one polygon": (
        lambda: (
            b"ply\nformat binary_little_endian 1.0\nelement vertex 1\nproperty float x\nelement face 1\n"
            b"property list int int vertex_indices\nend_header\n" + struct.pack("<fi", 0, 2_000_000) + bytes(8_000_000)
        ),
        "has 1,999,998 faces",
    ),
    "ply of one text": (
        lambda: (
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nelement face 1\n"
            b"property list int int vertex_indices\nend_header\n0\n2000000 " + b"0 " * 2_000_000
        ),
        "has 1,999,998 faces",
    ),
    "off of one polygon": (lambda: b"OFF\n1 1 0\n0 0 0\n1000000 " + b"0 " * 1_000_000, "up to 1,000,000 numbers"),
    "ply without end": (lambda: b"ply\n" + b"comment\n" * 100, "header doesn't end"),
    "off of promises": (lambda: b"OFF\n900000000 900000000 0\n0 0 0\n", "promises 900,000,000"),
    "off without counts": (lambda: b"OFF\nx y z\n", "three counts"),
    "stl of promises": (lambda: bytes(80) + struct.pack("<I", 1 << 31) + bytes(100), "none of"),
    "glb cut": (lambda: to_bytes(ball(), "glb")[:700], "cut off|can't be used"),
    "glb of version 1": (lambda: b"glTF" + struct.pack("<II", 1, 20) + bytes(20), "version 1"),
    "glb that laughs": (lambda: changed(laughing), "in two places"),
    "glb in a circle": (lambda: changed(put("nodes", value=[{"children": [0], "mesh": 0}])), "in a circle"),
    "glb too deep": (lambda: changed(deep), "too deep"),
    "glb too crowded": (lambda: changed(crowded), "has 1,600,000 faces"),
    "glb of many parts": (lambda: with_corners(nodes=1, parts=100_000, corners=200), "have 100,000 parts"),
    "glb of zeros": (lambda: changed(no_view), "numbers without bytes"),
    "glb sparse": (lambda: changed(put("accessors", 0, "sparse", value={"count": 1 << 40})), "numbers without bytes"),
    "glb of promises": (lambda: changed(put("accessors", 0, "count", value=1 << 30)), "promises"),
    "glb of long views": (lambda: changed(put("bufferViews", 0, "byteLength", value=1 << 39)), "promises more"),
    "glb of strides": (lambda: changed(put("bufferViews", 0, "byteStride", value=1)), "promises"),
    "glb of files": (lambda: changed(put("buffers", 0, "uri", value="/etc/passwd")), "in another file"),
    "glb of draco": (
        lambda: changed(put("extensionsRequired", value=["KHR_draco_mesh_compression"])),
        "needs the extension 'KHR_draco",
    ),
    "glb of meshopt": (
        lambda: changed(put("bufferViews", 0, "extensions", value={"EXT_meshopt_compression": {}})),
        "compressed",
    ),
    "glb draco unasked": (
        lambda: changed(put("meshes", 0, "primitives", 0, "extensions", value={"KHR_draco_mesh_compression": {}})),
        "compressed",
    ),
    "glb of bytes": (lambda: changed(put("accessors", 0, "componentType", value=5121)), "as VEC3"),
    "glb negative": (lambda: changed(put("accessors", 0, "count", value=-1)), "where a count"),
    "glb of points": (lambda: changed(put("meshes", 0, "primitives", 0, "mode", value=0)), "no faces"),
    "glb beyond": (lambda: changed(put("nodes", 0, "mesh", value=7)), "no faces|damaged"),
    "glb of lists": (lambda: glb.packed([], b""), "isn't a JSON object"),  # type: ignore[arg-type]
}


def test_memory_is_for_what_is_shown() -> None:
    with bounded(1 << 29):
        assert len(load_mesh(with_corners(nodes=2000, parts=1)).faces) == 2000
        assert len(load_mesh(with_corners(nodes=1, parts=2000)).faces) == 2000
        assert load_mesh(changed(overlapping)).is_watertight


def test_one_face_of_millions_of_corners() -> None:
    corners = b"v 0 0 0\nv 1 0 0\nv 0 1 0\n"
    with bounded(1 << 28), pytest.raises(ValueError, match=r"faces, but at most 1,000,000"):
        load_mesh(corners + b"f" + b" 1" * (4 << 20))


def test_glb_is_read_as_others_read_it() -> None:
    """Nodes in nodes that turn, stretch and move, by their parts and as matrices; strips; numbers between other numbers."""
    turn = trimesh.transformations.quaternion_from_euler(0.4, -1.0, 2.2)[[1, 2, 3, 0]]
    lean = np.array([[1, 0.3, 0, 2], [0, 1, 0.1, 0], [0.2, 0, 1, -1], [0, 0, 0, 1]])
    document, binary = glb._chunks(to_bytes(ball(), "glb"))
    document["nodes"] = [
        {"children": [1, 2], "rotation": turn.tolist(), "translation": [1, -2, 3], "scale": [2, 0.5, 1]},
        {"mesh": 0, "rotation": (3 * turn).tolist()},
        {"matrix": lean.T.flatten().tolist(), "children": [3], "mesh": 1},
        {"mesh": 0, "scale": [1, 1, -1]},
        {"mesh": 0},  # not in the scene
    ]
    strip = np.array([0, 1, 2, 3, 4, 4, 5], "<u2").tobytes() + bytes(2)
    rows = np.zeros((6, 5), "<f4")
    rows[:, 1:4] = np.random.default_rng(0).random((6, 3))
    document["bufferViews"] += [
        {"buffer": 0, "byteOffset": len(binary), "byteLength": len(strip)},
        {"buffer": 0, "byteOffset": len(binary) + len(strip), "byteLength": rows.nbytes, "byteStride": 20},
    ]
    document["accessors"] += [
        {"bufferView": 3, "componentType": 5123, "count": 7, "type": "SCALAR"},
        {"bufferView": 4, "byteOffset": 4, "componentType": 5126, "count": 6, "type": "VEC3"},
    ]
    document["meshes"].append(
        {
            "primitives": [
                {"attributes": {"POSITION": 4}, "indices": 3, "mode": 5},
                {"attributes": {"POSITION": 4}},
                {"attributes": {"POSITION": 4}, "mode": 1},
            ]
        }
    )
    data = glb.packed(document, binary + strip + rows.tobytes())
    ours = load_mesh(data)
    document["nodes"][1]["rotation"] = turn.tolist()  # trimesh takes rotations for of length 1
    theirs = load_mesh(trimesh.load(io.BytesIO(glb.packed(document, binary + strip + rows.tobytes())), file_type="glb"))
    assert len(ours.faces) == len(theirs.faces) == 2 * 320 + 3 + 2
    assert ours.triangles_center[np.lexsort(ours.triangles_center.T)] == pytest.approx(
        theirs.triangles_center[np.lexsort(theirs.triangles_center.T)], abs=1e-5
    )
    assert ours.volume == pytest.approx(theirs.volume, rel=1e-4)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_a_sentence(name: str) -> None:
    make, message = HOSTILE[name]
    data = make()
    with bounded(), pytest.raises(ValueError, match=message) as caught:
        load_mesh(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_textures_are_never_looked_at() -> None:
    def textured(document: dict) -> None:
        document["images"] = [{"uri": "file:///etc/passwd"}, {"bufferView": 10**9, "mimeType": "image/png"}]
        document["textures"] = [{"source": 0}]
        document["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
        document["animations"] = document["skins"] = "rubbish"

    assert load_mesh(changed(textured)).is_watertight


def test_sizes_are_bounded(tmp_path: Path) -> None:
    data = to_bytes(ball(), "stl")
    with pytest.raises(ValueError, match="320 faces, but at most 100"):
        load_mesh(data, max_faces=100)
    with pytest.raises(ValueError, match="larger than 1,000 bytes"):
        load_mesh(data, max_bytes=1000)
    with pytest.raises(ValueError, match="is missing"):
        load_mesh(tmp_path / "none.obj")
    with pytest.raises(ValueError, match="not a file"):
        load_mesh(tmp_path)
    with pytest.raises(ValueError, match="opened as text"):
        load_mesh(io.StringIO("v 0 0 0"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got a int for a mesh"):
        load_mesh(3)  # type: ignore[arg-type]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, with bytes changed, doubled or taken out."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        # what is at the beginning matters most
        at = int(len(out) * rng.random() ** 3)
        way = int(rng.integers(4))
        if way == 0:
            out[at : at + 1] = bytes([int(rng.integers(256))])
        elif way == 1:
            del out[at : at + int(rng.integers(1, 30))]
        elif way == 2:
            out[at:at] = out[at : at + int(rng.integers(1, 30))]
        else:
            out[at : at + 4] = int(rng.choice([0, 1, 255, 1 << 16, (1 << 31) - 1, (1 << 32) - 1])).to_bytes(4, "little")
    return bytes(out[: int(rng.integers(1, len(out) + 1))] if rng.random() < 0.2 else out)


def fuzz(name: str, trials: int) -> None:
    data, rng = FILES[name](), np.random.default_rng(len(name))
    refused = 0
    with bounded():
        for _ in range(trials):
            try:
                mesh = load_mesh(mutated(data, rng))
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
            else:
                assert len(mesh.faces) and np.isfinite(mesh.vertices).all()
    assert 0 < refused


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused_or_read(name: str) -> None:
    fuzz(name, 25)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_damaged_files(name: str) -> None:
    fuzz(name, 1500)
