"""Text → speech: in a voice that the model knows or that a clip shows, of a chosen duration; whole, while it is generated, or in
place of a span of a clip."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from mm.audio import Audio, SoundSource
from mm.data.documents import voice_segment, whole_text
from mm.generation import Event, Grid, Request
from mm.interfaces import Encoded, Sampling
from mm.layout import NULL, Segment
from mm.pipelines.base import Callback, Pipeline, SamplingOptions, check_count, choose_seed, several
from mm.pipelines.media import longest
from mm.pipelines.outputs import AudioOutput
from mm.pipelines.playing import Player, events
from mm.pipelines.sound_editing import Edit, plan
from mm.pipelines.spoken import Score, Utterance, best, completed
from mm.pipelines.utterances import USUAL, bounds, check_duration, divide, divided, shares

Voice = str | SoundSource | None
"""The name of a voice that the model knows, or a clip of one: a path, bytes, an open binary file, `mm.audio.Audio`, or (rate,
array). None: the first voice that the model knows, or none."""


class TextToSpeechPipeline(Pipeline):
    """`pipeline("seven", voice="theo", seed=0).audios`, or step by step: `encode`, `generate`, `decode`.

    The model says how long a text takes (its likeliest extent), unless `duration` does. Texts that are too long for one item
    of the model are divided after sentences, parts of sentences, or words, and what is spoken of them is joined.
    """

    direction = ("text", "speech")

    @torch.no_grad()
    def __call__(
        self,
        text: str | Sequence[str | None] | None,
        *,
        voice: Voice | list[Any] = None,
        duration: float | Sequence[float | None] | None = None,
        stretch: float = 1.0,
        edit: Edit | Sequence[Edit] | None = None,
        num_audios: int = 1,
        best_of: int = 1,
        score: Score | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> AudioOutput:
        """Sounds for one text or several.

        Args:
            text: what is said; None: anything.
            voice: one for all texts, or a list with one for each.
            duration: seconds of each sound, to the nearest element of the model; one for all, or a list. Of an edit: those
                of the new span, to the sample.
            stretch: the duration that the model chose is multiplied by this: 0.8 is faster, 1.25 slower.
            edit: a clip of which a span is spoken anew; the text is that of the whole result, and a duration that of the new
                span. Samples outside the span stay bit for bit what they are, in a clip of the model's rate; another clip
                is resampled first. Models whose order can't fill in the middle edit up to the clip's end only.
            num_audios: sounds a text.
            best_of: so many candidates are made of each sound, and the best one is kept: by `score`, or, in an edit, by how
                well what follows the span was foreseen (ARDiT, section 3.4).
            score: such as `SpeechToTextPipeline.agreement`.
            seed, generator, callback, sampling: as for `TextToImagePipeline`. A callback's rows are parts of texts.

        Raises:
            ValueError: an empty text, a voice that the model doesn't know, a duration in which the text can't be spoken, a
                clip that can't be loaded, or more than the model's context holds.
        """
        seed = choose_seed(seed, generator)
        texts = several(text, (str, NoneType), "a text; give a string, None")
        num_audios = check_count("num_audios", num_audios, len(texts))
        best_of = check_count("best_of", best_of, len(texts) * num_audios)
        edits = _edits(edit, len(texts))
        if best_of > 1 and score is None and None in edits:
            raise ValueError(
                "best_of needs a score(audio, text) that tells which candidate is best; only edits do without"
            )
        utterances = self.encode(texts, voice=voice, duration=duration, edit=edits, probe=best_of > 1 and score is None)
        tokens = self.generate(
            utterances,
            num_audios=num_audios * best_of,
            stretch=stretch,
            sampling=self.sampling(self.speech, sampling),
            seed=seed,
            callback=callback,
        )
        each = [parts for parts in utterances for _ in range(num_audios * best_of)]
        audios = self.decode(tokens, each)
        if best_of > 1:
            kept = [best(range(at, at + best_of), each, tokens, audios, score) for at in range(0, len(audios), best_of)]
            tokens, audios = [tokens[number] for number in kept], [audios[number] for number in kept]
        said = [words or "" for words in texts for _ in range(num_audios)]
        rate = self.tokenizer(self.speech).spec.sample_rate
        return AudioOutput([audio.samples for audio in audios], rate, said, tokens, seed)

    # --- the steps --------------------------------------------------------------------------------------------------

    def encode(
        self,
        texts: Sequence[str | None],
        *,
        voice: Voice | list[Any] = None,
        duration: float | Sequence[float | None] | None = None,
        edit: Sequence[Edit | None] | None = None,
        probe: bool = False,
    ) -> list[list[Utterance]]:
        """Each text as the items that it takes. `probe`: of edits, also what follows the span is generated, for a score."""
        if not self.tokenizer(self.speech).spec.spatial:
            raise ValueError(
                f"this model reads {self.speech!r} and can't make it: its elements don't stand for times; use a model of speech"
            )
        count = len(texts)
        voices = _spread(
            "voice", voice, count, (str, os.PathLike, bytes, bytearray, memoryview, Audio, tuple, NoneType)
        )
        durations = _spread("duration", duration, count, (int, float, NoneType))
        clips: dict[int, list[Segment]] = {}
        for one in voices:
            if id(one) not in clips:
                clips[id(one)] = self.encode_voice(one)
        out = []
        for text, one, seconds, change in zip(texts, voices, durations, _edits(edit, count), strict=True):
            beginning = clips[id(one)]
            if text is None and one is not None:
                raise ValueError("got a voice without a text; give a text, or neither (any speech)")
            if text is not None and isinstance(text, str) and not text.strip():
                raise ValueError("the text is empty; say what is to be spoken (None stands for any speech)")
            out.append(
                self._edited(text, beginning, seconds, change, probe)
                if change is not None
                else self._spoken(text, beginning, seconds)
            )
        return out

    def encode_voice(self, voice: Voice) -> list[Segment]:
        """How a document begins that is spoken in a voice. Raises `ValueError` for a voice that the model doesn't know."""
        known = self.model.voices
        if isinstance(voice, str) and voice not in known and not os.path.isfile(voice):
            names = ", ".join(known) or "none by name"
            raise ValueError(
                f"there is no voice {voice[:60]!r}, and no sound file of that name; this model knows {names}"
            )
        if voice is None and not known:
            return []
        if voice is None or (isinstance(voice, str) and voice in known):
            return [self.encode_text(voice_segment(voice or known[0]).content)]
        return self.encode_sounds([voice], self.speech)

    def _prompt(self, text: str | None, beginning: list[Segment]) -> list[Segment]:
        return [Segment(NULL, None, loss=False)] if text is None else [*beginning, self.encode_text(text)]

    def _spoken(self, text: str | None, beginning: list[Segment], seconds: float | None) -> list[Utterance]:
        tokenizer = self.tokenizer(self.speech)
        most = tokenizer.spec.max_grid[0]
        if text is not None:
            text = self._checked(text).strip()
        total = None if seconds is None else check_duration(seconds, text or "", tokenizer)
        if text is None:
            return [Utterance(prompt=self._prompt(None, []), text="", grid=None if total is None else (total,))]
        place = self.model.modalities[self.model.vocabulary.index[self.speech]]
        taken = len(self.model.build_document.draft(beginning, torch.Generator(), close=False).stream())
        taken += self.model.grammar.overhead(self.speech)
        rate = tokenizer.spec.frame_rate / USUAL if total is None else total / len(text)

        def fits(part: str) -> bool:
            elements = max(1, min(most, round(rate * len(part))))
            room = self.model.context - taken - place.order.places(elements, tokenizer.spec)
            length = len(self.tokenizer(self.text).encode(part))
            if self.model.by_word:  # each word once more, and an item for each
                around = self.model.grammar.overhead(self.speech) + place.order.places(1, tokenizer.spec)
                length = 2 * length + 1 + len(part.split()) * around
            return length <= room

        if total is None:
            parts = divide(text, max(1, int(longest(tokenizer) * USUAL)), fits)
            grids: list[Grid] = [bounds(part, tokenizer) for part in parts]
        else:
            shared = divided(text, total, most, fits)
            parts, grids = [part for part, _ in shared], [(number,) for _, number in shared]
        return [self._utterance(part, beginning, grid) for part, grid in zip(parts, grids, strict=True)]

    def _utterance(self, text: str, beginning: list[Segment], grid: Grid) -> Utterance:
        if not self.model.by_word:
            return Utterance(prompt=self._prompt(text, beginning), text=text, grid=grid)
        tokenizer = self.tokenizer(self.speech)
        words: list[tuple[str, Grid]] = (
            [(word, (elements,)) for word, elements in shares(text, grid[0])]
            if isinstance(grid, tuple)
            else [(word, bounds(word, tokenizer)) for word in text.split()]
        )
        prompt = [*beginning, self.encode_text(whole_text(" ".join(text.split())).content)]
        return Utterance(prompt=prompt, text=text, grid=grid, words=words)

    def _edited(
        self, text: str | None, beginning: list[Segment], seconds: float | None, edit: Edit, probe: bool
    ) -> list[Utterance]:
        if self.model.by_word:
            raise ValueError(
                "this model speaks word by word, and can't fill in a span; use one that learned whole texts with infill (ardit)"
            )
        order = self.model.modalities[self.model.vocabulary.index[self.speech]].order
        block = max(1, getattr(order, "block", 1)) if probe else 0
        planned = plan(edit, seconds, block, self.tokenizer(self.speech), text or "")
        if probe and not len(planned.truth):
            raise ValueError(
                "nothing follows the span of an edit that could tell which candidate is best; give a score"
            )
        prompt = self._prompt(text, beginning)
        return [Utterance(prompt=prompt, text=text or "", grid=(len(planned.known),), plan=planned)]

    def _checked(self, text: Any) -> str:
        self.encode_text(text)  # refuses what isn't text
        return str(text)

    @torch.no_grad()
    def generate(
        self,
        utterances: Sequence[Sequence[Utterance]],
        *,
        num_audios: int = 1,
        stretch: float = 1.0,
        sampling: Sampling | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> list[list[Encoded]]:
        """Items of `num_audios` sounds for each encoded text."""
        requests = self._requests(utterances, num_audios, stretch, sampling)
        made = iter(self.run(requests, seed, callback))
        return [[self._spoken_item(next(made)) for _ in parts] for parts in utterances for _ in range(num_audios)]

    def _spoken_item(self, segments: Sequence[Segment]) -> Encoded:
        """The sound of one utterance; of one that is spoken word by word, all its parts as one item."""
        contents = [segment.content.content for segment in segments if segment.modality == self.speech]
        return self._wrap(torch.cat(contents) if len(contents) > 1 else contents[0])

    def _requests(
        self, utterances: Sequence[Sequence[Utterance]], num_audios: int, stretch: float, sampling: Sampling | None
    ) -> list[Request]:
        if isinstance(stretch, bool) or not isinstance(stretch, int | float) or not 0.1 <= stretch <= 10:
            raise ValueError(f"stretch multiplies durations by 0.1 to 10, got {stretch!r:.60}")
        check_count("the number of parts of all texts", max(1, sum(map(len, utterances))), num_audios)
        # the likeliest extent: durations drawn at random would often be odd
        chosen = {self.speech: sampling or self.sampling(self.speech, {}), self.text: Sampling(temperature=0.0)}
        return [
            Request(
                prompt=part.prompt,
                items=self._items(part),
                text=False,
                by_modality=chosen,
                stretch=float(stretch),
                known=None if part.plan is None else (part.plan.known, part.plan.given),
            )
            for parts in utterances
            for _ in range(num_audios)
            for part in parts
        ]

    def _items(self, part: Utterance) -> list[tuple[str, Grid] | Segment]:
        if not part.words:
            return [(self.speech, part.grid)]
        each = ((self.encode_text(word), (self.speech, grid)) for word, grid in part.words)
        return [item for pair in each for item in pair]

    def decode(
        self, tokens: Sequence[Sequence[Encoded]], utterances: Sequence[Sequence[Utterance]] | None = None
    ) -> list[Audio]:
        """The sound of each list of items, joined. `utterances`, one for each, say which are edits."""
        plans = [[part.plan for part in parts] for parts in utterances or [[]] * len(tokens)]
        each = [
            completed(item, wanted)
            for items, parts in zip(tokens, plans, strict=True)
            for item, wanted in zip(items, parts or [None] * len(items), strict=True)
        ]
        decoded = iter(self.decode_items(self.speech, each))
        out = []
        for items, parts in zip(tokens, plans, strict=True):
            sounds: list[Audio] = [next(decoded) for _ in items]
            if parts and parts[0] is not None:
                sounds = [parts[0].joined(sounds[0])]
            joined = sounds[0].samples if len(sounds) == 1 else np.concatenate([sound.samples for sound in sounds])
            out.append(Audio(joined, sounds[0].rate))
        return out

    # --- while it is generated ----------------------------------------------------------------------------------------

    def stream(
        self,
        text: str,
        *,
        voice: Voice = None,
        duration: float | None = None,
        stretch: float = 1.0,
        chunk: int = 8,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Audio]:
        """The sound of one text in pieces, as soon as they are certain; joined they are what a call gives for the same seed, up
        to rounding. Closing the iterator ends the generation.

        Args:
            text, voice, duration, stretch, seed, generator, sampling: as for a call.
            chunk: elements of the model that a piece has at least. Pieces come late by the elements that the tokenizer's
                decoder wants to see after them.

        Raises:
            ValueError: as a call, before anything is generated.
        """
        seed, chunk = choose_seed(seed, generator), check_count("chunk", chunk)
        if not isinstance(text, str | None):
            raise ValueError(f"got a {type(text).__name__} for a text; a stream speaks one text at a time, a string")
        utterances = self.encode([text], voice=[voice], duration=[duration])
        requests = self._requests(utterances, 1, stretch, self.sampling(self.speech, sampling))
        return self._played(requests, seed, chunk)

    def _played(self, requests: Sequence[Request], seed: int, chunk: int) -> Iterator[Audio]:
        name, tokenizer = self.speech, self.tokenizer(self.speech)

        def work(tell: Callable[[Event], None]) -> None:
            self.run(requests, seed, tell, batch_size=1)

        players = [Player(tokenizer, self._wrap, chunk) for _ in requests]
        left = [sum(not isinstance(item, Segment) for item in request.items) for request in requests]
        before: list[list[Tensor]] = [[] for _ in requests]
        steps = events(work)
        try:
            for event in steps:
                if event.modality == name:
                    ended, earlier = event.done == 1.0, before[event.row]
                    left[event.row] -= ended
                    final = sum(map(len, earlier)) + (len(event.content) if ended else event.final)
                    content = torch.cat([*earlier, event.content])
                    with torch.no_grad():
                        piece = players[event.row].play(content, final, ended and not left[event.row])
                    if ended:
                        earlier.append(event.content)
                    if piece is not None and len(piece.samples):
                        yield piece
        finally:
            steps.close()  # type: ignore[attr-defined]

    def _wrap(self, content: Tensor) -> Encoded:
        return self.wrap(self.speech, content, (len(content),))


def _edits(edit: Any, count: int) -> list[Edit | None]:
    for one in edit if isinstance(edit, Sequence) else [edit]:
        if not isinstance(one, Edit | None):
            raise ValueError(f"got a {type(one).__name__} for an edit; give Edit(clip, start, end), or a list of them")
    return _spread("edit", edit, count, (Edit, NoneType))


def _spread(name: str, value: Any, count: int, one: tuple[type, ...]) -> list[Any]:
    """One value for each of `count` texts, of one for all or a list. Raises `ValueError` for a list of another length."""
    if isinstance(value, (*one, str, bytes)) or hasattr(value, "read") or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"got {len(value)} of `{name}` for {count} texts; give one for all, or one for each")
    return list(value)


__all__ = ["Edit", "Score", "TextToSpeechPipeline", "Utterance", "Voice"]
