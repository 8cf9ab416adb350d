"""JPEG files: written as Pillow writes them, read by a strict automaton, repaired where they are damaged."""

from __future__ import annotations

import io
import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm import jpeg
from mm.jpeg import Reader
from mm.jpeg_machine import JpegMachine
from mm.jpeg_markers import MarkerMachine
from mm.jpeg_tables import MARKER, SAMPLING, Frame, Huffman, Tables

FRAMES = [
    Frame(size=size, subsampling=subsampling, restart=restart)
    for size, subsampling, restart in [
        ((32, 32), "4:2:0", 1), ((32, 32), "4:2:0", 0), ((40, 50), "4:2:0", 3), ((20, 45), "4:2:2", 1), ((17, 9), "4:4:4", 2),
        ((1, 1), "4:2:0", 1), ((160, 48), "4:2:0", 1),
    ]
]  # fmt: skip


def pictures(frame: Frame, count: int = 6, seed: int = 0) -> list[Image.Image]:
    """Noise, smooth colours, and shapes: files with many and with few coefficients."""
    rng = np.random.default_rng(seed)
    height, width = frame.size
    out = []
    for n in range(count):
        small = rng.integers(0, 256, (1 + 2 * n, 2 + n, 3), dtype=np.uint8)
        method = Image.Resampling.BICUBIC if n % 2 else Image.Resampling.NEAREST
        out.append(Image.fromarray(small).resize((width, height), method))
    return out


def reader(frame: Frame, quality: int = 25) -> Reader:
    return Reader(frame, jpeg.tables(quality, frame.subsampling))


