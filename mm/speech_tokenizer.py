"""What the trained speech tokenizers share: sounds of any rate and length become elements and sound again, in pieces where they
are long; settings and weights are saved and found again. A tokenizer file adds its bottleneck.

A sound is brought to the tokenizer's rate and filled up with silence to a whole number of elements. What is decoded has that
length: T · `samples_per_element` samples.

Letters in shapes: B batch, S samples, F frames, M mel bins, T elements, X content of an element (sub-codes, or a vector).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mm.audio import Audio, given_samples
from mm.interfaces import Decoded, Encoded
from mm.saved import FromSettings
from mm.speech import KERNEL, LogMel, SpeechDecoder, SpeechEncoder, in_pieces, reach
from mm.trainable import TrainableTokenizer

MAX_ELEMENTS = 256
"""Elements that an item of a stream may have; `encode` and `decode` take longer ones."""
PIECE = 512
"""Elements that go through the networks at once."""


class SpeechTokenizer(FromSettings, TrainableTokenizer):
    """Sound ↔ a list of elements. A subclass calls `make_networks` from `_build`."""

    rate: int
    """Samples a second of what is decoded."""
    samples_per_element: int

    # --- what a tokenizer file implements -----------------------------------------------------------------------------

    @abc.abstractmethod
    def elements(self, z: Float[Tensor, "B T D"]) -> Tensor:
        """What `encode` gives, (B, T, X), of the encoder's output."""

    @abc.abstractmethod
    def sound(self, content: Tensor) -> Float[Tensor, "B S"]:
        """The inverse, for (B, T, X)."""

    @abc.abstractmethod
    def _encoded(self, content: Tensor) -> Encoded:
        """One item of (T, X)."""

    @abc.abstractmethod
    def _repaired(self, item: Encoded) -> tuple[Tensor, str]:
        """Content (T, X), T ≥ 1, that can be decoded, and what had to be repaired."""

    # --- networks -----------------------------------------------------------------------------------------------------

    def make_networks(self, c: dict[str, Any], *, hop: int, inward: int, outward: int, mels: int = 0) -> None:
        """Mel front, encoder with `inward` outputs and decoder with `outward` inputs from the shared settings; `mels`: bins
        of the decoder's second head."""
        self.config, self.rate, self.hop, self.n_fft = c, c["rate"], hop, 4 * hop
        self.stride = math.prod(c["strides"])
        self.samples_per_element = self.stride * hop
        self.mel = LogMel(self.rate, self.n_fft, hop, c["mels"])
        self.encoder = SpeechEncoder(c["mels"], c["width"], c["blocks"], c["strides"], inward, c["expansion"])
        self.decoder = SpeechDecoder(
            outward,
            c["decoder_width"],
            c["decoder_blocks"][::-1],
            c["strides"][::-1],
            c["expansion"],
            self.n_fft,
            hop,
            mels,
        )
        # one more convolution at the rate of the elements, the decoder's first
        self.encoder_reach = reach(c["blocks"], c["strides"], self.n_fft, hop)
        self.decoder_reach = reach(c["decoder_blocks"], c["strides"], self.n_fft, hop) + KERNEL // 2

    @property
    def frame_rate(self) -> float:
        """Elements a second."""
        return self.rate / self.samples_per_element

    def analysed(self, x: Float[Tensor, "B S"]) -> tuple[Float[Tensor, "B F M"], Float[Tensor, "B T D"]]:
        """Log-mel frames and the encoder's output; S is a multiple of `samples_per_element`."""
        mel = self.mel(x)
        return mel, self.encoder(mel.to(self._like().dtype))

    # --- the plug-in contract -----------------------------------------------------------------------------------------

    def encode(self, raw: Audio) -> Encoded:
        """Elements of a sound of any rate and of one sample or more. One longer than `MAX_ELEMENTS` elements is encoded as
        well, but is too long for an item of a stream."""
        return self.encode_batch([raw])[0]

    @torch.no_grad()
    def encode_batch(self, raws: Sequence[Audio]) -> list[Encoded]:
        sounds = [self._padded(raw) for raw in raws]
        training = self.training
        self.eval()
        try:
            out: dict[int, Encoded] = {}
            for where in self._batches([len(x) // self.samples_per_element for x in sounds]):
                content = in_pieces(
                    lambda x: self.elements(self.analysed(x)[1]).cpu(),
                    torch.stack([sounds[i] for i in where]).to(self._like().device),
                    core=PIECE,
                    context=self.encoder_reach,
                    unit=self.samples_per_element,
                    made=1,
                )
                out |= {i: self._encoded(one) for i, one in zip(where, content, strict=True)}
        finally:
            if training:
                self.train()
        return [out[i] for i in range(len(sounds))]

    def decode(self, encoded: Encoded) -> Decoded:
        """Sound of T · `samples_per_element` samples, whatever is decoded; what is out of range is brought into it, with
        `valid` off."""
        return self.decode_batch([encoded])[0]

    @torch.no_grad()
    def decode_batch(self, items: Sequence[Encoded]) -> list[Decoded]:
        repaired = [self._repaired(item) for item in items]
        out: dict[int, Decoded] = {}
        for where in self._batches([len(content) for content, _ in repaired]):
            made = in_pieces(
                lambda content: self.sound(content).float().cpu(),
                torch.stack([repaired[i][0] for i in where]).to(self._like().device),
                core=PIECE,
                context=self.decoder_reach,
                unit=1,
                made=self.samples_per_element,
            )
            for i, samples in zip(where, made, strict=True):
                reason = repaired[i][1]
                if not bool(samples.isfinite().all()):
                    samples, reason = (
                        samples.nan_to_num(0.0, 0.0, 0.0),
                        "; ".join(filter(None, (reason, "no finite sound"))),
                    )
                out[i] = Decoded(value=Audio(samples.numpy(), self.rate), valid=not reason, reason=reason)
        return [out[i] for i in range(len(items))]

    # --- training -----------------------------------------------------------------------------------------------------

    def synchronise(self, enabled: bool) -> None:
        """Nothing here is learned but by gradients, unless a subclass says so."""

    def last_layer(self) -> Tensor:
        return self.decoder.head.project.weight

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _like(self) -> Tensor:
        return self.decoder.head.project.weight

    def _padded(self, raw: Any) -> Float[Tensor, " S"]:
        """At the tokenizer's rate, filled up with silence to a whole number of elements."""
        x = torch.from_numpy(np.ascontiguousarray(given_samples(raw, self.rate)))
        return torch.nn.functional.pad(x, (0, -len(x) % self.samples_per_element))

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of equal lengths together, as many at a time as `PIECE` elements allow."""
        places: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            places.setdefault(length, []).append(i)
        out = []
        for length, where in places.items():
            most = max(1, PIECE // length)
            out += [where[n : n + most] for n in range(0, len(where), most)]
        return out
