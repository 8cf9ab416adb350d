"""Meshes from strangers, and meshes written: OBJ, STL, PLY, GLB and OFF.

Only geometry is read. What a file claims is held against its length before memory is taken for it, and nothing that it names is
followed: no material, no texture, no other file. What can't be used is dropped and counted, or refused in one sentence.
"""

from __future__ import annotations

import io
import os
import re
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from mm import file_sources, glb, safe_io

if TYPE_CHECKING:  # imported where it is used, so that `import mm` stays fast
    from trimesh import Scene, Trimesh

SAID = file_sources.Said("mesh", "a mesh", "a path, bytes, a binary file, a trimesh.Trimesh or a Scene")

MAX_FACES = 1_000_000
"""Most triangles of a mesh, by default."""
MAX_BYTES = 1 << 26
"""Largest file that is read, by default (64 MiB)."""
MAX_COORDINATE = 1e12
"""Vertices farther out are taken for damage, as NaN is."""
MAX_TOKEN = 64
"""Longest number in a text."""
MOST_ENTRIES = 32
"""Numbers of a face in PLY and OFF files on average: corners, their places in a texture, colours."""
EXTENSIONS = frozenset(("obj", "stl", "ply", "glb", "off"))
"""File name endings (lower case, no dot) that are read and written."""
PLY_SIZES = {
    **dict.fromkeys(("char", "uchar", "int8", "uint8"), 1),
    **dict.fromkeys(("short", "ushort", "int16", "uint16"), 2),
    **dict.fromkeys(("int", "uint", "float", "int32", "uint32", "float32"), 4),
    **dict.fromkeys(("double", "float64"), 8),
}
"""Bytes of a number."""


@dataclass(frozen=True)
class MeshReport:
    """What a mesh is like; `mesh.metadata["report"]` of one that was loaded."""

    faces: int
    vertices: int
    dropped: int
    """Faces that had no area, or a vertex that is no number or far out."""
    watertight: bool
    """Each edge has two faces."""
    consistent: bool
    """Neighbouring faces agree on which side is outside."""

    def __str__(self) -> str:
        parts = [f"{self.faces:,} faces"]
        if not self.watertight:
            parts.append("not closed: its inside is what most directions agree on")
        elif not self.consistent:
            parts.append("its faces don't agree on which side is outside")
        if self.dropped:
            parts.append(f"{self.dropped:,} broken faces dropped")
        return ", ".join(parts)


MeshSource = file_sources.FileSource
"""A path, the bytes of a file, or an open binary file; also a `trimesh.Trimesh` or a `trimesh.Scene`."""


def load_mesh(
    source: MeshSource | Trimesh | Scene, *, max_faces: int = MAX_FACES, max_bytes: int = MAX_BYTES
) -> Trimesh:
    """One mesh of all that a file shows, where its scene puts it, in the file's own coordinates; a report is in its metadata.

    What the file is, its beginning says, not its name. Polygons become triangles, vertices at the very same place become one,
    and faces without area or with a vertex that is NaN, infinite or beyond `MAX_COORDINATE` are dropped. An open mesh is taken
    as it is (`MeshReport.watertight`).

    Raises:
        ValueError: one sentence, for a file that is missing, damaged, empty, too large, of another kind, or compressed.
    """
    from trimesh import Scene, Trimesh

    if isinstance(source, Trimesh | Scene):
        name, found = "the mesh", source
        faces = len(found.faces) if isinstance(found, Trimesh) else _scene_faces(found)
    else:
        name = f"the mesh {os.fspath(source)!r:.400}" if isinstance(source, str | os.PathLike) else "the mesh"
        data = file_sources.content(source, name, SAID, max_bytes)
        try:
            found, faces = _parsed(data, max_faces)
        except Exception as error:  # a parser fed with a stranger's bytes may raise anything
            raise ValueError(f"{name} is damaged or can't be used as a mesh: {_short(error)}") from error
    if faces > max_faces:
        raise ValueError(
            f"{name} has {faces:,} faces, but at most {max_faces:,} are read; simplify it or raise max_faces"
        )
    try:
        mesh = found if isinstance(found, Trimesh) else found.to_mesh()
        vertices, triangles = np.array(mesh.vertices, np.float64), np.array(mesh.faces, np.int64)
    except Exception as error:
        raise ValueError(f"{name} is damaged or can't be used as a mesh: {_short(error)}") from error
    return _cleaned(vertices.reshape(-1, 3), triangles.reshape(-1, 3), name)


def save_mesh(path: str | os.PathLike[str], mesh: Trimesh) -> None:
    """Write a mesh, whole or not at all; the ending says as what (`EXTENSIONS`). A GLB has normals, and shows both sides of
    faces. A mesh without faces is written as a file without faces.

    Raises `ValueError` for another ending.
    """
    ending = Path(path).suffix.lower().lstrip(".")
    if ending not in EXTENSIONS:
        raise ValueError(f"meshes are written as .{', .'.join(sorted(EXTENSIONS))}, got {str(path)!r:.200}")
    with safe_io.atomic_file(path) as temporary:
        temporary.write_bytes(to_bytes(mesh, ending))


