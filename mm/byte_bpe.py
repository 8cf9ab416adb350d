"""Byte-pair encoding of the bytes of files, by the library `tokenizers`; lossless on any bytes (JPEG-LM, Han et al. 2024,
arXiv 2408.08459, reads files as text in the same way).

Id b is the byte b, up to 255; then come the merges, in the order in which they were learned. To the library byte b is the
character U+2800 + b, so that nothing of what it does to texts applies. A table of the bytes of each id goes with it: decoding
and automata (`mm.byte_automaton`) read that alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm import safe_io

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FIRST = 0x2800
"""Character of byte 0; the 256 from here on are letters of braille."""
MAX_VOCAB = 1 << 16
MAX_TOKEN_BYTES = 1 << 12
"""Longest token that is read from a file."""
Merge = tuple[bytes, bytes]


class ByteBPE:
    """Bytes ↔ ids.

    Args:
        vocab_size: ids, the 256 bytes among them. Where fewer merges are known, the last ids stand for nothing.
        merges: pairs of tokens that become one, in order.
        apart: strings of bytes that are cut out before anything is merged, so that no token holds a part of one and anything else
            (markers, start codes). All of one file format, so it isn't saved.

    Raises:
        ValueError: a vocabulary out of range, or merges that don't follow from each other.
    """

    def __init__(self, vocab_size: int = 320, merges: Sequence[Merge] = (), apart: Sequence[bytes] = ()) -> None:
        if not 256 <= vocab_size <= MAX_VOCAB:
            raise ValueError(f"a vocabulary of bytes has 256 to {MAX_VOCAB:,} ids, got {vocab_size}")
        self.vocab_size, self.apart = vocab_size, tuple(apart)
        self._become(merges)

    def _become(self, merges: Sequence[Merge]) -> None:
        self.merges = tuple(merges)
        ids = {bytes([b]): b for b in range(256)}
        for left, right in self.merges:
            if left not in ids or right not in ids:
                raise ValueError(
                    f"a merge of {left[:16]!r} and {right[:16]!r} comes before both are tokens; give merges in the "
                    "order in which they were learned"
                )
            ids.setdefault(left + right, len(ids))  # the same bytes may be reached by several merges
        if len(ids) > self.vocab_size:
            raise ValueError(f"{len(ids)} tokens don't fit into a vocabulary of {self.vocab_size}; give fewer merges")
        self.table: tuple[bytes, ...] = (*ids, *[b""] * (self.vocab_size - len(ids)))
        """Bytes of each id; empty where it stands for nothing."""
        self._library: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_library": None}  # made again when it is used

    # ---- bytes ↔ ids -------------------------------------------------------------------------------------------------

    def encode(self, data: bytes) -> list[int]:
        """Ids of any bytes; none of none."""
        return list(self._tokenizer().encode(characters(data)).ids)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids. What is no id is left out."""
        size = self.vocab_size
        return b"".join(self.table[i] for i in ids if 0 <= i < size)

    def fit(self, data: Iterable[bytes]) -> None:
        """Learn the merges from files. Raises `ValueError` where there is none."""
        from tokenizers import trainers

        texts = [characters(one) for one in data if one]
        if not texts:
            raise ValueError("no bytes to learn merges from; give at least one file that isn't empty")
        library = self._blank([])
        alphabet = [chr(FIRST + b) for b in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        library.train_from_iterator(texts, trainer)
        self._become(_merges_of(library.to_str()))

    # ---- the library -------------------------------------------------------------------------------------------------

    def _blank(self, merges: Sequence[Merge]) -> Tokenizer:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        pairs = [(characters(left), characters(right)) for left, right in merges]
        ids = {characters(token): i for i, token in enumerate(self.table) if token}
        library = Tokenizer(models.BPE(vocab=ids, merges=pairs) if pairs else models.BPE(vocab=ids, merges=[]))
        if self.apart:
            longest = sorted(
                self.apart, key=len, reverse=True
            )  # a start code of four bytes, before that of three in it
            library.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(characters, longest))), "isolated")
        return library

    def _tokenizer(self) -> Tokenizer:
        if self._library is None:
            self._library = self._blank(self.merges)
        return self._library

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a tokenizer JSON, which the library reads by itself."""
        safe_io.write_text(path, self._tokenizer().to_str(pretty=True))

    @classmethod
    def load(
        cls, path: str | Path, vocab_size: int, apart: Sequence[bytes] = (), max_bytes: int = safe_io.MAX_JSON
    ) -> ByteBPE:
        """What `save` wrote. Of the file only the merges are taken; they may come from a stranger.

        Raises:
            ValueError: missing, damaged, larger than `max_bytes`, or not a BPE of bytes.
        """
        try:
            return cls(vocab_size, _merges_of(safe_io.read_bytes(path, max_bytes=max_bytes).decode()), apart)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} is no byte-pair encoding of bytes: {error}") from error


def characters(data: bytes) -> str:
    """Bytes as the characters that the library gets."""
    return data.decode("latin-1").translate(_TO_CHARACTERS)


_TO_CHARACTERS = {b: FIRST + b for b in range(256)}


def _merges_of(text: str) -> list[Merge]:
    """The merges of a tokenizer JSON. Raises `ValueError`."""
    import json

    value = json.loads(text)
    model = value.get("model") if isinstance(value, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(merges, list) or len(merges) > MAX_VOCAB:
        raise ValueError(f"it has no list of up to {MAX_VOCAB:,} merges")
    return [_merge(pair) for pair in merges]


def _merge(pair: Any) -> Merge:
    pair = pair.split(" ") if isinstance(pair, str) else pair  # older versions write a pair as one string
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) and side for side in pair):
        raise ValueError(f"{str(pair)[:40]!r} is not a merge of two tokens")
    left, right = pair
    if len(left) + len(right) > MAX_TOKEN_BYTES or any(not 0 <= ord(c) - FIRST < 256 for c in left + right):
        raise ValueError(f"the merge of {left[:16]!r} and {right[:16]!r} is not one of bytes")
    return bytes(ord(c) - FIRST for c in left), bytes(ord(c) - FIRST for c in right)
