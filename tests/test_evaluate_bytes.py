"""Pictures as files, judged: what is whole is counted, the untrained twin is one, and damage is measured as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm import pictures
from mm.evaluate.bytes import (
    RARE,
    STATES,
    WRONG,
    Group,
    damage_figures,
    damaged,
    digit_group,
    distance_figures,
    emoji_group,
    evaluate_bytes,
    mixed,
    rare_kinds,
    rate_figures,
    state,
    untrained,
)
from mm.evaluate.gallery import Gallery
from mm.evaluate.protocol import Protocol, Recipe
from mm.evaluate.run import evaluate
from mm.evaluate.subject import Drawn, Subject
from mm.interfaces import Encoded
from mm.testing import tiny
from mm.tokenizers.jpeg_bytes import JpegBytes

SMALL = Recipe(channels=1, widths=(4, 8, 8), features=8, epochs=2, batch=20)
PROTOCOL = Protocol(
    samples=6, holdout_every=5, side=16, controls=2, single=1, batch=8, digit_judge=SMALL,
    emoji_judge=replace(SMALL, channels=3),
)  # fmt: skip


def gallery(count: int, side: int = 16, **more: Any) -> Gallery:
    """Coarse noise, each fifth held out."""
    noise = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    known: dict[str, Any] = {
        "captions": [f"thing {n}" for n in range(count)],
        "styles": ["noto"] * count,
        "kinds": ["all/all"] * count,
        "digits": [n % 10 for n in range(count)],
    }
    return Gallery(
        pixels=(noise * 255).byte().repeat_interleave(8, 2).repeat_interleave(8, 3),
        keys=[f"{n:04d}" for n in range(count)],
        held=[n % 5 == 0 for n in range(count)],
        identity=f"noise {count}",
        **{**known, **more},
    )


@pytest.fixture(scope="module")
def writes() -> Subject:
    """A random model of JPEG files of 16×16."""
    tokenizer = JpegBytes(size=(16, 16), strip_header=True, vocab=280)
    tokenizer.fit(tokenizer.file(pictures.to_image(pixels)) for pixels in gallery(30).pixels)
    return Subject(tiny(tokenizer=tokenizer, context=160), sampling={"temperature": 1.0}, batch=8)


# --- how many are whole ---------------------------------------------------------------------------------------------


def test_a_reason_says_in_which_state_a_file_was() -> None:
    assert state(True, "") == "strict"
    assert [state(False, f"{name}: the file ends early") for name in STATES[1:]] == list(STATES[1:])
    assert state(False, "3 ids stand for no bytes") == state(False, "") == "invalid"


def test_a_tokenizer_of_files_tells_the_state(writes: Subject) -> None:
    tokenizer = writes.tokenizer
    whole = tokenizer.encode(pictures.to_image(gallery(1).pixels[0]))
    assert whole.ids is not None
    cut = whole.ids[:-4]
    for ids, wanted in ((whole.ids, {"strict"}), (cut, {"repaired", "partial", "invalid"}), (cut[:1], {"invalid"})):
        decoded = tokenizer.decode(Encoded(grid=(len(ids),), ids=ids))
        assert state(decoded.valid, decoded.reason) in wanted and decoded.valid == (wanted == {"strict"})
        assert decoded.valid or decoded.reason.partition(":")[0] in STATES


def test_files_are_counted_with_the_automaton_and_without(writes: Subject) -> None:
    asked = ["one", "two", "three"] * 4
    figures = {f.name: f for f in rate_figures(writes, asked, PROTOCOL, lambda line: None)}
    for who in ("", "untrained, "):
        held, free = figures[f"{who}strict, with the automaton"], figures[f"{who}strict, without"]
        assert held.value == 1.0 and free.value < 0.5 and held.n == free.n == 12
        assert sum(free.detail.values()) == 12 and set(free.detail) == set(STATES)
        assert held.control == bool(who)
    assert figures["seconds a file, without"].value > 0


def test_states_are_those_that_decoding_tells(writes: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [(True, ""), (False, "repaired: x"), (False, "invalid: x"), (False, "partial: y")]

    def draw(self: Subject, prompts: Sequence[str], seed: int, constrained: bool = True) -> Drawn:
        made = [told[0]] * len(prompts) if constrained else told[: len(prompts)]
        valid, reasons = (list(column) for column in zip(*made, strict=True))
        return Drawn(torch.zeros(len(prompts), 3, 16, 16, dtype=torch.uint8), valid, reasons, 2.0)

    monkeypatch.setattr(Subject, "draw", draw)
    figures = {f.name: f for f in rate_figures(writes, ["a"] * 4, PROTOCOL, lambda line: None)}
    assert figures["strict, without"].detail == dict.fromkeys(STATES, 1) and figures["strict, without"].hits == 1
    assert figures["strict, without"].note == "repaired 1, partial 1, invalid 1"
    assert figures["untrained, strict, with the automaton"].detail["strict"] == 4
    assert figures["seconds a file, without"].value == 0.5


def test_other_tokens_are_not_files() -> None:
    (figure,) = rate_figures(Subject(tiny(), batch=4), ["a"] * 3, PROTOCOL, lambda line: None)
    assert figure.name == "valid" and figure.value == 1.0 and figure.note == "not files"


def test_the_untrained_twin_has_the_same_shape_and_other_weights(writes: Subject) -> None:
    model = writes.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state_of_torch = torch.get_rng_state()
    one, other = untrained(model, 0), untrained(model, 0)
    assert torch.equal(torch.get_rng_state(), state_of_torch)
    weights = {name: value for name, value in one.state_dict().items() if value.ndim > 1}
    assert {n: v.shape for n, v in one.state_dict().items()} == {n: v.shape for n, v in before.items()}
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in weights.items())
    assert any(not torch.equal(value, before[name]) for name, value in weights.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model itself stays"
    assert one.heads["text"] is not model.heads["text"]
    assert one.modalities[1].tokenizer is model.modalities[1].tokenizer


# --- what is asked for, and what is shown ----------------------------------------------------------------------------


def test_rare_kinds_are_the_smallest_that_hold_a_share() -> None:
    kinds = ["a/big"] * 60 + ["b/middle"] * 25 + ["c/small"] * 9 + ["d/tiny"] * 4 + ["e/least"] * 2
    assert rare_kinds(gallery(100, kinds=kinds)) == {"e/least", "d/tiny", "c/small"}
    assert 15 == RARE * 100
    assert rare_kinds(gallery(100, kinds=["a/big"] * 85 + ["b/small"] * 15)) == {"b/small"}
    assert rare_kinds(gallery(10)) == set()


def test_groups_ask_for_what_was_trained_and_compare_with_what_was_not() -> None:
    kinds = ["a/big"] * 170 + ["b/small"] * 30
    whole = gallery(200, kinds=kinds)
    everything, rare = emoji_group(whole, replace(PROTOCOL, samples=50))
    assert (everything.name, rare.name) == ("emoji", "rare emoji")
    numbers = [int(text.split()[1].rstrip(",")) for text in rare.prompts]
    assert all(n >= 170 and n % 5 for n in numbers) and len(set(numbers)) == 24
    assert len(everything.prompts) == 50 and everything.prompts[0].endswith(", noto")
    assert torch.equal(rare.held, whole.pixels[170::5]) and len(rare.seen) == 24 and len(everything.seen) == 160
    (digits,) = digit_group(whole, PROTOCOL)
    assert digits.digits == [0, 1, 2, 3, 4, 5] and digits.prompts[3] == "handwritten digit three"
    assert len(emoji_group(gallery(20), PROTOCOL)) == 1, "nothing is rare where all is of one kind"
    assert mixed([["a", "b"], ["x"]], 5) == ["a", "x", "b", "x", "a"]


def test_distances_are_to_held_out_pictures_as_many() -> None:
    def features(pixels: Tensor) -> Tensor:
        return pixels.float().flatten(1)[:, :4]

    real = gallery(40).pixels
    group = Group("digits", "digits", [], real[:12], real[12:], [])
    made, control = distance_figures(group, real[:20], features)
    assert made.n == control.n == 12 and control.control and "12 held-out" in made.note
    assert made.value == pytest.approx(0, abs=1e-3) and control.value > 1
    far, _ = distance_figures(group, real[:20].clamp(max=9), features)
    assert far.value > control.value
    assert distance_figures(replace(group, held=real[:1]), real, features) == []


# --- damage ---------------------------------------------------------------------------------------------------------


def test_damage_ends_at_a_restart_marker() -> None:
    shown = [pictures.to_image(pixels) for pixels in gallery(6, 48).pixels]
    cost = {}
    for restart in (1, 0):
        errors, whole = damaged(JpegBytes(size=(48, 48), restart=restart), shown, 0)
        assert len(errors) == len(whole) == 6 * WRONG and min(errors) >= 0
        cost[restart] = np.median(errors)
        assert 0 < sum(whole) < len(whole) and any(errors)
    assert cost[0] > 2 * cost[1]


def test_damage_is_measured_of_files_alone(writes: Subject) -> None:
    figures = {f.name: f for f in damage_figures(writes, gallery(5), PROTOCOL, lambda line: None)}
    assert figures["one byte wrong, with restart markers: error"].n == 5 * WRONG
    assert "one byte wrong, without: strict" in figures and all(figure.control for figure in figures.values())
    assert damage_figures(Subject(tiny()), gallery(5), PROTOCOL, lambda line: None) == []


# --- all of it ------------------------------------------------------------------------------------------------------


def test_a_model_is_measured_whole(writes: Subject, tmp_path: Path) -> None:
    kinds = ["a/big"] * 34 + ["b/small"] * 6
    galleries = {"digits": gallery(60), "emoji": gallery(40, kinds=kinds)}
    outcomes = evaluate_bytes(writes, galleries, PROTOCOL, tmp_path)
    assert [outcome.name for outcome in outcomes] == ["bytes-digits", "bytes-emoji", "bytes-rare-emoji"]
    names = [figure.name for outcome in outcomes for figure in outcome.figures]
    assert names[0] == "strict, with the automaton" and len(set(names)) == len(names)
    for name in ("digits recognised", "emoji, Fréchet distance", "real emoji, Fréchet distance"):
        assert name in names
    assert outcomes[0].figures[0].goal == 0.99
    with pytest.raises(ValueError, match="give the source 'digits' or 'emoji'"):
        evaluate_bytes(writes, {"other": gallery(9)}, PROTOCOL)


def test_the_family_is_measured_of_files_or_when_asked_for(
    writes: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm.data.sources import DigitsSource

    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", images=rng.integers(0, 255, (40, 16, 16), np.uint8), labels=np.arange(40) % 10)
    sources = {"digits": DigitsSource(tmp_path / "d.npz", size=16)}
    report = evaluate(writes, sources, protocol=PROTOCOL, folder=tmp_path / "out", only=["bytes"])
    assert {figure.family for figure in report.figures} == {"bytes", "generation"}
    assert (tmp_path / "out" / "bytes-digits.png").is_file()
    other = Subject(tiny(), batch=4)
    monkeypatch.setattr("mm.evaluate.run.evaluate_digits", lambda *args: pytest.fail("not asked for"))
    asked = evaluate(other, sources, protocol=PROTOCOL, only=["bytes"])
    assert ("bytes", "valid") in {(figure.family, figure.name) for figure in asked.figures}
