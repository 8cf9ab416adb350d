"""Shapes → text: captions, and answers to questions; from all scales of a shape, or only from the first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch

from mm.generation import Request
from mm.interfaces import Encoded, Sampling
from mm.layout import Segment
from mm.multiscale import first_scales
from mm.pipelines.abilities import check_learned
from mm.pipelines.base import Callback, Pipeline, SamplingOptions, check_count, choose_seed, several
from mm.pipelines.outputs import TextOutput
from mm.shapes import Shape, ShapeSource, load_shape


class ShapeReader(Pipeline):
    """What pipelines share that are given shapes."""

    def encode_shapes(self, shapes: Sequence[Any], scales: int | None = None) -> list[Segment]:
        """Given shapes, or their first `scales`. Raises `ValueError` for what can't be loaded, or has not as many."""
        if not shapes:
            return []
        name = self.shape
        tokenizer = self.tokenizer(name)
        if scales is not None:
            scales = check_count("scales", scales)
            has = len(tokenizer.spec.scales)
            if scales > has:
                what = f"has {has} scales" if has else "has shapes of one scale"
                raise ValueError(f"scales is {scales}, and this model {what}; leave it out, or show it fewer")
        out = []
        for start in range(0, len(shapes), self.batch_size):
            loaded = [load_shape(one, tokenizer.spec.voxels) for one in shapes[start : start + self.batch_size]]
            for item in tokenizer.encode_batch(loaded):
                out.append(Segment(name, item if scales is None else first_scales(item, scales), loss=False))
        return out


class ShapeToTextPipeline(ShapeReader):
    """`pipeline("chair.obj").texts`, `pipeline("chair.obj", question="how many legs?").texts`, or step by step: `encode`,
    `generate`, `decode`."""

    direction = ("shape", "text")

    @torch.no_grad()
    def __call__(
        self,
        shape: ShapeSource | Any,
        *,
        question: str = "",
        scales: int | None = None,
        num_texts: int = 1,
        max_tokens: int = 128,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> TextOutput:
        """Texts for one shape or several. By default the likeliest token each time (temperature 0).

        Args:
            shape: paths or bytes of OBJ, STL, PLY, GLB, OFF and (paths) NPZ files, open binary files, `mm.shapes.Shape`, grids
                (bool or signed distances [N, N, N]), `trimesh.Trimesh` or `Scene`; or a list of them.
            question: what is answered; without one, what the shape is called is written.
            scales: of a model whose shapes have several: only the first so many are shown to it.
            num_texts: texts for each; more than one need a temperature above 0.
            max_tokens: the longest text, in tokens.
            seed, generator, callback, sampling: as for `TextTo3DPipeline`.

        Raises:
            ValueError: a shape that can't be loaded, a model that has none, learned to tell nothing of them, or has not as many
                scales, or settings that make no sense for text.
        """
        check_learned(self, "shape", "text")
        seed = choose_seed(seed, generator)
        shapes = several(shape, _one(shape), "a shape; give a path, bytes, a binary file, a grid, a mesh")
        num_texts = check_count("num_texts", num_texts, len(shapes))
        chosen = self.sampling(self.text, sampling, Sampling(temperature=0.0))
        if num_texts > 1 and chosen.temperature == 0:
            raise ValueError(f"num_texts={num_texts} at temperature 0 gives equal texts; set temperature above 0")
        if chosen.guidance != 1:
            raise ValueError(f"text is generated without guidance; leave guidance out, got {chosen.guidance}")
        tokens = self.generate(
            self.encode(shapes, question, scales),
            num_texts=num_texts,
            max_tokens=max_tokens,
            sampling=chosen,
            seed=seed,
            callback=callback,
        )
        return TextOutput(self.decode(tokens), tokens, seed)

    def encode(self, shapes: Sequence[Any], question: str = "", scales: int | None = None) -> list[list[Segment]]:
        """Each shape as the beginning of a document, and the question about it."""
        asked = [self.encode_text(question)] if question else []
        return [[segment, *asked] for segment in self.encode_shapes(shapes, scales)]

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
        """Tokens of `num_texts` texts for each encoded shape."""
        num_texts = check_count("num_texts", num_texts, len(prompts))
        request = Request(
            prompt=[],
            max_tokens=check_count("max_tokens", max_tokens) + 1,  # and the end
            sampling=sampling or Sampling(temperature=0.0),
        )
        requests = [replace(request, prompt=prompt) for prompt in prompts for _ in range(num_texts)]
        nothing = Encoded(grid=(0,), ids=torch.zeros(0, dtype=torch.int64))
        return [segments[-1].content if segments else nothing for segments in self.run(requests, seed, callback)]

    def decode(self, tokens: Sequence[Encoded]) -> list[str]:
        """Texts; bytes that are no text become U+FFFD."""
        return self.decode_items(self.text, tokens)


def _one(shape: Any) -> tuple[type, ...]:
    """Types of which a value is one shape. Meshes are known by what they have, so that their library isn't loaded to ask."""
    one: tuple[type, ...] = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Shape)
    return (*one, type(shape)) if hasattr(shape, "faces") or hasattr(shape, "geometry") else one
