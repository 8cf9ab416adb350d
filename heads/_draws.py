"""Ids drawn from logits: what heads of ids share.

Letters in shapes: n positions, V ids.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mm.interfaces import Sampling


def sample_logits(
    logits: Float[Tensor, "*n V"], sampling: Sampling, generator: torch.Generator
) -> tuple[Tensor, Float[Tensor, " n"]]:
    """Ids drawn with temperature, then top-k, then top-p; and log p of each at temperature 1 (summed over sub-codes).

    Randomness comes from the CPU generator whatever the device, so that a seed means one thing everywhere. Raises
    `ValueError` for logits that are not numbers.
    """
    shape = logits.shape[:-1]
    flat = logits.reshape(-1, logits.shape[-1])
    if sampling.temperature == 0:
        chosen = flat.argmax(-1)
    else:
        chosen = _categorical(truncate(flat / sampling.temperature, sampling.top_k, sampling.top_p), generator)
    log_prob = flat.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    log_prob = log_prob.view(shape[0], -1).sum(-1)
    if log_prob.isnan().any():
        raise ValueError("the logits are not numbers (NaN): the weights are damaged, or overflow in this precision")
    return chosen.view(shape).cpu(), log_prob.cpu()


def truncate(logits: Float[Tensor, "n V"], top_k: int, top_p: float) -> Float[Tensor, "n V"]:
    """−inf outside the k likeliest ids, then outside the smallest set whose probability reaches p (which is never empty)."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1)
        outside = mass.cumsum(-1) - mass >= top_p
        logits = logits.masked_fill(outside.scatter(-1, places, outside), float("-inf"))
    return logits


def _categorical(logits: Float[Tensor, "n V"], generator: torch.Generator) -> Tensor:
    """One draw a row by inverting the cumulative distribution: one uniform number a row, and small differences between
    batched and single arithmetic almost never move a draw."""
    mass = logits.double().softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(mass.device)
    place = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
    last = (logits > float("-inf")).long().cumsum(-1).argmax(-1, keepdim=True)  # never a forbidden id by rounding
    return torch.minimum(place, last)[:, 0]
