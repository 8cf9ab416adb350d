"""The systems that speak in residual codes, MusicGen and VALL-E: trained for a few steps, saved, loaded, made to speak."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from mm.commands.train import SHIPPED, main
from mm.data.documents import voice_segment
from mm.generation import Engine, Request
from mm.hub import load_pretrained, read_config
from mm.layout import Segment
from mm.testing import write_tar

SYSTEMS = {"musicgen": "delay.Delay", "vall_e": "stages.Stages"}
DEBUG = """
trainer:
  accelerator: cpu
  max_steps: 3
  val_check_interval: 2
  limit_val_batches: 1
  callbacks:
    - {class_path: mm.export.SavePretrained, init_args: {sampling: {speech: {guidance: 3.0}}}}
model:
  init_args:
    backbone: {width: 32, layers: 2, heads: 2}
    warmup_steps: 1
data:
  init_args:
    tokens: 512
    cache: cache
    train:
      - source: &all
          class_path: mm.data.shards.ShardSource
          init_args: {paths: [speech.tar], split: train, holdout_where: {index: [5, 6]}, caption: null}
        template: &speak {class_path: mm.data.documents.TextToSpeech, init_args: {drop: 0.3}}
    validation:
      - source: *all
        template: *speak
"""
OPTIONS = [
    "--model.init_args.modalities.tokenizer=mm.testing.Levels",
    "--model.init_args.modalities.tokenizer.init_args.rate=1000",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def recordings(path: Path, count: int) -> None:
    soundfile = pytest.importorskip("soundfile")
    members = []
    for number in range(count):
        sound = io.BytesIO()
        wave = np.sin(np.arange(40 + number) / (2 + number % 3)) / 2
        soundfile.write(sound, wave, 1000, format="WAV", subtype="PCM_16")
        fields = {"text": f"word {number}", "speaker": "ann" if number % 2 else "theo", "index": number}
        members += [(f"{number:03}.wav", sound.getvalue()), (f"{number:03}.json", json.dumps(fields).encode())]
    write_tar(path, members)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_trains_and_speaks(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recordings(tmp_path / "speech.tar", 20)
    (tmp_path / "debug.yaml").write_text(DEBUG)
    assert main(["fit", "-c", f"configs/systems/{system}.yaml", "-c", "debug.yaml", *OPTIONS]) == 0
    folder = tmp_path / "runs" / system / "model"
    model = load_pretrained(folder)
    order = model.modalities[1].order
    assert f"{type(order).__module__}.{type(order).__name__}" == f"mm.orders.{SYSTEMS[system]}" and order.along
    assert read_config(folder)["sampling"]["speech"]["guidance"] == 3.0
    prompt = [voice_segment("ann"), Segment("text", "word 3")]
    ((made,),) = Engine(model).generate([Request(prompt=prompt, items=[("speech", (11,))], text=False)])
    sound = model.modalities[1].tokenizer.decode(made.content).value
    assert made.content.codes.shape == (11, 4) and sound.rate == 1000 and len(sound.samples) == 44
    # a clip in the place of the name, which is the acoustic prompt
    clip = Segment("speech", made.content)
    ((again,),) = Engine(model).generate([Request(prompt=[clip, prompt[1]], items=[("speech", (5,))], text=False)])
    assert again.content.codes.shape == (5, 4)


@pytest.mark.parametrize("system", SYSTEMS)
def test_held_out_takes_are_never_trained_on(system: str) -> None:
    parts = yaml.safe_load((SHIPPED / "systems" / f"{system}.yaml").read_text())["data"]["init_args"]["train"]
    sources = [part["source"]["init_args"] for part in parts]
    real = [source for source in sources if "data/fsdd-train.tar" in source["paths"]]
    assert real and all(s["split"] == "train" and s["holdout_where"] == {"index": [5, 6]} for s in real)
    assert not any("heldout" in path for source in sources for path in source["paths"])
