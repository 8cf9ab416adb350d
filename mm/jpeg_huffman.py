"""Huffman tables in which every symbol of a JPEG file fills whole bytes, and files rewritten with them, without loss.

A JPEG file brings its own tables, and a decoder follows whichever they are. In the *aligned* ones a code of a symbol with s bits
of value has 8 − s bits, or 16 − s: code and value fill one byte, or two. Each byte of a file then says one thing: a first
coefficient, or a run of zeros and the coefficient after it, or the end of a block; there are no bits left to carry over, and none
to fill up before a marker. With the usual tables the same byte means something else at each of eight places. Files get longer
(the shortest code has 8 bits instead of 2); what they show stays the same in every decoder, for no coefficient changes.
"""

from __future__ import annotations

from collections.abc import Iterator

from mm.jpeg_tables import EOI, MARKER, SOI, Frame, Huffman, Tables, packed, segment, segments

LONGEST = 16
"""Bits of a code, at the most."""


def aligned(blob: bytes) -> bytes:
    """Tables with the same steps, and codes that fill bytes, for all values that steps of this size leave. `blob` are the usual
    tables. Symbols with small values get one byte, as far as there are bytes, those first that take few bits in the usual
    tables; the others two. Raises `ValueError` as `Tables.read`."""
    tables = Tables.read(blob)
    out = bytearray(SOI)
    steps: dict[int, bytes] = {}
    for code, data in segments(blob[2:-2]):
        if code == 0xDB:
            out += segment(code, data)
            steps |= {data[at]: data[at + 1 : at + 65] for at in range(0, len(data), 65)}
    for kind in (0, 1):
        # a coefficient has up to 1024 before it is divided; what is coded of the first is a difference of two
        first, other = ((1024 + step // 2) // step for step in (steps[kind][0], min(steps[kind][1:])))
        out += segment(0xC4, bytes([kind]) + _table(tables.dc[kind], (2 * first).bit_length()))
        out += segment(0xC4, bytes([0x10 + kind]) + _table(tables.ac[kind], other.bit_length()))
    return bytes(out + EOI)


def _table(usual: Huffman, largest: int) -> bytes:
    """Numbers of codes of each length, and their symbols, of those of the usual table whose values have up to so many bits."""
    bits = {s: len(usual.path(s)) + (s & 15) for s in usual.symbols if s & 15 <= largest}
    # in strings of 16 bits, of which each symbol takes those that begin with it; those with eight ones stay free
    left = (1 << 16) - (1 << 8) - sum(_strings(s, _two(s)) for s in bits)
    lengths = {s: _two(s) for s in bits}
    for symbol in sorted(bits, key=lambda s: (s & 15, bits[s], s)):
        one = 8 - (symbol & 15)
        more = _strings(symbol, one) - _strings(symbol, lengths[symbol])
        if one > 0 and more <= left:
            lengths[symbol], left = one, left - more
    ordered = sorted(lengths, key=lambda s: (lengths[s], bits[s], s))
    counts = [sum(length == n for length in lengths.values()) for n in range(1, LONGEST + 1)]
    return bytes(counts) + bytes(ordered)


def _two(symbol: int) -> int:
    """Length of a code that fills two bytes with its value."""
    return LONGEST - (symbol & 15)


def _strings(symbol: int, length: int) -> int:
    return 1 << (16 - length)


class Recoder:
    """Rewrites files from some codes to others.

    Args:
        frame: of the files, which have no tables.
        source, target: the tables that they have, and that they get.
    """

    def __init__(self, frame: Frame, source: Tables, target: Tables) -> None:
        kinds = [min(part, 1) for part in frame.components]
        self.header = frame.header()
        rows, columns = frame.grid
        self.total = rows * columns
        self.interval = min(frame.restart, self.total) or self.total
        readers = [(_windows(source.dc[kind]), _windows(source.ac[kind])) for kind in (0, 1)]
        writers = [(_codes(target.dc[kind]), _codes(target.ac[kind])) for kind in (0, 1)]
        self.blocks = [(*readers[kind], *writers[kind]) for kind in kinds]

    def __call__(self, data: bytes) -> bytes:
        """A file that `mm.jpeg.encode` wrote, with the other codes."""
        body = data[len(self.header) :]
        out, begin, left = bytearray(self.header), 0, self.total
        for found in MARKER.finditer(body):
            count = min(self.interval, left)
            out += packed("".join(self._interval(body[begin : found.start()], count))) + found[0]
            begin, left = found.end(), left - count
        return bytes(out)

    def _interval(self, part: bytes, count: int) -> Iterator[str]:
        """Bits of the codes of so many MCUs."""
        part = part.replace(b"\xff\x00", b"\xff") + b"\xff\xff"  # so that a window can be read at the end, too
        bits, end, at = int.from_bytes(part, "big"), 8 * len(part), 0
        for _ in range(count):
            for first, other, to_first, to_other in self.blocks:
                k = 0
                while k < 64:
                    symbol, size = (other if k else first)[bits >> (end - at - 16) & 0xFFFF]
                    assert size, "what was just written can be read"
                    at += size
                    yield (to_other if k else to_first)[symbol]
                    if value := symbol & 15:
                        yield f"{bits >> (end - at - value) & ((1 << value) - 1):0{value}b}"
                        at += value
                    if k and not symbol:
                        break
                    k += (symbol >> 4) + 1 if k else 1


def _codes(code: Huffman) -> dict[int, str]:
    return {symbol: "".join(str(bit) for _, bit in code.path(symbol)) for symbol in code.symbols}


def _windows(code: Huffman) -> list[tuple[int, int]]:
    """Of each 16 bits, the symbol whose code they begin with, and its length; lengths of 0: none."""
    out = [(0, 0)] * (1 << LONGEST)
    for symbol, bits in _codes(code).items():
        count = 1 << (LONGEST - len(bits))
        first = int(bits, 2) * count
        out[first : first + count] = [(symbol, len(bits))] * count
    return out
