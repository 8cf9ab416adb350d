"""The token stream: packing, unpacking, validation, moving."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.attention import runs
from mm.stream import POSITIONAL, RECORDS, Placed, TokenStream, pack, unpack
from mm.testing import stream


def same(a: TokenStream, b: TokenStream) -> bool:
    fields = all(torch.equal(getattr(a, name), getattr(b, name)) for name in POSITIONAL)
    for kind in RECORDS:
        left, right = getattr(a, kind), getattr(b, kind)
        fields &= left.keys() == right.keys()
        for name in left.keys() & right.keys():
            fields &= torch.equal(left[name].values, right[name].values)
            fields &= torch.equal(left[name].index, right[name].index)
    return fields


def rich(length: int, seed: int) -> TokenStream:
    """A document that uses every field and every kind of record."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (length,), generator=rng)
    records: dict[str, dict[str, Placed]] = {}
    if length > 2:  # the last two positions hold sub-codes and a vector
        ids[-2:] = -1
        codes, vector = torch.randint(0, 9, (1, 3), generator=rng), torch.randn(1, 4, generator=rng)
        records["codes"] = {"audio": Placed(values=codes, index=torch.tensor([length - 2]))}
        records["latents"] = {"video": Placed(values=vector, index=torch.tensor([length - 1]))}
    records["inject"] = {"rate": Placed(values=torch.randn(1, 2, generator=rng), index=torch.tensor([0]))}
    target = torch.arange(1, length + 1)
    target[-1] = -1
    return stream(
        torch.randint(0, 5, (length,), generator=rng).tolist(),
        torch.randint(0, 3, (length,), generator=rng).tolist(),
        modality=torch.randint(0, 3, (length,), generator=rng),
        ids=ids,
        target=target,
        position=torch.randn(length, 3, generator=rng),
        time=torch.rand(length, generator=rng),
        weight=torch.rand(length, generator=rng),
        **records,
    )


def test_fields_must_share_one_length() -> None:
    with pytest.raises(ValueError, match=r"TokenStream.ids has 2 positions, but modality has 3"):
        stream([0, 1, 2], ids=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"TokenStream.position has shape \(3, 2\); it needs \(3, 3\)"):
        stream([0, 1, 2], position=torch.zeros(3, 2))


def test_records_need_one_index_a_value() -> None:
    with pytest.raises(ValueError, match=r"2 values but \(3,\) indices"):
        Placed(values=torch.zeros(2, 4), index=torch.arange(3))
    with pytest.raises(ValueError, match=r"2 values but \(2, 1\) indices"):
        Placed(values=torch.zeros(2, 4), index=torch.zeros(2, 1, dtype=torch.int64))


def test_a_stream_is_frozen() -> None:
    with pytest.raises(AttributeError):
        stream([0, 1]).order = torch.zeros(2)  # type: ignore[misc]


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 99)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_unpack_is_the_inverse_of_pack(shapes: list[tuple[int, int]]) -> None:
    documents = [rich(length, seed) for length, seed in shapes]
    packed = pack(documents).validate()
    assert packed.num_documents == len(documents) and packed.lengths == [n for n, _ in shapes]
    assert packed.document.unique_consecutive().tolist() == list(range(len(documents)))
    for document, again in zip(documents, unpack(packed), strict=True):
        assert same(document, again)
    assert same(pack(unpack(packed)), packed)


def test_pack_of_packs_renumbers_documents_and_shifts_targets_and_records() -> None:
    a, b, c = rich(4, 0), rich(3, 1), rich(5, 2)
    nested, flat = pack([pack([a, b]), c]), pack([a, b, c])
    assert same(nested, flat)
    assert flat.document.tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert flat.target.tolist() == [1, 2, 3, -1, 5, 6, -1, 8, 9, 10, 11, -1]
    assert flat.codes["audio"].index.tolist() == [2, 5, 10]
    assert flat.latents["video"].index.tolist() == [3, 6, 11]
    assert flat.inject["rate"].index.tolist() == [0, 4, 7]


