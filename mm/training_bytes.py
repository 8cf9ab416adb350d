"""Training of a tokenizer of files, read from YAML by `mm fit`; the tokenizer itself is named there by `class_path`.

One epoch reads the data, then the merges are learned from the bytes of all files at once: there are no weights and no steps of an
optimiser. Trains in one process: the whole takes a minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import lightning.pytorch as pl
from torch.utils.data import DataLoader, IterableDataset

from mm.byte_files import FileTokenizer
from mm.data.example import BrokenExample, Source, warn_skipped


class ByteTraining(pl.LightningModule):
    """Learns the byte BPE of a `FileTokenizer`. A batch is a list of raw items.

    Validation logs `val/bytes` and `val/ids`, the mean length of a file, `val/most_ids`, the longest, and `val/lossless`, the
    share whose bytes come back.

    Args:
        tokenizer: what is trained.
        save_to: directory that receives it.
    """

    def __init__(self, tokenizer: FileTokenizer, save_to: str | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False  # there is nothing to step
        self.tokenizer, self.save_to = tokenizer, save_to
        self._files: list[bytes] = []
        self._lengths: list[tuple[int, int, bool]] = []

    def configure_optimizers(self) -> list[Any]:
        return []

    def training_step(self, batch: list[Any], batch_idx: int) -> None:
        self._files += [self.tokenizer.file(raw) for raw in batch]

    def on_validation_start(self) -> None:
        if self._files:
            self.tokenizer.fit(self._files)
            self._files = []

    def validation_step(self, batch: list[Any], batch_idx: int) -> None:
        for raw in batch:
            data, encoded = self.tokenizer.file(raw), self.tokenizer.encode(raw)
            self._lengths.append((len(data), len(encoded), self.tokenizer.bytes_of(encoded) == (data, "")))

    def on_validation_epoch_end(self) -> None:
        sizes, ids, same = zip(*self._lengths, strict=True)
        self._lengths = []
        count = len(ids)
        self.log("val/bytes", sum(sizes) / count)
        self.log("val/ids", sum(ids) / count, prog_bar=True)
        self.log("val/most_ids", float(max(ids)))
        self.log("val/lossless", sum(same) / count)
        if self.save_to is not None and self.trainer.state.fn == "fit" and not cast(Any, self.trainer).fast_dev_run:
            self.tokenizer.save(self.save_to)


class RawDataModule(pl.LightningDataModule):
    """One field of the examples of some sources, as it is.

    Args:
        train, validation: sources.
        field: of their examples.
        batch_size: items a batch.
        limit: only so many of each source, spread over all of it; 0 = all.
    """

    def __init__(
        self,
        train: list[Source],
        validation: list[Source],
        field: str = "image",
        batch_size: int = 64,
        limit: int = 0,
    ) -> None:
        super().__init__()
        if not train or not validation or batch_size < 1 or limit < 0:
            raise ValueError(
                f"expected a source to train with, one to validate with, batch_size >= 1 and limit >= 0, got {len(train)}, "
                f"{len(validation)}, {batch_size} and {limit}"
            )
        self.train, self.validation = train, validation
        self.field, self.batch_size, self.limit = field, batch_size, limit

    def _loader(self, sources: list[Source]) -> Any:
        return DataLoader(Items(sources, self.field, self.limit), batch_size=self.batch_size, collate_fn=list)

    def transfer_batch_to_device(self, batch: list[Any], device: Any, dataloader_idx: int) -> list[Any]:
        return batch  # raw items are no tensors, and need not be of a kind that Lightning knows

    def train_dataloader(self) -> Any:
        return self._loader(self.train)

    def val_dataloader(self) -> Any:
        return self._loader(self.validation)


class Items(IterableDataset[Any]):
    """One field of examples; broken ones are skipped and counted (a strict source raises)."""

    def __init__(self, sources: list[Source], field: str, limit: int) -> None:
        self.sources, self.field, self.limit = sources, field, limit

    def __iter__(self) -> Iterator[Any]:
        for source in self.sources:
            skipped: list[str] = []
            every = -(-len(source) // self.limit) if self.limit else 1
            for index in range(0, len(source), every):
                try:
                    yield source[index][self.field]
                except BrokenExample as error:
                    if source.strict:
                        raise
                    skipped.append(str(error))
            if skipped:
                warn_skipped(source.what, len(skipped), len(range(0, len(source), every)), skipped[0])
