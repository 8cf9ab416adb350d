"""Mega-TTS: a voice as a vector, prosody as a few codes, and the system that puts both before the sound."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

from mm.audio import Audio, resample
from mm.commands.train import SHIPPED, main
from mm.data.example import BrokenExample, Example
from mm.data.shards import ShardSource
from mm.data.speech_documents import MegaSpeech
from mm.evaluate import timbre
from mm.evaluate.recordings import Recordings, load_recordings
from mm.generation import Engine, Request
from mm.hub import load_pretrained
from mm.layout import NULL, Segment
from mm.speech_reader import HOP, RATE
from mm.testing import tiny, write_tar
from mm.tokenizers.speech_codec import SpeechCodec
from mm.tokenizers.speech_prosody import SAMPLES, SpeechProsody
from mm.tokenizers.speech_timbre import SpeechTimbre
from mm.training_voices import TimbreTraining, VoicesDataModule, VoiceSet, cropped

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
VOICES = {"ann": (0.0, 900.0), "ben": (1.0, 1500.0), "cid": (0.5, 2600.0)}
"""Loudness of the even harmonics, and the formant."""


def spoken(speaker: str, rises: str, rate: int = RATE, seed: int = 0) -> Audio:
    """A voice made of harmonics whose pitch rises (/), falls (\\\\) or stays (-), 0.25 s each."""
    rng = np.random.default_rng(seed)
    even, formant = VOICES[speaker]
    ramp = np.linspace(0, 0.8, rate // 4)
    octaves = np.concatenate([{"/": ramp, "\\": 0.8 - ramp, "-": np.full_like(ramp, 0.4)}[c] for c in rises])
    pitch = 150 * 2**octaves
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    x = np.zeros(len(pitch))
    for k in range(1, 24):
        height = np.exp(-(((k * pitch - formant) / 500) ** 2)) + 0.3 / k
        x += (even if k % 2 == 0 else 1.0) * height * np.sin(k * phase) * (k * pitch < 0.45 * rate)
    x = 0.2 * x * np.tile(np.hanning(rate // 4), len(rises)) + 1e-3 * rng.standard_normal(len(x))
    return Audio(x.astype(np.float32), rate)


def wav(audio: Audio) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio.samples, audio.rate, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three voices with contours that are trained with, and others."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("other", 6)):
        members = []
        for n in range(count * len(VOICES)):
            speaker = list(VOICES)[n % len(VOICES)]
            contour = "".join(rng.choice(list("/\\-"), int(rng.integers(2, 5))))
            fields = {"text": contour, "speaker": speaker, "index": n % 7, "split": name, "kind": "digits"}
            sound = spoken(speaker, contour, 8000 if n % 4 == 3 else RATE, seed=n)
            members += [(f"{name}{n:03}.wav", wav(sound)), (f"{name}{n:03}.json", json.dumps(fields).encode())]
        write_tar(folder / f"{name}.tar", members)
    return folder


def trained(kind: str, shards: Path, folder: Path, *options: str) -> Path:
    """With the shipped configuration, in seconds."""
    source = "{class_path: mm.data.shards.ShardSource, init_args: {paths: [%s], split: all}}"
    more = [f"--data.init_args.train=[{{source: {source % (shards / 'train.tar')}}}]"]
    more.append(f"--data.init_args.validation=[{{name: other, source: {source % (shards / 'other.tar')}}}]")
    more += [f"--model.init_args.save_to={folder}/tokenizer", f"--trainer.default_root_dir={folder}"]
    more += ["--trainer.callbacks=[]", "--trainer.enable_checkpointing=false", "--trainer.logger=false"]
    more += ["--data.init_args.batch_size=8", "--model.init_args.warmup=5", *options]
    assert main(["fit", "-c", f"configs/tokenizers/speech_{kind}.yaml", *more, *QUIET]) == 0
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def voices(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = "--model.init_args.tokenizer.init_args={mels: 40, width: 24, dim: 8, blocks: [1, 1]}"
    steps = ["--trainer.max_steps=60", "--trainer.val_check_interval=60", "--model.init_args.speakers=3"]
    return trained("timbre", shards, tmp_path_factory.mktemp("timbre"), small, *steps)


@pytest.fixture(scope="module")
def contours(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = "--model.init_args.tokenizer.init_args={mels: 80, low: 20, width: 24, codebook_size: 16, code_dim: 8}"
    steps = ["--trainer.max_steps=120", "--trainer.val_check_interval=120", "--model.init_args.learning_rate=4e-3"]
    return trained("prosody", shards, tmp_path_factory.mktemp("prosody"), small, *steps)


# --- timbre -----------------------------------------------------------------------------------------------------------


def nearest(tokenizer: SpeechTimbre, audio: Audio) -> str:
    means = {
        name: torch.stack([tokenizer.encode(spoken(name, c)).content[0] for c in ("/-", "\\/")]).mean(0)
        for name in VOICES
    }
    vector = tokenizer.encode(audio).content[0]
    return max(means, key=lambda name: float(torch.cosine_similarity(vector, means[name], dim=0)))


def test_timbre_tells_voices_apart_whatever_they_say(voices: Path) -> None:
    tokenizer = SpeechTimbre.from_directory(voices)
    for name in VOICES:
        assert nearest(tokenizer, spoken(name, "-/\\\\", seed=9)) == name
        assert nearest(tokenizer, resample(spoken(name, "-\\", seed=9), 8000)) == name, "also of a narrow band"
        quiet = Audio(spoken(name, "-/", seed=3).samples * 0.4, RATE)
        assert nearest(tokenizer, quiet) == name


def test_timbre_vectors() -> None:
    tokenizer = SpeechTimbre.tiny()
    vector = tokenizer.encode(spoken("ann", "/")).content
    assert vector.shape == (1, 4) and float(vector.norm()) == pytest.approx(2.0)
    long = Audio(np.tile(spoken("ann", "/-").samples, 70), RATE)
    cut = Audio(long.samples[: 30 * RATE], RATE)
    assert torch.equal(tokenizer.encode(long).content, tokenizer.encode(cut).content), "its first 30 s"
    assert tokenizer.spec.sample_rate == 0 and tokenizer.spec.max_grid == (1,) and not tokenizer.decodes


def test_a_narrow_band_is_what_a_low_rate_has() -> None:
    tokenizer = SpeechTimbre()
    noise = Audio(0.3 * np.random.default_rng(0).standard_normal(RATE), RATE)
    low = resample(resample(noise, 8000), RATE)
    full, made = (tokenizer.mel(torch.tensor(a.samples)[None]) for a in (noise, low))
    narrow = tokenizer.narrowed(full)
    assert float((narrow - made).abs().mean()) < 0.15 < float((full - made).abs().mean())
    kept = (narrow == full).all(1)[0]
    assert kept[:-1].ge(kept[1:]).all() and 40 < int(kept.sum()) < 70


# --- prosody ----------------------------------------------------------------------------------------------------------


def test_prosody_codes_tell_contours_apart(contours: Path) -> None:
    """What comes back is nearer to the contour than to that of another pitch, for a voice that takes no part in it."""
    tokenizer = SpeechProsody.from_directory(contours)
    sounds = {c: torch.tensor(spoken("cid", c * 4).samples)[None, : 7 * SAMPLES] for c in "/\\"}
    wanted = {c: tokenizer.contours(x) for c, x in sounds.items()}
    for c, other in ("/\\", "\\/"):
        back = tokenizer.reconstruct(wanted[c]).output
        distance = (back - wanted[c]).abs().mean()
        assert distance < 0.9 * wanted[c].abs().mean(), "better than nothing"
        assert distance < 0.9 * (back - wanted[other]).abs().mean()


def test_prosody_is_heard_where_pitch_is_only() -> None:
    """Loudness of the clip, and all that lies above the lowest bins, change no code."""
    tokenizer = SpeechProsody.tiny()
    audio = spoken("ben", "/-\\")
    codes = tokenizer.encode(audio).content
    louder = tokenizer.encode(Audio(2 * audio.samples, RATE)).content
    assert (codes == louder).float().mean() >= 0.8
    time = np.arange(len(audio.samples)) / RATE
    hiss = 0.2 * np.sin(2 * np.pi * 5000 * time) * np.hanning(len(time))
    assert torch.equal(tokenizer.encode(Audio(audio.samples + hiss.astype(np.float32), RATE)).content, codes)


def test_prosody_codes_stand_for_times() -> None:
    tokenizer = SpeechProsody.tiny()
    for count in (1, SAMPLES, SAMPLES + 1, 5 * SAMPLES):
        assert len(tokenizer.encode(Audio(np.ones(count), RATE))) == -(-count // SAMPLES)
    assert tokenizer.frame_rate == RATE / SAMPLES == RATE / HOP / 8
    with pytest.raises(ValueError, match=r"got 33\.0 s of sound, expected up to 32\.8 s"):
        tokenizer.encode(Audio(np.zeros(33 * RATE), RATE))
    with pytest.raises(ValueError, match="the codebook of the prosody is empty: train it first"):
        SpeechProsody(mels=40, low=10, width=8, codebook_size=12, code_dim=4).encode(spoken("ann", "/"))


@pytest.mark.parametrize("kind", [SpeechTimbre, SpeechProsody])
def test_what_is_no_sound_or_no_setting_is_refused(kind: Any, tmp_path: Path) -> None:
    tokenizer = kind.tiny()
    for bad, message in (("x", "expected a sound"), (Audio(np.zeros(0), RATE), "the sound has no sample")):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(bad)
    for settings in ({"mels": 0}, {"width": True}, {"mels": 10**9}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            kind(**settings)
    tokenizer.save(tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    value = json.loads(file.read_text())
    value["config"]["width"] = 4096
    file.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="more memory than its weights file holds"):
        kind.from_directory(tmp_path / "t")


@pytest.mark.parametrize("kind", [SpeechTimbre, SpeechProsody])
def test_other_types_of_numbers_come_back(kind: Any, tmp_path: Path) -> None:
    tokenizer = kind.tiny().to(torch.bfloat16)
    audio = spoken("ann", "/-")
    assert tokenizer.encode(audio).content.isfinite().all()
    tokenizer.save(tmp_path / "t")
    assert kind.from_directory(tmp_path / "t").spec == tokenizer.spec


# --- training ---------------------------------------------------------------------------------------------------------


def test_voices_are_drawn_evenly_and_the_same_again(shards: Path) -> None:
    train = VoiceSet(ShardSource(paths=[str(shards / "train.tar")], split="all"))
    other = VoiceSet(ShardSource(paths=[str(shards / "other.tar")], split="all"), "other")
    data = VoicesDataModule([train], [other], batch_size=30, seconds=(0.3, 0.9), batches=3)
    data.setup()
    assert data.speakers == sorted(VOICES) and len(data.clips["validation"]) == 18
    loader = data.train_dataloader()
    first = list(loader)
    assert len({batch.samples.shape[1] for batch in first}) > 1
    assert all(batch.samples.shape[1] % SAMPLES == 0 for batch in first)
    counts = torch.bincount(torch.cat([batch.speaker for batch in first]))
    assert len(counts) == 3 and counts.min() > 15
    state = {"epoch": 0, "done": 2}
    loader.load_state_dict(state)
    (last,) = list(loader)
    assert torch.equal(last.samples, first[2].samples) and loader.state_dict() == {"epoch": 1, "done": 0}
    x = torch.arange(5.0)
    again = cropped(x, 8, np.random.default_rng(0))
    assert len(again) == 8 and torch.equal(again.diff() % 5, torch.ones(7)), "over and over"
    with pytest.raises(ValueError, match="sets of different names to validate with"):
        VoicesDataModule([train], [other, other])
    with pytest.raises(ValueError, match="seconds are the shortest and the longest crop"):
        VoicesDataModule([train], [other], seconds=(2.0, 1.0))
    with pytest.raises(ValueError, match="speakers >= 2"):
        TimbreTraining(SpeechTimbre.tiny(), speakers=1)


def test_as_many_classes_as_speakers(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data have 3 speakers, but speakers is 10"):
        trained("timbre", shards, tmp_path, "--trainer.max_steps=1")


# --- documents --------------------------------------------------------------------------------------------------------


def source(shards: Path, name: str = "train", **options: Any) -> ShardSource:
    return ShardSource(paths=[str(shards / f"{name}.tar")], caption=None, **{"split": "all", **options})


def test_a_document_is_voice_text_prosody_sound(shards: Path) -> None:
    clips = source(shards)
    template = MegaSpeech(clips, drop=0.0)
    shown = set()
    for seed in range(30):
        example = clips[4]
        document = template(example, torch.Generator().manual_seed(seed))
        assert [(part.modality, part.loss) for part in document] == [
            ("timbre", False), ("text", False), ("prosody", True), ("speech", True),
        ]  # fmt: skip
        voice, text, prosody, speech = (part.content for part in document)
        assert text == example["text"]
        assert np.array_equal(prosody.samples, speech.samples) and np.array_equal(
            speech.samples, example["audio"].samples
        )
        same = [n for n in range(len(clips)) if np.array_equal(clips[n]["audio"].samples, voice.samples)]
        assert len(same) == 1 and same[0] != 4 and clips[same[0]]["speaker"] == example["speaker"]
        shown.add(same[0])
    assert len(shown) > 8, "any other clip of the speaker"
    one, two = (template(clips[4], torch.Generator().manual_seed(3)) for _ in range(2))
    assert np.array_equal(one[0].content.samples, two[0].content.samples)
    assert template.voices(clips) == set()


def test_what_is_given_is_dropped_together(shards: Path) -> None:
    clips = source(shards)
    found = [
        tuple(part.modality for part in MegaSpeech(clips, drop=0.5)(clips[1], torch.Generator().manual_seed(seed)))
        for seed in range(200)
    ]
    whole = ("timbre", "text", "prosody", "speech")
    counts = {kind: found.count(kind) for kind in (whole, (NULL, "speech"), (NULL, "prosody"))}
    assert sum(counts.values()) == 200
    assert 80 < counts[whole] < 120 and min(counts.values()) > 30
    # the voice that is shown doesn't depend on the probability
    rng = [torch.Generator().manual_seed(seed) for seed in (5, 5)]
    first, second = (MegaSpeech(clips, drop=p)(clips[1], g) for p, g in zip((0.0, 0.01), rng, strict=True))
    assert np.array_equal(first[0].content.samples, second[0].content.samples)


def test_prosody_is_of_the_clip_that_is_spoken(shards: Path) -> None:
    train = source(shards, split="train", holdout_where={"index": [5, 6]})
    held = source(shards, split="holdout", holdout_where={"index": [5, 6]})
    with pytest.raises(BrokenExample, match="is not in shard train.tar, where its prosody was to be taken from"):
        MegaSpeech(train, drop=0.0)(held[0], torch.Generator())
    lonely = Example({"key": "x", "text": "/", "speaker": "ann", "audio": spoken("ann", "/")}, text="/")
    only = MegaSpeech(One(lonely), drop=0.0)(lonely, torch.Generator())
    assert np.array_equal(only[0].content.samples, only[3].content.samples), (
        "its own voice, where there is no other clip"
    )


class One:
    """A source of one example."""

    what = "one"

    def __init__(self, example: Example) -> None:
        self.example = example

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        return self.example


# --- the system -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped configuration with small tokenizers that know nothing, after two steps."""
    folder = tmp_path_factory.mktemp("system")
    SpeechTimbre.tiny().save(folder / "timbre")
    SpeechProsody.tiny().save(folder / "prosody")
    SpeechCodec.tiny().save(folder / "codec")
    names = {
        "runs/speech_timbre/tokenizer": "timbre", "runs/speech_prosody/tokenizer": "prosody",
        "runs/speech_codec/tokenizer": "codec",
    }  # fmt: skip
    text = (SHIPPED / "systems" / "mega_tts.yaml").read_text()
    for path, name in names.items():
        text = text.replace(path, str(folder / name))
    for path, name in (("speech/speech-train", "train"), ("speech/speech-heldout", "other")):
        text = text.replace(f"runs/{path}.tar", str(shards / f"{name}.tar"))
    text = text.replace("data/fsdd-train.tar", str(shards / "train.tar"))
    file = folder / "mega_tts.yaml"
    file.write_text(text.replace("extends: [../", f"extends: [{SHIPPED}/").replace(", ../", f", {SHIPPED}/"))
    small = ["--model.init_args.backbone={width: 32, layers: 2, heads: 2}", "--data.init_args.tokens=400"]
    small += [f"--trainer.default_root_dir={folder}/run", f"--data.init_args.cache={folder}/cache"]
    small += ["--trainer.callbacks=[{class_path: mm.export.SavePretrained}]", "--trainer.enable_checkpointing=false"]
    small += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    small += ["--trainer.logger=false", "--model.init_args.warmup_steps=1"]
    assert main(["fit", "-c", str(file), *small, *QUIET]) == 0
    return folder / "run" / "model"


