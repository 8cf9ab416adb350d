"""Video in and out: one kind of video, a loader that bounds what it decodes, a writer, rates and sizes.

Letters in shapes: T frames, H rows, W columns.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from mm import safe_io, video_encoding, video_files
from mm.media import EXTENSIONS as PICTURES
from mm.media import array_pixels, load_image
from mm.video_encoding import Frames
from mm.video_files import DEFAULT_DURATION, MAX_DECODED, Clip, Frame, Limits, has_av, source_name

__all__ = [
    "Frames",
    "Video",
    "VideoSource",
    "has_av",
    "load_video",
    "moves",
    "resample_frames",
    "save_video",
    "square",
    "to_webp",
]

MAX_FRAMES = 4096
"""Most frames of one video, by default."""
MAX_PIXELS = 1 << 23
"""Most pixels of one frame (4K films have 3840 × 2160)."""
MAX_TOTAL = 1 << 28
"""Most pixels of all frames that are kept (768 MiB; while it is loaded, a video takes twice that)."""
MAX_BYTES = 1 << 28
"""Largest file that is read (256 MiB)."""
MIN_FPS, MAX_FPS = 0.001, 1000.0
"""Fewest and most frames a second."""
MAX_SIZE = 4096
"""Largest side that frames are scaled to."""
EXTENSIONS = frozenset(("mp4", "m4v", "webm", "mkv", "mov"))
"""File name endings (lower case, no dot) that folders and shards take for videos; animations are pictures there."""
ANIMATIONS = frozenset(("gif", "apng", "webp"))
"""Endings of files that may be videos or pictures."""
WRITTEN = video_encoding.WRITTEN
"""Endings that `save_video` knows: .mp4, .webm, .gif, .apng, .webp, and .png for a contact sheet."""


@dataclass(frozen=True, eq=False)
class Video:
    """Frames at a constant rate. Raises `ValueError` for frames of another shape or type, and for an impossible rate."""

    frames: Frames
    """uint8 [T, H, W, 3], at least one frame and one pixel."""
    fps: float
    """Frames a second."""

    def __post_init__(self) -> None:
        frames = np.asarray(self.frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise ValueError(
                f"a video has frames of uint8 and the shape [T, H, W, 3] with at least one of each, got {frames.dtype} "
                f"{list(frames.shape)}; load_video takes more kinds"
            )
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "fps", _checked_fps(self.fps))

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.fps

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as pictures have it."""
        return self.frames.shape[2], self.frames.shape[1]


VideoSource = str | os.PathLike[str] | bytes | IO[bytes] | Video | np.ndarray[Any, Any] | Sequence[Any]
"""A path (of a folder of pictures too), the bytes of a file, an open binary file, a video, an array, or a list of frames."""


# --- reading --------------------------------------------------------------------------------------------------------


def moves(path: str | os.PathLike[str]) -> bool:
    """Whether a file of an animation (GIF, APNG, WebP) has a second frame; not for what can't be read: who loads it says why."""
    limits = Limits(1, MAX_PIXELS, MAX_TOTAL, MAX_BYTES, fps=1.0)
    try:
        with video_files.opened(path, source_name(path), limits) as clip:
            return len(list(itertools.islice(clip.frames, 2))) > 1
    except ValueError:
        return False


def load_video(
    source: VideoSource,
    *,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
    max_total: int = MAX_TOTAL,
    max_bytes: int = MAX_BYTES,
    size: int | None = None,
    fps: float | None = None,
) -> Video:
    """A whole video as upright 8-bit RGB, transparency composited over white.

    Takes a path (a video, an animation, a picture, or a folder of pictures in the order of their names), the bytes of a
    file, an open binary file, a `Video`, an array ([T, H, W, 3], also grey [T, H, W] or with alpha; uint8, or from 0 to 1
    as `mm.media.array_pixels`), or a list of frames (PIL pictures, arrays, paths). Sizes, frames and seconds are checked
    against the header before anything is decoded, and again while it is. A file that ends early is refused. A file whose
    frames last differently long gets a constant rate that keeps their times.

    Args:
        max_frames: most frames (of those that are kept, if `fps` is given).
        max_pixels: most pixels of a frame.
        max_total: most pixels of all frames together, after scaling.
        max_bytes: largest file.
        size: make frames `size`×`size`: scaled to cover the square, and cropped in the middle (`square`).
        fps: frames a second: at each time the frame that is on screen (`resample_frames`). By default the file's own;
            lists and arrays have 10.

    Raises:
        ValueError: one sentence, for a video that is missing, damaged, empty, too large, too long, or of an unknown kind;
            and where FFmpeg (`pip install 'mm[video]'`) is needed and not there.
    """
    if size is not None:
        _check_size(size)
    fps = None if fps is None else _checked_fps(fps)
    limits = Limits(max_frames, max_pixels, max_total, max_bytes, size, fps)
    name = source_name(source)
    with _clip(source, name, limits) as clip:
        timed = _bounded(clip, name, limits)
        if fps is not None:
            frames, rate = _kept(_on_screen(timed, fps, 0.51 * clip.tick), name, limits), fps
        else:
            frames, rate = _at_own_rate(list(timed), clip, name, limits)
    if not frames:
        raise ValueError(f"{name} has no frames")
    try:
        return Video(np.stack(frames), rate)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _clip(source: Any, name: str, limits: Limits) -> AbstractContextManager[Clip]:
    if isinstance(source, Video):
        return nullcontext(_from_list(source.frames, name, limits, source.fps))
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        return nullcontext(_from_list(_pictures_in(Path(source), limits), name, limits))
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(source, "read"):
        return video_files.opened(source, name, limits)
    if isinstance(source, Sequence | np.ndarray) or hasattr(source, "__array__"):
        return nullcontext(_from_list(source, name, limits))
    raise ValueError(
        f"got a {type(source).__name__} for a video; give a path, bytes, a binary file, mm.video.Video, an array "
        "[T, H, W, 3] or a list of frames"
    )


