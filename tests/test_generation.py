"""The engine: cached = uncached, batched = one by one, certain structure, room, events, guidance, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.backbone import BackboneConfig
from mm.generation import Engine, Event, Request
from mm.heads.lm import LMHead
from mm.interfaces import Draw, Encoded, Modality, Order, Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.testing import Palette, Uncached, tiny
from mm.tokenizers.text_bytes import TextBytes
from mm.tracks import Feed

Result = list[list[tuple[str, tuple[int, ...], list[int]]]]
PICTURE = Encoded(grid=(2, 2), ids=torch.tensor([3, 1, 4, 1]))


def text(words: str) -> Segment:
    return Segment("text", words, loss=False)


def flat(made: list[list[Segment]]) -> Result:
    return [[(s.modality, s.content.grid, s.content.ids.tolist()) for s in row] for row in made]


def mixed(guidance: float = 1.0) -> list[Request]:
    """Rows that have little in common: prompts of any length, pictures in and out, text, freedom to open pictures."""
    guided = Sampling(guidance=guidance, guidance_schedule="ramp", guidance_interval=(0.0, 0.8))
    return [
        Request(prompt=[text("a cat")], items=[("image", (3, 4))], text=False, sampling=guided, seed=1),
        Request(prompt=[], max_tokens=9, sampling=Sampling(temperature=0.7, top_k=50), seed=2),
        Request(prompt=[Segment("image", PICTURE), text("?")], max_tokens=6, seed=3),
        Request(
            prompt=[text("two")], items=[("image", (2, 2)), ("image", (1, 3))], sampling=guided, max_tokens=4, seed=4
        ),
        Request(prompt=[text("go on, and on")], free=True, max_tokens=40, sampling=guided, seed=5),
        Request(prompt=[text("x")], items=[("image", (4, 4))], text=False, sampling=Sampling(temperature=0), seed=6),
    ]


def opening(order: Order, seed: int = 0, spread: float = 0.2, context: int = 96) -> MultimodalModel:
    """A model that often opens a picture by itself: the host head has a bias for it."""
    torch.manual_seed(seed)
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(bias=True), order=Raster()),
        Modality(name="image", tokenizer=Palette(6), head=LMHead(), order=order),
    ]
    config = BackboneConfig(width=32, layers=2, heads=4, kv_heads=2)
    model = MultimodalModel(config, modalities, context=context).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, spread)
        model.heads["text"].bias[model.vocabulary.begin("image")] = 4.0 * spread * 32**0.5  # four standard deviations
    return model


ORDERS = {"raster": Raster, "masked": lambda: Masked(steps=3, rate_condition=True, micro=(0.5,))}


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("order", ORDERS)
def test_cached_is_uncached_and_batched_is_one_by_one(order: str, guidance: float) -> None:
    model, requests = opening(ORDERS[order]()), mixed(guidance)
    together = flat(Engine(model).generate(requests))
    assert any(len(row) > 2 for row in together)  # some row opened a picture in its text
    assert together == flat(Uncached(model).generate(requests))
    assert together == [flat(Engine(model).generate([request]))[0] for request in requests]
    backwards = flat(Engine(model).generate(requests[::-1]))
    assert together == backwards[::-1]


def test_a_seed_means_the_same_everywhere_and_another_seed_something_else() -> None:
    model, request = tiny(), mixed()[0]
    results = [flat(Engine(model).generate([replace(request, seed=seed)])) for seed in (7, 7, 8, 9)]
    assert results[0] == results[1] and results[0] != results[2] != results[3]
    torch.manual_seed(99)  # the global generator has no part in it
    assert flat(Engine(model).generate([replace(request, seed=7)])) == results[0]


# --- structure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spread", [0.2, 30.0])
def test_structure_is_certain_whatever_the_weights(order: str, spread: float) -> None:
    items = 0
    for seed in range(4):
        model = opening(ORDERS[order](), seed, spread)
        sampling = Sampling(temperature=(0.0, 1.0, 5.0, 1.0)[seed], guidance=(1.0, 3.0)[seed % 2])
        request = Request(prompt=[text("so")], free=True, sampling=sampling)
        requests = [replace(request, max_tokens=room, seed=room) for room in (3, 5, 8, 21, 60)]
        for request, row in zip(requests, Engine(model).generate(requests), strict=True):
            used = 0
            for before, segment in zip([None, *row], row, strict=False):
                ids, grid = segment.content.ids, segment.content.grid
                if segment.modality == "image":
                    items += 1
                    assert len(grid) == 2 and all(1 <= extent <= 6 for extent in grid)
                    assert len(ids) == grid[0] * grid[1] and bool(((ids >= 0) & (ids < 8)).all())
                    used += len(ids) + 4
                else:
                    assert 0 < len(ids) and bool(((ids >= 0) & (ids < 256)).all())
                    assert before is None or before.modality == "image"
                    used += len(ids)
            assert used <= request.max_tokens
    assert items > 10


def test_items_that_do_not_fit_are_not_opened() -> None:
    model = opening(Raster())
    made = Engine(model).generate([Request(prompt=[], free=True, max_tokens=5, seed=seed) for seed in range(20)])
    assert all(segment.modality == "text" for row in made for segment in row)
    tight = Engine(model).generate([Request(prompt=[], free=True, max_tokens=7, seed=seed) for seed in range(20)])
    sizes = {len(s.content) for row in tight for s in row if s.modality == "image"}
    assert sizes and max(sizes) <= 3  # begin, two extents, end


def test_a_prompt_may_fill_the_context_and_not_more() -> None:
    model = tiny(context=32)
    # bos, 23 letters, begin, two sizes, four elements, end: 32
    item = Request(prompt=[text("a" * 23)], items=[("image", (2, 2))], text=False)
    assert flat(Engine(model).generate([item]))[0][0][1] == (2, 2)
    guided = replace(item, sampling=Sampling(guidance=2.0))
    assert len(Engine(model).generate([guided])[0][0].content) == 4
    with pytest.raises(ValueError, match="prompt takes 25 positions and what is asked for 8, but the context holds 32"):
        Engine(model).generate([replace(item, prompt=[text("a" * 24)])])
    with pytest.raises(ValueError, match="the prompt takes 41 positions, but the context holds 32; shorten the prompt"):
        Engine(model).generate([Request(prompt=[text("a" * 40)])])
    (row,) = Engine(model).generate([Request(prompt=[text("a" * 20)], max_tokens=500)])
    assert sum(len(s.content) for s in row) <= 32 - 21


def test_empty_requests() -> None:
    model = tiny()
    assert Engine(model).generate([]) == []
    (row,) = Engine(model).generate([Request(prompt=[], max_tokens=4)])
    assert all(segment.modality == "text" for segment in row)
    assert Engine(model).generate([Request(prompt=[text("hi")], max_tokens=0)]) == [[]]
    assert Engine(model).generate([Request(prompt=[text("")], text=False)]) == [[]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": [("image", (5, 1))]}, r"grid of \(5, 1\) does not fit the largest grid \(4, 4\)"),
        ({"items": [("image", (0, 2))]}, "an axis can have 1..256 elements, got 0"),
        ({"items": [("smell", (1, 1))]}, "no modality 'smell' in this model; it has text, image"),
        ({"items": [("text", (3,))]}, "text is written as text, not opened as an item"),
        ({"known": (torch.zeros(4), torch.ones(4))}, "`items` is empty"),
        (
            {"items": [("image", (2, 2))], "known": (torch.tensor([0, 8, 0, 0]), torch.ones(4, dtype=torch.bool))},
            r"`known` holds ids 0..8; those of image are 0..7",
        ),
        (
            {"items": [("image", (2, 2))], "known": (torch.zeros(3).long(), torch.ones(3, dtype=torch.bool))},
            r"given elements cover 3 and 3 places, but the grid \(2, 2\) has 4",
        ),
    ],
)
def test_impossible_requests_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(tiny()).generate([Request(prompt=[text("a")], **changes)])


def test_damaged_weights_are_named() -> None:
    model = tiny()
    model.embedding.weight.data[97] = float("nan")
    with pytest.raises(ValueError, match=r"the logits are not numbers \(NaN\)"):
        Engine(model).generate([Request(prompt=[text("a")])])


# --- what the caller gets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_events_tell_every_step_once(order: str) -> None:
    events: list[Event] = []
    requests = [
        Request(prompt=[text("a")], items=[("image", (2, 3))], text=False, sampling=Sampling(guidance=2.0)),
        Request(prompt=[text("b")], max_tokens=5, seed=1),
    ]
    made = Engine(tiny(ORDERS[order]())).generate(requests, events.append)
    picture = [event for event in events if event.row == 0]
    assert {event.modality for event in picture} == {"image"}
    assert len(picture) == (6 if order == "raster" else 3)
    shares = [event.done for event in picture]
    assert shares == sorted(set(shares)) and shares[-1] == 1.0 and 0 < shares[0] < 1
    final = made[0][0].content.ids
    assert torch.equal(picture[-1].content, final)
    for event, after in zip(picture, picture[1:], strict=False):  # snapshots
        assert not torch.equal(event.content, after.content)
    words = [event.content.tolist() for event in events if event.row == 1]
    assert words == [made[1][0].content.ids.tolist()[: n + 1] for n in range(len(words))]
    assert len(words) == len(made[1][0].content)


@pytest.mark.parametrize(("items", "words"), [(1, False), (3, False), (2, True)])
def test_events_tell_the_share_of_the_whole_row(items: int, words: bool) -> None:
    events: list[Event] = []
    request = Request(prompt=[text("a")], items=[("image", (2, 2))] * items, text=words, max_tokens=3)
    Engine(tiny()).generate([request], events.append)
    shares = [event.share for event in events if event.modality == "image"]
    assert shares == pytest.approx([(n + 1) / (4 * (items + words)) for n in range(4 * items)])
    assert [event.done for event in events[:4]] == [0.25, 0.5, 0.75, 1.0]
    said = [event.share for event in events if event.modality == "text"]
    assert said == sorted(said) and all(share > shares[-1] for share in said) and max(said, default=1) <= 1


@pytest.mark.parametrize(("forced", "most"), [(1, 1), (1, 60), (0, 60)])
def test_shares_reach_the_end_and_never_go_back(forced: int, most: int) -> None:
    """Nothing is written where one token is all that fits; and items may come that nobody asked for."""
    for seed in range(4):
        events: list[Event] = []
        request = Request(prompt=[text("a")], items=[("image", (2, 2))] * forced, free=True, max_tokens=most, seed=seed)
        Engine(tiny()).generate([request], events.append)
        shares = [event.share for event in events]
        assert shares == sorted(shares) and max(shares) <= 1
        assert most > 1 or shares[-1] == 1


def test_results_are_ordinary_tensors_and_the_model_stays_in_its_mode() -> None:
    model = tiny(dropout=0.5).train()
    first = Engine(model).generate([mixed()[0]])
    assert model.training and model.backbone.training
    assert flat(first) == flat(Engine(model).generate([mixed()[0]]))  # no dropout while generating
    tokens = model.build_document(first[0], torch.Generator())
    model.loss(tokens).total.backward()  # tensors of inference mode would refuse
    with pytest.raises(ValueError):
        Engine(model).generate([Request(prompt=[text("a" * 999)])])
    assert model.training


@pytest.mark.parametrize("order", ORDERS)
def test_given_elements_stay_as_they_are(order: str) -> None:
    model = tiny(ORDERS[order]())
    content = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
    given = torch.arange(8) < 5 if order == "raster" else torch.tensor([1, 0, 0, 1, 1, 0, 1, 1]).bool()
    made = [
        Engine(model)
        .generate(
            [Request(prompt=[text("a")], items=[("image", (2, 4))], text=False, known=(content, given), seed=seed)]
        )[0][0]
        .content.ids
        for seed in range(4)
    ]
    assert all(torch.equal(ids[given], content[given]) for ids in made)
    assert len({tuple(ids.tolist()) for ids in made}) > 1
    everything = Request(prompt=[], items=[("image", (2, 4))], text=False, known=(content, torch.ones(8).bool()))
    assert torch.equal(Engine(model).generate([everything])[0][0].content.ids, content)


def test_each_modality_has_its_own_sampling() -> None:
    model = tiny()
    request = Request(
        prompt=[text("a")],
        items=[("image", (4, 4))],
        max_tokens=12,
        sampling=Sampling(temperature=3.0),
        by_modality={"image": Sampling(temperature=0)},
    )
    made = flat(Engine(model).generate([replace(request, seed=seed) for seed in range(3)]))
    assert made[0][0] == made[1][0] == made[2][0]  # greedy pictures
    assert made[0][1] != made[1][1] != made[2][1]  # free text


# --- guidance -------------------------------------------------------------------------------------------------------


def scales(model: MultimodalModel, sampling: Sampling) -> list[float]:
    """Guidance scale of every draw of a picture, 1 where the unconditional branch had no say."""
    seen: list[float] = []

    class Watching(LMHead):
        def sample(self, hidden: Tensor, draws: Sequence[Draw]) -> list[tuple[Tensor, Tensor | None]]:
            seen.extend(1.0 if draw.unconditional is None else draw.scale for draw in draws)
            return super().sample(hidden, draws)

    model.heads["image"].__class__ = Watching
    Engine(model).generate([Request(prompt=[text("a")], items=[("image", (2, 4))], text=False, sampling=sampling)])
    return seen


def test_guidance_schedules() -> None:
    model = tiny()
    assert scales(model, Sampling()) == [1.0] * 8
    assert scales(model, Sampling(guidance=3.0)) == [3.0] * 8
    assert scales(model, Sampling(guidance=3.0, guidance_schedule="ramp")) == [1 + 2 * n / 8 for n in range(8)]
    inside = Sampling(guidance=3.0, guidance_interval=(0.25, 0.5))
    assert scales(model, inside) == [1, 1, 3, 3, 3, 1, 1, 1]
    parallel = scales(tiny(Masked(steps=4)), Sampling(guidance=2.0, guidance_schedule="ramp"))
    assert parallel[0] == 1.0 and parallel == sorted(parallel) and len(parallel) == 4 and parallel[-1] < 2.0


def test_the_unconditional_branch_runs_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twins = tiny(), []
    original = Engine._sample

    def watched(self: Engine, rows: Any, feeds: list[Feed], hidden: Tensor) -> None:
        twins.append(sum(feed.branch > 0 for feed in feeds))
        original(self, rows, feeds, hidden)

    monkeypatch.setattr(Engine, "_sample", watched)
    Engine(model).generate(mixed(1.0)[:4])
    assert not any(twins)
    Engine(model).generate(mixed(2.0)[:4])
    assert max(twins) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
        ({"temperature": float("inf")}, "temperature must be a finite number, got inf"),
        ({"temperature": None}, "temperature must be a finite number, got None"),
        ({"temperature": 10**400}, "temperature must be a finite number"),
        ({"top_p": float("nan")}, "top_p must be a finite number, got nan"),
        ({"top_p": True}, "top_p must be a finite number, got True"),
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
        ({"guidance": float("-inf")}, "guidance must be a finite number, got -inf"),
        ({"guidance": "x"}, "guidance must be a finite number, got 'x'"),
        ({"guidance": 1e39}, "guidance must be within ±1,000,000"),
        ({"guidance_schedule": "wrong"}, "guidance_schedule must be constant or ramp, got 'wrong'"),
        ({"guidance_schedule": ["ramp"]}, "guidance_schedule must be constant or ramp"),
        ({"guidance_interval": None}, "guidance_interval must be two numbers, from and to, got None"),
        ({"guidance_interval": (0.0, 0.5, 1.0)}, "guidance_interval must be two numbers"),
        ({"guidance_interval": (0.0, "1")}, "guidance_interval must be a finite number, got '1'"),
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"top_k": True}, "top_k must be a whole number, got True"),
        ({"steps": "many"}, "steps must be a whole number, got 'many'"),
        ({"denoising_steps": None}, "denoising_steps must be a whole number, got None"),
        ({"denoising_steps": 10**9}, "steps and denoising_steps must be at most 10,000"),
    ],
)
def test_sampling_of_wrong_types_or_without_bounds_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_sampling_takes_numbers_of_numpy() -> None:
    given = Sampling(top_k=np.int64(3), guidance=np.float32(2), temperature=1, guidance_interval=[0, 1])  # type: ignore[arg-type]
    assert given == Sampling(top_k=3, guidance=2.0) and hash(given) == hash(Sampling(top_k=3, guidance=2.0))
    assert type(given.top_k) is int and type(given.guidance) is float


def test_guidance_moves_towards_the_condition() -> None:
    """With a large scale the draw is the id whose logit the prompt raises most, u + s·(c − u) for s → ∞."""
    model = tiny()
    prompt = [text("red")]
    greedy = Sampling(guidance=1e4, temperature=0)
    request = Request(prompt=prompt, items=[("image", (1, 1))], text=False, sampling=greedy)
    (made,) = Engine(model).generate([request])
    with torch.no_grad():
        rows = []
        for given in ([*prompt], [Segment("null")]):
            document = model.build_document([*given, replace(made[0], loss=True)], torch.Generator())
            place = int((document.modality == 1).nonzero()[0]) - 1
            rows.append(model.logits(document, "image")[place])
    assert made[0].content.ids.tolist() == [int((rows[0] - rows[1]).argmax())]
