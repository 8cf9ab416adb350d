"""Examples → documents. A document is a list of segments in reading order; `mm.layout` turns it into a token stream.

Which segment is predicted is said once, here (`loss`). Classifier-free guidance needs a model that also knows the
unconditional case: with probability `drop` the condition is replaced by the *null condition*, a segment of modality
"null" without content.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mm.data.example import BrokenExample, Source
from mm.interfaces import Encoded
from mm.layout import NULL, Segment


def null_segment() -> Segment:
    """The null condition: what stands in the place of a condition that is dropped."""
    return Segment(NULL, None, loss=False)


class Template(abc.ABC):
    """Turns an example into a document. Draws come from `rng` only, so a document depends on its example and seed."""

    @abc.abstractmethod
    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        """Raises `BrokenExample` for a field that the example lacks."""


def happens(probability: float, rng: torch.Generator) -> bool:
    """True with the given probability. Always takes one draw, so that what follows doesn't depend on it."""
    return float(torch.rand((), generator=rng)) < probability  # rand lies in [0, 1): p = 0 never, p = 1 always


def check_probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability between 0 and 1, got {value}")
    return value


class Pair(Template):
    """A condition, which may be dropped, and what is generated from it."""

    def __init__(
        self, condition: tuple[str, str], generated: tuple[str, str], drop: float, condition_loss: bool
    ) -> None:
        self.condition, self.generated = condition, generated
        self.drop, self.condition_loss = check_probability("drop", drop), condition_loss

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        field, modality = self.condition
        if happens(self.drop, rng):
            first = null_segment()  # the dropped field isn't even read
        else:
            first = Segment(modality, example[field], loss=self.condition_loss)
        field, modality = self.generated
        return [first, Segment(modality, example[field], loss=True)]


class TextToImage(Pair):
    """Text, then the picture it asks for. The text is dropped with probability `drop`.

    `text` and `image` name the modalities, `text_field` and `image_field` the fields of the example. With `text_loss`
    the text is learned too (Liquid, Chameleon).
    """

    def __init__(
        self,
        drop: float = 0.1,
        text_loss: bool = False,
        text: str = "text",
        image: str = "image",
        text_field: str = "text",
        image_field: str = "image",
    ) -> None:
        super().__init__((text_field, text), (image_field, image), drop, text_loss)


class ImageToText(Pair):
    """A picture, then its caption. The picture is dropped with probability `drop` (0: captioning needs no guidance)."""

    def __init__(
        self,
        drop: float = 0.0,
        image_loss: bool = False,
        text: str = "text",
        image: str = "image",
        text_field: str = "text",
        image_field: str = "image",
    ) -> None:
        super().__init__((image_field, image), (text_field, text), drop, image_loss)


class TextToVideo(Pair):
    """Text, then the clip it asks for. The text is dropped with probability `drop`."""

    def __init__(
        self,
        drop: float = 0.1,
        text: str = "text",
        video: str = "video",
        text_field: str = "text",
        video_field: str = "video",
    ) -> None:
        super().__init__((text_field, text), (video_field, video), drop, False)


class VideoToText(Pair):
    """A clip, then its caption, which is learned. The clip is dropped with probability `drop` (0: captioning needs no
    guidance)."""

    def __init__(
        self,
        drop: float = 0.0,
        text: str = "text",
        video: str = "video",
        text_field: str = "text",
        video_field: str = "video",
    ) -> None:
        super().__init__((video_field, video), (text_field, text), drop, False)


