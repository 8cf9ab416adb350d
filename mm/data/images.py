"""Small picture sets held in memory as one tensor: what a picture tokenizer trains on.

Reads WebDataset shards (`.tar` with `.png`, `.jpg`, `.jpeg` or `.webp` members) and `.npz` files with a field `images`
(N, rows, columns) of uint8. Files are taken to come from strangers, as in `mm.data.shards`. Every picture is decoded
once and fitted to a square on white; batches are gathered from the tensor, so an epoch costs no decoding at all.

Letters in shapes: N pictures, B batch, S side in pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from mm import pictures
from mm.data.shards import COMPRESSED, TAR_ERRORS, member_problem, tar_members
from mm.data.sources import load_arrays
from mm.media import load_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_MEMBER_BYTES = 16 << 20
MAX_BYTES_IN_MEMORY = 4 << 30


@dataclass(kw_only=True)
class PictureSource:
    """One file of pictures."""

    path: str
    """`.tar` or `.npz`."""
    flip: bool = False
    """Mirror left to right at random in training; not for writing."""
    invert: bool = False
    """Exchange black and white (ink on paper instead of light on dark)."""
    share: float = 1.0
    """Fraction of the training pictures that one epoch draws."""

    @property
    def name(self) -> str:
        return Path(self.path).stem


class PictureBatch(NamedTuple):
    """A batch as training and validation see it."""

    pixels: Float[Tensor, "B 3 S S"]
    """In [−1, 1]."""
    source: Int[Tensor, " B"]
    """Index into the data module's `names`."""


def read_pictures(
    source: PictureSource, size: int, *, strict: bool = False
) -> tuple[list[str], UInt8[Tensor, "N 3 S S"]]:
    """All pictures of one file, sorted by their key (file stem, or running number), with the keys.

    Broken members, and the rest of a file from where it is damaged, are skipped with one counted warning, or raise if
    `strict`.

    Raises:
        ValueError: the file is missing, of another kind, holds no picture, or more than fits in memory.
    """
    path = Path(source.path)
    if not path.is_file():
        raise ValueError(f"no picture file '{path}': expected a .tar of pictures or an .npz with a field 'images'")
    if path.suffix == ".tar":
        keys, found = _read_tar(path, size, strict)
    elif path.suffix == ".npz":
        keys, found = _read_npz(path, size)
    else:
        raise ValueError(f"'{path}' is neither .tar nor .npz: pack the pictures into a WebDataset shard")
    if not found:
        raise ValueError(f"'{path}' holds no picture that can be read")
    stacked = torch.stack(found)
    return keys, 255 - stacked if source.invert else stacked


def _budget(count: int, size: int, path: Path) -> None:
    if count * 3 * size * size > MAX_BYTES_IN_MEMORY:
        raise ValueError(f"'{path}' holds more than {MAX_BYTES_IN_MEMORY >> 30} GiB of pictures of {size}×{size}")


def _read_tar(path: Path, size: int, strict: bool) -> tuple[list[str], list[Tensor]]:
    found: dict[str, Tensor] = {}
    broken: list[str] = []
    with path.open("rb") as file:
        if file.read(2) in COMPRESSED:
            raise ValueError(f"'{path}' is compressed: unpack it to a plain .tar")
        members, seen = tar_members(file), 0
        while True:
            try:
                member = next(members, None)
            except TAR_ERRORS as error:
                first = str(error).split("\n")[0]
                if not seen:
                    raise ValueError(f"'{path}' is not a tar file: {first}") from error
                if strict:
                    raise ValueError(f"'{path}' is damaged: {first}") from error
                broken.append(f"the damaged rest of the file ({first})")
                break
            if member is None:
                break
            seen += 1
            stem, dot, suffix = PurePosixPath(member.name).name.partition(".")
            if not member.isreg() or not stem or f"{dot}{suffix}".lower() not in SUFFIXES:
                continue
            try:
                if problem := member_problem(member, False, MAX_MEMBER_BYTES):
                    raise ValueError(problem)
                file.seek(member.offset_data)
                picture = pictures.to_bytes(pictures.fit_square(load_image(file.read(member.size)), size))
            except (ValueError, OSError) as error:
                if strict:
                    raise ValueError(f"'{path}', member '{member.name}': {error}") from error
                broken.append(f"'{member.name}'")
                continue
            _budget(len(found) + 1, size, path)
            found[stem] = picture
    if broken:
        warnings.warn(f"'{path}': skipped {len(broken)} broken pictures, the first is {broken[0]}", stacklevel=3)
    keys = sorted(found)
    return keys, [found[key] for key in keys]


