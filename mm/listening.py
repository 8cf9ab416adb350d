"""Listening while speaking: two channels of sound, and what of the second one is given to the model (LSLM, Ma et al. 2024,
arXiv 2408.02622).

What is heard during an element becomes a row of numbers when the element is over: log-mel magnitudes of its time, and of the
elements before it. The paper has a convolutional encoder in that place; ours sees half a second and keeps no state, so that a
row is the same live and in training.

Letters in shapes: S samples, T elements, M mel bins, H elements that a row looks back, F = H · M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mm.audio import Audio, log_mel, resample
from mm.interfaces import Encoded

NAME = "listening"
"""Of the rows among what comes alongside the elements."""
FLOOR = 1e-2
"""Mel magnitudes below count as silence; a sine of full scale has 128."""
SCALE = 4.0
"""Logarithms are divided by it, so that rows are about 0 (silence) to 2.5."""


@dataclass(frozen=True, eq=False)
class Dialogue:
    """What is said and what is heard at the same time."""

    speaking: Audio | Encoded
    """The sound, or the codec's elements of it."""
    listening: Audio | None = None
    """From the same moment on; None: silence. What lies beyond the end of `speaking` is left out."""
    interrupted: float | None = None
    """Seconds after the beginning at which the speaker has to have stopped; None: never."""


@dataclass(frozen=True)
class Ear:
    """How a channel is heard.

    Args:
        rate: samples a second.
        samples: samples of an element, an even number.
        bins: M, mel bins.
        history: H, elements that a row looks back, the last one among them.
    """

    rate: int
    samples: int
    bins: int
    history: int

    @property
    def features(self) -> int:
        return self.bins * self.history

    def rows(self, audio: Audio | None, elements: int) -> Float[Tensor, "T F"]:
        """A row for each of so many elements; row t depends on no sample after element t. Silence gives zeros."""
        if audio is None or not elements:
            return torch.zeros(elements, self.features)
        heard = torch.from_numpy(np.ascontiguousarray(resample(audio, self.rate).samples))[: elements * self.samples]
        heard = torch.nn.functional.pad(heard, (0, elements * self.samples - len(heard)))
        return self._stacked(self._spectra(heard))

    def _spectra(self, heard: Float[Tensor, " S"]) -> Float[Tensor, "T M"]:
        # Windows are as long as an element and centred on its beginning and its middle: none reaches beyond its end.
        frames = log_mel(heard, rate=self.rate, bins=self.bins, n_fft=self.samples, hop=self.samples // 2, floor=FLOOR)
        pairs = frames[:, : 2 * (len(heard) // self.samples)].T.unflatten(0, (-1, 2))
        return (pairs.mean(1) - math.log(FLOOR)) / SCALE

    def _stacked(self, spectra: Float[Tensor, "T M"]) -> Float[Tensor, "T F"]:
        padded = torch.nn.functional.pad(spectra, (0, 0, self.history - 1, 0))
        return padded.unfold(0, self.history, 1).transpose(1, 2).flatten(1)  # oldest first


class Listener:
    """A live channel: `hear` what comes in, and give the engine the listener itself in the place of rows (`Request.alongside`).

    Raises `ValueError` where an element is asked for before it was heard.
    """

    def __init__(self, ear: Ear) -> None:
        self.ear = ear
        self.kept = np.zeros(0, dtype=np.float32)
        self.first = 0
        """Sample that `kept` begins with; what no row will look at any more is dropped."""

    def hear(self, samples: Float[Tensor, " S"] | np.ndarray) -> None:
        """The next samples, at the ear's rate."""
        more = Audio(np.asarray(samples), self.ear.rate).samples
        self.kept = np.concatenate((self.kept, more))

    @property
    def elements(self) -> int:
        """Elements that are heard to their end."""
        return (self.first + len(self.kept)) // self.ear.samples

    def __call__(self, element: int) -> Float[Tensor, " F"]:
        ear = self.ear
        first = max(0, element - ear.history) * ear.samples  # one element more: the first window begins before its own
        if element >= self.elements or first < self.first:
            raise ValueError(
                f"element {element} is asked for, but elements {math.ceil(self.first / ear.samples)} to {self.elements - 1} were "
                "heard; call hear() with its samples first, and ask in turn"
            )
        self.kept, self.first = self.kept[first - self.first :], first
        heard = torch.from_numpy(self.kept[: (element + 1) * ear.samples - first].copy())
        return ear._stacked(ear._spectra(heard)[-ear.history :])[-1]