class TextToSpeech(Template):
    """A voice, a text, and the sound of the text in that voice: `theo: `, `seven`, the clip. Voice and text are given; the sound
    is learned, and before it how long it is.

    With probability `reference` a clip of the same speaker, drawn from the others of `source`, stands in the place of the
    name, where there is one: so any voice can be asked for by a sample. With probability `drop` voice and text together
    become the null condition.

    A small model loses its place in a long text. `by_word` gives it its place: after the whole text each word stands once more,
    right before its own part of the sound, whose end says that the next word's turn has come (as phonemes do in ELLA-V, Song
    et al. 2024, section 3). An example without `words` is one word.

    Args:
        drop, reference: probabilities; see above.
        by_word: whether words and their sounds alternate; for sounds that come as tokens (`cached` of the data module).
        words_field: field with [word, first second, last second] of each word.
        frame_rate: elements a second of the tokens, for `by_word`.
        source: where reference clips come from; as a rule the source of the examples.
        text, speech: modalities.
        text_field, audio_field: fields of the example.
        speaker_field: field with the speaker's name; None: documents have no voice.
    """

    def __init__(
        self,
        drop: float = 0.1,
        reference: float = 0.0,
        source: Source | None = None,
        text: str = "text",
        speech: str = "speech",
        text_field: str = "text",
        speaker_field: str | None = "speaker",
        audio_field: str = "audio",
        by_word: bool = False,
        words_field: str = "words",
        frame_rate: float | None = None,
    ) -> None:
        self.drop, self.reference = check_probability("drop", drop), check_probability("reference", reference)
        if by_word and (frame_rate is None or not 0 < frame_rate < 1e6):
            raise ValueError(f"by_word needs frame_rate, the tokenizer's elements a second, got {frame_rate}")
        self.by_word, self.words_field, self.frame_rate = by_word, words_field, frame_rate
        if reference and (source is None or speaker_field is None):
            raise ValueError(
                f"reference clips (probability {reference}) are drawn from others of the same speaker; give source, and the "
                "speaker_field that tells them"
            )
        self.source, self.text, self.speech = source, text, speech
        self.text_field, self.speaker_field, self.audio_field = text_field, speaker_field, audio_field
        self._clips: dict[str, list[tuple[str, int]]] = {}

    def clips(self) -> dict[str, list[tuple[str, int]]]:
        """Key and index of each clip of the source, by speaker. Examples without a speaker are left out."""
        if not self._clips and self.source is not None:
            for index in range(len(self.source)):
                try:
                    example = self.source[index]
                    entry = (str(example["key"]), index)
                    self._clips.setdefault(str(example[self.speaker_field or ""]), []).append(entry)
                except BrokenExample:  # the loader, which meets it too, skips and counts it
                    continue
        return self._clips

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        # every draw is taken in every case, so that what follows doesn't depend on the probabilities
        dropped, by_clip = happens(self.drop, rng), happens(self.reference, rng)
        which = float(torch.rand((), generator=rng, dtype=torch.float64))
        if dropped:
            return [null_segment(), Segment(self.speech, example[self.audio_field], loss=True)]
        document = self._spoken(example)
        if self.speaker_field is None:
            return document
        name = str(example[self.speaker_field])
        others = [index for key, index in self.clips().get(name, []) if key != str(example["key"])] if by_clip else []
        if others:
            assert self.source is not None
            clip = self.source[others[int(which * len(others))]][self.audio_field]
            return [Segment(self.speech, clip, loss=False), *document]
        return [voice_segment(name, self.text), *document]

    def _spoken(self, example: Mapping[str, Any]) -> list[Segment]:
        """The text and its sound, whole or word by word."""
        text, sound = example[self.text_field], example[self.audio_field]
        if not self.by_word:
            return [Segment(self.text, text, loss=False), Segment(self.speech, sound, loss=True)]
        if not isinstance(sound, Encoded):
            raise ValueError(
                f"by_word takes tokens apart, but {self.audio_field} is a {type(sound).__name__}; name it in the data module's "
                f"cached: {{{self.audio_field}: {self.speech}}}"
            )
        document = [whole_text(text, self.text)]
        words = example.get(self.words_field) or [[text, 0.0, 0.0]]
        begin = 0
        for number, (word, _, _) in enumerate(words, 1):
            # a word's part lasts until the next one begins, the first has the silence before it, the last the rest
            end = len(sound) if number == len(words) else round(float(words[number][1]) * (self.frame_rate or 0.0))
            if not begin < end <= len(sound) - (len(words) - number):
                raise BrokenExample(
                    f"example {example['key']!r}: word {number} of {len(words)} spans the elements {begin} to {end} of "
                    f"{len(sound)}; is frame_rate {self.frame_rate} the tokenizer's?"
                )
            document.append(Segment(self.text, str(word), loss=False))
            document.append(Segment(self.speech, part(sound, begin, end), loss=True))
            begin = end
        return document

    def voices(self, source: Source) -> set[str]:
        """Names of the speakers in a source, which documents begin with."""
        return set() if self.speaker_field is None else speakers(source, self.speaker_field)


def speakers(source: Source, field: str) -> set[str]:
    """The names in one field of all examples. Examples without it are left out."""
    names = set()
    for index in range(len(source)):
        try:
            names.add(str(source[index][field]))
        except BrokenExample:  # the loader, which meets it too, skips and counts it
            continue
    return names


def voice_segment(name: str, text: str = "text") -> Segment:
    """How a document names its voice. Requests for speech begin with it."""
    return Segment(text, f"{name}: ", loss=False)


def whole_text(text: str, modality: str = "text") -> Segment:
    """How a document begins that is spoken word by word."""
    return Segment(modality, f"{text}\n", loss=False)


def part(item: Encoded, begin: int, end: int) -> Encoded:
    """Elements of a list, as an item of their own."""
    grid, kept = (end - begin,), slice(begin, end)
    if item.codes is not None:
        return Encoded(grid=grid, codes=item.codes[kept])
    if item.latents is not None:
        return Encoded(grid=grid, latents=item.latents[kept])
    assert item.ids is not None
    return Encoded(grid=grid, ids=item.ids[kept])


