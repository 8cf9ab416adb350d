"""Clips as H.264 streams: written as AVC-LM writes them, read whatever they are, and what an automaton knows of them."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mm.avc_headers import CODE, LONG, Bits, Headers, Shape, plain, se, ue
from mm.interfaces import Encoded
from mm.tokenizers.avc_bytes import AvcBytes
from mm.video import Video

av = pytest.importorskip("av", reason="H.264 needs av: pip install 'mm[video]'")

KINDS: list[dict[str, Any]] = [
    {"size": (32, 32), "frames": 6},
    {"size": (16, 16), "frames": 1, "qp": 20},
    {
        "size": (18, 20),
        "frames": 18,
        "qp": 45,
        "fps": 3.0,
    },  # sides that 16 doesn't divide; a number of frames beyond 4 bits
]


def clips(frames: int, size: tuple[int, int], count: int = 4, seed: int = 0) -> list[np.ndarray]:
    """Smooth colours that move, and noise."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[: size[0], : size[1]]
    out = []
    for n in range(count):
        if n % 4 == 3:
            out.append(rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8))
            continue
        phase, speed = rng.uniform(0, 6, 3), rng.uniform(-1, 1)
        angle = (row * rng.uniform(0, 0.4) + column * 0.3)[None] + speed * np.arange(frames)[:, None, None]
        out.append((127 + 120 * np.sin(angle[..., None] + phase)).astype(np.uint8))
    return out


def made(**settings: Any) -> tuple[AvcBytes, list[np.ndarray]]:
    """A tokenizer with merges learned from clips, and others."""
    tokenizer = AvcBytes(**{"vocab": 320, **settings})
    given = clips(tokenizer.config["frames"], tuple(tokenizer.config["size"]), 8)
    tokenizer.fit(map(tokenizer.file, given[4:]))
    return tokenizer, given[:4]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[AvcBytes, list[np.ndarray]]:
    return made(**request.param)


def item(ids: list[int]) -> Encoded:
    return Encoded(grid=(len(ids),), ids=torch.tensor(ids, dtype=torch.long))


def test_bytes_come_back_and_any_player_opens_them(pair: tuple[AvcBytes, list[np.ndarray]]) -> None:
    tokenizer, given = pair
    for frames in given:
        data = tokenizer.file(frames)
        encoded = tokenizer.encode(frames)
        assert tokenizer.bytes_of(encoded) == (data, "") and len(encoded) < len(data)
        decoded = tokenizer.decode(encoded)
        assert decoded.valid and decoded.value.fps == tokenizer.config["fps"]
        with av.open(io.BytesIO(tokenizer.reader.playable(data)), format="h264") as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert np.array_equal(np.stack(shown), decoded.value.frames)


def test_the_stream_is_that_of_the_paper(pair: tuple[AvcBytes, list[np.ndarray]]) -> None:
    """A key frame, then predicted ones; a slice for each block of 16×16 pixels; no other units but the end."""
    tokenizer, given = pair
    shape = tokenizer.headers.shape
    units = tokenizer.file(given[0]).split(CODE)[1:]
    kinds = [unit[0] & 31 for unit in units]
    assert kinds == [5] * shape.blocks + [1] * shape.blocks * (shape.frames - 1) + [11]
    blocks = [Bits(unit[1:]).ue() for unit in units[:-1]]
    assert blocks == [*range(shape.blocks)] * shape.frames
    assert tokenizer.file(given[0]).count(LONG) == shape.frames


def test_few_steps_of_quantisation_lose_little() -> None:
    errors = []
    for qp in (10, 16, 40):
        tokenizer = AvcBytes(frames=4, qp=qp)
        frames = clips(4, (32, 32))[0][..., :1].repeat(3, axis=-1)  # without colours, which are kept at half the size
        errors.append(np.abs(tokenizer.decode(tokenizer.encode(frames)).value.frames.astype(int) - frames).mean())
    assert errors[0] < errors[1] < errors[2] and errors[0] < 6