def to_bytes(mesh: Trimesh, ending: str) -> bytes:
    """The mesh as a file of one of `EXTENSIONS`."""
    if ending == "glb":
        return glb.written(mesh)
    if not len(mesh.faces):
        return {
            "obj": b"# no faces\n",
            "off": b"OFF\n0 0 0\n",
            "stl": bytes(84),
            "ply": b"ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nproperty float y\nproperty float z\n"
            b"element face 0\nproperty list uchar int vertex_indices\nend_header\n",
        }[ending]
    data = mesh.export(file_type=ending)
    return data.encode() if isinstance(data, str) else bytes(data)


def file_kind(data: bytes) -> str:
    """Which of `EXTENSIONS` a file is, by its content; empty for none."""
    start = data[:1024].lstrip()
    if data[:4] == glb.MAGIC:
        return "glb"
    if data[:4] in (b"ply\n", b"ply\r"):
        return "ply"
    if re.match(rb"(ST)?C?N?OFF\s", start):
        return "off"
    if len(data) >= 84 and _stl_count(data) * 50 + 84 == len(data):
        return "stl"
    if re.match(rb"solid\b", start) and re.search(rb"\b(facet|endsolid)\b", data[:4096]):
        return "stl"
    if re.search(rb"^[ \t]*v[ \t]+[-+.\d]", data, re.MULTILINE) and b"\0" not in data[:4096]:
        return "obj"
    return ""


# --- reading --------------------------------------------------------------------------------------------------------


def _parsed(data: bytes, max_faces: int) -> tuple[Any, int]:
    """What trimesh makes of a file, and how many faces it says; the file isn't parsed if these are too many."""
    from trimesh import Trimesh, load

    kind = file_kind(data)
    if not kind:
        raise ValueError(f"it is none of {', '.join(sorted(EXTENSIONS)).upper()}")
    if kind == "obj":
        if (least := data.count(b"\nf ")) > max_faces:
            return None, least
    if kind in ("obj", "glb"):
        soup, count = (glb.triangles if kind == "glb" else _obj)(data, max_faces)
        return None if soup is None else Trimesh(*soup, process=False), count
    count = {"stl": _check_stl, "ply": _check_ply, "off": _check_off}[kind](data)
    if count > max_faces:
        return None, count
    with np.errstate(all="ignore"):  # numbers that are none are dropped afterwards
        found: Any = load(io.BytesIO(data), file_type=kind, process=False, skip_materials=True)
    return found, len(found.faces) if hasattr(found, "faces") else _scene_faces(found)


def _scene_faces(scene: Any) -> int:
    """Of all its meshes, as often as they stand in it."""
    sizes = {name: len(getattr(geometry, "faces", ())) for name, geometry in scene.geometry.items()}
    return sum(sizes.get(scene.graph[node][1], 0) for node in scene.graph.nodes_geometry)


