"""Pictures to ids and back: the shipped `emoji_vq` beside a `VQModel` of `diffusers` made to the same measure.

The peer has the same sides (32×32 → 8×8), the same codebook (1,024 codes of 32 numbers) and about as many weights; what it
is made of (residual blocks, group norms, attention in the middle) is what its library gives for these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mm.bench import Row, Settings, alternate

BATCH = 64


def rows(settings: Settings) -> Iterator[Row]:
    import diffusers

    from mm.tokenizers.image_vq import ImageVQ

    torch.manual_seed(0)
    ours = ImageVQ(pretrained="emoji_vq")
    peer: Any = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 32, 48), layers_per_block=1, latent_channels=32, num_vq_embeddings=1024,
        vq_embed_dim=32, norm_num_groups=8, mid_block_add_attention=True,
    )  # fmt: skip
    peer.eval()
    size = " and ".join(f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for m in (ours, peer))
    pictures = torch.rand(BATCH, 3, 32, 32) * 2 - 1
    ids = ours.encode_pixels(pictures)
    version = f"diffusers {diffusers.__version__}"

    def encode() -> torch.Tensor:
        return peer.quantize(peer.encode(pictures).latents)[2][2]

    def decode() -> torch.Tensor:
        codes = peer.quantize.get_codebook_entry(ids.flatten(), (BATCH, *ids.shape[1:], 32))
        return peer.decode(codes, force_not_quantize=True).sample

    with torch.inference_mode():
        if encode().numel() != ids.numel() or decode().shape != ours.decode_ids(ids).shape:
            raise ValueError("the two tokenizers make different numbers of ids or pixels: unequal work")
        for name, mine, theirs in (
            ("encode", lambda: ours.encode_pixels(pictures), encode),
            ("decode", lambda: ours.decode_ids(ids), decode),
        ):
            a, b, ratio = alternate(mine, theirs, settings.rounds)
            yield Row(f"{name} pictures of 32×32 ({size} weights)", BATCH / a, "pictures/s", BATCH / b, ratio, version)
