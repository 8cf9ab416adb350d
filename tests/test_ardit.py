"""ARDiT as a system: its configurations train, distil and speak at debug size; a sound's length is guessed, or asked for."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import yaml

from mm.backbone import BackboneConfig
from mm.commands.train import main
from mm.data.documents import TextToSpeech, voice_segment
from mm.data.example import Example
from mm.generation import Engine, Request
from mm.heads.lm import LMHead
from mm.heads.regression import RegressionHead
from mm.hub import load_pretrained
from mm.interfaces import Encoded, Modality, Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.blocks import Blocks
from mm.orders.raster import Raster
from mm.stream import pack
from mm.testing import Frames, write_tar
from mm.tokenizers.text_bytes import TextBytes


def recordings(path: Path, count: int) -> Path:
    """A shard of noise that two speakers say words with."""
    import soundfile

    rng = torch.Generator().manual_seed(0)
    members = []
    for number in range(count):
        sound = io.BytesIO()
        samples = torch.randn(60 + number, generator=rng).clamp(-3, 3) / 4
        soundfile.write(sound, samples.numpy(), 1000, format="WAV", subtype="PCM_16")
        fields = {"text": f"word {number}", "speaker": "ann" if number % 2 else "theo", "index": number}
        members += [(f"{number:03}.wav", sound.getvalue()), (f"{number:03}.json", json.dumps(fields).encode())]
    return write_tar(path, members)


DEBUG = """
trainer:
  accelerator: cpu
  max_steps: 4
  val_check_interval: 2
  limit_val_batches: 2
  callbacks:
    - {class_path: mm.ema.EMA, init_args: {decay: 0.5}}
    - {class_path: mm.export.SavePretrained}
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
        template:
          class_path: mm.data.documents.TextToSpeech
          init_args: {drop: 0.2, reference: 0.5, source: *all}
    validation:
      - source:
          class_path: mm.data.shards.ShardSource
          init_args: {paths: [speech.tar], split: holdout, holdout_where: {index: [5, 6]}, caption: null}
        template: {class_path: mm.data.documents.TextToSpeech}
"""
FRAMES = [
    "--model.init_args.modalities.tokenizer=mm.testing.Frames",
    "--model.init_args.modalities.tokenizer.init_args.dim=8",
    "--model.init_args.modalities.tokenizer.init_args.rate=1000",
]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def test_it_trains_distils_and_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recordings(tmp_path / "speech.tar", 24)
    (tmp_path / "debug.yaml").write_text(DEBUG)
    for system in ("ardit", "ardit_distilled"):
        assert main(["fit", "-c", f"configs/systems/{system}.yaml", "-c", "debug.yaml", *FRAMES, *QUIET]) == 0
    teacher, student = load_pretrained("runs/ardit/model"), load_pretrained("runs/ardit_distilled/model")
    orders = [model.modalities[1].order for model in (teacher, student)]
    assert [(o.block, o.along, o.infill, o.sampler.steps) for o in orders] == [(4, True, 0.3, 16), (4, True, 0.3, 1)]  # type: ignore[attr-defined]
    rows = (tmp_path / "runs/ardit_distilled/logs/version_0/metrics.csv").read_text()
    assert "val/ode" in rows and "val/text" in rows
    request = Request(prompt=[voice_segment("ann"), Segment("text", "word 3")], items=[("speech", (11,))], text=False)
    for model in (teacher, student):
        ((made,),) = Engine(model).generate([request])
        sound = model.modalities[1].tokenizer.decode(made.content).value
        assert made.content.grid == (11,) and sound.rate == 1000 and len(sound.samples) == 88


def test_held_out_takes_are_never_trained_on() -> None:
    """Takes 5 and 6 of the real recordings belong to tests."""
    file = Path(__file__).resolve().parent.parent / "configs" / "systems" / "ardit.yaml"
    parts = yaml.safe_load(file.read_text())["data"]["init_args"]["train"]
    sources = [part["source"]["init_args"] for part in parts]
    real = [source for source in sources if "data/fsdd-train.tar" in source["paths"]]
    assert real and all(s["split"] == "train" and s["holdout_where"] == {"index": [5, 6]} for s in real)
    assert not any("heldout" in path for source in sources for path in source["paths"])


def test_the_model_says_how_long_and_a_request_may_say_otherwise() -> None:
    """Four frames for `a`, seven for `b`: learned with the sound, guessed where the request leaves it open."""
    torch.manual_seed(0)
    blocks = Blocks(4, along=True, infill=0.3, time_condition=False, sampler={"steps": 2})
    model = MultimodalModel(
        BackboneConfig(width=48, layers=2, heads=2, adaln=True, qk_norm=True),
        [
            Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
            Modality(name="speech", tokenizer=Frames(), head=RegressionHead(), order=blocks),
        ],
    )
    rng, template = torch.Generator().manual_seed(0), TextToSpeech(drop=0.0)
    lengths = {"a": 4, "b": 7}
    examples = [
        Example(
            key=f"{n}",
            text=word,
            speaker="ann",
            audio=Encoded(grid=(count,), latents=torch.randn(count, 2, generator=rng)),
        )
        for n, (word, count) in enumerate(list(lengths.items()) * 4)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model.loss(pack([model.build_document(template(e, rng), rng) for e in examples])).total.backward()
        optimizer.step()

    def ask(word: str, **wanted: object) -> list[Segment]:
        prompt = [voice_segment("ann"), Segment("text", word, loss=False)]
        return Engine(model).generate([Request(prompt=prompt, sampling=Sampling(temperature=0), **wanted)])[0]  # type: ignore[arg-type]

    for word, count in lengths.items():
        (guessed,) = ask(word, free=True)
        assert (guessed.modality, guessed.content.grid) == ("speech", (count,))
        for other in (round(0.8 * count), round(1.25 * count)):
            (forced,) = ask(word, items=[("speech", (other,))], text=False)
            assert forced.content.grid == (other,) and forced.content.latents.isfinite().all()
