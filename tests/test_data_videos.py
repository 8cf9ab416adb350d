"""Sources of videos: what shards, folders, streams and `datasets` directories give, what is converted, cached, laid out."""

from __future__ import annotations

import io
import json
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm.data.cache import CachedSource, open_cache
from mm.data.convert import to_shards
from mm.data.documents import TextToVideo, VideoToText
from mm.data.example import BrokenExample, Lazy, Source
from mm.data.media import is_video, medium
from mm.data.sources import FolderSource, HFSource, ShardSource
from mm.interfaces import Encoded, Spec
from mm.testing import Frames, write_tar
from mm.video import Video, save_video, to_webp

needs_av = pytest.mark.skipif(find_spec("av") is None, reason="writes MP4: pip install 'mm[video]'")


def film(level: int = 200, count: int = 4) -> Any:
    frames = np.zeros((count, 16, 24, 3), dtype=np.uint8)
    for number in range(count):
        frames[number, :, 4 * number : 4 * number + 8] = level
    return frames


def webp(level: int = 200, count: int = 4) -> bytes:
    return to_webp(Video(film(level, count), 8))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(buffer, format="PNG")
    return buffer.getvalue()


def same(video: Video, level: int = 200, count: int = 4) -> bool:
    return np.array_equal(video.frames, film(level, count)) and video.fps == pytest.approx(8)


def test_which_files_are_videos() -> None:
    names = {
        "video": (
            "mp4",
            "webm",
            "mkv",
            "mov",
            "m4v",
            "cam2.mp4",
            "video.webp",
            "video.gif",
            "video.apng",
            "a.video.gif",
        ),
        "image": ("gif", "webp", "apng", "png", "avideo.gif", "video.png", "videos.webp"),
        "audio": ("wav", "mp3"),
        "": ("video", "txt", "json", "m4a", "mp4.part", "avi"),
    }
    assert {name: medium(name) for of in names.values() for name in of} == {
        name: field for field, of in names.items() for name in of
    }
    assert is_video("x.mp4") and not is_video("x.gif") and medium("clip.video.gif") == "video"


def test_shards_with_videos(tmp_path: Path) -> None:
    members = [
        ("a.video.webp", webp(100)),
        ("a.json", b'{"text": "one", "video": "a field cannot hide the video"}'),
        ("b.webp", webp(90)),
        ("b.video.webp", webp(80)),
        ("b.side.video.webp", webp(70)),
        ("c.mp4", b"\0\0\0\x10ftypisom and no more"),
        ("d.txt", b"no video"),
    ]
    source = ShardSource(write_tar(tmp_path / "x.tar", members))
    first, second = source[0], source[1]
    assert isinstance(dict(first)["video"], Lazy) and first["text"] == "one" and "image" not in first
    assert same(first["video"], 100)
    assert source.raw_picture(0) is None and source.raw_sound(0) is None and source.raw_video(0) == members[0][1]
    # an animation without the word is a picture: its first frame; the first video is `video`, another goes by its suffix
    assert np.array_equal(np.asarray(second["image"]), film(90)[0])
    assert same(second["video"], 80) and same(second["side.video.webp"], 70)
    assert source.raw_picture(1) == webp(90) and source.raw_video(1) == webp(80)
    with pytest.raises(BrokenExample, match=r"x\.tar: c\.mp4: the video is (truncated|damaged)"):
        source[2]["video"]
    assert source.raw_video(3) is None and "video" not in source[3]
    with pytest.warns(UserWarning, match=r"skipped 1 of 4 .*c\.mp4"):
        assert [example["key"] for example in source] == ["a", "b", "d"]


