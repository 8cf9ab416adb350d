"""What is the same in every H.264 stream of one kind (ITU-T H.264, Annex B): the parameter sets, and how each slice begins.

Streams are those of AVC-LM (Han et al. 2024, arXiv 2408.08459, section 3.2): baseline, one key frame and then predicted ones,
one slice for each macroblock of 16×16 pixels. All that is not known beforehand is then what a macroblock looks like: the bits
with which a slice begins say only its place, and are written here (`Headers.bits`).

Parameter sets may come from a stranger's file: they are held to what such streams need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CODE, LONG = b"\x00\x00\x01", b"\x00\x00\x00\x01"
"""Start codes: of a slice, and of the first slice of a frame."""
IDR, INTER, SPS, PPS, END = 0x65, 0x41, 0x67, 0x68, 0x0B
"""First bytes of units: a slice of the key frame, of another one, the two parameter sets, the end of the stream."""
BLOCK = 16
MAX_SIDE, MAX_FRAMES, MAX_SLICES = 512, 256, 1 << 14
UNFILTERED = 15
"""Coarsest step at which there is no filter between blocks."""
MAX_HEADER = 256
"""Bytes of both parameter sets; those of x264 are about 40."""


class Bits:
    """Reads a unit's bits. Raises `ValueError` behind the last."""

    def __init__(self, unit: bytes) -> None:
        self.text = "".join(f"{byte:08b}" for byte in plain(unit))
        self.at = 0

    def u(self, count: int) -> int:
        self.at += count
        if self.at > len(self.text):
            raise ValueError("it ends early")
        return int(self.text[self.at - count : self.at] or "0", 2)

    def ue(self) -> int:
        """Exp-Golomb, up to 32 bits."""
        zeros = 0
        while not self.u(1):
            zeros += 1
            if zeros > 15:
                raise ValueError("it has a number that is too large")
        return (1 << zeros) - 1 + self.u(zeros)

    def se(self) -> int:
        value = self.ue()
        return (value + 1) // 2 if value % 2 else -value // 2


def ue(value: int) -> str:
    text = f"{value + 1:b}"
    return "0" * (len(text) - 1) + text


def se(value: int) -> str:
    return ue(2 * value - 1 if value > 0 else -2 * value)


