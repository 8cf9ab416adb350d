"""What xformers is asked on CUDA, checked without CUDA: its kernels accept every call by their own tests, and the call,
computed as its documentation defines it, is what SDPA computes here. `tests/gpu` runs the kernels themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.attention import Packed, xformers_bias
from mm.backbone import BackboneConfig
from mm.cache import Cached, Chunk, KVCache
from mm.stream import TokenStream, pack
from mm.testing import rule, stream

pytest.importorskip("xformers")

# reasons that this machine gives and CUDA would not
HERE = ("device=cpu", "bf16 is only supported on A100+")


def attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None) -> Tensor:
    """`memory_efficient_attention` by its documentation, after asking the kernels whether they would take the call."""
    from xformers.ops.fmha import cutlass, flash
    from xformers.ops.fmha.common import Inputs

    asked = Inputs(query=query, key=key, value=value, attn_bias=attn_bias)
    asked.validate_inputs()
    needs = [(flash.FwOp, cutlass.FwOp)]
    if query.requires_grad or key.requires_grad or value.requires_grad:
        needs.append((flash.BwOp, cutlass.BwOp))
    for kernels in needs:
        reasons = {
            kernel.NAME: [r for r in kernel.not_supported_reasons(asked) if not r.startswith(HERE)]
            for kernel in kernels
        }
        assert not all(reasons.values()), f"no kernel takes this call: {reasons}"
    assert all(x.shape[-1] * x.element_size() % 16 == 0 for x in (query, key, value))
    if query.ndim == 5:
        query, key, value = (x.flatten(2, 3) for x in (query, key, value))
    scores = torch.einsum("bqhe,bkhe->bhqk", query.float(), key.float()) / query.shape[-1] ** 0.5
    if attn_bias is not None:
        dense = attn_bias if isinstance(attn_bias, Tensor) else attn_bias.materialize(scores.shape[-2:])
        scores = scores + dense.float()
    out = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), value.float()).to(query.dtype)
    return out.reshape(*asked.query.shape[:-1], -1)


@pytest.fixture(autouse=True)
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", attention)


PACKS = {
    "causal": [stream(range(5)), stream(range(1)), stream(range(9))],
    "full": [stream([0] * 5), stream([0])],
    "mixed": [stream(range(3)), stream([0] * 6), stream([0, 1, 1, 1, 2])],
    "noisy": [stream([0, 1, 1, 1, 1], [0, 0, 0, 1, 1]), stream(range(6))],
}


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKS)
def test_packed(name: str, dtype: torch.dtype, heads: tuple[int, int], learn: bool) -> None:
    tokens = pack(PACKS[name])
    q, k, v = (torch.randn(len(tokens), h, 16).to(dtype).requires_grad_(learn) for h in (*heads, heads[1]))
    plain, plan = Packed(tokens), Packed(tokens)
    plan.bias = xformers_bias(tokens)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for layer in range(2):  # the second layer meets the bias as the first left it
        mine, reference = plan(layer, q, k, v), plain(layer, q, k, v)
        torch.testing.assert_close(mine, reference, **tolerance)
    if learn:
        weight = torch.randn_like(mine)
        grads = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (mine, reference)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=10 * tolerance["atol"], rtol=10 * tolerance["rtol"])


def as_on_cuda(plan: Cached) -> Cached:
    """The plan with the biases it would have on CUDA."""
    groups = []
    for group in plan.groups:
        starts = [plan.cache.lengths[row] for row in range(group.row, group.row + group.rows)]
        groups.append(replace(group, bias=plan._xformers(starts, group.count, group.keys, group.kind, group.mask)))
    plan.groups, plan.single = groups, groups[0] if len(groups) == 1 else None
    plan._sdpa = plan._cuda  # type: ignore[method-assign]
    return plan


PASSES = {
    "prompts": [Chunk(0, [2, 3, 4]), Chunk(1, [5, 6, 7]), Chunk(2, [1, 2, 3])],
    "one token": [Chunk(0, [2]), Chunk(1, [5]), Chunk(2, [1])],
    "pictures": [Chunk(0, [2] * 4), Chunk(1, [5] * 4), Chunk(2, [1] * 4)],
    "a closed picture": [Chunk(0, [2, 2, 3]), Chunk(1, [5, 5, 6])],
    "noisy blocks": [Chunk(1, [5] * 4, [1, 1, 2, 2], keep=False)],
    "different modes": [Chunk(0, [2]), Chunk(1, [5, 5, 5]), Chunk(2, [1, 2])],
}


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PASSES)
def test_cached(name: str, dtype: torch.dtype, heads: int) -> None:
    config = BackboneConfig(width=64, layers=1, heads=4, kv_heads=heads)
    cache = KVCache(config, 3, 16, "cpu", dtype)
    for x in (cache.keys, cache.values):
        x.copy_(torch.randn_like(x))
    cache.commit([Chunk(0, [0, 1]), Chunk(1, [0, 1, 2, 3, 4]), Chunk(2, [0])])
    chunks = PASSES[name]
    total = sum(len(chunk.order) for chunk in chunks)
    q, k, v = (torch.randn(total, h, 16).to(dtype) for h in (4, heads, heads))
    with torch.inference_mode():
        wanted = cache.plan(chunks)(0, q, k, v)
        mine = as_on_cuda(cache.plan(chunks))(0, q, k, v)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(mine, wanted, atol=tolerance, rtol=tolerance)


def test_the_reference_itself_is_the_rule() -> None:
    tokens: TokenStream = pack(PACKS["mixed"])
    q, k, v = (torch.randn(len(tokens), 4, 16) for _ in range(3))
    bias = torch.zeros(len(tokens), 16)[:, : len(tokens)].masked_fill(~rule(tokens), float("-inf"))
    padded = torch.zeros(len(tokens), 16)
    padded[:, : len(tokens)] = bias
    out = attention(q[None], k[None], v[None], padded[:, : len(tokens)].expand(1, 4, -1, -1))
    torch.testing.assert_close(out[0], Packed(tokens)(0, q, k, v), atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="no kernel takes this call"):  # and it does say no
        attention(q[None], k[None], v[None], bias.contiguous().expand(1, 4, -1, -1))