def _read_npz(path: Path, size: int) -> tuple[list[str], list[Tensor]]:
    try:
        images = load_arrays(path, ("images",), max_rows=MAX_BYTES_IN_MEMORY // (3 * size * size))["images"]
    except ValueError as error:
        raise ValueError(f"'{path}' is not an .npz with a field 'images' that can be read: {error}") from error
    if images.ndim != 3 or images.dtype != np.uint8 or not images.size:
        raise ValueError(f"'{path}': expected images (N, rows, columns) of uint8, got {images.dtype} {images.shape}")
    rows, columns = images.shape[1:]
    keys = [f"{i:06d}" for i in range(len(images))]
    if max(rows, columns) > size:
        return keys, [pictures.to_bytes(pictures.fit_square(Image.fromarray(x), size)) for x in images]
    # Smaller pictures keep their pixels: the margin takes the value of the background, that is the corner's.
    canvas = np.full((len(images), size, size), 0, dtype=np.uint8)
    canvas[:] = images[:, :1, :1]
    top, left = (size - rows) // 2, (size - columns) // 2
    canvas[:, top : top + rows, left : left + columns] = images
    return keys, list(torch.from_numpy(canvas)[:, None].expand(-1, 3, -1, -1).contiguous())


def seeded(*parts: int) -> torch.Generator:
    """A generator per purpose and step, so that a resumed run needs no saved generator state."""
    seed = np.random.SeedSequence([p % (1 << 32) for p in parts]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


class Drawn(Protocol):
    """What `ShuffledBatches` draws from."""

    batch_size: int
    seed: int

    @property
    def epoch_size(self) -> int:
        """Rows of an epoch."""

    def order(self, epoch: int) -> Int[Tensor, " N"]:
        """Rows of an epoch in their order, the same on every rank."""

    def drawn(self, rows: Int[Tensor, " B"], rng: torch.Generator) -> Any:
        """The batch of these rows; `rng` draws what differs from one epoch to the next."""


class ShuffledBatches:
    """Batches of rows in an order drawn anew each epoch; its state resumes mid-epoch with the very same batches.

    Lightning calls `state_dict` and `load_state_dict` on loaders that have them.
    """

    def __init__(self, data: Drawn, rank: int, world: int) -> None:
        self.data, self.rank, self.world = data, rank, world
        self.epoch, self.done = 0, 0

    def __len__(self) -> int:
        return self.data.epoch_size // (self.data.batch_size * self.world)

    def __iter__(self) -> Iterator[Any]:
        order = self.data.order(self.epoch)
        size = self.data.batch_size * self.world
        for index in range(self.done, len(self)):
            rows = order[index * size + self.rank : (index + 1) * size : self.world]
            self.done = index + 1
            if self.done == len(self):
                self.epoch, self.done = self.epoch + 1, 0
                epoch = self.epoch - 1
            else:
                epoch = self.epoch
            yield self.data.drawn(rows, seeded(self.data.seed, epoch, index, self.rank))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]


class Batches:
    """Held-out batches in order, made as they are asked for."""

    def __init__(self, chunks: Sequence[Tensor], make: Callable[[Tensor], Any]) -> None:
        self.chunks, self.make = chunks, make

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Any]:
        return map(self.make, self.chunks)


