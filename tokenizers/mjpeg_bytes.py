"""Clips as the bytes of JPEG files, one for each frame, read with a byte BPE: what `avc_bytes` does by H.264, without FFmpeg, and
with an automaton that holds a model to whole files, to the last bit. Frames don't build on each other, so it takes more bytes.

`mm fit -c configs/tokenizers/mjpeg_bytes.yaml` learns the merges. Tables and the versions of Pillow and libjpeg are saved with
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from mm import jpeg_clips, saved
from mm.byte_clips import ClipFiles, ReadClip, check_settings
from mm.jpeg_clips import ClipMachine
from mm.jpeg_files import JpegFiles
from mm.jpeg_machine import JpegMachine
from mm.jpeg_markers import MarkerMachine
from mm.jpeg_tables import MARKERS, Tables
from mm.video import Video
from mm.video_encoding import Frames

GRAMMARS = ("strict", "markers", "none")
MAX_FRAMES = 256


class MjpegBytes(JpegFiles, ClipFiles):
    """The bytes of JPEG files of one size, as many as a clip has frames, and an id that ends them.

    Args:
        size: height and width that frames are made to have, in pixels.
        frames: of a clip.
        fps: frames a second; clips of another rate are resampled.
        quality: of the files, 1 to 95.
        subsampling: 4:2:0, 4:2:2 or 4:4:4.
        restart: blocks (MCUs) between restart markers; 0: none.
        vocab: ids of the BPE, the 256 bytes among them.
        grammar: what the automaton holds a model to: `strict`, files that are right to the last bit; `markers`, no marker where
            none may stand; `none`.
        pretrained: a directory that `save` wrote. What it says replaces every other argument.

    Raises:
        ValueError: settings out of range, or a saved tokenizer that is missing, damaged or foreign.
    """

    form: ClassVar[str] = "mm.tokenizers.mjpeg_bytes"
    what: ClassVar[str] = "a tokenizer of clips as JPEG files"
    apart: ClassVar[Sequence[bytes]] = MARKERS

    def __init__(
        self,
        size: Sequence[int] = (32, 32),
        frames: int = 8,
        fps: float = 8.0,
        quality: int = 25,
        subsampling: str = "4:2:0",
        restart: int = 1,
        vocab: int = 320,
        grammar: Literal["strict", "markers", "none"] = "strict",
        pretrained: str | None = None,
    ) -> None:
        config = dict(
            size=saved.as_list(size),
            frames=frames,
            fps=saved.as_float(fps),
            quality=quality,
            subsampling=subsampling,
            restart=restart,
            vocab=vocab,
            grammar=grammar,
        )
        self._made(pretrained, config)

    def _build(self, config: dict[str, Any], facts: Mapping[str, str]) -> None:
        check_settings(config, GRAMMARS)
        saved.whole_number("frames", config["frames"], 1, MAX_FRAMES)
        saved.whole_number("restart", config["restart"])
        self.reader = self._reader(config, facts)
        frame = self.reader.frame
        self.strict = ClipMachine(JpegMachine(frame, Tables.read(self.reader.blob)), config["frames"])

    def written(self, frames: Frames) -> bytes:
        self._check_tables("clips")
        return jpeg_clips.written(frames, self.reader, self.config["quality"])

    def read(self, data: bytes) -> ReadClip:
        return jpeg_clips.read(data, self.reader, self.strict)

    def machine(self) -> ClipMachine | None:
        match self.config["grammar"]:
            case "strict":
                return self.strict
            case "markers":
                return ClipMachine(MarkerMachine(self.reader.frame), self.config["frames"])
        return None

    @classmethod
    def tiny(cls) -> MjpegBytes:
        """A small one, for tests."""
        tokenizer = cls(size=(16, 24), frames=3, vocab=300)
        tokenizer.fit(map(tokenizer.file, cls.some((16, 24), 3, 8.0, 4)))
        return tokenizer

    @classmethod
    def examples(cls) -> list[Video]:
        """Clips of several sizes and rates."""
        return cls.some((16, 24), 3, 8.0, 4)