def test_coordinates_restart_and_no_target_crosses_a_document() -> None:
    packed = pack([stream(range(n), target=torch.arange(1, n + 1) % n) for n in (3, 1, 4)])
    assert packed.position[:, 0].tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    has = packed.target >= 0
    assert has.any() and torch.equal(packed.document[packed.target[has]], packed.document[has])


def test_pack_names_total_and_capacity() -> None:
    with pytest.raises(ValueError, match=r"2 streams of 7 positions in all, but the capacity is 6"):
        pack([stream(range(3)), stream(range(4))], capacity=6)
    assert len(pack([stream(range(3)), stream(range(4))], capacity=7)) == 7
    with pytest.raises(ValueError, match="no streams"):
        pack([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"document": torch.tensor([1, 1, 1])}, "must start at 0"),
        ({"document": torch.tensor([0, 0, 2])}, "without gaps"),
        ({"document": torch.tensor([0, 1, 0])}, "without gaps"),
        ({"target": torch.tensor([1, 3, -1])}, r"spans -1..3; it must lie in -1..2"),
        ({"target": torch.tensor([1, -2, -1])}, r"spans -2..1; it must lie in -1..2"),
        (
            {"document": torch.tensor([0, 1, 1]), "target": torch.tensor([1, 2, 0])},
            "2 targets of TokenStream lie in another document",
        ),
        ({"position": torch.tensor([[0.0, 0, float("nan")]] * 3)}, "finite"),
        ({"weight": torch.tensor([1.0, float("inf"), 0])}, "finite"),
        ({"time": torch.tensor([0.0, 1.5, 0])}, "lie in 0..1"),
        ({"time": torch.tensor([0.0, float("nan"), 0])}, "lie in 0..1"),
        ({"ids": torch.tensor([4, -1, -1])}, "2 positions of TokenStream hold no content and 0 hold"),
        (
            {"latents": {"x": Placed(values=torch.zeros(1, 2), index=torch.tensor([3]))}},
            r"latents\['x'\] points outside the stream's 3 positions",
        ),
        (
            {"inject": {"x": Placed(values=torch.zeros(1, 2), index=torch.tensor([-1]))}},
            r"inject\['x'\] points outside the stream's 3 positions",
        ),
        (
            {"codes": {"x": Placed(values=torch.zeros(1, 2), index=torch.tensor([0]))}},
            "0 positions of TokenStream hold no content and 1 hold more than one",
        ),
    ],
)
def test_validation_says_what_is_wrong(changes: dict, message: str) -> None:
    good = stream([0, 1, 2])
    assert good.validate() is good
    with pytest.raises(ValueError, match=message):
        replace(good, **changes).validate()


def test_lengths_and_counts_are_derived() -> None:
    packed = stream([0, 1, 0, 0, 1, 2], document=[0, 0, 1, 2, 2, 2])
    assert packed.lengths == [2, 1, 3] and packed.num_documents == 3 and len(packed) == 6
    assert len(stream([])) == 0 and stream([]).lengths == []
    assert stream([]).validate().num_documents == 0


def test_moving_keeps_contents_and_derived_facts() -> None:
    packed = pack([rich(4, 0), rich(3, 1)])
    groups, lengths = runs(packed), packed.lengths
    moved = packed.to("cpu")
    assert same(moved, packed) and moved.device.type == "cpu"
    assert runs(moved) is groups and moved.lengths is lengths
    away = packed.to("meta")
    assert away.device.type == "meta" and away.latents["video"].values.device.type == "meta"
    assert away.lengths == lengths  # no look at data that is elsewhere


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pin_memory_pins_everything() -> None:
    pinned = pack([rich(4, 0), rich(3, 1)]).pin_memory()
    assert all(getattr(pinned, name).is_pinned() for name in POSITIONAL)
    assert pinned.latents["video"].values.is_pinned() and pinned.inject["rate"].index.is_pinned()
