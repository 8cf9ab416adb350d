"""Items of free length in the engine: their end, their room, their automaton; in training, generation, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mm import hub
from mm.backbone import BackboneConfig
from mm.commands.generate import main
from mm.decoding import SingleStep
from mm.generation import Engine, Event, Request
from mm.heads.lm import LMHead
from mm.interfaces import Automaton, Decoded, Encoded, Modality, Order, Sampling, Spec
from mm.layout import NULL, Segment
from mm.media import load_image
from mm.model import MultimodalModel
from mm.orders.blocks import Blocks
from mm.orders.delay import Delay
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.orders.stages import Stages
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.pipelines.image_to_text import ImageToTextPipeline
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.stream import TokenStream
from mm.testing import Brackets, Palette, Uncached, tiny, watch
from mm.tokenizers.text_bytes import TextBytes

STOP = 5


def built(
    order: Order | None = None, *, seed: int = 0, stop: float = 0.0, context: int = 96, **options: Any
) -> MultimodalModel:
    """A random model that often opens a list by itself; `stop` makes its end likelier."""
    torch.manual_seed(seed)
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(bias=True), order=Raster()),
        Modality(name="file", tokenizer=Brackets(**options), head=LMHead(bias=True), order=order or Raster()),
        Modality(name="image", tokenizer=Palette(), head=LMHead(), order=Raster()),
    ]
    model = MultimodalModel(BackboneConfig(width=32, layers=2, heads=4, kv_heads=2), modalities, context=context).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
        model.heads["text"].bias[model.vocabulary.begin("file")] = 4.5
        model.heads["file"].bias[STOP] = stop
    return model


def text(words: str) -> Segment:
    return Segment("text", words, loss=False)


def flat(made: list[list[Segment]]) -> list[list[tuple[str, tuple[int, ...], list[int]]]]:
    return [[(s.modality, s.content.grid, s.content.ids.tolist()) for s in row] for row in made]


def of(row: Sequence[Segment], name: str = "file") -> list[list[int]]:
    return [s.content.ids.tolist() for s in row if s.modality == name]


ASK = Request(prompt=[text("a file")], items=[("file", ())], text=False)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_list_is_begin_ids_stop_end_and_announces_nothing() -> None:
    model = built()
    stream = model.build_document([text("a"), Segment("file", "()x")], torch.Generator()).validate()
    v = model.vocabulary
    start = v["file"].start
    item = [v.begin("file"), start, start + 1, start + 4, start + STOP, v.end("file")]
    assert stream.ids.tolist() == [v.control("bos"), ord("a"), *item, v.control("eos")]
    assert stream.target.tolist() == [-1, 2, 3, 4, 5, 6, 7, 8, -1]
    assert stream.order.tolist() == list(range(9)) and stream.position[:, 0].tolist() == list(range(9))


@pytest.mark.parametrize("order", [Masked(), Delay(), Stages(), Blocks(4)])
def test_orders_that_must_know_the_extent_refuse_it(order: Order) -> None:
    with pytest.raises(ValueError, match=r"must know an item's extent beforehand|this tokenizer is discrete"):
        order.check(Brackets().spec)
    with pytest.raises(ValueError, match=r"must know an item's extent beforehand|this tokenizer is discrete"):
        built(order)


def test_what_is_no_list_of_free_length_is_refused() -> None:
    with pytest.raises(ValueError, match="can't run along a text"):
        built(Raster(along=True))
    with pytest.raises(ValueError, match=r"has ids, of which one is its end.* continuous with stop 0"):
        Spec(kind="continuous", dim=2, stop=0)
    with pytest.raises(ValueError, match="got discrete with stop 5 of 5"):
        Spec(kind="discrete", vocab_size=5, stop=5)
    modalities = [Modality(name=n, tokenizer=TextBytes(), head=LMHead(), order=Raster()) for n in ("text", "more")]
    with pytest.raises(
        ValueError, match="more: its tokenizer says neither how large its items may be nor which id ends"
    ):
        MultimodalModel(BackboneConfig(width=32, layers=1, heads=4), modalities)


# --- generation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forced(model: MultimodalModel, segments: Sequence[Segment], name: str) -> Tensor:
    """Teacher-forced hidden states of the positions that predict this modality, in the order of what is predicted."""
    stream: TokenStream = model.build_document(segments, torch.Generator()).validate()
    owner = model.vocabulary.index[name]
    places = [p for p, t in enumerate(stream.target.tolist()) if t >= 0 and int(stream.modality[t]) == owner]
    return model(stream)[places]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_generation_sees_what_training_sees(guidance: float) -> None:
    """Also the twins; and all but the first pass take the short way."""
    model, short = built(stop=1.0), []
    seen = watch(model)
    request = replace(ASK, items=[("file", ()), ("file", ())], sampling=Sampling(guidance=guidance))
    step = SingleStep.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SingleStep, "__call__", lambda self, *args: short.append(1) or step(self, *args))
        (row,) = Engine(model).generate([request])
    first, second = [s for s in row if s.modality == "file"]
    assert all(s.content.grid == (len(s.content),) and s.content.ids[-1] == STOP for s in (first, second))
    draws = seen["file"]
    mine = torch.cat([hidden[draw.rows] for hidden, draw, _ in draws])
    torch.testing.assert_close(mine, forced(model, [text("a file"), *row], "file"), atol=2e-5, rtol=1e-4)
    twins = [hidden[draw.unconditional] for hidden, draw, _ in draws if draw.unconditional is not None]
    assert len(twins) == (len(draws) if guidance != 1 else 0)
    if twins:
        split = len(first.content)
        for part, item in ((twins[:split], first), (twins[split:], second)):
            alone = forced(model, [Segment(NULL), item], "file")
            torch.testing.assert_close(torch.cat(part), alone, atol=2e-5, rtol=1e-4)
    else:  # context, then a step an id; what follows an item comes with its end
        assert len(short) == len(first.content) + len(second.content) - 2


def test_the_end_ends_and_the_room_cuts() -> None:
    made = Engine(built(stop=2.0, automatic=False)).generate([replace(ASK, seed=seed) for seed in range(30)])
    lists = [ids for row in made for ids in of(row)]
    assert len({len(ids) for ids in lists}) > 3
    assert all(ids.index(STOP) == len(ids) - 1 for ids in lists)  # once, at the end
    # begin, its elements and its end fill what the prompt leaves of the context
    (row,) = Engine(built(stop=-99.0, automatic=False, context=32)).generate([ASK])
    (ids,) = of(row)
    assert len(ids) == 32 - 7 - 2 and STOP not in ids and row[0].content.ended is False
    bounded = replace(ASK, items=[("file", range(1, 6))])
    (row,) = Engine(built(stop=-99.0, automatic=False)).generate([bounded])
    assert len(of(row)[0]) == 5


def test_room_is_left_for_what_comes_later() -> None:
    model = built(stop=-99.0, automatic=False, context=48)
    # bos and 4 letters; two lists; a text of 3; a picture with 3 controls around its 4 elements and one for its end
    items = [("file", ()), ("file", ()), text("and"), ("image", (2, 2))]
    (row,) = Engine(model).generate([Request(prompt=[text("four")], items=items, text=False)])
    assert [s.modality for s in row] == ["file", "file", "text", "image"]
    first, second = of(row)
    assert len(second) == Brackets().spec.least and len(first) + len(second) == 48 - 5 - 2 * 2 - 3 - 8
    assert len(of(row, "image")[0]) == 4


def test_text_after_a_list_has_its_own_bound() -> None:
    model = built(stop=3.0)
    for seed in range(6):
        (row,) = Engine(model).generate([replace(ASK, text=True, max_tokens=5, seed=seed)])
        assert sum(map(len, of(row, "text"))) <= 5


@pytest.mark.parametrize("temperature", [0.0, 1.0, 8.0])
def test_the_automaton_is_obeyed_whatever_the_weights(temperature: float) -> None:
    lengths, tokenizer = set(), Brackets()
    for seed in range(3):
        model = built(seed=seed, stop=-4.0 * seed)
        sampling = Sampling(temperature=temperature, guidance=(1.0, 4.0, 1.0)[seed], top_k=(0, 2, 0)[seed])
        rooms = [3, 4, 5, 8, 20, 60]
        requests = [replace(ASK, items=[("file", range(1, n + 1))], sampling=sampling, seed=n) for n in rooms]
        for room, row in zip(rooms, Engine(model).generate(requests), strict=True):
            assert tokenizer.decode(row[0].content).valid and len(row[0].content) <= room
            lengths.add(len(row[0].content))
    assert max(lengths) > 20 and min(lengths) == 3


def test_unconstrained_a_sample_may_be_broken() -> None:
    model, tokenizer = built(stop=1.0), Brackets()
    requests = [replace(ASK, constrained=False, seed=seed) for seed in range(20)]
    valid = [tokenizer.decode(row[0].content).valid for row in Engine(model).generate(requests)]
    assert sum(valid) < 10
    free = Engine(built(stop=1.0, automatic=False)).generate(requests)
    assert flat(free) == flat(Engine(model).generate(requests))


def mixed() -> list[Request]:
    guided = Sampling(guidance=2.5, guidance_schedule="ramp")
    return [
        replace(ASK, sampling=guided, seed=1),
        Request(prompt=[text("so")], free=True, max_tokens=50, seed=2),
        Request(
            prompt=[text("x"), Segment("file", "([])")],
            items=[("image", (2, 3))],
            max_tokens=6,
            sampling=guided,
            seed=3,
        ),
        replace(ASK, constrained=False, seed=4, text=True, max_tokens=9),
        replace(ASK, known=(torch.tensor([0, 2]), torch.ones(2).bool()), sampling=guided, seed=5),
        replace(ASK, items=[("file", range(1, 9)), text(" and "), ("file", None)], seed=6),
    ]


def test_rows_of_a_batch_are_rows_alone_and_cached_is_uncached() -> None:
    model, requests = built(stop=1.0, context=64), mixed()
    together = flat(Engine(model).generate(requests))
    assert together == flat(Uncached(model).generate(requests))
    assert together == [flat(Engine(model).generate([request]))[0] for request in requests]
    assert together == flat(Engine(model).generate(requests[::-1]))[::-1]
    assert [name for name, _, _ in together[5]] == ["file", "text", "file"]


def test_text_opens_lists_by_itself_where_they_fit() -> None:
    model, tokenizer, count = built(stop=1.0), Brackets(), 0
    for room in (5, 6, 9, 40):
        requests = [Request(prompt=[text("so")], free=True, max_tokens=room, seed=seed) for seed in range(12)]
        for row in Engine(model).generate(requests):
            files = [s.content for s in row if s.modality == "file"]
            used = sum(len(s.content) + {"text": 0, "file": 2, "image": 4}[s.modality] for s in row)
            assert all(tokenizer.decode(f).valid for f in files) and used <= room
            assert not files or room >= 6  # begin, three elements, end, and one more position, which is `eos`
            count += len(files)
    assert count > 10


def test_an_interleaved_document() -> None:
    model = built(stop=1.0)
    items = [("file", range(1, 20)), text("then"), ("file", range(1, 20))]
    (row,) = Engine(model).generate([Request(prompt=[text("first")], items=items, max_tokens=3)])
    assert [s.modality for s in row[:3]] == ["file", "text", "file"]
    document = [text("first"), *row]
    stream = model.build_document(document, torch.Generator(), close=False).validate()
    # everything that was generated stands in the document as it was fed: the next row goes on from it
    again = Engine(model).generate([Request(prompt=document, items=[("file", ())], text=False)])
    assert Brackets().decode(again[0][0].content).valid and len(stream) == 1 + sum(
        len(model.build_document.encode(s)) + 2 * (s.modality == "file") for s in document
    )


def test_events_of_a_list() -> None:
    events: list[Event] = []
    (row,) = Engine(built(stop=1.0)).generate([ASK], events.append)
    (ids,) = of(row)
    assert [event.content.tolist() for event in events] == [ids[: n + 1] for n in range(len(ids))]
    assert [event.final for event in events] == list(range(1, len(ids) + 1))
    shares = [event.done for event in events]
    assert shares == sorted(set(shares)) and shares[-1] == 1.0 and shares[0] < 0.1


# --- what is given ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_given_beginning_goes_on(constrained: bool, guidance: float) -> None:
    model, given = built(stop=1.0), torch.tensor([0, 2, 4])
    seen = watch(model)
    request = replace(
        ASK, known=(given, torch.ones(3).bool()), constrained=constrained, sampling=Sampling(guidance=guidance), seed=2
    )
    (row,) = Engine(model).generate([request])
    (ids,) = of(row)
    assert ids[:3] == given.tolist() and (not constrained or Brackets().decode(row[0].content).valid)
    mine = torch.cat([hidden[draw.rows] for hidden, draw, _ in seen["file"]])
    whole = forced(model, [text("a file"), *row], "file")
    torch.testing.assert_close(mine, whole[3:], atol=2e-5, rtol=1e-4)
    # some of it given, counted from the beginning
    part = replace(request, known=(given, torch.tensor([True, True, False])))
    assert of(Engine(model).generate([part])[0])[0][:2] == [0, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": [("file", (3,))]}, r"file has no extent that could be asked for, got \(3,\); give \(\), or range"),
        ({"items": [("file", range(2, 9))]}, "file has no extent that could be asked for"),
        ({"items": [("file", range(1, 3))]}, "asked for with 2 elements at the most, but has at least 3"),
        (
            {"known": (torch.tensor([0, STOP]), torch.ones(2).bool())},
            "element 1 of `known` is the one at which file ends",
        ),
        (
            {"known": (torch.tensor([0, STOP + 1]), torch.ones(2).bool())},
            "`known` holds ids 0..6; those of file are 0..5",
        ),
        ({"known": (torch.tensor([0, 1]), torch.tensor([False, True]))}, "can keep given elements only at the start"),
        ({"known": (torch.tensor([0, 1]), torch.ones(3).bool())}, "given elements cover 2 and 3 places"),
        (
            {"known": (torch.zeros(87).long(), torch.ones(87).bool())},
            "87 elements of file are given, but there is room for 87",
        ),
        ({"known": (torch.zeros(2, 2).long(), torch.ones(2).bool())}, r"`known` has shape \(2, 2\)"),
        (
            {"prompt": [text("a" * 91)]},
            "the prompt takes 92 positions and what is asked for 5, but the context holds 96",
        ),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(built()).generate([replace(ASK, **changes)])


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    model = built(stop=1.0)
    loaded = hub.load_pretrained(hub.save_pretrained(model, tmp_path / "model"))
    requests = mixed()
    assert flat(Engine(loaded).generate(requests)) == flat(Engine(model).generate(requests))
    assert loaded.vocabulary["file"].max_grid == () and loaded.modalities[1].tokenizer.spec == Brackets().spec


# --- pictures that are lists ------------------------------------------------------------------------------------------

SIDE = 4


class Scan(Palette):
    """A picture as a list of its pixels, row by row, that ends."""

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=9, stop=8, least=1, pixels=(SIDE, SIDE), fingerprint="scan")

    def encode(self, raw: Image.Image) -> Encoded:
        ids = super().encode(raw.resize((SIDE, SIDE), Image.Resampling.NEAREST)).ids
        return Encoded(grid=(SIDE * SIDE + 1,), ids=torch.cat((ids, torch.tensor([8]))))

    def decode(self, encoded: Encoded) -> Decoded:
        """What isn't there is black."""
        ids = [i for i in encoded.ids.tolist() if i < 8][: SIDE * SIDE]
        whole = torch.tensor(ids + [0] * (SIDE * SIDE - len(ids)))
        return replace(super().decode(Encoded(grid=(SIDE, SIDE), ids=whole)), valid=len(ids) == SIDE * SIDE)

    def prefix(self, raw: Image.Image, share: float) -> Encoded:
        ids = self.encode(raw).ids[: int(share * SIDE) * SIDE]
        return Encoded(grid=(len(ids),), ids=ids)

    def automaton(self) -> Automaton | None:
        return Count()


