"""Sound files from strangers, decoded block by block to mono float32.

WAV, FLAC, Ogg and MP3 (and AIFF, AU, CAF) go through libsndfile (`soundfile`); MP4 and M4A, WebM and bare AAC through
FFmpeg (`av`, of the extra `video`). A file's first bytes decide, not its name, and only the reader of that one kind
is tried. The silence with which encoders fill their first and last frames is taken off where the file says how much it is
(MP4 and M4A; WebM as far as FFmpeg knows); bare AAC doesn't say, and keeps it. No block takes more than `BLOCK` samples, so
a header that lies about lengths costs no memory.

Letters in shapes: S samples.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import IO, Any, cast

import numpy as np

from mm.file_sources import FileSource as FileSource
from mm.file_sources import Said, opened
from mm.video_boxes import SOUND, check_mp4

Samples = np.ndarray[Any, np.dtype[np.float32]]
SAID = Said("sound", "a sound file", "a path, bytes, a binary file, mm.Audio or (rate, array)")

MAX_RATE = 768_000
MAX_CHANNELS = 64
BLOCK = 1 << 18
"""Samples of all channels that are decoded at a time (1 MiB as float32)."""
PADDING = 1 << 12
"""Most samples that an encoder adds at the end: a frame of AAC has 1,024, in its variants up to 4,096."""
KNOWN = "WAV, FLAC, Ogg, MP3, AIFF, AU, CAF, M4A, WebM"


def source_name(source: Any) -> str:
    """What to call a sound in a message."""
    return f"the sound {os.fspath(source)!r:.400}" if isinstance(source, str | os.PathLike) else "the sound"


def too_long(name: str, seconds: float | None, limit: float) -> ValueError:
    says = "is longer than"
    if seconds is not None:  # with as many digits as tell the two apart
        digits = next((n for n in (1, 2, 3) if f"{seconds:.{n}f}" != f"{limit:.{n}f}"), 0)
        says = f"is {seconds:,.{digits}f} s long, which is more than" if digits else says
    return ValueError(
        f"{name} {says} the {limit:g} s that are decoded; cut it into parts, or in Python raise max_seconds or use read_chunks"
    )


def decode_blocks(source: FileSource, max_seconds: float, max_bytes: int) -> Iterator[tuple[int, Samples]]:
    """(rate, samples [S]) again and again, channels averaged. Samples may be anything, NaN too.

    Raises:
        ValueError: missing, empty, larger than `max_bytes`, of an unknown kind, damaged, or by its header longer than
            `max_seconds`. The caller counts what is decoded: the header may lie.
    """
    name = source_name(source)
    with opened(source, name, SAID, max_bytes) as file:
        start = file.read(16)
        file.seek(0)
        kind = file_kind(start)
        if not kind:
            raise ValueError(f"{name} is damaged or not a sound (known: {KNOWN})")
        if kind in FFMPEG:
            yield from _through_ffmpeg(file, name, max_seconds, FFMPEG[kind])
        else:
            yield from _through_sndfile(file, name, max_seconds)


PACKETS, DAY = 400, 86_400
"""Packets a second that an MP4 may have (the shortest of any codec in use have 2.5 ms), and seconds in all: FFmpeg makes room
for as many as the file claims."""
FFMPEG = {"m4a": "mov", "webm": "matroska", "aac": "aac"}
"""Kind of file → FFmpeg's name of its reader; the others are libsndfile's."""


def file_kind(start: bytes) -> str:
    """The kind of a file by its first bytes, as a file name's ending; empty if it is none of a sound."""
    if start[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and start[8:12] == b"WAVE":
        return "wav"
    if start[:4] == b"FORM" and start[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if kind := {b"fLaC": "flac", b"OggS": "ogg", b".snd": "au", b"caff": "caf", b"\x1aE\xdf\xa3": "webm"}.get(
        start[:4]
    ):
        return kind
    if start[4:8] == b"ftyp":
        return "m4a"
    if start[:3] == b"ID3":
        return "mp3"
    if len(start) > 2 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0:
        return "mp3" if start[1] & 0x06 else "aac"  # ADTS has the layer 0, which no MPEG audio layer has
    return ""


def average(block: np.ndarray[Any, Any]) -> Samples:
    """[S, channels] → [S]. What overflows becomes infinite, which callers refuse."""
    with np.errstate(over="ignore", invalid="ignore"):
        return block[:, 0].astype(np.float32) if block.shape[1] == 1 else block.mean(1, dtype=np.float32)


def _check_header(name: str, rate: int, channels: int, seconds: float | None, max_seconds: float) -> None:
    if not 1 <= rate <= MAX_RATE:
        raise ValueError(f"{name} has {rate:,} samples a second; 1 to {MAX_RATE:,} can be used")
    if not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"{name} has {channels:,} channels; 1 to {MAX_CHANNELS} are averaged")
    if seconds is not None and seconds > max_seconds:
        raise too_long(name, seconds, max_seconds)


# --- libsndfile -----------------------------------------------------------------------------------------------------


@cache
def _forward() -> Any:
    import soundfile

    class Forward(soundfile.SoundFile):  # type: ignore[misc, unused-ignore]
        def seekable(self) -> bool:
            """Else soundfile seeks after each block, which fails at the end of what a header gave no length."""
            return False

    return Forward


def _through_sndfile(file: IO[bytes], name: str, max_seconds: float) -> Iterator[tuple[int, Samples]]:
    try:
        sound = _forward()(_Nameless(file))
    except Exception as error:  # a parser fed with a stranger's bytes may raise anything
        raise ValueError(f"{name} is damaged or not a sound: {_short(error)}") from error
    with sound:
        rate, channels, frames = sound.samplerate, sound.channels, sound.frames
        known = 0 <= frames < 1 << 62  # beyond: libsndfile's word for a length that the header leaves out
        _check_header(name, rate, channels, frames / max(1, rate) if known else None, max_seconds)
        size, total = BLOCK // channels, 0
        while not known or total < frames:
            try:  # no more than there is: libsndfile fills the rest with zeros, which takes longer than a short sound
                block = sound.read(min(size, frames - total), dtype="float32", always_2d=True)
            except Exception as error:
                raise ValueError(f"{name} is truncated or damaged ({sound.format}): {_short(error)}") from error
            if not len(block):
                break
            total += len(block)
            yield rate, average(block)
        if known and total < frames and sound.format == "FLAC":
            raise ValueError(
                f"{name} is truncated: it has {total:,} of the {frames:,} samples that its header promises"
            )


class _Nameless:
    """A file by its content alone: by its name, soundfile would take x.raw for samples without a header."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self.read = file.seek, file.tell, file.read
        self.readinto = cast(Any, file).readinto


# --- FFmpeg ---------------------------------------------------------------------------------------------------------


def _through_ffmpeg(file: IO[bytes], name: str, max_seconds: float, reader: str) -> Iterator[tuple[int, Samples]]:
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"{name} is of a kind that needs FFmpeg; pip install 'mm[video]', or save it as WAV, FLAC, Ogg or MP3"
        ) from error
    seen: Any = check_mp4(file, name, int(min(max_seconds, DAY) * PACKETS), wanted=SOUND) if reader == "mov" else file
    try:
        # One reader and no protocol: a container must not make FFmpeg open other files or addresses.
        container: Any = av.open(seen, format=reader, options={"protocol_whitelist": "none"}, metadata_errors="ignore")
    except Exception as error:
        raise ValueError(f"{name} is damaged or not a sound: {_short(error)}") from error
    with container:
        if not container.streams.audio:
            raise ValueError(f"{name} has no sound track")
        planes, rate = av.AudioResampler(format="fltp"), 0
        decoding = _av_frames(container, planes)
        if reader == "mov":
            decoding = _unpadded(decoding, container.streams.audio[0])
        while True:
            try:
                found = next(decoding, None)
            except Exception as error:
                raise ValueError(f"{name} is truncated or damaged ({reader}): {_short(error)}") from error
            if found is None:
                return
            frame_rate, block = found
            if not rate:
                rate, length = frame_rate, container.duration
                seconds = length / av.time_base if length and length > 0 and reader != "aac" else None
                _check_header(name, rate, block.shape[1], seconds, max_seconds)
            if frame_rate != rate:
                raise ValueError(f"{name} changes its rate from {rate:,} to {frame_rate:,}; convert it to one rate")
            for start in range(0, len(block), BLOCK // block.shape[1]):
                yield rate, average(block[start : start + BLOCK // block.shape[1]])


Frames = Iterator[tuple[int, np.ndarray[Any, Any]]]
"""(rate, samples [S, channels]) again and again."""


def _av_frames(container: Any, planes: Any) -> Frames:
    for frame in container.decode(container.streams.audio[0]):
        for plane in planes.resample(frame):
            if plane.samples:
                yield plane.sample_rate, plane.to_ndarray().T


def _unpadded(frames: Frames, stream: Any) -> Frames:
    """Without what the last frame has beyond the length of the track. A length that differs by more is not believed."""
    held: deque[tuple[int, np.ndarray[Any, Any]]] = deque()
    waiting = count = 0
    for rate, block in frames:
        held.append((rate, block))
        waiting, count = waiting + len(block), count + len(block)
        while waiting - len(held[0][1]) >= PADDING:
            waiting -= len(held[0][1])
            yield held.popleft()
    if held and stream.duration:
        extra = count - round(stream.duration * stream.time_base * held[0][0])
        while 0 < extra <= PADDING and held:
            rate, block = held.pop()
            if extra < len(block):
                held.append((rate, block[: len(block) - extra]))
            extra -= len(block)
    yield from held


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    # soundfile names the Python object that it was given
    return (text[0].split(">: ")[-1][:200] if text else type(error).__name__).rstrip(".")
