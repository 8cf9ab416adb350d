"""Networks that judge sound: which digit is said, and by whom. Trained here, on real recordings.

They look at what lies below 4 kHz, at one loudness and without the silence at the ends, so that a codec's band or level
is not what they judge.

Letters in shapes: B batch, N windows, S samples of a window.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.audio import Audio, log_mel, resample
from mm.data.sources import DIGIT_NAMES
from mm.evaluate.networks import Say, fit, keep
from mm.evaluate.protocol import Schedule
from mm.evaluate.recordings import Recordings

VERSION = "1"
"""Counts up when this file changes what a judge becomes."""
RATE = 8000
"""Samples a second at which judges listen."""
WINDOW = RATE
"""Samples that a judge hears at once (1 s)."""
LOUDNESS = 0.1
"""Root-mean-square amplitude to which the sounding part is brought."""
QUIET = 0.03
"""Frames of 10 ms below this share of the loudest one's amplitude (−30 dB) are silence at the ends."""
BINS, N_FFT, HOP, FLOOR = 40, 256, 80, 0.05
"""Of the log-mel picture; the floor lies about 45 dB below speech at `LOUDNESS`."""


@dataclass(frozen=True, kw_only=True)
class SoundChange:
    """How training sounds of a judge are varied. Amounts are the largest ones, to both sides."""

    speed: float = 0.08
    """Relative; pitch moves with it."""
    shift: float = 0.1
    """Seconds."""
    gain: float = 4.0
    """dB."""
    noise: float = 0.15
    """White noise in units of `LOUDNESS`, from 0 to this."""


@dataclass(frozen=True, kw_only=True)
class SoundRecipe(Schedule):
    """Shape and training of a judge of sound."""

    widths: tuple[int, int, int] = (24, 48, 64)
    features: int = 128
    dropout: float = 0.2
    change: SoundChange = SoundChange()


DIGITS = SoundRecipe(epochs=10)
"""Digits and speakers of real recordings."""
VOICES = SoundRecipe(epochs=3)
"""Voices of the made corpus."""
MOST_WINDOWS = 1500
"""Of the made corpus that a judge of voices is trained on."""


