"""Text as the tokens of a Hugging Face tokenizer, or of the byte-pair encoding that ships inside open-clip."""

from __future__ import annotations

import abc
import gzip
import hashlib
import html
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mm import safe_io, saved
from mm.hf_checks import check_parts, library
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE, SETTINGS = "tokenizer.json", "mm_tokenizer.json"
OPEN_CLIP = "open_clip"
OPEN_CLIP_MERGES = 49152 - 256 - 2
"""Merges of CLIP's vocabulary of 49,408: two kinds of 256 bytes, the merges, two special tokens."""
MAX_FILE = 1 << 28
MAX_SIZE = 1 << 24
"""Most ids of a vocabulary. The library's own writer takes memory by the largest id, and aborts the process beyond."""


class TextHF(ModalityTokenizer):
    """A Hugging Face tokenizer without its special tokens: the core frames text with control tokens of its own.

    Text that spells a special token ("<|endoftext|>") is encoded as ordinary text, so that a prompt can't inject one.

    Args:
        source: folder with a `tokenizer.json` (or whatever else `transformers.AutoTokenizer` reads), the name of a
            repository on the hub, `open_clip` for CLIP's lower-casing vocabulary of 49,408 (no download), or the name of a
            checkpoint that ships with the package (`mm-tiny`), whose text tokenizer is meant.
        vocab_size: number of ids; 0 = as many as the tokenizer has. Larger where a pretrained model's embedding has
            more rows than its tokenizer has tokens (Qwen), so that ids keep their rows.

    Raises:
        ValueError: nothing there that can be read, `vocab_size` below what the tokenizer has, or more than 2²⁴ ids.
    """

    def __init__(self, source: str = OPEN_CLIP, vocab_size: int = 0) -> None:
        source = _shipped().get(source, source)
        settings = _settings(source)
        self.backend = _open(settings.get("source", source), source)
        size = vocab_size or settings.get("vocab_size", 0) or self.backend.size
        if size < self.backend.size:
            raise ValueError(
                f"vocab_size is {size}, but the tokenizer {source!r} has {self.backend.size} ids; "
                "leave it at 0 or give the rows of the model's embedding"
            )
        self.vocab_size = _check_size(size)

    @classmethod
    def tiny(cls) -> TextHF:
        """A byte-level BPE trained on a sentence, for tests."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["a red apple and a green apple on a table"], trainer)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(str(Path(folder, FILE)))
            return cls(folder)

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=self.vocab_size, fingerprint=self.backend.fingerprint)

    def encode(self, raw: str) -> Encoded:
        if not isinstance(raw, str):
            raise ValueError(f"got {type(raw).__name__}, expected text (str); decode bytes with .decode('utf-8') first")
        try:
            raw.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds half a surrogate pair at index {error.start}, which is not a character; "
                "it was read with the wrong encoding, read it as UTF-8"
            ) from error
        ids = self.backend.encode(raw)
        return Encoded(grid=(len(ids),), ids=torch.tensor(ids, dtype=torch.long))

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.ids is not None
        ids = encoded.ids.flatten().tolist()
        known = [i for i in ids if self.backend.knows(i)]
        text = self.backend.decode(known)
        reason = ""
        if len(known) < len(ids):
            reason = f"{len(ids) - len(known)} ids stand for nothing"
        elif "\ufffd" in text:
            reason = "some ids are parts of characters without the rest"
        return Decoded(value=text, valid=not reason, reason=reason)

    def save(self, path: str | Path) -> None:
        """A folder that `TextHF(path)` reads."""
        with safe_io.atomic_folder(path, last=SETTINGS) as folder:
            source = self.backend.save(folder)
            safe_io.write_json(folder / SETTINGS, {"source": source, "vocab_size": self.vocab_size})

    @classmethod
    def from_directory(cls, path: str | Path) -> TextHF:
        """The tokenizer that `save` wrote. Raises `ValueError` as the constructor does."""
        return cls(str(path))


class _Backend(abc.ABC):
    """The few things needed of somebody's tokenizer."""

    size: int
    known: set[int]
    fingerprint: str

    def knows(self, token: int) -> bool:
        return token in self.known

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def save(self, folder: Path) -> str:
        """Write what is needed; returns the `source` that opens it again."""


