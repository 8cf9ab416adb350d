"""WebDataset shards on this machine, with random access.

Files are taken to come from strangers: nothing is extracted or unpickled, every read is bounded, and no path given
*inside* a file may lead out of its folder. What can't be used is skipped with one counted warning (`strict` raises).
"""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from mm.data.example import BrokenExample, Lazy, Source, digest
from mm.data.media import Decoding, decoding_of, is_picture, is_shape, is_sound, is_video, medium

MAX_MEMBER_BYTES = 1 << 28
"""Largest member, picture, video or row that is read (256 MiB)."""
MAX_TEXT_BYTES = 1 << 24
"""Largest caption or JSON record that is read (16 MiB)."""
MAX_SKIPPED_BYTES = 1 << 50
"""Largest member that a header may claim, read or not (1 PiB)."""
COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")
"""First two bytes of gzip, bzip2, xz and zstandard files."""
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)
"""What reading the headers of a damaged tar file raises."""


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's grouping: (key, suffix), cut at the first dot of the base name; None for names it leaves out."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or name.startswith("__"):
        return None
    return folder + slash + stem, suffix.lower()


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises `BrokenExample` for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenExample(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BrokenExample(f"{where} holds a JSON {type(value).__name__}; it needs an object")
    return value


def member_problem(info: tarfile.TarInfo, twice: bool, limit: int) -> str:
    """Why a member can't be used; empty if it can."""
    if twice:
        return f"{info.name} occurs twice in one example"
    if info.issparse() or info.size > limit:
        return f"{info.name} has {info.size:,} bytes; at most {limit:,} are read"
    return ""


def fields_of_members(
    suffixes: Sequence[str], read: Callable[[int], bytes], where: str, decoding: Decoding
) -> dict[str, Any]:
    """Fields of one WebDataset sample: JSON merged, `.txt` as `caption`, the first picture as `image`, the first sound as
    `audio`, the first video as `video`, other such files decoded and everything else as bytes under its suffix. Reads and
    decodes only what is asked for, JSON excepted."""
    fields: dict[str, Any] = {}
    if "json" in suffixes:  # first, so that its fields never hide a picture, a sound or a video
        fields |= parse_json(read(suffixes.index("json")), f"{where}.json")
    for number, suffix in enumerate(suffixes):
        if suffix == "json":
            continue
        if suffix == "txt":
            fields.setdefault("caption", Lazy(partial(_read_text, read, number)))
        elif field := medium(suffix):
            lazy = Lazy(partial(_read_medium, read, number, field, f"{where}.{suffix}", decoding))
            fields[field if not isinstance(fields.get(field), Lazy) else suffix] = lazy
        else:
            fields[suffix] = Lazy(partial(read, number))
    return fields


def _read_text(read: Callable[[int], bytes], number: int) -> str:
    return read(number).decode("utf-8", "replace").strip()


def _read_medium(read: Callable[[int], bytes], number: int, field: str, where: str, decoding: Decoding) -> Any:
    return decoding.decode(field, read(number), where)


class _Files:
    """Reads slices of many files, safe in threads and after a fork (`pread` has no shared offset)."""

    def __init__(self, paths: Sequence[Path], keep_open: int = 64) -> None:
        self.paths, self.keep_open = paths, keep_open
        self.open: OrderedDict[int, IO[bytes]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "keep_open": self.keep_open, "open": OrderedDict()}

    def __del__(self) -> None:
        for file in self.open.values():
            file.close()

    def read(self, number: int, offset: int, size: int) -> bytes:
        file = self.open.pop(number, None) or self.paths[number].open("rb", buffering=0)
        self.open[number] = file
        if len(self.open) > self.keep_open:
            self.open.popitem(last=False)[1].close()
        if hasattr(os, "pread"):
            data = os.pread(file.fileno(), size, offset)
        else:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise BrokenExample(f"{self.paths[number].name} ends after {offset + len(data)} bytes, inside a member")
        return data


class BoundedInfo(tarfile.TarInfo):
    """A tar header that refuses name and attribute blocks which would fill the memory (tarfile reads them whole), and
    members so large that skipping them in a stream would never end."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if not self.isreg() and not self.isdir() and self.size > 1 << 20:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        member = super()._proc_member(tar)  # type: ignore[misc]
        if member.size > MAX_SKIPPED_BYTES:  # after the call, since an attribute block may give the size as well
            raise tarfile.ReadError(f"a member of {member.size:,} bytes; at most {MAX_SKIPPED_BYTES:,} make sense")
        return member


def tar_members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Members of an uncompressed tar file in file order. `file` may be moved between them.

    Raises one of `TAR_ERRORS` where the file is damaged, after it has given what comes before.
    """
    length, position = file.seek(0, os.SEEK_END), -1
    file.seek(0)
    tar = tarfile.TarFile(fileobj=file, mode="r", tarinfo=BoundedInfo)
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        if info.size < 0 or info.offset <= position:
            raise tarfile.ReadError(f"member {info.name!r} has an impossible size or place")
        position = info.offset
        if info.offset_data + info.size > length:
            raise tarfile.ReadError(f"member {info.name!r} is cut off")
        yield info
    file.seek(tar.offset)  # tarfile takes a damaged header for the end; the real end is a block of zeros
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"neither a header nor an end mark at byte {tar.offset}")


