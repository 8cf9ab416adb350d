"""Generation and training of the whole model on CUDA: what the CPU does, in fp32 and in bf16."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mm.generation import Engine, Request
from mm.heads.lm import LMHead
from mm.interfaces import Draw, Encoded, Order, Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.stream import pack
from mm.testing import tiny

ORDERS = {"raster": Raster, "masked": lambda: Masked(steps=3, rate_condition=True)}
WIDE = {"width": 64, "heads": 4, "kv_heads": 2}  # heads of 16: the kernels load 16 bytes at once


class Recording(LMHead):
    """Remembers the logits it draws from."""

    seen: list[Tensor]

    def sample(self, hidden: Tensor, draws: Sequence[Draw]) -> list[tuple[Tensor, Tensor | None]]:
        self.seen.append(self.logits(hidden).float().cpu())
        return super().sample(hidden, draws)


def record(model: MultimodalModel) -> list[Tensor]:
    seen: list[Tensor] = []
    for head in model.heads.values():
        head.__class__ = Recording
        head.seen = seen
    return seen


def requests(guidance: float) -> list[Request]:
    guided = Sampling(guidance=guidance)
    return [
        Request(prompt=[Segment("text", "a cat")], items=[("image", (3, 4))], text=False, sampling=guided, seed=1),
        Request(prompt=[], max_tokens=9, sampling=Sampling(top_k=50, top_p=0.9), seed=2),
        Request(prompt=[Segment("text", "longer than that")], items=[("image", (2, 2))], max_tokens=4, seed=4),
    ]


def flat(made: list[list[Segment]]) -> list[list[tuple[str, tuple[int, ...], list[int]]]]:
    return [[(s.modality, s.content.grid, s.content.ids.tolist()) for s in row] for row in made]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("order", ORDERS)
def test_fp32_generation_is_that_of_the_cpu(order: str, guidance: float) -> None:
    model = tiny(ORDERS[order](), **WIDE)
    seen = record(model)
    here = flat(Engine(model).generate(requests(guidance)))
    logits, count = list(seen), len(seen)
    there = flat(Engine(model.cuda()).generate(requests(guidance)))
    assert there == here
    for mine, reference in zip(seen[count:], logits, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_structure_and_seeds(order: str, dtype: torch.dtype) -> None:
    model = tiny(ORDERS[order](), **WIDE).to("cuda", dtype)
    made = Engine(model).generate(requests(2.0))
    assert flat(made) == flat(Engine(model).generate(requests(2.0)))
    assert [made[0][0].content.grid, made[2][0].content.grid] == [(3, 4), (2, 2)]
    for row in made:
        for segment in row:
            assert segment.content.ids.device.type == "cpu"
            size = 8 if segment.modality == "image" else 256
            assert bool(((segment.content.ids >= 0) & (segment.content.ids < size)).all())


def test_batched_is_one_by_one() -> None:
    model = tiny(**WIDE).cuda()
    together = flat(Engine(model).generate(requests(2.0)))
    assert together == [flat(Engine(model).generate([request]))[0] for request in requests(2.0)]


@pytest.mark.parametrize("order", ORDERS)
def test_loss_and_gradients(order: str) -> None:
    plug: Order = ORDERS[order]()
    model, other = tiny(plug, **WIDE), tiny(plug, **WIDE).cuda()
    picture = Encoded(grid=(2, 3), ids=torch.tensor([7, 0, 3, 3, 5, 1]))
    rng = torch.Generator().manual_seed(0)
    tokens = pack(
        [
            model.build_document([Segment("text", "one"), Segment("image", picture)], rng),
            model.build_document([Segment("image", picture, loss=False), Segment("text", "two")], rng),
        ]
    )
    moved = tokens.pin_memory().to("cuda")
    a, b = model.loss(tokens), other.loss(moved)
    torch.testing.assert_close(b.total.cpu(), a.total, atol=1e-4, rtol=1e-4)
    assert a.count == b.count
    a.total.backward()
    b.total.backward()
    for (name, mine), (_, reference) in zip(other.named_parameters(), model.named_parameters(), strict=True):
        assert (mine.grad is None) == (reference.grad is None), name
        if mine.grad is not None and reference.grad is not None:
            scale = reference.grad.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(mine.grad.cpu() / scale, reference.grad / scale, atol=1e-3, rtol=1e-2, msg=name)
