"""Sub-codes: patterns against slow references and MusicGen's own, the delay order, and sub-codes throughout the engine."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm.generation import Engine, Event, Request
from mm.heads.lm import LMHead
from mm.interfaces import DRAWN, Encoded, Layout, Sampling
from mm.layout import NULL, DocumentBuilder, Draft, Segment
from mm.model import MultimodalModel
from mm.orders.delay import Delay
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.patterns import Pattern
from mm.stream import Placed, TokenStream, pack, unpack
from mm.testing import Levels, Palette, Uncached, predictors, tiny, watch

RNG = torch.Generator
CODES = st.integers(1, 5)
ORDERS = {
    "delay": Delay(),
    "moshi": Delay(delays=[0, 1, 1, 1]),
    "parallel": Delay("parallel"),
    "flatten": Delay("flatten"),
    "partial": Delay("flatten", groups=[0, 1, 1, 1], along=True),
    "coarse first": Delay("coarse_first", along=True),
}
PROMPT = [Segment("text", "say it", loss=False)]


def frames(count: int, seed: int = 0, num_codes: int = 4) -> Encoded:
    codes = torch.randint(0, 8, (count, num_codes), generator=RNG().manual_seed(seed))
    return Encoded(grid=(count,), codes=codes)


def model(order: Any = None, **options: Any) -> MultimodalModel:
    """Text, and lists of 4 sub-codes (called image, as in all tiny models)."""
    return tiny(order or Delay(), tokenizer=Levels(), **options)


def document(of: MultimodalModel, *segments: Segment) -> TokenStream:
    return of.build_document(segments, RNG()).validate()


def close(mine: list[Tensor], wanted: Tensor) -> None:
    torch.testing.assert_close(torch.cat(mine), wanted, atol=2e-5, rtol=1e-4)


# --- patterns -------------------------------------------------------------------------------------------------------


def slow(codes: Tensor, steps: list[list[tuple[int, int]]]) -> Tensor:
    out = torch.full((len(steps), codes.shape[1]), -1)
    for number, places in enumerate(steps):
        for t, q in places:
            out[number, q] = codes[t, q]
    return out


def check(pattern: Pattern, count: int, steps: list[list[tuple[int, int]]]) -> None:
    assert pattern.layout(count) == steps and pattern.steps(count) == len(steps)
    codes = torch.randint(0, 9, (count, pattern.num_codes))
    built = pattern.build(codes)
    assert torch.equal(built, slow(codes, steps)) and torch.equal(pattern.holds(count), built >= 0)
    assert torch.equal(pattern.revert(built, count), codes)
    assert len(pattern.frame(count)) == len(steps)


@given(st.integers(0, 9), st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_delay_and_parallel(count: int, delays: list[int]) -> None:
    total = count + max(delays) if count else 0
    steps = [[(t, q) for t in range(count) for q, d in enumerate(delays) if t + d == s] for s in range(total)]
    check(Pattern.delay(delays), count, steps)
    assert Pattern.delay(delays).frame(count).tolist() == list(range(total))
    check(Pattern.parallel(len(delays)), count, [[(t, q) for q in range(len(delays))] for t in range(count)])


@given(st.integers(0, 9), st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_flatten(count: int, raw: list[int]) -> None:
    groups = [sorted(set(raw)).index(x) for x in raw]
    steps = [[(t, q) for q, g in enumerate(groups) if g == n] for t in range(count) for n in range(max(groups) + 1)]
    check(Pattern.flatten(groups), count, steps)
    together = [t + n / (max(groups) + 1) for t in range(count) for n in range(max(groups) + 1)]
    assert Pattern.flatten(groups).frame(count).tolist() == pytest.approx(together)


@given(st.integers(0, 9), CODES)
def test_coarse_first(count: int, num_codes: int) -> None:
    steps = [[(t, 0)] for t in range(count)]
    if num_codes > 1:
        steps += [[(t, q) for q in range(1, num_codes)] for t in range(count)]
    check(Pattern.coarse_first(num_codes), count, steps)
    assert Pattern.coarse_first(num_codes).frame(count).tolist() == [*range(count)] * min(num_codes, 2)


def test_no_pattern() -> None:
    for wrong, message in [
        (lambda: Pattern(()), "got 0 offsets"),
        (lambda: Pattern((0, 1), late=(0,)), "got 2 offsets and 1 passes"),
        (lambda: Pattern.delay([0, -1]), "offsets and passes from 0 to 1024"),
        (lambda: Pattern.delay([0, 10**9]), "offsets and passes from 0 to 1024"),
        (lambda: Pattern.delay([0, 0.5]), "whole numbers"),  # type: ignore[list-item]
        (lambda: Pattern((0, 1), late=(0, 1)), "can't be delayed too"),
        (lambda: Pattern.flatten([0, 2]), "numbered from 0 without gaps"),
        (lambda: Pattern.flatten([]), "numbered from 0 without gaps"),
        (lambda: Pattern.parallel(3).build(torch.zeros(2, 4)), r"of 3 sub-codes, got codes of shape \(2, 4\)"),
        (lambda: Pattern.delay([0, 1]).revert(torch.zeros(4, 2), 4), "take 5 steps, got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()


@settings(max_examples=6)
@given(st.integers(0, 5), st.integers(4, 9), st.integers(1, 4))
def test_the_delay_pattern_is_musicgens(prefix: int, count: int, num_codes: int) -> None:
    """`build_delay_pattern_mask` of transformers: a start token, then our steps; places to be generated are −1 there."""
    musicgen = pytest.importorskip("transformers").MusicgenForCausalLM
    prefix, pad = min(prefix, count - 1), 99
    config = musicgen.config_class(
        vocab_size=8, num_codebooks=num_codes, num_hidden_layers=1, hidden_size=8, num_attention_heads=1, ffn_dim=8
    )
    start = torch.full((num_codes, 1), pad)
    codes = torch.randint(0, 8, (count, num_codes))
    given_to = torch.cat((start, codes[:prefix].T), 1)
    _, mask = musicgen(config).build_delay_pattern_mask(given_to, pad, count + num_codes)
    known = codes.clone()
    known[prefix:] = -1
    wanted = Pattern.delay(range(num_codes)).build(known, fill=pad)
    assert torch.equal(mask[:, 1:].T, wanted) and bool((mask[:, 0] == pad).all())


# --- the order ------------------------------------------------------------------------------------------------------


def test_layout() -> None:
    layout = Delay().layout(frames(3), context=False, rng=RNG())
    assert layout.order.tolist() == [0, 1, 2, 3, 4, 5] and layout.target.tolist() == [1, 2, 3, 4, 5, 6]
    assert layout.enters and not layout.copy.any() and not layout.time.any()
    assert layout.held is not None and torch.equal(layout.held, Pattern.delay(range(4)).build(frames(3).codes))
    assert layout.position[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    flat = Delay("flatten").layout(frames(2), context=False, rng=RNG())
    assert flat.position[:, 2].tolist() == [*range(8)]
    along = Delay("flatten", along=True).layout(frames(2), context=False, rng=RNG())
    assert along.position[:, 2].tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


def test_loss_is_over_what_stands_there() -> None:
    """Each step's loss is the mean over its own sub-codes."""
    of, item = model(), frames(3)
    stream = document(of, *PROMPT, Segment("image", item))
    hidden = predictors(of, stream, "image")
    logits = of.head("image").logits(hidden).detach().log_softmax(-1)  # type: ignore[operator]
    wanted = []
    for step, places in enumerate(Pattern.delay(range(4)).layout(3)):
        wanted.append(-sum(logits[step, q, item.codes[t, q]] for t, q in places) / len(places))
    report = of.loss(stream)
    assert report.count["image"] == 6
    assert report.raw["image"].item() == pytest.approx(float(sum(wanted)) / 6, rel=1e-5)


