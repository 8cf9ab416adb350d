"""WebDataset shards that are too many or too far away for random access, read in sequence through `webdataset`.

The order is a function of the seed alone. Shards are permuted every epoch and dealt to `lanes`; lanes are read in turn,
and inside a shard blocks of `shuffle` examples are permuted. A place in the stream is (epoch, shard, example) for every
lane, so reading can go on at any example, in any number of worker processes that divides `lanes`.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from torch.utils.data import IterableDataset, get_worker_info

from mm.audio import MAX_SECONDS
from mm.data.example import BrokenExample, Caption, Example, Split, digest, warn_skipped
from mm.data.media import Decoding
from mm.data.shards import MAX_MEMBER_BYTES, MAX_TEXT_BYTES, BoundedInfo, fields_of_members, member_problem, split_name
from mm.media import MAX_PIXELS
from mm.shapes import SIZE
from mm.video import MAX_FRAMES

Place = tuple[int, int, int]
"""Epoch, number of the shard within the lane, number of the example within the shard (as read, permuted)."""


class StreamingShards(IterableDataset[Example]):
    """Examples of remote or very large shards.

    Iterating gives one epoch (each worker process its lanes); `state_dict` of a stream read in this process holds the
    place after the last example, and the next iteration goes on there.

    Args:
        urls: paths, addresses (http, https, gs, hf and whatever else `webdataset` opens), braces expanded. Compressed
            tar files are fine here. `pipe:` runs a shell command and needs `allow_commands`.
        split, holdout_every: as for the random-access sources, but by a hash of the key: a stream can't sort its keys.
        caption, strict, max_pixels, max_seconds, max_frames, video_size, video_fps, shape_size: as for the random-access sources.
        lanes: shards read in turn. Memory: `lanes` × `shuffle` undecoded examples.
        shuffle: examples permuted together; 1 keeps the order of the shards' members.
        seed: of the permutations.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        split: Split = "all",
        holdout_every: int = 20,
        caption: str | None = None,
        strict: bool = False,
        max_pixels: int = MAX_PIXELS,
        max_seconds: float = MAX_SECONDS,
        max_frames: int = MAX_FRAMES,
        video_size: int | None = None,
        video_fps: float | None = None,
        shape_size: int = SIZE,
        max_member_bytes: int = MAX_MEMBER_BYTES,
        lanes: int = 4,
        shuffle: int = 256,
        seed: int = 0,
        allow_commands: bool = False,
    ) -> None:
        from webdataset.shardlists import expand_urls

        if split not in ("all", "train", "holdout"):
            raise ValueError(f"split must be 'all', 'train' or 'holdout', got {split!r}")
        if lanes < 1 or shuffle < 1 or holdout_every < (1 if split == "holdout" else 0):
            raise ValueError(f"lanes, shuffle, holdout_every must be positive, got {lanes}, {shuffle}, {holdout_every}")
        given = [urls] if isinstance(urls, str) else list(urls)
        self.urls: list[str] = [url for entry in given for url in expand_urls(str(entry))]
        for url in self.urls:
            if (url == "-" or urlsplit(url).scheme == "pipe") and not allow_commands:
                raise ValueError(f"{url!r} runs a command or reads the terminal; set allow_commands if you mean it")
        if not self.urls:
            raise ValueError("StreamingShards got no shards; give at least one address or path")
        self.split, self.holdout_every, self.strict = split, holdout_every, strict
        self.decoding = Decoding(max_pixels, max_seconds, max_frames, video_size, video_fps, shape_size)
        self.max_member_bytes = max_member_bytes
        self.lanes, self.shuffle, self.seed = min(lanes, len(self.urls)), shuffle, seed
        self._text = Caption(caption)
        self.what = f"stream of {len(self.urls)} shards"
        self._state: dict[str, Any] = {"next": 0, "lanes": [(0, 0, 0)] * self.lanes}

    @property
    def identity(self) -> str:
        options = (self.split, self.holdout_every, self.lanes, self.shuffle, self.seed)
        return digest("stream", *self.urls, *map(str, options))

    def deal(self, epoch: int, lane: int, rank: int = 0, world: int = 1) -> list[int]:
        """Shards (indices into `urls`) that a lane reads in an epoch; lanes and ranks partition all shards."""
        order = torch.randperm(len(self.urls), generator=_generator(self.seed, epoch)).tolist()
        return order[rank::world][lane :: self.lanes]

    def lane(
        self, lane: int, place: Place = (0, 0, 0), *, rank: int = 0, world: int = 1, until: int | None = None
    ) -> Iterator[tuple[Place, Example | BrokenExample]]:
        """Examples of a lane from `place` on, each with its place; endless, or up to the beginning of epoch `until`.

        What can't be read comes as a `BrokenExample`. Raises `ValueError` if a whole epoch holds nothing.
        """
        epoch, shard, index = place
        while until is None or epoch < until:
            shards = self.deal(epoch, lane, rank, world)
            if not shards:
                raise ValueError(f"{self.what}: lane {lane} of rank {rank} has no shard; use fewer lanes")
            empty = (shard, index) == (0, 0)
            for number in range(shard, len(shards)):
                for at, example in self._shard(shards[number], epoch, index):
                    empty = False
                    yield (epoch, number, at), example
                index = 0
            if empty:
                raise ValueError(f"{self.what}: the shards of lane {lane} hold no examples of split {self.split!r}")
            epoch, shard = epoch + 1, 0

    def _shard(self, shard: int, epoch: int, start: int) -> Iterator[tuple[int, Example | BrokenExample]]:
        """Examples of one shard from number `start` on, permuted in blocks."""
        block: list[dict[str, Any] | BrokenExample] = []
        first = 0

        def emit() -> Iterator[tuple[int, Example | BrokenExample]]:
            order = torch.randperm(len(block), generator=_generator(self.seed, epoch, shard, first)).tolist()
            for number, chosen in enumerate(order, first):
                if number >= start:
                    yield number, self._example(block[chosen])

        for sample in self._samples(self.urls[shard]):
            block.append(sample)
            if len(block) == self.shuffle:
                yield from emit()
                first += len(block)
                block = []
        yield from emit()

    def _samples(self, url: str) -> Iterator[dict[str, Any] | BrokenExample]:
        """Undecoded samples of this split as `webdataset` groups them."""
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys

        try:
            with contextlib.closing(gopen(url, "rb")) as stream:
                for sample in group_by_keys(self._members(stream, url)):
                    broken = next((value for value in sample.values() if isinstance(value, BrokenExample)), None)
                    if broken is not None or self._wanted(sample["__key__"]):
                        yield broken or sample
        except (OSError, ValueError) as error:
            yield BrokenExample(f"shard {url} can't be read: {error}")

    def _members(self, stream: Any, url: str) -> Iterator[dict[str, Any]]:
        """Members for `group_by_keys`; one that can't be used carries the reason, which spoils its whole sample."""
        key: str | None = None
        seen: set[str] = set()
        try:
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=BoundedInfo) as tar:
                for info in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                    parts = split_name(info.name)
                    if parts is None or not info.isreg():
                        continue
                    if parts[0] != key:
                        key, seen = parts[0], set()
                    suffix = parts[1]
                    limit = min(self.max_member_bytes, MAX_TEXT_BYTES if suffix in ("json", "txt") else 1 << 62)
                    data: bytes | BrokenExample
                    if problem := member_problem(info, suffix in seen, limit):
                        suffix, data = f"broken {len(seen)}", BrokenExample(f"{url}: {problem}")
                    else:
                        file = tar.extractfile(info)
                        data = file.read() if file is not None else b""
                        if len(data) != info.size:
                            raise tarfile.ReadError(f"member {info.name!r} is cut off")
                    seen.add(suffix)
                    yield {"fname": f"{key}.{suffix}", "data": data, "__url__": url}
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            reason = BrokenExample(f"shard {url} is damaged, its rest is left out: {error}")
            yield {"fname": f"{key or 'shard'}.damaged", "data": reason, "__url__": url}

    def _wanted(self, key: str) -> bool:
        if self.split == "all" or not self.holdout_every:
            return True
        held = int(digest("holdout", key), 16) % self.holdout_every == 0
        return held == (self.split == "holdout")

    def _example(self, sample: dict[str, Any] | BrokenExample) -> Example | BrokenExample:
        if isinstance(sample, BrokenExample):
            return sample
        key = sample["__key__"]
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        values, where = list(members.values()), f"{sample['__url__']}: {key}"
        try:
            fields = fields_of_members(list(members), values.__getitem__, where, self.decoding)
        except BrokenExample as error:
            return error
        fields["key"] = key
        return Example(fields, text=self._text(fields))

    def __iter__(self) -> Iterator[Example]:
        """One epoch: lanes in turn, media loaded; broken examples are skipped and counted (`strict` raises)."""
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        state = self._state
        epoch = min(place[0] for place in state["lanes"])
        open_lanes = {
            lane: self.lane(lane, state["lanes"][lane], until=epoch + 1) for lane in range(number, self.lanes, count)
        }
        skipped: list[str] = []
        seen, lane = 0, state["next"]
        while open_lanes:
            if lane in open_lanes:
                item = next(open_lanes[lane], None)
                if item is None:
                    del open_lanes[lane]
                    state["lanes"][lane] = (epoch + 1, 0, 0)
                else:
                    (_, shard, index), example = item
                    seen += 1
                    state["lanes"][lane] = (epoch, shard, index + 1)
                    state["next"] = (lane + 1) % self.lanes
                    if reason := self._broken(example):
                        skipped.append(reason)
                    else:
                        assert isinstance(example, Example)
                        yield example
            lane = (lane + 1) % self.lanes
        state["next"] = 0
        if skipped:
            warn_skipped(self.what, len(skipped), seen, skipped[0])

    def _broken(self, example: Example | BrokenExample) -> str:
        try:
            if isinstance(example, BrokenExample):
                raise example
            example.load()
        except BrokenExample as error:
            if self.strict:
                raise
            return str(error)
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"identity": self.identity, "next": self._state["next"], "lanes": list(self._state["lanes"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["identity"] != self.identity:
            raise ValueError("the saved place is of another stream: shards, split, lanes, shuffle or seed changed")
        self._state = {"next": state["next"], "lanes": [(e, s, i) for e, s, i in state["lanes"]]}


def _generator(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(digest(*(str(part) for part in parts))[:15], 16))
