"""What tokenizers of shapes with weights share: shapes as cubes of numbers and back, and how they learn.

A shape is told as its *solidity*: the signed distance in units of `mm.voxels.TRUNCATION` with the other sign, from −1 (outside,
far) to 1 (inside, deep); its surface is where that is 0.

Letters in shapes: B batch, N cells a side, P cells that are compared.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.interfaces import Decoded, Encoded
from mm.saved import FromSettings
from mm.shape_views import DISTANCE, Views, checked_poses, rays, views
from mm.shapes import Shape, as_shape
from mm.trainable import Reconstruction, TrainableTokenizer
from mm.volume import Field, between_cells, views_of
from mm.voxels import TRUNCATION


@dataclass(frozen=True)
class Lesson:
    """One step of training: what came back at some cells, and what should have."""

    output: Float[Tensor, "B P"]
    target: Float[Tensor, "B P"]
    ids: Int[Tensor, "B ..."]
    loss: Float[Tensor, ""]
    """The quantiser's own, already weighted."""
    field: Field
    """What came back at any points, for learning from pictures."""


def solidity(shape: Shape) -> Float[Tensor, "N N N"]:
    return torch.from_numpy(np.clip(-shape.distance / TRUNCATION, -1, 1))


def pictures_of(shape: Shape, count: int, side: int) -> Float[Tensor, "V C S S"]:
    """Views all round with C = 10 numbers a pixel, as SAR3D reads them: colour in [−1, 1], depth, and the pixel's ray as Plücker
    coordinates (its direction, and its moment about the middle of the cube)."""
    drawn = views(shape.mesh, count, side)
    origins, directions = rays(drawn.poses, side)
    moments = np.cross(origins - 0.5, directions)
    depth = np.where(drawn.mask, drawn.depth - DISTANCE, 1.0)[..., None]  # what is far off stands for nothing
    numbers = np.concatenate((drawn.rgb / 127.5 - 1, depth, directions, moments), axis=-1)
    return torch.from_numpy(numbers.astype(np.float32)).permute(0, 3, 1, 2)


class ShapeTokenizer(FromSettings, TrainableTokenizer):
    """A tokenizer that reads cubes of `size` cells a side, or pictures of a shape, and gives back such cubes."""

    size: int
    looks: tuple[int, int] = (0, 0)
    """Pictures of each shape that it reads, and their side in pixels; none: it reads the cube."""

    # ---- what a file in tokenizers/ has to say -----------------------------------------------------------------------

    @abc.abstractmethod
    def ids_of(self, x: Float[Tensor, "B ..."]) -> Int[Tensor, "B ..."]:
        """Ids of what is read (`inputs`), in evaluation."""

    @abc.abstractmethod
    def solidity_of(self, ids: Int[Tensor, "B ..."]) -> Float[Tensor, "B N N N"]:
        """What repaired ids of one size stand for, not bounded."""

    @abc.abstractmethod
    def repaired(self, item: Encoded) -> tuple[Tensor, str]:
        """Ids that can be decoded, and what of the item had to be replaced for it."""

    @abc.abstractmethod
    def encoded(self, ids: Tensor) -> Encoded:
        """One item of `ids_of`."""

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    def encode(self, raw: Any) -> Encoded:
        """Ids of a shape: `mm.shapes.Shape`, a grid of this size, a mesh, or its file. Raises `ValueError` as `as_shape`."""
        return self.encode_batch([raw])[0]

    def encode_batch(self, raws: Sequence[Any]) -> list[Encoded]:
        if not raws:
            return []
        x = self.inputs([as_shape(raw, self.size) for raw in raws])
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                ids = self.ids_of(x.to(self._like().device))
        finally:
            self.train(training)
        return [self.encoded(one) for one in ids.cpu()]

    def decode(self, encoded: Encoded) -> Decoded:
        """A shape of signed distances. What can't be ids is replaced, with `valid` off; so it is where nothing is inside."""
        return self.decode_batch([encoded])[0]

    def decode_batch(self, items: Sequence[Encoded]) -> list[Decoded]:
        found = [self.repaired(item) for item in items]
        out: dict[int, Decoded] = {}
        training = self.training
        self.eval()
        try:
            for form in {tuple(ids.shape) for ids, _ in found}:
                where = [i for i, (ids, _) in enumerate(found) if tuple(ids.shape) == form]
                with torch.no_grad():
                    values = self.solidity_of(torch.stack([found[i][0] for i in where]).to(self._like().device))
                out |= {i: self._judged(one, found[i][1]) for i, one in zip(where, values.float().cpu(), strict=True)}
        finally:
            self.train(training)
        return [out[i] for i in range(len(items))]

    def _judged(self, values: Float[Tensor, "N N N"], reason: str) -> Decoded:
        distance = -TRUNCATION * values.nan_to_num(nan=-1.0).clamp(-1, 1)
        shape = Shape(distance.numpy())
        reason = "; ".join(filter(None, (reason, shape.reason)))
        return Decoded(value=shape, valid=not reason, reason=reason)

    # ---- training ----------------------------------------------------------------------------------------------------

    def inputs(self, shapes: Sequence[Shape]) -> Float[Tensor, "B ..."]:
        """What is read of shapes of this size."""
        return torch.stack([solidity(shape) for shape in shapes]).to(self._like().dtype)

    def learn(self, x: Float[Tensor, "B ..."], target: Float[Tensor, "B N N N"]) -> Lesson:
        """Encode, pass the quantiser and decode, with gradients; all cells are compared."""
        out: Reconstruction = self.reconstruct(x)
        assert out.ids is not None
        return Lesson(out.output.flatten(1), target.flatten(1), out.ids, out.loss, partial(between_cells, out.output))

    def render(self, item: Any, poses: Any = None, size: int = 64, *, views: int = 6) -> Views:
        """Pictures of what an item's ids stand for, by volume rendering: from `views` places all round, or from the given cameras
        (`mm.shape_views`). Raises `ValueError` for numbers that are out of bounds."""
        poses = checked_poses(views, size, poses)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                ids = self.repaired(item)[0].to(self._like().device)
                return views_of(self.field_of(ids[None]), poses, size)
        finally:
            self.train(training)

    def field_of(self, ids: Int[Tensor, "B ..."]) -> Field:
        """Solidity at any points, of repaired ids of one size."""
        return partial(between_cells, self.solidity_of(ids))

    def _like(self) -> Tensor:
        return self.last_layer()
