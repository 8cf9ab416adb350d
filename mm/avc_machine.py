"""The automaton of an H.264 stream with a slice for each macroblock, on the level of units: every frame has its slices in order,
each begins as it has to, start codes stand nowhere else, what looks like one is escaped, and the end of the stream follows the
last slice. What the bits of a macroblock say is left to the model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from mm.avc_headers import CODE, END, LONG, Headers
from mm.byte_automaton import ByteMachine

CLOSE = CODE + bytes([END])
ANY = (1 << 256) - 1
"""Every byte (`AvcMachine.allowed`)."""
LAST = 0x80
"""A byte that may end any slice: the bit that says so."""


class Place(NamedTuple):
    """Between two bytes."""

    number: int
    """Of the slice; behind the last: the end of the stream."""
    at: int = 0
    """Bytes that came of those known beforehand; all of them in a macroblock, and at the end."""
    way: int = 0
    """Bytes of an empty macroblock that came; −1: others came."""
    zeros: int = 0
    """Of the bytes that came last, up to 2."""
    ends: bool = False
    """Whether the slice may end before these zeros."""
    escaped: bool = False
    """After a 03 that came behind two zeros."""


class AvcMachine(ByteMachine[Place]):
    """See the module.

    Args:
        headers: how slices begin.
    """

    def __init__(self, headers: Headers) -> None:
        self.headers, self.slices = headers, headers.shape.slices
        begins = [headers.begin(number) for number in range(self.slices)]
        self.known = [data for data, _ in begins] + [CLOSE]
        self.first = [(int("0" + bits, 2) << (8 - len(bits)), 0x100 - (1 << (8 - len(bits)))) for _, bits in begins]
        """Bits of a macroblock's first byte that are known, and which these are."""
        self.empty = [headers.empty(number) for number in range(self.slices)]
        self.rest = [len(CLOSE)]
        """[n]: bytes of empty slices from the n-th on, and of the end."""
        for known, empty in zip(self.known[-2::-1], self.empty[::-1], strict=True):
            self.rest.append(self.rest[-1] + len(known) + len(empty))
        self.rest.reverse()
        self.start = Place(0)

    def _inside(self, state: Place) -> bool:
        """Whether it stands in a macroblock."""
        return state.number < self.slices and state.at == len(self.known[state.number])

    def step(self, state: Place, byte: int) -> Place | None:
        number, at, way, zeros, ends, escaped = state
        if self.is_end(state):
            return None
        if not self._inside(state):
            return Place(number, at + 1) if byte == self.known[number][at] else None
        if not way:  # the first byte
            value, mask = self.first[number]
            if byte & mask != value:
                return None
        if escaped and byte > 3:
            return None
        if zeros == 2:
            if byte == 3:
                return Place(number, at, -1, escaped=True)
            code = self.known[number + 1]
            if byte < 3:
                return Place(number + 1, 3) if ends and byte == code[2] else None
        on_way = 0 <= way < len(self.empty[number]) and byte == self.empty[number][way]
        way = way + 1 if on_way else -1
        if byte:
            return Place(number, at, way, 0, True)
        return Place(number, at, way, zeros + 1, ends)

    def successors(self, state: Place) -> dict[int, Place]:
        if self._inside(state) or self.is_end(state):
            return super().successors(state)
        number, at, *_ = state
        return {self.known[number][at]: Place(number, at + 1)}

    def allowed(self, state: Place) -> int:
        if self.is_end(state):
            return 0
        if not self._inside(state):
            return 1 << self.known[state.number][state.at]
        may = ANY
        if not state.way:
            value, mask = self.first[state.number]
            may = ((1 << (0x100 - mask)) - 1) << value
        if state.escaped:
            may &= 0b1111
        if state.zeros == 2:
            may = (may & ~0b111) | (self.step(state, 0) is not None) | (self.step(state, 1) is not None) << 1
        return may

    def key(self, state: Place, reach: int) -> Hashable:
        """Of the place in the stream only what is known to come, as far as such a string leads."""
        number, at, way, zeros, ends, escaped = state
        if number == self.slices:
            return state
        first, long = self.first[number], self.known[number + 1].startswith(LONG)
        if not self._inside(state):
            return self.known[number][at:], first, number if reach else long
        return None if way else first, zeros, ends, escaped, number if reach or zeros else long

    def reach(self, table: Sequence[bytes]) -> int:
        """A string without a start code, or with nothing behind one, leads into no further slice."""
        return max((len(token) for token in table if CODE in token[:-1]), default=0)

    def is_end(self, state: Place) -> bool:
        return state.number == self.slices and state.at == len(CLOSE)

    def closing(self, state: Place) -> int:
        number, at, way, zeros, ends, escaped = state
        if not self._inside(state):
            return self.known[number][at]
        if 0 <= way < len(self.empty[number]):
            return self.empty[number][way]
        if ends:
            return self.known[number + 1][zeros]
        return 1 if escaped else LAST

    def need(self, state: Place) -> int:
        number, at, way, zeros, ends, _ = state
        if self.is_end(state):
            return 0
        if not self._inside(state):
            return self.rest[number] - at
        after = self.rest[number + 1]
        if 0 <= way < len(self.empty[number]):
            return len(self.empty[number]) - way + after
        return after - zeros if ends else after + 1

    def bound(self, state: Place) -> int:
        return self.rest[state.number]
