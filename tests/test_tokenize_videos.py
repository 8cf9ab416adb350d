"""`mm tokenize` for videos: figures by hand, files written back, which tokenizer a file goes to, refusals."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.cli import main
from mm.commands.tokenize import kinds_of_file
from mm.commands.tokenize_videos import longest, side_of
from mm.tokenizers.video_frames import VideoFrames
from mm.tokenizers.video_vae import VideoVAE
from mm.video import Video, load_video, resample_frames, save_video, square

needs_av = pytest.mark.skipif(find_spec("av") is None, reason="reads and writes MP4: pip install 'mm[video]'")


def film(count: int, height: int = 20, width: int = 28) -> Any:
    frames = np.zeros((count, height, width, 3), dtype=np.uint8)
    for number in range(count):
        frames[number, 4:12, 2 + number : 10 + number] = (220, 10 * number % 256, 90)
    return frames


def tokenized(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["tokenize", *arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_video("clip.gif", film(7), 10)
    return tmp_path


def test_tokenize_a_clip_with_vectors(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = VideoVAE.tiny()
    tokenizer.save("vae")
    side, spec = tokenizer.size, tokenizer.spec
    assert side_of(tokenizer) == side and longest(tokenizer) == 9
    figures = tokenized(capsys, "clip.gif", "--tokenizer", "vae", "--out", "back.gif")
    given = square(resample_frames(Video(film(7), 10), spec.fps), side)
    encoded = tokenizer.encode(given)
    back = tokenizer.decode(encoded).value.frames[: len(given)]
    assert (figures["tokens"], figures["grid"], figures["clips"]) == (len(encoded), list(encoded.grid), 1)
    assert (
        figures["bits"] == 32 * len(encoded) * spec.dim and figures["file_bits"] == 8 * Path("clip.gif").stat().st_size
    )
    assert (figures["frames"], figures["decoded_frames"], figures["fps"]) == (6, 6, 8.0)
    assert figures["size"] == figures["decoded_size"] == [side, side]
    error = np.mean((given.frames.astype(float) - back) ** 2)
    assert figures["psnr_db"] == round(10 * math.log10(255**2 / error), 2) and not figures["lossless"]
    assert figures["raw_bits"] == 24 * 6 * side * side
    assert figures["compression"] == round(figures["raw_bits"] / figures["bits"], 2)
    assert figures["bits_per_second"] == round(figures["bits"] / (6 / 8), 1)
    assert figures["bits_per_frame"] == round(figures["bits"] / 6, 1)
    assert figures["bits_per_pixel"] == round(24 * figures["bits"] / figures["raw_bits"], 4)
    again = load_video("back.gif")
    assert again.fps == 8 and again.frames.shape == back.shape
    assert main(["tokenize", "clip.gif", "--tokenizer", "vae"]) == 0
    assert "bits per frame" in capsys.readouterr().out


def test_long_clips_become_several(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = VideoFrames.tiny()
    tokenizer.save("frames")
    most, spec = longest(tokenizer), tokenizer.spec
    assert most == spec.max_grid[0]
    side = side_of(tokenizer)
    assert side is not None
    whole = Video(film(2 * most + 1, side, side), spec.fps)
    save_video("long.apng", whole)
    figures = tokenized(capsys, "long.apng", "--tokenizer", "frames", "--out", "back")
    parts = [tokenizer.encode(Video(whole.frames[n : n + most], spec.fps)) for n in (0, most, 2 * most)]
    assert figures["clips"] == 3 and figures["tokens"] == sum(map(len, parts)) and figures["frames"] == 2 * most + 1
    assert figures["grid"] == [list(parts[1].grid), list(parts[2].grid)]
    elements = sum(part.content.numel() for part in parts)
    each = 32 if spec.kind == "continuous" else math.log2(spec.vocab_size)
    assert figures["bits"] == pytest.approx(elements * each, abs=0.3)
    back = load_video(figures["wrote"])
    assert len(back) == 2 * most + 1 and back.fps == pytest.approx(spec.fps)


@needs_av
def test_films_go_to_the_tokenizer_that_there_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mm.tokenizers.speech_codec import SpeechCodec

    VideoVAE.tiny().save("vae")
    SpeechCodec.tiny().save("codec")
    save_video("clip.mp4", film(6), 8)
    Path("clip.mp4").rename("film")
    figures = tokenized(capsys, "film", "--tokenizer", "vae", "--out", "back")
    assert figures["frames"] == 6 and figures["wrote"] == "back.mp4" and load_video("back.mp4").fps == 8
    assert main(["tokenize", "film", "--tokenizer", "codec"]) == 2
    assert "the sound 'film' has no sound track" in capsys.readouterr().err
    assert main(["tokenize", "film", "--tokenizer", "text_bytes"]) == 2
    assert "'text_bytes' is a tokenizer of texts, and 'film' is a video; give one of videos" in capsys.readouterr().err


def test_pictures_and_folders_of_them_are_clips_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    VideoVAE.tiny().save("vae")
    Path("frames").mkdir()
    for number, frame in enumerate(film(3)):
        Image.fromarray(frame).save(f"frames/{number}.png")
    assert tokenized(capsys, "frames/0.png", "--tokenizer", "vae")["frames"] == 1
    figures = tokenized(capsys, "frames", "--tokenizer", "vae")
    assert figures["frames"] == 3 and figures["file_bits"] is None
    # for the tokenizers of a model without video an animation is a picture: its first frame
    assert tokenized(capsys, "clip.gif", "--tokenizer", "mm-pictures")["size"] == [28, 20]


def test_which_files_are_taken_for_what(here: Path) -> None:
    for name, kinds in (
        ("x.mp4", ("video", "sound")),
        ("x.m4a", ("sound",)),
        ("x.WEBM", ("video", "sound")),
        ("clip.gif", ("picture", "video")),
        ("x.wav", ("sound",)),
        ("x.txt", ("text",)),
        (".", ("video",)),
    ):
        assert kinds_of_file(name) == kinds
    Path("song").write_bytes(b"\0\0\0\x20ftypM4A rest")
    Path("clip.gif").rename("clip")
    assert kinds_of_file("song") == ("sound", "video") and kinds_of_file("clip") == ("picture", "video")


def test_refusals(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    VideoVAE.tiny().save("vae")
    Path("broken.gif").write_bytes(Path("clip.gif").read_bytes()[:60])
    for arguments, message in (
        (["none.mp4", "--tokenizer", "vae"], "the video 'none.mp4' is missing"),
        (["broken.gif", "--tokenizer", "vae"], "the video 'broken.gif' is damaged or not a picture (GIF)\n"),
        (["clip.gif", "--tokenizer", "vae", "--out", "x.avi"], "unknown ending '.avi'"),
        (["clip.gif", "--tokenizer", "vae", "--transcript", "one"], "--transcript is of what is said in a sound"),
        (["x.mp4", "--tokenizer", "mm-pictures"], "has no tokenizer for videos"),
    ):
        assert main(["tokenize", *arguments]) == 2
        assert message in capsys.readouterr().err
