"""Video files: what FFmpeg reads and writes, odd ones, hostile ones, and files that were damaged on purpose."""

from __future__ import annotations

import io
import resource
import struct
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm import video_files
from mm.video import Video, load_video, save_video

pytestmark = pytest.mark.filterwarnings("ignore:Invalid APNG:UserWarning")  # what Pillow says about damaged ones
av = pytest.importorskip("av", reason="reads and writes MP4 and WebM")


def film(count: int = 6, height: int = 32, width: int = 48) -> Any:
    """A coloured block that moves to the right over grey."""
    frames = np.full((count, height, width, 3), 90, dtype=np.uint8)
    for number in range(count):
        frames[number, 8:24, 4 * number : 4 * number + 16] = (200, 40, 60)
    return frames


def saved(frames: Any, ending: str = "mp4", fps: float = 10, **options: Any) -> bytes:
    """The bytes of a video; `options` are for FFmpeg: a container to write otherwise than `save_video` does."""
    buffer = io.BytesIO()
    form, encoder = options.pop("form", ending), options.pop("encoder", "libx264")
    kind, times = options.pop("pix_fmt", "yuv420p"), options.pop("times", range(len(frames)))
    height, width = frames.shape[1:3]
    with av.open(buffer, "w", format=form, options=options.pop("container", {})) as container:
        stream = container.add_stream(encoder, rate=Fraction(fps), options=options.pop("codec", {}))
        stream.height, stream.width, stream.pix_fmt = height, width, kind
        stream.time_base = 1 / Fraction(fps)
        layout = {2: "gray", 3: "rgb24", 4: "rgba"}[frames.shape[-1] if frames.ndim == 4 else 2]
        for time, pixels in zip(times, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format=layout).reformat(format=kind)
            frame.pts, frame.time_base = time, 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("videos")
    found = {}
    for ending in (".mp4", ".webm", ".gif", ".apng", ".webp"):
        save_video(folder / f"x{ending}", film(), 10)
        found[ending[1:]] = (folder / f"x{ending}").read_bytes()
    fragments = {"movflags": "frag_every_frame+empty_moov+default_base_moof"}
    return found | {"fragments": saved(film(), container=fragments)}


def patched(data: bytes, *changes: tuple[bytes, int, bytes]) -> bytes:
    """For each change the bytes from so many after a name on, wherever that stands."""
    out = bytearray(data)
    for name, offset, new in changes:
        place, found = out.find(name), 0
        while place >= 0:
            out[place + offset : place + offset + len(new)] = new
            place, found = out.find(name, place + 4), found + 1
        assert found
    return bytes(out)


