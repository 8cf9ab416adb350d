"""Shapes ↔ a grid of discrete codes through a small 3-D convolutional autoencoder (VQ-VAE, van den Oord et al. 2017; for shapes:
Mittal et al. 2022, "AutoSDF", section 3.1, whose grid is 8×8×8).

A cube of `size` cells a side becomes (size / downsample)³ ids: x slowest, then y (up), then z. It is trained by `mm fit` with
`mm.training_shapes.ShapeTokenizerModule`, saved as safetensors and one JSON, and loaded by `from_directory`.

Letters in shapes: B batch, N cells a side, h, w and d of the grid of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm import saved
from mm.interfaces import Encoded, Spec
from mm.quantizers import Quantized, Quantizer, QuantizerName
from mm.shape_tokenizer import ShapeTokenizer
from mm.shapes import Shape
from mm.trainable import Reconstruction
from mm.voxel_autoencoder import VoxelDecoder, VoxelEncoder, begin_principal, check_shape

QUANTIZERS = ("vq", "fsq", "lfq", "bsq")


class VoxelVQ(ShapeTokenizer):
    """Convolutional tokenizer of shapes with discrete codes.

    Args:
        size: cells a side.
        downsample: cells per token along a side: 4 or 8.
        patch: side of the blocks that the first layer reads as one position: 2 or 4, a divisor of `downsample`.
        channels: width of the finest level.
        multipliers: width of each level in units of `channels`, finest first; one level for every halving between `patch`
            and `downsample`, and one more.
        blocks: residual blocks a level.
        decoder_channels, decoder_blocks: as above, of the decoder; 0 = the encoder's.
        quantizer: vq, fsq, lfq or bsq, see `mm.quantizers.Quantizer`, also for the settings below.
        pretrained: a directory that `save` wrote, or the name of a tokenizer shipped with the package. Its configuration
            replaces every other argument.

    Raises:
        ValueError: sizes that do not fit each other, or a saved tokenizer that is missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.voxel_vq", "a tokenizer of shapes"
    inner = ("decoder_channels", "decoder_blocks")

    def __init__(
        self,
        size: int = 32,
        downsample: int = 4,
        patch: int = 4,
        channels: int = 64,
        multipliers: Sequence[int] = (1,),
        blocks: int = 1,
        decoder_channels: int = 0,
        decoder_blocks: int = 0,
        quantizer: QuantizerName = "vq",
        codebook_size: int = 512,
        code_dim: int = 16,
        levels: Sequence[int] = (8, 5, 5, 5),
        decay: float = 0.99,
        dead_below: float = 0.5,
        commitment: float = 0.25,
        entropy: float = 0.1,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = dict(
            size=size,
            downsample=downsample,
            patch=patch,
            channels=channels,
            multipliers=saved.as_list(multipliers),
            blocks=blocks,
            decoder_channels=decoder_channels or channels,
            decoder_blocks=decoder_blocks or blocks,
            quantizer=quantizer,
            codebook_size=codebook_size,
            code_dim=code_dim,
            levels=saved.as_list(levels),
            decay=saved.as_float(decay),
            dead_below=saved.as_float(dead_below),
            commitment=saved.as_float(commitment),
            entropy=saved.as_float(entropy),
        )
        self._made(pretrained, config)

    def _build(self, c: dict[str, Any]) -> None:
        check_shape(c)
        for name in ("codebook_size", "code_dim"):
            saved.whole_number(name, c[name])
        for name in ("decay", "dead_below", "commitment", "entropy"):
            saved.number(name, c[name], 0)
        saved.whole_numbers("levels", c["levels"])
        if c["quantizer"] not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {c['quantizer']!r:.40}")
        self.config, self.size, self.downsample = c, c["size"], c["downsample"]
        chosen = ("code_dim", "levels", "decay", "dead_below", "commitment", "entropy")
        codebook = 0 if c["quantizer"] == "fsq" else c["codebook_size"]
        self.quantizer = Quantizer(c["quantizer"], codebook_size=codebook, **{name: c[name] for name in chosen})
        shared: dict[str, Any] = dict(latent=self.quantizer.dim, patch=c["patch"])
        widths = [c["channels"] * m for m in c["multipliers"]]
        self.encoder = VoxelEncoder(self.size, widths, blocks=c["blocks"], **shared)
        widths = [c["decoder_channels"] * m for m in c["multipliers"]]
        self.decoder = VoxelDecoder(self.size, widths, blocks=c["decoder_blocks"], **shared)

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    @property
    def side(self) -> int:
        """Tokens a side."""
        return self.size // self.downsample

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="discrete",
            vocab_size=self.quantizer.codebook_size,
            max_grid=(self.side,) * 3,
            voxels=self.size,
            fingerprint=self.fingerprint,
        )

    def encoded(self, ids: Int[Tensor, "h w d"]) -> Encoded:
        return Encoded(grid=tuple(ids.shape), ids=ids.flatten())

    def repaired(self, item: Encoded) -> tuple[Int[Tensor, "h w d"], str]:
        """A smaller grid is taken for the part of the cube at its origin."""
        grid = tuple(item.grid)
        whole = len(grid) == 3 and not item.scales and all(1 <= extent <= self.side for extent in grid)
        ids = None if item.ids is None else item.ids.detach().cpu().long()
        if ids is None or not whole or len(ids) != grid[0] * grid[1] * grid[2]:
            held = 0 if ids is None else len(ids)
            kept = torch.zeros(self.side**3, dtype=torch.long)
            if ids is not None:
                kept[:held] = ids[: self.side**3]
            kept = kept.clamp(0, self.quantizer.codebook_size - 1).view(self.side, self.side, self.side)
            return kept, f"{held} ids on a grid {grid}, expected three axes of 1 to {self.side}"
        bad = int(((ids < 0) | (ids >= self.quantizer.codebook_size)).sum())
        reason = f"{bad} ids outside 0..{self.quantizer.codebook_size - 1}" if bad else ""
        return ids.clamp(0, self.quantizer.codebook_size - 1).view(*grid), reason

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def quantized(
        self, x: Float[Tensor, "B N N N"]
    ) -> tuple[Float[Tensor, "B D h w d"], Int[Tensor, "B h w d"], Quantized]:
        z = self.encoder(x[:, None])
        found = self.quantizer(z.flatten(3))
        return found.latents.view_as(z).to(self._like().dtype), found.ids.reshape(len(z), *z.shape[2:]), found

    def ids_of(self, x: Float[Tensor, "B N N N"]) -> Int[Tensor, "B h w d"]:
        return self.quantized(x)[1]

    def solidity_of(self, ids: Int[Tensor, "B h w d"]) -> Float[Tensor, "B N N N"]:
        latents = self.quantizer.lookup(ids.flatten(2)).view(len(ids), -1, *ids.shape[1:])
        part = self.decoder(latents.to(self._like().dtype))[:, 0]
        if part.shape[1:] == (self.size,) * 3:
            return part
        cube = part.new_full((len(ids), self.size, self.size, self.size), -1.0)
        cube[:, : part.shape[1], : part.shape[2], : part.shape[3]] = part
        return cube

    def reconstruct(self, batch: Float[Tensor, "B N N N"]) -> Reconstruction:
        latents, ids, found = self.quantized(batch)
        return Reconstruction(self.decoder(latents)[:, 0], ids, found.loss)

    def last_layer(self) -> Tensor:
        return self.decoder.last.weight

    @torch.no_grad()
    def warm_start(self, batch: Float[Tensor, "B N N N"]) -> None:
        """Begin as the best code of single blocks: principal components as the linear maps of encoder and decoder, k-means as the
        codebook of `vq`. The networks begin at zero, so this is exactly what training improves."""
        begin_principal(self.encoder, self.decoder, batch[:, None], even=not self.quantizer.codebooks())
        self.quantizer.warm_start(self.encoder(batch[:, None]).flatten(3))
        self.weights_changed()

    def synchronise(self, enabled: bool) -> None:
        self.quantizer.synchronise(enabled)

    @classmethod
    def tiny(cls) -> VoxelVQ:
        """A small random tokenizer whose codebook is initialised, for tests."""
        tokenizer = cls(size=16, channels=8, codebook_size=16, code_dim=4).train()
        tokenizer.warm_start(torch.stack([_ball(16, radius) for radius in (3.0, 5.0, 7.0)]))
        return tokenizer.eval()

    @classmethod
    def examples(cls) -> list[Shape]:
        """Balls of several sizes, as cells and as distances."""
        return [
            Shape(_ball(16, 3.0).numpy() > 0),
            Shape(-0.1 * _ball(16, 6.0).numpy()),
            Shape(_ball(16, 7.0).numpy() > 0),
        ]


def _ball(size: int, radius: float) -> Float[Tensor, "N N N"]:
    """Solidity of a ball in the middle; the radius is in cells."""
    line = torch.arange(size) + 0.5 - size / 2
    away = (line[:, None, None] ** 2 + line[:, None] ** 2 + line**2).sqrt()
    return ((radius - away) / size * 10).clamp(-1, 1)
