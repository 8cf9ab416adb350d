"""GLB, the binary form of glTF 2.0: the triangles of a stranger's file, and files that viewers show.

A file of few bytes can ask for endless memory: numbers without bytes behind them, numbers that overlap, one mesh named by a tree
of nodes that share their children, a million corners named again for each triangle, textures, compressed meshes. `triangles`
looks at nothing but triangles and where they stand, takes memory for corners that these use, and refuses the rest.

Letters in shapes: V corners, F triangles.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    from trimesh import Trimesh

MAGIC = b"glTF"
MAX_JSON = 1 << 24
MAX_NODES = 1 << 16
"""Nodes, and parts of all meshes."""
MAX_DEPTH = 200
"""Nodes within nodes."""
JSON, BIN = 0x4E4F534A, 0x004E4942
NUMBERS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
"""Types of numbers, by their code."""
FLOAT = 5126
WIDTHS = {"SCALAR": 1, "VEC3": 3}
TRIANGLES, STRIP = 4, 5
HARMLESS = ("KHR_materials_", "KHR_texture_", "KHR_lights_", "EXT_texture_", "MSFT_")
"""Extensions that say nothing of where triangles are."""
Soup = tuple[Float[np.ndarray, "V 3"], Int[np.ndarray, "F 3"]]
"""Corners, and triangles of them."""


class Part(NamedTuple):
    """Triangles of a mesh, as they lie in the file."""

    places: Float[np.ndarray, "V 3"]
    indices: Int[np.ndarray, " N"] | None
    """None: the places as they come."""
    mode: int
    faces: int
    """Triangles."""


def triangles(data: bytes, max_faces: int) -> tuple[Soup | None, int]:
    """All triangles that the scene shows, where it puts them, and how many: None if these are too many. Raises `ValueError`,
    saying what is wrong; anything else that goes wrong is for the caller to refuse."""
    document, binary = _chunks(data)
    for name in document.get("extensionsRequired", ()):
        if not str(name).startswith(HARMLESS):
            raise ValueError(f"it needs the extension {name!r:.60}; save it without compression")
    if len(document.get("buffers", ())) > 1 or any("uri" in buffer for buffer in document.get("buffers", ())):
        raise ValueError("its numbers lie in another file; save it as one GLB")
    views = [_view(view, len(binary)) for view in document.get("bufferViews", ())]
    accessors = document.get("accessors", [])
    given = document.get("meshes", [])
    if (parts := sum(len(mesh["primitives"]) for mesh in given)) > MAX_NODES:
        raise ValueError(f"its meshes have {parts:,} parts, at most {MAX_NODES:,} are read")
    meshes = [[_primitive(own, accessors, views, binary) for own in mesh["primitives"]] for mesh in given]
    sizes = [sum(part.faces for part in mesh) for mesh in meshes]
    shown = [(which, matrix) for which, matrix in _nodes(document) if which < len(sizes) and sizes[which]]
    faces = sum(sizes[which] for which, _ in shown)
    if faces > max_faces:
        return None, faces
    soups = {
        which: _joined([_soup(part) for part in meshes[which] if part.faces]) for which in {which for which, _ in shown}
    }
    return _joined([_moved(soups[which], matrix) for which, matrix in shown]), faces


def _moved(soup: Soup, matrix: Float[np.ndarray, "4 4"]) -> Soup:
    places, faces = soup
    with np.errstate(all="ignore"):  # what isn't finite then is dropped like all that isn't
        places = places @ matrix[:3, :3].T + matrix[:3, 3]
        mirrored = np.linalg.det(matrix[:3, :3]) < 0
    return places, faces[:, ::-1] if mirrored else faces


def _joined(soups: list[Soup]) -> Soup:
    if not soups:
        return np.zeros((0, 3)), np.zeros((0, 3), np.int64)
    starts = np.cumsum([0] + [len(places) for places, _ in soups])
    faces = [own + start for (_, own), start in zip(soups, starts[:-1], strict=True)]
    return np.concatenate([places for places, _ in soups]), np.concatenate(faces)


def _soup(part: Part) -> Soup:
    indices = np.arange(len(part.places)) if part.indices is None else part.indices.astype(np.int64)
    if indices.max() >= len(part.places):
        raise ValueError(f"a triangle names corner {indices.max()}, but there are {len(part.places)}")
    if part.mode == STRIP:
        faces = np.stack((indices[:-2], indices[1:-1], indices[2:]), 1)
        faces[1::2, :2] = faces[1::2, 1::-1]  # every other one turns the other way
    else:
        faces = indices[: 3 * part.faces].reshape(-1, 3)
    used, faces = np.unique(faces, return_inverse=True)
    return part.places[used].astype(np.float64), faces.reshape(-1, 3)


def _chunks(data: bytes) -> tuple[dict[str, Any], bytes]:
    _, version, _ = struct.unpack_from("<4sII", data)
    if version != 2:
        raise ValueError(f"it is glTF of version {version}, only 2 is read")
    length, kind = struct.unpack_from("<II", data, 12)
    if kind != JSON or length > min(MAX_JSON, len(data) - 20):
        raise ValueError("its description is cut off or too long")
    document = json.loads(data[20 : 20 + length])
    if not isinstance(document, dict):
        raise ValueError("its description isn't a JSON object")
    rest = data[20 + length :]
    binary = b""
    if len(rest) >= 8:
        length, kind = struct.unpack_from("<II", rest)
        if kind != BIN or length > len(rest) - 8:
            raise ValueError("its numbers are cut off")
        binary = rest[8 : 8 + length]
    return document, binary


def _view(view: dict[str, Any], available: int) -> dict[str, Any]:
    out = {
        "buffer": 0,
        "byteOffset": _whole(view.get("byteOffset", 0)),
        "byteLength": _whole(view["byteLength"]),
    }
    if "byteStride" in view:
        out["byteStride"] = _whole(view["byteStride"])
    if view.get("extensions"):
        raise ValueError("its numbers are compressed; save it without compression")
    if out["byteOffset"] + out["byteLength"] > available:
        raise ValueError(f"it promises more numbers than its {available:,} bytes hold")
    return out


def _primitive(own: dict[str, Any], accessors: list[Any], views: list[dict[str, Any]], binary: bytes) -> Part:
    """Its triangles; of points and lines, none."""
    mode = own.get("mode", TRIANGLES)
    if own.get("extensions", {}).keys() - {"KHR_materials_variants"}:
        raise ValueError("its triangles are compressed; save it without compression")
    if mode not in (TRIANGLES, STRIP):
        if mode in (0, 1, 2, 3):
            return Part(np.zeros((0, 3), np.float32), None, mode, 0)
        raise ValueError("its triangles stand in a fan or of an unknown kind; save it with separate triangles")
    places = _numbers(accessors, _whole(own["attributes"]["POSITION"]), views, binary, "VEC3", (FLOAT,))
    indices = None
    if "indices" in own:
        indices = _numbers(accessors, _whole(own["indices"]), views, binary, "SCALAR", (5121, 5123, 5125))[:, 0]
    corners = len(places if indices is None else indices)
    return Part(places, indices, mode, corners // 3 if mode == TRIANGLES else max(corners - 2, 0))


def _numbers(
    accessors: list[Any], which: int, views: list[dict[str, Any]], binary: bytes, kind: str, codes: tuple[int, ...]
) -> Any:
    """The numbers [count, width], as they lie in the file: nothing is copied."""
    accessor = accessors[which]
    if "sparse" in accessor or "bufferView" not in accessor:
        raise ValueError("it has numbers without bytes behind them; save it with all numbers written out")
    if accessor.get("type") != kind or accessor.get("componentType") not in codes:
        raise ValueError(
            f"it has {accessor.get('type')!r:.20} of the code {accessor.get('componentType')!r:.20} as {kind}"
        )
    view = views[_whole(accessor["bufferView"])]
    count, offset = _whole(accessor["count"]), _whole(accessor.get("byteOffset", 0))
    number = np.dtype(NUMBERS[accessor["componentType"]])
    element = number.itemsize * WIDTHS[kind]
    stride = view.get("byteStride") or element
    if stride < element or (count and offset + stride * (count - 1) + element > view["byteLength"]):
        raise ValueError(f"it promises {count:,} numbers, more than its bytes hold")
    if not count:
        return np.zeros((0, WIDTHS[kind]), number)
    begin = view["byteOffset"] + offset
    return np.ndarray((count, WIDTHS[kind]), number, binary, begin, (stride, number.itemsize))


def _nodes(document: dict[str, Any]) -> list[tuple[int, Float[np.ndarray, "4 4"]]]:
    """The meshes that the scene shows, and where each stands: each node hangs in one place."""
    given = document.get("nodes", [])
    scenes = document.get("scenes", [])
    if len(given) > MAX_NODES:
        raise ValueError(f"it has {len(given):,} nodes, at most {MAX_NODES:,} are read")
    children = [[_whole(child) for child in node.get("children", ())] for node in given]
    if scenes:
        roots = [_whole(root) for root in scenes[_whole(document.get("scene", 0))].get("nodes", ())]
    else:
        hanging = {child for own in children for child in own}
        roots = [index for index in range(len(given)) if index not in hanging]
    out = []
    seen: set[int] = set()
    waiting = [(root, 0, np.eye(4)) for root in roots]
    while waiting:
        index, depth, above = waiting.pop()
        if index in seen or depth > MAX_DEPTH:
            raise ValueError("its nodes hang in a circle, in two places, or too deep")
        seen.add(index)
        with np.errstate(all="ignore"):
            matrix = above @ _placed(given[index])
        if "mesh" in given[index]:
            out.append((_whole(given[index]["mesh"]), matrix))
        waiting.extend((child, depth + 1, matrix) for child in children[index])
    return out


def _placed(node: dict[str, Any]) -> Float[np.ndarray, "4 4"]:
    """Where a node stands in the one that holds it."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T  # written column by column
    out = np.eye(4)
    if "rotation" in node:
        turn = np.array(node["rotation"], np.float64).reshape(4)
        x, y, z, w = turn / np.linalg.norm(turn)
        across = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        out[:3, :3] += 2 * (w * across + across @ across)  # Rodrigues' formula, in half angles
    if "scale" in node:
        out[:3, :3] *= np.array(node["scale"], np.float64).reshape(3)
    if "translation" in node:
        out[:3, 3] = np.array(node["translation"], np.float64).reshape(3)
    return out


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise ValueError(f"it has {value!r:.40} where a count or a place is expected")
    return value


