"""Files from strangers, opened: a path, bytes or an open file as one thing to read from, of bounded size."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

FileSource = str | os.PathLike[str] | bytes | IO[bytes]
"""A path, the bytes of a file, or an open binary file."""


class Said(NamedTuple):
    """What messages say."""

    noun: str
    files: str
    """What a path has to lead to."""
    taken: str
    """What may be given."""


@contextmanager
def opened(source: Any, name: str, said: Said, max_bytes: int) -> Iterator[IO[bytes]]:
    """The file, at its beginning. `name` is what messages call this one.

    Raises:
        ValueError: missing, empty, larger than `max_bytes`, or no file at all.
    """
    if isinstance(source, str | os.PathLike):
        if not os.path.isfile(source):  # opening a pipe would wait for its writer for ever
            problem = "not a file" if os.path.exists(source) else "missing"  # of names that are too long too
            problem = "a folder, not a file" if os.path.isdir(source) else problem
            raise ValueError(f"{name} is {problem}; give the path of {said.files}")
        try:
            found = open(source, "rb")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise ValueError(f"{name} can't be read: {error.strerror or error}") from error
        with found as file:
            _check_size(name, os.fstat(file.fileno()).st_size, max_bytes)
            yield file
        return
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif hasattr(source, "read"):
        data = source.read(max_bytes + 1)
        if not isinstance(data, bytes):
            raise ValueError(f"the {said.noun} comes from a file opened as text; open it in binary mode ('rb')")
    else:
        raise ValueError(f"got a {type(source).__name__} for a {said.noun}; give {said.taken}")
    _check_size(name, len(data), max_bytes)
    yield io.BytesIO(data)


def content(source: Any, name: str, said: Said, max_bytes: int) -> bytes:
    """All of the file. Raises as `opened`."""
    with opened(source, name, said, max_bytes) as file:
        return file.read(max_bytes)


def _check_size(name: str, size: int, max_bytes: int) -> None:
    if not size:
        raise ValueError(f"{name} is an empty file")
    if size > max_bytes:
        raise ValueError(f"{name} is larger than {max_bytes:,} bytes; give a smaller file or raise max_bytes")
