"""The token stream: everything the backbone reads, packed 1-D, many documents end to end and no padding.

Letters in shapes: T packed positions, C positions that a record covers, K sub-codes, D latent width.

Visibility is one rule over three integers. Position i sees position j iff they share `document` and
(`copy_j` = 0 and `order_j` < `order_i`) or (`order_j` = `order_i` and `copy_j` = `copy_i`). Nothing else in the project
decides who sees whom; see `mm.attention` for how the rule becomes a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

RECORDS = ("codes", "latents", "inject")


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """Values that only some positions have, and the positions where they stand."""

    values: Tensor
    """C rows: (C, K) sub-codes, (C, D) latents or injected vectors."""
    index: Int[Tensor, " C"]
    reads: Tensor | None = None
    """C rows: what the backbone reads there, where it differs from `values`, which is what is to be predicted there."""

    def __post_init__(self) -> None:
        if self.index.ndim != 1 or len(self.values) != len(self.index):
            raise ValueError(
                f"a record has {len(self.values)} values but {tuple(self.index.shape)} indices; "
                "give one index a value, in one dimension"
            )
        if self.reads is not None and len(self.reads) != len(self.values):
            raise ValueError(
                f"a record has {len(self.values)} values, but {len(self.reads)} rows to be read in their place; give as many"
            )

    @property
    def read(self) -> Tensor:
        """What the backbone reads."""
        return self.values if self.reads is None else self.reads

    def at(self, chosen: Tensor, offset: int = 0) -> Placed:
        """Some of the rows, `offset` further on."""
        reads = None if self.reads is None else self.reads[chosen]
        return Placed(values=self.values[chosen], index=self.index[chosen] + offset, reads=reads)

    def moved(self, offset: int) -> Placed:
        """The same, `offset` further on."""
        return Placed(values=self.values, index=self.index + offset, reads=self.reads)

    def map(self, function: Callable[[Tensor], Tensor]) -> Placed:
        reads = None if self.reads is None else function(self.reads)
        return Placed(values=function(self.values), index=function(self.index), reads=reads)


def join(records: Sequence[Placed]) -> Placed:
    """Records of one name as one; where some have their own `reads`, the others read their values."""
    if len(records) == 1:
        return records[0]
    return Placed(
        values=torch.cat([r.values for r in records]),
        index=torch.cat([r.index for r in records]),
        reads=torch.cat([r.read for r in records]) if any(r.reads is not None for r in records) else None,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStream:
    """Packed positions. Holds primary facts only; masks, runs and counts are derived from them.

    Raises `ValueError` on construction when two fields disagree about T; `validate` checks the contents too.
    """

    modality: Int[Tensor, " T"]
    """Which modality owns the position (index into the model's list)."""
    ids: Int[Tensor, " T"]
    """Global vocabulary id; −1 where the content is in `codes` or `latents`."""
    document: Int[Tensor, " T"]
    """Which example of the pack; documents are contiguous and count up from 0."""
    order: Int[Tensor, " T"]
    """When the position is generated, free of where it stands."""
    copy: Int[Tensor, " T"]
    """0 = clean; >= 1 = a noisy or query copy that no other order or copy may see."""
    position: Float[Tensor, "T 3"]
    """Rotary coordinates: time, row, column."""
    time: Float[Tensor, " T"]
    """Diffusion time: 0 = data, 1 = noise (or the mask vector). `ids` and records hold the truth whatever the time."""
    target: Int[Tensor, " T"]
    """Index of the position whose content this position's hidden state predicts, or −1."""
    weight: Float[Tensor, " T"]
    """Loss weight of the prediction that this position makes."""
    codes: dict[str, Placed] = field(default_factory=dict)
    latents: dict[str, Placed] = field(default_factory=dict)
    inject: dict[str, Placed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.modality)
        for name in POSITIONAL:
            value = getattr(self, name)
            if len(value) != count:
                raise ValueError(
                    f"TokenStream.{name} has {len(value)} positions, but modality has {count}; all fields need one length"
                )
        if self.position.shape != (count, 3):
            raise ValueError(f"TokenStream.position has shape {tuple(self.position.shape)}; it needs ({count}, 3)")

    def __len__(self) -> int:
        return len(self.modality)

    @property
    def device(self) -> torch.device:
        return self.modality.device

    @cached_property
    def lengths(self) -> list[int]:
        """Positions of each document, in stream order. Cached: on an accelerator it would cost a synchronisation."""
        if not len(self):
            return []
        return torch.unique_consecutive(self.document, return_counts=True)[1].tolist()

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    def validate(self) -> TokenStream:
        """Check the contents; returns self. Raises `ValueError` that names what was got and what was expected."""
        count, document = len(self), self.document
        steps = document.diff()
        if count and (document[0] != 0 or not ((steps == 0) | (steps == 1)).all()):
            raise ValueError(
                "TokenStream.document must start at 0 and count up without gaps (documents are contiguous); "
                "build packs with mm.stream.pack"
            )
        if count and (int(self.target.max()) >= count or int(self.target.min()) < -1):
            low, high = int(self.target.min()), int(self.target.max())
            raise ValueError(f"TokenStream.target spans {low}..{high}; it must lie in -1..{count - 1}")
        has = self.target >= 0
        crossing = int((document[self.target[has]] != document[has]).sum())
        if crossing:
            raise ValueError(f"{crossing} targets of TokenStream lie in another document; targets stay in their own")
        if not torch.isfinite(self.position).all() or not torch.isfinite(self.weight).all():
            raise ValueError("TokenStream.position and .weight must be finite numbers")
        if count and not ((self.time >= 0) & (self.time <= 1)).all():
            raise ValueError("TokenStream.time must lie in 0..1 (0 = data, 1 = noise)")
        held = torch.zeros(count, dtype=torch.int64, device=self.device)
        for kind in RECORDS:
            for name, record in getattr(self, kind).items():
                index = record.index
                if len(index) and (int(index.min()) < 0 or int(index.max()) >= count):
                    raise ValueError(f"TokenStream.{kind}[{name!r}] points outside the stream's {count} positions")
                if kind != "inject":
                    held.index_add_(0, index, torch.ones_like(index))
        held += self.ids >= 0
        if not (held == 1).all():
            raise ValueError(
                f"{int((held == 0).sum())} positions of TokenStream hold no content and {int((held > 1).sum())} hold "
                "more than one; each needs exactly one of ids, codes, latents"
            )
        return self

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TokenStream:
        # towards the CPU an asynchronous copy may be read before it has arrived
        wait = torch.device(device).type == "cpu"
        return self._map(lambda x: x.to(device, non_blocking=non_blocking and not wait))

    def pin_memory(self) -> TokenStream:
        return self._map(lambda x: x.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> TokenStream:
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in POSITIONAL}
        for kind in RECORDS:
            changed[kind] = {name: record.map(function) for name, record in getattr(self, kind).items()}
        moved = replace(self, **changed)
        for name in ("lengths", "runs"):  # derived facts stay true, and were computed where it is cheap
            if name in self.__dict__:
                moved.__dict__[name] = self.__dict__[name]
        return moved


POSITIONAL = tuple(f.name for f in fields(TokenStream) if f.name not in RECORDS)


def pack(streams: Sequence[TokenStream], capacity: int | None = None) -> TokenStream:
    """Put streams end to end: documents renumbered, indices and targets shifted. `unpack` is the inverse.

    Raises `ValueError` when the sum of lengths exceeds `capacity`.
    """
    if not streams:
        raise ValueError("pack got no streams; it needs at least one")
    total = sum(len(s) for s in streams)
    if capacity is not None and total > capacity:
        raise ValueError(f"pack got {len(streams)} streams of {total} positions in all, but the capacity is {capacity}")
    parts: dict[str, list[Tensor]] = {name: [] for name in POSITIONAL}
    records: dict[str, dict[str, list[Placed]]] = {kind: {} for kind in RECORDS}
    offset, documents = 0, 0
    for stream in streams:
        for name in POSITIONAL:
            value = getattr(stream, name)
            if name == "document":
                value = value + documents
            elif name == "target":
                value = torch.where(value >= 0, value + offset, value)
            parts[name].append(value)
        for kind in RECORDS:
            for name, record in getattr(stream, kind).items():
                records[kind].setdefault(name, []).append(record.moved(offset))
        offset += len(stream)
        documents += stream.num_documents
    merged: dict[str, Any] = {name: torch.cat(values) for name, values in parts.items()}
    packed = TokenStream(
        **merged | {kind: {name: join(parts) for name, parts in named.items()} for kind, named in records.items()},
    )
    packed.__dict__["lengths"] = [n for stream in streams for n in stream.lengths]
    return packed


def unpack(stream: TokenStream) -> list[TokenStream]:
    """One stream a document; `pack(unpack(s))` equals `s`."""
    out, start = [], 0
    for number, length in enumerate(stream.lengths):
        end = start + length
        changed: dict[str, Any] = {name: getattr(stream, name)[start:end] for name in POSITIONAL}
        changed["document"] = changed["document"] - number
        changed["target"] = torch.where(changed["target"] >= 0, changed["target"] - start, changed["target"])
        for kind in RECORDS:
            changed[kind] = {}
            for name, record in getattr(stream, kind).items():
                inside = (record.index >= start) & (record.index < end)
                if inside.any():
                    changed[kind][name] = record.at(inside, -start)
        out.append(TokenStream(**changed))
        start = end
    return out
