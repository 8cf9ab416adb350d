"""What tokenizers of files share: the bytes of a file as ids of a byte BPE, closed by an id of their own, the automaton that
follows them, and how all of it is saved.

In a folder: `config.json` (settings), `bpe.json` (the merges, a tokenizer JSON) and `facts.json` (what decoding needs besides,
such as the tables of a format and the version of the library that wrote them). None of it is trusted.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from mm import safe_io, saved
from mm.byte_automaton import ByteGrammar, ByteMachine
from mm.byte_bpe import ByteBPE
from mm.interfaces import Automaton, Decoded, Encoded, ModalityTokenizer, Spec

BPE, FACTS = "bpe.json", "facts.json"
MAX_BPE_BYTES, MAX_FACTS_BYTES = 1 << 24, 1 << 20


class FileTokenizer(ModalityTokenizer):
    """Raw data as the bytes of a file. A subclass fills a dictionary of settings, `vocab` (ids of the BPE) among them, and calls
    `_made`."""

    form: ClassVar[str]
    """Of the saved settings, `mm.tokenizers.` and the file's name."""
    what: ClassVar[str]
    """What messages call it, with its article."""
    apart: ClassVar[Sequence[bytes]] = ()
    """Strings that no token holds a part of (`ByteBPE`)."""
    inner: ClassVar[Sequence[str]] = ("grammar",)
    """Settings that do not change what a token means."""
    config: dict[str, Any]
    facts: dict[str, str]
    bpe: ByteBPE
    _fingerprint: str | None
    _grammar: ByteGrammar[Any] | None

    # ---- what a format has to say ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _facts(self, config: Mapping[str, Any]) -> dict[str, str]:
        """What decoding needs besides the settings, made anew; texts, of bytes their hexadecimal digits."""

    @abc.abstractmethod
    def _build(self, config: dict[str, Any], facts: Mapping[str, str]) -> None:
        """Become what the settings say. Raises `ValueError` for settings or facts that don't fit."""

    @abc.abstractmethod
    def file(self, raw: Any) -> bytes:
        """The bytes that ids are made of. Raises `ValueError` as `encode`."""

    @abc.abstractmethod
    def machine(self) -> ByteMachine[Any] | None:
        """The automaton of these bytes; None where there is none."""

    # ---- bytes ↔ ids -------------------------------------------------------------------------------------------------

    @property
    def stop(self) -> int:
        """The id that ends a file."""
        return self.bpe.vocab_size

    def encode(self, raw: Any) -> Encoded:
        ids = torch.tensor([*self.bpe.encode(self.file(raw)), self.stop])
        return Encoded(grid=(len(ids),), ids=ids)

    def bytes_of(self, encoded: Encoded) -> tuple[bytes, str]:
        """The bytes up to the end, and what was wrong with the ids, if anything was."""
        assert encoded.ids is not None
        ids = encoded.ids.flatten().tolist()
        if self.stop in ids:
            ids = ids[: ids.index(self.stop)]
        odd = sum(not 0 <= i < self.stop or not self.bpe.table[i] for i in ids)
        return self.bpe.decode(ids), f"{odd} ids stand for no bytes" if odd else ""

    @staticmethod
    def judged(value: Any, status: str, odd: str, reason: str) -> Decoded:
        """What was read, with what was wrong with the ids and with the file; `reason` begins with the state of the file."""
        status = "repaired" if odd and status == "strict" else status
        reason = "; ".join(filter(None, (odd, reason)))
        return Decoded(value=value, valid=not reason, reason=f"{status}: {reason}" if reason else "")

    @staticmethod
    def bytes_of_fact(facts: Mapping[str, str], name: str, what: str) -> bytes:
        """A fact that is bytes. Raises `ValueError` for one that isn't."""
        try:
            return bytes.fromhex(facts.get(name, ""))
        except ValueError as error:
            raise ValueError(f"the saved {what} are no hexadecimal digits; restore the saved files") from error

    def grammar(self) -> ByteGrammar[Any] | None:
        """Which ids the format allows; kept, since it remembers its answers."""
        if self._grammar is None and (machine := self.machine()) is not None:
            self._grammar = ByteGrammar(machine, self.bpe.table, self.stop)
        return self._grammar

    def automaton(self) -> Automaton | None:
        grammar = self.grammar()
        return None if grammar is None else grammar.automaton()

    def fit(self, files: Iterable[bytes]) -> None:
        """Learn the merges of the BPE. Ids change their meaning."""
        self.bpe.fit(files)
        self._changed()

    # ---- identity, saving, loading -----------------------------------------------------------------------------------

    def _made(self, pretrained: str | None, config: Mapping[str, Any]) -> None:
        """Become what the settings say, or what `save` wrote with settings of these names. Raises `ValueError` for settings that
        don't fit, and for files that are missing, damaged, or not what was saved."""
        self._changed()
        if pretrained is None:
            self.config, self.facts = dict(config), self._facts(config)
            saved.whole_number("vocab", self.config["vocab"], 256, 1 << 16)
            self.bpe = ByteBPE(self.config["vocab"], apart=self.apart)
            self._build(self.config, self.facts)
            return
        folder = saved.find(pretrained, self.what.split(" ", 1)[1], self.form)
        self.config = saved.read(folder, self.form, config, self.what)
        saved.whole_number("vocab", self.config["vocab"], 256, 1 << 16)
        self.facts = safe_io.read_json(folder / FACTS, max_bytes=MAX_FACTS_BYTES)
        if not all(isinstance(value, str) for value in self.facts.values()):
            raise ValueError(f"{str(folder / FACTS)!r} holds something that is no text; restore the saved file")
        self.bpe = ByteBPE.load(folder / BPE, self.config["vocab"], self.apart, MAX_BPE_BYTES)
        self._build(self.config, self.facts)
        saved.check_whole(folder, self.fingerprint, self._described(), {})

    def _described(self) -> dict[str, Any]:
        merges = [[left.hex(), right.hex()] for left, right in self.bpe.merges]
        return {**self.config, "facts": self.facts, "merges": merges}

    @property
    def fingerprint(self) -> str:
        """What an id means, hashed: settings, facts and merges."""
        if self._fingerprint is None:
            known = {name: value for name, value in self._described().items() if name not in self.inner}
            self._fingerprint = f"{self.form.rpartition('.')[2]}-{saved.digest(known, {})}"
        return self._fingerprint

    def _changed(self) -> None:
        self._fingerprint = self._grammar = None

    def spec_of(self, **facts: Any) -> Spec:
        """The description of a list of bytes, with what else is to be said."""
        grammar = self.grammar()
        return Spec(
            kind="discrete",
            vocab_size=self.stop + 1,
            stop=self.stop,
            least=1 if grammar is None else grammar.least(),
            spatial=False,
            fingerprint=self.fingerprint,
            **facts,
        )

    def save(self, path: str | Path) -> None:
        """Write `config.json`, `bpe.json` and `facts.json` into the folder `path`, all or none."""
        described = saved.digest(self._described(), {})
        with safe_io.atomic_folder(path, last=saved.CONFIG) as folder:
            self.bpe.save(folder / BPE)
            safe_io.write_json(folder / FACTS, self.facts)
            value = {"format": self.form, "fingerprint": self.fingerprint, "digest": described, "config": self.config}
            safe_io.write_json(folder / saved.CONFIG, value)

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """A saved tokenizer. Raises `ValueError` for files that are missing, damaged, or not what was saved."""
        return cls(pretrained=str(path))
