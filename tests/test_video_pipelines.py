"""Pipelines of video with tiny random models: numbers of frames, what is given, streams, captions, files, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mm
from mm.backbone import BackboneConfig
from mm.cli import main as run_mm
from mm.generation import Event
from mm.heads.lm import LMHead
from mm.heads.regression import RegressionHead
from mm.interfaces import Decoded, Encoded, Modality, ModalityTokenizer, Spec
from mm.media import load_image
from mm.model import MultimodalModel
from mm.orders.blocks import Blocks
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.pipelines.image_to_text import ImageToTextPipeline
from mm.pipelines.media import medium_of
from mm.pipelines.outputs import VideoOutput
from mm.pipelines.text_to_video import TextToVideoPipeline
from mm.sheet import strips
from mm.testing import Levels, tiny
from mm.tokenizers.text_bytes import TextBytes
from mm.tokenizers.video_frames import VideoFrames
from mm.tokenizers.video_vae import VideoVAE
from mm.training import ModelTraining
from mm.video import Video, load_video, save_video, square

FPS, CELLS, SIDE, MOST = 8.0, 2, 4, 5
"""Of the toy tokenizers: frames a second, cells a side, pixels a side, steps in time of the longest clip."""


class Cells(ModalityTokenizer):
    """A clip as the mean colour of each quarter of a frame: a vector, or the nearest of 8 colours. `stride` frames are one step
    in time, but for the first."""

    def __init__(self, kind: str = "continuous", stride: int = 1) -> None:
        self.kind, self.stride = kind, stride

    @property
    def spec(self) -> Spec:
        values: dict[str, Any] = (
            {"kind": "continuous", "dim": 3} if self.kind == "continuous" else {"kind": "discrete", "vocab_size": 8}
        )
        grid = (MOST, CELLS, CELLS)
        return Spec(max_grid=grid, fps=FPS, frame_stride=self.stride, fingerprint=self.kind, **values)

    def encode(self, raw: Video) -> Encoded:
        frames = square(raw, SIDE).frames.astype(np.float32) / 127.5 - 1
        steps, odd = divmod(len(frames) - 1, self.stride)
        if odd:
            raise ValueError(f"got {len(frames)} frames")
        cells = frames.reshape(len(frames), CELLS, SIDE // CELLS, CELLS, SIDE // CELLS, 3).mean((2, 4))
        later = cells[1:].reshape(steps, self.stride, CELLS, CELLS, 3).mean(1)
        values = torch.tensor(np.concatenate((cells[:1], later))).view(-1, 3)
        grid = (1 + steps, CELLS, CELLS)
        if self.kind == "continuous":
            return Encoded(grid=grid, latents=values)
        return Encoded(grid=grid, ids=((values > 0).long() * torch.tensor([4, 2, 1])).sum(-1))

    def decode(self, encoded: Encoded) -> Decoded:
        return Decoded(value=Video(self.pictures(encoded.content, np.zeros((0, SIDE, SIDE, 3), np.uint8)), FPS))

    def pictures(self, content: torch.Tensor, before: Any) -> Any:
        """Frames of steps that follow others: each also shows a little of the frame before it."""
        if self.kind != "continuous":
            content = ((content[:, None] // torch.tensor([4, 2, 1])) % 2) * 2.0 - 1
        cells = content.nan_to_num().view(-1, CELLS, CELLS, 3).numpy()
        large = cells.repeat(SIDE // CELLS, axis=1).repeat(SIDE // CELLS, axis=2)
        counts = [self.stride] * len(large) if len(before) else [1, *[self.stride] * (len(large) - 1)]
        frames = ((large.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).repeat(counts, axis=0)
        both = np.concatenate((before[-1:], frames)).astype(np.int64)
        for number in range(1, len(both)):
            both[number] = (3 * both[number] + both[number - 1]) // 4
        return both[len(before[-1:]) :].astype(np.uint8)


class Streaming(Cells):
    """The same, which goes on decoding from where it was."""

    def streaming(self) -> Any:
        class Decoder:
            before = np.zeros((0, SIDE, SIDE, 3), np.uint8)

            def decode(this, content: torch.Tensor) -> Any:
                this.before = self.pictures(content, this.before)
                return this.before

        return Decoder()


class Written(ModalityTokenizer):
    """A clip as a list of free length: an id a frame, its brightness, and one that ends it."""

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=9, stop=8, fps=FPS, spatial=False, fingerprint="written")

    def encode(self, raw: Video) -> Encoded:
        ids = torch.tensor(raw.frames.mean((1, 2, 3)) // 32).long()
        return Encoded(grid=(len(ids) + 1,), ids=torch.cat((ids, torch.tensor([8]))))

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.ids is not None
        ids = encoded.ids[encoded.ids < 8]
        frames = np.zeros((max(1, len(ids)), SIDE, SIDE, 3), dtype=np.uint8)
        frames[: len(ids)] = (ids.numpy() * 32).astype(np.uint8)[:, None, None, None]
        ended = bool(len(encoded.ids) and encoded.ids[-1] == 8)
        return Decoded(value=Video(frames, FPS), valid=ended, reason="" if ended else "it doesn't end")


def continuous(stride: int = 1, tokenizer: type[Cells] = Cells, **settings: Any) -> MultimodalModel:
    order = Blocks(**{"frames": 2, "sampler": {"steps": 2}, **settings})
    return tiny(order, tokenizer=tokenizer(stride=stride), head=RegressionHead())


def codes() -> MultimodalModel:
    return tiny(Raster(), tokenizer=Cells("discrete"), head=LMHead())


def masked() -> MultimodalModel:
    return tiny(Masked(steps=3), tokenizer=Cells("discrete"), head=LMHead())


def strided() -> MultimodalModel:
    return continuous(2, Streaming)


def written() -> MultimodalModel:
    return tiny(Raster(), tokenizer=Written(), head=LMHead())


@pytest.fixture(params=[continuous, codes, masked, strided])
def filmer(request: pytest.FixtureRequest) -> TextToVideoPipeline:
    return TextToVideoPipeline(request.param())


def clip(count: int, seed: int = 0, side: int = SIDE) -> Video:
    """Bright and dark quarters: those which `Cells` of either kind keep."""
    cells = np.random.default_rng(seed).integers(0, 2, (count, CELLS, CELLS, 3), dtype=np.uint8) * 255
    return Video(cells.repeat(side // CELLS, 1).repeat(side // CELLS, 2), FPS)


def alike(one: list[Any], other: list[Any]) -> bool:
    """Equal up to the rounding of batches of other shapes."""
    return len(one) == len(other) and all(
        a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1
        for a, b in zip(one, other, strict=True)
    )


# --- what comes out -------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert mm.TextToVideoPipeline is TextToVideoPipeline and mm.Video is Video and mm.load_video is load_video
    assert medium_of(Cells().spec) == medium_of(Written().spec) == "video"


def test_counts_and_kinds(filmer: TextToVideoPipeline) -> None:
    out = filmer(["a seven", None], num_videos=2, seed=0)
    stride = filmer.tokenizer("image").spec.frame_stride
    assert isinstance(out, VideoOutput) and out.captions == ["a seven"] * 2 + [""] * 2 and out.seed == 0
    assert {(video.shape, video.dtype.name) for video in out.videos} == {((1 + 4 * stride, SIDE, SIDE, 3), "uint8")}
    assert out.fps == FPS and out.valid == [True] * 4 and out.reasons == [""] * 4
    assert {item.grid for item in out.tokens} == {(MOST, CELLS, CELLS)}
    assert len({video.tobytes() for video in out.videos}) == 4
    assert filmer([], seed=0).videos == []


def test_a_seed_means_the_same_in_any_batch(filmer: TextToVideoPipeline) -> None:
    many = filmer(["red", "blue", "red"], num_videos=2, seed=5).videos
    assert alike(many[2:4], filmer("blue", num_videos=2, seed=5).videos)
    assert alike(many[:2] + many[4:], filmer("red", num_videos=4, seed=5).videos)
    filmer.batch_size = 2
    assert alike(filmer(["red", "blue", "red"], num_videos=2, seed=5).videos, many)
    assert not alike(filmer("blue", num_videos=2, seed=6).videos, many[2:4])
    generator = torch.Generator().manual_seed(1)
    first, second = filmer("red", generator=generator), filmer("red", generator=generator)
    assert first.seed != second.seed and alike(filmer("red", seed=second.seed).videos, second.videos)


def test_the_steps_make_the_call(filmer: TextToVideoPipeline) -> None:
    whole = filmer("red", num_videos=2, num_frames=3, image=picture(), seed=4)
    given = filmer.given(image=picture())
    tokens = filmer.generate(filmer.encode(["red"]), num_videos=2, grid=filmer.grid(3, given), given=given, seed=4)
    assert all(torch.equal(a.content, b.content) for a, b in zip(tokens, whole.tokens, strict=True))
    assert alike(filmer.decode(tokens, 3), whole.videos)
    assert filmer.generate(filmer.encode(["red"]))[0].grid == (MOST, CELLS, CELLS)


def picture() -> Image.Image:
    return Image.fromarray(clip(1, seed=9).frames[0])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_so_many_frames(filmer: TextToVideoPipeline, count: int) -> None:
    out = filmer("red", num_frames=count, seed=1)
    stride = filmer.tokenizer("image").spec.frame_stride
    assert len(out.videos[0]) == count and out.tokens[0].grid[0] == 1 + math.ceil((count - 1) / stride)


def test_callback(filmer: TextToVideoPipeline) -> None:
    events: list[Event] = []
    filmer("red", num_videos=2, seed=0, callback=events.append)
    for row in range(2):
        done = [event.done for event in events if event.row == row]
        assert done == sorted(done) and len(done) > 1 and done[-1] == 1.0


# --- what is given --------------------------------------------------------------------------------------------------


def test_a_picture_is_the_first_frame(filmer: TextToVideoPipeline) -> None:
    out = filmer(["red", "blue"], image=picture(), seed=2)
    stride = filmer.tokenizer("image").spec.frame_stride
    assert {len(video) for video in out.videos} == {1 + 4 * stride}
    for video, free in zip(out.videos, filmer(["red", "blue"], seed=2).videos, strict=True):
        assert np.array_equal(video[0], np.asarray(picture())) and not np.array_equal(video, free)
    flat = Image.new("RGB", (40, 20), "red")
    assert (filmer("red", image=flat, seed=2).videos[0][0] == (255, 0, 0)).all(), "any size is fitted"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_clip_goes_on(count: int) -> None:
    filmer, before = TextToVideoPipeline(continuous()), clip(count)
    reproduced = Cells().decode(Cells().encode(before)).value.frames
    out = filmer("red", video=before, seed=3)
    assert len(out.videos[0]) == MOST and np.array_equal(out.videos[0][:count], reproduced)
    assert len({video[count:].tobytes() for video in filmer("red", num_videos=3, video=before, seed=3).videos}) == 3


def test_of_a_clip_the_end_is_kept() -> None:
    filmer = TextToVideoPipeline(strided())
    kept = filmer.given(video=clip(4))
    assert kept is not None and kept.grid == (2, CELLS, CELLS)
    assert torch.equal(kept.content, Cells(stride=2).encode(Video(clip(4).frames[1:], FPS)).content)
    assert len(filmer("red", video=clip(4), num_frames=4, seed=0).videos[0]) == 4


def test_sources_of_clips(tmp_path: Path) -> None:
    """Files are brought to the model's rate; frames without a rate are taken as they are."""
    filmer, frames = TextToVideoPipeline(continuous()), clip(3).frames
    save_video(tmp_path / "a.gif", frames, FPS)
    save_video(tmp_path / "fast.gif", frames.repeat(2, axis=0), 2 * FPS)
    (tmp_path / "folder").mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "folder" / f"{number}.png")
    wanted = filmer.given(video=clip(3))
    assert wanted is not None
    data = (tmp_path / "a.gif").read_bytes()
    for source in (frames, list(frames), tmp_path / "a.gif", str(tmp_path / "fast.gif"), tmp_path / "folder", data):
        given = filmer.given(video=source)
        assert given is not None and torch.equal(given.content, wanted.content)
    slow = filmer.given(video=Video(frames[:2], FPS / 2))
    assert slow is not None and slow.grid[0] == 4


