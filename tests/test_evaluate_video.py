"""Video judged: the measures find what true clips show and not what they don't, and say so of what a model makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm.data.convert import make_digits
from mm.data.moving import MovingSource
from mm.data.moving_paths import DIRECTIONS
from mm.evaluate import video as evaluation
from mm.evaluate.command import open_source, parse_data
from mm.evaluate.motion import bounces, centred, directions, grows, ink, moves_as, places, turns
from mm.evaluate.moving_digits import recognised, seen, training_frames
from mm.evaluate.networks import Judge
from mm.evaluate.protocol import Augmentation, Protocol, Recipe
from mm.evaluate.run import evaluate
from mm.evaluate.video import Filmed, VideoSubject, ask, clip_figures, drift_figures, evaluate_video, open_moving, psnr
from mm.heads.regression import RegressionHead
from mm.orders.blocks import Blocks
from mm.testing import tiny
from mm.tokenizers.video_vae import VideoVAE
from mm.video import Video

RECIPE = Recipe(channels=1, widths=(8, 16, 16), features=32, epochs=3, augmentation=Augmentation(noise=0.05))
OPPOSITE = {"right": "left", "up": "down", "clockwise": "anticlockwise", "grows": "shrinks"}
OPPOSITE |= {"up-right": "down-left", "up-left": "down-right"}
OPPOSITE |= {other: name for name, other in OPPOSITE.items()}

MOVES = (*DIRECTIONS, "bounces", "clockwise", "anticlockwise", "grows", "shrinks")


def noisy(frames: np.ndarray[Any, Any], amount: float = 12.0) -> np.ndarray[Any, Any]:
    """As a decoder might give them back."""
    noise = np.random.default_rng(0).normal(0, amount, frames.shape)
    return (frames + noise).round().clip(0, 255).astype(np.uint8)


# --- measures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", ["straight", "turn", "bounce", "rotate", "scale"])
def test_the_motion_of_true_clips_is_found(motion: str) -> None:
    source = MovingSource(count=100, motions=[motion], grounds=["black", "blue"])
    right = wrong = 0
    for number in range(40):
        plan = source.plan(number)
        frames, steps = noisy(source.draw(plan).frames), plan.courses[0].steps
        right += moves_as(frames, source.fps, steps)
        # read backwards, everything goes the other way; what bounces still does, and so do there and back
        if motion == "turn" and OPPOSITE.get(steps[0]) == steps[1]:
            continue
        wrong += moves_as(frames[::-1].copy(), source.fps, steps)
    assert right >= 39
    assert wrong >= 36 if motion == "bounce" else wrong <= 2


def test_a_place_is_found_through_the_frame_s_border() -> None:
    frames = np.zeros((40, 16, 16, 3), np.uint8)
    for number in range(40):
        rows, columns = np.arange(3) - number, np.arange(4) + 2 * number
        frames[number][np.ix_(rows % 16, columns % 16)] = (0, 200, 0)
    place = places(ink(frames))
    assert np.allclose(place, np.arange(40)[:, None] * [2, -1], atol=1e-6)
    assert directions(frames, 8.0, 1) == ("up-right",) or directions(frames, 8.0, 1) == ("right",)
    assert not bounces(frames) and grows(frames) == ""


def test_legs_are_measured_apart() -> None:
    source = MovingSource(count=60, motions=["turn"])
    for number in range(20):
        plan = source.plan(number)
        first, second = plan.courses[0].steps
        frames = source.draw(plan).frames
        assert directions(frames, 8.0, 2) == (first, second)
        assert not moves_as(frames, 8.0, (second, first))


def test_what_stands_still_has_no_motion() -> None:
    source = MovingSource(count=20, motions=["rotate", "scale"])
    for number in range(6):
        still = np.repeat(source[number]["video"].frames[:1], 16, axis=0)
        assert not any(moves_as(still, 8.0, (step,)) for step in MOVES)
    empty = np.zeros((16, 32, 32, 3), np.uint8)
    assert not any(moves_as(empty, 8.0, (step,)) for step in MOVES)
    assert not centred(empty).any()
    with pytest.raises(ValueError, match="can't be measured"):
        moves_as(empty, 8.0, ("flies",))


def test_straight_ways_don_t_bounce_and_growing_isn_t_turning() -> None:
    straight = MovingSource(count=60, motions=["straight"])
    assert not any(bounces(straight[number]["video"].frames) for number in range(30))
    growing = MovingSource(count=60, motions=["scale"])
    assert sum(turns(growing[number]["video"].frames) != "" for number in range(20)) <= 2


def test_a_thing_is_shown_in_the_middle() -> None:
    source = MovingSource(count=9, motions=["straight"], frames=40, things=["shapes"], grounds=["blue"])
    shown = centred(source[2]["video"].frames).astype(float).mean(-1)
    axis = np.arange(32)
    for frame in shown:
        middle = [(frame.sum(0) * axis).sum() / frame.sum(), (frame.sum(1) * axis).sum() / frame.sum()]
        assert np.abs(np.array(middle) - 16).max() < 1
    assert shown.max() == 255 and np.median(shown) == 0


# --- digits ---------------------------------------------------------------------------------------------------------


def test_the_recogniser_sees_no_digit_that_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = make_digits(tmp_path, count=40)
    source = MovingSource(str(shard), count=9, things=["digits"], holdout_every=4)
    pixels, digits = training_frames(source, 0)
    assert len(pixels) == 30 and pixels.shape[1:] == (3, 32, 32) and pixels.dtype == torch.uint8
    rows = [n for n in range(40) if n % 4]
    assert digits.tolist() == [source.pools["digit"].source[n]["digit"] for n in rows]
    monkeypatch.setattr("mm.evaluate.moving_digits.PRINTED", 12)
    printed, names = training_frames(MovingSource(count=9, things=["digits"]), 0)
    assert len(printed) == len(names) == 12 and printed.float().mean((1, 2, 3)).min() > 3


def test_each_frame_is_recognised_by_itself() -> None:
    class Brightest(Judge):
        def classify(self, pixels: Any, question: str) -> Any:
            assert question == "digit" and pixels.shape[1:] == (3, 16, 16)
            return (pixels > 0).flatten(1).sum(1) // 12

    clips = [np.zeros((3, 16, 16, 3), np.uint8) for _ in range(2)]
    clips[0][0, 4:6, 4:6] = 255  # four pixels of three values: a "1"
    clips[0][2, 4:6, 4:8] = 255
    clips[1][0, 4:8, 4:8] = 255
    judge = Brightest(RECIPE, 16, {"digit": 10})
    assert recognised(judge, clips, 0) == [1, 4] and recognised(judge, clips, -1) == [2, 0]
    assert recognised(judge, [], 0) == [] and seen(clips[0]).shape == (3, 3, 16, 16)


# --- figures --------------------------------------------------------------------------------------------------------


@dataclass
class Perfect:
    """A model that makes the true clips, or something else of them."""

    source: MovingSource
    longest: int = 10**9
    length: int = 16
    asked: list[tuple[int, int]] = field(default_factory=list)

    def film(self, prompts: Sequence[str], seed: int, num_frames: int | None = None) -> Filmed:
        frames = num_frames or self.length
        self.asked.append((len(prompts), frames))
        plans = ask(self.source, len(prompts)).plans
        return Filmed(
            [self.change(self.source.draw(plan, frames).frames) for plan in plans], 8.0, [True] * len(plans), 3.0
        )

    def change(self, frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return frames

    def reaches(self, num_frames: int) -> str:
        return "" if num_frames <= self.longest else "too long"

    def reconstruct(self, clips: Sequence[Video]) -> list[np.ndarray[Any, Any]]:
        return [noisy(clip.frames, 2.0) for clip in clips]


class Backwards(Perfect):
    def change(self, frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return frames[::-1].copy()


class Fading(Perfect):
    def change(self, frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        dark = np.linspace(1.0, 0.0, len(frames))[:, None, None, None]
        return (frames * dark).astype(np.uint8)


@pytest.fixture(scope="module")
def source() -> MovingSource:
    return open_moving(["size=16"])


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recogniser of this module is kept once it is trained."""
    return tmp_path_factory.mktemp("judges")


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> Protocol:
    monkeypatch.setattr("mm.evaluate.moving_digits.PRINTED", 200)
    return Protocol(samples=14, side=16, digit_judge=RECIPE)


