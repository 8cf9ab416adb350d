"""Dialogues made on the fly from clips of speech: one channel speaks, the other is silent or noisy, and may interrupt.

After LSLM (Ma et al. 2024, arXiv 2408.02622, section 4.1): noise with probability 0.5, an interruption with probability 0.5 at a
random time, and the speaker stops a while after it begins. The paper's while is 0.5 s; here it is 0.25 s unless it is set, so
that a model that learned it stops within half a second of the interruption even if it hesitates.

Letters in shapes: S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from mm.audio import Audio, resample
from mm.data.documents import Template, check_probability, happens, null_segment, speakers, voice_segment
from mm.data.example import BrokenExample, Source
from mm.interfaces import Encoded
from mm.layout import Segment
from mm.listening import Dialogue

RATE = 16_000
"""Samples a second of the listening channel."""
NOISES = ("white", "pink", "babble")
NOISE_LEVELS = {"white": (-50.0, -32.0), "pink": (-50.0, -32.0), "babble": (-50.0, -36.0)}
"""Root mean square in dB of full scale, drawn evenly."""
SPEECH_LEVELS = (-26.0, -16.0)
"""Of what interrupts, over the part of it that isn't quiet."""
VOICES = 3
"""Clips that babble is made of."""
ONSET = 0.03
"""A clip begins where 10 ms of it first have this share of the loudest amplitude (−30 dB)."""
MARGIN = 0.1
"""Seconds between the moment at which the speaker has to have stopped and the end of what it was going to say, at least."""
MAX_KEPT = 1 << 27
"""Samples of clips that are kept in memory, two bytes each."""
Samples = np.ndarray[Any, np.dtype[np.float32]]
Clip = Callable[[int], Audio]


@dataclass(frozen=True)
class Heard:
    """A listening channel."""

    audio: Audio | None
    """None: silence."""
    start: float | None
    """When the interruption begins, in seconds; None: nobody interrupts."""
    noise: str
    """One of `NOISES`, or empty."""