def plain(unit: bytes) -> bytes:
    """Without the 03 that stand between two bytes of zeros and a byte of up to 3."""
    out, zeros = bytearray(), 0
    for byte in unit:
        if zeros >= 2 and byte == 3:
            zeros = 0
            continue
        out.append(byte)
        zeros = 0 if byte else zeros + 1
    return bytes(out)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size and number of frames."""

    size: tuple[int, int]
    """Height and width in pixels, both even."""
    frames: int

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(BLOCK <= side <= MAX_SIDE and side % 2 == 0 for side in self.size):
            raise ValueError(
                f"size is height and width, each an even number of pixels from {BLOCK} to {MAX_SIDE}, got {self.size}"
            )
        if not 1 <= self.frames <= MAX_FRAMES or self.slices > MAX_SLICES:
            raise ValueError(
                f"a clip has 1 to {MAX_FRAMES} frames and up to {MAX_SLICES:,} blocks of 16×16 pixels, got {self.frames} frames "
                f"of {self.size}; make it shorter or smaller"
            )

    @property
    def blocks(self) -> int:
        """Macroblocks, and slices, of a frame."""
        rows, columns = self.grid
        return rows * columns

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of macroblocks; the last may reach beyond the frame."""
        return -(-self.size[0] // BLOCK), -(-self.size[1] // BLOCK)

    @property
    def slices(self) -> int:
        return self.blocks * self.frames


@dataclass(frozen=True)
class Headers:
    """What is known of all streams of one kind."""

    shape: Shape
    sets: bytes
    """Both parameter sets with their start codes."""
    number_bits: int
    """Of the number of a frame, which counts from the key frame on."""
    references: int
    """Frames that one may be predicted from, of those before it."""
    steps: tuple[int, int]
    """Of quantisation: of the key frame, and of others."""
    start: int
    """The one that the parameter sets say."""

    @classmethod
    def read(cls, sets: bytes, shape: Shape, qp: int) -> Headers:
        """Of parameter sets as x264 writes them; `qp` is what it is told. Raises `ValueError` for any others."""
        try:
            if len(sets) > MAX_HEADER or not sets.startswith(LONG) or sets.count(CODE) != 2 or sets.count(LONG) != 2:
                raise ValueError(f"they are not two units of up to {MAX_HEADER} bytes")
            first, second = sets[len(LONG) :].split(LONG)
            number_bits, references = _sequence(first, shape)
            active, start = _picture(second)
        except ValueError as error:
            raise ValueError(
                f"these are no parameter sets of such an H.264 stream: {error}; restore the saved ones, or install the "
                "version of av that is named beside them"
            ) from error
        if not 1 <= active <= references:
            raise ValueError(
                f"the parameter sets name {active} of {references} reference frames; restore the saved ones"
            )
        return cls(shape, sets, number_bits, active, (key_qp(qp), qp), start)

    def place(self, number: int) -> tuple[int, int]:
        """Frame and macroblock of a slice."""
        return divmod(number, self.shape.blocks)

    def bits(self, number: int) -> str:
        """All bits of a slice before its macroblock, behind the first byte."""
        frame, block = self.place(number)
        key = frame == 0
        counted = f"{frame % (1 << self.number_bits):0{self.number_bits}b}"
        out = ue(block) + ue(7 if key else 5) + ue(0) + counted
        if key:
            out += ue(0) + "00"  # the number of the key frame; nothing of before is shown or kept
        else:
            known = min(frame, self.references)
            out += "1" + ue(known - 1) if known < self.references else "0"
            out += "00"  # frames before are taken in their order, and forgotten in it
        # the filter between blocks, as it is; where steps are so fine that it would do nothing, x264 says that there is none
        return (
            out
            + se(self.steps[not key] - self.start)
            + (ue(0) + se(0) + se(0) if self.steps[not key] > UNFILTERED else ue(1))
        )

    def begin(self, number: int) -> tuple[bytes, str]:
        """How a slice begins: whole bytes from the start code on, and the bits of the byte after them that are known."""
        frame, block = self.place(number)
        bits = self.bits(number)
        whole = len(bits) // 8
        data = bytes([IDR if frame == 0 else INTER]) + int("0" + bits[: 8 * whole], 2).to_bytes(whole, "big")
        assert b"\x00\x00" not in data and data[-1], "nothing in it has to be escaped"
        return (LONG if block == 0 else CODE) + data, bits[8 * whole :]

    def empty(self, number: int) -> bytes:
        """What follows `begin` in a slice that shows nothing new: grey, in the key frame; else what was there before."""
        # a block like its neighbours' mean, of which there are none, with a residue of nothing; or one that is skipped
        bits = self.begin(number)[1] + ("00100" + "1" + "1" + "1" if number < self.shape.blocks else ue(1)) + "1"
        bits += "0" * (-len(bits) % 8)
        data = int(bits, 2).to_bytes(len(bits) // 8, "big")
        assert all(data), "nothing in it has to be escaped"
        return data


def key_qp(qp: int) -> int:
    """Of the key frame, as x264 finds it: finer by a factor of 1.4, where 6 double the step."""
    return min(max(int(qp - 6 * math.log2(1.4) + 0.5), 0), 51)


def _sequence(unit: bytes, shape: Shape) -> tuple[int, int]:
    """Bits of a frame's number, and frames that are kept. Raises `ValueError`."""
    bits = Bits(unit)
    if (bits.u(8), bits.u(8)) != (SPS, 66):
        raise ValueError("the first is not of the baseline profile")
    bits.u(16)
    bits.ue()
    number_bits = bits.ue() + 4
    order, kept, gaps = bits.ue(), bits.ue(), bits.u(1)
    columns, rows, whole = bits.ue() + 1, bits.ue() + 1, bits.u(1)
    bits.u(1)
    cut = [bits.ue() for _ in range(4)] if bits.u(1) else [0] * 4
    if order != 2 or gaps or not whole or not 1 <= kept <= 16 or number_bits > 16:
        raise ValueError("the first says another order of frames")
    size = (BLOCK * rows - 2 * (cut[2] + cut[3]), BLOCK * columns - 2 * (cut[0] + cut[1]))
    if size != tuple(shape.size) or (rows, columns) != shape.grid or cut[0] or cut[2]:
        raise ValueError(f"they are of frames of {size[0]}×{size[1]}, expected {shape.size[0]}×{shape.size[1]}")
    return number_bits, kept


def _picture(unit: bytes) -> tuple[int, int]:
    """Reference frames, and the step of quantisation. Raises `ValueError`."""
    bits = Bits(unit)
    if bits.u(8) != PPS or bits.ue() or bits.ue() or bits.u(2) or bits.ue():
        raise ValueError("the second has more than a baseline stream needs")
    active = bits.ue() + 1
    bits.ue()
    weighted = bits.u(3)
    start = 26 + bits.se()
    bits.se()
    bits.se()
    if weighted or not 0 <= start <= 51 or bits.u(3) != 0b100:
        raise ValueError("the second says another form of slices")
    return active, start
