"""A corpus of clear speech, made on this machine: flite speaks, pocketsphinx says when each word is heard.

Clips are 16 kHz, 16 bit, mono. The two programs are installed, not downloaded by this code; nothing touches the
network. `mm.data.speech_grammar` says what is spoken and what is held out.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
import subprocess
import tarfile
import tempfile
import threading
import wave
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.speech_grammar import Kind, held_out, plan, texts
from mm.safe_io import atomic_file, write_text

RATE = 16_000
"""Samples a second, of the voices and of the recogniser's acoustic model."""
VOICES = ("kal16", "awb", "rms", "slt")
"""Voices that Debian's flite holds at 16 kHz: three men, one woman."""
LONGEST = 4.0
"""Seconds; longer clips are left out."""
FRAME = RATE // 100
"""Samples over which energy is taken (10 ms)."""
QUIET = 0.01
"""Frames below this share of the loudest frame's amplitude (−40 dB) are silence at the ends."""
MARGIN = 0.10
"""Seconds of that silence that stay at both ends, at the most (frames add up to 10 ms)."""
WORKERS = 2
"""Clips that are made at once. flite runs beside Python, so threads are enough."""
CHUNK = 64
PATIENCE = 60.0
"""Seconds that one clip may take; flite needs hundredths of one."""
MAX_HOURS = 1000.0
Progress = Callable[[int, int], None]
Words = list[tuple[str, float, float]]
"""(word, start, end) in seconds."""


@dataclass(frozen=True)
class Made:
    """What `make_speech` wrote."""

    paths: list[Path]
    clips: dict[str, int]
    """By split: "train" and "heldout"."""
    seconds: dict[str, float]
    unaligned: int
    """Clips left out because their words could not be found in them."""
    too_long: int


@dataclass(frozen=True)
class Clip:
    """One spoken text; `words` is None where the alignment failed."""

    kind: Kind
    text: str
    speaker: str
    samples: np.ndarray[Any, np.dtype[np.int16]]
    words: Words | None

    @property
    def seconds(self) -> float:
        return len(self.samples) / RATE

    @property
    def split(self) -> str:
        return "heldout" if held_out(self.kind, self.text) else "train"

    def members(self) -> dict[str, bytes]:
        """Members of the WebDataset sample."""
        fields = {
            "text": self.text,
            "speaker": self.speaker,
            "kind": self.kind,
            "words": self.words,
            "split": self.split,
        }
        return {"wav": wav_bytes(self.samples), "json": json.dumps(fields).encode()}


def make_speech(
    out: str | Path,
    *,
    hours: float = 1.0,
    seed: int = 0,
    voices: Sequence[str] = VOICES,
    commands: float = 0.3,
    progress: Progress | None = None,
) -> Made:
    """Write `out`/speech-train.tar, speech-heldout.tar and README.md; the bytes depend on the arguments and on the two
    programs alone.

    Args:
        hours: of sound in both shards together; the last clip may end a little later. At least one clip is held out.
        voices: of `flite -lv`; each text is said by one of them, drawn at random.
        commands: share of clips that are commands; the others are digits.
        progress: is told seconds made and wanted.

    Raises:
        ValueError: flite, one of its voices or pocketsphinx is missing, or the arguments make no corpus.
    """
    if not 0 < hours <= MAX_HOURS or not 0 <= commands <= 1:
        raise ValueError(
            f"a corpus needs hours above 0 (at most {MAX_HOURS:g}) and commands 0 to 1, got {hours} and {commands}"
        )
    check_voices(voices)
    most = texts(commands) * len(voices) * LONGEST / 3600
    if hours > most:
        raise ValueError(
            f"{len(voices)} voices can't fill {hours:g} hours without saying a text twice (less than {most:.1f}); ask for "
            "fewer hours, more voices, or another share of commands"
        )
    require_pocketsphinx()
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give the name of a folder to write")
    paths = {split: folder / f"speech-{split}.tar" for split in ("train", "heldout")}
    clips, seconds = dict.fromkeys(paths, 0), dict.fromkeys(paths, 0.0)
    unaligned = too_long = 0
    with atomic_file(paths["train"]) as train, atomic_file(paths["heldout"]) as heldout:
        with tarfile.open(train, "w") as first, tarfile.open(heldout, "w") as second:
            shards = {"train": first, "heldout": second}
            for clip in speak_all(plan(seed, tuple(voices), commands)):
                if clip.words is None:
                    unaligned += 1
                    continue
                if clip.seconds > LONGEST:
                    too_long += 1
                    continue
                _add(shards[clip.split], f"{sum(clips.values()):06d}", clip.members())
                clips[clip.split] += 1
                seconds[clip.split] += clip.seconds
                total = sum(seconds.values())
                if progress is not None:
                    progress(min(int(total), int(hours * 3600)), int(hours * 3600))
                if total >= hours * 3600 and all(clips.values()):
                    break
    made = Made(list(paths.values()), clips, seconds, unaligned, too_long)
    write_text(folder / "README.md", readme(made, seed, voices))
    return made


