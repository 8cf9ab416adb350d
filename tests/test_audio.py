"""Sound in and out: every format comes back, hostile files cost neither memory nor more than a ValueError."""

from __future__ import annotations

import io
import math
import os
import struct
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mm import audio_files, resampling
from mm.audio import Audio, load_audio, log_mel, read_chunks, resample, save_audio, to_wav
from mm.audio_files import file_kind


def sine(seconds: float = 0.25, rate: int = 16_000, pitch: float = 440.0, level: float = 0.5) -> np.ndarray[Any, Any]:
    return (level * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: Any, rate: int = 16_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def wav_header(data_bytes: int, *, rate: int = 16_000, channels: int = 1, bits: int = 16, form: int = 1) -> bytes:
    frame = channels * bits // 8
    chunk = struct.pack("<HHIIHH", form, channels, rate, rate * frame & 0xFFFFFFFF, frame & 0xFFFF, bits)
    return (
        b"RIFF" + struct.pack("<I", 36 + data_bytes & 0xFFFFFFFF) + b"WAVEfmt " + struct.pack("<I", 16) + chunk
        + b"data" + struct.pack("<I", data_bytes)
    )  # fmt: skip


# --- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 1 / 128),
        ("WAV", "PCM_16", 1 / 32768),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 2**-24),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "ULAW", 0.02),
        ("FLAC", "PCM_S8", 1 / 128),
        ("FLAC", "PCM_16", 1 / 32768),
        ("FLAC", "PCM_24", 2**-23),
        ("AIFF", "PCM_16", 1 / 32768),
        ("AU", "FLOAT", 0),
        ("CAF", "PCM_24", 2**-23),
        ("RF64", "PCM_16", 1 / 32768),
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.1),
        ("MP3", "MPEG_LAYER_III", 0.1),
    ],
)
def test_every_format_comes_back(kind: str, subtype: str, error: float, tmp_path: Path) -> None:
    samples = sine()
    data = encoded(samples, kind=kind, subtype=subtype)
    path = tmp_path / "misnamed.raw"  # the name says nothing
    path.write_bytes(data)
    for source in (path, str(path), data, bytearray(data), io.BytesIO(data)):
        audio = load_audio(source)
        assert audio.rate == 16_000 and audio.samples.dtype == np.float32 and audio.samples.shape == samples.shape
        assert np.abs(audio.samples - samples)[200:-200].max() <= error
    with path.open("rb") as file:
        assert load_audio(file).samples.shape == samples.shape


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "aac"), ("webm", "libopus"), ("adts", "aac")])
def test_what_libsndfile_cannot_read_goes_through_ffmpeg(kind: str, codec: str) -> None:
    av = pytest.importorskip("av")
    samples = np.stack([sine(1, 48_000), -0.5 * sine(1, 48_000)])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=48_000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate = 48_000
        for part in (frame, None):
            for packet in stream.encode(part):
                container.mux(packet)
    data = buffer.getvalue()
    assert file_kind(data[:16]) in audio_files.FFMPEG
    audio = load_audio(data)
    assert audio.rate == 48_000 and abs(audio.seconds - 1) < 0.05
    spectrum = np.abs(np.fft.rfft(audio.samples[10_000:34_000]))
    assert spectrum.argmax() == 220  # 440 Hz in half a second
    assert spectrum.max() / 12_000 == pytest.approx(0.125, abs=0.03)  # (0.5 − 0.25) / 2; the encoders are rough
    with pytest.raises(ValueError, match="longer than|is 1.0 s long, which is more than"):
        load_audio(data, max_seconds=0.5)
    joined = np.concatenate([part.samples for part in read_chunks(data, 0.1)])
    assert np.array_equal(joined, audio.samples)
    outcomes = set()
    generator = np.random.default_rng(0)
    for number in range(80):
        broken = bytearray(data)
        for place in generator.integers(0, len(broken), 1 + number % 8):
            broken[place] = generator.integers(256)
        outcomes.add(outcome(bytes(broken if number % 2 else broken[: generator.integers(1, len(broken) + 1)])))
    assert outcomes == {"sound", "ValueError"}


