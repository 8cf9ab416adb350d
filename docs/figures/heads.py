"""The pictures of docs/heads.md: `python docs/figures/heads.py [mixture] [cost]` writes docs/heads.png and docs/heads-cost.svg.

Needs matplotlib (`make setup-bench`); each takes about a minute on one thread.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import matplotlib
import torch

from mm.bench.heads import FEW, attention_times, of_data, raster_model, token_times
from mm.bench.mixture import sampled, train
from mm.heads.diffusion import DiffusionHead
from mm.heads.gaussian import GaussianHead
from mm.heads.regression import RegressionHead

DOCS = Path(__file__).parent.parent
ANGLES = (0.3, 1.9)
"""Radians; a colour each."""


def mixture() -> None:
    """Real points and those of three trained heads, at two angles."""
    from matplotlib import pyplot

    panels = {
        "data": of_data,
        "diffusion, 10 steps": partial(sampled, train(DiffusionHead(sampler=FEW, width=64))),
        "regression": partial(sampled, train(RegressionHead(layers=3))),
        "Gaussian": partial(sampled, train(GaussianHead())),
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(8, 2.3), sharex=True, sharey=True)
    for axis, (name, made) in zip(axes, panels.items(), strict=True):
        for number, angle in enumerate(ANGLES):
            x, y = made(torch.full((300,), angle), seed=number).T
            axis.scatter(x, y, s=3, alpha=0.5, linewidths=0, color=f"C{number}")
        axis.set(title=name, xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    figure.tight_layout()
    figure.savefig(DOCS / "heads.png", dpi=110)


def cost(side: int = 32, rounds: int = 5) -> None:
    """Milliseconds a vector over the course of an item, and the part of it that is attention."""
    from matplotlib import pyplot

    model = raster_model(256, 6, side)
    times, _ = token_times(model, side, rounds)
    lengths = [1, *range(side, side * side + 1, side * 4)]
    attention = attention_times(model, lengths)
    smooth = times.unfold(0, side, 1).median(1).values
    figure, axis = pyplot.subplots(figsize=(6, 2.6))
    axis.plot(range(side // 2, side // 2 + len(smooth)), smooth, label=f"a vector (running median of {side})")
    axis.plot(lengths, attention, label="its attention, timed alone")
    axis.set(xlabel="vectors generated", ylabel="ms of processor time", ylim=(0, None), xlim=(0, side * side))
    axis.legend(loc="center right", frameon=False)
    figure.tight_layout()
    figure.savefig(DOCS / "heads-cost.svg", metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="mixture|cost")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    torch.set_num_threads(1)
    pictures = {"mixture": mixture, "cost": cost}
    for name in parser.parse_args().names or pictures:
        if name not in pictures:
            parser.error(f"{name!r} is none of {', '.join(pictures)}")
        pictures[name]()
