"""Figures of speech: word errors by hand, distances that are nought for equal sounds, judges that tell tones apart and are
kept, tokenizers and models that know or don't know the answers."""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm.audio import Audio
from mm.data.example import Source
from mm.data.sources import DIGIT_NAMES
from mm.data.speech_corpus import require_pocketsphinx
from mm.evaluate import speech_judges
from mm.evaluate.protocol import Protocol
from mm.evaluate.recordings import Recordings, load_recordings
from mm.evaluate.results import Figure
from mm.evaluate.run import evaluate
from mm.evaluate.speech import edit_distance, mel_distance, recognise, si_sdr, stoi, word_error
from mm.evaluate.speech_figures import (
    Spoken,
    hearing_figures,
    prepare,
    rate_figures,
    speaking_figures,
    tokenizer_figures,
)
from mm.evaluate.speech_judges import SoundChange, SoundJudge, SoundRecipe, digit_judge, train_judge, vary, windows
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec

SMALL = SoundRecipe(epochs=12, batch=16, widths=(4, 8, 8), features=16, dropout=0.0)
SPEAKERS = ("high", "low")


def recogniser_is_here() -> bool:
    try:
        require_pocketsphinx()
    except ValueError:
        return False
    return True


hears = pytest.mark.skipif(not recogniser_is_here(), reason="needs pocketsphinx")


def tone(digit: int, speaker: str, take: int) -> Audio:
    """A digit is a pitch, a speaker an octave; takes differ by noise."""
    rng = np.random.default_rng([digit, SPEAKERS.index(speaker), take])
    pitch = 300 * 2 ** (digit / 10) * (4 if speaker == "high" else 1)
    samples = 0.3 * np.sin(2 * math.pi * pitch * np.arange(4800) / 8000) + 0.005 * rng.standard_normal(4800)
    return Audio(samples.astype("float32"), 8000)


@pytest.fixture(scope="module")
def clips() -> Recordings:
    """Takes 4 to 7 of each digit by two speakers; 5 and 6 are held out."""
    rows = [(digit, speaker, take) for digit in range(10) for speaker in SPEAKERS for take in (4, 5, 6, 7)]
    return Recordings(
        audios=[tone(*row) for row in rows],
        texts=[DIGIT_NAMES[digit] for digit, _, _ in rows],
        speakers=[speaker for _, speaker, _ in rows],
        kinds=["digits"] * len(rows),
        held=[take in (5, 6) for _, _, take in rows],
        identity="tones",
    )


# --- measures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [("", "", 0), ("a b", "", 2), ("", "a", 1), ("a b c", "a x c", 1), ("a b c", "b c", 1), ("a b", "b a", 2),
     ("one two three", "one one two four three", 2)],
)  # fmt: skip
def test_edit_distance(one: str, other: str, edits: int) -> None:
    assert edit_distance(one.split(), other.split()) == edits == edit_distance(other.split(), one.split())


