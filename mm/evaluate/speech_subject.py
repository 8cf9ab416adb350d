"""The model under test, of sound: what it says, what it hears, what its tokenizer keeps. Everything by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mm.audio import Audio
from mm.data.example import Source
from mm.evaluate.listening import listening_figures
from mm.evaluate.networks import Say
from mm.evaluate.protocol import Protocol
from mm.evaluate.recordings import Recordings, load_recordings
from mm.evaluate.results import Figure
from mm.evaluate.speech_control import editing_figures, pace_figures
from mm.evaluate.speech_figures import hearing_figures, prepare, speaking_figures, tokenizer_figures
from mm.evaluate.subject import Tested
from mm.interfaces import ModalityTokenizer
from mm.listening import NAME
from mm.pipelines.abilities import abilities_of
from mm.pipelines.sound_editing import Edit
from mm.pipelines.speech_to_text import SpeechToTextPipeline
from mm.pipelines.text_to_speech import TextToSpeechPipeline

CLEAR, REAL = "speech", "spoken"
"""Kinds of sources: the made corpus, and recordings of single digits."""
PARTS = ("tokenizer", "speaking", "pace", "editing", "hearing", "listening")
"""What is measured of a model."""


class SpeechSubject(Tested):
    """A model with text and sound, used the way its pipelines use it."""

    def _open(self) -> None:
        held, recommended, batch = self.model, self.recommended, self.batch
        self.speaks = TextToSpeechPipeline(held, recommended, batch)
        self.hears = SpeechToTextPipeline(held, recommended, batch)
        self.sampling = self.speaks.sampling(self.speaks.speech, self.options)

    @property
    def tokenizer(self) -> ModalityTokenizer:
        """Of the sound."""
        return self.speaks.tokenizer(self.speaks.speech)

    @property
    def listens(self) -> bool:
        """Whether it hears anything while it speaks."""
        return NAME in self.tokenizer.spec.alongside

    def speak(self, texts: Sequence[str], voices: Sequence[str], seed: int) -> list[Audio]:
        """One sound a text. A model that knows no voices speaks as it likes. Raises `ValueError` for an unknown voice."""
        if not texts:
            return []
        voice = list(voices) if self.model.voices else None
        made = self.speaks(list(texts), voice=voice, seed=seed, **self.options)
        return [Audio(samples, made.sample_rate) for samples in made.audios]

    def paced(self, texts: Sequence[str], voices: Sequence[str], seed: int, stretch: float) -> list[Audio]:
        """As `speak`, the duration that the model chooses multiplied by `stretch`."""
        voice = list(voices) if self.model.voices else None
        made = self.speaks(list(texts), voice=voice, seed=seed, stretch=stretch, **self.options)
        return [Audio(samples, made.sample_rate) for samples in made.audios]

    def edited(self, clips: Recordings, edits: Sequence[Edit], seed: int) -> list[Audio]:
        """The clips, spans of them spoken anew."""
        voice = list(clips.speakers) if self.model.voices else None
        made = self.speaks(list(clips.texts), voice=voice, edit=list(edits), seed=seed, **self.options)
        return [Audio(samples, made.sample_rate) for samples in made.audios]

    @property
    def fills_in(self) -> bool:
        """Whether it can speak a span in the middle of a clip."""
        order = self.model.modalities[self.model.vocabulary.index[self.speaks.speech]].order
        return not self.model.by_word and bool(getattr(order, "infill", 0.0))

    @property
    def learned_hearing(self) -> bool:
        """Whether training showed it texts of sounds, as far as is known."""
        return "sound" in abilities_of(self.hears).reads

    def transcribe(self, audios: Sequence[Audio]) -> list[str]:
        """One text a sound, the likeliest token each time."""
        return self.hears(list(audios), seed=0).texts if audios else []


def evaluate_speech(
    subject: SpeechSubject | ModalityTokenizer,
    sources: Mapping[str, Source],
    *,
    protocol: Protocol,
    judges: Path | None = None,
    only: Sequence[str] = PARTS,
    say: Say = lambda line: None,
) -> list[Figure]:
    """Figures of a model with sound, or of a tokenizer by itself.

    Args:
        sources: whole sources by kind, "speech" (the made corpus: fields `audio`, `text`, `speaker`, `kind`, `split`) and
            "spoken" (single digits: `audio`, `text`, `speaker`, `index`), or one of them.
        judges: folder where judges are kept.
        only: which figures of a model; of a tokenizer by itself those of the first are measured, whatever this says.

    Raises:
        ValueError: an unknown name in `only`, or a tokenizer of something else.
    """
    if unknown := [name for name in only if name not in PARTS]:
        raise ValueError(f"there are no figures {unknown[0]!r} of speech; {', '.join(PARTS)} can be measured")
    if isinstance(subject, ModalityTokenizer) and not subject.spec.sample_rate:
        raise ValueError(f"{type(subject).__name__} is no tokenizer of sound; others are measured as part of a model")
    given = {}
    for kind in (CLEAR, REAL):
        if kind in sources:
            say(f"{kind}: reading {sources[kind].what}")
        given[kind] = load_recordings(sources[kind], protocol.holdout_every) if kind in sources else None
    figures: list[Figure] = []
    clear = given[CLEAR]
    if isinstance(subject, SpeechSubject) and "listening" in only and clear is not None and subject.listens:
        held = clear.subset(clear.where(held=True) or range(len(clear)))
        figures += listening_figures(
            subject.model,
            held,
            speech=subject.speaks.speech,
            sampling=subject.sampling,
            count=protocol.samples,
            batch=subject.batch,
            seed=protocol.seed,
            say=say,
        )
    if isinstance(subject, SpeechSubject) and "hearing" in only and not subject.learned_hearing:
        say("hearing: left out, training showed the model no text of sounds")
        only = [part for part in only if part != "hearing"]
    if isinstance(subject, SpeechSubject) and set(only) <= {"listening"}:
        return figures
    spoken = prepare(given[CLEAR], given[REAL], judges, say, protocol.seed)
    if isinstance(subject, ModalityTokenizer):
        return tokenizer_figures(subject, spoken, protocol.captioned, say)
    if "tokenizer" in only:
        figures += tokenizer_figures(subject.tokenizer, spoken, protocol.captioned, say)
    if "speaking" in only:
        figures += speaking_figures(subject, spoken, protocol.samples, protocol.seed, say)
    if "pace" in only and spoken.clear is not None:
        figures += pace_figures(subject, spoken, protocol.samples, protocol.seed, say)
    if "editing" in only and spoken.clear is not None and subject.fills_in:
        figures += editing_figures(subject, spoken, protocol.samples, protocol.seed, say)
    if "hearing" in only:
        figures += hearing_figures(subject, spoken, protocol.captioned, say)
    return figures
