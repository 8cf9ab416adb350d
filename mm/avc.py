"""H.264 streams as AVC-LM writes them (Han et al. 2024, arXiv 2408.08459, section 3.2), and any bytes back into a clip.

What is written and read here lacks the parameter sets, which are the same for every clip of one kind, and the units in which x264
tells its version; start codes are those of Annex B, and a unit that ends the stream comes last. Reading is total: what the
automaton (`mm.avc_machine`) doesn't accept is made into a stream that it accepts, with empty slices in the place of those that
are missing, so that FFmpeg never sees but slices of the right number, place and size of frame.

FFmpeg comes with the package `av` (`pip install 'mm[video]'`), imported where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from mm.avc_headers import CODE, IDR, INTER, LONG, PPS, SPS, Bits, Headers, Shape
from mm.avc_machine import CLOSE, AvcMachine, Place
from mm.byte_clips import ReadClip
from mm.video_encoding import Frames
from mm.video_files import require_av

GREY = 128
"""What stands where nothing could be read."""
MAX_AHEAD = 2
"""Frames by which a slice may be ahead of where it is expected."""
UNIT = re.compile(rb"\x00\x00\x01")
OPTIONS = {
    "bframes": 0, "slice-max-mbs": 1, "ref": 3, "mixed-refs": 0, "trellis": 0, "psy": 0, "fast-pskip": 0, "partitions": "none",
    "subme": 0, "weightp": 0, "cabac": 0, "8x8dct": 0, "scenecut": 0, "keyint": "infinite", "annexb": 1, "threads": 1,
    "repeat-headers": 1,
}  # fmt: skip
"""Of x264, as in the paper, and what the baseline profile means by itself; the key frame is the first."""

# --- writing --------------------------------------------------------------------------------------------------------


def ffmpeg() -> Any:
    """The package `av`. Raises `ValueError` where it isn't installed."""
    return require_av("H.264 streams are written and read by FFmpeg", "or use mm.tokenizers.mjpeg_bytes")


def encoded(frames: Frames, qp: int, fps: float) -> tuple[bytes, list[bytes]]:
    """The parameter sets of a clip (uint8 [T, H, W, 3]), with start codes, and its slices without."""
    av = ffmpeg()
    context = av.CodecContext.create("libx264", "w")
    context.height, context.width = frames.shape[1:3]
    context.pix_fmt, context.thread_count = "yuv420p", 1
    rate = Fraction(fps).limit_denominator(1000)
    context.framerate, context.time_base = rate, 1 / rate
    options = ":".join(f"{name}={value}" for name, value in {"qp": qp, **OPTIONS}.items())
    context.options = {"profile": "baseline", "x264-params": options}
    data = bytearray()
    for pixels in frames:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        for packet in context.encode(frame.reformat(format="yuv420p")):
            data += bytes(packet)
    for packet in context.encode(None):
        data += bytes(packet)
    units = [unit.rstrip(b"\x00") for unit in UNIT.split(bytes(data))[1:]]
    sets = b"".join(LONG + unit for unit in units if unit[0] in (SPS, PPS))
    return sets, [unit for unit in units if unit[0] in (IDR, INTER)]


def sets_of(shape: Shape, qp: int, fps: float) -> bytes:
    """The parameter sets of all clips of one kind."""
    return encoded(np.zeros((1, *shape.size, 3), np.uint8), qp, fps)[0]


def encode(frames: Frames, reader: Reader, qp: int, fps: float) -> bytes:
    """The stream of a clip without its parameter sets. Of fewer frames than the shape has, it is the beginning of one.

    Raises:
        ValueError: an x264 that writes other parameter sets, or other slices.
    """
    headers = reader.headers
    sets, slices = encoded(frames, qp, fps)
    out = bytearray()
    for number, unit in enumerate(slices):
        out += (CODE if number % headers.shape.blocks else LONG) + unit
    if len(frames) == headers.shape.frames:
        out += CLOSE
    _, count = reader.machine.run(bytes(out))
    if sets != headers.sets or count != len(out) or len(slices) != headers.shape.blocks * len(frames):
        raise ValueError(
            "this version of x264 writes another form of stream than that of the tokenizer; install the version of av that "
            "is named beside its saved parameter sets"
        )
    return bytes(out)


# --- reading --------------------------------------------------------------------------------------------------------


