"""Training of a speech tokenizer: spectra at several resolutions, and what is measured while it learns.

`mm fit` reads it from YAML, the tokenizer itself by `class_path`:

    model:
      class_path: mm.training_speech.SpeechTokenizerModule
      init_args:
        tokenizer: {class_path: mm.tokenizers.speech_codec.SpeechCodec}
"""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from mm.measured import MeasuredTraining
from mm.optimization import optimizer_and_schedule
from mm.reconstruction import count_codes
from mm.speech_losses import SpectralLosses, SpeechDiscriminators
from mm.speech_tokenizer import SpeechTokenizer

STATISTICS = 256
"""Training crops that statistics of latents are taken from, and to which codebooks are fitted."""


class SpeechTokenizerModule(MeasuredTraining):
    """Trains any `SpeechTokenizer`.

    A batch is a pair: sounds (B, S) at the tokenizer's rate, and the source of each, by which the validation figures are also
    split.

    Args:
        tokenizer: what is trained.
        stft: weight of the distances of spectra at several resolutions.
        mel: weight of the L1 distance of log-mel frames.
        adversarial: weight of the networks that judge spectra (`mm.speech_losses`), which are trained beside the tokenizer by
            the same optimiser; 0 = none.
        features: weight of the distance of their maps, where there are any.
        adversarial_start: step at which they begin to count; they learn from the first step on.
        learning_rate, weight_decay, betas: of AdamW; matrices and kernels decay, vectors do not.
        warmup: steps of linear warm-up; then a cosine to `final_rate` times the rate at the last step.
        warm_start: how many training crops the tokenizer's codebooks are fitted to before the first step; 0 = none.
        save_to: directory that receives the tokenizer (averaged weights, where EMA is on) after every validation; so the last
            step should be validated.
    """

    figures = ("mel", "stft")

    def __init__(
        self,
        tokenizer: SpeechTokenizer,
        stft: float = 1.0,
        mel: float = 1.0,
        adversarial: float = 0.0,
        features: float = 1.0,
        adversarial_start: int = 0,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        betas: tuple[float, float] = (0.8, 0.99),
        warmup: int = 200,
        final_rate: float = 0.01,
        warm_start: int = STATISTICS,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        self.weights = dict(stft=stft, mel=mel, adversarial=adversarial, features=features)
        if min(self.weights.values()) < 0 or stft + mel <= 0:
            raise ValueError(f"loss weights must not be negative, and one positive, got {self.weights}")
        self.tokenizer = tokenizer
        self.discriminators = SpeechDiscriminators() if adversarial else None
        self.adversarial_start = adversarial_start
        self.losses = SpectralLosses(tokenizer.rate, tokenizer.n_fft, tokenizer.hop, tokenizer.config["mels"])
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup, self.final_rate, self.warm_start, self.save_to = warmup, final_rate, warm_start, save_to

    # ---- set-up ------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        # A loaded tokenizer comes in evaluation mode, in which its codebooks would never move.
        self.tokenizer.train()
        self.tokenizer.synchronise(self.trainer.world_size > 1)
        if not self.warm_start or self.trainer.global_step or self.trainer.ckpt_path:
            return
        state = torch.get_rng_state()
        # Every rank takes the same crops with the same seed, and so starts from the same codebooks.
        torch.manual_seed(0)
        self.tokenizer.warm_start(self._crops(self.warm_start))
        torch.set_rng_state(state)

    def _crops(self, count: int) -> Tensor:
        return cast(Any, self.trainer).datamodule.sample(count).to(self.device)

    def on_fit_end(self) -> None:
        self.tokenizer.synchronise(False)

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(
            self.parameters(),
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

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        out = self.tokenizer.reconstruct(x)
        self._train_counts = count_codes(self._train_counts, out.ids, self.tokenizer)
        terms = self.losses(out.output, x)
        loss = self.weights["stft"] * terms["stft"] + self.weights["mel"] * terms["mel"] + out.loss.float()
        terms["bottleneck"] = out.loss
        if self.discriminators is not None:
            terms |= self.discriminators.losses(out.output, x)
            loss = loss + terms["discriminator"]
            if self.global_step >= self.adversarial_start:
                loss = (
                    loss
                    + self.weights["adversarial"] * terms["generator"]
                    + self.weights["features"] * terms["features"]
                )
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()}, batch_size=len(x))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(x))
        return loss

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """The tokenizer's gradients and the judges' each by themselves: one must not make the other's steps small."""
        limit = kwargs.get("gradient_clip_val")
        for part in (self.tokenizer, self.discriminators):
            if limit and part is not None:
                norm = torch.nn.utils.clip_grad_norm_(part.parameters(), limit)
                if part is self.tokenizer:
                    self.log("train/gradient_norm", norm)

    def on_train_batch_end(self, *args: Any) -> None:
        self.tokenizer.weights_changed()

    # ---- validation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, source = batch
        out = self.tokenizer.reconstruct(x)
        self._val_counts = count_codes(self._val_counts, out.ids, self.tokenizer)
        for number in source.unique().tolist():
            mine = source == number
            terms = self.losses(out.output[mine], x[mine])
            weight = mine.sum().double()
            total = torch.stack([terms["mel"].double() * weight, terms["stft"].double() * weight, weight])
            self.measured(number, total)

    def prepare_saving(self) -> None:
        self.tokenizer.before_saving(self._crops(STATISTICS))
