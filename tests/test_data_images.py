"""Picture sets in memory, read from files of strangers: a sentence or a counted skip, never a traceback."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm.data import images
from mm.data.images import PictureSource, read_pictures
from mm.testing import write_tar


def picture(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format=kind)
    return buffer.getvalue()


def keys(path: Path, *, strict: bool = False) -> list[str]:
    return read_pictures(PictureSource(path=str(path)), 8, strict=strict)[0]


def test_no_reader_that_starts_other_programs_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def run(*args: object, **options: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    path = write_tar(tmp_path / "x.tar", [("a.png", picture("EPS")), ("b.png", picture())])
    with pytest.warns(UserWarning, match="skipped 1 broken pictures, the first is 'a.png'"):
        assert keys(path) == ["b"]
    with pytest.raises(ValueError, match="member 'a.png': the picture is damaged or not a picture"):
        keys(path, strict=True)


@pytest.mark.parametrize("damage", ["cut in data", "cut in header", "huge size", "garbage header"])
def test_a_damaged_tar_gives_what_comes_before_the_damage(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.png", picture()), ("b.png", picture()), ("c.png", picture())])
    with tarfile.open(path) as tar:
        place = tar.getmember("b.png")
    data = bytearray(path.read_bytes())
    if damage == "cut in data":
        data = data[: place.offset_data + 3]
    elif damage == "cut in header":
        data = data[: place.offset + 100]
    elif damage == "huge size":
        header = bytearray(place.tobuf())
        header[124:136] = b"\x80" + b"\x7f" * 11
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[place.offset : place.offset + 512] = header
    else:
        data[place.offset : place.offset + 512] = b"\xaa" * 512
    path.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="skipped 1 broken pictures, the first is the damaged rest of the file"):
        assert keys(path) == ["a"]
    with pytest.raises(ValueError, match=r"x\.tar' is damaged: "):
        keys(path, strict=True)


def test_compressed_and_empty_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="is compressed: unpack it"):
        keys(tmp_path / "x.tar")
    (tmp_path / "y.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a tar file: empty file"):
        keys(tmp_path / "y.tar")


def test_npz_files_from_strangers(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8))
    assert keys(path) == ["000000", "000001", "000002"]
    whole = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            keys(path)

    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(40) + whole[middle + 40 :])
    refused("is not an .npz with a field 'images' that can be read")
    wrong = bytearray(whole)
    wrong[8:10] = wrong[whole.index(b"PK\1\2") + 10 : whole.index(b"PK\1\2") + 12] = b"\x63\0"
    path.write_bytes(bytes(wrong))
    refused("that compression method is not supported|that can be read")
    with path.open("wb") as file:
        np.save(file, np.zeros((3, 8, 8), np.uint8))
    refused("is not an .npz")
    header = io.BytesIO()
    promise = {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 20, 1 << 20)}
    np.lib.format.write_array_header_1_0(header, promise)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue() + b"tiny")
    refused("that can be read")


def test_more_pictures_than_fit_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=np.zeros((9, 1, 1), np.uint8))
    monkeypatch.setattr(images, "MAX_BYTES_IN_MEMORY", 8 * 3 * 8 * 8)
    with pytest.raises(ValueError, match="array 'images' has 9 rows; at most 8 are read"):
        keys(path)
    tar = write_tar(tmp_path / "x.tar", ((f"{n}.png", picture()) for n in range(9)))
    with pytest.raises(ValueError, match="holds more than 0 GiB of pictures"):
        keys(tar)
