"""Limits of sound: few samples a second cost no memory, and what isn't a float sound is refused."""

from __future__ import annotations

import io
import struct
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from mm import audio as audio_module
from mm import audio_files, resampling
from mm.audio import Audio, load_audio, read_chunks, resample, to_wav


def taken(work: Any) -> int:
    """Bytes of numpy at the peak of the work."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("rate", "new"), [(1, 16_000), (10, 16_000), (100, 44_100), (3, 100_000)])
def test_few_samples_a_second_cost_no_memory(rate: int, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    run = resampling.Resampler._run

    def watched(self: resampling.Resampler) -> Any:
        nonlocal largest
        out = run(self)
        largest = max(largest, len(out))
        return out

    monkeypatch.setattr(resampling.Resampler, "_run", watched)
    file = to_wav(Audio(np.sin(np.arange(10.0)), rate))
    sizes: list[int] = []
    assert taken(lambda: sizes.append(len(load_audio(file, rate=new).samples))) < 1 << 26
    assert sizes == [-(-10 * new // rate)]
    assert largest <= 1 << 21  # it was as many as a step of 131,072 samples makes


def test_pieces_of_few_samples_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of a file isn't resampled at once: at this rate it would be hours of sound."""
    samples = np.sin(np.arange(2000.0))
    most = 0
    feed = resampling.Resampler.feed

    def watched(self: resampling.Resampler, given: Any) -> Any:
        nonlocal most
        out = feed(self, given)
        most = max(most, len(out))
        return out

    monkeypatch.setattr(resampling.Resampler, "feed", watched)
    pieces = list(read_chunks(to_wav(Audio(samples, 10)), 20.0, rate=8000))
    assert most <= 1 << 19 and len(pieces) == 10
    whole = resample(Audio(samples, 10), 8000).samples
    assert np.allclose(np.concatenate([piece.samples for piece in pieces]), whole, atol=1e-6)


def test_the_limit_counts_resampled_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_module, "MAX_SAMPLES", 10_000)
    sound = to_wav(Audio(np.zeros(100), 100))
    assert len(load_audio(sound, rate=10_000).samples) == 10_000
    with pytest.raises(ValueError, match="is longer than the 0.625 s"):
        load_audio(sound, rate=16_000)


@pytest.mark.parametrize(
    "samples",
    [np.array([1, 2], np.int16), [0, 1], np.array([True]), np.array([1j]), ["0.5"], torch.zeros(2, dtype=torch.int16)],
)
def test_sounds_are_floats(samples: Any) -> None:
    with pytest.raises(ValueError, match=r"got samples of .*; give floats of full scale ±1, or load_audio"):
        Audio(samples, 8000)


def test_rates_are_whole_numbers_of_any_kind() -> None:
    assert type(Audio(np.zeros(2), np.int64(8000)).rate) is int  # type: ignore[arg-type]
    assert resample(Audio([0.0, 0.5], 8000), np.int32(16_000)).rate == 16_000  # type: ignore[arg-type]
    assert Audio([], 8000).samples.shape == (0,)  # type: ignore[arg-type]
    for rate in (True, 8000.0, "8000", 0, None):
        with pytest.raises(ValueError, match="the rate of a sound is 1 to 768,000"):
            Audio(np.zeros(2), rate)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (None, "is longer than"),
        (700.0, "is 700.0 s long, which"),
        (600.04, "is 600.04 s long, which"),
        (600.00001, "is longer than"),
    ],
)
def test_too_long_by_how_much(seconds: float | None, says: str) -> None:
    message = str(audio_files.too_long("the sound", seconds, 600.0))
    assert message.startswith(f"the sound {says}") and "the 600 s that are decoded; cut it into parts" in message


def test_whole_numbers_are_scaled_by_the_loader() -> None:
    array = np.array([0, 16384, -32768], np.int16)
    assert load_audio((8000, array)).samples.tolist() == [0, 0.5, -1]


def m4a(samples: Any, rate: int) -> bytes:
    """AAC in MP4, as FFmpeg writes it: 1,024 samples of the encoder's before the sound, and a last frame filled up."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for part in (frame, None):
            for packet in stream.encode(part):
                container.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("seconds", [1.0, 0.01, 3.0001])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_the_silence_that_aac_adds_is_taken_off(rate: int, seconds: float) -> None:
    t = np.arange(round(seconds * rate)) / rate
    samples = 0.5 * np.sin(2 * np.pi * (300 + 400 * t) * t)
    data = m4a(samples, rate)
    audio = load_audio(data)
    assert abs(len(audio.samples) - len(samples)) <= rate // 1000  # the file counts milliseconds
    both = min(len(audio.samples), len(samples))
    assert np.abs(audio.samples[:both] - samples[:both]).mean() < 0.03  # a shift by a frame gives 0.2 and more
    joined = np.concatenate([piece.samples for piece in read_chunks(data, 0.3)])
    assert np.array_equal(joined, audio.samples)


def test_what_an_edit_list_leaves_out_is_left_out() -> None:
    data = bytearray(m4a(0.5 * np.sin(np.arange(16_000) / 10), 16_000))
    at = data.find(b"elst") + 12
    assert struct.unpack(">I", data[at : at + 4]) == (1000,)  # milliseconds
    data[at : at + 4] = struct.pack(">I", 500)
    assert len(load_audio(bytes(data)).samples) == 8000


def test_a_length_that_is_no_encoders_padding_is_not_believed() -> None:
    data = bytearray(m4a(0.5 * np.sin(np.arange(16_000) / 10), 16_000))
    at = data.find(b"elst")
    data[at : at + 4] = b"free"
    at = data.find(b"mdhd") + 20
    assert struct.unpack(">I", data[at : at + 4]) == (17_024,)
    data[at : at + 4] = struct.pack(">I", 10)
    assert len(load_audio(bytes(data)).samples) >= 16_000


def box(data: bytearray, name: bytes, word: int) -> slice:
    """A 32-bit word of a box of an MP4, counted from behind its name."""
    start = data.index(name) + 4 + 4 * word
    return slice(start, start + 4)


def test_a_table_that_claims_much_is_refused() -> None:
    """FFmpeg would make room for all of it."""
    data = bytearray(m4a(0.5 * np.sin(np.arange(16_000) / 10), 16_000))
    data[box(data, b"stsz", 1)], data[box(data, b"stsz", 2)] = struct.pack(">I", 7), struct.pack(">I", 1 << 31)
    with pytest.raises(ValueError, match=r"2,147,483,648 packets, but at most 240,000 are decoded; cut it into parts"):
        load_audio(bytes(data))


def test_pictures_beside_the_sound_are_not_opened() -> None:
    """The cover of a song is a track of its own."""
    data = bytearray(m4a(0.5 * np.sin(np.arange(16_000) / 10), 16_000))
    data[box(data, b"hdlr", 2)] = b"vide"
    with pytest.raises(ValueError, match="has no sound track"):
        load_audio(bytes(data))
