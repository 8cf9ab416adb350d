"""Training of the model: a LightningModule around `MultimodalModel`, its optimizer, schedule and sample grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from mm.backbone import BackboneConfig
from mm.directions import shown
from mm.export import WriteRows
from mm.interfaces import Modality, Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.optimization import optimizer_and_schedule
from mm.resume import RandomState
from mm.stream import TokenStream

SPREAD = (0.2, 5.0)
"""Standard deviations of vectors between which diffusion is trained without a question."""
SAMPLE = 64
"""Vectors that a spread is taken of, at the least: a single picture may be flat."""


class ModelTraining(pl.LightningModule):
    """Trains the model of a configuration on packed token streams.

    Args:
        backbone: size and shape of the backbone.
        modalities: the modalities, host (text) first; lists of several YAML files append with `modalities+:`.
        context: positions a document may have.
        optimizer: "adamw", or "muon" for the matrices inside the backbone with AdamW for the rest.
        lr, betas, weight_decay, warmup_steps, lr_floor: of the optimizer; linear warm-up, then cosine to lr_floor·lr at
            the trainer's last step.
        initial: a checkpoint directory of this project whose weights training starts from.
        adopt: as `initial`, of a model with other tokenizers: what means the same is taken over (`mm.adopt`).
        train_only: parts of the model that are trained (`heads.image`, `latent_embeddings.image`, `backbone`, …); the others
            stay bit for bit what they are. Empty: all.
        unnormalized: vectors whose spread is far from 1 are accepted as data for diffusion.
        sample_prompts: captions whose pictures, or else clips, are generated and logged at every validation.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        modalities: list[Modality],
        context: int = 1024,
        optimizer: Literal["adamw", "muon"] = "adamw",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
        lr_floor: float = 0.05,
        initial: str | None = None,
        adopt: str | None = None,
        train_only: list[str] | None = None,
        unnormalized: bool = False,
        sample_prompts: list[str] | None = None,
        sample_guidance: float = 3.0,
    ) -> None:
        super().__init__()
        self.model = MultimodalModel(backbone, modalities, context)
        if optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be 'adamw' or 'muon', got {optimizer!r}")
        self.optimizer = optimizer
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_steps, self.lr_floor = warmup_steps, lr_floor
        self.sample_prompts = sample_prompts or []
        if self.sample_prompts and _shown(modalities) is None:
            raise ValueError(
                "sample_prompts asks for pictures, clips or shapes, which no modality here makes; set sample_prompts: []"
            )
        self.sample_guidance = sample_guidance
        for modality in modalities:  # tokenizers with weights are part of the data path, not of what is trained
            if isinstance(modality.tokenizer, torch.nn.Module):
                modality.tokenizer.eval().requires_grad_(False)
        self._unchecked: dict[str, list[Tensor]] = {
            m.name: []
            for number, m in enumerate(modalities)
            if not unnormalized
            and m.tokenizer.spec.kind == "continuous"
            and (self.model.process(number) is not None or hasattr(m.head, "process"))
        }
        """First vectors of the modalities whose spread isn't known yet."""
        self._looks = 0
        """Batches of this run whose directions were noted."""
        if initial is not None and adopt is not None:
            raise ValueError("give initial (the same tokenizers) or adopt (others), not both")
        if initial is not None:
            from mm.hub import load_weights

            load_weights(self.model, initial)
        if adopt is not None:
            from mm import adopt as adoption

            adoption.adopt(self.model, adopt)
        if train_only:
            from mm.adopt import train_only as freeze

            freeze(self.model, train_only)

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(
            self.model.parameters(),
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            warmup=self.warmup_steps,
            total=int(self.trainer.estimated_stepping_batches),
            floor=self.lr_floor,
            matrices=self.model.backbone.matrices() if self.optimizer == "muon" else (),
        )

    def training_step(self, batch: TokenStream, batch_idx: int) -> Tensor:
        self._check_spread(batch)
        # the first ones of this run, not of the epoch: one that goes on may begin with nothing known
        if self._looks < 200 or batch_idx % 100 == 0:
            self._looks += 1
            self.model.directions = (self.model.directions or frozenset()) | shown(batch, self.model.vocabulary)
        # on an accelerator the look costs a synchronisation, so that it is rare where conditions are never dropped
        if not self.model.null_seen and (batch_idx < 100 or batch_idx % 100 == 0):
            null = self.model.vocabulary.control("null")
            self.model.null_seen = bool((batch.ids == null).any())
        return self._step(batch, "train")

    def _check_spread(self, batch: TokenStream) -> None:
        """Raises `ValueError` where the first vectors that diffusion is to learn are far from unit spread, as its schedules
        take them to be: the latents of an autoencoder that nobody normalised."""
        for name in [name for name in self._unchecked if name in batch.latents]:
            seen = torch.cat([*self._unchecked[name], batch.latents[name].values.detach().float()])
            self._unchecked[name] = [seen]
            if len(seen) < SAMPLE:
                continue
            del self._unchecked[name]
            spread = float(seen.std())
            if not SPREAD[0] <= spread <= SPREAD[1]:
                raise ValueError(
                    f"the vectors of {name!r} have a standard deviation of {spread:.3g}, and diffusion takes it to be about 1 "
                    f"({SPREAD[0]:g} to {SPREAD[1]:g}); normalise them (mm.latents), or set unnormalized: true"
                )

    def on_fit_start(self) -> None:
        """Ask the training data for the names of voices; streams, which can't be looked up, are not asked. Raises `ValueError`
        for names that can't be saved."""
        from mm.data.example import Source
        from mm.hub import check_voices

        parts = getattr(getattr(self.trainer, "datamodule", None), "parts", {}).get("train", [])
        found: set[str] = set()
        for part in parts:
            self.model.by_word |= getattr(part.template, "by_word", False)
            if hasattr(part.template, "voices") and isinstance(part.source, Source):
                found |= part.template.voices(part.source)
        # names that can't be saved are refused before hours of training, not after
        self.model.voices = check_voices(sorted(found | set(self.model.voices)), "the training data")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["null_seen"], checkpoint["voices"] = self.model.null_seen, list(self.model.voices)
        checkpoint["by_word"] = self.model.by_word
        checkpoint["directions"] = None if self.model.directions is None else sorted(self.model.directions)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        from mm.hub import check_directions

        self.model.null_seen = checkpoint.get("null_seen")
        self.model.voices = tuple(checkpoint.get("voices", ()))
        self.model.by_word = bool(checkpoint.get("by_word"))
        self.model.directions = check_directions(
            checkpoint.get("directions"), self.model.vocabulary.index, "the checkpoint"
        )

    def validation_step(self, batch: TokenStream, batch_idx: int) -> Tensor:
        return self._step(batch, "val")

    def test_step(self, batch: TokenStream, batch_idx: int) -> Tensor:
        return self._step(batch, "test")

    def predict_step(self, batch: TokenStream, batch_idx: int) -> list[dict[str, Any]]:
        """For every document its mean loss a predicted position, and how many there are, by modality (nats: a document's
        likelihood is exp of minus the sum)."""
        rows: list[dict[str, Any]] = [{} for _ in range(batch.num_documents)]
        noise = self.model.draw_noise(batch)
        for name, source, losses in self.model.losses(batch, self.model(batch, noise=noise), noise):
            document = batch.document[source]
            count = torch.bincount(document, minlength=len(rows))
            summed = torch.zeros(len(rows), device=losses.device).index_add_(0, document, losses.float())
            for row, n, total in zip(rows, count.tolist(), summed.tolist(), strict=True):
                if n:
                    row[name] = {"loss": total / n, "positions": n}
        return rows

    def configure_callbacks(self) -> list[pl.Callback]:
        return [WriteRows(), RandomState()]

    def _step(self, batch: TokenStream, stage: str) -> Tensor:
        several = self.trainer.world_size > 1
        report = self.model.loss(batch, self._global_counts(batch) if several else None)
        size = batch.num_documents
        self.log(f"{stage}/loss", report.total, prog_bar=True, batch_size=size, sync_dist=stage != "train")
        for name, value in report.raw.items():
            self.log(f"{stage}/{name}", value, prog_bar=True, batch_size=size, sync_dist=stage != "train")
            self.log(f"{stage}/{name}_weighted", report.weighted[name], batch_size=size, sync_dist=stage != "train")
        if stage == "train":
            self.log("train/positions", float(len(batch)), batch_size=size)
        return report.total + self.model.untouched() if several else report.total

    def _global_counts(self, batch: TokenStream) -> dict[str, Tensor]:
        """Predicted positions by modality, averaged over ranks: gradients are averaged too, so the mean is global."""
        owner = batch.modality[batch.target[batch.target >= 0]]
        counts = torch.bincount(owner, minlength=len(self.model.modalities)).float()
        dist.all_reduce(counts)
        counts = (counts / self.trainer.world_size).clamp(min=1)
        return {m.name: counts[n] for n, m in enumerate(self.model.modalities)}

    def on_validation_end(self) -> None:
        if self.sample_prompts and not self.trainer.sanity_checking:
            folder = self.trainer.log_dir  # all ranks ask, for the first one tells the others
            if self.trainer.is_global_zero:
                self.log_samples(folder)

    def log_samples(self, folder: str | None) -> None:
        """Pictures, clips or shapes for `sample_prompts`: a grid in TensorBoard and as a PNG beside the logs, and of clips also a
        GIF in which they play side by side."""
        from pathlib import Path

        import numpy as np

        from mm.generation import Engine, Request
        from mm.pipelines.outputs import portrait
        from mm.shapes import Shape
        from mm.sheet import grid, strips
        from mm.video import Video, save_video

        model = self.model
        shown = _shown(model.modalities)
        assert shown is not None
        requests = [
            Request(
                prompt=[Segment(model.vocabulary.host.name, prompt, loss=False)],
                items=[(shown.name, shown.tokenizer.spec.max_grid)],
                text=False,
                # before the null condition was ever seen, guidance would spoil the pictures
                sampling=Sampling(guidance=self.sample_guidance if model.null_seen else 1.0),
                seed=number,
            )
            for number, prompt in enumerate(self.sample_prompts)
        ]
        made = [segments[-1].content for segments in Engine(model).generate(requests)]
        values = [decoded.value for decoded in shown.tokenizer.decode_batch(made)]
        clips = [value for value in values if isinstance(value, Video)]
        stills = [portrait(value.mesh, 128) if isinstance(value, Shape) else value for value in values]
        sheet = strips([clip.frames for clip in clips], self.sample_prompts) if clips else grid(stills)
        if folder is not None:
            path = Path(folder) / "samples" / f"step-{self.global_step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
            if clips:
                shortest = min(map(len, clips))
                beside = np.concatenate([clip.frames[:shortest] for clip in clips], axis=2)
                save_video(path.with_suffix(".gif"), beside, clips[0].fps, scale=max(1, 128 // beside.shape[1]))
        for logger in self.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_image"):
                experiment.add_image("samples", np.asarray(sheet), self.global_step, dataformats="HWC")


def _shown(modalities: Sequence[Modality]) -> Modality | None:
    """The modality whose samples are logged."""
    from mm.pipelines.media import medium_of

    shown = ("picture", "video", "shape")
    made = [m for m in modalities[1:] if m.tokenizer.decodes and medium_of(m.tokenizer.spec) in shown]
    return min(made, key=lambda m: medium_of(m.tokenizer.spec) != "picture", default=None)
