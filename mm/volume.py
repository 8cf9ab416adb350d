"""Pictures of a field of values by volume rendering, with gradients: what a tokenizer of shapes may learn from pictures (SAR3D,
Chen et al. 2024, arXiv 2411.16856, section 3.1), and pictures of what its codes stand for, without a mesh between.

The field is a shape's solidity (`mm.shape_tokenizer`), whose density is VolSDF's (Yariv et al. 2021, arXiv 2106.12052, equations
2 and 3): σ = Ψ(−d) / β with the signed distance d and Ψ the distribution function of a Laplace distribution of scale β. Samples
along a ray are composed as NeRF's (Mildenhall et al. 2020, arXiv 2003.08934, section 4), and more are drawn where the first ones
have found something (section 5.2). Cameras are `mm.shape_views`'.

Letters in shapes: B batch, R rays, T samples of a ray, Q points, V views, S side of a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mm import saved
from mm.shape_views import AMBIENT, DISTANCE, INK, LIGHTS, Views, rays
from mm.voxels import TRUNCATION

Field = Callable[[Float[Tensor, "B Q 3"]], Float[Tensor, "B Q"]]
"""Solidity at points of the unit cube."""
AT_ONCE = 4096
"""Rays that are followed at once where no gradients are kept."""


def between_cells(values: Float[Tensor, "B N N N"], points: Float[Tensor, "B Q 3"]) -> Float[Tensor, "B Q"]:
    """A cube's values at points of the unit cube, linear between the centres of cells."""
    where = points.flip(-1)[:, :, None, None].to(values.dtype) * 2 - 1  # grid_sample counts the last axis first
    return F.grid_sample(values[:, None], where, padding_mode="border", align_corners=False)[:, 0, :, 0, 0]


class Rays(NamedTuple):
    """Some pixels of pictures of each shape, and what is seen there."""

    origins: Float[Tensor, "B R 3"]
    directions: Float[Tensor, "B R 3"]
    forward: Float[Tensor, "B R 3"]
    """Where the camera looks, of length 1 like the direction of the ray."""
    right: Float[Tensor, "B R 3"]
    """The camera's, of length 1: its light stands with it."""
    mask: Float[Tensor, "B R"]
    """1 where the shape is."""
    depth: Float[Tensor, "B R"]
    """Along `forward`, in sides of the cube; means nothing where the shape isn't."""
    colour: Float[Tensor, "B R 3"]
    """From −1 to 1."""


class Rendered(NamedTuple):
    alpha: Float[Tensor, "B R"]
    """How much of the light from behind is held up."""
    distance: Float[Tensor, "B R"]
    """Mean distance along the ray of what does that; of nothing, the far side of the cube."""


@dataclass(frozen=True)
class Rendering:
    """Learning from pictures: how much each of their errors counts (mean absolute errors; the weights are SAR3D's), and how they
    are rendered. Raises `ValueError` for settings out of bounds.

    Attributes:
        alpha, depth, colour: weights. Depth and colour count where the shape is; colour is that of the surface's slope.
        rays: pixels of each shape in a step, three in four where the shape is.
        coarse, fine: samples of a ray, evenly, and then where the first have found something.
        beta: β, in sides of the cube. What is seen begins about β before the surface; less blurs less, and teaches less far.
    """

    alpha: float = 1.0
    depth: float = 0.5
    colour: float = 1.0
    rays: int = 128
    coarse: int = 32
    fine: int = 16
    beta: float = 0.005

    def __post_init__(self) -> None:
        for name in ("alpha", "depth", "colour", "beta"):
            saved.number(name, getattr(self, name))
        weights = (self.alpha, self.depth, self.colour)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(f"alpha, depth and colour are weights from 0 on, and one above it, got {weights}")
        for name, least, most in (("rays", 1, 1 << 16), ("coarse", 2, 512), ("fine", 0, 512)):
            saved.whole_number(name, getattr(self, name), least, most)
        if not 1e-4 <= self.beta <= 1:
            raise ValueError(f"beta, in sides of the cube, is from 0.0001 to 1, got {self.beta}")

    def losses(self, field: Field, seen: Rays) -> dict[str, Tensor]:
        """The terms, not yet weighted; those that have no weight are left out."""
        found = render(field, seen.origins, seen.directions, self.coarse, self.fine, self.beta)
        terms, there = {}, seen.mask / seen.mask.sum().clamp_min(1)
        if self.alpha:
            terms["alpha"] = (found.alpha - seen.mask).abs().mean()
        if self.depth:
            depth = found.distance * (seen.directions * seen.forward).sum(-1)
            terms["depth"] = ((depth - seen.depth).abs() * there).sum()
        if self.colour:
            made = colours(field, seen, found, TRUNCATION / 4)
            terms["colour"] = ((made - seen.colour).abs().mean(-1) * there).sum()
        return terms


