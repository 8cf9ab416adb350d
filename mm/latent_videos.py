"""What tokenizers share that turn clips into grids of tokens and back: what they take for a clip, and, for those of vectors, what
a grid is beyond `mm.latent_grids`, and decoding step by step as a clip is made.

Letters in shapes: B clips, T frames, S steps in time, H and W rows and columns of pixels, h and w of the grid, C channels of a
latent, N = S · h · w tokens of one clip.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mm import pictures, saved
from mm.interfaces import Spec
from mm.latent_grids import BATCH_PIXELS, MAX_AXIS, LatentGrids
from mm.latents import LatentNormalizer
from mm.video import MAX_FPS, MIN_FPS, Video, resample_frames, square
from mm.video_autoencoder import Past, steps_of, to_frames, to_steps

STRIDES = (1, 2, 4)
Clip = Video | np.ndarray[Any, np.dtype[np.uint8]] | Image.Image
"""A video, its frames (uint8 [T, H, W, 3]) at the tokenizer's rate, or a picture: a clip of one frame."""


def given_clip(raw: Clip, fps: float, most: int) -> Video:
    """What a tokenizer of clips is given, at its rate. Raises `ValueError` for what is none, or has more than `most` frames."""
    if isinstance(raw, Image.Image):
        raw = np.asarray(pictures.to_rgb(raw))[None]
    if isinstance(raw, np.ndarray):
        raw = Video(raw, fps)
    if not isinstance(raw, Video):
        raise ValueError(
            f"expected a mm.video.Video, its frames (uint8 [T, H, W, 3]) or a picture, got {type(raw).__name__}: open a file "
            "with mm.video.load_video"
        )
    if len(raw) * fps / raw.fps > most + 1:  # told before a slow one is made long
        raise ValueError(
            f"expected at most {most} frames, got {raw.seconds * fps:.0f} at {fps:g} a second: cut the clip"
        )
    video = resample_frames(raw, fps)
    if len(video) > most:
        raise ValueError(f"expected at most {most} frames, got {len(video)} at {fps:g} a second: cut the clip")
    return video


def check_clip(c: dict[str, Any]) -> None:
    """Raises `ValueError` for `frames` and `fps` that are none."""
    saved.whole_number("frames", c["frames"], 1, 4 * MAX_AXIS)
    saved.number("fps", c["fps"])
    if not MIN_FPS <= c["fps"] <= MAX_FPS:
        raise ValueError(f"fps must be {MIN_FPS:g} to {MAX_FPS:g}, got {c['fps']}")


