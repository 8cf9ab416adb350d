"""Pre-tokenised caches: every item of a source encoded once, kept in two files, served from memory.

`KEY.safetensors` holds the tokens, `KEY.json` says of which source, tokenizer and field; KEY is a hash of the three. A
cache made with another tokenizer, or from other data, is refused. Nothing half-written stays: the tensors are written
first, the JSON last, each to a temporary file that is renamed.

Letters in shapes: I items of the source, J = I + 1, M elements of all items together, A axes of a grid, K sub-codes,
D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mm import safe_io
from mm.data.example import BrokenExample, Example, Lazy, Source, digest, warn_skipped
from mm.interfaces import Encoded, ModalityTokenizer, Spec
from mm.runtime import release_memory

FORMAT = 1
MISSING = -1
RELEASED = 4
"""Batches after which memory is given back."""


class TokenCache:
    """Tokens of the items of one source, by ordinal (position in the whole source, whatever the split)."""

    def __init__(
        self, spec: Spec, content: Tensor, offset: Int[Tensor, " J"], grid: Int[Tensor, "I A"], what: str = "the cache"
    ) -> None:
        """`content` is ids [M], codes [M, K] or latents [M, D]; item i has rows offset[i]..offset[i+1] and grid[i], or
        grid −1 where it was broken. Raises `ValueError` when these don't fit each other or the spec."""
        shape = {"discrete": (), "codes": (spec.num_codes,), "continuous": (spec.dim,)}[spec.kind]
        sizes = offset.diff()
        extents = grid.prod(1).masked_fill((grid == MISSING).all(1), 0)
        for scale in spec.scales:
            extents[(grid == torch.tensor(scale)).all(1)] = spec.count(scale)
        if tuple(content.shape[1:]) != shape or int(offset[-1]) != len(content) or int(offset[0]) != 0:
            raise ValueError(
                f"{what} holds tokens of shape {list(content.shape)} for offsets up to {int(offset[-1])}; "
                f"expected [{int(offset[-1])}{''.join(f', {n}' for n in shape)}]"
            )
        if len(sizes) != len(grid) or not torch.equal(sizes, extents):
            raise ValueError(f"{what}: the grids and the offsets of its items don't agree; build it again")
        if spec.kind != "continuous" and len(content):
            low, high = int(content.min()), int(content.max())
            if low < 0 or high >= spec.vocab_size:
                raise ValueError(f"{what} holds ids {low}..{high}, but the tokenizer has 0..{spec.vocab_size - 1}")
        self.spec, self.content = spec, content
        self._offset, self._grid = offset.numpy(), grid.numpy()

    def __len__(self) -> int:
        return len(self._grid)

    def __getitem__(self, ordinal: int) -> Encoded:
        """Raises `BrokenExample` for an item that couldn't be encoded when the cache was built."""
        grid = tuple(self._grid[ordinal].tolist())
        if grid[0] == MISSING:
            raise BrokenExample(f"item {ordinal} couldn't be encoded when the cache was built")
        part = self.content[int(self._offset[ordinal]) : int(self._offset[ordinal + 1])]
        return self.spec.item(part.float() if self.spec.kind == "continuous" else part.long(), grid)


class CachedSource(Source):
    """A source some of whose fields come encoded from caches, field → cache."""

    def __init__(self, source: Source, caches: Mapping[str, TokenCache]) -> None:
        for field, cache in caches.items():
            if len(cache) != source.total:
                raise ValueError(
                    f"the cache of {field!r} has {len(cache)} items, but the source {source.total}; build it again"
                )
        self.source, self.caches = source, dict(caches)
        self._text = source._text
        self.what, self.strict, self.split = source.what, source.strict, source.split
        self._keys, self.ordinals = source._keys, source.ordinals

    @property
    def identity(self) -> str:
        return self.source.identity

    def _fields(self, ordinal: int) -> dict[str, Any]:
        return self.source._fields(ordinal)

    def whole(self) -> Source:
        return CachedSource(self.source.whole(), self.caches)

    def raw_picture(self, index: int) -> bytes | Any:
        return self.source.raw_picture(index)

    def raw_sound(self, index: int) -> bytes | Any:
        return self.source.raw_sound(index)

    def raw_video(self, index: int) -> bytes | Any:
        return self.source.raw_video(index)

    def raw_shape(self, index: int) -> bytes | Any:
        return self.source.raw_shape(index)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        for field, cache in self.caches.items():
            example[field] = Lazy(partial(cache.__getitem__, self.ordinals[index]))
        return example


def cache_key(source: Source, tokenizer: ModalityTokenizer, field: str = "image") -> str:
    """Name of the cache of one field. Raises `ValueError` for a tokenizer without a fingerprint."""
    fingerprint = tokenizer.spec.fingerprint
    if not fingerprint:
        raise ValueError("the tokenizer's spec has no fingerprint, so a cache can't tell whether its tokens still hold")
    return digest("tokens", str(FORMAT), fingerprint, _subject(source, field), field)


def _subject(source: Source, field: str) -> str:
    """What the items are; the text also depends on the caption format."""
    return f"{source.identity} {source.caption}" if field == "text" else source.identity


