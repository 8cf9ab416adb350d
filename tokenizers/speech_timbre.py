"""Who speaks, as one vector: log-mel frames, a few convolutions, the average over time (Mega-TTS, Jiang et al. 2023,
arXiv 2306.03509).

It stands in the context of what is generated, taken from another clip of the same speaker, so that it can't say what is said. It
is trained to tell speakers apart: `mm fit -c configs/tokenizers/speech_timbre.yaml`. Nothing makes sound of it again.

Letters in shapes: B batch, F frames of the spectrum, M mel bins, D width of the vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mm import saved
from mm.interfaces import Encoded, Spec
from mm.speech import FLOOR, LogMel, SpeechEncoder
from mm.speech_reader import HOP, N_FFT, RATE, TimbreReader

MAX_SECONDS = 30
"""Of a longer sound, the beginning is read."""
NARROW = 4000.0
"""Hertz above which a sound of a low rate has nothing."""


class SpeechTimbre(TimbreReader):
    """One vector a sound, of length √D: its numbers are of the size that a network likes to read.

    Args:
        mels: M.
        width: channels of the convolutions.
        dim: D.
        blocks: ConvNeXt blocks at 62.5 frames a second, and at half as many.
        pretrained: a directory that `save` wrote. What it says replaces every other argument.

    Raises:
        ValueError: sizes out of range, or a saved tokenizer that is missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.speech_timbre", "a speech timbre"

    def __init__(
        self,
        mels: int = 80,
        width: int = 96,
        dim: int = 48,
        blocks: Sequence[int] = (1, 2),
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self._made(pretrained, dict(mels=mels, width=width, dim=dim, blocks=saved.as_list(blocks)))

    def _build(self, c: dict[str, Any]) -> None:
        saved.whole_number("mels", c["mels"], 1, 512)
        saved.whole_number("width", c["width"], 1, 4096)
        saved.whole_number("dim", c["dim"], 2, 4096)
        saved.whole_numbers("blocks", c["blocks"])
        if len(c["blocks"]) != 2 or not 0 <= min(c["blocks"]) <= max(c["blocks"]) <= 64:
            raise ValueError(f"blocks must be two numbers in 0..64, got {c['blocks']}")
        self.config = c
        self.mel = LogMel(RATE, N_FFT, HOP, c["mels"])
        self.encoder = SpeechEncoder(c["mels"], c["width"], c["blocks"], [2], c["dim"], 2)

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="continuous", dim=self.config["dim"], max_grid=(1,), spatial=False, fingerprint=self.fingerprint
        )

    def vectors(self, mel: Float[Tensor, "B F M"]) -> Float[Tensor, "B D"]:
        """Of spectra with an even number of frames."""
        pooled = self.encoder(mel.to(self.encoder.last.weight.dtype)).mean(1)
        return F.normalize(pooled, dim=-1) * math.sqrt(self.config["dim"])

    def narrowed(self, mel: Float[Tensor, "B F M"]) -> Float[Tensor, "B F M"]:
        """As of sounds at 8 kHz: silent above `NARROW`."""
        # bin k has its centre at (k + 1) / (M + 1) of the mel scale (HTK)
        top, edge = (2595 * math.log10(1 + hertz / 700) for hertz in (RATE / 2, NARROW))
        count = int(edge / top * (mel.shape[-1] + 1)) - 1
        return torch.cat((mel[..., :count], torch.full_like(mel[..., count:], math.log(FLOOR))), dim=-1)

    def _read(self, samples: Float[Tensor, " S"]) -> Encoded:
        samples = samples[: MAX_SECONDS * RATE]
        x = self.mel(F.pad(samples, (0, -len(samples) % (2 * HOP)))[None])
        return Encoded(grid=(1,), latents=self.vectors(x).float().cpu())

    @classmethod
    def tiny(cls) -> SpeechTimbre:
        """A small random one, for tests."""
        return cls(mels=16, width=8, dim=4, blocks=(1, 1)).eval()
