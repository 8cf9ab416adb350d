"""Huffman tables in which everything fills whole bytes: what they are, and that files rewritten with them show the same."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from mm import jpeg
from mm.jpeg_codes import Bits
from mm.jpeg_huffman import Recoder, aligned
from mm.jpeg_tables import SAMPLING, Frame, Huffman, Tables
from mm.tokenizers.jpeg_bytes import JpegBytes


def noise(frame: Frame, count: int = 4) -> list[Image.Image]:
    """Black and white noise has the largest coefficients that there are; the others fewer and fewer."""
    rng = np.random.default_rng(0)
    height, width = frame.size
    out = [Image.fromarray(rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255)]
    for side in range(2, count + 1):
        small = rng.integers(0, 256, (-(-height // side), -(-width // side), 3), dtype=np.uint8)
        out.append(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    cells = np.indices((height, width)).sum(0) % 2 * 255
    return [*out, Image.fromarray(cells.astype(np.uint8)).convert("RGB"), Image.new("RGB", (width, height), "white")]


def lengths(code: Huffman) -> dict[int, int]:
    return {symbol: len(code.path(symbol)) for symbol in code.symbols}


@pytest.mark.parametrize("quality", [1, 10, 25, 75, 95])
def test_code_and_value_fill_whole_bytes(quality: int) -> None:
    usual = jpeg.tables(quality)
    tables, before = Tables.read(aligned(usual)), Tables.read(usual)
    assert tables.steps == before.steps
    for code in (*tables.dc, *tables.ac):
        sizes = lengths(code)
        assert all((size + (symbol & 15)) % 8 == 0 for symbol, size in sizes.items())
        assert sum(2.0**-size for size in sizes.values()) <= 1 - 2.0**-8, "no code begins with eight ones"
    if quality <= 25:  # what pictures are mostly made of takes one byte
        sizes = lengths(tables.ac[0])
        assert all(sizes[symbol] + (symbol & 15) == 8 for symbol in sizes if symbol & 15 <= 2)


@pytest.mark.parametrize("subsampling", SAMPLING)
@pytest.mark.parametrize(("quality", "restart"), [(1, 1), (10, 1), (25, 0), (50, 2), (95, 3)])
def test_files_come_back_and_show_the_same(quality: int, restart: int, subsampling: str) -> None:
    frame = Frame(size=(40, 50), subsampling=subsampling, restart=restart)
    usual = jpeg.tables(quality, subsampling)
    blob = aligned(usual)
    there, back = (Recoder(frame, *map(Tables.read, pair)) for pair in ((usual, blob), (blob, usual)))
    reader = jpeg.Reader(frame, blob)
    for image in noise(frame):
        file = jpeg.encode(image, frame, quality)
        data = there(file)
        assert back(data) == file
        read = reader.read(data)
        assert read.status == "strict", read.reason
        with Image.open(io.BytesIO(jpeg.splice(file, usual))) as whole:
            assert np.array_equal(np.asarray(read.picture), np.asarray(whole))


def test_every_symbol_ends_with_a_byte() -> None:
    """Of an aligned file: after each byte the automaton is between two symbols, or in the middle of one of two bytes."""
    tokenizer = JpegBytes(huffman="aligned", strip_header=True)
    machine = tokenizer.reader.machine
    for image in noise(tokenizer.frame):
        states = [machine.run(machine.header)[0]]
        for byte in tokenizer.file(image):
            after = machine.step(states[-1], byte)
            assert after is not None
            states.append(after)
        inside = [isinstance(s.inner, Bits) and bool(s.inner.node or s.inner.bits) for s in states]
        assert not any(a and b for a, b in pairwise(inside)) and sum(inside) < len(inside) / 3


@pytest.mark.parametrize("restart", [0, 1])
def test_any_bytes_are_read(restart: int) -> None:
    """Mutated, cut and random ones: a picture of the size, and a file that is strict."""
    frame = Frame(size=(24, 40), subsampling="4:4:4", restart=restart)
    usual = jpeg.tables(10, "4:4:4")
    blob = aligned(usual)
    reader, recode = jpeg.Reader(frame, blob), Recoder(frame, Tables.read(usual), Tables.read(blob))
    files, rng, seen = (
        [recode(jpeg.encode(image, frame, 10)) for image in noise(frame)],
        np.random.default_rng(1),
        set(),
    )
    for number in range(120):
        data = bytearray(files[number % len(files)])
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        if number % 3 == 1:
            data = data[: int(rng.integers(len(data)))]
        elif number % 3 == 2:
            data = bytearray(rng.bytes(len(data)))
        read = reader.read(bytes(data))
        state, count = reader.machine.run(read.data)
        assert read.picture.size == (40, 24) and reader.machine.is_end(state) and count == len(read.data)
        assert (read.status == "strict") == (read.reason == "")
        seen.add(read.status)
    assert len(seen) >= 3


def test_other_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="huffman must be standard or aligned, got 'short'"):
        JpegBytes(huffman="short")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the tables are no JPEG file of tables"):
        aligned(b"tables")
