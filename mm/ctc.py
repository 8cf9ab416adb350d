"""Connectionist temporal classification over characters (Graves et al. 2006): loss, greedy text, and frames compressed by it.

A frame is labelled with a character or with *blank*; a text is what is left when equal neighbours are joined and blanks dropped.
Compression keeps the encoder's frames that say something: those whose blank probability is no more than 0.95, the rule that a
later study (CJST) found most robust among those for decoder-only recognition with CTC prompts; that frames of one run of a label
are averaged is our choice.

Prompts for text without sound, also by our rule (the paper's own is not known to us): each character's mean vector, taken from
training sounds, with some of their spread.

Letters in shapes: B batch, T frames, V labels with blank, N vectors, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

BLANK = 0
ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"
LABELS = len(ALPHABET) + 1
"""V: blank is 0, characters follow in the order of `ALPHABET`."""
DROP = 0.95
"""Blank probability above which a frame is dropped."""
MAX_TEXT = 1 << 16
"""Longest text that is spelled, in characters."""


# --- text -------------------------------------------------------------------------------------------------------------


def spell(text: str) -> list[int]:
    """Labels of a text: lower case, punctuation as spaces, single spaces between words.

    Raises:
        ValueError: not a text, too long, or letters and digits that the alphabet lacks.
    """
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        what = f"a text of {len(text):,} characters" if isinstance(text, str) else f"a {type(text).__name__}"
        raise ValueError(f"got {what} to spell, expected text of up to {MAX_TEXT:,} characters")
    lower = text.lower().replace("\u2019", "'")
    if odd := sorted({c for c in lower if c.isalnum() and c not in ALPHABET}):
        raise ValueError(
            f"{text[:40]!r} has {odd[0]!r}, expected letters a to z: write numbers and letters out as words"
        )
    words = "".join(c if c in ALPHABET else " " for c in lower).split()
    return [ALPHABET.index(c) + 1 for c in " ".join(words)]


def unspell(labels: Sequence[int]) -> str:
    """The text of labels without blanks; single spaces between words."""
    return " ".join("".join(ALPHABET[label - 1] for label in labels).split())


def greedy(scores: Float[Tensor, "T V"]) -> list[int]:
    """Labels of the likeliest path: equal neighbours joined, blanks dropped."""
    return [label for label in scores.argmax(-1).unique_consecutive().tolist() if label != BLANK]


@dataclass(frozen=True)
class Spelling:
    """A text that stands for its sound: encoded, it is a made prompt."""

    text: str
    noise: float = 1.0
    """How much of the characters' spread is added to their means; 0 = none."""
    errors: float = 0.0
    """Share of the characters that are dropped or replaced, half and half."""
    seed: int = 0


# --- loss -------------------------------------------------------------------------------------------------------------


def ctc_loss(
    logits: Float[Tensor, "B T V"], lengths: Int[Tensor, " B"], targets: Sequence[Sequence[int]]
) -> Float[Tensor, ""]:
    """−log p of the texts ÷ the number of their characters. A text that has no room in its frames counts as 0."""
    flat = torch.tensor([label for target in targets for label in target], dtype=torch.int64)
    sizes = torch.tensor([len(target) for target in targets], dtype=torch.int64)
    scores = logits.float().log_softmax(-1).transpose(0, 1)
    total = F.ctc_loss(scores, flat, lengths.cpu(), sizes, blank=BLANK, reduction="sum", zero_infinity=True)
    return total / max(1, len(flat))


# --- compression ------------------------------------------------------------------------------------------------------


def compress(
    frames: Float[Tensor, "T D"], logits: Float[Tensor, "T V"], drop: float = DROP
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
    """One vector for each run of frames of one label, the mean of its frames, and the labels. Frames whose blank probability is
    above `drop` are left out, and end a run. Where none is left (silence): the mean of all, as blank."""
    kept = logits.float().softmax(-1)[:, BLANK] <= drop
    label = logits.argmax(-1)
    if not bool(kept.any()):
        return frames.mean(0, keepdim=True), label.new_full((1,), BLANK)
    begins = kept.clone()
    begins[1:] &= ~kept[:-1] | (label[1:] != label[:-1])
    run = (begins.cumsum(0) - 1)[kept]
    total = frames.new_zeros(int(begins.sum()), frames.shape[1]).index_add(0, run, frames[kept])
    return total / run.bincount()[:, None], label[begins]


class LabelMeans(nn.Module):
    """Mean and standard deviation of the vectors of each label, from training sounds."""

    averaged = False
    """`mm.ema.EMA` leaves them alone: they are those of the averaged encoder already."""
    mean: Tensor
    spread: Tensor
    seen: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(LABELS, dim))
        self.register_buffer("spread", torch.zeros(LABELS, dim))
        self.register_buffer("seen", torch.zeros(LABELS, dtype=torch.bool))

    @torch.no_grad()
    def fit(self, vectors: Float[Tensor, "N D"], labels: Int[Tensor, " N"]) -> None:
        """Take them from vectors and their labels. Those of a label that is not among them become those of all. Raises
        `ValueError` for no vectors."""
        if not len(vectors) or len(vectors) != len(labels):
            raise ValueError(
                f"got {len(vectors)} vectors and {len(labels)} labels to take means of; give one label a vector"
            )
        x = vectors.double()
        which = F.one_hot(labels, LABELS).to(x)
        count = which.sum(0)[:, None]
        mean = which.t() @ x / count.clamp(min=1)
        variance = which.t() @ (x - mean[labels]).square() / count.clamp(min=1)
        here = count > 0
        self.mean.copy_(torch.where(here, mean, x.mean(0)))
        self.spread.copy_(torch.where(here, variance, x.var(0, correction=0)).sqrt())
        self.seen.copy_(here[:, 0])

    def prompt(self, spelling: Spelling) -> Float[Tensor, "N D"]:
        """Vectors of a text, one a character; of one without characters, blank's. The same for the same seed. Raises
        `ValueError` before `fit`."""
        if not bool(self.seen.any()):
            raise ValueError(
                "prompts from text need a trained speech encoder, and this one has seen no sound: train it first"
            )
        rng = torch.Generator().manual_seed(spelling.seed)
        labels = torch.tensor(spell(spelling.text), dtype=torch.int64)
        chance, other = torch.rand(len(labels), generator=rng), torch.randint(1, LABELS, labels.shape, generator=rng)
        labels = torch.where(chance < spelling.errors / 2, other, labels)
        labels = labels[(chance < spelling.errors / 2) | (chance >= spelling.errors)]
        labels = (labels if len(labels) else torch.tensor([BLANK])).to(self.mean.device)
        draw = torch.randn(len(labels), self.mean.shape[1], generator=rng).to(self.mean)
        return self.mean[labels] + spelling.noise * self.spread[labels] * draw
