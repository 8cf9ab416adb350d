"""Writes the model as a checkpoint that pipelines load, while it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from mm import hub
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
