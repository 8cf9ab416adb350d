"""Pictures ↔ vectors by `diffusers.AutoencoderKL` (the VAE of Stable Diffusion, FLUX and others).

A vector is (mean − shift_factor) · scaling_factor, as the pipelines of `diffusers` have it. Both factors belong to the weights:
latents without them have another spread than what was meant, so a checkpoint that doesn't state its scaling factor is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm import safe_io, saved
from mm.latent_pictures import LatentPictures, check_pack
from mm.latents import LatentNormalizer
from mm.vq_adapter import CONFIG, SETTINGS, WEIGHTS, load_config, load_network

SIZE = 256
MIN_FACTOR, MAX_FACTOR = 1e-4, 1e4
"""Scaling factors beyond are mistakes: published ones are 0.13 to 1.5."""


class ImageKL(LatentPictures):
    """A `diffusers.AutoencoderKL` as a tokenizer; it is used as it is, and not trained.

    Args:
        path: folder of the checkpoint (`config.json` and safetensors), or an `AutoencoderKL`.
        size: side of the square that pictures are fitted to; 0 = what was saved, else 256.
        scaling_factor: where the checkpoint doesn't state one; 0 = the checkpoint's.
        pack: joins squares of pack×pack latents to one token (NextStep-1, FLUX: 2); 0 = what was saved, else 1.

    Raises:
        ValueError: no scaling factor; one that is not a number from 1e-4 to 1e4; files missing, damaged or foreign.
    """

    def __init__(
        self, path: str | Path | torch.nn.Module, size: int = 0, scaling_factor: float = 0.0, pack: int = 0
    ) -> None:
        super().__init__()
        if isinstance(path, str | Path):
            path = str(path)
            config, settings = load_config(path), _settings(path)
            network: Any = load_network(path, _build)
        else:
            held = getattr(path, "config", None)
            known = hasattr(held, "latent_channels") and hasattr(held, "block_out_channels")
            if not isinstance(path, torch.nn.Module) or not known:
                raise ValueError(
                    f"expected the folder of a VAE (str or Path) or a diffusers.AutoencoderKL, got {type(path).__name__}: "
                    "give one of them"
                )
            network, settings = path, {}
            config = dict(network.config)
        factor = scaling_factor or config.get("scaling_factor")
        if factor is None:
            raise ValueError(
                f"the configuration of the VAE {path!r:.80} states no scaling_factor, without which its latents have no "
                "known spread; give scaling_factor (Stable Diffusion 1: 0.18215)"
            )
        shift = config.get("shift_factor") or 0.0
        for name, value in (("scaling_factor", factor), ("shift_factor", shift)):
            saved.number(f"{name} of the VAE", value)
        if factor <= 0:
            raise ValueError(f"scaling_factor of the VAE must be above 0, got {factor}")
        if not MIN_FACTOR <= factor <= MAX_FACTOR:
            raise ValueError(
                f"scaling_factor of the VAE must be from {MIN_FACTOR:g} to {MAX_FACTOR:g} (1 / the latents' deviation), "
                f"got {factor:g}: correct it"
            )
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise ValueError(
                "this VAE normalises its latents by channel (latents_mean, latents_std); that is not supported"
            )
        # of the network, which has defaults for what a configuration leaves out
        channels, downsample = network.config.latent_channels, 2 ** (len(network.config.block_out_channels) - 1)
        pack = settings.get("pack", 1) if pack == 0 and not isinstance(pack, bool) else pack
        check_pack(pack)
        normalizer = LatentNormalizer("scale", channels * pack**2, float(factor))
        normalizer.shift.fill_(float(shift))
        self.fit_to(size or settings.get("size", SIZE), downsample, channels, normalizer, pack)
        self.network = network.requires_grad_(False).eval()
        self.factors = {"scaling_factor": float(factor), "shift_factor": float(shift)}

    @classmethod
    def tiny(cls) -> ImageKL:
        """A random instance for tests: 16×16 pixels, 8×8 vectors of 4."""
        config = {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "shift_factor": 0.1,
        }
        return cls(_build(config), size=16)

    def latents(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        return self.network.encode(x).latent_dist.mode()

    def pixels(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.network.decode(z).sample

    def identity(self) -> str:
        return f"image_kl-{saved.digest({**self.factors, 'pack': self.pack}, self.network.state_dict())}"

    def train(self, mode: bool = True) -> ImageKL:
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    def save(self, path: str | Path) -> None:
        """A folder that `from_directory` reads: the network's configuration, its weights, and the settings here."""
        config = {**json.loads(self.network.to_json_string()), **self.factors}
        with safe_io.atomic_folder(path, last=CONFIG) as folder:
            safe_io.write_tensors(folder / WEIGHTS, self.network.state_dict())
            safe_io.write_json(folder / SETTINGS, {"size": self.size, "pack": self.pack})
            safe_io.write_json(folder / CONFIG, config)

    @classmethod
    def from_directory(cls, path: str | Path) -> ImageKL:
        """The tokenizer that `save` wrote. Raises `ValueError` as the constructor does."""
        return cls(str(path))


def _settings(folder: str) -> dict[str, int]:
    """`size` and `pack` that `save` wrote beside a network; empty for a published checkpoint."""
    path = safe_io.inside(folder, SETTINGS)
    if not path.exists():
        return {}
    settings = safe_io.read_json(path)
    if any(isinstance(v, bool) or not isinstance(v, int) for v in (settings.get("size"), settings.get("pack"))):
        raise ValueError(f"{str(path)!r} has a wrong size or pack; save the tokenizer again")
    return {key: settings[key] for key in ("size", "pack")}


def _build(config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    network: Any = AutoencoderKL(**{name: value for name, value in config.items() if not name.startswith("_")})
    return network
