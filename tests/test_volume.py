"""Volume rendering of shapes: against the mesh renderer, against a solid whose rays are known, and as a lesson."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from mm.shape_tokenizer import pictures_of, solidity
from mm.shape_views import around, pose_at, views
from mm.shapes import Shape, as_shape
from mm.tokenizers.triplane_msvq import TriplaneMSVQ
from mm.tokenizers.voxel_vq import VoxelVQ
from mm.training_shapes import ShapeTokenizerModule
from mm.volume import Rendering, between_cells, density, pixels, render, views_of
from mm.voxels import TRUNCATION


def ball(points: Tensor, radius: float = 0.3) -> Tensor:
    return (radius - (points - 0.5).norm(dim=-1)) / TRUNCATION


@pytest.fixture(scope="module")
def shape() -> Shape:
    mesh = trimesh.creation.box(extents=(0.9, 0.3375, 0.5625))
    mesh.apply_translation([0.5, 0.5, 0.5])
    return as_shape(mesh, 32)


def test_density_is_half_at_the_surface_and_falls_outward() -> None:
    values = density(torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float64), beta=0.05)
    assert values[1] == 0.5 / 0.05 and torch.isclose(values[0] + values[2], torch.tensor(20.0, dtype=torch.float64))
    assert torch.isclose(values[0], 10 * torch.exp(torch.tensor(-10.0, dtype=torch.float64)))


def test_a_ball_is_where_rays_meet_it() -> None:
    rng = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(1, 200, 3, generator=rng), dim=-1)
    origins = 0.5 - 1.8 * directions + 0.25 * torch.randn(1, 200, 3, generator=rng)
    found = render(ball, origins, directions, coarse=64, fine=64, beta=0.002)
    along = ((0.5 - origins) * directions).sum(-1)
    past = (0.5 - origins - along[..., None] * directions).norm(dim=-1)
    sure = (past - 0.3).abs() > 0.03
    hit = past < 0.3
    assert ((found.alpha > 0.5) == hit)[sure].all() and hit.sum() > 50 and (~hit).sum() > 20
    known = along - (0.09 - past**2).clamp_min(0).sqrt()
    assert (found.distance - known)[hit & sure].abs().max() < 0.01


def test_rays_past_the_cube_and_along_its_axes() -> None:
    origins = torch.tensor([[[0.5, 0.5, 3.0], [5.0, 5.0, 5.0], [0.5, 0.5, 0.5]]])
    directions = torch.tensor([[[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    found = render(ball, origins, directions, beta=0.005)
    assert torch.isfinite(found.distance).all()
    assert found.alpha[0, 1] == 0 and found.alpha[0, 0] > 0.99
    assert abs(float(found.distance[0, 0]) - 2.2) < 0.02 and float(found.distance[0, 2]) < 0.05, "it begins inside"


def test_pictures_of_a_field_are_those_of_its_mesh(shape: Shape) -> None:
    values = solidity(shape)[None]
    made = views_of(lambda points: between_cells(values, points), around(4), 48)
    drawn = views(shape.mesh, 4, 48)
    overlap = (made.mask & drawn.mask).sum() / (made.mask | drawn.mask).sum()
    both = made.mask & drawn.mask
    assert overlap > 0.93
    assert np.abs(made.depth - drawn.depth)[both].mean() < 0.02
    assert np.abs(made.rgb.astype(float) - drawn.rgb)[both].mean() < 20  # of 255; edges are softer
    blank = views_of(lambda points: torch.full(points.shape[:2], -1.0), around(1), 16)
    assert not blank.mask.any() and (blank.rgb > 250).all()


def test_pixels_say_where_their_cameras_stand(shape: Shape) -> None:
    seen = pixels(pictures_of(shape, 3, 32)[None].repeat(2, 1, 1, 1, 1), 500, torch.Generator().manual_seed(0))
    assert seen.mask.mean() == pytest.approx(0.75, abs=0.06)
    cameras = torch.from_numpy(around(3)[:, :3, 3])
    assert torch.cdist(seen.origins.flatten(0, 1), cameras).amin(1).max() < 1e-4
    # from the camera along the ray to the depth: a point of the box's surface
    reach = seen.depth / (seen.directions * seen.forward).sum(-1)
    points = (seen.origins + reach[..., None] * seen.directions)[seen.mask > 0]
    inside = ((points - 0.5).abs() / torch.tensor([0.45, 0.16875, 0.28125])).amax(-1)
    assert (inside - 1).abs().max() < 0.1


def test_rays_without_a_shape_are_drawn_evenly() -> None:
    empty = pictures_of(as_shape(np.eye(16, dtype=bool)[None].repeat(16, 0) & False, 16), 2, 16)[None]
    seen = pixels(empty, 64)
    assert seen.mask.sum() == 0
    terms = Rendering().losses(ball, seen)
    assert all(torch.isfinite(term) for term in terms.values()) and terms["depth"] == 0 < terms["alpha"]


@pytest.mark.parametrize("kind", ["triplane", "voxel"])
def test_pictures_alone_teach_a_shape(kind: str, shape: Shape) -> None:
    """The rest of the loss at 0: what is learned is learned through the renderer."""
    torch.manual_seed(0)
    tokenizer: Any = (
        TriplaneMSVQ(
            size=16, scales=[1, 2, 4], width=32, depth=1, heads=2, features=8, hidden=16, codebook_size=16, code_dim=4
        )
        if kind == "triplane"
        else VoxelVQ(size=16, channels=8, codebook_size=16, code_dim=4)
    )
    box = as_shape(shape.mesh, 16)
    x = tokenizer.inputs([box] * 4)
    tokenizer.warm_start(tokenizer.inputs(TriplaneMSVQ.examples()))
    pictures = pictures_of(box, 3, 24)[None].repeat(4, 1, 1, 1, 1)
    lesson = Rendering(rays=48, coarse=24, fine=8, beta=0.02)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    rng, history = torch.Generator().manual_seed(1), []
    for _ in range(40):
        out = tokenizer.learn(x, x)
        terms = lesson.losses(out.field, pixels(pictures, lesson.rays, rng))
        assert set(terms) == {"alpha", "depth", "colour"}
        optimizer.zero_grad()
        (sum(terms.values()) + out.loss).backward()
        optimizer.step()
        history.append({name: float(term.detach()) for name, term in terms.items()})
    first, last = ({n: np.mean([h[n] for h in part]) for n in history[0]} for part in (history[:5], history[-5:]))
    assert last["alpha"] < 0.7 * first["alpha"] and last["depth"] < 0.7 * first["depth"], (first, last)
    drawn = tokenizer.render(tokenizer.encode(box), views=3, size=24)
    truth = views(box.mesh, 3, 24)
    assert (drawn.mask & truth.mask).sum() / (drawn.mask | truth.mask).sum() > 0.6


def test_light_stands_with_the_camera(shape: Shape) -> None:
    """Also with one that looks straight down or is tilted."""
    tilt = np.eye(4)
    tilt[:2, :2] = [[0, -1], [1, 0]]
    for pose in (pose_at(0.3, math.pi / 2), pose_at(0.3, 0.4) @ tilt):
        truth = views(shape.mesh, 1, 48, pose[None])
        drawn = views_of(partial(between_cells, solidity(shape)[None]), pose[None], 48)
        both = truth.mask & drawn.mask
        assert both.sum() > 200 and np.abs(truth.rgb[both].astype(int) - drawn.rgb[both]).mean() < 12


def test_rendering_is_checked(shape: Shape) -> None:
    for settings, message in (
        (dict(alpha=0, depth=0, colour=0), "one above it"),
        (dict(depth=-1), "weights from 0 on"),
        (dict(rays=0), r"rays must be a whole number in 1\.\."),
        (dict(rays=1.5), "rays must be a whole number"),
        (dict(coarse=1), r"coarse must be a whole number in 2\.\."),
        (dict(alpha="much"), "alpha must be a number"),
        (dict(beta=0), "beta, in sides"),
    ):
        with pytest.raises(ValueError, match=message):
            Rendering(**settings)
    with pytest.raises(ValueError, match="weights must not be negative"):
        ShapeTokenizerModule(TriplaneMSVQ.tiny(), distance=0, bce=0, dice=0)
    ShapeTokenizerModule(TriplaneMSVQ.tiny(), distance=0, bce=0, dice=0, rendering=Rendering())
    with pytest.raises(ValueError, match="pictures of 1 to 2048"):
        TriplaneMSVQ.tiny().render(TriplaneMSVQ.tiny().encode(TriplaneMSVQ.examples()[0]), size=0)
