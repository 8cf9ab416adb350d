"""Training of a tokenizer of shapes, and what is measured while it learns.

`mm fit` reads it from YAML, the tokenizer itself by `class_path`:

    model:
      class_path: mm.training_shapes.ShapeTokenizerModule
      init_args:
        tokenizer: {class_path: mm.tokenizers.voxel_vq.VoxelVQ}
"""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mm.data.shape_batches import ShapeBatch
from mm.measured import MeasuredTraining
from mm.optimization import optimizer_and_schedule
from mm.reconstruction import count_codes
from mm.shape_tokenizer import ShapeTokenizer
from mm.volume import Rendering, pixels


class ShapeTokenizerModule(MeasuredTraining):
    """Trains any `ShapeTokenizer` on batches of `mm.data.shape_batches`.

    Args:
        tokenizer: what is trained.
        distance: weight of the mean absolute error of solidity; beyond the band within which distances are known, only the side
            counts. `near`: how much more than elsewhere it counts within the band.
        bce: weight of the cross-entropy of what is inside. `positive`: weight of cells that are, against those that aren't.
        dice: weight of 1 − the overlap (Dice) of what is inside, of each shape by itself.
        sharpness: logits that solidity stands for in these two.
        rendering: what is learned from pictures too, for which the data needs `views`; with distance, bce and dice 0, from these
            alone.
        learning_rate, weight_decay, betas: of AdamW; matrices and kernels decay, vectors do not.
        warmup: steps of linear warm-up; then a cosine to `final_rate` times the rate at the last step.
        warm_start: how many training shapes the tokenizer's closed-form start is computed from; 0 = none.
        save_to: directory that receives the tokenizer (averaged weights, where EMA is on) after every validation.
    """

    figures = ("iou", "iou_above_0.9", "volume_error")

    def __init__(
        self,
        tokenizer: ShapeTokenizer,
        distance: float = 1.0,
        near: float = 4.0,
        bce: float = 1.0,
        positive: float = 2.0,
        dice: float = 1.0,
        sharpness: float = 10.0,
        rendering: Rendering | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup: int = 50,
        final_rate: float = 0.01,
        warm_start: int = 512,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        self.weights = dict(distance=distance, bce=bce, dice=dice)
        nothing = max(self.weights.values()) == 0 and rendering is None
        if min(self.weights.values()) < 0 or nothing or min(near, positive, sharpness) <= 0:
            raise ValueError(
                f"loss weights must not be negative, and one positive, got {self.weights}; near, positive and sharpness must be "
                f"above 0, got {near}, {positive} and {sharpness}"
            )
        self.tokenizer, self.rendering = tokenizer, rendering
        self.near, self.positive, self.sharpness = near, positive, sharpness
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup, self.final_rate, self.warm_start, self.save_to = warmup, final_rate, warm_start, save_to

    # ---- set-up ------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        # A loaded tokenizer comes in evaluation mode, in which its codebook would never move.
        self.tokenizer.train()
        self.tokenizer.synchronise(self.trainer.world_size > 1)
        if not self.warm_start or self.trainer.global_step or self.trainer.ckpt_path:
            return
        state = torch.get_rng_state()
        # Every rank reads the same shapes in the same order with the same seed, and so starts from the same weights.
        taken: list[Tensor] = []
        for batch in cast(Any, self.trainer).datamodule.held_in_batches():
            taken.append(self._read(batch))
            if sum(map(len, taken)) >= self.warm_start:
                break
        torch.manual_seed(0)
        self.tokenizer.warm_start(torch.cat(taken)[: self.warm_start].to(self.device))
        torch.set_rng_state(state)

    def on_fit_end(self) -> None:
        self.tokenizer.synchronise(False)

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(
            self.tokenizer.parameters(),
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            total=int(self.trainer.estimated_stepping_batches),
            floor=self.final_rate,
        )

    def configure_callbacks(self) -> list[L.Callback]:
        from mm.resume import RandomState

        return [RandomState()]

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _read(self, batch: ShapeBatch) -> Tensor:
        """What of a batch the tokenizer reads."""
        if not self.tokenizer.looks[0]:
            return batch.solidity
        if batch.views is None or (batch.views.shape[1], batch.views.shape[-1]) != self.tokenizer.looks:
            made = None if batch.views is None else list(batch.views.shape)
            raise ValueError(
                f"the tokenizer reads views {self.tokenizer.looks}, the data gives {made}; set views alike"
            )
        return batch.views

    @staticmethod
    def _pictures(batch: ShapeBatch) -> Tensor:
        if batch.views is None:
            raise ValueError(
                "rendering learns from pictures, and the data gives none; set views of the data, such as [6, 64]"
            )
        return batch.views

    def losses(self, output: Float[Tensor, "B P"], target: Float[Tensor, "B P"]) -> dict[str, Tensor]:
        """The terms, not yet weighted."""
        output = output.float()
        inside = (target > 0).float()
        # where the target is cut off, more of the same side is as good
        over = ((target >= 1) & (output > 1)) | ((target <= -1) & (output < -1))
        error = (output - target).abs().masked_fill(over, 0.0)
        weight = torch.where(target.abs() < 1, self.near, 1.0)
        logits = self.sharpness * output
        bce = F.binary_cross_entropy_with_logits(logits, inside, pos_weight=output.new_tensor(self.positive))
        share = logits.sigmoid()
        both = (share * inside).sum(1)
        dice = 1 - ((2 * both + 1) / (share.sum(1) + inside.sum(1) + 1)).mean()
        return {"distance": (weight * error).sum() / weight.sum(), "bce": bce, "dice": dice}

    def training_step(self, batch: ShapeBatch, batch_idx: int) -> Tensor:
        out = self.tokenizer.learn(self._read(batch), batch.solidity)
        self._train_counts = count_codes(self._train_counts, out.ids, self.tokenizer)
        terms = self.losses(out.output, out.target)
        weights = dict(self.weights)
        if self.rendering is not None:
            seen = self.rendering.losses(out.field, pixels(self._pictures(batch), self.rendering.rays))
            terms |= seen
            weights |= {name: getattr(self.rendering, name) for name in seen}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum() + out.loss.float()
        terms["bottleneck"] = out.loss
        count = len(batch.solidity)
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()}, batch_size=count)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=count)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.tokenizer.weights_changed()

    # ---- validation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: ShapeBatch, batch_idx: int) -> None:
        out = self.tokenizer.reconstruct(self._read(batch))
        self._val_counts = count_codes(self._val_counts, out.ids, self.tokenizer)
        made, truth = out.output.flatten(1) > 0, batch.solidity.flatten(1) > 0
        either = (made | truth).sum(1).double()
        overlap = torch.where(either > 0, (made & truth).sum(1) / either.clamp_min(1), 1.0)
        volume = (made.sum(1).double() / truth.sum(1).clamp_min(1) - 1).abs()
        figures = torch.stack([overlap, (overlap >= 0.9).double(), volume, torch.ones_like(overlap)])
        self.measured(0, figures.sum(1))
