"""Networks of the speech tokenizers: log-mel front, ConvNeXt blocks over time, and a head that makes sound by inverse STFT.

A sound of T · hop · stride samples has T latents; every layer looks a fixed distance to either side, so that a long sound can be
worked on in pieces (`in_pieces`) with the result of the whole.

Sources: Vocos (Siuzdak 2023, arXiv 2306.00814) for the head and the blocks on frames at one rate, ConvNeXt (Liu et al. 2022)
for the block.

Letters in shapes: B batch, S samples, F frames of the STFT, M mel bins, T latents, C channels of a network, D of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

FLOOR = 1e-2
"""Magnitudes below are silence; a sine of full scale has n_fft / 4 (256 where there are 1024), so this is 88 dB below."""
KERNEL = 7
"""Frames that a depthwise convolution reads."""
LARGEST_LOG = 6.0
"""Bound of the head's log-magnitudes: e⁶ = 403, more than a sine of full scale has."""


# --- spectra --------------------------------------------------------------------------------------------------------


def window(n_fft: int) -> Float[Tensor, " n_fft"]:
    """Periodic Hann window."""
    return torch.hann_window(n_fft)


def frames(x: Float[Tensor, "B S"], n_fft: int, hop: int) -> Float[Tensor, "B F n_fft"]:
    """Overlapping frames, S / hop of them: the first and last lap over the ends, where there are zeros."""
    side = (n_fft - hop) // 2
    return F.pad(x, (side, n_fft - hop - side)).unfold(1, n_fft, hop)


def overlap_add(x: Float[Tensor, "B F n_fft"], hop: int) -> Float[Tensor, "B S"]:
    """The transpose of `frames`. `hop` divides n_fft."""
    batch, count, n_fft = x.shape
    parts = n_fft // hop
    out = x.new_zeros(batch, count + parts - 1, hop)
    for k, part in enumerate(x.reshape(batch, count, parts, hop).unbind(2)):
        out = out + F.pad(part, (0, 0, k, parts - 1 - k))
    side = (n_fft - hop) // 2
    return out.reshape(batch, -1)[:, side : side + count * hop]


def mel_filters(rate: int, n_fft: int, mels: int) -> Float[Tensor, "bins mels"]:
    """Triangles of equal height on the mel scale (HTK) from 0 to half the rate."""
    import torchaudio

    return torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, rate / 2, mels, rate)


class LogMel(nn.Module):
    """Natural logarithm of the mel spectrum of magnitudes, one frame every `hop` samples."""

    window: Tensor
    filters: Tensor

    def __init__(self, rate: int = 16_000, n_fft: int = 1024, hop: int = 256, mels: int = 80) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", window(n_fft), persistent=False)
        self.register_buffer("filters", mel_filters(rate, n_fft, mels), persistent=False)

    def forward(self, x: Float[Tensor, "B S"]) -> Float[Tensor, "B F M"]:
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfft(frames(x.float(), self.n_fft, self.hop) * self.window.float())
            magnitude = torch.view_as_real(spectrum).square().sum(-1).add(1e-12).sqrt()
            return (magnitude @ self.filters.float()).clamp_min(FLOOR).log()


class SpectralHead(nn.Module):
    """Channels → magnitude and phase of every bin → sound, by inverse STFT (Vocos, section 3.2)."""

    window: Tensor

    def __init__(self, width: int, n_fft: int = 1024, hop: int = 256) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.project = nn.Linear(width, n_fft + 2)
        self.register_buffer("window", window(n_fft), persistent=False)

    def forward(self, h: Float[Tensor, "B F C"]) -> Float[Tensor, "B S"]:
        with torch.autocast(h.device.type, enabled=False):
            log_magnitude, phase = F.linear(h.float(), self.project.weight.float(), self.project.bias.float()).chunk(
                2, dim=-1
            )
            magnitude = log_magnitude.clamp(max=LARGEST_LOG).exp()
            spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
            w = self.window.float()
            made = overlap_add(torch.fft.irfft(spectrum, n=self.n_fft) * w, self.hop)
            weight = overlap_add(w.square().expand(1, h.shape[1], -1), self.hop)
            return made / weight.clamp_min(1e-6)


# --- networks -------------------------------------------------------------------------------------------------------


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a two-layer network at each frame, added to the input."""

    def __init__(self, width: int, expansion: int = 3, scale: float = 0.1) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.inward = nn.Linear(width, expansion * width)
        self.outward = nn.Linear(expansion * width, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Float[Tensor, "B F C"]) -> Float[Tensor, "B F C"]:
        h = self.norm(self.depthwise(x.transpose(1, 2)).transpose(1, 2))
        return x + self.scale * self.outward(F.gelu(self.inward(h)))


class Frames(nn.Module):
    """A convolution over `KERNEL` frames, from one width to another."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, KERNEL, padding=KERNEL // 2)

    def forward(self, x: Float[Tensor, "B F inputs"]) -> Float[Tensor, "B F outputs"]:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Join(nn.Module):
    """Every `stride` frames become one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width * stride, width)

    def forward(self, x: Float[Tensor, "B F C"]) -> Float[Tensor, "B G C"]:
        return self.linear(self.norm(x).reshape(len(x), -1, x.shape[-1] * self.stride))


class Part(nn.Module):
    """Every frame becomes `stride` of them."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width * stride)

    def forward(self, x: Float[Tensor, "B G C"]) -> Float[Tensor, "B F C"]:
        return self.linear(self.norm(x)).reshape(len(x), -1, x.shape[-1])