def test_frames_and_not_steps_span_the_text() -> None:
    of = model(Delay(along=True))
    stream = document(of, Segment("text", "abcdef"), Segment("image", frames(3)))
    steps = stream.position[stream.modality == 1]
    assert steps[:, 0].tolist() == [1, 3, 5, 7, 9, 11]  # the text begins at 1 and has 6 letters: 2 a frame


def test_steps_without_sub_codes_teach_nothing() -> None:
    """Delays count from the least of them, and gaps between them are not learned."""
    assert torch.equal(Delay(delays=[2, 3]).pattern(2).when(3), Delay(delays=[0, 1]).pattern(2).when(3))
    of = model(Delay(delays=[7, 7, 3, 3]))
    item = frames(2)
    stream = document(of, *PROMPT, Segment("image", item))
    report = of.loss(stream)
    assert int((stream.modality == 1).sum()) == 6 and report.count["image"] == 4, "steps 2 and 3 are empty"
    assert report.raw["image"] > 0.1
    assert (of.modalities[1].order.arguments()["delays"]) == [7, 7, 3, 3]
    seen = watch(of)
    ((made,),) = Engine(of).generate([Request(prompt=PROMPT, items=[("image", (2,))], text=False)])
    wanted = predictors(of, document(of, *PROMPT, made), "image")
    assert len(wanted) == 4
    close([hidden[draw.rows] for hidden, draw, _ in seen["image"]], wanted)


