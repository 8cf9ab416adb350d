"""Pictures of shapes, drawn here: colour and depth from any camera, views all round, turntables. No graphics card is asked.

Cameras stand `DISTANCE` from the middle of the unit cube and look at it, with an angle of view of `FIELD`, so that whatever has
a margin of 0.05 in the cube (`mm.voxels.normalised`) is seen whole. A pose is camera-to-world [4, 4]: its columns are the
camera's right, up and backward, and where it stands (OpenGL: it looks along its -z).

Letters in shapes: V views, S side of a picture in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from mm.triangles import covered

if TYPE_CHECKING:  # imported where it is used, so that `import mm` stays fast
    from trimesh import Trimesh

DISTANCE = 1.8
"""From the camera to the middle of the cube, in sides of the cube."""
FIELD = math.radians(52)
"""Angle of view, from side to side."""
NEAREST = 0.05
"""Triangles with a corner nearer to the camera are left out."""
MAX_SIDE = 2048
MAX_VIEWS = 1024
INK, PAPER = (166, 178, 204), (255, 255, 255)
LIGHTS = (((0.3, 0.5, 0.8), 0.75), ((-0.8, 0.2, 0.4), 0.25))
"""Where light comes from, in the camera's axes, and how much; what faces away still gets `AMBIENT`."""
AMBIENT = 0.25


@dataclass(frozen=True, eq=False)
class Views:
    """Pictures of one shape."""

    rgb: UInt8[np.ndarray, "V S S 3"]
    """White where nothing is."""
    depth: Float[np.ndarray, "V S S"]
    """float32: distance along the direction in which the camera looks, in sides of the cube; 0 where nothing is."""
    poses: Float[np.ndarray, "V 4 4"]
    """float32."""

    @property
    def mask(self) -> Any:
        """bool [V, S, S]: where the shape is."""
        return self.depth > 0


def views(mesh: Trimesh, count: int = 6, size: int = 64, poses: Float[np.ndarray, "V 4 4"] | None = None) -> Views:
    """The mesh, which lies in the unit cube, from `count` places all round (`around`), or from the given ones.

    Raises `ValueError` for a count or a size that is out of bounds.
    """
    poses = checked_poses(count, size, poses)
    drawn = [draw(mesh, pose, size) for pose in poses]
    return Views(np.stack([rgb for rgb, _ in drawn]), np.stack([depth for _, depth in drawn]), poses)


def turntable(mesh: Trimesh, frames: int = 24, size: int = 128) -> UInt8[np.ndarray, "T S S 3"]:
    """Once round the shape, from a little above: frames for `mm.video.save_video` (.gif, .mp4, .png for a contact sheet).

    Raises `ValueError` for a count or a size that is out of bounds.
    """
    _check(frames, size)
    turns = np.linspace(0, 2 * math.pi, frames, endpoint=False)
    return np.stack([draw(mesh, pose_at(float(turn) + math.radians(30), math.radians(25)), size)[0] for turn in turns])


def around(count: int) -> Float[np.ndarray, "V 4 4"]:
    """Poses evenly round the shape, in turn from 30° above and from 20° below."""
    heights = (math.radians(30), math.radians(-20))
    poses = [pose_at(2 * math.pi * view / count + math.radians(15), heights[view % 2]) for view in range(count)]
    return np.stack(poses).astype(np.float32)


def pose_at(turn: float, height: float) -> Float[np.ndarray, "4 4"]:
    """The camera that looks at the middle of the cube, from the front (z) turned towards x, and above the horizon; radians."""
    backward = np.array(
        [math.sin(turn) * math.cos(height), math.sin(height), math.cos(turn) * math.cos(height)], np.float64
    )
    right = np.array([math.cos(turn), 0.0, -math.sin(turn)])
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2] = right, np.cross(backward, right), backward
    pose[:3, 3] = 0.5 + DISTANCE * backward
    return pose


