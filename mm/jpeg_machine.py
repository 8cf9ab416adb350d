"""The strict automaton of a baseline JPEG file: what it accepts is a whole picture, to the last bit.

It reads the codes bit by bit: every MCU has its blocks, no run of zeros leads beyond the 64th coefficient, first coefficients
stay in the range of pixels, a restart marker comes after every interval and has its number, unused bits before a marker are ones,
an FF among the codes is followed by 00, and the end marker follows the last MCU.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from mm.byte_automaton import ByteMachine
from mm.jpeg_closing import Closing
from mm.jpeg_codes import LAST, Bits, Codes, Inner
from mm.jpeg_tables import RST, Frame, Tables

END = 0xD9
FOREIGN = re.compile(rb"\xff[^\x00\xd0-\xd7\xd9]")
"""What can't come among codes: the marker of a header."""
MODES = ("header", "codes", "stuffed", "marker", "number", "end")
"""Of states."""


class State(NamedTuple):
    """Between two bytes."""

    mode: str
    """`header`; `codes`; `stuffed`: after an FF among the codes; `marker`, `number`: before the first and second byte of a
    marker; `end`."""
    inner: Inner = 0
    """In `header` its bytes that came."""


class JpegMachine(Codes, ByteMachine[State]):
    """See the module.

    Args:
        frame: size, sampling and restart interval.
        tables: codes and steps.
        header: what comes before the codes; may be empty.
    """

    def __init__(self, frame: Frame, tables: Tables, header: bytes = b"") -> None:
        super().__init__(frame, tables)
        self.header, (self.rows, self.columns) = header, frame.grid
        self.start = State("header") if header else State("codes", Bits(self.total))
        self.way = Closing(self)

    def step(self, state: State, byte: int) -> State | None:
        if state.mode != "codes":
            after, expected = self._forced(state)
            return after if byte == expected else None
        inner, place = state.inner, 8  # bits that are still to come
        while place:
            skipped = self.skipped(inner, place)
            if skipped is not None:
                inner, place = skipped
                continue
            following, size = self.coded(inner, byte << (8 - place) & 0xFF, place)
            if following is None:
                return None
            inner, place = following, place - size
        return self._whole(inner, byte)

    def allowed(self, state: State) -> int:
        return super().allowed(state) if state.mode != "codes" else self.strings(state.inner, 8)

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
        place = (state.mode, inner.block, *inner[2:])
        return place if blocks * self.shortest > 8 * reach else (*place, blocks, self.number(left))

    def reach(self, table: Sequence[bytes]) -> int:
        return max(len(token) for token in table if not FOREIGN.search(token))

    def place(self, state: State) -> list[float]:
        """What comes (the mode), row and column of the MCU, block and coefficient, whether a code or a value has begun, and the
        first coefficients before."""
        inner, left, limits = state.inner, self.total, self.limits
        out = [0.0] * (self.rows + self.columns + len(self.part) + len(MODES) + LAST + 7)
        at = len(MODES)
        out[MODES.index(state.mode)] = 1.0
        if isinstance(inner, Bits):
            left = inner.left
            out[at + self.rows + 1 + self.columns + inner.block] = 1.0
            out[-LAST - 6 + inner.k] = 1.0
            first, second, third = inner.before
            out[-5:] = (
                float(inner.node > 0), inner.bits / 11, first / limits[0], second / limits[-1], third / limits[-1]
            )  # fmt: skip
        elif state.mode != "header":
            left = inner
        row, column = divmod(self.total - left, self.columns)
        out[at + row] = out[at + self.rows + 1 + column] = 1.0
        return out

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
