"""What pipelines return: frozen records of plural lists that can save themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from mm import safe_io
from mm.audio import WRITTEN, Audio, Samples, save_audio
from mm.interfaces import Encoded
from mm.shapes import Shape
from mm.sheet import grid, strips
from mm.video import WRITTEN as WRITTEN_VIDEOS
from mm.video import Frames, Video, has_av, save_video

if TYPE_CHECKING:  # imported where it is used, so that `import mm` stays fast
    from trimesh import Trimesh

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXTS = (".txt", ".md")
SOUNDS = WRITTEN
VIDEOS = WRITTEN_VIDEOS
MESHES = (".glb", ".obj", ".stl", ".ply", ".off")
SHOWN = (".gif", ".png")
"""Endings with which a mesh is written as pictures: once round it, or from one side."""
TURN_FPS = 12
"""Frames a second of a turntable."""


@dataclass(frozen=True)
class ImageOutput:
    """Pictures, prompt by prompt and within a prompt number by number."""

    images: list[Image.Image]
    prompts: list[str]
    """The prompt of each picture."""
    tokens: list[Encoded]
    seed: int
    """What to pass as `seed` to get the same again."""

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write one picture to `path`, several to numbered files beside it (`name-01.png`), into a folder if it is one.

        The format follows the ending (PNG without one). Each file is written whole or not at all. Raises `ValueError`
        for an unknown ending.
        """
        places = numbered(path, len(self.images), "image", PICTURES)
        for place, image in zip(places, self.images, strict=True):
            save_picture(image, place)
        return places

    def sheet(self, columns: int | None = None, scale: int | None = None) -> Image.Image:
        """All pictures on one, each with its prompt below."""
        return grid(self.images, columns, self.prompts, scale)


@dataclass(frozen=True)
class TextOutput:
    """Texts, input by input and within an input number by number."""

    texts: list[str]
    tokens: list[Encoded]
    seed: int
    """What to pass as `seed` to get the same again."""

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write one text to `path`, several to numbered files beside it (`name-01.txt`), into a folder if it is one."""
        places = numbered(path, len(self.texts), "text", TEXTS)
        for place, text in zip(places, self.texts, strict=True):
            safe_io.write_text(place, text + "\n")
        return places


@dataclass(frozen=True)
class AudioOutput:
    """Sounds, text by text and within a text number by number."""

    audios: list[Samples]
    """float32 [samples] each, mono, full scale ±1."""
    sample_rate: int
    """Samples a second of all of them."""
    texts: list[str]
    """The text of each sound."""
    tokens: list[list[Encoded]]
    """Of each sound the items that it is made of: several, where a text was too long for one."""
    seed: int
    """What to pass as `seed` to get the same again."""

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write one sound to `path`, several to numbered files beside it (`name-01.wav`), into a folder if it is one.

        The format follows the ending: .wav (also without one) or .flac, 16 bits. Each file is written whole or not at
        all; a sound with peaks beyond full scale is made quieter as a whole, with a warning. Raises `ValueError` for an
        unknown ending, and for a sound without samples (before anything is written).
        """
        places = numbered(path, len(self.audios), "speech", SOUNDS)
        sounds = [Audio(np.asarray(audio), self.sample_rate) for audio in self.audios]
        for number, sound in enumerate(sounds, 1):
            if not len(sound.samples):
                raise ValueError(f"sound {number} of {len(sounds)} has no samples, so it can't be saved")
        for place, sound in zip(places, sounds, strict=True):
            save_audio(place, sound)
        return places


@dataclass(frozen=True)
class VideoOutput:
    """Clips, prompt by prompt and within a prompt number by number."""

    videos: list[Frames]
    """uint8 [T, H, W, 3] each: frames, rows, columns, red, green and blue."""
    fps: float
    """Frames a second of all of them."""
    captions: list[str]
    """The prompt of each clip."""
    tokens: list[Encoded]
    valid: list[bool]
    """Whether each decoded without repair."""
    reasons: list[str]
    """What was repaired, or ""."""
    seed: int
    """What to pass as `seed` to get the same again."""

    def save(self, path: str | os.PathLike[str], scale: int = 1) -> list[Path]:
        """Write one clip to `path`, several to numbered files beside it (`name-01.mp4`), into a folder if it is one.

        The format follows the ending, as of `mm.video.save_video`: .mp4 (plays in browsers), .webm, .gif, .apng, .webp, or .png
        for a contact sheet; without one .mp4, or .gif where FFmpeg isn't installed. `scale` enlarges each pixel to a square of
        so many. Each file is written whole or not at all. Raises `ValueError` for an unknown ending, and for what can't be
        written.
        """
        places = numbered(path, len(self.videos), "video", video_endings())
        for place, frames in zip(places, self.videos, strict=True):
            save_video(place, frames, self.fps, scale=scale)
        return places

    def sheet(self, columns: int = 8, scale: int | None = None) -> Image.Image:
        """All clips on one picture, a row each: up to `columns` frames, evenly spread, and the captions below."""
        return strips(self.videos, self.captions, columns, scale)


