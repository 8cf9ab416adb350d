"""What a lossy tokenizer offers so that `mm fit` can train it: the contract of `mm.training_tokenizer`."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from mm.interfaces import ModalityTokenizer
from mm.saved import Fingerprinted


@dataclass(frozen=True)
class Reconstruction:
    """One pass there and back."""

    output: Float[Tensor, "B ..."]
    """As the input, not bounded."""
    ids: Int[Tensor, "B ..."] | None
    """Tokens of each example, sub-codes on the last axis; None for a tokenizer of vectors."""
    loss: Float[Tensor, ""]
    """The bottleneck's own losses (of a quantiser, or a divergence), already weighted."""


class TrainableTokenizer(ModalityTokenizer, Fingerprinted):
    """A tokenizer with weights that are learned from data."""

    @abc.abstractmethod
    def reconstruct(self, batch: Float[Tensor, "B ..."]) -> Reconstruction:
        """Encode, pass the bottleneck and decode, with gradients."""

    def warm_start(self, batch: Float[Tensor, "B ..."]) -> None:  # noqa: B027 - optional
        """Begin from what a closed form finds in this data, before the first step; the default does nothing."""

    def before_saving(self, batch: Float[Tensor, "B ..."]) -> None:  # noqa: B027 - optional
        """Take from training data what is not learned by gradients but saved with the weights (statistics of latents); the
        default does nothing."""

    @abc.abstractmethod
    def last_layer(self) -> Tensor:
        """The weight that balances the adversarial loss against the others (Esser et al. 2021, equation 7)."""

    @abc.abstractmethod
    def synchronise(self, enabled: bool) -> None:
        """Keep state that is not learned by gradients (codebooks) equal over the ranks of the process group."""

    @abc.abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the tokenizer into a directory, whole or not at all."""
