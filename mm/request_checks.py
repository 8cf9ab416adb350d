"""What a request for generation asks that can't be: found before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

from torch import Tensor

from mm.interfaces import Spec
from mm.layout import Segment

if TYPE_CHECKING:
    from mm.generation import Grid, Request
    from mm.model import MultimodalModel

Items = Sequence["tuple[str, Grid] | Segment"]


def check_request(model: MultimodalModel, request: Request) -> None:
    """Raises `ValueError` for modalities that the model doesn't have, and for items that can't be opened as asked for."""
    for name in (*request.alongside, *request.by_modality):
        model.vocabulary[name]
    if not isinstance(request.stretch, Real) or not 0 < request.stretch < math.inf:
        raise ValueError(
            f"stretch multiplies extents, so it must be a finite number above 0; got {request.stretch!r:.60}"
        )
    for item in request.items:
        if not isinstance(item, Segment):
            _check_item(model, *item)
    if request.known is not None:
        _check_known(model, request.items, *request.known)


def _check_item(model: MultimodalModel, name: str, grid: Grid) -> None:
    entry = model.vocabulary[name]
    if entry is model.vocabulary.host:
        raise ValueError(f"{name} is written as text, not opened as an item; leave it out of `items`")
    modality = model.modalities[model.vocabulary.index[name]]
    if (spec := modality.tokenizer.spec).is_free:
        _check_free(spec, name, grid)
        return
    if isinstance(grid, tuple):
        model.vocabulary.opening(name, modality.order.announced(grid))
        spec.upto(grid)
        return
    axes = len(entry.max_grid)
    if not axes or (grid is not None and (axes > 1 or grid.step != 1 or not 0 < grid.start < grid.stop)):
        raise ValueError(
            f"the extents of {name} can't be left to the model with {grid}: only items with a stated extent have one to "
            "choose, and a range, counted by ones from 1 or more, bounds a list's"
        )
    if grid is not None and grid.start > entry.max_grid[0]:
        raise ValueError(
            f"{name} is asked for with at least {grid.start} elements, but has {entry.max_grid[0]} at the most"
        )


def _check_free(spec: Spec, name: str, grid: Grid) -> None:
    bounded = isinstance(grid, range) and grid.start == grid.step == 1
    if grid not in (None, ()) and not bounded:
        raise ValueError(
            f"{name} has no extent that could be asked for, got {grid}; give (), or range(1, N + 1) for N elements at the most"
        )
    if isinstance(grid, range) and len(grid) < spec.least:
        raise ValueError(f"{name} is asked for with {len(grid)} elements at the most, but has at least {spec.least}")


def _check_known(model: MultimodalModel, items: Items, content: Tensor, given: Tensor) -> None:
    if not items:
        raise ValueError("`known` gives elements of the first of `items`, but `items` is empty; name item and grid")
    first = next((item for item in items if not isinstance(item, Segment)), None)
    if first is None:
        raise ValueError("`known` gives elements of an item, but `items` holds texts only; name item and grid")
    name, grid = first
    spec = model.modalities[model.vocabulary.index[name]].tokenizer.spec
    if not isinstance(grid, tuple) and not spec.is_free:
        raise ValueError(f"`known` gives elements of {name}, whose extents the model is to choose; name its grid")
    entry = model.vocabulary[name]
    if entry.kind == "continuous":
        if content.ndim != 2 or content.shape[1] != spec.dim or not bool(content.isfinite().all()):
            raise ValueError(
                f"`known` has shape {tuple(content.shape)}; {name} needs finite vectors of width {spec.dim}"
            )
        return
    size = entry.size
    if entry.kind == "codes":
        size = spec.vocab_size
        if content.ndim != 2 or content.shape[1] != spec.num_codes or content.is_floating_point():
            raise ValueError(
                f"`known` has shape {tuple(content.shape)} of {content.dtype}; {name} needs {spec.num_codes} "
                "sub-codes an element, as whole numbers"
            )
    elif content.ndim != 1:
        raise ValueError(f"`known` has shape {tuple(content.shape)}; {name} needs one id an element")
    low, high = (int(x) for x in content.aminmax()) if len(content) else (0, 0)
    if low < 0 or high >= size:
        raise ValueError(f"`known` holds ids {low}..{high}; those of {name} are 0..{size - 1}")
    if spec.stop >= 0 and len(given) == len(content):
        stops = ((content if content.ndim == 1 else content[:, 0]) == spec.stop) & given.bool()
        if bool(stops.any()):
            raise ValueError(
                f"element {int(stops.nonzero()[0])} of `known` is the one at which {name} ends; give the elements before it only"
            )
