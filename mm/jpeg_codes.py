"""The codes of a baseline JPEG file bit by bit: which bit may come after which, so that every block is whole and right.

What may come depends on the blocks that are left, on the coefficient that is next, on the node of the Huffman tree, and on the
first coefficients before. `mm.jpeg_machine` makes bytes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from mm.jpeg_tables import Frame, Huffman, Tables

LAST = 64
"""Coefficients of a block."""
ZEROS = (0, 0, 0)
UNKNOWN = (-1, 99)
"""Where 8 bits don't tell a symbol: none, and a length that doesn't fit."""
MAX_STRINGS = 1 << 15
"""Answers of `Codes.strings` that are kept."""


class Bits(NamedTuple):
    """Between two bits of an interval."""

    left: int
    """MCUs of the picture that are not yet complete."""
    block: int = 0
    """Block of the MCU."""
    k: int = 0
    """Coefficient that comes next; 0 is the first (DC). Among the bits of a value: that after it."""
    node: int = 0
    """Of the Huffman tree. Among the bits of a first coefficient's value: their number altogether."""
    bits: int = 0
    """Bits of a value that are still to come."""
    value: int = 0
    """Those that came, of a first coefficient's; of others they may be anything."""
    before: tuple[int, int, int] = ZEROS
    """First coefficient of each component's block before: what is coded is the difference. Zero where it no longer matters."""


Inner = Bits | int
"""Between two bits; a number: the interval is complete, and so many MCUs are left after it."""


