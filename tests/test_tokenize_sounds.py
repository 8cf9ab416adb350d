"""`mm tokenize` for sounds, and the record of sounds that pipelines return."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm.audio import Audio, load_audio, save_audio
from mm.audio_files import file_kind
from mm.cli import main
from mm.pipelines.outputs import AudioOutput


def sine(seconds: float, rate: int = 16_000) -> np.ndarray[Any, Any]:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def tokenized(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["tokenize", *arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Half a second of a tone that comes and goes."""
    monkeypatch.chdir(tmp_path)
    tone = sine(0.5, 8000) * np.abs(np.sin(np.arange(4000) / 400)).astype(np.float32)
    save_audio("clip.flac", Audio(tone, 8000))
    return tmp_path / "clip.flac"


def test_tokenize_a_sound(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mm.tokenizers.speech_codec import SpeechCodec

    tokenizer = SpeechCodec.tiny()
    tokenizer.save("codec")
    spec = tokenizer.spec
    figures = tokenized(capsys, "clip.flac", "--tokenizer", "codec", "--out", "new/back")
    encoded = tokenizer.encode(load_audio(clip))
    assert figures["wrote"] == str(Path("new/back.wav")) and figures["tokens"] == len(encoded)
    assert figures["bits"] == round(len(encoded) * spec.num_codes * math.log2(spec.vocab_size), 1)
    assert figures["bits_per_second"] == pytest.approx(2 * figures["bits"], abs=0.06)
    assert (figures["sample_rate"], figures["seconds"]) == (8000, 0.5)
    assert (figures["decoded_sample_rate"], figures["frame_rate"]) == (spec.sample_rate, spec.frame_rate)
    assert figures["log_mel_l1"] > 0 and "si_sdr_db" not in figures  # its phases are made up
    back = load_audio("new/back.wav")
    assert back.rate == spec.sample_rate and back.seconds == pytest.approx(figures["decoded_seconds"], abs=1e-4)
    assert main(["tokenize", "clip.flac", "--tokenizer", "codec"]) == 0
    assert "bits per second" in capsys.readouterr().out


def test_tokenize_by_waveform(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mm.evaluate.speech import si_sdr
    from mm.tokenizers.audio_encodec import AudioEncodec

    tokenizer = AudioEncodec.tiny()
    tokenizer.save("encodec")
    save_audio("short.wav", Audio(load_audio(clip).samples[:1600], 8000))
    figures = tokenized(capsys, "short.wav", "--tokenizer", "audio_encodec:encodec")
    raw = load_audio("short.wav")
    wanted = si_sdr(raw, tokenizer.decode(tokenizer.encode(raw)).value)
    assert wanted is not None and figures["si_sdr_db"] == round(wanted, 2)


def test_tokenize_counts_the_words_that_are_misheard(
    clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pocketsphinx")
    import mm.evaluate.speech as speech
    from mm.tokenizers.speech_codec import SpeechCodec

    SpeechCodec.tiny().save("codec")
    asked: list[str] = []

    def recognise(sounds: list[Audio], grammar: str) -> list[str]:
        assert [sound.rate for sound in sounds] == [8000, 16_000]
        asked.append(grammar)
        return ["three five", "three nine five"]

    monkeypatch.setattr(speech, "recognise", recognise)
    figures = tokenized(capsys, "clip.flac", "--tokenizer", "codec", "--transcript", "Three  five")
    assert (figures["heard_before"], figures["heard"]) == ("three five", "three nine five")
    assert (figures["word_error_before"], figures["word_error"]) == (0, 0.5)
    tokenized(capsys, "clip.flac", "--tokenizer", "codec", "--transcript", "turn on the light")
    assert asked == ["digits", "commands"]


def test_tokenize_refusals(clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["none.wav", "--tokenizer", "text_bytes"], "'none.wav' is missing"),
        (["clip.flac", "--tokenizer", "mm-pictures"], "has no tokenizer for sounds"),
        (
            ["clip.flac", "--tokenizer", "mm-pictures", "--out", "x.mp3"],
            "unknown ending '.mp3'; use one of .wav, .flac",
        ),
        (["x.txt", "--tokenizer", "text_bytes", "--transcript", "one"], "--transcript is of what is said in a sound"),
        (["clip.flac", "--tokenizer", "x", "--transcript", " "], "--transcript is empty"),
    ):
        assert main(["tokenize", *arguments]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    assert main(["tokenize", "clip.flac", "--tokenizer", "x", "--transcript", "one"]) == 2
    assert "mm[speech]" in capsys.readouterr().err


@pytest.mark.parametrize("samples", [np.zeros(1), np.ones(1), sine(0.01, 8000), np.full(80, 0.3), np.zeros(1600)])
def test_tokenize_short_and_flat_sounds(
    samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mm.tokenizers.audio_encodec import AudioEncodec
    from mm.tokenizers.speech_codec import SpeechCodec

    monkeypatch.chdir(tmp_path)
    save_audio("short.wav", Audio(samples, 8000))
    for cls, name in ((SpeechCodec, "codec"), (AudioEncodec, "audio_encodec:net")):
        cls.tiny().save(name.rpartition(":")[2])
        figures = tokenized(capsys, "short.wav", "--tokenizer", name, "--out", "back.wav")
        assert load_audio("back.wav").seconds == pytest.approx(figures["decoded_seconds"], abs=1e-4)
        assert figures.get("stoi") is None


def test_tokenize_goes_by_what_is_in_a_file(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from mm.tokenizers.speech_codec import SpeechCodec

    SpeechCodec.tiny().save("codec")
    clip.rename("clip")
    assert tokenized(capsys, "clip", "--tokenizer", "codec")["seconds"] == 0.5
    Path("notes").write_text("é" * 300, encoding="utf-8")
    assert tokenized(capsys, "notes", "--tokenizer", "text_bytes")["tokens"] == 600
    Image.new("RGB", (4, 4)).save("picture", "png")
    for file, kind, given in (("picture", "picture", "sounds"), ("notes", "text", "sounds")):
        assert main(["tokenize", file, "--tokenizer", "codec"]) == 2
        message = f"'codec' is a tokenizer of {given}, and {file!r} is a {kind}; give one of {kind}s"
        assert message in capsys.readouterr().err
    assert main(["tokenize", "clip", "--tokenizer", "text_bytes"]) == 2
    assert "'text_bytes' is a tokenizer of texts, and 'clip' is a sound" in capsys.readouterr().err
    assert main(["tokenize", "none", "--tokenizer", "text_bytes"]) == 2
    assert "'none' is missing; give the path of a picture, a sound, a video or a text" in capsys.readouterr().err


def test_transcripts_are_words_that_the_recogniser_knows(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pocketsphinx")
    from mm.commands.tokenize import check_transcript

    assert check_transcript("Three, five!", "sound") == ["three", "five"]
    assert check_transcript("Turn on the light.", "sound") == ["turn", "on", "the", "light"]
    for text, word in (("three fife", "three"), ("3 5", "3"), ("turn five", "five")):
        with pytest.raises(ValueError, match=f"can't hear '{word}'; it knows either digits .zero, .*kitchen"):
            check_transcript(text, "sound")


# --- what pipelines return ------------------------------------------------------------------------------------------


def test_sounds_that_pipelines_return_save_themselves(tmp_path: Path) -> None:
    audios = [sine(0.1), sine(0.2)]
    output = AudioOutput(audios, 16_000, ["one", "two"], [], 0)
    places = output.save(tmp_path / "new" / "word")
    assert [place.name for place in places] == ["word-01.wav", "word-02.wav"]
    assert [load_audio(place).samples.shape for place in places] == [(1600,), (3200,)]
    one = AudioOutput(audios[:1], 16_000, ["one"], [], 0)
    assert one.save(tmp_path / "a.flac") == [tmp_path / "a.flac"] and file_kind((tmp_path / "a.flac").read_bytes()[:16])
    assert one.save(tmp_path) == [tmp_path / "speech.wav"]
    with pytest.raises(ValueError, match=r"unknown ending '\.mp3'"):
        output.save(tmp_path / "a.mp3")
    broken = AudioOutput([audios[0], np.zeros(0, np.float32)], 16_000, ["one", ""], [], 0)
    with pytest.raises(ValueError, match="sound 2 of 2 has no samples"):
        broken.save(tmp_path / "b.wav")
    assert not list(tmp_path.glob("b*"))


# --- sounds too long for one piece ------------------------------------------------------------------------------------


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is long, and cut after 20 elements."""
    from mm.commands import long_sounds

    monkeypatch.setattr(long_sounds, "MAX_SECONDS", 1.0)
    monkeypatch.setattr(long_sounds, "PIECE", 0.64)


@pytest.mark.parametrize("rate", [8000, 44_100])
def test_tokenize_a_long_sound_piece_by_piece(
    rate: int, short_pieces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mm.tokenizers.speech_codec import SpeechCodec

    monkeypatch.chdir(tmp_path)
    tokenizer = SpeechCodec.tiny()
    tokenizer.save("codec")
    save_audio("long.wav", Audio(sine(2.0, rate), rate))
    figures = tokenized(capsys, "long.wav", "--tokenizer", "codec", "--out", "back.wav")
    assert (figures["pieces"], figures["seconds"], figures["decoded_seconds"]) == (4, 2.0, 2.0)
    assert figures["tokens"] == figures["grid"][0] == 3 * 20 + 3  # 0.08 s are left
    assert figures["bits"] == round(63 * tokenizer.spec.num_codes * math.log2(tokenizer.spec.vocab_size), 1)
    assert figures["bits_per_second"] == round(figures["bits"] / 2, 1)
    raw, back = load_audio("long.wav", rate=16_000), load_audio("back.wav")
    assert back.rate == 16_000 and len(back.samples) == 32_000
    first = tokenizer.decode(tokenizer.encode(Audio(raw.samples[:10_240], 16_000))).value.samples
    if rate == 8000:  # resampled, a piece is that of the whole but for its ends
        assert np.abs(back.samples[:10_240] - first)[:8000].max() < 0.02
    short = tokenized(capsys, "long.wav", "--tokenizer", "codec")
    assert figures["log_mel_l1"] == short["log_mel_l1"] > 0 and "wrote" not in short


def test_figures_of_pieces_are_means_by_their_seconds() -> None:
    from mm.commands.long_sounds import together

    one = {"sample_rate": 8000, "seconds": 3.0, "decoded_seconds": 3.0, "log_mel_l1": 1.0, "stoi": 0.8}
    other = {"sample_rate": 8000, "seconds": 1.0, "decoded_seconds": 1.5, "log_mel_l1": 2.0, "stoi": None}
    assert together([one, other]) == {
        "sample_rate": 8000, "seconds": 4.0, "decoded_seconds": 4.5, "log_mel_l1": 1.25, "stoi": 0.8
    }  # fmt: skip
    assert together([other])["stoi"] is None


def test_tokenize_refusals_of_long_sounds(
    short_pieces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mm.commands import long_sounds
    from mm.tokenizers.speech_codec import SpeechCodec

    pytest.importorskip("pocketsphinx")
    monkeypatch.chdir(tmp_path)
    SpeechCodec.tiny().save("codec")
    save_audio("long.flac", Audio(sine(2.0), 16_000))
    assert main(["tokenize", "long.flac", "--tokenizer", "codec", "--transcript", "one"]) == 2
    assert "--transcript is of sounds of up to ten minutes" in capsys.readouterr().err
    monkeypatch.setattr(long_sounds, "MAX_SAMPLES", 20_000)
    assert main(["tokenize", "long.flac", "--tokenizer", "codec", "--out", "back.wav"]) == 2
    assert "is longer than the 1.25 s that --out writes" in capsys.readouterr().err
    Path("cut.flac").write_bytes(Path("long.flac").read_bytes()[:2000])
    assert main(["tokenize", "cut.flac", "--tokenizer", "codec"]) == 2
    assert "is truncated" in capsys.readouterr().err and not Path("back.wav").exists()
