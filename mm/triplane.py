"""Shapes as three planes of features (a triplane, Chan et al. 2022, arXiv 2112.07945) at the size of one processor core: how
planes come from a cube or from pictures, and how cells come from planes. The structure is SAR3D's (Chen et al. 2024, arXiv
2411.16856): a network over the positions of all planes together (roll-out attention), and a small one at each point, which reads
the sum of what the planes say there.

Planes, in their order: what is seen along z (rows x, columns y), along y (x, z), and along x (y, z).

Letters in shapes: B batch, N cells a side, P = 3 planes, D latent channels, s side of a plane of latents, R side of a plane of
features, W width, F features, Q points, V views, C numbers of a pixel, S side of a view, T positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.autoencoder import principal_axes
from mm.vit import Attention, linear
from mm.volume import between_cells

PLANES = ((0, 1), (0, 2), (1, 2))
"""Axes that are the rows and the columns of each plane."""


class Block(nn.Module):
    """Self-attention and a network of two layers, pre-normalised, each added. `still`: it begins as the identity."""

    def __init__(self, width: int, heads: int, *, still: bool = True) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Attention(width, heads)
        back = linear(4 * width, width)
        self.mlp = nn.Sequential(linear(width, 4 * width), nn.GELU(), back)
        if still:
            for last in (self.attention.out, back):
                nn.init.zeros_(last.weight)

    def forward(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed)
        return x + self.mlp(self.norms[1](x))


def columns(x: Float[Tensor, "B N N N"], side: int) -> list[Float[Tensor, "B T c"]]:
    """For each plane of side² positions, what stands over each: c = N·(N/side)² cells."""
    planes = (x.permute(0, 3, 1, 2), x.permute(0, 2, 1, 3), x.permute(0, 1, 2, 3))
    return [F.pixel_unshuffle(plane, x.shape[-1] // side).flatten(2).transpose(1, 2) for plane in planes]


def from_columns(parts: list[Float[Tensor, "B T c"]], side: int) -> Float[Tensor, "B N N N"]:
    """The sum of the cubes that columns over each plane make up (`columns`)."""
    cells = parts[0].shape[-1]
    finer = round((cells / side) ** (1 / 3))  # c = finer³·side
    xy, xz, yz = (F.pixel_shuffle(part.transpose(1, 2).unflatten(2, (side, side)), finer) for part in parts)
    return xy.permute(0, 2, 3, 1) + xz.permute(0, 2, 1, 3) + yz


def to_planes(x: Float[Tensor, "B T D"], side: int) -> Float[Tensor, "B P D s s"]:
    return x.unflatten(1, (3, side, side)).permute(0, 1, 4, 2, 3)


class GridPlanes(nn.Module):
    """A cube → planes of latents: a linear map of each column plus what the network makes of all columns together, which begins
    at zero."""

    def __init__(self, size: int, side: int, latent: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.side, cells = side, size**3 // side**2
        self.linear = nn.ModuleList(nn.Linear(cells, latent) for _ in PLANES)
        self.enter = nn.ModuleList(linear(cells, width) for _ in PLANES)
        self.places = nn.Parameter(0.5 * torch.randn(3 * side**2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.out = nn.LayerNorm(width), linear(width, latent)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Float[Tensor, "B N N N"]) -> Float[Tensor, "B P D s s"]:
        parts = columns(x, self.side)
        straight = torch.cat([layer(part) for layer, part in zip(self.linear, parts, strict=True)], dim=1)
        entered = torch.cat([layer(part) for layer, part in zip(self.enter, parts, strict=True)], dim=1)
        return to_planes(straight + self.out(self.norm(self.blocks(entered + self.places))), self.side)


class ViewPlanes(nn.Module):
    """Pictures of a shape → planes of latents: learned queries, one a position of the planes, and the squares of all pictures see
    each other. Where a picture was taken from, the rays of its pixels say."""

    def __init__(self, views: tuple[int, int], side: int, latent: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        count, pixels = views
        self.side, self.patch = side, pixels // 8
        self.enter = linear(10 * self.patch**2, width)
        self.queries = nn.Parameter(0.1 * torch.randn(3 * side**2, width))
        # queries that see nothing at first would all give the same codes
        self.blocks = nn.Sequential(*(Block(width, heads, still=False) for _ in range(depth)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, latent, bias=False)
        self.still = nn.Parameter(torch.zeros(3 * side**2, latent))

    def forward(self, x: Float[Tensor, "B V C S S"]) -> Float[Tensor, "B P D s s"]:
        return to_planes(self.out(self._looked(x)) + self.still, self.side)

    def _looked(self, x: Float[Tensor, "B V C S S"]) -> Float[Tensor, "B T W"]:
        squares = F.pixel_unshuffle(x.flatten(0, 1), self.patch).flatten(2).transpose(1, 2)
        seen = self.enter(squares).unflatten(0, (len(x), -1)).flatten(1, 2)
        every = self.blocks(torch.cat((self.queries.expand(len(x), -1, -1), seen), dim=1))
        return self.norm(every[:, : len(self.queries)])

    @torch.no_grad()
    def begin_principal(self, x: Float[Tensor, "B V C S S"]) -> None:
        """Let latents be the principal components of how what is seen differs from shape to shape: at first it differs much more
        from place to place."""
        looked = self._looked(x).float()
        usual = looked.mean(0)
        _, axes, spread = principal_axes((looked - usual).flatten(0, 1), self.out.out_features)
        nn.init.zeros_(self.out.weight)
        self.out.weight[: len(axes)] = axes / spread[:1]
        self.still.copy_(-usual @ self.out.weight.T)


class Planes(NamedTuple):
    """What a shape's values are read from."""

    features: Float[Tensor, "B P F R R"]
    coarse: Float[Tensor, "B N N N"]
    """What columns over the planes come to, cell by cell."""


