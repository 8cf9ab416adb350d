"""What an MP4 or WebM file says about itself, read before FFmpeg sees it.

FFmpeg makes room for as many samples as a table claims, some of which cost the file no bytes, and it opens every track. So
the boxes of an MP4 are walked first: tables must fit in their boxes, the samples of all pictures are counted, tracks of
other kinds are hidden, and a file whose boxes go on after its end is refused as truncated. Nothing is read but headers and
tables, and memory holds one table at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import numpy as np

CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
"""Boxes of boxes, as far as they matter."""
TABLES = {b"stts": 8, b"ctts": 8, b"stsc": 12, b"stco": 4, b"co64": 8, b"stss": 4, b"stps": 4}
"""Box → bytes of an entry of its table."""
MAX_BOXES = 1 << 16
MAX_TABLE = 1 << 24
"""Largest table that is read (16 MiB)."""
TRUNCATED = "is truncated: it ends before its last part does; fetch or make it again"


class Box(NamedTuple):
    kind: bytes
    start: int
    """Of the header."""
    body: int
    """Where the content begins."""
    end: int


class Hidden:
    """A file in which the names of some boxes read "free", which readers skip."""

    def __init__(self, file: IO[bytes], names: list[int]) -> None:
        self.file, self.names = file, names
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        place = self.file.tell()
        data = self.file.read(size)
        for name in self.names:
            begin, end = max(name, place), min(name + 4, place + len(data))
            if begin < end:
                data = data[: begin - place] + b"free"[begin - name : end - name] + data[end - place :]
        return data


class Wanted(NamedTuple):
    """The tracks that are read."""

    handler: bytes
    name: str
    samples: str
    """What its samples are called."""


PICTURES = Wanted(b"vide", "video", "frames")
SOUND = Wanted(b"soun", "sound", "packets")


def check_mp4(
    file: IO[bytes],
    name: str,
    max_samples: int,
    check_frame: Callable[[int, int], None] = lambda width, height: None,
    wanted: Wanted = PICTURES,
) -> Hidden:
    """The file as FFmpeg may see it: with its tracks of pictures (or of sound) alone. `check_frame` is called with the widths
    and heights of pictures.

    Raises:
        ValueError: damaged, truncated, without such a track, or one with more samples than `max_samples`.
    """
    length = file.seek(0, os.SEEK_END)
    boxes = _Walk(file, name, length, check_frame, wanted)
    try:
        boxes.walk(0, length, ())
    except (ValueError, IndexError, OverflowError) as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name} is damaged: its boxes don't fit into each other (mp4)") from error
    if not boxes.tracks:
        raise ValueError(f"{name} is damaged or not a {wanted.name}: it has no list of tracks (mp4)")
    if not boxes.seen:
        raise ValueError(f"{name} has no {wanted.name} track")
    if boxes.most > max_samples:
        raise ValueError(
            f"{name} has {boxes.most:,} {wanted.samples}, but at most {max_samples:,} are decoded; cut it into parts"
        )
    file.seek(0)
    return Hidden(file, boxes.others)


class _Walk:
    def __init__(
        self, file: IO[bytes], name: str, length: int, check_frame: Callable[[int, int], None], wanted: Wanted
    ) -> None:
        self.file, self.name, self.length, self.check_frame, self.wanted = file, name, length, check_frame, wanted
        self.boxes = self.tracks = self.seen = 0
        self.most = self.runs = 0
        """Most samples that a table of a wanted track claims, and those of fragments so far."""
        self.sizes = self.chunks = self.a_chunk = 0
        """Samples by the table of sizes, chunks, and most samples of a chunk, of the open track."""
        self.uncompressed = False
        """Every sample of the open track lasts 1: FFmpeg then takes 1,024 of a chunk for one."""
        self.others: list[int] = []
        """Where the names of tracks of other kinds stand."""

    def walk(self, start: int, end: int, path: tuple[bytes, ...]) -> None:
        for box in self._in(start, end, top=not path):
            if box.kind in (b"cmov", b"rmra"):
                raise ValueError(f"{self.name} has a compressed or referring header, which isn't read; save it anew")
            if box.kind == b"trak":
                self.tracks += 1
                if self._handler(box) != self.wanted.handler:
                    self.others.append(box.start + 4)
                    continue
                self.seen += 1
                self.sizes = self.chunks = self.a_chunk = 0
                self.uncompressed = False
            if box.kind in CONTAINERS:
                if len(path) > len(CONTAINERS):
                    raise ValueError("boxes are nested too deeply")
                self.walk(box.body, box.end, (*path, box.kind))
                if box.kind == b"trak":
                    packets = self.chunks * max(1, self.a_chunk // 1024)
                    self.most = max(self.most, packets if self.uncompressed else self.sizes)
            elif path:
                self._table(box)

    def _in(self, start: int, end: int, top: bool = False) -> Iterator[Box]:
        while start + 8 <= end:
            self.boxes += 1
            if self.boxes > MAX_BOXES:
                raise ValueError(f"{self.name} has more than {MAX_BOXES:,} boxes; convert it to a plain MP4")
            header = self._read(start, 16)
            size, kind, body = int.from_bytes(header[:4], "big"), header[4:8], start + 8
            if size == 1:
                size, body = int.from_bytes(header[8:16], "big"), start + 16
            elif size == 0:
                size = end - start
            if start + size < body:
                if top and not any(header):  # zeros at the end of a file
                    return
                raise ValueError("a box is smaller than its header")
            if start + size > end:
                raise ValueError(f"{self.name} {TRUNCATED} (mp4)") if top else ValueError("a box is cut off")
            yield Box(kind, start, body, start + size)
            start += size

    def _handler(self, track: Box) -> bytes:
        """What kind of track it is."""
        for media in self._in(track.body, track.end):
            if media.kind == b"mdia":
                for box in self._in(media.body, media.end):
                    if box.kind == b"hdlr":
                        return self._read(box.body + 8, 4)
        return b""

    def _table(self, box: Box) -> None:
        room = box.end - box.body
        if box.kind == b"stsd" and self.wanted is PICTURES:
            # of its first entry: 16 bytes of headers, 24 of other things, width and height
            sides = self._read(box.body + 40, 4) if room >= 44 else bytes(4)
            if all(width_height := (int.from_bytes(sides[:2], "big"), int.from_bytes(sides[2:], "big"))):
                self.check_frame(*width_height)
        elif box.kind == b"stsz":
            size, count = (int(n) for n in np.frombuffer(self._read(box.body + 4, 8), ">u4"))
            if not size and 12 + 4 * count > room:
                raise ValueError("a table is longer than its box")
            self.sizes = max(self.sizes, count)
        elif box.kind == b"stz2":
            self.sizes = max(self.sizes, int.from_bytes(self._read(box.body + 8, 4), "big"))
        elif box.kind == b"trun":
            self.runs += int.from_bytes(self._read(box.body + 4, 4), "big")
            self.most = max(self.most, self.runs)
        elif box.kind in TABLES:
            count = int.from_bytes(self._read(box.body + 4, 4), "big")
            if 8 + TABLES[box.kind] * count > room or room > MAX_TABLE:
                raise ValueError("a table is longer than its box, or than any that is read")
            if box.kind in (b"stts", b"ctts") and count:
                table = np.frombuffer(self._read(box.body + 8, 8 * count), ">u4")
                self.sizes = max(self.sizes, int(table[::2].sum(dtype=np.uint64)))
                if box.kind == b"stts" and self.wanted is SOUND:
                    self.uncompressed = count == 1 and int(table[1]) == 1
            elif box.kind == b"stsc" and count:
                self.a_chunk = int(np.frombuffer(self._read(box.body + 8, 12 * count), ">u4")[1::3].max())
            elif box.kind in (b"stco", b"co64"):
                self.chunks = max(self.chunks, count)

    def _read(self, place: int, size: int) -> bytes:
        self.file.seek(place)
        return self.file.read(size)


def check_webm(file: IO[bytes], name: str) -> None:
    """Raises `ValueError` where the file ends before its segment does, by the sizes of its first two elements."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = 0
    for wanted in (b"\x1aE\xdf\xa3", b"\x18S\x80g"):  # the header, the segment with all else
        file.seek(start)
        head = file.read(12)
        width = 9 - head[4].bit_length() if len(head) > 4 and head[4] else 0
        if head[:4] != wanted or not width or len(head) < 4 + width:
            raise ValueError(f"{name} is damaged or not a video (webm)")
        size = int.from_bytes(head[4 : 4 + width], "big") - (1 << 7 * width)
        start += 4 + width + size
        # all ones: it lasts until the file ends
        if start > length and size != (1 << 7 * width) - 1:
            raise ValueError(f"{name} {TRUNCATED} (webm)")
    file.seek(0)
