"""Pictures → shapes: one picture is the condition, seen through a tokenizer that may do nothing but read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image

from mm.layout import Segment
from mm.pipelines.abilities import check_learned
from mm.pipelines.base import Callback, Picture, SamplingOptions, check_count, choose_seed, several
from mm.pipelines.outputs import MeshOutput
from mm.pipelines.text_to_3d import ShapeMaker


class ImageTo3DPipeline(ShapeMaker):
    """`pipeline("chair.png", seed=0).meshes`, or step by step: `encode`, `generate`, `decode`."""

    direction = ("image", "shape")

    @torch.no_grad()
    def __call__(
        self,
        image: Picture | Sequence[Picture],
        *,
        num_meshes: int = 1,
        scales: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        constrained: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> MeshOutput:
        """Shapes for one picture or several; what is behind is made up.

        Args:
            image: paths, bytes of files, open binary files, PIL pictures, or arrays (`mm.media.array_pixels`).
            num_meshes: shapes a picture.
            scales, seed, generator, callback, constrained, sampling: as for `TextTo3DPipeline`.

        Raises:
            ValueError: a picture that can't be loaded, or a model that has no pictures or learned to make no shapes of them.
        """
        check_learned(self, "picture", "shape")
        seed = choose_seed(seed, generator)
        one: tuple[Any, ...] = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)
        images = several(image, one, "a picture; give a path, bytes, a binary file, a PIL picture, an array")
        num_meshes = check_count("num_meshes", num_meshes, len(images))
        grid = self.grid(scales)
        tokens = self.generate(
            self.encode(images),
            num_meshes=num_meshes,
            grid=grid,
            sampling=self.sampling(self.shape, sampling),
            seed=seed,
            callback=callback,
            constrained=constrained,
        )
        captions = [str(source) if isinstance(source, str | os.PathLike) else "" for source in images]
        return self.output(tokens, [text for text in captions for _ in range(num_meshes)], seed)

    def encode(self, images: Sequence[Picture]) -> list[list[Segment]]:
        """Each picture as the beginning of a document."""
        return [[segment] for segment in self.encode_pictures(images)]
