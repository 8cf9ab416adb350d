"""Sentences as vectors: how text is cut into sentences, and networks that read and write them.

A *concept* is one sentence as one vector (Large Concept Models, LCM team 2024, arXiv 2412.08821, which takes SONAR's). Here a
small autoencoder of our own makes it: a transformer reads the sentence's subwords and is averaged to one vector of unit
spread; another writes the sentence from it, subword by subword. It is trained with noise on the vector, so that what lies
near a sentence's vector reads as that sentence too: models hit vectors nearly, never exactly.

Letters in shapes: B sentences, L subwords of the longest and its end, D width of a concept, W width inside, V output ids.
"""

from __future__ import annotations

import abc
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mm.interfaces import ModalityTokenizer
from mm.latents import LatentNormalizer
from mm.saved import Fingerprinted

BOUNDARY = re.compile(r"(?<=[.!?…])\s+|\s*\n\s*")
EPS = 1e-5
MEMORY = 4
"""Positions before the sentence that hold the concept when it is written."""
PAD = -1


# --- text -------------------------------------------------------------------------------------------------------------


def split_sentences(text: str, max_bytes: int = 1 << 20) -> list[str]:
    """Sentences of a text: they end after `.`, `!`, `?` or `…` with white space behind it, and at line breaks. White space
    inside them becomes single spaces. One of more than `max_bytes` bytes of UTF-8 is cut further, between words where it
    can be.

    It knows nothing of abbreviations ("Mr. Smith" is cut): what is joined again reads the same.
    """
    sentences = (" ".join(part.split()) for part in BOUNDARY.split(text))
    return [piece for sentence in sentences if sentence for piece in _pieces(sentence, max_bytes)]


def join_sentences(sentences: Sequence[str]) -> str:
    """The text of sentences: a space between them."""
    return " ".join(sentence for sentence in sentences if sentence)


def _pieces(sentence: str, limit: int) -> Iterator[str]:
    line = ""
    for word in sentence.split(" "):
        if line and len(f"{line} {word}".encode()) > limit:
            yield line
            line = ""
        line = f"{line} {word}" if line else word
        while len(line.encode()) > limit:  # a word that is longer by itself, cut between characters
            head = line.encode()[:limit].decode("utf-8", "ignore")
            yield head
            line = line[len(head) :]
    if line:
        yield line


