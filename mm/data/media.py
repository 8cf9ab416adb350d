"""Pictures, sounds, videos and shapes of examples: which files are which, and how much of each is decoded.

One table for all sources: a further medium is one more entry of `MEDIA` and one more method of `Decoding`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm import audio, media, shape_files, shapes, video
from mm.data.example import BrokenExample, Source


def is_picture(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in media.EXTENSIONS and not is_video(suffix)


def is_sound(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in audio.EXTENSIONS


def is_video(suffix: str) -> bool:
    """Films, and animations whose name says that they are meant as videos: KEY.video.gif."""
    before, _, ending = suffix.rpartition(".")
    return ending in video.EXTENSIONS or (ending in video.ANIMATIONS and before.rpartition(".")[2] == "video")


def is_shape(suffix: str) -> bool:
    """Meshes, and grids whose name says what they are: KEY.shape.npz."""
    return suffix.rpartition(".")[2] in shape_files.EXTENSIONS or f".{suffix}".endswith(".shape.npz")


MEDIA: dict[str, Callable[[str], bool]] = {
    "image": is_picture,
    "audio": is_sound,
    "video": is_video,
    "shape": is_shape,
}
"""Field of examples → whether a file belongs there, by the end of its name (lower case)."""


def medium(suffix: str) -> str:
    """The field that a file belongs to, by the end of its name; empty for files of other kinds."""
    return next((field for field, belongs in MEDIA.items() if belongs(suffix)), "")


@dataclass(frozen=True)
class Decoding:
    """How much of a stranger's file is decoded, and as what. Sources take the same settings (`mm.data.example.Source`)."""

    max_pixels: int = media.MAX_PIXELS
    max_seconds: float = audio.MAX_SECONDS
    max_frames: int = video.MAX_FRAMES
    video_size: int | None = None
    video_fps: float | None = None
    shape_size: int = shapes.SIZE

    def decode(self, field: str, data: Any, where: str) -> Any:
        """What belongs in a field of `MEDIA`. What is wrong with it becomes a `BrokenExample` that says where it is."""
        try:
            return {"image": self._picture, "audio": self._sound, "video": self._video, "shape": self._shape}[field](
                data
            )
        except ValueError as error:
            raise BrokenExample(f"{where}: {error}") from error

    def _picture(self, data: Any) -> Any:
        return media.load_image(data, max_pixels=self.max_pixels)

    def _sound(self, data: Any) -> audio.Audio:
        return audio.load_audio(data, max_seconds=self.max_seconds)

    def _video(self, data: Any) -> video.Video:
        return video.load_video(
            data,
            max_frames=self.max_frames,
            max_pixels=min(self.max_pixels, video.MAX_PIXELS),
            size=self.video_size,
            fps=self.video_fps,
        )

    def _shape(self, data: Any) -> shapes.Shape:
        return shapes.load_shape(data, self.shape_size)


def decoding_of(source: Source) -> Decoding:
    """By the settings of a source."""
    return Decoding(
        source.max_pixels,
        source.max_seconds,
        source.max_frames,
        source.video_size,
        source.video_fps,
        source.shape_size,
    )
