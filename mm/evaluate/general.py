"""What holds for everything that was generated: validity, and seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from mm.evaluate.protocol import Protocol
from mm.evaluate.results import Figure, share
from mm.evaluate.subject import Outcome, Subject

FAMILY = "generation"


def evaluate_generation(subject: Subject, outcomes: Sequence[Outcome], protocol: Protocol) -> list[Figure]:
    """Shares of pictures and captions that decode without repair, and seconds of each (wall clock on this machine,
    tokens and decoding, in batches and one by one)."""
    drawn = [made for outcome in outcomes for made in outcome.drawn]
    written = [texts for outcome in outcomes for texts in outcome.written]
    figures = []
    if drawn:
        valid = [own for made in drawn for own in made.valid]
        reasons = Counter(reason for made in drawn for reason in made.reasons if reason)
        figures.append(share(FAMILY, "pictures valid", valid, detail=dict(reasons.most_common(10))))
        seconds = sum(made.seconds for made in drawn) / len(valid)
        figures.append(_seconds(f"seconds a picture, batches of {subject.batch}", seconds, len(valid)))
        prompts = next(outcome.prompts for outcome in outcomes if outcome.drawn)
        single = [subject.draw([prompt], protocol.seed).seconds for prompt in prompts[: protocol.single]]
        figures.append(_seconds("seconds a picture, one by one, median", median(single), len(single)))
    if written:
        proper = [own for texts in written for own in texts.valid]
        figures.append(share(FAMILY, "captions valid text", proper))
        seconds = sum(texts.seconds for texts in written) / len(proper)
        figures.append(_seconds(f"seconds a caption, batches of {subject.batch}", seconds, len(proper)))
    return figures


def _seconds(name: str, value: float, n: int) -> Figure:
    return Figure(family=FAMILY, name=name, value=value, unit="s", n=n)
