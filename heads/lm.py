"""The language-model head: logits over one modality's range of ids, or over K sub-codebooks at once (ELM, residual audio codes).

Letters in shapes: n positions, W width, V ids of the range, K sub-codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.interfaces import Draw, Head, Sampling, Spec


class LMHead(Head):
    """One linear map to the range's logits; K of them side by side for sub-codes, drawn independently (ELM, section 3).

    `z_loss` adds z_loss·(log Σ exp logits)² (PaLM, Chameleon); `label_smoothing` as in `cross_entropy`.
    """

    weight: nn.Parameter

    def __init__(self, z_loss: float = 0.0, label_smoothing: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        self.z_loss, self.label_smoothing, self.use_bias = z_loss, label_smoothing, bias
        self.num_codes, self.vocab, self.sub_codes = 1, 0, False

    def build(self, *, width: int, spec: Spec, controls: int = 0) -> None:
        if spec.kind == "continuous":
            raise ValueError(
                "LMHead predicts ids, but this tokenizer is continuous; give the modality a continuous head"
            )
        if controls and spec.kind != "discrete":
            raise ValueError("the host modality must be discrete: its head also predicts the control tokens")
        self.sub_codes = spec.kind == "codes"
        self.num_codes = spec.num_codes if self.sub_codes else 1
        self.vocab = spec.vocab_size + controls
        # stored column by column, as `mm.backbone.wide_linear` explains
        self.weight = nn.Parameter(torch.empty(width, self.num_codes * self.vocab).t())
        nn.init.normal_(self.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(self.num_codes * self.vocab)) if self.use_bias else None

    def logits(self, hidden: Float[Tensor, "n W"]) -> Tensor:
        """(n, V), or (n, K, V) with sub-codes."""
        out = F.linear(hidden, self.weight, self.bias)
        return out.unflatten(-1, (self.num_codes, self.vocab)) if self.sub_codes else out

    def loss(self, hidden: Float[Tensor, "n W"], target: Tensor) -> Float[Tensor, " n"]:
        logits = self.logits(hidden).float()
        flat, wanted = logits.reshape(-1, self.vocab), target.reshape(-1)
        loss = F.cross_entropy(flat, wanted, reduction="none", ignore_index=-1, label_smoothing=self.label_smoothing)
        if self.z_loss:
            loss = loss + self.z_loss * torch.where(wanted >= 0, torch.logsumexp(flat, -1).square(), 0.0)
        if not self.sub_codes:
            return loss
        valid = (target >= 0).sum(-1).clamp(min=1)
        return loss.view(-1, self.num_codes).sum(-1) / valid

    def sample(
        self, hidden: Float[Tensor, "n W"], draws: Sequence[Draw]
    ) -> list[tuple[Tensor, Float[Tensor, " m"] | None]]:
        logits = self.logits(hidden).float()
        out: list[tuple[Tensor, Tensor | None]] = []
        for draw in draws:
            own = draw.guided(logits)
            if draw.bias is not None:
                own = own + draw.bias
            out.append(sample_logits(own, draw.sampling, draw.generator))
        return out


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
