"""A small convolutional picture autoencoder: the encoder and decoder around a quantiser.

The shape of VQ-GAN's networks (Esser, Rombach and Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis",
section 3.1): pre-activation residual blocks with GroupNorm and SiLU, space-to-depth resampling between
levels, optional self-attention at the coarsest level. The first and last layers work on patches (space to depth), which
keeps the full-resolution convolutions, the dearest ones, out of a small model.

Letters in shapes: B batch, C channels, H rows, W columns, D latent channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm import saved


def norm(channels: int) -> nn.GroupNorm:
    # Sixteen channels a group where that divides; one group otherwise (tiny test models).
    return nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels, eps=1e-6)


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Zero weights: a residual branch that begins as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the width kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = norm(channels)
        self.conv2 = zero(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class SeparableBlock(nn.Module):
    """x + narrow(silu(widen(depthwise(norm(x))))): a 5×5 depthwise convolution, then a pointwise network three times as
    wide (the block of Liu et al. 2022, "A ConvNet for the 2020s"). A third of a residual block's cost at equal width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.widen = nn.Conv2d(channels, 3 * channels, 1)
        self.narrow = zero(nn.Conv2d(3 * channels, channels, 1))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x + self.narrow(F.silu(self.widen(self.depthwise(self.norm(x)))))


class SpatialAttention(nn.Module):
    """Self-attention over all positions of a feature map, as a residual."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        batch, channels, rows, columns = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, rows * columns)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, channels, rows, columns)
        return x + self.out(h)


def principal_components(
    x: Float[Tensor, "B C H W"], side: int, most: int
) -> tuple[Float[Tensor, " P"], Float[Tensor, "K P"], Float[Tensor, " K"]]:
    """Of squares of side×side pixels as vectors (P = C·side²): their mean, the K = min(most, P) axes of largest spread, and the
    deviation along each."""
    return principal_axes(F.pixel_unshuffle(x.float(), side).permute(0, 2, 3, 1).flatten(0, 2), most)


def principal_axes(
    vectors: Float[Tensor, "n P"], most: int
) -> tuple[Float[Tensor, " P"], Float[Tensor, "K P"], Float[Tensor, " K"]]:
    """Of vectors: their mean, the K = min(most, P) axes of largest spread, and the deviation along each."""
    kept = min(most, vectors.shape[1])
    centre = vectors.mean(0)
    variance, axes = torch.linalg.eigh((vectors - centre).T @ (vectors - centre) / len(vectors))
    return centre, axes.flip(1)[:, :kept].T, variance.flip(0)[:kept].clamp_min(1e-8).sqrt()


@torch.no_grad()
def begin_linear(encoder: Encoder, decoder: Decoder, x: Float[Tensor, "B C H W"], side: int) -> None:
    """Let an encoder of Gaussian latents and its decoder begin as the best linear code of squares of side×side pixels: their
    principal components, each scaled to unit variance, which is also what the divergence asks for."""
    inward, outward = encoder.linear[1], decoder.linear[0]
    assert isinstance(inward, nn.Conv2d) and isinstance(outward, nn.Conv2d)
    assert inward.bias is not None and outward.bias is not None
    latent = outward.in_channels
    centre, axes, spread = principal_components(x, side, latent)
    kept = len(axes)
    for values in (inward.weight, inward.bias, outward.weight, outward.bias):
        nn.init.zeros_(values)
    inward.weight[:kept, :, 0, 0] = axes / spread[:, None]
    inward.bias[:kept] = -(axes @ centre) / spread
    # a deviation that costs little of a picture, whatever the component's share in it
    inward.bias[latent : latent + kept] = 2 * torch.log(0.05 / spread).clamp(max=0)
    outward.weight[:, :kept, 0, 0] = axes.T * spread
    outward.bias.copy_(centre)


@torch.no_grad()
def begin_principal(encoder: Encoder, decoder: Decoder, x: Float[Tensor, "B C H W"], side: int, *, even: bool) -> None:
    """Let an encoder and its decoder begin as the best linear code of squares of side×side pixels: their principal components.
    `even`: each scaled to unit spread; otherwise all alike, which keeps distances those of pixels."""
    inward, outward = encoder.linear[1], decoder.linear[0]
    assert isinstance(inward, nn.Conv2d) and isinstance(outward, nn.Conv2d)
    assert inward.bias is not None and outward.bias is not None
    centre, axes, spread = principal_components(x, side, outward.in_channels)
    kept = len(axes)
    scale = spread if even else spread[:1].expand(kept)
    for layer in (inward, outward):
        nn.init.zeros_(layer.weight)
    inward.weight[:kept, :, 0, 0] = axes / scale[:, None]
    inward.bias[:kept] = -(axes @ centre) / scale
    inward.bias[kept:] = 0
    outward.weight[:, :kept, 0, 0] = axes.T * scale
    outward.bias.copy_(centre)


BLOCKS = {"residual": ResidualBlock, "separable": SeparableBlock}
BlockName = Literal["residual", "separable"]
MAX_SIDE_TOKENS = 256
"""Largest extent of a grid that the vocabulary's size controls can state."""


