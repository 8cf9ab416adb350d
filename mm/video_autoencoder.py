"""A small causal autoencoder of clips: the picture networks of `mm.autoencoder`, which read `stride` frames as one, with layers
between that look back in time.

A causal 3-D autoencoder (MAGVIT-v2, Yu et al. 2023, section 3.2) in its factorised form: kernels over rows and columns, then
kernels over time (Tran et al. 2018, "(2+1)D"). The first frame is a step of its own, so that a picture is a clip of one frame;
each step after it stands for `stride` frames. Nothing at a step depends on later ones: norms are those of single steps, and
`CausalTime` sees its step and the two before it. So a clip can go through in pieces, given what those layers keep of the piece
before (`Past`).

Letters in shapes: B clips, T frames, S steps (1 + ⌈(T − 1) / stride⌉), F frames a step, C channels, H rows, W columns, D latent
channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.autoencoder import BlockName, Decoder, Encoder, norm, zero

REACH = 3
"""Steps that a layer in time sees, its own among them."""
Past = dict[nn.Module, Tensor]
"""What each layer in time keeps of the steps before; empty where a clip begins."""


def steps_of(frames: int, stride: int) -> int:
    """S, of T frames."""
    return 1 + -(-(frames - 1) // stride)


def to_steps(x: Float[Tensor, "B T 3 H W"], stride: int, begins: bool = True) -> Float[Tensor, "B S FC H W"]:
    """Frames joined to steps, of F = `stride` frames one above another as channels. Where a clip begins its first frame fills the
    first step; the last frame is repeated where the last step needs more."""
    if begins:
        x = torch.cat([x[:, :1].expand(-1, stride - 1, -1, -1, -1), x], 1)
    if missing := -x.shape[1] % stride:
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
    return x.unflatten(1, (-1, stride)).flatten(2, 3)


def to_frames(x: Float[Tensor, "B S FC H W"], stride: int, begins: bool = True) -> Float[Tensor, "B T 3 H W"]:
    """The inverse of `to_steps`: 1 + (S − 1) · stride frames, or, where the clip began before, S · stride."""
    frames = x.unflatten(2, (stride, -1)).flatten(1, 2)
    return frames[:, stride - 1 :] if begins else frames


class CausalTime(nn.Module):
    """x + out(silu(mix(what the norm of this step and the two before it has at the same place))); zeros before the first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.mix = nn.Conv2d(REACH * channels, channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "BS C H W"], steps: int, past: Past) -> Float[Tensor, "BS C H W"]:
        """`past` is read, and then holds what the next steps need."""
        h = F.silu(self.norm(x)).unflatten(0, (-1, steps))
        before = past.get(self)
        if before is None:
            before = h.new_zeros(len(h), REACH - 1, *h.shape[2:])
        h = torch.cat([before, h], 1)
        past[self] = h[:, -(REACH - 1) :]
        seen = torch.cat([h[:, k : k + steps] for k in range(REACH)], 2).flatten(0, 1)
        return x + self.out(F.silu(self.mix(seen)))


def _through(network: nn.Sequential, x: Float[Tensor, "BS ..."], steps: int, past: Past) -> Tensor:
    for layer in network:
        x = layer(x, steps, past) if isinstance(layer, CausalTime) else layer(x)
    return x


class VideoEncoder(Encoder):
    """Steps of frames → latents. Arguments as of `Encoder`, and `stride`."""

    def __init__(
        self, widths: Sequence[int], *, stride: int, blocks: int, latent: int, patch: int, block: BlockName
    ) -> None:
        shared = {"patch": patch, "attention_heads": 0, "block": block}
        super().__init__(widths, blocks=blocks, latent=latent, colours=3 * stride, mixer=CausalTime, **shared)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "B S FC H W"], past: Past | None = None) -> Float[Tensor, "B S D h w"]:
        steps, flat = x.shape[1], x.flatten(0, 1)
        made = self.linear(flat) + _through(self.network, flat, steps, {} if past is None else past)
        return made.unflatten(0, (-1, steps))


class VideoDecoder(Decoder):
    """Latents → steps of frames, the mirror of `VideoEncoder`; the output is not bounded."""

    def __init__(
        self, widths: Sequence[int], *, stride: int, blocks: int, latent: int, patch: int, block: BlockName
    ) -> None:
        shared = {"patch": patch, "attention_heads": 0, "block": block}
        super().__init__(widths, blocks=blocks, latent=latent, colours=3 * stride, mixer=CausalTime, **shared)  # type: ignore[arg-type]

    def forward(self, latents: Float[Tensor, "B S D h w"], past: Past | None = None) -> Float[Tensor, "B S FC H W"]:
        steps, flat = latents.shape[1], latents.flatten(0, 1)
        made = self.linear(flat) + _through(self.network, flat, steps, {} if past is None else past)
        return made.unflatten(0, (-1, steps))
