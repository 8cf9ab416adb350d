"""What a run writes besides logs: the model as a checkpoint that pipelines load; the rows of `mm predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from mm import hub, safe_io
from mm.ema import EMA
from mm.interfaces import Sampling


class SavePretrained(pl.Callback):
    """After every validation, and at the end of training, `mm.hub.save_pretrained` of the model (averaged weights,
    where `mm.ema.EMA` is on).

    Args:
        path: the folder; by default `model` in the trainer's `default_root_dir`.
        storage: `float16` halves the file.
        sampling: recommended sampling by modality, which pipelines take as their default.
    """

    def __init__(
        self,
        path: str | None = None,
        storage: Literal["float32", "float16"] = "float32",
        sampling: dict[str, Sampling] | None = None,
    ) -> None:
        self.path, self.storage, self.sampling = path, storage, sampling

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Before `on_validation_end`, where EMA gives the trained weights back."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        averages: list[EMA] = [c for c in trainer.callbacks if isinstance(c, EMA)]  # type: ignore[attr-defined]
        for average in averages:
            average.swap_in(pl_module)
        try:
            self._save(trainer, pl_module)
        finally:
            for average in averages:
                average.swap_out(pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self.path or Path(trainer.default_root_dir) / "model"
            hub.save_pretrained(pl_module.model, path, storage=self.storage, sampling=self.sampling)


class WriteRows(pl.Callback):
    """Writes what `predict_step` returns, a list of JSON objects a batch, as lines of `predictions.jsonl` in the trainer's
    `default_root_dir` (`predictions.RANK.jsonl` where several ranks predict). The file appears when it is complete."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rows = []

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.rows += [json.dumps(row) for row in outputs]

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = f"predictions.{trainer.global_rank}.jsonl" if trainer.world_size > 1 else "predictions.jsonl"
        path = Path(trainer.default_root_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        safe_io.write_text(path, "".join(f"{row}\n" for row in self.rows))
        pl.utilities.rank_zero.rank_zero_info(f"wrote {len(self.rows)} rows to {path}")
