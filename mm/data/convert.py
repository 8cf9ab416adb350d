"""Making and converting data sets: what `mm data` calls. Everything is written as WebDataset shards."""

from __future__ import annotations

import io
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from mm import shape_files, video_files
from mm.audio import Audio, to_wav
from mm.audio_files import file_kind
from mm.data.example import LOADED, BrokenExample, Lazy, Source, warn_skipped
from mm.data.media import decoding_of, is_sound, is_video
from mm.data.sources import DIGIT_NAMES, MAX_DIGIT_SIZE, DigitsSource
from mm.safe_io import atomic_file
from mm.shapes import Shape, to_npz
from mm.video import Video, to_webp

AnySource = TypeVar("AnySource", bound=Source)
Progress = Callable[[int, int], None]
Entry = tuple[str, dict[str, bytes]]
"""One example of a shard: key, and suffix → member."""


def write_shards(
    entries: Iterator[Entry], out: str | Path, *, prefix: str = "data", per_shard: int = 10_000
) -> list[Path]:
    """Write examples to `out`/`prefix`-000000.tar and so on; returns the paths. The bytes depend on the entries alone.

    Keys are cleaned so that other tools group and extract the files safely. The shards come into the folder once all
    are written; older ones of the same names are replaced. Raises `ValueError` if there is no entry, or if older shards
    would stay beside the new ones.
    """
    if per_shard < 1:
        raise ValueError(f"a shard needs at least one example, got per_shard {per_shard}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give the name of a folder to write")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder) as temporary:
        written = _write(entries, Path(temporary), prefix, per_shard)
        names = {path.name for path in written}
        pattern = re.compile(rf"{re.escape(prefix)}-\d{{6}}\.tar")
        older = sorted(p.name for p in folder.iterdir() if pattern.fullmatch(p.name) and p.name not in names)
        if older:  # they may be somebody's only copy, so they aren't removed here
            raise ValueError(
                f"{str(folder)!r} holds {older[0]} (older shards: {len(older)}), which would mix with the "
                f"{len(written)} new ones; remove the older ones or give another folder; nothing was written"
            )
        return [path.replace(folder / path.name) for path in written]


def _write(entries: Iterator[Entry], folder: Path, prefix: str, per_shard: int) -> list[Path]:
    paths: list[Path] = []
    entry = next(entries, None)
    while entry is not None:
        path = folder / f"{prefix}-{len(paths):06d}.tar"
        with atomic_file(path) as temporary, tarfile.open(temporary, mode="w") as tar:
            previous, count = "", 0
            while entry is not None and count < per_shard:
                key = clean_key(entry[0])
                if key == previous:  # consecutive members of one stem would become one example
                    key += f"-{count}"
                for suffix, data in entry[1].items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                previous, count = key, count + 1
                entry = next(entries, None)
        paths.append(path)
    if not paths:
        raise ValueError("there is nothing to write: no example could be read")
    return paths


def clean_key(key: str) -> str:
    """A stem without dots in its base name, without `..`, and relative."""
    *folders, base = [part for part in PurePosixPath(key).parts if part != "/"] or ["example"]
    safe = [part.replace("..", "_") for part in folders] + [base.replace(".", "_")]
    name = "/".join(safe)
    return f"x{name}" if name.startswith("__") else name


def to_shards(
    source: Source,
    out: str | Path,
    *,
    prefix: str = "data",
    per_shard: int = 10_000,
    progress: Progress | None = None,
) -> list[Path]:
    """Convert any random-access source (a folder of pictures or sounds, a `datasets` directory, …) to shards.

    The files of `image` and `audio` are kept byte for byte; the other fields go into one `.json` each, the text as
    `caption` where the source has a caption format. Broken examples are skipped with a counted warning, or raise if the
    source is strict.
    """
    return write_shards(entries_of(source, _members, progress), out, prefix=prefix, per_shard=per_shard)


def entries_of(
    source: AnySource, members: Callable[[AnySource, int], dict[str, bytes]], progress: Progress | None
) -> Iterator[Entry]:
    """The examples of a source, each with what `members` makes of its index. Broken ones are skipped with a counted warning, or
    raise if the source is strict."""
    skipped: list[str] = []
    for index in range(len(source)):
        try:
            yield source.key(index), members(source, index)
        except BrokenExample as error:
            if source.strict:
                raise
            skipped.append(str(error))
        if progress is not None:
            progress(index + 1, len(source))
    if skipped:
        warn_skipped(source.what, len(skipped), len(source), skipped[0])


