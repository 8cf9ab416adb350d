"""What the heads of vectors share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm.interfaces import Draw, Spec


def guided(made: Float[Tensor, "n D"], draw: Draw) -> Float[Tensor, "m D"]:
    """The rows of a draw, u + scale·(c − u) where it has unconditional ones."""
    if draw.unconditional is None or draw.scale == 1.0:
        return made[draw.rows]
    return torch.lerp(made[draw.unconditional], made[draw.rows], draw.scale)


def mlp(width: int, out: int, layers: int) -> nn.Sequential:
    """`layers` linear maps with SiLU between them."""
    inside = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), nn.SiLU())]
    return nn.Sequential(*inside, nn.Linear(width, out))


def check_continuous(name: str, spec: Spec, controls: int) -> None:
    """Raises `ValueError` for tokens that are no vectors."""
    if spec.kind != "continuous":
        raise ValueError(f"a {name} head predicts vectors, but this tokenizer is {spec.kind}; give it an LMHead")
    if controls:
        raise ValueError("the host modality must be discrete: its head also predicts the control tokens")
