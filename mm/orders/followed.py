"""Followed: raster order for lists of free length whose tokenizer has an automaton. Beside each element the backbone reads where
the next one stands in the format, as the automaton knows it of the elements so far: of a picture file, which block and which
coefficient. Any reader of the file knows as much; a model that sees ids alone would have to count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mm.grid import coordinates, given_prefix
from mm.interfaces import Automaton, Encoded, Layout, ModalityTokenizer, Order, Proposal, Sampling, Session, Spec


class Followed(Order):
    """See the module.

    Args:
        name: of what positions read, among what is injected: two modalities of one model that are followed need two names.
    """

    free = True

    def __init__(self, name: str = "place") -> None:
        self.name = name
        self.vectors: Mapping[str, int] = {}

    def check(self, spec: Spec) -> None:
        if not spec.is_free:
            raise ValueError("the followed order is for lists of free length; use raster")

    def attach(self, tokenizer: ModalityTokenizer) -> None:
        self.tokenizer = tokenizer
        self.vectors = {self.name: len(self._place(self.automaton()))}

    def automaton(self) -> Automaton:
        """One that stands at the beginning. Raises `ValueError` where the tokenizer has none."""
        automaton = self.tokenizer.automaton()
        if automaton is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} has no automaton with these settings, which the followed order asks; use raster"
            )
        return automaton

    def _place(self, automaton: Automaton) -> Sequence[float]:
        place = automaton.place()
        if place is None:
            raise ValueError(
                f"the automaton of {type(self.tokenizer).__name__} doesn't say where the next id stands; use raster"
            )
        return place

    def positions(self, ids: Tensor, first: int, automaton: Automaton) -> Layout:
        """Elements from `first` on, which come next to the automaton."""
        places = []
        for token in ids.tolist():
            automaton.accept(token)
            places.append(self._place(automaton))
        element = first + torch.arange(len(ids))
        return Layout(
            element=element,
            order=element,
            position=coordinates((first + len(ids),))[first:],
            time=torch.zeros(len(ids)),
            copy=torch.zeros_like(element),
            target=torch.arange(1, len(ids) + 1),
            enters=True,
            inject={self.name: torch.from_numpy(np.array(places, np.float32))},
        )

    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        return self.positions(encoded.content, 0, self.automaton())

    def session(
        self,
        grid: tuple[int, ...],
        sampling: Sampling,
        rng: torch.Generator,
        known: tuple[Tensor, Bool[Tensor, " N"]] | None = None,
        dim: int = 0,
        num_codes: int = 0,
    ) -> Session:
        return FollowedSession(self, known)


class FollowedSession(Session):
    """Element by element, each with its place; elements given at the beginning are accepted without being sampled. It goes on to
    `stop`, or as far as there is room."""

    lays_out = True

    def __init__(self, order: Followed, known: tuple[Tensor, Tensor] | None) -> None:
        self.order, self.automaton, self.told = order, order.automaton(), 0
        self.ids = torch.zeros(0, dtype=torch.int64) if known is None else given_prefix(known, ()).long()

    def propose(self) -> Proposal | None:
        made = len(self.ids)
        if made >= self.most or (made and int(self.ids[-1]) == self.stop):
            return None
        return Proposal(autoregressive=True, done=made / self.most)

    def accept(self, sample: Tensor, log_prob: Tensor | None) -> None:
        self.ids = torch.cat((self.ids, sample.to(self.ids)))

    def settled(self) -> Layout | None:
        if self.told == len(self.ids):
            return None
        first, self.told = self.told, len(self.ids)
        return self.order.positions(self.ids[first:], first, self.automaton)

    def content(self) -> Int[Tensor, " N"]:
        return self.ids

    def final(self) -> int:
        return len(self.ids)
