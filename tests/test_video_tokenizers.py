"""Tokenizers of clips: causal, whole or in pieces, trained as those of pictures are, total on what models emit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from mm.data.clips import ClipDataModule
from mm.data.images import ShuffledBatches
from mm.data.moving import MovingSource
from mm.interfaces import Encoded
from mm.tokenizers.image_vae import ImageVAE
from mm.tokenizers.image_vq import ImageVQ
from mm.tokenizers.speech_codec import SpeechCodec
from mm.tokenizers.text_bytes import TextBytes
from mm.tokenizers.video_frames import VideoFrames
from mm.tokenizers.video_vae import VideoVAE
from mm.video import Video
from mm.video_autoencoder import steps_of, to_frames, to_steps

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


def vae(stride: int = 2, **changes: Any) -> VideoVAE:
    """A small one all of whose layers do something: those that begin at zero are drawn too."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(size=16, frames=9, frame_stride=stride, channels=16, latent=4, downsample=8)
    made = VideoVAE(**{**settings, **changes}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.fit_normalizer(clips(4))
    return made


def clips(count: int = 2, frames: int = 9, side: int = 16) -> Tensor:
    return torch.rand(count, frames, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def source(**changes: Any) -> MovingSource:
    return MovingSource(**{"size": 16, "frames": 6, "count": 40, **changes})


# ---- steps and frames ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("frames", [1, 2, 5, 9])
def test_steps_hold_every_frame_in_turn(stride: int, frames: int) -> None:
    x = torch.arange(float(frames))[None, :, None, None, None].expand(1, -1, 3, 2, 2)
    steps = to_steps(x, stride)
    assert steps.shape == (1, steps_of(frames, stride), 3 * stride, 2, 2)
    assert steps[0, 0].eq(0).all(), "the first frame has a step of its own"
    back = to_frames(steps, stride)[0, :, 0, 0, 0].tolist()
    assert back == [*range(frames), *[frames - 1] * ((1 - frames) % stride)], "the last frame fills the last step"


# ---- causal ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_no_latent_depends_on_later_frames_and_no_frame_on_later_latents(stride: int) -> None:
    tokenizer, x = vae(stride), clips(1)
    z = tokenizer.latents(x)
    for changed in (0, 1, 4, 8):
        other = x.clone()
        other[:, changed] = 0.3
        differs = (tokenizer.latents(other) - z).abs().amax((0, 2, 3, 4))
        first = steps_of(changed + 1, stride) - 1
        assert differs[:first].eq(0).all() and differs[first] > 1e-6
        assert (differs[first : first + 3] > 1e-6).all(), "what follows remembers it"
    frames = tokenizer.pixels(z)
    for changed in range(z.shape[1]):
        other = z.clone()
        other[:, changed] += 1
        differs = (tokenizer.pixels(other) - frames).abs().amax((0, 2, 3, 4))
        first = 0 if not changed else 1 + (changed - 1) * stride
        assert differs[:first].eq(0).all() and (differs[first : first + stride] > 1e-6).all()


@torch.no_grad()
def test_a_picture_is_the_first_step_of_a_clip() -> None:
    tokenizer, x = vae(), clips(1)
    whole, alone = tokenizer.encode(x[0]), tokenizer.encode(x[0, :1])
    assert whole.grid == (5, 2, 2) and alone.grid == (1, 2, 2)
    assert torch.allclose(alone.content, whole.content[:4], atol=1e-5)
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    assert tokenizer.encode(picture).grid == (1, 2, 2)
    assert torch.equal(tokenizer.encode(picture).content, tokenizer.encode(np.asarray(picture)[None]).content)
    assert len(tokenizer.decode(alone).value) == 1


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("pieces", [[1, 1, 1, 1, 1], [2, 3], [5], [1, 4]])
def test_a_stream_gives_the_frames_of_the_whole(stride: int, pieces: list[int]) -> None:
    tokenizer = vae(stride)
    rows = torch.randn(20, 4)
    whole = tokenizer.untoken(rows[None], (5, 2, 2))
    past: Any = {}
    z = tokenizer.map(tokenizer.normalizer.inverse(rows[None]), (5, 2, 2))
    parts = [tokenizer.steps_from(part, past) for part in z.split(pieces, 1)]
    assert torch.allclose(to_frames(torch.cat(parts, 1), stride), whole, atol=1e-5)
    stream = tokenizer.streaming()
    got = [stream.decode(part) for part in rows.split([4 * n for n in pieces])]
    assert [len(part) for part in got] == [1 + (pieces[0] - 1) * stride, *[n * stride for n in pieces[1:]]]
    decoded = tokenizer.decode(Encoded(grid=(5, 2, 2), latents=rows)).value.frames
    assert np.abs(np.concatenate(got).astype(int) - decoded).max() <= 1, "rounded to bytes"


@torch.no_grad()
def test_long_clips_go_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, x = vae(), clips(2)
    z, frames = tokenizer.latents(x), tokenizer.pixels(tokenizer.latents(x))
    seen: list[int] = []
    tokenizer.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    monkeypatch.setattr("mm.latent_videos.BATCH_PIXELS", 4 * 2 * 16 * 16)  # four steps, of two clips two at a time
    assert torch.allclose(tokenizer.latents(x), z, atol=1e-5) and seen == [2, 2, 1]
    assert torch.allclose(tokenizer.pixels(z), frames, atol=1e-5)
    many = tokenizer.decode(Encoded(grid=(40, 2, 2), latents=torch.randn(160, 4)))
    assert many.valid and len(many.value) == 79, "longer than any clip of training"


# ---- what is given ---------------------------------------------------------------------------------------------------


def test_clips_come_to_the_rate_and_the_size() -> None:
    tokenizer = vae()
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    assert tokenizer.encode(Video(frames, 4.0)).grid == (5, 2, 2), "8 frames at the tokenizer's rate"
    slow = tokenizer.encode(Video(np.repeat(frames, 2, 0), 8.0))
    assert torch.equal(slow.content, tokenizer.encode(Video(frames, 4.0)).content)
    half = tokenizer.encode(torch.rand(3, 3, 8, 16))
    assert half.grid == (2, 1, 2) and tokenizer.decode(half).value.size == (16, 8)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.zeros((10, 16, 16, 3), np.uint8), "expected at most 9 frames, got 10 at 8 a second"),
        (Video(np.zeros((3, 16, 16, 3), np.uint8), 0.001), "expected at most 9 frames, got 24000"),
        (np.zeros((2, 16, 16), np.uint8), "shape \\[T, H, W, 3\\]"),
        (np.zeros((2, 16, 16, 3)), "frames of uint8"),
        ("clip.mp4", "got str: open a file with mm.video.load_video"),
        (torch.zeros(2, 3, 12, 16), "multiples of 8 up to 16, got \\(12, 16\\)"),
        (torch.zeros(2, 3, 24, 24), "multiples of 8 up to 16"),
        (torch.zeros(10, 3, 16, 16), "at most 9 frames, got 10"),
        (torch.zeros(0, 3, 16, 16), "expected a float tensor \\(T, 3, H, W\\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "expected a float tensor"),
    ],
)
def test_what_is_no_clip_is_refused(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae().encode(raw)
    if not isinstance(raw, Tensor):
        with pytest.raises(ValueError, match=message):
            VideoFrames(ImageVQ.tiny(), frames=9).encode(raw)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frame_stride": 3}, "frame_stride must be one of 1, 2, 4, got 3"),
        ({"frames": 0}, "frames must be a whole number in 1..1024, got 0"),
        ({"frames": 600, "frame_stride": 2}, "frames must be at most 511 with frame_stride 2"),
        ({"fps": 0}, "fps must be 0.001 to"),
        ({"fps": "fast"}, "fps must be a number"),
        ({"multipliers": [1]}, "levels, got 1 multipliers"),
        ({"latent": 0}, "latent must be in 1..256"),
        ({"kl": -1.0}, "kl must be a number of at least 0"),
        ({"noise": 0.1}, "noise needs the normalizer token"),
    ],
)
def test_a_vae_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoVAE(**settings)


