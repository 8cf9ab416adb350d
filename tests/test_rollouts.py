"""Rollouts of video beyond the training: a sliding window over the cache, held to a reference that recomputes everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.attention import visible
from mm.backbone import Backbone, BackboneConfig, Block, apply_rotary
from mm.cache import Chunk, Forgotten, KVCache
from mm.generation import Engine, Event, Request, assemble
from mm.heads.regression import RegressionHead
from mm.interfaces import Encoded, Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.blocks import Blocks
from mm.testing import Clips, tiny
from mm.tracks import Feed

DIM, STEPS, AREA = 5, 2, 4


def order(frames: int = 2, **settings: Any) -> Blocks:
    return Blocks(frames=frames, **{"sampler": {"steps": STEPS}, **settings})


def model(
    frames: int = 2, *, most: int = 6, adaln: bool = False, context: int = 256, **settings: Any
) -> MultimodalModel:
    blocks = order(frames, time_condition=not adaln, **settings)
    made = tiny(blocks, tokenizer=Clips(DIM, most), head=RegressionHead(), context=context, qk_norm=True, adaln=adaln)
    with torch.no_grad():
        for parameter in made.parameters():  # AdaLN and conditions start at zero, biases too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def clip(frames: int, seed: int = 0) -> Encoded:
    rng = torch.Generator().manual_seed(seed)
    return Encoded(grid=(frames, 2, 2), latents=torch.randn(frames * AREA, DIM, generator=rng))


def text(words: str) -> Segment:
    return Segment("text", words, loss=False)


def ask(frames: int, given: int = 0, words: str = "ab", **settings: Any) -> Request:
    """A clip that begins with `given` frames."""
    known = None
    if given:
        known = (clip(frames, seed=9).content, torch.arange(frames * AREA) < given * AREA)
    return Request(prompt=[text(words)], items=[("image", (frames, 2, 2))], known=known, **{"text": False, **settings})


def same(a: list[list[Segment]], b: list[list[Segment]]) -> None:
    for one, other in zip(a, b, strict=True):
        for left, right in zip(one, other, strict=True):
            assert left.modality == right.modality and left.content.grid == right.content.grid
            assert torch.allclose(left.content.content.float(), right.content.content.float(), atol=1e-4)


class Recomputed(Engine):
    """The slow reference of a rollout: in every pass all of a row's past passes are evaluated again, pass by pass, keys as they
    are before rotation and turned to where they stand in that pass. A pass sees what was in the row's window at its time."""

    def _run(self, requests: Sequence[Request], on_step: Any) -> list[list[Segment]]:
        self.passes: dict[int, list[Pass]] = {}
        self.now: dict[int, tuple[list[int], Tensor]] = {}
        """By row of the cache: which of its positions are in the window, and where they stand."""
        self.seen: list[tuple[bool, int, int, Tensor]] = []
        """Of every pass and row: whether it is kept, positions fed, positions seen before them, and where all of them stand."""
        self.gone: Counter[int] = Counter()
        return super()._run(requests, on_step)

    def _forward(self, feeds: list[Feed], cache: KVCache, count: int, *_: Any) -> Tensor:
        out = []
        for feed in feeds:
            slot = feed.slot(count)
            if feed.reset:
                self.passes.pop(slot, None)
                self.now.pop(slot, None)
            known, where = self.now.get(slot, ([], torch.zeros(0, 3)))
            own = torch.tensor(feed.position)
            stream = assemble([feed], self.model.device)
            orders = torch.tensor(feed.order), torch.tensor(feed.copy or [0] * len(feed.order))
            this = Pass(self.model.embed(stream), stream.time, own, known, where, *orders)
            past = self.passes.setdefault(slot, [])
            out.append(evaluate(self.model.backbone, [*past, this]))
            self.seen.append((feed.keep, len(own), len(known), torch.cat((where, own))))
            if feed.keep:
                total = sum(len(before.x) for before in past)
                past.append(this)
                known, where = [*known, *range(total, total + len(own))], torch.cat((where, own))
                if (gone := feed.forgotten) is not None:
                    old = gone.first + gone.count
                    self.gone[slot] += gone.count
                    known = known[: gone.first] + known[old:]
                    where = torch.cat((where[: gone.first], where[old:] + torch.tensor(gone.by)))
                self.now[slot] = known, where
        cache.commit([Chunk(feed.slot(count), feed.order, feed.copy, feed.keep) for feed in feeds])
        return torch.cat(out)


