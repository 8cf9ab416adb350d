"""The key/value cache: passes of any shape over ragged rows see what the rule says, and scratch leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm.attention import Packed, visible
from mm.backbone import Backbone, BackboneConfig
from mm.cache import Cached, Chunk, KVCache, padded_bias
from mm.stream import TokenStream
from mm.testing import stream

CONFIG = BackboneConfig(width=24, layers=2, heads=4, kv_heads=2, head_dim=6)
CAPACITY = 24


class Kept:
    """What a row holds, and what it should see: the reference without a cache."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.k, self.v = torch.zeros(0, 2, 6), torch.zeros(0, 2, 6)

    def attend(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        order, copy = torch.tensor(chunk.order), torch.tensor(chunk.copy or [0] * len(chunk.order))
        past = torch.tensor(self.order, dtype=torch.int64)
        seen = visible(order, copy, torch.cat((past, order)), torch.cat((torch.zeros_like(past), copy)))
        keys, values = (torch.cat(x).repeat_interleave(2, dim=1) for x in ((self.k, k), (self.v, v)))
        scores = torch.einsum("qhe,khe->hqk", q, keys) / 6**0.5
        out = torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)
        if chunk.keep:
            self.order += chunk.order
            self.k, self.v = torch.cat((self.k, k)), torch.cat((self.v, v))
        return out


def draw_chunk(rng: random.Random, row: int, start: int, room: int) -> Chunk:
    """Text, a picture, a picture with its end, noisy copies, or one token; everything later than what the row holds."""
    kind = rng.choice(["one", "text", "picture", "closed", "noisy", "prompt"])
    count = 1 if kind == "one" else rng.choice([2, 3, min(4, room)])
    count = min(count, room)
    order = list(range(start, start + count))
    if kind == "picture":
        order = [start] * count
    elif kind == "closed" and count > 1:
        order = [start] * (count - 1) + [start + 1]
    elif kind == "prompt":
        order = [start + n // 2 for n in range(count)]
    if kind == "noisy":
        return Chunk(row, [start] * count, [rng.choice([1, 2]) for _ in range(count)], keep=False)
    return Chunk(row, order, rng.choice([None, [0] * count]), keep=rng.random() < 0.8)


@given(st.integers(0, 1_000_000))
@settings(max_examples=60, deadline=None)
def test_every_pass_sees_what_the_rule_says(seed: int) -> None:
    rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = rng.randint(1, 4)
    cache, kept = KVCache(CONFIG, rows, CAPACITY, "cpu", torch.float32), [Kept() for _ in range(rows)]
    for _ in range(6):
        taking = [row for row in range(rows) if rng.random() < 0.8 and cache.lengths[row] < CAPACITY]
        if not taking:
            continue
        chunks = []
        for row in taking:
            start = kept[row].order[-1] + 1 if kept[row].order else 0
            chunks.append(draw_chunk(rng, row, start, CAPACITY - cache.lengths[row]))
        if rng.random() < 0.4:  # the common case: every row does the same
            chunks = [Chunk(row, [max(kept[row].order[-1:] or [-1]) + 1]) for row in taking]
        total = sum(len(chunk.order) for chunk in chunks)
        q, k, v = (torch.randn(total, heads, 6, generator=noise) for heads in (4, 2, 2))
        out = cache.plan(chunks)(1, q, k, v)
        cache.commit(chunks)
        at = 0
        for chunk in chunks:
            part = slice(at, at + len(chunk.order))
            wanted = kept[chunk.row].attend(chunk, q[part], k[part], v[part])
            torch.testing.assert_close(out[part], wanted, atol=1e-5, rtol=1e-5)
            at = part.stop
        assert cache.lengths == [len(row.order) for row in kept]


def feed(
    model: Backbone, cache: KVCache, tokens: TokenStream, x: Tensor, pieces: Sequence[int], row: int = 0
) -> Tensor:
    """Hidden states of a document fed piece by piece."""
    out, start = [], 0
    for piece in pieces:
        part = slice(start, start + piece)
        chunk = Chunk(row, tokens.order[part].tolist(), tokens.copy[part].tolist())
        out.append(model(x[part], tokens.position[part], cache.plan([chunk])))
        cache.commit([chunk])
        start += piece
    return torch.cat(out)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "qkv_bias": True}])
