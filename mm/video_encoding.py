"""Frames to video files: H.264 and VP9 through FFmpeg (`av`, of the extra `video`), animations through Pillow.

Letters in shapes: T frames, H rows, W columns.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from mm import safe_io
from mm.video_files import Frame, require_av

if TYPE_CHECKING:
    from PIL import Image

Frames = np.ndarray[Any, np.dtype[np.uint8]]
"""uint8 [T, H, W, 3]."""
FFMPEG = {
    ".mp4": (
        "libx264",
        {"crf": "17", "preset": "medium", "x264-params": "mbtree=0"},
        {"movflags": "+faststart", "fflags": "+bitexact"},
    ),
    ".webm": ("libvpx-vp9", {"crf": "24", "deadline": "good", "cpu-used": "4"}, {"fflags": "+bitexact"}),
}
"""Ending → FFmpeg's encoder, its options, and those of the file. The same frames give the same file: without `bitexact` a WebM
has a random number, and x264's mbtree writes frames of under 128 pixels otherwise each time."""
WRITTEN = (*FFMPEG, ".gif", ".apng", ".webp", ".png")
"""Endings that are known; .png is a contact sheet."""
MAX_SIDE = {".mp4": 8192, ".webm": 8192, ".webp": 16_383}
MAX_SCALE = 64
BT709 = 1
"""FFmpeg's number of the colours that browsers take for granted."""
COLOURS = 256
"""Of a GIF's frame."""


def write(path: str | os.PathLike[str], frames: Frames, fps: float, scale: int = 1) -> None:
    """As `mm.video.save_video`, which has checked the frames."""
    ending = os.path.splitext(os.fspath(path))[1].lower()
    if ending not in WRITTEN:
        raise ValueError(f"can't write {os.fspath(path)!r}: unknown ending {ending!r}; use one of {', '.join(WRITTEN)}")
    if not isinstance(scale, int | np.integer) or not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"scale must be a whole number from 1 to {MAX_SCALE}, got {scale!r:.60}")
    side, most = max(frames.shape[1:3]) * scale, MAX_SIDE.get(ending, 65_535)
    if side > most:
        raise ValueError(f"can't write {os.fspath(path)!r}: its frames have a side of {side:,}; at most {most:,} fit")
    if ending in FFMPEG:
        require_av(f"can't write {os.fspath(path)!r} without FFmpeg", "or write a .gif")
    with safe_io.atomic_file(path) as temporary:
        if ending in FFMPEG:
            _encode(temporary, frames, fps, scale, ending)
        elif ending == ".gif":
            with temporary.open("wb") as file:
                _write_gif(file, frames, fps, scale)
        elif ending == ".webp":
            temporary.write_bytes(to_webp(frames, fps, scale))
        elif ending == ".apng":
            _write_apng(temporary, frames, fps, scale)
        else:
            _sheet(frames, scale).save(temporary)


