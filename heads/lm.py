"""The language-model head: logits over one modality's range of ids, or over K sub-codebooks at once (ELM, residual audio codes).

Letters in shapes: n positions, W width, V ids of the range, K sub-codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.heads._draws import sample_logits, truncate
from mm.interfaces import Draw, Head, Spec


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


__all__ = ["LMHead", "sample_logits", "truncate"]