def _from_list(given: Any, name: str, limits: Limits, fps: float | None = None) -> Clip:
    if not isinstance(given, Sequence):
        given = np.asarray(given)
        if given.ndim not in (3, 4):
            raise ValueError(f"the array of a video has the shape [T, H, W, 3] or [T, H, W], got {list(given.shape)}")
    if limits.fps is None:
        limits.check(name, 1, 1, len(given))
    rate = fps or 1 / DEFAULT_DURATION

    def frames() -> Iterator[tuple[float, float, Frame]]:
        size = None
        for number, item in enumerate(given):
            try:
                frame = _frame(item, limits)
            except ValueError as error:
                raise ValueError(f"{name}, frame {number + 1} of {len(given)}: {error}") from error
            size = size or frame.shape
            if frame.shape != size and limits.size is None:
                raise ValueError(
                    f"{name}: frame {number + 1} is {frame.shape[1]}×{frame.shape[0]}, but those before it are "
                    f"{size[1]}×{size[0]}; give frames of one size, or a size to scale them to"
                )
            yield number / rate, 1 / rate, frame

    return Clip(frames(), 0.001 / rate, rate)


def _frame(item: Any, limits: Limits) -> Frame:
    """One frame of a list."""
    if isinstance(item, str | os.PathLike | bytes) or hasattr(item, "convert"):
        return np.asarray(load_image(item, max_pixels=limits.pixels, max_bytes=limits.bytes))
    values = np.asarray(item)
    if values.ndim in (2, 3):  # others are refused by their shape
        limits.check_frame("it", values.shape[1], values.shape[0])
    frame = array_pixels(values, "a frame")
    if frame.shape[2] == 1:
        frame = np.repeat(frame, 3, axis=2)
    return video_files.over_white(frame) if frame.shape[2] == 4 else frame


