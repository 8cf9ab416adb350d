"""Speech ↔ a vector for every 32 ms: log-mel frames, a ConvNeXt encoder with a Gaussian bottleneck (VAE, Kingma and Welling 2014;
with a small weight on the divergence: Rombach et al. 2022, section 3.1), a ConvNeXt decoder with two heads, log-mel frames and
an inverse STFT.

The vectors are the means, normalised by channel. It is trained by `mm fit -c configs/tokenizers/speech_vae.yaml`, saved as
safetensors and one JSON, and loaded by `from_directory`.

An item of a stream holds up to 256 elements (8.2 s); `encode` and `decode` take longer sounds.

Letters in shapes: B batch, S samples, T elements, D latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mm import saved
from mm.audio import Audio
from mm.interfaces import Encoded, Spec
from mm.latents import Kind, LatentNormalizer
from mm.speech import griffin_lim
from mm.speech_tokenizer import MAX_ELEMENTS, SpeechTokenizer
from mm.tokenizers import _speech_settings as settings
from mm.trainable import Reconstruction

MAX_LATENT = 256
BOUND = 100.0
"""Normalised vectors are held within ±this when they are decoded; real ones stay below 10."""
VOCODERS = ("istft", "griffin_lim")


class SpeechVAE(SpeechTokenizer):
    """Vectors of speech.

    Args:
        rate, mels, width, decoder_width, strides, blocks, decoder_blocks, expansion: as for `SpeechCodec`; strides [2] make
            31.25 vectors a second, [3] 20.8.
        latent: D.
        kl: weight of the divergence from a standard normal distribution, a latent's number (mean over all of them).
        mel_weight: weight of the L1 distance of the decoder's log-mel frames.
        normalizer: how vectors are brought to unit spread (`mm.latents`); its statistics are taken from training sounds each
            time the tokenizer is saved.
        vocoder: what makes sound: `istft`, the trained head, or `griffin_lim`, which finds phases for the decoded mel frames
            without training. Not saved: it may be chosen for any saved tokenizer.
        pretrained: a directory that `save` wrote, or the name of a tokenizer shipped with the package. Its configuration
            replaces every other argument but `vocoder`.

    Raises:
        ValueError: sizes that do not fit each other, or a saved tokenizer that is missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.speech_vae", "a speech autoencoder"
    inner = ("decoder_width", "decoder_blocks", "kl", "mel_weight")

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
        latent: int = 16,
        kl: float = 1e-2,
        mel_weight: float = 1.0,
        normalizer: Kind = "channel",
        vocoder: Literal["istft", "griffin_lim"] = "istft",
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        if vocoder not in VOCODERS:
            raise ValueError(f"vocoder must be {' or '.join(VOCODERS)}, got {vocoder!r:.60}")
        self.vocoder = vocoder
        config: dict[str, Any] = dict(
            rate=rate,
            mels=mels,
            width=width,
            decoder_width=decoder_width or width,
            strides=saved.as_list(strides),
            blocks=saved.as_list(blocks),
            decoder_blocks=saved.as_list(decoder_blocks),
            expansion=expansion,
            latent=latent,
            kl=kl,
            mel_weight=mel_weight,
            normalizer=normalizer,
        )
        self._made(pretrained, config)

    def _build(self, c: dict[str, Any]) -> None:
        settings.check(c)
        saved.whole_number("latent", c["latent"], 1, MAX_LATENT)
        for name in ("kl", "mel_weight"):
            saved.number(name, c[name], 0)
        if c["normalizer"] == "token":
            raise ValueError(
                "normalizer token needs a decoder that reads such vectors; take channel, robust, scale or none"
            )
        normalizer = LatentNormalizer(c["normalizer"], c["latent"])
        hop = settings.hop(c["rate"])
        self.make_networks(c, hop=hop, inward=2 * c["latent"], outward=c["latent"], mels=c["mels"])
        self.normalizer = normalizer

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="continuous",
            dim=self.config["latent"],
            max_grid=(MAX_ELEMENTS,),
            sample_rate=self.rate,
            frame_rate=self.frame_rate,
            fingerprint=self.fingerprint,
        )

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def elements(self, z: Float[Tensor, "B T two_D"]) -> Float[Tensor, "B T D"]:
        mean = z.chunk(2, dim=2)[0]
        return self.normalizer(mean).float()

    def sound(self, content: Float[Tensor, "B T D"]) -> Float[Tensor, "B S"]:
        rows = content.clamp(-BOUND, BOUND).to(self._like().dtype)
        z = self.normalizer.inverse(rows) if self.normalizer.ready else rows
        h = self.decoder.features(z)
        if self.vocoder == "istft":
            return self.decoder.head(h)
        assert self.decoder.mel is not None
        return griffin_lim(self.decoder.mel(h).float().clamp(max=8.0), self.rate, self.n_fft, self.hop)

    # ---- training ----------------------------------------------------------------------------------------------------

    def reconstruct(self, batch: Float[Tensor, "B S"]) -> Reconstruction:
        mel, z = self.analysed(batch)
        mean, log_variance = z.float().chunk(2, dim=2)
        log_variance = log_variance.clamp(-30.0, 20.0)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        drawn = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        h = self.decoder.features(drawn.to(z.dtype))
        assert self.decoder.mel is not None
        loss = self.config["kl"] * divergence
        loss = loss + self.config["mel_weight"] * F.l1_loss(self.decoder.mel(h).float(), mel)
        return Reconstruction(self.decoder.head(h), None, loss)

    @torch.no_grad()
    def before_saving(self, batch: Float[Tensor, "B S"]) -> None:
        training = self.training
        self.eval()
        means = [self.analysed(part)[1].chunk(2, dim=2)[0].flatten(0, 1) for part in batch.split(16)]
        self.train(training)
        self.normalizer.fit(torch.cat(means).float())
        self.weights_changed()

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _encoded(self, content: Float[Tensor, "T D"]) -> Encoded:
        return Encoded(grid=(len(content),), latents=content)

    def _repaired(self, item: Encoded) -> tuple[Float[Tensor, "T D"], str]:
        held, width = item.latents, self.config["latent"]
        if held is None or held.ndim != 2 or held.shape[1] != width or not len(held):
            return torch.zeros(1, width), f"no vectors of width {width} to decode"
        reasons = []
        rows = held.detach().float().cpu()
        if not self.normalizer.ready:
            reasons.append("the tokenizer is not trained yet, its normaliser has no statistics")
        if not bool(rows.isfinite().all()):
            reasons.append("the vectors hold values that are not numbers")
            rows = torch.where(rows.isfinite(), rows, 0.0)
        if len(item.grid) != 1:
            reasons.append(f"grid {item.grid} has not one axis")
        return rows, "; ".join(reasons)

    @classmethod
    def tiny(cls) -> SpeechVAE:
        """A small random tokenizer whose normaliser is fitted, for tests."""
        tokenizer = cls(width=16, blocks=(1, 1), decoder_blocks=(1, 1), expansion=2, latent=4)
        x = torch.randn(4, 16_000) * torch.linspace(0.001, 0.5, 16_000)
        tokenizer.before_saving(x[:, : 31 * tokenizer.samples_per_element])
        return tokenizer.eval()

    @classmethod
    def examples(cls) -> list[Audio]:
        """Sounds of several rates and lengths."""
        return settings.examples()
