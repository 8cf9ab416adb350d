"""Pictures ↔ a short sequence of vectors through a vision transformer and a causal transformer (VL-GPT, Zhu et al. 2023, arXiv
2312.09251).

A vision transformer of timm turns the picture into features; N learned queries read them, each seeing those before it, and
become N embeddings of width D, normalised. They are no map, every embedding reads the whole picture: the grid is 1×N. The
decoder is a transformer too: one query for each square of pixels reads the embeddings.

VL-GPT's decoder instead estimates the CLIP embeddings of the picture and its caption, which a frozen diffusion model draws
from; this one writes pixels and is trained against them, so that nothing has to be downloaded.

Letters in shapes: B batch, H and W rows and columns of pixels, N embeddings, n of them, D their width.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm import safe_io, saved
from mm.latent_pictures import MAX_AXIS, TrainedPictures
from mm.latents import Kind, LatentNormalizer
from mm.trainable import Reconstruction
from mm.vit import CausalResampler, PatchDecoder, vision_transformer

LIMITS: dict[str, tuple[int, int]] = {
    "size": (1, 1024), "embeddings": (1, MAX_AXIS), "latent": (1, 1024),
    "encoder_patch": (0, 64), "encoder_width": (0, 4096), "encoder_depth": (0, 64), "encoder_heads": (0, 64),
    "width": (1, 4096), "depth": (1, 64), "heads": (1, 64),
    "decoder_patch": (1, 64), "decoder_width": (1, 4096), "decoder_depth": (1, 64),
}  # fmt: skip
"""Least and largest value of each size; whoever wrote them, no network is built beyond."""
UNUSED = ("head.", "attn_pool.")
"""What published weights of an encoder hold beyond the features."""


class ImageViT(TrainedPictures):
    """Picture tokenizer with N vectors in causal order.

    Args:
        size: side of the square that pictures are fitted to, in pixels.
        embeddings: N.
        latent: D.
        encoder: name of a timm vision transformer. Its weights are never downloaded.
        encoder_patch, encoder_width, encoder_depth, encoder_heads: pixels of a patch along a side, width, blocks and attention
            heads of the encoder, where they are not the named model's; 0 = as that model has them.
        encoder_weights: a safetensors file with weights of exactly that encoder (a classifier's head is passed over). They are
            saved with the tokenizer; the file is not needed again.
        encoder_frozen: the encoder stays as it is, and in evaluation mode.
        width, depth, heads: of the causal transformer; `heads` also of the decoder.
        decoder_patch, decoder_width, decoder_depth: pixels of a decoded square along a side, width (0 = `width`), blocks.
        normalizer: how vectors are brought to unit spread (`mm.latents`). With `token` the decoder learns to read normalised
            vectors; the statistics of others are taken from training pictures each time the tokenizer is saved.
        noise: as for `ImageVAE`: largest deviation of the noise that the decoder learns to bear; only with `token`.
        pretrained: a directory that `save` wrote, or the name of a tokenizer shipped with the package. Its configuration
            replaces every other argument.

    Raises:
        ValueError: sizes that do not fit each other, an encoder that timm can't make or whose weights do not fit, or a saved
            tokenizer that is missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.image_vit", "an image embedder"
    inner = ("decoder_patch", "decoder_width", "decoder_depth", "noise", "encoder_frozen")
    spatial = False

    def __init__(
        self,
        size: int = 32,
        embeddings: int = 16,
        latent: int = 16,
        encoder: str = "vit_tiny_patch16_224",
        encoder_patch: int = 8,
        encoder_width: int = 96,
        encoder_depth: int = 2,
        encoder_heads: int = 3,
        encoder_weights: str | None = None,
        encoder_frozen: bool = False,
        width: int = 96,
        depth: int = 2,
        heads: int = 3,
        decoder_patch: int = 8,
        decoder_width: int = 0,
        decoder_depth: int = 2,
        normalizer: Kind = "token",
        noise: float = 0.0,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = dict(
            size=size,
            embeddings=embeddings,
            latent=latent,
            encoder=encoder,
            encoder_patch=encoder_patch,
            encoder_width=encoder_width,
            encoder_depth=encoder_depth,
            encoder_heads=encoder_heads,
            encoder_frozen=encoder_frozen,
            width=width,
            depth=depth,
            heads=heads,
            decoder_patch=decoder_patch,
            decoder_width=decoder_width or width,
            decoder_depth=decoder_depth,
            normalizer=normalizer,
            noise=noise,
        )
        if pretrained is not None and encoder_weights is not None:
            raise ValueError(
                "got both pretrained and encoder_weights: a saved tokenizer holds its encoder; give one of them"
            )
        if encoder_frozen and pretrained is None and encoder_weights is None:
            raise ValueError("encoder_frozen would keep random weights; give encoder_weights, or leave it out")
        self._made(pretrained, config)
        if encoder_weights is not None:
            self._load_encoder(encoder_weights)

    def _build(self, c: dict[str, Any]) -> None:
        for name, (low, high) in LIMITS.items():
            saved.whole_number(name, c[name], low, high)
        for name, whole, part in (
            ("size", c["size"], "decoder_patch"),
            ("width", c["width"], "heads"),
            ("decoder_width", c["decoder_width"], "heads"),
        ):
            if whole % c[part]:
                raise ValueError(f"{name} must be a multiple of {part} ({c[part]}), got {whole}")
        if c["encoder_patch"] and c["size"] % c["encoder_patch"]:
            raise ValueError(f"size must be a multiple of encoder_patch ({c['encoder_patch']}), got {c['size']}")
        noise = c["noise"]
        saved.number("noise", noise, 0)
        if noise and c["normalizer"] != "token":
            raise ValueError(f"noise needs the normalizer token, got {noise} with {c['normalizer']}")
        self.config = c
        # one latent is as large as the picture: the base class then takes pictures of the full size only
        self.fit_to(c["size"], c["size"], c["latent"], LatentNormalizer(c["normalizer"], c["latent"]))
        sizes = [c[f"encoder_{name}"] for name in ("patch", "width", "depth", "heads")]
        self.encoder, tokens, features = vision_transformer(c["encoder"], c["size"], *sizes)
        self.encoder.requires_grad_(not c["encoder_frozen"])
        # what the encoder's weights take pictures to be scaled to
        for name in ("mean", "std"):
            values = torch.tensor(self.encoder.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(f"pixel_{name}", values, persistent=False)
        count, dim, heads = c["embeddings"], c["latent"], c["heads"]
        self.resampler = CausalResampler(tokens, features, count, dim, width=c["width"], depth=c["depth"], heads=heads)
        self.decoder = PatchDecoder(
            c["size"], c["decoder_patch"], count, dim, width=c["decoder_width"], depth=c["decoder_depth"], heads=heads
        )
        self.train()

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def embeddings(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Of pictures in [−1, 1] of the full size, not normalised."""
        scaled = ((x + 1) / 2 - self.get_buffer("pixel_mean")) / self.get_buffer("pixel_std")
        with torch.no_grad() if self.config["encoder_frozen"] else contextlib.nullcontext():
            features = self.encoder.forward_features(scaled)
        return self.resampler(features)

    def latents(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D 1 N"]:
        return self.embeddings(x).transpose(1, 2).unsqueeze(2)

    def pixels(self, z: Float[Tensor, "B D 1 n"]) -> Float[Tensor, "B 3 H W"]:
        return self.decoder(z.squeeze(2).transpose(1, 2))

    def reconstruct(self, batch: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        rows = self.embeddings(batch)
        if self.normalizer.kind == "token":
            rows = self.roughened(self.normalizer(rows))
        output = self.decoder(rows)
        return Reconstruction(output, None, output.new_zeros(()))

    def last_layer(self) -> Tensor:
        return self.decoder.last.weight

    @property
    def largest(self) -> tuple[int, int]:
        return 1, self.config["embeddings"]

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.config["encoder_frozen"]:
            self.encoder.eval()
        return self

    @classmethod
    def tiny(cls) -> ImageViT:
        """A small random tokenizer, for tests."""
        small: dict[str, Any] = dict(encoder_width=16, encoder_depth=1, encoder_heads=2, width=16, depth=2, heads=2)
        return cls(size=16, embeddings=6, latent=8, decoder_depth=1, **small).eval()

    def _load_encoder(self, path: str) -> None:
        found = safe_io.read_tensors(path, max_bytes=saved.MAX_WEIGHT_BYTES)
        found = {name: tensor for name, tensor in found.items() if not name.startswith(UNUSED)}
        self.encoder.load_state_dict(safe_io.fit_tensors(repr(path), found, self.encoder.state_dict()))
