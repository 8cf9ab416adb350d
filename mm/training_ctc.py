"""Training of a speech encoder with CTC and continuous integrate-and-fire, read from YAML by `mm fit`; the tokenizer itself is
named there by `class_path`.

Trains on one device: the whole takes minutes. Letters in shapes as in `mm.speech_encoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mm.audio import Audio, resample
from mm.cif import integrate_and_fire, quantity_loss, scaled
from mm.concepts_training import SimilarLengths
from mm.ctc import LABELS, compress, ctc_loss, greedy, spell, unspell
from mm.data.example import BrokenExample, Source
from mm.optimization import optimizer_and_schedule
from mm.speech_encoder import RATE, TrainableSpeechEncoder

FOR_MEANS = 600
"""Training sounds that the characters' mean vectors are taken from."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to training sounds, every time anew. All zero: nothing."""

    speed: float = 0.1
    """Largest change of tempo and pitch together, as a share."""
    gain: float = 10.0
    """Largest change of loudness in dB; what then lies beyond full scale is cut off."""
    noise: float = 0.7
    """Share of sounds that get white or low-pass noise."""
    loudest_noise: float = 5.0
    """Least ratio of sound to noise in dB; each draws its own up to 40."""
    bands: int = 2
    """SpecAugment (Park et al. 2019): masked bands of mel bins."""
    band: float = 0.15
    """Widest of them, as a share of the bins."""
    gaps: int = 2
    """Masked stretches of time."""
    gap: float = 0.08
    """Longest of them, as a share of the sound."""

    def sound(self, x: Float[Tensor, " S"]) -> Float[Tensor, " S2"]:
        if self.speed:
            size = max(1, round(len(x) / (1 + self.speed * (2 * float(torch.rand(())) - 1))))
            x = F.interpolate(x[None, None], size=size, mode="linear")[0, 0]
        if self.gain:
            x = (x * 10 ** (self.gain * (2 * float(torch.rand(())) - 1) / 20)).clamp(-1, 1)
        if float(torch.rand(())) < self.noise:
            ratio = self.loudest_noise + (40 - self.loudest_noise) * float(torch.rand(()))
            noise = torch.randn(len(x) + 7)
            width = int(torch.randint(1, 9, ()))  # of the moving average: 1 leaves white noise
            noise = F.avg_pool1d(noise[None], width, stride=1)[0, : len(x)]
            x = x + noise * (x.std(correction=0) + 1e-4) / noise.std(correction=0) * 10 ** (-ratio / 20)
        return x

    def spectrum(self, x: Float[Tensor, "F M"]) -> Float[Tensor, "F M"]:
        """Masked parts hold the sound's mean."""
        x, mean = x.clone(), x.mean()
        for axis, count, share in ((1, self.bands, self.band), (0, self.gaps, self.gap)):
            for _ in range(count):
                size = int(float(torch.rand(())) * share * x.shape[axis])
                start = int(torch.randint(x.shape[axis] - size + 1, ()))
                x.narrow(axis, start, size).fill_(mean)
        return x


