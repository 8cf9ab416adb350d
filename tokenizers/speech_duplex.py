"""Speech that can be interrupted: a codec's sub-codes with one more id, IRQ, at which the speaker stops; and what the speaker
hears meanwhile (LSLM, Ma et al. 2024, arXiv 2408.02622, section 3).

`encode` takes a sound (nothing is heard), or a `mm.listening.Dialogue`. An interrupted item ends with one element of IRQ on all
sub-codes, before the extent it announced: how long it was going to be says nothing of the interruption. `decode` gives the sound
up to there.

Letters in shapes: T elements, K sub-codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mm import nested, saved
from mm.audio import Audio
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec
from mm.listening import NAME, Dialogue, Ear

FORM = "mm.tokenizers.speech_duplex"
INNER = "codec"
"""Folder of the codec among the saved files."""
MAX_BINS, MAX_HISTORY = 256, 128


class SpeechDuplex(ModalityTokenizer, nn.Module):
    """A codec with IRQ, and an ear.

    Args:
        codec: a tokenizer of sound with sub-codes.
        bins: mel bins of what is heard.
        history: elements that are heard at once; 16 are half a second of the codec of this project.

    Raises:
        ValueError: another kind of tokenizer, or sizes out of range.
    """

    def __init__(self, codec: ModalityTokenizer, bins: int = 40, history: int = 16) -> None:
        super().__init__()
        spec = codec.spec
        if spec.kind != "codes" or not spec.sample_rate or len(spec.max_grid) != 1:
            raise ValueError(
                f"{type(codec).__name__} is no codec of sound with sub-codes; give one such as mm.tokenizers.speech_codec"
            )
        if spec.stop >= 0:
            raise ValueError(f"{type(codec).__name__} has an id to stop at already; give the codec inside it")
        samples = spec.sample_rate / spec.frame_rate
        if samples % 2:
            raise ValueError(
                f"{type(codec).__name__} has {samples:g} samples an element; what is heard is cut into even numbers"
            )
        saved.whole_number("bins", bins, 1, MAX_BINS)
        saved.whole_number("history", history, 1, MAX_HISTORY)
        self.codec, self.ear = codec, Ear(spec.sample_rate, int(samples), bins, history)
        self.irq = spec.vocab_size
        """The id."""

    @property
    def spec(self) -> Spec:
        inner, ear = self.codec.spec, self.ear
        settings = {"bins": ear.bins, "history": ear.history, "codec": inner.fingerprint}
        return Spec(
            kind="codes",
            vocab_size=self.irq + 1,
            num_codes=inner.num_codes,
            max_grid=inner.max_grid,
            spatial=inner.spatial,
            sample_rate=inner.sample_rate,
            frame_rate=inner.frame_rate,
            alongside={NAME: ear.features},
            stop=self.irq,
            fingerprint=f"speech_duplex-{saved.digest(settings, {})}",
        )

    @property
    def origin(self) -> str:
        """Fingerprint of the codec, whose ids these are but for the last one (`mm.adopt`)."""
        return self.codec.spec.fingerprint

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    def encode(self, raw: Audio | Dialogue) -> Encoded:
        return self.encode_batch([raw])[0]

    def encode_batch(self, raws: Sequence[Audio | Dialogue]) -> list[Encoded]:
        given = [raw if isinstance(raw, Dialogue) else Dialogue(raw) for raw in raws]
        sounds = [one.speaking for one in given if not isinstance(one.speaking, Encoded)]
        made = iter(self.codec.encode_batch(sounds))
        spoken = [one.speaking if isinstance(one.speaking, Encoded) else next(made) for one in given]
        return [self._item(one, said) for one, said in zip(given, spoken, strict=True)]

    def _item(self, dialogue: Dialogue, spoken: Encoded) -> Encoded:
        codes = spoken.codes
        if codes is None or codes.ndim != 2 or codes.shape[1] != self.codec.spec.num_codes:
            raise ValueError(
                f"what is said has shape {tuple(spoken.content.shape)}, expected {self.codec.spec.num_codes} sub-codes an element"
            )
        low, high = (int(x) for x in codes.aminmax()) if len(codes) else (0, 0)
        if low < 0 or high >= self.irq:
            raise ValueError(f"what is said has sub-codes {low}..{high}, but those of its codec are 0..{self.irq - 1}")
        planned, ended = len(codes), False
        if dialogue.interrupted is not None:
            if not 0 <= dialogue.interrupted < math.inf:
                raise ValueError(
                    f"an interruption is 0 or more seconds after the beginning, got {dialogue.interrupted}"
                )
            last = math.ceil(dialogue.interrupted * self.codec.spec.frame_rate)
            if last < planned:  # otherwise everything was said before
                codes, ended = torch.cat((codes[:last], torch.full_like(codes[:1], self.irq))), True
        heard = {} if dialogue.listening is None else {NAME: self.ear.rows(dialogue.listening, len(codes))}
        return Encoded(grid=(planned,), codes=codes, alongside=heard, ended=ended)

    def interrupted(self, encoded: Encoded) -> int | None:
        """The element at which an item stops for an interruption; None: it does not."""
        codes = encoded.codes
        stops = (codes[:, 0] == self.irq).nonzero() if codes is not None and codes.numel() else torch.zeros(0)
        return int(stops[0]) if len(stops) else None

    def decode(self, encoded: Encoded) -> Decoded:
        """Sound up to the interruption, if there is one; at least one element, which is silent where nothing was said. IRQ
        where it doesn't stop the item (in other sub-codes than the first) counts as id 0."""
        return self.decode_batch([encoded])[0]

    def decode_batch(self, items: Sequence[Encoded]) -> list[Decoded]:
        said = [self._said(item) for item in items]
        made = iter(self.codec.decode_batch([item for item in said if item is not None]))
        silence = Audio(np.zeros(self.ear.samples, dtype=np.float32), self.ear.rate)
        return [Decoded(value=silence) if item is None else next(made) for item in said]

    def _said(self, item: Encoded) -> Encoded | None:
        """What the codec decodes; None: nothing was said."""
        codes, last = item.codes, self.interrupted(item)
        if codes is None or codes.ndim != 2:
            return item
        if last == 0:
            return None
        codes = codes if last is None else codes[:last]
        grid = item.grid if last is None and not item.ended else (len(codes),)
        return Encoded(grid=grid, codes=torch.where(codes == self.irq, 0, codes))

    # ---- saving, loading ---------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write `config.json` and the codec's folder into the folder `path`, both or neither."""
        others = {"bins": self.ear.bins, "history": self.ear.history}
        nested.save_around(path, FORM, self.spec.fingerprint, INNER, self.codec, others)

    @classmethod
    def from_directory(cls, path: str | Path) -> SpeechDuplex:
        """A saved tokenizer, in evaluation mode. Raises `ValueError` for files that are missing, damaged, or not what was
        saved."""
        inside = "a duplex inside a duplex; expected a codec of sound"
        found = nested.Around(Path(path), FORM, INNER, SpeechDuplex, {"bins", "history"}, "a speech duplex", inside)
        made = cls(found.load(), found.config["bins"], found.config["history"]).eval()
        found.check(made.spec.fingerprint)
        return made

    @classmethod
    def tiny(cls) -> SpeechDuplex:
        """Around a small random codec, for tests."""
        return cls(nested.find_class("mm.tokenizers.speech_codec.SpeechCodec").tiny(), bins=8, history=3).eval()

    @classmethod
    def examples(cls) -> list[Audio]:
        """The codec's."""
        sounds: list[Audio] = nested.find_class("mm.tokenizers.speech_codec.SpeechCodec").examples()
        return sounds
