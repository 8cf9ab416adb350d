"""Making and converting data sets: what a folder holds afterwards, and what is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from mm.commands.data import _texts
from mm.data.sources import ShardSource


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_captions_for_a_bpe_skip_broken_records(tmp_path: Path) -> None:
    records = [b'{"caption": "a pear"}', b"{nope", b'{"caption": null}', b"[1]", b'{"caption": "a fig"}']
    path = write_tar(tmp_path / "x.tar", [(f"{n}.json", record) for n, record in enumerate(records)])
    seen: list[int] = []
    with pytest.warns(UserWarning, match="skipped 3 of 5 examples as broken; the first: x.tar: 1.json is not valid"):
        assert _texts(ShardSource(path), lambda done, total: seen.append(done)) == ["a pear", "a fig"]
    assert seen == [1, 2, 3, 4, 5]