def test_the_system_speaks_with_given_and_with_its_own_prosody(system: Path) -> None:
    model = load_pretrained(system).eval()
    assert [(m.name, m.order.along) for m in model.modalities] == [
        ("text", False), ("timbre", False), ("prosody", True), ("speech", True),
    ]  # fmt: skip
    voice, prosody = Segment("timbre", spoken("ann", "/")), Segment("prosody", spoken("ben", "/-\\"))
    request = Request(prompt=[voice, Segment("text", "abc"), prosody], items=[("speech", (24,))], text=False)
    ((made,),) = Engine(model).generate([request])
    sound = model.modalities[3].tokenizer.decode(made.content).value
    assert made.content.codes.shape == (24, 4) and sound.seconds == pytest.approx(24 * 512 / RATE)
    request = Request(prompt=[voice, Segment("text", "abc")], items=[("prosody", (6,)), ("speech", (24,))], text=False)
    (both,) = Engine(model).generate([request])
    assert [part.modality for part in both] == ["prosody", "speech"] and both[0].content.ids.shape == (6,)
    # prosody and sound stand over the same text: code j where the sound's element 4 j is
    stream = model.build_document([voice, Segment("text", "abc"), *both], torch.Generator())
    codes, frames = (stream.position[stream.modality == number, 0] for number in (2, 3))
    assert torch.allclose(codes, frames[: 4 * len(codes) : 4], atol=1e-5)