class LatentVideos(LatentGrids):
    """Clips ↔ vectors, by causal networks of steps (`mm.video_autoencoder`). The first frame is a step of its own, each further
    step stands for `stride` frames: S steps are 1 + (S − 1) · stride frames, and the last frame is repeated to fill the last
    step. A subclass's constructor calls `fit_to` once it knows its sizes.

    `encode` takes a `Clip` of up to `frames` frames at `fps` (other rates are resampled), scaled to cover the square of `size`
    and cropped, or a float tensor (T, 3, H, W) in [−1, 1] with sides that `downsample` divides, no larger than that square.
    `decode` takes any number of steps.
    """

    def fit_to(
        self,
        size: int,
        downsample: int,
        channels: int,
        normalizer: LatentNormalizer,
        frames: int,
        stride: int,
        fps: float,
    ) -> None:
        """Side of the square of frames, pixels a latent along a side, C, most frames of a clip, frames a step and a second."""
        if stride not in STRIDES or isinstance(stride, bool):
            raise ValueError(f"frame_stride must be one of {', '.join(map(str, STRIDES))}, got {stride!r:.60}")
        check_clip({"frames": frames, "fps": fps})
        if steps_of(frames, stride) > MAX_AXIS:
            raise ValueError(
                f"frames must be at most {1 + (MAX_AXIS - 1) * stride} with frame_stride {stride}, got {frames}"
            )
        self.size, self.downsample, self.channels = size, downsample, channels
        self.frames, self.stride, self.fps = frames, stride, float(fps)
        self.normalizer = normalizer

    # --- what a tokenizer file implements -----------------------------------------------------------------------------

    @abc.abstractmethod
    def latents_of(self, steps: Float[Tensor, "B S FC H W"], past: Past) -> Float[Tensor, "B S C h w"]:
        """Of steps that follow on `past`; the mean, where there is a distribution."""

    @abc.abstractmethod
    def steps_from(self, z: Float[Tensor, "B S C h w"], past: Past) -> Float[Tensor, "B S FC H W"]:
        """The way back."""

    # --- what one item is ---------------------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="continuous",
            dim=self.width,
            max_grid=self.largest,
            fps=self.fps,
            frame_stride=self.stride,
            fingerprint=self.fingerprint,
        )

    @property
    def largest(self) -> tuple[int, ...]:
        """Steps, rows and columns of the grid of the longest clip."""
        side = self.size // self.downsample
        return steps_of(self.frames, self.stride), side, side

    @property
    def width(self) -> int:
        return self.channels

    def latents(self, x: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B S C h w"]:
        """Of clips in [−1, 1] whose sides `downsample` divides, piece by piece where they are long."""
        return _in_pieces(self.latents_of, to_steps(x, self.stride), self._piece)

    def pixels(self, z: Float[Tensor, "B S C h w"]) -> Float[Tensor, "B T 3 H W"]:
        """Clips, nominally in [−1, 1], piece by piece where they are long."""
        return to_frames(_in_pieces(self.steps_from, z, self._piece), self.stride)

    def streaming(self) -> VideoStream:
        """Decodes a clip step by step."""
        return VideoStream(self)

    def rows(self, z: Float[Tensor, "B S C h w"]) -> tuple[tuple[int, ...], Float[Tensor, "B N C"]]:
        batch, steps, channels, rows, columns = z.shape
        return (steps, rows, columns), z.permute(0, 1, 3, 4, 2).reshape(batch, -1, channels)

    def map(self, rows: Float[Tensor, "B N C"], grid: tuple[int, ...]) -> Float[Tensor, "B S C h w"]:
        return rows.unflatten(1, grid).permute(0, 1, 4, 2, 3)

    def _given(self, raw: Clip | Tensor) -> Float[Tensor, "T 3 H W"]:
        if not isinstance(raw, Tensor):
            frames = square(given_clip(raw, self.fps, self.frames), self.size).frames
            return pictures.to_unit(torch.from_numpy(frames.copy()).permute(0, 3, 1, 2))
        if raw.ndim != 4 or raw.shape[1] != 3 or not len(raw) or not raw.is_floating_point():
            raise ValueError(
                f"expected a float tensor (T, 3, H, W) in [-1, 1], got {raw.dtype} {tuple(raw.shape)}: convert it"
            )
        sides = tuple(raw.shape[2:])
        if min(sides) < 1 or max(sides) > self.size or any(side % self.downsample for side in sides):
            raise ValueError(
                f"expected sides that are multiples of {self.downsample} up to {self.size}, got {sides}: resize or pad the "
                "frames"
            )
        if len(raw) > self.frames:
            raise ValueError(f"expected at most {self.frames} frames, got {len(raw)}: cut the clip")
        return raw.float()

    def _value(self, pixels: Float[Tensor, "T 3 H W"]) -> Video:
        return Video(_bytes(pixels), self.fps)

    def _expected(self, grid: tuple[int, ...]) -> str:
        _, rows, columns = self.largest
        if len(grid) == 3 and grid[0] >= 1 and 1 <= grid[1] <= rows and 1 <= grid[2] <= columns:
            return ""
        return f"steps in time, and rows and columns within {rows}×{columns}"

    def _at_once(self, shape: tuple[int, ...]) -> int:
        return (
            max(1, self._piece // steps_of(shape[0], self.stride))
            if len(shape) == 4
            else max(1, self._piece // shape[0])
        )

    @property
    def _piece(self) -> int:
        """Steps that go through the networks at once."""
        return max(1, BATCH_PIXELS // (self.stride * self.size**2))


class VideoStream:
    """The frames of one clip, as its vectors come: whatever the pieces, the same frames as of the whole."""

    def __init__(self, tokenizer: LatentVideos) -> None:
        self.tokenizer = tokenizer
        self._past: Past = {}
        self._begun = False

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "M C"]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The frames, uint8 [T, H, W, 3], of the next steps, from M = steps · h · w vectors for whole frames. What is not a
        number is taken to be 0. Raises `ValueError` for vectors of another width, or a part of a step."""
        tokenizer = self.tokenizer
        _, rows, columns = tokenizer.largest
        if (
            latents.ndim != 2
            or latents.shape[1] != tokenizer.width
            or len(latents) % (rows * columns)
            or not len(latents)
        ):
            raise ValueError(
                f"expected vectors of width {tokenizer.width}, {rows * columns} a step, got {tuple(latents.shape)}: give whole "
                "steps"
            )
        held = latents.detach().to(tokenizer._like())
        held = torch.where(held.isfinite(), held, 0.0)[None]
        if tokenizer.normalizer.ready:
            held = tokenizer.normalizer.inverse(held)
        z = tokenizer.map(held, (len(latents) // (rows * columns), rows, columns))
        made = _in_pieces(tokenizer.steps_from, z, tokenizer._piece, self._past)
        frames = to_frames(made, tokenizer.stride, begins=not self._begun)
        self._begun = True
        return _bytes(frames[0].float().cpu())


def _in_pieces(
    network: Callable[[Tensor, Past], Tensor], x: Float[Tensor, "B S ..."], piece: int, past: Past | None = None
) -> Tensor:
    """A causal network on so many steps at a time."""
    past = {} if past is None else past
    return torch.cat([network(part, past) for part in x.split(max(1, piece // len(x)), 1)], 1)


def _bytes(pixels: Float[Tensor, "T 3 H W"]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.ascontiguousarray(pictures.from_unit(pixels).permute(0, 2, 3, 1).numpy())
