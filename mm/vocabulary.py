"""Global ids: one contiguous range a modality and one for the control tokens. Saved with the checkpoint, never guessed.

Layout: [host modality | controls | second modality | third …]. The host is the first modality of the list (text, as a rule);
its range comes first so that the ids of a pretrained language model stay what they were, and the controls come next so that
host and controls are one range, which one head predicts. New modalities are appended: nothing before them moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mm.interfaces import Spec

SIZES = 256  # size controls: the extents 1..256 that one axis of an item can have
NAMED = 64  # named controls: three general ones, and begin and end of up to 30 modalities
GENERAL = ("bos", "eos", "null")
NAMES_OF_TORCH = nn.ModuleDict()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One modality's place in the vocabulary."""

    name: str
    start: int
    size: int
    """Ids in the range; 0 for a continuous modality (it has controls only). Sub-codes count one sub-codebook each."""
    kind: str
    max_grid: tuple[int, ...]
    fingerprint: str

    @property
    def stop(self) -> int:
        return self.start + self.size


class Vocabulary:
    """Ranges of ids by modality name, and the ids of the control tokens.

    Raises `ValueError` for two modalities of one name, or a host that is not discrete.
    """

    def __init__(self, specs: Mapping[str, Spec] | Sequence[tuple[str, Spec]]) -> None:
        pairs = list(specs.items()) if isinstance(specs, Mapping) else list(specs)
        names = [name for name, _ in pairs]
        if not pairs:
            raise ValueError("a vocabulary needs at least one modality")
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ValueError(
                f"two modalities share the name {twice[0]!r}; give each its own (is one overlay loaded twice?)"
            )
        for name in names:
            if not name or "." in name or name == "null":  # weights are stored by name; `null` is the absent condition
                raise ValueError(f"a modality cannot be called {name!r}; use a word without dots other than null")
            if hasattr(NAMES_OF_TORCH, name):  # heads are kept there by name, beside its methods
                raise ValueError(
                    f"a modality cannot be called {name!r}, which torch keeps for itself; use another word"
                )
        if pairs[0][1].kind != "discrete":
            raise ValueError(
                f"the first modality {names[0]!r} is {pairs[0][1].kind}; it owns the control tokens and must be discrete"
            )
        if 2 * len(pairs) + len(GENERAL) > NAMED:
            raise ValueError(f"{len(pairs)} modalities need more than the {NAMED} named controls there are")
        self.entries: list[Entry] = []
        start = 0
        for number, (name, spec) in enumerate(pairs):
            if spec.max_grid and max(spec.max_grid) > SIZES:
                raise ValueError(f"{name}: the grid may have up to {SIZES} an axis, got {spec.max_grid}")
            size = spec.vocab_size if spec.kind == "discrete" else 0
            self.entries.append(
                Entry(
                    name=name,
                    start=start,
                    size=size,
                    kind=spec.kind,
                    max_grid=spec.max_grid,
                    fingerprint=spec.fingerprint,
                )
            )
            start += size
            if number == 0:
                self.control_start = start
                start += NAMED + SIZES
        self.size = start
        self.index = {entry.name: number for number, entry in enumerate(self.entries)}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, name: str) -> Entry:
        if name not in self.index:
            raise ValueError(f"no modality {name!r} in this model; it has {', '.join(self.index)}")
        return self.entries[self.index[name]]

    @property
    def host(self) -> Entry:
        return self.entries[0]

    # --- controls ---------------------------------------------------------------------------------------------------

    def control(self, name: str) -> int:
        """Id of a general control: `bos` (document begins), `eos` (document ends), `null` (no condition: guidance)."""
        return self.control_start + GENERAL.index(name)

    def begin(self, name: str) -> int:
        return self.control_start + len(GENERAL) + 2 * self.index[self[name].name]

    def end(self, name: str) -> int:
        return self.begin(name) + 1

    def extent(self, size: int) -> int:
        """Id that states the extent of one axis of an item."""
        if not 1 <= size <= SIZES:
            raise ValueError(f"an axis can have 1..{SIZES} elements, got {size}")
        return self.control_start + NAMED + size - 1

    def opening(self, name: str, grid: tuple[int, ...]) -> list[int]:
        """Control ids that open an item: begin, then the extent of each axis if the modality has grids."""
        entry = self[name]
        if not entry.max_grid:
            return [self.begin(name)]
        if len(grid) != len(entry.max_grid) or any(g > m for g, m in zip(grid, entry.max_grid, strict=True)):
            raise ValueError(
                f"{name}: a grid of {grid} does not fit the largest grid {entry.max_grid} of its tokenizer"
            )
        return [self.begin(name), *(self.extent(g) for g in grid)]

    def describe(self, token: int) -> str:
        """A name for an id, for people."""
        if self.control_start <= token < self.control_start + NAMED + SIZES:
            number = token - self.control_start
            if number < len(GENERAL):
                return f"<{GENERAL[number]}>"
            if number >= NAMED:
                return f"<size {number - NAMED + 1}>"
            which, closing = divmod(number - len(GENERAL), 2)
            if which < len(self.entries):
                return f"<{'end' if closing else 'begin'} {self.entries[which].name}>"
            return f"<control {number}>"
        for entry in self.entries:
            if entry.start <= token < entry.stop:
                return f"{entry.name}:{token - entry.start}"
        raise ValueError(f"id {token} lies outside this vocabulary of {self.size}")

    # --- saving -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "control_start": self.control_start,
            "modalities": [
                {"name": e.name, "start": e.start, "size": e.size, "kind": e.kind, "fingerprint": e.fingerprint,
                 "max_grid": list(e.max_grid)}
                for e in self.entries
            ],
        }  # fmt: skip

    def check(self, saved: Mapping[str, Any]) -> None:
        """Refuse a checkpoint made with another vocabulary: `ValueError` naming what differs."""
        mine = self.to_dict()
        theirs = {m["name"]: m for m in saved.get("modalities", [])}
        for entry in mine["modalities"]:
            other = theirs.get(entry["name"])
            if other is None:
                raise ValueError(
                    f"the checkpoint has no modality {entry['name']!r} (it has {', '.join(theirs) or 'none'}); "
                    "use the modalities it was trained with"
                )
            for key, value in entry.items():
                if other.get(key) != value:
                    raise ValueError(
                        f"the checkpoint's modality {entry['name']!r} has {key} {other.get(key)!r}, but the one given has "
                        f"{value!r}; use the tokenizer it was trained with"
                    )
        for name in theirs:
            if name not in self.index:
                raise ValueError(f"the checkpoint has a modality {name!r} that this configuration lacks; add it")
        for key in ("size", "control_start"):
            if saved.get(key) != mine[key]:
                raise ValueError(f"the checkpoint's vocabulary has {key} {saved.get(key)}, this one has {mine[key]}")
