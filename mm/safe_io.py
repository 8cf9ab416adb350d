"""Files: whole or not at all when written, bounded and inert when read.

Writers fill a temporary neighbour and rename it: a reader never sees half a file, and a failure leaves nothing behind.
Readers check sizes before they read, never unpickle, and stay inside the folder they were given. Every refusal is a
`ValueError` of one sentence.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PathLike = str | os.PathLike[str]

MAX_JSON = 1 << 24
"""Largest JSON file that is read (16 MiB)."""
MAX_TENSORS = 1 << 40
"""Largest tensor file that is read (1 TiB): it is mapped, not copied, so this bounds little more than mistakes."""
PICKLES = frozenset((".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pt2", ".pth"))
"""Endings of files that run code when they are loaded, or may."""
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Yields the path of a temporary neighbour to write; on success it replaces `path`, on failure it is removed.

    The temporary name keeps the ending, since many writers choose their format by it. Missing parent folders are made.

    Raises:
        ValueError: `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{str(target)!r} is a folder; give the name of a file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}.tmp{target.suffix}")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: PathLike, *, last: str | None = None) -> Iterator[Path]:
    """Yields a temporary folder to fill; on success it becomes `path`, on failure it is removed.

    A new or empty `path` appears in one rename. In a folder that already holds files, only files of the same names are
    replaced, one rename each, and others stay (they may be the user's). Then `last` names the file without which the
    folder is not a valid result (the JSON that describes it): it goes first and comes back last, so whoever reads
    in between is told that it is missing instead of getting a mixture.

    Raises:
        ValueError: `path` is a file, or `last` was not written.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{str(target)!r} is a file; give the name of a folder to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.absolute().with_name(f".{uuid.uuid4().hex[:12]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(p.relative_to(temporary) for p in temporary.rglob("*") if p.is_file())
        if last is not None and Path(last) not in files:
            raise ValueError(f"{last} was not written")
        for name in files:
            _to_disk(temporary / name)
        if not target.exists() or not any(target.iterdir()):
            # Windows can't rename onto a folder, not even an empty one.
            if target.exists():
                target.rmdir()
            os.replace(temporary, target)
            return
        if last is not None:
            (target / last).unlink(missing_ok=True)
        for name in sorted(files, key=lambda n: n == Path(last or "")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, target / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: PathLike, text: str) -> None:
    """UTF-8, line ends as they are."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: PathLike, value: Mapping[str, Any]) -> None:
    """Indented JSON. Raises `ValueError` or `TypeError` for what JSON has no word for (NaN, tensors)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file. Tensors may be on any device and share memory (each is then stored by itself)."""
    from safetensors.torch import save_file

    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(owned, temporary, dict(metadata or {}))


def _to_disk(path: Path) -> None:
    """After a rename the content must not be lost in a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


# --- reading --------------------------------------------------------------------------------------------------------


def inside(folder: PathLike, name: str) -> Path:
    """The path of `name` in `folder`, for names that come from a file or a request. Need not exist.

    Links may not lead out of the folder, except from a snapshot of the Hugging Face cache to the blobs beside it.

    Raises:
        ValueError: the name is empty, absolute, climbs out, or is a link that leads out or in a circle.
    """
    parts = [*PurePosixPath(name).parts, *PureWindowsPath(name).parts]
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or PureWindowsPath(name).root
    if not name or absolute or ".." in parts or any(ord(c) < 32 for c in name):
        raise ValueError(f"the name {name!r} does not stay inside its folder; use a plain relative name")
    try:
        root = Path(folder).resolve()
        path = root / name
        real = path.resolve()
    except (RuntimeError, OSError) as error:  # Python 3.11 raises RuntimeError for links in a circle
        raise ValueError(
            f"{name!r} in {str(folder)!r} is a link that leads in a circle; replace it by the file"
        ) from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(top) for top in allowed):
        raise ValueError(f"{name!r} is a link that leads out of its folder {str(root)!r}; replace it by the file")
    return path


def refuse_pickle(path: PathLike) -> None:
    """Raises `ValueError` for a file that would have to be unpickled, by its name; the file need not exist."""
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path.name!r} is a pickle, which can run any code when it is loaded; "
            "convert it to .safetensors where you trust it"
        )