def rays(poses: Float[np.ndarray, "V 4 4"], size: int) -> tuple[Any, Any]:
    """Where the ray of each pixel begins and its direction of length 1, each float32 [V, S, S, 3]; rows go down."""
    axis = ((np.arange(size) + 0.5) / size * 2 - 1) * math.tan(FIELD / 2)
    across, down = np.meshgrid(axis, axis)
    local = np.stack((across, -down, -np.ones_like(across)), -1)
    directions = np.einsum("vij,hwj->vhwi", np.asarray(poses, np.float64)[:, :3, :3], local)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    origins = np.broadcast_to(np.asarray(poses)[:, None, None, :3, 3], directions.shape)
    return origins.astype(np.float32), directions.astype(np.float32)


def draw(mesh: Trimesh, pose: Float[np.ndarray, "4 4"], size: int) -> tuple[Any, Any]:
    """Colour (uint8 [S, S, 3], with twice as many samples each way) and depth (float32 [S, S]) from one camera."""
    nearest, which, shade = _nearest(mesh, pose, 2 * size)
    light = np.where((which >= 0)[..., None], shade[which][..., None] * np.array(INK), np.array(PAPER))
    rgb = light.reshape(size, 2, size, 2, 3).mean((1, 3))
    depth = _nearest(mesh, pose, size)[0]
    return np.rint(rgb).clip(0, 255).astype(np.uint8), np.where(np.isfinite(depth), depth, 0).astype(np.float32)


def _nearest(mesh: Trimesh, pose: Any, size: int) -> tuple[Any, Any, Any]:
    """Depth [S, S] (infinite where nothing is) and triangle (−1) of each pixel, and how bright each triangle is."""
    pose = np.asarray(pose, np.float64)
    places = (np.asarray(mesh.vertices) - pose[:3, 3]) @ pose[:3, :3]
    corners = places[np.asarray(mesh.faces)].reshape(-1, 3, 3)
    corners = corners[(corners[..., 2] < -NEAREST).all(1)]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    # both sides of a face are seen: the one that faces the camera
    normals *= np.where((normals * corners[:, 0]).sum(1, keepdims=True) > 0, -1, 1)
    shade = np.full(len(corners) + 1, AMBIENT)
    for direction, strength in LIGHTS:
        towards = np.array(direction) / np.linalg.norm(direction)
        shade[:-1] += strength * np.maximum(normals @ towards, 0)
    scale = size / 2 / math.tan(FIELD / 2)
    depths = -corners[..., 2]
    flat = np.stack((corners[..., 0], -corners[..., 1]), -1) / depths[..., None] * scale + size / 2
    nearest, which = np.full(size * size, np.inf), np.full(size * size, -1)
    for face, column, row, weights in covered(flat, size, size):
        depth = 1 / (weights / depths[face]).sum(1)  # what is linear on the screen is one over the depth
        order = np.lexsort((depth, row * size + column))
        pixel = (row * size + column)[order]
        first = np.ones(len(pixel), bool)
        first[1:] = pixel[1:] != pixel[:-1]
        pixel, depth, face = pixel[first], depth[order][first], face[order][first]
        closer = depth < nearest[pixel]
        nearest[pixel[closer]], which[pixel[closer]] = depth[closer], face[closer]
    return nearest.reshape(size, size), which.reshape(size, size), np.minimum(shade, 1)


def checked_poses(count: int, size: int, poses: Any = None) -> Float[np.ndarray, "V 4 4"]:
    """Poses all round, or the given ones. Raises `ValueError` for a count or a size that is out of bounds, and for poses that
    are none."""
    if poses is None:
        _check(count, size)
        return around(count)
    found = np.asarray(poses)
    if found.ndim != 3 or found.shape[1:] != (4, 4) or found.dtype.kind not in "iuf" or not np.isfinite(found).all():
        raise ValueError(
            f"poses are a list of camera-to-world matrices of 4×4 finite numbers, got {found.dtype} {list(found.shape)}; "
            "pose_at and around make some"
        )
    _check(len(found), size)
    return found.astype(np.float32)


def _check(count: int, size: int) -> None:
    whole = isinstance(count, Integral) and isinstance(size, Integral)
    if not whole or not 1 <= count <= MAX_VIEWS or not 1 <= size <= MAX_SIDE:
        raise ValueError(
            f"a shape is shown by 1 to {MAX_VIEWS} pictures of 1 to {MAX_SIDE} pixels a side, got {count!r:.40} of {size!r:.40}"
        )
