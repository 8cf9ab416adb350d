"""Pictures ↔ discrete codes on ever finer grids (the tokenizer of VAR, Tian et al. 2024): a convolutional autoencoder around
`mm.multiscale.MultiScaleQuantizer`, for the scales order.

A picture of `size`×`size` becomes Σ side² ids over the `scales`, whose last is size / downsample. It is trained by `mm fit` with
`mm.training_tokenizer.TokenizerModule`. Of an item's first scales alone it decodes a coarser picture of the same size.

Letters in shapes: B batch, H and W rows and columns of pixels, N ids of all scales, n of the first ones, m of those and the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mm import pictures, saved
from mm.autoencoder import BlockName, Decoder, Encoder, begin_principal, check_shape
from mm.interfaces import Decoded, Encoded, Spec
from mm.multiscale import MultiScaleQuantizer
from mm.saved import FromSettings
from mm.trainable import Reconstruction, TrainableTokenizer


class ImageMSVQ(FromSettings, TrainableTokenizer):
    """Convolutional picture tokenizer with codes at several scales.

    Args:
        size: side of the square that pictures are fitted to, in pixels.
        downsample: pixels along a side for each cell of the finest scale: 4, 8 or 16.
        scales: sides of the grids, growing up to size / downsample.
        patch, channels, multipliers, blocks, block, decoder_channels, decoder_blocks, attention_heads: of the networks, as
            for `ImageVQ`.
        codebook_size, code_dim, phis, residual, commitment, decay, dead_below, normalize: of the quantiser, as for
            `mm.multiscale.MultiScaleQuantizer`.
        pretrained: a directory that `save` wrote, or the name of a tokenizer shipped with the package. Its configuration
            replaces every other argument.

    Raises:
        ValueError: sizes that do not fit each other, or a saved tokenizer that is missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.image_msvq", "a multi-scale image tokenizer"
    inner = ("decoder_channels", "decoder_blocks")

    def __init__(
        self,
        size: int = 32,
        downsample: int = 4,
        scales: Sequence[int] = (1, 2, 4, 8),
        patch: int = 2,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        block: BlockName = "residual",
        decoder_channels: int = 0,
        decoder_blocks: int = 0,
        attention_heads: int = 0,
        codebook_size: int = 1024,
        code_dim: int = 8,
        phis: int = 4,
        residual: float = 0.5,
        commitment: float = 0.25,
        decay: float = 0.99,
        dead_below: float = 0.5,
        normalize: bool = False,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = dict(
            size=size,
            downsample=downsample,
            scales=saved.as_list(scales),
            patch=patch,
            channels=channels,
            multipliers=saved.as_list(multipliers),
            blocks=blocks,
            block=block,
            decoder_channels=decoder_channels or channels,
            decoder_blocks=decoder_blocks or blocks,
            attention_heads=attention_heads,
            codebook_size=codebook_size,
            code_dim=code_dim,
            phis=phis,
            residual=saved.as_float(residual),
            commitment=saved.as_float(commitment),
            decay=saved.as_float(decay),
            dead_below=saved.as_float(dead_below),
            normalize=normalize,
        )
        self._made(pretrained, config)

    def _build(self, c: dict[str, Any]) -> None:
        check_shape(c)
        for name in ("codebook_size", "code_dim", "phis"):
            saved.whole_number(name, c[name])
        for name in ("residual", "commitment", "decay", "dead_below"):
            saved.number(name, c[name], 0)
        saved.whole_numbers("scales", c["scales"])
        side = c["size"] // c["downsample"]
        if c["scales"][-1] != side:
            raise ValueError(f"the last scale must be size / downsample, {side}, got {c['scales'][-1]}")
        self.config, self.size = c, c["size"]
        chosen = (
            "scales",
            "codebook_size",
            "code_dim",
            "phis",
            "residual",
            "commitment",
            "decay",
            "dead_below",
            "normalize",
        )
        self.quantizer = MultiScaleQuantizer(**{name: c[name] for name in chosen})
        shared: dict[str, Any] = dict(
            latent=c["code_dim"], patch=c["patch"], attention_heads=c["attention_heads"], block=c["block"]
        )
        self.encoder = Encoder([c["channels"] * m for m in c["multipliers"]], blocks=c["blocks"], **shared)
        widths = [c["decoder_channels"] * m for m in c["multipliers"]]
        self.decoder = Decoder(widths, blocks=c["decoder_blocks"], **shared)

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="discrete",
            vocab_size=self.quantizer.codebook_size,
            max_grid=self.quantizer.grids[-1],
            scales=self.quantizer.grids,
            scale_dim=self.quantizer.dim,
            spatial=False,
            fingerprint=self.fingerprint,
        )

    def encode(self, raw: Image.Image | Tensor) -> Encoded:
        """Ids of a picture, or of a float tensor (3, size, size) in [−1, 1]."""
        return self.encode_batch([raw])[0]

    def encode_batch(self, raws: Sequence[Image.Image | Tensor]) -> list[Encoded]:
        if not raws:
            return []
        ids = self.encode_pixels(torch.stack([self._pixels(raw) for raw in raws])).cpu()
        grids = self.quantizer.grids
        return [Encoded(grid=grids[-1], scales=grids, ids=one) for one in ids]

    def scale_inputs(self, ids: Int[Tensor, " n"], *, own: bool = False) -> Float[Tensor, "m D"]:
        return self.quantizer.scale_inputs(ids[None].to(self._device()), own=own)[0]

    def decode(self, encoded: Encoded) -> Decoded:
        """An RGB picture, of all scales or of the first ones. What can't be ids of whole scales is replaced, with `valid` off."""
        return self.decode_batch([encoded])[0]

    def decode_batch(self, items: Sequence[Encoded]) -> list[Decoded]:
        found = [self.quantizer.repaired(item) for item in items]
        out: dict[int, Decoded] = {}
        for count in {len(ids) for ids, _ in found}:
            where = [i for i, (ids, _) in enumerate(found) if len(ids) == count]
            pixels = pictures.from_unit(self.decode_ids(torch.stack([found[i][0] for i in where])))
            for i, one in zip(where, pixels, strict=True):
                reason = found[i][1]
                out[i] = Decoded(value=pictures.to_image(one), valid=not reason, reason=reason)
        return [out[i] for i in range(len(items))]

    # ---- tensors -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_pixels(self, x: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B N"]:
        """Ids of pictures in [−1, 1]."""
        training = self.training
        self.eval()
        try:
            return self.quantizer(self.encoder(x.to(self._device()))).ids
        finally:
            self.train(training)

    @torch.no_grad()
    def decode_ids(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B 3 H W"]:
        """Pictures, nominally in [−1, 1], of ids of whole scales."""
        return self.decoder(self.quantizer.lookup(ids.to(self._device())).to(self._dtype()))

    def reconstruct(self, batch: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        quantized = self.quantizer(self.encoder(batch))
        return Reconstruction(self.decoder(quantized.latents.to(self._dtype())), quantized.ids, quantized.loss)

    def last_layer(self) -> Tensor:
        return self.decoder.last.weight

    @torch.no_grad()
    def warm_start(self, x: Float[Tensor, "B 3 H W"]) -> None:
        """Begin as the best code of single squares of pixels: principal components as the linear maps of encoder and decoder,
        k-means over all scales as the codebook. The networks begin at zero, so this is exactly what training improves."""
        begin_principal(self.encoder, self.decoder, x, self.config["downsample"], even=False)
        self.quantizer.warm_start(self.encoder.linear(x))
        self.weights_changed()

    def synchronise(self, enabled: bool) -> None:
        self.quantizer.synchronise(enabled)

    @classmethod
    def tiny(cls) -> ImageMSVQ:
        """A small random tokenizer, for tests."""
        return cls(size=16, scales=[1, 2, 4], channels=8, codebook_size=16, code_dim=4).eval()

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _device(self) -> torch.device:
        return self.decoder.last.weight.device

    def _dtype(self) -> torch.dtype:
        return self.decoder.last.weight.dtype

    def _pixels(self, raw: Image.Image | Tensor) -> Float[Tensor, "3 H W"]:
        if not isinstance(raw, Tensor):
            return pictures.to_unit(pictures.to_bytes(pictures.fit_square(raw, self.size))).to(self._dtype())
        if raw.shape != (3, self.size, self.size) or not raw.is_floating_point():
            raise ValueError(
                f"expected floats (3, {self.size}, {self.size}) in [-1, 1], got {raw.dtype} {tuple(raw.shape)}: convert them"
            )
        return raw.to(self._dtype())
