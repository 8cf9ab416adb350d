"""JPEG files as JPEG-LM writes them (Han et al. 2024, arXiv 2408.08459, section 3), and any bytes back into a picture.

A file is *abbreviated*: it lacks the tables, which are the same for every picture of one quality and are put back before it is
decoded (`splice`). Reading is total: a file is taken as it is where the strict automaton (`mm.jpeg_machine`) accepts it to the
last bit; else what can be read of it is copied into a file that it accepts, so that Pillow never sees a damaged one, and none of
its process-wide switches is touched.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mm.jpeg_codes import Bits
from mm.jpeg_machine import JpegMachine
from mm.jpeg_tables import EOI, MARKER, RST, Frame, Tables, check_subsampling, packed

if TYPE_CHECKING:  # Pillow is imported where it is used, so that `import mm` stays fast
    from PIL import Image

GREY = (128, 128, 128)
"""What stands where nothing could be read."""
MAX_AHEAD = 3
"""Restart intervals that may be missing between two that are there; a number further ahead is taken for a wrong one."""
Status = Literal["strict", "repaired", "partial", "invalid"]

# --- writing --------------------------------------------------------------------------------------------------------


def encode(image: Image.Image, frame: Frame, quality: int = 25) -> bytes:
    """The abbreviated file of an RGB picture of the frame's size. Nothing but its pixels goes in.

    Raises:
        ValueError: another size, or a Pillow that writes another header.
    """
    if image.size != frame.size[::-1]:
        raise ValueError(f"got a picture of {image.size} pixels, expected {frame.size[::-1]}; scale it")
    data = _save(image, quality, frame.subsampling, 2, frame.restart)
    if not data.startswith(frame.header()):
        raise ValueError("this version of Pillow writes another JPEG header than expected; install Pillow 11 or 12")
    return data


def tables(quality: int = 25, subsampling: str = "4:2:0") -> bytes:
    """The tables that belong to files of this quality: a file of nothing else."""
    from PIL import Image

    return _save(Image.new("RGB", (8, 8)), quality, subsampling, 1, 0)


def _save(image: Image.Image, quality: int, subsampling: str, streamtype: int, restart: int) -> bytes:
    import numpy as np
    from PIL import Image

    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 95:
        raise ValueError(f"quality is a whole number from 1 to 95, got {quality!r:.20}")
    check_subsampling(subsampling)
    file = io.BytesIO()
    # through an array: Pillow copies the comment of the file that a picture was read from
    plain = Image.fromarray(np.asarray(image.convert("RGB")))
    markers = {"restart_marker_blocks": restart} if restart else {}
    plain.save(file, format="JPEG", quality=quality, subsampling=subsampling, streamtype=streamtype, **markers)
    return file.getvalue()


def splice(data: bytes, blob: bytes) -> bytes:
    """An abbreviated file with its tables: what any viewer opens."""
    return data[:2] + blob[2:-2] + data[2:]


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Read:
    """What was read."""

    picture: Image.Image
    """RGB, of the frame's size; grey where nothing could be read."""
    status: Status
    """`strict`: to the last bit; `repaired`: every pixel was there; `partial`: some were; `invalid`: none."""
    reason: str
    """Empty for `strict`."""
    data: bytes
    """A file that is strict: the one given, or what was made of it."""