@dataclass(frozen=True)
class Pass:
    x: Tensor
    time: Tensor
    position: Tensor
    known: list[int]
    """Earlier positions of the row that it sees, counted over all passes, and where they stand at its time."""
    where: Tensor
    order: Tensor
    copy: Tensor


def evaluate(backbone: Backbone, passes: list[Pass]) -> Tensor:
    """Hidden states of the last pass, by the backbone's weights and nothing else of it."""
    config = backbone.config
    sizes = (config.heads, config.kv_heads, config.kv_heads)
    keys: list[list[Tensor]] = [[] for _ in range(config.layers)]
    values: list[list[Tensor]] = [[] for _ in range(config.layers)]
    orders = torch.cat([one.order for one in passes])
    for one in passes:
        x, added = one.x, torch.zeros(())
        ropes = [backbone.rotary(place, x.dtype) for place in (one.position, torch.cat((one.where, one.position)))]
        past = orders[one.known]
        seen = visible(one.order, one.copy, torch.cat((past, one.order)), torch.cat((torch.zeros_like(past), one.copy)))
        if backbone.time is not None:
            added = F.silu(backbone.time(one.time))
        for number, block in enumerate(cast("Iterable[Block]", backbone.blocks)):
            shift1, scale1, gate1, shift2, scale2, gate2 = (
                torch.zeros(6, 1) if block.modulation is None else block.modulation(added).chunk(6, -1)
            )
            part = block.attention
            assert part.q_norm is not None and part.k_norm is not None
            mixed = part.qkv(block.attention_norm(x) * (1 + scale1) + shift1).view(len(x), -1, config.head_dim)
            q, k, v = mixed.split(sizes, 1)
            k = part.k_norm(k)
            all_k, all_v = (torch.cat((torch.cat([k[:0], *old])[one.known], new)) for old, new in
                            ((keys[number], k), (values[number], v)))  # fmt: skip
            keys[number].append(k)
            values[number].append(v)
            q, all_k = apply_rotary(part.q_norm(q), ropes[0]), apply_rotary(all_k, ropes[1])
            all_k, all_v = (t.repeat_interleave(config.heads // config.kv_heads, 1) for t in (all_k, all_v))
            scores = torch.einsum("qhe,khe->hqk", q, all_k) / config.head_dim**0.5
            mixed = torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, float("-inf")).softmax(-1), all_v)
            x = x + part.out(mixed.flatten(1)) * (1 + gate1)
            x = x + block.mlp(block.mlp_norm(x) * (1 + scale2) + shift2) * (1 + gate2)
    return backbone.norm(x)


ROLLOUTS: dict[str, Any] = {"window": 4, "augment": 0.2, "augment_sampling": 0.1}
"""In models whose clips have 6 frames, in blocks of 2."""


def requests(guidance: float) -> list[Request]:
    """Rows that are at different stages all the time."""
    guided = Sampling(guidance=guidance)
    return [
        ask(9, seed=1, sampling=guided),
        ask(4, words="a longer prompt", seed=2, text=True, max_tokens=5),
        ask(8, given=3, words="c", seed=3, sampling=guided, text=True, max_tokens=4),
        ask(12, given=7, seed=4, sampling=guided),
        Request(prompt=[Segment("image", clip(3)), text("?")], items=[("image", (7, 2, 2)), ("image", (2, 2, 2))], seed=5,
                text=False),
        Request(prompt=[text("tell")], max_tokens=9, seed=6),
    ]  # fmt: skip


