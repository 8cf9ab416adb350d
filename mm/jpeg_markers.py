"""The loose automaton of a JPEG file: it knows markers, not codes. No marker stands where none may, restart markers come with
their numbers and not before an interval can be whole, and the end marker comes last; what the codes say is left to the model."""

from __future__ import annotations

from typing import NamedTuple

from mm.byte_automaton import ByteMachine
from mm.jpeg_tables import RST, Frame


class Place(NamedTuple):
    """Between two bytes."""

    interval: int
    """Restart intervals that are complete; all of them: the end."""
    taken: int = 0
    """Bytes of the interval that came, as many as matter."""
    after: bool = False
    """Whether the last of them was FF."""
    header: int = -1
    """Bytes of the header that came; −1: all of it."""


FILLER = 0
"""What is written to the end where codes don't matter."""


class MarkerMachine(ByteMachine[Place]):
    """See the module.

    Args:
        frame: size, sampling and restart interval.
        header: what comes before the codes; may be empty.
    """

    def __init__(self, frame: Frame, header: bytes = b"") -> None:
        rows, columns = frame.grid
        size = min(frame.restart, rows * columns) or rows * columns
        self.intervals, self.header = -(-rows * columns // size), header
        # a block takes 4 bits at the least with the codes that all files have; the last interval may have fewer MCUs
        whole, rest = (len(frame.components) * n // 2 for n in (size, (rows * columns - 1) % size + 1))
        self.sizes = [whole] * (self.intervals - 1) + [rest]
        self.start = Place(0, header=0) if header else Place(0)
        self._from = [0]
        """[n]: bytes of the last n intervals, markers too, at the least."""
        for size in reversed(self.sizes):
            self._from.append(self._from[-1] + size + 2)

    def number(self, interval: int) -> int:
        """Second byte of the marker that ends an interval."""
        return 0xD9 if interval + 1 == self.intervals else RST + interval % 8

    def step(self, state: Place, byte: int) -> Place | None:
        interval, taken, after, header = state
        if header >= 0:
            last = header + 1 == len(self.header)
            return Place(0, header=-1 if last else header + 1) if byte == self.header[header] else None
        if self.is_end(state):
            return None
        if not after:
            return Place(interval, min(taken + 1, self.sizes[interval]), byte == 0xFF)
        if byte == 0:
            return Place(interval, taken)
        # the FF, which was counted, then belonged to the marker
        fits = taken >= self.sizes[interval] and byte == self.number(interval)
        return Place(interval + 1) if fits else None

    def is_end(self, state: Place) -> bool:
        return state.interval == self.intervals

    def closing(self, state: Place) -> int:
        interval, taken, after, header = state
        if header >= 0:
            return self.header[header]
        whole = taken >= self.sizes[interval]
        if after:
            return self.number(interval) if whole else 0
        return 0xFF if whole else FILLER

    def need(self, state: Place) -> int:
        interval, taken, after, header = state
        if header >= 0:
            return len(self.header) - header + self._from[-1]
        if self.is_end(state):
            return 0
        missing = self.sizes[interval] - taken
        begun = 1 if not missing else -1
        return missing + 2 - after * begun + self._from[self.intervals - interval - 1]

    def bound(self, state: Place) -> int:
        return (len(self.header) if state.header >= 0 else 0) + self._from[self.intervals - state.interval] + 1