class ShardSource(Source):
    """Examples of local, uncompressed WebDataset tar files, indexed once (headers only) and read by offset.

    Consecutive members with one stem are one example, as in `webdataset`; see `fields_of_members` for its fields.
    """

    def __init__(
        self, paths: Sequence[str | Path] | str | Path, *, max_member_bytes: int = MAX_MEMBER_BYTES, **options: Any
    ) -> None:
        super().__init__(**options)
        given = [paths] if isinstance(paths, str | Path) else list(paths)
        self.paths = [Path(path) for path in given]
        self.max_member_bytes = max_member_bytes
        self._files = _Files(self.paths)
        self._suffixes: list[str] = []
        self._shard, self._first, self._count = array("i"), array("q"), array("i")
        self._offset, self._size, self._suffix = array("q"), array("q"), array("i")
        keys: list[str] = []
        for number, path in enumerate(self.paths):
            self._index(number, path, keys)
        names = ", ".join(path.name for path in self.paths[:3]) + (", …" if len(self.paths) > 3 else "")
        self._finish(keys, f"shards {names}" if len(self.paths) != 1 else f"shard {names}")

    def _index(self, number: int, path: Path, keys: list[str]) -> None:
        if not path.is_file():
            raise ValueError(f"shard {str(path)!r} is missing; give paths of local .tar files")
        members: dict[str, tuple[int, int]] = {}
        current: str | None = None
        spoiled = False
        suffix_ids = {suffix: i for i, suffix in enumerate(self._suffixes)}

        def close() -> None:
            if current is None or spoiled or not members:
                members.clear()
                return
            keys.append(current)
            self._shard.append(number)
            self._first.append(len(self._offset))
            self._count.append(len(members))
            for suffix, (offset, size) in members.items():
                if suffix not in suffix_ids:
                    suffix_ids[suffix] = len(self._suffixes)
                    self._suffixes.append(suffix)
                self._suffix.append(suffix_ids[suffix])
                self._offset.append(offset)
                self._size.append(size)
            members.clear()

        with path.open("rb") as file:
            if file.read(2) in COMPRESSED:
                raise ValueError(
                    f"shard {path.name} is compressed, so it has no random access; unpack it to a plain .tar, or use "
                    "StreamingShards"
                )
            for info in self._members(file, path):
                if info is None:  # damage: the example before it may lack members
                    spoiled = True
                    continue
                split = split_name(info.name)
                if split is None or not info.isreg():
                    continue
                key, suffix = split
                if key != current:
                    close()
                    current, spoiled = key, False
                if problem := member_problem(info, suffix in members, self.max_member_bytes):
                    self._bad(f"{path.name}: {problem}")
                    spoiled = True
                members[suffix] = (info.offset_data, info.size)
        close()

    def _members(self, file: IO[bytes], path: Path) -> Iterator[tarfile.TarInfo | None]:
        """Members in file order. Damage ends the shard: it is counted as one broken member, and None comes last."""
        try:
            yield from tar_members(file)
        except TAR_ERRORS as error:
            self._bad(f"shard {path.name} is damaged, its rest is left out: {error}")
            yield None

    @property
    def identity(self) -> str:
        tables = (self._first, self._count, self._offset, self._size, self._suffix)
        return digest(
            "shards",
            *(str(path.stat().st_size) for path in self.paths),
            *(sample_bytes(path) for path in self.paths),
            *self._keys,
            *(table.tobytes() for table in tables),
        )

    def _members_of(self, ordinal: int) -> tuple[list[str], Callable[[int], bytes], str]:
        first, shard = self._first[ordinal], self._shard[ordinal]
        suffixes = [self._suffixes[self._suffix[first + n]] for n in range(self._count[ordinal])]

        def read(number: int) -> bytes:
            size = self._size[first + number]
            if suffixes[number] in ("json", "txt") and size > MAX_TEXT_BYTES:
                raise BrokenExample(f"{self._keys[ordinal]}.{suffixes[number]} has {size:,} bytes of text")
            return self._files.read(shard, self._offset[first + number], size)

        return suffixes, read, f"{self.paths[shard].name}: {self._keys[ordinal]}"

    def _fields(self, ordinal: int) -> dict[str, Any]:
        return fields_of_members(*self._members_of(ordinal), decoding_of(self))

    def raw_picture(self, index: int) -> bytes | Any:
        return self._first_of(index, is_picture)

    def raw_sound(self, index: int) -> bytes | Any:
        return self._first_of(index, is_sound)

    def raw_video(self, index: int) -> bytes | Any:
        return self._first_of(index, is_video)

    def raw_shape(self, index: int) -> bytes | Any:
        return self._first_of(index, is_shape)

    def _first_of(self, index: int, wanted: Callable[[str], bool]) -> bytes | None:
        suffixes, read, _ = self._members_of(self.ordinals[index])
        return next((read(number) for number, suffix in enumerate(suffixes) if wanted(suffix)), None)


def sample_bytes(path: Path, blocks: int = 16, size: int = 4096) -> bytes:
    """Evenly spread blocks of a file: an edit that keeps every size is still likely to show in `identity`."""
    length = path.stat().st_size
    with path.open("rb") as file:
        out = []
        for number in range(blocks):
            file.seek(max(0, length - size) * number // max(1, blocks - 1))
            out.append(file.read(size))
    return b"".join(out)
