"""Muon (Jordan et al. 2024) for the matrices inside the backbone, AdamW for everything else, as one optimizer.

Muon replaces the momentum of a matrix by the nearest orthogonal matrix, so that rare directions of the gradient move as
far as common ones: what is seen seldom is learned sooner. `torch.optim.Muon` takes no blocks, and always computes in
bfloat16, which a CPU without units for it does fifty times slower than float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from mm.runtime import fast_bfloat16

# Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", quintic coefficients.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor U·Vᵀ of each matrix U·S·Vᵀ, roughly (singular values end within about 0.7 to 1.2), by
    Newton–Schulz iteration: in bfloat16 where the device is fast at it, else in float32. `matrices` is (batch, rows,
    columns)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x.to(torch.bfloat16 if x.is_cuda or fast_bfloat16() else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, except in groups that have `rows`: their parameters are matrices and take Muon's step.

    `rows` are the heights of the blocks that such a matrix is made of (query, key and value in one matrix are three
    blocks); each block is made orthogonal by itself. The step is scaled by 0.2·√max(rows, columns) (Liu et al. 2025, "Muon
    is scalable for LLM training", section 2.2), so that learning rate and weight decay mean what they mean for AdamW.
    """

    def __init__(self, params: Any, *, momentum: float = 0.95, **adamw: Any) -> None:
        super().__init__(params, **adamw)
        self.momentum = momentum
        for group in self.param_groups:
            for p in group["params"] if "rows" in group else ():
                if p.ndim != 2 or sum(group["rows"]) != p.shape[0]:
                    raise ValueError(
                        f"Muon takes matrices of {sum(group['rows'])} rows here, got a parameter of shape {tuple(p.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        everything = self.param_groups
        self.param_groups = [g for g in everything if "rows" not in g]
        try:
            super().step()
        finally:
            self.param_groups = everything
        for group in everything:
            if "rows" in group:
                self._orthogonal_step(group)
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        params = [p for p in cast("list[Tensor]", group["params"]) if p.grad is not None]
        if not params:
            return
        gradients = [cast(Tensor, p.grad) for p in params]
        buffers = []
        for p in params:
            state = self.state[p]
            if not state:
                # AdamW's loading code expects every state to count its steps.
                state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(p)
            state["step"] += 1
            buffers.append(state["momentum"])
        torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
        nesterov = torch.stack(torch._foreach_lerp(gradients, buffers, self.momentum))
        blocks = nesterov.split(list(group["rows"]), dim=1)
        # Blocks of one shape are one batch.
        update = torch.empty_like(nesterov)
        start = 0
        for size, rows in _runs(group["rows"]):
            height = size * rows
            block = torch.stack(blocks[start : start + size], dim=1).flatten(0, 1)
            scale = 0.2 * max(block.shape[-2:]) ** 0.5
            orthogonal = orthogonalize(block) * scale
            offset = sum(group["rows"][:start])
            update[:, offset : offset + height] = orthogonal.reshape(len(params), height, -1)
            start += size
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(update.unbind(0)), alpha=-float(group["lr"]))


def _runs(rows: tuple[int, ...]) -> list[tuple[int, int]]:
    """(how many, height) for each run of equal heights."""
    runs: list[tuple[int, int]] = []
    for height in rows:
        if runs and runs[-1][1] == height:
            runs[-1] = (runs[-1][0] + 1, height)
        else:
            runs.append((1, height))
    return runs
