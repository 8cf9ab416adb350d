"""What decoded speech is judged by in training: spectra at several resolutions, and optionally networks that judge them.

| term | source |
|---|---|
| spectral convergence and log-magnitudes at several resolutions | Yamamoto et al. 2020, "Parallel WaveGAN", section 2.2 |
| log-mel L1 | Kong et al. 2020, "HiFi-GAN", equation 5 |
| multi-resolution spectrogram discriminator, hinge loss, feature matching | Jang et al. 2021, "UnivNet"; Siuzdak 2023 |

All of it in float32, whatever the precision around it: logarithms of small magnitudes don't bear less.

Letters in shapes: B batch, S samples, F frames, N bins of a spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.speech import FLOOR, LogMel, frames, window

RESOLUTIONS = (256, 512, 1024, 2048)


def spectrum(x: Float[Tensor, "B S"], n_fft: int, w: Float[Tensor, " n_fft"]) -> Float[Tensor, "B F N"]:
    """Magnitudes, a frame every quarter of a window."""
    found = torch.fft.rfft(frames(x, n_fft, n_fft // 4) * w)
    return torch.view_as_real(found).square().sum(-1).add(1e-12).sqrt()


class SpectralLosses(nn.Module):
    """The terms of one pass: `stft` (spectral convergence + L1 of log-magnitudes, mean over the resolutions) and `mel` (L1 of
    log-mel frames)."""

    def __init__(self, rate: int, n_fft: int, hop: int, mels: int, resolutions: Sequence[int] = RESOLUTIONS) -> None:
        super().__init__()
        self.mel = LogMel(rate, n_fft, hop, mels)
        self.resolutions = list(resolutions)
        for n in self.resolutions:
            self.register_buffer(f"window{n}", window(n), persistent=False)

    def forward(self, output: Float[Tensor, "B S"], wanted: Float[Tensor, "B S"]) -> dict[str, Float[Tensor, ""]]:
        with torch.autocast(output.device.type, enabled=False):
            output, wanted = output.float(), wanted.float()
            stft = output.new_zeros(())
            for n in self.resolutions:
                w = getattr(self, f"window{n}")
                made = spectrum(output, n, w)
                with torch.no_grad():
                    real = spectrum(wanted, n, w)
                distance = (made - real).square().sum((1, 2)).add(1e-8).sqrt()
                convergence = distance / real.square().sum((1, 2)).sqrt().clamp_min(1.0)
                logs = F.l1_loss(made.clamp_min(FLOOR).log(), real.clamp_min(FLOOR).log())
                stft = stft + convergence.mean() + logs
            with torch.no_grad():
                mel = self.mel(wanted)
            return {"stft": stft / len(self.resolutions), "mel": F.l1_loss(self.mel(output), mel)}
