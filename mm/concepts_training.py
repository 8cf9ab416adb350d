"""Training of a sentence autoencoder, read from YAML by `mm fit`; the tokenizer itself is named there by `class_path`.

Trains on one device: the whole takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from mm.concepts import PAD, TrainableConcepts
from mm.data.example import BrokenExample, Source
from mm.optimization import optimizer_and_schedule


class ConceptTraining(pl.LightningModule):
    """Trains a tokenizer of sentences: the cross-entropy of each subword, written from the concept with noise on it.

    A batch is a list of sentences. Validation writes sentences from their concepts without noise and logs `val/exact`, the
    share that comes back letter by letter, and `val/cer`, the character error rate (edit distance ÷ characters).

    Args:
        tokenizer: what is trained. Its subwords are learned from the training sentences before the first step.
        noise: largest standard deviation of the noise; each sentence draws its own from 0 up. Channels have variance 1.
        blank: probability that a subword is hidden from those after it, so that they have to be read from the concept
            (word dropout, Bowman et al. 2016).
        merge_dropout: probability that a merge of subwords is left out.
        learning_rate, weight_decay, betas, warmup, final_rate: of Muon (matrices inside the blocks), AdamW (the rest) and
            their schedule, as in `mm.training`.
        save_to: directory that receives the tokenizer (averaged weights, where EMA is on) after every validation.
    """

    def __init__(
        self,
        tokenizer: TrainableConcepts,
        noise: float = 0.5,
        blank: float = 0.3,
        merge_dropout: float = 0.1,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: int = 50,
        final_rate: float = 0.02,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("blank", blank), ("merge_dropout", merge_dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is a probability below 1, got {value}")
        if not 0 <= noise < 100:
            raise ValueError(f"noise is a standard deviation of at least 0 where data have 1, got {noise}")
        self.tokenizer = tokenizer
        self.noise, self.blank, self.merge_dropout = noise, blank, merge_dropout
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup, self.final_rate = warmup, final_rate
        self.save_to = save_to
        self._done: list[tuple[str, str]] = []

    def on_fit_start(self) -> None:
        self.tokenizer.train()
        if not self.tokenizer.subwords.merges:
            self.tokenizer.subwords.fit(self._sentences())

    def _sentences(self) -> list[str]:
        return cast(Any, self.trainer).datamodule.sentences["train"]

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(
            self.tokenizer.parameters(),
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            total=int(self.trainer.estimated_stepping_batches),
            floor=self.final_rate,
            matrices=self.tokenizer.matrices(),
        )

    def on_train_epoch_start(self) -> None:
        self.tokenizer.subwords.drop_merges(self.merge_dropout)

    def on_validation_start(self) -> None:
        self.tokenizer.subwords.drop_merges(0.0)
        self.tokenizer.weights_changed()

    def on_validation_end(self) -> None:
        self.tokenizer.weights_changed()
        self.tokenizer.subwords.drop_merges(self.merge_dropout)

    def training_step(self, batch: list[str], batch_idx: int) -> Tensor:
        tokens = self.tokenizer.subwords(batch).to(self.device)
        concepts = self.tokenizer.encoder(tokens)
        deviation = self.noise * torch.rand(len(concepts), 1, device=self.device)
        noisy = concepts + deviation * torch.randn_like(concepts)
        hidden = torch.rand(tokens.shape, device=self.device) < self.blank
        logits = self.tokenizer.decoder(noisy, tokens, hidden)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), ignore_index=PAD)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: list[str], batch_idx: int) -> None:
        concepts = self.tokenizer.encoder(self.tokenizer.subwords(batch).to(self.device))
        made = self.tokenizer.decoder.write(concepts)
        self._done += zip(map(self.tokenizer.subwords.text, made), batch, strict=True)

    def on_validation_epoch_end(self) -> None:
        figures = reconstruction(*zip(*self._done, strict=True))
        self._done = []
        self.log_dict({f"val/{name}": value for name, value in figures.items()}, prog_bar=True)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._fit_normalizer()
            if self.save_to is not None and not cast(Any, self.trainer).fast_dev_run:
                self.tokenizer.save(self.save_to)

    @torch.no_grad()
    def _fit_normalizer(self) -> None:
        sentences = self._sentences()
        parts = [sentences[n : n + 256] for n in range(0, len(sentences), 256)]
        encoder, subwords = self.tokenizer.encoder, self.tokenizer.subwords
        self.tokenizer.normalizer.fit(torch.cat([encoder(subwords(part).to(self.device)) for part in parts]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["merges"] = [list(pair) for pair in self.tokenizer.subwords.merges]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        size = self.tokenizer.subwords.size
        self.tokenizer.subwords = type(self.tokenizer.subwords)(size, checkpoint["merges"])

    def configure_callbacks(self) -> list[pl.Callback]:
        from mm.resume import RandomState

        return [RandomState()]


def reconstruction(made: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """`exact`, the share of equal sentences, and `cer`, edit distance ÷ characters wanted, over all of them."""
    from torchmetrics.functional.text import char_error_rate

    equal = sum(one == other for one, other in zip(made, wanted, strict=True))
    return {"exact": equal / len(wanted), "cer": float(char_error_rate(list(made), list(wanted)))}


class SentenceDataModule(pl.LightningDataModule):
    """The sentences of the texts of some sources, each once; those to validate with are not among those to train with.

    Args:
        train, validation: sources; their `text` is cut into sentences by the tokenizer that is trained.
        batch_size: sentences a batch. Those of one batch are of similar length.
        seed: of the order.
    """

    def __init__(self, train: list[Source], validation: list[Source], batch_size: int = 128, seed: int = 0) -> None:
        super().__init__()
        if not train or not validation or batch_size < 1:
            raise ValueError(
                f"sentences need a source to train with, one to validate with and batch_size >= 1, got {len(train)}, "
                f"{len(validation)} and {batch_size}"
            )
        self.sources = {"train": train, "validation": validation}
        self.batch_size, self.seed = batch_size, seed
        self.sentences: dict[str, list[str]] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.sentences:
            return
        split = cast(Any, self.trainer).lightning_module.tokenizer.split
        found = {name: self._read(name, split) for name in self.sources}
        known = set(found["train"])
        found["validation"] = [sentence for sentence in found["validation"] if sentence not in known]
        for name, sentences in found.items():
            if not sentences:
                raise ValueError(f"the sources for {name} hold no sentence of their own; give others or another split")
        self.sentences = found

    def _read(self, name: str, split: Any) -> list[str]:
        out: dict[str, None] = {}
        skipped: list[str] = []
        for source in self.sources[name]:
            for index in range(len(source)):
                try:
                    out.update(dict.fromkeys(split(source[index]["text"])))
                except BrokenExample as error:
                    if source.strict:
                        raise
                    skipped.append(str(error))
        if skipped:
            from mm.data.example import warn_skipped

            warn_skipped(name, len(skipped), sum(map(len, self.sources[name])), skipped[0])
        return list(out)

    def train_dataloader(self) -> Any:
        sentences = self.sentences["train"]
        batches = SimilarLengths([len(sentence) for sentence in sentences], self.batch_size, self.seed)
        return DataLoader(cast(Any, sentences), batch_sampler=batches, collate_fn=list)

    def val_dataloader(self) -> Any:
        return DataLoader(cast(Any, self.sentences["validation"]), batch_size=self.batch_size, collate_fn=list)


class SimilarLengths(Sampler[list[int]]):
    """Batches of similar lengths, in an order that is new every epoch: of each 16 batches' worth that is drawn, neighbours in
    length go together."""

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self.lengths, self.size, self.seed, self.epoch = list(lengths), size, seed, 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.lengths), generator=rng).tolist()
        batches: list[list[int]] = []
        for first in range(0, len(order), 16 * self.size):
            chosen = sorted(order[first : first + 16 * self.size], key=self.lengths.__getitem__)
            batches += [chosen[n : n + self.size] for n in range(0, len(chosen), self.size)]
        for number in torch.randperm(len(batches), generator=rng).tolist():
            yield batches[number]