@dataclass(frozen=True)
class MeshOutput:
    """Shapes, prompt by prompt and within a prompt number by number."""

    meshes: list[Trimesh]
    """Closed surfaces in the unit cube, y up; without faces where nothing was made."""
    grids: list[Bool[np.ndarray, "N N N"]]
    """Which cells of the cube are inside, [x, y, z]."""
    captions: list[str]
    """The prompt of each shape, or the name of the file it was made from."""
    tokens: list[Encoded]
    valid: list[bool]
    """Whether each decoded without repair, and isn't empty."""
    reasons: list[str]
    """What was repaired or is missing, or ""."""
    seed: int
    """What to pass as `seed` to get the same again."""

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write one mesh to `path`, several to numbered files beside it (`name-01.glb`), into a folder if it is one.

        The format follows the ending: .glb (also without one), .obj, .stl, .ply, .off; .gif for a film once round the shape,
        .png for a picture. Each file is written whole or not at all. Raises `ValueError` for an unknown ending.
        """
        from mm.shape_files import save_mesh
        from mm.shape_views import turntable

        places = numbered(path, len(self.meshes), "shape", (*MESHES, *SHOWN))
        for place, mesh in zip(places, self.meshes, strict=True):
            match place.suffix.lower():
                case ".gif":
                    save_video(place, turntable(mesh), TURN_FPS)
                case ".png":
                    save_picture(portrait(mesh, 256), place)
                case _:
                    save_mesh(place, mesh)
        return places

    def sheet(self, columns: int | None = None, size: int = 128) -> Image.Image:
        """All shapes on one picture, each seen from the same side, with its caption below."""
        return grid([portrait(mesh, size) for mesh in self.meshes], columns, self.captions, 1)


def portrait(mesh: Trimesh, size: int) -> Image.Image:
    """A mesh seen from the front, a little from the right and from above."""
    from mm.shape_views import turntable

    return Image.fromarray(turntable(mesh, 1, size)[0])


@dataclass(frozen=True)
class AnyOutput:
    """Documents of text, pictures, sound, video, shapes and whatever else the model has: what was generated, without what was
    given."""

    documents: list[list[Any]]
    """Parts: `str`, `PIL.Image.Image`, `Audio`, `Video`, `Shape`, else what the tokenizer of the modality decodes to."""
    seed: int
    """What to pass as `seed` to get the same again."""

    @property
    def texts(self) -> list[str]:
        """All texts of all documents."""
        return [part for document in self.documents for part in document if isinstance(part, str)]

    @property
    def images(self) -> list[Image.Image]:
        """All pictures of all documents."""
        return [part for document in self.documents for part in document if isinstance(part, Image.Image)]

    @property
    def audios(self) -> list[Audio]:
        """All sounds of all documents."""
        return [part for document in self.documents for part in document if isinstance(part, Audio)]

    @property
    def videos(self) -> list[Video]:
        """All clips of all documents."""
        return [part for document in self.documents for part in document if isinstance(part, Video)]

    @property
    def meshes(self) -> list[Trimesh]:
        """The meshes of all shapes of all documents; without faces where a shape is empty."""
        return [part.mesh for document in self.documents for part in document if isinstance(part, Shape)]

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the parts as numbered files (`01-01.txt`, `01-02.png`, `01-03.wav`, `01-04.mp4`, `01-05.glb`) into the folder
        `path`. Raises `ValueError` for parts that are none of these, before anything is written."""
        from mm.shape_files import save_mesh

        folder = Path(path)
        if folder.is_file():
            raise ValueError(f"{str(path)!r} is a file; documents are saved into a folder")
        for part in (part for document in self.documents for part in document):
            if not isinstance(part, str | Image.Image | Audio | Video | Shape):
                raise ValueError(f"a part is a {type(part).__name__}, which has no file format here; save it by itself")
        folder.mkdir(parents=True, exist_ok=True)
        places = []
        for number, document in enumerate(self.documents, 1):
            for count, part in enumerate(document, 1):
                endings: dict[type, str] = {str: ".txt", Audio: ".wav", Video: video_endings()[0], Shape: ".glb"}
                place = folder / f"{number:02d}-{count:02d}{endings.get(type(part), '.png')}"
                if isinstance(part, str):
                    safe_io.write_text(place, part + "\n")
                elif isinstance(part, Audio):
                    save_audio(place, part)
                elif isinstance(part, Video):
                    save_video(place, part)
                elif isinstance(part, Shape):
                    save_mesh(place, part.mesh)
                else:
                    save_picture(part, place)
                places.append(place)
        return places


def video_endings() -> tuple[str, ...]:
    """Endings that clips can have, the usual one first."""
    return VIDEOS if has_av() else (".gif", *(ending for ending in VIDEOS if ending != ".gif"))


def numbered(path: str | os.PathLike[str], count: int, name: str, endings: Sequence[str]) -> list[Path]:
    """Where `count` results go. The first of `endings` is used where `path` has none."""
    place = Path(path)
    if place.is_dir() or os.fspath(path).endswith(("/", os.sep)):
        place = place / name
    # "v1.5" is a name, not an ending; whatever looks like one must be known
    if not place.suffix or place.suffix[1:].isdigit():
        place = place.with_name(place.name + endings[0])
    elif place.suffix.lower() not in endings:
        raise ValueError(f"can't write {str(path)!r}: unknown ending {place.suffix!r}; use one of {', '.join(endings)}")
    if count == 1:
        return [place]
    digits = max(2, len(str(count)))
    return [place.with_name(f"{place.stem}-{number:0{digits}d}{place.suffix}") for number in range(1, count + 1)]


def save_picture(image: Image.Image, path: Path) -> None:
    """Whole or not at all; the format follows the ending."""
    with safe_io.atomic_file(path) as temporary:
        image.save(temporary)