class Count(Automaton):
    """So many pixels and no more."""

    def __init__(self) -> None:
        self.made = 0

    def allowed(self, room: int) -> Tensor:
        return (torch.arange(9) == 8) == (self.made >= SIDE * SIDE)

    def accept(self, token: int) -> None:
        self.made += 1


@pytest.fixture
def painter() -> TextToImagePipeline:
    return TextToImagePipeline(tiny(tokenizer=Scan(SIDE), context=64))


def picture(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    values = torch.randint(0, 2, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed)) * 255
    return Image.fromarray(values.to(torch.uint8).numpy())


def below(row: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A mask that keeps the rows above this one."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, row, *size))
    return mask


def test_pictures_are_made_as_lists(painter: TextToImagePipeline) -> None:
    events: list[Event] = []
    out = painter(["red", "blue"], num_images=2, seed=3, guidance=2.0, callback=events.append)
    assert [len(t) for t in out.tokens] == [SIDE * SIDE + 1] * 4 and all(t.ids[-1] == 8 for t in out.tokens)
    assert len({i.tobytes() for i in out.images}) == 4 and {i.size for i in out.images} == {(SIDE, SIDE)}
    first = [event for event in events if event.row == 0]
    half = np.asarray(painter.preview(first[7].content))
    assert (half[:2] == np.asarray(out.images[0])[:2]).all() and not half[2:].any()
    assert painter("red", seed=3, guidance=2.0).images[0].tobytes() == out.images[0].tobytes()
    free = painter("red", num_images=8, seed=0, constrained=False)
    assert any(len(t) != SIDE * SIDE + 1 for t in free.tokens)


@pytest.mark.parametrize("row", [0, 1, 3, 4])
def test_the_upper_part_is_kept(painter: TextToImagePipeline, row: int) -> None:
    kept = picture(1)
    out = painter("red", num_images=3, seed=0, image=kept, mask=below(row))
    for made in out.images:
        assert (np.asarray(made)[:row] == np.asarray(kept)[:row]).all()
    assert len({i.tobytes() for i in out.images}) == (1 if row == 4 else 3)


def test_a_wide_picture_is_put_on_white(painter: TextToImagePipeline) -> None:
    """Of two rows in the middle of four the lower one is drawn anew."""
    wide = picture(2, (4, 2))
    for made in painter("red", num_images=2, seed=0, image=wide, mask=below(1, (4, 2))).images:
        pixels = np.asarray(made)
        assert (pixels[0] == 255).all() and (pixels[1] == np.asarray(wide)[0]).all()


def test_what_can_not_be_kept_is_refused(painter: TextToImagePipeline) -> None:
    upper = Image.fromarray(255 - np.asarray(below(2)))
    with pytest.raises(ValueError, match="from top to bottom, and can keep an upper part only"):
        painter("red", image=picture(1), mask=upper)
    with pytest.raises(ValueError, match=r"the mask has \(3, 3\) pixels, the picture \(4, 4\)"):
        painter("red", image=picture(1), mask=below(1, (3, 3)))
    with pytest.raises(ValueError, match="Brackets can't tell which of its ids hold a part of a picture"):
        Brackets().prefix(picture(1), 0.5)


def test_captions_and_documents_of_such_pictures(painter: TextToImagePipeline) -> None:
    texts = ImageToTextPipeline(painter.model)([picture(1), picture(2)], max_tokens=5, seed=0)
    assert len(texts.texts) == 2 and all(len(t) <= 5 for t in texts.tokens)
    anything = AnyToAnyPipeline(painter.model)
    out = anything(["a", picture(1)], to="image", max_tokens=3, seed=0)
    parts = out.documents[0]
    assert isinstance(parts[0], Image.Image) and all(isinstance(part, str | Image.Image) for part in parts)
    with pytest.raises(ValueError, match="'text' has no items to begin with"):
        anything("a", to="text")


def test_the_command_writes_such_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, painter: Any) -> None:
    monkeypatch.setattr(AnyToAnyPipeline, "from_pretrained", lambda *_: AnyToAnyPipeline(painter.model))
    picture(1).save(tmp_path / "from.png")
    below(2).save(tmp_path / "mask.png")
    given = ["--from", str(tmp_path / "from.png"), "--mask", str(tmp_path / "mask.png")]
    for number, options in enumerate(([], ["--unconstrained"], given)):
        out = tmp_path / f"{number}.png"
        assert main(["red", "--to", "image", "--seed", "1", "--out", str(out), *options]) == 0
        assert load_image(out).size == (SIDE, SIDE)
    assert (np.asarray(load_image(tmp_path / "2.png"))[:2] == np.asarray(picture(1))[:2]).all()
    with pytest.raises(ValueError, match="--unconstrained goes with"):
        main(["red", "--to", "text", "--unconstrained"])
