"""Video in and out: what is written comes back, rates and sizes, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.video import Video, load_video, resample_frames, save_video, square, to_webp


def film(count: int = 8, height: int = 24, width: int = 32) -> Any:
    """Flat colours on black: a bar that grows; frame 3 repeats frame 2."""
    frames = np.zeros((count, height, width, 3), dtype=np.uint8)
    for number in range(count):
        frames[number, 4:12, 2 : 6 + 2 * min(number, 12)] = (200, 30, 10 * number)
    if count > 3:
        frames[3] = frames[2]
    return frames


@pytest.mark.parametrize("ending", [".gif", ".apng", ".webp"])
@pytest.mark.parametrize("fps", [8, 12.5, 10.0])
def test_animations_come_back_exactly(tmp_path: Path, ending: str, fps: float) -> None:
    frames = film()
    save_video(tmp_path / f"x{ending}", frames, fps)
    for source in (tmp_path / f"x{ending}", (tmp_path / f"x{ending}").read_bytes()):
        video = load_video(source)
        assert np.array_equal(video.frames, frames)
        assert video.fps == pytest.approx(fps, rel=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == [f"x{ending}"]


@pytest.mark.parametrize("ending", [".gif", ".apng", ".webp"])
@pytest.mark.parametrize("order", [[0] * 8, [0, 0, 4, 4, 5, 5], [0, 1, 1, 1, 4, 0, 0]])
@pytest.mark.parametrize("scale", [1, 3])
def test_equal_frames_stay_apart(tmp_path: Path, ending: str, order: list[int], scale: int) -> None:
    """Encoders join equal neighbours; a clip of nothing but these came back as one frame, and one of pairs at half its rate."""
    frames = film()[order, :23, :31]
    save_video(tmp_path / f"x{ending}", frames, 8, scale=scale)
    video = load_video(tmp_path / f"x{ending}")
    assert np.array_equal(video.frames, frames.repeat(scale, 1).repeat(scale, 2))
    assert video.fps == pytest.approx(8, rel=1e-2)
    if ending == ".webp" and scale == 1:
        assert to_webp(Video(frames, 8)) == (tmp_path / "x.webp").read_bytes()


@pytest.mark.parametrize("ending", [".mp4", ".webm", ".gif", ".apng", ".webp"])
@pytest.mark.parametrize("side", [32, 64])
def test_the_same_frames_give_the_same_file(tmp_path: Path, ending: str, side: int) -> None:
    """A small MP4 had other pixels each time."""
    if ending in (".mp4", ".webm"):
        pytest.importorskip("av")
    noise = np.random.default_rng(0).normal(size=(17, side // 8, side // 8, 3)).cumsum(0)
    frames = (127 + 40 * np.tanh(noise).repeat(8, 1).repeat(8, 2) + 9 * np.sin(np.arange(side))[:, None]).astype(
        np.uint8
    )
    written = set()
    for number in range(6):
        save_video(tmp_path / f"{number}{ending}", frames, 8)
        written.add((tmp_path / f"{number}{ending}").read_bytes())
    assert len(written) == 1


def test_arrays_and_lists_of_frames() -> None:
    frames = film()
    assert np.array_equal(load_video(frames).frames, frames)
    assert load_video(frames).fps == 10
    grey = load_video(frames[..., 0])
    assert np.array_equal(grey.frames, frames[..., :1].repeat(3, -1))
    clear = np.concatenate([frames, np.zeros_like(frames[..., :1])], axis=-1)
    assert (load_video(clear).frames == 255).all()
    given = load_video([Image.fromarray(frame) for frame in frames])
    assert np.array_equal(given.frames, frames)
    assert np.array_equal(load_video(frames.astype(np.float32) / 255).frames, frames)
    with pytest.raises(ValueError, match="frame 2 is 30×24, but those before it are 32×24"):
        load_video([frames[0], frames[0][:, :30]])
    assert load_video([frames[0], frames[0][:, :30]], size=8).frames.shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match="has no frames"):
        load_video([])
    for wrong in (
        np.full((2, 4, 4, 3), -1.0),
        np.zeros((2, 4, 4, 3), int),
        np.zeros((2, 4, 4, 2), np.uint8),
        np.zeros(3, np.uint8),
        [1, 2],
        {"a": 1},
    ):
        with pytest.raises(ValueError, match=r"(frame|array|got)"):
            load_video(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("frames", [film()[0], film().astype(np.float32), film()[:0], film()[..., :1], film()[:, :0]])
def test_a_video_refuses_other_frames(frames: Any) -> None:
    with pytest.raises(ValueError, match=r"frames of uint8 and the shape \[T, H, W, 3\]"):
        Video(frames, 10)


@pytest.mark.parametrize("fps", [0, -1, 1e-4, 1e-320, float("nan"), float("inf"), 1001, 10**400, "x", None])
def test_a_video_refuses_impossible_rates(fps: Any) -> None:
    with pytest.raises(ValueError, match="the rate of a video is 0.001 to 1000 frames a second"):
        Video(film(), fps)


def test_rates_and_sizes() -> None:
    video = Video(film(12), 12)
    assert len(video) == 12 and video.seconds == 1 and video.size == (32, 24)
    assert np.array_equal(resample_frames(video, 6).frames, video.frames[::2])
    assert np.array_equal(resample_frames(video, 36).frames, video.frames.repeat(3, 0))
    assert resample_frames(video, 12) is video
    assert np.array_equal(resample_frames(video, 0.1).frames, video.frames[:1])
    assert np.array_equal(resample_frames(video, 5).frames, video.frames[[0, 2, 4, 7, 9]])
    assert np.array_equal(load_video(video, fps=5).frames, resample_frames(video, 5).frames)
    for wrong in (0, 2.5, "x"):
        with pytest.raises(ValueError, match="scaled to a size from 1 to 4096, a whole number"):
            square(video, wrong)  # type: ignore[arg-type]
    small = square(video, 12)
    assert small.frames.shape == (12, 12, 12, 3)
    # cropped in the middle: 4 columns on either side are gone, and every second row
    assert np.array_equal(square(Video(film()[:, :, 4:28], 1), 24).frames, film()[:, :, 4:28])
    assert np.array_equal(square(Video(film(), 1), 24).frames, film()[:, :, 4:28])


def test_a_still_picture_is_a_video_of_one_frame() -> None:
    data = io.BytesIO()
    Image.fromarray(film()[1]).save(data, "PNG")
    assert np.array_equal(load_video(data.getvalue()).frames, film()[1:2])
