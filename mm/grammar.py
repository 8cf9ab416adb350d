"""What a row may emit next, as biases on the host head's logits: structure is certain, never a matter of training."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from mm.vocabulary import NAMED, SIZES, Vocabulary


class Grammar:
    """Rules of text mode and of an item's opening: text, `eos`, begin of an item that fits, extents that fit; what follows
    from the rules alone (the extents of a fixed grid, the end of a full item) is fed without asking the model."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.size = vocabulary.host.size + NAMED + SIZES
        self.text = lru_cache(maxsize=256)(self._text)
        self.extent = lru_cache(maxsize=SIZES)(self._extent)

    def __reduce__(self) -> tuple[type[Grammar], tuple[Vocabulary]]:
        return Grammar, (self.vocabulary,)  # the caches cannot be pickled, and are quickly made again

    def _text(self, openable: tuple[str, ...], more: bool) -> Float[Tensor, " V"]:
        """Text ids if there is room for `more`, `eos` always, and the begin of each openable modality."""
        bias = torch.full((self.size,), float("-inf"))
        if more:
            bias[: self.vocabulary.host.size] = 0.0
        bias[self.vocabulary.control("eos")] = 0.0
        for name in openable:
            bias[self.vocabulary.begin(name)] = 0.0
        return bias

    def _extent(self, largest: int, smallest: int = 1) -> Float[Tensor, " V"]:
        bias = torch.full((self.size,), float("-inf"))
        bias[self.vocabulary.extent(smallest) : self.vocabulary.extent(largest) + 1] = 0.0
        return bias

    def overhead(self, name: str) -> int:
        """Control positions around an item: begin, extents, end."""
        return 2 + len(self.vocabulary[name].max_grid)

    def largest(self, name: str, fixed: tuple[int, ...], room: int) -> int:
        """Largest extent of the next axis such that the item, its other axes as small as can be, fits in `room` elements."""
        for extent in fixed:
            room //= extent
        return min(self.vocabulary[name].max_grid[len(fixed)], room)