class Codes:
    """What the codes of a picture may be.

    Args:
        frame: size, sampling and restart interval.
        tables: codes and steps.
    """

    def __init__(self, frame: Frame, tables: Tables) -> None:
        rows, columns = frame.grid
        self.total = rows * columns
        self.interval = min(frame.restart, self.total) or self.total
        self.part = frame.components
        self.ends_part = [part not in self.part[block + 1 :] for block, part in enumerate(self.part)]
        kinds = [min(part, 1) for part in self.part]
        self.codes = [(tables.dc[kind], tables.ac[kind]) for kind in kinds]
        self.limits = [(1024 + tables.steps[kind] // 2) // tables.steps[kind] for kind in kinds]
        self.smallest = [_of_nodes(first, min) for first, _ in self.codes]
        self.furthest = [_of_nodes(other, _furthest) for _, other in self.codes]
        self.windows = [(_windows(first), _windows(other)) for first, other in self.codes]
        self.spread = _spread(tables.ac)
        self.shortest = min(len(first.path(0)) + len(other.path(0)) for first, other in self.codes)
        """Bits of the shortest block."""
        self._strings: dict[Hashable, int] = {}

    def bit(self, s: Inner, bit: int) -> Inner | None:
        """The state after a bit; None: it may not come."""
        if isinstance(s, int):
            return s if bit else None
        left, block, k, node, bits, value, before = s
        if bits:
            if not k:
                return self._first(s, 2 * value + bit, bits - 1)
            if bits > 1 or k < LAST:
                return Bits(left, block, k, 0, bits - 1, 0, before)
            return self._next(left, block, before)
        child = self.codes[block][k > 0].children[node][bit]
        if child == -1:
            return None
        if child < -1:
            return self.symbol(s, -2 - child)
        if k > self.furthest[block][child] if k else not self._may_be(s, self.smallest[block][child]):
            return None
        return Bits(left, block, k, child, 0, 0, before)

    def symbol(self, s: Bits, symbol: int) -> Inner | None:
        """After a code."""
        left, block, k, _, _, _, before = s
        if not k:
            if not symbol:
                return self._settle(s, before[self.part[block]])
            return Bits(left, block, 0, symbol, symbol, 0, before) if self._may_be(s, symbol) else None
        if not symbol:
            return self._next(left, block, before)
        bits = symbol & 15
        k += (symbol >> 4) + 1
        if k > (LAST if bits else LAST - 1):  # sixteen zeros are followed by a coefficient
            return None
        return Bits(left, block, k, 0, bits, 0, before)

    def _may_be(self, s: Bits, size: int) -> bool:
        """Whether a difference of so many bits leads to a first coefficient in range."""
        return (1 << size >> 1) - abs(s.before[self.part[s.block]]) <= self.limits[s.block]

    def _first(self, s: Bits, value: int, bits: int) -> Inner | None:
        """After a bit of a first coefficient's value, of which `bits` are still to come."""
        at, limit, lowest = s.before[self.part[s.block]], self.limits[s.block], value << bits
        if at + _signed(lowest + (1 << bits) - 1, s.node) < -limit or at + _signed(lowest, s.node) > limit:
            return None
        if bits:
            return Bits(s.left, s.block, 0, s.node, bits, value, s.before)
        return self._settle(s, at + _signed(value, s.node))

    def _settle(self, s: Bits, at: int) -> Bits:
        """After a first coefficient."""
        part, before = self.part[s.block], list(s.before)
        forgotten = self.ends_part[s.block] and self.after(s.left)[0] == 0
        before[part] = 0 if forgotten else at
        return Bits(s.left, s.block, 1, 0, 0, 0, (before[0], before[1], before[2]))

    def _next(self, left: int, block: int, before: tuple[int, int, int]) -> Inner:
        """After a block."""
        if block + 1 < len(self.part):
            return Bits(left, block + 1, 0, 0, 0, 0, before)
        return Bits(left - 1, 0, 0, 0, 0, 0, before) if self.after(left)[0] else left - 1

    def after(self, left: int) -> tuple[int, int]:
        """MCUs of the interval after the one that is under way, and those of the picture after the interval."""
        done = self.total - left
        first = done - done % self.interval
        size = min(self.interval, self.total - first)
        return size - done % self.interval - 1, self.total - first - size

    # ---- several bits ---------------------------------------------------------------------------------------------------

    def skipped(self, s: Inner, place: int) -> tuple[Inner, int] | None:
        """Over the bits of a value that may be anything, as many as come: the state after them, and how many are then left of
        `place`. None: there is none."""
        if isinstance(s, int) or not s.bits or not s.k:
            return None
        bits = s.bits - place
        if bits > 0 or s.k < LAST:
            return Bits(s.left, s.block, s.k, 0, max(bits, 0), 0, s.before), max(-bits, 0)
        return self._next(s.left, s.block, s.before), -bits

    def coded(self, s: Inner, window: int, place: int) -> tuple[Inner | None, int]:
        """After the code that stands in the first `place` of these 8 bits, or after one bit, where it can't be told; and how many
        bits that took."""
        if isinstance(s, Bits) and not s.node and not s.bits:
            symbol, size = self.windows[s.block][s.k > 0][window]
            if size <= place:
                return self.symbol(s, symbol), size
        return self.bit(s, window >> 7), 1

    def strings(self, s: Inner, count: int) -> int:
        """Which strings of so many bits may come, the first in the highest place of their number, as the bits of a number."""
        if not count:
            return 1
        if isinstance(s, int):
            return 1 << ((1 << count) - 1)
        if (skipped := self.skipped(s, count)) is not None:
            after, rest = skipped
            every = ((1 << (1 << count)) - 1) // ((1 << (1 << rest)) - 1)  # the same behind any value
            return every * self.strings(after, rest)
        blocks = min((self.after(s.left)[0] + 1) * len(self.part) - s.block, 8)
        key = (count, blocks, s.block, self._near(s.k, 8), *s[3:])
        found = self._strings.get(key)
        if found is None:
            found = 0
            for bit in (0, 1):
                if (following := self.bit(s, bit)) is not None:
                    found |= self.strings(following, count - 1) << (bit << (count - 1))
            if len(self._strings) >= MAX_STRINGS:
                self._strings.clear()
            self._strings[key] = found
        return found

    def _near(self, k: int, count: int) -> int:
        """Of a coefficient's place what matters within so many bits: nothing, where they can't lead beyond the last."""
        return 1 if 0 < k < LAST - self.spread[min(count, len(self.spread) - 1)] else k


def _signed(value: int, size: int) -> int:
    """The number that so many bits stand for."""
    return value if value >> (size - 1) else value - (1 << size) + 1


def _of_nodes(code: Huffman, what: Callable[[list[int]], int]) -> list[int]:
    """Something of the symbols that can still be reached, for each node."""
    return [what(list(code.below(node))) for node in range(len(code.children))]


def _windows(code: Huffman) -> list[tuple[int, int]]:
    """Of each 8 bits, the symbol whose code they begin with, and its length."""
    out = [UNKNOWN] * 256
    for symbol in code.symbols:
        bits = [bit for _, bit in code.path(symbol)]
        if len(bits) <= 8:
            first, count = int("".join(map(str, bits)), 2), 1 << (8 - len(bits))
            out[first * count : (first + 1) * count] = [(symbol, len(bits))] * count
    return out


def _spread(codes: Sequence[Huffman]) -> list[int]:
    """[n]: by how many coefficients n bits can lead on at the most, the last code perhaps not whole."""
    steps = [(symbol, len(code.path(symbol))) for code in codes for symbol in code.symbols if symbol]
    out = [0]
    for count in range(1, 65):
        whole = [
            (symbol >> 4) + 1 + out[count - size] for symbol, bits in steps if (size := bits + (symbol & 15)) <= count
        ]
        out.append(max([*whole, 16]))
    return out


def _furthest(symbols: list[int]) -> int:
    """Largest k at which one of these may stand."""
    reach = {0: LAST - 1, 0xF0: LAST - 17}
    return max(reach[symbol] if symbol in reach else LAST - 1 - (symbol >> 4) for symbol in symbols)
