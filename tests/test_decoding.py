"""The single-position step computes what the backbone does, and is only used where it can."""

from __future__ import annotations

import pytest
import torch

from mm.backbone import Backbone, BackboneConfig
from mm.cache import Chunk, KVCache
from mm.decoding import SingleStep
from mm.testing import stream

SHAPES = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "qwen2": {"qkv_bias": True, "kv_heads": 1},
    "qwen3": {"qk_norm": True, "kv_heads": 2, "head_dim": 12},
}


def backbone(**changes: object) -> Backbone:
    made = Backbone(BackboneConfig(**{"width": 32, "layers": 3, "heads": 4, **changes}))  # type: ignore[arg-type]
    for parameter in made.parameters():  # biases begin at zero and norms at one, which would hide mistakes
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return made.eval()


@pytest.mark.parametrize("lengths", [[5], [5, 5], [3, 7, 1]])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_step_equals_the_backbone(shape: str, lengths: list[int]) -> None:
    """Rows of equal and of unequal length, several steps, rows that do not start at the first; and what is cached."""
    model = backbone(**SHAPES[shape])
    assert SingleStep.fits(model)
    rows = len(lengths)
    caches = [KVCache(model.config, rows + 1, 12, "cpu", torch.float32) for _ in range(2)]
    for row, length in enumerate(lengths, start=1):
        x, part = torch.randn(length, 32), stream(range(length))
        for cache in caches:
            model(x, part.position, cache.plan([Chunk(row, list(range(length)))]))
            cache.commit([Chunk(row, list(range(length)))])
    step = SingleStep(model, caches[1])
    for number in range(3):
        x, position = torch.randn(rows, 32), torch.rand(rows, 3) * 9
        chunks = [Chunk(row, [length + number]) for row, length in enumerate(lengths, start=1)]
        wanted = model(x, position, caches[0].plan(chunks))
        torch.testing.assert_close(step(x, position, 1), wanted, atol=1e-5, rtol=1e-5)
        for cache in caches:
            cache.commit(chunks)
    for row, length in enumerate(lengths, start=1):
        for mine, theirs in ((caches[1].keys, caches[0].keys), (caches[1].values, caches[0].values)):
            torch.testing.assert_close(mine[:, row, : length + 3], theirs[:, row, : length + 3], atol=1e-5, rtol=1e-5)


def test_it_leaves_the_rest_to_the_backbone() -> None:
    assert not SingleStep.fits(backbone(adaln=True))
    assert not SingleStep.fits(backbone().double())
    hooked = backbone()
    hooked.blocks[0].register_forward_hook(lambda *_: None)
    assert not SingleStep.fits(hooked)
