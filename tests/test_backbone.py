"""The backbone: who influences whom, packing, rotary positions, options, recomputation, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.attention import Packed
from mm.backbone import Backbone, BackboneConfig, RMSNorm, Rotary, apply_rotary
from mm.stream import TokenStream, pack, unpack
from mm.testing import rule, stream

LAYOUTS = {
    "text, picture, text": stream([0, 1, 2, 2, 2, 2, 3]),
    "two documents": stream([0, 1, 2, 0, 1, 1], document=[0, 0, 0, 1, 1, 1]),
    "clean and noisy blocks": stream([0, 1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 1, 0, 0, 1, 1]),
    "fill in the middle": stream([0, 1, 4, 5, 2, 3]),
    "causal": stream(range(6)),
}


def backbone(seed: int = 0, **changes: Any) -> Backbone:
    """A small one with weights that no mistake can hide behind: nothing zero, nothing one."""
    torch.manual_seed(seed)
    made = Backbone(BackboneConfig(**{"width": 24, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, **changes}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 and "norm" in name else 0.0, 0.2)
    return made.eval()


def run(model: Backbone, tokens: TokenStream, x: Tensor, time: Tensor | None = None) -> Tensor:
    return model(x, tokens.position, Packed(tokens), tokens.time if time is None else time)


def reachable(seen: Tensor, layers: int) -> Tensor:
    """Who can influence whom through several layers of the rule."""
    reach = seen
    for _ in range(layers - 1):
        reach = (reach.float() @ seen.float()) > 0
    return reach


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_reach_exactly_what_is_visible(name: str, layers: int) -> None:
    tokens = LAYOUTS[name]
    model = backbone(layers=layers, qk_norm=True)
    x = torch.randn(len(tokens), 24, requires_grad=True)
    out = run(model, tokens, x)
    wanted = reachable(rule(tokens), layers)
    for place in range(len(tokens)):
        (grad,) = torch.autograd.grad(out[place].sum(), x, retain_graph=True)
        size = grad.abs().sum(-1)
        assert bool((size[~wanted[place]] == 0).all()), f"position {place} reads what it must not see"
        assert bool((size[wanted[place]] > 1e-7).all()), f"position {place} does not read all it sees"


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "qkv_bias": True}, {"adaln": True}, {"kv_heads": 4}])
def test_packed_equals_each_document_alone(options: dict[str, Any]) -> None:
    documents = [*LAYOUTS.values(), stream([0]), stream([0, 0, 0], time=torch.tensor([0.2, 0.9, 1.0]))]
    packed = pack(documents)
    model, x = backbone(**options), torch.randn(len(packed), 24)
    together, start = run(model, packed, x), 0
    assert packed.num_documents == len(unpack(packed)) == 8
    for document in unpack(packed):
        end = start + len(document)
        torch.testing.assert_close(together[start:end], run(model, document, x[start:end]), atol=1e-5, rtol=1e-5)
        start = end


def test_config_fills_in_and_refuses() -> None:
    config = BackboneConfig(width=96, heads=6)
    assert (config.kv_heads, config.head_dim, config.hidden) == (6, 16, 256)
    assert BackboneConfig(**config.to_dict()) == config  # type: ignore[arg-type]
    for wrong, message in [
        ({"width": 10, "heads": 4}, "width 10 does not divide into 4 heads"),
        ({"heads": 4, "kv_heads": 3}, "4 query heads cannot share 3 key/value heads"),
        ({"width": 12, "heads": 4}, "even head_dim, got 3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            BackboneConfig(**wrong)  # type: ignore[arg-type]


def test_rms_norm_is_its_formula() -> None:
    norm, x = RMSNorm(8, 1e-3), torch.randn(5, 8)
    norm.weight.data.uniform_(0.5, 2)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), wanted)


# --- rotary ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_equal_axes_are_the_rotary_embedding_of_llama(head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim)
    place = torch.arange(50)
    q, k = torch.randn(50, 4, head_dim), torch.randn(50, 2, head_dim)
    cos, sin = LlamaRotaryEmbedding(config)(q, place[None])
    wanted = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    rope = Rotary(head_dim, 10000.0)(place.float()[:, None].expand(-1, 3), torch.float32)
    for mine, reference in zip((apply_rotary(q, rope), apply_rotary(k, rope)), wanted, strict=True):
        torch.testing.assert_close(mine, reference[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_scores_depend_on_differences_of_coordinates_axis_by_axis() -> None:
    rotary, q, k = Rotary(24, 100.0), torch.randn(1, 1, 24), torch.randn(1, 1, 24)

    def score(a: list[float], b: list[float]) -> float:
        turned = [apply_rotary(x, rotary(torch.tensor([p]), torch.float32)) for x, p in ((q, a), (k, b))]
        return float((turned[0] * turned[1]).sum())

    base = score([3.0, 1.5, 2.0], [1.0, 0.5, 7.0])
    assert base == pytest.approx(score([13.0, 4.5, 2.25], [11.0, 3.5, 7.25]), abs=1e-4)
    for axis in range(3):  # and each axis counts
        moved = [3.0, 1.5, 2.0]
        moved[axis] += 1.0
        assert abs(base - score(moved, [1.0, 0.5, 7.0])) > 1e-3


def test_frequencies_stay_exact_in_half_precision() -> None:
    model = backbone(adaln=True)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.bfloat16()
    assert next(model.parameters()).dtype == torch.bfloat16
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), f"{name} was rounded"
    far = torch.full((1, 3), 30000.0)
    cos, _ = model.rotary(far, torch.float32)
    torch.testing.assert_close(cos, backbone(adaln=True).rotary(far, torch.float32)[0])
    assert Rotary(8, 1e4).to("meta").frequency.device.type == "meta"


# --- options --------------------------------------------------------------------------------------------------------


def test_qk_norm_makes_scores_blind_to_the_size_of_queries() -> None:
    tokens, x = LAYOUTS["text, picture, text"], torch.randn(7, 24)
    for on in (True, False):
        model = backbone(qk_norm=on)
        before = run(model, tokens, x)
        with torch.no_grad():
            for block in model.blocks:
                block.attention.qkv.weight[: 4 * 8] *= 50.0  # the queries
        assert torch.allclose(before, run(model, tokens, x), atol=1e-4) == on


def test_adaln_tells_positions_their_time_one_by_one() -> None:
    tokens, x = LAYOUTS["clean and noisy blocks"], torch.randn(9, 24)
    model, time = backbone(adaln=True), torch.tensor([0.0, 0, 0, 0.7, 0.7, 0, 0, 0.3, 0.3])
    before = run(model, tokens, x, time)
    time[3] = 0.8  # seen by its own noisy block only
    changed = (before - run(model, tokens, x, time)).abs().amax(-1) > 1e-6
    assert changed.tolist() == [False, False, False, True, True, False, False, False, False]
    with pytest.raises(ValueError, match="pass the time of every position"):
        model(x, tokens.position, Packed(tokens))


def test_adaln_starts_as_the_backbone_without_it() -> None:
    tokens, x = LAYOUTS["causal"], torch.randn(6, 24)
    plain = Backbone(BackboneConfig(width=24, layers=2, heads=4, head_dim=8))
    timed = Backbone(BackboneConfig(width=24, layers=2, heads=4, head_dim=8, adaln=True))
    timed.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(run(timed, tokens, x, torch.rand(6)), run(plain, tokens, x))


def test_a_block_is_its_formula() -> None:
    """One layer with every option, written out (DiT, section 3.2, with gates 1 + learned)."""
    tokens, x, time = LAYOUTS["clean and noisy blocks"], torch.randn(9, 24), torch.rand(9)
    model = backbone(layers=1, adaln=True, qk_norm=True, qkv_bias=True)
    block = model.blocks[0]
    parts = block.modulation(F.silu(model.time(time))).chunk(6, dim=-1)
    h = (1 + parts[1]) * block.attention_norm(x) + parts[0]
    q, k, v = block.attention.qkv(h).view(9, 8, 8).split((4, 2, 2), dim=1)
    cos, sin = model.rotary(tokens.position, torch.float32)

    def turn(y: Tensor) -> Tensor:  # the pairs (i, i + 4) as complex numbers
        turned = torch.complex(y[..., :4], y[..., 4:]) * torch.complex(cos[..., :4], sin[..., 4:])
        return torch.cat((turned.real, turned.imag), -1)

    q, k = turn(block.attention.q_norm(q)), turn(block.attention.k_norm(k))
    k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / 8**0.5
    weights = scores.masked_fill(~rule(tokens), float("-inf")).softmax(-1)
    y = x + (1 + parts[2]) * block.attention.out(torch.einsum("hqk,khe->qhe", weights, v).flatten(1))
    h = (1 + parts[4]) * block.mlp_norm(y) + parts[3]
    gate, up = block.mlp.gate_up.weight.chunk(2)
    y = y + (1 + parts[5]) * block.mlp.down(F.silu(h @ gate.T) * (h @ up.T))
    torch.testing.assert_close(run(model, tokens, x, time), model.norm(y), atol=1e-5, rtol=1e-5)


def test_injected_vectors_enter_at_the_named_layer() -> None:
    tokens, x, vectors = LAYOUTS["causal"], torch.randn(6, 24), torch.randn(2, 24)
    model, index = backbone(), torch.tensor([1, 4])
    position, plan = tokens.position, Packed(tokens)
    first = model(x, position, plan, inject={0: (vectors, index)})
    torch.testing.assert_close(first, model(x.index_add(0, index, vectors), position, plan))
    second = model(x, position, plan, inject={1: (vectors, index)})
    assert not torch.allclose(first[4:], second[4:], atol=1e-3)
    assert torch.equal(second[0], model(x, position, plan)[0]) and not torch.equal(second[1], first[1])


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    tokens, x = LAYOUTS["causal"], torch.randn(6, 24)
    model = backbone(layers=1, dropout=0.3)
    still = run(model, tokens, x)
    assert torch.equal(still, run(backbone(layers=1), tokens, x))
    model.train()
    a, b = run(model, tokens, x), run(model, tokens, x)
    assert not torch.equal(a, b)
    mlp_only = torch.ones(200_000)
    kept = model.blocks[0].drop(mlp_only)
    assert kept.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (kept == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("name", LAYOUTS)
def test_mixed_precision_on_the_cpu_stays_close(name: str) -> None:
    """Products in bfloat16; norms, rotary, softmax and the residual stream in float32."""
    tokens, model = LAYOUTS[name], backbone(qk_norm=True)
    x = torch.randn(len(tokens), 24, requires_grad=True)
    grad_of_output = torch.randn(len(tokens), 24)
    results = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = run(model, tokens, x)
        assert out.dtype == torch.float32
        gradients = torch.autograd.grad(out, [x, *model.parameters()], grad_of_output)
        results.append([out.detach(), *gradients])
    for exact, mixed_one in zip(*results, strict=True):
        assert float((exact - mixed_one).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_neither_outputs_nor_gradients(dropout: float) -> None:
    tokens = pack([*LAYOUTS.values()])
    x, results = torch.randn(len(tokens), 24), []
    for checkpointing in (False, True):
        model = backbone(adaln=True, dropout=dropout, checkpointing=checkpointing).train()
        torch.manual_seed(3)
        out = run(model, tokens, x)
        out.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert all(g is not None and g.abs().sum() > 0 for g in grads.values())
        results.append((out, grads))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], msg=name)


def test_initial_weights_follow_the_table() -> None:
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(width=128, layers=8, heads=4, adaln=True, qkv_bias=True, qk_norm=True))
    for name, parameter in model.named_parameters():
        if "modulation" in name or name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert bool((parameter == 1).all()), name
        else:
            wanted = 0.02 / 16**0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "text, picture, text"])
def test_compiles_as_one_graph(name: str) -> None:
    tokens = LAYOUTS[name]
    model, plan = backbone(qk_norm=True, adaln=True), Packed(tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results, x = [], torch.randn(len(tokens), 24)
    for call in (model, compiled):
        out = call(x, tokens.position, plan, tokens.time)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    for mine, reference in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_backbone_takes_other_layouts() -> None:
    model = backbone()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for first in (3, 4, 9):
        tokens = pack([stream(range(first)), stream(range(2 * first + 1))])
        x, plan = torch.randn(len(tokens), 24), Packed(tokens)
        torch.testing.assert_close(compiled(x, tokens.position, plan), model(x, tokens.position, plan))