def _obj(data: bytes, max_faces: int) -> tuple[glb.Soup | None, int]:
    """Corners and faces alone, and how many faces, at least: None if these are too many. Materials, groups, normals and textures
    are left out; polygons become fans."""
    places = array("d")
    faces: list[tuple[int, int, int]] = []
    for line in io.BytesIO(data.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ").replace(b"\r", b"\n")):
        words = line.split(None, max_faces + 4)  # of a face with more corners the rest doesn't matter
        if not words or words[0] not in (b"v", b"f"):
            continue
        count = len(places) // 3
        if words[0] == b"v":
            if len(words) < 4 or max(map(len, words[1:4])) > MAX_TOKEN:
                raise ValueError(f"vertex {count + 1} has no three coordinates")
            places.extend([float(word) for word in words[1:4]])
            continue
        if len(faces) + len(words) - 3 > max_faces:
            return None, len(faces) + len(words) - 3
        corners = [int(word.partition(b"/")[0][:MAX_TOKEN]) for word in words[1:]]
        corners = [corner - 1 if corner > 0 else count + corner for corner in corners]
        if any(corner < 0 for corner in corners):
            raise ValueError("a face names a vertex before the first")
        faces.extend((corners[0], b, c) for b, c in zip(corners[1:], corners[2:], strict=False))
    count = len(places) // 3
    if faces and max(map(max, faces)) >= count:
        raise ValueError(f"a face names vertex {max(map(max, faces)) + 1}, but there are {count}")
    soup = np.array(places, np.float64).reshape(-1, 3), np.array(faces, np.int64).reshape(-1, 3)
    return soup, len(faces)


def _stl_count(data: bytes) -> int:
    return int.from_bytes(data[80:84], "little")


def _check_stl(data: bytes) -> int:
    if len(data) >= 84 and _stl_count(data) * 50 + 84 == len(data):
        return _stl_count(data)
    return data.count(b"facet normal")


def _check_ply(data: bytes) -> int:
    """Faces by the header, whose elements must fit into the file, or as many triangles as its lists of corners may hold."""
    head, end, body = data.partition(b"end_header")
    if not end or len(head) > 1 << 16:
        raise ValueError("its header doesn't end")
    form, entry = "", 8
    counts: dict[str, int] = {}
    smallest: dict[str, int] = {}
    numbers: dict[str, int] = {}
    lists: dict[str, int] = {}
    for line in head.decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["format"] and not form and len(words) > 1:
            form = words[1]
        elif words[:1] == ["element"]:
            if len(words) != 3 or not re.fullmatch(r"\d{1,12}", words[2]) or words[1] in counts:
                raise ValueError(f"its header has the line {line!r:.80}")
            element = words[1]
            counts[element], smallest[element], numbers[element], lists[element] = int(words[2]), 0, 0, 0
        elif words[:1] == ["property"]:
            several = words[1:2] == ["list"] and len(words) == 5
            kind = words[2] if several else words[1] if len(words) == 3 else ""
            if not counts or kind not in PLY_SIZES or (several and words[3] not in PLY_SIZES):
                raise ValueError(f"its header has the line {line!r:.80}")
            smallest[element] += PLY_SIZES[kind] if "binary" in form else 2
            numbers[element] += 1
            if several:
                lists[element] += 1
                entry = min(entry, PLY_SIZES[words[3]])
        elif words and words[0] not in ("ply", "comment", "obj_info"):
            raise ValueError(f"its header has the line {line!r:.80}")
    least = sum(count * max(smallest[element], 1) for element, count in counts.items())
    if form not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise ValueError(f"its format is {form!r:.40}")
    if least > len(body):
        raise ValueError(f"its header promises at least {least:,} bytes, but {len(body):,} follow")
    if "vertex" not in counts or "face" not in counts:
        raise ValueError("it has no vertices or no faces")
    if form == "ascii":
        entries = _words(body) - sum(count * numbers[element] for element, count in counts.items())
    else:
        entries = (len(body) - least) // entry
    return _triangles(entries, counts["face"], lists["face"] == sum(lists.values()) == 1)


def _check_off(data: bytes) -> int:
    """Faces by the header, whose vertices and faces must fit into the file, or as many triangles as its lines may hold."""
    text = re.sub(rb"#[^\n]*", b"", data[: 1 << 16])
    found = re.match(rb"\s*OFF\s+(\d{1,12})\s+(\d{1,12})\s+\d{1,12}\s", text)
    if not found:
        raise ValueError("it doesn't begin with OFF and three counts")
    vertices, faces = int(found[1]), int(found[2])
    if 6 * (vertices + faces) > len(data):
        raise ValueError(
            f"its header promises {vertices:,} vertices and {faces:,} faces, more than {len(data):,} bytes hold"
        )
    return _triangles(_words(data) - 4 - 3 * vertices - faces, faces, False)  # faces may have colours


def _triangles(entries: int, faces: int, corners: bool) -> int:
    """The most triangles of polygons whose lists have so many entries in all: two fewer a polygon than it has corners, if these
    alone are listed; else, where colours or places in textures may be among them, refused if they are beyond all measure."""
    if corners:
        return max(faces, entries - 2 * faces)
    if entries > max(MOST_ENTRIES * faces, 1 << 16):
        raise ValueError(f"its {faces:,} faces have up to {entries:,} numbers; cut its polygons into triangles")
    return faces


def _words(text: bytes) -> int:
    """Numbers and words of a text, which may have comments, too."""
    count, before = 0, True
    for start in range(0, len(text), 1 << 20):
        blank = np.frombuffer(text[start : start + (1 << 20)], np.uint8) <= 32
        count += int((blank[:-1] & ~blank[1:]).sum()) + int(before and not blank[0])
        before = bool(blank[-1])
    return count


# --- cleaning -------------------------------------------------------------------------------------------------------


def _cleaned(vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"], name: str) -> Trimesh:
    from trimesh import Trimesh

    given = len(faces)
    if given and (faces.min() < 0 or faces.max() >= len(vertices)):
        raise ValueError(f"{name} is damaged: its faces name vertices that it doesn't have")
    sound = (np.abs(vertices) <= MAX_COORDINATE).all(1)  # NaN isn't
    faces = faces[sound[faces].all(1)]
    used, faces = np.unique(faces, return_inverse=True)
    places, same = np.unique(vertices[used] + 0.0, axis=0, return_inverse=True)  # -0 becomes 0
    faces = same.reshape(-1)[faces].reshape(-1, 3)
    corners = places[faces]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    faces = faces[areas > 0]
    if not len(faces):
        reason = (
            "no faces" if not given else f"{given:,} faces, but none has an area and three vertices that are numbers"
        )
        raise ValueError(f"{name} is empty: it has {reason}")
    used, faces = np.unique(faces, return_inverse=True)
    mesh = Trimesh(places[used], faces.reshape(-1, 3), process=False)
    mesh.metadata["report"] = MeshReport(
        faces=len(mesh.faces),
        vertices=len(mesh.vertices),
        dropped=given - len(mesh.faces),
        watertight=bool(mesh.is_watertight),
        consistent=bool(mesh.is_winding_consistent),
    )
    return mesh


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0][:200] if text else type(error).__name__).rstrip(".")
