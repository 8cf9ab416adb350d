"""ViD-GPT as a system: its configuration trains at debug size, and what it trained makes clips, also longer ones, and goes on
from frames."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mm.commands.train import main
from mm.generation import Engine, Request
from mm.hub import load_pretrained
from mm.layout import Segment
from mm.orders.blocks import Blocks
from mm.tokenizers.video_vae import VideoVAE
from mm.video import Video

DEBUG = """
trainer:
  accelerator: cpu
  max_steps: 2
  val_check_interval: 2
  limit_val_batches: 1
  callbacks:
    - {class_path: mm.export.SavePretrained}
model:
  init_args:
    backbone: {width: 32, layers: 2, heads: 2}
    warmup_steps: 1
    sample_prompts: []
    unnormalized: true
data:
  init_args:
    tokens: 1024
    cache: cache
    train:
      - source:
          class_path: mm.data.moving.MovingSource
          init_args: {digits: null, frames: 9, count: 12, size: 16, split: train, caption: null}
        template: {class_path: mm.data.documents.TextToVideo, init_args: {drop: 0.5}}
    validation:
      - source:
          class_path: mm.data.moving.MovingSource
          init_args: {digits: null, frames: 9, count: 12, size: 16, split: holdout, caption: null}
        template: {class_path: mm.data.documents.TextToVideo}
"""
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def test_it_trains_and_makes_clips_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    VideoVAE(size=16, downsample=8, channels=8, latent=2, normalizer="none").save(tmp_path / "runs/video_vae/tokenizer")
    (tmp_path / "debug.yaml").write_text(DEBUG)
    assert main(["fit", "-c", "configs/systems/vid_gpt.yaml", "-c", "debug.yaml", *QUIET]) == 0
    model = load_pretrained("runs/vid_gpt/model")
    order, tokenizer = model.modalities[1].order, model.modalities[1].tokenizer
    assert isinstance(order, Blocks) and isinstance(tokenizer, VideoVAE)
    assert order.window + order.frames == tokenizer.spec.max_grid[0] and 0 < order.augment_sampling <= order.augment
    first = tokenizer.encode(Video(tokenizer.decode(tokenizer.encode(_grey())).value.frames[:1], 8.0))
    content = torch.zeros(20 * 4, 2)
    content[:4] = first.content
    known = (content, torch.arange(20 * 4) < 4)
    asked = Request(prompt=[Segment("text", "a digit moves")], items=[("video", (20, 2, 2))], text=False, known=known)
    ((made,),) = Engine(model).generate([asked])
    assert torch.equal(made.content.latents[:4], first.content)
    clip = tokenizer.decode(made.content).value
    assert clip.frames.shape == (39, 16, 16, 3) and made.content.latents.isfinite().all()


def _grey() -> Video:
    return Video(torch.full((1, 16, 16, 3), 90, dtype=torch.uint8).numpy(), 8.0)