class Channel:
    """Makes listening channels.

    Args:
        clip: gives the clip of a number.
        count: how many clips there are.
        interruption, noise: probabilities.
        reaction: seconds from the beginning of an interruption until the speaker has to have stopped.
        interrupts: numbers of the clips that interrupt, each with (from, to) in seconds or None for all of it; by default all
            clips. Babble is made of any clips.
    """

    def __init__(
        self,
        clip: Clip,
        count: int,
        *,
        interruption: float = 0.5,
        noise: float = 0.5,
        reaction: float = 0.25,
        interrupts: list[tuple[int, tuple[float, float] | None]] | None = None,
    ) -> None:
        self.interruption = check_probability("interruption", interruption)
        self.noise = check_probability("noise", noise)
        if not 0 <= reaction <= 10:
            raise ValueError(f"reaction is 0 to 10 seconds, got {reaction}")
        if count < 1 or interrupts == []:
            raise ValueError("there is no clip of speech that could interrupt; give a source with clips of sound")
        self.reaction = reaction
        self._clip, self.count, self._interrupts = clip, count, interrupts
        self._kept: dict[int, np.ndarray[Any, np.dtype[np.int16]]] = {}
        self._room = MAX_KEPT

    def __call__(self, seconds: float, rng: np.random.Generator) -> Heard:
        """What is heard during so many seconds. Too short a time is never interrupted."""
        size = max(1, round(seconds * RATE))
        # all draws are taken in every case, so that what follows doesn't depend on the probabilities
        noisy, interrupted, place = rng.random(3)
        latest = seconds - self.reaction - MARGIN
        kind = NOISES[int(rng.integers(len(NOISES)))] if noisy < self.noise else ""
        start = place * latest if interrupted < self.interruption and latest > 0 else None
        out = np.zeros(size, dtype=np.float32)
        if kind:
            sound = self._babble(size, rng) if kind == "babble" else coloured(kind, size, rng)
            out += levelled(sound, rng.uniform(*NOISE_LEVELS[kind]))
        if start is not None:
            first = round(start * RATE)
            said = levelled(self._interruption(rng), rng.uniform(*SPEECH_LEVELS))[: size - first]
            out[first : first + len(said)] += said
            start = first / RATE
        silent = not kind and start is None
        return Heard(None if silent else Audio(out.clip(-1, 1), RATE), start, kind)

    def _interruption(self, rng: np.random.Generator) -> Samples:
        if self._interrupts is None:
            return from_onset(self._samples(int(rng.integers(self.count))))
        number, span = self._interrupts[int(rng.integers(len(self._interrupts)))]
        samples = self._samples(number)
        if span is not None:
            samples = samples[round(span[0] * RATE) : round(span[1] * RATE)]
            if not len(samples):
                raise BrokenExample(
                    f"clip {number} has no sample from {span[0]:g} to {span[1]:g} s, where its word is said"
                )
        return from_onset(samples)

    def _babble(self, size: int, rng: np.random.Generator) -> Samples:
        out = np.zeros(size, dtype=np.float32)
        for _ in range(VOICES):
            said = levelled(self._samples(int(rng.integers(self.count))), -20.0)
            said = np.resize(said, max(size, len(said)) + 1)  # said again, where it is too short
            first = int(rng.integers(len(said) - size))
            out += said[first : first + size]
        return out

    def _samples(self, number: int) -> Samples:
        if number not in self._kept:
            samples = resample(self._clip(number), RATE).samples
            if not len(samples):
                raise BrokenExample(f"clip {number} has no sample to interrupt with")
            small = (samples.clip(-1, 1) * 32767).round().astype(np.int16)
            if len(small) > self._room:
                return small.astype(np.float32) / np.float32(32767)
            self._room -= len(small)
            self._kept[number] = small
        return self._kept[number].astype(np.float32) / np.float32(32767)


def coloured(kind: str, size: int, rng: np.random.Generator) -> Samples:
    """White or pink noise (power 1 / f)."""
    noise = rng.standard_normal(size)
    if kind == "pink":
        spectrum = np.fft.rfft(noise)
        noise = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)).clip(min=1)), size)
    return noise.astype(np.float32)


def envelope(samples: Samples) -> Samples:
    """Root mean square of every 10 ms."""
    step = RATE // 100
    padded = np.pad(samples, (0, -len(samples) % step))
    return np.sqrt(np.square(padded.reshape(-1, step)).mean(1))


