"""From sound to picture and back, without a word between: "listen to this digit, draw it", and "say what is drawn here".

Held-out recordings and held-out pictures of digits are given; what comes out is judged by the networks that judge spoken and
handwritten digits elsewhere, and the same judges on what is given stand beside. Each way counts by itself, for a model may
have been trained in one way only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import UInt8
from torch import Tensor

from mm import pictures
from mm.audio import Audio
from mm.data.sources import DIGIT_NAMES
from mm.evaluate import digits, speech_figures
from mm.evaluate.gallery import Gallery
from mm.evaluate.networks import Say
from mm.evaluate.protocol import Protocol as Settings
from mm.evaluate.recordings import Recordings
from mm.evaluate.results import Figure, share
from mm.evaluate.speech_judges import digit_judge
from mm.evaluate.subject import Tested
from mm.pipelines.any_to_any import AnyToAnyPipeline

FAMILY = "crossing"


class Crosses(Protocol):
    """What is asked of the model."""

    def draw_heard(self, audios: Sequence[Audio], seed: int) -> list[Any]:
        """A PIL picture for each sound."""

    def speak_seen(self, pixels: UInt8[Tensor, "N 3 S S"], seed: int) -> list[Audio]:
        """A sound for each picture."""


class CrossingSubject(Tested):
    """A model with pictures and sound, asked for one of them after the other, and for nothing else."""

    def _open(self) -> None:
        self.pipeline = AnyToAnyPipeline(self.model, self.recommended, self.batch)
        self.picture, self.speech = self.pipeline.picture, self.pipeline.speech
        for name in (self.picture, self.speech):
            self.pipeline.recommended[name] = self.pipeline.sampling(name, self.options)

    def draw_heard(self, audios: Sequence[Audio], seed: int) -> list[Any]:
        return self._turn([[audio] for audio in audios], self.picture, seed)

    def speak_seen(self, pixels: UInt8[Tensor, "N 3 S S"], seed: int) -> list[Audio]:
        return self._turn([[pictures.to_image(each)] for each in pixels], self.speech, seed)

    def _turn(self, documents: list[list[Any]], to: str, seed: int) -> list[Any]:
        if not documents:
            return []
        made = self.pipeline(documents, to=to, free=False, max_tokens=1, seed=seed).documents
        return [document[0] for document in made]


def evaluate_crossing(
    subject: Crosses,
    gallery: Gallery,
    clips: Recordings,
    protocol: Settings,
    judges: Path | None = None,
    say: Say = lambda line: None,
) -> list[Figure]:
    """Shares of digits that come out as the digit that went in, both ways.

    Raises `ValueError` for a source without held-out digits.
    """
    heard = clips.subset(clips.where(held=True)).spread(protocol.samples)
    seen = gallery.subset(gallery.where(held=True))
    if not len(heard) or not len(seen):
        raise ValueError(
            f"there are {len(heard)} recordings and {len(seen)} pictures of digits that training has not seen; give sources that "
            "hold some out"
        )
    step = max(1, len(seen) // protocol.samples)
    seen = seen.subset(range(0, len(seen), step)[: protocol.samples])
    eye = digits.recogniser(gallery, protocol, judges, say)
    ear = digit_judge(clips, judges, say, protocol.seed)
    said, drawn = torch.tensor([DIGIT_NAMES.index(text) for text in heard.texts]), torch.tensor(seen.digits)
    names = [DIGIT_NAMES[digit] for digit in seen.digits]

    say(f"crossing: drawing {len(heard)} spoken digits")
    size = seen.pixels.shape[-1]
    made = [
        pictures.to_bytes(pictures.fit_square(picture, size))
        for picture in subject.draw_heard(heard.audios, protocol.seed)
    ]
    seen_right = digits.right(eye, torch.stack(made), said)
    say(f"crossing: speaking {len(seen)} handwritten digits")
    spoken = subject.speak_seen(seen.pixels, protocol.seed)
    given_right = speech_figures.right(ear, heard.audios, "digit", heard.texts)
    heard_right = speech_figures.right(ear, spoken, "digit", names)
    return [
        share(FAMILY, "recogniser, the spoken digits given", given_right, control=True),
        share(FAMILY, "recogniser, the handwritten digits given", digits.right(eye, seen.pixels, drawn), control=True),
        share(FAMILY, "speech → picture, the same digit", seen_right, detail=speech_figures.counts_by(heard.texts, seen_right)),
        share(FAMILY, "picture → speech, the same digit", heard_right, detail=speech_figures.counts_by(names, heard_right)),
    ]  # fmt: skip
