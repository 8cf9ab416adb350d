"""Listening while speaking: rows alongside elements in training and generation, and items that end early (LSLM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mm.backbone import BackboneConfig
from mm.fusion import Alongside, Fusion
from mm.generation import Engine, Request
from mm.heads.depth import DepthHead
from mm.heads.lm import LMHead
from mm.interfaces import Encoded, Modality, Sampling, Spec
from mm.interfaces import Fusion as Way
from mm.layout import NULL, Segment
from mm.model import MultimodalModel
from mm.orders.delay import Delay
from mm.orders.raster import Raster
from mm.stream import pack
from mm.testing import Levels, Uncached, predictors, tiny, watch
from mm.tokenizers.text_bytes import TextBytes

WAYS = get_args(Way)
STOP = 8
PROMPT = [Segment("text", "say it", loss=False)]
Make = Callable[..., MultimodalModel]


class Hearing(Levels):
    """Levels with one more id, which stops the item, and three numbers alongside each element."""

    @property
    def spec(self) -> Spec:
        return replace(super().spec, vocab_size=STOP + 1, alongside={"heard": 3}, stop=STOP)


class Numbered(Levels):
    """Levels with two numbers alongside each element, for orders whose items don't end early."""

    @property
    def spec(self) -> Spec:
        return replace(super().spec, alongside={"heard": 3})


def model(way: Way, order: Any = None, tokenizer: Any = None, head: Any = None, **backbone: Any) -> MultimodalModel:
    torch.manual_seed(0)
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(
            name="speech",
            tokenizer=tokenizer or Hearing(),
            head=head or LMHead(bias=True),
            order=order or Delay(),
            fusion=way,
        ),
    ]
    made = MultimodalModel(BackboneConfig(**{"width": 32, "layers": 2, "heads": 4, **backbone}), modalities, 256)
    for parameter in made.parameters():  # zero-initialised layers would hide mistakes
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def never(of: MultimodalModel) -> MultimodalModel:
    """It doesn't stop by itself."""
    head = of.head("speech")
    assert isinstance(head, LMHead) and head.bias is not None
    head.bias.data.view(-1, STOP + 1)[:, STOP] = -1e4
    return of


def stopping(of: MultimodalModel, at: int) -> MultimodalModel:
    """It stops in its draw number `at`, counted from 0."""
    head, drawn = never(of).head("speech"), [0]
    sample = head.sample

    def wrapped(hidden: Tensor, draws: Any) -> Any:
        made = sample(hidden, draws)
        if drawn[0] == at:
            made[0][0][0, 0] = STOP
        drawn[0] += 1
        return made

    head.sample = wrapped  # type: ignore[method-assign]
    return of


