"""Sound in and out: one kind of sound, a loader that bounds what it decodes, a writer, rates and mel spectra.

Letters in shapes: S samples, M mel bins, F frames.
"""

from __future__ import annotations

import math
import operator
import os
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from mm import resampling, safe_io
from mm.audio_files import MAX_CHANNELS, MAX_RATE, FileSource, Samples, average, decode_blocks, source_name, too_long

if TYPE_CHECKING:
    from torch import Tensor

MAX_SECONDS = 600.0
"""Longest sound that is decoded in one piece."""
MAX_SAMPLES = 1 << 27
"""Most samples of one, whatever its rate (512 MiB)."""
MAX_BYTES = 1 << 28
"""Largest file that is read in one piece (256 MiB)."""
EXTENSIONS = frozenset(("wav", "flac", "mp3", "ogg", "oga", "opus"))
"""File name endings (lower case, no dot) that folders and shards take for sounds."""
READ = EXTENSIONS | {"aac", "aif", "aiff", "au", "caf", "m4a", "mp4", "webm"}
"""Those of all files that `load_audio` reads."""
WRITTEN = (".wav", ".flac")
"""Endings that `save_audio` knows."""
LARGEST = 32.0
"""Samples are held within ±this before spectra are made of them: far beyond, these would be infinite."""
FLOOR = 1e-5
"""Mel magnitudes below count as silence."""


@dataclass(frozen=True, eq=False)
class Audio:
    """Mono sound. Raises `ValueError` for samples that are not a finite float array of one axis."""

    samples: Samples
    """float32 [S], full scale ±1 (what lies beyond is kept until it is written)."""
    rate: int
    """Samples a second."""

    def __post_init__(self) -> None:
        try:
            given = np.asarray(self.samples)
        except (TypeError, ValueError) as error:
            raise ValueError(f"got a {type(self.samples).__name__} for samples; give an array of floats") from error
        if given.dtype.kind != "f":  # whole numbers would be taken for a sound thousands of times too loud
            raise ValueError(
                f"got samples of {given.dtype}; give floats of full scale ±1, or load_audio((rate, array)), which scales "
                "whole numbers"
            )
        with np.errstate(over="ignore"):  # what overflows is refused below
            samples = given.astype(np.float32, copy=False)
        if samples.ndim != 1:
            raise ValueError(f"sound has samples of shape {list(samples.shape)}; give one axis (mono)")
        if not np.isfinite(samples).all():
            raise ValueError("sound has samples that are NaN or infinite; give finite numbers")
        object.__setattr__(self, "rate", _checked(self.rate, "the rate of a sound"))
        object.__setattr__(self, "samples", samples)

    @cached_property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


SoundSource = FileSource | Audio | tuple[int, Any]
"""A path, the bytes of a file, an open binary file, a sound, or Gradio's (rate, array [S] or [S, channels])."""


# --- reading --------------------------------------------------------------------------------------------------------


def load_audio(
    source: SoundSource, *, rate: int | None = None, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES
) -> Audio:
    """A whole sound as mono float32. Channels are averaged; loudness is left alone.

    Lengths are checked against the header before anything is decoded, and against what is decoded after that. Of a file
    that ends early one gets what is there, if its format allows that (WAV, MP3).

    Args:
        rate: resample to so many samples a second (`resample`); by default the sound keeps its own rate.
        max_seconds: longest sound; `read_chunks` reads longer ones piece by piece.
        max_bytes: largest file.

    Raises:
        ValueError: one sentence, for a sound that is missing, damaged, empty, too long or not finite.
    """
    name = source_name(source)
    if rate is not None:
        rate = _checked(rate)
    found: list[Samples] = []
    own, count = 0, 0
    for audio in _blocks(source, name, max_seconds, max_bytes):
        own, count = audio.rate, count + len(audio.samples)
        most = min(max_seconds, MAX_SAMPLES / max(own, rate or 1))
        if count > most * own:
            raise too_long(name, None, most)
        found.append(audio.samples)
    if not count:
        raise _empty(name)
    whole = Audio(found[0] if len(found) == 1 else np.concatenate(found), own)
    return whole if rate is None else resample(whole, rate)


