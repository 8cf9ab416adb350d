"""A clip of which a span is spoken anew: which elements are kept, and how the new span is set into the old samples.

Letters in shapes: S samples, T elements, X content of an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from mm.audio import Audio, SoundSource, load_audio
from mm.interfaces import ModalityTokenizer
from mm.pipelines.media import longest
from mm.pipelines.utterances import as_seconds, check_speed

FADE = 0.01
"""Seconds in which the old sound passes over into the new one and back, inside the span."""


@dataclass(frozen=True)
class Edit:
    """A clip, and the span of it (seconds) that is spoken anew; the text then is that of the whole result."""

    clip: SoundSource
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An edit in elements and samples."""

    clip: Audio
    """At the tokenizer's rate."""
    first: int
    """Samples [first, last) are replaced."""
    last: int
    made: int
    """Samples that replace them."""
    known: Shaped[Tensor, "T ..."]
    """Elements of the result; those to be generated hold 0."""
    given: Bool[Tensor, " T"]
    probe: slice
    """Known elements after the span that are generated too, so that candidates can be told apart (ARDiT's post-filter)."""
    truth: Shaped[Tensor, "P ..."]
    """What they are."""

    def distance(self, content: Tensor) -> float:
        """How far what was generated after the span is from what stands there: mean square of vectors, share of other ids."""
        made = content[self.probe]
        if made.is_floating_point():
            return float((made - self.truth).square().mean())
        return float((made != self.truth).float().mean())

    def completed(self, content: Tensor) -> Tensor:
        """The result's elements, with what is known after the span."""
        out = content.clone()
        out[self.probe] = self.truth
        return out

    def joined(self, decoded: Audio) -> Audio:
        """The clip with the span replaced by that of the decoded result; every other sample is the clip's."""
        old, size = self.clip.samples, self.made
        new = np.zeros(size, np.float32)
        part = decoded.samples[self.first : self.first + size]
        loudest = max(1.0, float(np.abs(old).max()))  # or saving would make all of it quieter
        new[: len(part)] = part.clip(-loudest, loudest)
        fade = min(round(FADE * self.clip.rate), size // 2, (self.last - self.first) // 2)
        if fade:
            rising = ((np.arange(fade) + 0.5) / fade).astype(np.float32)
            if self.first:
                new[:fade] = rising * new[:fade] + (1 - rising) * old[self.first : self.first + fade]
            if self.last < len(old):
                new[size - fade :] = rising[::-1] * new[size - fade :] + rising * old[self.last - fade : self.last]
        return Audio(np.concatenate((old[: self.first], new, old[self.last :])), self.clip.rate)


def plan(edit: Edit, duration: float | None, block: int, tokenizer: ModalityTokenizer, text: str = "") -> Plan:
    """What an edit asks for.

    Args:
        edit: a clip of another rate is resampled first; kept samples are those of the resampled clip.
        duration: seconds of what replaces the span; by default those of the span.
        block: elements after the span that are generated as a probe.
        text: of the whole result; "": anything.

    Raises:
        ValueError: a span that isn't one of the clip, a result longer than one item, or too short for its text.
    """
    spec = tokenizer.spec
    clip = load_audio(edit.clip, rate=spec.sample_rate)
    begins, ends = as_seconds(edit.start, "the start of an edit"), as_seconds(edit.end, "the end of an edit")
    if not 0 <= begins < ends <= clip.seconds + 0.5 / clip.rate:
        raise ValueError(
            f"the span from {begins:g} to {ends:g} s isn't one of a clip of {clip.seconds:g} s; give 0 ≤ start < end ≤ "
            f"{clip.seconds:g}"
        )
    first, last = round(begins * clip.rate), min(round(ends * clip.rate), len(clip.samples))
    most = longest(tokenizer)
    made = last - first
    if duration is not None:  # no more than needs to be refused, so that numbers stay small
        made = round(max(0.0, min(as_seconds(duration, "the duration of an edit"), most + 1)) * clip.rate)
    if first == last or made < 1:
        raise ValueError("the span of an edit, and what replaces it, have at least one sample; give a longer one")
    if max(len(clip.samples), len(clip.samples) + made - (last - first)) > most * clip.rate:
        raise ValueError(
            f"an edited clip is up to {most:.2f} s long before and after, got {clip.seconds:.2f} s and a span of "
            f"{made / clip.rate:.2f} s in place of {(last - first) / clip.rate:.2f} s; cut the clip around the span"
        )
    check_speed((len(clip.samples) + made - (last - first)) / clip.rate, text)
    content = tokenizer.encode(clip).content
    samples = clip.rate / spec.frame_rate
    begin = min(math.floor(first / samples), len(content) - 1)
    end = min(max(math.ceil(last / samples - 1e-6), begin + 1), len(content))
    count = max(1, end - begin + round((made - (last - first)) / samples))
    if begin + count + len(content) - end > spec.max_grid[0]:
        raise ValueError(
            f"the edited clip would be longer than the {most:.2f} s that an item holds; cut it around the span"
        )
    known = torch.cat((content[:begin], content.new_zeros((count, *content.shape[1:])), content[end:]))
    given = torch.ones(len(known), dtype=torch.bool)
    probe = slice(begin + count, min(begin + count + block, len(known)))
    given[begin : probe.stop] = False
    truth = known[probe].clone()
    return Plan(clip=clip, first=first, last=last, made=made, known=known, given=given, probe=probe, truth=truth)
