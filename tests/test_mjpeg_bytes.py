"""Clips as JPEG files one after another: exactly as many as there are frames, each strict, whatever a model does."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm import jpeg
from mm.interfaces import Encoded
from mm.tokenizers.mjpeg_bytes import MjpegBytes

KINDS: list[dict[str, Any]] = [
    {"size": (16, 32), "frames": 4},
    {"size": (12, 16), "frames": 3, "restart": 0, "subsampling": "4:2:2"},
]


def clips(frames: int, size: tuple[int, int], count: int = 4) -> list[np.ndarray]:
    """Smooth colours that move."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[: size[0], : size[1]]
    out = []
    for _ in range(count):
        angle = (row * rng.uniform(0, 0.4) + column * 0.3)[None] + rng.uniform(-1, 1) * np.arange(frames)[:, None, None]
        out.append((127 + 120 * np.sin(angle[..., None] + rng.uniform(0, 6, 3))).astype(np.uint8))
    return out


def made(**settings: Any) -> tuple[MjpegBytes, list[np.ndarray]]:
    tokenizer = MjpegBytes(**{"vocab": 280, **settings})
    given = clips(tokenizer.config["frames"], tuple(tokenizer.config["size"]), 8)
    tokenizer.fit(map(tokenizer.file, given[4:]))
    return tokenizer, given[:4]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[MjpegBytes, list[np.ndarray]]:
    return made(**request.param)


def item(ids: list[int]) -> Encoded:
    return Encoded(grid=(len(ids),), ids=torch.tensor(ids, dtype=torch.long))


def test_each_frame_is_a_file(pair: tuple[MjpegBytes, list[np.ndarray]]) -> None:
    tokenizer, given = pair
    reader = tokenizer.reader
    for frames in given:
        files = [jpeg.encode(Image.fromarray(frame), reader.frame, 25) for frame in frames]
        data = tokenizer.file(frames)
        assert data == b"".join(file[len(reader.header) :] for file in files)
        encoded = tokenizer.encode(frames)
        assert tokenizer.bytes_of(encoded) == (data, "")
        decoded = tokenizer.decode(encoded)
        assert decoded.valid and decoded.value.fps == 8
        assert np.array_equal(decoded.value.frames, np.stack([np.asarray(reader.pixels(file)) for file in files]))


def test_the_beginning_of_a_clip_is_the_beginning_of_its_file(pair: tuple[MjpegBytes, list[np.ndarray]]) -> None:
    tokenizer, (frames, *_) = pair
    ids = tokenizer.encode(frames).content.tolist()
    for count in range(1, len(frames)):
        begun = tokenizer.encode(frames[:count]).content.tolist()
        assert begun[:-1] == ids[: len(begun) - 1]
        decoded = tokenizer.decode(item(begun))
        assert decoded.reason == f"partial: {len(frames) - count} frames are missing"
        assert (decoded.value.frames[count:] == decoded.value.frames[count - 1]).all()


def test_what_is_written_is_allowed(pair: tuple[MjpegBytes, list[np.ndarray]]) -> None:
    tokenizer, given = pair
    for frames in given[:1]:
        automaton, ids = tokenizer.automaton(), tokenizer.encode(frames).content.tolist()
        assert automaton is not None
        for place, token in enumerate(ids):
            assert automaton.allowed(10_000 - place)[token]
            automaton.accept(token)


def test_every_sample_is_strict_and_has_its_frames(pair: tuple[MjpegBytes, list[np.ndarray]]) -> None:
    """Whatever the logits, and however little room there is."""
    tokenizer, generator = pair[0], torch.Generator().manual_seed(0)
    least = tokenizer.spec.least
    for room in (least, least + 9, 200):
        automaton, ids = tokenizer.automaton(), []
        assert automaton is not None
        while not ids or ids[-1] != tokenizer.stop:
            allowed = automaton.allowed(room - len(ids))
            logits = 3 * torch.randn(len(allowed), generator=generator)
            ids.append(int(logits.masked_fill(~allowed, float("-inf")).argmax()))
            automaton.accept(ids[-1])
            assert len(ids) <= room
        decoded = tokenizer.decode(item(ids))
        assert decoded.valid, decoded.reason
        assert tokenizer.bytes_of(item(ids))[0].count(jpeg.EOI) == tokenizer.config["frames"]


