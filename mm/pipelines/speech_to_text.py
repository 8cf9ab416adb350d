"""Speech → text: sounds of any length, read piece by piece, each piece as long as the model can hear at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np
import torch

from mm.audio import Audio, SoundSource, read_chunks
from mm.edits import edit_distance
from mm.generation import Request
from mm.interfaces import Encoded, Sampling
from mm.layout import Segment
from mm.pipelines.abilities import check_learned
from mm.pipelines.base import Callback, Pipeline, SamplingOptions, check_count, choose_seed, several, shifted
from mm.pipelines.media import longest
from mm.pipelines.outputs import TextOutput

MOST_SECONDS = 8.0
"""Longest piece of a sound."""
WINDOW = 0.02
"""Seconds of which the loudness is compared, to find a quiet place."""
LEAST = 0.25
"""Seconds that a piece has at least, about a short word; only a whole sound may be shorter."""
SILENCE = 1e-4
"""Largest amplitude of what holds no speech (80 dB below full scale)."""
CHARACTERS = 20.0
"""Tokens of text a second of speech for which room is left."""


class SpeechToTextPipeline(Pipeline):
    """`pipeline("clip.wav").texts`, or step by step: `encode`, `generate`, `decode`."""

    direction = ("speech", "text")

    @torch.no_grad()
    def __call__(
        self,
        audio: SoundSource | Sequence[SoundSource],
        *,
        max_tokens: int = 256,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> TextOutput:
        """The text of one sound or several. By default the likeliest token each time (temperature 0).

        Long sounds are cut at quiet places into pieces of up to 8 s, or of what the model holds, whose texts are joined by
        spaces. Of a file no more than a batch of pieces is in memory, so that recordings of hours can be read.

        Args:
            audio: paths, bytes of files, open binary files, `mm.Audio`, or (rate, array).
            max_tokens: the longest text of a piece, in tokens.
            seed, generator, callback, sampling: as for `TextToImagePipeline`. A callback's rows are pieces.

        Raises:
            ValueError: a sound that can't be loaded, a model that learned to write down none, or settings that make no sense for
                text.
        """
        check_learned(self, "sound", "text")
        seed = choose_seed(seed, generator)
        one = (str, os.PathLike, bytes, bytearray, memoryview, Audio, tuple)
        sounds = several(audio, one, "a sound; give a path, bytes, a binary file, mm.Audio, (rate, array)")
        max_tokens = check_count("max_tokens", max_tokens)
        chosen = self.sampling(self.text, sampling, Sampling(temperature=0.0))
        if chosen.guidance != 1:
            raise ValueError(f"text is generated without guidance; leave guidance out, got {chosen.guidance}")
        seen: Counter[bytes] = Counter()
        texts: list[list[str]] = [[] for _ in sounds]
        tokens: list[list[Encoded]] = [[] for _ in sounds]
        batch: list[tuple[int, Audio]] = []
        done = 0

        def read() -> None:
            nonlocal done
            made = self.generate(
                self.encode([piece for _, piece in batch]),
                max_tokens=max_tokens,
                sampling=chosen,
                seed=seed,
                callback=None if callback is None else shifted(callback, done),
                seen=seen,
            )
            for (number, _), item, text in zip(batch, made, self.decode(made), strict=True):
                tokens[number].append(item)
                texts[number].append(text.strip())
            done += len(batch)
            batch.clear()

        for number, sound in enumerate(sounds):
            for piece in self.pieces(sound):
                batch.append((number, piece))
                if len(batch) == self.batch_size:
                    read()
        if batch:
            read()
        return TextOutput(
            [" ".join(filter(None, parts)) for parts in texts], [_joined(items) for items in tokens], seed
        )

    def agreement(self, audio: Audio, text: str) -> float:
        """How much of a text is heard in a sound, letter by letter: 1 = all, 0 = as many mistakes as letters. For
        `TextToSpeechPipeline(..., best_of=4, score=recogniser.agreement)`."""
        heard, wanted = self(audio, seed=0).texts[0].lower(), text.lower()
        return 1.0 - edit_distance(heard, wanted) / max(1, len(wanted))

    # --- the steps ----------------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """The longest piece: what an item and the context hold, with room for its text."""
        name = self.hearing()
        spec, order = self.tokenizer(name).spec, self.model.modalities[self.model.vocabulary.index[name]].order
        room = self.model.context - 1 - self.model.grammar.overhead(name)
        most = min(spec.max_grid[0], int(MOST_SECONDS * spec.frame_rate) or 1)
        for count in range(most, 0, -1):
            if order.places(count, spec) + max(2, CHARACTERS * count / spec.frame_rate) <= room:
                return count / spec.frame_rate
        raise ValueError(f"the model's context of {self.model.context} positions has no room for a sound and its text")

    def pieces(self, sound: SoundSource) -> Iterator[Audio]:
        """A sound at the model's rate in pieces of up to `seconds`, cut at quiet places; silent ones are left out."""
        tokenizer = self.tokenizer(self.hearing())
        most, rate = min(self.seconds, longest(tokenizer)), tokenizer.spec.sample_rate
        for piece in cut_quietly(read_chunks(sound, most, rate=rate), most):
            if float(np.abs(piece.samples).max(initial=0.0)) > SILENCE:
                yield piece

    def encode(self, pieces: Sequence[Audio]) -> list[list[Segment]]:
        """Each piece as the beginning of a document."""
        return [[segment] for segment in self.encode_sounds(pieces)]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[Segment]],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        seed: int = 0,
        callback: Callback | None = None,
        seen: Counter[bytes] | None = None,
    ) -> list[Encoded]:
        """Tokens of the text of each encoded piece. `seen`: as for `run`."""
        chosen, max_tokens = sampling or Sampling(temperature=0.0), max_tokens + 1  # and the end
        requests = [Request(prompt=prompt, max_tokens=max_tokens, sampling=chosen) for prompt in prompts]
        made = self.run(requests, seed, callback, seen=seen)
        return [segments[-1].content if segments else _joined([]) for segments in made]

    def decode(self, tokens: Sequence[Encoded]) -> list[str]:
        """Texts; bytes that are no text become U+FFFD."""
        return self.decode_items(self.text, tokens)


def cut_quietly(chunks: Iterator[Audio], seconds: float) -> Iterator[Audio]:
    """A sound that comes in chunks, in pieces of up to `seconds`. A piece ends in the quietest window of its second half, and
    leaves at least `LEAST` seconds for the next one."""
    waiting, rate = np.zeros(0, np.float32), 0
    for chunk in chunks:
        rate = chunk.rate
        waiting = np.concatenate((waiting, chunk.samples))
        most, window = max(1, int(seconds * rate)), max(1, round(WINDOW * rate))
        while len(waiting) > most:
            half, end = most // 2, min(most, len(waiting) - min(round(LEAST * rate), most // 4))
            within = np.square(waiting[half:end], dtype=np.float64)
            power = np.convolve(within, np.ones(window), "valid") if len(within) >= window else within[:0]
            cut = half + int(power.argmin()) + window // 2 if len(power) else end
            yield Audio(waiting[:cut], rate)
            waiting = waiting[cut:]
    if len(waiting):
        yield Audio(waiting, rate)


def _joined(items: Sequence[Encoded]) -> Encoded:
    """The tokens of all pieces of a sound."""
    ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(item.content for item in items)])
    return Encoded(grid=(len(ids),), ids=ids)