class SoundJudge(nn.Module):
    """Three strided convolutions over a log-mel picture of one second, a hidden layer, a classifier for each question.

    Args:
        recipe: widths.
        classes: names of the classes by question.
    """

    def __init__(self, recipe: SoundRecipe, classes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.classes = {question: list(names) for question, names in classes.items()}
        layers: list[nn.Module] = []
        before, extent = 1, (BINS, 1 + WINDOW // HOP)
        for width, kernel in zip(recipe.widths, (5, 3, 3), strict=True):
            layers += [nn.Conv2d(before, width, kernel, 2, kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before, extent = width, (math.ceil(extent[0] / 2), math.ceil(extent[1] / 2))
        self.trunk = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Dropout(recipe.dropout),
            nn.Linear(before * extent[0] * extent[1], recipe.features, bias=False),
            nn.BatchNorm1d(recipe.features),
            nn.ReLU(),
        )
        self.questions = nn.ModuleDict({name: nn.Linear(recipe.features, len(n)) for name, n in self.classes.items()})

    def forward(self, x: Float[Tensor, "B S"]) -> dict[str, Tensor]:
        """Logits by question, of windows."""
        picture = log_mel(x, rate=RATE, bins=BINS, n_fft=N_FFT, hop=HOP, floor=FLOOR)
        hidden = self.trunk((picture[:, None] - 0.5) / 2)
        return {name: question(hidden) for name, question in self.questions.items()}

    @torch.no_grad()
    def classify(self, audios: Sequence[Audio], question: str) -> list[str]:
        """The likeliest class of each sound: log-probabilities averaged over its windows."""
        self.eval()
        out: list[str] = []
        for audio in audios:
            scores = self(windows(audio))[question].log_softmax(-1).mean(0)
            out.append(self.classes[question][int(scores.argmax())])
        return out


def windows(audio: Audio) -> Float[Tensor, "N S"]:
    """The sounding part at `RATE` and `LOUDNESS`: one window with it in the middle, or several that cover it evenly."""
    x = torch.from_numpy(np.ascontiguousarray(resample(audio, RATE).samples))
    frame = RATE // 100
    if not len(x):
        return torch.zeros(1, WINDOW)
    x = F.pad(x, (0, -len(x) % frame))
    level = x.reshape(-1, frame).square().mean(1).sqrt()
    loud = torch.nonzero(level > QUIET * level.max().clamp_min(1e-6)).flatten()
    if not len(loud):  # silence
        return torch.zeros(1, WINDOW)
    x = x[int(loud[0]) * frame : (int(loud[-1]) + 1) * frame]
    x = x * (LOUDNESS / x.square().mean().sqrt())
    if len(x) <= WINDOW:
        left = (WINDOW - len(x)) // 2
        return F.pad(x, (left, WINDOW - len(x) - left))[None]
    count = math.ceil(len(x) / WINDOW)
    starts = torch.linspace(0, len(x) - WINDOW, count).round().long().tolist()
    return torch.stack([x[start : start + WINDOW] for start in starts])


def vary(x: Float[Tensor, "B S"], by: SoundChange, rng: torch.Generator) -> Float[Tensor, "B S"]:
    """Windows faster or slower, moved, louder or softer, and with noise, at random. Silence moves in from outside."""
    count, size = x.shape

    def draw() -> Tensor:
        return torch.rand(count, 1, generator=rng) * 2 - 1

    places = torch.arange(size) - size / 2
    places = places * (1 + by.speed * draw()) + size / 2 + by.shift * RATE * draw()
    below = places.floor()
    low = below.long()
    inside = ((low >= 0) & (low < size - 1)).float()
    low = low.clamp(0, size - 2)
    x = torch.lerp(x.gather(1, low), x.gather(1, low + 1), places - below) * inside
    x = x * 10 ** (by.gain / 20 * draw())
    amount = by.noise * LOUDNESS * torch.rand(count, 1, generator=rng)
    return x + amount * torch.randn(x.shape, generator=rng)


def train_judge(
    name: str,
    clips: Recordings,
    questions: Mapping[str, Sequence[str]],
    recipe: SoundRecipe,
    *,
    seed: int = 0,
    most: int | None = None,
    folder: Path | None = None,
    say: Say = lambda line: None,
) -> SoundJudge:
    """A judge of the clips' `questions`, question → answer of each clip: from `folder`, or trained and kept there. No
    held-out clip is looked at.

    Raises `ValueError` where there is nothing to tell apart.
    """
    rows = clips.where(held=False)
    classes = {question: sorted({answers[row] for row in rows}) for question, answers in questions.items()}
    for question, names in classes.items():
        if len(names) < 2:
            raise ValueError(
                f"the clips to train on have {len(names)} classes of {question!r}; a judge needs 2 or more"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = SoundJudge(recipe, classes)

    def learn(report: Say) -> None:
        heard: list[Tensor] = []
        asked: dict[str, list[int]] = {question: [] for question in classes}
        for row in rows:
            if most is not None and len(heard) >= most:
                break
            for window in windows(clips.audios[row]):
                heard.append(window)
                for question, names in classes.items():
                    asked[question].append(names.index(questions[question][row]))
        report(f"training on {len(heard):,} windows of a second")
        labels = {question: torch.tensor(answers) for question, answers in asked.items()}
        with torch.random.fork_rng(devices=[]):  # dropout draws from the global state
            torch.manual_seed(seed)
            fit(judge, torch.stack(heard), labels, recipe, lambda x, rng: vary(x, recipe.change, rng), seed, report)

    answers = [json.dumps([questions[question][row] for row in rows]) for question in sorted(classes)]
    settings = json.dumps([VERSION, asdict(recipe), seed, most, classes], sort_keys=True)
    keep(name, judge, learn, settings=settings, identity=(clips.identity, *answers), folder=folder, say=say)
    return judge


def digit_judge(
    clips: Recordings, folder: Path | None = None, say: Say = lambda line: None, seed: int = 0
) -> SoundJudge:
    """Answers "digit" and "speaker" of single spoken digits. Raises `ValueError` for clips that say anything else."""
    for text in clips.texts:
        if text not in DIGIT_NAMES:
            raise ValueError(f"a clip says {text!r:.60}; give recordings of single digits, zero to nine")
    questions = {"digit": clips.texts, "speaker": clips.speakers}
    return train_judge("spoken-digits", clips, questions, DIGITS, seed=seed, folder=folder, say=say)


def voice_judge(
    clips: Recordings, folder: Path | None = None, say: Say = lambda line: None, seed: int = 0
) -> SoundJudge:
    """Answers "speaker" of clips of any length."""
    questions = {"speaker": clips.speakers}
    return train_judge("voices", clips, questions, VOICES, seed=seed, most=MOST_WINDOWS, folder=folder, say=say)
