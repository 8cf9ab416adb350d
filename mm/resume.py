"""Exact resumption: the state of the random generators, which Lightning's checkpoints leave out."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class RandomState(pl.Callback):
    """Dropout, noise and replaced codes go on after a resumption as they would have without it.

    A checkpoint is written by one rank and read by all; the others take a state that follows from it.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = dict(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Last of all that draws before the first batch."""
        saved, self.saved = self.saved, {}
        if "cpu" in saved:
            torch.set_rng_state(saved["cpu"].cpu())
        if "cuda" in saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda"].cpu())
        if saved and trainer.global_rank:
            torch.manual_seed(int(torch.randint(1 << 31, ())) + trainer.global_rank)