def test_without_av_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"needs FFmpeg; pip install 'mm\[video\]'"):
        load_audio(b"\0\0\0\x1cftypisom" + bytes(100))


def test_channels_are_averaged_and_loudness_is_left_alone() -> None:
    left, right = sine(level=1.0), np.full(4000, -0.5, np.float32)
    stereo = load_audio(encoded(np.stack([left, right], 1), subtype="FLOAT"))
    assert np.allclose(stereo.samples, (left + right) / 2, atol=1e-7)
    six = load_audio(encoded(np.stack([left] * 6, 1), kind="FLAC"))
    assert np.abs(six.samples - left).max() <= 1 / 32768
    loud, quiet = load_audio(encoded(3 * left, subtype="FLOAT")), load_audio(encoded(left / 1000, subtype="FLOAT"))
    assert np.array_equal(loud.samples, 3 * left) and np.array_equal(quiet.samples, left / 1000)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_short_silent_and_fast_sounds(kind: str) -> None:
    assert load_audio(encoded(sine(0.01), kind=kind)).seconds == 0.01
    assert not load_audio(encoded(np.zeros(1600), kind=kind)).samples.any()
    if kind != "MP3":
        fast = load_audio(encoded(sine(0.1, 96_000), 96_000, kind=kind))
        assert (fast.rate, len(fast.samples)) == (96_000, 9600)
    if kind in ("WAV", "FLAC"):
        assert len(load_audio(encoded(np.ones(1) / 2, kind=kind)).samples) == 1


def test_pairs_of_rate_and_array() -> None:
    whole = np.array([0, 16384, -32768], np.int16)
    assert load_audio((8000, whole)).samples.tolist() == [0, 0.5, -1]
    assert load_audio((8000, whole.astype(np.int32) * 65536)).samples.tolist() == [0, 0.5, -1]
    assert load_audio((8000, np.array([128, 192, 0], np.uint8))).samples.tolist() == [0, 0.5, -1]
    assert load_audio((np.int64(8000), np.array([[0.5, 1.5], [3, 3]]))).samples.tolist() == [1, 3]
    for pair, message in (
        ((8000, [0.5]), "a pair for a sound is"),
        ((8000,), "a pair for a sound is"),
        ((8000, np.zeros((2, 65))), "up to 64"),
        ((8000, np.zeros((2, 0))), "up to 64"),
        ((8000, np.zeros(3, np.int64)), "got int64"),
        ((8000, np.zeros(0)), "has no samples"),
        ((8000, np.array([np.nan])), "NaN or infinite"),
        ((8000, np.array([1e300])), "NaN or infinite"),
        ((0, np.zeros(3)), "1 to 768,000"),
        ((8000.0, np.zeros(3)), "1 to 768,000"),
    ):
        with pytest.raises(ValueError, match=message):
            load_audio(pair)


def test_a_sound_is_its_own_source() -> None:
    audio = Audio(sine(), 16_000)
    assert load_audio(audio).samples is audio.samples and audio.seconds == 0.25
    with pytest.raises(ValueError, match=r"is 0\.25 s long, which is more than the 0\.2 s"):
        load_audio(audio, max_seconds=0.2)
    for samples, rate, message in (
        (np.zeros((2, 2)), 8000, "one axis"),
        ([math.inf], 8000, "NaN or infinite"),
        (["a"], 8000, "give floats of full scale"),
        ([0.0], True, "1 to 768,000"),
    ):
        with pytest.raises(ValueError, match=message):
            Audio(samples, rate)  # type: ignore[arg-type]


# --- files from strangers -------------------------------------------------------------------------------------------


