"""Documents of systems of speech: of recognisers that read speech as a prompt (a sound, or vectors made from the text alone, then
the text), and of those that take speech apart before they make it (a voice, a text, prosody, then the sound)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mm.ctc import Spelling
from mm.data.documents import Template, TextToSpeech, check_probability, happens, null_segment
from mm.data.example import BrokenExample, Source
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


class MegaSpeech(TextToSpeech):
    """A voice, a text, how it is spoken, and the sound (Mega-TTS, Jiang et al. 2023, arXiv 2306.03509): the timbre of another
    clip of the same speaker, `seven`, the clip's prosody, the clip. Voice and text are given; prosody and sound are learned, and
    before each how long it is.

    The timbre is of the clip itself only where its speaker has no other. With probability `drop` everything that is given
    becomes the null condition, and one of the two that are learned follows it, drawn evenly: guidance of either compares with
    this.

    Args:
        source: the source of the examples, without a cache: where timbre and prosody are taken from.
        drop: probability; see above.
        text, timbre, prosody, speech: modalities.
        text_field, audio_field, speaker_field: fields of the example. `audio_field` may be cached for `speech`.
    """

    def __init__(
        self,
        source: Source,
        drop: float = 0.1,
        text: str = "text",
        timbre: str = "timbre",
        prosody: str = "prosody",
        speech: str = "speech",
        text_field: str = "text",
        speaker_field: str = "speaker",
        audio_field: str = "audio",
    ) -> None:
        super().__init__(
            drop=drop,
            source=source,
            text=text,
            speech=speech,
            text_field=text_field,
            speaker_field=speaker_field,
            audio_field=audio_field,
        )
        self.timbre, self.prosody = timbre, prosody
        self._own: dict[str, int] = {}

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        # every draw is taken in every case, so that what follows doesn't depend on the probability
        dropped, which_learned = happens(self.drop, rng), happens(0.5, rng)
        which = float(torch.rand((), generator=rng, dtype=torch.float64))
        assert self.source is not None
        key, speaker = str(example["key"]), str(example[self.speaker_field or ""])
        clips = self.clips().get(speaker, [])
        self._own = self._own or {key: index for some in self.clips().values() for key, index in some}
        if key not in self._own:
            raise BrokenExample(f"example {key!r} is not in {self.source.what}, where its prosody was to be taken from")
        speech = Segment(self.speech, example[self.audio_field], loss=True)
        if dropped and which_learned:
            return [null_segment(), speech]
        prosody = Segment(self.prosody, self.source[self._own[key]][self.audio_field], loss=True)
        if dropped:
            return [null_segment(), prosody]
        others = [index for other, index in clips if other != key] or [self._own[key]]
        timbre = self.source[others[int(which * len(others))]][self.audio_field]
        return [
            Segment(self.timbre, timbre, loss=False),
            Segment(self.text, example[self.text_field], loss=False),
            prosody,
            speech,
        ]

    def voices(self, source: Source) -> set[str]:
        """None by name: a voice is asked for by a clip."""
        return set()
