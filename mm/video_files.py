"""Video files from strangers, decoded frame by frame to 8-bit RGB.

MP4 and MOV, WebM and MKV go through FFmpeg (`av`, of the extra `video`); animated GIF, PNG, WebP and AVIF, and single
pictures, through Pillow. A file's first bytes decide, not its name, and only the reader of that one kind is tried, with no
protocol: no file can make FFmpeg open another file or an address. Sizes, frames and seconds are checked against the
header before anything is decoded, and each frame again, since headers lie.

Letters in shapes: H rows, W columns.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from mm.file_sources import FileSource, Said
from mm.file_sources import opened as open_source
from mm.media import MAX_SIDE, load_image
from mm.video_boxes import check_mp4, check_webm

if TYPE_CHECKING:
    from PIL import Image

Frame = np.ndarray[Any, np.dtype[np.uint8]]
"""uint8 [H, W, 3]."""
SAID = Said("video", "a video file or of a folder of pictures", "a path, bytes or a binary file")

MAX_DECODED = 1 << 16
"""Most frames of a file that are decoded, kept or not."""
DEFAULT_DURATION = 0.1
"""Seconds that a frame lasts whose file doesn't say it (what browsers take for such a GIF)."""
FFMPEG = {"mp4": "mov", "webm": "matroska"}
"""Kind of file → FFmpeg's name of its reader; the others are Pillow's."""
PICTURES = {"gif": "GIF", "png": "PNG", "webp": "WEBP", "avif": "AVIF"}
"""Kind of file that may be an animation → Pillow's name of it."""
CODECS = (
    *("h264", "hevc", "mpeg4", "vp8", "vp9", "libdav1d", "av1", "mjpeg", "png", "prores"),
    *("libvpx", "libvpx-vp9", "ffv1", "qtrle", "rawvideo", "h263"),
)
"""Decoders of FFmpeg that are used. It has hundreds, most of them for formats that nobody has used for decades."""
KNOWN = "MP4, MOV, WebM, MKV, GIF, APNG, animated WebP and AVIF"


