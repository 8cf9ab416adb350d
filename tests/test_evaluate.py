"""The parts of the evaluation: intervals, galleries, searches, judges, data arguments."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor

from mm.data.sources import ShardSource
from mm.evaluate.command import open_source, parse_data, parser
from mm.evaluate.digits import digit_words, variety
from mm.evaluate.emoji import choose, named
from mm.evaluate.emoji_judge import choose_controls
from mm.evaluate.frechet import frechet_distance
from mm.evaluate.gallery import Gallery, Nearest, load_gallery
from mm.evaluate.networks import Judge, obtain, one_cycle, train, vary
from mm.evaluate.protocol import Augmentation, Protocol, Recipe
from mm.evaluate.results import Figure, Report, Z, form, mean, share, wilson
from mm.evaluate.styles import Missing, missing_styles
from mm.evaluate.tokenizer import count_codes
from mm.interfaces import Encoded

SMALL = Recipe(channels=3, widths=(8, 8, 16), features=16, epochs=4, batch=16)


def gallery(count: int, *, styles: Sequence[str] = ("flat",), side: int = 8, same: Sequence[int] = ()) -> Gallery:
    """`count` concepts in every style, as noise; concepts in `same` have the picture of concept 0."""
    rng = torch.Generator().manual_seed(0)
    rows = [(number, style) for style in styles for number in range(count)]
    pixels = torch.randint(256, (len(rows), 3, side, side), generator=rng, dtype=torch.uint8)
    for index, (number, _) in enumerate(rows):
        if number in same:
            pixels[index] = pixels[index - number]
    return Gallery(
        pixels=pixels,
        keys=[f"{number:03d}" for number, _ in rows],
        captions=[f"thing {number}" for number, _ in rows],
        styles=[style for _, style in rows],
        kinds=[f"kind/{number % 3}" for number, _ in rows],
        digits=[-1] * len(rows),
        held=[number % 5 == 0 for number, _ in rows],
        identity="noise",
    )


def shard(path: Path, rows: Sequence[tuple[str, dict[str, str], Image.Image]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, fields, picture in rows:
            png = io.BytesIO()
            picture.save(png, "PNG")
            for suffix, data in (("png", png.getvalue()), ("json", json.dumps(fields).encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


# --- intervals and reports --------------------------------------------------------------------------------------------


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_shares_that_the_score_test_accepts(case: tuple[int, int]) -> None:
    """At each end p of the interval, |hits/n − p| is z standard errors of p: how Wilson's interval is defined."""
    hits, n = case
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(hits / n - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), abs=1e-9)


def test_wilson_by_hand() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(190, 200) == pytest.approx((0.9104, 0.9726), abs=1e-4)


