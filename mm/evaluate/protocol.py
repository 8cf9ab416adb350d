"""Every constant of the evaluation in one place. The values used stand in the results; changing one changes figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training pictures of a judge are varied, so that it judges content and not exact pixels. Amounts are the
    largest ones, drawn uniformly and to both sides; noise is a standard deviation. Pixels are in [−1, 1]."""

    rotate: float = 0.0
    """Radians."""
    zoom: float = 0.0
    """Relative."""
    shear: float = 0.0
    shift: float = 0.0
    """In units of half the side."""
    brightness: float = 0.0
    blur: float = 0.0
    """Share of a 3×3 mean mixed in, from 0 to this."""
    noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Training of a judge (`mm.evaluate.networks.fit`)."""

    epochs: int
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    batch: int = 128
    smoothing: float = 0.05
    """Label smoothing."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Schedule):
    """Shape and training of a judge of pictures (`mm.evaluate.networks`)."""

    channels: int
    """1: pictures are judged in grey."""
    widths: tuple[int, int, int]
    features: int
    """Width of the penultimate layer."""
    augmentation: Augmentation = field(default_factory=Augmentation)


DIGIT_JUDGE = Recipe(
    channels=1,
    widths=(24, 48, 64),
    features=128,
    epochs=12,
    augmentation=Augmentation(rotate=0.25, zoom=0.15, shear=0.2, shift=0.12, brightness=0.05, blur=0.5, noise=0.05),
)
EMOJI_JUDGE = Recipe(
    channels=3,
    widths=(32, 64, 128),
    features=192,
    epochs=10,
    augmentation=Augmentation(rotate=0.15, zoom=0.125, shift=0.1, brightness=0.05, blur=0.8, noise=0.1),
)


@dataclass(frozen=True, kw_only=True)
class SolidRecipe(Schedule):
    """Shape and training of the judge of shapes (`mm.evaluate.shape_judge`)."""

    widths: tuple[int, int, int]
    features: int
    examples: int
    """Shapes that it is trained on."""
    swell: float
    """Largest amount by which surfaces are moved in or out, place by place, in cells: a tokenizer does so too."""
    noise: float
    """Of the distance of each cell to the surface, in cells."""


SOLID_JUDGE = SolidRecipe(
    widths=(16, 32, 64), features=128, epochs=8, learning_rate=3e-3, batch=64, examples=8000, swell=0.4, noise=0.25
)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is drawn, how much of it, and how it is judged."""

    seed: int = 0
    """Of the choice of captions, of every generated picture, and of the judges' training."""
    samples: int = 200
    """Pictures generated for a figure (digits: the ten in turn)."""
    holdout_every: int = 20
    """Of the sorted unique keys of a source each so-manieth is held out, beginning with the first (0: none)."""
    trained_on: Literal["train", "all"] = "train"
    """What the model has seen: captions to draw and missing styles are taken from it. `all`: held-out keys too."""
    batch: int = 32
    """Rows that are generated at once."""
    single: int = 5
    """Pictures that are drawn one by one, for the seconds of a picture by itself."""
    caption_tokens: int = 96
    """Longest caption the model may write."""
    captioned: int = 500
    """Pictures that are captioned for a figure, at the most."""
    pictures_for_codes: int = 2000
    """Pictures of a source over which codebook usage is counted, evenly spread, beside the held-out ones."""
    side: int = 32
    """Side in pixels at which the judges look. Distances between pixels are taken at the tokenizer's own size."""
    digit_prompt: str = "handwritten digit {name}"
    emoji_prompt: str = "{caption}, {style}"
    skin_tone: str = "skin tone"
    """Captions that contain it are the skin tone variants."""
    controls: int = 120
    """Concepts of which the picture in one style is kept from the emoji judge, to know what it can tell of such."""
    rollout: int = 4
    """Clips are also made so many times as long as the model's own."""
    digit_judge: Recipe = DIGIT_JUDGE
    emoji_judge: Recipe = EMOJI_JUDGE
    solid_judge: SolidRecipe = SOLID_JUDGE

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "single", "caption_tokens", "captioned", "pictures_for_codes", "rollout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0 or self.holdout_every < 0 or self.holdout_every == 1:
            raise ValueError(f"seed must be >= 0 and holdout_every 0 or >= 2, got {self.seed} and {self.holdout_every}")
        if self.side < 8 or self.side % 8:
            raise ValueError(f"side must be a multiple of 8, got {self.side}")


GOALS: Mapping[tuple[str, str], float] = {
    ("tokenizer", "PSNR, held-out emoji"): 24.0,
    ("tokenizer", "codebook usage"): 0.80,
    ("digits", "recogniser, held-out real digits"): 0.98,
    ("digits", "generated, recognised"): 0.95,
    ("digits", "captions of held-out digits, exact"): 0.95,
    ("speech tokenizer", "STOI, clear speech"): 0.90,
    ("speech tokenizer", "word errors, digits, decoded"): 0.05,
    ("speech tokenizer", "digit recognised, real, originals"): 0.97,
    ("speech tokenizer", "digit recognised, real, decoded"): 0.93,
    ("speaking", "word errors, digits, generated"): 0.10,
    ("speaking", "digit recognised, real, generated"): 0.90,
    ("speaking", "speaker recognised, real, generated"): 0.90,
    ("hearing", "word errors, clear digits"): 0.05,
    ("hearing", "exact texts, real digits"): 0.95,
    ("editing", "samples outside identical"): 1.0,
    ("listening", "stopped within 0.5 s of an interruption"): 0.95,
    ("listening", "stopped before the interruption"): 0.05,
    ("listening", "stopped without reason, noise only"): 0.05,
    ("listening", "stopped without reason, silence only"): 0.05,
    ("video", "true clips: digit recognised, first frame"): 0.97,
    ("video", "true clips: motion as captioned"): 0.99,
    ("video", "rollout: digits recognised, last ÷ first frame"): 0.90,
    ("video", "rollout: direction as captioned"): 0.90,
    ("shapes", "true shapes: class"): 0.98,
    ("shapes", "tokenizer: IoU, held-out shapes"): 0.85,
    ("shapes", "tokenizer: codebook usage"): 0.50,
    ("shapes", "tokenizer: volume error"): 0.05,
    ("shapes", "generated: not empty"): 0.98,
    ("shapes", "generated: class"): 0.90,
    ("shapes", "generated: height"): 0.80,
    ("shapes", "generated: legs"): 0.80,
    ("shapes", "captions: class"): 0.95,
    ("shapes", "captions: exact"): 0.80,
    ("bytes", "strict, with the automaton"): 0.99,
    ("bytes", "one byte wrong: median error without ÷ with restart markers"): 2.0,
    ("emoji", "training captions: asked caption, pixel"): 0.70,
    ("emoji", "training captions: asked caption, feature"): 0.70,
}
"""What a figure should reach, by family and name; what an error should not exceed."""
