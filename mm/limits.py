"""What the items of one row may take of its context: how many elements and positions, beside those that come after them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mm.fusion import Alongside
from mm.interfaces import Modality, Spec
from mm.layout import Segment

if TYPE_CHECKING:
    from mm.generation import Grid, Request
    from mm.model import MultimodalModel

Item = tuple[str, "Grid"] | Segment
"""An item that is to be opened, or a text that is given between items."""


class Limits:
    """Of one request to a model. Elements are counted by `counts`, positions by `needed`."""

    def __init__(self, model: MultimodalModel, request: Request) -> None:
        self.model, self.request = model, request
        self.vocabulary, self.grammar = model.vocabulary, model.grammar

    def modality(self, name: str) -> Modality:
        return self.model.modalities[self.vocabulary.index[name]]

    def spec(self, name: str) -> Spec:
        return self.modality(name).tokenizer.spec

    def alongside(self, name: str, passed: int) -> Alongside:
        """What comes alongside an item, after `passed` elements of its modality."""
        return Alongside(self.request.alongside.get(name, {}), self.spec(name), name, passed)

    def openable(self) -> list[str]:
        """Modalities whose items the model may open inside its text."""
        return [entry.name for entry in self.vocabulary.entries[1:]]

    # --- elements -----------------------------------------------------------------------------------------------------

    def counts(self, name: str, grid: Grid) -> tuple[int, int]:
        """The fewest and the most elements that a forced item may have."""
        spec = self.spec(name)
        if spec.is_free:
            most = self.model.context
            return spec.least, min(grid[-1], most) if isinstance(grid, range) else most
        if isinstance(grid, tuple):
            return (spec.count(grid),) * 2
        most = math.prod(spec.max_grid)
        if grid is None:
            return 1, most
        longest = min(grid[-1], most)
        return grid[0], min(max(longest, math.ceil(longest * min(self.request.stretch, most))), most)

    def least(self, name: str, items: Iterable[Item]) -> int:
        """The fewest elements of this modality among these items."""
        opened = [item for item in items if not isinstance(item, Segment)]
        return sum(self.counts(*item)[0] for item in opened if item[0] == name)

    def elements(self, name: str, room: int) -> int:
        """The most elements that fit in `room` positions."""
        return bisect_right(range(1, room + 1), room, key=lambda count: self.places(name, count))

    def inside(self, name: str, stated: int, room: int, later: Sequence[Item], rows: int | None) -> int:
        """The most elements of an open item of which so many extents are stated, where its row has `room` more positions for it
        and for the `later` items; `rows`: what there is alongside it."""
        room -= sum(self.needed(item)[0] for item in later)
        elements = self.elements(name, room - self.grammar.overhead(name) + 1 + stated)
        return elements if rows is None else min(elements, rows - self.least(name, later))

    # --- positions ----------------------------------------------------------------------------------------------------

    def places(self, name: str, count: int) -> int:
        """Positions that an item's elements take."""
        return self.modality(name).order.places(count, self.spec(name))

    def needed(self, item: Item) -> tuple[int, int]:
        """The fewest and the most positions that an item may take, or a text between items."""
        if isinstance(item, Segment):
            return (len(item.content),) * 2
        around, (least, most) = self.grammar.overhead(item[0]), self.counts(*item)
        return around + self.places(item[0], least), around + self.places(item[0], most)

    def fits(self, name: str, room: int, rows: int | None) -> bool:
        """Whether the smallest item of this modality has its place, and rows alongside it."""
        spec = self.spec(name)
        least = spec.count(spec.max_grid) if spec.scales else spec.least
        return room > self.grammar.overhead(name) + self.places(name, least) and (rows is None or rows >= least)

    def beside(self, items: Iterable[Item], names: Iterable[str], limit: int) -> int:
        """The most elements that are evaluated once more beside themselves, of the forced items and of the modalities that the
        model may open by itself."""
        opened = [item for item in items if not isinstance(item, Segment)]
        forced = [self.counts(*item)[1] for item in opened if self.modality(item[0]).order.beside]
        free = [min(limit, math.prod(self.spec(n).max_grid)) for n in names if self.modality(n).order.beside]
        return max([*forced, *free], default=0)
