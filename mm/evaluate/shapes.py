"""Shapes: are generated ones what was asked for, or one of the training; what a model says of given ones, by scales; what a
tokenizer keeps.

Prompts are plain captions of held-out shapes of `mm.data.shapes.ShapesSource`. What a shape is is told by a network trained here
(`shape_judge`), of which the same figures on true shapes, and on these after the tokenizer, stand beside as controls.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from mm.data.shapes import Plan, ShapesSource
from mm.evaluate.networks import Say
from mm.evaluate.protocol import Protocol
from mm.evaluate.results import Figure, mean, share
from mm.evaluate.shape_geometry import counted
from mm.evaluate.shape_judge import KIND, ShapeJudge, agreement, kind_said, shape_judge
from mm.evaluate.subject import Tested
from mm.evaluate.tokenizer import count_codes, usage_and_perplexity
from mm.interfaces import ModalityTokenizer, Sampling
from mm.pipelines.abilities import abilities_of
from mm.pipelines.image_to_3d import ImageTo3DPipeline
from mm.pipelines.outputs import MeshOutput
from mm.pipelines.shape_to_text import ShapeToTextPipeline
from mm.pipelines.text_to_3d import TextTo3DPipeline
from mm.shapes import Shape
from mm.voxels import iou

FAMILY = "shapes"
SHAPES = "shapes"
"""Kind of the source."""
ATTRIBUTES = (KIND, "height", "legs")
"""What has figures of its own; the rest stands in the detail."""
SHOWN = 40
CODED = 1000
"""Shapes over which codebook usage is counted, at the most."""
ALIKE = 0.95
"""Intersection over union from which on two shapes count as the same."""
CHUNK = 512
"""Training shapes that are compared at once."""
COUNT = 20_000
"""Shapes of the source, by default: those of the shipped configurations."""


class ShapeSubject(Tested):
    """A model with text and shapes, used the way its pipelines use it."""

    def _open(self) -> None:
        held, recommended, batch = self.model, self.recommended, self.batch
        self.makes = TextTo3DPipeline(held, recommended, batch)
        self.sees = ImageTo3DPipeline(held, recommended, batch)
        self.reads = ShapeToTextPipeline(held, recommended, batch)
        self.sampling: Sampling = self.makes.sampling(self.makes.shape, self.options)

    @property
    def tokenizer(self) -> ModalityTokenizer:
        return self.makes.tokenizer(self.makes.shape)

    @property
    def size(self) -> int:
        """Cells a side."""
        return self.tokenizer.spec.voxels

    def make(self, prompts: Sequence[str], seed: int) -> MeshOutput:
        """One shape a prompt; equal prompts give different ones."""
        return self.makes(list(prompts), seed=seed, **self.options)

    def write(self, shapes: Sequence[Shape], scales: int | None, max_tokens: int) -> list[str]:
        return self.reads(list(shapes), scales=scales, max_tokens=max_tokens, seed=0).texts

    def answer(self, shapes: Sequence[Shape], questions: Sequence[str], max_tokens: int) -> list[str]:
        """To a question each."""
        given = self.reads.encode_shapes(list(shapes))
        prompts = [[segment, self.reads.encode_text(asked)] for segment, asked in zip(given, questions, strict=True)]
        return self.reads.decode(self.reads.generate(prompts, max_tokens=max_tokens))

    def passes(self, prompt: str) -> int:
        """Forward passes that one shape takes by itself."""
        from mm.bench.scales import Counted

        engine = Counted(self.model)
        engine.generate(self.makes.requests(self.makes.encode([prompt]), sampling=self.sampling))
        return engine.passes


def there_and_back(tokenizer: ModalityTokenizer, shapes: Sequence[Shape], batch: int = 32) -> list[Shape]:
    """What is left of shapes after the tokenizer."""
    parts = [shapes[start : start + batch] for start in range(0, len(shapes), batch)]
    return [d.value for part in parts for d in tokenizer.decode_batch(tokenizer.encode_batch(part))]


@dataclass(frozen=True)
class Asked:
    """Held-out shapes, and what they are called."""

    plans: list[Plan]
    numbers: list[int]
    shapes: list[Shape]

    @property
    def prompts(self) -> list[str]:
        return [plan.plain for plan in self.plans]


def evaluate_shapes(
    subject: ShapeSubject | ModalityTokenizer,
    source: ShapesSource,
    protocol: Protocol,
    folder: Path | None = None,
    judges: Path | None = None,
    say: Say = lambda line: None,
) -> list[Figure]:
    """All figures of shapes; contact sheets go into `folder`. Of a tokenizer by itself those of what it keeps.

    Args:
        source: whole (split "all"), with the settings of the training.

    Raises:
        ValueError: a source that is a part, or a tokenizer of something else.
    """
    tokenizer = subject.tokenizer if isinstance(subject, ShapeSubject) else subject
    size = tokenizer.spec.voxels
    if not size:
        raise ValueError(
            f"{type(tokenizer).__name__} is no tokenizer of shapes; give one, or leave out the source 'shapes'"
        )
    asked = ask(source, protocol.samples, size)
    judge = shape_judge(source, size, protocol.solid_judge, protocol.seed, judges, say)
    figures = judged(judge, [shape.occupancy for shape in asked.shapes], asked, "true shapes: ", control=True)
    say(f"shapes: {len(asked.shapes)} through the tokenizer")
    back = there_and_back(tokenizer, asked.shapes, protocol.batch)
    figures += tokenizer_figures(tokenizer, source, asked, back, protocol)
    figures += judged(judge, [s.occupancy for s in back], asked, "true shapes after the tokenizer: ", control=True)
    if not isinstance(subject, ShapeSubject):
        return figures
    if subject.tokenizer.decodes:
        say(f"shapes: making {len(asked.plans)}")
        figures += generated_figures(subject, source, judge, asked, protocol, folder, say)
    if draws_pictured(subject):
        say("shapes: from pictures")
        figures += pictured_figures(subject, source, judge, asked, protocol, folder)
    if "shape" not in abilities_of(subject.reads).reads:
        say("shapes: no captions, training showed the model none")
        return figures
    say("shapes: captions and answers")
    return figures + caption_figures(subject, asked, protocol)


def draws_pictured(subject: ShapeSubject) -> bool:
    """Whether it makes shapes of pictures, as far as is known."""
    able = abilities_of(subject.makes)
    return "shape" in able.makes and ("picture", "shape") in able.follows


def ask(source: ShapesSource, count: int, size: int) -> Asked:
    """The first held-out shapes (all, if none is held out)."""
    if source.split != "all":
        raise ValueError(f"{source.what} is the split {source.split!r}; give the whole source, split 'all'")
    numbers = list(range(0, source.count, max(1, source.holdout_every)))[:count]
    plans = [source.plan(number) for number in numbers]
    return Asked(plans, numbers, [source.draw(plan, size) for plan in plans])


def judged(
    judge: ShapeJudge, grids: Sequence[Bool[np.ndarray, "N N N"]], asked: Asked, prefix: str, *, control: bool = False
) -> list[Figure]:
    """Whether the judge sees in shapes what their captions say, and what can be counted."""
    found = agreement(judge.tell(grids), asked.plans)
    counts = {name: [sum(hits), len(hits)] for name, hits in found.items()}
    figures = [share(FAMILY, f"{prefix}{name}", found[name], control=control) for name in ATTRIBUTES if name in found]
    figures.append(share(FAMILY, f"{prefix}all of it", found["all of it"], control=control, detail=counts))
    return figures + counted(FAMILY, prefix, grids, asked.plans, control=control)


def generated_figures(
    subject: ShapeSubject,
    source: ShapesSource,
    judge: ShapeJudge,
    asked: Asked,
    protocol: Protocol,
    folder: Path | None,
    say: Say,
) -> list[Figure]:
    """Of shapes that are made from captions."""
    started = time.perf_counter()
    made = subject.make(asked.prompts, protocol.seed)
    together = (time.perf_counter() - started) / len(made.meshes)
    figures = [share(FAMILY, "generated: not empty", [bool(grid.any()) for grid in made.grids])]
    figures += judged(judge, made.grids, asked, "generated: ")
    closed = [bool(mesh.is_watertight) for mesh in made.meshes if len(mesh.faces)]
    if closed:
        figures.append(share(FAMILY, "generated: watertight", closed, note="of those that aren't empty"))
    say("shapes: looking for them in the training")
    near = nearest(source, made.grids, subject.size)
    true = nearest(source, [shape.occupancy for shape in asked.shapes], subject.size)
    note = f"of {len(training(source)):,}"
    for values, prefix, control in ((true, "true shapes", True), (near, "generated", False)):
        more: dict[str, Any] = {"control": control, "note": note}
        figures.append(mean(FAMILY, f"{prefix}: IoU with the nearest training shape", values.tolist(), "IoU", **more))
        alike = [bool(value >= ALIKE) for value in values]
        figures.append(share(FAMILY, f"{prefix}: IoU of {ALIKE:g} or more with one", alike, **more))
    seconds = []
    for number, prompt in enumerate(asked.prompts[: protocol.single]):
        started = time.perf_counter()
        subject.make([prompt], protocol.seed + 1 + number)
        seconds.append(time.perf_counter() - started)
    threads = f"{torch.get_num_threads()} threads"
    figures.append(mean(FAMILY, "seconds a shape, one by one", seconds, "s", note=f"tokens and mesh, {threads}"))
    note = f"in batches of {subject.makes.batch_size}, {threads}"
    figures.append(
        Figure(family=FAMILY, name="seconds a shape", value=together, unit="s", n=len(made.meshes), note=note)
    )
    passes = float(subject.passes(asked.prompts[0]))
    figures.append(Figure(family=FAMILY, name="forward passes a shape", value=passes, unit="passes", n=1))
    sheet(folder, "shapes", made, asked.prompts)
    return figures


def pictured_figures(
    subject: ShapeSubject,
    source: ShapesSource,
    judge: ShapeJudge,
    asked: Asked,
    protocol: Protocol,
    folder: Path | None,
) -> list[Figure]:
    """Of shapes that are made from one picture of a held-out shape."""
    pictures = [source.image(n, shape, 64) for n, shape in zip(asked.numbers, asked.shapes, strict=True)]
    made = subject.sees(pictures, seed=protocol.seed, **subject.options)
    same = [iou(grid, true.occupancy) for grid, true in zip(made.grids, asked.shapes, strict=True)]
    sheet(folder, "shapes-pictures", made, asked.prompts)
    figures = [mean(FAMILY, "from a picture: IoU with what it shows", [float(v) for v in same], "IoU")]
    return figures + judged(judge, made.grids, asked, "from a picture: ")


def caption_figures(subject: ShapeSubject, asked: Asked, protocol: Protocol) -> list[Figure]:
    """Captions of held-out shapes, from all scales and from the first ones, and answers to every question about them."""
    total = len(subject.tokenizer.spec.scales)
    figures = []
    for scales in [None, *range(1, total)]:
        texts = [text.strip() for text in subject.write(asked.shapes, scales, protocol.caption_tokens)]
        seen = "" if scales is None else f", {scales} of {total} scales"
        right = [kind_said(text) == plan.kind for text, plan in zip(texts, asked.plans, strict=True)]
        exact = [text == plan.plain for text, plan in zip(texts, asked.plans, strict=True)]
        figures += [share(FAMILY, f"captions{seen}: class", right), share(FAMILY, f"captions{seen}: exact", exact)]
    pairs = [(shape, *pair) for shape, plan in zip(asked.shapes, asked.plans, strict=True) for pair in plan.questions]
    shapes, questions, answers = (list(column) for column in zip(*pairs, strict=True))
    told = subject.answer(shapes, questions, protocol.caption_tokens)
    hits = [text.strip() == answer for text, answer in zip(told, answers, strict=True)]
    by: dict[str, list[int]] = {}
    for question, hit in zip(questions, hits, strict=True):
        count = by.setdefault(question, [0, 0])
        count[0] += hit
        count[1] += 1
    return [*figures, share(FAMILY, "questions answered", hits, detail=by)]


def tokenizer_figures(
    tokenizer: ModalityTokenizer, source: ShapesSource, asked: Asked, back: Sequence[Shape], protocol: Protocol
) -> list[Figure]:
    """Of held-out shapes, there and back."""
    pairs = list(zip(asked.shapes, back, strict=True))
    figures = [
        mean(
            FAMILY,
            "tokenizer: IoU, held-out shapes",
            [float(iou(a.occupancy, b.occupancy)) for a, b in pairs],
            "IoU",
        )
    ]
    closed = [bool(b.mesh.is_watertight) for _, b in pairs]
    figures.append(share(FAMILY, "tokenizer: watertight", closed))
    same = [int(a.mesh.euler_number) == int(b.mesh.euler_number) for a, b in pairs]
    figures.append(share(FAMILY, "tokenizer: Euler number kept", same))
    errors = [abs(_volume(b) / _volume(a) - 1) for a, b in pairs]
    figures.append(mean(FAMILY, "tokenizer: volume error", errors, "error"))
    spec = tokenizer.spec
    if spec.kind == "discrete" and not spec.is_free:
        numbers = training(source)[: min(CODED, protocol.pictures_for_codes)]
        shapes = [source.draw(source.plan(number), spec.voxels) for number in numbers]
        counts = count_codes(tokenizer.encode_batch(shapes), 1, spec.vocab_size)
        used, perplexity = usage_and_perplexity(counts)
        note = f"of {spec.vocab_size:,} codes, {int(counts.sum()):,} tokens"
        n = len(shapes)
        figures += [
            Figure(family=FAMILY, name="tokenizer: codebook usage", value=used, unit="share", n=n, note=note),
            Figure(family=FAMILY, name="tokenizer: codebook perplexity", value=perplexity, unit="codes", n=n),
        ]
    return figures


def _volume(shape: Shape) -> float:
    return float(shape.mesh.volume) if len(shape.mesh.faces) else 0.0


def training(source: ShapesSource) -> list[int]:
    """Numbers of the shapes that aren't held out."""
    every = source.holdout_every
    return [number for number in range(source.count) if not every or number % every]


