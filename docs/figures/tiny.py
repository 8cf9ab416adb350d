"""What one model makes: pictures, sounds with what it hears in them, clips, and shapes; first draws, seed 0.

python docs/figures/tiny.py --out docs/mm-tiny.png
"""

from __future__ import annotations

import argparse
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

import mm  # noqa: E402
from mm.audio import Audio, log_mel  # noqa: E402
from mm.shape_views import turntable  # noqa: E402

PICTURES = (
    ["blue heart, noto", "mushroom, twemoji", "grinning face, twemoji", "tulip, noto", "snowman, noto"]
    + ["cactus, noto", "rocket, noto"]
    + [f"handwritten digit {name}" for name in ("three", "seven", "eight")]
)
SAID = [("three five one seven", "slt"), ("turn on the light", "rms"), ("seven", "theo"), ("two", "jackson")]
CLIPS = ["a handwritten seven moves right", "a handwritten three moves up, then left"]
FRAMES = 5
SHAPES = [
    "a tall table with four legs and a square top",
    "a tall chair with armrests",
    "a tall mug with one handle",
    "a cone on top of a box",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mm-tiny")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)

    figure = plt.figure(figsize=(12, 7), dpi=90)
    grid = figure.add_gridspec(4, 20, height_ratios=[1, 1.1, 1, 1.6], hspace=0.45, wspace=0.12)

    def panel(row: int, start: int, width: int, title: str, size: float = 7) -> Any:
        axes = figure.add_subplot(grid[row, start : start + width])
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(title, fontsize=size)
        for side in axes.spines.values():
            side.set_visible(False)
        return axes

    pictures = mm.TextToImagePipeline.from_pretrained(args.model)(PICTURES, seed=0).images
    for number, (prompt, picture) in enumerate(zip(PICTURES, pictures, strict=True)):
        panel(0, 2 * number, 2, prompt.replace("handwritten ", ""), 6).imshow(picture)

    said = mm.TextToSpeechPipeline.from_pretrained(args.model)(
        [text for text, _ in SAID], voice=[voice for _, voice in SAID], seed=0
    )
    sounds = [Audio(samples, said.sample_rate) for samples in said.audios]
    heard = mm.SpeechToTextPipeline.from_pretrained(args.model)(sounds).texts
    for number, ((text, voice), sound, words) in enumerate(zip(SAID, sounds, heard, strict=True)):
        mel = log_mel(torch.from_numpy(sound.samples), rate=sound.rate, bins=64, n_fft=1024, hop=160)
        panel(1, 5 * number, 5, f"“{text}”, {voice}\nheard again: “{words}”").imshow(
            mel.numpy(), origin="lower", aspect="auto", cmap="magma"
        )

    films = mm.TextToVideoPipeline.from_pretrained(args.model)(CLIPS, seed=0).videos
    for number, (prompt, frames) in enumerate(zip(CLIPS, films, strict=True)):
        for place in range(FRAMES):
            index = place * (len(frames) - 1) // (FRAMES - 1)
            title = prompt if place == FRAMES // 2 else ""
            panel(2, 10 * number + 2 * place, 2, title).imshow(frames[index])

    meshes = mm.TextTo3DPipeline.from_pretrained(args.model)(SHAPES, seed=0).meshes
    told = mm.ShapeToTextPipeline.from_pretrained(args.model)(meshes).texts
    for number, (prompt, mesh, words) in enumerate(zip(SHAPES, meshes, told, strict=True)):
        picture = turntable(mesh, frames=1, size=384)[0][64:-64]
        panel(3, 5 * number, 5, f"“{prompt}”\ntold again: “{words}”", 6).imshow(picture)

    figure.savefig(args.out, bbox_inches="tight", facecolor="white", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
