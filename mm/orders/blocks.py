"""Blocks: vectors made block by block, all of a block at once, with the backbone as the denoiser (Transfusion, ARDiT, ViD-GPT).

In training every block stands there twice: clean (copy 0, time 0) and noisy (copy 1, time t, one t a block). Both have the
block's order, so by the rule of visibility a noisy block sees all clean blocks before it and itself, never its own clean
copy; and what comes after sees clean blocks only. The noisy copy predicts what the process asks of its own truth.

In generation a block starts as noise; each step of the sampler is one pass over its positions, which are not kept; then its
clean elements are fed once and stay in the cache (Liu et al. 2024, ARDiT, section 3.3: N + 1 passes a block).

To fill in the middle, what is given before and behind comes first: one order number for all of it, clean, seen by every block.

Video goes by whole frames (Gao et al. 2024, ViD-GPT and Ca2-VDM: causal over time, full within a chunk of frames): frames that
are given are the first blocks, the first one shorter where they don't fill it. So that a long rollout doesn't drift, the
clean copies may be read with a little noise in training, and generated frames enter the cache with some. With a window it
goes on for as long as is asked for: what came before the item stays in the cache, and of the item its last frames, whose
coordinates move back as older ones leave, so that nothing stands farther out than in a clip of the training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.diffusion import TIME, Process, Sampler, settings
from mm.grid import coordinates
from mm.interfaces import Encoded, Layout, Order, Proposal, Sampling, Session, Spec


class Blocks(Order):
    """The head of the modality predicts what `process` asks for: `mm.heads.regression.RegressionHead`.

    Args:
        block: elements of a block; 0 = the whole item is one (Transfusion).
        shift: in training the blocks begin at a random place (ARDiT), so that every element, or every frame, stands everywhere in
            a block. It is also what lets any number of given elements (frames) be gone on from.
        process: from data to noise.
        sampler: from noise to data, unless `Sampling.denoising_steps`, or else `Sampling.steps`, asks for another number of
            steps.
        infill: probability in training that only a span of the item is learned, and all around it is given. Where the span
            lies and how long it is is drawn evenly. Without it, given elements can be kept at the beginning only.
        along: as `Order.along`.
        time_condition: the backbone is told a noisy position's time by a vector that is added to it. Not needed where it
            has AdaLN (`backbone: {adaln: true}`).
        frames: instead of `block`: steps of the grid's slowest axis a block, each with all that stands at it.
        augment: in training, what later blocks see of a block is read at a time drawn evenly from 0 to this (one a block), and
            the backbone is told so (Ca2-VDM, `prefix_perturb_t`: 100 of 1000).
        augment_sampling: the time at which generated blocks enter the cache; `augment` at the most (Ca2-VDM: 50 of 1000). The
            item itself stays as it was generated.
        window: frames that a block sees before it, in generation; 0 = all. `window + frames` is a clip of the training, and what
            the model is told of the length of a longer one.
        lead: frames of the first block in generation, where nothing is given; 0 = as many as the others have. With 1 a clip
            begins as a picture. Shifted blocks show the model each of these in training.
    """

    def __init__(
        self,
        block: int = 0,
        shift: bool = True,
        process: Process | Mapping[str, Any] | None = None,
        sampler: Sampler | Mapping[str, Any] | None = None,
        time_condition: bool = True,
        infill: float = 0.0,
        along: bool = False,
        frames: int = 0,
        augment: float = 0.0,
        augment_sampling: float = 0.0,
        window: int = 0,
        lead: int = 0,
    ) -> None:
        if min(block, frames) < 0:
            raise ValueError(f"a block has at least one element (0: the whole item is one), got {min(block, frames)}")
        if block and frames:
            raise ValueError(f"a block is counted in elements or in frames; got block {block} and frames {frames}")
        if not 0 <= augment_sampling <= augment < 1:
            raise ValueError(
                "what is before a block is read at a time from 0 to below 1, and in generation at no later one than in training; "
                f"got augment {augment} and augment_sampling {augment_sampling}"
            )
        if not 0 <= infill <= 1:
            raise ValueError(f"infill is a probability between 0 and 1, got {infill}")
        if window < 0 or (window and (not frames or infill or along or not shift and window % frames)):
            raise ValueError(
                f"a window of {window} frames needs blocks of frames, without infill and not along a text, and where training "
                "doesn't shift the blocks as many frames as whole blocks have"
            )
        if lead and not frames:
            raise ValueError(f"lead is of blocks of frames: give frames too, or leave lead out; got lead {lead}")
        if lead < 0 or (lead and (lead > frames or infill or lead != frames and not shift)):
            raise ValueError(
                f"the first block has 1 to {frames} frames (0: as many as the others), where training shifts the blocks and "
                f"fills in nothing; got lead {lead} with frames {frames}"
            )
        self.infill, self.along, self.window, self.lead = infill, along, window, lead
        self.block, self.frames, self.shift, self.time_condition = block, frames, shift, time_condition
        self.augment, self.augment_sampling = augment, augment_sampling
        self.process, self.sampler = settings(Process, process), settings(Sampler, sampler)
        self.sampler.plan(self.process)  # a pair that can't work is refused now

    def check(self, spec: Spec) -> None:
        super().check(spec)
        if self.window and (not spec.max_grid or self.window + self.frames > spec.max_grid[0]):
            raise ValueError(
                f"a window of {self.window} frames and a block of {self.frames} are more than a clip of this tokenizer's has, "
                f"{spec.max_grid[:1]}; make the window smaller"
            )

    def places(self, count: int, spec: Spec) -> int:
        return min(count, (self.window + self.frames) * math.prod(spec.max_grid[1:])) if self.window else count

    def announced(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        return (min(grid[0], self.window + self.frames), *grid[1:]) if self.window and grid else grid

    def unit(self, grid: tuple[int, ...]) -> int:
        """Elements that no block divides: those of a frame, or one."""
        return math.prod(grid[1:]) if self.frames else 1

    def size(self, grid: tuple[int, ...]) -> int:
        """Elements of a block of an item of this grid."""
        return self.unit(grid) * (self.block or self.frames) or max(1, math.prod(grid))

    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        count, unit, size = len(encoded), self.unit(encoded.grid), self.size(encoded.grid)
        element, place = torch.arange(count), coordinates(encoded.grid)
        if context:
            kept = math.prod(self.announced(encoded.grid))  # of a longer clip its end, as when it is generated
            return self.positions(element[-kept:], blocks(kept, size), place[:kept], torch.zeros(kept), noisy=False)
        given = torch.zeros(count, dtype=torch.bool)
        if self.infill and float(torch.rand((), generator=rng)) < self.infill and count:
            length = 1 + int(torch.randint(count // unit, (), generator=rng))
            first = int(torch.randint(count // unit - length + 1, (), generator=rng))
            given = (element < first * unit) | (element >= (first + length) * unit)
        places = self.block or self.frames
        begin = unit * int(torch.randint(places, (), generator=rng)) if self.shift and places > 1 else 0
        number, learned = numbers(given, size, begin), element[~given]
        total = int(number.max()) + 1 if count else 0
        time = self.process.draw_time(total, rng)[number[learned]]
        read = self.augment * torch.rand(total, generator=rng)[number] if self.augment else torch.zeros(count)
        clean = self.positions(element, number, place, read, noisy=False)
        noisy = self.positions(learned, number[learned], place[learned], time, noisy=True)
        return Layout(
            element=torch.cat((element, learned)),
            order=torch.cat((clean.order, noisy.order)),
            position=torch.cat((clean.position, noisy.position)),
            time=torch.cat((clean.time, noisy.time)),
            copy=torch.cat((clean.copy, noisy.copy)),
            target=torch.cat((clean.target, count + noisy.target)),
            enters=False,
            inject={name: torch.cat((clean.inject[name], noisy.inject[name])) for name in clean.inject},
        )

    def positions(
        self, element: Tensor, block: Tensor, place: Float[Tensor, "P 3"], time: Float[Tensor, " P"], *, noisy: bool
    ) -> Layout:
        """One copy of some elements; noisy ones are read."""
        where = torch.arange(len(element))
        return Layout(
            element=element,
            order=block,
            position=place,
            time=time,
            copy=torch.full_like(element, int(noisy)),
            target=where if noisy else torch.full_like(element, -1),
            enters=False,
            inject={TIME: time[:, None]} if self.time_condition else {},
        )

    @property
    def conditions(self) -> dict[str, int]:
        return {TIME: 1} if self.time_condition else {}

    def session(
        self,
        grid: tuple[int, ...],
        sampling: Sampling,
        rng: torch.Generator,
        known: tuple[Tensor, Bool[Tensor, " N"]] | None = None,
        dim: int = 0,
        num_codes: int = 0,
    ) -> Session:
        if not dim:
            raise ValueError("the blocks order makes vectors; this tokenizer has ids: give it raster or masked order")
        return BlocksSession(self, grid, sampling, rng, known, dim)


def blocks(count: int, size: int, begin: int = 0) -> Int[Tensor, " N"]:
    """The block of each element; the first block is `begin` elements shorter than the others."""
    return (torch.arange(count) + begin) // size


def numbers(given: Bool[Tensor, " N"], size: int, begin: int = 0) -> Int[Tensor, " N"]:
    """The order of each element: 0 for what is given, if anything is, and then the others block by block."""
    number = torch.zeros(len(given), dtype=torch.int64)
    number[~given] = blocks(int((~given).sum()), size, begin) + int(given.any())
    return number


class BlocksSession(Session):
    """Block after block. Given elements are fed clean: as the first blocks, where they fill them and no others and training
    showed whole items too (`infill` below 1), or else all at once, and the blocks are made of what is left."""

    def __init__(
        self,
        order: Blocks,
        grid: tuple[int, ...],
        sampling: Sampling,
        rng: torch.Generator,
        known: tuple[Tensor, Tensor] | None,
        dim: int,
    ) -> None:
        self.order, self.rng, self.dim = order, rng, dim
        self.plan = order.sampler.plan(order.process, sampling.denoising_steps or sampling.steps)
        self.temperature = sampling.temperature
        self.count, self.place = math.prod(grid), coordinates(grid)
        self.unit, self.size = order.unit(grid), order.size(grid)
        self.window = order.window * self.unit or self.count
        self._blocks(blocks(self.count, self.size, -order.lead * self.unit % self.size))
        self.values = torch.zeros(self.count, dim)
        self.current, self.step, self.fresh = 0, 0, list[int]()
        self.first = 0
        """The oldest element that stays in the cache: the coordinates of all count from it."""
        self.read = 0.0
        """The time at which fresh elements enter the cache: given ones as they are."""
        if known is not None:
            self._give(*known)
        self._begin()

    def _give(self, content: Tensor, given: Tensor) -> None:
        if len(given) != self.count or len(content) != self.count:
            raise ValueError(
                f"given elements cover {len(content)} and {len(given)} places, but the grid has {self.count}"
            )
        order, number = self.order, int(given.sum())
        leads = number % self.unit == 0 and bool(given[:number].all())
        if leads and order.shift and (order.frames or not order.infill):  # then blocks began anywhere in training
            self._blocks(blocks(self.count, self.size, -number % self.size))
        whole = [bool(given[self.block == number].all()) for number in range(self.total)]
        first = whole.index(False) if False in whole else self.total
        always = order.infill >= 1  # then training never showed blocks that came first one by one
        if always or number != int((self.block < first).sum()):
            if not order.infill:
                raise ValueError(
                    "this blocks order was trained without infill, and can keep given elements only as whole blocks at the "
                    f"start: {first} of {self.total} blocks are, but {number} elements are given"
                )
            self._blocks(numbers(given, self.size))
            first = int(given.any())
        self.values[given] = content[given].float()
        self.current, self.first = first, max(0, number - self.window)
        self.fresh = given.nonzero()[self.first :, 0].tolist()

    def _blocks(self, block: Int[Tensor, " N"]) -> None:
        self.block, self.total = block, int(block.max()) + 1

    def _begin(self) -> None:
        """Noise for the current block."""
        if self.current >= self.total:
            return
        self.element = (self.block == self.current).nonzero()[:, 0]
        self.noise = iter(self.plan.noise(len(self.element), self.dim, self.rng, self.temperature))
        self.x, self.step = next(self.noise), 0
        self.memory: Tensor | None = None

    def settled(self) -> Layout | None:
        if not self.fresh:
            return None
        element, self.fresh = torch.tensor(self.fresh), []
        time = torch.full((len(element),), self.read)
        layout = self.order.positions(element, self.block[element], self._place(element), time, noisy=False)
        if not self.read:
            return layout
        noise = torch.randn(len(element), self.dim, generator=self.rng)
        return replace(layout, reads=self.order.process.corrupt(self.values[element], noise, time))

    def _place(self, element: Int[Tensor, " P"]) -> Float[Tensor, "P 3"]:
        return self.place[element] - self.place[self.first]

    def forgets(self) -> tuple[int, Float[Tensor, " 3"]] | None:
        if self.current >= self.total or (first := int(self.element[0]) - self.window) <= self.first:
            return None
        before, self.first = self.first, first
        return first - before, self.place[before] - self.place[first]

    def propose(self) -> Proposal | None:
        if self.current >= self.total:
            return None
        element = self.element
        time = self.plan.time[self.step].expand(len(element))
        layout = self.order.positions(element, self.block[element], self._place(element), time, noisy=True)
        done = (self.current + self.step / len(self.plan.steps)) / self.total
        content = self.values.clone()
        content[element] = self.x
        return Proposal(autoregressive=False, done=done, content=content, layout=layout)

    def accept(self, sample: Tensor, log_prob: Tensor | None) -> None:
        """One step of the sampler with the head's prediction."""
        self.x, self.memory = self.plan.advance(self.step, self.x, sample, self.memory, self.noise)
        self.step += 1
        if self.step == len(self.plan.steps):
            self.values = self.values.clone()
            self.values[self.element] = self.x
            self.fresh += self.element.tolist()
            self.current, self.read = self.current + 1, self.order.augment_sampling
            self._begin()

    def content(self) -> Tensor:
        return self.values

    def final(self) -> int:
        return int((self.block < self.current).long().cumprod(0).sum())
