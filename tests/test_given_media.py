"""What pipelines and `mm generate` take for a picture or a clip: arrays, folders, clips that are too long. Tiny random models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm.backbone import BackboneConfig
from mm.cli import main as run_mm
from mm.heads.lm import LMHead
from mm.interfaces import Decoded, Encoded, Modality, ModalityTokenizer, Spec
from mm.model import MultimodalModel
from mm.orders.raster import Raster
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.pipelines.image_to_text import ImageToTextPipeline
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.pipelines.text_to_video import TextToVideoPipeline
from mm.testing import Palette, tiny
from mm.tokenizers.text_bytes import TextBytes
from mm.video import Video, load_video, save_video, square

FPS, MOST = 8.0, 5
"""Of the toy tokenizer: frames a second, steps in time of the longest clip."""


class Bright(ModalityTokenizer):
    """A clip as one id for every `stride` frames (but for the first): their brightness."""

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="discrete",
            vocab_size=8,
            max_grid=(MOST, 1, 1),
            fps=FPS,
            frame_stride=self.stride,
            fingerprint="bright",
        )

    def encode(self, raw: Video) -> Encoded:
        assert (len(raw) - 1) % self.stride == 0
        levels = torch.tensor(square(raw, 4).frames.mean((1, 2, 3)) // 32).long()
        return Encoded(grid=(1 + (len(raw) - 1) // self.stride, 1, 1), ids=levels[:: self.stride])

    def decode(self, encoded: Encoded) -> Decoded:
        levels = (encoded.content * 32).to(torch.uint8).numpy()
        frames = np.concatenate((levels[:1], levels[1:].repeat(self.stride)))
        return Decoded(value=Video(frames[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3), FPS))


def films(stride: int = 1) -> MultimodalModel:
    return tiny(tokenizer=Bright(stride))


def both() -> MultimodalModel:
    """Of text, pictures and clips."""
    torch.manual_seed(0)
    config = BackboneConfig(width=32, layers=2, heads=4, kv_heads=2)
    named: list[tuple[str, ModalityTokenizer]] = [("text", TextBytes()), ("image", Palette()), ("film", Bright())]
    modalities = [Modality(name=name, tokenizer=made, head=LMHead(), order=Raster()) for name, made in named]
    return MultimodalModel(config, modalities, context=256).eval()


def clip(count: int) -> Video:
    """Each frame has another level, as `Bright` keeps them."""
    return Video(
        (np.arange(count) % 8 * 32).astype(np.uint8)[:, None, None, None] + np.zeros((1, 4, 4, 3), np.uint8), FPS
    )


def levels(video: Any) -> list[int]:
    return [int(level) // 32 for level in np.asarray(video)[:, 0, 0, 0]]


# --- pictures as arrays -----------------------------------------------------------------------------------------------


def test_arrays_of_pictures() -> None:
    """They were refused: only their files and Pillow's pictures were taken."""
    picture = Image.new("RGB", (4, 4), "red")
    pixels = np.asarray(picture)
    reader = ImageToTextPipeline(both())
    said = reader(picture, max_tokens=8).texts
    for given in (pixels, pixels / 255, [pixels], [pixels.astype(np.float32) / 255]):
        assert reader(given, max_tokens=8).texts == said
    grey = reader(pixels[..., 0], max_tokens=8).texts
    assert grey == reader(Image.fromarray(pixels[..., 0]), max_tokens=8).texts
    assert [reader.is_clip(x) for x in (pixels, pixels[..., 0], pixels[None], np.zeros((3, 4, 5), np.uint8))] == [
        False, False, True, True,
    ]  # fmt: skip
    talker = AnyToAnyPipeline(both())
    first = talker(["a", picture], to="image", max_tokens=4, seed=0).documents
    again = talker(["a", pixels], to="image", max_tokens=4, seed=0).documents
    assert first[0][0].tobytes() == again[0][0].tobytes()
    filmed = TextToVideoPipeline(films())("red", image=np.full((6, 9, 3), 0.6), seed=0).videos[0]
    assert len(filmed) == MOST and levels(filmed)[0] == 153 // 32
    with pytest.raises(ValueError, match=re.escape("got [2, 2, 4, 4]")):
        reader.encode_pictures([np.zeros((2, 2, 4, 4), np.uint8)])
    with pytest.raises(ValueError, match="holds uint8, bool, or floating-point numbers from 0 to 1, got int64"):
        reader(pixels.astype(np.int64))


