"""GLB, the binary form of glTF 2.0: what a stranger's file may hold before it is parsed, and files that viewers show.

A file of few bytes can ask for endless memory: numbers without bytes behind them, one mesh named by a tree of nodes that share
their children, textures, compressed meshes. `checked` leaves triangles and where they stand, and refuses the rest.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimesh import Trimesh

MAGIC = b"glTF"
MAX_JSON = 1 << 24
MAX_NODES = 1 << 16
MAX_DEPTH = 200
"""Nodes within nodes."""
JSON, BIN = 0x4E4F534A, 0x004E4942
SIZES = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
"""Bytes of a number, by its code."""
FLOAT = 5126
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
TRIANGLES, STRIP = 4, 5
HARMLESS = ("KHR_materials_", "KHR_texture_", "KHR_lights_", "EXT_texture_", "MSFT_")
"""Extensions that say nothing of where triangles are."""


def checked(data: bytes) -> tuple[bytes, int]:
    """The same scene with nothing but triangles and nodes, and how many triangles it shows. Raises `ValueError`, saying what is
    wrong; anything else that goes wrong is for the caller to refuse."""
    document, binary = _chunks(data)
    for name in document.get("extensionsRequired", ()):
        if not str(name).startswith(HARMLESS):
            raise ValueError(f"it needs the extension {name!r:.60}; save it without compression")
    if len(document.get("buffers", ())) > 1 or any("uri" in buffer for buffer in document.get("buffers", ())):
        raise ValueError("its numbers lie in another file; save it as one GLB")
    views = [_view(view, len(binary)) for view in document.get("bufferViews", ())]
    accessors = document.get("accessors", [])
    meshes, sizes = [], []
    for mesh in document.get("meshes", ()):
        kept = [_primitive(own, accessors, views) for own in mesh["primitives"]]
        some = [own for own in kept if own is not None]
        meshes.append({"primitives": [own for own, _ in some]} if some else None)
        sizes.append(sum(count for _, count in some))
    place = {old: new for new, old in enumerate(i for i, mesh in enumerate(meshes) if mesh is not None)}
    nodes, roots, faces = _nodes(document, sizes, place)
    used = {"accessors": accessors, "bufferViews": views, "meshes": [mesh for mesh in meshes if mesh is not None]}
    kept_document = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": roots}],
        "nodes": nodes,
        "buffers": [{"byteLength": len(binary)}],
        **used,
    }
    return packed(kept_document, binary), faces


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


def _primitive(
    own: dict[str, Any], accessors: list[Any], views: list[dict[str, Any]]
) -> tuple[dict[str, Any], int] | None:
    """Triangles with nothing but places, and how many; None for points and lines."""
    mode = own.get("mode", TRIANGLES)
    if own.get("extensions", {}).keys() - {"KHR_materials_variants"}:
        raise ValueError("its triangles are compressed; save it without compression")
    if mode not in (TRIANGLES, STRIP):
        if mode in (0, 1, 2, 3):
            return None
        raise ValueError("its triangles stand in a fan or of an unknown kind; save it with separate triangles")
    places = _whole(own["attributes"]["POSITION"])
    count = _numbers(accessors, places, views, "VEC3", (FLOAT,))
    out = {"attributes": {"POSITION": places}, "mode": mode}
    if "indices" in own:
        out["indices"] = _whole(own["indices"])
        count = _numbers(accessors, out["indices"], views, "SCALAR", (5121, 5123, 5125))
    return out, count // 3 if mode == TRIANGLES else max(count - 2, 0)


def _numbers(accessors: list[Any], which: int, views: list[dict[str, Any]], kind: str, codes: tuple[int, ...]) -> int:
    """How many elements there are, all within the file."""
    accessor = accessors[which]
    if "sparse" in accessor or "bufferView" not in accessor:
        raise ValueError("it has numbers without bytes behind them; save it with all numbers written out")
    if accessor.get("type") != kind or accessor.get("componentType") not in codes:
        raise ValueError(
            f"it has {accessor.get('type')!r:.20} of the code {accessor.get('componentType')!r:.20} as {kind}"
        )
    view = views[_whole(accessor["bufferView"])]
    count, offset = _whole(accessor["count"]), _whole(accessor.get("byteOffset", 0))
    element = SIZES[accessor["componentType"]] * WIDTHS[kind]
    stride = view.get("byteStride") or element
    if stride < element or (count and offset + stride * (count - 1) + element > view["byteLength"]):
        raise ValueError(f"it promises {count:,} numbers, more than its bytes hold")
    return count


def _nodes(
    document: dict[str, Any], sizes: list[int], place: dict[int, int]
) -> tuple[list[dict[str, Any]], list[int], int]:
    """Nodes as they stand, those that the scene shows, and how many triangles it shows: each node hangs in one place."""
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
    out: list[dict[str, Any]] = [{} for _ in given]
    seen: set[int] = set()
    faces = 0
    waiting = [(root, 0) for root in roots]
    while waiting:
        index, depth = waiting.pop()
        if index in seen or depth > MAX_DEPTH:
            raise ValueError("its nodes hang in a circle, in two places, or too deep")
        seen.add(index)
        node = given[index]
        out[index] = {key: node[key] for key in ("matrix", "translation", "rotation", "scale") if key in node}
        if "mesh" in node and _whole(node["mesh"]) in place:
            out[index]["mesh"] = place[node["mesh"]]
            faces += sizes[node["mesh"]]
        if children[index]:
            out[index]["children"] = children[index]
        waiting.extend((child, depth + 1) for child in children[index])
    return out, roots, faces


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
    import numpy as np

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
