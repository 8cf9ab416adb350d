"""Pictures ↔ codes by Chameleon's tokenizer (Chameleon, Anole, Liquid: 8192 codes, a factor of 16).

The class in `transformers` can only encode, and checkpoints converted for it have lost their decoder. The decoder here
is the one of VQ-GAN (Esser, Rombach and Ommer 2021) with the names of its public checkpoints, so that converted
checkpoints which kept it, and the original one saved as safetensors, can be decoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from mm.interfaces import Decoded, Encoded
from mm.vq_adapter import VQAdapter


class ImageChameleon(VQAdapter):
    """`transformers.ChameleonVQVAE` and its decoder as a tokenizer.

    Args:
        path: folder of the tokenizer or of a whole Chameleon model (`transformers` format, safetensors), or a
            `ChameleonVQVAE`, with or without a child `decoder`.
        size: side of the square that pictures are fitted to; 0 = what was saved, else the checkpoint's own.
        decode: whether pictures will be asked for. Without, a checkpoint that has no decoder will do: for models that
            only read pictures.

    Raises:
        ValueError: `decode`, but the checkpoint has no decoder.
    """

    def __init__(self, path: str | nn.Module, size: int = 0, decode: bool = True) -> None:
        super().__init__(path, size, build=_build, optional=["decoder"])
        self.decodes = getattr(self.network, "decoder", None) is not None
        if decode and not self.decodes:
            raise ValueError(
                f"the Chameleon tokenizer in {path if isinstance(path, str) else 'memory'!r} has no decoder, since its "
                "conversion dropped it; use a checkpoint with decoder weights (such as Anole's), or set decode=False "
                "for a model that only reads pictures"
            )

    @staticmethod
    def _sizes(config: Any) -> tuple[int, int, int]:
        return config.resolution, 2 ** (len(config.channel_multiplier) - 1), config.num_embeddings

    @classmethod
    def tiny(cls) -> ImageChameleon:
        """A random instance for tests: 16×16 pixels, 16 codes."""
        config = {
            "num_embeddings": 16,
            "embed_dim": 8,
            "latent_channels": 8,
            "resolution": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
        }
        return cls(_build(config))

    @classmethod
    def from_directory(cls, path: str | Path) -> ImageChameleon:
        """The tokenizer that `save` wrote, which may have been one without a decoder."""
        return cls(str(path), decode=False)

    def codes(self, x: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        ids = self.network.encode(x).image_tokens
        return ids.view(len(x), x.shape[2] // self.downsample, x.shape[3] // self.downsample)

    def pixels(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        codes = self.network.quantize.embedding(ids).permute(0, 3, 1, 2).contiguous()
        return self.network.decoder(self.network.post_quant_conv(codes))

    def decode_batch(self, items: Any) -> list[Decoded]:
        if self.decodes:
            return super().decode_batch(items)
        reason = "this checkpoint has no decoder (decode=False)"
        return [Decoded(value=self._blank(item), valid=False, reason=reason) for item in items]

    def _blank(self, item: Encoded) -> Image.Image:
        grid, _ = self._repaired(item)
        rows, columns = grid.shape
        return Image.new("RGB", (columns * self.downsample, rows * self.downsample), (128, 128, 128))


def _build(config: dict[str, Any]) -> nn.Module:
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    network: Any = ChameleonVQVAE(ChameleonVQVAEConfig(**config))
    network.decoder = _make_decoder(network.config)
    return network.eval()


def _make_decoder(config: Any) -> nn.Module:
    """VQ-GAN's decoder, section 3.1 and appendix of the paper, from the encoder's own blocks.

    Children are called as in the public checkpoints: conv_in, mid, up.0 (finest) … up.n (coarsest), norm_out, conv_out.
    """
    from transformers.models.chameleon.modeling_chameleon import (
        ChameleonVQVAEEncoderAttnBlock as Attention,
    )
    from transformers.models.chameleon.modeling_chameleon import (
        ChameleonVQVAEEncoderResnetBlock as Block,
    )

    vanilla = config.attn_type == "vanilla"
    widths = [config.base_channels * multiplier for multiplier in config.channel_multiplier]
    resolutions = [config.resolution // 2**level for level in range(len(widths))]
    decoder = _Decoder()
    decoder.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
    decoder.mid = nn.ModuleDict(
        {
            "block_1": Block(config, widths[-1], widths[-1]),
            "attn_1": Attention(widths[-1]) if vanilla else nn.Identity(),
            "block_2": Block(config, widths[-1], widths[-1]),
        }
    )
    decoder.up = nn.ModuleList()
    for level, width in enumerate(widths):
        coarser = widths[min(level + 1, len(widths) - 1)]
        inputs = [coarser] + [width] * config.num_res_blocks
        attends = vanilla and resolutions[level] in (config.attn_resolutions or ())
        stage = nn.ModuleDict({"block": nn.ModuleList(Block(config, each, width) for each in inputs)})
        stage["attn"] = nn.ModuleList(Attention(width) for _ in inputs if attends)
        if level > 0:
            stage["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
        decoder.up.append(stage)
    decoder.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
    decoder.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)
    return decoder


class _Decoder(nn.Module):
    """Latents → pictures; each level but the finest doubles the sides."""

    conv_in: nn.Conv2d
    mid: nn.ModuleDict
    up: Any
    norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        x = self.conv_in(x)
        for part in self.mid.values():
            x = part(x)
        for stage in reversed(self.up):
            for number, block in enumerate(stage["block"]):
                x = block(x)
                if len(stage["attn"]) > 0:
                    x = stage["attn"][number](x)
            if "upsample" in stage:
                x = stage["upsample"]["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))
