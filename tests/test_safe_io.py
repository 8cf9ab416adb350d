"""Files are written whole or not at all, and read within bounds."""

from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch

from mm import safe_io


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.json"
    with safe_io.atomic_file(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.suffix == ".json"
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert names(tmp_path) == ["new", "new/a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), safe_io.atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_written_files_are_readable_as_usual(tmp_path: Path) -> None:
    safe_io.write_text(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
    assert modes[0] == modes[1]


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a folder; give the name of a file"), safe_io.atomic_file(tmp_path):
        pass
    with pytest.raises(ValueError, match="is a file; give the name of a folder"):
        with safe_io.atomic_folder(tmp_path / "file"):
            pass
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("empty", [False, True])
def test_a_new_folder_appears_whole(tmp_path: Path, empty: bool) -> None:
    target = tmp_path / "model"
    if empty:
        target.mkdir()
    with safe_io.atomic_folder(target, last="model.json") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        (folder / "model.json").write_text("2")
        assert not target.exists() or not any(target.iterdir())
    assert names(tmp_path) == ["model", "model/model.json", "model/sub", "model/sub/a"]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), safe_io.atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
        raise RuntimeError
    with pytest.raises(ValueError, match="model.json was not written"):
        with safe_io.atomic_folder(tmp_path / "model", last="model.json") as folder:
            (folder / "a").write_text("1")
    assert names(tmp_path) == []


def test_a_folder_in_use_keeps_what_is_not_ours(tmp_path: Path) -> None:
    tmp_path = tmp_path / "model"
    (tmp_path / "sub").mkdir(parents=True)
    for name in ("model.json", "sub/a", "sub/thesis.txt"):
        (tmp_path / name).write_text("old")
    with safe_io.atomic_folder(tmp_path, last="model.json") as folder:
        (folder / "sub").mkdir()
        for name in ("model.json", "sub/a", "b"):
            (folder / name).write_text("new")
    found = {name: (tmp_path / name).read_text() for name in ("model.json", "sub/a", "sub/thesis.txt", "b")}
    assert found == {"model.json": "new", "sub/a": "new", "sub/thesis.txt": "old", "b": "new"}
    assert [file.name for file in tmp_path.parent.iterdir()] == ["model"], "no temporary folder stays"


def test_a_folder_interrupted_while_it_is_replaced_lacks_its_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model.json", "weights"):
        (tmp_path / name).write_text("old")
    replace = os.replace

    def fail(source: str, target: str) -> None:
        replace(source, target)
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power cut"), safe_io.atomic_folder(tmp_path, last="model.json") as folder:
        for name in ("model.json", "weights"):
            (folder / name).write_text("new")
    assert names(tmp_path) == ["weights"], "new weights beside an old description would be a mixture"


def test_json_and_tensors_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    safe_io.write_json(tmp_path / "a.json", value)
    assert safe_io.read_json(tmp_path / "a.json") == value
    base = torch.randn(4, 3)
    tensors = {"a": base, "b": base.T, "c": torch.arange(3), "d": base[1:], "e": torch.randn(2).bfloat16()}
    safe_io.write_tensors(tmp_path / "a.safetensors", tensors)
    back = safe_io.read_tensors(tmp_path / "a.safetensors", tensors)
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)


def test_json_has_no_word_for_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        safe_io.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "sub/a", "./a", "..a"])
def test_inside(tmp_path: Path, name: str) -> None:
    assert safe_io.inside(tmp_path, name).is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "name", ["", "..", "../a", "a/../../b", "/etc/passwd", "C:\\a", "\\\\host\\a", "..\\a", "a\0b", "a\nb", "C:a"]
)
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="does not stay inside its folder"):
        safe_io.inside(tmp_path, name)


def test_links_that_leave_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    (folder / "own").symlink_to("file")
    for name in ("link", "up/secret", "up/new"):
        with pytest.raises(ValueError, match="is a link that leads out"):
            safe_io.inside(folder, name)
    assert safe_io.inside(folder, "own") == folder / "own"


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to("round")
    for folder, name in ((tmp_path, "round"), (tmp_path / "round", "file")):
        with pytest.raises(ValueError, match="is a link that leads in a circle; replace it by the file"):
            safe_io.inside(folder, name)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("{}")
    (tmp_path / "refs").write_text("x")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "odd").symlink_to("../../refs")
    assert safe_io.read_json(safe_io.inside(snapshot, "config.json")) == {}
    with pytest.raises(ValueError, match="leads out"):
        safe_io.inside(snapshot, "odd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ('{"a": 1', "not a JSON file"),
        ("[1]", "holds a JSON list, expected an object"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "nested too deeply|not a JSON file"),
        ('{"a": ' + "9" * 10_000 + "}", "not a JSON file"),
        ("\ufeff{}", "not a JSON file"),
        (" " * 200, "larger than the 100 bytes"),
    ],
)
def test_bad_json(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        safe_io.read_json(file, max_bytes=100 if text.isspace() else safe_io.MAX_JSON)


def test_json_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a JSON file"):
        safe_io.read_json(tmp_path / "a.json")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing; give the path"):
        safe_io.read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="is not a file"):
        safe_io.read_tensors(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="is not a file"):
        safe_io.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.PTH", "a.ckpt", "a.pkl", "a.pickle"])
def test_pickles_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"is a pickle.*convert it to \.safetensors"):
        safe_io.refuse_pickle(name)


def test_pickles_are_refused_under_another_name(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "zip.safetensors")
    (tmp_path / "raw.safetensors").write_bytes(pickle.dumps({"a": 1}))
    for name in ("zip", "raw"):
        with pytest.raises(ValueError, match="is a pickle under another name"):
            safe_io.read_tensors(tmp_path / f"{name}.safetensors")


def test_a_header_that_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """Length of the header 0x0280 = 640: the file begins with the bytes of a pickle."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(640).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert file.read_bytes()[:2] == b"\x80\x02"
    assert safe_io.read_tensors(file)["a"].tolist() == [0.0]


def test_damaged_tensors(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    safe_io.write_tensors(file, {"a": torch.zeros(100)})
    whole = file.read_bytes()
    for data in (b"", b"x", whole[:50], whole[:-4], b"\xff" * 100, (1 << 60).to_bytes(8, "little") + whole[8:]):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            safe_io.read_tensors(file)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    safe_io.write_tensors(file, {"a": torch.zeros(2, 3), "b": torch.zeros(1), "n": torch.arange(2)})
    good = {"a": torch.zeros(2, 3), "b": torch.zeros(1), "n": torch.arange(2)}
    cases = [
        ({**good, "a": torch.zeros(3, 2)}, r"a has shape \(2, 3\), expected \(3, 2\)"),
        ({**good, "c": torch.zeros(1)}, "lacks c; it belongs to another"),
        ({"a": good["a"], "n": good["n"]}, "has b too many"),
        ({"a": good["a"], "n": good["n"], "z": torch.zeros(1)}, "lacks z and has b too many"),
        ({**good, "n": torch.zeros(2)}, "n has dtype torch.int64, expected torch.float32"),
    ]
    for expected, message in cases:
        with pytest.raises(ValueError, match=message):
            safe_io.read_tensors(file, expected)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        safe_io.read_tensors(file, max_bytes=10)


def test_floats_become_the_expected_ones(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    safe_io.write_tensors(file, {"x.a": torch.tensor([1.5]).half(), "y.b": torch.zeros(1)})
    back = safe_io.read_tensors(file, {"a": torch.zeros(1, device="meta")}, prefix="x.")
    assert back["a"].dtype == torch.float32 and back["a"].tolist() == [1.5]
