"""Text → shapes, as meshes and grids; and what it shares with pictures → shapes."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Unpack

import torch

from mm.generation import Request
from mm.interfaces import Decoded, Encoded, Sampling
from mm.layout import Segment
from mm.pipelines.base import Callback, Pipeline, SamplingOptions, check_count, choose_seed, several
from mm.pipelines.outputs import MeshOutput
from mm.shapes import Shape


class ShapeMaker(Pipeline):
    """What pipelines share that make shapes: `grid`, `generate`, `decode`."""

    direction = ("text", "shape")

    def grid(self, scales: int | None = None) -> tuple[int, ...] | None:
        """Extents of an item; None where the model says by itself how long its shapes are. With `scales` it ends with that scale,
        which is coarser. Raises `ValueError` for a model that only reads shapes, or hasn't as many scales."""
        tokenizer = self.tokenizer(self.shape)
        if not tokenizer.decodes:
            raise ValueError(f"this model reads {self.shape!r} and can't make it; use a model that makes shapes")
        spec = tokenizer.spec
        if scales is None:
            return spec.max_grid or None
        scales = check_count("scales", scales)
        if scales > len(spec.scales):
            has = f"has {len(spec.scales)} scales" if spec.scales else "makes shapes in one go"
            raise ValueError(f"scales is {scales}, and this model {has}; leave it out, or ask for fewer")
        return spec.scales[scales - 1]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[Segment]],
        *,
        num_meshes: int = 1,
        grid: tuple[int, ...] | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        callback: Callback | None = None,
        constrained: bool = True,
    ) -> list[Encoded]:
        """Tokens of `num_meshes` shapes for each encoded prompt. `grid`: what `grid` returned, by default of a whole shape."""
        requests = self.requests(prompts, num_meshes=num_meshes, grid=grid, sampling=sampling, constrained=constrained)
        return [segments[-1].content for segments in self.run(requests, seed, callback)]

    def requests(
        self,
        prompts: Sequence[Sequence[Segment]],
        *,
        num_meshes: int = 1,
        grid: tuple[int, ...] | None = None,
        sampling: Sampling | None = None,
        constrained: bool = True,
    ) -> list[Request]:
        """What `generate` asks of the engine."""
        num_meshes = check_count("num_meshes", num_meshes, len(prompts))
        grid, name = grid or self.grid(), self.shape
        sampling = sampling or self.sampling(name, {})
        return [
            Request(prompt=prompt, items=[(name, grid)], text=False, sampling=sampling, constrained=constrained)
            for prompt in prompts
            for _ in range(num_meshes)
        ]

    def decode(self, tokens: Sequence[Encoded]) -> list[Shape]:
        """Shapes, of which each has its mesh."""
        return self.decode_items(self.shape, tokens)

    def output(self, tokens: list[Encoded], captions: list[str], seed: int) -> MeshOutput:
        """What a call returns."""
        made: list[Decoded] = self.decoded(self.shape, tokens)
        return MeshOutput(
            meshes=[one.value.mesh for one in made],
            grids=[one.value.occupancy for one in made],
            captions=captions,
            tokens=tokens,
            valid=[one.valid and one.value.valid for one in made],
            reasons=[one.reason or one.value.reason for one in made],
            seed=seed,
        )


class TextTo3DPipeline(ShapeMaker):
    """`pipeline("a tall table with three legs", seed=0).meshes`, or step by step: `encode`, `generate`, `decode`."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str | None] | None,
        *,
        num_meshes: int = 1,
        scales: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        constrained: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> MeshOutput:
        """Shapes for one prompt or several.

        Args:
            prompt: what the shapes are; None: anything. What the model never heard of gives some shape all the same.
            num_meshes: shapes a prompt.
            scales: of a model that makes a shape scale by scale: only so many, coarse and sooner done.
            seed: the n-th shape of a prompt depends on the seed alone, not on the other prompts.
            generator: where the seed is drawn from, if none is given.
            callback: called with `mm.generation.Event` after every step of every row.
            constrained: a model that writes meshes face by face can write nothing but whole faces; False: it may.
            sampling: fields of `mm.interfaces.Sampling`.

        A shape of which nothing is left is an empty mesh, with `valid` False and a reason.

        Raises:
            ValueError: an empty prompt, one that the context can't hold, or a model that makes no shapes.
        """
        seed = choose_seed(seed, generator)
        prompts = several(prompt, (str, NoneType), "a prompt; give a string, None")
        num_meshes = check_count("num_meshes", num_meshes, len(prompts))
        grid = self.grid(scales)
        tokens = self.generate(
            self.encode(prompts),
            num_meshes=num_meshes,
            grid=grid,
            sampling=self.sampling(self.shape, sampling),
            seed=seed,
            callback=callback,
            constrained=constrained,
        )
        return self.output(tokens, [text or "" for text in prompts for _ in range(num_meshes)], seed)

    def encode(self, prompts: Sequence[str | None]) -> list[list[Segment]]:
        """Each prompt as the beginning of a document; None is the null condition."""
        return self.encode_prompts(prompts, "shape")