class Reader:
    """Reads abbreviated files of one kind.

    Args:
        frame: size, sampling, restart interval: what every picture has, whatever a file says.
        blob: the tables.

    Raises:
        ValueError: tables that are damaged, or not those of a baseline file.
    """

    def __init__(self, frame: Frame, blob: bytes) -> None:
        self.frame, self.blob, self.header = frame, blob, frame.header()
        self.machine = JpegMachine(frame, Tables.read(blob), self.header)

    def read(self, data: bytes) -> Read:
        """A picture of any bytes, in time and memory proportional to their number and the frame's size."""
        state, count = self.machine.run(data)
        if self.machine.is_end(state) and count == len(data):
            return Read(picture=self.pixels(data), status="strict", reason="", data=data)
        if self.machine.is_end(state):
            reason = f"{len(data) - count} bytes follow the end of the file"
        elif count == len(data):
            reason = "the file ends early"
        else:
            reason = f"byte {count} of {len(data)} can't stand there"
        data, good, shown = self.repaired(data)
        if all(good):
            return Read(picture=self.pixels(data), status="repaired", reason=reason, data=data)
        if not any(shown):
            grey = self._grey(self.frame.size[::-1])
            return Read(picture=grey, status="invalid", reason=f"{reason}; no part of it could be read", data=data)
        picture = self.pixels(data)
        (height, width), columns = self.frame.mcu, self.frame.grid[1]
        for number, fine in enumerate(shown):
            if not fine:
                row, column = divmod(number, columns)
                picture.paste(self._grey((width, height)), (column * width, row * height))
        reason = f"{reason}; {sum(good)} of {len(good)} parts could be read"
        return Read(picture=picture, status="partial", reason=reason, data=data)

    def pixels(self, data: bytes) -> Image.Image:
        """The picture of a file that is strict."""
        from PIL import Image

        with Image.open(io.BytesIO(splice(data, self.blob)), formats=["JPEG"]) as image:
            picture = Image.new("RGB", image.size)  # a copy, which holds nothing of the file but its pixels
            picture.paste(image)
            return picture

    @staticmethod
    def _grey(size: tuple[int, int]) -> Image.Image:
        from PIL import Image

        return Image.new("RGB", size, GREY)

    # ---- what can be read of a damaged file --------------------------------------------------------------------------

    def repaired(self, data: bytes) -> tuple[bytes, list[bool], list[bool]]:
        """A strict file of all whole blocks that can be read, which MCUs are whole, and which are in part at least; blocks that
        are missing are like the one before. With restart markers an interval is found by its number; what lies behind a damage
        is then not lost."""
        machine, empty, good, shown = self.machine, self.machine.way.empty, list[bool](), list[bool]()
        out = bytearray(self.header)
        for left, part in self._intervals(self._body(data)).items():
            after, beyond = machine.after(left)
            bits, count = self._blocks(part, left)
            whole, begun = divmod(count, len(empty))
            good += [n < whole for n in range(after + 1)]
            shown += [n < whole + (begun > 0) for n in range(after + 1)]
            for number in range(count, (after + 1) * len(empty)):
                bits += empty[number % len(empty)]
            out += packed("".join(map(str, bits)))
            out += bytes([0xFF, machine.number(beyond)])
        return bytes(out), good, shown

    def _body(self, data: bytes) -> bytes:
        """What comes after the header, or after what stands in its place."""
        if data.startswith(self.header):
            return data[len(self.header) :]
        scan = self.header[-14:]
        found = data.find(scan, 0, 4 * len(self.header))
        return data[found + len(scan) :] if found >= 0 else data[len(self.header) :]

    def _intervals(self, body: bytes) -> dict[int, bytes]:
        """The bytes between markers by the number of MCUs that are left where they begin: those of all intervals."""
        size, total = self.machine.interval, self.machine.total
        parts: dict[int, bytes] = {}
        number, begin, count = 0, 0, -(-total // size)
        for found in MARKER.finditer(body):
            parts.setdefault(number, body[begin : found.start()])
            begin, kind = found.end(), found[1][0]
            if kind == EOI[1] or number + 1 == count:
                break
            if RST <= kind < RST + 8:
                ahead = (kind - RST - number) % 8
                number += 1 + (ahead if ahead <= MAX_AHEAD and number + 1 + ahead < count else 0)
        else:
            parts.setdefault(number, body[begin:])
        return {total - n * size: parts.get(n, b"") for n in range(count)}

    def _blocks(self, part: bytes, left: int) -> tuple[list[int], int]:
        """Bits of the whole blocks at the beginning of an interval, and how many there are."""
        machine, inner, count, kept = self.machine, Bits(left), 0, 0
        bits: list[int] = []
        for byte in part.replace(b"\xff\x00", b"\xff"):
            for place in range(7, -1, -1):
                following = machine.bit(inner, byte >> place & 1)
                if following is None:
                    return bits[:kept], count
                bits.append(byte >> place & 1)
                if isinstance(following, int):
                    return bits, count + 1
                if (following.left, following.block) != (inner.left, inner.block):
                    count, kept = count + 1, len(bits)
                inner = following
        return bits[:kept], count
