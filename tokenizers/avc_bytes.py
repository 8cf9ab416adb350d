"""Clips as the bytes of H.264 streams, read with a byte BPE (AVC-LM, Han et al. 2024, arXiv 2408.08459, section 3.2): baseline
profile, constant steps of quantisation, no frame predicted from a later one, a slice for every macroblock, and the parameter
sets, the same for all clips, left out.

`mm fit -c configs/tokenizers/avc_bytes.yaml` learns the merges. The parameter sets and the version of FFmpeg are saved with them.
FFmpeg comes with `pip install 'mm[video]'`; `mjpeg_bytes` needs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from mm import avc, saved
from mm.avc_headers import CODE, LONG, Headers, Shape
from mm.avc_machine import AvcMachine
from mm.byte_clips import ClipFiles, ReadClip, check_settings
from mm.video import Video
from mm.video_encoding import Frames


class AvcBytes(ClipFiles):
    """The bytes of an H.264 stream of clips of one size and length, and an id that ends them.

    Args:
        size: height and width that frames are made to have, in pixels; even.
        frames: of a clip.
        fps: frames a second; clips of another rate are resampled.
        qp: step of quantisation, 1 (fine) to 51.
        vocab: ids of the BPE, the 256 bytes among them.
        grammar: what the automaton holds a model to: `units`, all slices of all frames, each with the beginning that it has to
            have (what a macroblock says is free); `none`.
        pretrained: a directory that `save` wrote. What it says replaces every other argument.

    Raises:
        ValueError: settings out of range, a saved tokenizer that is missing, damaged or foreign, or no package `av`.
    """

    form: ClassVar[str] = "mm.tokenizers.avc_bytes"
    what: ClassVar[str] = "a tokenizer of H.264 streams"
    apart: ClassVar[Sequence[bytes]] = (LONG, CODE)

    def __init__(
        self,
        size: Sequence[int] = (32, 32),
        frames: int = 8,
        fps: float = 8.0,
        qp: int = 37,
        vocab: int = 1024,
        grammar: Literal["units", "none"] = "units",
        pretrained: str | None = None,
    ) -> None:
        config = dict(
            size=saved.as_list(size), frames=frames, fps=saved.as_float(fps), qp=qp, vocab=vocab, grammar=grammar
        )
        self._made(pretrained, config)

    @staticmethod
    def _shape(config: Mapping[str, Any]) -> Shape:
        check_settings(dict(config), ("units", "none"))
        saved.whole_number("qp", config["qp"], 1, 51)
        height, width = config["size"] if len(config["size"]) == 2 else (0, 0)
        return Shape(size=(height, width), frames=config["frames"])

    def _facts(self, config: Mapping[str, Any]) -> dict[str, str]:
        av = avc.ffmpeg()
        sets = avc.sets_of(self._shape(config), config["qp"], config["fps"])
        return {"sets": sets.hex(), "av": str(av.__version__)}

    def _build(self, config: dict[str, Any], facts: Mapping[str, str]) -> None:
        avc.ffmpeg()
        sets = self.bytes_of_fact(facts, "sets", "parameter sets")
        self.headers = Headers.read(sets, self._shape(config), config["qp"])
        self.reader = avc.Reader(self.headers)

    def written(self, frames: Frames) -> bytes:
        return avc.encode(frames, self.reader, self.config["qp"], self.config["fps"])

    def read(self, data: bytes) -> ReadClip:
        return self.reader.read(data)

    def machine(self) -> AvcMachine | None:
        return self.reader.machine if self.config["grammar"] == "units" else None

    @classmethod
    def tiny(cls) -> AvcBytes:
        """A small one, for tests."""
        tokenizer = cls(size=(16, 32), frames=3, vocab=300)
        tokenizer.fit(map(tokenizer.file, cls.some((16, 32), 3, 8.0, 4)))
        return tokenizer

    @classmethod
    def examples(cls) -> list[Video]:
        """Clips of several sizes and rates."""
        return cls.some((16, 32), 3, 8.0, 4)
