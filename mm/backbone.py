"""The backbone: a Llama-shaped decoder over packed positions. Whole before parts.

What it has: RMSNorm, rotary embedding over three explicit coordinates, grouped-query heads, SwiGLU, optional query/key
norm (Qwen3), optional q/k/v bias (Qwen2), optional per-token AdaLN time (DiT, ARDiT), activation checkpointing. What it
does not have: embeddings, heads, masks, caches. It gets vectors and an attention plan, and gives vectors.

Letters in shapes: T packed positions, W width, H query heads, G key/value heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm.attention import AttentionPlan
from mm.fused import rms_norm


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    width: int = 256
    """Width of the residual stream."""
    layers: int = 6
    """Number of blocks."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 0
    """Key/value heads (grouped-query attention); 0 = as many as query heads."""
    head_dim: int = 0
    """Width of a head; 0 = width / heads."""
    hidden: int = 0
    """Width inside the SwiGLU; 0 = 8/3 width rounded up to a multiple of 32."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before rotary (Qwen3)."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    adaln: bool = False
    """Shift, scale and gate every block by the position's diffusion time (AdaLN-zero)."""
    dropout: float = 0.0
    """Dropout on what each attention and MLP adds to the residual stream."""
    checkpointing: bool = False
    """Recompute block activations in the backward pass (less memory, about a third more time)."""

    def __post_init__(self) -> None:
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if not self.head_dim:
            if self.width % self.heads:
                raise ValueError(
                    f"width {self.width} does not divide into {self.heads} heads; change one or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if not self.hidden:
            object.__setattr__(self, "hidden", 32 * math.ceil(self.width * 8 / 3 / 32))
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads; use a divisor")
        if self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, got {self.head_dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class Backbone(nn.Module):
    """Blocks and a final norm: vectors in, vectors out, at T packed positions."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = Rotary(config.head_dim, config.rope_theta)
        self.time = TimeEmbedding(config.width) if config.adaln else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal(0, 0.02); what writes to the residual stream is divided by √(2·layers) (GPT-2); AdaLN starts at zero."""
        for name, parameter in self.named_parameters():
            if "modulation" in name or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02)

    def matrices(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The weight matrices inside the blocks, each with the heights of the maps it is made of (for Muon)."""
        query, key = self.config.heads * self.config.head_dim, self.config.kv_heads * self.config.head_dim
        for block in cast("Iterable[Block]", self.blocks):
            yield block.attention.qkv.weight, (query, key, key)
            yield block.attention.out.weight, (self.config.width,)
            yield block.mlp.gate_up.weight, (self.config.hidden, self.config.hidden)
            yield block.mlp.down.weight, (self.config.width,)

    def forward(
        self,
        x: Float[Tensor, "T W"],
        position: Float[Tensor, "T 3"],
        plan: AttentionPlan,
        time: Float[Tensor, " T"] | None = None,
        inject: Mapping[int, tuple[Float[Tensor, "C W"], Int[Tensor, " C"]]] | None = None,
    ) -> Float[Tensor, "T W"]:
        """`time` is needed with AdaLN; `inject[layer]` = (vectors, indices) added to the input of that block."""
        rope = self.rotary(position, x.dtype)
        modulation = None
        if self.time is not None:
            if time is None:
                raise ValueError("this backbone has AdaLN time; pass the time of every position (0 = clean)")
            modulation = F.silu(self.time(time).to(x.dtype))
        for layer, block in enumerate(self.blocks):
            if inject and layer in inject:
                values, index = inject[layer]
                x = x.index_add(0, index, values.to(x.dtype))
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, rope, plan, modulation, use_reentrant=False)
            else:
                x = block(x, rope, plan, modulation)
        return self.norm(x)


class Block(nn.Module):
    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)
        self.modulation = nn.Linear(config.width, 6 * config.width) if config.adaln else None
        self.dropout = config.dropout

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, modulation: Tensor | None) -> Tensor:
        if self.modulation is None or modulation is None:
            x = x + self.drop(self.attention(self.attention_norm(x), rope, plan))
            return x + self.drop(self.mlp(self.mlp_norm(x)))
        # AdaLN-zero (DiT, section 3.2): y = (1 + scale)·norm(x) + shift, and a gate on what each branch adds. The gates are
        # 1 + learned here, so that a backbone loaded from a language model starts as that language model.
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(modulation).chunk(6, dim=-1)
        h = torch.addcmul(shift1, self.attention_norm(x), 1 + scale1)
        x = torch.addcmul(x, self.drop(self.attention(h, rope, plan)), 1 + gate1)
        h = torch.addcmul(shift2, self.mlp_norm(x), 1 + scale2)
        return torch.addcmul(x, self.drop(self.mlp(h)), 1 + gate2)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class Attention(nn.Module):
    """Grouped-query attention. Query, key and value weights are one matrix (rows: queries, keys, values)."""

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, config.heads, config.kv_heads, config.head_dim
        self.qkv = wide_linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_dim, config.qkv_bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan) -> Tensor:
        qkv = self.qkv(x).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            q, k = apply_rotary(self.q_norm(q), rope), apply_rotary(self.k_norm(k), rope)
        else:  # queries and keys stand side by side, so one rotation serves both
            qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
            q, k = apply_rotary(qk, rope).split((self.heads, self.kv_heads), dim=1)
        return self.out(plan(self.layer, q, k, v).flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)); gate and up are one matrix (rows: gate, up)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.gate_up = wide_linear(config.width, 2 * config.hidden)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def wide_linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """A linear map to more features than it gets, its weight (outputs, inputs) stored column by column: on the CPU a product
    with few positions then streams long stretches of memory, 1.2 to 1.6 times as fast; with many positions nothing changes."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    return linear


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight, over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Float32Buffers(nn.Module):
    """Keeps its buffers in float32 whatever the model is cast to: a rounded frequency is a wrong angle far out."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class Rotary(Float32Buffers):
    """Rotary angles from three coordinates. Frequency f turns with axis f mod 3 (time, row, column), so every axis gets
    fast and slow frequencies; where the three coordinates are equal this is the one-dimensional embedding of Llama."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        half = torch.arange(0, head_dim, 2, dtype=torch.float32)
        self.register_buffer("frequency", 1.0 / (theta ** (half / head_dim)))
        self.register_buffer("axis", torch.arange(head_dim // 2) % 3, persistent=False)
        self.frequency: Tensor
        self.axis: Tensor

    def forward(self, position: Float[Tensor, "T 3"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin) of shape (T, 1, E); the first half of sin is negated, as `apply_rotary` wants it."""
        angle = position.float()[:, self.axis] * self.frequency  # float32: fractional positions need it
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)


def apply_rotary(x: Float[Tensor, "T N E"], rope: tuple[Tensor, Tensor]) -> Float[Tensor, "T N E"]:
    """Rotate the pairs (i, i + E/2), the pairing of the `transformers` checkpoints."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class TimeEmbedding(Float32Buffers):
    """Diffusion time → vector: sinusoid of 1000·t, then a two-layer network (DiT)."""

    def __init__(self, width: int, features: int = 256) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(features, width), nn.Linear(width, width)
        steps = torch.arange(features // 2, dtype=torch.float32)
        self.register_buffer("frequency", torch.exp(-math.log(10000.0) * steps / (features // 2)), persistent=False)
        self.frequency: Tensor

    def forward(self, time: Float[Tensor, " T"]) -> Float[Tensor, "T W"]:
        angle = 1000.0 * time.float()[:, None] * self.frequency
        features = torch.cat((angle.cos(), angle.sin()), -1).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(features)))
