"""Text → video; also video that goes on from a picture or from a clip. Whole, or frame by frame while it is generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import NoneType
from typing import Unpack

import numpy as np
import torch

from mm.generation import Event, Request
from mm.interfaces import Encoded, Sampling
from mm.layout import Segment
from mm.media import load_image
from mm.pipelines.base import (
    Callback,
    Picture,
    Pipeline,
    SamplingOptions,
    check_count,
    choose_seed,
    several,
)
from mm.pipelines.media import most_frames
from mm.pipelines.outputs import VideoOutput
from mm.pipelines.playing import Reel, events
from mm.video import Frames, Video, VideoSource

Grid = tuple[int, ...]


class TextToVideoPipeline(Pipeline):
    """`pipeline("a handwritten seven moves right", seed=0).videos`, or step by step: `encode`, `given`, `generate`, `decode`.

    Letters in shapes: T frames, H rows and W columns of pixels.
    """

    direction = ("text", "video")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str | None] | None,
        *,
        num_videos: int = 1,
        num_frames: int | None = None,
        image: Picture | None = None,
        video: VideoSource | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        constrained: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> VideoOutput:
        """Clips for one prompt or several.

        Args:
            prompt: what the clips show; None: anything.
            num_videos: clips a prompt.
            num_frames: frames of a clip, given ones counted; by default as many as the model was trained on. More are made
                where its order has a window (`mm.orders.blocks`), up to 100,000 frames in one call.
            image: the first frame of all clips.
            video: a clip that all go on from, in the place of `image`: at the model's frames a second and size, without its
                first few frames where the model's steps in time don't begin with it. `ending` cuts one that is too long.
            seed: the n-th clip of a prompt depends on the seed alone, not on the other prompts.
            generator: where the seed is drawn from, if none is given.
            callback: called with `mm.generation.Event` after every step of every row.
            constrained: a model that writes clips as files can write nothing but files; False: what it writes may be broken.
            sampling: fields of `mm.interfaces.Sampling`.

        What is given stands at the beginning of the answer as the tokenizer reproduces it, so that no seam is seen where the
        generated frames begin.

        Raises:
            ValueError: an empty prompt, one that the context can't hold, a picture or clip that can't be loaded, or numbers of
                frames that the model can't make.
        """
        seed = choose_seed(seed, generator)
        prompts = several(prompt, (str, NoneType), "a prompt; give a string, None")
        num_videos = check_count("num_videos", num_videos, len(prompts))
        given = self.given(image=image, video=video)
        grid = self.grid(num_frames, given, len(prompts) * num_videos)
        tokens = self.generate(
            self.encode(prompts),
            num_videos=num_videos,
            grid=grid,
            given=given,
            sampling=self.sampling(self.video, sampling),
            seed=seed,
            callback=callback,
            constrained=constrained,
        )
        decoded = self.decoded(self.video, tokens)
        return VideoOutput(
            videos=[self._cut(clip.value, num_frames) for clip in decoded],
            fps=self.tokenizer(self.video).spec.fps,
            captions=[text or "" for text in prompts for _ in range(num_videos)],
            tokens=tokens,
            valid=[clip.valid for clip in decoded],
            reasons=[clip.reason for clip in decoded],
            seed=seed,
        )

    # --- the steps --------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str | None]) -> list[list[Segment]]:
        """Each prompt as the beginning of a document; None is the null condition."""
        return self.encode_prompts(prompts, "video")

    def given(self, *, image: Picture | None = None, video: VideoSource | None = None) -> Encoded | None:
        """A picture, or the end of a clip, as the first elements of an item: whole steps in time, or a file up to its end."""
        tokenizer, spec = self.tokenizer(self.video), self.tokenizer(self.video).spec
        if not tokenizer.decodes:
            raise ValueError(f"this model reads {self.video!r} and can't make it; use a model that makes video")
        if image is None and video is None:
            return None
        if image is not None and video is not None:
            raise ValueError("got both image and video; give the picture to begin with, or the clip to go on from")
        if not spec.is_free and (len(spec.max_grid) != 3 or not spec.spatial):
            raise ValueError(
                f"the tokens of {self.video!r} don't stand for places in a clip, so that none can be given; leave image and "
                "video out, or use a model whose tokens lie on a grid"
            )
        if image is not None:
            clip = Video(np.asarray(load_image(image))[None], spec.fps)
        else:
            assert video is not None
            clip = self.load_video(video)
        most = most_frames(spec)
        if len(clip.frames) > most:
            raise ValueError(
                f"the clip has {len(clip.frames)} frames at {spec.fps:g} a second, and the model reads up to {most}; give its end"
            )
        odd = (len(clip.frames) - 1) % spec.frame_stride  # what is nearest to the generated frames matters most
        encoded = tokenizer.encode(Video(clip.frames[odd:], clip.fps))
        if not spec.is_free:
            return encoded
        kept = encoded.content[encoded.content != spec.stop]
        return self.wrap(self.video, kept, (len(kept),))

    def ending(self, video: VideoSource, num_frames: int | None = None) -> Video:
        """A clip at the model's frames a second as `video` of a call for `num_frames`: whole, or, where the model can't read that
        much or nothing would be left to make, its end: as much as the model reads, and no more than half of what comes out."""
        spec, clip = self.tokenizer(self.video).spec, self.load_video(video)
        grid = self.grid(num_frames)
        if grid is None:
            return clip
        most, steps = int(most_frames(spec)), grid[0]
        if len(clip) <= most and (len(clip) - 1) // spec.frame_stride < steps - 1:
            return clip
        return Video(clip.frames[-min(most, 1 + (steps - 1) // 2 * spec.frame_stride) :], clip.fps)

    def grid(self, num_frames: int | None = None, given: Encoded | None = None, clips: int = 1) -> Grid | None:
        """Extents of an item of at least so many frames: steps in time, rows and columns of elements; None where the model says
        by itself how long its clips are (files)."""
        modality = self.model.modalities[self.model.vocabulary.index[self.video]]
        spec = modality.tokenizer.spec
        if num_frames is not None:
            num_frames = check_count("num_frames", num_frames, clips)
        if len(spec.max_grid) != 3:
            if num_frames is not None:
                raise ValueError("this model decides by itself how long its clips are; leave num_frames out")
            return None
        most, *area = spec.max_grid
        steps = most if num_frames is None else 1 + math.ceil((num_frames - 1) / spec.frame_stride)
        if steps > most and not getattr(modality.order, "window", 0):
            raise ValueError(
                f"num_frames is {num_frames}, and this model makes up to {most_frames(spec)}: only a blocks order with a window "
                "goes on beyond what it was trained on"
            )
        if given is not None:
            if list(given.grid[1:]) != area:
                raise ValueError(
                    f"what is given has {given.grid[1:]} elements a frame, and the model makes {tuple(area)}; scale it first"
                )
            if given.grid[0] >= steps:
                held = 1 + (given.grid[0] - 1) * spec.frame_stride
                asked = (
                    f"the {most_frames(spec)} that the model makes"
                    if num_frames is None
                    else f"num_frames={num_frames}"
                )
                raise ValueError(
                    f"{held} frames are given, which leaves nothing to make of {asked}; give fewer, or raise num_frames"
                )
        return (steps, *area)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[Segment]],
        *,
        num_videos: int = 1,
        grid: Grid | None = None,
        given: Encoded | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        callback: Callback | None = None,
        constrained: bool = True,
    ) -> list[Encoded]:
        """Tokens of `num_videos` clips for each encoded prompt. `grid`: what `grid` returned, by default that of the longest clip
        of the training; `given`: what `given` returned."""
        num_videos = check_count("num_videos", num_videos, len(prompts))
        request = self._request(grid or self.grid(given=given), given, sampling, constrained)
        requests = [request(prompt) for prompt in prompts for _ in range(num_videos)]
        return [segments[-1].content for segments in self.run(requests, seed, callback)]

    def _request(
        self, grid: Grid | None, given: Encoded | None, sampling: Sampling | None, constrained: bool = True
    ) -> Callable[[Sequence[Segment]], Request]:
        """From an encoded prompt to what is asked for."""
        name, known = self.video, None
        if given is not None:
            count = len(given) if grid is None else math.prod(grid)
            content = torch.zeros((count, *given.content.shape[1:]), dtype=given.content.dtype)
            content[: len(given)] = given.content
            known = (content, torch.arange(count) < len(given))
        sampling = sampling or self.sampling(name, {})
        return lambda prompt: Request(
            prompt=prompt,
            items=[(name, grid)],
            text=False,
            sampling=sampling,
            known=known,
            constrained=constrained,
        )

    def decode(self, tokens: Sequence[Encoded], num_frames: int | None = None) -> list[Frames]:
        """Clips as uint8 [T, H, W, 3], of `num_frames` if they have more."""
        return [self._cut(clip, num_frames) for clip in self.decode_items(self.video, tokens)]

    def _cut(self, clip: Video, num_frames: int | None) -> Frames:
        return clip.frames[:num_frames]

    # --- while it is generated ----------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | None,
        *,
        num_frames: int | None = None,
        image: Picture | None = None,
        video: VideoSource | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Frames]:
        """One clip in pieces of one frame or more, uint8 [T, H, W, 3], as soon as they are final; joined they are what a call
        gives for the same seed, up to rounding. Given frames come first. Closing the iterator ends the generation.

        An order that doesn't go along time (masked) has no final frames before its last step, and what is written as a file is
        shown when it is complete.

        Raises:
            ValueError: as a call, before anything is generated.
        """
        seed = choose_seed(seed, generator)
        if not isinstance(prompt, str | None):
            raise ValueError(
                f"got a {type(prompt).__name__} for a prompt; a stream shows one clip, give a string or None"
            )
        given = self.given(image=image, video=video)
        grid = self.grid(num_frames, given)
        request = self._request(grid, given, self.sampling(self.video, sampling))(self.encode([prompt])[0])
        reel = Reel(self.tokenizer(self.video), partial(self.wrap, self.video), grid or ())
        return self._shown(request, reel, seed, num_frames)

    def _shown(self, request: Request, reel: Reel, seed: int, num_frames: int | None) -> Iterator[Frames]:
        name = self.video
        left = math.inf if num_frames is None else num_frames

        def work(tell: Callable[[Event], None]) -> None:
            self.run([request], seed, tell)

        steps = events(work)
        try:
            for event in steps:
                if event.modality == name:
                    with torch.no_grad():
                        frames = reel.show(event.content, event.final, ended=event.done == 1.0)
                    if len(frames) and left:
                        yield frames[: None if left == math.inf else int(left)]
                    left = max(0, left - len(frames))
        finally:
            steps.close()  # type: ignore[attr-defined]


__all__ = ["TextToVideoPipeline"]
