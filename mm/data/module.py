"""The LightningDataModule: sources + templates + tokenizers → packed token streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from mm.data.cache import CachedSource, TokenCache, open_cache
from mm.data.example import BrokenExample, Source
from mm.data.feeds import DocumentMaker, Feed, MixtureFeed, Part, StreamFeed, ToStream
from mm.data.loader import PackedLoader, estimate_batches
from mm.data.streaming import StreamingShards
from mm.interfaces import ModalityTokenizer

CACHED = {"image": "image", "audio": "speech", "video": "video", "shape": "shape"}
"""Field → modality of what is cached by default."""
FIRST = 16
"""Examples that are looked at to see which fields a source has."""


class MultimodalDataModule(pl.LightningDataModule):
    """Batches are packed `TokenStream`s of at most `tokens` positions; documents are never split.

    What is in a batch depends on the data, the seed and the number of ranks, not on `num_workers`. Training batches go
    on without end and an epoch is `batches_per_epoch` of them; the training loader's state is saved with Lightning's
    checkpoints, and a resumed run gets the batches that the interrupted one would have got.

    Args:
        train: the mixture; `StreamingShards` must be its only entry.
        validation: the same, seen once, in order (give sources with `split: holdout`). Condition dropout and other
            draws are the same every time.
        tokens: budget of a batch in positions.
        to_stream: lays out a document; by default the `build_document` of the model being trained.
        tokenizers: modality → tokenizer; by default those of the model being trained.
        cache: folder for pre-tokenised fields. Encodes each field of `cached` once, before training.
        cached: field of the examples → modality whose tokenizer encodes it; sources that lack a field go without. By
            default `image` for the modality image, `audio` for speech and `video` for video, as far as the model has these.
        batches_per_epoch: by default as many as show every example about once; needed for streams.
        seed: of order, mixture, dropout and whatever the layout draws.
        lookahead, chunk: documents that wait while a batch is chosen; documents made at a time.
        oversize: what to do with a document longer than a batch: `error`, or `skip` with a counted warning.
        strict: raise at the first broken example instead of skipping it.
    """

    def __init__(
        self,
        train: list[Part],
        validation: list[Part] | None = None,
        tokens: int = 4096,
        to_stream: ToStream | None = None,
        tokenizers: Mapping[str, ModalityTokenizer] | None = None,
        cache: str | None = None,
        cached: dict[str, str] | None = None,
        batches_per_epoch: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        lookahead: int = 128,
        chunk: int = 16,
        oversize: Literal["error", "skip"] = "error",
        strict: bool = False,
    ) -> None:
        super().__init__()
        if not train:
            raise ValueError("the data module needs at least one training source")
        self.parts = {"train": list(train), "validation": list(validation or [])}
        self.tokens, self.seed, self.num_workers = tokens, seed, num_workers
        self._given = (to_stream, tokenizers)
        self.cache, self.cached = cache, None if cached is None else dict(cached)
        self.batches_per_epoch, self.lookahead, self.chunk = batches_per_epoch, lookahead, chunk
        self.oversize: Literal["error", "skip"] = oversize
        self.strict = strict
        self._caches: dict[tuple[str, str], TokenCache] = {}

    def _model(self) -> Any:
        module = getattr(self.trainer, "lightning_module", None)
        model = getattr(module, "model", None)
        if model is None:
            raise ValueError(
                "the data module has no trainer with a model to lay documents out; give to_stream and tokenizers"
            )
        return model

    @property
    def to_stream(self) -> ToStream:
        return self._given[0] or self._model().build_document

    @property
    def tokenizers(self) -> Mapping[str, ModalityTokenizer]:
        if self._given[1] is not None:
            return self._given[1]
        return {} if self._given[0] else {entry.name: entry.tokenizer for entry in self._model().modalities}

    def prepare_data(self) -> None:
        """Build the caches that are missing (Lightning calls this in one process a machine)."""
        self._open_caches()

    def setup(self, stage: str | None = None) -> None:
        self._open_caches()

    def _wanted(self) -> dict[str, str]:
        """Field → modality of what is cached."""
        known = self.tokenizers
        if self.cached is None:
            found = {field: modality for field, modality in CACHED.items() if modality in known}
            if not found:
                raise ValueError(f"cache is given, but not which fields; name them in cached; there is {sorted(known)}")
            return found
        for modality in self.cached.values():
            if modality not in known:
                raise ValueError(f"cached names the modality {modality!r}; there is {sorted(known)}")
        return self.cached

    def _open_caches(self) -> None:
        if self.cache is None:
            return
        parts = [*self.parts["train"], *self.parts["validation"]]
        sources = [leaf for part in parts for leaf in _leaves(part.source)]
        for field, modality in self._wanted().items():
            having = [source for source in sources if _has(source, field)]
            if sources and not having and self.cached is not None:
                raise ValueError(f"cached names the field {field!r}, which none of the sources has")
            for source in having:
                name = (source.identity + str(source.caption), field)
                if name not in self._caches:
                    bar = _Bar(f"encoding {field} of {source.what}")
                    tokenizer = self.tokenizers[modality]
                    self._caches[name] = open_cache(source, tokenizer, Path(self.cache), field, progress=bar)
                    bar.close()

    def _with_caches(self, parts: Sequence[Part]) -> list[Part]:
        out = []
        for part in parts:
            source = part.source
            if self.cache is not None and not isinstance(source, StreamingShards):
                source = self._with_cache(source)
            out.append(Part(source=source, template=part.template, weight=part.weight))
        return out

    def _with_cache(self, source: Source) -> Source:
        if source.members:
            return source.of([self._with_cache(member) for member in source.members])
        name = source.identity + str(source.caption)
        return CachedSource(source, {field: c for (of, field), c in self._caches.items() if of == name})

    def loader(self, which: Literal["train", "validation"]) -> PackedLoader:
        """The loader of one set: endless for training, once through in order for validation."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        parts = self._with_caches(self.parts[which])
        make = DocumentMaker(self.to_stream, self.tokenizers, self.seed if which == "train" else self.seed + 1)
        training = which == "train"
        batches = self.batches_per_epoch if training else None
        feed: Feed
        if training and len(parts) == 1 and isinstance(parts[0].source, StreamingShards):
            if batches is None:
                raise ValueError("the length of a stream is unknown; set batches_per_epoch")
            feed = StreamFeed(parts[0], make, rank=rank, world=world, chunk=self.chunk)
        else:
            feed = MixtureFeed(
                parts,
                make,
                shuffle=training,
                epochs=None if training else 1,
                rank=rank,
                world=world,
                chunk=self.chunk,
            )
            if training and batches is None:
                batches = estimate_batches(feed, self.tokens)
        return PackedLoader(
            feed,
            self.tokens,
            batches=batches,
            lookahead=self.lookahead,
            num_workers=self.num_workers,
            oversize=self.oversize,
            strict=self.strict,
            rank=rank,
            world=world,
        )

    def train_dataloader(self) -> PackedLoader:
        return self.loader("train")

    def val_dataloader(self) -> PackedLoader | list[PackedLoader]:
        return self.loader("validation") if self.parts["validation"] else []

    def test_dataloader(self) -> PackedLoader | list[PackedLoader]:
        return self.val_dataloader()

    def predict_dataloader(self) -> PackedLoader | list[PackedLoader]:
        return self.val_dataloader()


def _leaves(source: Source | StreamingShards) -> list[Source]:
    """The sources whose items are cached: of those that are made of others, these."""
    if isinstance(source, StreamingShards):
        return []
    return [leaf for member in source.members for leaf in _leaves(member)] if source.members else [source]


def _has(source: Source, field: str) -> bool:
    """Whether one of the first examples has the field."""
    whole = source.whole()
    for index in range(min(FIRST, len(whole))):
        try:
            if field in whole[index]:
                return True
        except BrokenExample:
            continue
    return False


class _Bar:
    """Progress of building a cache; appears only when there is something to build."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=self.text, unit="item")
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
