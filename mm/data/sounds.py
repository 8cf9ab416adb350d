"""Small sets of sounds held in memory as one tensor: what a speech tokenizer trains on.

Reads WebDataset shards: `.tar` with members of sound (`mm.audio.EXTENSIONS`) and `.json` records of the same key. Files are
taken to come from strangers, as in `mm.data.shards`. Every sound is decoded once, mixed to one channel and brought to one rate;
batches are crops of the tensor, so an epoch costs no decoding at all.

Letters in shapes: B batch, S samples of a crop, n samples of a sound.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from mm.audio import EXTENSIONS, load_audio
from mm.data.example import BrokenExample
from mm.data.shards import COMPRESSED, TAR_ERRORS, member_problem, parse_json, split_name, tar_members

SUFFIXES = tuple(sorted(EXTENSIONS))
MAX_MEMBER_BYTES = 64 << 20
MAX_SECONDS = 600.0
"""Longest sound that is decoded."""
MAX_SAMPLES_IN_MEMORY = 1 << 30
"""Of one file, two bytes each: 18 hours at 16 kHz."""


@dataclass(kw_only=True)
class SoundSource:
    """One shard of sounds."""

    path: str
    """`.tar`."""
    share: float = 1.0
    """Weight of this file among the others when training draws crops; 0: it is only validated with."""
    hold_out: dict[str, list[int | str]] = field(default_factory=dict)
    """Values of the JSON records whose sounds are never trained with: `{index: [5, 6]}`. 5 and "5" are the same value, and a
    record without the field counts as held out."""

    @property
    def name(self) -> str:
        return Path(self.path).stem


class SoundBatch(NamedTuple):
    """A batch as training and validation see it."""

    samples: Float[Tensor, "B S"]
    """Full scale ±1."""
    source: Int[Tensor, " B"]
    """Index into the data module's `names`."""


class Sounds(NamedTuple):
    """The sounds of one file."""

    samples: list[Int16[Tensor, " n"]]
    held_out: list[bool]


def read_sounds(source: SoundSource, rate: int, *, strict: bool = False) -> Sounds:
    """All sounds of one file at `rate`, in the order of the file.

    Broken members, and the rest of a file from where it is damaged, are skipped with one counted warning, or raise if
    `strict`. A sound whose record can't be read counts as held out.

    Raises:
        ValueError: the file is missing, of another kind, holds no sound, more than fits in memory, or nothing of what it is
            to hold out.
    """
    path = Path(source.path)
    if not path.is_file() or path.suffix != ".tar":
        raise ValueError(f"no sound file '{path}': expected a .tar with members such as .wav or .flac")
    sounds: dict[str, Tensor] = {}
    records: dict[str, dict[str, Any]] = {}
    broken: list[str] = []
    total = 0
    with path.open("rb") as file:
        if file.read(2) in COMPRESSED:
            raise ValueError(f"'{path}' is compressed: unpack it to a plain .tar")
        members = tar_members(file)
        while True:
            try:
                member = next(members, None)
            except TAR_ERRORS as error:
                first = str(error).split("\n")[0]
                if strict or not (sounds or records):
                    raise ValueError(f"'{path}' is damaged, or not a tar file: {first}") from error
                broken.append(f"the damaged rest of the file ({first})")
                break
            if member is None:
                break
            split = split_name(member.name) if member.isreg() else None
            if split is None or split[1] not in (*SUFFIXES, "json"):
                continue
            key, suffix = split
            try:
                known = records if suffix == "json" else sounds
                if problem := member_problem(member, key in known, MAX_MEMBER_BYTES):
                    raise ValueError(problem)
                file.seek(member.offset_data)
                data = file.read(member.size)
                if suffix == "json":
                    records[key] = parse_json(data, member.name)
                    continue
                decoded = _decode(data, rate)
            except (ValueError, BrokenExample) as error:
                if strict:
                    raise ValueError(f"'{path}', member '{member.name}': {error}") from error
                broken.append(f"'{member.name}'")
                continue
            total += len(decoded)
            if total > MAX_SAMPLES_IN_MEMORY:
                raise ValueError(f"'{path}' holds more than {MAX_SAMPLES_IN_MEMORY:,} samples at {rate} Hz: split it")
            sounds[key] = decoded
    if not sounds:
        raise ValueError(f"'{path}' holds no sound that can be read")
    if broken:
        warnings.warn(f"'{path}': skipped {len(broken)} broken members, the first is {broken[0]}", stacklevel=2)
    held = [_held_out(records.get(key), source.hold_out) for key in sounds]
    if source.hold_out and not any(held):
        raise ValueError(
            f"'{path}' holds nothing of what is held out, {source.hold_out}: is a name or a value misspelt?"
        )
    return Sounds(list(sounds.values()), held)


