"""Sounds ↔ codes by Mimi (Défossez et al. 2024, arXiv 2410.00037), the codec of Moshi and CSM: one codebook that was taught what
is said, and residual codebooks beside it.

Published in the format of `transformers`: kyutai/mimi (24 kHz, 12.5 frames a second, 32 codebooks of 2048; Moshi uses 8 of them).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.audio_codec_adapter import MAX_CODEBOOKS, AudioCodecAdapter, Facts

HALVES = {"encoder_seanet": "encoder", "decoder_seanet": "decoder"}
"""What the network calls its convolutions, and what checkpoints do."""


class AudioMimi(AudioCodecAdapter):
    """`transformers.MimiModel` as a tokenizer. By default 8 codebooks are used, or all where there are fewer."""

    model_type = "mimi"
    fields = {
        "sampling_rate": 768_000, "frame_rate": 0, "audio_channels": 0, "hidden_size": 0, "num_filters": 0,
        "num_residual_layers": 4, "upsampling_ratios": 0, "kernel_size": 0, "last_kernel_size": 0, "residual_kernel_size": 0,
        "dilation_growth_rate": 8, "use_causal_conv": 0, "pad_mode": 0, "compress": 0, "trim_right_ratio": 0,
        "codebook_size": 0, "codebook_dim": 0, "num_quantizers": MAX_CODEBOOKS, "use_conv_shortcut": 0,
        "vector_quantization_hidden_dimension": 0, "num_semantic_quantizers": MAX_CODEBOOKS, "upsample_groups": 0,
        "num_hidden_layers": 64, "intermediate_size": 0, "num_attention_heads": 0, "num_key_value_heads": 0, "head_dim": 0,
        "hidden_act": 0, "max_position_embeddings": 0, "norm_eps": 0, "rope_theta": 0, "rope_parameters": 0,
        "sliding_window": 0, "attention_bias": 0,
    }  # fmt: skip
    default_codes = 8

    @staticmethod
    def _build(config: dict[str, Any]) -> torch.nn.Module:
        from transformers import MimiConfig, MimiModel

        return MimiModel(MimiConfig(**config))

    @staticmethod
    def _facts(config: Any) -> Facts:
        ratio = config.encodec_frame_rate / config.frame_rate
        if ratio != config.latent_stride or ratio < 2:  # at 1 the class makes no layer for it, and then calls it
            raise ValueError(f"its frame rate is 1/{ratio:.4g} of its convolutions', expected a whole part")
        hop = config.latent_stride
        for stride in config.upsampling_ratios:
            hop *= stride
        return Facts(
            sample_rate=config.sampling_rate,
            hop=hop,
            codebooks=config.num_quantizers,
            vocab_size=config.codebook_size,
            channels=config.audio_channels,
            least=config.num_semantic_quantizers,
        )

    @classmethod
    def tiny(cls) -> AudioMimi:
        """A random instance for tests: 8 kHz, 16 samples a frame, 3 of 4 codebooks of 16."""
        config = {
            "sampling_rate": 8000,
            "num_filters": 4,
            "hidden_size": 16,
            "upsampling_ratios": [4, 2],
            "codebook_size": 16,
            "codebook_dim": 8,
            "vector_quantization_hidden_dimension": 8,
            "num_quantizers": 4,
            "num_hidden_layers": 1,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "upsample_groups": 16,
            "sliding_window": 4,
        }
        network: Any = cls._build(config)
        for codebook in _codebooks(network):  # the class begins with zeros
            torch.nn.init.normal_(codebook.embed_sum)
            torch.nn.init.uniform_(codebook.cluster_usage, 0.5, 2.0)
        return cls(network, num_codes=3)

    def codes(self, x: Float[Tensor, "1 1 n"]) -> Int[Tensor, "k T"]:
        self._forget()
        return self.network.encode(x, num_quantizers=self.num_codes).audio_codes[0]

    def sound(self, codes: Int[Tensor, "K T"]) -> Float[Tensor, " n"]:
        self._forget()
        return self.network.decode(codes[None]).audio_values[0, 0]

    def codebooks(self) -> list[Tensor]:
        return [codebook.embed_sum for codebook in _codebooks(self.network)]

    @staticmethod
    def published(name: str) -> str:
        half, inner = re.fullmatch(r"(encoder\.|decoder\.|)(.*)", name).groups()  # type: ignore[union-attr]  # any name
        first, rest = inner.split(".", 1)
        return f"{HALVES.get(first, first)}.{rest}" if half else name

    def _forget(self) -> None:
        """The network keeps its codebooks' means, and would not notice when they are loaded, converted or moved."""
        for codebook in _codebooks(self.network):
            codebook._embed = None


def _codebooks(network: Any) -> list[Any]:
    quantizer = network.quantizer
    parts = (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer)
    return [layer.codebook for part in parts for layer in part.layers]
