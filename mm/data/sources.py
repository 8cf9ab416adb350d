"""Random-access sources: folders, Hugging Face `datasets` directories, digits in one `.npz`; shards are in `shards`.

Files are taken to come from strangers: nothing is unpickled, every read is bounded, and no path given *inside* a file
may lead out of its folder. What can't be used is skipped with one counted warning (`strict` raises).
"""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm.audio import EXTENSIONS, READ
from mm.data.example import LOADED, BrokenExample, Lazy, Source, digest
from mm.data.media import decoding_of, medium
from mm.data.shards import (
    MAX_MEMBER_BYTES,
    MAX_TEXT_BYTES,
    ShardSource,
    parse_json,
    sample_bytes,
)
from mm.safe_io import read_bytes

__all__ = ["DigitsSource", "FolderSource", "HFSource", "ShardSource"]

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OTHER_SOUNDS = tuple(f".{name}" for name in sorted(READ - EXTENSIONS - {"mp4", "webm"}))
"""Endings of sounds that folders don't take; the two that are left out here may be films."""
MAX_DIGIT_SIZE = 512
"""Largest side of a picture of a digit: beyond, a mistyped size would fill the memory."""


class FolderSource(Source):
    """Pictures, sounds, videos and shapes anywhere under a folder; `NAME.wav` beside `NAME.png` belongs to the same example, and
    so does `NAME.mp4` or `NAME.video.gif` (an animation that isn't called so is taken for a picture). Fields come from
    `NAME.json` and `NAME.txt` (as `caption`) beside them, and from the row of `metadata.jsonl` whose `file_name` names them
    (relative to where `metadata.jsonl` lies).
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        super().__init__(**options)
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(
                f"folder {str(path)!r} is missing or not a folder; give a folder with pictures, sounds, videos or shapes"
            )
        self._root = self.path.resolve()
        self._rows: dict[str, dict[str, Any]] = {}
        self._names: list[str] = []
        self._beside: dict[str, str] = {}
        self._more: dict[str, dict[str, str]] = {}
        """Example (by its first file, which stands in `_names`) → field → further file."""
        found: dict[str, list[str]] = {field: [] for field in LOADED}
        others: list[str] = []
        for folder, folders, files in os.walk(self.path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            place = Path(folder).relative_to(self.path)
            for name in sorted(files):
                if name == "metadata.jsonl":
                    self._read_rows(place)
                elif name.startswith("."):
                    continue
                elif field := medium(name.lower()):
                    found[field].append((place / name).as_posix())
                elif name.lower().endswith((".txt", ".json")):
                    stem, _, suffix = name.rpartition(".")
                    # Where a.txt and a.TXT both lie there, the one in lower case, which comes last, counts.
                    self._beside[f"{(place / stem).as_posix()}.{suffix.lower()}"] = (place / name).as_posix()
                elif name.lower().endswith(OTHER_SOUNDS):
                    others.append((place / name).as_posix())
        if others:
            warnings.warn(
                f"folder {self.path.name!r}: left out {len(others)} sounds of other kinds, the first is {others[0]!r}; convert "
                f"them to one of {', '.join(sorted(EXTENSIONS))}",
                stacklevel=2,
            )
        self._join(found)
        for name in sorted(set(self._rows).difference(*found.values())):
            self._bad(
                f"metadata.jsonl names {name!r}, which is not a picture, a sound or a video, nor a shape, in the folder"
            )
        self._finish([_stem(name) for name in self._names], f"folder {self.path.name!r}")

    def _join(self, found: dict[str, list[str]]) -> None:
        """Files of one name are one example: that of the picture, else of the video, else of the shape. A second file of a kind,
        and a sound without these, is an example of its own."""
        first: dict[str, str] = {}
        for field in ("image", "video", "shape", "audio"):
            for name in sorted(found[field]):
                example = first.get(_stem(name), name)
                if example == name or field in self._files_of(example):
                    self._names.append(name)
                    if field != "audio":
                        first.setdefault(_stem(name), name)
                else:
                    self._more.setdefault(example, {})[field] = name
        self._names.sort()

    def _files_of(self, name: str) -> dict[str, str]:
        """Field → file of an example."""
        return {medium(name.lower()): name, **self._more.get(name, {})}

    def _read_rows(self, place: Path) -> None:
        with self._file((place / "metadata.jsonl").as_posix()).open("rb") as file:
            number = 0
            while line := file.readline(MAX_TEXT_BYTES):
                number += 1
                where = f"{(place / 'metadata.jsonl').as_posix()} line {number}"
                if not line.strip():
                    continue
                try:
                    row = parse_json(line, where)
                    if not isinstance(name := row.pop("file_name", None), str):
                        raise BrokenExample(f"{where} has no file_name")
                except BrokenExample as error:
                    self._bad(str(error))
                else:
                    self._rows[os.path.normpath((place / name).as_posix()).replace(os.sep, "/")] = row

    def _inside(self, name: str) -> Path:
        """The file's real path; a link that leads out of the folder is refused."""
        try:
            path = (self.path / name).resolve()
        except (RuntimeError, OSError) as error:  # Python 3.11 raises RuntimeError for links in a circle
            raise BrokenExample(f"{name!r} is a link that leads in a circle") from error
        if not path.is_relative_to(self._root):
            raise BrokenExample(f"{name!r} is a link that leads out of the folder")
        return path

    def _file(self, name: str) -> Path:
        """As `_inside`, but what exists must be a file: opening a pipe would wait for its writer for ever."""
        path = self._inside(name)
        if path.exists() and not path.is_file():
            raise BrokenExample(f"{name!r} is not a file")
        return path

    def _read(self, name: str, limit: int) -> bytes:
        try:
            with self._file(name).open("rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise BrokenExample(f"{name!r} can't be read: {error.strerror or error}") from error
        if len(data) > limit:
            raise BrokenExample(f"{name!r} is larger than {limit:,} bytes")
        return data

    @property
    def identity(self) -> str:
        names = sorted(file for name in self._names for file in self._files_of(name).values())
        files = [(name, self.path / name) for name in names]
        sizes = [f"{name} {path.stat().st_size if path.is_file() else -1}" for name, path in files]
        spread = files[:: max(1, len(files) // 64)]
        return digest("folder", *sizes, *(sample_bytes(path, blocks=2) for _, path in spread if path.is_file()))

    def _fields(self, ordinal: int) -> dict[str, Any]:
        name = self._names[ordinal]
        stem = _stem(name)
        fields: dict[str, Any] = {}
        if beside := self._beside.get(f"{stem}.txt"):
            fields["caption"] = self._read(beside, MAX_TEXT_BYTES).decode("utf-8", "replace").strip()
        if beside := self._beside.get(f"{stem}.json"):
            fields |= parse_json(self._read(beside, MAX_TEXT_BYTES), beside)
        files = self._files_of(name)
        for file in files.values():
            fields |= self._rows.get(file, {})
        for field, file in files.items():
            fields[field] = Lazy(partial(self._decode, field, file))
        return fields

    def _decode(self, field: str, name: str) -> Any:
        return decoding_of(self).decode(field, self._read(name, MAX_MEMBER_BYTES), name)

    def raw_picture(self, index: int) -> bytes | Any:
        return self._raw(index, "image")

    def raw_sound(self, index: int) -> bytes | Any:
        return self._raw(index, "audio")

    def raw_video(self, index: int) -> bytes | Any:
        return self._raw(index, "video")

    def raw_shape(self, index: int) -> bytes | Any:
        return self._raw(index, "shape")

    def _raw(self, index: int, field: str) -> bytes | None:
        name = self._files_of(self._names[self.ordinals[index]]).get(field)
        return None if name is None else self._read(name, MAX_MEMBER_BYTES)


def _stem(name: str) -> str:
    path, marked = Path(name).with_suffix(""), (".video", ".shape")
    return (
        path.with_suffix("") if path.suffix.lower() in marked and medium(name.lower()) in LOADED else path
    ).as_posix()


class HFSource(Source):
    """A directory written by `datasets.Dataset.save_to_disk` (or one `subset` of a saved `DatasetDict`).

    `image` is the first picture column, `audio` the first sound column, and `video` the first video column; a column named
    `key`, `id` or `__key__` gives the key, else the row number.
    """

    def __init__(self, path: str | Path, subset: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        try:
            import datasets
        except ImportError as error:
            raise ValueError("HFSource needs the package 'datasets'; install it with: pip install datasets") from error
        self.path = Path(path)
        if (self.path / "dataset_dict.json").is_file():
            splits = self._json("dataset_dict.json").get("splits", [])
            if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
                raise ValueError(f"dataset_dict.json of {self.path.name!r} is damaged: its splits are no list of names")
            if subset not in splits or Path(str(subset)).name != subset:
                raise ValueError(f"{self.path.name!r} holds the subsets {splits}; name one of them, got {subset!r}")
            self.path /= subset
        elif subset is not None:
            raise ValueError(f"{self.path.name!r} holds one data set without subsets; leave subset out, got {subset!r}")
        self._check_files()
        try:
            rows = datasets.load_from_disk(str(self.path)).with_format(None)
        except Exception as error:  # arrow raises types of its own
            raise ValueError(f"{self.path.name!r} is damaged: {error}") from error
        kinds = {"image": datasets.Image, "audio": datasets.Audio, "video": datasets.Video}
        self._columns = {
            field: [name for name, of in rows.features.items() if isinstance(of, kind)] for field, kind in kinds.items()
        }
        self._media = [name for names in self._columns.values() for name in names]
        for name in self._media:
            rows = rows.cast_column(name, type(rows.features[name])(decode=False))
        self._rows = rows
        named = next((name for name in ("key", "id", "__key__") if name in rows.features), None)
        width = len(str(len(rows)))
        keys = [str(key) for key in rows[named]] if named else [f"{row:0{width}}" for row in range(len(rows))]
        self._finish(keys, f"data set {self.path.name!r}")

    def _check_files(self) -> None:
        """`load_from_disk` would follow any path that state.json names; only files of the directory are wanted."""
        state = self.path / "state.json"
        if not state.is_file():
            raise ValueError(f"{str(self.path)!r} is not a data set saved with save_to_disk: it has no state.json")
        named = self._json("state.json").get("_data_files") or []
        if not isinstance(named, list):
            raise ValueError(f"state.json of {self.path.name!r} is damaged: its _data_files are no list")
        if (self.path / "dataset_info.json").is_file():  # `load_from_disk` reads all of it
            self._json("dataset_info.json")
        names = [entry.get("filename") if isinstance(entry, dict) else None for entry in named]
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (self.path / name).is_file():
                raise ValueError(f"state.json of {self.path.name!r} names {name!r}, which is not a file beside it")

    def _json(self, name: str) -> dict[str, Any]:
        return parse_json(read_bytes(self.path / name, max_bytes=MAX_TEXT_BYTES), name)

    @property
    def identity(self) -> str:
        files = sorted(self.path.glob("*.arrow"))
        return digest("datasets", *(f"{file.name} {file.stat().st_size}" for file in files), *map(sample_bytes, files))

    def _fields(self, ordinal: int) -> dict[str, Any]:
        try:
            fields: dict[str, Any] = dict(self._rows[ordinal])
        except Exception as error:
            raise BrokenExample(f"row {ordinal} of {self.what} can't be read: {error}") from error
        stored = {name: fields.pop(name) for name in self._media}
        for field, columns in self._columns.items():
            for name in columns:
                if stored[name] is not None:
                    lazy = Lazy(partial(self._decode, field, stored[name], f"row {ordinal}, {name}"))
                    fields[field if name == columns[0] else name] = lazy
        return fields

    def _facts(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Of the columns that are asked for, so that nothing is decoded."""
        known = [n for n in names if n in self._rows.features and n not in self._media]
        for row in self._rows.select_columns(known) if known else [{}] * self.total:
            yield dict(row)

    def _decode(self, field: str, stored: dict[str, Any], where: str) -> Any:
        if not stored.get("bytes"):
            what = {"image": "picture", "audio": "sound", "video": "video"}[field]
            raise BrokenExample(f"{where} names a file instead of holding the {what}; save it with embedded {what}s")
        return decoding_of(self).decode(field, stored["bytes"], where)

    def raw_picture(self, index: int) -> bytes | Any:
        return self._raw(index, "image")

    def raw_sound(self, index: int) -> bytes | Any:
        return self._raw(index, "audio")

    def raw_video(self, index: int) -> bytes | Any:
        return self._raw(index, "video")

    def _raw(self, index: int, field: str) -> bytes | None:
        if not self._columns[field]:
            return None
        stored = self._rows[self.ordinals[index]][self._columns[field][0]]
        return stored["bytes"] if stored else None


class DigitsSource(Source):
    """Handwritten digits from one `.npz` with `images` uint8[n, h, w] (bright ink on black) and `labels` [n].

    Pictures come out as dark ink on white, centred on a `size`×`size` square; `caption` is "handwritten digit seven".
    """

    def __init__(self, path: str | Path, size: int = 32, **options: Any) -> None:
        super().__init__(**options)
        if not 1 <= size <= MAX_DIGIT_SIZE:
            raise ValueError(f"digits are drawn with size 1 to {MAX_DIGIT_SIZE}, got {size}")
        arrays = load_arrays(Path(path), ("images", "labels"))
        images, labels = arrays["images"], arrays["labels"]
        fits = images.ndim == 3 and images.dtype == "uint8" and labels.shape == images.shape[:1]
        if not fits or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{Path(path).name!r} has images {images.dtype}{list(images.shape)} and labels {labels.dtype}"
                f"{list(labels.shape)}; expected images uint8[n, h, w] and labels of integers [n]"
            )
        if max(images.shape[1:]) > size:
            raise ValueError(f"digits of {images.shape[1]}×{images.shape[2]} don't fit into size {size}; raise size")
        self.size, self._images, self._labels = size, images, labels
        for row in ((labels < 0) | (labels > 9)).nonzero()[0][:1]:
            raise ValueError(f"{Path(path).name!r} has label {labels[row]} at row {row}; digits are 0 to 9")
        width = len(str(len(images)))
        self._finish([f"{row:0{width}}" for row in range(len(images))], f"digits {Path(path).name!r}")

    @property
    def identity(self) -> str:
        return digest("digits", str(self.size), self._images.tobytes(), self._labels.tobytes())

    def _fields(self, ordinal: int) -> dict[str, Any]:
        digit = int(self._labels[ordinal])
        name = DIGIT_NAMES[digit]
        return {
            "image": Lazy(lambda: self._draw(ordinal)),
            "digit": digit,
            "name": name,
            "caption": f"handwritten digit {name}",
        }

    def _draw(self, ordinal: int) -> Any:
        import numpy as np
        from PIL import Image

        ink = self._images[ordinal]
        paper = np.full((self.size, self.size), 255, np.uint8)
        top, left = (self.size - ink.shape[0]) // 2, (self.size - ink.shape[1]) // 2
        paper[top : top + ink.shape[0], left : left + ink.shape[1]] -= ink
        return Image.fromarray(paper).convert("RGB")


def load_arrays(
    path: Path, names: tuple[str, ...], max_bytes: int = 1 << 31, max_rows: int | None = None
) -> dict[str, Any]:
    """Named arrays of an `.npz`, never unpickled. Sizes are checked against the headers before memory is taken:
    `max_bytes` of each array, and `max_rows` of its first axis.

    Raises `ValueError` for a missing, damaged or oversized file or a missing array.
    """
    import numpy as np

    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing; give the path of an .npz file")
    out = {}
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            for name in names:
                member = f"{name}.npy"
                if member not in sizes:
                    raise ValueError(f"it has no array {name!r}, but {sorted(sizes)}")
                if sizes[member] > max_bytes:
                    raise ValueError(f"array {name!r} has {sizes[member]:,} bytes; at most {max_bytes:,} are read")
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    one = version == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
                    shape, columns_first, dtype = read(file)
                    size = math.prod(shape) * dtype.itemsize
                    if max_rows is not None and shape and shape[0] > max_rows:
                        raise ValueError(f"array {name!r} has {shape[0]:,} rows; at most {max_rows:,} are read")
                    fits = not dtype.hasobject and size == sizes[member] - file.tell()
                    data = file.read() if fits else b""
                if not fits or len(data) != size:
                    raise ValueError(f"array {name!r} doesn't hold the {dtype}{list(shape)} that its header promises")
                array = np.frombuffer(data, dtype) if size else np.zeros(0, dtype)
                out[name] = array.reshape(shape, order="F" if columns_first else "C")
    except Exception as error:  # a stranger's bytes may raise anything in the unpackers
        raise ValueError(f"{path.name!r} can't be used as an .npz file: {error}") from error
    return out
