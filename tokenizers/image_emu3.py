"""Pictures ↔ codes by Emu3's tokenizer (Wang et al. 2024; MoVQ, a factor of 8 in space and 4 in time).

The network is one for video: a picture enters it repeated four times and leaves it as the first of four frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm import safe_io
from mm.vq_adapter import VQAdapter

PREPROCESSOR = "preprocessor_config.json"


class ImageEmu3(VQAdapter):
    """`transformers.Emu3VQVAE` as a tokenizer.

    Args:
        path: folder of the tokenizer or of a whole Emu3 model (`transformers` format, safetensors), or an `Emu3VQVAE`.
            The normalisation of its `preprocessor_config.json` is used where there is one, else mean and std are 0.5.
        size: side of the square that pictures are fitted to; 0 = what was saved, else 512.
    """

    def __init__(self, path: str | torch.nn.Module, size: int = 0) -> None:
        super().__init__(path, size, build=_build, **(_preprocessor(path) if isinstance(path, str) else {}))

    @staticmethod
    def _sizes(config: Any) -> tuple[int, int, int]:
        return 512, 2 ** (len(config.channel_multiplier) - 1), config.codebook_size

    @classmethod
    def tiny(cls) -> ImageEmu3:
        """A random instance for tests: 16×16 pixels, 16 codes."""
        config = {
            "codebook_size": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
            "temporal_downsample_factor": 4,
        }
        tokenizer = cls(_build(config), size=16)
        # As published weights are: codes that lie apart, where the class begins with nearly equal ones.
        torch.nn.init.normal_(tokenizer.network.quantize.embedding.weight)
        return tokenizer

    def codes(self, x: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        sizes = torch.tensor([x.shape[2:]] * len(x))
        return torch.stack(list(self.network.encode(x, sizes).image_tokens))

    def pixels(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.network.decode(ids)


def _build(config: dict[str, Any]) -> torch.nn.Module:
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    return Emu3VQVAE(Emu3VQVAEConfig(**config))


def _preprocessor(folder: str) -> dict[str, Any]:
    """Mean and std of a checkpoint's image processor, if it has one."""
    if not Path(folder, PREPROCESSOR).exists():
        return {}
    config = safe_io.read_json(safe_io.inside(folder, PREPROCESSOR))
    found = {"mean": config.get("image_mean"), "std": config.get("image_std")}
    for value in found.values():
        if not isinstance(value, list) or not all(isinstance(v, int | float) for v in value):
            return {}
    return found
