"""Shapes as tensors: what a tokenizer of shapes trains on.

Any source whose examples have a `shape` will do, one that makes them as it goes as well.

Letters in shapes: B batch, N cells a side, V views, S side of a view in pixels, C numbers of a pixel.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.data.clips import EPOCH, PATIENCE
from mm.data.example import BrokenExample, Source
from mm.data.images import Batches, ShuffledBatches, seeded
from mm.shape_tokenizer import pictures_of, solidity
from mm.shapes import SIZE, Shape, as_shape


class ShapeBatch(NamedTuple):
    """A batch as training and validation see it."""

    solidity: Float[Tensor, "B N N N"]
    """`mm.shape_tokenizer.solidity`: in [−1, 1], above 0 inside."""
    source: Int[Tensor, " B"]
    """All 0, there is one source."""
    views: Float[Tensor, "B V C S S"] | None = None
    """`mm.shape_tokenizer.pictures_of`, where asked for."""


class ShapeDataModule(L.LightningDataModule):
    """The shapes of a source.

    Args:
        train: the source to learn from.
        validation: another one, or another split; its first `held_out` shapes are looked at.
        size: cells a side.
        views: pictures of each shape, and their side in pixels; [0, 0]: none. Drawing them takes longer than making shapes.
        batch_size: shapes a step and rank.
        held_out: most shapes for validation.
        seed: of the order.
    """

    def __init__(
        self,
        train: Source,
        validation: Source,
        size: int = SIZE,
        views: Sequence[int] = (0, 0),
        batch_size: int = 16,
        held_out: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(batch_size, held_out) < 1 or len(views) != 2 or min(views) < 0:
            raise ValueError(
                f"batch_size and held_out must be at least 1, and views two numbers (how many, and their side), got "
                f"{batch_size}, {held_out} and {list(views)}"
            )
        self.train, self.validation, self.names = train, validation, ["shapes"]
        self.size, self.views = size, tuple(views)
        self.batch_size, self.held_out, self.seed = batch_size, held_out, seed
        self._loader: ShuffledBatches | None = None
        self._held: list[ShapeBatch] | None = None

    def setup(self, stage: str | None = None) -> None:
        world = self.trainer.world_size if self.trainer else 1
        if len(self.train) < self.batch_size * world:
            raise ValueError(
                f"{self.train.what} has {len(self.train)} shapes to train on, fewer than one batch of {self.batch_size * world}"
            )

    def shape(self, source: Source, index: int) -> Shape:
        """That of one example. Raises `BrokenExample`."""
        example = source[index]
        try:
            return as_shape(example["shape"], self.size)
        except ValueError as error:
            raise BrokenExample(f"example {example['key']!r}: {error}") from error

    def shapes(self, source: Source, rows: Sequence[int]) -> list[Shape]:
        """Those of these examples; one that is broken gives its place to the next that isn't."""
        taken: list[Shape] = []
        for row in rows:
            for index in range(row, row + PATIENCE):
                try:
                    taken.append(self.shape(source, index % len(source)))
                    break
                except BrokenExample as error:
                    if source.strict or index == row + PATIENCE - 1:
                        raise ValueError(f"{source.what}: {error}") from error
                    warnings.warn(f"{source.what}: skipped a broken example: {error}", stacklevel=2)
        return taken

    def batch(self, source: Source, rows: Sequence[int]) -> ShapeBatch:
        shapes = self.shapes(source, rows)
        count, side = self.views
        views = torch.stack([pictures_of(shape, count, side) for shape in shapes]) if count else None
        values = torch.stack([solidity(shape) for shape in shapes])
        return ShapeBatch(values, torch.zeros(len(shapes), dtype=torch.long), views)

    @property
    def epoch_size(self) -> int:
        return min(len(self.train), EPOCH)

    def order(self, epoch: int) -> Int[Tensor, " N"]:
        """Rows of the training source: each once, or `EPOCH` draws from one that is longer."""
        count, rng = len(self.train), seeded(self.seed, epoch, -1)
        return torch.randperm(count, generator=rng) if count <= EPOCH else torch.randint(count, (EPOCH,), generator=rng)

    def drawn(self, rows: Int[Tensor, " B"], rng: torch.Generator) -> ShapeBatch:
        return self.batch(self.train, rows.tolist())

    def held_in_batches(self) -> Iterator[ShapeBatch]:
        """Training shapes in an order of its own, the same on every rank."""
        order, rng = self.order(0), seeded(self.seed, 0, -3)
        for rows in order[torch.randperm(len(order), generator=rng)].split(self.batch_size):
            yield self.batch(self.train, rows.tolist())

    def train_dataloader(self) -> Any:
        if self._loader is None:
            rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
            self._loader = ShuffledBatches(self, rank, world)
        return self._loader

    def val_dataloader(self) -> Any:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        rows = torch.arange(min(self.held_out, len(self.validation)))[rank::world]
        if self._held is None:
            self._held = [self.batch(self.validation, part.tolist()) for part in rows.split(self.batch_size)]
        held = self._held  # Lightning would take a list for several loaders
        return Batches(torch.arange(len(held)).unbind(), lambda number: held[int(number)])

    def predict_dataloader(self) -> Any:
        return self.val_dataloader()