def test_held_out_takes_are_never_trained_on() -> None:
    parts = yaml.safe_load((SHIPPED / "systems" / "mega_tts.yaml").read_text())["data"]["init_args"]["train"]
    for part in parts:
        for one in (part["source"], part["template"]["init_args"]["source"]):
            options = one["init_args"]
            if "data/fsdd-train.tar" in options["paths"]:
                assert options["split"] == "train" and options["holdout_where"] == {"index": [5, 6]}
            assert not any("heldout" in path for path in options["paths"])
    for kind in ("timbre", "prosody"):
        text = yaml.safe_load((SHIPPED / "tokenizers" / f"speech_{kind}.yaml").read_text())
        sets = [part["source"]["init_args"] for part in text["data"]["init_args"]["train"]]
        assert sets[1]["holdout_where"] == {"index": [5, 6]} and sets[1]["split"] == "train"
        assert not any("heldout" in path for one in sets for path in one["paths"])


# --- figures ----------------------------------------------------------------------------------------------------------


def recordings(shards: Path) -> Recordings:
    return load_recordings(
        ShardSource(paths=[str(shards / "train.tar"), str(shards / "other.tar")], split="all", caption=None)
    )


def test_cases_of_a_swap(shards: Path) -> None:
    clips = recordings(shards)
    found = timbre.cases(clips, 200, most=10.0)
    assert len(found) == 200
    pairs = set()
    for case in found:
        mine, own, other = (clips.speakers[n] for n in (case.clip, case.own, case.other))
        assert mine == own != other
        assert clips.texts[case.clip] not in (clips.texts[case.own], clips.texts[case.other])
        pairs.add((mine, other))
    assert len(pairs) == 6, "every voice in place of every other"
    one = clips.subset([i for i, name in enumerate(clips.speakers) if name == "ann"])
    with pytest.raises(ValueError, match="a swap needs two speakers or more"):
        timbre.cases(one, 3, most=10.0)