def from_onset(samples: Samples) -> Samples:
    """Without the quiet beginning."""
    loud = envelope(samples)
    first = int(np.argmax(loud >= ONSET * loud.max(initial=0.0)))
    return samples[first * (RATE // 100) :]


def levelled(samples: Samples, decibels: float) -> Samples:
    """At a root mean square of so many dB of full scale, over the 10 ms that aren't quiet. Silence stays silence."""
    loud = envelope(samples)
    heard = loud[loud > max(0.1 * float(loud.max(initial=0.0)), 1e-6)]
    if not len(heard):
        return samples
    scaled: Samples = samples * np.float32(10 ** (decibels / 20) / np.sqrt(np.square(heard).mean()))
    return scaled


class Dialogues(Template):
    """A voice, a text, and the sound of the text in that voice while the other channel is heard; an interrupted sound ends early.
    Voice and text are given; the sound is learned, and before it how long it was going to be.

    For a modality whose tokenizer is `mm.tokenizers.speech_duplex`. The examples' own sound may come encoded from a cache.

    Args:
        source: clips that interrupt and that babble is made of: as a rule the source of the examples.
        interruption, noise: probabilities.
        reaction: seconds from the beginning of an interruption until the speaker has to have stopped.
        hesitation: up to so many seconds more, drawn for each example (0 in the paper). A model that is not sure when the
            interruption began then learns to stop in every frame that follows, not in one that it may miss.
        keyword: only this word interrupts ("stop"), cut from the clips of `source`, which need `words`: [word, start, end] in
            seconds (the paper's command setting); None: any clip does (its voice setting).
        drop: probability that voice and text become the null condition.
        frame_rate: the tokenizer's elements a second; needed where the sound comes encoded from a cache.
        text, speech: modalities.
        text_field, speaker_field, audio_field, words_field: fields of the examples; no speaker_field: no voice.
    """

    def __init__(
        self,
        source: Source,
        interruption: float = 0.5,
        noise: float = 0.5,
        reaction: float = 0.25,
        hesitation: float = 0.0,
        keyword: str | None = None,
        drop: float = 0.1,
        frame_rate: float | None = None,
        text: str = "text",
        speech: str = "speech",
        text_field: str = "text",
        speaker_field: str | None = "speaker",
        audio_field: str = "audio",
        words_field: str = "words",
    ) -> None:
        if frame_rate is not None and not 0 < frame_rate < 1e6:
            raise ValueError(f"frame_rate is elements a second, more than 0, got {frame_rate}")
        if not 0 <= hesitation <= 10:
            raise ValueError(f"hesitation is 0 to 10 seconds, got {hesitation}")
        self.source, self.keyword = source, keyword
        self.reaction, self.hesitation = reaction, hesitation
        self.drop, self.frame_rate = check_probability("drop", drop), frame_rate
        self.text, self.speech = text, speech
        self.text_field, self.speaker_field, self.audio_field = text_field, speaker_field, audio_field
        self.channel = Channel(
            partial(_sound, source, audio_field),
            len(source),
            interruption=interruption,
            noise=noise,
            reaction=reaction + hesitation,
            interrupts=None if keyword is None else spoken_words(source, keyword, words_field),
        )

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        dropped, seed = happens(self.drop, rng), int(torch.randint(1 << 31, (), generator=rng))
        late = float(torch.rand((), generator=rng))
        said = example[self.audio_field]
        seconds = self._seconds(said)
        heard = self.channel(seconds, np.random.default_rng(seed))
        until = None if heard.start is None else heard.start + self.reaction + late * self.hesitation
        spoken = Segment(self.speech, Dialogue(said, heard.audio, until), loss=True)
        if dropped:
            return [null_segment(), spoken]
        document = [Segment(self.text, example[self.text_field], loss=False), spoken]
        if self.speaker_field is None:
            return document
        return [voice_segment(str(example[self.speaker_field]), self.text), *document]

    def _seconds(self, said: Audio | Encoded) -> float:
        if not isinstance(said, Encoded):
            return said.seconds
        if self.frame_rate is None:
            raise ValueError(
                f"{self.audio_field} comes encoded, which doesn't tell how long it is; give frame_rate, the tokenizer's elements "
                "a second"
            )
        return said.grid[0] / self.frame_rate

    def voices(self, source: Source) -> set[str]:
        """Names of the speakers in a source, which documents begin with."""
        return set() if self.speaker_field is None else speakers(source, self.speaker_field)


def _sound(source: Source, field: str, number: int) -> Audio:
    sound: Audio = source[number][field]
    return sound


def spoken_words(source: Source, keyword: str, field: str) -> list[tuple[int, tuple[float, float] | None]]:
    """Where a word is said: the clip's number, and from when to when. Raises `ValueError` where it is nowhere."""
    found: list[tuple[int, tuple[float, float] | None]] = []
    for number in range(len(source)):
        try:
            for word, start, end in source[number][field]:
                if word == keyword and 0 <= start < end:
                    found.append((number, (float(start), float(end))))
        except (BrokenExample, TypeError, ValueError):  # no words, or none that are [word, start, end]
            continue
    if not found:
        raise ValueError(f"{source.what}: no clip says {keyword!r} by its field {field!r}; choose a word that is said")
    return found