def test_what_is_not_a_sound(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("hello there, this is not a sound")
    (tmp_path / "large.wav").write_bytes(encoded(sine()))
    for source, message in (
        (tmp_path / "none.wav", r"none\.wav' is missing"),
        (tmp_path, "is a folder, not a file"),
        (tmp_path / "empty.wav", "is an empty file"),
        (tmp_path / "text.wav", "damaged or not a sound"),
        (b"", "is an empty file"),
        (io.StringIO("RIFF"), "open it in binary mode"),
        (7, "got a int for a sound"),
        (encoded(np.zeros(0)), "has no samples"),
        (encoded(np.array([0.0, np.nan]), subtype="FLOAT"), "NaN or infinite"),
        (encoded(np.array([0.0, 1e200]), subtype="DOUBLE"), "NaN or infinite"),
        (encoded(np.array([[np.inf, -np.inf]]), subtype="FLOAT"), "NaN or infinite"),
        (wav_header(32, rate=900_000) + bytes(32), "900,000 samples a second"),
        (wav_header(200, channels=100) + bytes(200), "100 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            load_audio(source)  # type: ignore[arg-type]
    for source in (tmp_path / "large.wav", encoded(sine()), io.BytesIO(encoded(sine()))):
        with pytest.raises(ValueError, match="is larger than 1,000 bytes"):
            load_audio(source, max_bytes=1000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.wav")
    with pytest.raises(ValueError, match="is not a file"):
        load_audio(tmp_path / "p.wav")


def with_flac_length(data: bytes, samples: int) -> bytes:
    """STREAMINFO ends its rate, channels and depth with the number of samples in 36 bits."""
    fields = int.from_bytes(data[18:26], "big")
    return data[:18] + (fields >> 36 << 36 | samples).to_bytes(8, "big") + data[26:]


def test_headers_that_lie_cost_no_memory() -> None:
    flac = encoded(sine(1), kind="FLAC")
    tracemalloc.start()
    try:
        # a length beyond the file: WAV ends where the file does, FLAC is taken for cut off
        assert len(load_audio(wav_header(0xFFFFFFF0) + bytes(3200)).samples) == 1600
        with pytest.raises(ValueError, match=r"is truncated: it has 16,000 of the 5,000,000 samples"):
            load_audio(with_flac_length(flac, 5_000_000))
        # refused by its header alone
        with pytest.raises(ValueError, match=r"is 4,294,967\.3 s long, which is more than the 600 s"):
            load_audio(with_flac_length(flac, 2**36 - 1))
        # no length at all: decoded to its end, or to the limit
        assert len(load_audio(with_flac_length(flac, 0)).samples) == 16_000
        with pytest.raises(ValueError, match=r"is longer than the 0\.5 s"):
            load_audio(with_flac_length(flac, 0), max_seconds=0.5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_sounds_that_are_cut_off(kind: str) -> None:
    data = encoded(sine(1), kind=kind)
    found = [outcome(data[:length]) for length in range(0, len(data), max(1, len(data) // 97))]
    assert outcome(data) == "sound" and found[0] == "ValueError"
    # FLAC says how long it is, and a page of Ogg has a checksum; the others end where they end
    assert set(found[1:-1]) == (
        {"ValueError"} if kind in ("FLAC", "OGG") else {"sound"} if kind == "WAV" else set(found)
    )
    assert kind != "MP3" or found[-1] == "sound"


def outcome(data: bytes) -> str:
    """What comes of loading: a usable sound or a ValueError. Anything else fails the test."""
    try:
        audio = load_audio(data, max_seconds=60)
    except ValueError as error:
        assert 10 < len(str(error)) < 500 and "\n" not in str(error)
        return "ValueError"
    assert 0 < audio.seconds <= 60 and np.isfinite(audio.samples).all()
    return "sound"


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)],
)
def test_mutated_files_are_sounds_or_refused(kind: str, subtype: str | None) -> None:
    generator = np.random.default_rng(7)
    data = encoded(np.stack([sine(0.1), sine(0.1, pitch=900)], 1), kind=kind, subtype=subtype)
    outcomes: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(400):
            broken = bytearray(data)
            area = 64 if number % 2 else len(broken)  # half of the time where the header is
            for place in generator.integers(0, min(area, len(broken)), 1 + number % 12):
                broken[place] = generator.integers(256)
            if number % 5 == 0:
                broken = broken[: generator.integers(len(broken) + 1)]
            result = outcome(bytes(broken))
            outcomes[result] = outcomes.get(result, 0) + 1
    # each page of Ogg has a checksum, so that nothing broken is played
    assert set(outcomes) == ({"ValueError"} if kind == "OGG" else {"sound", "ValueError"}), outcomes


# --- long sounds ----------------------------------------------------------------------------------------------------


def test_an_hour_in_pieces_takes_little_memory(tmp_path: Path) -> None:
    path, second = tmp_path / "hour.wav", sine(1, 8000)
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        for _ in range(60):
            file.write(np.tile(second, 60))
    with pytest.raises(ValueError, match=r"is 3,600\.0 s long, .* use read_chunks"):
        load_audio(path)
    tracemalloc.start()
    try:
        count, samples = 0, 0
        for audio in read_chunks(path, 7):
            count, samples = count + 1, samples + len(audio.samples)
            assert len(audio.samples) == (7 * 8000 if count <= 514 else 2 * 8000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (count, samples) == (515, 3600 * 8000)
    assert peak < 8 << 20  # whole it is 115 MB


@pytest.mark.parametrize("rate", [None, 16_000, 11_025, 16_001])
def test_pieces_end_to_end_are_the_whole(rate: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_files, "BLOCK", 1000)
    monkeypatch.setattr(resampling, "STEP", 700)
    samples = np.random.default_rng(0).normal(size=16_001).astype(np.float32) * 0.1
    data = encoded(samples, 22_050, subtype="FLOAT")
    whole = load_audio(data, rate=rate)
    for seconds in (0.001, 0.0311, 0.5, 100):
        pieces = list(read_chunks(data, seconds, rate=rate))
        assert {piece.rate for piece in pieces} == {rate or 22_050}
        assert len({len(piece.samples) for piece in pieces[:-1]}) <= 1
        assert np.allclose(np.concatenate([piece.samples for piece in pieces]), whole.samples, atol=1e-6)
    assert len(whole.samples) == (16_001 if rate is None else -(-16_001 * rate // 22_050))


def test_pieces_of_nothing() -> None:
    for seconds in (0, -1, math.nan, math.inf, 601):
        with pytest.raises(ValueError, match="pieces are more than 0 and at most 600 seconds"):
            next(read_chunks(encoded(sine()), seconds))
    with pytest.raises(ValueError, match="has no samples"):
        list(read_chunks(encoded(np.zeros(0)), 1))
    with pytest.raises(ValueError, match="NaN or infinite"):
        list(read_chunks(encoded(np.array([0.0, np.nan]), subtype="FLOAT"), 1))


# --- rates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [(16_000, 8000), (8000, 16_000), (44_100, 16_000), (48_000, 22_050), (44_101, 16_000), (96_000, 16_001)],
)
def test_resampling_a_sine_gives_the_sine(old: int, new: int) -> None:
    pitch, seconds = 1000.0, 1.0
    out = resample(Audio(sine(seconds, old, pitch), old), new)
    assert out.rate == new and abs(len(out.samples) - seconds * new) < 1
    middle = slice(new // 5, -new // 5)
    assert np.abs(out.samples - sine(seconds, new, pitch)[: len(out.samples)])[middle].max() < 2e-3


def test_resampling_takes_out_what_the_new_rate_cannot_hold() -> None:
    high = resample(Audio(sine(1, 48_000, 10_000.0), 48_000), 16_000)
    assert np.abs(high.samples[2000:-2000]).max() < 1e-4  # folded down it would be a sine of 6,000 Hz at 0.5
    kept = resample(Audio(sine(1, 48_000, 7000.0), 48_000), 16_000)
    assert np.abs(kept.samples[2000:-2000]).max() == pytest.approx(0.5, abs=1e-3)


def test_table_and_filters_are_the_same_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    for old, new in ((44_100, 16_000), (8000, 22_050), (16_000, 8000)):
        filtered = resampling.resample(noise, old, new)
        with monkeypatch.context() as patch:
            patch.setattr(resampling, "SMALL", 0)
            looked_up = resampling.resample(noise, old, new)
        assert filtered.shape == looked_up.shape == (-(-3000 * new // old),)
        assert np.abs(filtered - looked_up).max() < 5e-5


def test_rates_that_cannot_be() -> None:
    audio = Audio(sine(0.01), 16_000)
    for rate in (0, -1, 1_000_000, 8000.0, True, "8000"):
        with pytest.raises(ValueError, match="a rate is 1 to 768,000"):
            resample(audio, rate)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="too far apart to resample"):
        resample(Audio(np.zeros(8), 768_000), 1)
    assert resample(audio, 16_000).samples is audio.samples
    assert len(resample(Audio(np.zeros(1), 8000), 16_000).samples) == 2
    assert len(resample(Audio(np.zeros(0), 8000), 16_000).samples) == 0


# --- mel spectra ----------------------------------------------------------------------------------------------------


def test_log_mel_of_a_sine() -> None:
    mel = log_mel(torch.from_numpy(sine(1, pitch=1000.0, level=1.0)), rate=16_000)
    assert mel.shape == (80, 63) and mel.dtype == torch.float32
    column = mel[:, 30]
    # HTK's mel scale: 80 triangles between 0 and 8,000 Hz, equally far apart in 2595·log10(1 + f / 700)
    expected = 2595 * math.log10(1 + 1000 / 700) / (2595 * math.log10(1 + 8000 / 700)) * 81 - 1
    assert abs(int(column.argmax()) - expected) <= 0.5
    # a Hann window of 1,024 sums to 512, and half of a sine's magnitude lies at the positive frequency
    assert 0.5 * 256 < float(column.exp().max()) < 2 * 256
    assert log_mel(torch.zeros(100), rate=16_000).unique().tolist() == pytest.approx([math.log(1e-5)])


def test_log_mel_keeps_batches_gradients_and_type() -> None:
    samples = torch.randn(2, 3, 700, dtype=torch.float64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mel = log_mel(samples, rate=8000, bins=20, n_fft=256, hop=64)
    assert mel.shape == (2, 3, 20, 11) and mel.dtype == torch.float32
    mel.sum().backward()
    assert samples.grad is not None and samples.grad.abs().sum() > 0
    assert torch.allclose(mel[1, 2], log_mel(samples[1, 2], rate=8000, bins=20, n_fft=256, hop=64), atol=1e-5)


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".wav", ".flac", ".WAV"])
def test_saved_sounds_come_back(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"a{ending}"
    save_audio(path, Audio(sine(), 16_000))
    again = load_audio(path)
    assert again.rate == 16_000 and np.abs(again.samples - sine()).max() <= 0.5 / 32768
    save_audio(path, again)
    assert np.array_equal(load_audio(path).samples, again.samples)
    assert soundfile.info(str(path)).subtype == "PCM_16"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    full = Audio(np.array([1.0, -1.0, 0.0], np.float32), 8000)
    save_audio(path, full)
    assert load_audio(path).samples.tolist() == [32767 / 32768, -1, 0]


def test_peaks_beyond_full_scale_make_the_sound_quieter(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"a\.wav': peaks reach 2 of full scale, so the sound was made 6\.0 dB quieter"
    ):
        save_audio(tmp_path / "a.wav", Audio(np.array([2.0, -1.0, 0.5], np.float32), 8000))
    assert np.allclose(load_audio(tmp_path / "a.wav").samples, [1, -0.5, 0.25], atol=1 / 32768)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    good = Audio(sine(), 16_000)
    for name, audio, message in (
        ("a.mp3", good, r"unknown ending '\.mp3'; use one of \.wav, \.flac"),
        ("a", good, "unknown ending ''"),
        ("a.wav", Audio(np.zeros(0), 8000), "the sound has no samples"),
        ("a.flac", Audio(sine(), 700_000), "can't write 700,000 samples a second as FLAC"),
    ):
        with pytest.raises(ValueError, match=message):
            save_audio(tmp_path / name, audio)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        save_audio(tmp_path / "folder.wav", good)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.wav"]


def test_a_wav_of_floats_loses_nothing() -> None:
    audio = Audio(5 * sine(), 22_050)
    again = load_audio(to_wav(audio))
    assert again.rate == 22_050 and np.array_equal(again.samples, audio.samples)
    info = soundfile.info(io.BytesIO(to_wav(audio)))
    assert (info.subtype, info.channels, info.frames) == ("FLOAT", 1, len(audio.samples))
