"""A network that reads speech: log-mel spectrum → two convolutions (a frame each 40 ms) → blocks of convolution, attention and a
perceptron → characters by CTC, and the weights of integrate-and-fire.

The blocks are a light Conformer (Gulati et al. 2020): one perceptron a block instead of two halves, normalisation over channels
instead of the batch, and no positions in the attention, since the convolutions know what is beside what. Whatever lies behind a
sound in its batch is masked in every layer: a batch gives what each sound gives alone.

Letters in shapes: B batch, S samples, M mel bins, F frames of the spectrum (10 ms), T frames of the encoder, D their width,
V labels.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mm.audio import log_mel
from mm.cif import Predictor
from mm.ctc import LABELS, LabelMeans
from mm.interfaces import ModalityTokenizer
from mm.saved import Fingerprinted

RATE = 16_000
HOP, WINDOW = 160, 512
"""Samples between two frames of the spectrum, and under one."""
STRIDE = 4
"""Frames of the spectrum in one of the encoder."""
FRAME_RATE = RATE / HOP / STRIDE
RANGE = 9.0
"""Log-magnitudes are kept down to this far below the loudest (78 dB)."""
FLOOR = 1e-4
"""Smallest magnitude: a sine of full scale has 128."""
EPS = 1e-5


class CTCEncoder(nn.Module):
    """Frames of width D, logits of their characters, and their weights for integrate-and-fire.

    Args:
        mels: M.
        width: D.
        layers, heads, kernel: blocks, attention heads, and frames that a block's convolution sees.
        dropout: of each part of a block.
    """

    def __init__(
        self, mels: int = 80, width: int = 144, layers: int = 4, heads: int = 4, kernel: int = 15, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.mels = mels
        self.first, self.second = _Halving(mels, width), _Halving(width, width)
        self.blocks = nn.ModuleList(_Block(width, heads, kernel, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.weights, self.labels = Predictor(width), nn.Linear(width, LABELS)

    def features(self, samples: Float[Tensor, " S"]) -> Float[Tensor, "F M"]:
        """Log-mel spectrum of one sound at `RATE`, in −1 … 1: 1 is the loudest of this sound, −1 is 78 dB below it and less. At
        least one frame of the encoder, filled up with zeros."""
        padded = F.pad(samples, (0, max(0, HOP * STRIDE - len(samples))))
        x = log_mel(padded, rate=RATE, bins=self.mels, n_fft=WINDOW, hop=HOP, floor=FLOOR).t()
        return ((x - x.max()) / (RANGE / 2) + 1).clamp(min=-1)

    def forward(
        self, mels: Float[Tensor, "B F M"], lengths: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B T D"], Int[Tensor, " B"]]:
        """Frames, of mean 0 and variance 1 over their channels, and how many each sound has; 0 behind them."""
        x, lengths = self.second(*self.first(mels, lengths))
        real = within(lengths, x.shape[1])
        for block in self.blocks:
            x = block(x, real)
        return self.norm(x) * real[..., None], lengths

    def read(
        self, features: Sequence[Float[Tensor, "_ M"]]
    ) -> tuple[Float[Tensor, "B T D"], Int[Tensor, " B"], Float[Tensor, "B T V"], Float[Tensor, "B T"]]:
        """Of spectra of different lengths: frames, how many, logits of labels, and weights of integrate-and-fire."""
        lengths = torch.tensor([len(x) for x in features], device=features[0].device)
        frames, lengths = self(pad_sequence(list(features), batch_first=True), lengths)
        return frames, lengths, self.labels(frames), self.weights(frames, within(lengths, frames.shape[1]))


def within(lengths: Int[Tensor, " B"], longest: int) -> Bool[Tensor, "B T"]:
    """Which frames there are."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


class _Halving(nn.Module):
    """A convolution over three frames with stride 2."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out, eps=EPS)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = x * within(lengths, x.shape[1])[..., None]
        return F.gelu(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))), (lengths + 1) // 2


class _Block(nn.Module):
    """x + convolution(norm(x)), then + attention(norm(x)), then + perceptron(norm(x))."""

    def __init__(self, width: int, heads: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=EPS) for _ in range(4))
        self.enter, self.leave = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "B T D"], real: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        gated = F.glu(self.enter(self.norms[0](x)), -1) * real[..., None]
        mixed = self.depthwise(gated.transpose(1, 2)).transpose(1, 2)
        x = x + self.dropout(self.leave(F.silu(self.norms[3](mixed))))
        q, k, v = self.qkv(self.norms[1](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        x = x + self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.silu(self.up(self.norms[2](x)))))


class TrainableSpeechEncoder(ModalityTokenizer, Fingerprinted):
    """What `mm.training_ctc` trains: a tokenizer that reads speech with this encoder."""

    encoder: CTCEncoder
    means: LabelMeans
    config: dict[str, Any]
    """At least `width`, and `compress`: ctc, cif or none."""

    @abc.abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the tokenizer into a directory, whole or not at all."""
