"""The judge of shapes: a small 3-D convolutional network, trained here on shapes that the model under test never saw, which tells
what a shape is and all that captions say of one. And what a caption says, read from its words.

Letters in shapes: B batch, N cells a side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor, nn

from mm.data.shape_captions import NAMES
from mm.data.shapes import Plan, ShapesSource
from mm.evaluate.networks import Say, fit, keep
from mm.evaluate.protocol import SolidRecipe

KIND = "class"
VERSION = "1"
"""Counts up when this file changes what a judge becomes."""
LEVELS = 127
"""Steps from the surface to where distances are cut off, in which examples are kept."""
FURNITURE = {name: name for name in ("table", "chair", "stool", "shelf", "mug")} | {"cup": "mug"}
SOLIDS = {word: kind for kind, name in NAMES.items() for word in (name, kind)} | {"block": "box"}
"""Words for simple solids → their kinds."""


class ShapeJudge(nn.Module):
    """Three strided convolutions, one hidden layer, and a linear classifier for each question.

    Args:
        recipe: widths.
        size: cells a side.
        classes: answers by question, `class` among them.
    """

    def __init__(self, recipe: SolidRecipe, size: int, classes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.classes = {name: list(answers) for name, answers in classes.items()}
        layers: list[nn.Module] = []
        for inside, outside in zip((1, *recipe.widths), recipe.widths, strict=False):
            layers += [nn.Conv3d(inside, outside, 3, 2, 1, bias=False), nn.BatchNorm3d(outside), nn.ReLU()]
            size = -(-size // 2)
        self.trunk = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(recipe.widths[-1] * size**3, recipe.features), nn.ReLU()
        )
        self.questions = nn.ModuleDict(
            {_key(name): nn.Linear(recipe.features, len(answers)) for name, answers in self.classes.items()}
        )

    def forward(self, x: Float[Tensor, "B N N N"]) -> dict[str, Tensor]:
        """Logits by question, of cells that are 1 inside and 0 outside."""
        hidden = self.trunk(x[:, None] * 2 - 1)
        return {name: self.questions[_key(name)](hidden) for name in self.classes}

    @torch.no_grad()
    def tell(self, grids: Sequence[Bool[np.ndarray, "N N N"]], batch: int = 64) -> list[dict[str, str]]:
        """The likeliest answer to each question about each shape, whether it applies or not."""
        self.eval()
        out: list[dict[str, str]] = []
        for start in range(0, len(grids), batch):
            cells = torch.from_numpy(np.stack(grids[start : start + batch])).float()
            found = {name: logits.argmax(-1).tolist() for name, logits in self(cells).items()}
            out += [{name: self.classes[name][rows[row]] for name, rows in found.items()} for row in range(len(cells))]
        return out


def _key(name: str) -> str:
    return f"q_{name}"  # a module may not be called as its methods are


def truth(plan: Plan) -> dict[str, str]:
    """What can be told of a shape, as the judge tells it."""
    return {KIND: plan.kind, **{name: str(value) for name, value in plan.facts.items()}}


def questions_of(plans: Sequence[Plan]) -> dict[str, list[str]]:
    """Question → answers, of all that is said of these shapes."""
    found: dict[str, set[str]] = {}
    for plan in plans:
        for name, value in truth(plan).items():
            found.setdefault(name, set()).add(value)
    return {name: sorted(answers) for name, answers in sorted(found.items())}


def shape_judge(
    source: ShapesSource, size: int, recipe: SolidRecipe, seed: int, folder: Path | None, say: Say = lambda line: None
) -> ShapeJudge:
    """A trained judge: from `folder` where the same was trained before. It is trained on shapes beyond the source's count: of the
    same settings, and none that the source gives."""
    plans = [source.plan(source.count + number) for number in range(recipe.examples)]
    classes = questions_of(plans)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = ShapeJudge(recipe, size, classes)

    def learn(say: Say) -> None:
        say(f"training on {len(plans):,} shapes")
        x = torch.stack([_levels(source.draw(plan, size).distance, size) for plan in plans])
        fit(judge, x, _labels(plans, classes), recipe, lambda part, rng: roughened(part, recipe, rng), seed, say)

    settings = json.dumps([VERSION, asdict(recipe), size, seed, classes], sort_keys=True)
    keep("shapes", judge, learn, settings=settings, identity=(source.identity,), folder=folder, say=say)
    return judge


def _levels(distance: Float[np.ndarray, "N N N"], size: int) -> Int8[Tensor, "N N N"]:
    """Distances in 127ths of two cells."""
    return torch.from_numpy((distance * (size * LEVELS / 2)).clip(-LEVELS, LEVELS).astype(np.int8))


def _labels(plans: Sequence[Plan], classes: Mapping[str, Sequence[str]]) -> dict[str, Int[Tensor, " n"]]:
    """−1 where a question doesn't apply."""
    known = [truth(plan) for plan in plans]
    return {
        name: torch.tensor([answers.index(own[name]) if name in own else -1 for own in known])
        for name, answers in classes.items()
    }


def roughened(x: Int8[Tensor, "B N N N"], recipe: SolidRecipe, rng: torch.Generator) -> Float[Tensor, "B N N N"]:
    """Cells of shapes that are moved by up to a cell, and whose surface lies a little further in or out from place to place."""
    size = x.shape[-1]
    distance = x.float() * (2 / LEVELS)  # in cells
    coarse = (torch.rand(len(x), 1, 4, 4, 4, generator=rng) * 2 - 1) * recipe.swell
    distance += F.interpolate(coarse, size=(size, size, size), mode="trilinear", align_corners=False)[:, 0]
    distance += recipe.noise * torch.randn(x.shape, generator=rng)
    shift = torch.randint(-1, 2, (3,), generator=rng).tolist()
    return torch.roll(distance < 0, shift, (1, 2, 3)).float()


def kind_said(caption: str) -> str:
    """The kind that a caption names; empty for none."""
    words = [word.strip(",.?") for word in caption.lower().split()]
    for word in words:
        if word in FURNITURE:
            return FURNITURE[word]
    if "hole" in words:
        return "drilled"
    named = [SOLIDS[word] for word in words if word in SOLIDS]
    if len(named) > 1 and "on" in words:
        return "stack"
    return named[0] if named else ""


def agreement(told: Sequence[Mapping[str, str]], plans: Sequence[Plan]) -> dict[str, list[bool]]:
    """Question → whether the judge says what was asked for, of each shape that it applies to; and `all of it`, of every shape."""
    out: dict[str, list[bool]] = {}
    for own, plan in zip(told, plans, strict=True):
        hits: dict[str, Any] = {name: own.get(name) == value for name, value in truth(plan).items()}
        for name, hit in {**hits, "all of it": all(hits.values())}.items():
            out.setdefault(name, []).append(hit)
    return out