def nearest(source: ShapesSource, grids: Sequence[Bool[np.ndarray, "N N N"]], size: int) -> Float[np.ndarray, " n"]:
    """Intersection over union of each shape with the training shape that is most like it."""
    own = torch.from_numpy(np.stack(grids)).flatten(1).float()
    best = torch.zeros(len(own))
    numbers = training(source)
    for start in range(0, len(numbers), CHUNK):
        chunk = [source.draw(source.plan(number), size).occupancy for number in numbers[start : start + CHUNK]]
        others = torch.from_numpy(np.stack(chunk)).flatten(1).float()
        both = own @ others.T
        either = own.sum(1)[:, None] + others.sum(1) - both
        best = torch.maximum(best, (both / either.clamp(min=1)).amax(1))
    return best.numpy()


def sheet(folder: Path | None, name: str, made: MeshOutput, prompts: Sequence[str]) -> None:
    """The first shapes, not the best, with their prompts."""
    from mm.pipelines.outputs import portrait
    from mm.safe_io import atomic_file
    from mm.sheet import grid

    if folder is not None:
        shown = [portrait(mesh, 128) for mesh in made.meshes[:SHOWN]]
        with atomic_file(folder / f"{name}.png") as temporary:
            grid(shown, min(8, len(shown)), list(prompts[:SHOWN]), 1).save(temporary, format="PNG")


OPTIONS: Mapping[str, type] = {
    "count": int, "seed": int, "size": int, "kinds": list, "turned": bool, "sides": int, "holdout_every": int,
}  # fmt: skip
"""Settings of `ShapesSource` that `open_shapes` takes."""


def open_shapes(settings: Sequence[str]) -> ShapesSource:
    """The source that `shapes:SETTING=VALUE,…` names; several values of a setting are joined with "+". By default that of the
    shipped configurations.

    Raises `ValueError` for an unknown setting or an impossible value.
    """
    given: dict[str, Any] = {"count": COUNT}
    for setting in settings:
        name, _, value = setting.partition("=")
        kind = OPTIONS.get(name)
        if kind is None:
            raise ValueError(f"shapes has no setting {name!r}; there are {', '.join(OPTIONS)}")
        try:
            if kind is bool and value not in ("true", "false"):
                raise ValueError("it is true or false")
            given[name] = value.split("+") if kind is list else value == "true" if kind is bool else kind(value)
        except ValueError as error:
            raise ValueError(f"shapes: {name} can't be {value!r}: {error}") from error
    return ShapesSource(**given)
