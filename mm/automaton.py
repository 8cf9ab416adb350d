"""What may be written next of an item of free length."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from jaxtyping import Bool
from torch import Tensor


class Automaton(abc.ABC):
    """Which ids may come next in one item of free length while it is generated, so that what a model writes is a file."""

    @abc.abstractmethod
    def allowed(self, room: int) -> Bool[Tensor, " V"]:
        """Ids that may come next, on the CPU, where at most `room` >= 1 more of them fit, `stop` included; at least one is True.
        Where `room` was enough at the beginning (`Spec.least`), whatever is allowed leaves enough to end. The caller doesn't
        change the tensor, so that it may be given out again."""

    @abc.abstractmethod
    def accept(self, token: int) -> None:
        """This id came. Never raises: one that was not allowed (it was given) is followed by the best there is."""

    def place(self) -> Sequence[float] | None:
        """Where the next id stands in the format, as numbers of about −1 to 1, always as many; None: it doesn't say."""
        return None
