"""Pictures ↔ the features of a VQ autoencoder before they are quantised (Orthus, Kou et al. 2025, section 3.2).

The encoder and decoder are those of an `image_vq` tokenizer with one codebook. The backbone reads a feature by a soft lookup in
that codebook (`mm.soft_codes`), so that a model trained on the ids can go on with the vectors: `ModelTraining(adopt=…)`. The
decoder can be trained further on the features (`mm fit` with `TokenizerModule(frozen: [encoder])`), as Orthus does.

Letters in shapes: B batch, H and W rows and columns of pixels, h and w of the grid, C channels of a feature.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm import safe_io, saved
from mm.autoencoder import Decoder, Encoder, check_shape
from mm.latent_pictures import TrainedPictures
from mm.latents import Kind, LatentNormalizer
from mm.quantizers import Quantizer
from mm.soft_codes import SoftCodebook
from mm.tokenizers import _image_vq_settings as settings
from mm.trainable import Reconstruction

DEFAULTS: dict[str, Any] = dict(
    size=32, downsample=4, patch=4, channels=64, multipliers=[1], blocks=1, block="residual", decoder_channels=64,
    decoder_blocks=1, attention_heads=0, codebook_size=1024, code_dim=8, temperature=1.0, normalizer="scale", origin="",
)  # fmt: skip


class ImageSoftVQ(TrainedPictures):
    """Un-quantised features of a VQ tokenizer.

    Args:
        source: the VQ tokenizer: a folder that `ImageVQ.save` wrote, the name of one shipped with the package, or an
            `ImageVQ`.
        temperature: τ of the soft lookup, in squared units of the features (Orthus: 1); 0 = the nearest code.
        normalizer: how features are brought to unit spread (`scale`, `channel`, `robust` or `none`); a new tokenizer's
            statistics are those of the codebook's entries, until `mm fit` or `fit_normalizer` takes them from pictures.
        pretrained: a folder that `save` wrote; replaces every other argument.

    Raises:
        ValueError: neither `source` nor `pretrained`; a source that is no VQ tokenizer, or one without one codebook (fsq,
            residual, …); a temperature that is not a number of at least 0; files that are missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.image_softvq", "a soft-VQ tokenizer"
    inner = ("decoder_channels", "decoder_blocks")
    ready_made = True
    """Made without arguments it is trained: `mm tokenize` takes it by its name alone."""
    codes: Tensor

    def __init__(
        self,
        source: str | Path | nn.Module | None = "emoji_vq",
        temperature: float = 1.0,
        normalizer: Kind = "scale",
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        if pretrained is not None:
            self._made(pretrained, DEFAULTS)
            return
        _check_temperature(temperature)
        if source is None:
            raise ValueError("give source, a VQ tokenizer whose features are the tokens, or pretrained")
        config, weights, origin = _parts(source) if isinstance(source, nn.Module) else settings.read_whole(source)
        if config.get("quantizer") != "vq":
            raise ValueError(
                f"a soft lookup needs the quantizer vq, which has one codebook; got {config.get('quantizer')}"
            )
        mine = {"temperature": float(temperature), "normalizer": normalizer, "origin": origin}
        self._build({name: mine.get(name, config.get(name)) for name in DEFAULTS})
        weights["codes"] = weights[settings.CODEBOOK][0]
        kept = {name: value for name, value in self.state_dict().items() if name.startswith("normalizer.")}
        needed = {name: weights[name] for name in self.state_dict() if name in weights}
        self.load_state_dict(safe_io.fit_tensors("the VQ tokenizer", {**needed, **kept}, self.state_dict()))
        self.normalizer.fit(self.codes)
        self.eval()

    def _build(self, c: dict[str, Any]) -> None:
        check_shape(c)
        _check_temperature(c["temperature"])
        if c["normalizer"] == "token":
            raise ValueError(
                "the normalizer token forgets a feature's length, which its distance to codes needs; use scale"
            )
        for name in ("code_dim", "codebook_size"):
            saved.whole_number(name, c[name])
        if not (1 <= c["code_dim"] <= 4096 and 2 <= c["codebook_size"] <= 1 << 18):
            raise ValueError(
                f"a codebook of {c['codebook_size']} codes of width {c['code_dim']} is none that can be used"
            )
        self.config = c
        self.fit_to(c["size"], c["downsample"], c["code_dim"], LatentNormalizer(c["normalizer"], c["code_dim"]))
        shared: dict[str, Any] = dict(
            latent=c["code_dim"], patch=c["patch"], attention_heads=c["attention_heads"], block=c["block"]
        )
        self.encoder = Encoder([c["channels"] * m for m in c["multipliers"]], blocks=c["blocks"], **shared)
        widths = [c["decoder_channels"] * m for m in c["multipliers"]]
        self.decoder = Decoder(widths, blocks=c["decoder_blocks"], **shared)
        self.register_buffer("codes", torch.zeros(c["codebook_size"], c["code_dim"]))

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    def embedding(self, width: int) -> nn.Module:
        normalizer = self.normalizer
        return SoftCodebook(self.codes, width, self.config["temperature"], normalizer.shift, normalizer.scale)

    @property
    def origin(self) -> str:
        """Fingerprint of the VQ tokenizer whose ids the codes are."""
        return cast(str, self.config["origin"])

    def latents(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        return self.encoder(x)

    def pixels(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.decoder(z)

    # ---- training of the decoder -------------------------------------------------------------------------------------

    def reconstruct(self, batch: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        return Reconstruction(self.decoder(self.encoder(batch)), None, batch.new_zeros(()))

    def last_layer(self) -> Tensor:
        return self.decoder.last.weight

    @classmethod
    def tiny(cls) -> ImageSoftVQ:
        """A small random tokenizer, for tests."""
        return cls(_Random())


def _check_temperature(value: Any) -> None:
    saved.number("the temperature of a soft codebook", value, 0)


def _parts(vq: Any) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Settings, weights and fingerprint of an `ImageVQ`. Raises `ValueError` for another module."""
    config, fingerprint = getattr(vq, "config", None), getattr(vq, "fingerprint", None)
    if not isinstance(config, dict) or "quantizer" not in config or not isinstance(fingerprint, str):
        raise ValueError(
            f"source must be an ImageVQ or the folder of one, got {type(vq).__name__}: give a VQ tokenizer"
        )
    return config, dict(vq.state_dict()), fingerprint


class _Random(nn.Module):
    """A random VQ tokenizer, as far as its features go."""

    fingerprint = "random"

    def __init__(self) -> None:
        super().__init__()
        self.config = {**DEFAULTS, "size": 16, "patch": 2, "channels": 8, "multipliers": [1, 2], "decoder_channels": 8,
                       "codebook_size": 16, "code_dim": 4, "quantizer": "vq"}  # fmt: skip
        shared: dict[str, Any] = {"blocks": 1, "latent": 4, "patch": 2, "attention_heads": 0}
        self.encoder, self.decoder = Encoder([8, 16], **shared), Decoder([8, 16], **shared)
        self.quantizer = Quantizer(codebook_size=16, code_dim=4).train()
        self.quantizer(self.encoder(torch.rand(4, 3, 16, 16) * 2 - 1))
        self.eval()