def read_bytes(path: PathLike, *, max_bytes: int) -> bytes:
    """A file of at most `max_bytes`. Raises `ValueError`: missing, not a file, larger, unreadable."""
    path = _file(path)
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{str(path)!r} can't be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise ValueError(f"{str(path)!r} is larger than the {max_bytes:,} bytes expected of it; is it the right file?")
    return data


def read_json(path: PathLike, *, max_bytes: int = MAX_JSON) -> dict[str, Any]:
    """The object of a JSON file. Raises `ValueError`: as `read_bytes`, or not a JSON object."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    data = read_bytes(path, max_bytes=max_bytes)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{str(path)!r} is not a JSON file: {detail}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds a JSON {type(value).__name__}, expected an object {{...}}")
    return value


def read_tensors(
    path: PathLike, expected: Mapping[str, Tensor] | None = None, *, prefix: str = "", max_bytes: int = MAX_TENSORS
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        path: the file.
        expected: names with tensors of the right shape and dtype (a `state_dict()`, meta tensors will do), see
            `fit_tensors`. Names and shapes are checked against the header, before any tensor is read.
        prefix: only names that begin so are read; it is taken off.
        max_bytes: largest file.

    Raises:
        ValueError: missing, a pickle, too large, damaged, or not what is expected.
    """
    from safetensors import SafetensorError, safe_open

    refuse_pickle(path)
    path = _file(path)
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{str(path)!r} is larger than {max_bytes:,} bytes; is it the right file?")
    with path.open("rb") as head:
        start = head.read(9)
    # A safetensors file is the length of its header in eight bytes, and then the header, which is a JSON object.
    if start[8:] != b"{" and start.startswith(PICKLE_STARTS):
        raise ValueError(f"{str(path)!r} is a pickle under another name; it is not loaded, since that can run any code")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            if expected is not None:
                shapes = {name[len(prefix) :]: tuple(file.get_slice(name).get_shape()) for name in names}
                _check_shapes(repr(str(path)), shapes, expected)
            tensors = {name[len(prefix) :]: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, AttributeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is damaged or not a safetensors file: {error}") from error
    return tensors if expected is None else fit_tensors(repr(str(path)), tensors, expected)


def check_finite(path: PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` naming a tensor of the file that holds infinities or NaN: no weights do."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{str(path)!r}: {name} holds values that are not finite; the file is damaged")


def fit_tensors(what: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the dtypes of `expected`. Names and shapes must agree; floating-point dtypes are converted.

    Raises:
        ValueError: beginning with `what`, naming the tensor that does not fit.
    """
    _check_shapes(what, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    out = {}
    for name, want in expected.items():
        have = tensors[name]
        if have.dtype != want.dtype and not (have.is_floating_point() and want.is_floating_point()):
            raise ValueError(
                f"{what}: {name} has dtype {have.dtype}, expected {want.dtype}; is it the right checkpoint?"
            )
        out[name] = have.to(want.dtype)
    return out


def _check_shapes(what: str, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in shapes]
    unknown = [name for name in shapes if name not in expected]
    if missing or unknown:
        parts = [f"lacks {_some(missing)}" if missing else "", f"has {_some(unknown)} too many" if unknown else ""]
        raise ValueError(f"{what} {' and '.join(filter(None, parts))}; it belongs to another configuration")
    for name, want in expected.items():
        if shapes[name] != tuple(want.shape):
            raise ValueError(
                f"{what}: {name} has shape {shapes[name]}, expected {tuple(want.shape)}; "
                "it belongs to another configuration"
            )


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _file(path: PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is {'not a file' if path.exists() else 'missing'}; give the path of a file")
    return path