def by_pillow(data: bytes) -> np.ndarray:
    """Pixels as Pillow reads them, strictly: it raises for files that end early."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_a_file_is_read_as_pillow_reads_a_whole_one(frame: Frame) -> None:
    """The tables are spliced in; pixels equal those of a file that Pillow writes with its tables."""
    read = reader(frame)
    for image in pictures(frame):
        data = jpeg.encode(image, frame)
        result = read.read(data)
        assert result.status == "strict" and result.reason == "" and result.data == data
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=25, subsampling=frame.subsampling)
        assert np.array_equal(np.asarray(result.picture), by_pillow(file.getvalue()))


def test_the_bytes_are_those_of_jpeg_lm() -> None:
    """Files that `convert_img_to_bytes` of xhan77/jpeg-lm (`run.py`) wrote, by libjpeg-turbo 3.1.4.1."""
    from PIL import features

    if features.version("libjpeg_turbo") != GOLDEN_VERSION:
        pytest.skip(f"another version of libjpeg-turbo than {GOLDEN_VERSION} may write other bytes")
    frame = Frame(size=(32, 32))
    for n, data in GOLDEN.items():
        assert jpeg.encode(golden_picture(n), frame).hex() == data
    assert jpeg.tables()[2:-2].hex().startswith("ffdb0043002016181c18142") and len(jpeg.tables()) == 574


def golden_picture(n: int) -> Image.Image:
    """A picture that needs no file and no library's scaling."""
    row, column = np.mgrid[:32, :32]
    parts = [(row * 7 + column * (n + 1)) % 256, (row * column // (n + 2)) % 256, (200 * (row > column)) % 256]
    return Image.fromarray(np.stack(parts, 2).astype(np.uint8))


def test_nothing_but_pixels_goes_into_a_file() -> None:
    """Pillow copies the comment of the file that a picture was read from."""
    frame = Frame(size=(16, 16))
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, format="JPEG", comment=b"a comment of its own", quality=90)
    image = Image.open(io.BytesIO(file.getvalue()))
    data = jpeg.encode(image, frame)
    assert b"comment" not in data
    assert data == jpeg.encode(Image.fromarray(np.array(image)), frame)


@pytest.mark.parametrize("subsampling", SAMPLING)
@pytest.mark.parametrize("quality", [1, 25, 75, 95])
def test_every_quality(quality: int, subsampling: str) -> None:
    frame = Frame(size=(24, 40), subsampling=subsampling, restart=2)
    read = reader(frame, quality)
    for image in pictures(frame):
        assert read.read(jpeg.encode(image, frame, quality)).status == "strict"


# --- the strict automaton -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", FRAMES, ids=str)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "markers"])
@pytest.mark.parametrize("header", [True, False])
def test_need_is_the_length_of_the_way_to_the_end(frame: Frame, strict: bool, header: bool) -> None:
    """From any state; and each of the steps on the way leads one byte nearer."""
    start = frame.header() if header else b""
    tables = Tables.read(jpeg.tables(25, frame.subsampling))
    machine: Any = JpegMachine(frame, tables, start) if strict else MarkerMachine(frame, start)
    rng, ends = random.Random(0), 0
    for _ in range(12):
        state, highest = machine.start, machine.bound(machine.start)
        for _ in range(rng.randrange(200)):
            following = machine.successors(state)
            if machine.is_end(state):
                assert not following
                ends += 1
                break
            byte = rng.choice(list(following))
            assert machine.step(state, byte) == following[byte]
            state = following[byte]
            assert machine.need(state) <= machine.bound(state) <= highest
            highest = machine.bound(state) if not header else highest
        rest = machine.closed(state)
        assert machine.need(state) == len(rest)
        for byte in rest:
            after = machine.step(state, byte)
            assert after is not None and machine.need(after) == machine.need(state) - 1
            state = after
        assert machine.is_end(state)


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_whatever_the_automaton_accepts_pillow_reads_without_a_warning(frame: Frame) -> None:
    tables = jpeg.tables(25, frame.subsampling)
    machine = JpegMachine(frame, Tables.read(tables), frame.header())
    rng = random.Random(1)
    for _ in range(8):
        data, state = bytearray(), machine.start
        while not machine.is_end(state) and len(data) < 300:
            byte, state = rng.choice(list(machine.successors(state).items()))
            data.append(byte)
        data += machine.closed(state)
        assert by_pillow(jpeg.splice(bytes(data), tables)).shape == (*frame.size, 3)


def test_equal_keys_allow_equal_strings() -> None:
    """Of several places in a picture, the restart markers' numbers and the place drop out where they can't be reached."""
    frame = Frame(size=(64, 64), restart=3)
    machine = JpegMachine(frame, Tables.read(jpeg.tables()))
    seen: dict[Any, Any] = {}
    rng, shared = random.Random(2), 0
    for _ in range(6):
        state = machine.start
        while not machine.is_end(state):
            following = machine.successors(state)
            other = seen.setdefault(machine.key(state, 2), state)
            if other != state:
                shared += 1
                others = machine.successors(other)
                assert set(others) == set(following)
                for byte in rng.sample(list(following), min(2, len(following))):
                    assert set(machine.successors(others[byte])) == set(machine.successors(following[byte]))
            state = following[rng.choice(list(following))] if rng.random() < 0.2 else following[machine.closing(state)]
    assert shared > 10, "states that differ share a key"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a wrong number": lambda d: d.replace(b"\xff\xd1", b"\xff\xd3"),
    "no restart marker": lambda d: d.replace(b"\xff\xd1", b""),
    "an FF without 00": lambda d: d[:70] + b"\xff" + d[71:],
    "another size": lambda d: d.replace(b"\x00\x20\x00\x20\x03", b"\x40\x20\x40\x20\x03"),
    "something behind": lambda d: d + b"x",
    "two ends": lambda d: d + b"\xff\xd9",
    "no end": lambda d: d[:-2],
    "half an end": lambda d: d[:-1],
    "a zero as filling": lambda d: d[:-3] + bytes([d[-3] & 0xFE]) + d[-2:],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damages_are_not_strict(name: str) -> None:
    frame = Frame(size=(32, 32))
    read = reader(frame)
    image = pictures(frame)[3]
    data = jpeg.encode(image, frame)
    assert DAMAGES[name](data) != data
    result = read.read(DAMAGES[name](data))
    assert result.status in ("repaired", "partial") and result.reason
    assert result.picture.size == (32, 32)
    if result.status == "repaired":
        assert np.array_equal(np.asarray(result.picture), np.asarray(read.read(data).picture))


def test_what_is_cut_off_is_grey_and_the_rest_stays() -> None:
    frame = Frame(size=(64, 48))
    read = reader(frame)
    image = pictures(frame)[5]
    data = jpeg.encode(image, frame)
    whole = np.asarray(read.read(data).picture)
    for restart in range(1, 8):
        cut = data[: data.index(bytes([0xFF, 0xD0 + restart])) - 1]  # in the interval before this marker
        result = read.read(cut)
        pixels = np.asarray(result.picture)
        good = restart
        assert result.status == "partial" and f"{good} of 12 parts" in result.reason
        row, column = divmod(good, 3)
        below, right = np.s_[16 * row + 16 :], np.s_[16 * row : 16 * row + 16, 16 * column + 16 :]
        assert (pixels[right] == 128).all() and (pixels[below] == 128).all()
        # of the part that was cut in two the blocks that are whole are shown: all of its luminance, as the last are of colour
        square = np.s_[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        grey, truth = (np.asarray(Image.fromarray(x[square]).convert("L"), np.float64) for x in (pixels, whole))
        assert np.abs(grey - truth).mean() < 12 < np.abs(128 - truth).mean()
        # colours of neighbours are mixed at the border
        assert np.array_equal(pixels[: 16 * row - 1], whole[: 16 * row - 1]) or not row
        if column:
            part = np.s_[16 * row : 16 * row + 15, : 16 * column - 1]
            assert np.abs(pixels[part].astype(int) - whole[part]).max() <= 64


def test_an_interval_that_is_lost_costs_that_interval() -> None:
    frame = Frame(size=(64, 64))
    read = reader(frame)
    data = jpeg.encode(pictures(frame)[5], frame)
    first, second = data.index(b"\xff\xd2"), data.index(b"\xff\xd3")
    result = read.read(data[:first] + data[second:])  # the interval between is missing, and its marker
    assert result.status == "partial" and "15 of 16 parts" in result.reason
    pixels, whole = np.asarray(result.picture), np.asarray(read.read(data).picture)
    assert (pixels[:16, 48:] == 128).all()
    assert np.array_equal(pixels[33:], whole[33:])


def test_nothing_readable_is_grey() -> None:
    frame = Frame(size=(30, 20))
    for data in (b"", b"\xff", b"\xff\xd8\xff\xd9", b"GIF89a", bytes(59)):
        result = reader(frame).read(data)
        assert result.status == "invalid" and result.picture.size == (20, 30)
        assert (np.asarray(result.picture) == 128).all()
        assert by_pillow(jpeg.splice(result.data, jpeg.tables())).shape == (30, 20, 3)


def mutated(original: bytes, rng: random.Random) -> bytes:
    """Cut, changed, repeated, or something else altogether."""
    data = bytearray(original)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data = data[:at]
            case 1:
                data[at : at + 1] = rng.randbytes(1)
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(40))
            case 3:
                data[at : at + rng.randrange(40)] = b""
            case 4:
                data[at:at] = bytes([0xFF, rng.randrange(0xC0, 0x100)])
            case 5:
                data = bytearray(rng.randbytes(rng.randrange(400)))
    return bytes(data)


def fuzz(count: int) -> dict[str, int]:
    rng, found = random.Random(3), dict.fromkeys(("strict", "repaired", "partial", "invalid"), 0)
    prepared = [(reader(frame), [jpeg.encode(image, frame) for image in pictures(frame)]) for frame in FRAMES[:6]]
    for _ in range(count):
        read, files = rng.choice(prepared)
        data = mutated(rng.choice(files), rng)
        result = read.read(data)
        assert result.picture.size == read.frame.size[::-1] and result.picture.mode == "RGB"
        assert (result.status == "strict") == (result.reason == "")
        state, used = read.machine.run(result.data)
        assert read.machine.is_end(state) and used == len(result.data), "what Pillow gets is whole"
        found[result.status] += 1
    return found


def test_damaged_bytes_are_read_without_complaint() -> None:
    from PIL import ImageFile

    assert min(fuzz(300).values()) > 0, "every kind of outcome"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.long
def test_ten_thousand_damaged_files_are_read_without_complaint() -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        fuzz(10_000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


# --- tables from strangers ------------------------------------------------------------------------------------------


def test_damaged_tables_are_refused() -> None:
    blob = jpeg.tables()
    rng = random.Random(4)
    assert Tables.read(blob).steps == (32, 34)
    refused = 0
    for _ in range(400):
        try:
            made = Tables.read(mutated(blob, rng))
        except ValueError as error:
            refused += "\n" not in str(error)
        else:
            frame = Frame(size=(16, 16))
            machine = JpegMachine(frame, made)
            assert machine.need(machine.start) == len(machine.closed(machine.start))
    assert refused > 300
    with pytest.raises(ValueError, match="no JPEG file of tables of up to 2,048 bytes"):
        Tables.read(blob + bytes(3000))


def test_huffman_codes_are_held_to_their_room() -> None:
    with pytest.raises(ValueError, match="more codes than there is room for"):
        Huffman([2, *[0] * 15], [1, 2])  # the code of ones alone is taken
    with pytest.raises(ValueError, match="a symbol twice"):
        Huffman([0, 2, *[0] * 14], [1, 1])
    code = Huffman([0, 3, *[0] * 14], [5, 6, 7])
    assert sorted(code.below(0)) == [5, 6, 7] and [bit for _, bit in code.path(6)] == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (0, 4)}, "size is height and width"),
        ({"size": (4, 5000)}, "size is height and width"),
        ({"subsampling": "4:1:1"}, "subsampling must be one of"),
        ({"restart": -1}, "restart is a number of MCUs"),
    ],
)
def test_bad_frames_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Frame(**{"size": (8, 8), **change})


