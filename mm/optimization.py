"""The optimizer and the learning-rate schedule that tokenizers and models are trained with."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch


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
) -> dict[str, Any]:
    """AdamW over the trained parameters (matrices and kernels decay, vectors do not) with warm-up and cosine, as
    Lightning's `configure_optimizers` returns it."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
    rate = functools.partial(warmup_cosine, warmup=warmup, total=total, floor=floor)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