def rows(count: int, seed: int = 1, width: int = 3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def request(count: int, heard: Any, **more: Any) -> Request:
    return Request(
        prompt=PROMPT, items=[("speech", (count,))], alongside={"speech": {"heard": heard}}, text=False, **more
    )


def close(mine: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(mine, wanted, atol=3e-5, rtol=1e-4)


# --- fusion in training and generation ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", [Delay(), Delay("parallel", along=True), Delay("flatten")], ids=lambda o: o.kind)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_cached_generation_sees_what_training_sees(way: Way, order: Delay, guidance: float) -> None:
    of, heard = never(model(way, order)), rows(7)
    seen = watch(of)["speech"]
    (made,) = Engine(of).generate([request(7, heard, sampling=Sampling(guidance=guidance), seed=3)])
    (item,) = made
    assert torch.equal(item.content.alongside["heard"], heard) and not item.content.ended
    document = of.build_document([*PROMPT, item], torch.Generator()).validate()
    close(torch.cat([hidden[draw.rows] for hidden, draw, _ in seen]), predictors(of, document, "speech"))
    if guidance != 1.0:
        twin = of.build_document([Segment(NULL), item], torch.Generator())
        close(torch.cat([hidden[draw.unconditional] for hidden, draw, _ in seen]), predictors(of, twin, "speech"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"adaln": True}], ids=["one position at a time", "general"])
def test_a_batch_of_rows_in_different_places(way: Way, options: dict[str, Any]) -> None:
    """The fast path and the general one, against an engine without a cache."""
    of = never(model(way, **options))
    asked = [request(n, rows(n, seed=n), seed=n, sampling=Sampling(temperature=0)) for n in (5, 9, 7)]
    for mine, wanted in zip(Engine(of).generate(asked), Uncached(of).generate(asked), strict=True):
        assert torch.equal(mine[0].content.content, wanted[0].content.content)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_heard_matters_and_only_later(way: Way) -> None:
    """The position that predicts element i + 1 reads row i, and those before it don't."""
    of, content = model(way, Delay("parallel")), torch.randint(0, 8, (6, 4))
    one, other = rows(6), rows(6)
    other[3] += 1.0
    hidden = []
    for heard in (one, other):
        encoded = Encoded(grid=(6,), codes=content, alongside={"heard": heard})
        document = of.build_document([*PROMPT, Segment("speech", encoded)], torch.Generator())
        hidden.append(predictors(of, document, "speech"))  # of elements 0 to 5
    changed = (hidden[0] - hidden[1]).abs().amax(1) > 1e-4
    later = [True, way != "late"]  # what was added at the end isn't seen by what follows
    assert changed.tolist() == [False] * 4 + later


@pytest.mark.parametrize("way", WAYS)
def test_middle_enters_every_block(way: Way) -> None:
    of = model(way, layers=3)
    encoded = Encoded(grid=(4,), codes=torch.zeros(4, 4, dtype=torch.long), alongside={"heard": rows(4)})
    stream = of.build_document([Segment("speech", encoded)], torch.Generator())
    inputs: list[Tensor] = []
    for block in of.backbone.blocks:
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    outputs: list[Tensor] = []
    for block in of.backbone.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    of.backbone.norm.register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.no_grad():
        final = of(stream)
        added = of.inject["heard"](stream.inject["heard"].values)
    bare = torch.zeros_like(inputs[0]).index_add(0, stream.inject["heard"].index, added)
    between = [after - before for before, after in zip(outputs[:2], inputs[1:], strict=True)]
    for difference in between:
        close(difference, bare if way == "middle" else torch.zeros_like(bare))
    close(final - outputs[-1], bare if way == "late" else torch.zeros_like(bare))


@pytest.mark.parametrize("way", WAYS)
def test_silence_is_nothing(way: Way) -> None:
    """Rows of zeros add nothing, in training and in generation, so that a model that listens can do without."""
    of = never(model(way))
    bare = Request(prompt=PROMPT, items=[("speech", (5,))], text=False, seed=2)
    silent = request(5, torch.zeros(5, 3), seed=2)
    one, other = (Engine(of).generate([asked])[0][0].content.content for asked in (bare, silent))
    assert torch.equal(one, other)
    assert not torch.equal(Fusion(3, 8, way)(rows(2)), torch.ones(2, 8))
    assert not Fusion(3, 8, way)(rows(2)).any(), "listening added to a trained model changes nothing at first"


def test_asked_live() -> None:
    """A function is asked for every element once, in turn, each after the one before it was drawn."""
    of, heard, asked = never(model("middle")), rows(6), []

    def listen(element: int) -> Tensor:
        asked.append(element)
        return heard[element]

    twins = Sampling(guidance=2.0)  # which hear the same
    (live,), (given,) = (Engine(of).generate([request(6, h, seed=4, sampling=twins)])[0] for h in (listen, heard))
    assert asked == list(range(6))
    assert torch.equal(live.content.content, given.content.content)
    assert torch.equal(live.content.alongside["heard"], heard)


def test_raster_items_listen_too() -> None:
    """Orders that feed element by element, and a depth head."""
    for order in (Raster(), Delay("parallel")):
        of = model("middle", order, tokenizer=Numbered(), head=DepthHead())
        heard = rows(4)
        seen = watch(of)["speech"]
        (made,) = Engine(of).generate([request(4, heard)])
        document = of.build_document([*PROMPT, made[0]], torch.Generator())
        close(torch.cat([hidden[draw.rows] for hidden, draw, _ in seen]), predictors(of, document, "speech"))


# --- items that end early -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [Delay(), Delay("parallel", along=True), Delay("flatten")], ids=lambda o: o.kind)
@pytest.mark.parametrize("way", ["early", "middle"])
@pytest.mark.parametrize("last", [0, 2, 6])
def test_an_item_ends_where_the_stop_is_drawn(order: Delay, way: Way, last: int) -> None:
    stride = order.pattern(4).stride
    of, heard = stopping(model(way, order), at=stride * last), rows(7)
    seen = watch(of)["speech"]
    (made,) = Engine(of).generate([request(7, heard, seed=1)])
    (item,) = made
    content = item.content
    assert content.grid == (7,) and content.codes is not None and len(content.codes) == last + 1
    assert (content.codes[last] == STOP).all() and not (content.codes[:last] == STOP).any()
    assert content.ended == (last < 6) and len(content.alongside["heard"]) == last + 1
    document = of.build_document([*PROMPT, item], torch.Generator()).validate()
    wanted = predictors(of, document, "speech")
    asked = torch.cat([hidden[draw.rows] for hidden, draw, _ in seen])
    # training also learns the rest of the last element, which is not drawn: it is known
    close(asked, wanted[: len(asked)])
    open_steps = int((order.pattern(4).build(content.codes.clone().fill_(0))[:, :] >= 0).any(1).sum())
    assert len(wanted) == open_steps
    assert last * stride + 1 <= len(asked) <= len(wanted)


def test_what_follows_an_ended_item() -> None:
    """Its extent stays what was announced, and the text after it is conditioned on what there is."""
    of = stopping(model("middle"), at=2)
    asked = Request(prompt=PROMPT, items=[("speech", (9,)), ("speech", (2,))], text=False, max_tokens=4)
    (made,) = Engine(of).generate([asked])
    assert [(len(s.content), s.content.grid) for s in made] == [(3, (9,)), (2, (2,))]
    stream = of.build_document([*PROMPT, *made], torch.Generator())
    extents = [int(i) - of.vocabulary.extent(1) + 1 for i in stream.ids if int(i) >= of.vocabulary.extent(1)]
    assert extents == [9, 2]


def test_ended_items_are_lists() -> None:
    codes = torch.zeros(3, 2, dtype=torch.long)
    assert len(Encoded(grid=(5,), codes=codes, ended=True)) == 3
    for grid in ((5,), (2,), (2, 2)):
        with pytest.raises(ValueError, match="holds 3 elements"):
            Encoded(grid=grid, codes=codes, ended=grid != (5,))
    with pytest.raises(ValueError, match="give a row of numbers an element"):
        Encoded(grid=(3,), codes=codes, alongside={"heard": rows(2)})


# --- refusals -------------------------------------------------------------------------------------------------------


def test_models_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="may end early, which Raster doesn't know"):
        model("early", Raster())
    with pytest.raises(ValueError, match="fusion must be early, middle or late, got 'first'"):
        model("first")  # type: ignore[arg-type]
    both = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="one", tokenizer=Hearing(), head=LMHead(), order=Delay()),
        Modality(name="two", tokenizer=Hearing(), head=LMHead(), order=Delay()),
    ]
    with pytest.raises(ValueError, match="two: another modality has 'heard', too"):
        MultimodalModel(BackboneConfig(width=32, layers=1, heads=2), both)