def test_the_beginning_of_a_clip_is_the_beginning_of_its_file() -> None:
    """What a model goes on from, where a picture or the first frames are given."""
    tokenizer, (frames, *_) = made(**KINDS[0])
    ids = tokenizer.encode(frames).content.tolist()
    for count in range(1, len(frames)):
        begun = tokenizer.encode(frames[:count]).content.tolist()
        assert begun[-1] == tokenizer.stop and begun[:-1] == ids[: len(begun) - 1]
        decoded = tokenizer.decode(item(begun))
        assert not decoded.valid and decoded.reason.startswith("partial: the stream ends early")
        whole = tokenizer.decode(item(ids)).value.frames
        assert np.array_equal(decoded.value.frames[:count], whole[:count])
        assert (decoded.value.frames[count:] == whole[count - 1]).mean() > 0.95, (
            "the last one stays, but for its filter"
        )


def test_no_token_crosses_a_start_code(pair: tuple[AvcBytes, list[np.ndarray]]) -> None:
    table = pair[0].bpe.table
    assert CODE in table or LONG in table
    assert all(token in (CODE, LONG) for token in table if CODE in token)


# --- the automaton --------------------------------------------------------------------------------------------------


def test_what_is_written_is_allowed(pair: tuple[AvcBytes, list[np.ndarray]]) -> None:
    tokenizer, given = pair
    for frames in given[:2]:
        automaton, ids = tokenizer.automaton(), tokenizer.encode(frames).content.tolist()
        assert automaton is not None
        for place, token in enumerate(ids):
            assert automaton.allowed(10_000 - place)[token]
            automaton.accept(token)


def drawn(tokenizer: AvcBytes, room: int, generator: torch.Generator) -> list[int]:
    automaton, ids = tokenizer.automaton(), []
    assert automaton is not None
    while not ids or ids[-1] != tokenizer.stop:
        allowed = automaton.allowed(room - len(ids))
        assert allowed.any()
        logits = 3 * torch.randn(len(allowed), generator=generator)
        ids.append(int(logits.masked_fill(~allowed, float("-inf")).argmax()))
        automaton.accept(ids[-1])
        assert len(ids) <= room
    return ids


def test_every_sample_has_its_units(pair: tuple[AvcBytes, list[np.ndarray]]) -> None:
    """All slices of all frames, each in its place, whatever the logits and however little room there is."""
    tokenizer, generator = pair[0], torch.Generator().manual_seed(0)
    least, machine = tokenizer.spec.least, tokenizer.reader.machine
    for room in (least, least + 1, least + 60, 2 * least):
        data, odd = tokenizer.bytes_of(item(drawn(tokenizer, room, generator)))
        state, count = machine.run(data)
        assert machine.is_end(state) and count == len(data) and not odd
        assert data.count(CODE) == tokenizer.headers.shape.slices + 1
        frames, status, _ = tokenizer.read(data)
        assert status in ("strict", "partial") and len(frames) == tokenizer.config["frames"]


def test_the_shortest_stream_is_grey_and_still(pair: tuple[AvcBytes, list[np.ndarray]]) -> None:
    """Where room is short, a stream is closed with slices that FFmpeg decodes without complaint."""
    tokenizer = pair[0]
    machine = tokenizer.reader.machine
    frames, status, _ = tokenizer.read(machine.closed(machine.start))
    assert status == "strict" and len(np.unique(frames)) == 1 and abs(int(frames[0, 0, 0, 0]) - 128) < 4