def packed(document: dict[str, Any], binary: bytes) -> bytes:
    """A GLB file of both chunks."""
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    out = struct.pack("<II", len(text), JSON) + text
    if binary:
        binary += bytes(-len(binary) % 4)
        out += struct.pack("<II", len(binary), BIN) + binary
    return struct.pack("<4sII", MAGIC, 2, 12 + len(out)) + out


def written(mesh: Trimesh) -> bytes:
    """A GLB with normals and a plain material that shows both sides, which viewers such as Gradio's `Model3D` light."""
    document: dict[str, Any] = {"asset": {"version": "2.0", "generator": "mm"}, "scene": 0}
    if not len(mesh.faces):
        return packed({**document, "scenes": [{"nodes": []}]}, b"")
    places = np.ascontiguousarray(mesh.vertices, "<f4")
    normals = np.ascontiguousarray(mesh.vertex_normals, "<f4")
    faces = np.ascontiguousarray(mesh.faces, "<u4")
    parts = [places.tobytes(), normals.tobytes(), faces.tobytes()]
    starts = [0, len(parts[0]), len(parts[0]) + len(parts[1])]
    material = {"baseColorFactor": [0.65, 0.7, 0.8, 1.0], "metallicFactor": 0.0, "roughnessFactor": 0.8}
    low, high = places.min(0).tolist(), places.max(0).tolist()
    document |= {
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [
            {"primitives": [{"attributes": {"POSITION": 0, "NORMAL": 1}, "indices": 2, "material": 0, "mode": 4}]}
        ],
        "materials": [{"doubleSided": True, "pbrMetallicRoughness": material}],
        "accessors": [
            {"bufferView": 0, "componentType": FLOAT, "count": len(places), "type": "VEC3", "min": low, "max": high},
            {"bufferView": 1, "componentType": FLOAT, "count": len(places), "type": "VEC3"},
            {"bufferView": 2, "componentType": 5125, "count": faces.size, "type": "SCALAR"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteOffset": start, "byteLength": len(part), "target": 34963 if place == 2 else 34962}
            for place, (start, part) in enumerate(zip(starts, parts, strict=True))
        ],
        "buffers": [{"byteLength": sum(map(len, parts))}],
    }
    return packed(document, b"".join(parts))
