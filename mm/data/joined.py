"""Sources made of others: examples that agree in a field, such as a spoken and a handwritten digit, and rows of examples.

What is drawn depends on the seed and the number of the example alone. Members are given with their own splits, so nothing
that they hold out gets in; the made source is all of one split.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from mm.data.example import BrokenExample, Example, Lazy, Source, digest

MAX_COUNT = 1 << 22
"""Examples of a made source: their keys are held in memory."""


class JoinedSource(Source):
    """An example of each of several sources, of equal value in one field: "seven" spoken by one, drawn by another.

    Fields are those of all; where several have one of the same name, the first has it, and so `key` joins theirs. Every value
    that all sources have is drawn equally often, and of the examples with it, each.

    Args:
        sources: at least two.
        field: the field that they agree in.
        count: examples; None: as many as the largest source has.
        seed: another seed, other pairs.
        options: `caption` and `strict`, as of every source.
    """

    def __init__(
        self, sources: Sequence[Source], field: str, count: int | None = None, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(**options)
        if len(sources) < 2:
            raise ValueError(f"JoinedSource joins at least two sources, got {len(sources)}")
        self.sources, self.field, self.seed = list(sources), field, _seed(seed)
        count = max(map(len, sources)) if count is None else count
        self._having = [_by_value(source, field) for source in sources]
        self.shared = sorted(set.intersection(*(set(having) for having in self._having)))
        """Values that all sources have, as they are printed."""
        if not self.shared:
            seen = "; ".join(f"{s.what}: {', '.join(list(h)[:5]) or 'none'}" for s, h in self._members())
            raise ValueError(f"no value of {field!r} is in all sources ({seen}); name a field that they share")
        self._finish(_numbered(count), f"joined {', '.join(source.what for source in sources)}")

    @property
    def members(self) -> Sequence[Source]:
        return self.sources

    def of(self, members: Sequence[Source]) -> Source:
        other = copy.copy(self)
        other.sources = list(members)
        return other

    def _members(self) -> Any:
        return zip(self.sources, self._having, strict=True)

    @property
    def identity(self) -> str:
        return digest("joined 1", self.field, str(self.seed), str(self.total), *map(_identity, self.sources))

    def _fields(self, ordinal: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, ordinal])
        value = self.shared[int(rng.integers(len(self.shared)))]
        fields: dict[str, Any] = {}
        for source, having in self._members():
            fields = _unread(source[having[value][int(rng.integers(len(having[value])))]]) | fields
        return fields


class RowsSource(Source):
    """Several examples of one source in a row, each once: a field `rows` of captions and pictures by turns, `length` of each.
    `mm.data.documents.Interleaved` with `fields: [rows]` makes documents of them.

    Args:
        source: where the examples come from.
        fields: of each example, in reading order.
        least, most: examples of a row.
        count: rows; None: as many as the source has examples.
        seed: another seed, other rows.
        options: `strict`, as of every source.
    """

    def __init__(
        self,
        source: Source,
        fields: Sequence[str] = ("text", "image"),
        least: int = 2,
        most: int = 3,
        count: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 1 <= least <= most <= len(source):
            raise ValueError(
                f"a row has 1 to {len(source)} examples, all that there are; got least {least} and most {most}"
            )
        if isinstance(fields, str) or not fields:
            raise ValueError(f"fields is a list of at least one field, got {fields!r:.60}")
        self.source, self.fields, self.seed = source, list(fields), _seed(seed)
        self.least, self.most = least, most
        self._finish(_numbered(len(source) if count is None else count), f"rows of {source.what}")

    @property
    def members(self) -> Sequence[Source]:
        return [self.source]

    def of(self, members: Sequence[Source]) -> Source:
        other = copy.copy(self)
        (other.source,) = members
        return other

    @property
    def identity(self) -> str:
        settings = (self.seed, self.total, self.least, self.most, *self.fields, self.source.caption)
        return digest("rows 1", *map(str, settings), _identity(self.source))

    def _fields(self, ordinal: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, ordinal])
        length = int(rng.integers(self.least, self.most + 1))
        chosen = rng.choice(len(self.source), length, replace=False).tolist()
        return {
            "rows": Lazy(lambda: [self.source[index][field] for index in chosen for field in self.fields]),
            "length": length,
        }


def _by_value(source: Source, field: str) -> dict[str, list[int]]:
    """Indices of the examples with each value of a field. Examples without it, and broken ones, are left out."""
    out: dict[str, list[int]] = {}
    for index in range(len(source)):
        try:
            out.setdefault(str(source[index][field]), []).append(index)
        except BrokenExample:  # the loader, which meets it too, skips and counts it
            continue
    return out


def _unread(example: Example) -> dict[str, Any]:
    """The fields of an example, with what is decoded when it is read left for then."""
    return {name: dict.__getitem__(example, name) for name in example}


def _identity(source: Source) -> str:
    """Of a source with its split: the numbers of its examples are part of what is drawn."""
    return digest(source.identity, source.split, str(len(source)), str(source.ordinals[0]) if len(source) else "")


def _numbered(count: int) -> list[str]:
    if not 1 <= count <= MAX_COUNT:
        raise ValueError(f"count must be 1 to {MAX_COUNT:,}, got {count:,}")
    return [f"{number:08d}" for number in range(count)]


def _seed(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    return seed
