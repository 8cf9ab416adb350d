"""Speech as a prompt for a decoder-only recogniser: an encoder's frames, compressed by what CTC hears in them (Tsunoo et al.
2023, arXiv 2309.08876) or by Paraformer's continuous integrate-and-fire (Gao et al. 2022, arXiv 2206.08317).

It only reads: nothing makes sound of the vectors again. `mm fit -c configs/tokenizers/speech_ctc.yaml` trains the encoder, for
all three compressions at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mm import safe_io, saved
from mm.audio import Audio, Samples, given_samples
from mm.cif import fire
from mm.ctc import LabelMeans, Spelling, compress, greedy, unspell
from mm.interfaces import Decoded, Encoded, Spec
from mm.speech_encoder import FRAME_RATE, RATE, CTCEncoder, TrainableSpeechEncoder

Compression = Literal["ctc", "cif", "none"]
COMPRESSIONS: tuple[str, ...] = get_args(Compression)
FORMAT, WHAT = "mm.tokenizers.speech_ctc", "a speech encoder"
BOUNDS = {
    "mels": (1, 256), "width": (2, 2048), "layers": (1, 64), "heads": (1, 64), "kernel": (1, 99), "seconds": (1, 120),
    "vectors": (1, 256),
}  # fmt: skip
NOTHING = Audio(np.zeros(0, dtype=np.float32), RATE)


class SpeechCTC(TrainableSpeechEncoder):
    """A sound as a list of vectors.

    | `compress` | vectors |
    |---|---|
    | `ctc` | of each run of frames with one label, their mean; frames that are blank with p > 0.95 are dropped |
    | `cif` | what integrate-and-fire makes: about one a character |
    | `none` | every frame, 25 a second |

    There is always at least one (silence). A `mm.ctc.Spelling` is encoded too: as the mean vectors of its characters.

    Args:
        compress: see above; empty = as saved, or else `ctc`.
        mels, width, layers, heads, kernel: of the encoder (`mm.speech_encoder`).
        seconds: the longest sound.
        vectors: most vectors of one sound; one that has more is refused.
        pretrained: a directory that `save` wrote. What it says replaces every other argument but `compress`.

    Raises:
        ValueError: sizes out of range, or a saved encoder that is missing, damaged or foreign.
    """

    decodes = False

    def __init__(
        self,
        compress: Literal["", "ctc", "cif", "none"] = "",
        mels: int = 80,
        width: int = 144,
        layers: int = 4,
        heads: int = 4,
        kernel: int = 15,
        seconds: int = 30,
        vectors: int = 256,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = dict(
            compress=compress or "ctc",
            mels=mels,
            width=width,
            layers=layers,
            heads=heads,
            kernel=kernel,
            seconds=seconds,
            vectors=vectors,
        )
        _check(config)
        folder = None if pretrained is None else saved.find(pretrained, "speech encoder", FORMAT)
        if folder is not None:
            config = _read(folder, config)
        self.config = {**config, "compress": compress or config["compress"]}
        with contextlib.nullcontext() if folder is None else saved.building(folder):
            self.encoder = CTCEncoder(*(config[name] for name in ("mels", "width", "layers", "heads", "kernel")))
            self.means = LabelMeans(config["width"])
        self.weights_changed()
        if folder is not None:
            self.load_state_dict(saved.read_weights(folder, self.state_dict()))
            self.eval()
            saved.check_whole(folder, self._print(config), config, self.state_dict())

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="continuous",
            dim=self.config["width"],
            max_grid=(self.config["vectors"],),
            spatial=False,
            sample_rate=RATE,
            frame_rate=FRAME_RATE,  # at the most, where they are compressed
            fingerprint=self.fingerprint,
        )

    @torch.no_grad()
    def encode(self, raw: Audio | Spelling) -> Encoded:
        """Vectors of a sound, or those that stand for a text. Raises `ValueError` for what is neither, or too long."""
        if isinstance(raw, Spelling):
            vectors = self.means.prompt(raw)
        else:
            features = self.features(raw)
            with self._still():
                frames, _, logits, alpha = self.encoder.read([features])
            match self.config["compress"]:
                case "ctc":
                    vectors, _ = compress(frames[0], logits[0])
                case "cif":
                    vectors = fire(frames[0], alpha[0])
                case _:
                    vectors = frames[0]
        if len(vectors) > self.config["vectors"]:
            what = (
                f"a text of {len(vectors)} characters" if isinstance(raw, Spelling) else f"{raw.seconds:.1f} s of sound"
            )
            raise ValueError(
                f"got {what}, which makes {len(vectors)} vectors; expected up to {self.config['vectors']}: cut it into parts"
            )
        return Encoded(grid=(len(vectors),), latents=vectors.float().cpu())

    def decode(self, encoded: Encoded) -> Decoded:
        """No sound: the vectors are made to be read."""
        return Decoded(value=NOTHING, valid=False, reason="this tokenizer reads speech and can't make any")

    # ---- beyond it ---------------------------------------------------------------------------------------------------

    def features(self, audio: Any) -> Float[Tensor, "F M"]:
        """Log-mel spectrum of a sound of any rate, on the encoder's device. Raises `ValueError` for what is no sound, empty, or
        too long."""
        if isinstance(audio, Audio) and audio.seconds > self.config["seconds"]:
            raise ValueError(
                f"got {audio.seconds:.1f} s of sound, expected up to {self.config['seconds']} s: cut it into parts"
            )
        weight = self.encoder.labels.weight
        return self.encoder.features(torch.tensor(given_samples(audio, RATE), device=weight.device)).to(weight.dtype)

    @torch.no_grad()
    def transcribe(self, audio: Audio) -> str:
        """What CTC hears, without a language model: the likeliest label of each frame. Raises `ValueError` as `encode`."""
        features = self.features(audio)
        with self._still():
            return unspell(greedy(self.encoder.read([features])[2][0]))

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        """The encoder without dropout, also while it is trained."""
        training = self.encoder.training
        self.encoder.eval()
        try:
            yield
        finally:
            self.encoder.train(training)

    # ---- identity, saving, loading -----------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Says what a vector means: a hash of settings and weights. Kept until the weights change."""
        if self._fingerprint is None:
            self._fingerprint = self._print(self.config)
        return self._fingerprint

    def _print(self, config: dict[str, Any]) -> str:
        return f"speech_ctc-{saved.digest(config, self.state_dict())}"

    def save(self, path: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into the folder `path`, both or neither."""
        self.weights_changed()
        with safe_io.atomic_folder(path, last=saved.CONFIG) as folder:
            saved.write(folder, FORMAT, self.config, self.state_dict(), self.fingerprint)

    @classmethod
    def from_directory(cls, path: str | Path) -> SpeechCTC:
        """A saved encoder, in evaluation mode.

        Raises:
            ValueError: files missing, damaged, of other shapes, or not what was saved.
        """
        return cls(pretrained=str(path))

    @classmethod
    def tiny(cls) -> SpeechCTC:
        """A small random one, for tests."""
        made = cls(mels=16, width=8, layers=1, heads=2, kernel=3, seconds=4, vectors=100)
        made.means.fit(torch.randn(60, 8), torch.arange(60) % len(made.means.seen))
        return made.eval()

    @classmethod
    def examples(cls) -> list[Audio]:
        """Tones, silence, and next to nothing."""
        time: Samples = (np.arange(RATE) / RATE).astype(np.float32)
        sweep: Samples = (0.5 * np.sin(2 * np.pi * (200 + 900 * time) * time)).astype(np.float32)
        tone: Samples = np.sin(2 * np.pi * 440 * time[: RATE // 3]).astype(np.float32)
        return [
            Audio(sweep, RATE),
            Audio(tone[::2], RATE // 2),
            Audio(np.zeros(RATE // 2, dtype=np.float32), RATE),
            Audio(time[:1], RATE),
        ]


def _check(c: dict[str, Any]) -> None:
    """Raises `ValueError` for settings out of range or that do not fit each other."""
    if c["compress"] not in COMPRESSIONS:
        raise ValueError(f"compress must be one of {', '.join(COMPRESSIONS)}, got {c['compress']!r:.60}")
    for name, (least, most) in BOUNDS.items():
        saved.whole_number(name, c[name], least, most)
    if c["width"] % c["heads"]:
        raise ValueError(f"width must be a multiple of heads, got {c['width']} and {c['heads']}")
    if not c["kernel"] % 2:
        raise ValueError(f"kernel must be odd, so that it has a middle, got {c['kernel']}")


def _read(folder: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """Settings of a folder that `save` filled. Raises `ValueError`."""
    config = saved.read(folder, FORMAT, defaults, WHAT)
    try:
        _check(config)
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} is damaged: {error}") from error
    return config
