"""What pipelines return: frozen records of plural lists that can save themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mm import safe_io
from mm.audio import WRITTEN, Audio, Samples, save_audio
from mm.interfaces import Encoded
from mm.sheet import grid

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXTS = (".txt", ".md")
SOUNDS = WRITTEN


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
class AnyOutput:
    """Documents of text, pictures and sound: what was generated, without what was given."""

    documents: list[list[str | Image.Image | Audio]]
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

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the parts as numbered files (`01-01.txt`, `01-02.png`, `01-03.wav`) into the folder `path`."""
        folder = Path(path)
        if folder.is_file():
            raise ValueError(f"{str(path)!r} is a file; documents are saved into a folder")
        folder.mkdir(parents=True, exist_ok=True)
        places = []
        for number, document in enumerate(self.documents, 1):
            for count, part in enumerate(document, 1):
                ending = ".txt" if isinstance(part, str) else ".wav" if isinstance(part, Audio) else ".png"
                place = folder / f"{number:02d}-{count:02d}{ending}"
                if isinstance(part, str):
                    safe_io.write_text(place, part + "\n")
                elif isinstance(part, Audio):
                    save_audio(place, part)
                else:
                    save_picture(part, place)
                places.append(place)
        return places


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
