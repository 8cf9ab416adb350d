"""Automata over the bytes of a file format, and what they allow of tokens that stand for several bytes.

A `ByteMachine` knows a format byte by byte; a `ByteGrammar` knows, of a vocabulary (bytes of each id), which ids a machine
allows in each of its states, and keeps the answers; a `ByteAutomaton` follows one item.

Letters in shapes: V ids.
"""

from __future__ import annotations

import abc
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from mm.interfaces import Automaton

State = TypeVar("State", bound=Hashable)
MAX_KEPT = 1 << 15
"""Answers that a grammar keeps (a byte an id, and about as much again)."""


class ByteMachine(abc.ABC, Generic[State]):
    """A format as a deterministic automaton over bytes. From every state that it gives there is a way to the end."""

    start: State

    @abc.abstractmethod
    def step(self, state: State, byte: int) -> State | None:
        """The state after a byte; None: it may not come here."""

    @abc.abstractmethod
    def is_end(self, state: State) -> bool:
        """Whether the file is whole. No byte may come then."""

    @abc.abstractmethod
    def closing(self, state: State) -> int:
        """The byte that comes next on a short way to the end."""

    @abc.abstractmethod
    def need(self, state: State) -> int:
        """Bytes from here to the end, on the way that `closing` goes; 0 at the end."""

    def bound(self, state: State) -> int:
        """No less than `need` here and in any later state; quickly found."""
        return self.need(self.start)

    def successors(self, state: State) -> dict[int, State]:
        """Every byte that may come, and the state after it."""
        steps = ((byte, self.step(state, byte)) for byte in range(256))
        return {byte: after for byte, after in steps if after is not None}

    def allowed(self, state: State) -> int:
        """The bytes that may come, as a number whose bit b says it of the byte b."""
        return sum(1 << byte for byte in self.successors(state))

    def key(self, state: State, reach: int) -> Hashable:
        """States of one key allow the same strings of up to `reach` bytes."""
        return state

    def place(self, state: State) -> list[float] | None:
        """Where the next byte stands, as numbers of about −1 to 1; None: the format doesn't say."""
        return None

    def reach(self, table: Sequence[bytes]) -> int:
        """The longest string of the table that `key` has to tell apart."""
        return max(map(len, table))

    def run(self, data: bytes, state: State | None = None) -> tuple[State, int]:
        """The last state that is reached, and how many of the bytes led to it."""
        state = self.start if state is None else state
        for count, byte in enumerate(data):
            after = self.step(state, byte)
            if after is None:
                return state, count
            state = after
        return state, len(data)

    def closed(self, state: State) -> bytes:
        """The bytes that lead to the end."""
        out = bytearray()
        while not self.is_end(state):
            byte = self.closing(state)
            after = self.step(state, byte)
            assert after is not None, "the way to the end is open"
            out.append(byte)
            state = after
        return bytes(out)


class ByteGrammar(Generic[State]):
    """Which ids a machine allows.

    Args:
        machine: the format.
        table: bytes of each id; empty where it stands for nothing. Every byte has to be an id.
        stop: the id that ends an item, which comes right behind the table.
    """

    def __init__(self, machine: ByteMachine[State], table: Sequence[bytes], stop: int) -> None:
        if stop != len(table):
            raise ValueError(f"the id that ends an item comes behind the {len(table)} of the table, got {stop}")
        self.machine, self.table, self.stop = machine, tuple(table), stop
        self.reach = machine.reach(self.table)
        self.singles = {token[0]: i for i, token in enumerate(self.table) if len(token) == 1}
        if len(self.singles) < 256:
            raise ValueError(f"every byte has to be an id, got {len(self.singles)} of 256; add the others to the table")
        self.root = Trie()
        for i, token in enumerate(self.table):
            if token:
                self.root.add(token, i)
        self._kept: dict[Hashable, Bool[Tensor, " V"]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def automaton(self) -> ByteAutomaton:
        """One for a new item."""
        return ByteAutomaton(self)

    def least(self) -> int:
        """Ids that suffice for a whole item, `stop` included."""
        return self.machine.need(self.machine.start) + 1

    def allowed(self, state: State, room: int) -> Bool[Tensor, " V"]:
        """Ids that may come where `room` more fit. Each leaves enough to end, if there was enough before."""
        machine = self.machine
        if machine.is_end(state):
            return self._only(self.stop)
        if machine.bound(state) + 2 > room:  # one for the id to come, one for `stop`
            return self._fitting(state, room)
        key = machine.key(state, self.reach)
        mask = self._kept.get(key)
        if mask is None:
            mask = torch.zeros(self.stop + 1, dtype=torch.bool)
            mask[list(self._open(state, self.root))] = True
            self._keep(key, mask)
        return mask

    def _open(self, state: State, trie: Trie) -> Iterator[int]:
        """Every id that may come: as `following`, but no state is made that isn't needed."""
        bits = self.machine.allowed(state)
        for byte, below in trie.below.items():
            if bits >> byte & 1:
                if below.token >= 0:
                    yield below.token
                if below.below:
                    after = self.machine.step(state, byte)
                    assert after is not None, "it may come"
                    yield from self._open(after, below)

    def _fitting(self, state: State, room: int) -> Bool[Tensor, " V"]:
        need, mask = self.machine.need, torch.zeros(self.stop + 1, dtype=torch.bool)
        fitting = [i for i, after in self.following(state) if need(after) + 2 <= room]
        mask[fitting or [self.singles[self.machine.closing(state)]]] = True
        return mask

    def following(self, state: State) -> Iterator[tuple[int, State]]:
        """Every id that may come, and the state after it."""
        for byte, after in self.machine.successors(state).items():
            yield self.singles[byte], after
            yield from self._along(after, self.root.below[byte])

    def _along(self, state: State, trie: Trie) -> Iterator[tuple[int, State]]:
        for byte, below in trie.below.items():
            after = self.machine.step(state, byte)
            if after is not None:
                if below.token >= 0:
                    yield below.token, after
                yield from self._along(after, below)

    def _only(self, token: int) -> Bool[Tensor, " V"]:
        mask = self._kept.get(("only", token))
        if mask is None:
            mask = torch.zeros(self.stop + 1, dtype=torch.bool)
            mask[token] = True
            self._keep(("only", token), mask)
        return mask

    def _keep(self, key: Hashable, mask: Bool[Tensor, " V"]) -> None:
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        self._kept[key] = mask


class Trie:
    """Tokens by their bytes."""

    def __init__(self) -> None:
        self.token = -1
        self.below: dict[int, Trie] = {}

    def add(self, rest: bytes, token: int) -> None:
        node = self
        for byte in rest:
            node = node.below.setdefault(byte, Trie())
        node.token = token


class ByteAutomaton(Automaton):
    """Follows one item. Bytes that were given although they may not come are passed over."""

    def __init__(self, grammar: ByteGrammar[Any]) -> None:
        self.grammar, self.state = grammar, grammar.machine.start

    def allowed(self, room: int) -> Bool[Tensor, " V"]:
        return self.grammar.allowed(self.state, room)

    def accept(self, token: int) -> None:
        if 0 <= token < len(self.grammar.table):
            for byte in self.grammar.table[token]:
                after = self.grammar.machine.step(self.state, byte)
                self.state = self.state if after is None else after

    def place(self) -> list[float] | None:
        return self.grammar.machine.place(self.state)
