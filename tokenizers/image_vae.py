"""Pictures ↔ a grid of vectors through a small convolutional autoencoder with a Gaussian bottleneck (VAE, Kingma and Welling
2014; with a small weight on the divergence: the KL autoencoder of Rombach et al. 2022, section 3.1).

A picture of `size`×`size` becomes (size / downsample / pack)² vectors, row by row: the means, normalised. It is trained by
`mm fit` with `mm.training_tokenizer.TokenizerModule`, saved as safetensors and one JSON, and loaded by `from_directory`.

Letters in shapes: B batch, H and W rows and columns of pixels, h and w of the grid, C channels of a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm import saved
from mm.autoencoder import BlockName, Decoder, Encoder, begin_linear, check_shape
from mm.latent_grids import GaussianGrids, check_gaussian
from mm.latent_pictures import TrainedPictures, check_pack
from mm.latents import Kind, LatentNormalizer

MAX_CHANNELS = 256


class ImageVAE(GaussianGrids, TrainedPictures):
    """Convolutional picture tokenizer with vectors.

    Args:
        size: side of the square that pictures are fitted to, in pixels.
        downsample: pixels per latent along a side: 4, 8 or 16.
        latent: C, channels of a latent.
        patch, channels, multipliers, blocks, block, decoder_channels, decoder_blocks, attention_heads: of the networks, as
            for `ImageVQ`.
        kl: weight of the divergence from a standard normal distribution, a latent's number (mean over all of them).
        pack: joins squares of pack×pack latents to one token.
        normalizer: how vectors are brought to unit spread (`mm.latents`); its statistics are taken from training pictures
            each time the tokenizer is saved. With `token` the decoder learns to read normalised vectors.
        noise: largest deviation of the noise that the decoder learns to bear, in normalised units: a vector gets γ·ε with γ
            drawn from 0 … noise for each picture (NextStep-1, section 3.3: 0.5). Only with `token`, whose scale is known
            from the start.
        pretrained: a directory that `save` wrote, or the name of a tokenizer shipped with the package. Its configuration
            replaces every other argument.

    Raises:
        ValueError: sizes that do not fit each other, or a saved tokenizer that is missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.image_vae", "an image autoencoder"
    inner = ("decoder_channels", "decoder_blocks", "kl", "noise")

    def __init__(
        self,
        size: int = 32,
        downsample: int = 4,
        latent: int = 16,
        patch: int = 2,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        block: BlockName = "residual",
        decoder_channels: int = 0,
        decoder_blocks: int = 0,
        attention_heads: int = 0,
        kl: float = 1e-4,
        pack: int = 1,
        normalizer: Kind = "channel",
        noise: float = 0.0,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = dict(
            size=size,
            downsample=downsample,
            latent=latent,
            patch=patch,
            channels=channels,
            multipliers=saved.as_list(multipliers),
            blocks=blocks,
            block=block,
            decoder_channels=decoder_channels or channels,
            decoder_blocks=decoder_blocks or blocks,
            attention_heads=attention_heads,
            kl=kl,
            pack=pack,
            normalizer=normalizer,
            noise=noise,
        )
        self._made(pretrained, config)

    def _build(self, c: dict[str, Any]) -> None:
        check_shape(c)
        check_gaussian(c, MAX_CHANNELS)
        check_pack(c["pack"])
        self.config = c
        width = c["latent"] * c["pack"] ** 2
        self.fit_to(c["size"], c["downsample"], c["latent"], LatentNormalizer(c["normalizer"], width), c["pack"])
        shared: dict[str, Any] = dict(patch=c["patch"], attention_heads=c["attention_heads"], block=c["block"])
        widths = [c["channels"] * m for m in c["multipliers"]]
        self.encoder = Encoder(widths, blocks=c["blocks"], latent=2 * c["latent"], **shared)
        widths = [c["decoder_channels"] * m for m in c["multipliers"]]
        self.decoder = Decoder(widths, blocks=c["decoder_blocks"], latent=c["latent"], **shared)

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def distribution(self, x: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C h w"]]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def pixels(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.decoder(z)

    def last_layer(self) -> Tensor:
        return self.decoder.last.weight

    @torch.no_grad()
    def warm_start(self, x: Float[Tensor, "B 3 H W"]) -> None:
        """Begin as the best linear code of single squares of pixels: their principal components, each scaled to unit
        variance, which is also what the divergence asks for. The networks begin at zero."""
        begin_linear(self.encoder, self.decoder, x, self.downsample)
        self.weights_changed()

    @classmethod
    def tiny(cls) -> ImageVAE:
        """A small random tokenizer whose normaliser is fitted, for tests."""
        tokenizer = cls(size=16, channels=8, latent=4)
        tokenizer.fit_normalizer(torch.rand(4, 3, 16, 16) * 2 - 1)
        return tokenizer.eval()
