"""What pictures, sounds, clips and shapes a model has: by the specs of its tokenizers, and, of what is given, by file names."""

from __future__ import annotations

import math
from typing import Literal

from mm.audio import READ
from mm.interfaces import ModalityTokenizer, Spec
from mm.shape_files import EXTENSIONS as SOLIDS
from mm.video import ANIMATIONS, EXTENSIONS

Medium = Literal["picture", "sound", "video", "shape"]
SOUNDS = frozenset(f".{name}" for name in READ)
"""Endings of files that are taken for sounds, where a picture could stand too."""
ANIMATED = frozenset(f".{name}" for name in ANIMATIONS)
CLIPS = frozenset(f".{name}" for name in EXTENSIONS) | ANIMATED
"""Endings of files that are videos, or may be (`ANIMATED`)."""
SHAPES = frozenset(f".{name}" for name in SOLIDS)
"""Endings of files that are meshes; shapes as grids are `.npz` files."""
ALONG = "mm-tiny, which comes along, and those trained with mm fit -c configs/systems"
SPEAKERS = f"models that speak or listen are {ALONG}/ardit.yaml, musicgen.yaml or asr.yaml"
"""What to use instead of a model without sound."""
FILMS = f"models that make or read video are {ALONG}/vid_gpt.yaml or video_vq.yaml"
"""What to use instead of a model without video."""
MODELLERS = f"models of shapes are {ALONG}/sar3d.yaml, voxel_lm.yaml or mesh_lm.yaml"
"""What to use instead of a model without shapes."""


def medium_of(spec: Spec) -> Medium | None:
    """What a tokenizer's elements stand for, by its spec; None: text, or vectors of none of these."""
    if spec.voxels > 0:
        return "shape"
    if spec.sample_rate > 0:
        return "sound"
    if spec.fps > 0:
        return "video"
    return "picture" if len(spec.max_grid) == 2 or spec.pixels else None


def longest(tokenizer: ModalityTokenizer) -> float:
    """Seconds of the longest item of a tokenizer of sound."""
    return tokenizer.spec.max_grid[0] / tokenizer.spec.frame_rate


def most_frames(spec: Spec) -> float:
    """Frames of the longest item of a tokenizer of video; infinite where it writes files."""
    return 1 + (spec.max_grid[0] - 1) * spec.frame_stride if spec.max_grid else math.inf
