"""xformers on CUDA against SDPA on the CPU and against the rule written out: forward and backward, fp32 and bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mm.attention import Packed, xformers_bias
from mm.backbone import Backbone, BackboneConfig
from mm.cache import Chunk, KVCache
from mm.stream import TokenStream, pack
from mm.testing import rule, stream

BLOCKS = [0, 1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 1, 0, 0, 1, 1]
PACKS = {
    "causal": [stream(range(n)) for n in (65, 1, 128, 7)],
    "one causal document": [stream(range(200))],
    "pictures": [stream([0] * 64), stream([0] * 33)],
    "text and pictures": [stream([*range(10), *[10] * 49, 11, 12]), stream(range(30)), stream([0] * 17)],
    "clean and noisy blocks": [stream(*BLOCKS), stream(*BLOCKS), stream(range(5))],
}
# relative to values of size 1; bf16 has 8 bits, and a gradient sums over many keys
TOLERANCE = {torch.float32: (2e-4, 1e-3), torch.bfloat16: (3e-2, 1e-1)}


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention by the rule, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


def close(mine: Tensor, reference: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(reference.detach().abs().max()))
    torch.testing.assert_close(mine.double().cpu(), reference.double().cpu(), atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("heads", [(8, 8, 32), (8, 2, 64), (4, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKS)
def test_forward_and_backward(name: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    tokens = pack(PACKS[name])
    rng = torch.Generator().manual_seed(0)
    shapes = [(len(tokens), h, heads[2]) for h in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
    weight = torch.randn(shapes[0], generator=rng).to(dtype)
    results = {}
    for where, plan in {"cpu": Packed(tokens), "cuda": Packed(tokens.to("cuda")), "rule": None}.items():
        device = "cuda" if where == "cuda" else "cpu"
        exact = torch.float32 if where == "cpu" else dtype  # bf16 on the CPU is slow and not what is asked
        q, k, v = (x.to(device, exact if where != "rule" else torch.float64).requires_grad_() for x in inputs)
        out = written_out(q, k, v, rule(tokens)) if plan is None else plan(0, q, k, v)
        results[where] = (out, *torch.autograd.grad((out * weight.to(out)).sum(), (q, k, v)))
    forward, backward = TOLERANCE[dtype]
    for number, parts in enumerate(zip(results["cuda"], results["cpu"], results["rule"], strict=True)):
        mine, sdpa, exact = parts
        assert mine.dtype == dtype and not mine.isnan().any()
        close(mine, exact, backward if number else forward)
        close(mine, sdpa, backward if number else forward)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("causal", "BlockDiagonalCausalMask"), ("pictures", "BlockDiagonalMask"), ("text and pictures", "Tensor")],
)
def test_biases_stand_on_the_device_of_the_stream(name: str, kind: str) -> None:
    tokens: TokenStream = pack(PACKS[name])
    bias = xformers_bias(tokens.to("cuda"))
    assert type(bias).__name__ == kind
    size = (len(tokens), len(tokens))
    seen = (bias if isinstance(bias, Tensor) else bias.materialize(size, device="cuda")) == 0
    assert torch.equal(seen.cpu(), rule(tokens))
    from_cpu = xformers_bias(tokens)  # a stream that is still on the CPU gets a bias there
    where = from_cpu.device if isinstance(from_cpu, Tensor) else from_cpu.q_seqinfo.seqstart.device
    assert where.type == "cpu"


PASSES: dict[str, list[Chunk]] = {
    "one token, ragged rows": [Chunk(0, [2]), Chunk(1, [5]), Chunk(2, [1])],
    "text, ragged rows": [Chunk(0, [2, 3, 4]), Chunk(1, [5, 6, 7]), Chunk(2, [1, 2, 3])],
    "pictures": [Chunk(0, [2] * 9), Chunk(1, [5] * 9), Chunk(2, [1] * 9)],
    "a closed picture": [Chunk(0, [2, 2, 3]), Chunk(1, [5, 5, 6])],
    "noisy blocks": [Chunk(1, [5] * 4, [1, 1, 2, 2], keep=False)],
    "different modes": [Chunk(0, [2]), Chunk(1, [5, 5, 5]), Chunk(2, [1, 2])],
}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PASSES)
def test_cached_passes(name: str, dtype: torch.dtype, kv_heads: int) -> None:
    config = BackboneConfig(width=128, layers=1, heads=4, kv_heads=kv_heads)
    rng, chunks, outs = torch.Generator().manual_seed(0), PASSES[name], []
    past = [torch.randn(1, 3, 32, kv_heads, 32, generator=rng).to(dtype) for _ in range(2)]
    total = sum(len(chunk.order) for chunk in chunks)
    q, k, v = (torch.randn(total, h, 32, generator=rng).to(dtype) for h in (4, kv_heads, kv_heads))
    for device, exact in (("cpu", torch.float32), ("cuda", dtype)):
        cache = KVCache(config, 3, 32, device, exact)
        cache.keys.copy_(past[0])
        cache.values.copy_(past[1])
        cache.commit([Chunk(0, [0, 1]), Chunk(1, [0, 1, 2, 3, 4]), Chunk(2, [0])])
        with torch.inference_mode():
            outs.append(cache.plan(chunks)(0, *(x.to(device, exact) for x in (q, k, v))))
    close(outs[1], outs[0], TOLERANCE[dtype][0])


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "adaln": True}, {"checkpointing": True}])
@pytest.mark.parametrize("name", ["causal", "clean and noisy blocks"])
def test_backbone_and_its_gradients(name: str, options: dict[str, Any]) -> None:
    tokens = pack(PACKS[name])
    torch.manual_seed(0)
    config = BackboneConfig(width=64, layers=3, heads=4, kv_heads=2, **options)
    here = Backbone(config).train()
    for parameter in here.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    there = Backbone(config).train()
    there.load_state_dict(here.state_dict())
    there.cuda()
    x, time, results = torch.randn(len(tokens), 64), torch.rand(len(tokens)), []
    for model, device in ((here, "cpu"), (there, "cuda")):
        moved = tokens.to(device)
        out = model(x.to(device), moved.position, Packed(moved), time.to(device))
        out.square().mean().backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters()}))
    close(results[1][0].detach(), results[0][0].detach(), 1e-3)
    for parameter_name, grad in results[0][1].items():
        assert grad is not None
        close(results[1][1][parameter_name] / grad.abs().max(), grad / grad.abs().max(), 5e-3)


def test_bf16_backbone_keeps_its_frequencies_and_follows_fp32() -> None:
    tokens = pack(PACKS["text and pictures"])
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(width=64, layers=2, heads=4, kv_heads=2, qk_norm=True)).eval()
    x = torch.randn(len(tokens), 64)
    with torch.inference_mode():
        wanted = model(x, tokens.position, Packed(tokens))
        model.to("cuda", torch.bfloat16)
        assert model.rotary.frequency.dtype == torch.float32
        moved = tokens.to("cuda")
        out = model(x.to("cuda", torch.bfloat16), moved.position, Packed(moved))
    assert out.dtype == torch.bfloat16
    assert (out.float().cpu() - wanted).abs().mean() < 0.02


def test_causal_text_needs_no_square_of_memory() -> None:
    tokens = pack([stream(range(8192)), stream(range(8192))]).to("cuda")
    plan = Packed(tokens)
    q, k, v = (torch.randn(16384, 2, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan(0, q, k, v).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16384 * 16384 / 16  # half a square of bits