def build_cache(
    source: Source,
    tokenizer: ModalityTokenizer,
    folder: str | Path,
    field: str = "image",
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> TokenCache:
    """Encode `field` of every item of the source (both splits), save it in `folder`, and return it.

    Broken items are skipped with one counted warning, or raise if the source is strict. `progress` is called with
    (items done, items in all).
    """
    key = cache_key(source, tokenizer, field)
    spec = tokenizer.spec
    whole = source.whole()
    items: list[Encoded | None] = []
    broken: list[str] = []
    for start in range(0, len(whole), batch_size):
        raws, places = [], []
        for index in range(start, min(start + batch_size, len(whole))):
            items.append(None)
            try:
                raws.append(whole[index][field])
                places.append(index)
            except BrokenExample as error:
                broken.append(_skipped(error, source.strict))
        for place, encoded in zip(places, _encode(tokenizer, raws, broken, source.strict), strict=True):
            items[place] = encoded
        if start // batch_size % RELEASED == RELEASED - 1:
            release_memory()
        if progress is not None:
            progress(len(items), len(whole))
    if broken:
        warn_skipped(source.what, len(broken), len(whole), broken[0])
    found = [item for item in items if item is not None]
    if not found:
        raise ValueError(f"{source.what}: no item could be encoded; the first problem: {broken[0]}")
    if any(item.ended or any(bool(rows.any()) for rows in item.alongside.values()) for item in found):
        raise ValueError(
            f"{source.what}: items that end early, or with something alongside their elements, can't be cached; leave the field "
            f"{field!r} out of `cached`"
        )
    axes = len(found[0].grid)
    grids = [list(item.grid) if item is not None else [MISSING] * axes for item in items]
    sizes = [len(item) if item is not None else 0 for item in items]
    content = torch.cat([_small(item.content, spec) for item in found])
    offset = torch.tensor([0, *np.cumsum(sizes).tolist()])
    cache = TokenCache(spec, content, offset, torch.tensor(grids))
    header = {
        "format": FORMAT,
        "fingerprint": spec.fingerprint,
        "source": _subject(source, field),
        "field": field,
        "items": len(items),
        "broken": len(broken),
    }
    _save(Path(folder), key, header, {"content": content, "offset": offset, "grid": torch.tensor(grids)})
    return cache


def _encode(tokenizer: ModalityTokenizer, raws: list[Any], broken: list[str], strict: bool) -> list[Encoded | None]:
    """One batch; if the batch fails, item by item, so that one bad item doesn't take the others along."""
    if not raws:
        return []
    try:
        return list(tokenizer.encode_batch(raws))
    except ValueError:
        out: list[Encoded | None] = []
        for raw in raws:
            try:
                out.append(tokenizer.encode(raw))
            except ValueError as error:
                broken.append(_skipped(error, strict))
                out.append(None)
        return out


def _skipped(error: ValueError, strict: bool) -> str:
    if strict:
        raise error
    return str(error)


def _small(content: Tensor, spec: Spec) -> Tensor:
    """The narrowest type that holds every token."""
    if spec.kind == "continuous":
        return content.float().cpu()
    limits = ((1 << 8, torch.uint8), (1 << 15, torch.int16), (1 << 31, torch.int32))
    return content.cpu().to(next(dtype for limit, dtype in limits if spec.vocab_size <= limit))


def _save(folder: Path, key: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    safe_io.write_tensors(folder / f"{key}.safetensors", tensors)
    safe_io.write_json(folder / f"{key}.json", header)


def load_cache(
    folder: str | Path, key: str, source: Source, tokenizer: ModalityTokenizer, field: str = "image"
) -> TokenCache:
    """A saved cache. Raises `ValueError` if it is missing, damaged, or of another tokenizer, source or field."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / f"{key}.json"
    what = f"the token cache {path.name!r}"
    try:
        header = json.loads(path.read_bytes())
        fields = {name: header[name] for name in ("format", "fingerprint", "source", "field")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{what} is missing or damaged; build it again") from error
    own = {
        "format": FORMAT,
        "fingerprint": tokenizer.spec.fingerprint,
        "source": _subject(source, field),
        "field": field,
    }
    for name, value in own.items():
        if fields[name] != value:
            thing = {"fingerprint": "tokenizer fingerprint"}.get(name, name)
            raise ValueError(
                f"{what} was made for {thing} {fields[name]!r}, but {value!r} is in use now; build it again, or use "
                "the one it was made for"
            )
    try:
        tensors = load_file(path.with_suffix(".safetensors"))
        content, offset, grid = tensors["content"], tensors["offset"], tensors["grid"]
        if offset.dtype != torch.int64 or grid.dtype != torch.int64 or offset.ndim != 1 or grid.ndim != 2:
            raise ValueError("offsets and grids have the wrong type")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"{what} is damaged ({error}); build it again") from error
    return TokenCache(tokenizer.spec, content, offset, grid, what)


def open_cache(
    source: Source, tokenizer: ModalityTokenizer, folder: str | Path, field: str = "image", **build: Any
) -> TokenCache:
    """The cache if it is there, else it is built (`build`: options of `build_cache`)."""
    key = cache_key(source, tokenizer, field)
    if (Path(folder) / f"{key}.json").is_file():
        return load_cache(folder, key, source, tokenizer, field)
    return build_cache(source, tokenizer, folder, field, **build)
