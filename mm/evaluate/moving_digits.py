"""The recogniser of digits in frames, and what it is trained on: the digits that are not held out, each cut out of a frame
that the source draws, as generated frames are.

Letters in shapes: N pictures, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mm.data.example import BrokenExample
from mm.data.moving import MovingSource, Plan
from mm.data.moving_paths import Course
from mm.data.moving_things import Thing, draw_printed
from mm.data.sources import DIGIT_NAMES
from mm.evaluate.motion import Frames, centred
from mm.evaluate.networks import Judge, Say, obtain
from mm.evaluate.protocol import Protocol

PRINTED = 8000
"""Digits of the typeface that the recogniser is trained on."""
LARGEST = 20_000
"""Handwritten ones, at the most."""
SEED = 7919
"""Added to the seed, so that no printed digit of a clip is one of these."""


def frame_recogniser(
    source: MovingSource, protocol: Protocol, folder: Path | None, say: Say = lambda line: None
) -> Judge:
    """Trained on the digits of a source that are not held out."""
    pool = source.pools.get("digit")
    say("video: drawing digits to learn from")
    pixels, digits = training_frames(source, protocol.seed)
    return obtain(
        "moving-digits",
        pixels,
        {"digit": digits},
        {"digit": len(DIGIT_NAMES)},
        protocol.digit_judge,
        side=protocol.side,
        seed=protocol.seed,
        folder=folder,
        identity=("printed" if pool is None else pool.source.identity, str(source.size), str(source.holdout_every)),
        say=say,
    )


def training_frames(source: MovingSource, seed: int) -> tuple[UInt8[Tensor, "N 3 S S"], Tensor]:
    """Digits as `seen` shows them, with their names."""
    rng = np.random.default_rng([seed, SEED])
    pool = source.pools.get("digit")
    things: list[Thing] = []
    if pool is None:
        things = [draw_printed(rng, "white", (seed + SEED, number)) for number in range(PRINTED)]
    else:
        rows = pool.rows[False]
        for row in rows[:: -(-len(rows) // LARGEST)]:
            try:
                things.append(pool.thing(int(row), rng, "white"))
            except BrokenExample:
                continue
    frames, digits = [], []
    for thing in things:
        still = Course(("right",), (float(rng.uniform()), float(rng.uniform())))
        try:
            video = source.draw(Plan("straight", (thing,), (still,), "black", ""), 1)
        except BrokenExample:
            continue
        frames.append(video.frames)
        digits.append(thing.digit)
    return torch.cat([seen(clip) for clip in frames]), torch.tensor(digits)


def seen(frames: Frames) -> UInt8[Tensor, "N 3 S S"]:
    """Frames as the recogniser is shown them: the ink, white on black, in the middle."""
    return torch.from_numpy(centred(frames)).permute(0, 3, 1, 2).contiguous()


def recognised(judge: Judge, clips: Sequence[Frames], number: int) -> list[int]:
    """The digit in frame `number` of each clip (−1: the last)."""
    if not clips:
        return []
    found: list[int] = judge.classify(torch.cat([seen(clip[[number]]) for clip in clips]), "digit").tolist()
    return found