class PlaneDecoder(nn.Module):
    """Planes of latents → planes of features, and values at points: a linear map of latents to columns, of which the mean over
    the planes is taken, plus what the networks make of the planes, which begins at zero.

    Args:
        size: N.
        side: s.
        latent: D.
        features: F, of each point of a plane.
        width, depth, heads: of the network over the positions of all planes.
        hidden: width of the network at each point.
    """

    def __init__(
        self, size: int, side: int, latent: int, *, features: int, width: int, depth: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.side, self.finer = side, size // side
        self.linear = nn.ModuleList(nn.Linear(latent, size**3 // side**2) for _ in PLANES)
        self.enter = linear(latent, width)
        self.places = nn.Parameter(0.5 * torch.randn(3 * side**2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.spread = nn.ModuleList(linear(width, features * self.finer**2) for _ in PLANES)
        self.smooth = nn.Conv2d(features, features, 3, padding=1)
        self.point = nn.Sequential(nn.SiLU(), linear(features, hidden), nn.SiLU(), linear(hidden, hidden), nn.SiLU())
        self.last = linear(hidden, 1)
        nn.init.zeros_(self.last.weight)

    def forward(self, latents: Float[Tensor, "B P D s s"]) -> Planes:
        places = latents.flatten(3).transpose(2, 3)
        coarse = from_columns([layer(places[:, plane]) for plane, layer in enumerate(self.linear)], self.side) / 3
        x = self.norm(self.blocks(self.enter(places.flatten(1, 2)) + self.places)).unflatten(1, (3, self.side**2))
        parts = [layer(x[:, plane]).transpose(1, 2) for plane, layer in enumerate(self.spread)]
        planes = torch.stack([part.unflatten(2, (self.side, self.side)) for part in parts], dim=1)
        fine = F.pixel_shuffle(planes.flatten(0, 1), self.finer)
        return Planes((fine + self.smooth(F.silu(fine))).unflatten(0, (-1, 3)), coarse)

    def at_cells(self, planes: Planes, cells: tuple[Tensor, Tensor, Tensor]) -> Float[Tensor, "B x y z"]:
        """At the centres of all cells whose indices along x, y and z are among the given ones."""
        xy, xz, yz = (
            planes.features[:, plane][:, :, cells[rows]][:, :, :, cells[column]]
            for plane, (rows, column) in enumerate(PLANES)
        )
        total = xy[:, :, :, :, None] + xz[:, :, :, None, :] + yz[:, :, None, :, :]
        coarse = planes.coarse[:, cells[0]][:, :, cells[1]][:, :, :, cells[2]]
        return coarse + self.last(self.point(total.movedim(1, -1)))[..., 0]

    def at_points(self, planes: Planes, points: Float[Tensor, "B Q 3"]) -> Float[Tensor, "B Q"]:
        """At any points of the unit cube: between the centres of cells, planes and columns are read linearly."""
        how: Any = dict(padding_mode="border", align_corners=False)
        coarse = between_cells(planes.coarse, points)
        total: Any = 0
        for plane, axes in enumerate(PLANES):
            where = points[..., [axes[1], axes[0]]][:, :, None].to(planes.features.dtype) * 2 - 1
            total = total + F.grid_sample(planes.features[:, plane], where, **how)
        return coarse + self.last(self.point(total[..., 0].transpose(1, 2)))[..., 0]


@torch.no_grad()
def begin_principal(encoder: GridPlanes, decoder: PlaneDecoder, x: Float[Tensor, "B N N N"]) -> None:
    """Let the linear maps of both be the principal components of columns, all planes in one scale."""
    for inward, outward, part in zip(encoder.linear, decoder.linear, columns(x.float(), encoder.side), strict=True):
        assert isinstance(inward, nn.Linear) and isinstance(outward, nn.Linear)
        centre, axes, spread = principal_axes(part.flatten(0, 1), inward.out_features)
        for values in (inward.weight, inward.bias, outward.weight):
            nn.init.zeros_(values)
        inward.weight[: len(axes)] = axes / spread[:1]
        inward.bias[: len(axes)] = -(axes @ centre) / spread[:1]
        outward.weight[:, : len(axes)] = axes.T * spread[:1]
        outward.bias.copy_(centre)
