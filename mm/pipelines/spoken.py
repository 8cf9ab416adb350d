"""What is asked for of one item of speech, and which of several candidates is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mm.audio import Audio
from mm.generation import Grid
from mm.interfaces import Encoded
from mm.layout import Segment
from mm.pipelines.sound_editing import Plan

Score = Callable[[Audio, str], float]
"""How good a sound is for a text; larger is better."""


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One item that is asked for."""

    prompt: list[Segment]
    text: str
    grid: Grid
    """Elements: given, or bounds between which the model chooses."""
    words: Sequence[tuple[str, Grid]] = ()
    """Of a model that speaks word by word: each word, and its elements."""
    plan: Plan | None = None
    """Of an edit."""


def completed(item: Encoded, wanted: Plan | None) -> Encoded:
    """What was generated, with what an edit keeps put back in its place."""
    if wanted is None:
        return item
    kind = next(kind for kind in ("ids", "codes", "latents") if getattr(item, kind) is not None)
    values: Mapping[str, Any] = {kind: wanted.completed(item.content)}
    return replace(item, **values)


def best(
    numbers: range,
    utterances: Sequence[Sequence[Utterance]],
    tokens: Sequence[Sequence[Encoded]],
    audios: Sequence[Audio],
    score: Score | None,
) -> int:
    """Of some candidates the one with the largest score, or the smallest distance to what follows the edited span."""

    def worth(number: int) -> float:
        if score is not None:
            return float(score(audios[number], " ".join(part.text for part in utterances[number])))
        wanted = utterances[number][0].plan
        assert wanted is not None
        return -wanted.distance(tokens[number][0].content)

    return max(numbers, key=worth)