def check_shape(c: Mapping[str, Any]) -> None:
    """Raises `ValueError` for settings of a tokenizer (`ImageVQ`, `ImageVAE`, `ImageSoftVQ`) that are no sizes, or do not fit
    each other."""
    for name in (
        "size", "downsample", "patch", "channels", "blocks", "decoder_channels", "decoder_blocks", "attention_heads"
    ):  # fmt: skip
        saved.whole_number(name, c[name])
    saved.whole_numbers("multipliers", c["multipliers"])
    if c["downsample"] not in (4, 8, 16):
        raise ValueError(f"downsample must be 4, 8 or 16, got {c['downsample']}")
    if c["patch"] not in (1, 2, 4):
        raise ValueError(f"patch must be 1, 2 or 4, got {c['patch']}")
    largest = MAX_SIDE_TOKENS * c["downsample"]
    if c["size"] < c["downsample"] or c["size"] % c["downsample"] or c["size"] > largest:
        raise ValueError(f"size must be a multiple of {c['downsample']} up to {largest}, got {c['size']}")
    levels = (c["downsample"] // c["patch"]).bit_length()
    if len(c["multipliers"]) != levels:
        raise ValueError(
            f"downsample {c['downsample']} after patches of {c['patch']} has {levels} levels, "
            f"got {len(c['multipliers'])} multipliers: give one a level, finest first"
        )
    widths = [w * m for w in (c["channels"], c["decoder_channels"]) for m in c["multipliers"]]
    if min(widths) < 1 or max(widths) > 4096 or not 1 <= c["blocks"] <= 64 or not 1 <= c["decoder_blocks"] <= 64:
        raise ValueError(
            f"widths must be in 1..4096 and blocks in 1..64, got {widths}, {c['blocks']} and {c['decoder_blocks']}"
        )
    if not isinstance(c["block"], str) or c["block"] not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got '{c['block']}'")
    heads = c["attention_heads"]
    if heads < 0 or (heads and any(w * c["multipliers"][-1] % heads for w in (c["channels"], c["decoder_channels"]))):
        raise ValueError(f"attention_heads must divide the coarsest width, got {heads}")


Mixer = Callable[[int], nn.Module]


def _stage(block: BlockName, channels: int, blocks: int, attention_heads: int, mixer: Mixer | None) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers.append(BLOCKS[block](channels))
        if mixer is not None:
            layers.append(mixer(channels))
        if attention_heads:
            layers.append(SpatialAttention(channels, attention_heads))
    return layers


class Encoder(nn.Module):
    """Pictures → latents; each side shrinks by `patch · 2^(len(widths) − 1)`, the downsampling.

    The result is a linear map of each square of pixels plus a network whose last layer begins at zero: training starts
    from a patch code that `ImageVQ.warm_start` computes in closed form, and learns what context adds to it.

    Args:
        widths: channels of each level, finest first.
        blocks: blocks a level, `block` of which kind (`residual` or `separable`).
        latent: D, channels of the result.
        patch: side of the pixel squares that the first layer of the network reads as one position.
        attention_heads: heads of self-attention after each block of the coarsest level; 0 = none.
        colours: numbers of a pixel; a clip has those of several frames (`mm.video_autoencoder`).
        mixer: makes what follows each block, of its width.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        blocks: int,
        latent: int,
        patch: int,
        attention_heads: int,
        block: BlockName = "residual",
        colours: int = 3,
        mixer: Mixer | None = None,
    ) -> None:
        super().__init__()
        downsample = patch << (len(widths) - 1)
        self.linear = nn.Sequential(nn.PixelUnshuffle(downsample), nn.Conv2d(colours * downsample**2, latent, 1))
        layers: list[nn.Module] = [nn.PixelUnshuffle(patch), nn.Conv2d(colours * patch**2, widths[0], 3, padding=1)]
        for finer, width in itertools.pairwise(widths):
            layers += _stage(block, finer, blocks, 0, mixer)
            layers.append(nn.Conv2d(finer, width, 2, stride=2))
        layers += _stage(block, widths[-1], blocks, attention_heads, mixer)
        layers += [norm(widths[-1]), nn.SiLU(), zero(nn.Conv2d(widths[-1], latent, 1))]
        self.network = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        return self.linear(x) + self.network(x)


class Decoder(nn.Module):
    """Latents → pictures, the mirror of `Encoder` (same arguments); the output is not bounded."""

    def __init__(
        self,
        widths: Sequence[int],
        *,
        blocks: int,
        latent: int,
        patch: int,
        attention_heads: int,
        block: BlockName = "residual",
        colours: int = 3,
        mixer: Mixer | None = None,
    ) -> None:
        super().__init__()
        downsample = patch << (len(widths) - 1)
        self.linear = nn.Sequential(nn.Conv2d(latent, colours * downsample**2, 1), nn.PixelShuffle(downsample))
        layers: list[nn.Module] = [nn.Conv2d(latent, widths[-1], 3, padding=1)]
        layers += _stage(block, widths[-1], blocks, attention_heads, mixer)
        for coarser, width in itertools.pairwise(reversed(widths)):
            # The mirror of the strided layer: nothing is spent on neighbours, which the blocks see to.
            layers += [nn.Conv2d(coarser, 4 * width, 1), nn.PixelShuffle(2)]
            layers += _stage(block, width, blocks, 0, mixer)
        last = zero(nn.Conv2d(widths[0], colours * patch**2, 3, padding=1))
        layers += [norm(widths[0]), nn.SiLU(), last, nn.PixelShuffle(patch)]
        self.network = nn.Sequential(*layers)

    @property
    def last(self) -> nn.Conv2d:
        """The network's output layer (a property: registered twice, its weights would be saved twice)."""
        return cast(nn.Conv2d, self.network[-2])

    def forward(self, latents: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.linear(latents) + self.network(latents)
