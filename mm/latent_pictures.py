"""What tokenizers share that turn a picture into a grid of vectors and back: fitting, batching, normalising, decoding that
never fails. A tokenizer file adds its network.

Letters in shapes: B batch, H and W rows and columns of pixels, h and w of the grid, C channels of the network's latents,
D = C · pack² width of a token, N tokens of one picture.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mm import pictures, saved
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec
from mm.latents import LatentNormalizer
from mm.saved import FromSettings
from mm.trainable import TrainableTokenizer

MAX_AXIS = 256
"""Largest extent of a grid that the vocabulary's size controls can state."""
BATCH_PIXELS = 1 << 20
"""Pixels that go through a network at once, at the most (16 pictures of 256×256); bounds memory, not results."""
MAX_PACK = 16


def check_pack(pack: Any) -> None:
    """Raises `ValueError` for a `pack` that is none; ask before a normaliser is made, whose width grows with its square."""
    saved.whole_number("pack", pack, 1, MAX_PACK)


class LatentPictures(ModalityTokenizer, saved.Fingerprinted):
    """Pictures ↔ vectors, by a network that a subclass brings as `latents` and `pixels`. A subclass's constructor calls
    `fit_to` once it knows its sizes.

    `pack` joins squares of pack×pack latents to one token, channel by channel and then row by row (MAR, NextStep-1).
    """

    normalizer: LatentNormalizer
    spatial = True
    """See `Spec.spatial`."""

    def fit_to(self, size: int, downsample: int, channels: int, normalizer: LatentNormalizer, pack: int = 1) -> None:
        """Side of the square that pictures are fitted to, pixels a latent along a side, and C."""
        check_pack(pack)
        saved.whole_number("size", size)
        step = downsample * pack
        if size < step or size % step or size // step > MAX_AXIS:
            raise ValueError(
                f"size must be a multiple of {step} (downsample · pack) up to {step * MAX_AXIS}, got {size} with pack {pack}"
            )
        self.size, self.downsample, self.channels, self.pack = size, downsample, channels, pack
        self.normalizer = normalizer

    # --- what a tokenizer file implements -----------------------------------------------------------------------------

    @abc.abstractmethod
    def latents(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Of pictures in [−1, 1] whose sides `downsample` divides; the mean, where there is a distribution."""

    @abc.abstractmethod
    def pixels(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pictures, nominally in [−1, 1]."""

    @abc.abstractmethod
    def identity(self) -> str:
        """What a vector means, hashed: settings and weights of encoder and normaliser."""

    # --- the plug-in contract -----------------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="continuous", dim=self.width, max_grid=self.largest, spatial=self.spatial, fingerprint=self.fingerprint
        )

    @property
    def largest(self) -> tuple[int, int]:
        """Rows and columns of the grid of a whole picture."""
        side = self.size // (self.downsample * self.pack)
        return side, side

    @property
    def width(self) -> int:
        """D."""
        return self.channels * self.pack**2

    @property
    def fingerprint(self) -> str:
        """Computed once, then kept until the weights change (`train`, `load_state_dict`, `to`, also of a module around it, and
        `weights_changed` forget it)."""
        if self._fingerprint is None:
            self._fingerprint = self.identity()
        return self._fingerprint

    def encode(self, raw: Image.Image | Tensor) -> Encoded:
        """Vectors of a picture (fitted to the square of `size`, over white), or of a float tensor (3, H, W) in [−1, 1]
        whose sides `downsample · pack` divides and that is no larger than that square."""
        return self.encode_batch([raw])[0]

    @torch.no_grad()
    def encode_batch(self, raws: Sequence[Image.Image | Tensor]) -> list[Encoded]:
        tensors = [self._pixels(raw) for raw in raws]
        out: dict[int, Encoded] = {}
        for where in self._batches([tuple(t.shape) for t in tensors]):
            grid, rows = self.tokens(torch.stack([tensors[i] for i in where]).to(self._like()))
            for i, one in zip(where, rows.float().cpu(), strict=True):
                out[i] = Encoded(grid=grid, latents=one)
        return [out[i] for i in range(len(raws))]

    def decode(self, encoded: Encoded) -> Decoded:
        """An RGB picture; what is not a number is taken to be 0, and a grid that isn't one of this tokenizer's replaced,
        with `valid` off. Without statistics of the normaliser the network reads the vectors as they are, with `valid` off."""
        return self.decode_batch([encoded])[0]

    @torch.no_grad()
    def decode_batch(self, items: Sequence[Encoded]) -> list[Decoded]:
        repaired = [self._repaired(item) for item in items]
        untrained = (
            "" if self.normalizer.ready else "the tokenizer is not trained yet, its normaliser has no statistics"
        )
        out: dict[int, Decoded] = {}
        for where in self._batches([grid for grid, _, _ in repaired]):
            grid = repaired[where[0]][0]
            rows = torch.stack([repaired[i][1] for i in where]).to(self._like())
            made = self.pixels(self.map(rows, grid)) if untrained else self.untoken(rows, grid)
            for i, pixels in zip(where, pictures.from_unit(made.float().cpu()), strict=True):
                reason = "; ".join(filter(None, (untrained, repaired[i][2])))
                out[i] = Decoded(value=pictures.to_image(pixels), valid=not reason, reason=reason)
        return [out[i] for i in range(len(items))]

    # --- tensors ------------------------------------------------------------------------------------------------------

    def tokens(self, x: Float[Tensor, "B 3 H W"]) -> tuple[tuple[int, int], Float[Tensor, "B N D"]]:
        """The grid and the normalised vectors of pictures."""
        training = self.training
        self.eval()
        try:
            z = self.latents(x)
        finally:
            if training:
                self.train()
        grid, rows = self.rows(z)
        return grid, self.normalizer(rows)

    def untoken(self, rows: Float[Tensor, "B N D"], grid: tuple[int, ...]) -> Float[Tensor, "B 3 H W"]:
        """Pictures of normalised vectors."""
        return self.pixels(self.map(self.normalizer.inverse(rows), grid))

    def rows(self, z: Float[Tensor, "B C h w"]) -> tuple[tuple[int, int], Float[Tensor, "B N D"]]:
        """A map as its grid of tokens, and the tokens row by row."""
        packed = F.pixel_unshuffle(z, self.pack) if self.pack > 1 else z
        return (int(packed.shape[2]), int(packed.shape[3])), packed.flatten(2).transpose(1, 2)

    def map(self, rows: Float[Tensor, "B N D"], grid: tuple[int, ...]) -> Float[Tensor, "B C h w"]:
        """The inverse of `rows`."""
        packed = rows.transpose(1, 2).unflatten(2, grid)
        return F.pixel_shuffle(packed, self.pack) if self.pack > 1 else packed

    @torch.no_grad()
    def fit_normalizer(self, x: Float[Tensor, "B 3 H W"]) -> None:
        """Take the normaliser's statistics from pictures in [−1, 1]."""
        training = self.training
        self.eval()
        parts = [self.rows(self.latents(part.to(self._like())))[1].flatten(0, 1) for part in x.split(self._batch)]
        self.train(training)
        self.normalizer.fit(torch.cat(parts))
        self.weights_changed()

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _like(self) -> Tensor:
        return next(self.parameters())

    def _pixels(self, raw: Image.Image | Tensor) -> Float[Tensor, "3 H W"]:
        if not isinstance(raw, Tensor):
            return pictures.to_unit(pictures.to_bytes(pictures.fit_square(raw, self.size)))
        if raw.ndim != 3 or raw.shape[0] != 3 or not raw.is_floating_point():
            raise ValueError(
                f"expected a float tensor (3, H, W) in [-1, 1], got {raw.dtype} {tuple(raw.shape)}: convert it"
            )
        step, sides = self.downsample * self.pack, tuple(raw.shape[1:])
        if min(sides) < 1 or max(sides) > self.size or any(side % step for side in sides):
            raise ValueError(
                f"expected sides that are multiples of {step} up to {self.size}, got {sides}: resize or pad the picture"
            )
        return raw.float()

    def _repaired(self, item: Encoded) -> tuple[tuple[int, int], Float[Tensor, "N D"], str]:
        """Vectors on a grid that can be decoded, and what had to be repaired."""
        most, held = self.largest, item.latents
        whole = most[0] * most[1]
        if held is None or held.ndim != 2 or held.shape[1] != self.width or not len(held):
            return most, torch.zeros(whole, self.width), f"no vectors of width {self.width} to decode"
        reasons = []
        rows = held.detach().float().cpu()
        if not bool(rows.isfinite().all()):
            reasons.append("the vectors hold values that are not numbers")
            rows = torch.where(rows.isfinite(), rows, 0.0)
        grid = tuple(item.grid)
        if len(grid) != 2 or not all(1 <= extent <= limit for extent, limit in zip(grid, most, strict=True)):
            where = f"within {most[0]}×{most[1]}"
            reasons.append(f"{len(rows)} vectors on a grid of {grid}, expected rows and columns {where}")
            grid = most
            rows = torch.cat([rows, rows.new_zeros(whole, self.width)])[:whole]
        return (grid[0], grid[1]), rows, "; ".join(reasons)

    @property
    def _batch(self) -> int:
        return max(1, BATCH_PIXELS // self.size**2)

    def _batches(self, keys: Sequence[Any]) -> list[list[int]]:
        """Indices of equal keys together, as many at a time as the network takes."""
        places: dict[Any, list[int]] = {}
        for i, key in enumerate(keys):
            places.setdefault(key, []).append(i)
        return [where[n : n + self._batch] for where in places.values() for n in range(0, len(where), self._batch)]


class TrainedPictures(FromSettings, LatentPictures, TrainableTokenizer):
    """Those that `mm fit` trains: a network with an `encoder` and a `decoder` made from settings, and saved with them."""

    def roughened(self, rows: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """In training, normalised vectors with noise: γ·ε, γ drawn from 0 … `noise` for each picture."""
        if not (self.training and self.config["noise"]):
            return rows
        amount = torch.rand(len(rows), 1, 1, device=rows.device) * self.config["noise"]
        return rows + amount * torch.randn_like(rows)

    def synchronise(self, enabled: bool) -> None:
        """Nothing here is learned but by gradients."""

    def before_saving(self, batch: Float[Tensor, "B 3 H W"]) -> None:
        self.fit_normalizer(batch)
