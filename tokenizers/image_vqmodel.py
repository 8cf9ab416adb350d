"""Pictures ↔ codes by `diffusers.VQModel` (VQ-GAN as in latent diffusion, aMUSEd, Meissonic).

`VQModel.encode` returns latents that are not yet quantised; its `decode` quantises them. Here codes stand between.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.vq_adapter import VQAdapter


class ImageVQModel(VQAdapter):
    """A `diffusers.VQModel` as a tokenizer.

    Args:
        path: folder of the checkpoint (`config.json` and safetensors), or a `VQModel`.
        size: side of the square that pictures are fitted to; 0 = what was saved, else 256.
    """

    def __init__(self, path: str | torch.nn.Module, size: int = 0) -> None:
        super().__init__(path, size, build=_build)

    @staticmethod
    def _sizes(config: Any) -> tuple[int, int, int]:
        return 256, 2 ** (len(config.block_out_channels) - 1), config.num_vq_embeddings

    @classmethod
    def tiny(cls) -> ImageVQModel:
        """A random instance for tests: 16×16 pixels, 16 codes."""
        config = {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "num_vq_embeddings": 16,
            "latent_channels": 4,
        }
        return cls(_build(config), size=16)

    def codes(self, x: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        latents = self.network.encode(x).latents
        indices = self.network.quantize(latents)[2][2]
        return indices.view(len(x), *latents.shape[2:])

    def pixels(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        network = self.network
        embedding = network.quantize.embedding(ids).permute(0, 3, 1, 2).contiguous()
        condition = embedding if network.config.norm_type == "spatial" else None
        return network.decoder(network.post_quant_conv(embedding), condition)

    def _config_json(self) -> str:
        return self.network.to_json_string()


def _build(config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import VQModel

    network: Any = VQModel(**{name: value for name, value in config.items() if not name.startswith("_")})
    return network
