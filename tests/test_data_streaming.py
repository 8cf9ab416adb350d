"""Streaming shards: every sample once, deterministic, resumable at any sample, and safe against broken shards."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mm.data.convert import write_shards
from mm.data.documents import TextOnly
from mm.data.example import BrokenExample
from mm.data.feeds import DocumentMaker, Part, StreamFeed
from mm.data.loader import PackedLoader
from mm.data.streaming import StreamingShards
from mm.layout import Segment
from mm.stream import TokenStream, unpack
from mm.tokenizers.text_bytes import TextBytes


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(buffer, format="PNG")
    return buffer.getvalue()


def entries(count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(count):
        caption = f"{number:03d}" + "." * (number * 7 % 40)
        yield f"{number:03d}", {"png": picture(), "json": json.dumps({"caption": caption}).encode()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Eight shards of uneven size: seven of 13 and one of 5."""
    return [str(p) for p in write_shards(entries(96), tmp_path_factory.mktemp("shards"), per_shard=13)]


def keys(stream: Any) -> list[str]:
    return [example["key"] for example in stream]


def causal(document: list[Segment], rng: torch.Generator) -> TokenStream:
    """All ids in a row, after one random number that shows where the generator stands."""
    ids = torch.cat([torch.randint(1 << 20, (1,), generator=rng), *(segment.content.ids for segment in document)])
    zeros = torch.zeros(len(ids))
    return TokenStream(
        modality=zeros.long(),
        ids=ids,
        document=zeros.long(),
        order=torch.arange(len(ids)),
        copy=zeros.long(),
        position=zeros[:, None].expand(-1, 3),
        time=zeros,
        target=zeros.long() - 1,
        weight=zeros,
    )


def loader(shards: list[str], num_workers: int = 0, **options: Any) -> PackedLoader:
    part = Part(source=StreamingShards(shards, lanes=4, shuffle=5), template=TextOnly())
    feed = StreamFeed(part, DocumentMaker(causal, {"text": TextBytes()}), chunk=3)
    return PackedLoader(feed, 200, **{"batches": 30, "lookahead": 12, "num_workers": num_workers, **options})


def fingerprint(stream: TokenStream) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(stream.lengths), tuple(stream.ids.tolist())


def test_an_epoch_gives_every_example_once_in_an_order_of_its_own(shards: list[str]) -> None:
    stream = StreamingShards(shards)
    first, second = keys(stream), keys(stream)
    everything = [f"{number:03d}" for number in range(96)]
    assert sorted(first) == sorted(second) == everything and first != second and first != everything
    assert keys(StreamingShards(shards)) == first, "the order is a function of the seed"
    assert keys(StreamingShards(shards, seed=1)) != first


def test_examples_are_those_of_random_access(shards: list[str]) -> None:
    example = next(iter(StreamingShards(shards, caption="a {caption}")))
    assert example["text"] == "a " + example["caption"] and example["image"].getpixel((0, 0)) == (255, 0, 0)


def test_without_shuffle_a_shard_keeps_its_order(shards: list[str]) -> None:
    assert keys(StreamingShards(shards[0], shuffle=1)) == [f"{number:03d}" for number in range(13)]


@pytest.mark.parametrize("stop", [1, 50, 95, 130])
def test_resume_at_any_sample(shards: list[str], stop: int) -> None:
    def read(stream: StreamingShards, count: int) -> list[str]:
        out: list[str] = []
        while len(out) < count:
            out += keys(islice(stream, count - len(out)))
        return out

    expected = read(StreamingShards(shards, lanes=3, shuffle=4), 192)
    first = StreamingShards(shards, lanes=3, shuffle=4)
    seen = read(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = StreamingShards(shards, lanes=3, shuffle=4)
    second.load_state_dict(state)
    assert seen + read(second, 192 - stop) == expected
    with pytest.raises(ValueError, match="of another stream"):
        StreamingShards(shards, lanes=2, shuffle=4).load_state_dict(state)


def test_worker_processes_share_the_shards(shards: list[str]) -> None:
    found = keys(DataLoader(StreamingShards(shards), batch_size=None, num_workers=2, collate_fn=dict))
    assert sorted(found) == [f"{number:03d}" for number in range(96)]


def test_braces_and_compression(shards: list[str], tmp_path: Path) -> None:
    assert len(StreamingShards(shards[0].replace("000000", "{000000..000007}")).urls) == 8
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(Path(shards[1]).read_bytes()))
    assert sorted(keys(StreamingShards(str(tmp_path / "x.tar.gz")))) == [f"{n:03d}" for n in range(13, 26)]


def test_holdout_by_hash(shards: list[str]) -> None:
    train = keys(StreamingShards(shards, split="train", holdout_every=4))
    held = keys(StreamingShards(shards, split="holdout", holdout_every=4))
    assert sorted(train + held) == [f"{number:03d}" for number in range(96)]
    assert 96 / 8 < len(held) < 96 / 2


@pytest.mark.parametrize("url", ["pipe:echo hello > owned", "-"])
def test_commands_need_consent(url: str) -> None:
    with pytest.raises(ValueError, match="runs a command or reads the terminal; set allow_commands"):
        StreamingShards(url)
    assert StreamingShards(url, allow_commands=True).urls == [url]


