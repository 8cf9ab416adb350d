"""Loss curves of a training, a panel for each modality, from the event files below one or several runs (one after the other):

python docs/figures/losses.py runs/tiny runs/tiny_2 --out docs/mm-tiny-loss.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MODALITIES = ("text", "image", "speech", "video", "shape")


def curves(run: Path) -> dict[str, dict[int, float]]:
    """Tag → step → value; what a resumed training did again replaces what it had done before."""
    found: dict[str, dict[int, float]] = {}
    for events in sorted(run.rglob("events.out.tfevents.*"), key=lambda file: file.name.split(".")[3]):
        log = EventAccumulator(str(events), size_guidance={"scalars": 0})
        log.Reload()
        for tag in log.Tags()["scalars"]:
            scalars = log.Scalars(tag)
            kept = {step: value for step, value in found.get(tag, {}).items() if step < scalars[0].step}
            found[tag] = kept | {scalar.step: scalar.value for scalar in scalars}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", required=True)
    parser.add_argument("--smooth", type=int, default=25, help="logged values that are averaged")
    args = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "mm"  # the same figure, the same file
    figure, panels = plt.subplots(1, len(MODALITIES), figsize=(13, 2.4))
    runs = [curves(run) for run in args.runs]
    for name, axes in zip(MODALITIES, panels, strict=True):
        start = 0
        for run in runs:
            last = max(run.get("train/loss", {}), default=-1)
            values = run.get(f"train/{name}", {})
            steps = list(values)
            width = min(args.smooth, len(values))
            if width:
                smooth = np.convolve(list(values.values()), np.ones(width) / width, "valid")
                axes.plot([start + step for step in steps[width - 1 :]], smooth, linewidth=1)
            start += last + 1
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("step", fontsize=8)
    panels[0].set_ylabel("loss", fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