def pixels(pictures: Float[Tensor, "B V C S S"], count: int, generator: torch.Generator | None = None) -> Rays:
    """`count` pixels of each shape's pictures (`mm.shape_tokenizer.pictures_of`), drawn at random, three in four where it is."""
    flat = pictures.movedim(2, -1).flatten(1, 3)
    colour, depth, directions, moments = flat.split((3, 1, 3, 3), dim=-1)
    there = depth[..., 0] < 1
    share = there.float().mean(1, keepdim=True)
    odds = torch.where(there, 0.75 / share.clamp_min(1e-6), 0.25 / (1 - share).clamp_min(1e-6))
    chosen = torch.multinomial(odds, count, replacement=True, generator=generator)
    # all rays of a picture lie evenly about where its camera looks
    middle = F.normalize(pictures[:, :, 4:7].mean((-1, -2)), dim=-1)
    size = pictures.shape[-1] ** 2
    forward = middle.repeat_interleave(size, dim=1)

    def at(values: Tensor) -> Tensor:
        return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))

    forward, directions = at(forward), at(directions)
    up = torch.tensor((0.0, 1.0, 0.0)).to(forward).expand_as(forward)  # no camera all round is tilted
    return Rays(
        origins=0.5 - DISTANCE * forward,
        directions=directions,
        forward=forward,
        right=F.normalize(torch.linalg.cross(forward, up), dim=-1),
        mask=there.gather(1, chosen).to(colour.dtype),
        depth=at(depth)[..., 0] + DISTANCE,
        colour=at(colour),
    )


def density(solidity: Tensor, beta: float) -> Tensor:
    """σ, per side of the cube."""
    inward = TRUNCATION * solidity / beta
    tail = 0.5 * torch.exp(-inward.abs())
    return torch.where(inward > 0, 1 - tail, tail) / beta


def render(
    field: Field,
    origins: Float[Tensor, "B R 3"],
    directions: Float[Tensor, "B R 3"],
    coarse: int = 32,
    fine: int = 16,
    beta: float = 0.005,
) -> Rendered:
    """Follow rays through the unit cube, outside of which nothing is. Rays that miss it see nothing."""
    near, far = crossing(origins, directions)
    steps = (torch.arange(coarse, device=near.device, dtype=near.dtype) + 0.5) / coarse
    along = near[..., None] + (far - near)[..., None] * steps
    if fine:
        with torch.no_grad():
            held = weights(_at(field, origins, directions, along), along, near, far, beta)
            more = inverse(along, near, far, held, fine)
        along = torch.cat((along, more), dim=-1).sort(dim=-1).values
    held = weights(_at(field, origins, directions, along), along, near, far, beta)
    alpha = held.sum(-1) * (far > near)
    distance = (held * along).sum(-1) + (1 - held.sum(-1)) * far
    return Rendered(alpha, distance)


def crossing(origins: Float[Tensor, "B R 3"], directions: Float[Tensor, "B R 3"]) -> tuple[Tensor, Tensor]:
    """Distances at which rays enter and leave the unit cube; equal for those that miss it."""
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    ends = torch.stack((-origins / safe, (1 - origins) / safe))
    near = ends.amin(0).amax(-1).clamp_min(0)
    return near, torch.maximum(ends.amax(0).amin(-1), near)


def _at(field: Field, origins: Tensor, directions: Tensor, along: Float[Tensor, "B R T"]) -> Float[Tensor, "B R T"]:
    points = origins[:, :, None] + along[..., None] * directions[:, :, None]
    return field(points.flatten(1, 2)).unflatten(1, along.shape[1:]).to(along.dtype)


