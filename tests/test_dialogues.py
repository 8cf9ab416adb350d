"""The speech tokenizer that can be interrupted, the ear, made dialogues, and the figures of the system LSLM."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from mm import hub, nested
from mm.audio import Audio
from mm.backbone import BackboneConfig
from mm.commands.train import main
from mm.data.cache import build_cache
from mm.data.dialogues import RATE, Channel, Dialogues, from_onset, levelled, spoken_words
from mm.data.example import BrokenExample, Lazy
from mm.data.shards import ShardSource
from mm.data.speech_corpus import wav_bytes
from mm.evaluate.command import main as evaluate
from mm.evaluate.listening import WITHIN, cases, ear_of, listening_figures, stops
from mm.evaluate.recordings import Recordings
from mm.heads.lm import LMHead
from mm.interfaces import Encoded, Modality, Sampling
from mm.interfaces import Fusion as Way
from mm.layout import NULL, Segment
from mm.listening import NAME, Dialogue, Ear, Listener
from mm.model import MultimodalModel
from mm.orders.delay import Delay
from mm.orders.raster import Raster
from mm.testing import Levels, tiny, write_tar
from mm.tokenizers.speech_codec import SpeechCodec
from mm.tokenizers.speech_duplex import SpeechDuplex
from mm.tokenizers.text_bytes import TextBytes

WAYS = get_args(Way)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def duplex_model(way: Way, tokenizer: SpeechDuplex | None = None) -> MultimodalModel:
    torch.manual_seed(0)
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(
            name="speech",
            tokenizer=tokenizer or SpeechDuplex.tiny(),
            head=LMHead(bias=True),
            order=Delay(),
            fusion=way,
        ),
    ]
    made = MultimodalModel(BackboneConfig(width=32, layers=2, heads=4), modalities, 256)
    for parameter in made.parameters():  # zero-initialised layers would hide mistakes
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def close(mine: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(mine, wanted, atol=3e-5, rtol=1e-4)


def test_checkpoints_keep_the_fusion(tmp_path: Path) -> None:
    of = duplex_model("late")
    hub.save_pretrained(of, tmp_path / "saved")
    again = hub.load_pretrained(tmp_path / "saved")
    assert [m.fusion for m in again.modalities] == ["middle", "late"]
    heard = Dialogue(SpeechCodec.examples()[0], Audio(np.ones(4000, dtype=np.float32), 16_000), 0.3)
    one, other = (
        m.build_document([Segment("speech", heard)], torch.Generator()) for m in (of, again)
    )  # the tokenizer is the same, too
    assert torch.equal(one.inject[NAME].values, other.inject[NAME].values) and one.inject[NAME].values.any()
    with torch.no_grad():
        close(again(other), of(one))
    with pytest.raises(ValueError, match="has fusion late, this one early"):
        hub.load_weights(duplex_model("early", of.modalities[1].tokenizer), tmp_path / "saved")  # type: ignore[arg-type]
    file = tmp_path / "saved" / "model.json"
    config = json.loads(file.read_text())
    config["modalities"][1]["fusion"] = "first"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has fusion 'first'; expected early, middle or late"):
        hub.load_pretrained(tmp_path / "saved")


def test_saved_duplexes_name_only_our_tokenizers(tmp_path: Path) -> None:
    SpeechDuplex.tiny().save(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    saved = json.loads(file.read_text())
    for path in ("os.system", "mm.tokenizers.speech_codec.torch", "mm.tokenizers.nothing.Nothing", 3, "mm.hub.Path"):
        file.write_text(json.dumps(saved | {"config": saved["config"] | {"codec": path}}))
        with pytest.raises(ValueError, match="is no tokenizer of this package"):
            SpeechDuplex.from_directory(tmp_path / "saved")
    file.write_text(json.dumps(saved | {"config": saved["config"] | {"bins": 9}}))
    with pytest.raises(ValueError, match="restore the files that were saved together"):
        SpeechDuplex.from_directory(tmp_path / "saved")
    file.write_text(
        json.dumps(saved | {"config": saved["config"] | {"codec": "mm.tokenizers.speech_duplex.SpeechDuplex"}})
    )
    with pytest.raises(ValueError, match="a duplex inside a duplex"):  # before the next one is opened
        SpeechDuplex.from_directory(tmp_path / "saved")
    file.write_text(json.dumps(saved | {"config": {}}))
    with pytest.raises(ValueError, match="does not describe a speech duplex"):
        SpeechDuplex.from_directory(tmp_path / "saved")
    with pytest.raises(ValueError, match="can't be inside another tokenizer"):
        nested.load("mm.tokenizers.text_bytes.TextBytes", tmp_path)
    with pytest.raises(ValueError, match="is no tokenizer of this package"):
        SpeechDuplex(Levels(rate=80)).save(tmp_path / "other")


# --- the tokenizer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def duplex() -> SpeechDuplex:
    torch.manual_seed(5)
    return SpeechDuplex.tiny()


def speech(seconds: float, seed: int = 0, rate: int = RATE, amplitude: float = 0.1) -> Audio:
    rng = np.random.default_rng(seed)
    return Audio(amplitude * rng.standard_normal(round(seconds * rate)).astype(np.float32), rate)


def test_an_interruption_ends_the_item(duplex: SpeechDuplex) -> None:
    said, heard = speech(1.0), speech(1.0, seed=1)
    whole = duplex.codec.encode(said)
    assert whole.codes is not None and whole.grid == (32,)
    cut = duplex.encode(Dialogue(said, heard, 0.5))  # 0.5 s are 15.6 elements
    assert cut.grid == (32,) and cut.ended and cut.codes is not None and len(cut.codes) == 17
    assert torch.equal(cut.codes[:16], whole.codes[:16]) and (cut.codes[16] == duplex.irq).all()
    assert duplex.interrupted(cut) == 16 and duplex.interrupted(whole) is None
    assert cut.alongside[NAME].shape == (17, 24)
    decoded = duplex.decode(cut)
    assert decoded.valid and len(decoded.value.samples) == 16 * 512
    # what is encoded already isn't encoded again, and says the same
    again = duplex.encode(Dialogue(whole, heard, 0.5))
    assert again.codes is not None and torch.equal(again.codes, cut.codes)
    late = duplex.encode(Dialogue(said, heard, 5.0))  # it had stopped before
    assert not late.ended and late.codes is not None and torch.equal(late.codes, whole.codes)
    first = duplex.encode(Dialogue(said, None, 0.0))
    assert len(first) == 1 and not first.alongside
    assert duplex.decode(first).valid and not duplex.decode(first).value.samples.any()
    with pytest.raises(ValueError, match="0 or more seconds"):
        duplex.encode(Dialogue(said, None, -0.1))
    with pytest.raises(ValueError, match="expected 4 sub-codes"):
        duplex.encode(Dialogue(Encoded(grid=(2,), codes=torch.zeros(2, 3, dtype=torch.long))))
    for code in (-1, duplex.irq):
        with pytest.raises(
            ValueError, match=r"what is said has sub-codes -?\d+..\d+, but those of its codec are 0..\d+"
        ):
            duplex.encode(Dialogue(Encoded(grid=(2,), codes=torch.tensor([[0] * 4, [0, code, 0, 0]]))))


def test_what_is_no_codec_is_refused() -> None:
    with pytest.raises(ValueError, match="TextBytes is no codec of sound"):
        SpeechDuplex(TextBytes())
    with pytest.raises(ValueError, match="has 3 samples an element"):
        SpeechDuplex(Levels(num_codes=3, rate=99))
    with pytest.raises(ValueError, match="SpeechDuplex has an id to stop at already"):
        SpeechDuplex(SpeechDuplex.tiny())
    with pytest.raises(ValueError, match=r"history must be a whole number in 1\.\.128, got 0"):
        SpeechDuplex(Levels(), history=0)


def test_caches_hold_sounds_but_no_dialogues(duplex: SpeechDuplex, tmp_path: Path) -> None:
    source = talks(tmp_path, ["one two"] * 2)
    cache = build_cache(source, duplex, tmp_path / "cache", "audio")
    assert torch.equal(cache[0].content, duplex.encode(source[0]["audio"]).content)

    class Talk(ShardSource):
        def _fields(self, ordinal: int) -> dict[str, Any]:
            fields = super()._fields(ordinal)
            audio = fields["audio"].load()
            return fields | {"audio": Lazy(lambda: Dialogue(audio, audio))}

    with pytest.raises(ValueError, match="can't be cached; leave the field 'audio' out"):
        build_cache(Talk(source.paths), duplex, tmp_path / "cache", "audio")


# --- the ear --------------------------------------------------------------------------------------------------------


def test_rows_depend_on_nothing_later() -> None:
    ear, sound = Ear(16_000, 512, 20, 4), speech(0.5)
    whole = ear.rows(sound, 15)
    assert whole.shape == (15, 80) and whole.min() >= 0 and 0.5 < float(whole.max()) < 3
    for element in (0, 3, 9):
        changed = sound.samples.copy()
        changed[512 * (element + 1) :] = 0.7
        other = ear.rows(Audio(changed, 16_000), 15)
        assert torch.equal(other[: element + 1], whole[: element + 1])
        assert not torch.allclose(other[element + 1], whole[element + 1])
    # the newest part of a row is that element's own, the oldest that of history − 1 elements before
    close(whole[5, :20], whole[2, 60:])
    assert not whole[1, :40].any()


def test_silence_gives_zeros() -> None:
    ear = Ear(16_000, 512, 20, 4)
    assert not ear.rows(None, 3).any() and ear.rows(None, 3).shape == (3, 80)
    assert not ear.rows(Audio(np.zeros(5000, dtype=np.float32), 8_000), 9).any()
    assert ear.rows(speech(1.0), 0).shape == (0, 80)
    short = ear.rows(speech(0.1), 20)  # silence after it
    assert short[3].any() and not short[8:].any()


def test_a_live_listener_gives_the_same_rows() -> None:
    ear, sound = Ear(16_000, 512, 20, 4), speech(1.0)
    whole, listener, fed = ear.rows(sound, 30), Listener(ear), 0
    rng = np.random.default_rng(0)
    for element in range(30):
        while listener.elements <= element:
            with pytest.raises(ValueError, match=f"element {element} is asked for"):
                listener(element)
            more = int(rng.integers(1, 900))
            listener.hear(sound.samples[fed : fed + more])
            fed += more
        close(listener(element), whole[element])
    assert len(listener.kept) <= 7 * 512, "what no row will look at any more is dropped"
    with pytest.raises(ValueError, match="were heard"):
        listener(3)


# --- dialogues ------------------------------------------------------------------------------------------------------


def corpus(folder: Path, texts: list[str], split: str = "train") -> Path:
    """Noise that says so: a quiet tenth of a second, then words of 0.4 s."""
    members = []
    for number, text in enumerate(texts):
        words = text.split()
        sound = np.concatenate([np.zeros(1600), *(speech(0.4, seed=number + n).samples for n in range(len(words)))])
        record = {
            "text": text,
            "speaker": f"s{number % 2}",
            "kind": "digits",
            "split": split,
            "words": [[w, 0.1 + 0.4 * n, 0.5 + 0.4 * n] for n, w in enumerate(words)],
        }
        members.append((f"{split}{number:03}.wav", wav_bytes((sound * 32767).astype(np.int16))))
        members.append((f"{split}{number:03}.json", json.dumps(record).encode()))
    return write_tar(folder / f"{split}.tar", members)


def talks(folder: Path, texts: list[str]) -> ShardSource:
    return ShardSource([str(corpus(folder, texts))], split="all")


def test_probabilities_of_channels() -> None:
    clips = [speech(1.0, seed=n) for n in range(3)]
    rng = np.random.default_rng(0)
    silent = Channel(clips.__getitem__, 3, interruption=0, noise=0)(2.0, rng)
    assert silent.audio is None and silent.start is None and not silent.noise
    always = Channel(clips.__getitem__, 3, interruption=1, noise=1)
    heard = [always(2.0, rng) for _ in range(60)]
    assert {h.noise for h in heard} == {"white", "pink", "babble"}
    starts = [h.start for h in heard if h.start is not None]
    assert len(starts) == 60 and 0 <= min(starts) < 0.3 and 1.3 < max(starts) <= 2.0 - 0.25 - 0.1
    assert all(h.audio is not None and len(h.audio.samples) == 2 * RATE for h in heard)
    assert always(0.3, rng).start is None, "too short to be interrupted and to stop"
    half = [Channel(clips.__getitem__, 3)(2.0, np.random.default_rng(n)) for n in range(200)]
    assert 70 < sum(h.start is not None for h in half) < 130 and 70 < sum(bool(h.noise) for h in half) < 130
    # louder than the noise, from its beginning on
    for h in heard:
        assert h.audio is not None and h.start is not None
        first = round(h.start * RATE)
        before, after = h.audio.samples[:first], h.audio.samples[first : first + 1600]
        if len(before) > 1600:
            assert np.square(after).mean() > 1.5 * np.square(before).mean()
    for bad in ({"interruption": 2.0}, {"noise": -1.0}, {"reaction": -1.0}, {"interrupts": []}):
        with pytest.raises(ValueError, match="is a probability|reaction is 0 to 10|no clip of speech"):
            Channel(clips.__getitem__, 3, **bad)  # type: ignore[arg-type]


def test_levels_and_onsets() -> None:
    sound = np.concatenate([np.zeros(1600, dtype=np.float32), speech(0.3).samples])
    assert len(from_onset(sound)) == 4800
    loud = levelled(sound, -20.0)[1600:]
    assert abs(20 * np.log10(np.sqrt(np.square(loud).mean())) + 20) < 0.5
    assert not levelled(np.zeros(100, dtype=np.float32), -20.0).any() and len(from_onset(np.zeros(200))) == 200


def test_dialogue_documents(duplex: SpeechDuplex, tmp_path: Path) -> None:
    source = talks(tmp_path, ["one two three", "stop four five six"])
    template = Dialogues(source, interruption=1.0, noise=0.0, drop=0.0, frame_rate=31.25)
    example = source[1]
    made = [template(example, torch.Generator().manual_seed(n)) for n in (0, 0, 1)]
    assert [(s.modality, s.loss) for s in made[0]] == [("text", False), ("text", False), ("speech", True)]
    assert [s.content for s in made[0][:2]] == ["s1: ", "stop four five six"]
    one, again, other = (document[-1].content for document in made)
    assert one.interrupted == again.interrupted != other.interrupted
    assert np.array_equal(one.listening.samples, again.listening.samples)
    start = round((one.interrupted - 0.25) * RATE)
    assert not one.listening.samples[:start].any() and one.listening.samples[start : start + 160].any()
    encoded = duplex.encode(one)
    assert encoded.ended and len(encoded) == int(np.ceil(one.interrupted * 31.25)) + 1
    # from a cache, sounds are of the same length
    cached = dict(example) | {"audio": duplex.encode(example["audio"])}
    from_cache = template(cached, torch.Generator().manual_seed(0))[-1].content
    assert abs(from_cache.interrupted - one.interrupted) < 0.03
    assert torch.equal(duplex.encode(from_cache).codes[:9], encoded.codes[:9])  # type: ignore[index]
    with pytest.raises(ValueError, match="audio comes encoded.*give frame_rate"):
        Dialogues(source)(cached, torch.Generator())
    copy = pickle.loads(pickle.dumps(template))  # what a worker that is started anew gets
    assert np.array_equal(
        copy(example, torch.Generator().manual_seed(0))[-1].content.listening.samples, one.listening.samples
    )
    assert template.voices(source) == {"s0", "s1"}
    dropped = Dialogues(source, drop=1.0, interruption=0, speaker_field=None)(example, torch.Generator())
    assert [s.modality for s in dropped] == [NULL, "speech"] and dropped[-1].content.interrupted is None
    waits = []
    for n in range(40):
        late = Dialogues(source, interruption=1.0, noise=0.0, drop=0.0, hesitation=0.2)(
            example, torch.Generator().manual_seed(n)
        )[-1].content
        waits.append(late.interrupted - np.flatnonzero(late.listening.samples)[0] / RATE)
    assert 0.24 < min(waits) < 0.3 and 0.4 < max(waits) <= 0.451
    with pytest.raises(ValueError, match="hesitation is 0 to 10 seconds"):
        Dialogues(source, hesitation=-1.0)
    with pytest.raises(ValueError, match="frame_rate is elements a second"):
        Dialogues(source, frame_rate=0)


def test_only_the_keyword_interrupts(tmp_path: Path) -> None:
    source = talks(tmp_path, ["one two three", "four stop"])
    assert spoken_words(source, "stop", "words") == [(1, (0.5, 0.9))]
    template = Dialogues(source, interruption=1.0, noise=0.0, keyword="stop")
    said = template(source[0], torch.Generator())[-1].content
    start = round((said.interrupted - 0.25) * RATE)
    heard = said.listening.samples[start : start + 3200]
    wanted = source[1]["audio"].samples[8000:11200]
    assert np.corrcoef(heard, wanted)[0, 1] > 0.99
    beyond = Channel(lambda n: source[n]["audio"], 2, interruption=1.0, interrupts=[(1, (7.0, 7.5))])
    with pytest.raises(BrokenExample, match="clip 1 has no sample from 7 to 7.5 s"):
        beyond(2.0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="no clip says 'honey' by its field 'words'"):
        Dialogues(source, keyword="honey")


# --- figures --------------------------------------------------------------------------------------------------------


def clips(count: int = 4) -> Recordings:
    return Recordings(
        audios=[speech(1.0 + 0.1 * n, seed=n) for n in range(count)],
        texts=["one"] * count,
        speakers=["s"] * count,
        kinds=["digits"] * count,
        held=[True] * count,
        identity="clips",
    )


@pytest.mark.parametrize("always", [True, False])
def test_figures_count_stops(duplex: SpeechDuplex, always: bool) -> None:
    of = duplex_model("late", duplex)
    head = of.head("speech")
    assert isinstance(head, LMHead) and head.bias is not None
    head.bias.data.view(4, -1)[:, duplex.irq] = 1e4 if always else -1e4
    figures = {
        f.name: f
        for f in listening_figures(of, clips(), speech="speech", sampling=Sampling(), count=6, batch=4, seed=0)
    }
    hit = figures[f"stopped within {WITHIN:g} s of an interruption"]
    assert hit.n == 6 and hit.value == 0 and hit.goal == 0.95, "at once is too early"
    assert hit.detail["never"] == (0 if always else 6) and hit.detail["before"] == (6 if always else 0)
    assert len(hit.detail["delays"]) == 6
    for room in ("noise", "silence"):
        assert figures[f"stopped without reason, {room} only"].value == float(always)
    assert ("seconds from interruption to stop" in figures) is False


def test_cases_leave_time_to_stop() -> None:
    asked = cases(clips(), "interrupted", 50, 31.25, 256, seed=0)
    for case in asked:
        assert case.heard.start is not None and case.heard.start + WITHIN < case.elements / 31.25
    assert {case.heard.noise for case in asked} == {"", "white", "pink", "babble"}
    assert all(c.heard.start is None and c.heard.noise for c in cases(clips(), "noise", 9, 31.25, 256, seed=0))
    short = replace(clips(), audios=[speech(0.4)] * 4)
    with pytest.raises(ValueError, match="no clip is longer than"):
        cases(short, "interrupted", 1, 31.25, 256, seed=0)
    with pytest.raises(ValueError, match="hears nothing while it speaks"):
        ear_of(tiny(Delay(), tokenizer=Levels()), "image")


def test_stops_are_timed(duplex: SpeechDuplex) -> None:
    """An item whose first sub-code is IRQ at element 3 stops after 3 elements."""
    of = duplex_model("early", duplex)
    head, drawn = of.head("speech"), [0]
    assert isinstance(head, LMHead) and head.bias is not None
    head.bias.data.view(4, -1)[:, duplex.irq] = -1e4
    sample = head.sample

    def wrapped(hidden: Tensor, draws: Any) -> Any:
        made = sample(hidden, draws)
        if drawn[0] == 3:
            made[1][0][0, 0] = duplex.irq
        drawn[0] += 1
        return made

    head.sample = wrapped  # type: ignore[method-assign]
    asked = cases(clips(), "silence", 2, 31.25, 256, seed=0)
    assert stops(of, asked, speech="speech", sampling=Sampling()) == [None, 3 / 31.25]


DEBUG = """
trainer: {accelerator: cpu, max_steps: 3, val_check_interval: 2, limit_val_batches: 1}
model: {init_args: {backbone: {width: 32, layers: 2, heads: 2}, warmup_steps: 1}}
data: {init_args: {tokens: 512}}
"""


@pytest.mark.parametrize("fusion", [None, "late"])
def test_the_system_trains_and_is_measured(
    fusion: Way | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is shipped, but for its size and a codec that knows nothing."""
    monkeypatch.chdir(tmp_path)
    texts = ["one two three", "four five six", "stop seven eight", "nine two one"]
    for name in ("train", "heldout"):
        (tmp_path / "runs/speech").mkdir(parents=True, exist_ok=True)
        corpus(tmp_path, texts, split=name).rename(tmp_path / f"runs/speech/speech-{name}.tar")
    SpeechCodec.tiny().save(tmp_path / "runs/speech_codec/tokenizer")
    (tmp_path / "debug.yaml").write_text(DEBUG)
    options = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    speaking = MultimodalModel(
        BackboneConfig(width=32, layers=2, heads=2, qk_norm=True),
        [
            Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
            Modality(
                name="speech",
                tokenizer=SpeechCodec.from_directory("runs/speech_codec/tokenizer"),
                head=LMHead(),
                order=Delay(along=True),
            ),
        ],
    )
    hub.save_pretrained(speaking, "runs/musicgen/model")
    options += [] if fusion is None else [f"--model.init_args.modalities.fusion={fusion}"]
    assert main(["fit", "-c", "configs/systems/lslm.yaml", "-c", "debug.yaml", *options]) == 0
    made = hub.load_pretrained("runs/lslm/model")
    assert made.modalities[1].fusion == (fusion or "middle") and made.voices == ("s0", "s1")
    data = "speech:" + ",".join(f"runs/speech/speech-{name}.tar" for name in ("train", "heldout"))
    arguments = ["--model", "runs/lslm/model", "--data", data, "--only", "listening", "--samples", "3", "--json"]
    capsys.readouterr()
    assert evaluate(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    names = {figure["name"]: figure for figure in report["figures"]}
    assert names["stopped within 0.5 s of an interruption"]["n"] == 3
    assert report["facts"]["sampling"]["sound"]["top_p"] == 0.99