@pytest.mark.parametrize("options", [{"lanes": 0}, {"shuffle": 0}, {"split": "holdout", "holdout_every": 0}])
def test_options(shards: list[str], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        StreamingShards(shards, **options)
    with pytest.raises(ValueError, match="got no shards"):
        StreamingShards([])


def test_broken_shards_and_members(shards: list[str], tmp_path: Path) -> None:
    cut, bad, missing = tmp_path / "cut.tar", tmp_path / "bad.tar", tmp_path / "missing.tar"
    data = Path(shards[0]).read_bytes()
    with tarfile.open(shards[0]) as tar:
        cut.write_bytes(data[: tar.getmember("005.json").offset_data + 4])
    members = [("a.png", b"no picture"), ("a.json", b"{}"), ("b.bin", b"x" * 99), ("b.json", b"{}")]
    members += [("c.json", b"{}"), ("c.json", b"{}"), ("d.json", b"[]"), ("e.json", b'{"caption": "fine"}')]
    with tarfile.open(bad, "w") as tar:
        for name, value in members:
            info = tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
    stream = StreamingShards([str(cut), str(bad), str(missing)], max_member_bytes=90)
    with pytest.warns(UserWarning, match="stream of 3 shards: skipped 6 of 12 examples as broken"):
        assert sorted(keys(stream)) == ["000", "001", "002", "003", "004", "e"]
    for path, reason in ((cut, "is damaged, its rest is left out"), (missing, "can't be read: .*No such file")):
        with pytest.raises(BrokenExample, match=reason):
            keys(StreamingShards(str(path), strict=True))


def test_packed_batches_do_not_depend_on_workers(shards: list[str]) -> None:
    expected = [fingerprint(batch) for batch in loader(shards)]
    assert all(sum(lengths) <= 200 for lengths, _ in expected) and len(set(expected)) == 30
    assert [fingerprint(batch) for batch in loader(shards, num_workers=2)] == expected
    with pytest.raises(ValueError, match="num_workers must divide the 4 lanes of the stream, got 3"):
        next(iter(loader(shards, num_workers=3)))


def test_packed_epochs_give_every_document_once(shards: list[str]) -> None:
    """Lanes end an epoch at different times, so look at what each lane gives: whole passes over its shards."""
    whole = loader(shards, batches=60)
    texts = [bytes(d.ids[1:].tolist()).decode()[:3] for batch in whole for d in unpack(batch)]
    counts = [texts.count(f"{number:03d}") for number in range(96)]
    assert len(texts) > 250 and min(counts) >= 1 and max(counts) - min(counts) <= 3


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 2)])
def test_packed_resume_is_exact(shards: list[str], before: int, after: int) -> None:
    expected = [fingerprint(batch) for batch in loader(shards)]
    first = loader(shards, num_workers=before)
    seen = [fingerprint(batch) for batch in islice(first, 16)]
    state = first.state_dict()
    assert len(state["ranks"][0]["waiting"]) >= 5, "the look-ahead buffer must not be empty, or this proves little"
    second = loader(shards, num_workers=after)
    second.load_state_dict(state)
    assert seen + [fingerprint(batch) for batch in second] == expected


def test_ranks_read_different_shards(shards: list[str]) -> None:
    stream = StreamingShards(shards, lanes=2)
    for epoch in range(3):
        dealt = [shard for rank in range(2) for lane in range(2) for shard in stream.deal(epoch, lane, rank, world=2)]
        assert sorted(dealt) == list(range(8))
    part = Part(source=StreamingShards(shards, lanes=4), template=TextOnly())
    with pytest.raises(ValueError, match="8 shards are too few for 4 lanes on each of 3 ranks"):
        StreamFeed(part, DocumentMaker(causal), world=3)


def test_a_stream_without_examples_stops(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match="the shards of lane 0 hold no examples"):
        keys(StreamingShards(str(tmp_path / "empty.tar")))
    with pytest.raises(ValueError, match="^stream of 1 shards: the shards of lane 0 hold no examples"):
        next(iter(loader([str(tmp_path / "empty.tar")])))


@pytest.mark.parametrize("where", ["header", "attribute block"])
def test_a_member_of_impossible_size_ends_the_shard(shards: list[str], where: str) -> None:
    class Counted(io.BytesIO):
        """tarfile would skip the member in steps of 10 kB, for ever."""

        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            self.reads += 1
            assert self.reads < 1000
            return super().read(size)

    info = tarfile.TarInfo("000.png")
    if where == "header":
        header = bytearray(info.tobuf())
        header[124:136] = b"\x80" + b"\x7f" * 11
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    else:
        info.pax_headers = {"size": str(1 << 60)}
        header = bytearray(info.tobuf(tarfile.PAX_FORMAT))
    members = list(StreamingShards("x.tar")._members(Counted(bytes(header) + Path(shards[0]).read_bytes()), "x.tar"))
    assert len(members) == 1 and "at most 1,125,899,906,842,624 make sense" in str(members[0]["data"])


def test_a_strict_stream_raises_in_a_loader_that_is_not(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.json")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"[1]"))
    part = Part(source=StreamingShards(str(tmp_path / "x.tar"), strict=True), template=TextOnly())
    with pytest.raises(ValueError, match="^[^ ]*: a.json holds a JSON list; it needs an object$"):
        next(iter(PackedLoader(StreamFeed(part, DocumentMaker(causal)), 100, batches=1)))
