"""Text → pictures; also pictures of which a part is given (inpainting, completion)."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Unpack

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from mm.generation import Request
from mm.interfaces import Encoded, Sampling
from mm.layout import Segment
from mm.media import load_image
from mm.pipelines.base import Callback, Picture, Pipeline, SamplingOptions, check_count, choose_seed, several
from mm.pipelines.outputs import ImageOutput

Known = tuple[Tensor, Tensor]


class TextToImagePipeline(Pipeline):
    """`pipeline("red apple", num_images=4, seed=0).images`, or step by step: `encode`, `generate`, `decode`."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str | None] | None,
        *,
        num_images: int = 1,
        image: Picture | None = None,
        mask: Picture | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        constrained: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> ImageOutput:
        """Pictures for one prompt or several.

        Args:
            prompt: what the pictures show; None: anything.
            num_images: pictures a prompt; up to 100,000 in one call.
            image: a picture of which a part is kept, together with `mask`.
            mask: white (or any bright value) where the picture is to be drawn anew, black where it is kept.
            seed: the n-th picture of a prompt depends on the seed alone, not on the other prompts.
            generator: where the seed is drawn from, if none is given.
            callback: called with `mm.generation.Event` after every step of every row.
            constrained: a model that writes pictures as files can write nothing but files; False: what it writes may be broken.
            sampling: fields of `mm.interfaces.Sampling`.

        Raises:
            ValueError: an empty prompt, one that the context can't hold, a picture that can't be loaded, or a mask
                that the model's order can't honour (raster order and files keep the upper part only).
        """
        seed = choose_seed(seed, generator)
        prompts = several(prompt, (str, NoneType), "a prompt; give a string, None")
        num_images = check_count("num_images", num_images, len(prompts))
        known = None
        if image is not None and mask is not None:
            known = self.known(image, mask)
        elif image is not None or mask is not None:
            raise ValueError(
                "inpainting needs both image and mask (white where it is drawn anew); give both or neither"
            )
        tokens = self.generate(
            self.encode(prompts),
            num_images=num_images,
            sampling=self.sampling(self.picture, sampling),
            seed=seed,
            known=known,
            callback=callback,
            constrained=constrained,
        )
        captions = [text or "" for text in prompts for _ in range(num_images)]
        return ImageOutput(self.decode(tokens), captions, tokens, seed)

    def encode(self, prompts: Sequence[str | None]) -> list[list[Segment]]:
        """Each prompt as the beginning of a document; None is the null condition."""
        return self.encode_prompts(prompts, "picture")

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[Segment]],
        *,
        num_images: int = 1,
        grid: tuple[int, ...] | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        known: Known | None = None,
        callback: Callback | None = None,
        constrained: bool = True,
    ) -> list[Encoded]:
        """Tokens of `num_images` pictures for each encoded prompt. `grid`: rows and columns of tokens, by default the
        largest that the tokenizer knows (files have none); `known`: what `known` returned."""
        num_images = check_count("num_images", num_images, len(prompts))
        requests = [
            Request(
                prompt=prompt,
                items=[(self.picture, grid or self._grid)],
                text=False,
                sampling=sampling or self.sampling(self.picture, {}),
                known=known,
                constrained=constrained,
            )
            for prompt in prompts
            for _ in range(num_images)
        ]
        return [segments[-1].content for segments in self.run(requests, seed, callback)]

    def decode(self, tokens: Sequence[Encoded]) -> list[Image.Image]:
        """RGB pictures."""
        return self.decode_items(self.picture, tokens)

    def preview(self, content: Tensor, grid: tuple[int, ...] | None = None) -> Image.Image:
        """A picture of what an event of the callback holds: elements that aren't generated yet are 0, and of a file that isn't
        complete it shows what there is."""
        grid, spec = grid or self._grid or (len(content),), self.tokenizer(self.picture).spec
        if spec.scales:  # as fine as it has come
            grid = max((scale for scale in spec.scales if spec.count(scale) <= len(content)), default=spec.scales[0])
        whole = torch.zeros((spec.count(grid), *content.shape[1:]), dtype=content.dtype)
        whole[: len(content)] = content[: len(whole)]
        return self.decode([spec.item(whole, grid)])[0]

    def known(self, image: Picture, mask: Picture) -> tuple[Tensor, Bool[Tensor, " N"]]:
        """Tokens of a picture and which of them are kept: those under which no pixel of the mask is bright.

        Both are brought to one size and put on a square (the kept border is white), so that mask and tokens fit
        whatever the tokenizer does with other shapes. Of a file that is its beginning, as far as nothing but the rows above the
        mask's bright ones stands in it.
        """
        if self.tokenizer(self.picture).spec.is_free:
            return self._beginning(*_pair(image, mask))
        if not self.tokenizer(self.picture).spec.spatial:
            raise ValueError(
                f"the tokens of {self.picture!r} stand for whole pictures, not for places in them, so that no part can be kept; "
                "leave image and mask out, or use a model whose tokens lie on a grid"
            )
        picture, area = _pair(image, mask)
        side = max(picture.size)
        corner = ((side - picture.width) // 2, (side - picture.height) // 2)
        square, drawn = Image.new("RGB", (side, side), "white"), Image.new("L", (side, side), 0)
        square.paste(picture, corner)
        drawn.paste(area, corner)
        encoded = self.tokenizer(self.picture).encode(square)
        rows, columns = encoded.grid
        bright = np.asarray(drawn) > 127
        by_row = np.stack([bright[slice(*_span(n, rows, side))].any(0) for n in range(rows)])
        cells = np.stack([by_row[:, slice(*_span(n, columns, side))].any(1) for n in range(columns)], axis=1)
        return encoded.content, torch.from_numpy(~cells.flatten())

    def _beginning(self, picture: Image.Image, area: Image.Image) -> tuple[Tensor, Bool[Tensor, " N"]]:
        """Of a picture that is a file, what its rows above the bright ones are. It is put on white of the file's proportions."""
        bright = np.asarray(area, dtype=np.uint8) > 127
        first = int(bright.nonzero()[0].min(initial=len(bright)))
        if not bright[first + 1 :].all():  # the row at the edge may be soft
            raise ValueError(
                "this model writes pictures as files, from top to bottom, and can keep an upper part only; give a mask that is "
                "bright in all of the lower rows"
            )
        tokenizer = self.tokenizer(self.picture)
        rows, columns = tokenizer.spec.pixels
        width = max(picture.width, -(-picture.height * columns // rows))
        height = max(picture.height, -(-picture.width * rows // columns))
        top = (height - picture.height) // 2
        page = Image.new("RGB", (width, height), "white")
        page.paste(picture, ((width - picture.width) // 2, top))
        kept = tokenizer.prefix(page, (top + first) / height).content
        return kept, torch.ones(len(kept), dtype=torch.bool)

    @property
    def _grid(self) -> tuple[int, ...]:
        return self.model.vocabulary[self.picture].max_grid


def _pair(image: Picture, mask: Picture) -> tuple[Image.Image, Image.Image]:
    """A picture and its mask, in grey."""
    picture, area = load_image(image), load_image(mask).convert("L")
    if area.size != picture.size:
        raise ValueError(f"the mask has {area.size} pixels, the picture {picture.size}; give them one size")
    return picture, area


def _span(number: int, cells: int, side: int) -> tuple[int, int]:
    """The pixels that a row or column of tokens covers, whole or in part."""
    return number * side // cells, -(-(number + 1) * side // cells)