def test_how_much_of_a_video_is_decoded(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.video.webp", webp()), ("a.txt", b"x")])
    small = ShardSource(path, video_size=8, video_fps=4)[0]["video"]
    assert small.frames.shape == (2, 8, 8, 3) and small.fps == 4
    for options, message in (({"max_frames": 3}, "has 4 frames, but at most 3"), ({"max_pixels": 383}, "24×16 = 384")):
        with pytest.raises(BrokenExample, match=message):
            ShardSource(path, **options)[0]["video"]
    with pytest.raises(BrokenExample, match="a size from 1 to"):
        ShardSource(path, video_size=0)[0]["video"]


def test_a_stream_gives_the_videos_that_shards_give(tmp_path: Path) -> None:
    from mm.data.streaming import StreamingShards

    members = [("a.video.webp", webp()), ("a.txt", b"one"), ("b.mp4", b"\0\0\0\x10ftyp"), ("b.txt", b"two")]
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.warns(UserWarning, match=r"skipped 1 of 2 .*b\.mp4"):
        (example,) = StreamingShards(str(path), shuffle=1)
    assert same(example["video"]) and example["text"] == "one"
    with pytest.warns(UserWarning, match="skipped 2 of 2"):
        assert not list(StreamingShards(str(path), shuffle=1, max_frames=3))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    from mm.audio import Audio, to_wav

    sound = to_wav(Audio(np.full(80, 0.5, np.float32), 8000))
    root = tmp_path / "mixed"
    (root / "sub").mkdir(parents=True)
    (root / "a.video.webp").write_bytes(webp(100))
    (root / "a.txt").write_text("a clip")
    (root / "a.wav").write_bytes(sound)
    (root / "b.png").write_bytes(png())
    (root / "b.MP4").write_bytes(webp(90))  # the content says what it is
    (root / "b.webm").write_bytes(b"damaged")
    (root / "b.wav").write_bytes(sound)
    save_video(root / "sub" / "c.video.gif", film(80), 8)
    (root / "d.webp").write_bytes(webp(70))
    rows = [{"file_name": "sub/c.video.gif", "text": "from a row"}, {"file_name": "b.MP4", "caption": "all three"}]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def test_folders_of_videos_pictures_and_sounds(mixed: Path) -> None:
    source = FolderSource(mixed, strict=True)
    assert [source.key(n) for n in range(len(source))] == ["a", "b", "b", "d", "sub/c"]
    kinds = [{name for name in ("image", "audio", "video") if name in source[n]} for n in range(5)]
    assert kinds == [{"audio", "video"}, {"image", "audio", "video"}, {"video"}, {"image"}, {"video"}]
    assert [source[n]["text"] for n in (0, 1, 4)] == ["a clip", "all three", "from a row"]
    assert same(source[0]["video"], 100) and same(source[1]["video"], 90) and same(source[4]["video"], 80)
    assert source.raw_video(0) == webp(100) and source.raw_picture(0) is None and source.raw_video(3) is None
    assert source.raw_picture(1) == png() and source[1]["audio"].seconds == 0.01
    with pytest.raises(BrokenExample, match=r"b\.webm: the video is damaged"):
        source[2]["video"]
    before = source.identity
    (mixed / "b.MP4").write_bytes(webp(91))
    assert FolderSource(mixed).identity != before
    (mixed / "metadata.jsonl").write_text('{"file_name": "e.mp4"}')
    with pytest.warns(UserWarning, match="names 'e.mp4', which is not a picture, a sound or a video"):
        FolderSource(mixed)


def test_shards_of_a_folder_keep_the_files_of_videos(mixed: Path, tmp_path: Path) -> None:
    from mm.commands.data import main

    with pytest.warns(UserWarning, match=r"skipped 1 of 5 .*'mixed': b: the video is damaged"):
        assert main(["shards", str(mixed), "--out", str(tmp_path / "out")]) == 0
    shards = ShardSource(tmp_path / "out" / "data-000000.tar")
    assert [shards.key(n) for n in range(len(shards))] == ["a", "b", "d", "sub/c"]
    gif = (mixed / "sub" / "c.video.gif").read_bytes()
    assert [shards.raw_video(n) for n in range(4)] == [webp(100), webp(90), None, gif]
    assert [shards[n]["text"] for n in (0, 1, 3)] == ["a clip", "all three", "from a row"]
    assert shards.raw_picture(1) == png() and shards[0]["audio"].rate == 8000
    with tarfile.open(tmp_path / "out" / "data-000000.tar") as tar:
        assert {"a.video.webp", "b.video.webp", "sub/c.video.gif"} < set(tar.getnames())


class Made(Source):
    """Two clips that stand in no file."""

    def __init__(self) -> None:
        super().__init__()
        self._finish(["x", "y"], "made")

    @property
    def identity(self) -> str:
        return "made"

    def _fields(self, ordinal: int) -> dict[str, Any]:
        return {"video": Video(film(50 + ordinal), 8), "side": Video(film(9), 8), "caption": "c"}


def test_videos_without_files_are_written_without_loss(tmp_path: Path) -> None:
    (path,) = to_shards(Made(), tmp_path / "out")
    again = ShardSource(path)
    assert same(again[0]["video"], 50) and same(again[1]["video"], 51) and same(again[0]["side.video.webp"], 9)
    (path,) = to_shards(again, tmp_path / "twice")
    assert same(ShardSource(path)[0]["side.video.webp"], 9) and same(ShardSource(path)[0]["video"], 50)


@needs_av
def test_films_in_shards(tmp_path: Path) -> None:
    save_video(tmp_path / "x.mp4", film(), 8)
    data = (tmp_path / "x.mp4").read_bytes()
    source = ShardSource(write_tar(tmp_path / "x.tar", [("a.mp4", data), ("a.txt", b"x")]))
    assert source[0]["video"].frames.shape == (4, 16, 24, 3)
    (path,) = to_shards(source, tmp_path / "out")
    assert ShardSource(path).raw_video(0) == data
    with tarfile.open(path) as tar:
        assert "a.mp4" in tar.getnames()


def test_hf_videos(tmp_path: Path) -> None:
    import datasets

    kind = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = {"clip": [{"bytes": webp(100), "path": None}, {"bytes": None, "path": str(tmp_path / "secret.mp4")}]}
    datasets.Dataset.from_dict(rows, features=datasets.Features({"clip": kind})).save_to_disk(str(tmp_path / "set"))
    info = json.loads((tmp_path / "set" / "dataset_info.json").read_text())
    info["features"]["clip"] = {"_type": "Video"}
    (tmp_path / "set" / "dataset_info.json").write_text(json.dumps(info))
    source = HFSource(tmp_path / "set")
    assert same(source[0]["video"], 100) and source.raw_video(0) == webp(100) and source.raw_picture(0) is None
    with pytest.raises(BrokenExample, match="row 1, clip names a file instead of holding the video"):
        source[1]["video"]


class Means:
    """A tokenizer of videos: the mean level of each frame."""

    spec = Spec(kind="continuous", dim=1, max_grid=(8,), fingerprint="means")

    def encode(self, raw: Video) -> Encoded:
        if len(raw) > 8:
            raise ValueError(f"a video of {len(raw)} frames is longer than 8")
        return Encoded(
            grid=(len(raw),), latents=torch.from_numpy(raw.frames.mean((1, 2, 3), dtype=np.float32))[:, None]
        )

    def encode_batch(self, raws: list[Video]) -> list[Encoded]:
        return [self.encode(raw) for raw in raws]


def test_videos_are_cached_and_become_documents(tmp_path: Path) -> None:
    members = [(f"{n}.video.webp", webp(10 * n, n)) for n in range(1, 5)] + [("5.video.webp", webp(9, 9))]
    members = [member for n, own in enumerate(members, 1) for member in (own, (f"{n}.txt", f"clip {n}".encode()))]
    source = ShardSource(write_tar(tmp_path / "x.tar", members))
    tokenizer: Any = Means()
    with pytest.warns(UserWarning, match=r"skipped 1 of 5 .*a video of 9 frames is longer than 8"):
        cache = open_cache(source, tokenizer, tmp_path / "cache", "video")
    cached = CachedSource(source, {"video": cache})
    for n in range(4):
        assert cached[n]["video"].grid == (n + 1,)
        assert torch.equal(cached[n]["video"].latents, tokenizer.encode(source[n]["video"]).latents)
        assert cached.raw_video(n) == source.raw_video(n)
    rng = torch.Generator().manual_seed(0)
    text, clip = TextToVideo(drop=0.0)(cached[2], rng)
    assert (text.modality, text.content, text.loss) == ("text", "clip 3", False)
    assert (clip.modality, clip.loss) == ("video", True) and clip.content.grid == (3,)
    clip, text = VideoToText(video="film")(cached[2], rng)
    assert (clip.modality, clip.loss, text.modality, text.content, text.loss) == ("film", False, "text", "clip 3", True)
    assert TextToVideo(drop=1.0)(cached[2], rng)[0].modality == "null"
    with pytest.raises(BrokenExample, match="couldn't be encoded"):
        TextToVideo()(cached[4], rng)
    with pytest.raises(ValueError, match="drop is a probability"):
        TextToVideo(drop=2)


def test_the_data_module_caches_videos_by_default(tmp_path: Path) -> None:
    from mm.data.feeds import Part
    from mm.data.module import MultimodalDataModule

    source = ShardSource(write_tar(tmp_path / "x.tar", [("a.video.webp", webp()), ("a.txt", b"x")]))
    module = MultimodalDataModule(
        [Part(source=source, template=TextToVideo())],
        to_stream=lambda *_: pytest.fail("not laid out"),
        tokenizers={"video": Means(), "text": Frames()},  # type: ignore[dict-item]
        cache=str(tmp_path),
    )
    module.setup()
    assert isinstance(module._with_caches(module.parts["train"])[0].source[0]["video"], Encoded)
