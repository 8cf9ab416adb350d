"""Delay order: an item of K sub-codes a frame as a list of steps, causal, sub-code q some steps after its frame (MusicGen).

A position is one step: it holds the sub-codes that the pattern writes there (`mm.patterns`) and predicts those of the next step;
where nothing stands there is no loss. MusicGen averages over the valid places of each codebook, then over codebooks; here each
step averages over its own (one reduction for every head), so that the few sub-codes of the steps at either end weigh more.

Letters in shapes: T frames, K sub-codes, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mm.grid import given_prefix
from mm.interfaces import DRAWN, Encoded, Layout, Order, Proposal, Sampling, Session, Spec
from mm.patterns import NONE, Pattern


class Delay(Order):
    """A pattern's steps one after another.

    Args:
        pattern: `delay`; `parallel`, a frame a step (Moshi and CSM, with a `mm.heads.depth.DepthHead`); `flatten`, one group of
            sub-codes a step; `coarse_first`, sub-code 0 of all frames before the others.
        delays: of `delay`: steps by which each sub-code is late; 0, 1, …, K − 1 where none are given (MusicGen). The least is
            taken from all: nothing stands in steps before it.
        groups: of `flatten`: the group of each sub-code (0, 1, 1, 1: two steps a frame); each its own where none are given.
        along: as `Order.along`: the frames are spread over the text, steps of one frame between it and the next. Otherwise a
            step's rotary coordinate is its number.
    """

    ends = True

    def __init__(
        self,
        pattern: Literal["delay", "parallel", "flatten", "coarse_first"] = "delay",
        delays: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
        along: bool = False,
    ) -> None:
        for name, value, of in (("delays", delays, "delay"), ("groups", groups, "flatten")):
            if value is not None and pattern != of:
                raise ValueError(f"{name} belong to the pattern {of}, got them for {pattern}")
        self.kind, self.along = pattern, along
        self.given = delays if delays is not None else groups
        if self.given is not None:
            self.pattern(len(self.given))  # what is no pattern is refused now
        if delays:
            self.given = [delay - min(delays) for delay in delays]

    def pattern(self, num_codes: int) -> Pattern:
        """The pattern of items of `num_codes` sub-codes a frame."""
        if self.given is not None and len(self.given) != num_codes:
            raise ValueError(
                f"the {self.kind} pattern is given for {len(self.given)} sub-codes, but the tokenizer has {num_codes}; give as "
                "many numbers, or none"
            )
        return PATTERNS[self.kind](range(num_codes) if self.given is None else self.given)

    def check(self, spec: Spec) -> None:
        if spec.kind != "codes":
            raise ValueError(f"the delay order is for several sub-codes an element, this tokenizer is {spec.kind}")
        self.pattern(spec.num_codes)

    def places(self, count: int, spec: Spec) -> int:
        return self.pattern(spec.num_codes).steps(count)

    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        if encoded.codes is None or len(encoded.grid) != 1:
            raise ValueError(
                f"the delay order lays out lists of sub-codes, got a grid {encoded.grid} of shape {tuple(encoded.content.shape)}"
            )
        codes = encoded.codes.long()
        pattern = self.pattern(codes.shape[1])
        return self.positions(pattern, pattern.build(codes), 0, len(codes))

    def positions(self, pattern: Pattern, held: Int[Tensor, "n K"], first: int, frames: int) -> Layout:
        """Steps from `first` on."""
        step = torch.arange(first, first + len(held))
        frame = pattern.frame(frames)[step]
        place = frame if self.along else step.float()
        target = torch.arange(len(held)) + 1
        target[:-1][(held[1:] == NONE).all(1)] = -1  # far apart, delays leave steps empty: nothing to learn
        return Layout(
            element=frame.long().clamp(max=max(frames - 1, 0)),  # the one whose turn it is
            order=step,
            position=place[:, None].expand(-1, 3),
            time=torch.zeros(len(held)),
            copy=torch.zeros_like(step),
            target=target,
            enters=True,
            held=held,
        )

    def session(
        self,
        grid: tuple[int, ...],
        sampling: Sampling,
        rng: torch.Generator,
        known: tuple[Tensor, Bool[Tensor, " N"]] | None = None,
        dim: int = 0,
        num_codes: int = 0,
    ) -> Session:
        if len(grid) != 1 or not num_codes:
            raise ValueError(f"the delay order makes lists of sub-codes, got the grid {grid} and {num_codes} sub-codes")
        return DelaySession(self, grid[0], num_codes, known)


class DelaySession(Session):
    """Step by step. Frames given at the beginning are kept: steps that they fill aren't asked for, and of a step that they fill
    in part the rest is drawn."""

    lays_out = True

    def __init__(self, order: Delay, frames: int, num_codes: int, known: tuple[Tensor, Tensor] | None) -> None:
        self.order, self.frames, self.pattern = order, frames, order.pattern(num_codes)
        codes = torch.full((frames, num_codes), DRAWN)
        if known is not None:
            prefix = given_prefix(known, (frames,)).long()
            codes[: len(prefix)] = prefix
        self.steps = self.pattern.build(codes)
        self.open = (self.steps == DRAWN).any(1).tolist()
        self.last = self.pattern.when(frames).amax(1)
        self.made, self.told = 0, 0
        self._skip()

    def _skip(self) -> None:
        """Past the steps that leave nothing to be drawn."""
        while self.made < len(self.steps) and not self.open[self.made]:
            self.made += 1

    def _end(self, last: int) -> None:
        """The item ends with this frame, and no other sub-code of it is drawn; those of frames before it still are."""
        codes = self.pattern.revert(self.steps, self.frames)[: last + 1]
        codes[last] = self.stop
        self.frames, self.steps = last + 1, self.pattern.build(codes)
        self.open = (self.steps == DRAWN).any(1).tolist()
        self.last = self.pattern.when(self.frames).amax(1)

    def propose(self) -> Proposal | None:
        if self.made == len(self.steps):
            return None
        given = self.steps[self.made : self.made + 1]
        return Proposal(autoregressive=True, done=self.made / len(self.steps), given=given)

    def accept(self, sample: Tensor, log_prob: Tensor | None) -> None:
        given = self.steps[self.made]
        self.steps = self.steps.clone()  # what was given out before stays as it was
        self.steps[self.made] = torch.where(given == DRAWN, sample[0], given)
        if self.stop >= 0 and self.steps[self.made, 0] == self.stop:
            self._end(int((self.pattern.when(self.frames)[:, 0] == self.made).nonzero()))
        self.made += 1
        self._skip()

    def settled(self) -> Layout | None:
        if self.told == self.made:
            return None
        first, self.told = self.told, self.made
        return self.order.positions(self.pattern, self.steps[first : self.made], first, self.frames)

    def content(self) -> Int[Tensor, "T K"]:
        return self.pattern.revert(self.steps, self.frames).clamp(min=0)

    def final(self) -> int:
        return int((self.last < self.made).sum())


PATTERNS: dict[str, Callable[[Sequence[int]], Pattern]] = {
    "delay": Pattern.delay,
    "parallel": lambda codes: Pattern.parallel(len(codes)),
    "flatten": Pattern.flatten,
    "coarse_first": lambda codes: Pattern.coarse_first(len(codes)),
}