# --- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".mp4", ".webm"])
@pytest.mark.parametrize(("fps", "count"), [(8.0, 6), (24_000 / 1001, 5), (30.0, 1)])
def test_films_come_close(tmp_path: Path, ending: str, fps: float, count: int) -> None:
    save_video(tmp_path / f"x{ending}", film(count), fps)
    video = load_video(tmp_path / f"x{ending}")
    assert video.frames.shape == film(count).shape and video.fps == pytest.approx(fps, rel=1e-6)
    assert np.abs(video.frames.astype(int) - film(count)).mean() < 3
    assert (
        np.abs(video.frames[:, 12:20, 2:6].astype(int).mean((1, 2)) - film(count)[:, 12:20, 2:6].mean((1, 2))).max() < 8
    )
    with (tmp_path / f"x{ending}").open("rb") as file:
        assert np.array_equal(load_video(file).frames, video.frames)
    assert [path.name for path in tmp_path.iterdir()] == [f"x{ending}"]


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (30, 160, 90)])
def test_colours_come_back(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    frames = np.broadcast_to(np.array(colour, np.uint8), (2, 16, 16, 3))
    for name in ("x.mp4", "x.webm"):
        save_video(tmp_path / name, frames, 10)
        assert np.abs(load_video(tmp_path / name).frames.astype(int) - frames).max() <= 4


def test_an_mp4_is_one_that_browsers_play(tmp_path: Path) -> None:
    save_video(tmp_path / "x.mp4", film(3, 31, 45), 12.5)  # odd sides
    data = (tmp_path / "x.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")  # its index is at the beginning
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(25, 2) and len(container.streams) == 1
    frames = load_video(data).frames
    assert frames.shape == (3, 32, 46, 3)
    assert np.abs(frames[:, -1].astype(int) - frames[:, -2]).mean() < 2  # the last row once more
    save_video(tmp_path / "one.mp4", film(1, 1, 1), 10, scale=1)
    assert load_video(tmp_path / "one.mp4").frames.shape == (1, 2, 2, 3)
    save_video(tmp_path / "large.mp4", film(2), 10, scale=3)
    assert load_video(tmp_path / "large.mp4").frames.shape == (2, 96, 144, 3)


def test_frames_of_different_length_keep_their_times() -> None:
    times = [0, 1, 2, 6, 8]
    video = load_video(saved(film(5), fps=10, times=times))
    assert video.fps == 10
    kept = [0, 1, 2, 2, 2, 2, 3, 3]
    assert np.abs(video.frames[:8].astype(int) - film(5)[kept]).mean() < 4
    one = load_video(saved(film(5), fps=10, times=times), fps=2.5)
    assert np.abs(one.frames[:3].astype(int) - film(5)[[0, 2, 4]]).mean() < 4


def test_depth_grey_and_transparency() -> None:
    deep = load_video(saved(film(3), form="matroska", encoder="ffv1", pix_fmt="yuv420p10le"))
    assert np.abs(deep.frames.astype(int) - film(3)).mean() < 4
    grey = load_video(saved(film(3)[..., 0], pix_fmt="gray", encoder="ffv1", form="matroska"))
    assert np.abs(grey.frames.astype(int) - film(3)[..., :1]).max() <= 2
    clear = np.concatenate([film(3), np.full((3, 32, 48, 1), 255, np.uint8)], axis=-1)
    clear[:, :8, :, 3], clear[:, 24:, :, 3] = 0, 128
    mixed = load_video(saved(clear, encoder="qtrle", pix_fmt="argb", form="mov")).frames.astype(int)
    assert (mixed[:, :8] == 255).all() and np.array_equal(mixed[:, 8:24], film(3)[:, 8:24])
    assert np.abs(mixed[:, 24:] - (film(3)[:, 24:] * 0.5 + 127.5)).max() <= 1


@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)]
)
def test_films_are_turned_upright(files: dict[str, bytes], matrix: tuple[int, ...], turns: int) -> None:
    a, b, c, d = (value << 16 for value in matrix)
    turned = load_video(patched(files["mp4"], (b"tkhd", 44, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))))
    assert np.array_equal(turned.frames, np.rot90(load_video(files["mp4"]).frames, turns, axes=(1, 2)))


def test_films_in_fragments_and_with_sound(files: dict[str, bytes]) -> None:
    assert len(load_video(files["fragments"])) == 6
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        picture, sound = container.add_stream("libx264", rate=10), container.add_stream("aac", rate=16_000)
        picture.width, picture.height, picture.pix_fmt = 48, 32, "yuv420p"
        for number, pixels in enumerate(film()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(picture.encode(frame))
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 9600), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 16_000
        for stream, last in ((sound, tone), (sound, None), (picture, None)):
            container.mux(stream.encode(last))
    assert len(load_video(buffer.getvalue())) == 6
    sounding = io.BytesIO()
    with av.open(sounding, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16_000)
        for last in (tone, None):
            container.mux(sound.encode(last))
    with pytest.raises(ValueError, match="the video has no video track"):
        load_video(sounding.getvalue())


# --- refusals -------------------------------------------------------------------------------------------------------


