"""What the training of any tokenizer measures and keeps at the end of a validation: figures by source, the use of its codes, and
the tokenizer itself."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import lightning as L
import torch
from torch import Tensor

from mm.reconstruction import usage_and_perplexity


class MeasuredTraining(L.LightningModule):
    """Subclasses set `tokenizer` and `save_to`, and in a validation step count codes in `_val_counts` and call `measured`."""

    figures: ClassVar[tuple[str, ...]]
    """Names of what is measured; the first one is on the progress bar."""
    tokenizer: Any
    save_to: str | None

    def __init__(self) -> None:
        super().__init__()
        self._train_counts: Tensor | None = None
        self._val_counts: Tensor | None = None
        self._val: dict[int, list[Tensor]] = {}

    def measured(self, source: int, sums: Tensor) -> None:
        """Sums of the figures over some examples of a source, and how many these are (float64 [figures + 1])."""
        self._val.setdefault(source, []).append(sums)

    def means(self, values: list[float]) -> list[float]:
        """What is logged, of the means of the sums."""
        return values

    def validated(self) -> None:  # noqa: B027 - optional
        """Log what is more than numbers."""

    def prepare_saving(self) -> None:  # noqa: B027 - optional
        """Before the tokenizer is saved."""

    def on_validation_epoch_start(self) -> None:
        self._val, self._val_counts = {}, None

    def on_validation_epoch_end(self) -> None:
        names = getattr(getattr(self.trainer, "datamodule", None), "names", None)
        count, width = len(names) if names else max(self._val, default=0) + 1, len(self.figures) + 1
        table = torch.zeros(count, width, dtype=torch.double, device=self.device)
        for index, parts in self._val.items():
            table[index] = torch.stack(parts).sum(0)
        # Every rank held a part: sums, then one division.
        table = cast(Tensor, self.all_gather(table)).reshape(-1, count, width).sum(0)
        for index in range(count):
            if table[index, -1] > 0:
                self._log_figures(table[index], f"/{names[index] if names else index}")
        self._log_figures(table.sum(0), "")
        self._log_codes("val", self._val_counts)
        self.validated()
        if self.trainer.sanity_checking:
            return
        self._log_codes("train", self._train_counts)
        self._train_counts = None
        if self.save_to is not None and self.trainer.is_global_zero and self.trainer.state.fn == "fit":
            self.prepare_saving()
            self.tokenizer.save(self.save_to)

    def _log_figures(self, sums: Tensor, suffix: str) -> None:
        values = self.means((sums[:-1] / sums[-1].clamp_min(1)).tolist())
        for number, (name, value) in enumerate(zip(self.figures, values, strict=True)):
            self.log(f"val/{name}{suffix}", value, prog_bar=not number and not suffix, rank_zero_only=True)

    def _log_codes(self, part: str, counts: Tensor | None) -> None:
        if counts is None:
            return
        counts = cast(Tensor, self.all_gather(counts)).reshape(-1, *counts.shape).sum(0)
        usage, perplexity = usage_and_perplexity(counts)
        self.log(f"{part}/usage", usage, prog_bar=part == "val", rank_zero_only=True)
        self.log(f"{part}/perplexity", perplexity, rank_zero_only=True)
