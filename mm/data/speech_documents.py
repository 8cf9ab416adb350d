"""Documents of recognisers that read speech as a prompt: a sound, or vectors made from the text alone, then the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mm.ctc import Spelling
from mm.data.documents import Template, check_probability, happens
from mm.layout import Segment


class PromptedText(Template):
    """A sound as a prompt, and its text, which is learned. With probability `made` the prompt is made from the text instead, so
    that texts without sound teach the decoder too (Tsunoo et al. 2023, arXiv 2309.08876, train so on a pseudo-prompt).

    How it is made is our choice, for we could not check the paper's rule: the speech tokenizer has the mean vector of each
    character and its spread (`mm.ctc.LabelMeans`), and the text is spelled with them. A made prompt would be exact where a real
    one has errors; noise, and characters dropped or replaced at the rate `errors`, keep the decoder from trusting it too far.

    Args:
        made: probability; 1 reads texts only, and the examples need no sound.
        noise: how much of the characters' spread is added to their means.
        errors: share of the made prompt's characters that are dropped or replaced, half and half.
        text, speech: modalities.
        text_field, audio_field: fields of the example.
    """

    def __init__(
        self,
        made: float = 0.3,
        noise: float = 1.0,
        errors: float = 0.05,
        text: str = "text",
        speech: str = "speech",
        text_field: str = "text",
        audio_field: str = "audio",
    ) -> None:
        self.made, self.errors = check_probability("made", made), check_probability("errors", errors)
        if not 0 <= noise < float("inf"):
            raise ValueError(f"noise is a factor of at least 0, got {noise}")
        self.noise = noise
        self.text, self.speech = text, speech
        self.text_field, self.audio_field = text_field, audio_field

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        # both draws are taken in either case, so that what follows doesn't depend on the probability
        from_text, seed = happens(self.made, rng), int(torch.randint(1 << 31, (), generator=rng))
        text = example[self.text_field]
        prompt = Spelling(str(text), self.noise, self.errors, seed) if from_text else example[self.audio_field]
        return [Segment(self.speech, prompt, loss=False), Segment(self.text, text, loss=True)]
