"""Sounds ↔ codes by EnCodec (Défossez et al. 2022, arXiv 2210.13438): a convolutional autoencoder with residual codebooks.

Published mono checkpoints in the format of `transformers`: facebook/encodec_24khz (75 frames a second, 32 codebooks of 1024;
VALL-E uses 8 of them) and facebook/encodec_32khz (50 frames, 4 of 2048; MusicGen). The stereo one of 48 kHz gives each second a
loudness that its codes do not hold, and is refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.audio_codec_adapter import MAX_CODEBOOKS, AudioCodecAdapter, Facts


class AudioEncodec(AudioCodecAdapter):
    """`transformers.EncodecModel` as a tokenizer. By default 8 codebooks are used, or all where there are fewer; any number
    may be: the network encodes at the next bandwidth that it offers, and the first codes are kept."""

    model_type = "encodec"
    fields = {
        "target_bandwidths": 0, "sampling_rate": 768_000, "audio_channels": 0, "normalize": 0, "chunk_length_s": 0,
        "overlap": 0, "hidden_size": 0, "num_filters": 0, "num_residual_layers": 4, "upsampling_ratios": 0, "norm_type": 0,
        "kernel_size": 0, "last_kernel_size": 0, "residual_kernel_size": 0, "dilation_growth_rate": 8, "use_causal_conv": 0,
        "pad_mode": 0, "compress": 0, "num_lstm_layers": 16, "trim_right_ratio": 0, "codebook_size": 0, "codebook_dim": 0,
        "use_conv_shortcut": 0,
    }  # fmt: skip
    default_codes = 8

    @staticmethod
    def _build(config: dict[str, Any]) -> torch.nn.Module:
        from transformers import EncodecConfig, EncodecModel

        built = EncodecConfig(**config)
        if built.num_quantizers > MAX_CODEBOOKS:  # it follows from the largest bandwidth, and is not bounded there
            raise ValueError(f"{built.num_quantizers} codebooks, at most {MAX_CODEBOOKS} are read")
        return EncodecModel(built)

    @staticmethod
    def _facts(config: Any) -> Facts:
        if config.normalize or config.chunk_length_s is not None:
            raise ValueError(
                "it encodes in chunks with a loudness each, which codes do not hold (as the 48 kHz checkpoint does); use one "
                "of 24 or 32 kHz"
            )
        return Facts(
            sample_rate=config.sampling_rate,
            hop=config.hop_length,
            codebooks=max(_counts(config).values()),
            vocab_size=config.codebook_size,
            channels=config.audio_channels,
        )

    @classmethod
    def tiny(cls) -> AudioEncodec:
        """A random instance for tests: 8 kHz, 8 samples a frame, 3 of 4 codebooks of 16."""
        config = {
            "sampling_rate": 8000,
            "num_filters": 4,
            "hidden_size": 8,
            "upsampling_ratios": [4, 2],
            "num_lstm_layers": 1,
            "codebook_size": 16,
            "target_bandwidths": [8.0, 16.0],
        }
        network: Any = cls._build(config)
        with (
            torch.no_grad()
        ):  # the class begins with zeros; each codebook gets some of what those before it leave of noise
            rest = network.eval().encoder(torch.randn(1, 1, 2048))
            for number, layer in enumerate(network.quantizer.layers):
                layer.codebook.embed.copy_(rest[0, :, number::16].T)
                rest = rest - layer.decode(layer.encode(rest))
        return cls(network, num_codes=3)

    def codes(self, x: Float[Tensor, "1 1 n"]) -> Int[Tensor, "k T"]:
        enough = [bandwidth for bandwidth, count in _counts(self.network.config).items() if count >= self.num_codes]
        return self.network.encode(x, bandwidth=min(enough)).audio_codes[0, 0]

    def sound(self, codes: Int[Tensor, "K T"]) -> Float[Tensor, " n"]:
        return self.network.decode(codes[None, None], [None]).audio_values[0, 0]

    def codebooks(self) -> list[Tensor]:
        return [layer.codebook.embed for layer in self.network.quantizer.layers]


def _counts(config: Any) -> dict[float, int]:
    """Codebooks used at each bandwidth (kilobits a second)."""
    bits = config.codebook_nbits * config.frame_rate
    return {
        b: min(max(1, math.floor(b * 1000 / bits)), config.num_quantizers) for b in config.target_bandwidths if b > 0
    }
