"""Shapes as sorted triangles. (What all tokenizers have in common: test_tokenizers_contract.)"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from trimesh import Trimesh
from trimesh.creation import box, icosphere, torus

from mm.interfaces import Encoded
from mm.shapes import Shape, from_mesh
from mm.tokenizers.mesh_faces import MeshFaces, Triangles
from mm.voxels import iou, normalised

SOLIDS = {
    "box": box(bounds=[[0.1, 0.2, 0.3], [0.9, 0.5, 0.7]]),
    "ball": normalised(icosphere(subdivisions=2)),
    "ring": normalised(torus(2.0, 0.7, major_sections=16, minor_sections=8)),
}


@pytest.mark.parametrize("name", SOLIDS)
def test_triangles_are_sorted_and_nothing_is_lost_after_rounding(name: str) -> None:
    tokenizer, mesh = MeshFaces(bins=64, max_faces=400), SOLIDS[name]
    item = tokenizer.encode(from_mesh(mesh))
    assert item.ids is not None and int(item.ids[-1]) == tokenizer.spec.stop
    faces = [tuple(tuple(corner) for corner in face) for face in item.ids[:-1].view(-1, 3, 3).tolist()]
    assert len(faces) == len(mesh.faces)
    assert faces == sorted(faces) and all(face[0] == min(face) for face in faces)
    decoded = tokenizer.decode(item)
    back = decoded.value.mesh
    assert decoded.valid and back.is_watertight and back.euler_number == mesh.euler_number
    assert abs(back.volume / normalised(mesh).volume - 1) < 0.05, "and faces outward"
    again = tokenizer.encode(decoded.value)
    assert torch.equal(again.content, item.content)
    places = np.asarray(back.vertices) * 64
    assert np.allclose(places, np.floor(places) + 0.5), "corners are in the middle of their places"


def test_corners_stand_by_height_then_depth_then_width() -> None:
    tokenizer = MeshFaces(bins=10)
    mesh = Trimesh([[0.31, 0.11, 0.21], [0.91, 0.11, 0.21], [0.31, 0.81, 0.21]], [[2, 0, 1]])
    ids = tokenizer.encode(Shape(np.zeros((32, 32, 32), bool), mesh)).content.tolist()
    assert ids == [1, 2, 3, 1, 2, 9, 8, 2, 3, 10], "y, z, x; the lowest corner first; in the mesh's direction"


def test_too_many_triangles() -> None:
    mesh = icosphere(subdivisions=3)
    with pytest.raises(ValueError, match="the mesh has 1,280 triangles, at most 128 are encoded; simplify it"):
        MeshFaces(simplify=False).encode(mesh)
    with pytest.raises(ValueError, match="comes to 0 triangles on a lattice of 4³ places"):
        MeshFaces(bins=4).encode(Shape(np.zeros((32, 32, 32), bool), box(bounds=[[0.51] * 3, [0.52] * 3])))
    pytest.importorskip("fast_simplification", reason="needs fast-simplification: pip install 'mm[mesh]'")
    tokenizer, shape = MeshFaces(), from_mesh(mesh)
    item = tokenizer.encode(shape)
    assert len(item) <= 9 * 128 + 1
    assert iou(tokenizer.decode(item).value.occupancy, shape.occupancy) > 0.9


def test_a_shape_in_many_pieces_is_encoded_more_coarsely() -> None:
    pytest.importorskip("fast_simplification", reason="needs fast-simplification: pip install 'mm[mesh]'")
    places = list(itertools.product(np.arange(0.1, 0.9, 0.1), repeat=3))
    mesh = sum(
        (box(bounds=[place, np.array(place) + 0.05]) for place in places[1:]), box(bounds=[places[0], [0.15] * 3])
    )
    item = MeshFaces().encode(Shape(np.zeros((32, 32, 32), bool), mesh))
    assert 10 <= len(item) <= 9 * 128 + 1


def test_what_makes_no_triangle_is_left_out() -> None:
    tokenizer = MeshFaces(bins=8, max_faces=2, voxels=16)
    first, second, third = [0, 0, 0, 7, 0, 0, 0, 7, 0], [0, 0, 0, 0, 7, 0, 0, 0, 7], [1, 1, 1, 7, 1, 1, 1, 7, 1]

    def read(ids: list[int]) -> tuple[int, str]:
        decoded = tokenizer.decode(Encoded(grid=(len(ids),), ids=torch.tensor(ids, dtype=torch.long)))
        assert decoded.valid == (not decoded.reason)
        return len(decoded.value.mesh.faces), decoded.reason

    assert read([*first, *second, 8, *third]) == (2, "")
    assert read([*first, *second]) == (2, ""), "cut off after a triangle"
    assert read([*first, 3, 3, 8]) == (1, "2 coordinates at the end make no triangle")
    assert read([*first, *second, *third, 8]) == (2, "1 triangles beyond the 2 there may be")
    assert read([*first, *first, 8]) == (1, "1 triangles that are none, or there twice")
    assert read([*first, 5, 5, 5, 5, 5, 5, 1, 1, 1, 8]) == (1, "1 triangles that are none, or there twice")
    assert read([*first, 0, 0, 0, 9, 0, 0, 0, 7, 0]) == (1, "1 triangles with coordinates outside 0..7")
    assert read([8]) == (0, "nothing is inside: every cell of the grid is empty")


def corners_allowed(
    automaton: Triangles, others: list[tuple[int, ...]], bins: int, ordered: bool
) -> set[tuple[int, ...]]:
    """By the rules as they are said, one corner after another."""
    every = list(itertools.product(range(bins), repeat=3))
    if not ordered:
        return {corner for corner in every if corner not in others}
    if not others:
        before = np.unravel_index(automaton.before, (bins,) * 3)
        return {corner for corner in every[:-2] if corner >= tuple(map(int, before))}
    return {corner for corner in every if corner > others[0] and corner not in others}


@pytest.mark.parametrize("ordered", [True, False])
def test_the_automaton_allows_just_what_the_rules_do(ordered: bool) -> None:
    bins, rng = 4, np.random.default_rng(0)
    for _ in range(12):
        automaton, ids = Triangles(bins, 50, ordered), []  # type: tuple[Triangles, list[int]]
        for step in range(27):
            others = [tuple(ids[-(step % 9) :][k : k + 3]) for k in range(0, step % 9 // 3 * 3, 3)] if step % 9 else []
            head = tuple(ids[len(ids) - step % 3 :])
            corners = corners_allowed(automaton, others, bins, ordered)
            expected = {corner[len(head)] for corner in corners if corner[: len(head)] == head}
            allowed = set(automaton.allowed(100).nonzero().flatten().tolist())
            assert allowed - {bins} == expected
            assert (bins in allowed) == (step % 9 == 0 and step > 0)
            # high ones are where it gets narrow
            token = max(expected) if rng.random() < 0.6 else int(rng.choice(sorted(expected)))
            automaton.accept(token)
            ids.append(token)


@pytest.mark.parametrize("grammar", ["sorted", "faces"])
def test_the_automaton_follows_items_and_ends_in_its_room(grammar: Any) -> None:
    tokenizer = MeshFaces(bins=64, max_faces=400, grammar=grammar)
    automaton, item = tokenizer.automaton(), tokenizer.encode(SOLIDS["ball"])
    assert automaton is not None
    for left, token in zip(range(len(item), 0, -1), item.content.tolist(), strict=True):
        assert automaton.allowed(left)[token]
        automaton.accept(token)
    generator = torch.Generator().manual_seed(0)
    for room in (10, 11, 18, 19, 64):
        automaton, ids = tokenizer.automaton(), []
        assert automaton is not None
        for left in range(room, 0, -1):
            chances = automaton.allowed(left).float()
            chances[-1] *= 0.1
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
            automaton.accept(ids[-1])
            if ids[-1] == tokenizer.spec.stop:
                break
        assert ids[-1] == tokenizer.spec.stop and len(ids) % 9 == 1 and len(ids) >= 10
    assert MeshFaces(grammar="none").automaton() is None


def test_the_automaton_bears_what_was_not_allowed() -> None:
    automaton = Triangles(4, 2, ordered=True)
    for token in [3, 3, 3, 3, 3, 3, 3, 3]:
        automaton.accept(token)
        assert automaton.allowed(5).any()
    assert len(automaton.place()) == 15 and max(map(abs, automaton.place())) <= 1
    for token in [3, 4, 2, 99]:
        automaton.accept(token)
    assert automaton.allowed(50).nonzero().tolist() == [[4]], "after the end only the end"
    with pytest.raises(ValueError, match="bins must be a whole number in 4..1024, got 3"):
        MeshFaces(bins=3)
    with pytest.raises(ValueError, match="grammar must be sorted, faces or none, got 'loose'"):
        MeshFaces(grammar="loose")  # type: ignore[arg-type]