def speak_all(wanted: Iterator[tuple[Kind, str, str]]) -> Iterator[Clip]:
    """Clips in the order asked for, several made at once."""
    with ThreadPoolExecutor(WORKERS) as pool:
        while chunk := list(itertools.islice(wanted, CHUNK)):
            yield from pool.map(lambda asked: make_clip(*asked), chunk)


def make_clip(kind: Kind, text: str, voice: str) -> Clip:
    """Spoken, aligned, and cut to `MARGIN` of silence at both ends. Words end where sound does."""
    samples = speak(text, voice)
    words = align(samples, text)
    start, stop, low, high = sounding(samples)
    if words is not None:
        words = [
            (word, round(max(begin, low) - start, 3), round(min(end, high) - start, 3)) for word, begin, end in words
        ]
        if any(end <= begin for _, begin, end in words):
            words = None
    return Clip(kind, text, voice, samples[round(start * RATE) : round(stop * RATE)], words)


def speak(text: str, voice: str) -> np.ndarray[Any, np.dtype[np.int16]]:
    """flite's voice, int16 [n] at `RATE`. Raises `ValueError` for a voice that speaks at another rate."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.wav"
        run_flite("-voice", voice, "-t", text, "-o", str(path))
        with _spoken(path) as file:
            if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
                raise ValueError(
                    f"voice {voice!r} speaks at {file.getframerate():,} Hz; give voices of {RATE:,} Hz: {', '.join(VOICES)}"
                )
            return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")


def sounding(samples: np.ndarray[Any, np.dtype[np.int16]]) -> tuple[float, float, float, float]:
    """(start, stop, low, high) in seconds: what is kept, and where in it sound begins and ends, both by energy."""
    count = len(samples) // FRAME
    frames = samples[: count * FRAME].reshape(count, FRAME).astype(np.float64)
    level = np.sqrt((frames**2).mean(1)) if count else np.zeros(1)
    loud = np.flatnonzero(level >= max(QUIET * float(level.max()), 1.0))
    if not len(loud):
        return 0.0, len(samples) / RATE, 0.0, len(samples) / RATE
    low, high = float(loud[0]) / 100, float(loud[-1] + 1) / 100
    return max(0.0, low - MARGIN), min(len(samples) / RATE, high + MARGIN), low, high


_decoders = threading.local()


def align(samples: np.ndarray[Any, np.dtype[np.int16]], text: str) -> Words | None:
    """When each word of a text is heard, in seconds (10 ms steps); None where pocketsphinx finds other words."""
    decoder = getattr(_decoders, "decoder", None)
    if decoder is None:
        decoder = _decoders.decoder = require_pocketsphinx().Decoder(samprate=RATE, lm=None, loglevel="FATAL")
    decoder.reinit_feat()  # forget the noise of the clip before: which it was depends on the threads
    decoder.set_align_text(text)
    decoder.start_utt()
    decoder.process_raw(samples.tobytes(), full_utt=True)
    decoder.end_utt()
    if decoder.hyp() is None:
        return None
    # Fillers are in angle or square brackets; a second pronunciation is written word(2).
    heard = [
        (segment.word.partition("(")[0], segment.start_frame / 100, (segment.end_frame + 1) / 100)
        for segment in decoder.seg()
        if segment.word[0] not in "<["
    ]
    return heard if [word for word, _, _ in heard] == text.split() else None


def require_pocketsphinx() -> Any:
    """The module. Raises `ValueError` where it is not installed."""
    try:
        import pocketsphinx
    except ImportError as error:
        raise ValueError("speech is recognised by pocketsphinx, which is missing; pip install 'mm[speech]'") from error
    return pocketsphinx


def _flite() -> str:
    program = shutil.which("flite")
    if program is None:
        raise ValueError("speech is made by the program flite, which is missing; apt install flite")
    return program


def run_flite(*arguments: str) -> str:
    """What flite prints. Raises `ValueError` where it is missing, fails, or takes longer than `PATIENCE`."""
    try:
        done = subprocess.run([_flite(), *arguments], check=True, capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"flite did not end within {PATIENCE:g} s; is the machine out of memory?") from error
    except (subprocess.CalledProcessError, OSError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        lines = said.decode("utf-8", "replace").strip().splitlines() or ["it says nothing"]
        raise ValueError(f"flite failed: {lines[-1][:200]}") from error
    return done.stdout.decode("utf-8", "replace")


def _spoken(path: Path) -> wave.Wave_read:
    try:
        return wave.open(str(path))
    except (OSError, EOFError, wave.Error) as error:
        raise ValueError(f"flite wrote no sound: {str(error) or 'the file is empty'}") from error


def check_voices(voices: Sequence[str]) -> None:
    """Raises `ValueError` where flite or a voice is missing."""
    listed = run_flite("-lv")
    known = listed.partition(":")[2].split()
    for voice in voices:
        if voice not in known:
            raise ValueError(f"flite has no voice {voice!r}; it has: {', '.join(known)}")
    if not voices or len(set(voices)) != len(voices):
        raise ValueError(f"got voices {list(voices)}; give at least one, each once")


def wav_bytes(samples: np.ndarray[Any, np.dtype[np.int16]], rate: int = RATE) -> bytes:
    """A mono 16-bit .wav file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    for suffix, data in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")  # time 0, so that the bytes of a shard are the same each time
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def readme(made: Made, seed: int, voices: Sequence[str]) -> str:
    """What the folder says of itself."""
    rows = "\n".join(f"| speech-{s}.tar | {made.clips[s]:,} | {made.seconds[s] / 60:.1f} |" for s in made.clips)
    return f"""# Made speech: digits and commands

Synthetic speech at {RATE:,} Hz, 16 bit, mono, made by `mm data speech` with seed {seed} and the voices
{", ".join(voices)}. WebDataset shards: NAME.wav, and NAME.json with text, speaker, kind (digits or commands),
words [[word, start, end] in seconds] and split. No voice says a text of the held-out shard in the training shard.

| shard | clips | minutes |
|---|---|---|
{rows}

Left out: {made.unaligned} clips whose words were not found in them, {made.too_long} longer than {LONGEST:g} s.

## Licences of what made it

- flite 2.2, Carnegie Mellon University, a BSD-like licence (names and disclaimer to be kept, changes to be marked);
  Debian: /usr/share/doc/flite/copyright.
- Voice kal16: the diphone voice that is part of flite, under flite's licence.
- Voices awb, rms, slt: part of flite, built from the CMU ARCTIC databases (Carnegie Mellon University, free for any use with the
  copyright notice kept).
- Word times: pocketsphinx 5 and its US English acoustic model, Carnegie Mellon University, two-clause BSD licence.
"""
