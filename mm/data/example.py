"""What every source gives: an example is a dictionary whose expensive values are loaded when they are first read."""

from __future__ import annotations

import abc
import copy
import hashlib
import string
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from mm.audio import MAX_SECONDS
from mm.media import MAX_PIXELS
from mm.shapes import SIZE
from mm.video import MAX_FRAMES

Split = Literal["all", "train", "holdout"]
LOADED = ("image", "audio", "video", "shape")
"""Fields that are decoded from files."""


class BrokenExample(ValueError):
    """One example can't be used (damaged picture, unreadable record). Callers skip and count it, or raise if strict."""


class Lazy:
    """A value computed on first access."""

    __slots__ = ("load",)

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load


class Example(dict[str, Any]):
    """`key`, `image` (PIL RGB), `audio` (`Audio`), `video` (`Video`), `shape` (`Shape`), `text`, and whatever else the source
    knows. `Lazy` values load when read, once."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, Lazy):
            value = value.load()
            self[name] = value
        return value

    def __missing__(self, name: str) -> Any:
        """Raises `BrokenExample`: one example without a picture or a caption must not end a long run."""
        known = ", ".join(sorted(self))
        raise BrokenExample(f"example {super().get('key', '?')!r} has no field {name!r}; it has: {known}")

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def load(self) -> None:
        """Read what is decoded, where it is there. Raises `BrokenExample`."""
        for name in LOADED:
            self.get(name)

    def items(self) -> Any:
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        return {name: self[name] for name in self}.values()


class Source(abc.ABC):
    """Random access to examples. Subclasses index their files, call `_finish`, and implement `_fields`.

    Args (of every source):
        split: `train` and `holdout` are complements: of the sorted unique keys of the whole source, each
            `holdout_every`-th (beginning with the first) is held out, with all examples of that key. `all` is both.
        holdout_every: 0 holds nothing out.
        holdout_where: held out instead is each example with one of these values, such as {"index": [5, 6]} or
            {"split": ["heldout"]}; several fields hold out what any of them names. Values are compared as they are
            printed, so 5 is "5".
        caption: format string over the example's fields that makes `text`, such as "{caption}, {style}"; lists are
            joined with commas. By default `text` is the field `caption`, or else the field `text`.
        strict: raise at the first broken example instead of skipping it with a counted warning.
        max_pixels: largest picture that is decoded, and largest frame.
        max_seconds: longest sound that is decoded.
        max_frames: most frames of a video.
        video_size: side of the square that frames are scaled and cropped to; by default they stay as they are.
        video_fps: frames a second of videos, whatever their files have; by default their own.
        shape_size: cells a side of the grids that meshes become; grids keep theirs.
    """

    def __init__(
        self,
        *,
        split: Split = "all",
        holdout_every: int = 20,
        holdout_where: Mapping[str, Sequence[str | int]] | None = None,
        caption: str | None = None,
        strict: bool = False,
        max_pixels: int = MAX_PIXELS,
        max_seconds: float = MAX_SECONDS,
        max_frames: int = MAX_FRAMES,
        video_size: int | None = None,
        video_fps: float | None = None,
        shape_size: int = SIZE,
    ) -> None:
        if split not in ("all", "train", "holdout"):
            raise ValueError(f"split must be 'all', 'train' or 'holdout', got {split!r}")
        if holdout_every < 0 or (split == "holdout" and holdout_every == 0 and not holdout_where):
            least = int(split == "holdout")
            raise ValueError(f"holdout_every is {holdout_every}; split {split!r} needs at least {least}")
        for name, values in (holdout_where or {}).items():
            if isinstance(values, str) or not values:
                raise ValueError(f"holdout_where gives {values!r} for {name!r}; give a list of at least one value")
        self.split, self.holdout_every, self.holdout_where = split, holdout_every, dict(holdout_where or {})
        self.strict, self.max_pixels, self.max_seconds = strict, max_pixels, max_seconds
        self.max_frames, self.video_size, self.video_fps = max_frames, video_size, video_fps
        self.shape_size = shape_size
        self._text = Caption(caption)
        self._broken: list[str] = []

    def _finish(self, keys: Sequence[str], what: str) -> None:
        """Called once the files are indexed: `keys[o]` is the key of the example with ordinal `o`."""
        self.what = what
        if self._broken and not self.strict:
            warn_skipped(what, len(self._broken), len(self._broken) + len(keys), self._broken[0])
        if not keys:
            reason = f" (first problem: {self._broken[0]})" if self._broken else ""
            raise ValueError(f"{what} holds no examples{reason}")
        self._keys = keys
        held: set[str] = set()
        if self.split != "all":
            held = self._held_by_value() if self.holdout_where else holdout_keys(keys, self.holdout_every)
        wanted = self.split == "holdout"
        self.ordinals: Sequence[int] = (
            range(len(keys))
            if self.split == "all"
            else [ordinal for ordinal, key in enumerate(keys) if (key in held) == wanted]
        )
        """Position of each example of this split in the whole source; what caches are keyed by."""

    def _held_by_value(self) -> set[str]:
        """Keys that `holdout_where` names. Raises `ValueError` if it names nothing: more likely a mistyped field than
        a source without a single such example."""
        wanted = {name: {str(value) for value in values} for name, values in self.holdout_where.items()}
        held: set[str] = set()
        seen: dict[str, set[str]] = {name: set() for name in wanted}
        for ordinal, facts in enumerate(self._facts(list(wanted))):
            for name, value in facts.items():
                if len(seen[name]) < 9:
                    seen[name].add(f"{value!s:.40}")
                if str(value) in wanted[name]:
                    held.add(self._keys[ordinal])
        if not held:
            found = "; ".join(
                f"{name} is {', '.join(sorted(values)[:8]) or 'in no example'}{', …' if len(values) > 8 else ''}"
                for name, values in seen.items()
            )
            raise ValueError(f"{self.what}: holdout_where {self.holdout_where} holds nothing out; {found}")
        return held

    def _facts(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Of each example of the whole source, in order, the fields of these names that are there without decoding."""
        for ordinal in range(self.total):
            try:
                fields = self._fields(ordinal)
            except BrokenExample:  # counted when it is read
                fields = {}
            yield {name: fields[name] for name in names if name in fields and not isinstance(fields[name], Lazy)}

    def _bad(self, reason: str) -> None:
        """Note something that can't be indexed."""
        if self.strict:
            raise BrokenExample(reason)
        self._broken.append(reason)

    def __len__(self) -> int:
        return len(self.ordinals)

    @property
    def caption(self) -> str | None:
        """Format of the text, as given."""
        return self._text.template

    @property
    def total(self) -> int:
        """Examples of the whole source, whatever the split."""
        return len(self._keys)

    def whole(self) -> Source:
        """The same source with split `all`; index and ordinal are then equal."""
        if self.split == "all":
            return self
        other = copy.copy(self)
        other.split, other.ordinals = "all", range(self.total)
        return other

    @property
    def members(self) -> Sequence[Source]:
        """Sources that this one is made of, if it is. What a cache holds are then their items."""
        return ()

    def of(self, members: Sequence[Source]) -> Source:
        """The same source of other members: its own, with caches."""
        assert not members
        return self

    def key(self, index: int) -> str:
        return self._keys[self.ordinals[index]]

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """Changes when the content or the numbering of the source changes; free of split and caption."""

    def raw_picture(self, index: int) -> bytes | Any:
        """The picture as the source stores it: the bytes of its file, a PIL picture, or None where there is none."""
        return self[index].get("image")

    def raw_sound(self, index: int) -> bytes | Any:
        """The sound as the source stores it: the bytes of its file, an `Audio`, or None where there is none."""
        return self[index].get("audio")

    def raw_video(self, index: int) -> bytes | Any:
        """The video as the source stores it: the bytes of its file, a `Video`, or None where there is none."""
        return self[index].get("video")

    def raw_shape(self, index: int) -> bytes | Any:
        """The shape as the source stores it: the bytes of its file, a `Shape`, or None where there is none."""
        return self[index].get("shape")

    @abc.abstractmethod
    def _fields(self, ordinal: int) -> dict[str, Any]:
        """Fields of one example (values may be `Lazy`). Raises `BrokenExample`."""

    def __getitem__(self, index: int) -> Example:
        """One example. Raises `BrokenExample` here, or when a lazy field of it is read."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.what} has {len(self)} examples in split {self.split!r}, got index {index}")
        ordinal = self.ordinals[index]
        fields = self._fields(ordinal)
        fields["key"] = self._keys[ordinal]
        return Example(fields, text=self._text(fields))

    def __iter__(self) -> Iterator[Example]:
        """All examples with what is decoded loaded; broken ones are skipped and counted (`strict` raises)."""
        skipped: list[str] = []
        for index in range(len(self)):
            try:
                example = self[index]
                example.load()
            except BrokenExample as error:
                if self.strict:
                    raise
                skipped.append(str(error))
            else:
                yield example
        if skipped:
            warn_skipped(self.what, len(skipped), len(self), skipped[0])


def warn_skipped(what: str, count: int, total: int, first: str) -> None:
    warnings.warn(f"{what}: skipped {count} of {total} examples as broken; the first: {first}", stacklevel=3)


def holdout_keys(keys: Iterable[str], every: int) -> set[str]:
    """Each `every`-th of the sorted unique keys, beginning with the first."""
    return set(sorted(set(keys))[::every]) if every else set()


class Caption:
    """Makes `text` from the other fields. Attribute and index access in the format is refused: fields are plain data.

    Raises `ValueError` on construction for a malformed format, and `BrokenExample` on use for a field that the example
    lacks.
    """

    def __init__(self, template: str | None) -> None:
        self.template = template
        try:
            parsed = list(string.Formatter().parse(template or ""))
        except ValueError as error:
            raise ValueError(f"caption {template!r} is not a format string: {error}") from error
        self.names = [name for _, name, _, _ in parsed if name is not None]
        for name in self.names:
            if not name.isidentifier():
                raise ValueError(f"caption {template!r} uses {{{name}}}; use plain field names such as {{caption}}")

    def __call__(self, fields: dict[str, Any]) -> str | Lazy:
        """`text` of an example: at once where it is there already, else when it is read."""
        if self.template is None:
            for name in ("caption", "text"):
                if fields.get(name) is not None:
                    value = fields[name]
                    return value if isinstance(value, Lazy) else str(_plain(value))
        return Lazy(lambda: self._render(fields))

    def _render(self, fields: dict[str, Any]) -> str:
        values: dict[str, Any] = {}
        for name in self.names or (["caption"] if self.template is None else []):
            value = fields.get(name)
            if isinstance(value, Lazy):
                value = value.load()
            if value is None:
                known = ", ".join(sorted(set(fields) - {*LOADED, "key"}))
                raise BrokenExample(
                    f"example {fields['key']!r} has no field {name!r} to make its text of; it has: {known or 'none'}; "
                    "set caption to a format over these"
                )
            values[name] = _plain(value)
        return self.template.format(**values) if self.template is not None else ""


def _plain(value: Any) -> Any:
    return ", ".join(str(item) for item in value) if isinstance(value, list | tuple) else value


def digest(*parts: str | bytes) -> str:
    """Short stable hash of a sequence of parts."""
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()