def test_limits_hold_before_anything_is_decoded(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0
    to_rgb = video_files._to_rgb

    def watched(frame: Any) -> Any:
        nonlocal counted
        counted += 1
        return to_rgb(frame)

    monkeypatch.setattr(video_files, "_to_rgb", watched)
    for kind in ("mp4", "webm", "apng", "webp"):
        for limit, message in (
            ({"max_frames": 5}, "has 6 frames, but at most 5 are decoded; cut it into parts"),
            ({"max_pixels": 1535}, "is 48×32 = 1,536 pixels a frame, but at most 1,535 are decoded"),
            ({"max_total": 9215}, "has 9,216 pixels in all its frames, but at most 9,215 are kept"),
            ({"max_bytes": 100}, "is larger than 100 bytes; give a smaller file or raise max_bytes"),
        ):
            with pytest.raises(ValueError, match=message):
                load_video(files[kind], **limit)
    assert counted == 0
    with pytest.raises(ValueError, match="has 6 frames, but at most 5"):
        load_video(files["gif"], max_frames=5)
    assert len(load_video(files["mp4"], max_frames=3, fps=5)) == 3
    assert load_video(files["mp4"], max_total=6 * 64, size=8).frames.shape == (6, 8, 8, 3)
    with pytest.raises(ValueError, match="has 12 frames, but at most 6 are decoded"):
        load_video(files["mp4"], max_frames=6, fps=20)
    with pytest.raises(ValueError, match="frames, but at most 6 are decoded"):
        load_video(files["gif"], max_frames=6, fps=20)


def test_headers_that_lie(files: dict[str, bytes]) -> None:
    big = struct.pack(">HH", 7680, 4320)
    refusals = {
        "8K MP4": (patched(files["mp4"], (b"avc1\0\0\0", 28, big)), "is 7680×4320 = 33,177,600 pixels a frame"),
        "GIF": (files["gif"][:6] + struct.pack("<HH", 65_000, 65_000) + files["gif"][10:], "pixels a frame"),
        "WebP": (patched(files["webp"], (b"VP8X", 12, b"\xff\xff\xff\xff\xff\xff")), "pixels a frame"),
        "10⁹ samples": (
            patched(files["mp4"], (b"stsz", 8, struct.pack(">II", 1, 1_000_000_000))),
            "has 1,000,000,000 frames, but at most 4,096 are decoded",
        ),
        "10⁹ sizes": (patched(files["mp4"], (b"stsz", 12, struct.pack(">I", 1_000_000_000))), "boxes don't fit"),
        "10⁹ times": (
            patched(files["mp4"], (b"stts", 12, struct.pack(">I", 1_000_000_000))),
            "has 1,000,000,000 frames",
        ),
        "10⁹ in a fragment": (
            patched(files["fragments"], (b"trun", 8, struct.pack(">I", 1_000_000_000))),
            "frames, but",
        ),
    }
    for name, (data, message) in refusals.items():
        with pytest.raises(ValueError, match=message):
            load_video(data)
            pytest.fail(name)
    for form, encoder in (("mp4", "libx264"), ("webm", "libvpx")):  # these hold what they say
        true = saved(np.zeros((1, 400, 400, 3), np.uint8), form=form, encoder=encoder)
        with pytest.raises(ValueError, match=r"is 400×400 = 160,000 pixels a frame, but at most 65,000 are decoded"):
            load_video(true, max_pixels=65_000)
    # the track says 48×32, and its pictures are larger
    small = struct.pack(">HH", 48, 32)
    for side in (120, 600):
        large = patched(saved(film(2, side, side)), (b"avc1\0\0\0", 28, small))
        with pytest.raises(ValueError, match=r"pixels a frame, but at most 4,096|has no frames|truncated or damaged"):
            load_video(large, max_pixels=4096)
    chunk = b"acTL" + struct.pack(">II", 1_000_000_000, 0)
    place = files["apng"].find(b"acTL")
    many = files["apng"][:place] + chunk + struct.pack(">I", zlib.crc32(chunk)) + files["apng"][place + 16 :]
    with pytest.raises(ValueError, match="has 1,000,000,000 frames, but at most 4,096 are decoded"):
        load_video(many)


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b'<?xml version="1.0"?><MPD><BaseURL>http://localhost/</BaseURL></MPD>',
        b"http://localhost/x.mp4",
        b"RIFF\x24\0\0\0AVI LIST",
        b"GIF89a\x10\0\x10\0\0\0\0;",
        b"\0\0\0\x08ftyp",
        b"\0\0\0\x10ftypisom\0\0\0\0",
        b"\x1aE\xdf\xa3\x80\x18S\x80g\x80",
        b"\x1aE\xdf\xa3",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_what_is_no_video_is_refused(data: bytes, tmp_path: Path) -> None:
    for name in ("x.mp4", "x.m3u8", "x"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"^the video '.*' is (damaged|truncated)"):
            load_video(tmp_path / name)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    for name, message in (("no.mp4", "is missing"), ("empty.mp4", "is an empty file"), ("x" * 5000, "is missing")):
        with pytest.raises(ValueError, match=message):
            load_video(tmp_path / name)
    for address in ("http://localhost/x.mp4", "concat:/etc/passwd", "file:/etc/passwd"):
        with pytest.raises(ValueError, match="is missing"):
            load_video(address)
    with pytest.raises(ValueError, match="opened as text"):
        load_video(io.StringIO("x"))  # type: ignore[arg-type]


def test_without_ffmpeg_animations_remain(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert not video_files.has_av()
    for kind in ("mp4", "webm"):
        with pytest.raises(ValueError, match=r"needs FFmpeg; pip install 'mm\[video\]', or save it as a GIF"):
            load_video(files[kind])
        with pytest.raises(ValueError, match=r"without FFmpeg; pip install 'mm\[video\]', or write a \.gif"):
            save_video(tmp_path / f"x.{kind}", film(), 10)
    for kind in ("gif", "apng", "webp"):
        assert np.array_equal(load_video(files[kind]).frames, film())
    save_video(tmp_path / "x.gif", film(), 10)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gif"]


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif", "apng", "webp", "fragments"])
def test_files_that_are_cut_off(files: dict[str, bytes], kind: str) -> None:
    data = files[kind]
    found = [outcome(data[:length]) for length in range(0, len(data), max(1, len(data) // 61))]
    assert outcome(data) == "video" and found[0] == "ValueError"
    # a GIF, or a film in fragments, that ends between two frames can't be told from a shorter one; a PNG's last bytes say nothing
    cut = found[: -len(found) // 20] if kind == "apng" else found
    assert kind in ("gif", "fragments") or set(cut) == {"ValueError"}


def outcome(data: bytes) -> str:
    """What comes of loading: a usable video or a ValueError. Anything else fails the test."""
    try:
        video = load_video(data, max_frames=64, max_pixels=1 << 18)
    except ValueError as error:
        assert 10 < len(str(error)) < 500 and "\n" not in str(error) and str(error).startswith("the video")
        return "ValueError"
    assert isinstance(video, Video) and 0 < len(video) <= 64 and video.frames[0].size <= 3 << 18
    return "video"


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed anywhere or in a header, sizes and counts made extreme, parts left out, repeated or cut off."""
    out, how = bytearray(data), rng.integers(5)
    if how == 0:
        out = out[: rng.integers(len(out))]
    elif how == 1:
        for place in rng.integers(0, len(out), rng.choice([1, 4, 32])):
            out[place] = rng.integers(256)
    elif how == 2:
        for _ in range(rng.integers(1, 4)):
            near = int(rng.integers(min(1500, len(out) - 4)))
            place = near if rng.random() < 0.5 else len(out) - 4 - near
            out[place : place + 4] = int(rng.choice([0, 1, 65_535, 10**9, 2**31 - 1, 2**32 - 1])).to_bytes(4, "big")
    else:
        start, end = sorted(rng.integers(0, len(out), 2))
        if how == 3:
            del out[start : min(end, start + 100)]
        else:
            out[start:start] = out[start : min(end, start + 300)]
    return bytes(out)


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif", "apng", "webp", "fragments"])
def test_damaged_files_are_videos_or_refused(files: dict[str, bytes], kind: str) -> None:
    rng = np.random.default_rng(3)
    outcomes = [outcome(damaged(files[kind], rng)) for _ in range(60)]
    assert "ValueError" in outcomes


@pytest.mark.long
def test_ten_thousand_damaged_and_random_files(files: dict[str, bytes]) -> None:
    rng = np.random.default_rng(4)
    starts = [data[:16] for data in files.values()] + [b""]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kinds = list(files)
    outcomes = [outcome(damaged(files[kinds[number % len(kinds)]], rng)) for number in range(7000)]
    for number in range(3000):
        outcomes.append(outcome(starts[number % len(starts)] + rng.bytes(int(rng.integers(2000)))))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (
        1 << 20 if sys.platform == "darwin" else 1 << 10
    )
    assert len(outcomes) == 10_000 and {"video", "ValueError"} == set(outcomes)
    assert grown < 256, f"{grown:.0f} MiB more than before"


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(film()[number]).save(folder / f"frame {2 * number}.png")
    (folder / "notes.txt").write_text("not a picture")
    Image.fromarray(film()[0]).save(folder / ".hidden.png")
    assert np.array_equal(load_video(folder).frames, film()) and load_video(folder).fps == 10
    assert np.array_equal(load_video(folder, fps=5).frames, film()[::2])
    with pytest.raises(ValueError, match="has 6 frames, but at most 5"):
        load_video(folder, max_frames=5)
    (folder / "frame 4.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"frame 3 of 6: the picture '.*frame 4.png' is damaged or not a picture"):
        load_video(folder)
    (folder / "frame 4.png").unlink()
    Image.fromarray(film()[0]).save(tmp_path / "outside.png")
    (folder / "frame 4.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(ValueError, match="is a link that leads out of its folder"):
        load_video(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures to make a video of"):
        load_video(tmp_path / "empty")