def _held_out(record: dict[str, Any] | None, hold_out: dict[str, list[int | str]]) -> bool:
    if not hold_out:
        return False
    if record is None or not record.keys() >= hold_out.keys():
        return True  # nobody knows whether it is one of them
    return any(str(record[name]) in map(str, values) for name, values in hold_out.items())


def _decode(data: bytes, rate: int) -> Int16[Tensor, " n"]:
    samples = load_audio(data, rate=rate, max_seconds=MAX_SECONDS, max_bytes=MAX_MEMBER_BYTES).samples
    return (torch.from_numpy(samples).clamp(-1, 1) * 32767).round().to(torch.int16)


def _rng(*parts: int) -> np.random.Generator:
    # A generator per purpose and step, so that a resumed run needs no saved generator state.
    return np.random.default_rng([p % (1 << 32) for p in parts])


class Cropped(Protocol):
    """What `CropBatches` draws from."""

    seed: int
    batch_size: int
    batches: int
    """Of one epoch."""

    def crops(self, count: int, rng: np.random.Generator) -> Any: ...


class CropBatches:
    """Random crops, so many batches an epoch; its state resumes mid-epoch with the very same batches.

    Lightning calls `state_dict` and `load_state_dict` on loaders that have them.
    """

    def __init__(self, data: Cropped, rank: int) -> None:
        self.data, self.rank = data, rank
        self.epoch, self.done = 0, 0

    def __len__(self) -> int:
        return self.data.batches

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.done, len(self)):
            rng = _rng(self.data.seed, self.epoch, index, self.rank)
            self.done = index + 1
            if self.done == len(self):
                self.epoch, self.done = self.epoch + 1, 0
            yield self.data.crops(self.data.batch_size, rng)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]