def _blocks(width: int, count: int, expansion: int) -> list[nn.Module]:
    return [ConvNeXtBlock(width, expansion) for _ in range(count)]


class SpeechEncoder(nn.Module):
    """Log-mel frames → latents.

    Args:
        mels: M.
        width: C.
        blocks: blocks at each rate, that of the STFT first, then after each stride; one more entry than `strides`.
        strides: frames that are joined, one after the other.
        latent: D.
        expansion: hidden width of a block in units of `width`.
    """

    def __init__(
        self, mels: int, width: int, blocks: Sequence[int], strides: Sequence[int], latent: int, expansion: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [Frames(mels, width), *_blocks(width, blocks[0], expansion)]
        for stride, count in zip(strides, blocks[1:], strict=True):
            layers += [Join(width, stride), *_blocks(width, count, expansion)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, latent)

    def forward(self, mel: Float[Tensor, "B F M"]) -> Float[Tensor, "B T D"]:
        return self.last(self.norm(self.layers((mel + 1.0) / 3.0)))  # about unit spread


class SpeechDecoder(nn.Module):
    """Latents → features of the frames of an STFT → sound, and the log-mel frames where `mels` is given.

    Args:
        latent, width, expansion: as in `SpeechEncoder`.
        blocks: blocks at each rate, that of the latents first.
        strides: frames that one becomes, in this order.
        n_fft, hop: of the inverse STFT.
        mels: bins of a second, linear head; 0 = none.
    """

    def __init__(
        self,
        latent: int,
        width: int,
        blocks: Sequence[int],
        strides: Sequence[int],
        expansion: int,
        n_fft: int,
        hop: int,
        mels: int = 0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [Frames(latent, width), *_blocks(width, blocks[0], expansion)]
        for stride, count in zip(strides, blocks[1:], strict=True):
            layers += [Part(width, stride), *_blocks(width, count, expansion)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = SpectralHead(width, n_fft, hop)
        self.mel = nn.Linear(width, mels) if mels else None

    def features(self, z: Float[Tensor, "B T D"]) -> Float[Tensor, "B F C"]:
        return self.norm(self.layers(z))

    def forward(self, z: Float[Tensor, "B T D"]) -> Float[Tensor, "B S"]:
        return self.head(self.features(z))


def reach(blocks: Sequence[int], strides: Sequence[int], n_fft: int, hop: int) -> int:
    """Latents on either side that one latent of an encoder (or a frame's samples of a decoder) can depend on, at the most.

    `blocks` and `strides` from the rate of the STFT down to that of the latents."""
    side = KERNEL // 2
    total, step = math.ceil(n_fft / hop), 1
    for level, count in enumerate(blocks):
        total += step * side * (count + 1)  # one more for the convolution that is not in a block
        step *= strides[level] if level < len(strides) else 1
    return math.ceil(total / step) + 1


def in_pieces(
    work: Callable[[Tensor], Tensor], x: Shaped[Tensor, "B N ..."], *, core: int, context: int, unit: int, made: int
) -> Tensor:
    """`work` on pieces of a long input, as on the whole: each piece has `core` steps and up to `context` more to either side,
    whose output is dropped.

    Args:
        unit: entries of the input's second axis a step.
        made: entries of the output's second axis a step.
    """
    steps = x.shape[1] // unit
    if steps <= core + 2 * context:
        return work(x)
    out = []
    for start in range(0, steps, core):
        stop = min(start + core, steps)
        low, high = max(0, start - context), min(steps, stop + context)
        part = work(x[:, low * unit : high * unit])
        out.append(part[:, (start - low) * made : (stop - low) * made])
    return torch.cat(out, dim=1)


# --- sound without a trained network --------------------------------------------------------------------------------


def griffin_lim(
    mel: Float[Tensor, "B F M"], rate: int, n_fft: int, hop: int, steps: int = 32, momentum: float = 0.99
) -> Float[Tensor, "B S"]:
    """Sound of log-mel frames: magnitudes by the filters' pseudo-inverse, phases found by going back and forth between STFT
    and sound (Griffin and Lim 1984, with the momentum of Perraudin et al. 2013). The same every time."""
    inverse = torch.linalg.pinv(mel_filters(rate, n_fft, mel.shape[-1]).double()).float().to(mel.device)
    magnitude = (mel.float().exp() @ inverse).clamp_min(0.0)
    w = window(n_fft).to(mel.device)
    weight = overlap_add(w.square().expand(1, mel.shape[1], -1), hop).clamp_min(1e-6)
    noise = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0)).to(mel.device)
    angles = torch.polar(torch.ones_like(magnitude), 2 * math.pi * noise)
    before = torch.zeros_like(angles)
    for _ in range(steps):
        sound = overlap_add(torch.fft.irfft(magnitude * angles, n=n_fft) * w, hop) / weight
        again = torch.fft.rfft(frames(sound, n_fft, hop) * w)
        angles = again - before * (momentum / (1 + momentum))
        angles = angles / angles.abs().clamp_min(1e-8)
        before = again
    return overlap_add(torch.fft.irfft(magnitude * angles, n=n_fft) * w, hop) / weight
