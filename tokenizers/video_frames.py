"""Clips frame by frame: a tokenizer of pictures, applied to each frame.

T frames become T grids of the picture tokenizer one after another, ids, sub-codes or vectors as it gives them. Nothing is learned
here; it is saved with the picture tokenizer in a folder of its own.

Letters in shapes: T frames, h and w rows and columns of a frame's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mm import nested, saved
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec
from mm.latent_videos import Clip, check_clip, given_clip
from mm.video import Video

FORM = "mm.tokenizers.video_frames"
INNER = "pictures"
"""Folder of the picture tokenizer among the saved files."""
MAX_FRAMES = 256
"""The vocabulary's size controls can state no more."""


class VideoFrames(ModalityTokenizer, nn.Module):
    """Frames as pictures.

    Args:
        pictures: a tokenizer of pictures with a grid, such as `ImageVQ`.
        frames: most frames of a clip that is encoded.
        fps: frames a second; clips of another rate are resampled.

    Raises:
        ValueError: another kind of tokenizer, or numbers out of range.
    """

    def __init__(self, pictures: ModalityTokenizer, frames: int = 16, fps: float = 8.0) -> None:
        super().__init__()
        spec = pictures.spec
        if len(spec.max_grid) != 2 or spec.fps or spec.sample_rate or not pictures.decodes:
            raise ValueError(
                f"{type(pictures).__name__} is no tokenizer of pictures with a grid that decodes; give one such as "
                "mm.tokenizers.image_vq"
            )
        check_clip({"frames": frames, "fps": fps})
        if frames > MAX_FRAMES:
            raise ValueError(f"frames must be at most {MAX_FRAMES}, got {frames}")
        self.pictures, self.frames, self.fps = pictures, frames, float(fps)

    @property
    def spec(self) -> Spec:
        inner = self.pictures.spec
        settings = {"frames": self.frames, "fps": self.fps, "pictures": inner.fingerprint}
        return Spec(
            kind=inner.kind,
            vocab_size=inner.vocab_size,
            num_codes=inner.num_codes,
            dim=inner.dim,
            max_grid=(self.frames, *inner.max_grid),
            spatial=inner.spatial,
            fps=self.fps,
            fingerprint=f"video_frames-{saved.digest(settings, {})}",
        )

    @property
    def origin(self) -> str:
        """Fingerprint of the picture tokenizer, whose ids these are (`mm.adopt`)."""
        return self.pictures.spec.fingerprint

    def embedding(self, width: int) -> nn.Module:
        return self.pictures.embedding(width)

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    def encode(self, raw: Clip) -> Encoded:
        """Tokens of a clip; every frame is fitted as the picture tokenizer does it."""
        return self.encode_batch([raw])[0]

    def encode_batch(self, raws: Sequence[Clip]) -> list[Encoded]:
        clips = [given_clip(raw, self.fps, self.frames) for raw in raws]
        made = iter(self.pictures.encode_batch([_picture(frame) for clip in clips for frame in clip.frames]))
        return [_joined([next(made) for _ in range(len(clip))]) for clip in clips]

    def decode(self, encoded: Encoded) -> Decoded:
        """A clip of as many frames as the grid has steps, whatever is decoded; what the picture tokenizer has to repair in a
        frame is repaired, and a grid that isn't one of clips replaced, with `valid` off."""
        return self.decode_batch([encoded])[0]

    def decode_batch(self, items: Sequence[Encoded]) -> list[Decoded]:
        repaired = [self._repaired(item) for item in items]
        made = iter(self.pictures.decode_batch([frame for frames, _ in repaired for frame in frames]))
        out = []
        for frames, problem in repaired:
            decoded = [next(made) for _ in frames]
            wrong = [i for i, one in enumerate(decoded) if not one.valid]
            reason = f"frame {wrong[0]}: {decoded[wrong[0]].reason}" if wrong else ""
            if len(wrong) > 1:
                reason += f" (and {len(wrong) - 1} more frames)"
            reason = "; ".join(filter(None, (problem, reason)))
            value = Video(np.stack([np.asarray(one.value) for one in decoded]), self.fps)
            out.append(Decoded(value=value, valid=not reason, reason=reason))
        return out

    def streaming(self) -> FrameStream:
        """Decodes a clip frame by frame."""
        return FrameStream(self)

    def _repaired(self, item: Encoded) -> tuple[list[Encoded], str]:
        """One item a frame that the picture tokenizer decodes, of one size, and what had to be repaired."""
        most = self.pictures.spec.max_grid
        grid = tuple(item.grid)
        if len(grid) == 3 and grid[0] >= 1 and all(1 <= n <= m for n, m in zip(grid[1:], most, strict=True)):
            return _parts(item, (grid[1], grid[2])), ""
        problem = f"{len(item)} elements on a grid of {grid}, expected frames, and rows and columns within {most[0]}×{most[1]}"
        wanted, content = most[0] * most[1], item.content[: most[0] * most[1]]
        missing = content.new_zeros(wanted - len(content), *content.shape[1:])
        return [_with(item, most, torch.cat([content, missing]))], problem

    # ---- saving, loading ---------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write `config.json` and the picture tokenizer's folder into the folder `path`, both or neither."""
        others = {"frames": self.frames, "fps": self.fps}
        nested.save_around(path, FORM, self.spec.fingerprint, INNER, self.pictures, others)

    @classmethod
    def from_directory(cls, path: str | Path) -> VideoFrames:
        """A saved tokenizer, in evaluation mode. Raises `ValueError` for files that are missing, damaged, or not what was
        saved."""
        inside = "frames inside frames; expected a tokenizer of pictures"
        found = nested.Around(Path(path), FORM, INNER, VideoFrames, {"frames", "fps"}, "frames as pictures", inside)
        check_clip(found.config)
        made = cls(found.load(), found.config["frames"], found.config["fps"]).eval()
        found.check(made.spec.fingerprint)
        return made

    @classmethod
    def tiny(cls) -> VideoFrames:
        """Around a small random tokenizer of pictures, for tests."""
        return cls(nested.find_class("mm.tokenizers.image_vq.ImageVQ").tiny(), frames=6).eval()

    @classmethod
    def examples(cls) -> list[Video]:
        """Clips of several lengths, sizes and rates."""
        rng = np.random.default_rng(0)
        return [
            Video(rng.integers(0, 256, (t, h, w, 3), dtype=np.uint8), fps)
            for t, h, w, fps in ((5, 16, 16, 8.0), (1, 7, 20, 8.0), (3, 24, 18, 4.0))
        ]