class SpeechEncoderTraining(pl.LightningModule):
    """Trains a `SpeechCTC`: CTC over characters; and for integrate-and-fire the cross-entropy of each character, read by one
    linear layer from the vector that fires for it, and the quantity loss (Paraformer's two, with the smallest decoder there is).

    A batch is a list of `Utterance`. Validation reads by CTC and logs for each set `val/NAME/cer` and `val/NAME/wer` (edit
    distance ÷ characters, ÷ words), `val/NAME/exact`, and how many vectors integrate-and-fire makes a character.

    Args:
        tokenizer: what is trained. What it is set to compress by changes the characters' mean vectors only.
        cif: weight of both losses of integrate-and-fire.
        silence: share of training sounds that are replaced by noise without text.
        augmentation: what is done to the others.
        learning_rate, weight_decay, betas, warmup, final_rate: of AdamW and its schedule, as in `mm.training`.
        save_to: directory that receives the tokenizer (averaged weights, where EMA is on) after every validation.
    """

    def __init__(
        self,
        tokenizer: TrainableSpeechEncoder,
        cif: float = 0.5,
        silence: float = 0.02,
        augmentation: Augmentation | None = None,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup: int = 150,
        final_rate: float = 0.02,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= silence < 1 or not 0 <= cif < float("inf"):
            raise ValueError(f"silence is a share below 1 and cif a weight of at least 0, got {silence} and {cif}")
        self.tokenizer = tokenizer
        self.reader = nn.Linear(tokenizer.config["width"], LABELS)
        self.cif, self.silence, self.augmentation = cif, silence, augmentation or Augmentation()
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup, self.final_rate = warmup, final_rate
        self.save_to = save_to
        self._done: dict[str, list[tuple[str, str, float]]] = {}

    def on_fit_start(self) -> None:
        self.tokenizer.train()

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

    def _features(self, samples: Tensor) -> Tensor:
        return self.tokenizer.encoder.features(samples.to(self.device))

    def training_step(self, batch: list[Utterance], batch_idx: int) -> Tensor:
        features, targets = [], []
        for one in batch:
            quiet = float(torch.rand(())) < self.silence
            x = one.sound()
            x = 0.1 * torch.rand(()) * torch.randn(len(x)) if quiet else self.augmentation.sound(x)
            features.append(self.augmentation.spectrum(self._features(x)))
            targets.append([] if quiet else spell(one.text))
        frames, lengths, logits, alpha = self.tokenizer.encoder.read(features)
        loss = ctc_loss(logits, lengths, targets)
        self.log("train/ctc", loss, prog_bar=True, batch_size=len(batch))
        if self.cif:
            characters, quantity = self._cif(frames, alpha, targets)
            self.log_dict({"train/cif": characters, "train/quantity": quantity}, batch_size=len(batch))
            loss = loss + self.cif * (characters + quantity)
        return loss

    def _cif(self, frames: Tensor, alpha: Tensor, targets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        units = torch.tensor([len(target) for target in targets], device=alpha.device)
        vectors = integrate_and_fire(frames, scaled(alpha, units), max(1, int(units.max())))
        wanted = torch.full(vectors.shape[:2], -1, device=alpha.device)
        for row, target in zip(wanted, targets, strict=True):
            row[: len(target)] = torch.tensor(target)
        total = F.cross_entropy(self.reader(vectors).flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum")
        return total / units.sum().clamp(min=1), quantity_loss(alpha, units)

    # ---- validation --------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self.tokenizer.weights_changed()

    on_validation_end = on_validation_start

    def validation_step(self, batch: list[Utterance], batch_idx: int, dataloader_idx: int = 0) -> None:
        _, lengths, logits, alpha = self.tokenizer.encoder.read([self._features(one.sound()) for one in batch])
        done = self._done.setdefault(batch[0].name, [])
        for one, length, row, weights in zip(batch, lengths.tolist(), logits, alpha, strict=True):
            wanted = unspell(spell(one.text))
            done.append((unspell(greedy(row[:length])), wanted, float(weights.sum()) / max(1, len(wanted))))

    def on_validation_epoch_end(self) -> None:
        for name, rows in self._done.items():
            made, wanted, fired = zip(*rows, strict=True)
            figures = {**recognition(made, wanted), "fired": sum(fired) / len(fired)}
            self.log_dict({f"val/{name}/{key}": value for key, value in figures.items()}, prog_bar=True)
        self._done = {}
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._fit_means()
            if self.save_to is not None and not cast(Any, self.trainer).fast_dev_run:
                self.tokenizer.save(self.save_to)

    @torch.no_grad()
    def _fit_means(self) -> None:
        """Vectors of training sounds under the labels that they were compressed by; integrate-and-fire's, under the characters
        of the text that they are made to be as many as."""
        vectors, labels = [], []
        utterances = cast(Any, self.trainer).datamodule.utterances["train"]
        some = torch.randperm(len(utterances), generator=torch.Generator().manual_seed(0))[:FOR_MEANS].tolist()
        for one in (utterances[n] for n in some):
            frames, _, logits, alpha = self.tokenizer.encoder.read([self._features(one.sound())])
            if self.tokenizer.config["compress"] == "cif":
                found = torch.tensor(spell(one.text), device=self.device)
                made = integrate_and_fire(frames, scaled(alpha, found.new_tensor([len(found)])), len(found))[0]
            elif self.tokenizer.config["compress"] == "ctc":
                made, found = compress(frames[0], logits[0])
            else:
                made, found = frames[0], logits[0].argmax(-1)
            vectors.append(made)
            labels.append(found)
        self.tokenizer.means.fit(torch.cat(vectors), torch.cat(labels))

    def configure_callbacks(self) -> list[pl.Callback]:
        from mm.resume import RandomState

        return [RandomState()]


def recognition(made: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """`cer` and `wer`: edit distance ÷ characters and ÷ words wanted, over all texts; `exact`: share of equal texts."""
    from torchmetrics.functional.text import char_error_rate, word_error_rate

    one, other = list(made), list(wanted)
    equal = sum(a == b for a, b in zip(one, other, strict=True)) / len(other)
    return {"cer": float(char_error_rate(one, other)), "wer": float(word_error_rate(one, other)), "exact": equal}


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Utterance:
    """A sound at `RATE`, its text, and the set that it is of."""

    samples: np.ndarray[Any, np.dtype[np.int16]]
    """16 bit, so that an hour takes 115 MB."""
    text: str
    name: str

    def sound(self) -> Float[Tensor, " S"]:
        return torch.from_numpy(self.samples.astype(np.float32) / 32768)


@dataclass(frozen=True)
class SpeechSet:
    """Examples with `audio` and `text`."""

    source: Source
    name: str = "speech"
    share: float = 1.0
    """Of its examples, how many an epoch has (in training)."""


class SpeechDataModule(pl.LightningDataModule):
    """Sounds and their texts, all in memory.

    Args:
        train, validation: sets; those to validate with are reported by their names.
        batch_size: sounds a batch. Those of one batch are of similar length.
        longest: seconds; training sounds beyond are left out, with a counted warning.
        seed: of the order.
    """

    def __init__(
        self,
        train: list[SpeechSet],
        validation: list[SpeechSet],
        batch_size: int = 32,
        longest: float = 10.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        names = [part.name for part in validation]
        if not train or not validation or batch_size < 1 or len(set(names)) < len(names):
            raise ValueError(
                f"speech needs sets to train with, sets of different names to validate with and batch_size >= 1, got "
                f"{len(train)}, {names} and {batch_size}"
            )
        self.sets = {"train": train, "validation": validation}
        self.batch_size, self.longest, self.seed = batch_size, longest, seed
        self.utterances: dict[str, list[Utterance]] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.utterances:
            return
        for which, parts in self.sets.items():
            found = [one for part in parts for one in self._read(part, which == "train")]
            if not found:
                raise ValueError(f"the sets for {which} hold no sound that can be used; give others, or filter less")
            self.utterances[which] = found

    def _read(self, part: SpeechSet, train: bool) -> list[Utterance]:
        out, skipped = [], []
        for index in range(len(part.source)):
            try:
                example = part.source[index]
                audio, text = example["audio"], str(example["text"])
                if train and audio.seconds > self.longest:
                    raise BrokenExample(f"{example['key']} has {audio.seconds:.1f} s, more than {self.longest:g}")
                spell(text)
            except ValueError as error:
                if part.source.strict:
                    raise
                skipped.append(str(error))
            else:
                out.append(Utterance(_sixteen_bit(audio), text, part.name))
        if skipped:
            from mm.data.example import warn_skipped

            warn_skipped(part.source.what, len(skipped), len(part.source), skipped[0])
        if train and part.share < 1:
            chosen = torch.randperm(len(out), generator=torch.Generator().manual_seed(self.seed))
            out = [out[n] for n in chosen[: round(part.share * len(out))].tolist()]
        return out

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # sounds move when they have become spectra

    def train_dataloader(self) -> Any:
        utterances = self.utterances["train"]
        batches = SimilarLengths([len(one.samples) for one in utterances], self.batch_size, self.seed)
        return DataLoader(cast(Any, utterances), batch_sampler=batches, collate_fn=list)

    def val_dataloader(self) -> Any:
        sets = [
            [one for one in self.utterances["validation"] if one.name == part.name] for part in self.sets["validation"]
        ]
        return [DataLoader(cast(Any, some), batch_size=self.batch_size, collate_fn=list) for some in sets if some]


def _sixteen_bit(audio: Audio) -> np.ndarray[Any, np.dtype[np.int16]]:
    return (resample(audio, RATE).samples.clip(-1, 1) * 32767).round().astype(np.int16)
