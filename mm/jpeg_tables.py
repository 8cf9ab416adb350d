"""The parts of a baseline JPEG file (ITU-T T.81) that are the same for every picture of one kind: the header, which says size and
sampling, and the tables, which say how coefficients were rounded (DQT) and what codes stand for them (DHT).

Tables may come from a stranger's file: they are held to what a baseline file of three components needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
RST = 0xD0
"""Second byte of the restart marker 0; there are 8, in turn."""
MARKERS = tuple(bytes([0xFF, second]) for second in range(RST, RST + 10))
"""Markers that may stand among the codes or around them: RST0 to RST7, SOI, EOI."""
MARKER = re.compile(rb"(?<!\xff)\xff+([^\x00\xff])")
"""Any marker as it stands among codes, perhaps behind more FF; looked for where a row of FF begins, or long ones would take time
to the square."""
SAMPLING = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}
"""Blocks of luminance, across and down, for one of each colour."""
MAX_SIDE = 1024
MAX_TABLES = 2048
"""Bytes of the tables; those of Pillow are 574."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Which baseline files are meant. An MCU is the smallest part that is coded as a whole: a few blocks of luminance, and one of
    each colour."""

    size: tuple[int, int]
    """Height and width in pixels."""
    subsampling: str = "4:2:0"
    restart: int = 1
    """MCUs between two restart markers; 0: there are none."""

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(1 <= side <= MAX_SIDE for side in self.size):
            raise ValueError(f"size is height and width, each 1 to {MAX_SIDE} pixels, got {self.size}")
        check_subsampling(self.subsampling)
        if not 0 <= self.restart <= 0xFFFF:
            raise ValueError(f"restart is a number of MCUs from 0 (no markers) to 65,535, got {self.restart}")

    @property
    def mcu(self) -> tuple[int, int]:
        """Height and width of an MCU in pixels."""
        across, down = SAMPLING[self.subsampling]
        return 8 * down, 8 * across

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of MCUs; the last may reach beyond the picture."""
        rows, columns = (-(-side // step) for side, step in zip(self.size, self.mcu, strict=True))
        return rows, columns

    @property
    def components(self) -> tuple[int, ...]:
        """Component (0 luminance, 1 and 2 colour) of each block of an MCU."""
        across, down = SAMPLING[self.subsampling]
        return (*[0] * (across * down), 1, 2)

    def header(self) -> bytes:
        """All that comes before the codes in a file without tables: SOI, APP0, SOF0, DRI, SOS, as libjpeg writes them."""
        (height, width), (across, down) = self.size, SAMPLING[self.subsampling]
        app0 = b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
        sof0 = b"\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big") + b"\x03"
        sof0 += bytes([1, 16 * across + down, 0, 2, 0x11, 1, 3, 0x11, 1])
        sos = b"\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00"
        parts = [(0xE0, app0), (0xC0, sof0), (0xDD, self.restart.to_bytes(2, "big")), (0xDA, sos)]
        return SOI + b"".join(segment(code, data) for code, data in parts if code != 0xDD or self.restart)


def check_subsampling(value: Any) -> None:
    """Raises `ValueError` for what is no key of `SAMPLING`."""
    if not isinstance(value, str) or value not in SAMPLING:
        raise ValueError(f"subsampling must be one of {', '.join(SAMPLING)}, got {value!r:.20}")


def segment(code: int, data: bytes) -> bytes:
    """A marker, the length of what follows, and that."""
    return bytes([0xFF, code]) + (len(data) + 2).to_bytes(2, "big") + data


def packed(bits: str) -> bytes:
    """Bits of codes as bytes: ones fill the last, and each byte of ones is followed by 00."""
    bits += "1" * (-len(bits) % 8)
    return int(bits or "0", 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")


class Huffman:
    """A Huffman code as a tree: `children[node]` are what bits 0 and 1 lead to, a node (≥ 0), a symbol s as −2 − s, or nothing
    (−1). Node 0 is the root.

    Args:
        counts: how many codes of each length, 1 to 16, there are.
        symbols: what they stand for, shortest first.

    Raises:
        ValueError: more codes than there is room for, the code of ones alone (no file may use it), or a symbol twice.
    """

    def __init__(self, counts: Sequence[int], symbols: Sequence[int]) -> None:
        if len(set(symbols)) != len(symbols) or sum(counts) != len(symbols) or not symbols:
            raise ValueError("a Huffman table has a symbol twice, or another number of symbols than it says")
        self.children: list[list[int]] = [[-1, -1]]
        code, following = 0, iter(symbols)
        for length, count in enumerate(counts, 1):
            for _ in range(count):
                if code >= (1 << length) - 1:
                    raise ValueError("a Huffman table has more codes than there is room for")
                self._add(code, length, next(following))
                code += 1
            code <<= 1
        self.symbols = frozenset(symbols)

    def _add(self, code: int, length: int, symbol: int) -> None:
        node = 0
        for place in range(length - 1, 0, -1):
            bit = code >> place & 1
            if self.children[node][bit] < 0:
                self.children.append([-1, -1])
                self.children[node][bit] = len(self.children) - 1
            node = self.children[node][bit]
        self.children[node][code & 1] = -2 - symbol

    def path(self, symbol: int) -> list[tuple[int, int]]:
        """The nodes and bits that lead to a symbol."""
        parent = {child: (node, bit) for node, pair in enumerate(self.children) for bit, child in enumerate(pair)}
        at, out = -2 - symbol, []
        while at != 0:
            at, bit = parent[at]
            out.append((at, bit))
        return out[::-1]

    def below(self, node: int) -> Iterator[int]:
        """Symbols that can still be reached."""
        for child in self.children[node]:
            if child >= 0:
                yield from self.below(child)
            elif child < -1:
                yield -2 - child


@dataclass(frozen=True)
class Tables:
    """What a table blob holds: two Huffman codes each for first (DC) and other (AC) coefficients, and the steps by which first
    coefficients were divided; of luminance and colour."""

    dc: tuple[Huffman, Huffman]
    ac: tuple[Huffman, Huffman]
    steps: tuple[int, int]

    @classmethod
    def read(cls, blob: bytes) -> Tables:
        """Of a file of tables alone (Pillow's `streamtype=1`): SOI, DQT, DHT, EOI. Raises `ValueError` for any other."""
        if len(blob) > MAX_TABLES or not blob.startswith(SOI) or not blob.endswith(EOI):
            raise ValueError(
                f"the tables are no JPEG file of tables of up to {MAX_TABLES:,} bytes; restore the saved ones"
            )
        steps: dict[int, int] = {}
        codes: dict[int, Huffman] = {}
        for code, data in segments(blob[2:-2]):
            while data:
                if code == 0xDB and data[0] in (0, 1) and len(data) >= 65 and 0 not in data[1:65]:
                    steps[data[0]], data = data[1], data[65:]
                elif code == 0xC4 and data[0] in (0, 1, 0x10, 0x11) and len(data) >= 17 + sum(data[1:17]) > 17:
                    end = 17 + sum(data[1:17])
                    codes[data[0]], data = _checked(data[0] >= 0x10, Huffman(data[1:17], data[17:end])), data[end:]
                else:
                    raise ValueError(
                        "the tables hold more than a baseline JPEG file needs, or are damaged; restore them"
                    )
        if len(steps) != 2 or len(codes) != 4:
            raise ValueError(
                f"expected 2 tables of steps and 4 of codes, got {len(steps)} and {len(codes)}; restore them"
            )
        return cls((codes[0], codes[1]), (codes[0x10], codes[0x11]), (steps[0], steps[1]))


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Second bytes of markers, and what follows them. Raises `ValueError` for what isn't made of segments."""
    while data:
        size = int.from_bytes(data[2:4], "big") + 2
        if data[0] != 0xFF or not 4 <= size <= len(data):
            raise ValueError("the tables are damaged; restore the saved ones")
        yield data[1], data[4:size]
        data = data[size:]


def _checked(ac: bool, code: Huffman) -> Huffman:
    """Raises `ValueError` for a code in which a picture of nothing couldn't be written, or whose symbols are not baseline."""
    fine = 0 in code.symbols and (
        all(s in (0, 0xF0) or 1 <= s & 15 <= 10 for s in code.symbols) if ac else max(code.symbols) <= 11
    )
    if not fine:
        raise ValueError("a Huffman table has symbols that no baseline JPEG file has; restore the saved tables")
    return code
