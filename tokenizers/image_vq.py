"""Pictures ↔ a grid of discrete codes through a small convolutional autoencoder (VQ-VAE, van den Oord et al. 2017; the
networks of VQ-GAN, Esser et al. 2021; other quantisers: `mm.quantizers`).

A picture of `size`×`size` becomes (size / downsample)² ids, row by row. It is trained by `mm fit` with
`mm.training_tokenizer.TokenizerModule`, saved as safetensors and one JSON, and loaded by `from_directory`.

Letters in shapes: B batch, H and W rows and columns of pixels, h and w of the token grid, K sub-codes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mm import pictures, safe_io, saved
from mm.autoencoder import BlockName, Decoder, Encoder, begin_principal, check_shape
from mm.interfaces import Decoded, Encoded, Spec
from mm.quantizers import Quantizer, QuantizerName
from mm.tokenizers import _image_vq_settings as settings
from mm.trainable import Reconstruction, TrainableTokenizer


class ImageVQ(TrainableTokenizer):
    """Convolutional picture tokenizer with discrete codes.

    Args:
        size: side of the square that pictures are fitted to, in pixels.
        downsample: pixels per token along a side: 4, 8 or 16.
        patch: side of the squares that the first layer reads as one position (1, 2 or 4, a divisor of `downsample`).
        channels: width of the finest level.
        multipliers: width of each level in units of `channels`, finest first; one level for every halving between
            `patch` and `downsample`, and one more.
        blocks: blocks a level.
        block: `residual` (two 3×3 convolutions) or `separable` (depthwise 5×5 and pointwise, a third of the cost).
        decoder_channels: as `channels`, of the decoder; 0 = the encoder's.
        decoder_blocks: as `blocks`, of the decoder; 0 = the encoder's.
        attention_heads: heads of self-attention at the coarsest level; 0 = none.
        quantizer: vq, fsq, lfq, bsq or residual, see `mm.quantizers.Quantizer`, also for the settings below.
        pretrained: a directory that `save` wrote, or the name of a tokenizer shipped with the package. Its configuration
            replaces every other argument.

    Raises:
        ValueError: sizes that do not fit each other, or a saved tokenizer that is missing, damaged or foreign.
    """

    def __init__(
        self,
        size: int = 32,
        downsample: int = 4,
        patch: int = 2,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        block: BlockName = "residual",
        decoder_channels: int = 0,
        decoder_blocks: int = 0,
        attention_heads: int = 0,
        quantizer: QuantizerName = "vq",
        codebook_size: int = 1024,
        code_dim: int = 8,
        levels: Sequence[int] = (8, 5, 5, 5),
        num_codes: int = 4,
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
            block=block,
            decoder_channels=decoder_channels or channels,
            decoder_blocks=decoder_blocks or blocks,
            attention_heads=attention_heads,
            quantizer=quantizer,
            codebook_size=codebook_size,
            code_dim=code_dim,
            levels=saved.as_list(levels),
            num_codes=num_codes,
            decay=decay,
            dead_below=dead_below,
            commitment=commitment,
            entropy=entropy,
        )
        directory = None if pretrained is None else saved.find(pretrained, settings.WHAT, settings.FORMAT)
        if directory is not None:
            config = settings.read(directory, config)
        self.config = config
        with contextlib.nullcontext() if directory is None else saved.building(directory):
            self._build(config)
        if directory is not None:
            self._load(directory)

    def _build(self, c: dict[str, Any]) -> None:
        check_shape(c)
        for name in ("codebook_size", "code_dim", "num_codes"):
            saved.whole_number(name, c[name])
        for name in ("decay", "dead_below", "commitment", "entropy"):
            saved.number(name, c[name])
        saved.whole_numbers("levels", c["levels"])
        self.size, self.downsample = c["size"], c["downsample"]
        self.quantizer = Quantizer(
            c["quantizer"],
            codebook_size=0 if c["quantizer"] == "fsq" else c["codebook_size"],
            code_dim=c["code_dim"],
            levels=c["levels"],
            num_codes=c["num_codes"],
            decay=c["decay"],
            dead_below=c["dead_below"],
            commitment=c["commitment"],
            entropy=c["entropy"],
        )
        shared: dict[str, Any] = dict(
            latent=self.quantizer.dim, patch=c["patch"], attention_heads=c["attention_heads"], block=c["block"]
        )
        self.encoder = Encoder([c["channels"] * m for m in c["multipliers"]], blocks=c["blocks"], **shared)
        widths = [c["decoder_channels"] * m for m in c["multipliers"]]
        self.decoder = Decoder(widths, blocks=c["decoder_blocks"], **shared)

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        side = self.size // self.downsample
        return Spec(
            kind="codes" if self.quantizer.name == "residual" else "discrete",
            vocab_size=self.quantizer.codebook_size,
            num_codes=self.quantizer.num_codes,
            max_grid=(side, side),
            fingerprint=self.fingerprint,
        )

    def encode(self, raw: Image.Image | Tensor) -> Encoded:
        """Tokens of a picture, or of a float tensor (3, H, W) in [−1, 1] with sides that `downsample` divides."""
        return self.encode_batch([raw])[0]

    def encode_batch(self, raws: Sequence[Image.Image | Tensor]) -> list[Encoded]:
        tensors = [self._pixels(raw) for raw in raws]
        out: list[Encoded | None] = [None] * len(raws)
        for shape in {t.shape for t in tensors}:
            where = [i for i, t in enumerate(tensors) if t.shape == shape]
            for i, ids in zip(where, self.encode_pixels(torch.stack([tensors[i] for i in where])), strict=True):
                out[i] = self._encoded(ids.cpu())
        return [e for e in out if e is not None]

    def decode(self, encoded: Encoded) -> Decoded:
        """An RGB picture of the grid's size × `downsample`. Ids out of range or too few are replaced, with `valid` off."""
        return self.decode_batch([encoded])[0]

    def decode_batch(self, items: Sequence[Encoded]) -> list[Decoded]:
        grids = [self._grid_of(item) for item in items]
        out: list[Decoded | None] = [None] * len(items)
        for shape in {g.shape for g, _ in grids}:
            where = [i for i, (g, _) in enumerate(grids) if g.shape == shape]
            decoded = pictures.from_unit(self.decode_ids(torch.stack([grids[i][0] for i in where])))
            for i, pixels in zip(where, decoded, strict=True):
                reason = grids[i][1]
                out[i] = Decoded(value=pictures.to_image(pixels), valid=not reason, reason=reason)
        return [d for d in out if d is not None]

    # ---- tensors -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_pixels(self, x: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"] | Int[Tensor, "B h w K"]:
        """Ids (int64) of pictures in [−1, 1]; H and W multiples of `downsample`."""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % self.downsample or x.shape[3] % self.downsample:
            raise ValueError(
                f"expected pictures (B, 3, H, W) with sides that are multiples of {self.downsample}, "
                f"got {tuple(x.shape)}: pad or resize them"
            )
        training = self.training
        self.eval()
        try:
            return self.quantizer(self.encoder(x.to(self._device()))).ids
        finally:
            self.train(training)

    @torch.no_grad()
    def decode_ids(self, ids: Int[Tensor, "B h w"] | Int[Tensor, "B h w K"]) -> Float[Tensor, "B 3 H W"]:
        """Pictures, nominally in [−1, 1], of ids within the vocabulary."""
        return self.decoder(self.quantizer.lookup(ids.to(self._device()).long()).to(self._dtype()))

    def reconstruct(self, batch: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        quantized = self.quantizer(self.encoder(batch))
        return Reconstruction(self.decoder(quantized.latents), quantized.ids, quantized.loss)

    def last_layer(self) -> Tensor:
        return self.decoder.last.weight

    @torch.no_grad()
    def warm_start(self, x: Float[Tensor, "B 3 H W"]) -> None:
        """Begin as the best code of single squares of pixels: principal components as the linear maps of encoder and
        decoder, k-means as the codebook of `vq`. The networks begin at zero, so this is exactly what training improves.
        """
        # quantisers with fixed levels need each channel filled
        even = not self.quantizer.codebooks()
        begin_principal(self.encoder, self.decoder, x, self.downsample, even=even)
        self.quantizer.warm_start(self.encoder.linear(x))
        self.weights_changed()

    def synchronise(self, enabled: bool) -> None:
        self.quantizer.synchronise(enabled)

    # ---- identity, saving, loading -----------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Says what an id means: a hash of encoder and quantiser, their settings and weights. A decoder that was trained
        further draws the same ids better, so models and caches made with the old one still fit. Computed once, then kept
        until the weights change (`train`, `load_state_dict`, `to`, also of a module around it, and `weights_changed`
        forget it)."""
        if self._fingerprint is None:
            config = {name: value for name, value in self.config.items() if not name.startswith("decoder_")}
            state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("decoder.")}
            self._fingerprint = f"image_vq-{saved.digest(config, state)}"
        return self._fingerprint

    def save(self, path: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into the folder `path`, both or neither."""
        self.weights_changed()
        with safe_io.atomic_folder(path, last=saved.CONFIG) as folder:
            saved.write(folder, settings.FORMAT, self.config, self.state_dict(), self.fingerprint)

    @classmethod
    def tiny(cls) -> ImageVQ:
        """A small random tokenizer whose codebook is initialised, for tests."""
        tokenizer = cls(size=16, channels=8, codebook_size=16, code_dim=4).train()
        tokenizer.reconstruct(torch.rand(4, 3, 16, 16) * 2 - 1)
        tokenizer.weights_changed()
        return tokenizer.eval()

    @classmethod
    def from_directory(cls, path: str | Path) -> ImageVQ:
        """A saved tokenizer, in evaluation mode.

        Raises:
            ValueError: files missing, damaged, of other shapes, or not what was saved.
        """
        return cls(pretrained=str(path))

    def _load(self, folder: Path) -> None:
        self.load_state_dict(saved.read_weights(folder, self.state_dict()))
        self.eval()
        saved.check_whole(folder, self.fingerprint, self.config, self.state_dict())

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _device(self) -> torch.device:
        return self.decoder.last.weight.device

    def _dtype(self) -> torch.dtype:
        return self.decoder.last.weight.dtype

    def _pixels(self, raw: Image.Image | Tensor) -> Float[Tensor, "3 H W"]:
        if isinstance(raw, Tensor):
            if raw.ndim != 3 or raw.shape[0] != 3 or not raw.is_floating_point():
                raise ValueError(
                    f"expected a float tensor (3, H, W) in [-1, 1], got {raw.dtype} {tuple(raw.shape)}: convert it"
                )
            return raw.to(self._dtype())
        return pictures.to_unit(pictures.to_bytes(pictures.fit_square(raw, self.size))).to(self._dtype())

    def _encoded(self, ids: Tensor) -> Encoded:
        grid = (int(ids.shape[0]), int(ids.shape[1]))
        if self.quantizer.name == "residual":
            return Encoded(grid=grid, codes=ids.reshape(-1, ids.shape[-1]))
        return Encoded(grid=grid, ids=ids.reshape(-1))

    def _grid_of(self, item: Encoded) -> tuple[Tensor, str]:
        """Ids on a grid that can be decoded, and what had to be repaired."""
        residual = self.quantizer.name == "residual"
        content = item.codes if residual else item.ids
        rows, columns = item.grid if len(item.grid) == 2 else _squarish(len(item))
        tail = (self.quantizer.num_codes,) if residual else ()
        if content is None or rows * columns == 0 or content.shape[1:] != tail:
            side = self.size // self.downsample
            kind = "codes" if residual else "ids"
            return torch.zeros(side, side, *tail, dtype=torch.long), f"no {kind} to decode, grid {item.grid}"
        ids = content.detach().cpu().long()
        reasons = []
        bad = (ids < 0) | (ids >= self.quantizer.codebook_size)
        if bad.any():
            reasons.append(f"{int(bad.sum())} ids outside 0..{self.quantizer.codebook_size - 1}")
            ids = ids.clamp(0, self.quantizer.codebook_size - 1)
        if len(item.grid) != 2:
            reasons.append(f"grid {item.grid} has not two axes, took {rows}×{columns}")
            ids = ids[: rows * columns]
        return ids.reshape(rows, columns, *tail), "; ".join(reasons)


def _squarish(count: int) -> tuple[int, int]:
    side = math.isqrt(count)
    return (side, side)
