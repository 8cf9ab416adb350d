"""The strict automaton of a baseline JPEG file: what it accepts is a whole picture, to the last bit.

It reads the codes bit by bit: every MCU has its blocks, no run of zeros leads beyond the 64th coefficient, first coefficients
stay in the range of pixels, a restart marker comes after every interval and has its number, unused bits before a marker are ones,
an FF among the codes is followed by 00, and the end marker follows the last MCU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from mm.byte_automaton import ByteMachine
from mm.jpeg_tables import RST, Frame, Huffman, Tables

LAST = 64
"""Coefficients of a block."""
ZEROS = (0, 0, 0)
END = 0xD9


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


class State(NamedTuple):
    """Between two bytes."""

    mode: str
    """`header`; `codes`; `stuffed`: after an FF among the codes; `marker`, `number`: before the first and second byte of a
    marker; `end`."""
    inner: Inner = 0
    """In `header` its bytes that came."""


class JpegMachine(ByteMachine[State]):
    """See the module.

    Args:
        frame: size, sampling and restart interval.
        tables: codes and steps.
        header: what comes before the codes; may be empty.
    """

    def __init__(self, frame: Frame, tables: Tables, header: bytes = b"") -> None:
        rows, columns = frame.grid
        self.total, self.header = rows * columns, header
        self.interval = min(frame.restart, self.total) or self.total
        self.part = frame.components
        self.ends_part = [part not in self.part[block + 1 :] for block, part in enumerate(self.part)]
        kinds = [min(part, 1) for part in self.part]
        self.trees = [(tables.dc[kind].children, tables.ac[kind].children) for kind in kinds]
        self.limits = [(1024 + tables.steps[kind] // 2) // tables.steps[kind] for kind in kinds]
        self.smallest = [_of_nodes(tables.dc[kind], lambda below: min(below)) for kind in kinds]
        self.furthest = [_of_nodes(tables.ac[kind], _furthest) for kind in kinds]
        self.start = State("header") if header else State("codes", Bits(self.total))
        self.way = Closing(self, [(tables.dc[kind], tables.ac[kind]) for kind in kinds])

    # ---- bits --------------------------------------------------------------------------------------------------------

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
        child = self.trees[block][k > 0][node][bit]
        if child == -1:
            return None
        if child < -1:
            return self._symbol(s, -2 - child)
        if k > self.furthest[block][child] if k else not self._may_be(s, self.smallest[block][child]):
            return None
        return Bits(left, block, k, child, 0, 0, before)

    def _symbol(self, s: Bits, symbol: int) -> Inner | None:
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

    # ---- bytes -------------------------------------------------------------------------------------------------------

    def step(self, state: State, byte: int) -> State | None:
        if state.mode != "codes":
            after, expected = self._forced(state)
            return after if byte == expected else None
        inner: Inner | None = state.inner
        for place in range(7, -1, -1):
            inner = self.bit(inner, byte >> place & 1)  # type: ignore[arg-type]
            if inner is None:
                return None
        return self._whole(inner, byte)  # type: ignore[arg-type]

    def successors(self, state: State) -> dict[int, State]:
        if state.mode == "end":
            return {}
        if state.mode != "codes":
            after, expected = self._forced(state)
            return {expected: after}
        reached: list[tuple[int, Inner]] = [(0, state.inner)]
        for _ in range(8):
            reached = [
                (2 * begun + bit, following)
                for begun, inner in reached
                for bit in (0, 1)
                if (following := self.bit(inner, bit)) is not None
            ]
        return {byte: self._whole(inner, byte) for byte, inner in reached}

    @staticmethod
    def _whole(inner: Inner, byte: int) -> State:
        """After the last bit of a byte."""
        if byte == 0xFF:
            return State("stuffed", inner)
        return State("marker", inner) if isinstance(inner, int) else State("codes", inner)

    def _forced(self, state: State) -> tuple[State, int]:
        """Where only one byte may come: the state after it, and the byte; −1 at the end."""
        mode, inner = state
        if mode == "stuffed":
            return State("marker" if isinstance(inner, int) else "codes", inner), 0
        assert isinstance(inner, int), "anything else stands between codes"
        if mode == "header":
            whole = inner + 1 == len(self.header)
            return State("codes", Bits(self.total)) if whole else State("header", inner + 1), self.header[inner]
        if mode == "marker":
            return State("number", inner), 0xFF
        if mode == "number":
            return (State("codes", Bits(inner)) if inner else State("end")), self.number(inner)
        return state, -1

    def number(self, left: int) -> int:
        """Second byte of the marker after which so many MCUs are left."""
        return RST + ((self.total - left) // self.interval - 1) % 8 if left else END

    def is_end(self, state: State) -> bool:
        return state.mode == "end"

    def key(self, state: State, reach: int) -> Hashable:
        """Of the place in the picture only what such a string can come to: the end of the interval, and its marker."""
        inner = state.inner
        if state.mode == "header" or isinstance(inner, int):
            return state
        after, left = self.after(inner.left)
        blocks = (after + 1) * len(self.part) - inner.block - 1
        if blocks * self.way.shortest > 8 * reach:
            return state.mode, inner.block, inner[2:]
        return state.mode, blocks, self.number(left), inner[2:]

    # ---- the end -----------------------------------------------------------------------------------------------------

    def closing(self, state: State) -> int:
        if state.mode != "codes":
            return self._forced(state)[1]
        inner, byte = state.inner, 0
        for _ in range(8):
            bit = self.way.bit(inner)
            following = self.bit(inner, bit)
            assert following is not None, "a way to the end is open"
            inner, byte = following, 2 * byte + bit
        return byte

    def need(self, state: State) -> int:
        mode, inner = state
        if mode == "header":
            assert isinstance(inner, int)
            return len(self.header) - inner + self.need(State("codes", Bits(self.total)))
        here = {"codes": 0, "stuffed": 1, "marker": 0, "number": -1, "end": -2}[mode]
        if isinstance(inner, int):  # a marker, and all intervals after it
            return here + 2 + self.way.intervals(inner)
        return here + self.way.bytes(inner)

    def bound(self, state: State) -> int:
        mode, inner = state
        if mode == "header":
            return len(self.header) + self.way.bound(self.total)
        return 3 + self.way.bound(inner if isinstance(inner, int) else inner.left)


class Closing:
    """The way from anywhere to the end of the picture: the value that has begun is written with as many zeros as may be, the
    block ends, and all further blocks are like the one before.

    A place within a byte is a pair (bits that came, whether all of them are ones: a byte of ones is followed by 00).
    """

    def __init__(self, machine: JpegMachine, codes: list[tuple[Huffman, Huffman]]) -> None:
        self.machine = machine
        self.zero = [tuple(code.path(0) for code in pair) for pair in codes]
        """Of each block and for first and other coefficients, the nodes and bits of the code of symbol 0."""
        self.end = [[bit for _, bit in other] for _, other in self.zero]
        """Bits that end a block."""
        self.empty = [[bit for _, bit in first] + end for (first, _), end in zip(self.zero, self.end, strict=True)]
        """Bits of a block like the one before."""
        self.shortest = min(map(len, self.empty))
        self.on_way = [tuple(dict(path) for path in pair) for pair in self.zero]
        self.begun: dict[tuple[int, ...], tuple[int, int]] = {}
        whole = [bit for block in self.empty for bit in block]
        moves = [_push(place >> 1, place & 1, whole) for place in range(16)]
        self.mcus = [[min(place >> 1, 1) * (1 + (place & 1)) for place in range(16)]]
        """[n][place]: bytes that n MCUs like the one before take, and the bits that fill the last."""
        for _ in range(machine.interval):
            self.mcus.append([count + self.mcus[-1][2 * at + ones] for at, ones, count in moves])

    def bit(self, s: Inner) -> int:
        """The next bit."""
        if isinstance(s, int):
            return 1
        if s.bits:
            return int(self.machine.bit(s, 0) is None)
        zero = self.on_way[s.block][s.k > 0].get(s.node)
        return self._choice(s)[1] if zero is None else zero

    def _choice(self, s: Bits) -> tuple[int, int]:
        """From a node of a tree from which symbol 0 can't be reached: least number of bits to the end of the block, and the
        first of them."""
        at = 0 if s.k else s.before[self.machine.part[s.block]]
        key = (s.block, s.k, s.node, at)
        if key not in self.begun:
            self.begun[key] = min((1 + self._cost(self.machine.bit(s, bit)), bit) for bit in (0, 1))
        return self.begun[key]

    def _cost(self, after: Inner | None) -> int:
        if after is None:
            return 1 << 20
        if isinstance(after, int):
            return 0
        if after.bits or not after.node:
            return after.bits + (len(self.end[after.block]) if after.k < LAST else 0)
        return self._choice(after)[0]

    def bytes(self, s: Bits) -> int:
        """Bytes from the beginning of one to the end of the picture, its end marker included."""
        block, at, ones, count = s.block, 0, 1, 0
        inner: Inner | None = s
        while isinstance(inner, Bits) and inner.left == s.left and inner.block == block:
            bit = self.bit(inner)
            inner = self.machine.bit(inner, bit)
            at, ones, more = _push(at, ones, [bit])
            count += more
            if isinstance(inner, Bits) and inner.k and not inner.node and not inner.bits:
                at, ones, more = _push(at, ones, self.end[block])
                count += more
                break
        for bits in self.empty[block + 1 :]:
            at, ones, more = _push(at, ones, bits)
            count += more
        after, left = self.machine.after(s.left)
        return count + self.mcus[after][2 * at + ones] + 2 + self.intervals(left)

    def intervals(self, left: int) -> int:
        """Bytes of so many MCUs after a marker, the markers behind them included."""
        size = self.machine.interval
        whole, rest = divmod(left, size)
        return whole * (self.mcus[size][1] + 2) + (self.mcus[rest][1] + 2 if rest else 0)

    def bound(self, left: int) -> int:
        """No less than `bytes` where so many MCUs are left, or fewer: a code has up to 16 bits, a value 11, an end 16; each byte
        may be followed by 00."""
        if not left:
            return 2
        after, beyond = self.machine.after(left)
        return max(self.mcus[after + 1]) + 14 + 2 + self.intervals(beyond)


def _push(at: int, ones: int, bits: list[int]) -> tuple[int, int, int]:
    """The place within a byte after some bits, and how many bytes became full, with the 00 that follow."""
    count = 0
    for bit in bits:
        at, ones = at + 1, ones & bit
        if at == 8:
            at, ones, count = 0, 1, count + 1 + ones
    return at, ones, count


def _signed(value: int, size: int) -> int:
    """The number that so many bits stand for."""
    return value if value >> (size - 1) else value - (1 << size) + 1


def _of_nodes(code: Huffman, what: Callable[[list[int]], int]) -> list[int]:
    """Something of the symbols that can still be reached, for each node."""
    return [what(list(code.below(node))) for node in range(len(code.children))]


def _furthest(symbols: list[int]) -> int:
    """Largest k at which one of these may stand."""
    reach = {0: LAST - 1, 0xF0: LAST - 17}
    return max(reach[symbol] if symbol in reach else LAST - 1 - (symbol >> 4) for symbol in symbols)
