"""Text as its sentences, each a vector: the concepts of a Large Concept Model (LCM team 2024, arXiv 2412.08821).

Where the vectors come from:

- a small autoencoder of our own, which `mm fit -c configs/tokenizers/concepts.yaml` trains: vectors are written out again as
  text by its decoder;
- an encoder of the package `sentence_transformers` (`encoder`): it has no decoder, so what is decoded is the nearest sentence
  of a `bank`. A bank may be given to the autoencoder as well, and then replaces its decoder.

Vectors are normalised by channel with medians and quartiles as in the paper (`mm.latents`): statistics of the
training sentences, or of the bank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm import safe_io, saved
from mm.concepts import (
    BorrowedEncoder,
    SentenceDecoder,
    SentenceEncoder,
    Subwords,
    TrainableConcepts,
    join_sentences,
    split_sentences,
)
from mm.interfaces import Decoded, Encoded, Spec
from mm.latents import LatentNormalizer
from mm.tokenizers import _concept_settings as settings

MAX_CACHED = 1 << 16
"""Sentences whose vectors are remembered."""
LARGEST = 100.0
"""Normalised vectors are held within ±this when they are decoded; real ones stay below 10."""
BATCH = 256


class TextConcepts(TrainableConcepts):
    """A text of 1 to `sentences` sentences as one vector each, and back.

    Sentences are cut by `mm.concepts.split_sentences`, those of more than `max_bytes` bytes further. What is decoded has
    single spaces between sentences.

    Args:
        dim: width of a vector; an `encoder` brings its own, which replaces it.
        width, layers, heads: of the autoencoder's two transformers.
        vocab_size: ids of its subwords: 256 bytes, and what training finds to merge.
        max_bytes: longest sentence, in bytes of UTF-8.
        sentences: most sentences of one text.
        bank: sentences that decoding chooses from; without it the autoencoder writes by itself.
        encoder: name of a model for `sentence_transformers.SentenceTransformer`, instead of an autoencoder; needs a `bank`.
        pretrained: a directory that `save` wrote. What it says replaces every other argument.

    Raises:
        ValueError: sizes out of range, a bank with a sentence that the autoencoder can't read since it is longer than
            `max_bytes`, an encoder without bank or that can't be loaded, or a saved tokenizer that is missing, damaged or
            foreign.
    """

    _fingerprint: str | None
    _known: dict[str, Tensor]
    _bank_vectors: Tensor | None

    def __init__(
        self,
        dim: int = 64,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        vocab_size: int = 1024,
        max_bytes: int = 96,
        sentences: int = 16,
        bank: list[str] | None = None,
        encoder: str = "",
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = dict(
            dim=dim,
            width=width,
            layers=layers,
            heads=heads,
            vocab_size=vocab_size,
            max_bytes=max_bytes,
            sentences=sentences,
            encoder=encoder,
        )
        merges: list[list[str]] = []
        bank = settings.check_bank(bank or [])
        folder = None if pretrained is None else saved.find(pretrained, "tokenizer of sentences", settings.FORMAT)
        if folder is not None:
            config, merges, bank = settings.read(folder, config)
        settings.check(config)
        settings.check_lengths(bank, config)
        self.borrowed = BorrowedEncoder(config["encoder"]) if config["encoder"] else None
        if self.borrowed is not None:
            if not bank:
                raise ValueError(f"the encoder {encoder!r} has no decoder; give a bank of sentences to choose from")
            if pretrained is None:
                config["dim"] = self.borrowed.dim
        self.config, self.bank = config, bank
        self.subwords = Subwords(config["vocab_size"], merges)
        if self.borrowed is None:
            sizes = (config["vocab_size"], config["max_bytes"] + 1, config["dim"])
            shape = (config["width"], config["layers"], config["heads"])
            with contextlib.nullcontext() if folder is None else saved.building(folder):
                self.encoder, self.decoder = SentenceEncoder(*sizes, *shape), SentenceDecoder(*sizes, *shape)
        self.normalizer = LatentNormalizer("robust", config["dim"])
        self.weights_changed()
        if folder is not None:
            self._load(folder)
        elif self.borrowed is not None:
            self.normalizer.fit(self._vectors(bank))

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        grid = (self.config["sentences"],)
        return Spec(kind="continuous", dim=self.config["dim"], max_grid=grid, fingerprint=self.fingerprint)

    def split(self, text: str) -> list[str]:
        return split_sentences(settings.check_text(text), self.config["max_bytes"])

    def encode(self, raw: str) -> Encoded:
        """A vector for each sentence. Raises `ValueError` for a text without sentences or with too many."""
        sentences = self.split(raw)
        if not 1 <= len(sentences) <= self.config["sentences"]:
            raise ValueError(
                f"got a text of {len(sentences)} sentences, expected 1 to {self.config['sentences']}; "
                f"{'split it into several documents' if sentences else 'leave it out of the document'}"
            )
        new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in self._known]
        if new:
            vectors = self.normalizer(self._vectors(new)).cpu()
            if len(self._known) + len(new) > MAX_CACHED:
                self._known = {s: self._known[s] for s in sentences if s in self._known}
            self._known.update(zip(new, vectors, strict=True))
        return Encoded(grid=(len(sentences),), latents=torch.stack([self._known[s] for s in sentences]))

    def decode(self, encoded: Encoded) -> Decoded:
        """The text that the vectors read as."""
        return self.decode_batch([encoded])[0]

    def decode_batch(self, items: Sequence[Encoded]) -> list[Decoded]:
        dim = self.config["dim"]
        usable = [e.latents is not None and len(e) > 0 and e.latents.shape[1:] == (dim,) for e in items]
        stacked = [e.latents for e, good in zip(items, usable, strict=True) if good and e.latents is not None]
        sentences = iter(self.write(torch.cat(stacked)) if stacked and self.normalizer.ready else [])
        out = []
        for item, good in zip(items, usable, strict=True):
            if not good:
                out.append(Decoded(value="", valid=False, reason=f"no vectors of width {dim} to decode"))
            elif not self.normalizer.ready:
                out.append(Decoded(value="", valid=False, reason="the tokenizer is not trained yet"))
            else:
                assert item.latents is not None
                own = [next(sentences) for _ in item.latents]
                reason = self._complaint(own, bool(item.latents.isfinite().all()))
                out.append(Decoded(value=join_sentences(own), valid=not reason, reason=reason))
        return out

    @staticmethod
    def _complaint(sentences: list[str], finite: bool) -> str:
        if not finite:
            return "the vectors hold values that are not numbers"
        if empty := sum(not sentence for sentence in sentences):
            return f"{empty} of {len(sentences)} vectors read as no text"
        if any("\ufffd" in sentence for sentence in sentences):
            return "some vectors read as bytes that are no text"
        return ""

    @torch.no_grad()
    def write(self, vectors: Float[Tensor, "N D"]) -> list[str]:
        """The sentence that each (normalised) vector reads as: the nearest of the bank, or what the decoder writes. What is
        not a number is read as 0. Raises `ValueError` before training."""
        x = vectors.float().nan_to_num(0.0, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)
        if self.bank:
            if self._bank_vectors is None:
                self._bank_vectors = self.normalizer(self._vectors(self.bank)).cpu()
            parts = x.cpu().split(BATCH)
            return [self.bank[int(n)] for part in parts for n in torch.cdist(part, self._bank_vectors).argmin(1)]
        x = self.normalizer.inverse(x.to(self.normalizer.scale))
        made = [ids for part in x.split(BATCH) for ids in self.decoder.write(part)]
        return [" ".join(self.subwords.text(ids).split()) for ids in made]

    @torch.no_grad()
    def _vectors(self, sentences: Sequence[str]) -> Float[Tensor, "N D"]:
        """Vectors before normalisation. One sentence at a time, so that no vector depends on its company."""
        if self.borrowed is not None:
            return self.borrowed(sentences)
        device = self.normalizer.scale.device
        return torch.cat([self.encoder(self.subwords([sentence]).to(device)) for sentence in sentences])

    # ---- identity, saving, loading -----------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Says what a vector means: a hash of encoder and normaliser, their settings and weights; the decoder and the bank
        are left out. Kept until the weights change."""
        if self._fingerprint is None:
            state = {name: value for name, value in self.state_dict().items() if not name.startswith("decoder.")}
            described = {**self.config, "merges": self.subwords.merges}
            self._fingerprint = f"text_concepts-{saved.digest(described, state)}"
        return self._fingerprint

    def weights_changed(self) -> None:
        self._fingerprint, self._known, self._bank_vectors = None, {}, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}  # workers of a data loader make their own

    def save(self, path: str | Path) -> None:
        """Write `config.json`, `words.json` and `model.safetensors` into the folder `path`, all or none."""
        self.weights_changed()
        with safe_io.atomic_folder(path, last=saved.CONFIG) as folder:
            merges = [list(pair) for pair in self.subwords.merges]
            safe_io.write_json(folder / settings.WORDS, {"merges": merges, "bank": self.bank})
            saved.write(folder, settings.FORMAT, self._described(), self.state_dict(), self.fingerprint)

    @classmethod
    def from_directory(cls, path: str | Path) -> TextConcepts:
        """A saved tokenizer, in evaluation mode.

        Raises:
            ValueError: files missing, damaged, of other shapes, or not what was saved.
        """
        return cls(pretrained=str(path))

    def _load(self, folder: Path) -> None:
        self.load_state_dict(saved.read_weights(folder, self.state_dict()))
        self.eval()
        saved.check_whole(folder, self.fingerprint, self._described(), self.state_dict())

    def _described(self) -> dict[str, Any]:
        return {**self.config, "words": settings.hash_words(self.subwords.merges, self.bank)}

    @classmethod
    def tiny(cls) -> TextConcepts:
        """A small random one that decodes by its bank, for tests."""
        made = cls(dim=8, width=16, layers=1, heads=2, vocab_size=256, max_bytes=48, sentences=8, bank=cls._words())
        made.normalizer.fit(made._vectors(made.bank))
        return made.eval()

    @staticmethod
    def _words() -> list[str]:
        return ["A red apple.", "A green pear!", "Is it a plum?", "on a table", "Żółw je 🍎."]

    @classmethod
    def examples(cls) -> list[str]:
        """What `tiny` gives back unchanged."""
        first, second, third, fourth, fifth = cls._words()
        return [f"{first} {second}", third, fourth, f"{fifth} {first} {third} {fourth}"]