class Reader:
    """Reads streams of one kind. States of a stream: `strict`: FFmpeg decodes all of it, and every unit is in its place;
    `repaired`: as much, when what doesn't belong to it is left out; `partial`: some slices were there; `invalid`: none."""

    def __init__(self, headers: Headers) -> None:
        self.headers, self.machine = headers, AvcMachine(headers)

    def read(self, data: bytes) -> ReadClip:
        """A clip of any bytes, in memory proportional to their number and the clip's size, in time to their product."""
        state, count = self.machine.run(data)
        whole = self.machine.is_end(state)
        reason, status, found = "", "strict", self.headers.shape.slices
        if not whole or count < len(data):
            if whole:
                reason = f"{len(data) - count} bytes follow the end of the stream"
            elif count == len(data):
                reason = "the stream ends early"
            else:
                reason = f"byte {count} of {len(data)} can't stand there"
            data, found = self.repaired(data)
            status = "repaired" if found == self.headers.shape.slices else "partial"
            reason += f"; {found} of {self.headers.shape.slices} blocks could be found"
        if not found:
            frames = np.full((self.headers.shape.frames, *self.headers.shape.size, 3), GREY, np.uint8)
            return ReadClip(frames, "invalid", reason)
        pictures, problem = self._decoded(data, strict=True)
        if problem:
            pictures, _ = self._decoded(data, strict=False)
            status, reason = "partial", "; ".join(filter(None, (reason, problem)))
        return ReadClip(self._stacked(pictures), status, reason)

    def playable(self, data: bytes) -> bytes:
        """A stream with its parameter sets: what any player opens."""
        return self.headers.sets + data

    # ---- what can be read of a damaged stream ------------------------------------------------------------------------

    def repaired(self, data: bytes) -> tuple[bytes, int]:
        """A stream that the automaton accepts, of all slices that have a place in it, and how many these are. Where one is
        missing, the frame keeps what was there before."""
        found: dict[int, bytes] = {}
        expected = 0
        for unit in UNIT.split(data)[1:]:
            number = self._number(unit, expected)
            if number is not None and (body := self._body(unit, number)) is not None:
                found[number], expected = body, number + 1
        parts = [
            known + found.get(number, empty)
            for number, (known, empty) in enumerate(zip(self.machine.known[:-1], self.machine.empty, strict=True))
        ]
        return b"".join(parts) + CLOSE, len(found)

    def _number(self, unit: bytes, expected: int) -> int | None:
        """Which slice a unit holds, of those not far behind the expected one."""
        shape, bits = self.headers.shape, Bits(unit[1:16])
        try:
            block, _, _ = bits.ue(), bits.ue(), bits.ue()
            counted = bits.u(self.headers.number_bits)
        except ValueError:
            return None
        frame = expected // shape.blocks
        for ahead in range(frame, min(frame + MAX_AHEAD + 1, shape.frames)):
            number = ahead * shape.blocks + block
            if block < shape.blocks and number >= expected and ahead % (1 << self.headers.number_bits) == counted:
                return number
        return None

    def _body(self, unit: bytes, number: int) -> bytes | None:
        """The bytes of a slice behind what is known of it; None: they are not those of such a slice."""
        known = self.machine.known[number]
        begin = known[known.index(CODE) + len(CODE) :]
        body = unit.rstrip(b"\x00")[len(begin) :]
        if not unit.startswith(begin):
            return None
        state, count = self.machine.run(body, Place(number, len(known)))
        return body if count == len(body) and state.ends and not state.zeros else None

    # ---- FFmpeg ------------------------------------------------------------------------------------------------------

    def _decoded(self, data: bytes, strict: bool) -> tuple[dict[int, Frames], str]:
        """Frames by their numbers of a stream that the automaton accepts, and the first problem; without `strict` FFmpeg goes
        on behind one, and shows what it makes of it."""
        av = ffmpeg()
        context = av.CodecContext.create("h264", "r")
        context.extradata, context.thread_count = self.headers.sets, 1
        context.options = {"err_detect": "explode"} if strict else {"flags": "+output_corrupt"}
        out: dict[int, Frames] = {}
        problem = ""
        for number, packet in enumerate([*self._packets(data), None]):
            try:
                frames = context.decode(None if packet is None else _packet(av, packet, number))
            except (av.FFmpegError, MemoryError) as error:
                problem = problem or f"frame {number}: {str(error)[:80]}"
                if strict:
                    break
                continue
            for frame in frames:
                pixels = frame.to_ndarray(format="rgb24")
                if frame.pts is not None and pixels.shape == (*self.headers.shape.size, 3):
                    out.setdefault(frame.pts, pixels)
        if not problem and len(out) != self.headers.shape.frames:
            problem = f"{len(out)} of {self.headers.shape.frames} frames could be decoded"
        return out, problem

    def _packets(self, data: bytes) -> Iterator[bytes]:
        """The bytes of each frame."""
        for part in data[: -len(CLOSE)].split(LONG)[1:]:
            yield LONG + part

    def _stacked(self, pictures: dict[int, Frames]) -> Frames:
        """All frames; where one is missing, the one before stays."""
        shown = np.full((*self.headers.shape.size, 3), GREY, np.uint8)
        out = []
        for number in range(self.headers.shape.frames):
            shown = pictures.get(number, shown)
            out.append(shown)
        return np.stack(out)


def _packet(av: Any, data: bytes, number: int) -> Any:
    packet = av.Packet(data)
    packet.pts = packet.dts = number
    packet.time_base = Fraction(1, 25)
    return packet