class SpeechToText(Pair):
    """A sound, then what is said in it, which is learned. The sound is dropped with probability `drop` (0: recognition needs no
    guidance)."""

    def __init__(
        self,
        drop: float = 0.0,
        text: str = "text",
        speech: str = "speech",
        text_field: str = "text",
        audio_field: str = "audio",
    ) -> None:
        super().__init__((audio_field, speech), (text_field, text), drop, False)


class TextOnly(Template):
    """Text alone, all of it learned."""

    def __init__(self, text: str = "text", text_field: str = "text") -> None:
        self.text, self.text_field = text, text_field

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        return [Segment(self.text, example[self.text_field], loss=True)]


class Interleaved(Template):
    """Several fields in a row, any number of modalities; a field that holds a list gives one segment an entry.

    Args:
        fields: field names in reading order, such as ["image", "text"]. Entries of a list that are None are left out
            (web pages stored as parallel lists of texts and pictures).
        modalities: field → modality. A field that isn't named is `text` where it holds a string, else `image`.
        context: fields that are context only; all others are learned.
        drop: probability that every context segment is replaced by the null condition.
    """

    def __init__(
        self,
        fields: Sequence[str],
        modalities: Mapping[str, str] | None = None,
        context: Sequence[str] = (),
        drop: float = 0.0,
    ) -> None:
        if not fields:
            raise ValueError("Interleaved needs at least one field")
        if unknown := sorted(set(context) - set(fields)):
            raise ValueError(f"context names {unknown}, but the fields are {list(fields)}; name fields of the document")
        self.fields, self.modalities = list(fields), dict(modalities or {})
        self.context, self.drop = set(context), check_probability("drop", drop)

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        dropped = happens(self.drop, rng)
        document: list[Segment] = []
        for field in self.fields:
            loss = field not in self.context
            if dropped and not loss:
                document.append(null_segment())
                continue
            value = example[field]
            for item in value if isinstance(value, list | tuple) else [value]:
                if item is None:
                    continue
                modality = self.modalities.get(field, "text" if isinstance(item, str) else "image")
                document.append(Segment(modality, item, loss=loss))
        if not document:
            raise BrokenExample(f"example {example.get('key', '?')!r} has nothing in the fields {self.fields}")
        return document


class Siblings(Template):
    """A text of several examples of one group: the group's name, this example's text, and texts of others of the group, drawn
    without repetition. What comes next is then one of many, whatever stood before.

    Args:
        source: where the others come from; its `text` is what is joined, so its `caption` should end a sentence.
        group: field that names the group. "food-fruit" becomes the sentence "food-fruit."
        most: examples of a document at the most; how many is drawn from 1 up.
        modality: of the text.
    """

    def __init__(self, source: Source, group: str, most: int = 4, modality: str = "text") -> None:
        if most < 1:
            raise ValueError(f"Siblings needs most >= 1, the examples of a document, got {most}")
        self.source, self.group, self.most, self.modality = source, group, most, modality
        self._texts: dict[str, list[str]] = {}

    def texts(self) -> dict[str, list[str]]:
        """Texts of each group, each once, in the order of the source. Examples without group or text are left out."""
        if not self._texts:
            found: dict[str, dict[str, None]] = {}
            for index in range(len(self.source)):
                try:
                    example = self.source[index]
                    found.setdefault(str(example[self.group]), {})[str(example["text"])] = None
                except BrokenExample:  # the loader, which meets it too, skips and counts it
                    continue
            self._texts = {name: list(texts) for name, texts in found.items()}
        return self._texts

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        name, own = str(example[self.group]), str(example["text"])
        others = [text for text in self.texts().get(name, []) if text != own]
        count = int(torch.randint(self.most, (), generator=rng))
        drawn = [others[i] for i in torch.randperm(len(others), generator=rng)[:count].tolist()]
        return [Segment(self.modality, " ".join([f"{name}.", own, *drawn]), loss=True)]


class Mixture(Template):
    """One of several templates an example, drawn with the given weights (equal by default)."""

    def __init__(self, templates: Sequence[Template], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(templates) if weights is None else list(weights)
        if not templates or len(weights) != len(templates) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise ValueError(
                f"Mixture got {len(templates)} templates and the weights {weights}; "
                "give at least one template and one weight >= 0 each, not all 0"
            )
        self.templates = list(templates)
        self._edges = (torch.tensor(weights, dtype=torch.float64).cumsum(0) / sum(weights)).tolist()
        self._last = max(number for number, weight in enumerate(weights) if weight > 0)

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        draw = float(torch.rand((), generator=rng, dtype=torch.float64))
        chosen = next((number for number, edge in enumerate(self._edges) if draw < edge), self._last)
        return self.templates[chosen](example, rng)

    def voices(self, source: Source) -> set[str]:
        """As `TextToSpeech.voices`, of all templates that name voices."""
        return {name for template in self.templates if hasattr(template, "voices") for name in template.voices(source)}