def test_word_error_is_over_the_whole_set() -> None:
    found = word_error(["one two three four", "five", "six"], ["one three four", "five", "nine nine"])
    assert (found.edits, found.words) == (1 + 0 + 2, 6)  # not the mean of 1/4, 0 and 2
    assert found.rate == 0.5
    assert found.exact == [False, True, False]
    assert 0.1 < found.standard_error < 1
    assert word_error(["One  Two"], ["one two"]).rate == 0
    same = word_error(["one two"] * 9, ["one"] * 9)
    assert (same.rate, same.standard_error) == (0.5, 0.0)
    # n texts of one word, each wrong with p: √(p(1 − p)/n)
    mixed = word_error(["a"] * 100, ["a", "b"] * 50)
    assert mixed.standard_error == pytest.approx(0.05, rel=0.15)
    with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
        word_error(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no words"):
        word_error([""], ["a"])


def test_distances_of_equal_and_of_noisy_sound() -> None:
    pytest.importorskip("pystoi", reason="needs pystoi")
    rng = np.random.default_rng(0)
    envelope = np.repeat(rng.random(40), 800)
    one = Audio((envelope * rng.standard_normal(32000)).astype("float32"), 16000)
    noisy = Audio(one.samples + 0.5 * rng.standard_normal(32000).astype("float32"), 16000)
    longer = Audio(np.pad(one.samples, (0, 300)), 16000)  # as decoders give it
    assert stoi(one, one) == pytest.approx(1, abs=1e-3) == stoi(one, longer)
    assert mel_distance(one, one) == 0 == mel_distance(one, longer)
    clear, worse = stoi(one, noisy), mel_distance(one, noisy)
    assert clear is not None and clear < 0.95 and worse > 0.1
    assert stoi(Audio(one.samples[:1600], 16000), one) is None
    exact = si_sdr(one, Audio(one.samples / 3, 16000))
    assert exact is not None and exact > 60
    power = float((one.samples.astype(float) ** 2).mean())
    assert si_sdr(one, noisy) == pytest.approx(10 * math.log10(power / 0.25), abs=0.3)
    for flat in (np.zeros(100), np.full(100, 0.3), np.ones(1), np.zeros(0)):
        assert si_sdr(Audio(flat, 16000), one) is None


@pytest.mark.parametrize("seconds", [1 / 16000, 0.001, 0.01, 0.025, 0.1, 0.39])
def test_short_sounds_have_no_intelligibility(seconds: float) -> None:
    pytest.importorskip("pystoi", reason="needs pystoi")
    short = Audio(np.sin(np.arange(max(1, round(seconds * 16000)))) + 0.5, 16000)
    assert stoi(short, short) is None
    click = np.zeros(16000)
    click[8000] = 1
    assert stoi(Audio(click, 16000), Audio(click, 16000)) is None  # what pystoi leaves of it is one frame


def test_figures_that_are_asked_for_by_name(clips: Recordings) -> None:
    from mm.evaluate.speech_subject import evaluate_speech
    from mm.tokenizers.text_bytes import TextBytes

    with pytest.raises(ValueError, match="there are no figures 'speking' of speech; tokenizer, speaking"):
        evaluate_speech(TextBytes(), {}, protocol=Protocol(), only=["speking"])
    with pytest.raises(ValueError, match="TextBytes is no tokenizer of sound"):
        evaluate_speech(TextBytes(), {}, protocol=Protocol(), only=["listening"])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("pystoi", "pocketsphinx"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ValueError, match=r"pystoi, which is missing; pip install 'mm\[speech\]'"):
        stoi(tone(0, "low", 0), tone(0, "low", 0))
    with pytest.raises(ValueError, match=r"pocketsphinx, which is missing; pip install 'mm\[speech\]'"):
        require_pocketsphinx()


@hears
def test_recogniser_of_grammars() -> None:
    silence = Audio(np.zeros(8000), 16000)
    assert recognise(silence) == [""] == recognise([Audio(np.zeros(0), 8000)], "commands")
    assert recognise([]) == []
    grammar = "#JSGF V1.0;\ngrammar one;\npublic <one> = yes;\n"
    assert set(recognise([tone(3, "low", 0)], grammar)) <= {"yes", ""}
    with pytest.raises(ValueError, match="neither one of digits, commands nor"):
        recognise(silence, "letters")
    with pytest.raises(ValueError, match="can't read this grammar"):
        recognise(silence, "#JSGF V1.0;\ngrammar broken;\npublic <broken> = (")


@hears
def test_recogniser_hears_clear_speech() -> None:
    import shutil

    from mm.data.speech_corpus import make_clip

    if shutil.which("flite") is None:
        pytest.skip("needs the program flite")
    for kind, text in (("digits", "three five one"), ("commands", "turn the kitchen light on")):
        clip = make_clip(kind, text, "slt")  # type: ignore[arg-type]
        sound = Audio(clip.samples.astype("float32") / 32768, 16000)
        assert recognise(sound, kind) == [text] == recognise(Audio(sound.samples * 0.02, 16000), kind)


# --- judges ---------------------------------------------------------------------------------------------------------


def test_windows_hold_the_sounding_part_at_one_level() -> None:
    sound = np.zeros(16000, dtype="float32")
    sound[6000:9000] = 0.01 * np.sin(np.arange(3000) / 3)
    (one,) = windows(Audio(sound, 8000))
    loud = one.abs() > 0.01
    assert one.shape == (8000,)
    assert 2400 <= int(torch.nonzero(loud).min()) and int(torch.nonzero(loud).max()) <= 5600
    assert float(one.square().sum() / 3000) == pytest.approx(0.01, rel=0.1)
    louder = windows(Audio(50 * sound, 8000))
    assert torch.allclose(louder[0], one, atol=1e-4)
    assert windows(Audio(np.ones(20000), 8000)).shape == (3, 8000)  # 2.5 s
    assert windows(Audio(np.ones(40000), 16000)).shape == (3, 8000)
    for nothing in (np.zeros(0), np.zeros(100)):
        assert not windows(Audio(nothing, 16000)).any()


def test_sounds_are_varied_by_seed() -> None:
    x = torch.stack([torch.sin(torch.arange(8000) / 4), torch.zeros(8000)])
    still = vary(x, SoundChange(speed=0, shift=0, gain=0, noise=0), torch.Generator().manual_seed(0))
    assert torch.allclose(still[:, :-1], x[:, :-1], atol=1e-5)
    one, again = (vary(x, SoundChange(), torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, again) and not torch.allclose(one, x, atol=0.1)
    moved = vary(x, SoundChange(speed=0, gain=0, noise=0), torch.Generator().manual_seed(2))
    assert 0 < int((moved[0] == 0).sum()) <= 900  # silence moves in from one side


def test_judges_are_trained_without_held_out_clips_and_kept(clips: Recordings, tmp_path: Path) -> None:
    said: list[str] = []
    questions = {"digit": clips.texts, "speaker": clips.speakers}
    judge = train_judge("tones", clips, questions, SMALL, folder=tmp_path, say=said.append)
    held = clips.subset(clips.where(held=True))
    hits = [a == b for a, b in zip(judge.classify(held.audios, "speaker"), held.speakers, strict=True)]
    assert sum(hits) >= 0.9 * len(hits)
    assert sum("training on 40 windows" in line for line in said) == 1
    again = train_judge("tones", clips, questions, SMALL, folder=tmp_path, say=said.append)
    assert "read from" in said[-1] and len(list(tmp_path.iterdir())) == 1
    for name, value in judge.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    # other answers are another judge; a damaged file is trained anew
    other = {"digit": clips.texts[::-1], "speaker": clips.speakers}
    train_judge("tones", clips, other, SMALL, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    train_judge("tones", clips, questions, SMALL, folder=tmp_path, say=said.append)
    assert any("trained again" in line for line in said)
    # held-out clips don't reach it: with other ones the weights are the same
    changed = Recordings(
        [Audio(np.ones(10), 8000) if out else a for a, out in zip(clips.audios, clips.held, strict=True)],
        clips.texts, clips.speakers, clips.kinds, clips.held, "changed",
    )  # fmt: skip
    blind = train_judge("tones", changed, questions, SMALL)
    for name, value in judge.state_dict().items():
        assert torch.equal(value, blind.state_dict()[name])


def test_judges_refuse_what_they_cannot_tell(clips: Recordings) -> None:
    with pytest.raises(ValueError, match="1 classes of 'speaker'"):
        train_judge("tones", clips, {"speaker": ["one"] * len(clips)}, SMALL)
    words = Recordings(clips.audios, ["one two"] * len(clips), clips.speakers, clips.kinds, clips.held, "")
    with pytest.raises(ValueError, match="single digits"):
        digit_judge(words)


# --- figures --------------------------------------------------------------------------------------------------------


class Samples(ModalityTokenizer):
    """Sixteen samples an element, kept as they are; or made silent."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent

    @property
    def spec(self) -> Spec:
        return Spec(kind="continuous", dim=16, max_grid=(4000,), sample_rate=8000, frame_rate=500.0)

    def encode(self, raw: Audio) -> Encoded:
        samples = torch.from_numpy(np.pad(raw.samples, (0, -len(raw.samples) % 16)))
        return Encoded(grid=(len(samples) // 16,), latents=samples.reshape(-1, 16) * (not self.silent))

    def decode(self, encoded: Encoded) -> Decoded:
        return Decoded(value=Audio(encoded.content.reshape(-1).numpy(), 8000))


class Parrot:
    """Plays and names the clips it was given; wrong ones, if it errs."""

    def __init__(self, clips: Recordings, errs: bool) -> None:
        self.clips, self.errs = clips, errs

    def speak(self, texts: Sequence[str], voices: Sequence[str], seed: int) -> list[Audio]:
        pairs = list(zip(self.clips.texts, self.clips.speakers, strict=True))
        rows = [pairs.index(pair) for pair in zip(texts, voices, strict=True)]
        return [self.clips.audios[(row + 4 * self.errs) % len(pairs)] for row in rows]

    def transcribe(self, audios: Sequence[Audio]) -> list[str]:
        known = {audio.samples.tobytes(): text for audio, text in zip(self.clips.audios, self.clips.texts, strict=True)}
        return ["nothing" if self.errs else known[audio.samples.tobytes()] for audio in audios]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the judges of the tones are kept: they are trained once."""
    return tmp_path_factory.mktemp("judges")


@pytest.fixture
def small_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIGITS", "VOICES"):
        monkeypatch.setattr(
            speech_judges, name, SoundRecipe(epochs=40, batch=20, widths=(8, 16, 16), change=SoundChange(speed=0))
        )


def by_name(figures: Sequence[Figure]) -> dict[str, Figure]:
    assert len({figure.name for figure in figures}) == len(figures)
    return {figure.name: figure for figure in figures}


def test_figures_of_a_tokenizer(clips: Recordings, small_judges: None, judges: Path) -> None:
    pytest.importorskip("pystoi", reason="needs pystoi")
    spoken = prepare(None, clips, judges)
    kept, lost = (by_name(tokenizer_figures(Samples(silent), spoken)) for silent in (False, True))
    assert set(kept) >= {"values a second", "mel distance, real digits", "digit recognised, real, decoded"}
    assert kept["values a second"].value == 8000
    assert kept["mel distance, real digits"].value == 0
    for question in ("digit", "speaker"):
        original, decoded = (kept[f"{question} recognised, real, {what}"] for what in ("originals", "decoded"))
        assert original.control and not decoded.control
        assert original.value == decoded.value >= 0.9
        assert decoded.n == 40
    assert lost["digit recognised, real, decoded"].value <= 0.2
    assert lost["mel distance, real digits"].value > 1


def test_bit_rate() -> None:
    spec = Spec(kind="codes", vocab_size=256, num_codes=4, max_grid=(256,), sample_rate=16000, frame_rate=31.25)
    (figure,) = rate_figures(spec)
    assert (figure.name, figure.value, figure.unit) == ("bit rate", 1000.0, "bit/s")


@pytest.mark.parametrize("errs", [False, True])
def test_figures_of_a_model(clips: Recordings, small_judges: None, judges: Path, errs: bool) -> None:
    spoken = prepare(None, clips, judges)
    parrot = Parrot(clips, errs)
    said = by_name(speaking_figures(parrot, spoken, samples=40))
    digit, speaker = (said[f"{question} recognised, real, generated"] for question in ("digit", "speaker"))
    assert digit.n == speaker.n == 40 and set(digit.detail) == set(DIGIT_NAMES)
    assert said["digit recognised, real, originals"].value >= 0.9
    assert said["duration, real, generated ÷ original"].value == 1
    heard = by_name(hearing_figures(parrot, spoken))["word errors, real digits"]
    assert heard.n == 40 and heard.detail["words"] == 40
    if errs:  # the other speaker's
        assert speaker.value <= 0.2 and heard.value == 1
    else:
        assert digit.value >= 0.9 and speaker.value >= 0.9 and heard.value == 0


@hears
def test_figures_of_clear_speech_are_by_kind_and_voice(clips: Recordings) -> None:
    said = by_name(speaking_figures(Parrot(clips, False), Spoken(clear=clips), samples=40))
    assert "word errors, digits, generated, low" in said and "word errors, digits, generated, high" in said
    assert said["word errors, digits, generated"].value == said["word errors, digits, originals"].value
    assert said["word errors, digits, generated"].detail["words"] == 40
    with pytest.raises(ValueError, match="'kind' that is one of digits, commands"):
        prepare(Recordings(clips.audios, clips.texts, clips.speakers, [""] * len(clips), clips.held, ""), None)


# --- sources --------------------------------------------------------------------------------------------------------


class Clips(Source):
    """Examples as given."""

    def __init__(self, examples: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(**options)
        self.examples = examples
        self._finish([f"{n:02d}" for n in range(len(examples))], "clips")

    @property
    def identity(self) -> str:
        return "clips"

    def _fields(self, ordinal: int) -> dict[str, Any]:
        return dict(self.examples[ordinal])


def test_recordings_know_what_is_held_out() -> None:
    sound = tone(0, "low", 0)
    taken = Clips([{"audio": sound, "text": " One  TWO", "index": index} for index in (4, 5, 6, 7)])
    found = load_recordings(taken)
    assert found.held == [False, True, True, False] and found.texts[0] == "one two" and found.speakers == [""] * 4
    made = Clips([{"audio": sound, "text": "a", "split": split, "kind": "digits"} for split in ("train", "heldout")])
    assert load_recordings(made).held == [False, True]
    keyed = Clips([{"audio": sound, "text": "a"} for _ in range(6)])
    assert load_recordings(keyed, 3).held == [True, False, False, True, False, False]
    with pytest.warns(UserWarning, match="skipped 1 of 2"):
        assert len(load_recordings(Clips([{"audio": sound, "text": "a"}, {"text": "no sound"}]))) == 1
    with pytest.raises(ValueError, match="no clips with sound and text"):
        load_recordings(Clips([{"text": "a"}]))
    with pytest.raises(ValueError, match="whole source"):
        load_recordings(Clips([{"audio": sound, "text": "a"}] * 4, split="train"))
    assert [len(found.spread(count)) for count in (1, 2, 3, 9)] == [1, 2, 3, 4]


def test_evaluate_measures_a_tokenizer_by_itself(clips: Recordings, small_judges: None, tmp_path: Path) -> None:
    pytest.importorskip("pystoi", reason="needs pystoi")
    rows = zip(clips.audios, clips.texts, clips.speakers, clips.held, strict=True)
    source = Clips([{"audio": a, "text": t, "speaker": s, "index": 5 if h else 0} for a, t, s, h in rows])
    report = evaluate(Samples(), {"spoken": source}, protocol=Protocol(), folder=tmp_path, name="samples")
    assert report.model == "samples" and report.facts["parameters"] == 0
    assert report["speech tokenizer", "mel distance, real digits"].value == 0
    assert len(list((tmp_path / "judges").iterdir())) == 1
    assert {figure.family for figure in report.figures} == {"speech tokenizer"}
    report.table()
    from mm.testing import tiny

    with pytest.raises(ValueError, match="no modality of sound"):
        evaluate(tiny(side=8), {"spoken": source})


def test_an_error_reaches_its_goal_from_above(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from mm.evaluate.results import Report

    figures = [
        Figure(family="speaking", name=f"word errors {value}", value=value, unit="error", n=9, goal=0.1)
        for value in (0.05, 0.2)
    ]
    Console(width=150).print(Report(model="m", fingerprint="", facts={}, figures=figures, seconds=0).table())
    lines = [line for line in capsys.readouterr().out.splitlines() if "word errors" in line]
    assert "5.0 %" in lines[0] and "≤ 10.0 % ✓" in lines[0]
    assert "≤ 10.0 % ✗" in lines[1]


def test_judge_classes_are_named(clips: Recordings) -> None:
    judge = SoundJudge(SMALL, {"speaker": SPEAKERS})
    assert set(judge.classify([tone(0, "low", 0), Audio(np.zeros(0), 16000)], "speaker")) <= set(SPEAKERS)
