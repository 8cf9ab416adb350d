"""Spoken clips of a source in memory, with what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mm.audio import Audio
from mm.data.example import BrokenExample, Source, digest, holdout_keys, warn_skipped

HELD_OUT_TAKES = (5, 6)
"""Of a source whose clips have a field `index` (the take): these are held out of all training."""
MAX_SECONDS = 20.0
"""Longer clips are not spoken prompts."""


@dataclass(frozen=True)
class Recordings:
    """Clips; one entry each of every list."""

    audios: list[Audio]
    texts: list[str]
    """Words in lower case."""
    speakers: list[str]
    kinds: list[str]
    """The grammar that the text belongs to; "" where the source doesn't say."""
    held: list[bool]
    """Whether the clip is held out."""
    identity: str
    """Of the source, for caches."""

    def __len__(self) -> int:
        return len(self.audios)

    def where(self, held: bool) -> list[int]:
        """Indices of the held-out clips, or of the others."""
        return [index for index, out in enumerate(self.held) if out == held]

    def subset(self, indices: Sequence[int]) -> Recordings:
        return Recordings(
            audios=[self.audios[i] for i in indices],
            texts=[self.texts[i] for i in indices],
            speakers=[self.speakers[i] for i in indices],
            kinds=[self.kinds[i] for i in indices],
            held=[self.held[i] for i in indices],
            identity=digest(self.identity, *map(str, indices)),
        )

    def spread(self, count: int) -> Recordings:
        """An even choice of at most `count`."""
        step = max(1, len(self) // max(1, count))
        return self if len(self) <= count else self.subset(range(0, step * count, step))


def load_recordings(source: Source, holdout_every: int = 20) -> Recordings:
    """All clips of a whole source. A field `split` decides what is held out ("train" or not), else a field `index`
    (`HELD_OUT_TAKES`), else the key as for pictures.

    Raises `ValueError` for a part of a source, and for one without sounds and texts.
    """
    if source.split != "all":
        raise ValueError(f"{source.what} is the split {source.split!r}; give the whole source, split 'all'")
    by_key = holdout_keys((source.key(i) for i in range(len(source))), holdout_every)
    found = Recordings([], [], [], [], [], source.identity)
    skipped: list[str] = []
    for index in range(len(source)):
        try:
            example = source[index]
            audio, text = example["audio"], " ".join(str(example["text"]).lower().split())
            if not isinstance(audio, Audio) or not 0 < audio.seconds <= MAX_SECONDS:
                raise BrokenExample(f"{example['key']} is no sound of at most {MAX_SECONDS:g} s")
            speaker, kind = str(example.get("speaker", "")), str(example.get("kind", ""))
            split, take = example.get("split"), example.get("index")
        except BrokenExample as error:
            skipped.append(str(error))
            continue
        held = split != "train" if split is not None else take in HELD_OUT_TAKES
        if split is None and take is None:
            held = source.key(index) in by_key
        found.audios.append(audio)
        found.texts.append(text)
        found.speakers.append(speaker)
        found.kinds.append(kind)
        found.held.append(held)
    if not len(found):
        raise ValueError(f"{source.what} has no clips with sound and text: {skipped[0] if skipped else 'it is empty'}")
    if skipped:
        warn_skipped(source.what, len(skipped), len(source), skipped[0])
    return found