@pytest.mark.parametrize(
    ("heard", "message"),
    [
        ({"seen": rows(5)}, "has heard alongside its elements, but 'seen'"),
        ({"heard": rows(5, width=2)}, r"rows of shape \(2,\), expected 3"),
        ({"heard": rows(4)}, "has 4 rows for 5 elements"),
        ({"heard": 3}, "is a int; give a tensor or a function"),
        ({"heard": lambda n: rows(1)}, r"rows of shape \(1, 3\), expected 3"),
        ({"heard": lambda n: torch.full((3,), float("nan"))}, "no tensor of finite numbers"),
        ({"heard": lambda n: [0.0] * 3}, "no tensor of finite numbers"),
    ],
)
def test_requests_are_checked(heard: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(never(model("early"))).generate([replace(request(5, None), alongside={"speech": heard})])


def test_modalities_that_are_not_there_are_named() -> None:
    of = model("early")
    with pytest.raises(ValueError, match="no modality 'sound' in this model; it has text, speech"):
        Engine(of).generate([replace(request(5, None), alongside={"sound": {"heard": rows(5)}})])
    with pytest.raises(ValueError, match="no modality 'sound' in this model; it has text, speech"):
        Engine(of).generate([Request(prompt=PROMPT, by_modality={"sound": Sampling()})])


@pytest.mark.parametrize("seed", range(3))
def test_no_extent_is_chosen_without_rows(seed: int) -> None:
    """Left to the model, extents are bounded by what there is to hear, and items that need more are refused before anything
    runs."""
    of = never(model("early"))
    free = replace(request(1, rows(3)), items=[("speech", None), ("speech", range(1, 9))], seed=seed, stretch=3.0)
    made = [segment.content for segment in Engine(of).generate([free])[0]]
    assert len(made) == 2 and sum(len(item) for item in made) <= 3
    with pytest.raises(ValueError, match="has 3 rows for 4 elements"):
        Engine(of).generate([replace(free, items=[("speech", range(4, 9))])])
    with pytest.raises(ValueError, match="has 3 rows for 4 elements"):
        Engine(of).generate([replace(free, items=[("speech", (2,)), ("speech", range(2, 9))])])
    opened = Engine(of).generate([replace(free, items=[], text=True, free=True, max_tokens=200)])[0]
    assert sum(len(segment.content) for segment in opened if segment.modality == "speech") <= 3


@pytest.mark.parametrize("live", [False, True])
def test_a_second_item_hears_what_comes_after_the_first(live: bool) -> None:
    of, heard, asked = never(model("middle")), rows(9), list[int]()

    def listen(element: int) -> Tensor:
        asked.append(element)
        return heard[element]

    two = replace(request(1, listen if live else heard), items=[("speech", (4,)), ("speech", (5,))], text=False)
    seen = watch(of)["speech"]
    (made,) = Engine(of).generate([two])
    assert torch.equal(torch.cat([segment.content.alongside["heard"] for segment in made]), heard)
    assert asked == (list(range(9)) if live else [])
    document = of.build_document([*PROMPT, *made], torch.Generator()).validate()
    close(torch.cat([hidden[draw.rows] for hidden, draw, _ in seen]), predictors(of, document, "speech"))


def test_no_stop_is_given() -> None:
    of, codes = never(model("early")), torch.zeros(5, 4, dtype=torch.long)
    codes[2:] = STOP
    for given, message in ((3, "element 2 of `known` is the one at which speech ends"), (2, None)):
        asked = replace(request(5, rows(5)), known=(codes, torch.arange(5) < given))
        if message is None:
            assert torch.equal(Engine(of).generate([asked])[0][0].content.codes[:2], codes[:2])
            continue
        with pytest.raises(ValueError, match=message):
            Engine(of).generate([asked])


def test_documents_are_checked() -> None:
    of, codes = model("early"), torch.zeros(3, 4, dtype=torch.long)
    for rest, message in (
        ({"seen": rows(3)}, "but 'seen' is given"),
        ({"heard": rows(3, width=1)}, r"shape \(1,\), expected 3"),
        ({"heard": torch.full((3, 3), float("inf"))}, "not numbers"),
    ):
        item = Segment("speech", Encoded(grid=(3,), codes=codes, alongside=rest))
        with pytest.raises(ValueError, match=message):
            of.build_document([item], torch.Generator())
    plain = tiny(Delay(), tokenizer=Levels())
    item = Segment("image", Encoded(grid=(3,), codes=codes, alongside={"heard": rows(3)}))
    with pytest.raises(ValueError, match="image has nothing alongside"):
        plain.build_document([item], torch.Generator())
    assert Alongside({}, Levels().spec, "x").of(0) == {}


# --- it can be learned ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_stopping_is_learned(way: Way) -> None:
    """After a few steps the model stops when it hears something, and not before."""
    rng = torch.Generator().manual_seed(0)

    def talk(start: int | None) -> Encoded:
        codes = torch.randint(0, 8, (10, 4), generator=rng)
        heard = 0.1 * torch.randn(10, 3, generator=rng)
        if start is None:
            return Encoded(grid=(10,), codes=codes, alongside={"heard": heard})
        heard[start:] += 1.0
        codes[start + 1] = STOP
        return Encoded(grid=(10,), codes=codes[: start + 2], alongside={"heard": heard[: start + 2]}, ended=True)

    of = model(way, Delay("parallel")).train()
    for parameter in of.parameters():
        parameter.data *= 0.3
    optimizer = torch.optim.AdamW(of.parameters(), lr=1e-2)
    for _ in range(60):
        drawn = torch.randint(0, 16, (16,), generator=rng).tolist()
        talks = [talk(start if start < 9 else None) for start in drawn]
        batch = pack([of.build_document([Segment("speech", one)], rng) for one in talks])
        optimizer.zero_grad()
        of.loss(batch).total.backward()
        optimizer.step()
    of.eval()
    greedy = Sampling(temperature=0)
    ends = []
    for start in (2, 5, None):
        heard = torch.zeros(10, 3)
        if start is not None:
            heard[start:] = 1.0
        asked = Request(
            prompt=[], items=[("speech", (10,))], alongside={"speech": {"heard": heard}}, text=False, sampling=greedy
        )
        ((item,),) = Engine(of).generate([asked])
        found = (item.content.codes[:, 0] == STOP).nonzero()
        ends.append(int(found[0]) if len(found) else None)
    assert ends == [3, 6, None]
