"""Pictures ↔ codes by the generation tokenizer of Janus and Janus-Pro (LlamaGen's VQ-16: 8 numbers a code, normalised).

The published quantiser normalises latents and codebook before it compares them (Sun et al. 2024, "Autoregressive Model
Beats Diffusion", section 3.1). The class in `transformers` does so only when it decodes; its `encode` is not used here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mm.vq_adapter import VQAdapter


class ImageJanus(VQAdapter):
    """`transformers.JanusVQVAE` as a tokenizer, encoding as the official one does.

    Args:
        path: folder of the tokenizer or of a whole Janus model (`transformers` format, safetensors), or a `JanusVQVAE`.
        size: side of the square that pictures are fitted to; 0 = what was saved, else the checkpoint's own.
    """

    def __init__(self, path: str | torch.nn.Module, size: int = 0) -> None:
        super().__init__(path, size, build=_build)

    @staticmethod
    def _sizes(config: Any) -> tuple[int, int, int]:
        downsample = 2 ** (len(config.channel_multiplier) - 1)
        return config.num_patches * downsample, downsample, config.num_embeddings

    @classmethod
    def tiny(cls) -> ImageJanus:
        """A random instance for tests: 16×16 pixels, 16 codes."""
        config = {
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 8,
        }
        return cls(_build(config))

    def codes(self, x: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        latents = self.network.quant_conv(self.network.encoder(x)).permute(0, 2, 3, 1)
        codebook = F.normalize(self.network.quantize.embedding.weight, dim=-1)
        # Of unit vectors the nearest is the one with the largest product.
        return (F.normalize(latents, dim=-1) @ codebook.T).argmax(-1)

    def pixels(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        codes = F.normalize(self.network.quantize.embedding(ids), dim=-1)
        return self.network.decoder(self.network.post_quant_conv(codes.permute(0, 3, 1, 2).contiguous()))


def _build(config: dict[str, Any]) -> torch.nn.Module:
    from transformers import JanusVQVAE, JanusVQVAEConfig

    return JanusVQVAE(JanusVQVAEConfig(**config))
