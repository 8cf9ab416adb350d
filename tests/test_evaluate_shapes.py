"""Shapes judged: the judge learns what true shapes are, captions are read, and a model gets the figures that it deserves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm.backbone import BackboneConfig
from mm.data.shape_captions import captions
from mm.data.shape_plans import KINDS
from mm.data.shapes import ShapesSource
from mm.evaluate.command import open_source, parse_data
from mm.evaluate.protocol import Protocol, SolidRecipe
from mm.evaluate.run import evaluate
from mm.evaluate.shape_judge import KIND, agreement, kind_said, roughened, shape_judge, truth
from mm.evaluate.shapes import ShapeSubject, ask, draws_pictured, nearest, open_shapes, training
from mm.heads.lm import LMHead
from mm.interfaces import Decoded, Encoded, Modality, ModalityTokenizer, Spec
from mm.model import MultimodalModel
from mm.orders.raster import Raster
from mm.pipelines.outputs import MeshOutput
from mm.shapes import Shape, as_shape
from mm.testing import Palette
from mm.tokenizers.text_bytes import TextBytes

SIZE = 16
RECIPE = SolidRecipe(
    widths=(8, 16, 16), features=32, epochs=14, learning_rate=5e-3, batch=32, examples=300, swell=0.3, noise=0.2
)
PROTOCOL = replace(
    Protocol(), samples=8, solid_judge=replace(RECIPE, examples=64, epochs=1), single=1, caption_tokens=4,
    pictures_for_codes=8,
)  # fmt: skip


class Cells(ModalityTokenizer):
    """A shape as 4³ blocks, each filled or not."""

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=2, max_grid=(4, 4, 4), voxels=SIZE, fingerprint="cells")

    def encode(self, raw: Any) -> Encoded:
        cells = as_shape(raw, SIZE).occupancy.reshape(4, 4, 4, 4, 4, 4).mean((1, 3, 5))
        return Encoded(grid=(4, 4, 4), ids=torch.tensor(cells >= 0.3).long().flatten())

    def decode(self, encoded: Encoded) -> Decoded:
        cells = encoded.content.clamp(0, 1).view(4, 4, 4).numpy().astype(bool)
        shape = Shape(cells.repeat(4, 0).repeat(4, 1).repeat(4, 2))
        return Decoded(value=shape, valid=shape.valid, reason=shape.reason)


def model() -> MultimodalModel:
    torch.manual_seed(0)
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="shape", tokenizer=Cells(), head=LMHead(), order=Raster()),
    ]
    return MultimodalModel(BackboneConfig(width=32, layers=1, heads=2), modalities, context=192).eval()


# --- what is read from words ----------------------------------------------------------------------------------------


def test_the_kind_is_read_from_every_wording() -> None:
    source = ShapesSource(count=1)
    seen = set()
    for number in range(400):
        plan = source.plan(number)
        for caption in captions(plan.thing):
            assert kind_said(caption) == plan.kind, caption
        seen.add(plan.kind)
    assert seen == set(KINDS)
    assert kind_said("a tall teapot") == kind_said("") == "" and kind_said("A Tall TABLE.") == "table"


def test_agreement_counts_what_applies() -> None:
    source = ShapesSource(count=100, kinds=["table", "sphere"])
    plans = [next(plan for plan in map(source.plan, range(100)) if plan.kind == kind) for kind in ("table", "sphere")]
    told = [truth(plan) for plan in plans]
    assert all(all(hits) for hits in agreement(told, plans).values())
    wrong = [{**told[0], "legs": "7"}, {**told[1], KIND: "box", "legs": "4"}]
    found = agreement(wrong, plans)
    assert found["legs"] == [False] and found["height"] == [True] and found["size"] == [True]
    assert found[KIND] == [True, False] and found["all of it"] == [False, False]


# --- the judge ------------------------------------------------------------------------------------------------------


def test_the_judge_learns_and_is_kept(tmp_path: Path) -> None:
    source = ShapesSource(count=40, size=SIZE, kinds=["sphere", "table", "torus"])
    said: list[str] = []
    judge = shape_judge(source, SIZE, RECIPE, 0, tmp_path, said.append)
    asked = ask(replace_every(source, 2), 20, SIZE)
    found = agreement(judge.tell([shape.occupancy for shape in asked.shapes]), asked.plans)
    assert len(found[KIND]) == 20 and sum(found[KIND]) >= 18
    assert sum(judge.tell([shape.occupancy])[0][KIND] == "sphere" for shape in asked.shapes) < 20
    again = shape_judge(source, SIZE, RECIPE, 0, tmp_path, said.append)
    assert any("read from shapes-" in line for line in said)
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), again.parameters(), strict=True))
    other = shape_judge(source, SIZE, replace(RECIPE, examples=40, epochs=1), 0, tmp_path, said.append)
    assert len(list(tmp_path.iterdir())) == 2 and other.classes.keys() == judge.classes.keys()


def replace_every(source: ShapesSource, every: int) -> ShapesSource:
    return ShapesSource(count=source.count, size=source.size, kinds=source.kinds, holdout_every=every)


def test_what_the_judge_sees_is_roughened() -> None:
    shape = ShapesSource(count=1)[0]["shape"]
    levels = torch.from_numpy((shape.distance * (32 * 127 / 2)).clip(-127, 127).astype(np.int8))[None]
    still = roughened(levels, replace(RECIPE, swell=0.0, noise=0.0), torch.Generator().manual_seed(3))
    assert int(still.sum()) == int((levels < 0).sum()), "moved whole"
    rough = [roughened(levels, RECIPE, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(rough[0], rough[1]) and not torch.equal(rough[0], rough[2]) and not torch.equal(rough[0], still)


# --- the figures ----------------------------------------------------------------------------------------------------


def test_a_model_that_makes_what_was_asked_and_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """True shapes for generated ones have the figures of the controls; empty ones have none."""
    source = ShapesSource(count=60, size=SIZE, holdout_every=5)
    subject = ShapeSubject(model())
    asked = ask(source, PROTOCOL.samples, SIZE)
    assert asked.numbers == [0, 5, 10, 15, 20, 25, 30, 35] and 5 not in training(source) and len(training(source)) == 48

    def make(shapes: Sequence[Shape]) -> Any:
        return lambda prompts, seed: MeshOutput(
            [s.mesh for s in shapes[: len(prompts)]], [s.occupancy for s in shapes[: len(prompts)]], list(prompts), [],
            [True] * len(prompts), [""] * len(prompts), seed,
        )  # fmt: skip

    monkeypatch.setattr(subject, "make", make(asked.shapes))
    words = {plan.plain: plan for plan in asked.plans}
    monkeypatch.setattr(subject, "write", lambda shapes, scales, most: [f"{text} " for text in asked.prompts])
    monkeypatch.setattr(
        subject,
        "answer",
        lambda shapes, questions, most: [dict(plan.questions)[q] for plan in asked.plans for q, _ in plan.questions],
    )
    report = evaluate(subject, {"shapes": source}, protocol=PROTOCOL, only=["shapes"])
    for name in (KIND, "all of it"):
        assert report["shapes", f"generated: {name}"].hits == report["shapes", f"true shapes: {name}"].hits
    assert report["shapes", "generated: not empty"].value == 1 and words
    assert report["shapes", "captions: class"].value == report["shapes", "captions: exact"].value == 1
    assert report["shapes", "questions answered"].value == 1
    own = report["shapes", "generated: IoU with the nearest training shape"]
    assert own.value == report["shapes", "true shapes: IoU with the nearest training shape"].value < 1
    nothing = [Shape(np.zeros((SIZE,) * 3, bool))] * PROTOCOL.samples
    monkeypatch.setattr(subject, "make", make(nothing))
    empty = evaluate(subject, {"shapes": source}, protocol=PROTOCOL, only=["shapes"])
    assert empty["shapes", "generated: not empty"].value == 0
    assert empty["shapes", "generated: IoU with the nearest training shape"].value == 0
    with pytest.raises(KeyError):
        empty["shapes", "generated: watertight"]


def test_a_copy_of_the_training_shows() -> None:
    source = ShapesSource(count=40, size=SIZE, holdout_every=4)
    copied = source.draw(source.plan(training(source)[7]), SIZE).occupancy
    held = source.draw(source.plan(4), SIZE).occupancy
    found = nearest(source, [copied, held, np.zeros_like(held)], SIZE)
    assert found[0] == pytest.approx(1) and 0 < found[1] < 1 and found[2] == 0


def test_the_whole_evaluation(tmp_path: Path) -> None:
    source = ShapesSource(count=40, size=SIZE, holdout_every=4)
    said: list[str] = []
    report = evaluate(model(), {"shapes": source}, protocol=PROTOCOL, folder=tmp_path, only=["shapes"], say=said.append)
    names = {figure.name for figure in report.figures}
    assert {
        "true shapes: class", "tokenizer: IoU, held-out shapes", "tokenizer: codebook usage", "tokenizer: volume error",
        "true shapes after the tokenizer: legs", "generated: height", "generated: not empty", "seconds a shape",
        "seconds a shape, one by one", "forward passes a shape", "captions: class", "captions: exact",
        "questions answered",
    } <= names  # fmt: skip
    assert all(figure.control == figure.name.startswith("true shapes") for figure in report.figures)
    assert 64 <= report["shapes", "forward passes a shape"].value <= 70, "one an element, and the prompt"
    assert report["shapes", "tokenizer: codebook usage"].value == 1
    assert (tmp_path / "shapes.png").is_file() and list((tmp_path / "judges").iterdir())
    assert report.facts["sampling"]["shape"]["temperature"] == 1.0 and report.facts["data"]["shapes"]["examples"] == 40


def test_what_was_never_learned_is_not_asked_for() -> None:
    """Shapes of pictures, of a model that has pictures for something else."""
    torch.manual_seed(0)
    modalities = [*model().modalities, Modality(name="image", tokenizer=Palette(), head=LMHead(), order=Raster())]
    both = MultimodalModel(BackboneConfig(width=32, layers=1, heads=2), modalities, context=192).eval()
    subject = ShapeSubject(both)
    assert draws_pictured(subject), "as far as is known"
    both.directions = frozenset({("text", "image"), ("text", "shape")})
    assert not draws_pictured(subject)
    both.directions |= {("image", "shape")}
    assert draws_pictured(subject) and not draws_pictured(ShapeSubject(model()))


def test_sources_by_name() -> None:
    given = parse_data(["shapes:count=50,kinds=table+mug,holdout_every=5"])
    source = open_source("shapes", given["shapes"])
    assert (source.count, source.kinds, source.holdout_every, source.split) == (50, ("table", "mug"), 5, "all")
    assert parse_data(["shapes"]) == {"shapes": []} and open_shapes([]).count == 20_000
    for settings, message in (
        (["legs=3"], "shapes has no setting 'legs'; there are count, seed"),
        (["count=x"], "shapes: count can't be 'x'"),
        (["turned=1"], "turned can't be '1': it is true or false"),
        (["kinds=house"], "kinds holds 'house'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_shapes(settings)


def test_what_cannot_be_judged() -> None:
    part = ShapesSource(count=40, size=SIZE, split="train")
    with pytest.raises(ValueError, match="is the split 'train'; give the whole source"):
        evaluate(model(), {"shapes": part}, protocol=PROTOCOL, only=["shapes"])
    with pytest.raises(ValueError, match="got a object to evaluate"):
        evaluate(object(), {"shapes": ShapesSource(count=4)}, only=["shapes"])
    from mm.testing import tiny

    with pytest.raises(ValueError, match="no modality of shapes"):
        evaluate(tiny(), {"shapes": ShapesSource(count=4)}, only=["shapes"])


def test_a_tokenizer_by_itself() -> None:
    source = ShapesSource(count=40, size=SIZE, kinds=["sphere", "box"])
    report = evaluate(Cells(), {"shapes": source}, protocol=PROTOCOL, only=["shapes"])
    names = {figure.name for figure in report.figures}
    assert {"tokenizer: IoU, held-out shapes", "tokenizer: codebook usage"} <= names
    assert not any(name.startswith(("generated", "captions")) for name in names)
    with pytest.raises(ValueError, match="TextBytes is no tokenizer of shapes"):
        evaluate(TextBytes(), {"shapes": source}, protocol=PROTOCOL, only=["shapes"])