def read_chunks(
    source: SoundSource, seconds: float, *, rate: int | None = None, max_bytes: int | None = None
) -> Iterator[Audio]:
    """The sound in pieces of `seconds` (the last may be shorter), however long it is: memory holds about two pieces.

    A path is read as it goes; of bytes and open files `MAX_BYTES` are taken. Resampled pieces join without seams: end to
    end they are what `resample` makes of the whole.

    Raises:
        ValueError: as `load_audio`, at the latest when the damaged place is reached.
    """
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"pieces are more than 0 and at most {MAX_SECONDS:g} seconds long, got {seconds!r:.60}")
    name = source_name(source)
    limit = max_bytes or (1 << 50 if isinstance(source, str | os.PathLike) else MAX_BYTES)
    count = 0
    for audio in _pieces(_at_rate(_blocks(source, name, math.inf, limit), rate), seconds):
        count += 1
        yield audio
    if not count:
        raise _empty(name)


def _blocks(source: SoundSource, name: str, max_seconds: float, max_bytes: int) -> Iterator[Audio]:
    """Pieces of any length."""
    if isinstance(source, tuple):
        source = _from_array(*source) if len(source) == 2 else _from_array(0, None)
    if isinstance(source, Audio):
        if source.seconds > max_seconds:
            raise too_long(name, source.seconds, max_seconds)
        yield source
        return
    for rate, samples in decode_blocks(source, max_seconds, max_bytes):
        if not np.isfinite(samples).all():
            raise ValueError(f"{name} has samples that are NaN or infinite; it is damaged")
        yield Audio(samples, rate)


def _from_array(rate: Any, array: Any) -> Audio:
    """Gradio's (rate, array): integers fill their range, floats are taken as they are."""
    if not isinstance(array, np.ndarray):
        raise ValueError("a pair for a sound is (rate, array), as Gradio gives it: a whole number and a numpy array")
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 1 <= array.shape[1] <= MAX_CHANNELS):
        raise ValueError(
            f"the array of a sound has shape [S] or [S, channels] with up to {MAX_CHANNELS}, got {list(array.shape)}"
        )
    if array.dtype == np.uint8:
        array = (array.astype(np.float32) - 128) / 128
    elif array.dtype in (np.int16, np.int32):
        array = array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    elif array.dtype.kind != "f":
        raise ValueError(f"the array of a sound holds uint8, int16, int32 or floats, got {array.dtype}")
    return Audio(average(array if array.ndim == 2 else array[:, None]), rate)


def _at_rate(blocks: Iterator[Audio], rate: int | None) -> Iterator[Audio]:
    stream: resampling.Resampler | None = None
    for audio in blocks:
        if rate is None or rate == audio.rate:
            yield audio
            continue
        stream = stream or resampling.Resampler(audio.rate, _checked(rate))
        for start in range(0, len(audio.samples), stream.piece):  # a second of few samples becomes one of many
            yield Audio(stream.feed(audio.samples[start : start + stream.piece]), rate)
    if stream is not None and rate is not None:
        yield Audio(stream.finish(), rate)


def _pieces(blocks: Iterator[Audio], seconds: float) -> Iterator[Audio]:
    waiting: list[Samples] = []
    count, rate = 0, 1
    for audio in blocks:
        rate, size = audio.rate, max(1, round(seconds * audio.rate))
        waiting.append(audio.samples)
        count += len(audio.samples)
        if count >= size:
            joined, start = np.concatenate(waiting), 0
            for start in range(0, count - size + 1, size):
                yield Audio(joined[start : start + size].copy(), rate)
            waiting = [joined[start + size :]]
            count = len(waiting[0])
    if count:
        yield Audio(np.concatenate(waiting), rate)


def _empty(name: str) -> ValueError:
    return ValueError(f"{name} has no samples; give a sound that isn't empty")


# --- rates and spectra ----------------------------------------------------------------------------------------------


def resample(audio: Audio, rate: int) -> Audio:
    """The sound at another rate, band-limited; S samples become ⌈S · rate / audio.rate⌉.

    Raises `ValueError` for a rate that is none, or one too far from the sound's.
    """
    return Audio(resampling.resample(audio.samples, audio.rate, _checked(rate)), rate)


def _checked(rate: Any, what: str = "a rate") -> int:
    try:
        number = 0 if isinstance(rate, bool) else operator.index(rate)
    except TypeError:
        number = 0
    if not 1 <= number <= MAX_RATE:
        raise ValueError(f"{what} is 1 to {MAX_RATE:,} samples a second, got {rate!r:.60}")
    return number