class Subwords:
    """A byte-level byte-pair encoding with `size` ids at the most (the 256 bytes, and merges), and the id `end` = `size`.

    Raises `ValueError` for a size or for merges that can't be.
    """

    def __init__(self, size: int = 512, merges: Sequence[Sequence[str]] = ()) -> None:
        if not 256 <= size <= 1 << 16:
            raise ValueError(f"a vocabulary of subwords has 256 (the bytes) to {1 << 16} ids, got {size}")
        self.size, self.end = size, size
        self._build([(str(a), str(b)) for a, b in merges])

    def _build(self, merges: list[tuple[str, str]], dropout: float | None = None) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        words = sorted(pre_tokenizers.ByteLevel.alphabet())
        if len(words) + len(merges) > self.size:
            raise ValueError(f"{len(merges)} merges are more than a vocabulary of {self.size} ids has room for")
        known = set(words)
        for left, right in merges:
            if left not in known or right not in known or left + right in known:
                raise ValueError(f"the merge of {left[:20]!r} and {right[:20]!r} doesn't follow from those before it")
            known.add(left + right)
            words.append(left + right)
        self.merges = merges
        vocabulary = {word: number for number, word in enumerate(words)}
        self.tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, dropout=dropout))
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = decoders.ByteLevel()

    def fit(self, sentences: Sequence[str]) -> None:
        """Learn the merges from sentences."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        learner.train_from_iterator(
            sentences, trainers.BpeTrainer(vocab_size=self.size, initial_alphabet=alphabet, show_progress=False)
        )
        self._build([(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]])

    def drop_merges(self, probability: float) -> None:
        """Leave out each merge with this probability from now on, which shows the network the parts of frequent words (BPE
        dropout, Provilkov et al. 2020); 0 = never."""
        self._build(self.merges, probability or None)

    def __call__(self, sentences: Sequence[str]) -> Int[Tensor, "B L"]:
        """Ids of each sentence and `end`; `PAD` behind it."""
        rows = [[*encoding.ids, self.end] for encoding in self.tokenizer.encode_batch(list(sentences))]
        out = torch.full((len(rows), max(map(len, rows), default=0)), PAD)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return out

    def text(self, ids: Sequence[int]) -> str:
        """What ids below `end` spell; U+FFFD where bytes are no UTF-8."""
        return self.tokenizer.decode([i for i in ids if i < self.tokenizer.get_vocab_size()])

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "merges": self.merges}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


# --- networks ---------------------------------------------------------------------------------------------------------


class SentenceEncoder(nn.Module):
    """Subwords → one vector of mean 0 and variance 1 over its channels."""

    def __init__(self, ids: int, longest: int, dim: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(ids + 1, width), nn.Embedding(longest + 1, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm, self.leave = nn.LayerNorm(width, eps=EPS), nn.Linear(width, dim)
        for table in (self.embedding, self.place):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        real = tokens != PAD
        x = self.embedding(tokens.clamp(min=0)) + self.place.weight[: tokens.shape[1]]
        mask = real[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x) * real[..., None]
        pooled = self.leave(x.sum(1) / real.sum(1, keepdim=True).clamp(min=1))
        return F.layer_norm(pooled.float(), (pooled.shape[-1],), eps=EPS)


class SentenceDecoder(nn.Module):
    """A vector → its sentence, subword by subword."""

    def __init__(self, ids: int, longest: int, dim: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.ids, self.longest = ids, longest
        self.start, self.blank = ids + 1, ids + 2
        self.embedding, self.place = nn.Embedding(ids + 3, width), nn.Embedding(MEMORY + longest + 1, width)
        self.memory = nn.Linear(dim, (MEMORY + 1) * width)
        """Of a concept: what stands before the sentence, and what is added to every place of it."""
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=EPS)
        for table in (self.embedding, self.place):
            nn.init.normal_(table.weight, std=0.05)

    def forward(
        self, concepts: Float[Tensor, "B D"], tokens: Int[Tensor, "B L"], blank: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L V"]:
        """Logits of each of `tokens` from those before it. What is `blank` is hidden from the places after it."""
        shown = tokens.clamp(min=0) if blank is None else torch.where(blank, self.blank, tokens.clamp(min=0))
        return self._logits(concepts, torch.cat((torch.full_like(shown[:, :1], self.start), shown[:, :-1]), 1))

    def _logits(self, concepts: Tensor, read: Tensor) -> Tensor:
        memory = self.memory(concepts).unflatten(1, (MEMORY + 1, -1))
        x = torch.cat((memory[:, :MEMORY], self.embedding(read) + memory[:, MEMORY:]), 1)
        x = x + self.place.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x, None)
        return self.norm(x[:, MEMORY:]) @ self.embedding.weight[: self.ids + 1].t()

    @torch.no_grad()
    def write(self, concepts: Float[Tensor, "B D"]) -> list[list[int]]:
        """The most probable subword each time, up to the end or `longest` of them."""
        out: list[list[int]] = [[] for _ in concepts]
        going = torch.arange(len(concepts), device=concepts.device)
        read = torch.full((len(concepts), 1), self.start, device=concepts.device)
        for _ in range(self.longest):
            if not len(going):
                break
            chosen = self._logits(concepts[going], read)[:, -1].argmax(-1)
            more = chosen < self.ids
            going, read = going[more], torch.cat((read, chosen[:, None]), 1)[more]
            for row, token in zip(going.tolist(), chosen[more].tolist(), strict=True):
                out[row].append(token)
        return out


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); causal where it gets no mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for linear in (self.out, self.down):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x: Float[Tensor, "B L W"], mask: Bool[Tensor, "B 1 1 L"] | None) -> Float[Tensor, "B L W"]:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))

    def matrices(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        width = len(self.out.weight)
        yield self.qkv.weight, (width,) * 3
        for linear in (self.out, self.up, self.down):
            yield linear.weight, (len(linear.weight),)


# --- contracts --------------------------------------------------------------------------------------------------------


class TrainableConcepts(ModalityTokenizer, Fingerprinted):
    """What `mm.concepts_training` trains: a tokenizer of sentences with networks of its own."""

    subwords: Subwords
    encoder: SentenceEncoder
    decoder: SentenceDecoder
    normalizer: LatentNormalizer

    def matrices(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The weight matrices inside the blocks, each with the heights of the maps it is made of (for Muon)."""
        for block in (*self.encoder.blocks, *self.decoder.blocks):
            yield from cast(_Block, block).matrices()

    @abc.abstractmethod
    def split(self, text: str) -> list[str]:
        """Sentences of a text as `encode` cuts them."""

    @abc.abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the tokenizer into a directory, whole or not at all."""


class BorrowedEncoder:
    """An encoder of the package `sentence_transformers`, loaded when it is first asked. Not a module: its weights are neither
    trained nor saved here.

    Args:
        name: what `SentenceTransformer` takes: a name on the Hugging Face hub or a folder. No code of the repository is run.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._model: Any = None

    @property
    def model(self) -> Any:
        """Raises `ValueError` where the package or the model is missing."""
        if self._model is None:
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise ValueError(
                    f"the sentence encoder {self.name!r} needs the package sentence-transformers; install it with: "
                    "pip install sentence-transformers"
                ) from error
            try:
                self._model = SentenceTransformer(self.name, trust_remote_code=False)
            except Exception as error:  # of the network, the hub, the files: many types
                first = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise ValueError(f"the sentence encoder {self.name!r} can't be loaded: {first}") from error
        return self._model

    @property
    def dim(self) -> int:
        """Width of its vectors."""
        return int(self.model.get_sentence_embedding_dimension())

    def __call__(self, sentences: Sequence[str]) -> Float[Tensor, "B D"]:
        made = self.model.encode(list(sentences), convert_to_tensor=True, show_progress_bar=False)
        return made.detach().float().cpu()