def test_need_is_the_length_of_the_way_to_the_end(pair: tuple[AvcBytes, list[np.ndarray]]) -> None:
    machine, rng = pair[0].reader.machine, random.Random(0)
    zeros = 0
    for _ in range(15):
        state, highest = machine.start, machine.bound(machine.start)
        for _ in range(rng.randrange(300)):
            if machine.is_end(state):
                assert not machine.successors(state)
                break
            following = machine.successors(state)
            byte = 0 if 0 in following and rng.random() < 0.3 else rng.choice(list(following))
            state = following[byte]
            zeros += state.zeros == 2
            assert machine.need(state) <= machine.bound(state) <= highest
            highest = machine.bound(state)
        rest = machine.closed(state)
        assert len(rest) == machine.need(state)
        for byte in rest:
            after = machine.step(state, byte)
            assert after is not None and machine.need(after) == machine.need(state) - 1
            state = after
    assert zeros > 10


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:-1],
        lambda d: d + b"\x00",
        lambda d: d.replace(LONG, CODE, 1),
        lambda d: d.replace(b"\x01\x41", b"\x01\x21", 1),  # another kind of unit
        lambda d: d[: d.rindex(CODE)] + b"\x00" + d[d.rindex(CODE) :],  # a slice that ends with a zero
        lambda d: d[:40] + b"\x00\x00\x02" + d[40:],  # what has to be escaped
        lambda d: CODE.join([*d.split(CODE)[:2], *d.split(CODE)[3:]]),  # a slice is missing
    ],
)
def test_damages_are_not_strict(damage: Callable[[bytes], bytes]) -> None:
    tokenizer, (frames, *_) = made(**KINDS[0])
    data = tokenizer.file(frames)
    assert damage(data) != data
    read, status, reason = tokenizer.read(damage(data))
    assert status in ("repaired", "partial") and reason
    if status == "repaired":
        assert np.array_equal(read, tokenizer.read(data)[0])


def test_a_slice_that_is_lost_costs_its_block() -> None:
    tokenizer, (frames, *_) = made(**KINDS[0])
    units = tokenizer.file(frames).split(CODE)
    last = 4 * 5 + 1  # the first block of the last frame
    read, status, reason = tokenizer.read(CODE.join([*units[:last], *units[last + 1 :]]))
    whole = tokenizer.read(CODE.join(units))[0]
    assert status == "partial" and "23 of 24 blocks" in reason
    assert np.array_equal(read[:5], whole[:5])
    assert np.array_equal(read[5, 20:, 20:], whole[5, 20:, 20:]) and np.array_equal(
        read[5, 20:, :12], whole[5, 20:, :12]
    )


# --- any bytes ------------------------------------------------------------------------------------------------------