class FrameStream:
    """The frames of one clip, as its elements come."""

    def __init__(self, tokenizer: VideoFrames) -> None:
        self.tokenizer = tokenizer

    def decode(self, content: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The frames, uint8 [T, H, W, 3], of the next elements: ids, sub-codes or vectors of whole frames. Raises `ValueError`
        for a part of a frame."""
        spec = self.tokenizer.spec
        _, rows, columns = spec.max_grid
        if not len(content) or len(content) % (rows * columns):
            raise ValueError(f"expected {rows * columns} elements a frame, got {len(content)}: give whole frames")
        name = {"discrete": "ids", "codes": "codes", "continuous": "latents"}[spec.kind]
        item = Encoded(grid=(len(content) // (rows * columns), rows, columns), **{name: content})  # type: ignore[arg-type]
        frames: np.ndarray[Any, np.dtype[np.uint8]] = self.tokenizer.decode(item).value.frames
        return frames


def _picture(frame: np.ndarray[Any, np.dtype[np.uint8]]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(frame))


def _with(item: Encoded, grid: tuple[int, ...], content: Tensor) -> Encoded:
    """Content of the kind that an item has, on a grid."""
    return Encoded(
        grid=grid,
        ids=content if item.ids is not None else None,
        codes=content if item.codes is not None else None,
        latents=content if item.latents is not None else None,
    )


def _parts(item: Encoded, grid: tuple[int, int]) -> list[Encoded]:
    return [_with(item, grid, part) for part in item.content.split(grid[0] * grid[1])]


def _joined(frames: list[Encoded]) -> Encoded:
    return _with(frames[0], (len(frames), *frames[0].grid), torch.cat([one.content for one in frames]))
