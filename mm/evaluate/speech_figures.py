"""Figures of speech: what a tokenizer of sound keeps, whether a model says what it is asked to, and what it hears.

`clear` speech is the made corpus, whose texts a recogniser with a grammar understands; `real` speech are recordings of
single digits, judged by networks trained on other takes. Beside each figure stands that of the originals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mm.audio import Audio
from mm.data.sources import DIGIT_NAMES
from mm.data.speech_grammar import KINDS
from mm.evaluate.networks import Say
from mm.evaluate.recordings import Recordings
from mm.evaluate.results import Figure, Z, mean, share
from mm.evaluate.speech import WordError, mel_distance, recognise, stoi, word_error
from mm.evaluate.speech_judges import SoundJudge, digit_judge, voice_judge
from mm.interfaces import ModalityTokenizer, Spec

TOKENIZER, SPEAKING, HEARING = "speech tokenizer", "speaking", "hearing"
"""Families of figures."""
BATCH = 16
"""Sounds that are encoded and decoded at once."""


class Speaks(Protocol):
    """What speaks, and what listens."""

    def speak(self, texts: Sequence[str], voices: Sequence[str], seed: int) -> list[Audio]:
        """One sound a text, in the voice of the same place."""
        ...

    def transcribe(self, audios: Sequence[Audio]) -> list[str]:
        """One text a sound."""
        ...


@dataclass(frozen=True)
class Spoken:
    """The clips to measure on, and who judges them."""

    clear: Recordings | None = None
    """The made corpus; its held-out clips are measured."""
    real: Recordings | None = None
    """Single digits; their held-out takes are measured."""
    voices: SoundJudge | None = None
    """Tells the voices of `clear` apart; None where it holds only one, or nothing to train on."""
    digits: SoundJudge | None = None
    """Of `real`."""

    def held_clear(self, count: int) -> Recordings:
        """At most `count` held-out clips with a grammar (all clips, if nothing is held out)."""
        assert self.clear is not None
        known = self.clear.subset([i for i, kind in enumerate(self.clear.kinds) if kind in KINDS])
        return known.subset(known.where(held=True) or range(len(known))).spread(count)

    def held_real(self, count: int) -> Recordings:
        assert self.real is not None
        return self.real.subset(self.real.where(held=True) or range(len(self.real))).spread(count)


def prepare(
    clear: Recordings | None,
    real: Recordings | None,
    folder: Path | None = None,
    say: Say = lambda line: None,
    seed: int = 0,
) -> Spoken:
    """Judges for the given clips, from `folder` or trained now. Raises `ValueError` for clips that say nothing a grammar or
    judge knows."""
    if clear is not None and not set(clear.kinds) & set(KINDS):
        raise ValueError(f"clear speech needs clips with a field 'kind' that is one of {', '.join(KINDS)}; got none")
    voices = None
    if clear is not None and len({clear.speakers[row] for row in clear.where(held=False)}) > 1:
        voices = voice_judge(clear, folder, say, seed)
    return Spoken(clear, real, voices, None if real is None else digit_judge(real, folder, say, seed))


# --- a tokenizer ----------------------------------------------------------------------------------------------------


def tokenizer_figures(
    tokenizer: ModalityTokenizer, spoken: Spoken, count: int = 500, say: Say = lambda line: None
) -> list[Figure]:
    """Bit rate; of held-out clear speech STOI, mel distance, word errors and voices; of held-out real digits what the judges
    hear: each there and back through the tokenizer, beside the originals. At most `count` clips of each kind."""
    figures = rate_figures(tokenizer.spec)
    if spoken.clear is not None:
        clips = spoken.held_clear(count)
        say(f"speech tokenizer: {len(clips)} clips of clear speech there and back")
        back = there_and_back(tokenizer, clips.audios)
        figures += distances(clips.audios, back, "clear speech")
        figures += word_figures(TOKENIZER, "originals", clips, clips.audios, control=True)
        figures += word_figures(TOKENIZER, "decoded", clips, back)
        figures += voice_figures(TOKENIZER, clips, clips.audios, back, spoken.voices, "decoded")
    if spoken.real is not None and spoken.digits is not None:
        clips = spoken.held_real(count)
        say(f"speech tokenizer: {len(clips)} real digits there and back")
        back = there_and_back(tokenizer, clips.audios)
        figures += distances(clips.audios, back, "real digits")
        for question, truth in (("digit", clips.texts), ("speaker", clips.speakers)):
            for what, audios in (("originals", clips.audios), ("decoded", back)):
                hits = right(spoken.digits, audios, question, truth)
                figures.append(
                    share(TOKENIZER, f"{question} recognised, real, {what}", hits, control=audios is not back)
                )
    return figures


def rate_figures(spec: Spec) -> list[Figure]:
    """Bits a second, if there are codes; vectors a second, if not."""
    if spec.kind == "continuous":
        name, value, unit = "values a second", spec.frame_rate * spec.dim, "1/s"
    else:
        name, value, unit = "bit rate", spec.frame_rate * spec.num_codes * math.log2(spec.vocab_size), "bit/s"
    note = f"{spec.frame_rate:g} elements a second"
    return [Figure(family=TOKENIZER, name=name, value=value, unit=unit, n=1, note=note)]


def there_and_back(tokenizer: ModalityTokenizer, audios: Sequence[Audio]) -> list[Audio]:
    """What is left of sounds after the tokenizer."""
    out: list[Audio] = []
    for start in range(0, len(audios), BATCH):
        items = tokenizer.encode_batch(list(audios[start : start + BATCH]))
        out += [decoded.value for decoded in tokenizer.decode_batch(items)]
    return out


def distances(originals: Sequence[Audio], decoded: Sequence[Audio], what: str) -> list[Figure]:
    """STOI of the clips that are long enough for it, and the mel distance."""
    pairs = list(zip(originals, decoded, strict=True))
    intelligible = [value for one, other in pairs if (value := stoi(one, other)) is not None]
    figures = [mean(TOKENIZER, f"STOI, {what}", intelligible, "")] if intelligible else []
    values = [mel_distance(one, other) for one, other in pairs]
    return [*figures, mean(TOKENIZER, f"mel distance, {what}", values, "nat")]


# --- a model --------------------------------------------------------------------------------------------------------


def speaking_figures(
    subject: Speaks, spoken: Spoken, samples: int = 200, seed: int = 0, say: Say = lambda line: None
) -> list[Figure]:
    """Whether a model says held-out texts in the voices asked for, and how long it takes for it.

    Of clear speech: texts and voices of held-out clips, `samples` at most. Of real digits: each digit in each speaker's
    voice in turn, `samples` together.
    """
    figures: list[Figure] = []
    if spoken.clear is not None:
        clips = spoken.held_clear(samples)
        say(f"speaking: {len(clips)} held-out texts")
        made = subject.speak(clips.texts, clips.speakers, seed)
        figures += word_figures(SPEAKING, "originals", clips, clips.audios, control=True)
        figures += word_figures(SPEAKING, "generated", clips, made, by_voice=True)
        figures += voice_figures(SPEAKING, clips, clips.audios, made, spoken.voices, "generated")
        ratios = [one.seconds / other.seconds for one, other in zip(made, clips.audios, strict=True)]
        figures.append(mean(SPEAKING, "duration, clear, generated ÷ original", ratios, "ratio"))
    if spoken.real is not None and spoken.digits is not None:
        speakers = spoken.digits.classes["speaker"]
        asked = [(DIGIT_NAMES[n % 10], speakers[n // 10 % len(speakers)]) for n in range(samples)]
        texts, voices = [text for text, _ in asked], [voice for _, voice in asked]
        say(f"speaking: {len(asked)} single digits")
        made = subject.speak(texts, voices, seed)
        held = spoken.held_real(len(spoken.real))
        for question, own, asked_for in (("digit", held.texts, texts), ("speaker", held.speakers, voices)):
            hits = right(spoken.digits, held.audios, question, own)
            figures.append(share(SPEAKING, f"{question} recognised, real, originals", hits, control=True))
            hits = right(spoken.digits, made, question, asked_for)
            figures.append(
                share(SPEAKING, f"{question} recognised, real, generated", hits, detail=counts_by(asked_for, hits))
            )
        usual = _seconds(spoken.real)
        ratios = [audio.seconds / usual[pair] for audio, pair in zip(made, asked, strict=True) if pair in usual]
        if ratios:
            note = "the speaker's mean for the digit"
            figures.append(mean(SPEAKING, "duration, real, generated ÷ original", ratios, "ratio", note=note))
    return figures


def hearing_figures(subject: Speaks, spoken: Spoken, count: int = 200, say: Say = lambda line: None) -> list[Figure]:
    """Word errors of what a model writes of held-out clips."""
    figures: list[Figure] = []
    if spoken.clear is not None:
        clips = spoken.held_clear(count)
        say(f"hearing: {len(clips)} held-out clips")
        heard = subject.transcribe(clips.audios)
        for kind, rows in _rows(clips.kinds).items():
            errors = word_error([clips.texts[i] for i in rows], [heard[i] for i in rows])
            figures += error_figures(HEARING, f"clear {kind}", errors)
    if spoken.real is not None:
        clips = spoken.held_real(count)
        say(f"hearing: {len(clips)} real digits")
        figures += error_figures(HEARING, "real digits", word_error(clips.texts, subject.transcribe(clips.audios)))
    return figures


# --- shared ---------------------------------------------------------------------------------------------------------


def right(judge: SoundJudge, audios: Sequence[Audio], question: str, truth: Sequence[str]) -> list[bool]:
    return [answer == own for answer, own in zip(judge.classify(audios, question), truth, strict=True)]


def word_figures(
    family: str, what: str, clips: Recordings, audios: Sequence[Audio], *, control: bool = False, by_voice: bool = False
) -> list[Figure]:
    """Word errors of sounds that say the clips' texts, under each kind's grammar; and for each voice, if asked."""
    figures: list[Figure] = []
    for kind, rows in _rows(clips.kinds).items():
        references, heard = [clips.texts[i] for i in rows], recognise([audios[i] for i in rows], kind)
        figures += error_figures(family, f"{kind}, {what}", word_error(references, heard), control=control)
        speakers = _rows([clips.speakers[i] for i in rows])
        for speaker, own in speakers.items() if by_voice and len(speakers) > 1 else ():
            errors = word_error([references[i] for i in own], [heard[i] for i in own])
            figures += error_figures(family, f"{kind}, {what}, {speaker}", errors, control=control)[:1]
    return figures


def error_figures(family: str, name: str, errors: WordError, control: bool = False) -> list[Figure]:
    """Word error rate and share of texts without an error."""
    half = Z * errors.standard_error
    n = len(errors.exact)
    rate = Figure(
        family=family,
        name=f"word errors, {name}",
        value=errors.rate,
        unit="error",
        n=n,
        low=max(0.0, errors.rate - half) if n > 1 else None,
        high=errors.rate + half if n > 1 else None,
        control=control,
        detail={"standard_error": errors.standard_error, "edits": errors.edits, "words": errors.words},
    )
    return [rate, share(family, f"exact texts, {name}", errors.exact, control=control)]


def voice_figures(
    family: str,
    clips: Recordings,
    originals: Sequence[Audio],
    made: Sequence[Audio],
    judge: SoundJudge | None,
    what: str,
) -> list[Figure]:
    """Whether the judge hears the clips' speakers, of those it knows."""
    if judge is None:
        return []
    rows = [i for i, speaker in enumerate(clips.speakers) if speaker in judge.classes["speaker"]]
    truth = [clips.speakers[i] for i in rows]
    figures: list[Figure] = []
    for name, audios in (("originals", originals), (what, made)) if rows else ():
        hits = right(judge, [audios[i] for i in rows], "speaker", truth)
        figures.append(
            share(
                family,
                f"voice recognised, clear, {name}",
                hits,
                control=audios is originals,
                detail=counts_by(truth, hits),
            )
        )
    return figures


def _rows(values: Sequence[str]) -> dict[str, list[int]]:
    """Indices by value, in sorted order."""
    return {value: [i for i, own in enumerate(values) if own == value] for value in sorted(set(values))}


def counts_by(names: Sequence[str], hits: Sequence[bool]) -> dict[str, list[int]]:
    """Hits and cases by name."""
    return {name: [sum(hits[i] for i in rows), len(rows)] for name, rows in _rows(names).items()}


def _seconds(clips: Recordings) -> Mapping[tuple[str, str], float]:
    """Mean length of the clips of each (text, speaker)."""
    found: dict[tuple[str, str], list[float]] = {}
    for audio, text, speaker in zip(clips.audios, clips.texts, clips.speakers, strict=True):
        found.setdefault((text, speaker), []).append(audio.seconds)
    return {pair: sum(values) / len(values) for pair, values in found.items()}