def test_a_mask_of_truth_values() -> None:
    painter = TextToImagePipeline(tiny())
    pixels = np.zeros((4, 4, 3), np.uint8)
    anew = np.arange(4)[:, None].repeat(4, 1) >= 2
    made = np.asarray(painter("red", image=pixels, mask=anew, num_images=4, seed=0).images)
    assert not made[:, :2].any() and made[:, 2:].any()


# --- clips that are too long ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "count", "asked", "kept"),
    [
        (1, 4, None, 4),  # as it was
        (1, 5, None, 3),  # nothing would be left
        (1, 40, None, 3),
        (1, 40, 3, 2),
        (1, 40, 2, 1),
        (2, 8, None, 8),  # five steps of two frames, the first of one; an odd frame at the beginning goes later
        (2, 9, None, 5),
        (2, 40, None, 5),
    ],
)
def test_of_a_long_clip_the_end(stride: int, count: int, asked: int | None, kept: int) -> None:
    filmer = TextToVideoPipeline(films(stride))
    end = filmer.ending(clip(count), asked)
    assert levels(end.frames) == levels(clip(count).frames[-kept:]) and end.fps == FPS
    out = filmer("red", video=end, num_frames=asked, seed=0).videos[0]
    assert len(out) == (asked or 1 + (MOST - 1) * stride)
    given = 1 + (kept - 1) // stride * stride
    assert stride > 1 or levels(out)[:given] == levels(clip(count).frames[-given:])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkpoints `films`, `pictures` and `both`, which no checkpoint may name."""
    monkeypatch.chdir(tmp_path)
    models: dict[str, Callable[[], MultimodalModel]] = {"films": films, "pictures": tiny, "both": both}
    monkeypatch.setattr("mm.hub.resolve", lambda name: name)
    monkeypatch.setattr("mm.hub.read_config", lambda folder: {})
    monkeypatch.setattr("mm.hub.load_sampling", lambda config: {})
    monkeypatch.setattr("mm.hub.load_pretrained", lambda name: models[name]())
    (tmp_path / "folder").mkdir()
    for number, frame in enumerate(clip(3).frames):
        Image.fromarray(frame).save(tmp_path / "folder" / f"{number}.png")
    return tmp_path


def test_the_command_cuts_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_video(here / "long.gif", clip(7))
    common = ["generate", "red", "--to", "video", "--model", "films", "--seed", "1", "--scale", "1", "--out", "out.gif"]
    assert run_mm([*common, "--from", "long.gif"]) == 0
    said = capsys.readouterr().err
    assert "long.gif has 7 frames at 8 a second, more than can be gone on from: its last 3 are given\n" in said
    assert levels(load_video(here / "out.gif").frames)[:3] == [4, 5, 6]
    save_video(here / "short.gif", clip(2))
    assert run_mm([*common, "--from", "short.gif"]) == 0
    assert "gone on from" not in capsys.readouterr().err


# --- models that write no text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("directions", "arguments", "message"),
    [
        ({("text", "film")}, ["a"], "training showed 'both' no text to write; use --to video or another model"),
        (
            {("text", "film"), ("image", "film")},
            ["--from", "folder"],
            "training showed 'both' no text of clips; use another model",
        ),
        (
            {("film", "text"), ("text", "image")},
            ["--from", "a.png"],
            "no text of pictures; it makes text of clips; use another model",
        ),
        ({("film", "text")}, ["--from", "folder"], ""),
        ({("film", "text")}, ["a"], ""),
        ({("text", "image"), ("text", "text")}, ["a"], ""),
        ({("text", "image"), ("text", "text")}, ["--from", "a.png"], "no text of pictures; use another model"),
        (
            {("image", "film"), ("film", "text")},
            ["--from", "a.png"],
            "it makes text of clips, and clips of pictures; use an",
        ),
        (None, ["--from", "a.png"], ""),
        (None, ["a"], ""),
    ],
)
def test_text_of_a_model_that_learned_to_write_none(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    directions: set[tuple[str, str]] | None, arguments: list[str], message: str,
) -> None:  # fmt: skip
    """It answered with an empty line."""
    model = both()
    model.by_word = True  # which says nothing of pictures and clips
    model.directions = None if directions is None else frozenset(directions)
    monkeypatch.setattr("mm.hub.load_pretrained", lambda name: model)
    Image.new("RGB", (4, 4), "red").save(here / "a.png")
    status = run_mm(["generate", "--to", "text", "--model", "both", "--max-tokens", "3", *arguments])
    said = capsys.readouterr().err
    assert status == (2 if message else 0) and message in said


@pytest.mark.parametrize("option", ["steps", "denoising_steps"])
def test_steps_of_what_has_none(here: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    """They were ignored."""
    given = f"--{option.replace('_', '-')}"
    assert run_mm(["generate", "red", "--model", "pictures", given, "3", "--out", "a.png"]) == 2
    says = f"'image' is made in no steps that could be counted (raster order, LMHead); leave {option} out"
    assert says in capsys.readouterr().err
    painter: Any = TextToImagePipeline(tiny())
    with pytest.raises(ValueError, match=f"leave {option} out"):
        painter("red", **{option: 3})
    assert painter("red", **{option: 0}).images, "0 is the order's own"


def test_pipelines_refuse_what_was_not_learned() -> None:
    reader = ImageToTextPipeline(both())
    red = Image.new("RGB", (4, 4), "red")
    assert len(reader([red, clip(3)], max_tokens=2).texts) == 2  # it isn't known what training showed
    reader.model.directions = frozenset({("film", "text"), ("text", "image")})
    assert len(reader(clip(3), max_tokens=2).texts) == 1
    with pytest.raises(
        ValueError, match="^training showed this model no text of pictures; it makes text of clips; use"
    ):
        reader([clip(3), red], max_tokens=2)


def test_an_animation_is_a_clip_if_it_moves(here: Path) -> None:
    """Its first frame was taken for a picture."""
    reader = AnyToAnyPipeline(both())
    for ending in (".gif", ".webp", ".apng"):
        save_video(here / f"moving{ending}", clip(3), 8)
        save_video(here / f"still{ending}", clip(1), 8)
        assert reader.medium(here / f"moving{ending}") == "video"
        assert reader.medium(here / f"still{ending}") == "picture"
    (here / "broken.gif").write_bytes(b"GIF89a")
    assert reader.medium(here / "broken.gif") == "picture", "who loads it says what is wrong with it"
    assert AnyToAnyPipeline(tiny()).medium(here / "moving.gif") == "picture"
    reader.model.directions = frozenset({("image", "text"), ("text", "film")})
    with pytest.raises(ValueError, match="no text of clips; it makes text of pictures"):
        ImageToTextPipeline(reader.model)(here / "moving.gif")


def test_space_around_a_prompt_is_none_of_it() -> None:
    painter = TextToImagePipeline(tiny())
    assert painter(" red \n", seed=0).tokens[0].ids.tolist() == painter("red", seed=0).tokens[0].ids.tolist()


# --- folders of pictures ----------------------------------------------------------------------------------------------


def test_folders_are_clips(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "--model", "films", "--seed", "1", "--from", "folder", "--to"]
    assert run_mm([*common, "video", "--scale", "1", "--out", "out.gif"]) == 0
    assert levels(load_video(here / "out.gif").frames)[:3] == [0, 1, 2]
    capsys.readouterr()
    for model in ("films", "both"):
        assert run_mm(["generate", "--to", "text", "--model", model, "--max-tokens", "5", "--from", "folder"]) == 0
        wanted = ImageToTextPipeline({"films": films, "both": both}[model]())(clip(3), max_tokens=5).texts[0]
        assert capsys.readouterr().out == wanted + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--to", "text", "--model", "pictures", "--from", "folder"],
            "'folder' is a folder, not a file; give the path",
        ),
        (
            ["--to", "video", "--model", "films", "--from", "empty"],
            "the folder 'empty' has no pictures to make a video",
        ),
        (
            ["--to", "image", "--model", "pictures", "--from", "folder"],
            "'folder' is a folder, not a file; give the path",
        ),
    ],
)
def test_folders_that_are_none(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (here / "empty").mkdir()
    assert run_mm(["generate", *arguments]) == 2
    assert message in (said := capsys.readouterr().err) and said.count("\n") == 1