def mutated(original: bytes, rng: random.Random) -> bytes:
    """Cut, changed, repeated, or something else altogether."""
    data = bytearray(original)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0:
                data = data[:at]
            case 1 | 2:
                data[at : at + 1] = rng.randbytes(1)
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(40))
            case 4:
                data[at : at + rng.randrange(40)] = b""
            case 5:
                data[at:at] = CODE + rng.randbytes(rng.randrange(12))
            case 6:
                data[at:at] = data[at // 2 : at]
            case 7:
                data = bytearray(rng.randbytes(rng.randrange(400)))
    return bytes(data)


def fuzz(count: int) -> dict[str, int]:
    rng, found = random.Random(3), dict.fromkeys(("strict", "repaired", "partial", "invalid"), 0)
    prepared = [(tokenizer, [tokenizer.file(one) for one in given]) for tokenizer, given in (made(**k) for k in KINDS)]
    for _ in range(count):
        tokenizer, files = rng.choice(prepared)
        data = mutated(rng.choice(files), rng)
        frames, status, reason = tokenizer.read(data)
        assert frames.shape == (tokenizer.config["frames"], *tokenizer.config["size"], 3) and frames.dtype == np.uint8
        assert (status == "strict") == (reason == "")
        repaired, _ = tokenizer.reader.repaired(data)
        state, used = tokenizer.reader.machine.run(repaired)
        assert tokenizer.reader.machine.is_end(state) and used == len(repaired), "what FFmpeg gets has its form"
        assert len(repaired) <= len(data) + tokenizer.spec.least
        if rng.random() < 0.1:
            assert np.array_equal(tokenizer.read(data)[0], frames), "the same bytes, the same clip"
        found[status] += 1
    return found


def test_damaged_bytes_are_read_without_complaint(capfd: pytest.CaptureFixture[str]) -> None:
    assert min(fuzz(100).values()) > 0, "every kind of outcome"
    assert capfd.readouterr() == ("", ""), "FFmpeg doesn't say what it thinks of them"


@pytest.mark.long
def test_ten_thousand_damaged_streams_are_read_without_complaint() -> None:
    """In bounded memory, FFmpeg's too, which is not Python's."""
    import resource

    fuzz(300)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(10_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"


def test_ids_of_nothing_and_beyond_are_said() -> None:
    tokenizer, (frames, *_) = made(**KINDS[0])
    ids = tokenizer.encode(frames).content.tolist()
    decoded = tokenizer.decode(item([*ids[:-1], 10_000, ids[-1]]))
    assert decoded.reason == "repaired: 1 ids stand for no bytes"
    assert np.array_equal(decoded.value.frames, tokenizer.decode(item(ids)).value.frames)
    nothing = tokenizer.decode(item([]))
    assert nothing.reason.startswith("invalid: ") and (nothing.value.frames == 128).all()


# --- settings, strangers' files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (31, 32)}, "an even number of pixels from 16 to 512"),
        ({"size": (32, 1024)}, "an even number of pixels from 16 to 512"),
        ({"size": (512, 512), "frames": 17}, "make it shorter or smaller"),
        ({"frames": 0}, "frames"),
        ({"fps": 0}, "fps must be 0.001 to"),
        ({"fps": 1e-9}, "fps must be 0.001 to"),
        ({"fps": None}, "fps must be a number"),
        ({"fps": "fast"}, "fps must be a number"),
        ({"qp": 52}, "qp"),
        ({"vocab": 255}, "vocab"),
        ({"grammar": "strict"}, "grammar must be one of units, none"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AvcBytes(**change)


def test_clips_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at most 8 frames, got 9"):
        AvcBytes().encode(Video(np.zeros((9, 32, 32, 3), np.uint8), 8))


def test_parameter_sets_of_others_are_refused() -> None:
    """They decide how much memory FFmpeg takes."""
    tokenizer = AvcBytes(size=(32, 48), frames=2)
    sets, shape = tokenizer.headers.sets, tokenizer.headers.shape
    assert Headers.read(sets, shape, 37) == tokenizer.headers
    with pytest.raises(ValueError, match="they are of frames of 32×48, expected 48×32"):
        Headers.read(sets, Shape(size=(48, 32), frames=2), 37)
    rng, refused = random.Random(5), 0
    for _ in range(500):
        try:
            headers = Headers.read(mutated(sets, rng), shape, 37)
        except ValueError as error:
            refused += "\n" not in str(error)
        else:
            assert headers.references <= 16 and headers.number_bits <= 16
    assert refused > 300


def test_another_encoder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from mm import avc

    tokenizer = AvcBytes(frames=2)
    monkeypatch.setitem(avc.OPTIONS, "ref", 1)
    with pytest.raises(ValueError, match="this version of x264 writes another form of stream"):
        tokenizer.encode(np.zeros((2, 32, 32, 3), np.uint8))


def test_without_av_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'mm\[video\]', or use mm.tokenizers.mjpeg_bytes"):
        AvcBytes()


def test_numbers_of_variable_length_are_read_as_written() -> None:
    numbers = [0, 1, 2, 3, 7, 8, 255, 4000]
    bits = "".join(ue(n) + se(n) + se(-n) for n in numbers)
    bits += "1" + "0" * (-(len(bits) + 1) % 8)
    read = Bits(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    assert [(read.ue(), read.se(), read.se()) for _ in numbers] == [(n, n, -n) for n in numbers]
    assert plain(b"\x00\x00\x03\x01\x00\x00\x03\x00\x00\x03") == b"\x00\x00\x01\x00\x00\x00\x00"
