"""What the heads of vectors share."""

from __future__ import annotations

from torch import nn

from mm.interfaces import Spec


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
