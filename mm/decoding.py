"""One new position a row on the CPU: what text generation does most, with as little around the matrix products as can be.

At batch 1 a product of a vector and a matrix takes as long as reading the matrix, and everything else a step does (module
calls, views, fresh tensors) costs as much again in a small model. `SingleStep` is the arithmetic of `Backbone.forward` for
that one case, bound to the weights and the cache once, written into buffers that stay. `tests/test_decoding.py` holds it to
the backbone; whatever it does not cover (`fits`) takes the general path.

Letters in shapes: R rows, W width, H query heads, G key/value heads, E head width, S slots of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.backbone import Attention, Backbone, Block, RMSNorm
from mm.cache import KVCache


@dataclass(frozen=True)
class _Layer:
    """The weights of a block as the step wants them: matrices transposed (views), norm weights twice in a row."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class SingleStep:
    """Evaluates one position in each of R neighbouring rows of a cache; writes its keys and values there.

    Call it under `torch.inference_mode()`; the caller then counts the position (`KVCache.commit`).
    """

    def __init__(self, backbone: Backbone, cache: KVCache) -> None:
        self.config, self.cache = backbone.config, cache
        blocks = cast(list[Block], list(backbone.blocks))
        self.layers = [
            _Layer(
                attention_norm=_twice(block.attention_norm),
                qkv=block.attention.qkv.weight.t(),
                qkv_bias=block.attention.qkv.bias,
                qk_norm=_head_norms(block.attention),
                out=block.attention.out.weight.t(),
                mlp_norm=_twice(block.mlp_norm),
                gate_up=block.mlp.gate_up.weight.t(),
                down=block.mlp.down.weight.t(),
            )
            for block in blocks
        ]
        self.norm = _twice(backbone.norm)
        # cos is even and sin is odd: one table of angles, its first half negated, gives both factors of `apply_rotary`
        self.axis = backbone.rotary.axis.repeat(2)
        self.frequency = torch.cat((-backbone.rotary.frequency, backbone.rotary.frequency))
        self.slots = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in zip(cache.keys, cache.values, strict=True)]
        self.rows = 0

    @staticmethod
    def fits(backbone: Backbone) -> bool:
        """Whether this class computes what the backbone would: a plain float32 decoder on the CPU, nothing hooked, wrapped or
        compiled (`backbone.compile()`: then the general path is the faster one)."""
        linear = (
            part
            for b in cast(list[Block], list(backbone.blocks))
            for part in (b.attention.qkv, b.attention.out, b.mlp.gate_up, b.mlp.down)
        )
        return (
            backbone.norm.weight.device.type == "cpu"
            and backbone._compiled_call_impl is None
            and not backbone.config.adaln
            and all(type(part) is nn.Linear and part.weight.dtype == torch.float32 for part in linear)
            and not any(part._forward_hooks or part._forward_pre_hooks for part in backbone.modules())
        )

    def _allocate(self, rows: int) -> None:
        c, self.rows = self.config, rows
        self.both = torch.empty(rows, 2 * c.width)
        self.x, self.mirror = self.both.chunk(2, dim=-1)  # the residual stream, and its negative
        self.qkv = torch.empty(rows, (c.heads + 2 * c.kv_heads) * c.head_dim)
        heads = self.qkv.view(rows, -1, c.head_dim)
        self.qk, self.v = heads.split((c.heads + c.kv_heads, c.kv_heads), dim=1)
        self.rotated = torch.empty(rows, c.heads + c.kv_heads, c.head_dim)
        self.k = self.rotated[:, c.heads :]
        # query heads that share a key head stand as several queries, which spares the grouped-query path of SDPA
        self.q = self.rotated[:, : c.heads].unflatten(1, (c.kv_heads, -1))
        self.gate_up = torch.empty(rows, 2 * c.hidden)
        self.gate, self.up = self.gate_up.chunk(2, dim=-1)

    def __call__(
        self,
        x: Float[Tensor, "R W"],
        position: Float[Tensor, "R 3"],
        first: int,
        every: Float[Tensor, "R W"] | None = None,
    ) -> Float[Tensor, "R W"]:
        """Hidden state of the next position of cache rows `first`, `first` + 1, …; `every` is added to each block's input."""
        rows, cache = len(x), self.cache
        if rows != self.rows:
            self._allocate(rows)
        lengths = cache.lengths[first : first + rows]
        count = max(lengths) + 1
        slots = torch.tensor([(first + n) * cache.capacity + length for n, length in enumerate(lengths)])
        mask = None
        if min(lengths) + 1 != count:
            mask = (torch.arange(count) <= torch.tensor(lengths)[:, None])[:, None, None]
        angle = position[:, self.axis] * self.frequency
        # `apply_rotary` as a matrix a row, for one operation a layer: cos on the diagonal, sin half a head away from it
        rotation = torch.diag_embed(angle.cos()) + torch.diag_embed(angle.sin()).roll(self.config.head_dim // 2, 1)
        keys, values = (
            past[:, first : first + rows, :count].transpose(2, 3).unbind(0) for past in (cache.keys, cache.values)
        )
        self.x.copy_(x)
        for layer, (all_keys, all_values), key, value in zip(self.layers, self.slots, keys, values, strict=True):
            if every is not None:
                self.x.add_(every)
            h = self._normed(layer.attention_norm)
            if layer.qkv_bias is None:
                torch.mm(h, layer.qkv, out=self.qkv)
            else:
                torch.addmm(layer.qkv_bias, h, layer.qkv, out=self.qkv)
            if layer.qk_norm is not None:
                self.qk.copy_(F.rms_norm(self.qk, (self.config.head_dim,), None, self.config.norm_eps)).mul_(
                    layer.qk_norm
                )
            torch.bmm(self.qk, rotation, out=self.rotated)
            all_keys.index_copy_(0, slots, self.k)
            all_values.index_copy_(0, slots, self.v)
            seen = F.scaled_dot_product_attention(self.q, key, value, attn_mask=mask)
            self.x.addmm_(seen.reshape(rows, -1), layer.out)
            torch.mm(self._normed(layer.mlp_norm), layer.gate_up, out=self.gate_up)
            self.x.addmm_(F.silu(self.gate, inplace=True).mul_(self.up), layer.down)
        return self._normed(self.norm)

    def _normed(self, weight: Float[Tensor, " W2"]) -> Float[Tensor, "R W"]:
        """RMSNorm as the layer norm of [x, −x]: its mean is 0 and its variance the mean square of x, and PyTorch has a fused
        layer norm on the CPU, but no RMS norm (five operations)."""
        torch.neg(self.x, out=self.mirror)
        return F.layer_norm(self.both, weight.shape, weight, None, self.config.norm_eps)[:, : self.config.width]


def _twice(norm: RMSNorm) -> Tensor:
    return norm.weight.repeat(2)


def _head_norms(attention: Attention) -> Float[Tensor, "N E"] | None:
    """Weights of the query and the key norm, one row a head (queries, then keys)."""
    if attention.q_norm is None or attention.k_norm is None:
        return None
    return torch.cat(
        (attention.q_norm.weight.expand(attention.heads, -1), attention.k_norm.weight.expand(attention.kv_heads, -1))
    )
