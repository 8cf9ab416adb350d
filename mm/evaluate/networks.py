"""The judges: small convolutional networks trained here on real pictures, by seed, and kept as safetensors.

Letters in shapes: B batch, N pictures, C channels, S side in pixels, F features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mm import safe_io
from mm.data.example import digest
from mm.evaluate.protocol import Augmentation, Recipe, Schedule

MAX_BYTES = 1 << 28
"""Largest file of a judge that is read (256 MiB)."""
VERSION = "1"
"""Counts up when this file changes what a judge becomes."""
Say = Callable[[str], None]


class Judge(nn.Module):
    """Three strided convolutions, one hidden layer (the features), and a linear classifier for each question.

    Args:
        recipe: widths and channels.
        side: side at which pictures are looked at; others are scaled to it.
        classes: number of classes by question.
    """

    def __init__(self, recipe: Recipe, side: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.channels, self.side = recipe.channels, side
        first, second, third = recipe.widths
        self.trunk = nn.Sequential(
            *_block(recipe.channels, first, 5),
            *_block(first, second, 3),
            *_block(second, third, 3),
            nn.Flatten(),
            nn.Linear(third * (side // 8) ** 2, recipe.features, bias=False),
            nn.BatchNorm1d(recipe.features),
            nn.ReLU(),
        )
        self.questions = nn.ModuleDict({name: nn.Linear(recipe.features, n) for name, n in classes.items()})
        for module in self.trunk:
            if isinstance(module, nn.Conv2d):  # a third faster on CPUs
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Float[Tensor, "B C S S"]) -> dict[str, Tensor]:
        """Logits by question, of pictures that `look` prepared."""
        hidden = self.trunk(x)
        return {name: question(hidden) for name, question in self.questions.items()}

    def look(self, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N C S S"]:
        """Bytes as the network sees them: in [−1, 1], grey if it has one channel, `side`×`side`."""
        x = pixels.float().mul_(2 / 255).sub_(1)
        if self.channels == 1:
            x = x.mean(1, keepdim=True)
        if x.shape[-1] != self.side or x.shape[-2] != self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        return x.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, pixels: UInt8[Tensor, "N 3 H W"], batch: int = 256) -> Float[Tensor, "N F"]:
        """The penultimate layer."""
        self.eval()
        return torch.cat([self.trunk(self.look(part)) for part in pixels.split(batch)])

    @torch.no_grad()
    def classify(self, pixels: UInt8[Tensor, "N 3 H W"], question: str) -> Int[Tensor, " N"]:
        """The likeliest class of each picture."""
        return self.questions[question](self.features(pixels)).argmax(-1)


def _block(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


def vary(x: Float[Tensor, "B C S S"], by: Augmentation, rng: torch.Generator) -> Float[Tensor, "B C S S"]:
    """Pictures turned, scaled, moved, softened and roughened at random. What moves in from outside is their border."""
    count = len(x)

    def draw(amount: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=rng) * 2 - 1) * amount

    angle, zoom, shear, shift = draw(by.rotate), 1 + draw(by.zoom), draw(by.shear), draw(by.shift, 2)
    rows = (
        torch.stack((angle.cos() * zoom, shear - angle.sin() * zoom, shift[:, 0]), -1),
        torch.stack((angle.sin() * zoom, angle.cos() * zoom, shift[:, 1]), -1),
    )
    places = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, places, padding_mode="border", align_corners=False)
    if by.blur:
        amount = torch.rand(count, 1, 1, 1, generator=rng) * by.blur
        x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), amount)
    x = x + draw(by.brightness, x.shape[1], 1, 1)
    return x + by.noise * torch.randn(x.shape, generator=rng)


def train(
    judge: Judge,
    pixels: UInt8[Tensor, "N 3 H W"],
    labels: Mapping[str, Int[Tensor, " N"]],
    recipe: Recipe,
    seed: int,
    say: Say = lambda line: None,
) -> None:
    """AdamW with a one-cycle learning rate on cross-entropies summed over the questions; a label of −1 asks nothing.

    Deterministic by `seed` for one number of threads; torch's own random state is left alone.
    Raises `ValueError` for labels that don't fit the pictures.
    """
    for name, values in labels.items():
        if len(values) != len(pixels):
            raise ValueError(f"got {len(values)} labels {name!r} for {len(pixels)} pictures; give one a picture")
    fit(judge, judge.look(pixels), labels, recipe, lambda x, rng: vary(x, recipe.augmentation, rng), seed, say)


def fit(
    judge: nn.Module,
    x: Tensor,
    labels: Mapping[str, Int[Tensor, " N"]],
    schedule: Schedule,
    change: Callable[[Tensor, torch.Generator], Tensor],
    seed: int,
    say: Say = lambda line: None,
) -> None:
    """The same on examples of any kind: `change` varies a batch of them, and the judge gives logits by question."""
    count = len(x)
    size = min(schedule.batch, count)
    steps = schedule.epochs * (count // size)
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step / steps))
    judge.train()
    for epoch in range(schedule.epochs):
        total = 0.0
        for rows in torch.randperm(count, generator=rng)[: count // size * size].split(size):
            logits = judge(change(x[rows], rng))
            loss = torch.stack([_loss(logits[name], labels[name][rows], schedule.smoothing) for name in labels]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            total += float(loss.detach())
        say(f"epoch {epoch + 1} of {schedule.epochs}: loss {total / (count // size):.3f}")
    judge.eval()


def one_cycle(progress: float, warm: float = 0.3) -> float:
    """Factor of the learning rate: half a cosine from 1/25 up to 1 over the share `warm`, then half a cosine to 0."""
    if progress < warm:
        return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * progress / warm))
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm))))


def _loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    if bool((labels < 0).all()):
        return logits.sum() * 0.0
    return F.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=-1)


def obtain(
    name: str,
    pixels: UInt8[Tensor, "N 3 H W"],
    labels: Mapping[str, Int[Tensor, " N"]],
    classes: Mapping[str, int],
    recipe: Recipe,
    *,
    side: int,
    seed: int,
    folder: Path | None,
    identity: Sequence[str],
    say: Say = lambda line: None,
) -> Judge:
    """A trained judge: from `folder` where the same was trained before, else trained now and kept there.

    `identity` names the data; with the recipe, seed, side and labels it decides whether a file is the same judge. A
    file that is damaged or doesn't fit is trained anew.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(recipe, side, classes)
    asked = [values.numpy().tobytes() for _, values in sorted(labels.items())]
    settings = json.dumps([VERSION, asdict(recipe), side, seed, dict(classes)], sort_keys=True)

    def learn(say: Say) -> None:
        say(f"training on {len(pixels):,} pictures")
        train(judge, pixels, labels, recipe, seed, say)

    keep(name, judge, learn, settings=settings, identity=(*identity, *asked), folder=folder, say=say)
    return judge


def keep(
    name: str,
    judge: nn.Module,
    learn: Callable[[Say], None],
    *,
    settings: str,
    identity: Sequence[str | bytes],
    folder: Path | None,
    say: Say = lambda line: None,
) -> None:
    """Fill a judge from `folder` where the same was trained before, else by `learn`, and keep it there. Settings and
    identity decide what is the same; a file that is damaged or doesn't fit is trained anew."""
    path = None if folder is None else folder / f"{name}-{digest(settings, *identity)}.safetensors"
    if path is not None and path.is_file():
        try:
            judge.load_state_dict(safe_io.read_tensors(path, judge.state_dict(), max_bytes=MAX_BYTES))
            say(f"{name}: read from {path.name}")
            judge.eval()
            return
        except ValueError as error:
            say(f"{name}: trained again, since {error}")
    learn(lambda line: say(f"{name}: {line}"))
    if path is not None:
        safe_io.write_tensors(path, judge.state_dict(), {"name": name, "settings": settings})
