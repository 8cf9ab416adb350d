"""What tokenizers share that turn clips into the bytes of files: what they take for a clip, and the clip that any ids become."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mm import saved
from mm.byte_files import FileTokenizer
from mm.interfaces import Decoded, Encoded, Spec
from mm.latent_videos import Clip, check_clip, given_clip
from mm.video import Video
from mm.video_encoding import Frames


class ReadClip(NamedTuple):
    """Frames of the declared number and size, what state the file is in ("strict" if nothing is wrong with it) and why."""

    frames: Frames
    status: str
    reason: str


class ClipFiles(FileTokenizer):
    """Clips of `frames` frames of one size. A clip of fewer is the beginning of a file: what a model can go on from."""

    # ---- what a format has to say ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def written(self, frames: Frames) -> bytes:
        """The bytes of up to so many frames, uint8 [T, H, W, 3] of the right size."""

    @abc.abstractmethod
    def read(self, data: bytes) -> ReadClip:
        """What is read of any bytes."""

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        return self.spec_of(fps=float(self.config["fps"]))

    def file(self, raw: Clip) -> bytes:
        """The bytes of a clip at the tokenizer's rate, scaled to cover the size of its frames, and cropped in the middle."""
        clip = given_clip(raw, self.config["fps"], self.config["frames"])
        return self.written(np.stack(list(self._fitted(clip.frames))))

    def _fitted(self, frames: Frames) -> Iterator[Frames]:
        height, width = self.config["size"]
        for frame in frames:
            if frame.shape[:2] != (height, width):
                image = Image.fromarray(np.ascontiguousarray(frame))
                frame = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
            yield frame

    def decode(self, encoded: Encoded) -> Decoded:
        """A clip of all frames. Where nothing of one could be read the one before stays, or grey; `reason` begins with the state
        of the file."""
        data, odd = self.bytes_of(encoded)
        frames, status, reason = self.read(data)
        return self.judged(Video(frames, self.config["fps"]), status, odd, reason)

    @classmethod
    def some(cls, size: Sequence[int], frames: int, fps: float, count: int = 2) -> list[Video]:
        """Clips of several sizes and rates that last as long as these frames, for tests."""
        rng = np.random.default_rng(0)
        out = []
        for n in range(count):
            height, width = (side + 7 * (n // 2) for side in size)
            small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
            still = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
            moved = [np.roll(still, 2 * t // (1 + n % 2), axis=1) for t in range(frames * (1 + n % 2))]
            out.append(Video(np.stack(moved), fps * (1 + n % 2)))
        return out


def check_settings(config: dict[str, Any], grammars: Sequence[str]) -> None:
    """Raises `ValueError` for settings of a clip that are none."""
    saved.whole_numbers("size", config["size"])
    check_clip(config)
    if config["grammar"] not in grammars:
        raise ValueError(f"grammar must be one of {', '.join(grammars)}, got {config['grammar']!r:.20}")
