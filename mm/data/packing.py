"""Packing documents of uneven length into batches of at most a given number of positions.

Documents wait in a buffer in the order of their arrival. A batch takes them in that order while they fit; the gap that
remains is filled with the longest waiting document that fits it, again and again (best fit). So batches stay close to a
random sample, nothing waits for long (the oldest document always goes first), and documents are never split.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import OrderedDict
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Packer(Generic[Item]):
    """The buffer. `tokens` is the budget of a batch in positions."""

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"a batch needs a budget of at least one position, got {tokens}")
        self.tokens = tokens
        self.waiting: OrderedDict[int, tuple[int, Item]] = OrderedDict()
        """Serial number → (length, item), oldest first."""
        self.positions = 0
        """Sum of the waiting lengths."""
        self._by_length: list[tuple[int, int]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, length: int, item: Item) -> None:
        """Raises `ValueError` for an item longer than a batch."""
        if not 0 < length <= self.tokens:
            raise ValueError(f"an item of {length} positions doesn't fit into a batch of {self.tokens}")
        self.waiting[self._serial] = (length, item)
        insort(self._by_length, (length, -self._serial))  # among equals the oldest sorts last and is taken first
        self._serial += 1
        self.positions += length

    def _take(self, serial: int) -> Item:
        length, item = self.waiting.pop(serial)
        del self._by_length[bisect_right(self._by_length, (length, -serial)) - 1]
        self.positions -= length
        return item

    def batch(self) -> list[Item]:
        """The next batch: empty when nothing waits."""
        chosen: list[Item] = []
        gap = self.tokens
        while self.waiting:
            serial, (length, _) = next(iter(self.waiting.items()))
            if length > gap:
                break
            chosen.append(self._take(serial))
            gap -= length
        while (place := bisect_right(self._by_length, (gap, 1))) > 0:
            length, negative = self._by_length[place - 1]
            chosen.append(self._take(-negative))
            gap -= length
        return chosen
