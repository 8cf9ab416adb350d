"""The shortest way that is quickly found from anywhere in the codes of a JPEG file to its end."""

from __future__ import annotations

from mm.jpeg_codes import LAST, Bits, Codes, Inner


class Closing:
    """The way from anywhere to the end of the picture: the value that has begun is written with as many zeros as may be, the
    block ends, and all further blocks are like the one before.

    A place within a byte is a pair (bits that came, whether all of them are ones: a byte of ones is followed by 00).
    """

    def __init__(self, codes: Codes) -> None:
        self.codes = codes
        self.zero = [tuple(code.path(0) for code in pair) for pair in codes.codes]
        """Of each block and for first and other coefficients, the nodes and bits of the code of symbol 0."""
        self.end = [[bit for _, bit in other] for _, other in self.zero]
        """Bits that end a block."""
        self.empty = [[bit for _, bit in first] + end for (first, _), end in zip(self.zero, self.end, strict=True)]
        """Bits of a block like the one before."""
        self.on_way = [tuple(dict(path) for path in pair) for pair in self.zero]
        self.begun: dict[tuple[int, ...], tuple[int, int]] = {}
        whole = [bit for block in self.empty for bit in block]
        moves = [_push(place >> 1, place & 1, whole) for place in range(16)]
        self.mcus = [[min(place >> 1, 1) * (1 + (place & 1)) for place in range(16)]]
        """[n][place]: bytes that n MCUs like the one before take, and the bits that fill the last."""
        for _ in range(codes.interval):
            self.mcus.append([count + self.mcus[-1][2 * at + ones] for at, ones, count in moves])

    def bit(self, s: Inner) -> int:
        """The next bit."""
        if isinstance(s, int):
            return 1
        if s.bits:
            return int(self.codes.bit(s, 0) is None)
        zero = self.on_way[s.block][s.k > 0].get(s.node)
        return self._choice(s)[1] if zero is None else zero

    def _choice(self, s: Bits) -> tuple[int, int]:
        """From a node of a tree from which symbol 0 can't be reached: least number of bits to the end of the block, and the
        first of them."""
        at = 0 if s.k else s.before[self.codes.part[s.block]]
        key = (s.block, s.k, s.node, at)
        if key not in self.begun:
            self.begun[key] = min((1 + self._cost(self.codes.bit(s, bit)), bit) for bit in (0, 1))
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
            inner = self.codes.bit(inner, bit)
            at, ones, more = _push(at, ones, [bit])
            count += more
            if isinstance(inner, Bits) and inner.k and not inner.node and not inner.bits:
                at, ones, more = _push(at, ones, self.end[block])
                count += more
                break
        for bits in self.empty[block + 1 :]:
            at, ones, more = _push(at, ones, bits)
            count += more
        after, left = self.codes.after(s.left)
        return count + self.mcus[after][2 * at + ones] + 2 + self.intervals(left)

    def intervals(self, left: int) -> int:
        """Bytes of so many MCUs after a marker, the markers behind them included."""
        size = self.codes.interval
        whole, rest = divmod(left, size)
        return whole * (self.mcus[size][1] + 2) + (self.mcus[rest][1] + 2 if rest else 0)

    def bound(self, left: int) -> int:
        """No less than `bytes` where so many MCUs are left, or fewer: a code has up to 16 bits, a value 11, an end 16; each byte
        may be followed by 00."""
        if not left:
            return 2
        after, beyond = self.codes.after(left)
        return max(self.mcus[after + 1]) + 14 + 2 + self.intervals(beyond)


def _push(at: int, ones: int, bits: list[int]) -> tuple[int, int, int]:
    """The place within a byte after some bits, and how many bytes became full, with the 00 that follow."""
    count = 0
    for bit in bits:
        at, ones = at + 1, ones & bit
        if at == 8:
            at, ones, count = 0, 1, count + 1 + ones
    return at, ones, count
