"""VALL-E's stages: the first sub-code frame by frame, each further one for all frames at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mm.generation import Engine, Event, Request
from mm.interfaces import DRAWN, Encoded, Layout, Sampling
from mm.layout import NULL, Segment
from mm.model import MultimodalModel
from mm.orders.stages import STAGE, Stages
from mm.stream import TokenStream
from mm.testing import Levels, Palette, Uncached, predictors, rule, tiny, watch

RNG = torch.Generator
PROMPT = [Segment("text", "say it", loss=False)]


class At(Stages):
    """The stages order with the stage given, not drawn."""

    stage = 1

    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        while True:
            layout = super().layout(encoded, context=context, rng=rng)
            if context or round(4 * float(layout.inject[STAGE].max())) == self.stage:
                return layout


def frames(count: int, seed: int = 0) -> Encoded:
    codes = torch.randint(0, 8, (count, 4), generator=RNG().manual_seed(seed))
    return Encoded(grid=(count,), codes=codes)


def model(order: Any = None, **options: Any) -> MultimodalModel:
    return tiny(order or Stages(), tokenizer=Levels(), **options)


def document(of: MultimodalModel, *segments: Segment) -> TokenStream:
    return of.build_document(segments, RNG().manual_seed(0)).validate()


def close(mine: list[torch.Tensor], wanted: torch.Tensor) -> None:
    torch.testing.assert_close(torch.cat(mine), wanted, atol=2e-5, rtol=1e-4)


def test_layout() -> None:
    item, stages = frames(3), set()
    for seed in range(30):
        layout = Stages().layout(item, context=False, rng=RNG().manual_seed(seed))
        stage = round(4 * float(layout.inject[STAGE][3]))
        stages.add(stage)
        assert layout.order.tolist() == [0, 1, 2, 3, 3, 3] and layout.copy.tolist() == [0, 0, 0, 1, 1, 1]
        assert layout.target.tolist() == [1, 2, 6, 3, 4, 5] and layout.enters
        assert layout.position[:, 0].tolist() == [0, 1, 2] * 2 and not layout.time.any()
        assert layout.inject[STAGE].flatten().tolist() == [0] * 3 + [stage / 4] * 3
        held, reads = layout.held, layout.reads
        assert held is not None and reads is not None
        assert torch.equal(held[:3, 0], item.codes[:, 0]) and bool((held[:3, 1:] == -1).all())
        assert torch.equal(held[3:, stage], item.codes[:, stage]) and int((held[3:] >= 0).sum()) == 3
        assert torch.equal(reads[:3], held[:3])
        assert torch.equal(reads[3:, :stage], item.codes[:, :stage]) and bool((reads[3:, stage:] == -1).all())
    assert stages == {1, 2, 3}  # each has its turn
    given = Stages().layout(item, context=True, rng=RNG())
    assert torch.equal(given.held, item.codes) and given.reads is None and given.order.tolist() == [0, 1, 2]
    assert given.inject[STAGE].flatten().tolist() == [1, 1, 1]


def test_who_sees_whom() -> None:
    """A stage sees the prompt, every first sub-code and itself; nobody sees a stage."""
    stream = document(model(), *PROMPT, Segment("image", frames(3)), Segment("text", "ab"))
    seen = rule(stream)
    first = ((stream.modality == 1) & (stream.copy == 0)).nonzero()[:, 0].tolist()
    stage = (stream.copy == 1).nonzero()[:, 0].tolist()
    before, after = list(range(first[0])), list(range(stage[-1] + 1, len(stream)))
    assert len(first) == len(stage) == 3 and after
    for place in stage:
        assert seen[place].nonzero()[:, 0].tolist() == before + first + stage
    for number, place in enumerate(first):
        assert seen[place].nonzero()[:, 0].tolist() == before + first[: number + 1]
    for place in after:
        assert bool(seen[place, first].all()) and not bool(seen[place, stage].any())


def test_the_loss_is_the_mean_of_both_halves() -> None:
    of, item = model(At()), frames(5)
    stream = document(of, *PROMPT, Segment("image", item))
    logits = of.head("image").logits(predictors(of, stream, "image")).detach().log_softmax(-1)  # type: ignore[operator]
    first = -logits[:5, 0].gather(-1, item.codes[:, :1]).mean()
    second = -logits[5:, 1].gather(-1, item.codes[:, 1:2]).mean()
    report = of.loss(stream)
    assert report.count["image"] == 10
    assert report.raw["image"].item() == pytest.approx((first + second).item() / 2, rel=1e-5)
    report.total.backward()
    assert of.inject[STAGE].down.weight.grad is not None


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_generation_sees_what_training_sees(guidance: float, along: bool) -> None:
    order = At(along=along)
    of = model(order)
    seen = watch(of)
    before = [Segment("image", frames(2, seed=7), loss=False), *PROMPT]
    request = Request(prompt=before, items=[("image", (5,))], max_tokens=5, sampling=Sampling(guidance=guidance))
    (made,) = Engine(of).generate([replace(request, seed=3)])
    item, text = made
    assert item.content.codes.shape == (5, 4) and bool(((item.content.codes >= 0) & (item.content.codes < 8)).all())
    calls = seen["image"]
    assert [len(tokens) for _, _, tokens in calls] == [1] * 5 + [5] * 3
    assert [draw.sampling.temperature for _, draw, _ in calls] == [1.0] * 5 + [0.0] * 3
    for stage in (1, 2, 3):
        order.stage = stage
        for context, chosen in ((before, "rows"), ([Segment(NULL)], "unconditional")):
            if guidance == 1.0 and chosen == "unconditional":
                continue
            wanted = predictors(of, document(of, *context, item), "image")
            mine = [hidden[getattr(draw, chosen)] for hidden, draw, _ in calls]
            close(mine[:5], wanted[:5])
            close(mine[4 + stage : 5 + stage], wanted[5:])
        assert torch.equal(calls[4 + stage][2][:, stage], item.content.codes[:, stage])
    wanted = predictors(of, document(of, *before, item, text), "text")[3:]
    close([hidden[draw.rows] for hidden, draw, _ in seen["text"]], wanted[: len(seen["text"])])
    assert len(text.content) > 0


def test_passes_may_draw_too() -> None:
    of = model(Stages(greedy=False))
    seen = watch(of)
    Engine(of).generate(
        [Request(prompt=PROMPT, items=[("image", (4,))], text=False, sampling=Sampling(temperature=0.7))]
    )
    assert {draw.sampling.temperature for _, draw, _ in seen["image"]} == {0.7}


@pytest.mark.parametrize("prefix", [1, 4, 5])
def test_given_frames_are_continued(prefix: int) -> None:
    of = model()
    seen = watch(of)
    known = (frames(5, seed=2).codes, torch.arange(5) < prefix)
    request = Request(prompt=PROMPT, items=[("image", (5,))], max_tokens=3, known=known)
    (made,) = Engine(of).generate([request])
    assert torch.equal(made[0].content.codes[:prefix], known[0][:prefix])
    assert len(seen["image"]) == (0 if prefix == 5 else 5 - prefix + 3)
    for _, draw, _ in seen["image"]:
        assert draw.given is not None and int(((draw.given == DRAWN).sum(1) > 1).sum()) == 0


def test_rows_in_different_modes() -> None:
    of = model(Stages(along=True))
    requests = [
        Request(prompt=PROMPT, items=[("image", (4,))], max_tokens=6, sampling=Sampling(guidance=2.0), seed=1),
        Request(prompt=[Segment("image", frames(3))], max_tokens=9, seed=2),
        Request(
            prompt=[*PROMPT, Segment("image", frames(2))], items=[("image", (2,)), ("image", (3,))], text=False, seed=3
        ),
        Request(
            prompt=PROMPT, items=[("image", (4,))], known=(frames(4).codes, torch.arange(4) < 2), max_tokens=3, seed=4
        ),
        Request(prompt=PROMPT, free=True, max_tokens=30, seed=5),
    ]
    together = Engine(of).generate(requests)
    for request, row in zip(requests, together, strict=True):
        for engine in (Engine(of), Uncached(of)):
            (alone,) = engine.generate([request])
            assert [s.modality for s in alone] == [s.modality for s in row]
            assert all(torch.equal(a.content.content, b.content.content) for a, b in zip(alone, row, strict=True))


def test_an_item_as_long_as_the_context_has_room_for_its_passes() -> None:
    of = model(context=24)
    ((item,),) = Engine(of).generate([Request(prompt=PROMPT, items=[("image", (14,))], text=False)])
    assert item.content.codes.shape == (14, 4)
    with pytest.raises(ValueError, match="what is asked for 18"):
        Engine(of).generate([Request(prompt=PROMPT, items=[("image", (15,))], text=False)])


def test_events() -> None:
    events: list[Event] = []
    Engine(model()).generate([Request(prompt=PROMPT, items=[("image", (3,))], text=False)], events.append)
    assert [event.content.shape for event in events] == [(3, 4)] * 6
    assert [event.final for event in events] == [0] * 5 + [3]
    done = [event.done for event in events]
    assert done == pytest.approx([1 / 12, 2 / 12, 3 / 12, 6 / 12, 9 / 12, 1.0])


def test_refusals() -> None:
    for wrong, message in [
        (lambda: tiny(Stages(), tokenizer=Palette()), "this tokenizer is discrete with 1"),
        (lambda: tiny(Stages(), tokenizer=Levels(num_codes=1)), "this tokenizer is codes with 1"),
        (
            lambda: Stages().layout(Encoded(grid=(4,), ids=torch.zeros(4)), context=False, rng=RNG()),
            "lists of sub-codes",
        ),
        (lambda: Stages().session((2, 2), Sampling(), RNG(), num_codes=4), "lists of sub-codes"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match="given elements only at the start"):
        request = Request(prompt=PROMPT, items=[("image", (4,))], known=(frames(4).codes, torch.arange(4) > 1))
        Engine(model()).generate([request])
