"""Training of a lossy tokenizer: reconstruction, structure, optional adversary; what is measured while it learns.

`mm fit` reads it from YAML, the tokenizer itself by `class_path`:

    model:
      class_path: mm.training_tokenizer.TokenizerModule
      init_args:
        tokenizer: {class_path: mm.tokenizers.image_vq.ImageVQ, init_args: {size: 32}}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.measured import MeasuredTraining
from mm.optimization import optimizer_and_schedule
from mm.reconstruction import (
    PatchDiscriminator,
    adaptive_weight,
    count_codes,
    gradient_loss,
    hinge_loss,
    psnr,
    ssim_loss,
)
from mm.trainable import TrainableTokenizer

STATISTICS = 4096
"""Training pictures that statistics of latents are taken from."""


class TokenizerModule(MeasuredTraining):
    """Trains any `TrainableTokenizer` of pictures, or of clips.

    A batch is a `PictureBatch`-like pair: pictures (B, 3, H, W) in [−1, 1], or clips (B, T, 3, H, W), and the source of each, by
    which the validation figures are also split. Losses and figures are those of single pictures.

    Args:
        tokenizer: what is trained.
        l1, l2: weights of the mean absolute and the mean squared error.
        structural: weight of the structural loss, `structure` which one: differences at several scales, or 1 − SSIM.
        adversarial: weight of the PatchGAN hinge loss, relative to the other gradients; 0 = no discriminator.
        adversarial_start: optimiser step at which the adversary begins.
        perceptual: weight of the perceptual loss; needs `perceptual_weights`.
        perceptual_weights: a safetensors file of a torchvision VGG-16 state dict.
        learning_rate, weight_decay, betas: of AdamW; matrices and kernels decay, vectors do not.
        warmup: steps of linear warm-up; then a cosine to `final_rate` times the rate at the last step.
        gradient_clip: largest norm of the gradient; 0 = no clipping.
        warm_start: how many training pictures the tokenizer's closed-form start is computed from; 0 = none.
        channels_last: keep pictures and kernels in the channels-last memory format.
        frozen: parts of the tokenizer (`encoder`, `quantizer`) that stay as they are. With both frozen only the decoder
            learns: pictures get better while every id keeps its meaning for models already trained on them.
        save_to: directory that receives the tokenizer (averaged weights, where EMA is on) after every validation.
        pictures: how many pairs the logged picture grid shows.
    """

    figures = ("psnr", "ssim", "psnr_of_mean_error")

    def __init__(
        self,
        tokenizer: TrainableTokenizer,
        l1: float = 1.0,
        l2: float = 0.0,
        structural: float = 0.5,
        structure: Literal["gradient", "ssim"] = "gradient",
        adversarial: float = 0.0,
        adversarial_start: int = 10_000,
        perceptual: float = 0.0,
        perceptual_weights: str | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup: int = 100,
        final_rate: float = 0.01,
        gradient_clip: float = 1.0,
        warm_start: int = 4096,
        channels_last: bool = True,
        frozen: Sequence[str] = (),
        save_to: str | None = None,
        pictures: int = 16,
    ) -> None:
        super().__init__()
        weights = dict(l1=l1, l2=l2, structural=structural, adversarial=adversarial, perceptual=perceptual)
        if min(weights.values()) < 0 or l1 + l2 <= 0:
            raise ValueError(f"loss weights must not be negative, and l1 or l2 positive, got {weights}")
        if perceptual and not perceptual_weights:
            raise ValueError("a perceptual loss needs perceptual_weights, a safetensors file of a VGG-16")
        self.tokenizer = tokenizer
        parts = dict(cast(torch.nn.Module, tokenizer).named_children())
        if unknown := [name for name in frozen if name not in parts]:
            raise ValueError(f"frozen names {unknown}, the tokenizer has the parts {sorted(parts)}")
        self.frozen = [parts[name].requires_grad_(False) for name in frozen]
        self.weights = weights
        self.structure = structure
        self.adversarial_start = adversarial_start
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup, self.final_rate, self.gradient_clip = warmup, final_rate, gradient_clip
        self.warm_start, self.channels_last = warm_start, channels_last
        self.save_to, self.pictures = save_to, pictures
        self.discriminator = PatchDiscriminator() if adversarial else None
        self.perceptual: torch.nn.Module | None = None
        if perceptual_weights and perceptual:
            from mm.perceptual import VGGDistance

            self.perceptual = VGGDistance(perceptual_weights)
        # Two optimisers take turns only where there is an adversary.
        self.automatic_optimization = self.discriminator is None
        self.batches_done = 0
        self._shown: tuple[Tensor, Tensor] | None = None

    # ---- set-up ------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        # A loaded tokenizer comes in evaluation mode, in which its codebook would never move.
        cast(torch.nn.Module, self.tokenizer).train()
        self.tokenizer.synchronise(self.trainer.world_size > 1)
        self._warm_start()
        if self.channels_last:
            cast(Any, self.tokenizer).to(memory_format=torch.channels_last)

    def _warm_start(self) -> None:
        if not self.warm_start or self.trainer.global_step or self.trainer.ckpt_path:
            return
        state = torch.get_rng_state()
        # Every rank reads the same pictures in the same order with the same seed, and so starts from the same weights.
        taken = self._training_pictures(self.warm_start)
        torch.manual_seed(0)
        self.tokenizer.warm_start(taken)
        torch.set_rng_state(state)

    def _training_pictures(self, count: int) -> Tensor:
        """The first pictures of the training data, or as many clips as have so many, in an order of their own."""
        taken: list[Tensor] = []
        for x, _ in cast(Any, self.trainer).datamodule.held_in_batches():
            taken.append(x)
            if sum(len(_pictures(part)) for part in taken) >= count:
                break
        each = len(_pictures(taken[0][:1]))
        return torch.cat(taken)[: math.ceil(count / each)].to(self.device)

    def on_fit_end(self) -> None:
        self.tokenizer.synchronise(False)

    def _steps(self) -> list[int]:
        """How many steps the tokenizer's optimiser will make, and the discriminator's."""
        total = int(self.trainer.estimated_stepping_batches)
        if self.discriminator is None:
            return [total]
        start = min(self.adversarial_start, total)
        # `max_steps` counts the steps of both optimisers; epochs count batches.
        both = total == self.trainer.max_steps
        first = start + (total - start) // 2 if both else total
        return [first, max(1, first - start)]

    def configure_optimizers(self) -> Any:
        modules = [self.tokenizer, *([self.discriminator] if self.discriminator is not None else [])]
        result = [
            optimizer_and_schedule(
                module.parameters(),
                lr=self.learning_rate,
                betas=self.betas,
                weight_decay=self.weight_decay,
                warmup=self.warmup,
                total=total,
                floor=self.final_rate,
            )
            for module, total in zip(modules, self._steps(), strict=True)
        ]
        return result[0] if len(result) == 1 else result

    # ---- one step ----------------------------------------------------------------------------------------------------

    def losses(self, x: Tensor, output: Tensor) -> dict[str, Tensor]:
        """The reconstruction terms that have a weight, not yet weighted."""
        x, output = _pictures(x), _pictures(output)
        terms: dict[str, Tensor] = {}
        if self.weights["l1"]:
            terms["l1"] = F.l1_loss(output, x)
        if self.weights["l2"]:
            terms["l2"] = F.mse_loss(output, x)
        if self.weights["structural"]:
            terms["structural"] = (gradient_loss if self.structure == "gradient" else ssim_loss)(output, x)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output, x)
        return terms

    def _prepare(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, source = batch
        last = self.channels_last and x.ndim == 4
        return (x.contiguous(memory_format=torch.channels_last) if last else x), source

    def on_train_batch_start(self, *args: Any) -> None:
        # Evaluation mode also stops the codebook's moving averages and the replacement of dead codes.
        for part in self.frozen:
            part.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        x, _ = self._prepare(batch)
        out = self.tokenizer.reconstruct(x)
        self._train_counts = count_codes(self._train_counts, out.ids, self.tokenizer)
        terms = self.losses(x, out.output)
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        terms["bottleneck"] = out.loss
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()}, batch_size=len(x))
        if self.discriminator is None:
            total = loss + out.loss
            self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(x))
            return total
        self._adversarial_step(x, out.output, loss, out.loss)
        return None

    def _adversarial_step(self, x: Tensor, output: Tensor, loss: Tensor, bottleneck: Tensor) -> None:
        assert self.discriminator is not None
        optimizers, schedules = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        total = loss + bottleneck
        active = self.batches_done >= self.adversarial_start
        self.batches_done += 1
        if active:
            self.discriminator.requires_grad_(False)
            generator = -self.discriminator(_pictures(output)).mean()
            self.discriminator.requires_grad_(True)
            balance = adaptive_weight(loss, generator, self.tokenizer.last_layer())
            total = total + self.weights["adversarial"] * balance * generator
            self.log("train/generator", generator.detach(), batch_size=len(x))
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(x))
        self._step(optimizers[0], schedules[0], total)
        if active:
            judge = hinge_loss(self.discriminator(_pictures(x)), self.discriminator(_pictures(output.detach())))
            self.log("train/discriminator", judge.detach(), batch_size=len(x))
            self._step(optimizers[1], schedules[1], judge)

    def _step(self, optimizer: Any, schedule: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.gradient_clip:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
        optimizer.step()
        schedule.step()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if self.gradient_clip:
            norm = torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), self.gradient_clip)
            self.log("train/gradient_norm", norm)

    def on_train_batch_end(self, *args: Any) -> None:
        self.tokenizer.weights_changed()

    # ---- validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._shown = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        from torchmetrics.functional.image import structural_similarity_index_measure

        x, source = self._prepare(batch)
        out = self.tokenizer.reconstruct(x)
        self._val_counts = count_codes(self._val_counts, out.ids, self.tokenizer)
        source = source.repeat_interleave(len(_pictures(x)) // len(x))
        x, made = _pictures(x), _pictures(out.output).float()
        similarity = structural_similarity_index_measure(made.clamp(-1, 1), x, data_range=2.0, reduction="none")
        error = F.mse_loss(made.clamp(-1, 1), x, reduction="none").flatten(1).mean(1) / 4
        figures = torch.stack([psnr(made, x), cast(Tensor, similarity), error, torch.ones_like(error)])
        for name in source.unique().tolist():
            self.measured(name, figures[:, source == name].double().sum(1))
        if self._shown is None:
            self._shown = (x[: self.pictures], made[: self.pictures])

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """For every picture or clip its source, its ids if it has any, and the PSNR of what they decode to (dB)."""
        x, source = self._prepare(batch)
        out = self.tokenizer.reconstruct(x)
        names = getattr(getattr(self.trainer, "datamodule", None), "names", None)
        rows: list[dict[str, Any]] = [
            {"source": names[s] if names else s, "psnr": decibels}
            for s, decibels in zip(source.tolist(), psnr(out.output.float(), x).tolist(), strict=True)
        ]
        if out.ids is not None:
            rows = [{**row, "ids": ids.flatten().tolist()} for row, ids in zip(rows, out.ids, strict=True)]
        return rows

    def configure_callbacks(self) -> list[L.Callback]:
        from mm.export import WriteRows
        from mm.resume import RandomState

        return [WriteRows(), RandomState()]

    def means(self, values: list[float]) -> list[float]:
        return [*values[:2], -10 * math.log10(max(values[2], 1e-10))]

    def prepare_saving(self) -> None:
        self.tokenizer.before_saving(self._training_pictures(STATISTICS))

    def validated(self) -> None:
        """Originals above, decoded below, where a TensorBoard logger runs."""
        from lightning.pytorch.loggers import TensorBoardLogger

        if self._shown is None or not self.trainer.is_global_zero:
            return
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                rows = [((t.float().clamp(-1, 1) + 1) / 2).unbind(0) for t in self._shown]
                grid = torch.cat([torch.cat(row, dim=2) for row in rows], dim=1)
                logger.experiment.add_image("pictures", grid, self.global_step)

    # ---- exact resumption --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokenizer_module"] = {"batches_done": self.batches_done}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches_done = int(checkpoint.get("tokenizer_module", {}).get("batches_done", 0))


def _pictures(x: Tensor) -> Tensor:
    """Of clips (B, T, 3, H, W) all their frames; pictures as they are."""
    return x.flatten(0, -4)