def test_beyond_the_training() -> None:
    """An order with a window goes on."""
    filmer = TextToVideoPipeline(continuous(window=2))
    out = filmer(["red", "blue"], num_frames=14, image=picture(), seed=0)
    assert {len(video) for video in out.videos} == {14} and out.tokens[0].grid == (14, CELLS, CELLS)
    assert alike(filmer(["red"], num_frames=14, image=picture(), seed=0).videos, out.videos[:1])
    assert alike([np.concatenate(list(filmer.stream("red", num_frames=14, image=picture(), seed=0)))], out.videos[:1])
    assert len(filmer("red", video=clip(MOST), num_frames=9, seed=0).videos[0]) == 9


# --- while it is generated ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"image": True}, {"num_frames": 4}])
def test_a_stream_is_the_whole(filmer: TextToVideoPipeline, given: dict[str, Any]) -> None:
    options = {**given, "image": picture()} if "image" in given else given
    whole = filmer("red", seed=7, **options).videos[0]
    pieces = list(filmer.stream("red", seed=7, **options))
    assert all(len(piece) for piece in pieces) and alike([np.concatenate(pieces)], [whole])
    assert len(pieces) > 1 or isinstance(filmer.model.modalities[1].order, Masked)


def test_a_stream_comes_while_it_is_generated() -> None:
    filmer = TextToVideoPipeline(continuous())
    steps = 0
    evaluate = filmer.model.forward

    def counted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        return evaluate(*args)

    filmer.model.forward = counted  # type: ignore[method-assign, assignment]
    seen = []
    for _ in filmer.stream("red", seed=0):
        seen.append(steps)
    assert seen == sorted(seen)
    filmer("red", seed=0)
    whole, steps = steps, 0
    stream = filmer.stream("red", seed=0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert 0 < steps < whole, "closing it ends the work"


def test_tokenizers_with_networks(tmp_path: Path) -> None:
    """Of the project: a stream decodes from where it was, whatever the pieces, and a checkpoint holds them."""
    vectors = tiny(Blocks(frames=2, window=3, sampler={"steps": 2}), tokenizer=VideoVAE.tiny(), head=RegressionHead())
    framewise = tiny(Raster(), tokenizer=VideoFrames.tiny(), head=LMHead())
    for model, count in ((vectors, 24), (framewise, 2)):
        filmer = TextToVideoPipeline(model)
        image = Image.new("RGB", (20, 16), "red")
        whole = filmer("red", num_frames=count, image=image, seed=1).videos[0]
        pieces = list(filmer.stream("red", num_frames=count, image=image, seed=1))
        assert len(whole) == count and len(pieces) > 1 and alike([np.concatenate(pieces)], [whole])
        again = TextToVideoPipeline.from_pretrained(filmer.save_pretrained(tmp_path / str(count)))
        assert alike(again("red", num_frames=count, image=image, seed=1).videos, [whole])


# --- files of free length ---------------------------------------------------------------------------------------------


def test_clips_that_are_written_as_files() -> None:
    filmer = TextToVideoPipeline(written())
    out = filmer("red", num_videos=3, seed=1)
    for video, item, valid, reason in zip(out.videos, out.tokens, out.valid, out.reasons, strict=True):
        assert valid == (int(item.content[-1]) == 8) and (reason == "") == valid
        assert len(video) == max(1, int((item.content < 8).sum()))
    assert alike([np.concatenate(list(filmer.stream("red", seed=1)))], out.videos[:1])
    going_on = filmer("red", video=clip(3), seed=1)
    head = Written().encode(clip(3)).content[:-1]
    assert torch.equal(going_on.tokens[0].content[:3], head) and len(going_on.tokens[0]) > 3
    with pytest.raises(ValueError, match="decides by itself how long its clips are; leave num_frames out"):
        filmer("red", num_frames=3)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": ""}, "the prompt is empty; say what the video shows"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": 3}, "got a int for a prompt; give a string, None, or a list"),
        ({"prompt": ["a", 3]}, "got a int for a text"),
        ({"prompt": "x" * 300}, "the context holds 256; shorten the prompt"),
        ({"num_videos": 0}, "num_videos must be at least 1, got 0"),
        ({"num_videos": 10**6}, "num_videos is 1,000,000, and one call makes up to 100,000"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"num_frames": -3}, "num_frames must be at least 1"),
        ({"num_frames": 2.5}, "num_frames must be a whole number"),
        ({"num_frames": True}, "num_frames must be a whole number"),
        ({"num_frames": 10**9}, "num_frames is 1,000,000,000, and one call makes up to 100,000"),
        ({"num_frames": 6}, "num_frames is 6, and this model makes up to 5: only a blocks order with a window goes on"),
        ({"image": "none.png"}, "'none.png' is missing"),
        ({"image": b"no picture"}, "damaged or not a picture"),
        ({"video": "none.mp4"}, "'none.mp4' is missing"),
        ({"video": b"\0\0\0\x18ftypisom broken"}, "the video is truncated"),
        ({"video": b"GIF89a"}, "damaged or not a picture"),
        ({"video": 3}, "got a int for a video"),
        ({"video": np.zeros((0, 4, 4, 3), np.uint8)}, "no frames"),
        ({"video": np.full((2, 4, 4, 3), 1.5)}, "floating-point numbers beyond 0 to 1"),
        ({"video": clip(6)}, "the clip has 6 frames at 8 a second, and the model reads up to 5; give its end"),
        ({"video": clip(5)}, "5 frames are given, which leaves nothing to make of the 5 that the model makes"),
        ({"video": clip(3), "num_frames": 3}, "3 frames are given, which leaves nothing to make of num_frames=3"),
        ({"image": Image.new("RGB", (4, 4)), "video": clip(2)}, "got both image and video"),
        ({"heat": 1}, "unknown option 'heat'"),
        ({"temperature": -1.0}, "temperature"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_what_is_refused(wrong: dict[str, Any], message: str) -> None:
    filmer = TextToVideoPipeline(continuous())
    with pytest.raises(ValueError, match=message) as caught:
        filmer(**{"prompt": "red", **wrong})
    assert "\n" not in str(caught.value)


def test_models_that_can_not() -> None:
    with pytest.raises(
        ValueError, match=r"no modality of video; it has text, image; models that make or read video are"
    ):
        TextToVideoPipeline(tiny())("red")
    with pytest.raises(ValueError, match="no modality of pictures; it has text, image"):
        mm.TextToImagePipeline(continuous())("red")
    with pytest.raises(ValueError, match="a stream shows one clip"):
        TextToVideoPipeline(continuous()).stream(["red"])  # type: ignore[arg-type]

    class Read(Cells):
        decodes = False

    with pytest.raises(ValueError, match="reads 'image' and can't make it"):
        TextToVideoPipeline(continuous(tokenizer=Read))("red")

    class Odd(Cells):
        def encode(self, raw: Video) -> Encoded:
            return Encoded(grid=(len(raw.frames), 1, 1), latents=torch.zeros(len(raw.frames), 3))

    with pytest.raises(
        ValueError, match=r"has \(1, 1\) elements a frame, and the model makes \(2, 2\); scale it first"
    ):
        TextToVideoPipeline(continuous(tokenizer=Odd))("red", video=clip(2))


# --- files ----------------------------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    out = TextToVideoPipeline(codes())("red", num_videos=2, seed=0)
    places = out.save(tmp_path / "red.gif")
    assert [place.name for place in places] == ["red-01.gif", "red-02.gif"]
    for place, frames in zip(places, out.videos, strict=True):
        assert np.array_equal(load_video(place).frames, frames)
    (large,) = VideoOutput(out.videos[:1], FPS, ["red"], out.tokens[:1], [True], [""], 0).save(
        tmp_path / "l.webp", scale=3
    )
    assert np.array_equal(load_video(large).frames, out.videos[0].repeat(3, 1).repeat(3, 2))
    with pytest.raises(ValueError, match="unknown ending '.exe'"):
        out.save(tmp_path / "red.exe")
    with pytest.raises(ValueError, match="scale must be a whole number from 1 to 64"):
        out.save(tmp_path / "red.gif", scale=0)
    sheet = out.sheet(columns=3, scale=2)
    assert sheet.width == 4 + 2 * (3 * (SIDE + 1) - 1) + 4
    with pytest.raises(ValueError, match="a clip has no frames"):
        strips([out.videos[0][:0]])


def test_mp4(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="MP4 needs av")
    out = TextToVideoPipeline(codes())("red", seed=0)
    (place,) = out.save(tmp_path / "red")
    assert place.name == "red.mp4"
    with av.open(str(place)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.frames == MOST and float(stream.average_rate) == FPS
    data = place.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "browsers begin to play before all is there"


def test_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.pipelines.outputs.has_av", lambda: False)
    out = TextToVideoPipeline(codes())("red", seed=0)
    assert [place.name for place in out.save(tmp_path / "red")] == ["red.gif"]


# --- video in, text out; documents ----------------------------------------------------------------------------------


def test_captions_of_clips(tmp_path: Path) -> None:
    reader, one = ImageToTextPipeline(codes()), clip(3)
    save_video(tmp_path / "a.gif", one)
    wanted = reader(one, max_tokens=6, seed=0)
    assert len(wanted.texts) == 1 and wanted.tokens[0].grid[0] <= 6
    both = reader([one, clip(4, seed=1)], max_tokens=6, seed=0)
    assert both.texts[0] == wanted.texts[0] and len(both.texts) == 2
    for source in (one.frames, tmp_path / "a.gif", str(tmp_path / "a.gif"), (tmp_path / "a.gif").read_bytes()):
        assert reader(source, max_tokens=6, seed=0).texts == wanted.texts
    with pytest.raises(
        ValueError, match="a clip has 6 frames at 8 a second, and 'image' holds up to 5 at a time; cut it"
    ):
        reader(clip(6))
    with pytest.raises(ValueError, match="no modality of video"):
        ImageToTextPipeline(tiny())(one)
    assert ImageToTextPipeline(written())(clip(6), max_tokens=4, seed=0).texts


def test_documents(tmp_path: Path) -> None:
    pipeline = AnyToAnyPipeline(codes())
    save_video(tmp_path / "a.gif", clip(2))
    documents: list[list[Any]] = [["one:", clip(2), "two:"], ["one:", tmp_path / "a.gif", "two:"]]
    out = pipeline(documents, to=["image"], max_tokens=1, seed=0)
    assert len(out.videos) == 2 and all(isinstance(video, Video) and len(video) == MOST for video in out.videos)
    places = out.save(tmp_path / "out")
    films = [place for place in places if place.suffix in (".mp4", ".gif")]
    assert len(films) == 2 and load_video(films[0]).frames.shape == (MOST, SIDE, SIDE, 3)


def test_samples_of_training(tmp_path: Path) -> None:
    """Clips for the sample prompts, as a sheet and as a GIF in which they play side by side."""

    def training(tokenizer: ModalityTokenizer) -> ModelTraining:
        modalities = [
            Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
            Modality(name="video", tokenizer=tokenizer, head=LMHead(), order=Raster()),
        ]
        config = BackboneConfig(width=16, layers=1, heads=2, kv_heads=1)
        return ModelTraining(config, modalities, sample_prompts=["red", "blue"])

    training(Cells("discrete")).log_samples(str(tmp_path))
    together = load_video(tmp_path / "samples" / "step-000000.gif")
    assert len(together) == MOST and together.size == (2 * 128, 128)
    assert load_image(tmp_path / "samples" / "step-000000.png").width > MOST * SIDE
    with pytest.raises(
        ValueError, match="sample_prompts asks for pictures, clips or shapes, which no modality here makes"
    ):
        training(Levels(num_codes=1))


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint `m` of video; its model is made of parts of this file, which no checkpoint may name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mm.hub.resolve", lambda name: name)
    monkeypatch.setattr("mm.hub.read_config", lambda folder: {})
    monkeypatch.setattr("mm.hub.load_sampling", lambda config: {})
    monkeypatch.setattr("mm.hub.load_pretrained", lambda name: tiny() if name == "mm-tiny" else codes())
    return tmp_path


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_mm(["generate", "A seven", "--to", "video", "--model", "m", "--seed", "1", "--out", "seven.gif"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "wrote seven.gif (5 frames, 0.62 s, 256×256)\n" and "1 video in" in printed.err
    large = load_video(here / "seven.gif")
    assert large.size == (256, 256) and large.fps == pytest.approx(FPS, rel=0.02)
    whole = TextToVideoPipeline(codes())("A seven", seed=1).videos[0]
    assert np.array_equal(large.frames[:, ::64, ::64], whole)
    arguments = ["generate", "A seven", "--to", "video", "--model", "m", "--num", "2", "--frames", "3", "--seed", "1"]
    assert run_mm([*arguments, "--scale", "2", "--out", "clips/"]) == 0
    out = capsys.readouterr().out
    assert out.count("(3 frames, 0.38 s, 8×8)") == 2 and out.endswith("sheet.png\n")
    assert len(list((here / "clips").iterdir())) == 3
    for _ in range(2):  # each has a name of its own
        assert run_mm(["generate", "A seven", "--to", "video", "--model", "m", "--seed", "1"]) == 0
    assert len(list(here.glob("a-seven*"))) == 2


def test_the_command_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_video(here / "a.gif", clip(3))
    picture().save(here / "a.png")
    common = ["generate", "--to", "video", "--model", "m", "--seed", "1", "--scale", "1", "--out", "out.gif", "--from"]
    for file, given in (("a.gif", {"video": clip(3)}), ("a.png", {"image": picture()})):
        assert run_mm([*common, file]) == 0
        whole = TextToVideoPipeline(codes())(None, seed=1, **given).videos[0]
        assert np.array_equal(load_video(here / "out.gif").frames, whole)
    capsys.readouterr()
    arguments = ["generate", "--to", "text", "--model", "m", "--max-tokens", "5", "--seed", "0", "--from", "a.gif"]
    assert run_mm(arguments) == 0
    said = ImageToTextPipeline(codes())(clip(3), max_tokens=5, seed=0).texts[0]
    assert capsys.readouterr().out == said + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["red"], "'mm-tiny' makes text and image, not 'video'; models that make or read video are"),
        ([], "the prompt is empty; say what the video shows"),
        (["red", "--frames", "0", "--model", "m"], "--frames must be at least 1, got 0; leave it out"),
        (["red", "--steps", "0", "--model", "m"], "--steps must be at least 1, got 0"),
        (["red", "--denoising-steps", "-1", "--model", "m"], "--denoising-steps must be at least 1, got -1"),
        (["red", "--to", "3d", "--scales", "0", "--model", "m"], "--scales must be at least 1, got 0"),
        (["red", "--to", "text", "--max-tokens", "0", "--model", "m"], "--max-tokens must be at least 1, got 0"),
        (["red", "--frames", "99", "--model", "m"], "num_frames is 99, and this model makes up to 5"),
        (["red", "--scale", "99"], "--scale is from 1 to 64, got 99"),
        (["red", "--from", "a.png", "b.png"], "--to video goes on from one picture or clip, got 2 in --from"),
        (["red", "--model", "m", "--from", "none.gif"], "'none.gif' is missing"),
        (["red", "--out", "x.exe"], "unknown ending '.exe'"),
        (["red", "--to", "image", "--frames", "3"], "--frames goes with --to video"),
        (["red", "--to", "image", "--model", "m"], "'m' makes text and video, not 'image'"),
        (["red", "--mask", "a.png"], "--mask goes with --to image"),
    ],
)
def test_what_the_command_refuses(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_mm(["generate", "--to", "video", *arguments]) == 2
    assert message in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not list(here.iterdir())
