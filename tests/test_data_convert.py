"""Making and converting data sets: what a folder holds afterwards, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mm.commands.data import _texts
from mm.data.bpe import train_bpe
from mm.data.convert import Entry, make_digits, write_shards
from mm.data.sources import DigitsSource, ShardSource
from mm.testing import write_tar


def test_captions_for_a_bpe_skip_broken_records(tmp_path: Path) -> None:
    records = [b'{"caption": "a pear"}', b"{nope", b'{"caption": null}', b"[1]", b'{"caption": "a fig"}']
    path = write_tar(tmp_path / "x.tar", [(f"{n}.json", record) for n, record in enumerate(records)])
    seen: list[int] = []
    with pytest.warns(UserWarning, match="skipped 3 of 5 examples as broken; the first: x.tar: 1.json is not valid"):
        assert _texts(ShardSource(path), lambda done, total: seen.append(done)) == ["a pear", "a fig"]
    assert seen == [1, 2, 3, 4, 5]


def entries(count: int, fail_at: int | None = None) -> Iterator[Entry]:
    for number in range(count):
        if number == fail_at:
            raise OSError("the disk is full")
        yield f"{number:03d}", {"json": b"{}"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_of_an_earlier_run_never_mix_with_new_ones(tmp_path: Path) -> None:
    assert [path.name for path in write_shards(entries(6), tmp_path, per_shard=2)] == [
        "data-000000.tar",
        "data-000001.tar",
        "data-000002.tar",
    ]
    (tmp_path / "data-notes.tar").write_text("not ours")
    before = content(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds data-000001.tar \(older shards: 2\), .* 1 new ones; .* nothing was written"
    ):
        write_shards(entries(6), tmp_path)
    assert content(tmp_path) == before
    paths = write_shards(entries(9), tmp_path, per_shard=3)  # as many as before: all are replaced
    assert sum(len(ShardSource(path)) for path in paths) == 9
    assert sorted(content(tmp_path)) == sorted(before)
    write_shards(entries(1), tmp_path, prefix="other")
    assert len(content(tmp_path)) == 5


def test_a_failure_in_a_late_shard_leaves_nothing_half_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="disk is full"):
        write_shards(entries(6, fail_at=5), out, per_shard=2)
    assert content(out) == {}
    write_shards(entries(6), out, per_shard=2)
    before = content(out)
    with pytest.raises(OSError, match="disk is full"):
        write_shards(entries(6, fail_at=5), out, per_shard=3)
    assert content(out) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; give the name of a folder"):
        write_shards(entries(1), tmp_path / "file")


def test_sizes_and_seeds_of_digits_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size 8 to 512, got 1 and 513"):
        make_digits(tmp_path, count=1, size=513)
    with pytest.raises(ValueError, match="needs a seed >= 0, got -1; give 0 or a larger number"):
        make_digits(tmp_path, count=1, seed=-1)
    np.savez(tmp_path / "d.npz", images=np.zeros((1, 8, 8), np.uint8), labels=np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="with size 1 to 512, got 513"):
        DigitsSource(tmp_path / "d.npz", size=513)
    assert DigitsSource(tmp_path / "d.npz", size=512)[0]["image"].size == (512, 512)


def test_a_vocabulary_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 1,000,000 ids, got 1,000,001; give fewer"):
        train_bpe(["a pear"], tmp_path, 1_000_001)
    assert not list(tmp_path.iterdir())