@pytest.mark.parametrize("pieces", [[9], [1] * 3 + [4] + [1] * 2, [3, 4, 2], [2, 1, 4, 2]])
def test_fed_in_pieces_equals_fed_at_once(pieces: list[int], options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    config = BackboneConfig(**{**CONFIG.to_dict(), "layers": 3, **options})  # type: ignore[arg-type]
    model = Backbone(config).eval()
    tokens = stream([0, 1, 2, 3, 3, 3, 3, 4, 5])
    x = torch.randn(9, 24)
    cache = KVCache(model.config, 1, 9, "cpu", torch.float32)
    wanted = model(x, tokens.position, Packed(tokens))
    torch.testing.assert_close(feed(model, cache, tokens, x, pieces), wanted, atol=1e-5, rtol=1e-5)
    assert cache.lengths == [9] and cache.order[0].tolist() == tokens.order.tolist()
    cache.reset(0)  # what an earlier occupant left is overwritten
    torch.testing.assert_close(feed(model, cache, tokens, x, [9]), wanted, atol=1e-5, rtol=1e-5)


def test_scratch_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, tokens, x = Backbone(CONFIG).eval(), stream(range(6)), torch.randn(6, 24)
    cache = KVCache(CONFIG, 1, 12, "cpu", torch.float32)
    before = feed(model, cache, tokens, x, [3])
    scratch = Chunk(0, [3] * 5, [1] * 5, keep=False)
    model(torch.randn(5, 24), torch.rand(5, 3), cache.plan([scratch]))
    cache.commit([scratch])
    assert cache.lengths == [3]
    rest = Chunk(0, [3, 4, 5])
    after = model(x[3:], tokens.position[3:], cache.plan([rest]))
    wanted = model(x, tokens.position, Packed(tokens))
    torch.testing.assert_close(torch.cat((before, after)), wanted, atol=1e-5, rtol=1e-5)


def test_a_full_cache_says_how_much_is_missing() -> None:
    cache = KVCache(CONFIG, 2, 4, "cpu", torch.float32)
    cache.commit([Chunk(1, [0, 1, 2])])
    with pytest.raises(ValueError, match="row 1 needs 5 positions, but the cache holds 4; shorten the prompt"):
        cache.plan([Chunk(0, [0]), Chunk(1, [3, 4])])
    cache.plan([Chunk(0, [0]), Chunk(1, [3])])


# --- what CUDA gets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "count", "kind"),
    [([5], 1, "full"), ([0, 7, 3], 1, "full"), ([4, 4], 3, "causal"), ([0, 6, 2], 4, "causal"), ([0, 5], 3, "full")],
)
def test_padded_keys_biases_are_the_rule(starts: list[int], count: int, kind: str) -> None:
    """Rows of one cache side by side: a query sees its own row's keys up to its place, no padding and no neighbours."""
    pytest.importorskip("xformers")
    bias = padded_bias(starts, count, CAPACITY, kind, torch.device("cpu"))
    seen = bias.materialize((len(starts) * count, len(starts) * CAPACITY)) == 0
    wanted = torch.zeros_like(seen)
    for row, start in enumerate(starts):
        past, new = torch.zeros(start, dtype=torch.int64), torch.arange(1, count + 1)
        new = new if kind == "causal" else torch.ones_like(new)
        keys, zero = torch.cat((past, new)), torch.zeros(start + count, dtype=torch.int64)
        at = row * CAPACITY
        wanted[row * count : (row + 1) * count, at : at + start + count] = visible(new, zero[:count], keys, zero)
    assert torch.equal(seen, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_of_a_mixed_pass(dtype: torch.dtype) -> None:
    """Which bias a group gets: block-diagonal where the kernels know it, else dense ones in the cache's dtype."""
    pytest.importorskip("xformers")
    cache = KVCache(CONFIG, 4, CAPACITY, "cpu", dtype)
    cache.commit([Chunk(0, [0, 1]), Chunk(1, [0, 1, 2]), Chunk(2, [0]), Chunk(3, [0, 1])])
    plan = cache.plan([Chunk(0, [3]), Chunk(1, [3]), Chunk(2, [1, 1, 1]), Chunk(3, [2, 2, 3])])
    assert [group.kind for group in plan.groups] == ["full", "full", "masked"]
    one, picture, closed = (bias_of(plan, number) for number in range(3))
    assert type(one).__name__ == "BlockDiagonalCausalWithOffsetPaddedKeysMask"
    if dtype == torch.float32:
        assert picture == [None]  # all keys of the row: cut to its length instead of masked
    else:
        assert type(picture).__name__ == "BlockDiagonalPaddedKeysMask"
    (bias,) = closed
    assert bias.dtype == dtype and bias.shape == (3, 5) and bias.stride(0) % 8 == 0
    assert (bias == 0).tolist() == [[True] * 4 + [False]] * 2 + [[True] * 5]


def bias_of(plan: Cached, number: int) -> object:
    group = plan.groups[number]
    rows = range(group.row, group.row + group.rows)
    starts = [plan.cache.lengths[row] for row in rows]
    return plan._xformers(starts, group.count, group.keys, group.kind, group.mask)
