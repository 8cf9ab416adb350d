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

from mm.reconstruction import hinge_loss
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


# --- networks that judge --------------------------------------------------------------------------------------------


class SpectrogramDiscriminator(nn.Module):
    """Convolutions over frames and bins of one spectrum; a score for every place of the last map."""

    window: Tensor

    def __init__(self, n_fft: int, channels: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", window(n_fft), persistent=False)
        made: list[nn.Module] = []
        for number in range(layers):
            stride = 2 if number else 1  # bins are halved, frames stay
            conv = nn.Conv2d(channels if number else 1, channels, (3, 9), (1, stride), (1, 4))
            made.append(nn.utils.parametrizations.weight_norm(conv))
        self.layers = nn.ModuleList(made)
        self.last = nn.utils.parametrizations.weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, x: Float[Tensor, "B S"]) -> list[Tensor]:
        """The maps of all layers, the scores last."""
        with torch.autocast(x.device.type, enabled=False):
            h = spectrum(x.float(), self.n_fft, self.window)[:, None]
        out: list[Tensor] = []
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.1)
            out.append(h)
        return [*out, self.last(h)]


class SpeechDiscriminators(nn.Module):
    """One discriminator for each of several resolutions."""

    def __init__(self, resolutions: Sequence[int] = (512, 1024, 2048), channels: int = 32) -> None:
        super().__init__()
        self.parts = nn.ModuleList(SpectrogramDiscriminator(n, channels) for n in resolutions)

    def forward(self, x: Float[Tensor, "B S"]) -> list[list[Tensor]]:
        return [part(x) for part in self.parts]

    def losses(self, output: Float[Tensor, "B S"], wanted: Float[Tensor, "B S"]) -> dict[str, Float[Tensor, ""]]:
        """`discriminator`, whose gradients reach only the networks here; `generator` and `features` (L1 distance of the maps
        in units of their mean size), whose gradients reach only `output`."""
        real, fake = self(wanted), self(output.detach())
        fixed = {name: p.detach() for name, p in self.named_parameters()}
        seen = torch.func.functional_call(self, fixed, (output,))
        count = len(self.parts)
        judged = [hinge_loss(r[-1], f[-1]) for r, f in zip(real, fake, strict=True)]
        near = [
            F.l1_loss(s.float(), r.detach().float()) / r.detach().float().abs().mean().clamp_min(1e-6)
            for maps, wants in zip(seen, real, strict=True)
            for s, r in zip(maps[:-1], wants[:-1], strict=True)
        ]
        return {
            "discriminator": torch.stack(judged).sum() / count,
            "generator": -torch.stack([maps[-1].float().mean() for maps in seen]).sum() / count,
            "features": torch.stack(near).mean(),
        }