def test_bad_pictures_and_qualities_are_refused() -> None:
    frame = Frame(size=(8, 8))
    with pytest.raises(ValueError, match=r"expected \(8, 8\)"):
        jpeg.encode(Image.new("RGB", (9, 8)), frame)
    bad: list[Any] = [0, 96, "keep", True]
    for quality in bad:
        with pytest.raises(ValueError, match="quality is a whole number from 1 to 95"):
            jpeg.encode(Image.new("RGB", (8, 8)), frame, quality)


def test_markers_are_found_in_one_pass() -> None:
    """Those of the plain pattern, also behind rows of FF; a row that has no end is read once (else this never ends)."""
    rng = random.Random(0)
    for _ in range(300):
        data = bytes(rng.choices((0xFF, 0, 0xD0, 0xD9, 7), (6, 1, 1, 1, 1), k=40))
        plain = [(found.span(), found[1]) for found in re.finditer(rb"\xff+([^\x00\xff])", data)]
        assert [(found.span(), found[1]) for found in MARKER.finditer(data)] == plain
    assert reader(FRAMES[0]).read(b"\xff" * (1 << 20)).status == "invalid"


GOLDEN_VERSION = "3.1.4.1"
GOLDEN = {
    0: (
        "ffd8ffe000104a46494600010100000100010000ffc00011080020002003012200021101031101ffdd00040001ffda000c03"
        "010002110311003f00c4317714a23cd5945cd4821ee056d88a76f7a25dac7fffd0c710e7b53c5bfb55d4873daa74b7f6ae57"
        "56c0dd8fffd1a912d5c8a3cd4302f4ad1823cd7554958e8a91b1ffd2b2200016e001c9f6aa72dd3bb1483e54e9bb1c9ff0ab"
        "57b21793c943f22fdec7734d8ad7b815855a292f69f81bc29a4b9a47ffd9"
    ),
    1: (
        "ffd8ffe000104a46494600010100000100010000ffc00011080020002003012200021101031101ffdd00040001ffda000c03"
        "010002110311003f00c431f71404ab2ab4ff002bb815be229dbde89a247fffd0c711d3c43ed56563a9961f6ae6750db63fff"
        "d1a71ad598d2a3896ae4495d9391d928d8ffd27083b8153c70fb54e8aaa32c40aa5a86a091662b6cb37f130e31edf5ff003f"
        "4e7ad46527782347257e56cfffd9"
    ),
    2: (
        "ffd8ffe000104a46494600010100000100010000ffc00011080020002003012200021101031101ffdd00040001ffda000c03"
        "010002110311003f00c531f71404ab0ab4ef2bb8adebd3b7bd1368c4ffd0c811d384556163a9562ae7733a923fffd1a48b56"
        "112991ad594014658803debb6523b9c6c7ffd2410f702a548a813a8e106ef734855df924e3d074ac71141fc512e78a84745a"
        "9fffd9"
    ),
}
