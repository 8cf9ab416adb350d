"""Keys and values of what is already generated, row by row, and the attention plan that reads them.

Letters in shapes: T packed query positions of this pass, H query heads, G key/value heads, E head width, S slots of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.attention import dense_bias, visible, xformers_attention
from mm.backbone import BackboneConfig, apply_rotary


@dataclass(frozen=True)
class Chunk:
    """What one row feeds in one pass: `len(order)` positions. `keep`: they stay in the cache (clean positions only)."""

    row: int
    order: Sequence[int]
    copy: Sequence[int] | None = None
    keep: bool = True


@dataclass(frozen=True)
class Forgotten:
    """Positions of one row that leave the cache after a pass: `count` of them from slot `first` on. Those behind them move up,
    and their coordinates by `by`, so that what goes on for long never stands farther out than training showed."""

    first: int
    count: int
    by: tuple[float, float, float]


class KVCache:
    """Preallocated keys and values for `rows` rows of up to `capacity` positions. Slots past a row's length are scratch: a pass
    that is not kept writes there, and the next pass overwrites it."""

    def __init__(
        self, config: BackboneConfig, rows: int, capacity: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.layers, rows, capacity, config.kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.lengths = [0] * rows
        self.order = np.zeros((rows, capacity), dtype=np.int64)
        """Order of what each slot holds; every kept position is clean (copy 0)."""

    def reset(self, row: int) -> None:
        self.lengths[row] = 0

    def move(self, old: int, new: int) -> None:
        """What one row holds stands in another one from now on."""
        length = self.lengths[old]
        self.keys[:, new, :length] = self.keys[:, old, :length]
        self.values[:, new, :length] = self.values[:, old, :length]
        self.order[new, :length] = self.order[old, :length]
        self.lengths[new], self.lengths[old] = length, 0

    def grow(self, rows: int, capacity: int) -> None:
        """Room for so many rows of so many positions, neither fewer than before; what is held stays."""
        before, room = self.capacity, (rows - len(self.lengths), capacity - self.capacity)
        assert min(room) >= 0
        self.keys, self.values = (F.pad(x, (0, 0, 0, 0, 0, room[1], 0, room[0])) for x in (self.keys, self.values))
        order, self.order = self.order, np.zeros((rows, capacity), dtype=np.int64)
        self.order[: len(order), :before] = order
        self.lengths += [0] * room[0]
        self.capacity = capacity

    def plan(self, chunks: Sequence[Chunk]) -> Cached:
        """The plan of one pass; chunks in ascending row order. Raises `ValueError` when a row would outgrow the cache."""
        for chunk in chunks:
            end = self.lengths[chunk.row] + len(chunk.order)
            if end > self.capacity:
                raise ValueError(
                    f"row {chunk.row} needs {end} positions, but the cache holds {self.capacity}; "
                    "shorten the prompt or ask for fewer new tokens"
                )
        return Cached(self, chunks)

    def commit(self, chunks: Sequence[Chunk]) -> None:
        """Keep what the pass wrote, where the chunk says so."""
        for chunk in chunks:
            if chunk.keep:
                start, count = self.lengths[chunk.row], len(chunk.order)
                self.order[chunk.row, start : start + count] = chunk.order
                self.lengths[chunk.row] = start + count

    def forget(self, row: int, gone: Forgotten, rotary: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]) -> None:
        """Drop positions of a row. Keys stand here as rotated to where they were; rotations add up, so turning them by the way
        that they move gives what rotating them anew would (Ca2-VDM keeps them unrotated instead, and rotates all in every
        pass). What moves is as much as stays, whatever the row has forgotten before."""
        old, new, end = gone.first + gone.count, gone.first, self.lengths[row]
        assert 0 <= new < old <= end
        stay = end - gone.count
        rope = rotary(torch.tensor([gone.by], device=self.keys.device), torch.float32)
        kept = self.keys[:, row, old:end].float()  # (layers, moved, G, E)
        turned = apply_rotary(kept.flatten(0, 1), rope).view_as(kept)
        self.keys[:, row, new:stay] = turned.to(self.keys.dtype)
        self.values[:, row, new:stay] = self.values[:, row, old:end].clone()
        self.order[row, new:stay] = self.order[row, old:end].copy()
        self.lengths[row] = stay


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows whose chunks have one length and one look."""

    queries: slice
    row: int
    rows: int
    count: int
    keys: int
    kind: str
    mask: Tensor | None
    bias: Any = None
    """What xformers wants instead of the mask: a block-diagonal bias, or dense ones (None = all keys), one a row."""