def to_webp(frames: Frames, fps: float, scale: int = 1) -> bytes:
    """As `mm.video.to_webp`. As many frames as are given (libwebp's own writer joins equal neighbours), without loss, and of
    each only the part that changes, at even places. The container: RFC 9649, section 2.7."""
    from PIL import Image

    def part(name: bytes, data: bytes) -> bytes:
        return name + len(data).to_bytes(4, "little") + data + bytes(len(data) % 2)

    height, width = (side * scale for side in frames.shape[1:3])
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = [part(b"VP8X", b"\x02\0\0\0" + size), part(b"ANIM", bytes(6))]  # an animation, endless
    durations = _durations(len(frames), fps, 0.001)
    for (corner, pixels), duration in zip(_changes(frames, scale, even=True), durations, strict=True):
        coded = io.BytesIO()
        Image.fromarray(pixels).save(coded, "WEBP", lossless=True)
        where = (corner[0] // 2, corner[1] // 2, pixels.shape[1] - 1, pixels.shape[0] - 1, duration)
        head = b"".join(number.to_bytes(3, "little") for number in where)
        chunks.append(part(b"ANMF", head + b"\x02" + coded.getvalue()[12:]))  # instead of what is there, and it stays
    return part(b"RIFF", b"WEBP" + b"".join(chunks))


def _large(frame: Frame, scale: int) -> Frame:
    return frame if scale == 1 else frame.repeat(scale, axis=0).repeat(scale, axis=1)


def _durations(count: int, fps: float, tick: float) -> list[int]:
    """How long each frame lasts in ticks, so that their sum never strays from the rate by more than half a tick."""
    ends = [round(number / fps / tick) for number in range(count + 1)]
    return [max(1, after - before) for before, after in zip(ends, ends[1:], strict=False)]


# --- FFmpeg ---------------------------------------------------------------------------------------------------------


def _encode(path: Path, frames: Frames, fps: float, scale: int, ending: str) -> None:
    import av

    encoder, options, container_options = FFMPEG[ending]
    rate = Fraction(fps).limit_denominator(1001)
    height, width = (side * scale for side in frames.shape[1:3])
    try:
        with av.open(str(path), "w", format=ending[1:], options=container_options) as container:
            stream: Any = container.add_stream(encoder, rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            stream.time_base = 1 / rate
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = 1  # 16 to 235, as in nearly every film
            for number, pixels in enumerate(frames):
                whole = _large(pixels, scale)
                whole = np.pad(whole, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(whole), format="rgb24")
                coded = frame.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=1)
                coded.pts, coded.time_base = number, 1 / rate
                container.mux(stream.encode(coded))
            container.mux(stream.encode(None))
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(
            f"FFmpeg can't write {ending} of {width}×{height} at {fps:g} frames a second: {error}"
        ) from error


# --- Pillow ---------------------------------------------------------------------------------------------------------


def _sheet(frames: Frames, scale: int) -> Image.Image:
    from PIL import Image

    from mm import sheet

    columns = len(frames) if len(frames) <= 16 else math.ceil(math.sqrt(len(frames)))
    return sheet.grid([Image.fromarray(frame) for frame in frames], columns, scale=scale)


def _write_apng(file: Path, frames: Frames, fps: float, scale: int) -> None:
    """Without loss."""
    from PIL import Image

    pictures = [Image.fromarray(_large(frame, scale)) for frame in frames]
    durations = _durations(len(frames), fps, 0.001)
    # "in place of" and "over" are the same without transparency, and Pillow joins no equal neighbours that differ in it
    blend = [number % 2 for number in range(len(frames))]
    pictures[0].save(file, "PNG", save_all=True, append_images=pictures[1:], duration=durations, blend=blend, loop=0)


def _write_gif(file: IO[bytes], frames: Frames, fps: float, scale: int) -> None:
    """As many frames as are given (Pillow's own writer joins equal neighbours), each with a palette of its own, and of each
    only the part that changes."""
    from PIL import GifImagePlugin

    height, width = (side * scale for side in frames.shape[1:3])
    # screen without a palette of its own, then the block that makes players repeat for ever
    file.write(b"GIF89a" + width.to_bytes(2, "little") + height.to_bytes(2, "little") + b"\x70\x00\x00")
    file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")
    durations = _durations(len(frames), fps, 0.01)
    for (corner, pixels), duration in zip(_changes(frames, scale), durations, strict=True):
        # "leave it in place", how long it lasts, no transparency
        file.write(b"\x21\xf9\x04\x04" + min(duration, 0xFFFF).to_bytes(2, "little") + b"\x00\x00")
        for block in GifImagePlugin.getdata(_flat(pixels), corner, include_color_table=True):
            file.write(block)
    file.write(b";")


def _changes(frames: Frames, scale: int, even: bool = False) -> Iterator[tuple[tuple[int, int], Frame]]:
    """Of each frame the place (column, row) and the pixels of the part that differs from the one before. `even`: of even
    columns and rows."""
    before: Frame | None = None
    for frame in frames:
        left, top, right, bottom = 0, 0, frame.shape[1], frame.shape[0]
        if before is not None:
            rows, columns = np.nonzero((frame != before).any(axis=2))
            if len(rows):
                left, right = int(columns.min()), int(columns.max()) + 1
                top, bottom = int(rows.min()), int(rows.max()) + 1
            else:
                right, bottom = 1, 1
        if even and scale % 2:
            left, top = left - left % 2, top - top % 2
        before = frame
        yield (left * scale, top * scale), _large(np.ascontiguousarray(frame[top:bottom, left:right]), scale)


def _flat(frame: Frame) -> Image.Image:
    """At most 256 colours: the frame's own if it has no more, else the nearest of 256 chosen by median cut."""
    from PIL import Image

    packed = frame.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    colours, index = np.unique(packed, return_inverse=True)
    if len(colours) > COLOURS:
        whole = Image.fromarray(frame)
        return whole.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture = Image.fromarray(index.reshape(frame.shape[:2]).astype(np.uint8), mode="P")
    palette = np.stack([colours >> 16 & 255, colours >> 8 & 255, colours & 255], axis=1)
    picture.putpalette(palette.astype(np.uint8).tobytes())
    return picture
