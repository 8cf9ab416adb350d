"""Copies of sounds with small changes that leave what is said: for recognisers that have few recordings to learn from.

A codec's tokens differ for the same word at another speed, loudness or start, so a model that reads tokens learns each recording
by heart unless it meets it in many versions. What is drawn depends on the seed and the number of the example alone, so that the
copies can be cached like any other sounds.

Letters in shapes: S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mm.audio import Audio, resample
from mm.data.example import BrokenExample, Lazy, Source, digest
from mm.data.joined import MAX_COUNT
from mm.saved import number, whole_number

STEPS = 100
"""A speed is a whole number of hundredths: rates then have small common ratios, whose filters are kept."""


class PerturbedSource(Source):
    """Each example of a source `copies` times: first as it is, then at another speed (which raises the pitch with it; Ko et al.
    2015, "Audio augmentation for speech recognition"), after a little silence, louder or softer, and with noise.

    The made source is all of one split: give `source` with its own, so that nothing that it holds out gets in. Where a speaker's
    voice is to be learned, give the source itself, for another speed is another voice.

    Args:
        source: examples with a sound in `field`.
        copies: of each example; 1 changes nothing.
        speed: largest change, a share: 0.15 is 85 to 115 %, in hundredths.
        silence: longest silence before the sound, in seconds.
        gain: largest change of loudness up and down, in decibels.
        noise: signal-to-noise ratios between which that of white noise is drawn, in decibels; None adds none.
        field: the field that holds the sound.
        into: the field that has it in the copies, in the place of `field`; empty: the same. So one configuration may cache a
            sound twice, as what is spoken and, by another tokenizer, as what is heard.
        seed: another seed, other changes.
        options: `caption` and `strict`, as of every source.
    """

    def __init__(
        self,
        source: Source,
        copies: int = 4,
        speed: float = 0.15,
        silence: float = 0.1,
        gain: float = 6.0,
        noise: Sequence[float] | None = (15.0, 40.0),
        field: str = "audio",
        into: str = "",
        seed: int = 0,
        **options: Any,
    ) -> None:
        # by default the text is that of the source, which may have a format of its own for it
        super().__init__(**{"caption": "{text}", **options})
        if self.split != "all":
            raise ValueError(
                f"got split {self.split!r}; give it to the source that is copied: all copies are of one split"
            )
        for name, value in (("copies", copies), ("seed", seed)):
            whole_number(name, value)
        for name, share in (("speed", speed), ("silence", silence), ("gain", gain)):
            number(name, share)
        if not 1 <= copies <= MAX_COUNT // max(1, len(source)):
            raise ValueError(
                f"copies must be 1 to {MAX_COUNT // max(1, len(source)):,} of {len(source):,} examples, got {copies:,}"
            )
        if not 0 <= speed <= 0.5:
            raise ValueError(f"speed is a share of 0 to 0.5 (0.15: from 85 to 115 %), got {speed}")
        if not 0 <= silence <= 10:
            raise ValueError(f"silence is 0 to 10 seconds, got {silence}")
        if not 0 <= gain <= 40:
            raise ValueError(f"gain is 0 to 40 decibels, got {gain}")
        if noise is not None and not _is_range(noise):
            raise ValueError(f"noise is two ratios in decibels, the smaller first, from −20 to 100, got {noise!r:.60}")
        if not isinstance(into, str) or into in ("key", "text"):
            raise ValueError(f"into is the name of a field beside key and text, got {into!r:.60}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.source, self.copies, self.field, self.into, self.seed = source, copies, field, into or field, seed
        self.speed, self.silence, self.gain = float(speed), float(silence), float(gain)
        self.noise = None if noise is None else (float(noise[0]), float(noise[1]))
        self._finish([f"{place:08d}" for place in range(len(source) * copies)], f"{source.what}, {copies} copies")

    @property
    def identity(self) -> str:
        settings: tuple[object, ...] = (
            self.copies,
            self.speed,
            self.silence,
            self.gain,
            self.noise,
            self.field,
            self.seed,
        )
        if self.into != self.field:
            settings = (*settings, self.into)
        ordinals = np.asarray(self.source.ordinals, np.int64).tobytes()
        return digest("perturbed 1", *map(str, settings), self.source.identity, ordinals, str(self.source.caption))

    def _fields(self, ordinal: int) -> dict[str, Any]:
        copy, index = divmod(ordinal, len(self.source))
        example = self.source[index]
        fields: dict[str, Any] = {name: dict.__getitem__(example, name) for name in example}
        if self.field not in fields:
            raise BrokenExample(
                f"{self.source.what} has no field {self.field!r} to change; it has: {', '.join(sorted(fields))}"
            )
        sound = fields.pop(self.field)
        if self.into in fields:
            raise BrokenExample(f"{self.source.what} has a field {self.into!r} already; give another one in into")
        fields[self.into] = Lazy(lambda: self._changed(example[self.field], ordinal)) if copy else sound
        return fields

    def _changed(self, audio: Any, ordinal: int) -> Audio:
        if not isinstance(audio, Audio):
            raise BrokenExample(
                f"{self.field!r} of {self.source.what} is a {type(audio).__name__}, not a sound; perturb sounds before they are "
                "cached"
            )
        rng = np.random.default_rng([self.seed, ordinal])
        # every draw is taken in every case, so that one setting doesn't change what another draws
        speed, silence, gain, ratio = rng.uniform(-1, 1), rng.uniform(), rng.uniform(-1, 1), rng.uniform()
        percent = STEPS + round(STEPS * self.speed * speed)
        # the same samples, taken to be `percent` where `STEPS` are wanted, last STEPS / percent as long
        changed = resample(Audio(audio.samples, percent), STEPS).samples
        changed = np.concatenate([np.zeros(int(silence * self.silence * audio.rate), np.float32), changed])
        changed = changed * np.float32(10 ** (self.gain * gain / 20))
        if self.noise is not None and changed.size:
            level = self.noise[0] + (self.noise[1] - self.noise[0]) * ratio
            power = float(np.square(changed, dtype=np.float64).mean())
            scale = (power / 10 ** (level / 10)) ** 0.5
            changed = changed + (scale * rng.standard_normal(changed.size)).astype(np.float32)
        return Audio(changed, audio.rate)


def _is_range(value: Any) -> bool:
    if not isinstance(value, Sequence) or len(value) != 2:
        return False
    low, high = value
    return isinstance(low, int | float) and isinstance(high, int | float) and -20 <= low <= high <= 100
