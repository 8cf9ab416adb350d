"""Measures of speech: what a recogniser hears, how many words it gets wrong, and how near decoded sound is to the original.

The recogniser is pocketsphinx under a closed grammar; with its open language model it gets most digits of clear speech
wrong, so it judges only what a grammar can say. STOI is that of pystoi. Both come with the extra `speech`.

Letters in shapes: S samples.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.audio import Audio, held_samples, log_mel
from mm.data.example import digest
from mm.data.speech_corpus import require_pocketsphinx
from mm.data.speech_grammar import KINDS, jsgf
from mm.edits import edit_distance

RATE = 16_000
"""Samples a second at which everything here is compared."""
N_FFT, HOP, BINS = 1024, 256, 80
"""Of the log-mel spectra that are compared."""
FLOOR = 1e-2
"""Magnitudes below are silence; a sine of full scale has 256 (88 dB more)."""
LEVEL = 0.05
"""Root-mean-square amplitude that sounds are brought to before they are recognised."""
PAD = 0.2
"""Seconds of silence put before and after each sound: without it the recogniser hears digits in a sudden start (14 %
words wrong instead of 0.6 % on clear speech cut to 0.1 s of silence)."""
LEAST = 0.4
"""Seconds that STOI needs."""
RESAMPLES = 1000
"""Of the bootstrap."""


# --- recognition ----------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_decoders: list[Any] = []


def recognise(audio: Audio | Sequence[Audio], grammar: str = "digits") -> list[str]:
    """What pocketsphinx hears in each sound: words in lower case, "" for nothing.

    Args:
        grammar: "digits" (any number of them), "commands" (of the made corpus), or a grammar in the JSpeech Grammar
            Format, beginning with "#JSGF".

    Raises:
        ValueError: pocketsphinx is missing, or the grammar is none.
    """
    if grammar not in KINDS and not grammar.startswith("#JSGF"):
        raise ValueError(f"grammar {grammar!r:.60} is neither one of {', '.join(KINDS)} nor begins with '#JSGF'")
    sounds = [audio] if isinstance(audio, Audio) else list(audio)
    with _lock:  # one decoder a process, since its acoustic model takes 50 MB
        decoder = _decoder()
        text = jsgf(grammar) if grammar in KINDS else grammar
        name = f"g{digest(text)}"
        try:
            decoder.add_jsgf_string(name, text)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"pocketsphinx can't read this grammar: {error}; give one in JSGF") from error
        decoder.activate_search(name)
        return [_hear(decoder, sound) for sound in sounds]


def _decoder() -> Any:
    if not _decoders:
        _decoders.append(require_pocketsphinx().Decoder(samprate=RATE, lm=None, loglevel="FATAL"))
    return _decoders[0]


def _hear(decoder: Any, sound: Audio) -> str:
    samples = at_rate(sound)
    loudness = float(samples.square().mean().sqrt()) if len(samples) else 0.0
    if loudness < 1e-5:  # silence; a decoder given nothing at all keeps what it heard before
        return ""
    samples = torch.nn.functional.pad(samples * (LEVEL / loudness), (round(PAD * RATE),) * 2)
    data = samples.clamp(-1, 1).mul(32767).round().to(torch.int16).numpy()
    decoder.reinit_feat()  # forget the noise of the sound before
    decoder.start_utt()
    decoder.process_raw(data.tobytes(), full_utt=True)
    decoder.end_utt()
    heard = decoder.hyp()
    return "" if heard is None else str(heard.hypstr)


def at_rate(sound: Audio, rate: int = RATE) -> Tensor:
    """Samples float32 [S] at another rate, held as tokenizers hold them."""
    return torch.from_numpy(np.ascontiguousarray(held_samples(sound, rate)))


# --- word errors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WordError:
    """Edits ÷ words over a whole set of texts."""

    rate: float
    standard_error: float
    """By bootstrap over the texts; 0 for a single one."""
    edits: int
    words: int
    """Of the references."""
    exact: list[bool]
    """Whether each text is right to the word."""


def word_error(references: Sequence[str], hypotheses: Sequence[str], seed: int = 0) -> WordError:
    """Word error rate: insertions, deletions and substitutions ÷ words of the references. It can exceed 1.

    Raises `ValueError` for lists of different length, or references without a word.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"got {len(references)} references and {len(hypotheses)} hypotheses; give one for each")
    pairs = [(r.lower().split(), h.lower().split()) for r, h in zip(references, hypotheses, strict=True)]
    words = np.array([len(reference) for reference, _ in pairs], dtype=np.int64)
    if not words.sum():
        raise ValueError("the references have no words, so there is no word error rate; give spoken texts")
    edits = np.array([edit_distance(*pair) for pair in pairs], dtype=np.int64)
    rows = np.random.default_rng(seed).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    rates = edits[rows].sum(1) / np.maximum(words[rows].sum(1), 1)
    return WordError(
        rate=float(edits.sum() / words.sum()),
        standard_error=float(rates.std()),
        edits=int(edits.sum()),
        words=int(words.sum()),
        exact=[reference == hypothesis for reference, hypothesis in pairs],
    )


# --- distances ------------------------------------------------------------------------------------------------------


def stoi(reference: Audio, decoded: Audio) -> float | None:
    """Short-time objective intelligibility, about 0 to 1 (Taal et al. 2011); None for less than 0.4 s of speech.

    Raises `ValueError` where pystoi is missing.
    """
    import warnings

    try:
        import pystoi
    except ImportError as error:
        raise ValueError("STOI is measured by pystoi, which is missing; pip install 'mm[speech]'") from error
    one, other = _pair(reference, decoded)
    if len(one) < LEAST * RATE or not float(one.abs().max()):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(pystoi.stoi(one.double().numpy(), other.double().numpy(), RATE))
        except (RuntimeWarning, np.exceptions.AxisError):  # the latter where silence leaves it not one frame
            return None


def mel_distance(reference: Audio, decoded: Audio) -> float:
    """Mean absolute difference of log-mel magnitudes (natural logarithm, 80 bins, frames of 64 ms every 16 ms)."""
    one, other = _pair(reference, decoded)
    return float((_mel(one) - _mel(other)).abs().mean())


def log_mel_at_16k(audio: Audio) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Log-mel magnitudes (bins, frames), as `mel_distance` compares them."""
    return _mel(_pair(audio, audio)[0]).numpy()


def _mel(samples: Tensor) -> Tensor:
    return log_mel(samples, rate=RATE, bins=BINS, n_fft=N_FFT, hop=HOP, floor=FLOOR)


def si_sdr(reference: Audio, decoded: Audio) -> float | None:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019); None for a reference that doesn't change, such
    as silence. It says nothing of codecs that make up phases: right magnitudes with other phases score below −15 dB."""
    given, made = (x.double() for x in _pair(reference, decoded))
    if not len(given):
        return None
    one, other = given - given.mean(), made - made.mean()
    power = one.dot(one)
    if float(power) <= 1e-10 * float(given.dot(given)):  # what is left of a constant is rounding
        return None
    target = one * (one.dot(other) / power)
    ratio = target.square().sum() / (target - other).square().sum().clamp_min(1e-20)
    return float(10 * ratio.clamp_min(1e-20).log10())


def _pair(reference: Audio, decoded: Audio) -> tuple[Tensor, Tensor]:
    """Both at `RATE`, as long as the reference: decoders round lengths up to whole frames."""
    one, other = at_rate(reference), at_rate(decoded)[: round(reference.seconds * RATE) + 1]
    return one, torch.nn.functional.pad(other, (0, max(0, len(one) - len(other))))[: len(one)]