class _Fast(_Backend):
    """A `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.known = set(tokenizer.get_vocab(with_added_tokens=True).values())
        self.size = _check_size(max(self.known, default=0) + 1)  # before the fingerprint, which writes it
        self.fingerprint = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True  # pickling a tokenizer forgets this

    def encode(self, text: str) -> list[int]:
        with library("the text tokenizer can't encode this"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with library("the text tokenizer can't decode this"):
            return self.tokenizer.decode(ids, skip_special_tokens=False)

    def save(self, folder: Path) -> str:
        self.tokenizer.save(str(folder / FILE))
        return FILE


class _Slow(_Backend):
    """A tokenizer of `transformers` that is not built on `tokenizers` (sentencepiece, Python)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known = set(tokenizer.get_vocab().values())
        self.size = _check_size(max(self.known, default=0) + 1)
        table = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
        self.fingerprint = hashlib.sha256(table.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> str:
        self.tokenizer.save_pretrained(folder)
        return ""


class _OpenClip(_Fast):
    """CLIP's byte-pair encoding, from the merges in open-clip's wheel, without importing open-clip (seconds)."""

    def __init__(self) -> None:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        self.bytes = _byte_letters()
        merges = _open_clip_merges()
        letters = list(self.bytes.values())
        words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
        vocabulary = {word: number for number, word in enumerate([*words, "<start_of_text>", "<end_of_text>"])}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
        pattern = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        super().__init__(tokenizer)
        self.letters = {letter: byte for byte, letter in self.bytes.items()}

    def encode(self, text: str) -> list[int]:
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return super().encode(" ".join(text.split()).lower())

    def decode(self, ids: list[int]) -> str:
        words = "".join(self.tokenizer.id_to_token(i) or "" for i in ids).replace("</w>", " ")
        data = b"".join(bytes([self.letters[c]]) if c in self.letters else c.encode() for c in words)
        return data.decode("utf-8", "replace").strip()

    def save(self, folder: Path) -> str:
        return OPEN_CLIP


def _byte_letters() -> dict[int, str]:
    """The printable letter that byte-level BPE writes for each byte (Radford et al. 2019): itself, or from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(plain))
    return table


def _open_clip_merges() -> list[tuple[str, str]]:
    found = find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        raise ValueError("open-clip is not installed; pip install open-clip-torch, or name another tokenizer")
    path = Path(found.submodule_search_locations[0], "bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : OPEN_CLIP_MERGES + 1]
    return [(a, b) for a, b in (line.split() for line in lines)]


def _check_size(size: int) -> int:
    if size > MAX_SIZE:
        raise ValueError(f"the vocabulary has ids up to {size - 1:,}, but at most {MAX_SIZE:,} ids are expected of one")
    return size


def _shipped() -> dict[str, str]:
    """Folders of the text tokenizers of shipped checkpoints, by the checkpoint's name."""
    return {path.parent.parent.name: str(path) for path in saved.SHIPPED.glob("*/tokenizers/text")}


def _settings(source: str) -> dict[str, Any]:
    """What `TextHF.save` wrote, if it did."""
    path = Path(source) / SETTINGS
    if not path.is_file():
        return {}
    settings = safe_io.read_json(path)
    if settings.get("source") not in (OPEN_CLIP, FILE, "") or not isinstance(settings.get("vocab_size"), int):
        raise ValueError(f"{str(path)!r} has a wrong source or vocab_size; save the tokenizer again")
    return {"source": OPEN_CLIP if settings["source"] == OPEN_CLIP else source, "vocab_size": settings["vocab_size"]}


def _open(source: str, asked: str) -> _Backend:
    if source == OPEN_CLIP:
        return _OpenClip()
    from tokenizers import Tokenizer

    file = Path(source) / FILE
    if file.is_file():
        data = safe_io.read_bytes(safe_io.inside(source, FILE), max_bytes=MAX_FILE)
        with library(f"{str(file)!r} is damaged or not a Hugging Face tokenizer"):
            text = data.decode("utf-8")
            check_parts(json.loads(text))
            return _Fast(Tokenizer.from_str(text))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        what = "holds no tokenizer that can be read" if Path(source).is_dir() else "is neither a folder nor on the hub"
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{asked!r} {what}; give a folder with a {FILE}, a hub name or {OPEN_CLIP!r} ({first})"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _Fast(backend) if backend is not None else _Slow(tokenizer)
