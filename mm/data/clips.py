"""Clips as tensors: what a video tokenizer trains on.

Any source whose examples have a `video` will do, one that makes them as it goes as well. Each is brought to the size and the rate
that are wanted; training takes a window of it at a random place.

Letters in shapes: B batch, T frames, S side in pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mm import pictures
from mm.data.example import BrokenExample, Source
from mm.data.images import Batches, ShuffledBatches, seeded
from mm.video import Video, resample_frames, square

EPOCH = 1 << 16
"""Clips of an epoch, at the most, so that a source without end has epochs too."""
PATIENCE = 100
"""Examples in a row that may be broken before it is taken for a mistake."""


class ClipBatch(NamedTuple):
    """A batch as training and validation see it."""

    pixels: Float[Tensor, "B T 3 S S"] | Float[Tensor, "BT 3 S S"]
    """In [−1, 1]."""
    source: Int[Tensor, " B"]
    """All 0, there is one source; as many as `pixels`."""


class ClipDataModule(L.LightningDataModule):
    """Windows of the clips of a source.

    Args:
        train: the source to learn from.
        validation: another one, or another split; its first `held_out` clips are looked at, from their beginning.
        frames: frames of a window; what is shorter goes on with its last frame.
        size: side of frames in pixels; larger or oblong ones are scaled to cover the square and cropped.
        fps: frames a second; clips of another rate are resampled. 0: all as they are.
        batch_size: clips a step and rank.
        single: batches are of single frames, B · T pictures, for a tokenizer of pictures.
        held_out: most clips for validation.
        seed: of the order and the windows.
    """

    def __init__(
        self,
        train: Source,
        validation: Source,
        frames: int = 17,
        size: int = 32,
        fps: float = 0.0,
        batch_size: int = 16,
        single: bool = False,
        held_out: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(frames, size, batch_size, held_out) < 1 or fps < 0:
            raise ValueError(
                f"frames, size, batch_size and held_out must be at least 1 and fps not negative, got {frames}, {size}, "
                f"{batch_size}, {held_out} and {fps}"
            )
        self.train, self.validation, self.names = train, validation, ["clips"]
        self.frames, self.size, self.fps = frames, size, fps
        self.batch_size, self.held_out, self.seed = batch_size, held_out, seed
        self.single = single
        self._loader: ShuffledBatches | None = None
        self._held: UInt8[Tensor, "N T 3 S S"] | None = None

    def setup(self, stage: str | None = None) -> None:
        world = self.trainer.world_size if self.trainer else 1
        if len(self.train) < self.batch_size * world:
            raise ValueError(
                f"{self.train.what} has {len(self.train)} clips to train on, fewer than one batch of {self.batch_size * world}"
            )

    def clip(self, source: Source, index: int, place: torch.Generator | None) -> UInt8[Tensor, "T 3 S S"]:
        """A window of one example, at a random place if a generator is given. Raises `BrokenExample`."""
        example = source[index]
        video = example["video"]
        if not isinstance(video, Video):
            raise BrokenExample(f"example {example['key']!r} has a {type(video).__name__} for a video")
        try:
            video = square(resample_frames(video, self.fps) if self.fps else video, self.size)
        except ValueError as error:
            raise BrokenExample(f"example {example['key']!r}: {error}") from error
        spare = max(0, len(video) - self.frames)
        begin = int(torch.randint(spare + 1, (1,), generator=place)) if place is not None else 0
        frames = torch.from_numpy(video.frames[begin : begin + self.frames].copy()).permute(0, 3, 1, 2)
        missing = self.frames - len(frames)
        return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames

    def clips(self, source: Source, rows: Sequence[int], place: torch.Generator | None) -> UInt8[Tensor, "N T 3 S S"]:
        """Windows of these examples; one that is broken gives its place to the next that isn't."""
        taken: list[Tensor] = []
        for row in rows:
            for index in range(row, row + PATIENCE):
                try:
                    taken.append(self.clip(source, index % len(source), place))
                    break
                except BrokenExample as error:
                    if source.strict or index == row + PATIENCE - 1:
                        raise ValueError(f"{source.what}: {error}") from error
                    warnings.warn(f"{source.what}: skipped a broken example: {error}", stacklevel=2)
        return torch.stack(taken)

    def batch(self, clips: UInt8[Tensor, "B T 3 S S"]) -> ClipBatch:
        if self.single:
            clips = clips.flatten(0, 1)
        return ClipBatch(pictures.to_unit(clips), torch.zeros(len(clips), dtype=torch.long))

    @property
    def epoch_size(self) -> int:
        return min(len(self.train), EPOCH)

    def order(self, epoch: int) -> Int[Tensor, " N"]:
        """Rows of the training source: each once, or `EPOCH` draws from one that is longer."""
        count, rng = len(self.train), seeded(self.seed, epoch, -1)
        return torch.randperm(count, generator=rng) if count <= EPOCH else torch.randint(count, (EPOCH,), generator=rng)

    def drawn(self, rows: Int[Tensor, " B"], rng: torch.Generator) -> ClipBatch:
        return self.batch(self.clips(self.train, rows.tolist(), rng))

    def held_in_batches(self) -> Iterator[ClipBatch]:
        """Training clips in an order of its own, the same on every rank."""
        order, rng = self.order(0), seeded(self.seed, 0, -3)
        for rows in order[torch.randperm(len(order), generator=rng)].split(self.batch_size):
            yield self.batch(self.clips(self.train, rows.tolist(), rng))

    def train_dataloader(self) -> Any:
        if self._loader is None:
            rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
            self._loader = ShuffledBatches(self, rank, world)
        return self._loader

    def val_dataloader(self) -> Any:
        if self._held is None:
            self._held = self.clips(self.validation, range(min(self.held_out, len(self.validation))), None)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Batches(self._held[rank::world].split(self.batch_size), self.batch)

    def predict_dataloader(self) -> Any:
        return self.val_dataloader()
