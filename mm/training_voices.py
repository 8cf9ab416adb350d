"""Training of the two tokenizers that take speech apart: who speaks (`tokenizers/speech_timbre.py`), and how
(`tokenizers/speech_prosody.py`). `mm fit` reads it from YAML, the tokenizer itself by `class_path`.

Both learn from crops of one length a batch; a clip that is shorter is repeated. Every speaker is drawn equally often. Trains on
one device: the whole takes minutes.

Letters in shapes: B batch, S samples of a crop, D width of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mm.audio import Audio, resample
from mm.data.example import BrokenExample, Source, warn_skipped
from mm.data.sounds import CropBatches
from mm.optimization import optimizer_and_schedule
from mm.reconstruction import usage_and_perplexity
from mm.speech_reader import RATE, ProsodyReader, SpeechReader, TimbreReader
from mm.training_ctc import Augmentation

UNIT = 2048
"""Crops are a multiple of so many samples: a code of the prosody."""
FOR_CODEBOOK = 256
"""Crops that the codebook is fitted to before the first step."""


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """A sound at `RATE` and who speaks."""

    samples: np.ndarray[Any, np.dtype[np.int16]]
    """16 bit, so that an hour takes 115 MB."""
    speaker: int
    name: str
    """Of the set it is of."""

    def sound(self) -> Float[Tensor, " n"]:
        return torch.from_numpy(self.samples.astype(np.float32) / 32768)


class VoiceBatch(NamedTuple):
    """Crops of one length."""

    samples: Float[Tensor, "B S"]
    speaker: Int[Tensor, " B"]


@dataclass(frozen=True)
class VoiceSet:
    """Examples with `audio` and `speaker`."""

    source: Source
    name: str = "speech"


class VoicesDataModule(pl.LightningDataModule):
    """Clips and their speakers, all in memory.

    Args:
        train, validation: sets; those to validate with are reported by their names. A speaker that is only validated with is
            left out.
        batch_size: crops a batch.
        seconds: shortest and longest crop.
        batches: of one epoch.
        seed: of the crops.
    """

    def __init__(
        self,
        train: list[VoiceSet],
        validation: list[VoiceSet],
        batch_size: int = 24,
        seconds: tuple[float, float] = (0.4, 1.6),
        batches: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__()
        names = [part.name for part in validation]
        if not train or not validation or min(batch_size, batches) < 1 or len(set(names)) < len(names):
            raise ValueError(
                "voices need sets to train with, sets of different names to validate with, batch_size and batches >= 1, got "
                f"{len(train)}, {names}, {batch_size} and {batches}"
            )
        if not 0 < seconds[0] <= seconds[1] <= 30:
            raise ValueError(f"seconds are the shortest and the longest crop, up to 30, got {list(seconds)}")
        self.sets = {"train": train, "validation": validation}
        self.batch_size, self.batches, self.seed = batch_size, batches, seed
        self.sizes = [max(1, round(x * RATE / UNIT)) for x in seconds]
        self.speakers: list[str] = []
        self.clips: dict[str, list[Clip]] = {}
        self._by_speaker: list[list[Clip]] = []
        self._crops: CropBatches | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.clips:
            return
        found = {which: [row for part in parts for row in _read(part)] for which, parts in self.sets.items()}
        self.speakers = sorted({speaker for _, speaker, _ in found["train"]})
        for which, rows in found.items():
            known = [row for row in rows if row[1] in self.speakers]
            if not known:
                raise ValueError(f"the sets for {which} hold no clip of a speaker that is trained with; give others")
            self.clips[which] = [Clip(x, self.speakers.index(speaker), name) for x, speaker, name in known]
        self._by_speaker = [[one for one in self.clips["train"] if one.speaker == n] for n in range(len(self.speakers))]

    def crops(self, count: int, rng: np.random.Generator) -> VoiceBatch:
        """Of training clips."""
        size = UNIT * int(rng.integers(self.sizes[0], self.sizes[1] + 1))
        out, speakers = torch.zeros(count, size), rng.integers(len(self.speakers), size=count)
        for row, speaker in zip(out, speakers, strict=True):
            clips = self._by_speaker[speaker]
            row.copy_(cropped(clips[int(rng.integers(len(clips)))].sound(), size, rng))
        return VoiceBatch(out, torch.from_numpy(speakers))

    def sample(self, count: int) -> VoiceBatch:
        """Crops of training clips, the same every time."""
        return self.crops(count, np.random.default_rng([self.seed, 1 << 31]))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return VoiceBatch(*(x.to(device) for x in batch)) if isinstance(batch, VoiceBatch) else batch

    def train_dataloader(self) -> Any:
        self._crops = self._crops or CropBatches(self, 0)
        return self._crops

    def val_dataloader(self) -> Any:
        return DataLoader(cast(Any, self.clips["validation"]), batch_size=self.batch_size, collate_fn=list)


def cropped(x: Float[Tensor, " n"], size: int, rng: np.random.Generator) -> Float[Tensor, " size"]:
    """A part of a clip, or the clip over and over."""
    if len(x) < size:
        x = x.repeat(-(-size // len(x)))
    start = int(rng.integers(len(x) - size + 1))
    return x[start : start + size]


def _read(part: VoiceSet) -> list[tuple[np.ndarray[Any, np.dtype[np.int16]], str, str]]:
    out: list[tuple[np.ndarray[Any, np.dtype[np.int16]], str, str]] = []
    skipped: list[str] = []
    for index in range(len(part.source)):
        try:
            example = part.source[index]
            audio, speaker = example["audio"], str(example["speaker"])
            if not isinstance(audio, Audio) or not len(audio.samples):
                raise BrokenExample(f"{example['key']} has no sound")
        except BrokenExample as error:
            if part.source.strict:
                raise
            skipped.append(str(error))
            continue
        samples = (resample(audio, RATE).samples.clip(-1, 1) * 32767).round().astype(np.int16)
        out.append((samples, speaker, part.name))
    if skipped:
        warn_skipped(part.source.what, len(skipped), len(part.source), skipped[0])
    return out


# --- training ---------------------------------------------------------------------------------------------------------


class _Training(pl.LightningModule):
    """What both have: the optimiser, and that the tokenizer is saved after every validation."""

    def __init__(
        self,
        tokenizer: SpeechReader,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        warmup: int,
        final_rate: float,
        save_to: str | None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.rates = dict(lr=learning_rate, betas=betas, weight_decay=weight_decay, warmup=warmup, floor=final_rate)
        self.save_to = save_to

    def on_fit_start(self) -> None:
        self.tokenizer.train()  # a loaded one comes in evaluation mode

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        return optimizer_and_schedule(self.parameters(), total=total, **cast(Any, self.rates))

    def configure_callbacks(self) -> list[pl.Callback]:
        from mm.resume import RandomState

        return [RandomState()]

    def on_train_batch_end(self, *args: Any) -> None:
        self.tokenizer.weights_changed()

    def on_validation_start(self) -> None:
        self.tokenizer.weights_changed()

    on_validation_end = on_validation_start

    def _save(self) -> None:
        fast = bool(getattr(self.trainer, "fast_dev_run", False))
        if self.save_to is not None and self.trainer.state.fn == "fit" and not (self.trainer.sanity_checking or fast):
            self.tokenizer.save(self.save_to)

    @property
    def _data(self) -> VoicesDataModule:
        return cast(VoicesDataModule, cast(Any, self.trainer).datamodule)


class TimbreTraining(_Training):
    """Trains a `SpeechTimbre` to tell speakers apart: softmax over cosines, with a margin that the right one has to lead by
    (Wang et al. 2018, arXiv 1801.05599).

    Half of the sounds are heard as at 8 kHz (`narrow`): else all that tells speakers of one recording's rate from those of
    another's would be whether there is anything above 4 kHz.

    Validation is with whole clips, and logs for each set `val/NAME/accuracy` (of the classifier) and `val/NAME/nearest`: whose
    mean vector of `centroids` training clips is nearest; `…/narrow`: the same of sounds as at 8 kHz.

    Args:
        tokenizer: what is trained.
        speakers: how many the data have.
        scale, margin: of the cosines; the margin is taken from the right one's.
        narrow: share of the sounds that are heard as at 8 kHz.
        augmentation: loudness and noise; tempo and pitch belong to a voice.
        centroids: training clips of each speaker that mean vectors are taken from.
        learning_rate, weight_decay, betas, warmup, final_rate: of AdamW and its schedule, as in `mm.training`.
        save_to: directory that receives the tokenizer (averaged weights, where EMA is on) after every validation.
    """

    def __init__(
        self,
        tokenizer: TimbreReader,
        speakers: int = 10,
        scale: float = 20.0,
        margin: float = 0.2,
        narrow: float = 0.5,
        augmentation: Augmentation | None = None,
        centroids: int = 20,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup: int = 50,
        final_rate: float = 0.02,
        save_to: str | None = None,
    ) -> None:
        super().__init__(tokenizer, learning_rate, weight_decay, betas, warmup, final_rate, save_to)
        if speakers < 2 or scale <= 0 or not 0 <= margin < 1 or not 0 <= narrow <= 1:
            raise ValueError(
                f"speakers >= 2, scale > 0, margin in 0..1 and narrow a share are needed, got {speakers}, {scale}, {margin} "
                f"and {narrow}"
            )
        self.classes = nn.Parameter(torch.randn(speakers, tokenizer.spec.dim))
        self.scale, self.margin, self.narrow, self.centroids = scale, margin, narrow, centroids
        self.augmentation = augmentation or Augmentation(speed=0.0, noise=0.5, bands=0, gaps=0)
        self._rows: dict[str, list[tuple[bool, bool, bool]]] = {}

    @property
    def reader(self) -> TimbreReader:
        return cast(TimbreReader, self.tokenizer)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if len(self._data.speakers) != len(self.classes):
            raise ValueError(
                f"the data have {len(self._data.speakers)} speakers, but speakers is {len(self.classes)}; set it to the former"
            )

    def cosines(self, vectors: Float[Tensor, "B D"]) -> Float[Tensor, "B speakers"]:
        return F.normalize(vectors.float(), dim=-1) @ F.normalize(self.classes, dim=-1).T

    def training_step(self, batch: VoiceBatch, batch_idx: int) -> Tensor:
        heard = torch.stack([self.augmentation.sound(x) for x in batch.samples.cpu()]).to(self.device)
        mel = self.reader.mel(heard)
        few = torch.rand(len(mel), 1, 1, device=self.device) < self.narrow
        cosines = self.cosines(self.reader.vectors(torch.where(few, self.reader.narrowed(mel), mel)))
        right = F.one_hot(batch.speaker, len(self.classes))
        loss = F.cross_entropy(self.scale * (cosines - self.margin * right), batch.speaker)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(mel))
        self.log("train/accuracy", (cosines.argmax(1) == batch.speaker).float().mean(), batch_size=len(mel))
        return loss

    # ---- validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        found = []
        for speaker in range(len(self._data.speakers)):
            clips = [one for one in self._data.clips["train"] if one.speaker == speaker]
            chosen = clips[:: max(1, len(clips) // self.centroids)][: self.centroids]
            found.append(torch.stack([self._vector(one, False) for one in chosen]).mean(0))
        self._means, self._rows = F.normalize(torch.stack(found), dim=-1), {}

    @torch.no_grad()
    def _vector(self, clip: Clip, narrow: bool) -> Tensor:
        x = clip.sound()[None].to(self.device)
        mel = self.reader.mel(F.pad(x, (0, -x.shape[1] % UNIT)))
        return F.normalize(self.reader.vectors(self.reader.narrowed(mel) if narrow else mel)[0], dim=-1)

    def validation_step(self, batch: list[Clip], batch_idx: int) -> None:
        for one in batch:
            vector, narrow = self._vector(one, False), self._vector(one, True)
            guesses = (self.cosines(vector[None])[0], self._means @ vector, self._means @ narrow)
            right = [int(guess.argmax()) == one.speaker for guess in guesses]
            self._rows.setdefault(one.name, []).append((right[0], right[1], right[2]))

    def on_validation_epoch_end(self) -> None:
        for name, rows in self._rows.items():
            for what, hits in zip(("accuracy", "nearest", "narrow"), zip(*rows, strict=True), strict=True):
                self.log(f"val/{name}/{what}", sum(hits) / len(hits), prog_bar=True)
        self._save()


class ProsodyTraining(_Training):
    """Trains a `SpeechProsody`: the L1 distance of the contours that come back, and the codebook's commitment.

    Validation is with whole clips, and logs `val/NAME/l1` and `val/usage`, `val/perplexity` of the codes. (Contours have spread
    1; without any code their L1 distance from 0 is about 0.8.)

    Args:
        tokenizer: what is trained.
        noise: share of the sounds that get noise, and other loudness.
        learning_rate, weight_decay, betas, warmup, final_rate, save_to: as of `TimbreTraining`.
    """

    def __init__(
        self,
        tokenizer: ProsodyReader,
        noise: float = 0.3,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup: int = 50,
        final_rate: float = 0.02,
        save_to: str | None = None,
    ) -> None:
        super().__init__(tokenizer, learning_rate, weight_decay, betas, warmup, final_rate, save_to)
        self.augmentation = Augmentation(speed=0.15, gain=6.0, noise=noise, loudest_noise=15.0, bands=0, gaps=0)
        self._sums: dict[str, list[tuple[float, int]]] = {}
        self._counts = torch.zeros(1, tokenizer.spec.vocab_size, dtype=torch.long)

    @property
    def reader(self) -> ProsodyReader:
        return cast(ProsodyReader, self.tokenizer)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.trainer.global_step and not self.trainer.ckpt_path:
            crops = self._data.sample(FOR_CODEBOOK).samples.to(self.device)
            state = torch.get_rng_state()
            torch.manual_seed(0)
            self.reader.warm_start(self.reader.contours(crops))
            torch.set_rng_state(state)

    def training_step(self, batch: VoiceBatch, batch_idx: int) -> Tensor:
        size = batch.samples.shape[1]
        sounds = [self.augmentation.sound(x) for x in batch.samples.cpu()]
        heard = torch.stack([x.repeat(2)[:size] for x in sounds]).to(self.device)  # another tempo has another length
        wanted = self.reader.contours(heard)
        out = self.reader.reconstruct(wanted)
        distance = (out.output - wanted).abs().mean()
        self.log_dict({"train/l1": distance, "train/commitment": out.loss}, prog_bar=True, batch_size=len(heard))
        return distance + out.loss

    def on_validation_epoch_start(self) -> None:
        self._sums, self._counts = {}, torch.zeros_like(self._counts)

    @torch.no_grad()
    def validation_step(self, batch: list[Clip], batch_idx: int) -> None:
        for one in batch:
            x = one.sound()[None].to(self.device)
            wanted = self.reader.contours(F.pad(x, (0, -x.shape[1] % UNIT)), x.shape[1])
            out = self.reader.reconstruct(wanted)
            assert out.ids is not None
            self._counts += torch.bincount(out.ids.flatten().cpu(), minlength=self._counts.shape[1])
            self._sums.setdefault(one.name, []).append((float((out.output - wanted).abs().sum()), wanted.numel()))

    def on_validation_epoch_end(self) -> None:
        for name, rows in self._sums.items():
            self.log(f"val/{name}/l1", sum(a for a, _ in rows) / sum(n for _, n in rows), prog_bar=True)
        usage, perplexity = usage_and_perplexity(self._counts)
        self.log_dict({"val/usage": usage, "val/perplexity": perplexity}, prog_bar=True)
        self._save()
