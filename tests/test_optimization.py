"""Muon's step is that of `torch.optim.Muon`, block by block; everything else is AdamW; training resumes where it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mm.muon import Muon, orthogonalize
from mm.optimization import optimizer_and_schedule, warmup_cosine


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


@pytest.mark.parametrize(("bfloat16", "off"), [(False, 1e-3), (True, 3e-2)])
@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_orthogonalize(shape: tuple[int, int], bfloat16: bool, off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.muon.fast_bfloat16", lambda: bfloat16)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    x = u @ torch.diag_embed(torch.linspace(0.1, 7.0, min(shape)).expand(3, -1)) @ v
    made = orthogonalize(x)
    singular = torch.linalg.svdvals(made)
    assert 0.5 < float(singular.min()) and float(singular.max()) < 1.3
    # the singular vectors are those of the matrix: UᵀMV is diagonal
    inner = u.mT @ made @ v.mT
    assert torch.allclose(inner, torch.diag_embed(torch.diagonal(inner, dim1=-2, dim2=-1)), atol=off)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_step_is_that_of_torch(shape: tuple[int, int]) -> None:
    ours = parameters(shape)
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.02, "weight_decay": 0.1}
    peer = torch.optim.Muon(theirs, momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)
    mine = Muon([{"params": ours, "rows": (shape[0],)}], **settings)
    for _ in range(3):
        gradient = torch.randn(shape)
        before = ours[0].detach().clone()
        for p, optimizer in ((ours[0], mine), (theirs[0], peer)):
            p.grad = gradient.clone()
            optimizer.step()
        with torch.no_grad():
            moved = (ours[0] - before).norm()
            # the peer computes in bfloat16: eight bits
            assert float((ours[0] - theirs[0]).norm() / moved) < 0.03
            theirs[0].copy_(ours[0])


def test_blocks_are_matrices_of_their_own() -> None:
    whole, rest = parameters((40, 16), (40, 16)), []
    rows = (16, 8, 8, 8)
    blocks = [[nn.Parameter(b.clone()) for b in p.detach().split(rows)] for p in whole]
    for parts, p in zip(blocks, whole, strict=True):
        for part, gradient in zip(parts, p.grad.split(rows), strict=True):  # type: ignore[union-attr]
            part.grad = gradient.clone()
            rest.append(part)
    Muon([{"params": whole, "rows": rows}], lr=0.1).step()
    Muon([{"params": [p], "rows": (p.shape[0],)} for p in rest], lr=0.1).step()
    for parts, p in zip(blocks, whole, strict=True):
        torch.testing.assert_close(torch.cat([part.detach() for part in parts]), p.detach(), atol=1e-5, rtol=1e-5)


def test_the_rest_takes_the_step_of_adamw() -> None:
    ours = parameters((6, 4), (5,))
    theirs = copy.deepcopy(ours)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()  # type: ignore[union-attr]
    matrix = parameters((8, 8))
    Muon([{"params": ours}, {"params": matrix, "rows": (8,)}], lr=0.1).step()
    torch.optim.AdamW(theirs, lr=0.1).step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_a_resumed_run_takes_the_same_steps() -> None:
    layer = nn.Linear(8, 8)

    def build(module: nn.Linear) -> Muon:
        return Muon([{"params": [module.weight], "rows": (4, 4)}, {"params": [module.bias]}], lr=0.05)

    gradients = [[torch.randn_like(p) for p in layer.parameters()] for _ in range(4)]

    def step(module: nn.Linear, optimizer: Muon, values: list[Tensor]) -> None:
        for p, g in zip(module.parameters(), values, strict=True):
            p.grad = g.clone()
        optimizer.step()

    optimizer = build(layer)
    for values in gradients[:2]:
        step(layer, optimizer, values)
    saved = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
    for values in gradients[2:]:
        step(layer, optimizer, values)
    straight = [p.detach().clone() for p in layer.parameters()]

    again = nn.Linear(8, 8)
    again.load_state_dict(saved[0])
    resumed = build(again)
    resumed.load_state_dict(saved[1])
    for values in gradients[2:]:
        step(again, resumed, values)
    assert all(torch.equal(a, b) for a, b in zip(straight, again.parameters(), strict=True))


def test_groups() -> None:
    weight, bias, table = parameters((8, 4), (8,), (10, 4))
    frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.3, "warmup": 1, "total": 10, "floor": 0.1}
    plain = optimizer_and_schedule([weight, bias, table, frozen], **settings)["optimizer"]  # type: ignore[arg-type]
    assert type(plain) is torch.optim.AdamW
    assert [(len(g["params"]), g["weight_decay"]) for g in plain.param_groups] == [(2, 0.3), (1, 0.0)]
    muon = optimizer_and_schedule(
        [weight, bias, table, frozen],
        **settings,  # type: ignore[arg-type]
        matrices=[(weight, (4, 4)), (frozen, (4,))],
    )["optimizer"]
    assert isinstance(muon, Muon)
    assert [(len(g["params"]), g.get("rows")) for g in muon.param_groups] == [(1, None), (1, None), (1, (4, 4))]


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 rows here, got a parameter of shape \(6, 4\)"):
        Muon([{"params": parameters((6, 4)), "rows": (4, 4)}], lr=0.1)


def test_backbone_names_its_matrices() -> None:
    from mm.backbone import Backbone, BackboneConfig

    backbone = Backbone(BackboneConfig(width=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24))
    named = list(backbone.matrices())
    assert len(named) == 8
    assert all(sum(rows) == p.shape[0] for p, rows in named)
    assert named[0][1] == (32, 16, 16)


def test_warmup_cosine() -> None:
    rates = [warmup_cosine(step, warmup=4, total=20, floor=0.1) for step in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[12] == pytest.approx(0.55)
    assert rates[20:] == pytest.approx([0.1] * 5)


def test_gradients_are_clipped_beside_mixed_precision() -> None:
    """Lightning refuses to clip where an optimizer says that it undoes the loss scaling itself, as fused ones do."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    plan = optimizer_and_schedule(
        parameters((8, 8), (8,)), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, warmup=1, total=9, floor=0.1
    )
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(plan["optimizer"], 1.0)
    norms = [p.grad.norm() for group in plan["optimizer"].param_groups for p in group["params"]]
    assert float(torch.stack(norms).norm()) <= 1.0001
