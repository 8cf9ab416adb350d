"""How it is spoken, as a few codes: pitch and loudness without the words and without the voice (Mega-TTS, Jiang et al. 2023,
arXiv 2306.03509).

The encoder sees the lowest bins of the mel spectrum only (up to about 600 Hz), where the pitch is and few words are, each bin
without its mean over the clip, which is the speaker's. Eight frames become one code of a small codebook, 7.8 a second: the
bottleneck keeps what is left of words and voice out. A decoder gives the bins back; it is there for training.
`mm fit -c configs/tokenizers/speech_prosody.yaml` trains both. Nothing makes sound of the codes by themselves.

Letters in shapes: B batch, F frames of the spectrum, L low bins, T codes, D their width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm import saved
from mm.interfaces import Encoded, Spec
from mm.quantizers import Quantizer
from mm.speech import ConvNeXtBlock, Frames, LogMel, Part, SpeechEncoder
from mm.speech_reader import HOP, N_FFT, RATE, ProsodyReader
from mm.trainable import Reconstruction

STRIDES = (2, 2, 2)
STRIDE = 8
"""Frames of the spectrum that one code stands for."""
SAMPLES = STRIDE * HOP
"""A code stands for so many samples (128 ms)."""
MAX_ELEMENTS = 256
"""Codes of one sound (32.8 s)."""
LEAST_SPREAD = 0.1
"""Of log-magnitudes: silence has none, and must not be blown up."""


class SpeechProsody(ProsodyReader):
    """A list of ids, 7.8 a second.

    Args:
        mels: bins of the whole spectrum, 0 to 8 kHz.
        low: L, how many of them are seen.
        width: channels of the convolutions.
        codebook_size: ids.
        code_dim: D.
        decay, dead_below, commitment: of the codebook, as in `mm.quantizers`.
        pretrained: a directory that `save` wrote. What it says replaces every other argument.

    Raises:
        ValueError: sizes out of range, or a saved tokenizer that is missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.speech_prosody", "a speech prosody"
    frame_rate = RATE / SAMPLES
    """Codes a second."""

    def __init__(
        self,
        mels: int = 80,
        low: int = 20,
        width: int = 64,
        codebook_size: int = 64,
        code_dim: int = 16,
        decay: float = 0.99,
        dead_below: float = 0.2,
        commitment: float = 0.25,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = dict(
            mels=mels,
            low=low,
            width=width,
            codebook_size=codebook_size,
            code_dim=code_dim,
            decay=decay,
            dead_below=dead_below,
            commitment=commitment,
        )
        self._made(pretrained, config)

    def _build(self, c: dict[str, Any]) -> None:
        saved.whole_number("mels", c["mels"], 1, 512)
        saved.whole_number("low", c["low"], 1, c["mels"])
        saved.whole_number("width", c["width"], 1, 4096)
        for name in ("codebook_size", "code_dim"):
            saved.whole_number(name, c[name])
        for name in ("decay", "dead_below", "commitment"):
            saved.number(name, c[name], 0)
        if c["decay"] >= 1:
            raise ValueError(f"decay must be below 1, got {c['decay']}")
        self.config, width = c, c["width"]
        self.mel = LogMel(RATE, N_FFT, HOP, c["mels"])
        self.encoder = SpeechEncoder(c["low"], width, [1, 1, 1, 1], list(STRIDES), c["code_dim"], 2)
        layers: list[nn.Module] = [Frames(c["code_dim"], width), ConvNeXtBlock(width, 2)]
        for stride in STRIDES:
            layers += [Part(width, stride), ConvNeXtBlock(width, 2)]
        last = nn.Linear(width, c["low"])
        # It begins with the mean contour, not with noise: to be rid of that, training would make all codes the same.
        nn.init.zeros_(last.weight)
        self.decoder = nn.Sequential(*layers, nn.LayerNorm(width), last)
        self.quantizer = Quantizer(
            "vq",
            codebook_size=c["codebook_size"],
            code_dim=c["code_dim"],
            decay=c["decay"],
            dead_below=c["dead_below"],
            commitment=c["commitment"],
        )

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="discrete",
            vocab_size=self.config["codebook_size"],
            max_grid=(MAX_ELEMENTS,),
            spatial=False,
            fingerprint=self.fingerprint,
        )

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def contours(self, x: Float[Tensor, "B S"], count: int | None = None) -> Float[Tensor, "B F L"]:
        """The low bins without their means, and with a spread of 1 over all of them; mean and spread are those of the first
        `count` samples. S is a multiple of `SAMPLES`."""
        low = self.mel(x)[..., : self.config["low"]]
        real = low if count is None else low[:, : -(-count // HOP)]
        low = low - real.mean(1, keepdim=True)
        spread = (real - real.mean(1, keepdim=True)).square().mean((1, 2), keepdim=True).sqrt()
        return (low / spread.clamp_min(LEAST_SPREAD)).to(self.encoder.last.weight.dtype)

    def latents(self, contours: Float[Tensor, "B F L"]) -> Float[Tensor, "B D 1 T"]:
        """What is quantised, as a map of one row."""
        return self.encoder(contours).transpose(1, 2)[:, :, None]

    @property
    def ready(self) -> bool:
        """Whether its codebook holds codes."""
        return all(bool(cast(Any, codebook).initted) for codebook in self.quantizer.codebooks())

    def reconstruct(self, contours: Float[Tensor, "B F L"]) -> Reconstruction:
        """There and back, with gradients; F is a multiple of `STRIDE`."""
        out = self.quantizer(self.latents(contours))
        back = self.decoder(out.latents[:, :, 0].transpose(1, 2).to(contours.dtype))
        return Reconstruction(back, out.ids[:, 0], out.loss)

    @torch.no_grad()
    def warm_start(self, contours: Float[Tensor, "B F L"]) -> None:
        """Fit the codebook to these."""
        self.quantizer.warm_start(self.latents(contours))
        self.weights_changed()

    def _read(self, samples: Float[Tensor, " S"]) -> Encoded:
        if not self.ready:  # it would fit the codebook to this very sound
            raise ValueError("the codebook of the prosody is empty: train it first, or load one that was saved")
        if len(samples) > MAX_ELEMENTS * SAMPLES:
            raise ValueError(
                f"got {len(samples) / RATE:.1f} s of sound, expected up to {MAX_ELEMENTS * SAMPLES / RATE:.1f} s: cut it into "
                "parts"
            )
        x = F.pad(samples, (0, -len(samples) % SAMPLES))[None]
        ids: Int[Tensor, " T"] = self.quantizer(self.latents(self.contours(x, len(samples)))).ids[0, 0]
        return Encoded(grid=(len(ids),), ids=ids.cpu())

    @classmethod
    def tiny(cls) -> SpeechProsody:
        """A small random one whose codebook is filled, for tests."""
        tokenizer = cls(mels=40, low=10, width=8, codebook_size=12, code_dim=4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            noise = torch.randn(4, 16 * SAMPLES) * torch.rand(4, 16, 1).expand(-1, -1, SAMPLES).reshape(4, -1)
            tokenizer.warm_start(tokenizer.contours(noise))
        return tokenizer.eval()
