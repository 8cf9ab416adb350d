"""How many edits two texts, or two lists of words, lie apart."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that make one text or list the other (Levenshtein), row by row: always
    len(one) · len(other) steps, whatever they hold."""
    number: dict[Hashable, int] = {}
    left, right = (
        np.array([number.setdefault(unit, len(number)) for unit in units], dtype=np.int64) for units in (one, other)
    )
    columns = np.arange(len(right) + 1)
    row = columns.copy()
    for place, unit in enumerate(left, 1):
        above = np.minimum(row[1:] + 1, row[:-1] + (right != unit))
        # an insertion costs 1 more than the cell to the left: a running minimum of cost - column
        row = np.minimum.accumulate(np.concatenate(([place], above)) - columns) + columns
    return int(row[-1])
