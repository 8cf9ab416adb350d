"""The depth head: a small causal transformer over the K sub-codes of one step, given the backbone's hidden state (RQ-Transformer;
Moshi, Défossez et al. 2024, section 3.4.1; CSM). Side by side, as in `mm.heads.lm`, sub-codes of a step are independent of each
other; here each depends on those before it.

Step q reads the hidden state, which step it is, and sub-code q − 1 (a vector of its own stands for none), and predicts sub-code
q. Tables and output maps are a step's own; the layers are shared (Moshi's are a step's own, too).

Letters in shapes: n positions, W backbone width, D width of the head, K sub-codes, L of them, V ids of a sub-code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mm.heads._draws import sample_logits
from mm.interfaces import DRAWN, Draw, Head, Spec

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of the steps before, a layer."""


class DepthHead(Head):
    """Learns and samples sub-codes one after another.

    Args:
        layers: its layers.
        width: width inside the head; 0 = the backbone's.
        heads: attention heads.
        subset: share of the positions whose sub-codes after the first are learned, drawn anew for each batch (CSM: 1/16). Their
            loss is scaled up, so that its mean stays what it is over all. Evaluation takes all.
        first: share of the first sub-code in a position's loss; the others have the rest in equal parts. CSM adds the loss of
            the first and the mean of the others: 0.5 is half of that. None: all in equal parts, one of K each.
    """

    def __init__(
        self, layers: int = 2, width: int = 0, heads: int = 4, subset: float = 1.0, first: float | None = None
    ) -> None:
        super().__init__()
        if layers < 1 or width < 0 or heads < 1 or width % heads:
            raise ValueError(
                f"a depth head needs layers and heads >= 1 and a width that divides into its heads (0: the backbone's), got "
                f"{layers}, {heads} and {width}"
            )
        if not 0 < subset <= 1:
            raise ValueError(f"subset is a share of the positions, above 0 and up to 1; got {subset}")
        if first is not None and not 0 < first < 1:
            raise ValueError(f"first is a share of the loss between 0 and 1, or None; got {first}")
        self.layers, self.width, self.heads, self.subset, self.first = layers, width, heads, subset, first

    def build(self, *, width: int, spec: Spec, controls: int = 0) -> None:
        if spec.kind != "codes" or controls:
            raise ValueError(
                f"a depth head predicts sub-codes, but this tokenizer is {spec.kind}; give it an LMHead, or a tokenizer of "
                "several codes an element"
            )
        own = self.width or width
        if own % self.heads:
            raise ValueError(f"the depth head's width {own} doesn't divide into {self.heads} heads; set its width")
        self.num_codes, self.vocab = spec.num_codes, spec.vocab_size
        self.enter = nn.Linear(width, own, bias=False)
        self.step = nn.Parameter(torch.empty(self.num_codes, own))
        self.embedding = nn.Embedding((self.num_codes - 1) * (self.vocab + 1), own)
        self.blocks = nn.ModuleList(Block(own, self.heads) for _ in range(self.layers))
        self.norm = nn.RMSNorm(own, eps=1e-6)
        self.out = nn.Parameter(torch.empty(self.num_codes, self.vocab, own))
        for weight in (self.step, self.embedding.weight, self.out):
            nn.init.normal_(weight, std=0.02)

    def _embed(self, codes: Int[Tensor, "n L"], first: int = 0) -> Float[Tensor, "n L D"]:
        """Sub-codes `first`, `first` + 1, …; −1 = none."""
        table = first + torch.arange(codes.shape[1], device=codes.device)
        return self.embedding(codes + 1 + table * (self.vocab + 1))

    def _run(self, x: Float[Tensor, "n L D"], past: Past | None = None) -> Float[Tensor, "n L D"]:
        for number, block in enumerate(self.blocks):
            x = block(x, number, past)
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "n W"], codes: Int[Tensor, "n L"]) -> Float[Tensor, "n L V"]:
        """Of the first L sub-codes, each given the true ones before it."""
        length = codes.shape[1]
        before = F.pad(self._embed(codes[:, :-1]), (0, 0, 1, 0))
        x = self._run(self.enter(hidden)[:, None] + self.step[:length] + before)
        return torch.einsum("nld,lvd->nlv", x, self.out[:length].to(x.dtype))

    def _losses(self, hidden: Float[Tensor, "n W"], target: Int[Tensor, "n L"]) -> Float[Tensor, "n L"]:
        logits = self.logits(hidden, target).float()
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none", ignore_index=-1).view_as(
            target
        )

    def loss(self, hidden: Float[Tensor, "n W"], target: Int[Tensor, "n K"]) -> Float[Tensor, " n"]:
        count = len(target)
        chosen = max(1, round(self.subset * count))
        if not self.training or chosen >= count or self.num_codes == 1:
            losses = self._losses(hidden, target)
        else:
            some = torch.randperm(count)[:chosen].to(target.device)
            rest = self._losses(hidden[some], target[some])[:, 1:] * (count / chosen)
            empty = rest.new_zeros(count, self.num_codes - 1)
            losses = torch.cat((self._losses(hidden, target[:, :1]), empty.index_copy(0, some, rest)), 1)
        share = self._shares(target >= 0)
        return (share * losses).sum(-1) / share.sum(-1).clamp(min=1e-9)

    def _shares(self, stands: Bool[Tensor, "n K"]) -> Float[Tensor, "n K"]:
        """How much each sub-code counts, up to a factor; what doesn't stand there counts nothing."""
        share = stands.float()
        if self.first is None:
            return share
        rest = share[:, 1:]
        return torch.cat((self.first * share[:, :1], (1 - self.first) * rest / rest.sum(-1, True).clamp(min=1)), 1)

    @torch.no_grad()
    def sample(
        self, hidden: Float[Tensor, "n W"], draws: Sequence[Draw]
    ) -> list[tuple[Tensor, Float[Tensor, " m"] | None]]:
        """Sub-codes one after another; a guided row's twins are fed what it drew. Given ones (`Draw.given`) are not drawn."""
        condition, past = self.enter(hidden), Past()
        codes = torch.full((len(hidden), self.num_codes), -1, device=hidden.device)
        made = [torch.zeros(draw.rows.stop - draw.rows.start) for draw in draws]
        for q in range(self.num_codes):
            x = condition[:, None] + self.step[q]
            if q:
                x = x + self._embed(codes[:, q - 1 : q], q - 1)
            logits = F.linear(self._run(x, past)[:, 0], self.out[q].to(x.dtype)).float()
            for number, draw in enumerate(draws):
                drawn, log_prob = sample_logits(draw.guided(logits), draw.sampling, draw.generator)
                if draw.given is not None:
                    asked = draw.given[:, q] == DRAWN
                    drawn, log_prob = torch.where(asked, drawn, draw.given[:, q]), torch.where(asked, log_prob, 0.0)
                made[number] = made[number] + log_prob
                for rows in (draw.rows, draw.unconditional, draw.context):
                    if rows is not None:
                        codes[rows, q] = drawn.to(codes.device)
        codes = codes.cpu()
        return [(codes[draw.rows], log_prob) for draw, log_prob in zip(draws, made, strict=True)]


class Block(nn.Module):
    """Attention to the steps before, and a SwiGLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, hidden = heads, 32 * -(-8 * width // 96)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.attended = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)
        for linear in (self.qkv, self.attended, self.gate_up, self.down):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x: Float[Tensor, "n L D"], layer: int, past: Past | None) -> Float[Tensor, "n L D"]:
        """`past` grows by the keys and values of this call."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
        if past is not None:
            if layer < len(past):
                k, v = torch.cat((past[layer][0], k), 2), torch.cat((past[layer][1], v), 2)
                past[layer] = (k, v)
            else:
                past.append((k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        x = x + self.attended(seen.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)