def test_a_perfect_model_gets_what_the_truth_gets(
    source: MovingSource, protocol: Protocol, judges: Path, tmp_path: Path
) -> None:
    subject = Perfect(source)
    figures = {f.name: f for f in evaluate_video(subject, source, protocol, tmp_path, judges)}
    assert subject.asked == [(14, 16), (14, 64)]
    for name in ("digit recognised, first frame", "digit recognised, last frame", "motion as captioned"):
        assert figures[name].value == figures[f"true clips: {name}"].value
        assert figures[f"rollout: {name}"].value == figures[f"true rollouts: {name}"].value
        assert figures[f"true clips: {name}"].control and not figures[name].control
    assert figures["motion as captioned"].value >= 0.95 <= figures["direction as captioned"].value
    assert sum(n for _, n in figures["motion as captioned"].detail.values()) == 14
    assert set(figures["motion as captioned"].detail) == {"straight", "turn", "bounce"}
    assert figures["rollout: brightness drift"].value == figures["true rollouts: brightness drift"].value
    assert 30 < figures["true clips after the tokenizer: PSNR"].value < 50
    assert figures["seconds a clip"].value == 3.0 / 14 and figures["clips valid"].value == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["video-rollout.png", "video.png"]


def test_a_model_that_goes_the_wrong_way_or_fades_is_told(
    source: MovingSource, protocol: Protocol, judges: Path
) -> None:
    wrong = {f.name: f.value for f in evaluate_video(Backwards(source, 16), source, protocol, None, judges)}
    assert wrong["direction as captioned"] <= 0.1 and wrong["true clips: direction as captioned"] >= 0.95
    assert not any(name.startswith(("rollout", "true rollouts")) for name in wrong), "it reaches 16 frames only"
    fading = {f.name: f.value for f in evaluate_video(Fading(source), source, protocol, None, judges)}
    assert (
        fading["rollout: contrast, last ÷ first frames"] < 0.1 < fading["true rollouts: contrast, last ÷ first frames"]
    )
    assert fading["rollout: brightness drift"] < -10 and fading["rollout: brightness drift, absolute"] > 10
    assert fading["rollout: digit recognised, last frame"] < 0.4


