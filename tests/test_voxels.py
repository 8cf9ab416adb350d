"""Solids as grids and back: occupancy and distances of any mesh, closed surfaces of any grid, and views of them."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import trimesh

from mm.shape_files import to_bytes
from mm.shape_views import Views, around, pose_at, rays, turntable, views
from mm.shapes import Shape, as_shape, from_mesh, load_shape, to_npz
from mm.triangles import covered
from mm.voxels import distance_of, iou, mesh_from_grid, normalised, occupancy, sdf

CENTRES = (np.stack(np.meshgrid(*[np.arange(32)] * 3, indexing="ij"), -1) + 0.5) / 32


def placed(mesh: trimesh.Trimesh, middle: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> trimesh.Trimesh:
    return mesh.apply_translation(middle)


def ball(radius: float = 0.4, middle: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> trimesh.Trimesh:
    return placed(trimesh.creation.icosphere(3, radius), middle)


SOLIDS = {
    "sphere": (ball, 2),
    "torus": (lambda: placed(trimesh.creation.torus(0.3, 0.12)), 0),
    "box": (lambda: placed(trimesh.creation.box((0.5, 0.7, 0.3))), 2),
    "cone": (lambda: placed(trimesh.creation.cone(0.4, 0.7), (0.5, 0.5, 0.2)), 2),
}


@pytest.mark.parametrize("name", SOLIDS)
def test_surface_of_a_grid_is_closed_and_of_the_right_form(name: str) -> None:
    make, euler = SOLIDS[name]
    mesh = make()
    for grid in (occupancy(mesh, 32), sdf(mesh, 32)):
        made = Shape(grid).mesh
        assert made.is_watertight and made.is_winding_consistent and made.euler_number == euler
        assert made.volume == pytest.approx(mesh.volume, rel=0.05)
        assert np.abs(made.bounds - mesh.bounds).max() < 1.5 / 32


def test_occupancy_looks_at_centres() -> None:
    exact = np.linalg.norm(CENTRES - 0.5, axis=-1) < 0.4
    assert np.count_nonzero(occupancy(placed(trimesh.creation.icosphere(5, 0.4)), 32) != exact) < 0.002 * exact.sum()
    # faces that pass through centres of cells, and axes that aren't alike
    box = placed(trimesh.creation.box((13 / 16, 5 / 16, 3 / 16)))
    filled = np.argwhere(occupancy(box, 16))
    assert [len(set(filled[:, axis])) for axis in range(3)] == [13, 5, 3]


def test_overlaps_hollows_and_holes() -> None:
    both = trimesh.util.concatenate([ball(0.2, (0.4, 0.5, 0.5)), ball(0.2, (0.6, 0.5, 0.5))])
    assert (
        occupancy(both, 32) == (occupancy(ball(0.2, (0.4, 0.5, 0.5)), 32) | occupancy(ball(0.2, (0.6, 0.5, 0.5)), 32))
    ).all()
    inner = ball(0.2)
    inner.invert()
    hollow = occupancy(trimesh.util.concatenate([ball(0.4), inner]), 32)
    assert (hollow == (occupancy(ball(0.4), 32) & ~occupancy(ball(0.2), 32))).all()
    # a ball with a hole, and one whose faces don't agree on what is outside, are as full as a whole one
    whole = ball(0.4)
    rng = np.random.default_rng(0)
    open_ = trimesh.Trimesh(whole.vertices, whole.faces[whole.triangles_center[:, 1] < 0.87], process=False)
    faces = whole.faces.copy()
    flipped = rng.random(len(faces)) < 0.4
    faces[flipped] = faces[flipped][:, ::-1]
    mixed = trimesh.Trimesh(whole.vertices, faces, process=False)
    assert not open_.is_watertight and not mixed.is_winding_consistent
    assert iou(occupancy(open_, 32), occupancy(whole, 32)) > 0.98
    assert (occupancy(mixed, 32) == occupancy(whole, 32)).all()


def test_sheets_are_one_cell_thick() -> None:
    sheet = trimesh.Trimesh([[0.1, 0.52, 0.1], [0.9, 0.52, 0.1], [0.1, 0.52, 0.9]], [[0, 1, 2]])
    filled = occupancy(sheet, 16)
    assert set(np.argwhere(filled)[:, 1]) == {8} and 60 < filled.sum() < 120
    assert Shape(sdf(sheet, 16)).mesh.is_watertight


def test_thin_parts_stay_with_the_surface() -> None:
    needle = placed(trimesh.creation.box((0.01, 0.8, 0.01)), (0.51, 0.5, 0.51))
    thick = trimesh.util.concatenate([needle, ball(0.2, (0.5, 0.3, 0.5))])
    assert occupancy(thick, 32, surface=True).any((0, 2)).sum() > 24 > occupancy(thick, 32).any((0, 2)).sum()


def test_distances_are_exact_within_the_band() -> None:
    true = np.clip(np.linalg.norm(CENTRES - 0.5, axis=-1) - 0.3, -0.1, 0.1)
    given = sdf(placed(trimesh.creation.icosphere(4, 0.3)), 32)
    assert given.dtype == np.float32 and np.abs(given - true).max() < 1e-3
    # from cells alone they are right to half a cell
    assert np.abs(distance_of(true < 0) - true).max() < 0.5 / 32 * 1.8


def test_any_grid_becomes_a_closed_surface() -> None:
    rng = np.random.default_rng(0)
    for trial in range(24):
        size = int(rng.integers(1, 12))
        values = rng.random((size,) * 3)
        mesh, valid, reason = mesh_from_grid(values > 0.5 if trial % 2 else values)
        if valid:
            assert mesh.is_watertight and mesh.volume > 0 and not reason
        else:
            assert not (values > 0.5).any()
    full, valid, _ = mesh_from_grid(np.ones((8, 8, 8), bool))
    assert valid and full.is_watertight and full.euler_number == 2 and full.volume == pytest.approx(1, rel=0.05)
    odd = np.full((4, 4, 4), np.nan)
    odd[1, 1, 1], odd[2, 2, 2] = np.inf, -np.inf
    assert mesh_from_grid(odd)[0].is_watertight


def test_nothing_inside_is_an_empty_mesh_with_a_reason() -> None:
    mesh, valid, reason = mesh_from_grid(np.zeros((8, 8, 8)))
    assert not len(mesh.faces) and not valid and "every cell" in reason
    shape = Shape(np.ones((8, 8, 8), np.float32))
    assert not shape.valid and shape.reason == reason and not len(shape.mesh.faces)
    assert Shape(np.eye(8, dtype=bool)[None].repeat(8, 0)).reason == ""


def test_a_mesh_is_brought_into_the_cube() -> None:
    mesh = trimesh.creation.box((2000, 100, 10)).apply_translation((1e6, -3, 7))
    inside = normalised(mesh, 0.1)
    assert inside.bounds[:, 0] == pytest.approx([0.1, 0.9]) and inside.bounds.mean(0) == pytest.approx([0.5] * 3)
    assert mesh.bounds[0, 0] == 999_000  # a copy
    with pytest.raises(ValueError, match="empty mesh"):
        normalised(trimesh.Trimesh())
    with pytest.raises(ValueError, match="below half the cube"):
        normalised(mesh, 0.5)


def test_shapes_of_all_kinds() -> None:
    mesh = ball()
    shape = from_mesh(mesh, 16)
    assert shape.size == 16 and shape.mesh is shape.given and shape.valid
    assert as_shape(shape, 16) is shape and as_shape(shape, 24).size == 24
    assert iou(as_shape(mesh.copy().apply_scale(3), 16).occupancy, shape.occupancy) == 1
    assert as_shape(shape.occupancy, 16).grid.dtype == bool
    assert as_shape(shape.grid.astype(np.float64), 16).grid.dtype == np.float32
    bare = Shape(shape.occupancy)
    assert (bare.distance < 0).tolist() == shape.occupancy.tolist()
    with pytest.raises(ValueError, match="32³ cells is wanted, got 16³"):
        as_shape(bare, 32)


@pytest.mark.parametrize(
    "grid",
    [np.zeros((4, 4), bool), np.zeros((4, 4, 5), bool), np.zeros((4, 4, 4), int), np.zeros((1, 1, 1), bool)],
)
def test_grids_of_another_form_are_refused(grid: np.ndarray) -> None:
    with pytest.raises(ValueError, match="grid"):
        Shape(grid)


def test_distances_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Shape(np.full((4, 4, 4), np.nan))
    with pytest.raises(ValueError, match="2 to 256"):
        occupancy(ball(), 1000)
    with pytest.raises(ValueError, match="truncation"):
        sdf(ball(), 16, 0)
    with pytest.raises(ValueError, match="three axes"):
        mesh_from_grid(np.zeros((2, 2)))


def test_numbers_too_large_for_the_grid() -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        Shape(np.full((4, 4, 4), 1e300))
    far = Shape(np.full((4, 4, 4), 1e6, np.float32))  # too large for 16 bits
    assert np.array_equal(load_shape(to_npz(far), 4).grid, far.grid)


@pytest.mark.parametrize("ending", ["glb", "obj"])
def test_a_shape_stands_where_it_was_written(ending: str) -> None:
    """Small and on the floor, there and back through a file; what stands nowhere is brought to the middle."""
    grid = np.zeros((32, 32, 32), bool)
    grid[10:22, 2:9, 10:22] = True
    shape = Shape(grid)
    back = as_shape(to_bytes(shape.mesh, ending), 32)
    assert iou(back.occupancy, grid) == 1
    for moved in (shape.mesh.copy().apply_translation((3, 0, 0)), shape.mesh.copy().apply_scale(0.4)):
        found = np.argwhere(as_shape(to_bytes(moved, ending), 32).occupancy)
        assert (found.min(0) + found.max(0)).tolist() == pytest.approx([31] * 3, abs=1) and np.ptp(found, 0).max() > 26


def test_any_byte_but_zero_is_inside() -> None:
    """Numpy counts a bool as the number that it is."""
    with zipfile.ZipFile(io.BytesIO(to_npz(Shape(np.zeros((4, 4, 4), bool))))) as archive:
        data = archive.read("grid.npy")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("grid.npy", data[:-64] + bytes([0, 255] * 32))
    grid = load_shape(file.getvalue(), 4).grid
    assert grid.dtype == bool and set(grid.view(np.uint8).flat) == {0, 1} and grid.sum() == 32


@pytest.mark.parametrize("wrong", ["32", None, 1.5, [8]])
def test_what_is_no_number_is_refused(wrong: object) -> None:
    mesh = trimesh.creation.icosphere(1, 0.4).apply_translation((0.5,) * 3)
    for call in (
        lambda: occupancy(mesh, wrong),
        lambda: sdf(mesh, wrong),
        lambda: as_shape(mesh, wrong),
        lambda: views(mesh, wrong),
        lambda: views(mesh, 1, wrong),
        lambda: turntable(mesh, wrong),
    ):
        with pytest.raises(ValueError, match="got"):
            call()
    for call in (
        lambda: sdf(mesh, 8, "far"),
        lambda: normalised(mesh, None),
        lambda: mesh_from_grid(np.ones((4,) * 3), "x"),
    ):
        with pytest.raises(ValueError, match="got"):
            call()


@pytest.mark.parametrize("poses", [np.eye(4), np.zeros((1, 3, 3)), 5, "x", [], [[[1]]], np.full((1, 4, 4), np.nan)])
def test_poses_are_matrices(poses: object) -> None:
    with pytest.raises(ValueError, match="poses are"):
        views(trimesh.creation.icosphere(1, 0.4), 1, 8, poses)


def test_grids_as_files(tmp_path) -> None:
    rough = Shape(sdf(ball(), 16).astype(np.float16).astype(np.float32))
    for shape in (Shape(occupancy(ball(), 16)), rough, Shape(sdf(ball(), 16))):
        data = to_npz(shape)
        back = load_shape(data)
        assert back.grid.dtype == shape.grid.dtype and (back.grid == shape.grid).all()
        for cut in (10, len(data) // 2, len(data) - 30):
            with pytest.raises(ValueError, match="npz|mesh"):
                load_shape(data[:cut])
    assert len(to_npz(rough)) < len(to_npz(Shape(sdf(ball(), 16))))
    (tmp_path / "a.npz").write_bytes(to_npz(rough))
    assert (load_shape(tmp_path / "a.npz").grid == rough.grid).all()
    for grid in (np.array([[[object()]]]), np.zeros((300, 300, 300), bool), np.zeros((4, 4), bool)):
        np.savez_compressed(tmp_path / "b.npz", grid=grid)
        with pytest.raises(ValueError, match="can't be used as an .npz"):
            load_shape(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", other=rough.grid)
    with pytest.raises(ValueError, match="can't be used as an .npz"):
        load_shape(str(tmp_path / "c.npz"))


# --- pictures -------------------------------------------------------------------------------------------------------


def test_covered_pixels_are_those_whose_centre_is_inside() -> None:
    corners = np.array([[[0, 0], [4, 0], [0, 4]], [[9, 9], [1, 1], [5, 5]]], float)
    (face, column, row, weights), *rest = list(covered(corners, 6, 6))
    assert not rest and set(face) == {0}
    assert set(zip(column, row, strict=True)) == {(x, y) for x in range(4) for y in range(4) if x + y < 4}
    assert np.einsum("pc,pcx->px", weights, corners[face]) == pytest.approx(np.stack((column, row), 1) + 0.5)


def test_depth_is_where_rays_meet_the_ball() -> None:
    seen = views(placed(trimesh.creation.icosphere(4, 0.3)), 3, 32)
    assert isinstance(seen, Views) and seen.rgb.shape == (3, 32, 32, 3) and seen.rgb.dtype == np.uint8
    origins, directions = rays(seen.poses, 32)
    along = -(seen.poses[:, None, None, :3, 2] * directions).sum(-1)
    ends = origins + directions * (seen.depth / along)[..., None]
    assert np.abs(np.linalg.norm(ends - 0.5, axis=-1) - 0.3)[seen.mask].max() < 2e-3
    toward = np.linalg.norm(np.cross(origins - 0.5, directions), axis=-1)  # how far rays pass the middle
    assert (seen.mask == (toward < 0.3))[np.abs(toward - 0.3) > 3e-3].all()
    assert (seen.rgb[~seen.mask & (toward > 0.32)] == 255).all() and (seen.rgb[toward < 0.28] < 255).all()


def test_nearer_faces_hide_others_and_axes_are_as_said() -> None:
    front = pose_at(0, 0)  # from z
    assert front[:3, 3] == pytest.approx([0.5, 0.5, 2.3]) and front[:3, 1] == pytest.approx([0, 1, 0])
    near, far = ball(0.1, (0.7, 0.7, 0.8)), ball(0.1, (0.7, 0.7, 0.2))
    seen = views(trimesh.util.concatenate([far, near]), size=64, poses=front[None])
    rows, columns = np.nonzero(seen.mask[0])
    assert rows.mean() < 32 < columns.mean()  # up is up, x is right
    assert seen.depth[seen.mask].min() == pytest.approx(1.4, abs=0.01)
    middle = (int(rows.mean()), int(columns.mean()))
    assert seen.depth[0][middle] < 1.6


def test_turntable_and_empty_views() -> None:
    frames = turntable(placed(trimesh.creation.box((0.6, 0.2, 0.1))), 4, 24)
    assert frames.shape == (4, 24, 24, 3) and (frames[0] != frames[1]).any()
    assert not views(trimesh.Trimesh(), 2, 8).mask.any()
    assert around(5).shape == (5, 4, 4)
    for count, size in ((0, 8), (3, 0), (10_000, 8)):
        with pytest.raises(ValueError, match="a shape is shown by"):
            turntable(ball(), count, size)