def _members(source: Source, index: int) -> dict[str, bytes]:
    example = source[index]
    members: dict[str, bytes] = {}
    where, decoding = f"{source.what}: {source.key(index)}", decoding_of(source)
    for field, raw, make in (
        ("image", source.raw_picture, _picture),
        ("audio", source.raw_sound, _sound),
        ("video", source.raw_video, _video),
        ("shape", source.raw_shape, _shape),
    ):
        if field in example:
            stored = raw(index)
            # what is broken must not get into the shard
            members |= make(stored, decoding.decode(field, stored, where))
    fields: dict[str, Any] = {}
    for name, value in dict(example).items():
        if name in ("key", *LOADED):
            continue
        if name == "text" and (source.caption is not None or "caption" in example or isinstance(value, Lazy)):
            continue  # made of other fields
        value = value.load() if isinstance(value, Lazy) else value
        if isinstance(value, bytes):
            members[name] = value
        elif isinstance(value, Audio):
            members[name if is_sound(name) else f"{name}.wav"] = to_wav(value)
        elif isinstance(value, Video):
            members[f"{name.removesuffix('.video.webp')}.video.webp"] = to_webp(value)
        elif isinstance(value, Shape):
            members[f"{name.removesuffix('.shape.npz')}.shape.npz"] = to_npz(value)
        else:
            fields[name] = value
    if source.caption is not None:
        fields["caption"] = example["text"]
    members["json"] = json.dumps(fields, ensure_ascii=False, default=str).encode()
    return members


def _picture(stored: Any, decoded: Any) -> dict[str, bytes]:
    from PIL import Image

    if isinstance(stored, bytes):
        with Image.open(io.BytesIO(stored)) as picture:
            kind = (picture.format or "").lower()
        return {{"jpeg": "jpg", "mpo": "jpg"}.get(kind, kind): stored}
    return {"png": _png(decoded)}


def _sound(stored: Any, decoded: Audio) -> dict[str, bytes]:
    if isinstance(stored, bytes):
        kind = file_kind(stored[:16])
        return {kind if is_sound(kind) else "wav": stored}  # the ending only says that it is a sound
    return {"wav": to_wav(decoded)}


def _video(stored: Any, decoded: Video) -> dict[str, bytes]:
    if isinstance(stored, bytes):
        kind = video_files.file_kind(stored[:16])
        return {kind if is_video(kind) else f"video.{kind if is_video(f'video.{kind}') else 'webp'}": stored}
    return {"video.webp": to_webp(decoded)}


def _shape(stored: Any, decoded: Shape) -> dict[str, bytes]:
    if isinstance(stored, bytes):
        return {shape_files.file_kind(stored) or "shape.npz": stored}
    return {"shape.npz": to_npz(decoded)}


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def make_digits(
    out: str | Path,
    *,
    npz: str | Path | None = None,
    count: int = 2000,
    size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Shards of digits, dark on white, `size`×`size`, with captions.

    From `npz` (fields `images` and `labels`, such as an extract of MNIST): "handwritten digit seven". Without it,
    `count` digits are drawn here from a typeface under random strokes, tilts and shifts: "digit seven". These need no
    download; they are for trying things out.
    """
    if npz is not None:
        return to_shards(DigitsSource(npz, size), out, prefix="digits", progress=progress)
    if count < 1 or not 8 <= size <= MAX_DIGIT_SIZE:
        raise ValueError(f"make_digits needs count >= 1 and size 8 to {MAX_DIGIT_SIZE}, got {count} and {size}")
    if seed < 0:
        raise ValueError(f"make_digits needs a seed >= 0, got {seed}; give 0 or a larger number")
    return write_shards(_drawn(count, size, seed, progress), out, prefix="digits")


def _drawn(count: int, size: int, seed: int, progress: Progress | None) -> Iterator[Entry]:
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        digit = int(rng.integers(10))
        name = DIGIT_NAMES[digit]
        fields = {"caption": f"digit {name}", "digit": digit, "name": name}
        yield f"{number:06d}", {"png": _png(draw_digit(digit, size, rng)), "json": json.dumps(fields).encode()}
        if progress is not None:
            progress(number + 1, count)


def draw_digit(digit: int, size: int, rng: np.random.Generator) -> Any:
    """One digit as an RGB picture: random height, thickness, tilt, slant and place; drawn large, then scaled down."""
    from PIL import Image, ImageDraw, ImageFont

    large = 4 * size
    paper = Image.new("L", (large, large), 255)
    font = ImageFont.load_default(size=large * rng.uniform(0.65, 0.85))
    ImageDraw.Draw(paper).text(
        (large / 2, large / 2),
        str(digit),
        fill=int(rng.integers(0, 60)),
        font=font,
        anchor="mm",
        stroke_width=int(rng.integers(0, large // 24)),
    )
    angle, slant = rng.uniform(-0.2, 0.2), rng.uniform(-0.25, 0.25)
    cosine, sine = np.cos(angle), np.sin(angle)
    move = np.array([[cosine, slant - sine], [sine, cosine]])
    shift = large / 2 - move @ np.full(2, large / 2) + rng.uniform(-0.07, 0.07, 2) * large
    affine = (move[0, 0], move[0, 1], shift[0], move[1, 0], move[1, 1], shift[1])
    paper = paper.transform(
        (large, large), Image.Transform.AFFINE, affine, resample=Image.Resampling.BILINEAR, fillcolor=255
    )
    return paper.resize((size, size), Image.Resampling.BOX).convert("RGB")