def test_figures_are_counted_by_hand() -> None:
    plans = ask(MovingSource(count=200, things=["shapes"], motions=["straight"]), 4)
    source = MovingSource(things=["shapes"], motions=["straight"], count=200)
    clips = [source.draw(plan).frames for plan in plans.plans]
    clips[1] = clips[1][::-1].copy()
    figures = {f.name: f for f in clip_figures(None, clips, 8.0, plans, "x: ")}
    assert set(figures) == {"x: direction as captioned", "x: motion as captioned"}  # no digits, no recogniser
    assert figures["x: direction as captioned"].hits == 3
    dark, light = np.full((8, 4, 4, 3), 50, np.uint8), np.full((8, 4, 4, 3), 60, np.uint8)
    light[:, 0] = 100
    shift, absolute, contrast = drift_figures([np.concatenate((light, dark)), np.concatenate((dark, light))], "")
    assert shift.value == pytest.approx(0) and absolute.value == pytest.approx(20)
    assert contrast.n == 2 and psnr(dark, dark) == 100 and psnr(dark, dark + 51) == pytest.approx(20 * np.log10(5))


# --- what is asked for ----------------------------------------------------------------------------------------------


def test_prompts_are_plain_captions_of_held_out_clips() -> None:
    source = MovingSource(count=1000, motions=["straight", "cross"], varied=True)
    asked = ask(source, 20)
    held = [source.plan(20 * number) for number in range(60)]
    assert asked.plans == [plan for plan in held if len(plan.things) == 1][:20]
    assert asked.prompts == [plan.caption for plan in asked.plans]
    plain = ask(open_moving(["motions=turn"]), 5)
    assert all(prompt.startswith("a printed ") and ", then " in prompt for prompt in plain.prompts)
    with pytest.raises(ValueError, match="things that cross"):
        ask(MovingSource(motions=["cross"]), 3)
    with pytest.raises(ValueError, match="whole source"):
        ask(MovingSource(split="train"), 3)


