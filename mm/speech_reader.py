"""What tokenizers share that read a sound and keep one side of it (who speaks, or how): they make no sound again.

A sound is brought to `RATE` and filled up with silence to a whole number of frames. Settings and weights are saved and found
again as `mm.saved` has it; a tokenizer file adds its networks.

Letters in shapes: B batch, S samples, F frames of the spectrum, M mel bins, L the lowest of them, D width of a vector.
"""

from __future__ import annotations

import abc

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mm.audio import Audio, Samples, given_samples
from mm.interfaces import Decoded, Encoded, ModalityTokenizer
from mm.saved import FromSettings
from mm.speech import LogMel
from mm.trainable import Reconstruction

RATE, HOP, N_FFT = 16_000, 256, 1024
"""Samples a second, between two frames of the spectrum, and under one."""
NOTHING = Audio(np.zeros(0, dtype=np.float32), RATE)


class SpeechReader(FromSettings, ModalityTokenizer):
    """A subclass makes the networks in `_build`."""

    decodes = False
    mel: LogMel

    @abc.abstractmethod
    def _read(self, samples: Float[Tensor, " S"]) -> Encoded:
        """Tokens of a sound at `RATE`, of one sample or more."""

    # --- the plug-in contract -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, raw: Audio) -> Encoded:
        """Tokens of a sound of any rate. Raises `ValueError` for what is no sound, empty, or too long."""
        samples = torch.tensor(given_samples(raw, RATE), device=self.mel.window.device)
        training = self.training
        self.eval()
        try:
            return self._read(samples)
        finally:
            if training:
                self.train()

    def decode(self, encoded: Encoded) -> Decoded:
        """No sound: the tokens are one side of it only."""
        return Decoded(value=NOTHING, valid=False, reason="this tokenizer keeps one side of a sound and can't make any")

    @classmethod
    def examples(cls) -> list[Audio]:
        """Tones of several rates and lengths, silence, and next to nothing."""
        time: Samples = (np.arange(RATE) / RATE).astype(np.float32)
        sweep: Samples = (0.5 * np.sin(2 * np.pi * (150 + 400 * time) * time)).astype(np.float32)
        tone: Samples = (np.sin(2 * np.pi * 440 * time[: RATE // 3]) * time[: RATE // 3]).astype(np.float32)
        return [
            Audio(sweep, RATE),
            Audio(tone[::2], RATE // 2),
            Audio(np.zeros(RATE // 2, dtype=np.float32), RATE),
            Audio(time[:1], RATE),
        ]


class TimbreReader(SpeechReader):
    """Who speaks, as a vector: what `mm.training_voices` needs to train it."""

    @abc.abstractmethod
    def vectors(self, mel: Float[Tensor, "B F M"]) -> Float[Tensor, "B D"]:
        """Of spectra with an even number of frames."""

    @abc.abstractmethod
    def narrowed(self, mel: Float[Tensor, "B F M"]) -> Float[Tensor, "B F M"]:
        """As of sounds at 8 kHz."""


class ProsodyReader(SpeechReader):
    """How it is spoken, as codes: what `mm.training_voices` needs to train it."""

    @abc.abstractmethod
    def contours(self, x: Float[Tensor, "B S"], count: int | None = None) -> Float[Tensor, "B F L"]:
        """What is encoded of sounds; levels are measured on their first `count` samples."""

    @abc.abstractmethod
    def reconstruct(self, contours: Float[Tensor, "B F L"]) -> Reconstruction:
        """There and back, with gradients."""

    @abc.abstractmethod
    def warm_start(self, contours: Float[Tensor, "B F L"]) -> None:
        """Fit the codebook to these."""
