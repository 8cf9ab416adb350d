"""A small convolutional autoencoder of cubes of numbers: the encoder and decoder around a quantiser (the pictures' counterpart in
space: `mm.autoencoder`). Its convolutions are dense: at this size they use a processor better than separable ones.

Letters in shapes: B batch, C channels, N cells a side, n cells a side of the grid of latents, D latent channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm import saved
from mm.autoencoder import norm, principal_axes

SIDES = (16, 128)
"""Fewest and most cells a side."""


def to_blocks(x: Float[Tensor, "B C N N N"], side: int) -> Float[Tensor, "B S n n n"]:
    """Each block of side³ cells as one position, S = C·side³."""
    x = x.unflatten(4, (-1, side)).unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def from_blocks(x: Float[Tensor, "B S n n n"], side: int) -> Float[Tensor, "B C N N N"]:
    """The inverse of `to_blocks`."""
    x = x.unflatten(1, (-1, side, side, side)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def check_shape(c: Mapping[str, Any]) -> None:
    """Raises `ValueError` for settings that are no sizes, or do not fit each other."""
    for name in ("size", "downsample", "patch", "channels", "blocks", "decoder_channels", "decoder_blocks"):
        saved.whole_number(name, c[name])
    saved.whole_numbers("multipliers", c["multipliers"])
    if c["downsample"] not in (4, 8) or c["patch"] not in (2, 4):
        raise ValueError(f"downsample must be 4 or 8 and patch 2 or 4, got {c['downsample']} and {c['patch']}")
    if not SIDES[0] <= c["size"] <= SIDES[1] or c["size"] % c["downsample"]:
        raise ValueError(
            f"size must be a multiple of {c['downsample']} from {SIDES[0]} to {SIDES[1]}, got {c['size']}: cells of a side"
        )
    levels = (c["downsample"] // c["patch"]).bit_length()
    if len(c["multipliers"]) != levels:
        raise ValueError(
            f"downsample {c['downsample']} after blocks of {c['patch']} has {levels} levels, got {len(c['multipliers'])} "
            "multipliers: give one a level, finest first"
        )
    widths = [w * m for w in (c["channels"], c["decoder_channels"]) for m in c["multipliers"]]
    if min(widths) < 1 or max(widths) > 1024 or not 1 <= c["blocks"] <= 16 or not 1 <= c["decoder_blocks"] <= 16:
        raise ValueError(
            f"widths must be in 1..1024 and blocks in 1..16, got {widths}, {c['blocks']} and {c['decoder_blocks']}"
        )


class VoxelBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the width kept; begins as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = begin_zero(nn.Conv3d(channels, channels, 3, padding=1))

    def forward(self, x: Float[Tensor, "B C n n n"]) -> Float[Tensor, "B C n n n"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def begin_zero(layer: nn.Conv3d) -> nn.Conv3d:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Place(nn.Module):
    """Adds what is learned of each place of the grid: shapes stand upright in the middle of their cube. A smaller grid is the
    part at its origin."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(channels, side, side, side))

    def forward(self, x: Float[Tensor, "B C h w d"]) -> Float[Tensor, "B C h w d"]:
        h, w, d = x.shape[2:]
        return x + self.values[:, :h, :w, :d]


class VoxelEncoder(nn.Module):
    """Cubes → latents; each side shrinks by `patch · 2^(len(widths) − 1)`, the downsampling.

    The result is a linear map of each block plus a network whose last layer begins at zero: training starts from a code of
    blocks that `begin_principal` computes in closed form, and learns what context adds to it.

    Args:
        size: cells a side.
        widths: channels of each level, finest first.
        blocks: blocks a level.
        latent: D.
        patch: side of the blocks that the network's first layer reads as one position.
    """

    def __init__(self, size: int, widths: Sequence[int], *, blocks: int, latent: int, patch: int) -> None:
        super().__init__()
        self.patch, self.downsample = patch, patch << (len(widths) - 1)
        self.linear = nn.Conv3d(self.downsample**3, latent, 1)
        layers: list[nn.Module] = [nn.Conv3d(patch**3, widths[0], 3, padding=1)]
        for finer, width in itertools.pairwise(widths):
            layers += [VoxelBlock(finer) for _ in range(blocks)]
            layers.append(nn.Conv3d(finer, width, 2, stride=2))
        layers += [Place(widths[-1], size // self.downsample), *(VoxelBlock(widths[-1]) for _ in range(blocks))]
        layers += [norm(widths[-1]), nn.SiLU(), begin_zero(nn.Conv3d(widths[-1], latent, 1))]
        self.network = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B 1 N N N"]) -> Float[Tensor, "B D n n n"]:
        return self.linear(to_blocks(x, self.downsample)) + self.network(to_blocks(x, self.patch))


class VoxelDecoder(nn.Module):
    """Latents → cubes, the mirror of `VoxelEncoder` (same arguments); the output is not bounded."""

    def __init__(self, size: int, widths: Sequence[int], *, blocks: int, latent: int, patch: int) -> None:
        super().__init__()
        self.patch, self.downsample = patch, patch << (len(widths) - 1)
        self.linear = nn.Conv3d(latent, self.downsample**3, 1)
        layers: list[nn.Module] = [
            nn.Conv3d(latent, widths[-1], 3, padding=1),
            Place(widths[-1], size // self.downsample),
        ]
        layers += [VoxelBlock(widths[-1]) for _ in range(blocks)]
        for coarser, width in itertools.pairwise(reversed(widths)):
            layers += [nn.ConvTranspose3d(coarser, width, 2, stride=2), *(VoxelBlock(width) for _ in range(blocks))]
        self.last = begin_zero(nn.Conv3d(widths[0], patch**3, 3, padding=1))
        self.network = nn.Sequential(*layers, norm(widths[0]), nn.SiLU())

    def forward(self, latents: Float[Tensor, "B D h w d"]) -> Float[Tensor, "B 1 H W Z"]:
        coarse = from_blocks(self.linear(latents), self.downsample)
        return coarse + from_blocks(self.last(self.network(latents)), self.patch)


@torch.no_grad()
def begin_principal(encoder: VoxelEncoder, decoder: VoxelDecoder, x: Float[Tensor, "B 1 N N N"], *, even: bool) -> None:
    """Let both begin as the best linear code of single blocks: their principal components. `even`: each scaled to unit spread;
    otherwise all alike, which keeps distances those of cells."""
    inward, outward = encoder.linear, decoder.linear
    assert inward.bias is not None and outward.bias is not None
    vectors = to_blocks(x.float(), encoder.downsample).flatten(2).transpose(1, 2).flatten(0, 1)
    centre, axes, spread = principal_axes(vectors, outward.in_channels)
    kept = len(axes)
    scale = spread if even else spread[:1].expand(kept)
    for layer in (inward, outward):
        nn.init.zeros_(layer.weight)
    inward.weight[:kept, :, 0, 0, 0] = axes / scale[:, None]
    inward.bias[:kept] = -(axes @ centre) / scale
    inward.bias[kept:] = 0
    outward.weight[:, :kept, 0, 0, 0] = axes.T * scale
    outward.bias.copy_(centre)