@dataclass(frozen=True)
class Limits:
    """How much of a stranger's file is decoded."""

    frames: int
    """Kept in all."""
    pixels: int
    """Of one frame."""
    total: int
    """Pixels of all frames that are kept."""
    bytes: int
    """Of the file."""
    size: int | None = None
    """Side of the frames that are kept, if they are scaled."""
    fps: float | None = None
    """Frames a second that are kept, if these are fewer or more than the file has."""

    def check_frame(self, name: str, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise ValueError(f"{name} is {width}×{height}, so it has no pixels; give at least 1×1")
        if width * height > self.pixels or max(width, height) > MAX_SIDE:
            raise ValueError(
                f"{name} is {width}×{height} = {width * height:,} pixels a frame, but at most {self.pixels:,} are decoded; "
                "scale it down or raise max_pixels"
            )

    def check(self, name: str, width: int, height: int, count: float) -> None:
        """A header that speaks of `count` frames to be kept, or what has been decoded so far."""
        self.check_frame(name, width, height)
        if count > self.frames:
            raise ValueError(
                f"{name} has {count:,.0f} frames, but at most {self.frames:,} are decoded; cut it into parts, give a lower "
                "fps, or raise max_frames"
            )
        kept = count * (self.size**2 if self.size else width * height)
        if kept > self.total:
            raise ValueError(
                f"{name} has {kept:,.0f} pixels in all its frames, but at most {self.total:,} are kept; give a size or a "
                "lower fps, cut it into parts, or raise max_total"
            )


@dataclass(frozen=True)
class Clip:
    """Frames with their times, one after the other."""

    frames: Iterator[tuple[float | None, float | None, Frame]]
    """When a frame begins, how long it lasts (seconds; None where the file doesn't say), and its pixels."""
    tick: float
    """What the times are rounded to, in seconds."""
    rate: float | None = None
    """Frames a second, if the file says so."""


def source_name(source: Any) -> str:
    """What to call a video in a message."""
    return f"the video {os.fspath(source)!r:.400}" if isinstance(source, str | os.PathLike) else "the video"


def file_kind(start: bytes) -> str:
    """The kind of a file by its first 16 bytes, as a file name's ending; empty if it is none of a video or an animation."""
    if start[4:8] == b"ftyp":
        return "avif" if start[8:12] in (b"avif", b"avis") else "mp4"
    if start[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):  # QuickTime before there was ftyp
        return "mp4"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    return {b"\x1aE\xdf\xa3": "webm", b"\x89PNG": "png"}.get(start[:4], "")


@contextmanager
def opened(source: FileSource, name: str, limits: Limits) -> Iterator[Clip]:
    """The clip of a file, to be read while the context lasts.

    Raises:
        ValueError: missing, empty, larger than the limits, of an unknown kind, or damaged; also while frames are read.
    """
    with open_source(source, name, SAID, limits.bytes) as file:
        start = file.read(32)
        file.seek(0)
        kind = file_kind(start[:16])
        if kind in FFMPEG:
            with _through_ffmpeg(file, name, limits, kind) as clip:
                yield clip
        elif kind:
            yield _animation(file, name, limits, kind, start)
        else:
            yield _still(file.read(), name, limits)


# --- Pillow ---------------------------------------------------------------------------------------------------------


def _still(data: bytes, name: str, limits: Limits) -> Clip:
    """A picture of another kind: one frame."""
    try:
        picture = load_image(data, max_pixels=limits.pixels)
    except ValueError as error:
        problem = str(error).removeprefix("the picture ")
        if "or not a picture" in problem:
            problem = f"is damaged or not a video (known: {KNOWN}, and pictures)"
        raise ValueError(f"{name} {problem}") from error
    limits.check(name, *picture.size, 1)
    return Clip(iter([(0.0, None, np.asarray(picture))]), 0.001)


def _animation(file: IO[bytes], name: str, limits: Limits, kind: str, start: bytes) -> Clip:
    from PIL import Image, UnidentifiedImageError

    if all(size := _size(kind, start)):  # WebP's reader makes room for the whole canvas as soon as it is opened
        limits.check_frame(name, *size)
    try:
        picture = Image.open(file, formats=[PICTURES[kind]])
        limits.check_frame(name, *picture.size)
        # a GIF's frames aren't counted in its header, and Pillow counts them by reading the file: they are counted as they come
        count = 1 if kind == "gif" else int(getattr(picture, "n_frames", 1))
    except Exception as error:  # a parser fed with a stranger's bytes may raise anything
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {_short(error)}"
        raise ValueError(f"{name} is damaged or not a picture ({PICTURES[kind]}){detail}") from error
    limits.check(name, *picture.size, count if limits.fps is None else 1)
    return Clip(_pictures(picture, name, limits, count), 0.01 if kind == "gif" else 0.001)


def _pictures(
    picture: Image.Image, name: str, limits: Limits, count: int
) -> Iterator[tuple[float | None, float | None, Frame]]:
    time = 0.0
    size = picture.size
    first = 1 if picture.info.get("default_image") and getattr(picture, "n_frames", 1) > 1 else 0
    for number in itertools.count(first):  # an animated PNG may begin with a picture that isn't part of it
        try:
            if number:
                picture.seek(number)
            if picture.size == size:  # else nothing is decoded
                picture.load()
        except EOFError as error:
            if number < count:
                raise ValueError(
                    f"{name} is truncated: it has {number} of {count} frames ({picture.format})"
                ) from error
            return
        except Exception as error:
            raise ValueError(
                f"{name} is truncated or damaged at frame {number + 1} ({picture.format}): {_short(error)}"
            ) from error
        if picture.size != size:
            raise _changed(name, size, picture.size)
        try:
            frame = np.asarray(load_image(picture, max_pixels=limits.pixels))
        except ValueError as error:
            raise ValueError(f"{name}, frame {number + 1}: {error}") from error
        lasts = picture.info.get("duration")
        seconds = lasts / 1000 if isinstance(lasts, int | float) and lasts > 0 else DEFAULT_DURATION
        yield time, seconds, frame
        time += seconds


def _size(kind: str, start: bytes) -> tuple[int, int]:
    """Columns and rows by the first 32 bytes; 0 where these don't tell."""
    if kind == "png":
        return int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big")
    whole = int.from_bytes(start.ljust(32, b"\0"), "little")
    if kind == "gif":
        return whole >> 48 & 0xFFFF, whole >> 64 & 0xFFFF
    if start[12:16] == b"VP8X":
        return (whole >> 192 & 0xFFFFFF) + 1, (whole >> 216 & 0xFFFFFF) + 1
    if start[12:16] == b"VP8L":
        return (whole >> 168 & 0x3FFF) + 1, (whole >> 182 & 0x3FFF) + 1
    return (whole >> 208 & 0x3FFF, whole >> 224 & 0x3FFF) if start[12:16] == b"VP8 " else (0, 0)


def _changed(name: str, before: tuple[int, int], after: tuple[int, int]) -> ValueError:
    return ValueError(
        f"{name} changes its size from {before[0]}×{before[1]} to {after[0]}×{after[1]}; convert it to one size"
    )


# --- FFmpeg ---------------------------------------------------------------------------------------------------------


@contextmanager
def _through_ffmpeg(file: IO[bytes], name: str, limits: Limits, kind: str) -> Iterator[Clip]:
    av = require_av(f"{name} is of a kind that needs FFmpeg", "or save it as a GIF")
    seen: Any = file
    if kind == "mp4":
        most = MAX_DECODED if limits.fps else min(limits.frames, MAX_DECODED)
        seen = check_mp4(file, name, most, partial(limits.check_frame, name))
    else:
        check_webm(file, name)
    options = {
        "protocol_whitelist": "none",  # a container must not make FFmpeg open other files or addresses
        "max_pixels": str(max(2 * limits.pixels, 1 << 16)),  # of the decoder, whose frames are a little larger
        "max_streams": "32",
        "codec_whitelist": ",".join(CODECS),
    }
    try:
        container: Any = av.open(seen, format=FFMPEG[kind], options=options, metadata_errors="ignore")
    except Exception as error:
        raise ValueError(f"{name} is damaged or not a video ({kind}): {_short(error)}") from error
    with container:
        covers = av.stream.Disposition.attached_pic
        stream = next((s for s in container.streams.video if not s.disposition & covers), None)
        if stream is None:
            raise ValueError(f"{name} has no video track")
        context = stream.codec_context
        if context is None or context.codec.name not in CODECS:
            found = "unknown" if context is None else context.codec.name
            raise ValueError(f"{name} is coded as {found}, which isn't read; convert it to H.264, VP9 or AV1")
        context.thread_count = 1  # each thread would hold frames of its own
        context.options = {"max_pixels": options["max_pixels"]}
        rate = float(stream.average_rate or stream.guessed_rate or 0) or None
        _check_header(name, limits, container, stream, rate, av.time_base)
        tick = float(stream.time_base or 0.001)
        yield Clip(_av_frames(container, stream, name, limits, kind), tick, rate)


def _check_header(name: str, limits: Limits, container: Any, stream: Any, rate: float | None, base: int) -> None:
    lengths = [0.0]
    if stream.duration and stream.duration > 0 and stream.time_base:
        lengths.append(float(stream.duration * stream.time_base))
    if container.duration and container.duration > 0:
        lengths.append(container.duration / base)
    seconds = max(lengths)
    count = max(stream.frames or 0, 1)
    if limits.fps is not None:
        if count > MAX_DECODED:
            raise too_many(name)
        count = max(1, int(seconds * limits.fps))
    elif not stream.frames and rate:
        count = max(1, int(seconds * rate))
    context = stream.codec_context
    if context.width and context.height:  # else the decoder learns it from the first frame
        limits.check(name, context.width, context.height, count)
    else:
        limits.check(name, 1, 1, count)


def _av_frames(
    container: Any, stream: Any, name: str, limits: Limits, kind: str
) -> Iterator[tuple[float | None, float | None, Frame]]:
    decoding = container.decode(stream)
    size: tuple[int, int] | None = None
    while True:
        try:
            frame = next(decoding, None)
        except Exception as error:
            raise ValueError(f"{name} is truncated or damaged ({kind}): {_short(error)}") from error
        if frame is None:
            return
        limits.check_frame(name, frame.width, frame.height)
        size = size or (frame.width, frame.height)
        if (frame.width, frame.height) != size:
            raise _changed(name, size, (frame.width, frame.height))
        if frame.is_corrupt:
            raise ValueError(f"{name} is truncated or damaged ({kind}): a frame can't be decoded whole")
        lasts = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else None
        try:
            pixels = _to_rgb(frame)
        except Exception as error:
            raise ValueError(
                f"{name} has pixels of the kind {frame.format.name}, which can't become RGB: {_short(error)}"
            ) from error
        yield frame.time, lasts, pixels


def _to_rgb(frame: Any) -> Frame:
    """Upright, with transparency composited over white."""
    if any(component.is_alpha for component in frame.format.components):
        pixels = over_white(frame.to_ndarray(format="rgba"))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def over_white(rgba: Frame) -> Frame:
    """uint8 [H, W, 4] → [H, W, 3]."""
    values = rgba.astype(np.uint16)
    alpha = values[..., 3:]
    return ((values[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def has_av() -> bool:
    """Whether MP4 and WebM can be read and written."""
    return find_spec("av") is not None


def require_av(why: str, instead: str) -> Any:
    """The package `av`. Raises `ValueError` that names the extra where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{why}; pip install 'mm[video]', {instead}") from error
    return av


def too_many(name: str) -> ValueError:
    return ValueError(f"{name} has more than the {MAX_DECODED:,} frames that are decoded; cut it into parts")


def _short(error: BaseException) -> str:
    text = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return (text[0][:200] if text else type(error).__name__).rstrip(".")