def _pictures_in(folder: Path, limits: Limits) -> list[Path]:
    """In the order of their names, numbers by their value: 2.png before 10.png."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.rpartition(".")[2].lower() in PICTURES and not entry.name.startswith("."):
                found.append(entry.name)
            if len(found) > MAX_DECODED:
                raise video_files.too_many(f"the folder {str(folder)!r}")
    if not found:
        raise ValueError(f"the folder {str(folder)!r} has no pictures to make a video of")

    def order(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]

    return [safe_io.inside(folder, name) for name in sorted(sorted(found), key=order)]


def _bounded(clip: Clip, name: str, limits: Limits) -> Iterator[tuple[float | None, float | None, Frame]]:
    """Frames of the size that is wanted, none too many."""
    for number, (time, lasts, frame) in enumerate(clip.frames, 1):
        if limits.fps is None:
            limits.check(name, frame.shape[1], frame.shape[0], number)
        elif number > MAX_DECODED:
            raise video_files.too_many(name)
        yield time, lasts, frame if limits.size is None else _square(frame, limits.size)


def _kept(frames: Iterable[Frame], name: str, limits: Limits) -> list[Frame]:
    kept: list[Frame] = []
    for frame in frames:
        kept.append(frame)
        limits.check(name, frame.shape[1], frame.shape[0], len(kept))
    return kept


def _at_own_rate(
    timed: list[tuple[float | None, float | None, Frame]], clip: Clip, name: str, limits: Limits
) -> tuple[list[Frame], float]:
    """All frames, if they follow each other evenly; else as many as keep their times."""
    frames = [frame for _, _, frame in timed]
    times = [math.nan if time is None else time for time, _, _ in timed]
    steps = [after - before for before, after in zip(times, times[1:], strict=False)]
    last = timed[-1][1] if timed else None
    steps.append(
        last or (sorted(steps)[len(steps) // 2] if steps else 1 / clip.rate if clip.rate else DEFAULT_DURATION)
    )
    if not all(1 / MAX_FPS <= step <= 1 / MIN_FPS for step in steps):  # the file's times make no sense
        return frames, clip.rate or 1 / DEFAULT_DURATION
    total, slack = sum(steps), 1.05 * clip.tick
    if clip.rate and abs(len(frames) / clip.rate - total) <= 2 * slack and _even(steps, 1 / clip.rate, slack):
        return frames, clip.rate
    for step in (
        total / len(steps),
        sum(steps[:-1]) / max(1, len(steps) - 1),
    ):  # a GIF's last frame is often a tick longer
        if step and _even(steps, step, slack):
            return frames, _near_whole(1 / step)
    shortest = min(steps)
    counts = [round(step / shortest) for step in steps]  # of a rate at which some frames last for several
    step = total / sum(counts)
    if sum(counts) <= limits.frames and _even(steps, step, slack, counts):
        repeated = (frame for frame, count in zip(frames, counts, strict=True) for _ in range(count))
        return _kept(repeated, name, limits), _near_whole(1 / step)
    step = sorted(steps)[len(steps) // 2]
    return _kept(_on_screen(iter(timed), 1 / step, 0.51 * clip.tick), name, limits), _near_whole(1 / step)


def _even(steps: list[float], step: float, slack: float, counts: list[int] | None = None) -> bool:
    """Whether the frames begin where those of a constant rate do, which last for `counts` (one) of its steps."""
    expected = np.cumsum(counts or [1] * len(steps)) * step
    return bool((np.abs(np.cumsum(steps) - expected) <= slack).all())


def _near_whole(fps: float) -> float:
    return float(round(fps)) if abs(fps - round(fps)) < 1e-6 * fps else fps


def _on_screen(timed: Iterator[tuple[float | None, float | None, Frame]], fps: float, slack: float) -> Iterator[Frame]:
    """For each k the frame that a player shows at k / fps seconds."""
    shown: Frame | None = None
    begin, end, number = 0.0, 0.0, 0
    for time, lasts, frame in timed:
        if time is None:
            time = end
        if shown is None:
            begin = time
        time = max(time - begin, 0.0)
        while shown is not None and number / fps < time - slack:
            yield shown
            number += 1
        shown, end = frame, time + (lasts or DEFAULT_DURATION)
    while shown is not None and (number == 0 or number / fps < end - slack):
        yield shown
        number += 1


# --- rates and sizes ------------------------------------------------------------------------------------------------


def resample_frames(video: Video, fps: float) -> Video:
    """The video at another rate: at k / fps seconds the frame that is on screen then, so the first one always stays."""
    fps = _checked_fps(fps)
    if fps == video.fps:
        return video
    count = max(1, math.ceil(len(video) * fps / video.fps - 1e-6))
    if count * video.frames[0].size // 3 > MAX_TOTAL:
        raise ValueError(f"a video of {video.seconds:.1f} s at {fps:g} frames a second is too large; give a lower rate")
    rows = np.minimum(np.floor(np.arange(count) * (video.fps / fps) + 1e-6).astype(np.int64), len(video) - 1)
    return Video(video.frames[rows], fps)


def square(video: Video, size: int) -> Video:
    """Frames of `size`×`size`: scaled to cover the square, and cropped in the middle."""
    _check_size(size)
    return Video(np.stack([_square(frame, size) for frame in video.frames]), video.fps)


def _check_size(size: Any) -> None:
    if not isinstance(size, int | np.integer) or not 1 <= size <= MAX_SIZE:
        raise ValueError(f"frames can be scaled to a size from 1 to {MAX_SIZE}, a whole number, got {size!r:.60}")


def _square(frame: Frame, size: int) -> Frame:
    from PIL import Image, ImageOps

    if frame.shape[:2] == (size, size):
        return frame
    fitted = ImageOps.fit(Image.fromarray(np.ascontiguousarray(frame)), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted)


def _checked_fps(fps: Any) -> float:
    try:
        value = float(fps)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not MIN_FPS <= value <= MAX_FPS:
        raise ValueError(f"the rate of a video is {MIN_FPS:g} to {MAX_FPS:g} frames a second, got {fps!r:.60}")
    return value


# --- writing --------------------------------------------------------------------------------------------------------


def save_video(
    path: str | os.PathLike[str], video: Video | np.ndarray[Any, Any], fps: float | None = None, *, scale: int = 1
) -> None:
    """Write a video, whole or not at all; the ending says as what.

    - `.mp4`: H.264 that browsers play (4:2:0, its index at the beginning); an odd side gets one more row or column, which
      repeats the last. `.webm`: VP9. Both need FFmpeg (`pip install 'mm[video]'`).
    - `.gif`, `.apng`, `.webp`: endless animations; GIF has 256 colours a frame and is exact where these suffice, the other
      two lose nothing.
    - `.png`: a contact sheet, the frames side by side.

    Args:
        video: a `Video`, or its frames (uint8 [T, H, W, 3]); `fps` then is needed.
        scale: whole factor by which frames are enlarged, each pixel to a square.

    Raises:
        ValueError: for another ending, frames of another kind, and where FFmpeg is needed and not there.
    """
    if not isinstance(video, Video):
        video = Video(video, 10.0 if fps is None else fps)
    elif fps is not None:
        video = Video(video.frames, fps)
    video_encoding.write(path, video.frames, video.fps, scale)


def to_webp(video: Video) -> bytes:
    """An animation that loses nothing."""
    return video_encoding.to_webp(video.frames, video.fps)