def test_a_swap_shows_the_other_voice(system: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine is asked for, each way; and the figures of what comes, by a judge that knows."""
    model, clips = load_pretrained(system).eval(), recordings(shards)
    asked = timbre.cases(clips, 6, most=8.0)
    requests: list[Request] = []
    generate = Engine.generate
    monkeypatch.setattr(
        Engine, "generate", lambda self, some, *a, **k: [requests.extend(some), generate(self, some, *a, **k)][1]
    )
    for way in ("own", "swapped", "written"):
        requests.clear()
        made = timbre.speak(model, clips, asked, way, batch=4)  # type: ignore[arg-type]
        assert len(made) == 6
        for case, request, sound in zip(asked, requests, made, strict=True):
            shown = clips.audios[case.own if way == "own" else case.other]
            assert request.prompt[0].content is shown and request.prompt[1].content == clips.texts[case.clip]
            if way == "written":
                assert [name for name, _ in request.items] == ["prosody", "speech"]
            else:
                assert request.prompt[2].content is clips.audios[case.clip]
                assert abs(sound.seconds - clips.audios[case.clip].seconds) < 0.033

    class Knows:
        """Hears whoever was shown where prosody was given, else the first voice."""

        def classify(self, audios: list[Audio], question: str) -> list[str]:
            assert question == "speaker"
            return [answers.pop(0) for _ in audios]

    others = [clips.speakers[case.other] for case in asked]
    mine = [clips.speakers[case.clip] for case in asked]
    answers = mine + mine + others + others + mine + mine
    monkeypatch.setattr(timbre, "recognise", lambda audios, kind: ["/ - /"] * len(audios))
    figures = timbre.swap_figures(model, clips, Knows(), count=6)  # type: ignore[arg-type]
    values = {figure.name: figure.value for figure in figures}
    assert values["voice that was shown, originals"] == values["voice that was shown, own"] == 1
    assert values["voice that was shown, swapped"] == 1 and values["voice that was shown, written"] == 0
    assert values["voice of the clip that was spoken again, swapped"] == 0
    assert values["words wrong, swapped − own"] == 0
    assert not answers


def test_tokenizers_by_themselves(voices: Path, contours: Path, shards: Path, tmp_path: Path) -> None:
    data = [str(shards / "train.tar"), str(shards / "other.tar")]
    names = [f"speech_timbre:{voices}", f"speech_prosody:{contours}"]
    assert timbre.main(["--tokenizers", *names, "--data", *data, "--out", str(tmp_path / "x.json")]) == 0
    one, two = json.loads((tmp_path / "x.json").read_text())["figures"]
    assert one["name"] == "speaker told from the timbre's vector" and one["n"] == two["n"] == 18
    assert one["value"] > 0.9 and two["value"] < one["value"]
    with pytest.raises(ValueError, match="takes a timbre and a prosody"):
        timbre.main(["--tokenizers", *names[::-1], "--data", *data])
    with pytest.raises(ValueError, match="either --model or --tokenizers"):
        timbre.main(["--data", *data])
    with pytest.raises(ValueError, match="no timbre, prosody and speech to swap; it has text, image"):
        timbre.parts_of(tiny())
