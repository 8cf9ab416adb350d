"""Sounds ↔ codes by DAC (Kumar et al. 2023, arXiv 2306.06546): an autoencoder with narrow, normalised residual codebooks.

Published checkpoints in the format of `transformers`: descript/dac_16khz, dac_24khz, dac_44khz (50 to 86 frames a second, 9 to 32
codebooks of 1024). Their rates and ratios are not the defaults of the configuration class; the checkpoint's own hold.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.audio_codec_adapter import MAX_CODEBOOKS, AudioCodecAdapter, Facts


class AudioDac(AudioCodecAdapter):
    """`transformers.DacModel` as a tokenizer. By default all codebooks are used.

    Sounds are padded with zeros to whole frames, as the network's feature extractor does. What it decodes is a few samples
    shorter where a ratio is odd; zeros follow, so that a frame has the same length everywhere.
    """

    model_type = "dac"
    fields = {
        "encoder_hidden_size": 0, "downsampling_ratios": 0, "decoder_hidden_size": 0, "n_codebooks": MAX_CODEBOOKS,
        "codebook_size": 0, "codebook_dim": 0, "sampling_rate": 768_000,
    }  # fmt: skip

    @staticmethod
    def _build(config: dict[str, Any]) -> torch.nn.Module:
        from transformers import DacConfig, DacModel

        return DacModel(DacConfig(**config))

    @staticmethod
    def _facts(config: Any) -> Facts:
        return Facts(
            sample_rate=config.sampling_rate,
            hop=config.hop_length,
            codebooks=config.n_codebooks,
            vocab_size=config.codebook_size,
        )

    @classmethod
    def tiny(cls) -> AudioDac:
        """A random instance for tests: 8 kHz, 10 samples a frame (it decodes fewer), 2 of 3 codebooks of 16."""
        config = {
            "sampling_rate": 8000,
            "encoder_hidden_size": 4,
            "decoder_hidden_size": 16,
            "downsampling_ratios": [2, 5],
            "n_codebooks": 3,
            "codebook_size": 16,
            "codebook_dim": 4,
        }
        return cls(cls._build(config), num_codes=2)

    def codes(self, x: Float[Tensor, "1 1 n"]) -> Int[Tensor, "k T"]:
        whole = torch.nn.functional.pad(x, (0, -x.shape[-1] % self.facts.hop))
        return self.network.encode(whole, n_quantizers=self.num_codes).audio_codes[0]

    def sound(self, codes: Int[Tensor, "K T"]) -> Float[Tensor, " n"]:
        return self.network.decode(audio_codes=codes[None]).audio_values[0]

    def codebooks(self) -> list[Tensor]:
        return [quantizer.codebook.weight for quantizer in self.network.quantizer.quantizers]