class HeldOutBatches:
    """The beginnings of held-out sounds, short ones filled up with silence."""

    def __init__(self, data: SoundsDataModule, which: list[int]) -> None:
        self.data = data
        self.chunks = [which[n : n + data.batch_size] for n in range(0, len(which), data.batch_size)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[SoundBatch]:
        for chunk in self.chunks:
            yield self.data.beginnings(chunk)


class SoundsDataModule(L.LightningDataModule):
    """Crops of the sounds of several shards.

    A crop takes a file by its share, a sound by its length and a place at random. A sound shorter than the crop is followed by
    others of the same file, with up to 0.1 s of silence before each.

    Args:
        train: shards to train with; what their `hold_out` names is validated with.
        validation: shards that are only validated with.
        rate: samples a second.
        samples: S; a multiple of the samples of one element of the tokenizer (15,872 = 31 elements of 512).
        batch_size: crops a step and rank.
        batches: batches of one epoch.
        gain: crops are made louder or softer by up to this much, in dB, but never beyond full scale.
        validate_with: sounds of each file that validation takes, spread evenly over it.
        seed: of the crops.
        strict: raise on broken members instead of skipping them.
    """

    def __init__(
        self,
        train: list[SoundSource],
        validation: list[SoundSource] | None = None,
        rate: int = 16_000,
        samples: int = 15_872,
        batch_size: int = 8,
        batches: int = 1000,
        gain: float = 6.0,
        validate_with: int = 64,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__()
        sources = [*train, *(validation or [])]
        if not train or len({s.name for s in sources}) != len(sources):
            raise ValueError(f"sources must be one or more files of different names, got {[s.name for s in sources]}")
        if min(batch_size, batches, samples, validate_with) < 1 or rate < 1_000 or not 0 <= gain <= 40:
            raise ValueError(
                "batch_size, batches, samples and validate_with >= 1, rate >= 1000 and gain in 0..40 are needed, got "
                f"{batch_size}, {batches}, {samples}, {validate_with}, {rate} and {gain}"
            )
        if any(s.share < 0 for s in train) or not any(s.share for s in train):
            raise ValueError(f"shares must not be negative, and one positive, got {[s.share for s in train]}")
        self.sources, self.training = sources, len(train)
        self.rate, self.samples, self.batch_size, self.batches = rate, samples, batch_size, batches
        self.gain, self.validate_with, self.seed, self.strict = gain, validate_with, seed, strict
        self.names = [s.name for s in sources]
        self.sound: Int16[Tensor, " all"] = torch.empty(0, dtype=torch.int16)
        self.start = np.zeros(1, dtype=np.int64)
        self.source = np.zeros(0, dtype=np.int64)
        self.held_in: list[Any] = []
        self.held_out: list[int] = []
        self._loader: CropBatches | None = None

    def setup(self, stage: str | None = None) -> None:
        if len(self.sound):
            return
        parts: list[Tensor] = []
        label: list[int] = []
        for number, source in enumerate(self.sources):
            found = read_sounds(source, self.rate, strict=self.strict)
            rows = np.arange(len(parts), len(parts) + len(found.samples))
            out = np.array(found.held_out) | (number >= self.training)
            if number < self.training:
                if source.share and out.all():
                    raise ValueError(f"'{source.path}' holds out all its sounds: {source.hold_out}")
                self.held_in.append(rows[~out])
            self.held_out += _spread(rows[out], self.validate_with)
            parts += found.samples
            label += [number] * len(rows)
        if not self.held_out:  # nothing to validate with: then the training sounds
            self.held_out = _spread(np.concatenate(self.held_in), self.validate_with)
        lengths = np.array([len(p) for p in parts])
        self.start = np.concatenate([[0], lengths.cumsum()])
        self.source, self.sound = np.array(label), torch.cat(parts)
        weights = np.array([s.share for s in self.sources[: self.training]])
        self._shares = weights / weights.sum()
        self._odds = [lengths[rows] / lengths[rows].sum() if len(rows) else rows for rows in self.held_in]

    def crops(self, count: int, rng: np.random.Generator) -> SoundBatch:
        """Random crops of training sounds, at a random loudness."""
        out = torch.zeros(count, self.samples)
        chosen = rng.choice(len(self.held_in), size=count, p=self._shares)
        for row, number in zip(out, chosen, strict=True):
            self._fill(row, int(number), rng)
            factor = float(10 ** (rng.uniform(-self.gain, self.gain) / 20))
            row *= min(factor, 1 / max(float(row.abs().max()), 1e-4))
        return SoundBatch(out, torch.from_numpy(chosen))

    def _fill(self, row: Float[Tensor, " S"], number: int, rng: np.random.Generator) -> None:
        place = 0
        while place < self.samples:
            sound = self._sound(int(rng.choice(self.held_in[number], p=self._odds[number])))
            room = self.samples - place
            if place == 0 and len(sound) > room:
                first = int(rng.integers(len(sound) - room + 1))
                row[:] = sound[first : first + room]
                return
            place += int(rng.integers(self.rate // 10))
            part = sound[: max(0, self.samples - place)]
            row[place : place + len(part)] = part
            place += len(part)

    def _sound(self, row: int) -> Float[Tensor, " n"]:
        return self.sound[self.start[row] : self.start[row + 1]].float() / 32767

    def beginnings(self, rows: list[int]) -> SoundBatch:
        """The first samples of these sounds."""
        out = torch.zeros(len(rows), self.samples)
        for line, row in zip(out, rows, strict=True):
            part = self._sound(row)[: self.samples]
            line[: len(part)] = part
        return SoundBatch(out, torch.from_numpy(self.source[rows]))

    def sample(self, count: int) -> Float[Tensor, "count S"]:
        """Crops of training sounds, the same on every rank and every time."""
        return self.crops(count, _rng(self.seed, 1 << 31)).samples

    def train_dataloader(self) -> Any:
        if self._loader is None:
            self._loader = CropBatches(self, self.trainer.global_rank if self.trainer else 0)
        return self._loader

    def val_dataloader(self) -> Any:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return HeldOutBatches(self, self.held_out[rank::world])


def _spread(rows: Any, count: int) -> list[int]:
    return [int(rows[i * len(rows) // min(count, len(rows))]) for i in range(min(count, len(rows)))]
