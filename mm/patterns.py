"""Patterns: at which step each sub-code of each frame is written (Copet et al. 2023, MusicGen, section 2.2).

A frame has K sub-codes. Sub-code q of frame t is written at step stride·t + offset[q] + stride·T·late[q]. That one line covers
the patterns in use: `delay` (MusicGen; Moshi's 0, 1, 1, …), `parallel`, `flatten` and its partial form, and `coarse_first`,
where sub-code 0 of every frame comes before all others.

Letters in shapes: T frames, K sub-codes, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NONE = -1
"""Where no sub-code stands."""
MAX_DELAY = 1024
"""Steps that a sub-code may come after its frame's turn."""


@dataclass(frozen=True)
class Pattern:
    """The step of every sub-code. Raises `ValueError` for what is no pattern: numbers below 0, or a step with two frames' worth
    of one sub-code."""

    offset: tuple[int, ...]
    """Steps by which sub-code q comes after its frame's turn."""
    stride: int = 1
    """Steps from one frame to the next."""
    late: tuple[int, ...] = ()
    """Passes over all frames that come before the one with sub-code q; empty: none for any."""

    def __post_init__(self) -> None:
        if not self.late:
            object.__setattr__(self, "late", (0,) * len(self.offset))
        if not all(type(x) is int for x in (self.stride, *self.offset, *self.late)):
            raise ValueError(f"a pattern is made of whole numbers, got {self}")
        if not self.offset or len(self.late) != len(self.offset):
            raise ValueError(
                f"a pattern gives every sub-code an offset and a pass; got {len(self.offset)} offsets and {len(self.late)} passes"
            )
        if self.stride < 1 or not all(0 <= x <= MAX_DELAY for x in (*self.offset, *self.late)):
            raise ValueError(
                f"a pattern needs a stride >= 1, and offsets and passes from 0 to {MAX_DELAY}; got {self.stride}, "
                f"{self.offset}, {self.late}"
            )
        if any(late and offset for late, offset in zip(self.late, self.offset, strict=True)):
            raise ValueError(f"a sub-code of a later pass can't be delayed too; got {self.offset} and {self.late}")

    # --- the patterns in use ------------------------------------------------------------------------------------------

    @classmethod
    def delay(cls, delays: Sequence[int]) -> Pattern:
        """Sub-code q is `delays[q]` steps late: T + max(delays) steps. MusicGen: 0, 1, …, K − 1; Moshi: 0, 1, 1, …"""
        return cls(tuple(delays))

    @classmethod
    def parallel(cls, num_codes: int) -> Pattern:
        """A frame a step: T steps."""
        return cls((0,) * num_codes)

    @classmethod
    def flatten(cls, groups: Sequence[int]) -> Pattern:
        """Frame by frame, group after group: 0, 1, …, K − 1 has a sub-code a step (K·T steps), 0, 1, 1, 1 two steps a frame."""
        if not groups or sorted(set(groups)) != list(range(len(set(groups)))):
            raise ValueError(f"groups of sub-codes are numbered from 0 without gaps, got {tuple(groups)}")
        return cls(tuple(groups), stride=max(groups) + 1)

    @classmethod
    def coarse_first(cls, num_codes: int) -> Pattern:
        """Sub-code 0 of all frames, then the others of a frame together: 2·T steps (T where there is one sub-code)."""
        return cls((0,) * num_codes, late=(0,) + (1,) * (num_codes - 1))

    # --- what follows -------------------------------------------------------------------------------------------------

    @property
    def num_codes(self) -> int:
        return len(self.offset)

    def steps(self, frames: int) -> int:
        """Steps that `frames` frames take."""
        return int(self.when(frames).max()) + 1 if frames else 0

    @lru_cache(maxsize=64)  # noqa: B019 - patterns are few and small; a session asks at every step
    def when(self, frames: int) -> Int[Tensor, "T K"]:
        """The step of every sub-code; not to be written to."""
        offset = torch.tensor(self.offset) + self.stride * frames * torch.tensor(self.late)
        return self.stride * torch.arange(frames)[:, None] + offset

    @lru_cache(maxsize=64)  # noqa: B019
    def frame(self, frames: int) -> Float[Tensor, " S"]:
        """How far each step has come, in frames: 0 … T in every pass; not to be written to."""
        step = torch.arange(self.steps(frames)).float() / self.stride
        return step % frames if max(self.late) else step

    def layout(self, frames: int) -> list[list[tuple[int, int]]]:
        """(frame, sub-code) of what each step writes."""
        out: list[list[tuple[int, int]]] = [[] for _ in range(self.steps(frames))]
        for t, row in enumerate(self.when(frames).tolist()):
            for q, step in enumerate(row):
                out[step].append((t, q))
        return out

    def build(self, codes: Int[Tensor, "T K"], fill: int = NONE) -> Int[Tensor, "S K"]:
        """What each step writes, `fill` where nothing stands."""
        self._check(codes)
        out = codes.new_full((self.steps(len(codes)), self.num_codes), fill)
        return out.scatter_(0, self.when(len(codes)).to(codes.device), codes)

    def revert(self, steps: Int[Tensor, "S K"], frames: int) -> Int[Tensor, "T K"]:
        """The frames that `steps` write; the inverse of `build`."""
        self._check(steps)
        if len(steps) != self.steps(frames):
            raise ValueError(f"{frames} frames of this pattern take {self.steps(frames)} steps, got {len(steps)}")
        return steps.gather(0, self.when(frames).to(steps.device))

    def holds(self, frames: int) -> Bool[Tensor, "S K"]:
        """Which sub-codes each step writes."""
        return self.build(torch.zeros(frames, self.num_codes, dtype=torch.int64)) >= 0

    def _check(self, codes: Tensor) -> None:
        if codes.ndim != 2 or codes.shape[1] != self.num_codes:
            raise ValueError(
                f"this pattern is of {self.num_codes} sub-codes, got codes of shape {tuple(codes.shape)}; give it (frames, "
                f"{self.num_codes})"
            )
