"""What comes from elsewhere beside an item's elements (`Encoded.alongside`): how it enters the backbone, and where it is found
while the item is generated. LSLM (Ma et al. 2024, arXiv 2408.02622) listens this way while it speaks.

Three ways, as in section 3.3 of the paper. *Early*: added to what the backbone reads at the position. *Middle*: added to the
input of every block. *Late*: added to the hidden state that the head gets.

The position that holds element i gets row i: it predicts element i + 1 from what was heard up to the end of element i.

Letters in shapes: n positions, F features, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.interfaces import Encoded, Spec
from mm.interfaces import Fusion as Way

Given = Mapping[str, "Tensor | Callable[[int], Tensor]"]
"""Name → all rows at once, or a function that is asked for the row of each element when its turn comes."""


class Fusion(nn.Module):
    """Features → width: two linear maps with a SiLU between them (the paper has one after an encoder of its own; here the
    features are spectra). No biases, so that zeros add nothing. The last map starts at zero, so that listening added to a
    trained model changes nothing at first."""

    def __init__(self, features: int, width: int, way: Way) -> None:
        super().__init__()
        self.features, self.way = features, way
        self.up, self.down = nn.Linear(features, width, bias=False), nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, values: Float[Tensor, "n F"]) -> Float[Tensor, "n W"]:
        return self.down(F.silu(self.up(values.to(self.up.weight.dtype))))


def check_alongside(encoded: Encoded, spec: Spec, name: str) -> None:
    """Raises `ValueError` for what the modality `name` has no place for."""
    for key, rows in encoded.alongside.items():
        check_row(key, rows[0] if len(rows) else torch.zeros(spec.alongside.get(key, 0)), spec, name)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{name}: {key!r} alongside it holds values that are not numbers; look at what made them")


def check_row(key: str, row: Tensor, spec: Spec, name: str) -> None:
    if key not in spec.alongside:
        known = ", ".join(spec.alongside) or "nothing"
        raise ValueError(f"{name} has {known} alongside its elements, but {key!r:.60} is given; leave it out")
    if row.shape != (spec.alongside[key],):
        raise ValueError(
            f"{name}: {key!r} has rows of shape {tuple(row.shape)}, expected {spec.alongside[key]} numbers an element"
        )


class Alongside:
    """What comes alongside the elements of one item while it is generated. Each row is asked for once, in turn. The item begins
    with row `first`: those before it belong to the items before.

    Raises `ValueError` for names and widths that the modality doesn't have, and for fewer rows than elements.
    """

    def __init__(self, given: Given, spec: Spec, name: str, first: int = 0) -> None:
        self.given, self.spec, self.name, self.first = dict(given), spec, name, first
        self.rows: dict[str, dict[int, Tensor]] = {key: {} for key in given}
        for key, rows in given.items():
            if isinstance(rows, Tensor):
                check_row(key, rows[0] if rows.ndim and len(rows) else rows, spec, name)
            elif not callable(rows):
                raise ValueError(
                    f"{name}: {key!r} alongside it is a {type(rows).__name__}; give a tensor or a function"
                )

    @property
    def room(self) -> int | None:
        """Elements that there are rows for; None: no bound is known."""
        rows = [max(0, len(rows) - self.first) for rows in self.given.values() if isinstance(rows, Tensor)]
        return min(rows, default=None)

    def check(self, count: int) -> None:
        """That there are rows for so many elements."""
        for key, rows in self.given.items():
            if isinstance(rows, Tensor) and len(rows) < self.first + count:
                raise ValueError(
                    f"{self.name}: {key!r} has {len(rows)} rows for {self.first + count} elements; give one an element"
                )

    def at(self, elements: Sequence[int]) -> dict[str, Float[Tensor, "n F"]]:
        return {key: torch.stack([self._row(key, element) for element in elements]) for key in self.given}

    def of(self, count: int) -> dict[str, Float[Tensor, "N F"]]:
        """Of the first elements, as far as it was asked for all of them."""
        whole = all(n in rows for rows in self.rows.values() for n in range(count))
        return self.at(range(count)) if whole and count else {}

    def _row(self, key: str, element: int) -> Tensor:
        if element not in self.rows[key]:
            rows = self.given[key]
            place = self.first + element
            row = rows[place] if isinstance(rows, Tensor) else rows(place)
            if not isinstance(row, Tensor) or not bool(row.isfinite().all()):
                raise ValueError(f"{self.name}: {key!r} of element {element} is no tensor of finite numbers")
            check_row(key, row, self.spec, self.name)
            self.rows[key][element] = row.detach().cpu().float()
        return self.rows[key][element]
