"""The evaluation as a whole: a subject that knows the answers gets full marks, one that errs does not, and `mm evaluate`
measures a model from files to files."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mm.data.example import Source
from mm.data.sources import DigitsSource, ShardSource
from mm.evaluate import command
from mm.evaluate.gallery import Gallery, load_gallery
from mm.evaluate.protocol import Protocol, Recipe
from mm.evaluate.run import evaluate
from mm.evaluate.subject import Drawn, Subject, Written
from mm.hub import save_pretrained
from mm.testing import tiny

SIDE, CONCEPTS, STYLES = 8, 30, ("plain", "loud")
SMALL = Recipe(channels=1, widths=(8, 16, 16), features=16, epochs=20, batch=20)
PROTOCOL = Protocol(
    samples=20, holdout_every=5, side=16, controls=4, single=1, batch=16, digit_judge=SMALL,
    emoji_judge=replace(SMALL, channels=3, epochs=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Emoji as noise in the eight colours that the tiny tokenizer keeps; digits as ten patterns with a little noise."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    shard = folder / "emoji.tar"
    with tarfile.open(shard, "w") as tar:
        for number in range(CONCEPTS):
            for style in STYLES:
                png = io.BytesIO()
                Image.fromarray((rng.random((SIDE, SIDE, 3)) > 0.5).astype("uint8") * 255).save(png, "PNG")
                fields = {"key": f"{number:02d}", "caption": f"thing {number}", "style": style, "category": "things"}
                for suffix, data in (("png", png.getvalue()), ("json", json.dumps(fields).encode())):
                    info = tarfile.TarInfo(f"{number:02d}-{style}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    patterns = rng.random((10, SIDE, SIDE)) > 0.5
    labels = rng.permutation(np.tile(np.arange(10), 20))  # each so-manieth is held out: not always the same digits
    images = (patterns[labels] ^ (rng.random((200, SIDE, SIDE)) > 0.98)).astype("uint8") * 255
    digits = folder / "digits.npz"
    np.savez(digits, images=images.repeat(4, 1).repeat(4, 2), labels=labels.astype("int64"))
    return shard, digits


class Knowing(Subject):
    """Answers from the real pictures; from the wrong ones, if it errs."""

    def __init__(self, galleries: Sequence[Gallery], errs: bool) -> None:
        super().__init__(tiny(side=SIDE), name="knowing")
        self.pictures: dict[str, Tensor] = {}
        self.captions: dict[bytes, str] = {}
        for gallery in galleries:
            for row, caption in enumerate(gallery.captions):
                name = f"{caption}, {gallery.styles[row]}" if gallery.styles[row] else caption
                self.pictures.setdefault(name, gallery.pixels[row])
                self.captions[gallery.pixels[row].numpy().tobytes()] = name
        names = sorted(self.pictures)
        self.answer = dict(zip(names, names[1:] + names[:1] if errs else names, strict=True))

    def draw(self, prompts: Sequence[str], seed: int, constrained: bool = True) -> Drawn:
        made = torch.stack([self.pictures[self.answer[prompt]] for prompt in prompts])
        return Drawn(made, [True] * len(prompts), [""] * len(prompts), 1.0)

    def write(self, pixels: Any, seed: int, max_tokens: int) -> Written:
        texts = [self.answer[self.captions[p.numpy().tobytes()]] for p in pixels]
        return Written(texts, [True] * len(texts), 1.0)


@pytest.mark.parametrize("errs", [False, True])
def test_who_knows_gets_full_marks(files: tuple[Path, Path], errs: bool, tmp_path: Path) -> None:
    sources: dict[str, Source] = {"emoji": ShardSource([files[0]]), "digits": DigitsSource(files[1])}
    galleries = [load_gallery(source, SIDE, PROTOCOL.holdout_every) for source in sources.values()]
    report = evaluate(Knowing(galleries, errs), sources, protocol=PROTOCOL, folder=tmp_path)
    value = {(figure.family, figure.name): figure.value for figure in report.figures}
    if errs:
        assert (
            value["emoji", "training captions: asked caption, pixel"] <= 0.6
        )  # the other style is a neighbour by name
        assert value["emoji", "training captions: caption and style, pixel"] == 0
        assert value["emoji", "captions of training pictures, exact"] == 0
        assert value["digits", "generated, recognised"] <= 0.1
        assert value["digits", "captions of held-out digits, exact"] == 0
    else:
        for what in ("asked caption", "caption and style", "asked style"):
            for distance in ("pixel", "feature"):
                assert value["emoji", f"training captions: {what}, {distance}"] == 1
        assert value["emoji", "captions of training pictures, exact"] == 1
        assert value["emoji", "captions of held-out pictures, exact"] == 1
        assert value["digits", "recogniser, held-out real digits"] >= 0.9
        assert value["digits", "generated, recognised"] >= 0.9
        assert value["digits", "captions of held-out digits, exact"] == 1
    # the tokenizer keeps these colours: one value for a picture without any error
    assert value["tokenizer", "PSNR, held-out emoji"] > 50
    for name in ("emoji.png", "digits.png"):
        with Image.open(tmp_path / name) as sheet:
            assert sheet.width > SIDE


def test_the_command_measures_a_model(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(tiny(side=SIDE, context=512), tmp_path / "model")
    # the shipped judges are trained for minutes
    quick = replace(PROTOCOL, digit_judge=replace(SMALL, epochs=1), emoji_judge=replace(SMALL, channels=3, epochs=1))
    monkeypatch.setattr("mm.evaluate.protocol.Protocol", lambda: replace(quick, samples=6, captioned=6))
    out = tmp_path / "results"
    arguments = ["--model", str(tmp_path / "model"), "--data", f"emoji:{files[0]}", f"digits:{files[1]}"]
    state = torch.get_num_threads(), random.getstate()
    assert command.main([*arguments, "--out", str(out), "--json"]) == 0
    assert (torch.get_num_threads(), random.getstate()) == (1, state[1])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "results.json").read_text())
    families = {figure["family"] for figure in printed["figures"]}
    assert families >= {"tokenizer", "digits", "emoji"}
    assert all(0 <= f["value"] <= 1 for f in printed["figures"] if f["hits"] is not None)
    assert (out / "emoji.png").is_file() and len(list((out / "judges").iterdir())) == 2
    assert command.main([*arguments, "--out", "", "--only", "tokenizer"]) == 0
    assert "codebook usage" in capsys.readouterr().out
    drawer = tiny(side=SIDE, context=512)
    drawer.directions = frozenset({("text", "image")})  # nothing of captions that it never learned
    save_pretrained(drawer, tmp_path / "drawer")
    assert command.main(["--model", str(tmp_path / "drawer"), *arguments[2:], "--out", str(out), "--json"]) == 0
    names = [figure["name"] for figure in json.loads(capsys.readouterr().out)["figures"]]
    assert "generated, recognised" in names and not any("captions of" in name or "a caption" in name for name in names)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "/proc/x"], "can't write into '/proc/x': in '/proc' nothing can be written"),
        (["--out", __file__], "is not a folder"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--threads", "100000"], "--threads must be at most"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(more: list[str], message: str) -> None:
    """The data is missing, too: whoever looks at it first says so."""
    with pytest.raises(ValueError, match=message):
        command.main(["--data", "digits:none.npz", *more])