@pytest.mark.parametrize("grammar", ["strict", "markers"])
def test_need_is_the_length_of_the_way_to_the_end(grammar: str) -> None:
    tokenizer, rng = MjpegBytes(**KINDS[1], grammar=grammar), random.Random(0)  # type: ignore[arg-type]
    machine: Any = tokenizer.machine()
    for _ in range(5):
        state, highest = machine.start, machine.bound(machine.start)
        for _ in range(rng.randrange(400)):
            following = machine.successors(state)
            if machine.is_end(state):
                assert not following and not machine.allowed(state)
                break
            assert machine.allowed(state) == sum(1 << byte for byte in following)
            byte = rng.choice(list(following)) if rng.random() < 0.2 else machine.closing(state)
            assert machine.step(state, byte) == following[byte]
            state = following[byte]
            assert machine.need(state) <= machine.bound(state) <= highest
            highest = machine.bound(state)
        rest = machine.closed(state)
        assert len(rest) == machine.need(state)


def test_equal_keys_allow_equal_strings() -> None:
    """The last frame differs from those before it only near its end."""
    tokenizer, rng, shared = MjpegBytes(**KINDS[0]), random.Random(1), 0
    machine: Any = tokenizer.machine()
    seen: dict[Any, Any] = {}
    for _ in range(2):
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
            state = following[rng.choice(list(following)) if rng.random() < 0.1 else machine.closing(state)]
    assert shared > 10


def test_a_damaged_frame_leaves_the_others_whole() -> None:
    tokenizer, (frames, *_) = made(**KINDS[0])
    parts = tokenizer.file(frames).split(jpeg.EOI)
    whole = tokenizer.read(jpeg.EOI.join(parts)).frames
    cut = [parts[0], parts[1][:4], *parts[2:]]
    read = tokenizer.read(jpeg.EOI.join(cut))
    assert read.status == "partial" and read.reason.startswith("frame 1: ")
    assert np.array_equal(read.frames[[0, 2, 3]], whole[[0, 2, 3]])
    behind = tokenizer.read(jpeg.EOI.join(parts) + b"x")
    assert behind == (pytest.approx(whole), "repaired", "1 bytes follow the last frame")
    nothing = tokenizer.read(b"")
    assert nothing.status == "invalid" and (nothing.frames == 128).all()


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
                data[at : at + rng.randrange(80)] = b""
            case 4:
                data[at:at] = bytes([0xFF, rng.randrange(0xC0, 0x100)])
            case 5:
                data = bytearray(rng.randbytes(rng.randrange(400)))
    return bytes(data)


def fuzz(count: int) -> dict[str, int]:
    rng, found = random.Random(3), dict.fromkeys(("strict", "repaired", "partial", "invalid"), 0)
    prepared = [(tokenizer, [tokenizer.file(one) for one in given]) for tokenizer, given in (made(**k) for k in KINDS)]
    for _ in range(count):
        tokenizer, files = rng.choice(prepared)
        frames, status, reason = tokenizer.read(mutated(rng.choice(files), rng))
        assert frames.shape == (tokenizer.config["frames"], *tokenizer.config["size"], 3) and frames.dtype == np.uint8
        assert (status == "strict") == (reason == "")
        found[status] += 1
    return found


def test_damaged_bytes_are_read_without_complaint() -> None:
    found = fuzz(60)
    assert found["partial"] > 10 and found["invalid"] < 20


@pytest.mark.long
def test_ten_thousand_damaged_clips_are_read_without_complaint() -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        assert min(fuzz(10_000).values()) > 0, "every kind of outcome"
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (0, 32)}, "size"),
        ({"size": (32,)}, "size is height and width"),
        ({"frames": 257}, "frames"),
        ({"fps": 0}, "fps must be 0.001 to"),
        ({"fps": [8]}, "fps must be a number"),
        ({"subsampling": "4:1:0"}, "subsampling must be one of"),
        ({"quality": 0}, "quality"),
        ({"grammar": "units"}, "grammar must be one of strict, markers, none"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MjpegBytes(**change)