# ---- what a model emits ----------------------------------------------------------------------------------------------


def test_decoding_repairs_and_says_so() -> None:
    tokenizer = vae()
    broken = torch.randn(20, 4)
    broken[7, 1], broken[9, 0] = float("nan"), float("inf")
    for item, reason, frames in (
        (Encoded(grid=(5, 2, 2), latents=broken), "not numbers", 9),
        (Encoded(grid=(20,), latents=torch.randn(20, 4)), "expected steps in time, and rows and columns within 2×2", 9),
        (Encoded(grid=(1, 5, 4), latents=torch.randn(20, 4)), "expected steps in time", 9),
        (Encoded(grid=(5, 2, 2), latents=torch.zeros(20, 7)), "no vectors of width 4", 9),
        (Encoded(grid=(5, 0, 2), latents=torch.zeros(0, 4)), "no vectors of width 4", 9),
        (Encoded(grid=(2,), ids=torch.zeros(2, dtype=torch.long)), "no vectors of width 4", 9),
    ):
        decoded = tokenizer.decode(item)
        assert not decoded.valid and reason in decoded.reason
        assert decoded.value.frames.shape == (frames, 16, 16, 3)
    huge = tokenizer.decode(Encoded(grid=(1, 2, 2), latents=torch.full((4, 4), 1e30)))
    assert huge.value.frames.shape == (1, 16, 16, 3)
    assert tokenizer.streaming().decode(broken).shape == (9, 16, 16, 3)
    for wrong in (torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(0, 4)):
        with pytest.raises(ValueError, match="expected vectors of width 4, 4 a step"):
            tokenizer.streaming().decode(wrong)


