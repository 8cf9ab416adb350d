"""Stages (VALL-E, Wang et al. 2023): sub-code 0 frame by frame, then each further sub-code for all frames at once.

In training an item stands there twice. T causal positions (copy 0) hold sub-code 0 alone, each predicted by the position before.
T positions of one order after them (copy 1: nobody else sees them) learn one stage q, drawn at random: they read the sub-codes
below q, are told the stage, and predict sub-code q of their own frame. Every one of the 2·T predictions is of one sub-code, so
that the mean over positions is VALL-E's (autoregressive loss + loss of one stage) / 2.

A prompt (an item that is given) is T positions that read all K sub-codes, as the acoustic prompt of VALL-E's later stages.
In generation the causal positions stay in the cache; each stage is one pass over T positions that don't.

Letters in shapes: T frames, K sub-codes.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mm.grid import coordinates, given_prefix
from mm.interfaces import DRAWN, Encoded, Layout, Order, Proposal, Sampling, Session, Spec
from mm.patterns import NONE

STAGE = "stage"


class Stages(Order):
    """Autoregressive in sub-code 0, K − 1 parallel passes for the others.

    Args:
        greedy: the parallel passes take the likeliest sub-codes (VALL-E, section 4.2.2); otherwise they draw as the first.
        along: as `Order.along`.
    """

    beside = True

    def __init__(self, greedy: bool = True, along: bool = False) -> None:
        self.greedy, self.along = greedy, along

    @property
    def conditions(self) -> dict[str, int]:
        """The stage q as q / K: 0 at the causal positions, 1 in a prompt."""
        return {STAGE: 1}

    def check(self, spec: Spec) -> None:
        if spec.kind != "codes" or spec.num_codes < 2:
            raise ValueError(
                "the stages order is for two or more sub-codes an element, this tokenizer is "
                f"{spec.kind} with {spec.num_codes}"
            )

    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        if encoded.codes is None or len(encoded.grid) != 1:
            raise ValueError(
                f"the stages order lays out lists of sub-codes, got a grid {encoded.grid} of shape "
                f"{tuple(encoded.content.shape)}"
            )
        codes = encoded.codes.long()
        count, total = codes.shape
        if context:
            return self.causal(codes, 0, total)
        stage = int(torch.randint(1, total, (), generator=rng))
        first, second = self.causal(codes, 0, 0), self.parallel(codes, stage)
        assert second.held is not None and first.held is not None
        return Layout(
            element=torch.cat((first.element, second.element)),
            order=torch.cat((first.order, second.order)),
            position=torch.cat((first.position, second.position)),
            time=torch.zeros(2 * count),
            copy=torch.cat((first.copy, second.copy)),
            # the last causal position predicts what follows the item, not the first position of the stage
            target=torch.cat((torch.where(first.target == count, 2 * count, first.target), second.target + count)),
            enters=True,
            inject={STAGE: torch.cat((first.inject[STAGE], second.inject[STAGE]))},
            held=torch.cat((first.held, second.held)),
            reads=torch.cat((first.held, below(codes, stage))),
        )

    def causal(self, codes: Int[Tensor, "T K"], first: int, stage: int) -> Layout:
        """Frames from `first` on, one after another: sub-code 0 of each, or (stage K) all of them."""
        element = torch.arange(first, len(codes))
        return Layout(
            element=element,
            order=element,
            position=coordinates((len(codes),))[first:],
            time=torch.zeros(len(element)),
            copy=torch.zeros_like(element),
            target=torch.arange(len(element)) + 1,
            enters=True,
            inject={STAGE: torch.full((len(element), 1), stage / codes.shape[1])},
            held=below(codes[first:], stage or 1),
        )

    def parallel(self, codes: Int[Tensor, "T K"], stage: int) -> Layout:
        """All frames at once, after the causal ones: they read the sub-codes below `stage`, and hold that one."""
        count, total = codes.shape
        element, held = torch.arange(count), torch.full_like(codes, NONE)
        held[:, stage] = codes[:, stage]
        return Layout(
            element=element,
            order=torch.full_like(element, count),
            position=coordinates((count,)),
            time=torch.zeros(count),
            copy=torch.ones_like(element),
            target=element,
            enters=False,
            inject={STAGE: torch.full((count, 1), stage / total)},
            held=held,
            reads=below(codes, stage),
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
        if len(grid) != 1 or num_codes < 2:
            raise ValueError(
                f"the stages order makes lists of sub-codes, got the grid {grid} and {num_codes} sub-codes"
            )
        return StagesSession(self, grid[0], num_codes, known)


class StagesSession(Session):
    """Frame by frame, then stage by stage. Frames given at the beginning are kept."""

    lays_out = True

    def __init__(self, order: Stages, frames: int, num_codes: int, known: tuple[Tensor, Tensor] | None) -> None:
        self.order, self.frames, self.num_codes = order, frames, num_codes
        self.codes = torch.full((frames, num_codes), DRAWN)
        if known is not None:
            prefix = given_prefix(known, (frames,)).long()
            self.codes[: len(prefix)] = prefix
        self.made = int((self.codes[:, 0] != DRAWN).sum())
        self.told, self.stage = 0, 1 if self.made < frames or bool((self.codes == DRAWN).any()) else num_codes

    def propose(self) -> Proposal | None:
        if self.stage == self.num_codes:
            return None
        first = self.made < self.frames
        rest = (self.num_codes - self.stage) * self.frames if not first else self.num_codes * self.frames - self.made
        done = 1.0 - rest / (self.num_codes * self.frames)
        if first:
            return Proposal(autoregressive=True, done=done, given=only(self.codes[self.made : self.made + 1], 0))
        return Proposal(
            autoregressive=False,
            done=done,
            content=self.content(),
            layout=self.order.parallel(self.codes, self.stage),
            given=only(self.codes, self.stage),
            greedy=self.order.greedy,
        )

    def accept(self, sample: Tensor, log_prob: Tensor | None) -> None:
        self.codes = self.codes.clone()  # what was given out before stays as it was
        if self.made < self.frames:
            self.codes[self.made, 0] = sample[0, 0]
            self.made += 1
            return
        given = self.codes[:, self.stage]
        self.codes[:, self.stage] = torch.where(given == DRAWN, sample[:, self.stage], given)
        self.stage += 1

    def settled(self) -> Layout | None:
        if self.told == self.made:
            return None
        first, self.told = self.told, self.made
        return self.order.causal(self.codes[: self.made], first, 0)

    def content(self) -> Int[Tensor, "T K"]:
        return self.codes.clamp(min=0)

    def final(self) -> int:
        return self.frames if self.stage == self.num_codes else 0


def below(codes: Int[Tensor, "T K"], stage: int) -> Int[Tensor, "T K"]:
    """The sub-codes below a stage."""
    return torch.where(torch.arange(codes.shape[1]) < stage, codes, NONE)


def only(codes: Int[Tensor, "T K"], stage: int) -> Int[Tensor, "T K"]:
    """One sub-code of each frame."""
    return torch.where(torch.arange(codes.shape[1]) == stage, codes, NONE)
