"""What tokenizers share that turn pictures or clips into a grid of vectors and back: batching, normalising, decoding that never
fails, training. `mm.latent_pictures` and `mm.latent_videos` say what a grid is, a tokenizer file adds its network.

Letters in shapes: B batch, N tokens of one item, D width of a token; what one item is stands in the two modules.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm import saved
from mm.interfaces import Decoded, Encoded, ModalityTokenizer
from mm.latents import LatentNormalizer
from mm.saved import FromSettings
from mm.trainable import Reconstruction, TrainableTokenizer

MAX_AXIS = 256
"""Largest extent of a grid that the vocabulary's size controls can state."""
BATCH_PIXELS = 1 << 20
"""Pixels that go through a network at once, at the most (16 pictures of 256×256); bounds memory, not results."""


class LatentGrids(ModalityTokenizer, saved.Fingerprinted):
    """Items ↔ grids of vectors, by a network that a tokenizer brings as `latents` and `pixels`."""

    normalizer: LatentNormalizer
    spatial = True
    """See `Spec.spatial`."""

    # --- the network --------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def latents(self, x: Tensor) -> Tensor:
        """Of items with pixels in [−1, 1]; the mean, where there is a distribution."""

    @abc.abstractmethod
    def pixels(self, z: Tensor) -> Tensor:
        """Items, nominally in [−1, 1]."""

    @abc.abstractmethod
    def identity(self) -> str:
        """What a vector means, hashed: settings and weights of encoder and normaliser."""

    # --- what one item is ---------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def largest(self) -> tuple[int, ...]:
        """The grid of a whole item."""

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """D."""

    @abc.abstractmethod
    def rows(self, z: Tensor) -> tuple[tuple[int, ...], Float[Tensor, "B N D"]]:
        """What the network made as its grid of tokens, and the tokens in the order of the grid."""

    @abc.abstractmethod
    def map(self, rows: Float[Tensor, "B N D"], grid: tuple[int, ...]) -> Tensor:
        """The inverse of `rows`."""

    @abc.abstractmethod
    def _given(self, raw: Any) -> Tensor:
        """The pixels of one item. Raises `ValueError` for what is none."""

    @abc.abstractmethod
    def _value(self, pixels: Tensor) -> Any:
        """The item of these pixels (float32, on the CPU, of any size)."""

    @abc.abstractmethod
    def _expected(self, grid: tuple[int, ...]) -> str:
        """The grids that can be decoded, in words, unless this is one of them."""

    @abc.abstractmethod
    def _at_once(self, shape: tuple[int, ...]) -> int:
        """How many items of this shape, or of this grid, go through the network together."""

    # --- the plug-in contract -----------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Computed once, then kept until the weights change (`train`, `load_state_dict`, `to`, also of a module around it, and
        `weights_changed` forget it)."""
        if self._fingerprint is None:
            self._fingerprint = self.identity()
        return self._fingerprint

    def encode(self, raw: Any) -> Encoded:
        return self.encode_batch([raw])[0]

    @torch.no_grad()
    def encode_batch(self, raws: Sequence[Any]) -> list[Encoded]:
        tensors = [self._given(raw) for raw in raws]
        out: dict[int, Encoded] = {}
        for where in self._batches([tuple(t.shape) for t in tensors]):
            grid, rows = self.tokens(torch.stack([tensors[i] for i in where]).to(self._like()))
            for i, one in zip(where, rows.float().cpu(), strict=True):
                out[i] = Encoded(grid=grid, latents=one)
        return [out[i] for i in range(len(raws))]

    def decode(self, encoded: Encoded) -> Decoded:
        """What is not a number is taken to be 0, and a grid that isn't one of this tokenizer's replaced, with `valid` off.
        Without statistics of the normaliser the network reads the vectors as they are, with `valid` off."""
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
            for i, pixels in zip(where, made.float().cpu(), strict=True):
                reason = "; ".join(filter(None, (untrained, repaired[i][2])))
                out[i] = Decoded(value=self._value(pixels), valid=not reason, reason=reason)
        return [out[i] for i in range(len(items))]

    # --- tensors ------------------------------------------------------------------------------------------------------

    def tokens(self, x: Tensor) -> tuple[tuple[int, ...], Float[Tensor, "B N D"]]:
        """The grid and the normalised vectors of items."""
        training = self.training
        self.eval()
        try:
            z = self.latents(x)
        finally:
            if training:
                self.train()
        grid, rows = self.rows(z)
        return grid, self.normalizer(rows)

    def untoken(self, rows: Float[Tensor, "B N D"], grid: tuple[int, ...]) -> Tensor:
        """Items of normalised vectors."""
        return self.pixels(self.map(self.normalizer.inverse(rows), grid))

    @torch.no_grad()
    def fit_normalizer(self, x: Tensor) -> None:
        """Take the normaliser's statistics from items with pixels in [−1, 1]."""
        training = self.training
        self.eval()
        most = self._at_once(tuple(x.shape[1:]))
        parts = [self.rows(self.latents(part.to(self._like())))[1].flatten(0, 1) for part in x.split(most)]
        self.train(training)
        self.normalizer.fit(torch.cat(parts))
        self.weights_changed()

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _like(self) -> Tensor:
        return next(self.parameters())

    def _repaired(self, item: Encoded) -> tuple[tuple[int, ...], Float[Tensor, "N D"], str]:
        """Vectors on a grid that can be decoded, and what had to be repaired."""
        most, held = self.largest, item.latents
        whole = math.prod(most)
        if held is None or held.ndim != 2 or held.shape[1] != self.width or not len(held):
            return most, torch.zeros(whole, self.width), f"no vectors of width {self.width} to decode"
        reasons = []
        rows = held.detach().float().cpu()
        if not bool(rows.isfinite().all()):
            reasons.append("the vectors hold values that are not numbers")
            rows = torch.where(rows.isfinite(), rows, 0.0)
        grid = tuple(item.grid)
        if expected := self._expected(grid):
            reasons.append(f"{len(rows)} vectors on a grid of {grid}, expected {expected}")
            grid = most
            rows = torch.cat([rows, rows.new_zeros(whole, self.width)])[:whole]
        return grid, rows, "; ".join(reasons)

    def _batches(self, keys: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """Indices of equal keys together, as many at a time as the network takes."""
        places: dict[tuple[int, ...], list[int]] = {}
        for i, key in enumerate(keys):
            places.setdefault(key, []).append(i)
        out = []
        for key, where in places.items():
            most = self._at_once(key)
            out += [where[n : n + most] for n in range(0, len(where), most)]
        return out


class TrainedGrids(FromSettings, LatentGrids, TrainableTokenizer):
    """Those that `mm fit` trains: a network with an `encoder` and a `decoder` made from settings, and saved with them."""

    def roughened(self, rows: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """In training, normalised vectors with noise: γ·ε, γ drawn from 0 … `noise` for each item."""
        if not (self.training and self.config["noise"]):
            return rows
        amount = torch.rand(len(rows), 1, 1, device=rows.device) * self.config["noise"]
        return rows + amount * torch.randn_like(rows)

    def synchronise(self, enabled: bool) -> None:
        """Nothing here is learned but by gradients."""

    def before_saving(self, batch: Tensor) -> None:
        self.fit_normalizer(batch)


class GaussianGrids(TrainedGrids):
    """Those whose encoder gives a normal distribution for each latent (VAE, Kingma and Welling 2014). With the normaliser `token`
    the decoder learns to read normalised vectors."""

    @abc.abstractmethod
    def distribution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents."""

    def latents(self, x: Tensor) -> Tensor:
        return self.distribution(x)[0]

    def reconstruct(self, batch: Tensor) -> Reconstruction:
        """With draws in training, with means otherwise. Its loss: the divergence from a standard normal distribution, the mean
        over all latents, times `kl`."""
        mean, log_variance = (values.float() for values in self.distribution(batch))
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        if self.normalizer.kind == "token":
            grid, rows = self.rows(z)
            z = self.map(self.roughened(self.normalizer(rows)), grid)
        return Reconstruction(self.pixels(z), None, self.config["kl"] * divergence)


def check_gaussian(c: dict[str, Any], most: int) -> None:
    """Raises `ValueError` for settings of a tokenizer of Gaussian latents that are none; no more than `most` channels."""
    saved.whole_number("latent", c["latent"])
    if not 1 <= c["latent"] <= most:
        raise ValueError(f"latent must be in 1..{most}, got {c['latent']}")
    for name in ("kl", "noise"):
        saved.number(name, c[name], 0)
    if c["noise"] and c["normalizer"] != "token":
        raise ValueError(f"noise needs the normalizer token, got {c['noise']} with {c['normalizer']}")