@pytest.mark.parametrize("case", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(case: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 <= hits <= n"):
        wilson(*case)


def test_mean_has_the_interval_of_its_standard_error() -> None:
    figure = mean("tokenizer", "x", [1.0, 2.0, 3.0, 4.0], "dB")
    half = Z * math.sqrt(5 / 3 / 4)
    assert (figure.value, figure.n) == (2.5, 4)
    assert (figure.low, figure.high) == (pytest.approx(2.5 - half), pytest.approx(2.5 + half))
    assert mean("tokenizer", "x", [2.0], "dB").low is None
    with pytest.raises(ValueError, match="no values"):
        mean("tokenizer", "x", [], "dB")


def test_report_as_table_and_json() -> None:
    good = share("digits", "generated, recognised", [True] * 197 + [False] * 3)
    bad = share("digits", "captions of held-out digits, exact", [True, False], control=True)
    assert good.goal == 0.95 and (good.hits, good.n) == (197, 200)
    report = Report(model="m", fingerprint="f00d", facts={"threads": 1}, figures=[good, bad], seconds=1.0)
    assert report["digits", "generated, recognised"] is good
    with pytest.raises(KeyError, match="no figure"):
        report["digits", "nothing"]
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["figures"][0]["low"] == good.low and again["facts"] == {"threads": 1}
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=140).print(report.table())
    text = out.getvalue()
    line = next(line for line in text.splitlines() if "generated, recognised" in line)
    assert "98.5 %" in line and "≥ 95.0 % ✓" in line and "200" in line
    assert "✗" in next(line for line in text.splitlines() if "exact" in line)


def test_values_for_people() -> None:
    assert (form(0.25, "share"), form(1.5, "s"), form(24, "dB"), form(512.2, "codes")) == (
        "25.0 %",
        "1.500 s",
        "24.00 dB",
        "512",
    )


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"holdout_every": 1}, {"seed": -1}, {"side": 20}, {"caption_tokens": 0}]
)
def test_protocol_refuses(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Protocol(**wrong)  # type: ignore[arg-type]


# --- galleries and searches -------------------------------------------------------------------------------------------


def test_gallery_is_over_white_and_knows_what_is_held_out(tmp_path: Path) -> None:
    disc = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    ImageDraw.Draw(disc).ellipse((4, 4, 11, 11), fill=(255, 0, 0, 255))
    rows = [
        (f"{n:02d}", {"caption": f"disc {n}", "style": "flat", "category": "a", "subcategory": "b"}, disc)
        for n in range(6)
    ]
    source = ShardSource([shard(tmp_path / "a.tar", rows)])
    found = load_gallery(source, 16, holdout_every=3)
    assert found.pixels.shape == (6, 3, 16, 16)
    assert found.pixels[0, :, 0, 0].tolist() == [255, 255, 255] and found.pixels[0, :, 8, 8].tolist() == [255, 0, 0]
    assert found.held == [True, False, False, True, False, False]
    assert (found.captions[2], found.styles[2], found.kinds[2], found.digits[2]) == ("disc 2", "flat", "a/b", -1)
    part = found.subset(found.where(held=False))
    assert part.keys == ["01", "02", "04", "05"] and part.identity != found.identity
    assert len(part + part) == 8
    with pytest.raises(ValueError, match="whole source"):
        load_gallery(ShardSource([tmp_path / "a.tar"], split="train"), 16)


def test_nearest_by_pixels_is_the_brute_force_one() -> None:
    real = gallery(30)
    queries = torch.randint(256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    expected = [
        min(range(30), key=lambda i: int(((real.pixels[i].long() - q.long()) ** 2).sum()))  # noqa: B023
        for q in queries
    ]
    matches = Nearest(real).match(queries)
    assert [match.captions for match in matches] == [frozenset({f"thing {i}"}) for i in expected]
    best = math.sqrt(int(((real.pixels[expected[0]].long() - queries[0].long()) ** 2).sum()))
    assert matches[0].distance == pytest.approx(best, rel=1e-4)


def test_equal_pictures_are_one_picture_with_several_captions() -> None:
    search = Nearest(gallery(6, same=(3, 4)))
    assert len(search.members) == 4
    (match,) = search.match(search.gallery.pixels[4:5])
    assert match.captions == {"thing 0", "thing 3", "thing 4"} and match.kinds == {"kind/0", "kind/1"}
    assert ("thing 3", "flat") in match.named


def test_features_are_compared_by_direction() -> None:
    real = gallery(3)
    search = Nearest(real, torch.tensor([[1.0, 0.0], [0.0, 5.0], [-1.0, 0.0]]))
    assert [m.captions for m in search.match(torch.tensor([[0.1, 2.0], [300.0, 1.0]]))] == [{"thing 1"}, {"thing 0"}]
    with pytest.raises(ValueError, match="features of 2 pictures for a gallery of 3"):
        Nearest(real, torch.zeros(2, 2))


def test_ranks_count_nearer_pictures_of_the_style_only() -> None:
    real = gallery(4, styles=("flat", "ring"))
    places = torch.tensor([[0.0], [2.0], [4.0], [6.0], [0.1], [2.1], [4.1], [6.1]])
    angle = torch.cat((places.div(10).cos(), places.div(10).sin()), 1)
    search = Nearest(real, angle)
    near_two = torch.tensor([[math.cos(0.21), math.sin(0.21)]]).repeat(4, 1)
    captions = ["thing 1", "thing 1", "thing 3", "thing 0"]
    ranks = search.ranks(near_two, captions, ["flat", "ring", "ring", "flat"])
    assert ranks.tolist() == [0, 0, 3, 2]
    with pytest.raises(ValueError, match="no picture 'thing 9'"):
        search.ranks(near_two[:1], ["thing 9"], ["flat"])
    assert search.ranks(near_two[:0], [], []).tolist() == []


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_missing_styles_are_those_that_a_concept_lacks() -> None:
    whole = gallery(4, styles=("flat", "ring"))
    rows = [index for index in range(8) if index not in (2, 5)]  # no flat 2, no ring 1
    part = whole.subset(rows)
    found = missing_styles(part, range(len(part)))
    assert [(part.keys[m.row], part.styles[m.row], m.style) for m in found] == [
        ("001", "flat", "ring"),
        ("002", "ring", "flat"),
    ]
    assert missing_styles(part, [0]) == []
    assert missing_styles(whole, range(8)) == []
    assert isinstance(found[0], Missing)


def test_controls_have_every_style_and_no_skin_tone() -> None:
    real = gallery(60, styles=("flat", "ring"))
    toned = [
        f"{text}, dark skin tone" if int(key) % 2 else text for text, key in zip(real.captions, real.keys, strict=True)
    ]
    real = replace(real, captions=toned)
    chosen = choose_controls(real, Protocol(controls=50))
    assert len(chosen) == 3  # a tenth of the 30 without skin tone
    assert len({real.keys[row] for row in chosen}) == 3
    assert {real.styles[row] for row in chosen} == {"flat", "ring"}
    assert not any("skin tone" in real.captions[row] for row in chosen)
    assert (
        chosen == choose_controls(real, Protocol(controls=50)) != choose_controls(real, Protocol(controls=50, seed=1))
    )
    assert choose_controls(gallery(60), Protocol()) == []


def test_no_caption_is_chosen_twice() -> None:
    real = gallery(30, styles=("flat", "ring"))
    chosen = choose(real, range(60), Protocol(samples=20), salt=1)
    assert len(chosen) == len({real.captions[row] for row in chosen}) == 20
    assert {real.styles[row] for row in chosen} == {"flat", "ring"}
    assert chosen == choose(real, range(60), Protocol(samples=20), salt=1)
    assert chosen != choose(real, range(60), Protocol(samples=20), salt=2)
    assert len(choose(real, range(60), Protocol(samples=99), salt=1)) == 30


def test_words_of_captions() -> None:
    assert digit_words("Handwritten digit SEVEN.") == {"seven"}
    assert digit_words("one or two") == {"one", "two"}
    assert digit_words("someone, often") == set()
    assert named("red apple, noto", ["noto", "twemoji"]) == {"noto"}
    assert named("notorious apple", ["noto", "twemoji"]) == set()


def test_frechet_distance_is_that_of_normal_distributions() -> None:
    """In closed form where the covariances are diagonal; 0 between a set and itself; larger sets come nearer to the truth."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20000, 3, generator=rng) for _ in range(2))
    scale, move = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, -2.0])
    wanted = float(move.square().sum() + (scale - 1).square().sum())
    assert abs(frechet_distance(a, b * scale + move) - wanted) < 0.1
    assert frechet_distance(a, a) < 1e-9
    assert frechet_distance(a[:50], b[:50]) > frechet_distance(a, b)
    turned = torch.linalg.qr(torch.randn(3, 3, generator=rng)).Q
    assert math.isclose(frechet_distance(a @ turned, b * scale @ turned), frechet_distance(a, b * scale), rel_tol=1e-4)
    for wrong, message in ((a[:1], "two sets of two or more"), (a[:, :2], "of one width"), (a / 0, "not numbers")):
        with pytest.raises(ValueError, match=message):
            frechet_distance(a, wrong)


def test_variety_compares_with_people() -> None:
    real = replace(gallery(40), digits=[number % 2 for number in range(40)])
    one = real.pixels[:1].expand(10, -1, -1, -1)
    assert variety(one, [0] * 5 + [1] * 5, real)[0].value == 0
    same = variety(real.pixels, real.digits, real)[0]
    assert same.value == pytest.approx(1.0) and same.n == 2
    assert variety(one[:1], [0], real) == []


def test_codes_are_counted_by_book() -> None:
    items = [
        Encoded(grid=(1, 2), codes=torch.tensor([[0, 3], [1, 3]])),
        Encoded(grid=(1,), codes=torch.tensor([[0, 2]])),
    ]
    assert count_codes(items, 2, 4).tolist() == [[2, 1, 0, 0], [0, 0, 1, 2]]
    assert count_codes([Encoded(grid=(3,), ids=torch.tensor([2, 2, 0]))], 1, 3).tolist() == [[1, 0, 2]]


# --- judges -----------------------------------------------------------------------------------------------------------


def stripes(count: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Noise with a dark band: across (0), down (1)."""
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randint(150, 256, (count, 3, side, side), generator=rng, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    pixels[labels == 0, :, 6:10] = 0
    pixels[labels == 1, :, :, 6:10] = 0
    return pixels, labels


def made(
    pixels: Tensor, labels: Tensor, folder: Path | None, recipe: Recipe = SMALL, seed: int = 0
) -> tuple[Judge, list[str]]:
    said: list[str] = []
    judge = obtain(
        "bands", pixels, {"band": labels}, {"band": 2}, recipe, side=16, seed=seed, folder=folder, identity=("x",),
        say=said.append,
    )  # fmt: skip
    return judge, said


def test_a_judge_learns_is_the_same_by_seed_and_is_kept(tmp_path: Path) -> None:
    pixels, labels = stripes(96)
    before = torch.random.get_rng_state()
    judge, said = made(pixels[:64], labels[:64], tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert any("epoch 4 of 4" in line for line in said)
    assert (judge.classify(pixels[64:], "band") == labels[64:]).float().mean() >= 0.95
    again, _ = made(pixels[:64], labels[:64], None)
    other, _ = made(pixels[:64], labels[:64], None, seed=1)
    read, said = made(pixels[:64], labels[:64], tmp_path)
    assert said == [f"bands: read from {next(tmp_path.iterdir()).name}"]
    for name, value in judge.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]) and torch.equal(value, read.state_dict()[name])
    assert not torch.equal(judge.trunk[0].weight, other.trunk[0].weight)
    assert torch.equal(judge.features(pixels), read.features(pixels))


def test_another_recipe_or_other_labels_are_another_judge(tmp_path: Path) -> None:
    pixels, labels = stripes(32)
    one = replace(SMALL, epochs=1)
    for recipe, own, seed in (
        (one, labels, 0),
        (replace(one, batch=8), labels, 0),
        (one, 1 - labels, 0),
        (one, labels, 1),
    ):
        _, said = made(pixels, own, tmp_path, recipe, seed)
        assert any("training" in line for line in said)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all", b"\x80\x04K\x01."])
def test_a_damaged_judge_is_trained_again(tmp_path: Path, damage: bytes) -> None:
    pixels, labels = stripes(32)
    good, _ = made(pixels, labels, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    judge, said = made(pixels, labels, tmp_path)
    assert "trained again" in said[0]
    assert torch.equal(good.trunk[0].weight, judge.trunk[0].weight)
    assert made(pixels, labels, tmp_path)[1] == [f"bands: read from {file.name}"]


def test_unasked_labels_teach_nothing_and_wrong_numbers_are_refused() -> None:
    pixels, labels = stripes(32)
    one = replace(SMALL, epochs=1)
    judge = Judge(one, 16, {"band": 2, "other": 3})
    other = judge.questions["other"].weight.detach().clone()
    train(judge, pixels, {"band": labels, "other": torch.full((32,), -1)}, replace(one, weight_decay=0.0), 0)
    assert torch.equal(judge.questions["other"].weight, other)
    with pytest.raises(ValueError, match="got 5 labels 'band' for 32 pictures"):
        train(judge, pixels, {"band": labels[:5]}, one, 0)


def test_judges_look_at_one_size_and_at_grey() -> None:
    judge = Judge(replace(SMALL, channels=1), 16, {"a": 2})
    pixels = torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    pixels[0] = 255
    pixels[1, 0] = 255
    seen = judge.look(pixels)
    assert seen.shape == (2, 1, 16, 16)
    assert torch.allclose(seen[0], torch.ones(1)) and torch.allclose(seen[1], torch.tensor(-1 / 3))


def test_vary_by_nothing_changes_nothing() -> None:
    x = torch.rand(3, 1, 12, 12)
    assert torch.allclose(vary(x, Augmentation(), torch.Generator()), x, atol=1e-5)
    rng = torch.Generator().manual_seed(0)
    moved = vary(x, Augmentation(shift=0.2, noise=0.1, blur=0.5, brightness=0.1, rotate=0.2), rng)
    assert moved.shape == x.shape and bool((moved - x).abs().flatten(1).amax(1).gt(0.05).all())


def test_one_cycle_rises_and_falls() -> None:
    factors = [one_cycle(step / 100) for step in range(101)]
    top = factors.index(max(factors))
    assert factors[0] == pytest.approx(0.04) and factors[30] == pytest.approx(1.0) and factors[-1] == pytest.approx(0)
    assert factors[:top] == sorted(factors[:top]) and factors[top:] == sorted(factors[top:], reverse=True)


# --- the command's arguments ------------------------------------------------------------------------------------------


def test_data_arguments() -> None:
    assert parse_data(["emoji:a.tar,b.tar", "digits:d.npz", "emoji:c.tar"]) == {
        "emoji": ["a.tar", "b.tar", "c.tar"],
        "digits": ["d.npz"],
    }
    for wrong in ("emoji", "emoji:", ":a.tar", "my pictures:a.tar"):
        with pytest.raises(ValueError, match="is not KIND:PATH"):
            parse_data([wrong])
    assert parser().parse_args(["--data", "a:b", "c:d", "--data", "e:f"]).data == ["a:b", "c:d", "e:f"]


def test_sources_that_do_not_fit_their_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one .npz file, got 2"):
        open_source("digits", ["a.npz", "b.npz"])
    with pytest.raises(ValueError, match="neither a .tar shard nor a folder"):
        open_source("emoji", [str(tmp_path / "x.zip")])
    with pytest.raises(ValueError, match="missing"):
        open_source("emoji", [str(tmp_path / "x.tar")])


def test_figures_know_their_goals() -> None:
    assert Figure(family="digits", name="generated, recognised", value=1, unit="share", n=1).goal == 0.95
    assert Figure(family="digits", name="other", value=1, unit="share", n=1).goal is None
