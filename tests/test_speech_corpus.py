"""The made speech corpus: what is said and held out follows from the text alone, shards are the same for a seed, words lie
where they are heard."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest

from mm.commands import data as command
from mm.data import speech_corpus, speech_grammar
from mm.data.sources import DIGIT_NAMES, ShardSource
from mm.data.speech_corpus import RATE, make_speech, sounding
from mm.data.speech_grammar import KINDS, command_sentence, digit_string, held_out, jsgf, plan, words

VOICES = ("kal16", "slt")


def installed() -> bool:
    try:
        speech_corpus.require_pocketsphinx()
    except ValueError:
        return False
    return shutil.which("flite") is not None


speaks = pytest.mark.skipif(not installed(), reason="needs the program flite and pocketsphinx")


# --- what is said ---------------------------------------------------------------------------------------------------


def test_plan_is_the_same_for_a_seed_and_says_nothing_twice() -> None:
    first, again, other = (list(itertools.islice(plan(seed, VOICES), 400)) for seed in (0, 0, 1))
    assert first == again != other
    assert len({(text, voice) for _, text, voice in first}) == 400
    share = sum(kind == "commands" for kind, _, _ in first) / 400
    assert 0.2 < share < 0.4
    assert {voice for _, _, voice in first} == set(VOICES)
    assert {len(text.split()) for kind, text, _ in first if kind == "digits"} == {1, 2, 3, 4, 5, 6}
    assert all(kind == "digits" for kind, _, _ in itertools.islice(plan(0, VOICES, commands=0.0), 50))


def test_a_plan_ends_where_all_is_said() -> None:
    said = list(itertools.islice(plan(0, ("slt",), commands=1.0), 2000))
    assert len(said) == 2000
    assert speech_grammar.texts(0.0) == 1_111_110 == speech_grammar.texts(0.3) - speech_grammar.texts(1.0)
    assert 3000 < speech_grammar.texts(1.0) < 10_000
    rest = plan(0, ("slt",), commands=1.0)
    with pytest.raises(ValueError, match="1 voices have said nearly all that they can say"):
        for _ in range(speech_grammar.texts(1.0) + 1):
            next(rest)


@speaks
def test_hours_that_can_not_be_filled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 voices can't fill 900 hours without saying a text twice"):
        make_speech(tmp_path / "corpus", hours=900, voices=VOICES, commands=1.0)
    assert not (tmp_path / "corpus").exists()


def test_what_goes_wrong_in_flite_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "flite"
    monkeypatch.setattr(speech_corpus, "_flite", lambda: str(program))

    def does(script: str) -> None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    does("echo 'bad voice' >&2; exit 3")
    for work in (lambda: speech_corpus.speak("one", "slt"), lambda: speech_corpus.check_voices(["slt"])):
        with pytest.raises(ValueError, match="^flite failed: bad voice$"):
            work()
    does("exit 0")
    with pytest.raises(ValueError, match="flite wrote no sound"):
        speech_corpus.speak("one", "slt")
    does('echo no sound > "$6"')
    with pytest.raises(ValueError, match="flite wrote no sound"):
        speech_corpus.speak("one", "slt")
    monkeypatch.setattr(speech_corpus, "PATIENCE", 0.1)
    does("exec sleep 30")
    with pytest.raises(ValueError, match="flite did not end within 0.1 s"):
        speech_corpus.speak("one", "slt")
    program.write_bytes(b"not a program")
    with pytest.raises(ValueError, match="flite failed"):
        speech_corpus.speak("one", "slt")


def test_held_out_is_decided_by_the_text() -> None:
    short = [" ".join(pair) for pair in itertools.product(DIGIT_NAMES, DIGIT_NAMES)] + list(DIGIT_NAMES)
    assert not any(held_out("digits", text) for text in short)
    longer = [" ".join(three) for three in itertools.product(DIGIT_NAMES, repeat=3)]
    assert 0.07 < sum(held_out("digits", text) for text in longer) / len(longer) < 0.13
    rng = random.Random(0)
    sentences = {command_sentence(rng) for _ in range(2000)}
    assert 0.03 < sum(held_out("commands", text) for text in sentences) / len(sentences) < 0.07
    # written down, since shards made before must stay divided as they are
    assert [text for text in longer[:40] if held_out("digits", text)] == [
        "zero zero one",
        "zero one two",
        "zero two eight",
    ]


def test_grammar_and_sentences_are_of_the_same_words() -> None:
    known = set(words("commands"))
    assert 150 <= len(known) <= 250
    rng = random.Random(0)
    for _ in range(300):
        assert set(command_sentence(rng).split()) <= known
        assert set(digit_string(rng).split()) <= set(DIGIT_NAMES)
    for kind in KINDS:
        text = jsgf(kind)
        assert text.startswith("#JSGF V1.0;\n")
        rules = set(re.findall(r"^(?:public )?<(\w+)> =", text, re.M))
        assert set(re.findall(r"<(\w+)>", text)) == rules  # no rule is missing, none unused
        body = re.sub(r"<\w+>|[=|()+;]|#JSGF V1.0|^grammar.*|public", " ", text, flags=re.M)
        assert set(body.split()) == set(words(kind))
    assert set(re.findall(r"\{(\w+)\}", " ".join(speech_grammar.TEMPLATES))) == set(speech_grammar.SLOTS)


# --- sound ----------------------------------------------------------------------------------------------------------


def test_silence_at_the_ends_is_cut() -> None:
    sound = np.zeros(RATE, dtype=np.int16)
    sound[4000:8000] = (8000 * np.sin(np.arange(4000) / 5)).astype(np.int16)  # 0.25 to 0.5 s
    start, stop, low, high = sounding(sound)
    assert (low, high) == pytest.approx((0.25, 0.5))
    assert (start, stop) == pytest.approx((0.15, 0.6))
    assert sounding(sound[4000:8000])[:2] == pytest.approx((0.0, 0.25))  # nothing is added
    assert sounding(np.zeros(RATE, dtype=np.int16))[:2] == (0.0, 1.0)
    assert sounding(np.zeros(0, dtype=np.int16))[:2] == (0.0, 0.0)


@speaks
def test_shards_are_what_they_say(tmp_path: Path) -> None:
    made = make_speech(tmp_path / "one", hours=0.008, voices=VOICES)
    make_speech(tmp_path / "two", hours=0.008, voices=VOICES)
    assert made.unaligned == 0 and min(made.clips.values()) >= 1
    for path in made.paths:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    seen: dict[str, set[str]] = {}
    for split, path in zip(made.clips, made.paths, strict=True):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert len(names) == 2 * made.clips[split]
            for name in names[::2]:
                assert name.endswith(".wav")
                sound, record = tar.extractfile(name), tar.extractfile(name.replace(".wav", ".json"))
                assert sound is not None and record is not None
                fields = json.loads(record.read())
                assert set(fields) == {"text", "speaker", "kind", "words", "split"}
                assert fields["split"] == split == ("heldout" if held_out(fields["kind"], fields["text"]) else "train")
                seen.setdefault(split, set()).add(fields["text"])
                with wave.open(sound) as file:
                    assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
                    seconds = file.getnframes() / RATE
                    samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
                assert seconds <= speech_corpus.LONGEST
                _, _, low, high = sounding(samples)
                assert low <= 0.12 and seconds - high <= 0.12
                check_words(fields, samples, seconds)
    assert not seen["train"] & seen["heldout"]
    assert "flite" in (tmp_path / "one" / "README.md").read_text()
    example = ShardSource([made.paths[0]])[0]
    assert example["text"] and example["speaker"] in VOICES


def check_words(fields: dict[str, object], samples: np.ndarray, seconds: float) -> None:  # type: ignore[type-arg]
    """In order, inside the clip, and each louder than silence."""
    found = fields["words"]
    assert isinstance(found, list)
    assert " ".join(word for word, _, _ in found) == fields["text"]
    before = 0.0
    for _, start, end in found:
        assert before <= start < end <= seconds
        assert np.abs(samples[round(start * RATE) : round(end * RATE)]).max() > 300
        before = end


@speaks
def test_command_makes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["speech", "--out", str(tmp_path), "--hours", "0.001", "--voices", "kal16"]) == 0
    assert "speech-heldout.tar" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "speech-heldout.tar", "speech-train.tar"]
    with pytest.raises(ValueError, match="no voice 'nobody'; it has"):
        make_speech(tmp_path, voices=["nobody"])
    with pytest.raises(ValueError, match="at least one, each once"):
        make_speech(tmp_path, voices=["kal16", "kal16"])
    with pytest.raises(ValueError, match="'kal' speaks at 8,000 Hz"):
        make_speech(tmp_path / "other", hours=0.001, voices=["kal"])


def test_missing_flite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="apt install flite"):
        make_speech(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("hours", "commands"), [(0.0, 0.3), (-1.0, 0.3), (1e9, 0.3), (1.0, 1.5), (float("nan"), 0.3)])
def test_sizes_are_checked(hours: float, commands: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hours above 0"):
        make_speech(tmp_path, hours=hours, commands=commands)
