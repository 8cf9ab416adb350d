"""The byte BPE: lossless on anything, saved and read without trust; and the base of tokenizers of files."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.byte_bpe import FIRST, ByteBPE

APART = (b"\xff\xd0", b"\xff\xd1", b"\xff\xd9")


def some_files(count: int = 40) -> list[bytes]:
    """Bytes with repetitions, and with strings that are kept apart."""
    rng = random.Random(0)
    words = [rng.randbytes(rng.randrange(1, 6)) for _ in range(30)] + [part + b"AB" for part in APART] * 4
    return [b"".join(rng.choice(words) for _ in range(60)) for _ in range(count)]


@pytest.fixture(scope="module")
def trained() -> ByteBPE:
    bpe = ByteBPE(320, apart=APART)
    bpe.fit(some_files())
    return bpe


def test_without_merges_an_id_is_a_byte() -> None:
    data = bytes(range(256))
    assert ByteBPE().encode(data) == list(range(256))
    assert ByteBPE().decode(range(256)) == data
    assert ByteBPE().encode(b"") == [] and ByteBPE().decode([]) == b""


@given(st.binary(max_size=300))
def test_any_bytes_come_back(trained: ByteBPE, data: bytes) -> None:
    assert trained.decode(trained.encode(data)) == data


@given(st.lists(st.sampled_from([*APART, b"\xff", b"\xd0", b"\x00", b"ab"]), max_size=60))
def test_strings_that_are_kept_apart_come_back_too(trained: ByteBPE, words: list[bytes]) -> None:
    data = b"".join(words)
    assert trained.decode(trained.encode(data)) == data


def test_it_learns(trained: ByteBPE) -> None:
    files = some_files()
    assert sum(len(trained.encode(f)) for f in files) < 0.7 * sum(map(len, files))
    assert len(trained.table) == 320 and [t for t in trained.table[:256]] == [bytes([b]) for b in range(256)]
    assert len(set(trained.table)) == 320


def test_what_is_kept_apart_is_never_part_of_a_longer_token(trained: ByteBPE) -> None:
    assert any(token in APART for token in trained.table), "they are frequent enough to become tokens"
    assert not [token for token in trained.table if token not in APART and any(part in token for part in APART)]
    whole = ByteBPE(320)
    whole.fit(some_files())
    assert [token for token in whole.table if token not in APART and any(part in token for part in APART)]


def test_the_library_reads_what_is_saved(trained: ByteBPE, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    trained.save(tmp_path / "bpe.json")
    data = some_files(1)[0]
    library = Tokenizer.from_file(str(tmp_path / "bpe.json"))
    assert library.encode("".join(chr(FIRST + b) for b in data)).ids == trained.encode(data)


def test_saved_and_loaded(trained: ByteBPE, tmp_path: Path) -> None:
    trained.save(tmp_path / "bpe.json")
    for again in (ByteBPE.load(tmp_path / "bpe.json", 320, APART), pickle.loads(pickle.dumps(trained))):
        assert again.table == trained.table and again.merges == trained.merges
        for data in some_files(5):
            assert again.encode(data) == trained.encode(data)


def test_few_files_leave_ids_that_stand_for_nothing() -> None:
    bpe = ByteBPE(300)
    bpe.fit([b"abab"])
    assert len(bpe.table) == 300 and bpe.table[299] == b""
    assert bpe.decode([299, 97, -1, 300]) == b"a"


@pytest.mark.parametrize("merges", [[["⡡", "x"]], [["⡡"]], [["⡡", 3]], "x", None, [["⡡", "⡢⡢"]], [["", "⡢"]]])
def test_foreign_merges_are_refused(merges: object, tmp_path: Path) -> None:
    file = tmp_path / "bpe.json"
    file.write_text(json.dumps({"model": {"merges": merges}}))
    with pytest.raises(ValueError, match="is no byte-pair encoding of bytes"):
        ByteBPE.load(file, 320)


def test_too_many_merges_and_oversized_files_are_refused(trained: ByteBPE, tmp_path: Path) -> None:
    file = tmp_path / "bpe.json"
    trained.save(file)
    with pytest.raises(ValueError, match="don't fit into a vocabulary of 300"):
        ByteBPE.load(file, 300)
    with pytest.raises(ValueError, match="larger than the 100 bytes"):
        ByteBPE.load(file, 320, max_bytes=100)
    # each merge doubles the last token: 2^n bytes by n merges
    doubling = [[chr(FIRST) * 2**n] * 2 for n in range(30)][:14]
    file.write_text(json.dumps({"model": {"merges": doubling}}))
    with pytest.raises(ValueError, match="is not one of bytes"):
        ByteBPE.load(file, 320)


def test_bad_settings_are_refused() -> None:
    for size in (255, 1 << 17):
        with pytest.raises(ValueError, match="a vocabulary of bytes has 256 to 65,536 ids"):
            ByteBPE(size)
    with pytest.raises(ValueError, match="no bytes to learn merges from"):
        ByteBPE().fit([b""])