def test_refusals() -> None:
    for wrong, message in [
        (lambda: Delay("sideways"), "pattern .*, expected one of delay, parallel, flatten, coarse_first"),  # type: ignore[arg-type]
        (lambda: Delay("parallel", delays=[0, 1]), "delays belong to the pattern delay"),
        (lambda: Delay(groups=[0, 1]), "groups belong to the pattern flatten"),
        (lambda: Delay(delays=[0, -3]), "offsets and passes from 0"),
        (lambda: model(Delay(delays=[0, 1])), "given for 2 sub-codes, but the tokenizer has 4"),
        (lambda: tiny(Delay(), tokenizer=Palette()), "this tokenizer is discrete"),
        (lambda: Delay().layout(Encoded(grid=(2, 2), codes=torch.zeros(4, 4)), context=False, rng=RNG()), "lists of"),
        (
            lambda: Delay().layout(Encoded(grid=(4,), ids=torch.zeros(4)), context=False, rng=RNG()),
            "lists of sub-codes",
        ),
        (lambda: Delay().session((2, 2), Sampling(), RNG(), num_codes=4), "lists of sub-codes"),
        (lambda: Delay().session((2,), Sampling(), RNG()), "and 0 sub-codes"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()
    for codes in (torch.tensor([[0, 1, 2, 8]]), torch.tensor([[0, 1, 2, -1]])):
        with pytest.raises(ValueError, match=r"sub-codes span -?\d..\d, but its tokenizer has 0..7"):
            document(model(), Segment("image", Encoded(grid=(1,), codes=codes)))


# --- training and generation agree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ORDERS)
def test_step_by_step_sees_what_training_sees(name: str, guidance: float) -> None:
    of = model(ORDERS[name])
    seen = watch(of)
    before = [Segment("image", frames(2, seed=7), loss=False), *PROMPT]
    request = Request(prompt=before, items=[("image", (5,))], max_tokens=5, sampling=Sampling(guidance=guidance))
    (made,) = Engine(of).generate([replace(request, seed=3)])
    item, text = made
    assert item.content.codes.shape == (5, 4) and bool(((item.content.codes >= 0) & (item.content.codes < 8)).all())
    whole = document(of, *before, item, text)
    close([hidden[draw.rows] for hidden, draw, _ in seen["image"]], predictors(of, whole, "image"))
    wanted = predictors(of, whole, "text")[3:]  # begin, extent and end of the item are certain
    close([hidden[draw.rows] for hidden, draw, _ in seen["text"]], wanted[: len(seen["text"])])
    assert len(text.content) > 0
    steps = ORDERS[name].places(5, Levels().spec)
    twins = [hidden[draw.unconditional] for hidden, draw, _ in seen["image"] if draw.unconditional is not None]
    assert len(seen["image"]) == steps and len(twins) == (steps if guidance != 1.0 else 0)
    if twins:
        close(twins, predictors(of, document(of, Segment(NULL), item), "image"))
    drawn = torch.cat([tokens for _, _, tokens in seen["image"]])
    pattern = ORDERS[name].pattern(4)
    held = pattern.holds(5)
    assert torch.equal(drawn[held], pattern.build(item.content.codes)[held])  # what is fed is what was drawn


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("prefix", [1, 3, 5])
def test_given_frames_are_continued(name: str, prefix: int) -> None:
    of = model(ORDERS[name])
    seen = watch(of)
    known = (frames(5, seed=2).codes, torch.arange(5) < prefix)
    request = Request(prompt=PROMPT, items=[("image", (5,))], text=False, known=known)
    ((item,),) = Engine(of).generate([request])
    assert torch.equal(item.content.codes[:prefix], known[0][:prefix])
    pattern = ORDERS[name].pattern(4)
    steps = pattern.build(torch.where(known[1][:, None], known[0], DRAWN))
    open_steps = (steps == DRAWN).any(1)
    assert int(open_steps.sum()) == len(seen["image"])
    if len(seen["image"]):  # of a step that the prefix fills in part the rest is drawn
        assert torch.equal(torch.cat([draw.given for _, draw, _ in seen["image"]]), steps[open_steps])
        wanted = predictors(of, document(of, *PROMPT, item), "image")[open_steps]
        close([hidden[draw.rows] for hidden, draw, _ in seen["image"]], wanted)


@pytest.mark.parametrize("stretch", [1.0, 2.0, 0.5, 1e300, 10**400], ids=str)
def test_stretched_extents_have_their_place(stretch: float) -> None:
    """The room that an item may take is that of its stretched extent, up to the largest that there is."""
    of, most = model(context=96), Levels().spec.max_grid[0]
    request = Request(prompt=PROMPT, items=[("image", range(4, 5))], text=False, stretch=stretch)
    ((item,),) = Engine(of).generate([request])
    assert item.content.grid == (min(most, round(4 * stretch)),)


def test_extents_that_cannot_be() -> None:
    for items, stretch, message in (
        ([("image", range(200, 300))], 1.0, "at least 200 elements, but has"),
        ([("image", None)], float("nan"), "a finite number above 0; got nan"),
        ([("image", None)], float("inf"), "a finite number above 0; got inf"),
        ([("image", None)], 0.0, "a finite number above 0; got 0.0"),
        ([("image", None)], -1.0, "a finite number above 0; got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model()).generate([Request(prompt=PROMPT, items=items, stretch=stretch)])


def test_rows_in_different_modes() -> None:
    of = model(Delay(along=True))
    requests = [
        Request(prompt=PROMPT, items=[("image", (4,))], max_tokens=6, sampling=Sampling(guidance=2.0), seed=1),
        Request(prompt=[Segment("image", frames(3))], max_tokens=9, seed=2),
        Request(
            prompt=[*PROMPT, Segment("image", frames(2))], items=[("image", (2,)), ("image", (3,))], text=False, seed=3
        ),
        Request(
            prompt=PROMPT, items=[("image", (4,))], known=(frames(4).codes, torch.arange(4) < 2), max_tokens=3, seed=4
        ),
    ]
    together = Engine(of).generate(requests)
    for request, row in zip(requests, together, strict=True):
        for engine in (Engine(of), Uncached(of)):
            (alone,) = engine.generate([request])
            assert [s.modality for s in alone] == [s.modality for s in row]
            assert all(torch.equal(a.content.content, b.content.content) for a, b in zip(alone, row, strict=True))


def test_events_tell_of_frames() -> None:
    events: list[Event] = []
    Engine(model()).generate([Request(prompt=PROMPT, items=[("image", (3,))], text=False)], events.append)
    assert [event.content.shape for event in events] == [(3, 4)] * 6
    assert [event.final for event in events] == [0, 0, 0, 1, 2, 3]  # a frame is whole when its last sub-code is
    assert events[-1].done == 1.0 and [event.done for event in events] == sorted(event.done for event in events)


@pytest.mark.parametrize("name", ["delay", "flatten", "coarse first"])
def test_items_that_the_model_opens_fit(name: str) -> None:
    """The text head wants nothing but items: they come, and never outgrow the context, in steps rather than in frames."""
    of = model(ORDERS[name], context=48)
    of.heads["text"] = head = LMHead(bias=True)
    head.build(width=32, spec=of.modalities[0].tokenizer.spec, controls=of.grammar.size - 256)
    with torch.no_grad():
        head.bias[of.vocabulary.begin("image")] = 30.0
    for seed in range(6):
        (made,) = Engine(of).generate([Request(prompt=PROMPT, free=True, max_tokens=40, seed=seed)])
        items = [s for s in made if s.modality == "image"]
        assert items
        stream = of.build_document([*PROMPT, *made], RNG(), close=False)
        assert len(stream) <= 48
    with pytest.raises(ValueError, match="what is asked for"):
        Engine(of).generate([Request(prompt=PROMPT, items=[("image", (40,))], text=False)])


def test_known_is_checked() -> None:
    of, given_to = model(), torch.arange(4) < 2
    for content, message in [
        (torch.zeros(4, 3, dtype=torch.int64), r"shape \(4, 3\) of torch.int64; image needs 4 sub-codes"),
        (torch.zeros(4, 4), "as whole numbers"),
        (torch.full((4, 4), 8), "holds ids 8..8; those of image are 0..7"),
        (torch.zeros(3, 4, dtype=torch.int64), "cover 3 and 4 places, but the grid .4,. has 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            Engine(of).generate([Request(prompt=PROMPT, items=[("image", (4,))], known=(content, given_to))])
    known = (frames(4).codes, given_to)
    two = [("image", (4,)), ("image", None)]  # the model may choose the extents of others
    ((first, _),) = Engine(of).generate([Request(prompt=PROMPT, items=two, known=known, text=False)])
    assert torch.equal(first.content.codes[:2], known[0][:2])
    with pytest.raises(ValueError, match="whose extents the model is to choose"):
        Engine(of).generate([Request(prompt=PROMPT, items=two[::-1], known=known)])
    with pytest.raises(ValueError, match="given elements only at the start: got 2, 0"):
        request = Request(prompt=PROMPT, items=[("image", (4,))], known=(frames(4).codes, torch.arange(4) > 1))
        Engine(of).generate([request])


# --- sub-codes in the other orders ----------------------------------------------------------------------------------


def test_raster_takes_a_frame_a_step() -> None:
    """ELM: K heads side by side, which is the pattern `parallel`."""
    raster, parallel = model(Raster()), model(Delay("parallel"))
    request = Request(prompt=PROMPT, items=[("image", (5,))], max_tokens=4, seed=5)
    (first,), (second,) = Engine(raster).generate([request]), Engine(parallel).generate([request])
    assert all(torch.equal(a.content.content, b.content.content) for a, b in zip(first, second, strict=True))
    assert first[0].content.codes.shape == (5, 4)


def test_masked_fills_in_frames() -> None:
    of = model(Masked(steps=3))
    known = (frames(6).codes, torch.tensor([True, False, True, False, True, False]))
    (made,) = Engine(of).generate([Request(prompt=PROMPT, items=[("image", (6,))], known=known, max_tokens=3)])
    assert torch.equal(made[0].content.codes[known[1]], known[0][known[1]])
    seen = watch(of)
    ((item,),) = Engine(of).generate(
        [Request(prompt=PROMPT, items=[("image", (6,))], text=False, sampling=Sampling(steps=1))]
    )
    (hidden, draw, tokens), stream = seen["image"][0], document(of, *PROMPT, Segment("image", item.content))
    assert torch.equal(tokens, item.content.codes)
    stream = replace(
        stream,
        time=(stream.modality == 1).float(),
        target=torch.where(stream.modality == 1, torch.arange(len(stream)), -1),
    )
    close([hidden[draw.rows]], predictors(of, stream, "image"))


# --- what a position reads ------------------------------------------------------------------------------------------


class Blind(Raster):
    """The raster order, whose positions read nothing of themselves."""

    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        plain = super().layout(encoded, context=context, rng=rng)
        return replace(plain, reads=None if context else torch.full_like(encoded.content, -1))


def test_reads_travel_with_the_stream() -> None:
    of = model(Blind())
    documents = [
        [Segment("image", frames(2), loss=False), Segment("image", frames(3, seed=1))],
        [Segment("image", frames(2))],
    ]
    streams = [document(of, *segments) for segments in documents]
    streams.append(document(of, Segment("image", frames(4), loss=False), Segment("text", "a")))
    assert streams[0].codes["image"].reads is not None and streams[2].codes["image"].reads is None
    packed = pack(streams)
    record = packed.codes["image"]
    assert record.reads is not None and torch.equal(record.read, record.reads)
    assert torch.equal(record.reads[:2], frames(2).codes) and bool((record.reads[2:7] == -1).all())
    assert torch.equal(record.reads[7:], frames(4).codes)  # where nothing else is said, the values are read
    parts = unpack(packed.to("cpu"))
    for before, after in zip(streams, parts, strict=True):
        torch.testing.assert_close(of.embed(before), of.embed(after))
    again = pickle.loads(pickle.dumps(packed))  # as worker processes send it
    assert torch.equal(again.codes["image"].reads, record.reads)
    truth = of.truth(packed, 1, record.index)
    assert torch.equal(truth, record.values) and bool((truth >= 0).all())
    blind = of.embed(streams[1])[streams[1].codes["image"].index]
    assert not blind.any()  # −1 reads nothing
    with pytest.raises(ValueError, match="3 values, but 2 rows to be read"):
        Placed(values=torch.zeros(3, 1), index=torch.arange(3), reads=torch.zeros(2, 1))


def test_vectors_can_be_read_in_the_place_of_others() -> None:
    builder: DocumentBuilder = model(Raster()).build_document
    draft = Draft(builder.vocabulary)
    layout = Raster().layout(frames(3), context=False, rng=RNG())
    draft.item(1, frames(3).codes, replace(layout, held=frames(3, seed=5).codes), 1.0, 0.0, 1.0)
    assert torch.equal(draft.stream().codes["image"].values, frames(3, seed=5).codes)