def given_samples(raw: Any, rate: int) -> Samples:
    """What a tokenizer of sound is given, [S] at its rate and within ±`LARGEST`. Raises `ValueError` for what is no sound, or
    has no samples."""
    if not isinstance(raw, Audio):
        raise ValueError(
            f"expected a sound (mm.audio.Audio), got {type(raw).__name__}: load files with mm.audio, and wrap samples as "
            "Audio(samples, rate)"
        )
    if not len(raw.samples):
        raise ValueError("the sound has no sample: give it one or more")
    return held_samples(raw, rate)


def held_samples(audio: Audio, rate: int) -> Samples:
    """[S] at another rate, within ±`LARGEST` before."""
    return resample(Audio(audio.samples.clip(-LARGEST, LARGEST), audio.rate), rate).samples


def log_mel(
    samples: Tensor, *, rate: int, bins: int = 80, n_fft: int = 1024, hop: int = 256, floor: float = FLOOR
) -> Tensor:
    """Natural logarithm of mel magnitudes: (..., S) → float32 (..., M = `bins`, F = 1 + S // `hop`).

    Magnitudes (not powers) under a Hann window of `n_fft`, frames centred on multiples of `hop`, with silence before and
    after the sound; HTK's mel scale from 0 to `rate` / 2, filters of height 1; clamped to `floor` before the logarithm.
    Differentiable; always float32, whatever autocast says.
    """
    import torch

    transform = _mel(rate, bins, n_fft, hop, samples.device)
    with torch.autocast(samples.device.type, enabled=False):
        return transform(samples.float()).clamp_min(floor).log()


@lru_cache(maxsize=16)
def _mel(rate: int, bins: int, n_fft: int, hop: int, device: Any) -> Any:
    import torchaudio

    transform = torchaudio.transforms.MelSpectrogram(
        rate, n_fft, hop_length=hop, n_mels=bins, power=1.0, pad_mode="constant"
    )
    return transform.to(device)


# --- writing --------------------------------------------------------------------------------------------------------


def save_audio(path: str | os.PathLike[str], audio: Audio) -> None:
    """Write .wav or .flac, 16 bits a sample, whole or not at all.

    A sound with peaks beyond full scale is made quieter as a whole, so that nothing is clipped; a warning says by how
    many decibels. Raises `ValueError` for another ending, an empty sound, or a rate that the format can't hold.
    """
    ending = os.path.splitext(os.fspath(path))[1].lower()
    if ending not in WRITTEN:
        raise ValueError(f"can't write {os.fspath(path)!r}: unknown ending {ending!r}; use one of {', '.join(WRITTEN)}")
    samples, peak = audio.samples, float(np.abs(audio.samples).max(initial=0))
    if not len(samples):
        raise ValueError(f"can't write {os.fspath(path)!r}: the sound has no samples")
    if peak > 1:
        samples = samples / peak
        warnings.warn(
            f"{os.fspath(path)!r}: peaks reach {peak:.3g} of full scale, so the sound was made "
            f"{20 * math.log10(peak):.1f} dB quieter",
            stacklevel=2,
        )
    # as the readers do, which divide by 32,768: a sound of 16 bits comes back bit for bit
    whole = np.clip(np.round(samples * 32768.0), -32768, 32767).astype(np.int16)
    with safe_io.atomic_file(path) as temporary, temporary.open("wb") as file:
        _encode(file, whole, audio.rate, ending[1:].upper(), "PCM_16")


def to_wav(audio: Audio) -> bytes:
    """A .wav file of 32-bit floats, which loses nothing. Equal sounds give equal bytes (libsndfile writes the time of day
    into such files)."""
    data = audio.samples.astype("<f4").tobytes()
    chunks = [  # format 3 is floats: one channel, samples a second, bytes a second, bytes a sample, bits a sample
        (b"fmt ", struct.pack("<HHIIHH", 3, 1, audio.rate, 4 * audio.rate, 4, 32)),
        (b"fact", struct.pack("<I", len(audio.samples))),
        (b"data", data),
    ]
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(content)) + content for name, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _encode(file: IO[bytes], samples: np.ndarray[Any, Any], rate: int, kind: str, subtype: str) -> None:
    import soundfile

    try:
        soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    except (soundfile.SoundFileError, TypeError) as error:
        raise ValueError(f"can't write {rate:,} samples a second as {kind}: {error}") from error