@pytest.mark.parametrize("adaln", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_window_is_what_recomputing_gives(guidance: float, adaln: bool) -> None:
    one = model(adaln=adaln, **ROLLOUTS)
    made = Engine(one).generate(requests(guidance))
    slow = Recomputed(one)
    same(made, slow.generate(requests(guidance)))
    same(made, [Engine(one).generate([request])[0] for request in requests(guidance)])
    assert [made[row][0].content.grid[0] for row in range(4)] == [9, 4, 8, 12]
    gone = {0: 4, 2: 3, 3: 4, 4: 2}  # frames, by row; the last four stay while the last chunk is made
    twins = {row + 6: gone[row] for row in (0, 2, 3)} if guidance > 1 else {}
    assert {row: count / AREA for row, count in slow.gone.items()} == gone | twins


def test_a_chunk_sees_the_prompt_and_the_last_frames_where_training_has_them() -> None:
    """Whatever has left, what is seen stands at the coordinates of a clip of the training, and so does the chunk."""
    one, slow = model(**ROLLOUTS), Recomputed(model(**ROLLOUTS))
    slow.generate([ask(17, seed=1)])
    trained = one.build_document([text("ab"), Segment("image", clip(6))], torch.Generator(), close=False)
    index = trained.latents["image"].index[: 6 * AREA]
    before = trained.position[: int(index[0])]
    chunks = [(fed, places) for keep, fed, _, places in slow.seen if not keep]
    assert len(chunks) == 9 * STEPS
    for number, (fed, places) in enumerate(chunks):
        first, frames = 2 * (number // STEPS), fed // AREA
        assert frames == min(2, 17 - first)
        wanted = torch.cat((before, trained.position[index[: (min(first, 4) + frames) * AREA]]))
        assert torch.allclose(places, wanted, atol=1e-5)


def test_with_one_layer_a_rollout_is_one_fresh_clip_after_another() -> None:
    """Where keys know nothing but their own frame, a chunk is how a new clip goes on that begins with the window's frames."""
    one = model(window=4)
    one.backbone.blocks = one.backbone.blocks[:1]
    one.backbone.config = replace(one.backbone.config, layers=1)
    settings: dict[str, Any] = {"sampling": Sampling(temperature=0.0, guidance=2.0)}
    ((made,),) = Engine(one).generate([ask(14, **settings)])
    frames = made.content.latents.view(14, AREA, DIM)
    for first in range(4, 14, 2):
        known = torch.cat((frames[first - 4 : first].flatten(0, 1), torch.zeros(2 * AREA, DIM)))
        fresh = replace(ask(6, **settings), known=(known, torch.arange(6 * AREA) < 4 * AREA))
        ((again,),) = Engine(one).generate([fresh])
        assert torch.allclose(again.content.latents[4 * AREA :], frames[first : first + 2].flatten(0, 1), atol=1e-4)


class Costs:
    """Within it, what every pass feeds and how many keys its rows see is written down."""

    def __enter__(self) -> list[tuple[int, int]]:
        self.patch, seen = pytest.MonkeyPatch(), list[tuple[int, int]]()
        plan = KVCache.plan

        def planning(cache: KVCache, chunks: Sequence[Chunk]) -> Any:
            made = plan(cache, chunks)
            seen.append((sum(len(c.order) for c in chunks), sum(group.rows * group.keys for group in made.groups)))
            return made

        self.patch.setattr(KVCache, "plan", planning)
        return seen

    def __exit__(self, *_: Any) -> None:
        self.patch.undo()


def test_every_chunk_costs_the_same_and_the_context_is_that_of_a_clip() -> None:
    prompt = 1 + 3 + 4  # `bos`, the text, the opening
    one = model(context=prompt + 6 * AREA + 1, **ROLLOUTS)
    with Costs() as seen:
        Engine(one).generate([ask(40, words="abc", seed=1)])
    passes = STEPS + 1
    chunks = [seen[1 + n * passes : 1 + (n + 1) * passes] for n in range(20)]
    assert len({len(c) for c in chunks[:-1]}) == 1 and len(seen) == 1 + 20 * passes - 1
    assert all(chunk == chunks[2] for chunk in chunks[2:-1])
    assert [keys for _, keys in chunks[5]] == [prompt + 6 * AREA] * passes
    assert sum(keys for _, keys in chunks[0]) < sum(keys for _, keys in chunks[2])
    with pytest.raises(ValueError, match=r"a grid of \(40, 2, 2\) does not fit the largest grid \(6, 2, 2\)"):
        Engine(model()).generate([ask(40)])


def test_frames_are_final_chunk_by_chunk() -> None:
    events: list[Event] = []
    ((made,),) = Engine(model(**ROLLOUTS)).generate([ask(9, given=1, seed=1)], events.append)
    final = [event.final for event in events]
    assert sorted(set(final)) == [frames * AREA for frames in (1, 3, 5, 7, 9)] and final == sorted(final)
    for event in events:
        assert event.modality == "image" and torch.equal(
            event.content[: event.final], made.content.latents[: event.final]
        )


def test_a_long_clip_in_a_prompt_is_its_end() -> None:
    """So that what was made can be described, or gone on from, in another request."""
    one = model(**ROLLOUTS)
    long = Encoded(grid=(15, 2, 2), latents=torch.randn(15 * AREA, DIM))
    end = Encoded(grid=(6, 2, 2), latents=long.content[9 * AREA :])
    streams = [one.build_document([Segment("image", item, loss=False)], torch.Generator()) for item in (long, end)]
    for name in ("ids", "order", "position"):
        assert torch.equal(getattr(streams[0], name), getattr(streams[1], name)), name
    assert torch.equal(streams[0].latents["image"].values, streams[1].latents["image"].values)


def test_windows_that_cannot_work_are_refused() -> None:
    refused: list[dict[str, Any]] = [
        {"frames": 0},
        {"infill": 0.5},
        {"along": True},
        {"shift": False, "window": 3},
        {"window": -1},
    ]
    for settings in refused:
        with pytest.raises(ValueError, match="needs blocks of frames"):
            order(**{"frames": 2, "window": 4, **settings})
    with pytest.raises(ValueError, match="more than a clip of this tokenizer's has"):
        model(window=5)
    with pytest.raises(ValueError, match=r"does not fit the largest grid \(6, 2, 2\)"):
        Engine(model(window=4)).generate([replace(ask(2), items=[("image", (20, 3, 2))])])
    with pytest.raises(ValueError, match="does not fit"):
        Engine(model(window=4)).generate([replace(ask(2), items=[("image", ())])])


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_keys_that_move_are_as_if_they_had_always_stood_there(dtype: torch.dtype, error: float) -> None:
    """Also after as many moves as a key can see: each turns by the way that is left."""
    config = BackboneConfig(width=24, layers=2, heads=4, kv_heads=2, head_dim=6)
    rotary = Backbone(config).rotary
    cache = KVCache(config, 3, 20, "cpu", dtype)
    place = torch.arange(20.0)[:, None].repeat(1, 3)
    keys, values = (torch.randn(config.layers, 3, 20, 2, 6) for _ in range(2))
    rope = rotary(place, torch.float32)
    cache.keys.copy_(torch.stack([torch.stack([apply_rotary(row, rope) for row in layer]) for layer in keys]))
    cache.values.copy_(values)
    cache.commit([Chunk(row, range(18)) for row in range(3)])
    before = cache.keys.clone(), cache.values.clone()
    for _ in range(6):  # 3 stay for good, of the others the oldest 2 leave each time
        cache.forget(1, Forgotten(3, 2, (-2.0, 0.0, -1.0)), rotary)
    assert cache.lengths == [18, 6, 18] and cache.order[1, :6].tolist() == [0, 1, 2, 15, 16, 17]
    moved = place + torch.tensor([-12.0, 0.0, -6.0])
    for layer in range(config.layers):
        wanted = apply_rotary(keys[layer, 1], rotary(moved, torch.float32))[15:18]
        assert float((cache.keys[layer, 1, 3:6].float() - wanted).abs().max()) < error * float(wanted.abs().max())
    assert torch.equal(cache.values[:, 1, 3:6], before[1][:, 1, 15:18])
    for now, then in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(now[:, [0, 2]], then[:, [0, 2]]) and torch.equal(now[:, 1, :3], then[:, 1, :3])
