"""Clips that are made: the same for a seed, longer ones go on, things are where the track says, captions say what moves."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.commands import data as command
from mm.data.convert import make_digits
from mm.data.moving import MovingSource
from mm.data.moving_paths import DIRECTIONS, GROWTH, MOTIONS, SMALLEST, Course, reflected, trace
from mm.data.moving_shards import MEMBER, make_moving
from mm.data.sources import DIGIT_NAMES, FolderSource, ShardSource
from mm.video import Video, load_video

SIZE = 32


def ink(video: Video) -> np.ndarray[Any, Any]:
    """Brightness against black, [T, S, S]."""
    return video.frames.astype(np.float64).mean(-1)


def centre(picture: np.ndarray[Any, Any], near: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Centre of mass of a frame on a torus, cut open opposite to a point."""
    axis = np.arange(len(picture))
    out = []
    for number, weights in enumerate((picture.sum(0), picture.sum(1))):
        away = np.mod(axis - near[number] + len(picture) / 2, len(picture)) - len(picture) / 2
        out.append(near[number] + (weights * away).sum() / weights.sum())
    return np.array(out)


@pytest.fixture(scope="module")
def handwriting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz in the shape of MNIST: 80 made-up pictures, each of another brightness."""
    rng = np.random.default_rng(0)
    images = np.zeros((80, 28, 28), np.uint8)
    for number, picture in enumerate(images):
        top, left = rng.integers(2, 8, 2)
        picture[top : top + 18, left : left + 6 + number % 10] = 100 + number
    path = tmp_path_factory.mktemp("npz") / "digits.npz"
    np.savez(path, images=images, labels=np.arange(80, dtype=np.uint8) % 10)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of captioned pictures: red discs on transparent paper, and one without transparency."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        paper = np.full((24, 24, 4), (255, 255, 255, 0), np.uint8)
        paper[4:20, 6:18] = (250, 0, 0, 255)
        picture = Image.fromarray(paper)
        (Image.fromarray(paper[..., :3].copy()) if number == 3 else picture).save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text(f"apple {number}")
    return folder


# --- what a clip depends on -----------------------------------------------------------------------------------------


def test_a_clip_depends_on_seed_and_number_alone(handwriting: Path) -> None:
    one, other = MovingSource(str(handwriting), count=50), MovingSource(str(handwriting), count=9)
    for number in (7, 3):  # in another order, from a source of another length
        first, second = one[number], other[number]
        assert first["text"] == second["text"] and np.array_equal(first["video"].frames, second["video"].frames)
    assert one.identity != other.identity  # caches are of all clips
    assert one.plan(10**9) == other.plan(10**9), "clips go on beyond count"
    texts = {MovingSource(str(handwriting), count=9, seed=seed)[3]["text"] for seed in range(8)}
    assert len(texts) > 4


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_longer_clip_begins_with_the_shorter_one(motion: str) -> None:
    source = MovingSource(count=20, motions=[motion])
    for number in range(3):
        short, long = source[number], source.longer(64)[number]
        assert len(short["video"]) == 16 and len(long["video"]) == 64 and short["text"] == long["text"]
        assert np.array_equal(short["video"].frames, long["video"].frames[:16])
        frames = long["video"].frames.astype(float)
        standing = motion in ("scale",)  # it has grown, and stays
        assert (np.abs(np.diff(frames[48:], axis=0)).max() > 0) != standing


def test_frames_a_second_change_the_sampling_not_the_motion() -> None:
    slow, fast = MovingSource(count=5, fps=8), MovingSource(count=5, fps=16, frames=31)
    for number in range(5):
        assert np.array_equal(slow[number]["video"].frames, fast[number]["video"].frames[::2])


@pytest.mark.parametrize("size,frames", [(16, 1), (48, 5), (64, 3)])
def test_any_size_and_length(size: int, frames: int) -> None:
    source = MovingSource(count=6, size=size, frames=frames)
    for number in range(6):
        video = source[number]["video"]
        assert video.frames.shape == (frames, size, size, 3) and video.frames.dtype == np.uint8 and video.fps == 8
        assert video.frames.max() > 60, "something is to be seen"


# --- what is held out -----------------------------------------------------------------------------------------------


def test_held_out_clips_show_held_out_digits(handwriting: Path) -> None:
    parts = {
        split: MovingSource(str(handwriting), count=400, things=["digits"], split=split, holdout_every=10)
        for split in ("train", "holdout", "all")
    }
    keys = {split: {part.key(index) for index in range(len(part))} for split, part in parts.items()}
    assert keys["train"] | keys["holdout"] == keys["all"] and not keys["train"] & keys["holdout"]
    assert len(keys["holdout"]) == 40
    shown = {
        split: {thing.index for ordinal in part.ordinals for thing in part.plan(ordinal).things}
        for split, part in parts.items()
    }
    assert shown["holdout"] == set(range(0, 80, 10)) and not shown["holdout"] & shown["train"]
    assert parts["holdout"][0]["text"] == parts["all"][0]["text"]


def test_held_out_by_what_moves_how() -> None:
    options: dict[str, Any] = {"count": 200, "motions": ["straight"], "holdout_where": {"motion": [["left"]]}}
    held, train = MovingSource(split="holdout", **options), MovingSource(split="train", **options)
    assert len(held) + len(train) == 200
    assert {held[index]["motion"][0] for index in range(len(held))} == {"left"}
    assert "left" not in {train[index]["motion"][0] for index in range(len(train))}


# --- where things are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", ["straight", "turn", "bounce", "rotate", "scale"])
def test_things_are_where_the_track_says(motion: str, handwriting: Path) -> None:
    source = MovingSource(str(handwriting), count=12, motions=[motion], frames=40)
    for number in range(12):
        example = source[number]
        track = example["track"][0]
        assert ((track >= 0) & (track < SIZE)).all()
        off = [centre(frame, place) - place for frame, place in zip(ink(example["video"]), track, strict=True)]
        assert np.abs(off).max() < 0.3, (motion, example["text"])


def test_straight_motion_goes_the_way_it_is_called_for_ever() -> None:
    source = MovingSource(count=40, motions=["straight", "turn"], frames=64)
    seen = set()
    for number in range(40):
        plan = source.plan(number)
        place = source.traces(plan)[0].place
        for leg, step in enumerate(plan.courses[0].steps):
            way = place[63] - place[8] if leg else place[8] - place[0]
            seen.add(step)
            assert np.array_equal(np.sign(np.round(way, 6)), DIRECTIONS[step]), plan.caption
            assert 2 * np.abs(way).max() > 0.2 * SIZE, "too little to be told"
    assert seen == set(DIRECTIONS)


@pytest.mark.parametrize("motion", ["bounce", "rotate", "scale"])
def test_things_stay_inside(motion: str) -> None:
    source = MovingSource(count=12, motions=[motion], frames=64, things=["shapes"])
    for number in range(12):
        light = source[number]["video"].frames.max(-1).astype(float)
        total = light.sum((1, 2))
        if motion == "bounce":  # nothing is cut off
            assert total.min() > 0.97 * total.max()
        # Nothing comes in on the other side: a thing touches opposite borders only if it is as large as the frame.
        rows, columns = light.max(2) > 20, light.max(1) > 20
        assert not (rows[:, 0] & rows[:, -1]).any() and not (columns[:, 0] & columns[:, -1]).any()


def test_bouncing_is_light_between_mirrors() -> None:
    low, high = np.array([2.0, 0.0]), np.array([10.0, 5.0])
    place = np.stack((np.arange(0, 60, 0.7), np.arange(0, 60, 0.7)), -1) + low
    slow = []
    for axis in range(2):
        x, step, out = low[axis], 0.7, []
        for _ in place:
            out.append(x)
            x += step
            if x > high[axis]:
                x, step = 2 * high[axis] - x, -step
            elif x < low[axis]:
                x, step = 2 * low[axis] - x, -step
        slow.append(out)
    assert np.abs(reflected(place, low, high) - np.array(slow).T).max() < 1e-9


def test_growing_and_spinning_take_the_time_they_should() -> None:
    grown = trace(Course(("grows",), (0.5, 0.5), scale=(SMALLEST, 1.0)), (4, 4, 4, 4), SIZE, 40, 8.0).scale
    assert grown[0] == SMALLEST and grown[round(GROWTH * 8)] == 1 == grown[-1] and (np.diff(grown) >= 0).all()
    source = MovingSource(count=60, motions=["scale"], things=["shapes"])
    for number in range(10):
        light = ink(source[number]["video"]).sum((1, 2))
        ratio = light[-1] / light[0]
        assert ratio > 2.5 if source[number]["motion"] == ["grows"] else ratio < 1 / 2.5


def test_clockwise_is_clockwise() -> None:
    source = MovingSource(count=30, motions=["rotate"], things=["shapes"], size=64)
    seen = set()
    for number in range(30):
        example = source[number]
        if not example["things"][0].endswith("triangle"):
            continue
        light = ink(example["video"])
        places = [np.argwhere(frame > 0.5 * frame.max())[:, ::-1] for frame in light]
        middle = example["track"][0]
        # its farthest points are corners; in two frames they turn by less than half of what lies between them
        angle = [np.arctan2(*(p - m)[np.abs(p - m).sum(1).argmax()][::-1]) for p, m in zip(places, middle, strict=True)]
        turned = np.angle(np.exp(3j * np.diff(angle)))  # three corners: modulo a third of a turn
        step = "clockwise" if np.median(turned) > 0 else "anticlockwise"
        assert example["motion"] == [step]
        seen.add(step)
    assert len(seen) == 2


def test_things_that_cross_pass_each_other() -> None:
    source = MovingSource(count=20, motions=["cross"])
    for number in range(20):
        plan = source.plan(number)
        first, second = (own.place for own in source.traces(plan))
        axis = 0 if plan.courses[0].steps[0] in ("right", "left") else 1
        gap = (second - first)[:, axis]
        assert gap[0] * gap[-1] < 0 and np.abs(second - first)[:, 1 - axis].max() < 0.3 * SIZE
        assert len(source[number]["track"]) == len(source[number]["things"]) == 2


# --- things and captions --------------------------------------------------------------------------------------------


def test_captions_say_what_moves_and_how(handwriting: Path) -> None:
    plain = MovingSource(str(handwriting), count=60, varied=False, things=["digits"], motions=["turn"])
    for number in range(20):
        example = plain[number]
        first, second = (step.replace("-", " and to the ") for step in example["motion"])
        assert example["text"] == f"a handwritten {DIGIT_NAMES[example['digit']]} moves {first}, then {second}"
        assert int(handwritten_label(plain, number)) == example["digit"]
    varied = MovingSource(str(handwriting), count=300, things=["digits"], motions=["bounce"])
    forms = {varied[number]["text"].replace(DIGIT_NAMES[varied[number]["digit"]], "#") for number in range(300)}
    assert len(forms) == 4 and "a handwritten # bounces" in forms
    plans = [MovingSource(count=9, varied=flag).plan(5) for flag in (True, False)]
    assert plans[0].courses == plans[1].courses and plans[0].things == plans[1].things


def handwritten_label(source: MovingSource, number: int) -> int:
    """By the brightness of the made-up picture, which is its number."""
    light = int(source[number]["video"].frames[0].max())
    return min(range(80), key=lambda own: abs(100 + own - light)) % 10


def test_colours_are_named_and_seen() -> None:
    source = MovingSource(count=200, grounds=["black", "blue", "white"], inks=["yellow", "red"], motions=["straight"])
    for number in range(60):
        example = source[number]
        ground = example["video"].frames[0].reshape(-1, 3)
        colours, counts = np.unique(ground, axis=0, return_counts=True)
        common = tuple(colours[counts.argmax()].tolist())
        assert common == {"black": (0, 0, 0), "white": (255,) * 3, "blue": (50, 90, 235)}[example["ground"]]
        assert example["text"].endswith(f"on {example['ground']}") == (example["ground"] != "black")
        if example["digit"] >= 0:
            assert any(f"{ink} printed" in example["text"] for ink in ("yellow", "red"))
        else:
            assert example["ground"] not in example["things"][0]


def test_printed_digits_need_no_data() -> None:
    source = MovingSource(count=200, things=["digits"], motions=["straight"])
    digits = [source[number]["digit"] for number in range(200)]
    assert set(digits) == set(range(10))
    assert all(f"printed {DIGIT_NAMES[digit]}" in source[number]["text"] for number, digit in enumerate(digits[:40]))
    one = [source[n]["video"].frames for n, digit in enumerate(digits) if digit == 3][:2]
    assert not np.array_equal(*one), "each is drawn anew"


def test_pictures_move_with_their_transparency(pictures: Path) -> None:
    source = MovingSource(pictures=str(pictures), count=40, things=["pictures"], motions=["straight"], holdout_every=0)
    names = set()
    for number in range(40):
        example = source[number]
        frame = example["video"].frames[0].reshape(-1, 3)
        names.add(name := example["things"][0])
        assert name in example["text"] and example["digit"] == -1
        assert (frame.max(0)[1:] > 100).all() == (name == "apple 3"), "white paper only where the file has it"
    assert len(names) == 4


def test_digits_may_come_from_shards(tmp_path: Path) -> None:
    shards = make_digits(tmp_path, count=30)
    source = MovingSource([str(path) for path in shards], count=5, things=["digits"], holdout_every=5)
    assert "handwritten" in source[1]["text"] and source[1]["video"].frames.max() > 150
    given = MovingSource(ShardSource(shards), count=5, things=["digits"], holdout_every=5)
    assert given[1]["text"] == source[1]["text"]


def test_bad_settings_are_refused(pictures: Path, handwriting: Path) -> None:
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: MovingSource(count=0), "count must be"),
        (lambda: MovingSource(seed=-1), "seed at least 0"),
        (lambda: MovingSource(size=4), "size must be"),
        (lambda: MovingSource(frames=0), "1 to 16,384 frames, got 0"),
        (lambda: MovingSource(size=512, frames=1000), "1 to 256 frames"),
        (lambda: MovingSource(fps=0), "fps 0.001 to 1000"),
        (lambda: MovingSource(fps=1e-4), "fps 0.001 to 1000"),
        (lambda: MovingSource(motions=["fly"]), "motions holds 'fly'"),
        (lambda: MovingSource(motions="straight"), "give a list"),
        (lambda: MovingSource(things=["pictures"]), "none are given"),
        (lambda: MovingSource(grounds=[]), "grounds holds"),
        (lambda: MovingSource(grounds=["white"]), "digits in white can't be seen on white"),
        (lambda: MovingSource("nowhere"), "give an .npz of digits"),
        (lambda: MovingSource(str(handwriting), split="holdout", holdout_every=0), "needs at least 1"),
        (lambda: MovingSource(pictures=FolderSource(pictures, split="train"), count=1), "give the whole source"),
        (lambda: MovingSource(pictures=str(pictures), count=1, holdout_every=1), "too small to hold pictures"),
    ]
    for make, message in bad:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="no field 'digit'"):
        MovingSource(FolderSource(pictures), things=["digits"], count=9)[1]


# --- shards ---------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_the_source_gives(tmp_path: Path, handwriting: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    options = ["--count", "14", "--frames", "5", "--digits", str(handwriting), "--seed", "3"]
    assert command.main(["moving", "--out", str(out), *options]) == 0
    assert "moving-000000.tar" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "moving-000000.tar", "moving.png"]
    source = MovingSource(str(handwriting), count=14, frames=5, seed=3)
    with tarfile.open(out / "moving-000000.tar") as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    assert len(members) == 28
    for number in range(14):
        example, fields = source[number], json.loads(members[f"{example_key(source, number)}.json"])
        video = load_video(members[f"{example_key(source, number)}.{MEMBER}"])
        assert np.array_equal(video.frames, example["video"].frames) and video.fps == 8
        assert fields["caption"] == example["text"] and fields["motions"] == example["motions"]
        assert np.allclose(fields["track"], example["track"], atol=1e-3)
    read = ShardSource(out / "moving-000000.tar")
    assert len(read) == 14 and read.key(3) == source.key(3) and read[3]["text"] == source[3]["text"]
    assert np.array_equal(read[3]["video"].frames, source[3]["video"].frames) and "image" not in read[3]
    first = (out / "moving-000000.tar").read_bytes()
    assert command.main(["moving", "--out", str(out), *options]) == 0
    assert (out / "moving-000000.tar").read_bytes() == first, "the same settings write the same bytes"
    assert "with seed 3" in (out / "README.md").read_text() and "handwritten digits" in (out / "README.md").read_text()


def example_key(source: MovingSource, number: int) -> str:
    return str(source[number]["key"])


def test_pictures_that_are_broken_are_left_out(tmp_path: Path, pictures: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    Image.new("RGBA", (8, 8)).save(folder / "p1.png")  # nothing to be seen
    source = MovingSource(pictures=str(folder), count=20, frames=2, things=["pictures"], holdout_every=0)
    with pytest.warns(UserWarning, match=r"skipped \d+ of 20 examples as broken; the first: .*transparent"):
        (shard,) = make_moving(source, tmp_path / "out")
    with tarfile.open(shard) as tar:
        assert 0 < len(tar.getnames()) < 40