def test_an_untrained_tokenizer_decodes_and_says_so() -> None:
    decoded = VideoVAE(size=16, channels=8, latent=4).eval().decode(Encoded(grid=(2, 2, 2), latents=torch.zeros(8, 4)))
    assert not decoded.valid and "not trained yet" in decoded.reason and len(decoded.value) == 3


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_takes_draws_and_evaluation_means() -> None:
    tokenizer, x = vae(), clips()
    one, other = tokenizer.train().reconstruct(x), tokenizer.reconstruct(x)
    assert one.output.shape == x.shape and not torch.equal(one.output, other.output)
    mean, log_variance = tokenizer.distribution(x)
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0)).mean()
    assert torch.allclose(one.loss, 1e-4 * wanted, rtol=1e-3)
    tokenizer.eval()
    assert torch.equal(tokenizer.reconstruct(x).output, tokenizer.reconstruct(x).output)
    assert torch.allclose(tokenizer.reconstruct(x).output, tokenizer.pixels(tokenizer.latents(x)), atol=1e-5)


@torch.no_grad()
def test_warm_start_is_the_best_linear_code() -> None:
    """With as many channels as a block of frames has numbers, nothing is lost."""
    torch.manual_seed(0)
    tokenizer = VideoVAE(size=16, downsample=4, multipliers=[1], channels=8, latent=96).eval()
    x = clips(16)
    tokenizer.warm_start(x)
    assert torch.allclose(tokenizer.reconstruct(x).output, x, atol=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_is_trained_by_the_same_module_as_pictures(precision: Any, tmp_path: Path) -> None:
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger

    from mm.training_tokenizer import TokenizerModule

    torch.manual_seed(0)
    tokenizer = VideoVAE(size=16, frames=5, channels=8, latent=8)
    model = TokenizerModule(
        tokenizer, l2=1.0, warmup=2, warm_start=20, save_to=str(tmp_path / "saved"), learning_rate=1e-2
    )
    data = ClipDataModule(source(), source(seed=1), frames=5, size=16, batch_size=4, held_out=6)
    quiet: dict[str, Any] = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = L.Trainer(
        accelerator="cpu", precision=precision, max_steps=10, val_check_interval=5, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, log_every_n_steps=1, logger=CSVLogger(tmp_path), default_root_dir=tmp_path, **quiet,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    logged = np.genfromtxt(next(tmp_path.rglob("metrics.csv")), delimiter=",", names=True)
    psnr = logged["valpsnr"][~np.isnan(logged["valpsnr"])]
    assert len(psnr) == 2 and psnr[-1] > 15, "begun as principal components, and not spoilt"
    saved = VideoVAE.from_directory(tmp_path / "saved")
    assert saved.normalizer.ready and saved.spec == tokenizer.spec and saved.spec.frame_stride == 2
    decoded = saved.decode(saved.encode(data.validation[0]["video"].frames[:5]))
    assert decoded.valid and len(decoded.value) == 5
    clip = next(iter(data.val_dataloader())).pixels
    assert trainer.predict(model, datamodule=data)[0][0]["psnr"] == pytest.approx(  # type: ignore[index]
        _psnr(saved.decode(saved.encode(clip[0])).value.frames, clip[0]), abs=0.5
    )


def _psnr(frames: np.ndarray[Any, Any], clip: Tensor) -> float:
    truth = ((clip + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    return float(10 * np.log10(255**2 / np.square(frames - truth).mean()))


# ---- data ------------------------------------------------------------------------------------------------------------


def test_batches_are_windows_of_clips_and_resume() -> None:
    made = source(frames=9)
    data = ClipDataModule(made, source(seed=1), frames=4, size=16, batch_size=8)
    whole = ShuffledBatches(data, 0, 1)
    batches = list(whole)
    assert len(batches) == 5 and batches[0].pixels.shape == (8, 4, 3, 16, 16)
    clip = ((batches[0].pixels[0] + 1) * 127.5).round().permute(0, 2, 3, 1).byte().numpy()
    known = made[int(data.order(0)[0])]["video"].frames
    assert any(np.array_equal(clip, known[begin : begin + 4]) for begin in range(6))
    assert not torch.equal(batches[0].pixels, next(iter(whole)).pixels), "another epoch, another order"
    first = ShuffledBatches(data, 0, 1)
    next(iter(first))
    again = ShuffledBatches(data, 0, 1)
    again.load_state_dict(first.state_dict())
    assert torch.equal(next(iter(again)).pixels, batches[1].pixels)
    single = ClipDataModule(made, made, frames=12, size=8, fps=4.0, batch_size=2, single=True)
    x, where = next(iter(ShuffledBatches(single, 0, 1)))
    assert x.shape == (24, 3, 8, 8) and len(where) == 24
    assert torch.equal(x[5], x[11]) and not torch.equal(x[0], x[3]), "five frames at this rate; the last goes on"


class Broken(MovingSource):
    """Each clip but every third is none."""

    def _fields(self, ordinal: int) -> dict[str, Any]:
        return super()._fields(ordinal) if ordinal % 3 == 0 else {"video": "none"}


def test_broken_clips_give_their_place_to_the_next() -> None:
    data = ClipDataModule(Broken(size=16, frames=4, count=12), source(), frames=4, size=16, batch_size=4)
    with pytest.warns(UserWarning, match="has a str for a video"):
        taken = data.clips(data.train, [1, 3], None)
    assert np.array_equal(taken[0].permute(0, 2, 3, 1), data.train[3]["video"].frames)
    with pytest.raises(ValueError, match="has 3 clips to train on, fewer than one batch of 4"):
        ClipDataModule(source(count=3), source(), batch_size=4).setup()
    with pytest.raises(ValueError, match="must be at least 1"):
        ClipDataModule(source(), source(), frames=0)


# ---- frame by frame --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["vq", "vae", "residual"])
def test_frames_are_those_of_the_picture_tokenizer(inner: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pictures: Any = ImageVAE.tiny() if inner == "vae" else ImageVQ.tiny()
    if inner == "residual":
        pictures = ImageVQ(size=16, channels=8, quantizer="residual", codebook_size=16, code_dim=4, num_codes=3).train()
        pictures.reconstruct(clips(1)[0])  # which begins its codebooks
        pictures.eval().weights_changed()
    tokenizer = VideoFrames(pictures, frames=6, fps=8.0)
    clip = VideoFrames.examples()[0]
    encoded = tokenizer.encode(clip)
    spec = tokenizer.spec
    assert encoded.grid == (5, 4, 4) and spec.max_grid == (6, 4, 4) and spec.fps == 8.0 and spec.frame_stride == 1
    alone = [pictures.encode(Image.fromarray(frame)) for frame in clip.frames]
    torch.testing.assert_close(encoded.content, torch.cat([one.content for one in alone]), rtol=0.0, atol=1e-5)
    decoded = tokenizer.decode(encoded)
    for frame, one in zip(decoded.value.frames, alone, strict=True):
        assert np.abs(frame.astype(int) - np.asarray(pictures.decode(one).value)).max() <= 1
    stream = tokenizer.streaming()
    parts = np.concatenate([stream.decode(part) for part in encoded.content.split([16, 48, 16])])
    assert np.abs(parts.astype(int) - decoded.value.frames).max() <= 1
    with pytest.raises(ValueError, match="expected 16 elements a frame, got 15"):
        stream.decode(encoded.content[:15])
    assert len(tokenizer.decode_batch([encoded, tokenizer.encode(clip.frames[:2])])[1].value) == 2
    tokenizer.save(tmp_path / "saved")
    assert VideoFrames.from_directory(tmp_path / "saved").spec == spec
    assert tokenizer.origin == pictures.spec.fingerprint


def test_bad_frames_are_repaired_one_by_one() -> None:
    tokenizer = VideoFrames.tiny()
    ids = torch.zeros(48, dtype=torch.long)
    ids[20] = 99
    decoded = tokenizer.decode(Encoded(grid=(3, 4, 4), ids=ids))
    assert not decoded.valid and decoded.reason.startswith("frame 1: 1 ids outside") and len(decoded.value) == 3
    ids[40] = -1
    assert "and 1 more frames" in tokenizer.decode(Encoded(grid=(3, 4, 4), ids=ids)).reason
    for grid in ((48,), (0, 4, 4), (1, 6, 8), (3, 2, 8)):
        count = int(np.prod(grid))
        decoded = tokenizer.decode(Encoded(grid=grid, ids=torch.zeros(count, dtype=torch.long)))
        assert not decoded.valid and "expected frames, and rows and columns within 4×4" in decoded.reason
        assert decoded.value.frames.shape == (1, 16, 16, 3)
    assert not tokenizer.decode(Encoded(grid=(1, 4, 4), latents=torch.zeros(16, 3))).valid
    assert len(tokenizer.decode(Encoded(grid=(9, 4, 4), ids=torch.zeros(144, dtype=torch.long))).value) == 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VideoFrames(TextBytes()), "TextBytes is no tokenizer of pictures with a grid"),
        (lambda: VideoFrames(SpeechCodec.tiny()), "SpeechCodec is no tokenizer of pictures"),
        (lambda: VideoFrames(VideoFrames.tiny()), "VideoFrames is no tokenizer of pictures"),
        (lambda: VideoFrames(ImageVQ.tiny(), frames=0), "frames must be a whole number"),
        (lambda: VideoFrames(ImageVQ.tiny(), frames=257), "frames must be at most 256"),
        (lambda: VideoFrames(ImageVQ.tiny(), fps=float("nan")), "fps must be a number"),
    ],
)
def test_frames_refuse(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_saved_frames_are_whole_or_refused(tmp_path: Path) -> None:
    VideoFrames.tiny().save(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = yaml.safe_load(file.read_text())
    for changes, message in (
        ({"pictures": "mm.tokenizers.video_frames.VideoFrames"}, "frames inside frames"),
        ({"pictures": "os.system"}, "no tokenizer of this package"),
        ({"frames": 7}, "restore the files that were saved together"),
        ({"frames": 10**12}, "frames must be a whole number"),
        ({"fps": None}, "fps must be a number"),
        ({"more": 1}, "expected format"),
    ):
        file.write_text(json.dumps({**config, "config": {**config["config"], **changes}}))
        with pytest.raises(ValueError, match=message):
            VideoFrames.from_directory(tmp_path / "saved")


# ---- the systems -----------------------------------------------------------------------------------------------------

SMALL = """
trainer: {accelerator: cpu, max_steps: 2, val_check_interval: 2, limit_val_batches: 1, log_every_n_steps: 1}
data:
  init_args:
"""
TOKENIZER = """
    train: {class_path: mm.data.moving.MovingSource, init_args: {frames: 4, count: 16, split: train, digits: null}}
    validation: {class_path: mm.data.moving.MovingSource, init_args: {frames: 4, count: 16, split: holdout, digits: null}}
    batch_size: 4
model:
  init_args:
    warm_start: 40
    tokenizer: {init_args: {channels: 16, codebook_size: 16, code_dim: 4}}
"""
SYSTEM = """
    tokens: 1024
    cache: cache
    train:
      - source:
          class_path: mm.data.moving.MovingSource
          init_args: {count: 12, split: train, digits: null}
        template: {class_path: mm.data.documents.TextToVideo, init_args: {drop: 0.5}}
    validation:
      - source:
          class_path: mm.data.moving.MovingSource
          init_args: {count: 12, split: holdout, digits: null}
        template: {class_path: mm.data.documents.TextToVideo}
model:
  init_args:
    backbone: {width: 32, layers: 2, heads: 2}
    warmup_steps: 1
    sample_prompts: []
"""


def test_video_vq_trains_on_codes_of_a_tokenizer_it_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mm
    from mm.commands.train import main

    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    (tmp_path / "tokenizer.yaml").write_text(SMALL + TOKENIZER)
    (tmp_path / "system.yaml").write_text(SMALL + SYSTEM)
    assert main(["fit", "-c", "configs/tokenizers/moving_vq.yaml", "-c", "tokenizer.yaml", *quiet]) == 0
    pictures = ImageVQ.from_directory("runs/moving_vq/tokenizer")
    assert pictures.spec.max_grid == (4, 4)
    assert main(["fit", "-c", "configs/systems/video_vq.yaml", "-c", "system.yaml", *quiet]) == 0
    pipeline = mm.TextToVideoPipeline.from_pretrained("runs/video_vq/model")
    made = pipeline("a seven moves right", seed=0)
    assert made.videos[0].shape == (16, 32, 32, 3) and made.fps == 8.0 and made.valid == [True]
