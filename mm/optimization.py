"""The optimizer and the learning-rate schedule that tokenizers and models are trained with."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch

from mm.muon import Muon


def warmup_cosine(step: int, *, warmup: int, total: int, floor: float) -> float:
    """Factor of the learning rate: linear over `warmup` steps, then a cosine from 1 to `floor` at step `total`
    (Loshchilov and Hutter 2017)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_and_schedule(
    parameters: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    warmup: int,
    total: int,
    floor: float,
    matrices: Iterable[tuple[torch.Tensor, tuple[int, ...]]] = (),
) -> dict[str, Any]:
    """AdamW over the trained parameters (matrices and kernels decay, vectors do not) with warm-up and cosine, as
    Lightning's `configure_optimizers` returns it. `matrices` names parameters that take Muon's step instead, each with the
    heights of the blocks it is made of."""
    trained = [p for p in parameters if p.requires_grad]
    blocks = {p: rows for p, rows in matrices if p.requires_grad}
    rest: list[torch.Tensor] = [p for p in trained if p not in blocks]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    for kind in dict.fromkeys((tuple(p.shape), rows) for p, rows in blocks.items()):
        same = [p for p, rows in blocks.items() if (tuple(p.shape), rows) == kind]
        groups.append({"params": same, "weight_decay": weight_decay, "rows": kind[1]})
    kind_of = Muon if blocks else torch.optim.AdamW
    optimizer = kind_of([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
    # Fused AdamW offers to undo float16's loss scaling itself, and Lightning then refuses to clip gradients in mixed
    # precision. Without the offer the scaling is undone before the clipping; nothing else changes.
    optimizer._step_supports_amp_scaling = False
    rate = functools.partial(warmup_cosine, warmup=warmup, total=total, floor=floor)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
