"""Global ids and the grammar: ranges, control tokens, refusal of other vocabularies, what a row may emit."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm.grammar import Grammar
from mm.interfaces import Spec
from mm.testing import tiny
from mm.vocabulary import NAMED, SIZES, Vocabulary

TEXT = Spec(kind="discrete", vocab_size=100, fingerprint="t1")
IMAGE = Spec(kind="discrete", vocab_size=40, max_grid=(8, 6), fingerprint="i1")
VIDEO = Spec(kind="discrete", vocab_size=30, max_grid=(4, 8, 8), fingerprint="v1")
AUDIO = Spec(kind="codes", vocab_size=20, num_codes=4, max_grid=(200,), fingerprint="a1")
LATENT = Spec(kind="continuous", dim=8, max_grid=(8, 8), fingerprint="l1")
ALL = {"text": TEXT, "image": IMAGE, "audio": AUDIO, "video": VIDEO, "latent": LATENT}


def test_ranges_are_contiguous_and_disjoint() -> None:
    vocabulary = Vocabulary(ALL)
    assert [(e.name, e.start, e.size) for e in vocabulary.entries] == [
        ("text", 0, 100),
        ("image", 100 + NAMED + SIZES, 40),
        ("audio", 140 + NAMED + SIZES, 0),  # sub-codes have their own tables
        ("video", 140 + NAMED + SIZES, 30),
        ("latent", 170 + NAMED + SIZES, 0),
    ]
    assert len(vocabulary) == 170 + NAMED + SIZES
    owners = [vocabulary.describe(token).split(":")[0] for token in range(len(vocabulary))]
    assert owners.count("text") == 100 and owners.count("image") == 40 and owners.count("video") == 30
    assert len({vocabulary.describe(token) for token in range(len(vocabulary))}) == len(vocabulary)


def test_every_control_has_an_id_of_its_own_inside_the_controls() -> None:
    vocabulary = Vocabulary(ALL)
    ids = [vocabulary.control(name) for name in ("bos", "eos", "null")]
    ids += [which(name) for name in ALL for which in (vocabulary.begin, vocabulary.end)]
    ids += [vocabulary.extent(size) for size in range(1, SIZES + 1)]
    assert len(set(ids)) == len(ids) == 3 + 2 * 5 + SIZES
    assert all(100 <= token < 100 + NAMED + SIZES for token in ids)
    assert vocabulary.describe(vocabulary.begin("image")) == "<begin image>"
    assert vocabulary.describe(vocabulary.end("video")) == "<end video>"
    assert vocabulary.describe(vocabulary.extent(17)) == "<size 17>"
    assert vocabulary.describe(vocabulary.control("null")) == "<null>"
    for outside in (-1, len(vocabulary)):
        with pytest.raises(ValueError, match=f"id {outside} lies outside this vocabulary of {len(vocabulary)}"):
            vocabulary.describe(outside)


def test_a_new_modality_moves_nothing() -> None:
    before, after = Vocabulary({"text": TEXT, "image": IMAGE}), Vocabulary(ALL)
    assert before.entries == after.entries[:2] and before.control_start == after.control_start
    for name in before.index:
        assert (before.begin(name), before.end(name)) == (after.begin(name), after.end(name))


def test_thirty_modalities_fit_and_more_are_refused() -> None:
    specs = [("text", TEXT), *((f"m{n}", IMAGE) for n in range(29))]
    vocabulary = Vocabulary(specs)
    assert vocabulary.end("m28") < vocabulary.extent(1)
    with pytest.raises(ValueError, match=f"31 modalities need more than the {NAMED} named controls"):
        Vocabulary([*specs, ("one more", IMAGE)])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "at least one modality"),
        ([("text", TEXT), ("image", IMAGE), ("image", IMAGE)], "two modalities share the name 'image'"),
        ([("latent", LATENT), ("text", TEXT)], "'latent' is continuous; it owns the control tokens"),
        ([("audio", AUDIO)], "'audio' is codes"),
        ([("text", TEXT), ("null", IMAGE)], "a modality cannot be called 'null'"),
        ([("text", TEXT), ("type", IMAGE)], "a modality cannot be called 'type', which torch keeps for itself"),
        ([("text", TEXT), ("keys", IMAGE)], "a modality cannot be called 'keys'"),
        ([("training", TEXT)], "a modality cannot be called 'training'"),
        ([("text.a", TEXT)], "a modality cannot be called 'text.a'; use a word without dots"),
        ([("text", TEXT), ("image", Spec(kind="discrete", vocab_size=2, max_grid=(257, 1)))], r"up to 256 an axis"),
    ],
)
def test_impossible_vocabularies_are_refused(specs: list[tuple[str, Spec]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vocabulary(specs)


def test_opening_states_the_extents_and_refuses_what_does_not_fit() -> None:
    vocabulary = Vocabulary(ALL)
    extents = [vocabulary.extent(8), vocabulary.extent(3)]
    assert vocabulary.opening("image", (8, 3)) == [vocabulary.begin("image"), *extents]
    assert vocabulary.opening("text", (12,)) == [vocabulary.begin("text")]  # a list is closed by its end token
    for grid in ((9, 1), (8,), (1, 7), (2, 2, 2)):
        with pytest.raises(ValueError, match=r"does not fit the largest grid \(8, 6\)"):
            vocabulary.opening("image", grid)
    with pytest.raises(ValueError, match="an axis can have 1..256 elements, got 0"):
        vocabulary.opening("image", (0, 3))
    with pytest.raises(ValueError, match="no modality 'smell' in this model; it has text, image"):
        vocabulary.opening("smell", (1,))


def test_a_saved_vocabulary_is_accepted_again() -> None:
    vocabulary = Vocabulary(ALL)
    vocabulary.check(json.loads(json.dumps(vocabulary.to_dict())))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({**ALL, "image": replace(IMAGE, fingerprint="i2")}, "'image' has fingerprint 'i1', but .* 'i2'"),
        ({**ALL, "image": replace(IMAGE, max_grid=(8, 8))}, r"'image' has max_grid \[8, 6\]"),
        ({**ALL, "image": replace(IMAGE, vocab_size=41)}, "'image' has size 40, but the one given has 41"),
        ({**ALL, "audio": IMAGE}, "'audio' has size 0"),
        ({"text": TEXT, "image": IMAGE}, "the checkpoint has a modality 'audio' that this configuration lacks"),
        ({**ALL, "depth": IMAGE}, "the checkpoint has no modality 'depth'"),
        ({"text": TEXT, "video": VIDEO, "image": IMAGE, "audio": AUDIO, "latent": LATENT}, "'video' has start"),
    ],
)
def test_another_vocabulary_is_refused_by_name(now: dict[str, Spec], message: str) -> None:
    saved = json.loads(json.dumps(Vocabulary(ALL).to_dict()))
    with pytest.raises(ValueError, match=message):
        Vocabulary(now).check(saved)


def test_other_control_tables_are_refused() -> None:
    saved = Vocabulary(ALL).to_dict()
    with pytest.raises(ValueError, match="has control_start 99, this one has 100"):
        Vocabulary(ALL).check({**saved, "control_start": 99})
    with pytest.raises(ValueError, match="has no modality 'text' .it has none."):
        Vocabulary(ALL).check({})


# --- grammar --------------------------------------------------------------------------------------------------------


def allowed(bias: torch.Tensor) -> set[int]:
    assert set(bias.unique().tolist()) <= {0.0, float("-inf")}
    return set((bias == 0).nonzero()[:, 0].tolist())


def test_in_text_a_row_may_write_close_or_open() -> None:
    vocabulary = Vocabulary(ALL)
    grammar, text = Grammar(vocabulary), set(range(100))
    eos, image = vocabulary.control("eos"), vocabulary.begin("image")
    assert len(grammar.text((), True)) == 100 + NAMED + SIZES
    assert allowed(grammar.text((), True)) == text | {eos}
    assert allowed(grammar.text((), False)) == {eos}
    assert allowed(grammar.text(("image", "video"), True)) == text | {eos, image, vocabulary.begin("video")}
    assert allowed(grammar.text(("image",), False)) == {eos, image}
    assert allowed(grammar.extent(5)) == {vocabulary.extent(n) for n in range(1, 6)}


@given(st.integers(0, 5), st.integers(0, 8), st.integers(1, 300))
def test_the_largest_extent_is_the_largest_that_fits(frames: int, rows: int, room: int) -> None:
    """Against trying every extent, the axes after this one at 1."""
    grammar = Grammar(Vocabulary(ALL))
    fixed = tuple(extent for extent in (frames, rows) if extent)[: 2 if frames else 0]
    filled = 1
    for extent in fixed:
        filled *= extent
    if filled > room:
        return
    limit = ALL["video"].max_grid[len(fixed)]
    assert grammar.largest("video", fixed, room) == max(n for n in range(1, limit + 1) if filled * n <= room)


def test_overhead_counts_begin_extents_and_end() -> None:
    grammar = Grammar(Vocabulary(ALL))
    assert [grammar.overhead(name) for name in ("text", "audio", "image", "video")] == [2, 3, 4, 5]


def test_models_with_a_grammar_can_be_copied_and_pickled() -> None:
    model = tiny()
    wanted = model.grammar.text(("image",), True)
    assert torch.equal(copy.deepcopy(model).grammar.text(("image",), True), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model)).grammar.text(("image",), True), wanted)
