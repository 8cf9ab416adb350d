"""Clips ↔ a grid of vectors through a small causal autoencoder with a Gaussian bottleneck (VAE, Kingma and Welling 2014; causal
in time, with the first frame by itself: MAGVIT-v2, Yu et al. 2023, section 3.2).

T frames of `size`×`size` become 1 + ⌈(T − 1) / frame_stride⌉ steps of (size / downsample)² vectors, step by step and row by row:
the means, normalised. A vector depends on frames up to its own step, and a decoded frame on vectors up to its own. It is trained
by `mm fit` with `mm.training_tokenizer.TokenizerModule`, saved as safetensors and one JSON, and loaded by `from_directory`.

Letters in shapes: B batch, T frames, S steps, F frames a step, H and W rows and columns of pixels, h and w of the grid, C
channels of a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mm import saved
from mm.autoencoder import BlockName, begin_linear, check_shape
from mm.latent_grids import GaussianGrids, check_gaussian
from mm.latent_videos import LatentVideos
from mm.latents import Kind, LatentNormalizer
from mm.video import Video
from mm.video_autoencoder import Past, VideoDecoder, VideoEncoder, to_steps

MAX_CHANNELS = 256


class VideoVAE(GaussianGrids, LatentVideos):
    """Causal tokenizer of clips with vectors.

    Args:
        size: side of the square that frames are fitted to, in pixels.
        frames: most frames of a clip that is encoded.
        fps: frames a second; clips of another rate are resampled.
        frame_stride: frames of a step: 1, 2 or 4. The first step has one.
        downsample: pixels per latent along a side: 4, 8 or 16.
        latent: C, channels of a latent.
        patch, channels, multipliers, blocks, block, decoder_channels, decoder_blocks: of the networks, as for `ImageVQ`; each
            block is followed by a layer in time.
        kl: weight of the divergence from a standard normal distribution, a latent's number (mean over all of them).
        normalizer: how vectors are brought to unit spread (`mm.latents`); its statistics are taken from training clips each
            time the tokenizer is saved. With `token` the decoder learns to read normalised vectors.
        noise: largest deviation of the noise that the decoder learns to bear, as for `ImageVAE`. Only with `token`.
        pretrained: a directory that `save` wrote, or the name of a tokenizer shipped with the package. Its configuration
            replaces every other argument.

    Raises:
        ValueError: sizes that do not fit each other, or a saved tokenizer that is missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.video_vae", "a video autoencoder"
    inner = ("decoder_channels", "decoder_blocks", "kl", "noise")

    def __init__(
        self,
        size: int = 32,
        frames: int = 17,
        fps: float = 8.0,
        frame_stride: int = 2,
        downsample: int = 8,
        latent: int = 8,
        patch: int = 4,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        block: BlockName = "separable",
        decoder_channels: int = 0,
        decoder_blocks: int = 0,
        kl: float = 1e-4,
        normalizer: Kind = "channel",
        noise: float = 0.0,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = dict(
            size=size,
            frames=frames,
            fps=fps,
            frame_stride=frame_stride,
            downsample=downsample,
            latent=latent,
            patch=patch,
            channels=channels,
            multipliers=saved.as_list(multipliers),
            blocks=blocks,
            block=block,
            decoder_channels=decoder_channels or channels,
            decoder_blocks=decoder_blocks or blocks,
            kl=kl,
            normalizer=normalizer,
            noise=noise,
        )
        self._made(pretrained, config)

    def _build(self, c: dict[str, Any]) -> None:
        check_shape({**c, "attention_heads": 0})
        check_gaussian(c, MAX_CHANNELS)
        self.config = c
        normalizer = LatentNormalizer(c["normalizer"], c["latent"])
        self.fit_to(c["size"], c["downsample"], c["latent"], normalizer, c["frames"], c["frame_stride"], c["fps"])
        shared: dict[str, Any] = dict(patch=c["patch"], block=c["block"], stride=c["frame_stride"])
        widths = [c["channels"] * m for m in c["multipliers"]]
        self.encoder = VideoEncoder(widths, blocks=c["blocks"], latent=2 * c["latent"], **shared)
        widths = [c["decoder_channels"] * m for m in c["multipliers"]]
        self.decoder = VideoDecoder(widths, blocks=c["decoder_blocks"], latent=c["latent"], **shared)

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def distribution(
        self, x: Float[Tensor, "B T 3 H W"]
    ) -> tuple[Float[Tensor, "B S C h w"], Float[Tensor, "B S C h w"]]:
        mean, log_variance = self.encoder(to_steps(x, self.stride)).chunk(2, dim=2)
        return mean, log_variance.clamp(-30.0, 20.0)

    def latents(self, x: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B S C h w"]:
        return LatentVideos.latents(self, x)

    def latents_of(self, steps: Float[Tensor, "B S FC H W"], past: Past) -> Float[Tensor, "B S C h w"]:
        return self.encoder(steps, past).chunk(2, dim=2)[0]

    def steps_from(self, z: Float[Tensor, "B S C h w"], past: Past) -> Float[Tensor, "B S FC H W"]:
        return self.decoder(z, past)

    def last_layer(self) -> Tensor:
        return self.decoder.last.weight

    def warm_start(self, x: Float[Tensor, "B T 3 H W"]) -> None:
        """Begin as the best linear code of single blocks of `frame_stride` frames. The networks begin at zero."""
        begin_linear(self.encoder, self.decoder, to_steps(x, self.stride).flatten(0, 1), self.downsample)
        self.weights_changed()

    @classmethod
    def tiny(cls) -> VideoVAE:
        """A small random tokenizer whose normaliser is fitted, for tests."""
        tokenizer = cls(size=16, frames=9, downsample=4, channels=8, latent=4, multipliers=[1], decoder_blocks=1)
        tokenizer.fit_normalizer(torch.rand(4, 9, 3, 16, 16) * 2 - 1)
        return tokenizer.eval()

    @classmethod
    def examples(cls) -> list[Video]:
        """Clips of several lengths, sizes and rates."""
        rng = np.random.default_rng(0)
        return [
            Video(rng.integers(0, 256, (t, h, w, 3), dtype=np.uint8), fps)
            for t, h, w, fps in ((5, 16, 16, 8.0), (1, 7, 20, 8.0), (4, 24, 18, 4.0), (9, 16, 16, 8.0))
        ]