class ImageTensorDataModule(L.LightningDataModule):
    """Pictures of several files in one tensor, a part of the concepts held out for validation.

    A concept is a key (file stem); the keys of all shards are joined and sorted, and every `holdout_every`-th is held
    out of every shard, so that no style of a held-out concept is seen in training. The pictures of an `.npz` have no
    names: there every `holdout_every`-th row is held out.

    Args:
        sources: the files.
        size: side of the pictures in pixels.
        batch_size: pictures a step and rank.
        holdout_every: one concept in so many is held out (0: none; validation then runs on the training pictures).
        seed: of the order and the flips.
        strict: raise on broken members instead of skipping them.
    """

    def __init__(
        self,
        sources: list[PictureSource],
        size: int = 32,
        batch_size: int = 128,
        holdout_every: int = 20,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__()
        if not sources or len({s.name for s in sources}) != len(sources):
            raise ValueError(f"sources must be one or more files of different names, got {[s.name for s in sources]}")
        if batch_size < 1 or holdout_every == 1 or holdout_every < 0:
            raise ValueError(
                f"batch_size >= 1 and holdout_every 0 or >= 2 are needed, got {batch_size}, {holdout_every}"
            )
        if any(not 0 < s.share <= 1 for s in sources):
            raise ValueError(f"share must be in (0, 1], got {[s.share for s in sources]}")
        self.sources, self.size, self.batch_size = sources, size, batch_size
        self.holdout_every, self.seed, self.strict = holdout_every, seed, strict
        self.names = [s.name for s in sources]
        self.pixels = torch.empty(0, 3, size, size, dtype=torch.uint8)
        self.source = torch.empty(0, dtype=torch.long)
        self.train_rows: list[Tensor] = []
        self.held_out_rows = torch.empty(0, dtype=torch.long)
        self._loader: ShuffledBatches | None = None

    def setup(self, stage: str | None = None) -> None:
        if len(self.pixels):
            return
        read = [read_pictures(s, self.size, strict=self.strict) for s in self.sources]
        tars = [keys for s, (keys, _) in zip(self.sources, read, strict=True) if s.path.endswith(".tar")]
        concepts = sorted({key for keys in tars for key in keys})
        held = set(concepts[:: self.holdout_every]) if self.holdout_every else set()
        base, train, test, label = 0, [], [], []
        for number, (source, (keys, pixels)) in enumerate(zip(self.sources, read, strict=True)):
            if source.path.endswith(".tar"):
                out = torch.tensor([key in held for key in keys])
            else:
                out = torch.arange(len(keys)) % max(self.holdout_every, 1) == 0
                out &= self.holdout_every > 0
            train.append(base + (~out).nonzero()[:, 0])
            test.append(base + out.nonzero()[:, 0])
            label.append(torch.full((len(keys),), number))
            base += len(pixels)
        self.pixels, self.source = torch.cat([p for _, p in read]), torch.cat(label)
        self.train_rows = train
        self.held_out_rows = torch.cat(test if self.holdout_every else train)
        world = self.trainer.world_size if self.trainer else 1
        if self.epoch_size < self.batch_size * world:
            raise ValueError(
                f"an epoch draws {self.epoch_size} pictures, fewer than one batch of {self.batch_size * world}"
            )

    def draw(self, epoch: int) -> list[Tensor]:
        """Rows of each source that this epoch uses (all, or a fresh `share` of them)."""
        out = []
        for number, (source, rows) in enumerate(zip(self.sources, self.train_rows, strict=True)):
            count = round(len(rows) * source.share)
            if count < len(rows):
                rows = rows[torch.randperm(len(rows), generator=seeded(self.seed, epoch, -2, number))[:count]]
            out.append(rows)
        return out

    def batch(self, rows: Int[Tensor, " B"], *, flips: torch.Generator | None) -> PictureBatch:
        """The pictures of these rows, mirrored at random where their source allows it and `flips` is given."""
        pixels, source = pictures.to_unit(self.pixels[rows]), self.source[rows]
        if flips is not None:
            may = torch.tensor([s.flip for s in self.sources])[source]
            mirror = may & (torch.rand(len(rows), generator=flips) < 0.5)
            pixels = torch.where(mirror[:, None, None, None], pixels.flip(-1), pixels)
        return PictureBatch(pixels, source)

    @property
    def epoch_size(self) -> int:
        return sum(len(rows) for rows in self.draw(0))

    def order(self, epoch: int) -> Int[Tensor, " N"]:
        rows = torch.cat(self.draw(epoch))
        return rows[torch.randperm(len(rows), generator=seeded(self.seed, epoch, -1, 0))]

    def drawn(self, rows: Int[Tensor, " B"], rng: torch.Generator) -> PictureBatch:
        return self.batch(rows, flips=rng)

    def held_in_batches(self) -> Iterator[PictureBatch]:
        """Training pictures in an order of its own, the same on every rank, not mirrored."""
        rows = torch.cat(self.draw(0))
        rows = rows[torch.randperm(len(rows), generator=seeded(self.seed, 0, -3, 0))]
        for part in rows.split(self.batch_size):
            yield self.batch(part, flips=None)

    def train_dataloader(self) -> Any:
        if self._loader is None:
            rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
            self._loader = ShuffledBatches(self, rank, world)
        return self._loader

    def val_dataloader(self) -> Any:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        rows = self.held_out_rows[rank::world]
        return Batches(rows.split(self.batch_size), partial(self.batch, flips=None))

    def predict_dataloader(self) -> Any:
        return self.val_dataloader()
