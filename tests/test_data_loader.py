"""Packing and loading: nothing lost, nothing split, the same batches for any number of workers, exact resume."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm.data.convert import write_shards
from mm.data.documents import ImageToText, Interleaved, Mixture, TextOnly, TextToImage
from mm.data.feeds import DocumentMaker, MixtureFeed, Part
from mm.data.loader import PackedLoader, estimate_batches
from mm.data.packing import Packer
from mm.data.sources import ShardSource
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec
from mm.layout import Segment
from mm.stream import TokenStream, unpack
from mm.tokenizers.text_bytes import TextBytes

WORDS = "quince apple fig medlar pear".split()


def entries(count: int, broken: int | None = None) -> Iterator[tuple[str, dict[str, bytes]]]:
    rng = random.Random(0)
    for number in range(count):
        picture, buffer = (
            Image.new("RGB", (rng.randint(1, 4), rng.randint(1, 4)), rng.choice(["red", "blue"])),
            io.BytesIO(),
        )
        picture.save(buffer, format="PNG")
        caption = f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
        data = b"no picture" if number == broken else buffer.getvalue()
        yield f"{number:04d}", {"png": data, "json": json.dumps({"caption": caption}).encode()}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(entries(90), tmp_path_factory.mktemp("shards"))[0]


class Pixels(ModalityTokenizer):
    """Red channel of every pixel."""

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=256, max_grid=(4, 4), fingerprint="pixels")

    def encode(self, raw: Image.Image) -> Encoded:
        return Encoded(grid=(raw.height, raw.width), ids=torch.tensor(list(raw.tobytes()[::3])))

    def decode(self, encoded: Encoded) -> Decoded:
        return Decoded(value=encoded.ids)


def lay_out(document: list[Segment], rng: torch.Generator) -> TokenStream:
    """A causal stream of all ids, in which one random number shows where the generator stands."""
    parts = [segment.content.ids for segment in document if segment.content is not None]
    ids = torch.cat([torch.randint(1 << 20, (1,), generator=rng), *parts])
    count = len(ids)
    steps, zeros = torch.arange(count), torch.zeros(count)
    return TokenStream(
        modality=zeros.long(),
        ids=ids,
        document=zeros.long(),
        order=steps,
        copy=zeros.long(),
        position=steps.float()[:, None].expand(-1, 3),
        time=zeros,
        target=torch.where(steps < count - 1, steps + 1, -1),
        weight=zeros + 1,
    )


def maker(seed: int = 0) -> DocumentMaker:
    return DocumentMaker(lay_out, {"text": TextBytes(), "image": Pixels()}, seed)


def feed(shard: Path, **options: Any) -> MixtureFeed:
    template = Mixture([TextToImage(drop=0.3), ImageToText()])
    return MixtureFeed([Part(source=ShardSource(shard), template=template)], maker(), **{"chunk": 8, **options})


def fingerprint(stream: TokenStream) -> tuple[Any, ...]:
    return (
        tuple(stream.lengths),
        tuple(stream.ids.tolist()),
        tuple(stream.target.tolist()),
        tuple(stream.order.tolist()),
    )


# --- packer -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_packer_loses_and_repeats_nothing(lengths: list[int], tokens: int, lookahead: int) -> None:
    packer: Packer[int] = Packer(tokens)
    seen: list[int] = []

    def take() -> None:
        oldest = next(iter(packer.waiting.values()))[1]
        batch = packer.batch()
        assert batch[0] == oldest and sum(lengths[item] for item in batch) <= tokens
        gap = tokens - sum(lengths[item] for item in batch)
        assert all(length > gap for length, _ in packer.waiting.values()), "something that fits was left waiting"
        seen.extend(batch)

    for item, length in enumerate(lengths):
        packer.add(length, item)
        if len(packer) >= lookahead:
            take()
    while len(packer):
        take()
    assert sorted(seen) == list(range(len(lengths))) and packer.positions == 0 and packer.batch() == []


def test_packer_fills_the_gap_with_the_longest_that_fits() -> None:
    packer: Packer[str] = Packer(100)
    for name, length in [("a", 60), ("b", 50), ("c", 10), ("d", 35), ("e", 35), ("f", 5)]:
        packer.add(length, name)
    assert packer.batch() == ["a", "d", "f"]  # of the two of 35 the older one
    assert packer.batch() == ["b", "c", "e"]


@pytest.mark.parametrize("length", [0, 101])
def test_packer_refuses_what_never_fits(length: int) -> None:
    with pytest.raises(ValueError, match=f"an item of {length} positions doesn't fit into a batch of 100"):
        Packer(100).add(length, "x")


@pytest.mark.parametrize("tokens", [1024, 4096, 16_384])
def test_at_least_95_percent_of_positions_are_used_on_uneven_lengths(tokens: int) -> None:
    draw = random.Random(tokens)
    packer: Packer[int] = Packer(tokens)
    used = batches = 0
    for _ in range(6000):
        length = max(4, min(tokens, int(draw.lognormvariate(5, 1))))
        packer.add(length, length)
        while len(packer) >= 128 and packer.positions * 4 >= tokens * 5:
            used, batches = used + sum(packer.batch()), batches + 1
    assert batches > 20 and used / (batches * tokens) >= 0.95


# --- loader -------------------------------------------------------------------------------------------------------


def test_one_epoch_gives_every_document_once_unsplit(shard: Path) -> None:
    source = feed(shard, epochs=1)
    batches = list(PackedLoader(source, 300, lookahead=16))
    assert all(len(batch) <= 300 and batch.validate() is batch for batch in batches)
    documents = [fingerprint(document) for batch in batches for document in unpack(batch)]
    assert sorted(documents) == sorted(fingerprint(source.document(n)) for n in range(90))


def test_real_documents_fill_95_percent(shard: Path) -> None:
    loader = PackedLoader(feed(shard), 512, batches=60)
    assert len(list(loader)) == 60 and 0.95 <= loader.utilisation <= 1


def test_epochs_differ_and_seeds_differ(shard: Path) -> None:
    source = feed(shard)
    epochs = [[source.locate(epoch, place)[1] for place in range(90)] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(90)) and epochs[0] != epochs[1]
    again = feed(shard)
    assert [again.locate(1, place)[1] for place in range(90)] == epochs[1]
    other = MixtureFeed(source.parts, maker(seed=1))
    assert [other.locate(0, place)[1] for place in range(90)] != epochs[0]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_workers(shard: Path, num_workers: int) -> None:
    expected = [fingerprint(b) for b in islice(PackedLoader(feed(shard), 256, batches=40, lookahead=16), 40)]
    loader = PackedLoader(feed(shard), 256, batches=40, lookahead=16, num_workers=num_workers)
    assert [fingerprint(batch) for batch in loader] == expected
    assert len(set(expected)) == 40


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 2)])
def test_resume_is_exact(shard: Path, before: int, after: int) -> None:
    """Interrupted in the second epoch of the loader and the third of the data, with other numbers of workers."""

    def loader(num_workers: int) -> PackedLoader:
        return PackedLoader(feed(shard), 256, batches=25, lookahead=24, num_workers=num_workers)

    whole = loader(0)
    expected = [fingerprint(batch) for _ in range(3) for batch in whole]
    first = loader(before)
    seen = [fingerprint(batch) for batch in first] + [fingerprint(batch) for batch in islice(first, 7)]
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)  # as a checkpoint would
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert len(state["ranks"][0]["waiting"]) >= 5, "the look-ahead buffer must not be empty, or this proves little"
    second = loader(after)
    second.load_state_dict(state)
    rest = [fingerprint(batch) for batch in second]
    assert len(rest) == 18
    assert seen + rest + [fingerprint(batch) for batch in second] == expected


def test_a_state_of_other_data_is_refused(shard: Path) -> None:
    state = PackedLoader(feed(shard), 256).state_dict()
    with pytest.raises(ValueError, match="tokens was 256 and is 300 now"):
        PackedLoader(feed(shard), 300).load_state_dict(state)
    with pytest.raises(ValueError, match="can't be resumed: identity was"):
        PackedLoader(feed(shard, chunk=4), 256).load_state_dict(state)
    with pytest.raises(ValueError, match="covers 1 ranks, but this is rank 1"):
        PackedLoader(feed(shard), 256, rank=1).load_state_dict(state)


def test_ranks_partition_the_epoch(shard: Path) -> None:
    alone = feed(shard, epochs=1)
    everything = sorted(fingerprint(alone.document(n)) for n in range(90))
    documents = []
    for rank in range(4):
        source = feed(shard, epochs=1, rank=rank, world=4)
        documents += [fingerprint(d) for b in PackedLoader(source, 300, lookahead=8) for d in unpack(b)]
    assert sorted(documents) == everything


def test_weights_set_how_often_an_example_is_seen(shard: Path) -> None:
    source = ShardSource(shard)
    parts = [Part(source=source, template=TextOnly(), weight=weight) for weight in (2.0, 0.3)]
    mixture = MixtureFeed(parts, maker())
    assert mixture.epoch_length == 180 + 27
    drawn: list[list[set[int]]] = []
    for epoch in (0, 1):
        places = [mixture.locate(epoch, place) for place in range(mixture.epoch_length)]
        twice = [index for part, index in places if part is parts[0]]
        assert sorted(twice) == sorted([*range(90), *range(90)])
        some = [index for part, index in places if part is parts[1]]
        assert len(some) == len(set(some)) == 27
        drawn.append([set(some)])
    assert drawn[0] != drawn[1], "a fraction must be drawn anew every epoch"
    with pytest.raises(ValueError, match=r"weights > 0; got weights \[0\]"):
        MixtureFeed([Part(source=source, template=TextOnly(), weight=0)], maker())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_examples_are_counted_or_raise(tmp_path: Path, num_workers: int) -> None:
    path = write_shards(entries(20, broken=7), tmp_path)[0]

    def source() -> MixtureFeed:
        return MixtureFeed([Part(source=ShardSource(path), template=TextToImage(drop=0))], maker(), epochs=1)

    loader = PackedLoader(source(), 300, num_workers=num_workers)
    with pytest.warns(UserWarning, match="skipped 1 examples so far; the last: data-000000.tar: 0007.png"):
        assert sum(batch.num_documents for batch in loader) == 19
    assert loader.skipped == 1
    with pytest.raises(ValueError, match="^data-000000.tar: 0007.png: the picture is damaged or not a picture"):
        list(PackedLoader(source(), 300, num_workers=num_workers, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_strict_source_raises_in_a_loader_that_is_not(tmp_path: Path, num_workers: int) -> None:
    path = write_shards(entries(20, broken=7), tmp_path)[0]
    part = Part(source=ShardSource(path, strict=True), template=TextToImage(drop=0))
    loader = PackedLoader(MixtureFeed([part], maker(), epochs=1), 300, num_workers=num_workers)
    with pytest.raises(ValueError, match="^data-000000.tar: 0007.png: the picture is damaged or not a picture"):
        list(loader)


def test_an_example_that_lacks_a_field_is_skipped(tmp_path: Path) -> None:
    def imperfect() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield from entries(4)
        _, whole = next(entries(1))
        yield "no caption", {"png": whole["png"]}
        yield "null caption", {"png": whole["png"], "json": b'{"caption": null}'}
        yield "no picture", {"json": whole["json"]}
        yield "nothing", {"json": b"{}"}

    path = write_shards(imperfect(), tmp_path)[0]
    for template in (TextToImage(drop=0), Mixture([ImageToText()]), Interleaved(["text", "image"])):
        loader = PackedLoader(MixtureFeed([Part(source=ShardSource(path), template=template)], maker(), epochs=1), 300)
        with pytest.warns(UserWarning, match="skipped 1 examples so far; the last: example '.*' has no field"):
            assert sum(batch.num_documents for batch in loader) == 4
        assert loader.skipped == 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mistake_in_the_setup_raises_one_sentence(shard: Path, num_workers: int) -> None:
    part = Part(source=ShardSource(shard, caption="{nope}"), template=TextOnly())
    loader = PackedLoader(MixtureFeed([part], maker()), 300, batches=1, num_workers=num_workers)
    message = "^100 examples in a row can't be used; the last: example '0[0-9]+' has no field 'nope'"
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match=message):
        next(iter(loader))


def test_when_nothing_can_be_used_it_stops(tmp_path: Path) -> None:
    def bad() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number in range(5):
            yield f"{number}", {"png": b"no", "json": b'{"caption": "x"}'}

    part = Part(source=ShardSource(write_shards(bad(), tmp_path)[0]), template=TextToImage(drop=0))
    source = MixtureFeed([part], maker())
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="100 examples in a row can't be used; the last: "):
        next(iter(PackedLoader(source, 300, batches=10)))
    with pytest.raises(ValueError, match="none of the 5 examples that were tried can be used"):
        estimate_batches(source, 300)


def test_documents_longer_than_a_batch(shard: Path) -> None:
    lengths = [len(feed(shard).document(n)) for n in range(90)]
    tokens = sorted(lengths)[-5]
    too_long = sum(length > tokens for length in lengths)
    assert 0 < too_long < 5
    with pytest.raises(ValueError, match=rf"a document has \d+ positions, but a batch at most {tokens}; raise tokens"):
        list(PackedLoader(feed(shard, epochs=1), tokens))
    loader = PackedLoader(feed(shard, epochs=1), tokens, oversize="skip")
    with pytest.warns(UserWarning, match="skipped 1 examples so far; the last: a document has"):
        assert sum(batch.num_documents for batch in loader) == 90 - too_long
    assert loader.skipped == too_long


def test_estimated_batches_are_about_an_epoch(shard: Path) -> None:
    estimate = estimate_batches(feed(shard), 256)
    counted = len(list(PackedLoader(feed(shard, epochs=1), 256)))
    assert abs(estimate - counted) <= 0.15 * counted


def test_length(shard: Path) -> None:
    assert len(PackedLoader(feed(shard), 256, batches=9)) == 9
    with pytest.raises(TypeError, match="known only once everything is packed"):
        len(PackedLoader(feed(shard, epochs=1), 256))
    with pytest.raises(ValueError, match="must be at least 1"):
        PackedLoader(feed(shard), 256, batches=0)
