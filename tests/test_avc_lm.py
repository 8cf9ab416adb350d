"""Clips as files in a language model: the configurations train at debug size, a pipeline writes whole streams and goes on from
frames, and a few clips are memorised byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mm.commands.train import main
from mm.data.moving import MovingSource
from mm.layout import Segment
from mm.pipelines.text_to_video import TextToVideoPipeline
from mm.stream import pack
from mm.testing import tiny
from mm.tokenizers.mjpeg_bytes import MjpegBytes
from mm.video import has_av

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
needs_av = pytest.mark.skipif(not has_av(), reason="H.264 needs av: pip install 'mm[video]'")
CLIPS = (
    "{class_path: mm.data.moving.MovingSource, "
    "init_args: {digits: null, count: 30, frames: 2, size: 16, caption: null, split: all}}"
)
SYSTEM = """
trainer: {max_steps: 2, log_every_n_steps: 1, val_check_interval: 2, limit_val_batches: 1}
model:
  init_args:
    backbone: {width: 32, layers: 2, heads: 2}
    warmup_steps: 1
    sample_prompts: []
data:
  init_args:
    tokens: 1024
    cache: cache
    train:
      - {source: SOURCE, template: {class_path: mm.data.documents.TextToVideo, init_args: {drop: 0.5}}}
    validation:
      - {source: SOURCE, template: {class_path: mm.data.documents.TextToVideo}}
"""
KINDS = {"avc_bytes": "AvcBytes", "mjpeg_bytes": "MjpegBytes"}


@pytest.mark.parametrize("name", [pytest.param("avc_bytes", marks=needs_av), "mjpeg_bytes"])
def test_it_trains_and_writes_whole_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = "--model.init_args.tokenizer.init_args"
    settings = [f"{made}.size=[16,16]", f"{made}.frames=2", f"{made}.vocab=300"]
    data = [f"--data.init_args.train=[{CLIPS}]", f"--data.init_args.validation=[{CLIPS}]"]
    fit = [
        "fit",
        "-c",
        f"configs/tokenizers/{name}.yaml",
        *settings,
        *data,
        *QUIET,
        "--trainer.logger=false",
        "--trainer.log_every_n_steps=1",
    ]
    assert main(fit) == 0
    (tmp_path / "system.yaml").write_text(SYSTEM.replace("SOURCE", CLIPS))
    used = "--model.init_args.modalities.tokenizer"
    other = [f"{used}=mm.tokenizers.{name}.{KINDS[name]}", f"{used}.init_args.pretrained=runs/{name}/tokenizer"]
    assert main(["fit", "-c", "configs/systems/avc_lm.yaml", "-c", "system.yaml", *other, *QUIET]) == 0
    pipeline = TextToVideoPipeline.from_pretrained("runs/avc_lm/model")
    tokenizer = pipeline.tokenizer(pipeline.video)
    assert type(tokenizer).__name__ == KINDS[name] and tokenizer.spec.fps == 8 and len(tokenizer.bpe.merges) > 20
    output = pipeline(["a one moves right", None], seed=0)
    assert all(clip.shape == (2, 16, 16, 3) for clip in output.videos) and output.fps == 8
    for item, valid in zip(output.tokens, output.valid, strict=True):
        data_made, odd = tokenizer.bytes_of(item)
        machine = tokenizer.machine()
        state, count = machine.run(data_made)
        assert machine.is_end(state) and count == len(data_made) and not odd, "an untrained model, and yet a whole file"
        assert valid or name == "avc_bytes", "macroblocks are left to the model"
    begun = np.zeros((1, 16, 16, 3), np.uint8)
    gone_on = pipeline("a one moves right", video=begun, seed=0)
    assert int(gone_on.videos[0][0].max()) < 20, "what is given stays"
    ids = tokenizer.encode(begun).content[:-1]
    assert torch.equal(gone_on.tokens[0].content[: len(ids)], ids)


def memorised(tokenizer: MjpegBytes, count: int, steps: int, width: int) -> int:
    """How many of so many clips a model writes again byte for byte, greedily, each behind its name."""
    source = MovingSource(count=count, frames=tokenizer.config["frames"], size=tokenizer.config["size"][0], seed=3)
    clips = [source[n]["video"] for n in range(count)]
    tokenizer.fit(map(tokenizer.file, clips))
    model = tiny(tokenizer=tokenizer, context=800, width=width, layers=3, heads=4).train()
    names = [f"clip {n}" for n in range(count)]
    documents = []
    for name, clip in zip(names, clips, strict=True):
        segments = [Segment("text", name), Segment("image", clip, loss=True)]
        documents.append(model.build_document(segments, torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(step))[:4].tolist()
        loss = model.loss(pack([documents[n] for n in chosen])).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    pipeline = TextToVideoPipeline(model.eval())
    made = pipeline(names, seed=0, temperature=0.0, guidance=1.0).tokens
    return sum(tokenizer.bytes_of(one)[0] == tokenizer.file(clip) for one, clip in zip(made, clips, strict=True))


@pytest.mark.long
@needs_av
def test_ten_streams_are_memorised_byte_for_byte() -> None:
    from mm.tokenizers.avc_bytes import AvcBytes

    assert memorised(AvcBytes(size=(32, 32), frames=8, vocab=512), 10, 300, 96) == 10  # type: ignore[arg-type]


@pytest.mark.long
def test_ten_clips_of_files_are_memorised_byte_for_byte() -> None:
    assert memorised(MjpegBytes(size=(32, 32), frames=4), 10, 300, 96) == 10
