"""For guidance, what an item would be without its context: twins of a row, which are fed beside it while the item is open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mm.interfaces import Sampling
from mm.layout import NULL, Segment
from mm.tracks import Track

if TYPE_CHECKING:
    from mm.model import MultimodalModel


def open_twins(model: MultimodalModel, row: int, context: Sequence[Segment], sampling: Sampling) -> list[Track]:
    """One after `bos null`; and where the items of the context have a scale of their own, one after `bos null` and those items.
    None where guidance is off."""
    if not sampling.guided:
        return []
    scale, host = sampling.context_guidance, model.vocabulary.host.name
    items = [replace(s, loss=False) for s in context if s.modality not in (host, NULL)]
    apart = scale is not None and scale != sampling.guidance and bool(items)
    if sampling.guidance == 1.0 and not apart:
        return []
    contexts = [[], items] if apart and scale != 1.0 else [items] if apart else [[]]
    twins = []
    for branch, given in enumerate(contexts, 1):
        twins.append(Track(row, branch))
        document = [Segment(NULL, None, loss=False), *given]
        twins[-1].given(model.build_document.draft(document, torch.Generator().manual_seed(0), close=False))
    return twins
