"""Pictures and clips → text: captions, or any text that a model was trained to write after one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image

from mm.generation import Request
from mm.interfaces import Encoded, Sampling
from mm.layout import Segment
from mm.pipelines.abilities import check_learned
from mm.pipelines.base import Callback, Picture, Pipeline, SamplingOptions, check_count, choose_seed, several
from mm.pipelines.outputs import TextOutput
from mm.video import Frames, Video

Seen = Picture | Video | Frames


class ImageToTextPipeline(Pipeline):
    """`pipeline("apple.png").texts` or `pipeline("seven.mp4").texts`, or step by step: `encode`, `generate`, `decode`."""

    direction = ("image", "text")

    @torch.no_grad()
    def __call__(
        self,
        image: Seen | Sequence[Seen],
        *,
        prompt: str = "",
        num_texts: int = 1,
        max_tokens: int = 128,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> TextOutput:
        """Texts for one picture or clip or several. By default the likeliest token each time (temperature 0).

        Args:
            image: paths, bytes of files, open binary files, PIL pictures, `mm.Video`, or arrays: of a picture
                (`mm.media.array_pixels`), or of frames ([T, H, W, 3]). A model of both takes files for clips if their ending
                says so, and folders of pictures.
            prompt: how the text begins; it is not repeated in the output.
            num_texts: texts for each; more than one need a temperature above 0.
            max_tokens: the longest text, in tokens.
            seed, generator, callback, sampling: as for `TextToImagePipeline`.

        Raises:
            ValueError: a picture or clip that can't be loaded, that the model has no modality for, or of which it learned to
                write nothing, or settings that make no sense for text.
        """
        seed = choose_seed(seed, generator)
        one = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, Video, np.ndarray)
        images = several(
            image, one, "a picture or clip; give a path, bytes, a binary file, a PIL picture, mm.Video, an array"
        )
        for clip in {self.is_clip(image) for image in images}:
            check_learned(self, "video" if clip else "picture", "text")
        num_texts = check_count("num_texts", num_texts, len(images))
        chosen = self.sampling(self.text, sampling, Sampling(temperature=0.0))
        if num_texts > 1 and chosen.temperature == 0:
            raise ValueError(f"num_texts={num_texts} at temperature 0 gives equal texts; set temperature above 0")
        if chosen.guidance != 1:
            raise ValueError(f"text is generated without guidance; leave guidance out, got {chosen.guidance}")
        tokens = self.generate(
            self.encode(images, prompt),
            num_texts=num_texts,
            max_tokens=max_tokens,
            sampling=chosen,
            seed=seed,
            callback=callback,
        )
        return TextOutput(self.decode(tokens), tokens, seed)

    def encode(self, images: Sequence[Seen], prompt: str = "") -> list[list[Segment]]:
        """Each picture or clip as the beginning of a document, and the text that `prompt` begins."""
        beginning = [self.encode_text(prompt)] if prompt else []
        moves = [self.is_clip(image) for image in images]
        both: tuple[list[Any], list[Any]] = ([], [])
        for image, clip in zip(images, moves, strict=True):
            both[clip].append(image)
        stills, clips = iter(self.encode_pictures(both[0])), iter(self.encode_videos(both[1]))
        return [[next(clips if clip else stills), *beginning] for clip in moves]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[Segment]],
        *,
        num_texts: int = 1,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> list[Encoded]:
        """Tokens of `num_texts` texts for each encoded picture or clip."""
        num_texts = check_count("num_texts", num_texts, len(prompts))
        max_tokens = check_count("max_tokens", max_tokens) + 1  # and the end
        requests = [
            Request(prompt=prompt, max_tokens=max_tokens, sampling=sampling or Sampling(temperature=0.0))
            for prompt in prompts
            for _ in range(num_texts)
        ]
        nothing = Encoded(grid=(0,), ids=torch.zeros(0, dtype=torch.int64))
        return [segments[-1].content if segments else nothing for segments in self.run(requests, seed, callback)]

    def decode(self, tokens: Sequence[Encoded]) -> list[str]:
        """Texts; bytes that are no text become U+FFFD."""
        return self.decode_items(self.text, tokens)