def test_the_command_names_a_source_by_its_settings(tmp_path: Path) -> None:
    (shard,) = make_digits(tmp_path, count=30)
    given = parse_data([f"moving:{shard}", "moving:size=48,motions=straight+turn,inks=red,varied=true"])
    source = open_source("moving", given["moving"])
    assert isinstance(source, MovingSource) and source.size == 48 and source.motions == ("straight", "turn")
    assert source.inks == ("red",) and source.varied and source.things == ("digits",) and "digit" in source.pools
    assert parse_data(["moving"]) == {"moving": []} and open_source("moving", []).varied is False
    for settings, message in (
        (["speed=3"], "no setting 'speed'"),
        (["size=large"], "size can't be 'large'"),
        (["varied=yes"], "true or false"),
        (["motions=fly"], "motions holds 'fly'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_moving(settings)
    with pytest.raises(ValueError, match="is not KIND:PATH"):
        parse_data(["digits"])


def test_a_source_that_isn_t_moving_is_refused(tmp_path: Path) -> None:
    (shard,) = make_digits(tmp_path, count=30)
    with pytest.raises(ValueError, match="give a MovingSource"):
        evaluate(object(), {"moving": open_source("digits_too", [str(shard)])}, only=["video"])
    with pytest.raises(ValueError, match="got a object to evaluate"):
        evaluate(object(), {"moving": open_moving([])}, only=["video"])
    assert replace(Protocol(), rollout=2).rollout == 2 and evaluation.FAMILY == "video"


# --- a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 3])
def test_a_random_model_is_measured_whole(
    window: int, protocol: Protocol, judges: Path, tmp_path: Path, source: MovingSource
) -> None:
    order = Blocks(frames=2, window=window, sampler={"steps": 2})
    model = tiny(order, tokenizer=VideoVAE.tiny(), head=RegressionHead())
    protocol = replace(protocol, samples=5, rollout=2)
    said: list[str] = []
    (tmp_path / "judges").symlink_to(judges)
    report = evaluate(model, {"moving": source}, protocol=protocol, folder=tmp_path, only=["video"], say=said.append)
    names = {figure.name for figure in report.figures}
    assert {figure.family for figure in report.figures} == {"video"} and len(names) == len(report.figures)
    assert report["video", "direction as captioned"].value < 1 and report["video", "clips valid"].n == 5
    assert report["video", "seconds a clip"].note == "9 frames, in batches"
    assert ("rollout: motion as captioned" in names) == bool(window)
    assert any("no rollout of 18 frames" in line for line in said) == (not window)
    subject = VideoSubject(model, sampling={"steps": 2})
    again = evaluate(subject, {"moving": source}, protocol=protocol, folder=tmp_path, only=["video"])
    same = "motion as captioned"
    assert again.facts["sampling"]["video"]["steps"] == 2 and again["video", same].n == report["video", same].n