def weights(
    solidity: Float[Tensor, "B R T"], along: Float[Tensor, "B R T"], near: Tensor, far: Tensor, beta: float
) -> Float[Tensor, "B R T"]:
    """How much of a ray's light each sample holds up: it stands for all that is nearest to it."""
    between = (along[..., 1:] + along[..., :-1]) / 2
    lengths = torch.cat((near[..., None], between, far[..., None]), dim=-1).diff(dim=-1)
    thick = density(solidity, beta) * lengths
    before = torch.cat((torch.zeros_like(thick[..., :1]), thick.cumsum(-1)[..., :-1]), dim=-1)
    return torch.exp(-before) * -torch.expm1(-thick)


def inverse(
    along: Float[Tensor, "B R T"], near: Tensor, far: Tensor, held: Float[Tensor, "B R T"], count: int
) -> Float[Tensor, "B R count"]:
    """Places along rays at even quantiles of what is held up, a little of it spread evenly."""
    steps = along.shape[-1]
    share = held + 1e-3
    total = share.cumsum(-1)
    total = total / total[..., -1:]
    wanted = ((torch.arange(count, device=along.device, dtype=along.dtype) + 0.5) / count).expand(*along.shape[:2], -1)
    cell = torch.searchsorted(total.contiguous(), wanted.contiguous()).clamp_max(steps - 1)
    upper = total.gather(-1, cell)
    lower = torch.where(cell > 0, total.gather(-1, (cell - 1).clamp_min(0)), torch.zeros_like(upper))
    inside = ((wanted - lower) / (upper - lower).clamp_min(1e-9)).clamp(0, 1)
    return near[..., None] + (far - near)[..., None] * (cell + inside) / steps


def colours(field: Field, seen: Rays, found: Rendered, step: float) -> Float[Tensor, "B R 3"]:
    """The colour of the surface where rays end, as `mm.shape_views.draw` shades it; the slope is taken over ± `step`."""
    points = seen.origins + found.distance.detach()[..., None] * seen.directions
    shifts = step * torch.cat((torch.eye(3), -torch.eye(3))).to(points)
    values = field((points[:, :, None] + shifts).flatten(1, 2)).to(points.dtype).unflatten(1, (-1, 6))
    outward = values[..., 3:] - values[..., :3]  # solidity falls outward
    normals = F.normalize(outward, dim=-1, eps=1e-4)
    axes = torch.stack((seen.right, torch.linalg.cross(seen.right, seen.forward), -seen.forward), dim=-1)
    local = torch.einsum("brij,bri->brj", axes, normals)
    # both sides of a face are seen: the one towards the viewer
    toward = (normals * seen.directions).sum(-1, keepdim=True)
    local = torch.where(toward > 0, -local, local)
    light = torch.full_like(local[..., 0], AMBIENT)
    for place, strength in LIGHTS:
        light = light + strength * (local @ F.normalize(torch.tensor(place).to(points), dim=0)).clamp_min(0)
    return light.clamp_max(1)[..., None] * torch.tensor(INK).to(points) / 127.5 - 1


@torch.no_grad()
def views_of(field: Field, poses: Any, size: int, coarse: int = 64, fine: int = 32, beta: float = 0.005) -> Views:
    """Pictures of one shape (a batch of one) from cameras, as `mm.shape_views.views` draws a mesh; edges aren't smoothed."""
    import numpy as np

    poses = np.asarray(poses, np.float32)
    origins, directions = (torch.from_numpy(part).reshape(1, -1, 3) for part in rays(poses, size))
    forward, right = (
        torch.from_numpy(axis).repeat_interleave(size**2, dim=0)[None] for axis in (-poses[:, :3, 2], poses[:, :3, 0])
    )
    rgb, depth = [], []
    for o, d, f, r in zip(*(part.split(AT_ONCE, dim=1) for part in (origins, directions, forward, right)), strict=True):
        found = render(field, o, d, coarse, fine, beta)
        nothing = torch.zeros_like(found.alpha)
        there = found.alpha > 0.5
        surface = colours(field, Rays(o, d, f, r, nothing, nothing, torch.zeros_like(o)), found, TRUNCATION / 4)
        alpha = found.alpha[..., None]
        rgb.append(alpha * (surface + 1) / 2 + 1 - alpha)
        depth.append(torch.where(there, found.distance * (d * f).sum(-1), nothing))
    form = (len(poses), size, size)
    pictures = (torch.cat(rgb, 1).reshape(*form, 3).clamp(0, 1) * 255).round().to(torch.uint8)
    return Views(pictures.numpy(), torch.cat(depth, 1).reshape(form).numpy(), poses)
