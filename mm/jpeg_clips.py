"""Clips as JPEG files one after another, without the header and the tables that all have (motion JPEG)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mm import jpeg
from mm.byte_automaton import ByteMachine
from mm.byte_clips import ReadClip
from mm.jpeg_tables import EOI
from mm.video_encoding import Frames


class Shot(NamedTuple):
    """Between two bytes."""

    frame: int
    """Frames that are whole."""
    inner: Any
    """Of the machine of one frame, in the next of them."""


class ClipMachine(ByteMachine[Shot]):
    """The automaton of so many files, one after another, each as `frame` has it, which has no header."""

    def __init__(self, frame: ByteMachine[Any], count: int) -> None:
        self.frame, self.count = frame, count
        self.whole = frame.need(frame.start)
        self.start = Shot(0, frame.start)

    def _after(self, state: Shot, inner: Hashable) -> Shot:
        return Shot(state.frame + 1, self.frame.start) if self.frame.is_end(inner) else Shot(state.frame, inner)

    def _rest(self, state: Shot) -> int:
        """Bytes of the frames after this one."""
        return (self.count - state.frame - 1) * self.whole

    def step(self, state: Shot, byte: int) -> Shot | None:
        inner = None if self.is_end(state) else self.frame.step(state.inner, byte)
        return None if inner is None else self._after(state, inner)

    def successors(self, state: Shot) -> dict[int, Shot]:
        if self.is_end(state):
            return {}
        return {byte: self._after(state, inner) for byte, inner in self.frame.successors(state.inner).items()}

    def allowed(self, state: Shot) -> int:
        return 0 if self.is_end(state) else self.frame.allowed(state.inner)

    def is_end(self, state: Shot) -> bool:
        return state.frame == self.count

    def closing(self, state: Shot) -> int:
        return self.frame.closing(state.inner)

    def need(self, state: Shot) -> int:
        return 0 if self.is_end(state) else self.frame.need(state.inner) + self._rest(state)

    def bound(self, state: Shot) -> int:
        if self.is_end(state):
            return 0
        here = self.frame.bound(state.inner) + self._rest(state)
        last = state.frame + 1 == self.count
        return here if last else max(here, self.frame.bound(self.frame.start) + self._rest(state) - self.whole)

    def key(self, state: Shot, reach: int) -> Hashable:
        """Of the frames that are left only those that such a string can come to."""
        if self.is_end(state):
            return "end"
        return self.frame.key(state.inner, reach), min(self.count - state.frame - 1, 1 + reach // self.whole)

    def reach(self, table: Sequence[bytes]) -> int:
        return self.frame.reach(table)


def written(frames: Frames, reader: jpeg.Reader, quality: int) -> bytes:
    """The files of frames (uint8 [T, H, W, 3]) without their headers. Raises `ValueError` as `mm.jpeg.encode`."""
    files = (jpeg.encode(Image.fromarray(np.ascontiguousarray(frame)), reader.frame, quality) for frame in frames)
    return b"".join(file[len(reader.header) :] for file in files)


def read(data: bytes, reader: jpeg.Reader, machine: ClipMachine) -> ReadClip:
    """A clip of any bytes, in time and memory proportional to their number and the clip's size. A file ends where the automaton
    says so, or with the end marker that comes next."""
    shown = np.full((*reader.frame.size, 3), jpeg.GREY, np.uint8)
    frames, found, problems = [], [], []
    for number in range(machine.count):
        if not data:
            problems.append(f"{machine.count - number} frames are missing")
            frames += [shown] * (machine.count - number)
            found.append("missing")
            break
        part, data = _split(data, machine)
        one = reader.read(reader.header + part)
        if one.status != "invalid":
            shown = np.asarray(one.picture)
        if one.reason:
            problems.append(f"frame {number}: {one.reason}")
        frames.append(shown)
        found.append(one.status)
    if data:
        problems.append(f"{len(data)} bytes follow the last frame")
    if not set(found) & {"strict", "repaired", "partial"}:
        status = "invalid"
    elif set(found) <= {"strict", "repaired"}:
        status = "repaired" if problems else "strict"
    else:
        status = "partial"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return ReadClip(np.stack(frames), status, f"{problems[0]}{more}" if problems else "")


def _split(data: bytes, machine: ClipMachine) -> tuple[bytes, bytes]:
    """The first file, and what follows it. Up to the first end marker there is one file at the most: the automaton doesn't go
    beyond one."""
    state, count = machine.frame.run(data)
    if not machine.frame.is_end(state):
        count = data.find(EOI) + len(EOI)
        if count < len(EOI):
            count = len(data)
    return data[:count], data[count:]