class Cached:
    """Attention of new positions to the cached ones and to each other, by the one visibility rule."""

    def __init__(self, cache: KVCache, chunks: Sequence[Chunk]) -> None:
        self.cache = cache
        device = cache.keys.device
        slots: list[int] = []
        described = []
        for chunk in chunks:
            start, count = cache.lengths[chunk.row], len(chunk.order)
            first = chunk.row * cache.capacity + start
            slots.extend(range(first, first + count))
            described.append((chunk, start, _kind(chunk, start)))
        self.slots = torch.tensor(slots, device=device)
        self.groups: list[_Group] = []
        begin, number = 0, 0
        while number < len(described):
            last = number + 1
            while last < len(described) and _joins(described[last - 1], described[last]):
                last += 1
            members = described[number:last]
            count = len(members[0][0].order)
            self.groups.append(self._group(members, slice(begin, begin + count * len(members)), device))
            begin += count * len(members)
            number = last
        # one group over every row of the cache needs no gathering at all, and is the common case
        self.single = self.groups[0] if len(self.groups) == 1 else None

    def _group(self, members: list[tuple[Chunk, int, str]], queries: slice, device: torch.device) -> _Group:
        count = len(members[0][0].order)
        starts = [start for _, start, _ in members]
        keys = max(starts) + count
        kind, mask = members[0][2], None
        if kind == "masked":
            mask = torch.stack([self._rule(chunk, start, keys) for chunk, start, _ in members])[:, None].to(device)
        elif min(starts) != max(starts):  # ragged rows: the same look, but keys end at each row's own length
            ends = torch.tensor(starts)[:, None] + (torch.arange(count) + 1 if kind == "causal" else count)
            mask = (torch.arange(keys) < ends[..., None])[:, None].to(device)
        elif kind == "causal" and count > 1 and starts[0]:
            mask = (torch.arange(keys) <= starts[0] + torch.arange(count)[:, None])[None, None].to(device)
        bias = self._xformers(starts, count, keys, kind, mask) if device.type == "cuda" else None
        return _Group(queries, members[0][0].row, len(members), count, keys, kind, mask, bias)

    def _xformers(self, starts: list[int], count: int, keys: int, kind: str, mask: Tensor | None) -> Any:
        """Made once a pass, not once a layer."""
        dtype = self.cache.keys.dtype
        if kind == "masked":
            assert mask is not None
            return [dense_bias(own[0], dtype) for own in mask]
        if kind == "full" and count > 1 and dtype == torch.float32:
            return [None] * len(starts)  # no float32 kernel knows padded keys without causality
        return padded_bias(starts, count, self.cache.capacity, kind, self.cache.keys.device)

    def _rule(self, chunk: Chunk, start: int, keys: int) -> Tensor:
        order = torch.tensor(list(chunk.order))
        copy = torch.tensor(list(chunk.copy)) if chunk.copy is not None else torch.zeros_like(order)
        past = torch.from_numpy(self.cache.order[chunk.row, :start].copy())
        seen = visible(order, copy, torch.cat((past, order)), torch.cat((torch.zeros_like(past), copy)))
        return F.pad(seen, (0, keys - seen.shape[1]))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.flatten(0, 1).index_copy_(0, self.slots, k)
        values.flatten(0, 1).index_copy_(0, self.slots, v)
        attend = self._cuda if q.device.type == "cuda" else self._sdpa
        if self.single is not None:
            return attend(self.single, q, keys, values)
        return torch.cat([attend(group, q[group.queries], keys, values) for group in self.groups])

    def _sdpa(self, group: _Group, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows = slice(group.row, group.row + group.rows)
        k, v = (x[rows, : group.keys].transpose(1, 2) for x in (keys, values))
        shaped = q.view(group.rows, group.count, q.shape[1], q.shape[2]).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            shaped,
            k,
            v,
            attn_mask=group.mask,
            is_causal=group.kind == "causal" and group.mask is None,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return out.transpose(1, 2).reshape(q.shape)

    def _cuda(self, group: _Group, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows = slice(group.row, group.row + group.rows)
        if isinstance(group.bias, list):
            # rows one by one: a dense bias belongs to one row, and such passes are few
            outs = []
            for row, bias, part in zip(range(rows.start, rows.stop), group.bias, q.split(group.count), strict=True):
                end = group.keys if bias is not None else self.cache.lengths[row] + group.count
                outs.append(xformers_attention(part, keys[row, :end], values[row, :end], bias))
            return torch.cat(outs)
        k, v = (x[rows].flatten(0, 1) for x in (keys, values))
        return xformers_attention(q, k, v, group.bias)


def padded_bias(starts: Sequence[int], count: int, capacity: int, kind: str, device: torch.device) -> Any:
    """The xformers bias of neighbouring cache rows that hold `starts` positions each and are fed `count` more. A single
    query sees every key whether causal or not, and the causal bias is the one that all kernels know."""
    from xformers.ops.fmha import attn_bias as biases

    padded = biases.BlockDiagonalCausalWithOffsetPaddedKeysMask
    if kind == "full" and count > 1:
        padded = biases.BlockDiagonalPaddedKeysMask
    lengths = [start + count for start in starts]
    return padded.from_seqlens([count] * len(starts), capacity, lengths, device=device)


def _kind(chunk: Chunk, start: int) -> str:
    """How the rule looks in a chunk, given that the row's cached positions all have lower orders (the engine's invariant)."""
    if len(chunk.order) == 1:
        return "full"
    if chunk.copy is None or not any(chunk.copy):
        steps = np.diff(chunk.order)
        if (steps == 0).all():
            return "full"
        if (steps > 0).all():
            return "causal"
    return "masked"


def _joins(before: tuple[Chunk, int, str], after: tuple[Chunk, int, str]) -> bool:
    return after[0].row == before[0].row + 1 and len(after[0].order) == len(before[0].order) and after[2] == before[2]
