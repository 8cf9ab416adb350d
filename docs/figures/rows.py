"""Pictures of several models side by side, a row a model, first draws, seed 0:

python docs/figures/rows.py --out docs/emoji-heads.png --real data/emoji-noto.tar,data/emoji-twemoji.tar \\
  --prompts "red apple, noto" "japan flag, twemoji" -- diffusion=runs/orthus_base/model regression=runs/orthus_base_mse/model

Ten digits are asked for where no prompts are given. A number behind @ is the guidance: mar=runs/digits/mar_v/model@2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mm import TextToImagePipeline
from mm.data.shards import ShardSource
from mm.data.sources import DIGIT_NAMES
from mm.pictures import fit_square
from mm.sheet import grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="LABEL=FOLDER[@GUIDANCE]")
    parser.add_argument("--out", required=True)
    parser.add_argument("--prompts", nargs="+", default=[f"handwritten digit {name}" for name in DIGIT_NAMES])
    parser.add_argument("--real", help="shards; the first row shows their pictures of the prompts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = [], []
    if options.real:
        source = ShardSource(options.real.split(","), caption="{caption}, {style}")
        known = {f"{e['caption']}, {e['style']}": e for e in (source[n] for n in range(len(source)))}
        images += [fit_square(known[prompt]["image"], 32) for prompt in options.prompts]
        labels += ["real", *[""] * (len(options.prompts) - 1)]
    for model in options.models:
        label, _, place = model.partition("=")
        folder, _, guidance = place.partition("@")
        pipeline = TextToImagePipeline.from_pretrained(folder)
        images += pipeline(options.prompts, seed=0, guidance=float(guidance or 1.0)).images
        labels += [label, *[""] * (len(options.prompts) - 1)]
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    grid(images, columns=len(options.prompts), captions=labels, scale=2).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
