"""Exponential moving average of the weights: one float32 shadow, swapped in for validation, saved in checkpoints."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor


class EMA(L.Callback):
    """Keeps shadow ← d·shadow + (1 − d)·weights after every optimiser step and validates with the shadow.

    The decay warms up, d = min(decay, (1 + n) / (10 + n)) after n updates, so that early weights are forgotten. The
    shadow is float32 whatever the precision of the weights: at d = 0.9999 a bfloat16 average would never move. It covers
    trained parameters and floating-point buffers (a codebook kept by averages must fit the averaged encoder); other
    buffers are copied as they are.

    During validation, testing and prediction the module holds the shadow's values; hooks of the module up to
    `on_validation_epoch_end` see them. The trained weights are back before any checkpoint is written.

    Args:
        decay: d after the warm-up.
        every: optimiser steps between updates.
    """

    def __init__(self, decay: float = 0.999, every: int = 1) -> None:
        if not 0 <= decay < 1 or every < 1:
            raise ValueError(f"decay must be in [0, 1) and every at least 1, got {decay} and {every}")
        self.decay, self.every = decay, every
        self.updates = 0
        self.last_step = 0
        self.shadow: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] | None = None

    @property
    def current_decay(self) -> float:
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @staticmethod
    def _tracked(module: torch.nn.Module) -> dict[str, Tensor]:
        persistent = module.state_dict(keep_vars=True)
        found: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad and n in persistent}
        found |= {n: b for n, b in module.named_buffers() if b.is_floating_point() and n in persistent}
        for prefix, part in module.named_modules():
            if not getattr(part, "averaged", True):  # statistics that are taken from data, not learned step by step
                for name, _ in part.named_buffers(prefix, recurse=False):
                    found.pop(name, None)
        return found

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """One step of the average."""
        tracked = self._tracked(module)
        if not self.shadow:
            self.shadow = {n: t.detach().float().clone() for n, t in tracked.items()}
        names = list(tracked)
        shadow = [self.shadow[n] for n in names]
        torch._foreach_lerp_(shadow, [tracked[n].detach().float() for n in names], 1 - self.current_decay)
        self.updates += 1

    @torch.no_grad()
    def swap_in(self, module: torch.nn.Module) -> None:
        """The module takes the shadow's values; its own are kept aside. Nothing happens before the first update."""
        if not self.shadow or self._weights is not None:
            return
        tracked = self._tracked(module)
        self._weights = {n: t.detach().clone() for n, t in tracked.items()}
        for name, tensor in tracked.items():
            tensor.copy_(self.shadow[name])

    @torch.no_grad()
    def swap_out(self, module: torch.nn.Module) -> None:
        """The module takes its own values back."""
        if self._weights is None:
            return
        for name, tensor in self._tracked(module).items():
            tensor.copy_(self._weights[name])
        self._weights = None

    # ---- Lightning ---------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.shadow = {n: t.to(pl_module.device) for n, t in self.shadow.items()}
        if self.shadow:
            self._check(pl_module)
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Steps, not batches: with accumulated gradients several batches make one step.
        if trainer.global_step - self.last_step >= self.every:
            self.last_step = trainer.global_step
            self.update(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.swap_out(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.swap_out(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = int(state_dict["updates"])
        self.shadow = {n: t.float().clone() for n, t in state_dict["shadow"].items()}

    def _check(self, module: torch.nn.Module) -> None:
        expected = {n: tuple(t.shape) for n, t in self._tracked(module).items()}
        found = {n: tuple(t.shape) for n, t in self.shadow.items()}
        if expected != found:
            name = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            raise ValueError(
                f"the checkpoint's averaged weights do not fit the model: {name} has shape "
                f"{found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            )
