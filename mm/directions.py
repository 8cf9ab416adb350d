"""What a model was trained to do, in pairs: what it is given, and what it makes of it.

A model's modalities say what it could do; a model that has learned to speak can't for that write down what it hears. So training
notes what its documents show (`shown`), and checkpoints keep it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.stream import TokenStream
from mm.vocabulary import Vocabulary

Directions = frozenset[tuple[str, str]]
"""(given, made) by name of modality; twice the same name: made with nothing of another modality before it, as a text alone is."""


def shown(batch: TokenStream, vocabulary: Vocabulary) -> Directions:
    """(given, made): a document of the batch has elements of `given` before learned ones of another modality, `made`; where both
    are one, it has learned ones before those of any other. Control tokens belong to none."""
    host = batch.modality == 0
    held = ~host | (batch.ids < vocabulary.control_start)
    clean = held & (batch.copy == 0)
    predicted = batch.target[(batch.target >= 0) & (batch.weight > 0)]
    predicted = predicted[held[predicted]]
    shape = (batch.num_documents, len(vocabulary.entries))
    order = batch.order
    never = torch.iinfo(order.dtype).max
    first = torch.full(shape, never, dtype=order.dtype, device=order.device)
    begun, last = first.clone(), torch.full_like(first, torch.iinfo(order.dtype).min)
    _reduce(first, batch, torch.nonzero(clean).flatten(), "amin")
    _reduce(begun, batch, predicted, "amin")
    _reduce(last, batch, predicted, "amax")
    own = torch.eye(shape[1], dtype=torch.bool, device=order.device)
    of_others = first[:, None, :].masked_fill(own, never).amin(dim=-1)
    pairs = torch.where(own, (begun < of_others)[:, None, :], first[:, :, None] < last[:, None, :]).any(dim=0)
    names = list(vocabulary.index)
    return frozenset((names[a], names[b]) for a, b in pairs.nonzero().tolist())


def _reduce(into: Tensor, batch: TokenStream, where: Tensor, how: str) -> None:
    """The least or greatest order at some positions, by document and modality."""
    cell = batch.document[where] * into.shape[1] + batch.modality[where]
    into.view(-1).scatter_reduce_(0, cell.long(), batch.order[where], how)
