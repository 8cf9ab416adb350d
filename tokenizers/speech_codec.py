"""Speech ↔ a few discrete codes for every 32 ms (1.0 kbit/s): log-mel frames, a ConvNeXt encoder, a residual quantiser, a
ConvNeXt decoder and an inverse STFT.

Codes and sound need no adversary here: the decoder's head states magnitudes and phases (Vocos), the losses compare spectra. It is
trained by `mm fit -c configs/tokenizers/speech_codec.yaml`, saved as safetensors and one JSON, and loaded by `from_directory`.

An item of a stream holds up to 256 elements (8.2 s); `encode` and `decode` take longer sounds.

Letters in shapes: B batch, S samples, T elements, K sub-codes, D latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mm import saved
from mm.audio import Audio
from mm.interfaces import Encoded, Spec
from mm.quantizers import Quantized, Quantizer
from mm.speech_tokenizer import MAX_ELEMENTS, SpeechTokenizer
from mm.tokenizers import _speech_settings as settings
from mm.trainable import Reconstruction

MAX_CODES = 32


class SpeechCodec(SpeechTokenizer):
    """Residual codes of speech.

    Args:
        rate: samples a second that sounds are brought to, 8000 or 16000.
        mels: bins of the mel spectrum, of which there are 62.5 a second.
        width, decoder_width: channels of encoder and decoder; 0 = as the encoder.
        strides: frames that are joined to one, one step after the other; [2] makes 31.25 elements a second.
        blocks, decoder_blocks: ConvNeXt blocks at each rate, from 62.5 Hz down; one more than `strides`.
        expansion: hidden width of a block in units of its width.
        quantizer: `residual` (K codebooks, each of what the former ones left) or `fsq` (K groups of channels, each rounded to
            `levels`), see `mm.quantizers`.
        num_codes: K.
        codebook_size: ids a sub-code can take, of `residual`; those of `fsq` follow from `levels`.
        code_dim: D of `residual`.
        levels: levels of each channel of a group of `fsq`.
        decay, dead_below, commitment: of the codebooks, as in `mm.quantizers`.
        dropout: of `residual`, share of the training sounds that are decoded from fewer codebooks (1 to K − 1), so that the
            first ones say most (SoundStream, section III.C).
        pretrained: a directory that `save` wrote, or the name of a tokenizer shipped with the package. Its configuration
            replaces every other argument.

    Raises:
        ValueError: sizes that do not fit each other, or a saved tokenizer that is missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.speech_codec", "a speech codec"
    inner = ("decoder_width", "decoder_blocks", "decay", "dead_below", "commitment", "dropout")

    def __init__(
        self,
        rate: int = 16_000,
        mels: int = 80,
        width: int = 160,
        decoder_width: int = 0,
        strides: Sequence[int] = (2,),
        blocks: Sequence[int] = (4, 1),
        decoder_blocks: Sequence[int] = (5, 2),
        expansion: int = 3,
        quantizer: Literal["residual", "fsq"] = "residual",
        num_codes: int = 4,
        codebook_size: int = 256,
        code_dim: int = 48,
        levels: Sequence[int] = (4, 4, 4, 4),
        decay: float = 0.99,
        dead_below: float = 0.05,
        commitment: float = 0.25,
        dropout: float = 0.25,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = dict(
            rate=rate,
            mels=mels,
            width=width,
            decoder_width=decoder_width or width,
            strides=saved.as_list(strides),
            blocks=saved.as_list(blocks),
            decoder_blocks=saved.as_list(decoder_blocks),
            expansion=expansion,
            quantizer=quantizer,
            num_codes=num_codes,
            codebook_size=codebook_size,
            code_dim=code_dim,
            levels=saved.as_list(levels),
            decay=decay,
            dead_below=dead_below,
            commitment=commitment,
            dropout=dropout,
        )
        self._made(pretrained, config)

    def _build(self, c: dict[str, Any]) -> None:
        settings.check(c)
        if c["quantizer"] not in ("residual", "fsq"):
            raise ValueError(f"quantizer must be residual or fsq, got {c['quantizer']!r:.60}")
        saved.whole_number("num_codes", c["num_codes"], 1, MAX_CODES)
        for name in ("codebook_size", "code_dim"):
            saved.whole_number(name, c[name])
        saved.whole_numbers("levels", c["levels"])
        for name in ("decay", "dead_below", "commitment", "dropout"):
            saved.number(name, c[name], 0)
        if c["dropout"] > 1 or c["decay"] >= 1:
            raise ValueError(f"dropout is at most 1 and decay below 1, got {c['dropout']} and {c['decay']}")
        self.num_codes, fsq = c["num_codes"], c["quantizer"] == "fsq"
        quantizer = Quantizer(
            c["quantizer"],
            codebook_size=0 if fsq else c["codebook_size"],
            code_dim=c["code_dim"],
            levels=c["levels"],
            num_codes=c["num_codes"],
            decay=c["decay"],
            dead_below=c["dead_below"],
            commitment=c["commitment"],
        )
        latent = quantizer.dim * (c["num_codes"] if fsq else 1)
        self.make_networks(c, hop=settings.hop(c["rate"]), inward=latent, outward=latent)
        self.quantizer = quantizer

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="codes",
            vocab_size=self.quantizer.codebook_size,
            num_codes=self.num_codes,
            max_grid=(MAX_ELEMENTS,),
            sample_rate=self.rate,
            frame_rate=self.frame_rate,
            fingerprint=self.fingerprint,
        )

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def quantized(self, z: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], Int[Tensor, "B T K"], Tensor]:
        """The nearest codes with gradients passed straight through, ids, and the quantiser's losses."""
        if self.quantizer.name == "residual":
            out = self.quantizer(z.transpose(1, 2)[:, :, None])
            return out.latents[:, :, 0].transpose(1, 2), out.ids[:, 0], out.loss
        # Groups of channels, one beside the other: the same quantiser for each.
        groups = z.unflatten(2, (self.num_codes, -1)).permute(0, 3, 2, 1)
        out = cast(Quantized, self.quantizer(groups))
        return out.latents.permute(0, 3, 2, 1).flatten(2), out.ids.transpose(1, 2), out.loss

    def looked_up(self, ids: Int[Tensor, "B T K"]) -> Float[Tensor, "B T D"]:
        """The latents that ids stand for."""
        if self.quantizer.name == "residual":
            return self.quantizer.lookup(ids[:, None])[:, :, 0].transpose(1, 2)
        return self.quantizer.lookup(ids.transpose(1, 2)).permute(0, 3, 2, 1).flatten(2)

    @property
    def ready(self) -> bool:
        """Whether its codebooks hold codes; those of `fsq` always do."""
        return all(bool(cast(Any, codebook).initted) for codebook in self.quantizer.codebooks())

    def elements(self, z: Float[Tensor, "B T D"]) -> Int[Tensor, "B T K"]:
        if not self.ready:  # it would fit them to this very sound
            raise ValueError("the codec's codebooks are empty: train it first, or load one that was saved")
        return self.quantized(z)[1]

    def sound(self, content: Int[Tensor, "B T K"]) -> Float[Tensor, "B S"]:
        return self.decoder(self.looked_up(content).to(self._like().dtype))

    # ---- training ----------------------------------------------------------------------------------------------------

    def reconstruct(self, batch: Float[Tensor, "B S"]) -> Reconstruction:
        _, z = self.analysed(batch)
        latents, ids, loss = self.quantized(z)
        if self.training and self.config["dropout"] and self.quantizer.name == "residual" and self.num_codes > 1:
            latents = self._fewer(z, latents, ids)
        return Reconstruction(self.decoder(latents.to(z.dtype)), ids, loss)

    def _fewer(self, z: Tensor, latents: Tensor, ids: Int[Tensor, "B T K"]) -> Float[Tensor, "B T D"]:
        """For some of the sounds, what their first codebooks say."""
        with torch.no_grad():
            stages = self.quantizer.stages(ids)
            kept = torch.randint(1, self.num_codes, (len(z),), device=z.device)
            fewer = stages.cumsum(0)[kept - 1, torch.arange(len(z), device=z.device)]
            chosen = torch.rand(len(z), 1, 1, device=z.device) < self.config["dropout"]
        return torch.where(chosen, z + (fewer - z).detach(), latents)

    @torch.no_grad()
    def warm_start(self, batch: Float[Tensor, "B S"]) -> None:
        """Fit the codebooks to these sounds, which are more than a batch has."""
        self.train()
        self.quantized(self.analysed(batch)[1])
        self.weights_changed()

    def synchronise(self, enabled: bool) -> None:
        self.quantizer.synchronise(enabled)

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _encoded(self, content: Int[Tensor, "T K"]) -> Encoded:
        return Encoded(grid=(len(content),), codes=content)

    def _repaired(self, item: Encoded) -> tuple[Int[Tensor, "T K"], str]:
        held, size = item.codes, self.quantizer.codebook_size
        if held is None or not len(held) or held.ndim != 2:
            return torch.zeros(1, self.num_codes, dtype=torch.long), f"no {self.num_codes} codes an element to decode"
        reasons = [] if self.ready else ["the codec is not trained yet, its codebooks are empty"]
        ids = held.detach().cpu().long()
        if ids.shape[1] != self.num_codes:
            reasons.append(f"{ids.shape[1]} codes an element, expected {self.num_codes}")
            ids = F.pad(ids[:, : self.num_codes], (0, max(0, self.num_codes - ids.shape[1])))
        if bad := int(((ids < 0) | (ids >= size)).sum()):
            reasons.append(f"{bad} ids outside 0..{size - 1}")
            ids = ids.clamp(0, size - 1)
        if len(item.grid) != 1:
            reasons.append(f"grid {item.grid} has not one axis")
        return ids, "; ".join(reasons)

    @classmethod
    def tiny(cls) -> SpeechCodec:
        """A small random codec whose codebooks are initialised, for tests."""
        tokenizer = cls(width=16, blocks=(1, 1), decoder_blocks=(1, 1), expansion=2, codebook_size=16, code_dim=4)
        x = torch.randn(4, 16_000) * torch.linspace(0.001, 0.5, 16_000)
        tokenizer.warm_start(x[:, : 31 * tokenizer.samples_per_element])
        return tokenizer.eval()

    @classmethod
    def examples(cls) -> list[Audio]:
        """Sounds of several rates and lengths."""
        return settings.examples()
