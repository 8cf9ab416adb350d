"""Speech as a prompt: CTC and its compression, the encoder, its training, and the recognisers that read it."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mm.audio import Audio, load_audio
from mm.backbone import BackboneConfig
from mm.cli import main as program
from mm.commands.train import SHIPPED, main
from mm.ctc import ALPHABET, BLANK, LABELS, LabelMeans, Spelling, compress, ctc_loss, greedy, spell, unspell
from mm.data.example import BrokenExample, Example
from mm.data.shards import ShardSource
from mm.data.speech_documents import PromptedText
from mm.heads.lm import LMHead
from mm.heads.regression import RegressionHead
from mm.hub import load_pretrained, save_pretrained
from mm.interfaces import Modality
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.raster import Raster
from mm.pipelines.speech_to_text import SpeechToTextPipeline
from mm.speech_encoder import FRAME_RATE, RATE, CTCEncoder
from mm.testing import write_tar
from mm.tokenizers.speech_codec import SpeechCodec
from mm.tokenizers.speech_ctc import SpeechCTC
from mm.tokenizers.text_bytes import TextBytes
from mm.training_ctc import (
    Augmentation,
    SpeechDataModule,
    SpeechEncoderTraining,
    SpeechSet,
    Utterance,
    recognition,
)

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
LETTERS = "abcdef"


def spoken(text: str, rate: int = RATE, seed: int = 0) -> Audio:
    """A language of tones: one for each letter, silence for a space."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(0.12 * rate)) / rate
    parts = [np.zeros(rate // 20)]
    for letter in text:
        pitch = 0.0 if letter == " " else 300 * 1.45 ** LETTERS.index(letter)
        parts += [0.4 * np.sin(2 * np.pi * pitch * time) * np.hanning(len(time)), np.zeros(int(0.03 * rate))]
    samples = np.concatenate(parts)
    return Audio(samples + 1e-3 * rng.standard_normal(len(samples)), rate)


def wav(audio: Audio) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio.samples, audio.rate, format="WAV")
    return file.getvalue()


# --- CTC --------------------------------------------------------------------------------------------------------------


def logits(path: str, sure: float = 0.99) -> torch.Tensor:
    """Frames that are labelled so; `_` is blank with that probability, `?` a blank that is likely but not sure."""
    out = []
    for name in path:
        p = {"_": sure, "?": 0.9}.get(name, 0.8)
        row = torch.full((LABELS,), (1 - p) / (LABELS - 1))
        row[BLANK if name in "_?" else ALPHABET.index(name) + 1] = p
        out.append(row.log())
    return torch.stack(out)


def test_texts_are_spelled() -> None:
    assert unspell(spell("  It's  SEVEN,\nten-fold! ")) == "it's seven ten fold"
    assert spell("a z") == [3, 1, 28] and spell(" .,") == [] and unspell([]) == ""
    assert unspell(spell("it\u2019s")) == "it's"
    for odd, text in (("7", "route 7"), ("é", "Café"), ("ß", "straße")):
        with pytest.raises(ValueError, match=f"has '{odd}', expected letters a to z"):
            spell(text)
    with pytest.raises(ValueError, match="got a int to spell"):
        spell(7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a text of 100,000 characters"):
        spell("a" * 100_000)


def test_greedy_joins_neighbours_and_drops_blanks() -> None:
    assert unspell(greedy(logits("__tth_r?eee_e__"))) == "three"
    assert greedy(logits("___")) == []


def test_the_loss_is_the_sum_over_all_paths() -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 3, LABELS)
    target = spell("ab")
    log_p = scores[0].double().log_softmax(-1)
    total = 0.0
    labels = [BLANK, *target]  # paths with any other label spell something else
    for path in itertools.product(labels, repeat=3):
        read = [label for label, _ in itertools.groupby(path) if label != BLANK]
        if read == target:
            total += float(sum(log_p[n, label] for n, label in enumerate(path)).exp())  # type: ignore[union-attr]
    loss = ctc_loss(scores, torch.tensor([3]), [target])
    assert float(loss) == pytest.approx(-np.log(total) / 2, rel=1e-5)


def test_the_loss_of_a_batch_is_that_of_its_sounds() -> None:
    torch.manual_seed(0)
    scores, lengths, targets = torch.randn(3, 9, LABELS), torch.tensor([9, 5, 7]), [spell("abba"), spell("c"), []]
    alone = [ctc_loss(scores[n : n + 1, : lengths[n]], lengths[n : n + 1], [targets[n]]) for n in range(3)]
    wanted = (4 * alone[0] + alone[1] + alone[2]) / 5  # of a text without characters the loss is not divided
    torch.testing.assert_close(ctc_loss(scores, lengths, targets), wanted)
    no_room = ctc_loss(scores[:1, :2], torch.tensor([2]), [spell("abba")])
    assert float(no_room) == 0


def test_compression_by_hand() -> None:
    frames = torch.arange(10.0)[:, None]
    made, labels = compress(frames, logits("_aab?_bb_b"))
    #                                        0123456789: a = 1, 2; b = 3; a blank that isn't sure = 4; b = 6, 7; b = 9
    assert made.flatten().tolist() == [1.5, 3, 4, 6.5, 9]
    assert unspell([label for label in labels.tolist() if label]) == "abbb" and labels[2] == BLANK
    made, labels = compress(frames[:4], logits("____"))
    assert made.tolist() == [[1.5]] and labels.tolist() == [BLANK], "silence is one vector"
    made, _ = compress(frames[:4], logits("____"), drop=1.0)
    assert len(made) == 1
    made, labels = compress(frames[:3], logits("abc"))
    assert made.flatten().tolist() == [0, 1, 2]


def test_compression_keeps_the_sum_of_what_it_keeps_and_gradients() -> None:
    torch.manual_seed(0)
    frames, scores = torch.randn(60, 4, requires_grad=True), 4 * torch.randn(60, LABELS)
    scores[:, BLANK] += 9
    made, labels = compress(frames, scores)
    kept = scores.softmax(-1)[:, BLANK] <= 0.95
    assert 1 < len(made) < int(kept.sum()) < 60
    (gradient,) = torch.autograd.grad(made.sum(), frames)
    assert ((gradient[:, 0] > 0) == kept).all()
    torch.testing.assert_close(gradient[:, 0].sum(), torch.tensor(float(len(made))))
    assert (labels[1:] != labels[:-1]).any()


# --- characters -------------------------------------------------------------------------------------------------------


def test_means_of_labels() -> None:
    means = LabelMeans(2)
    with pytest.raises(ValueError, match="has seen no sound: train it first"):
        means.prompt(Spelling("a"))
    a, b = spell("ab")
    means.fit(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([a, a, b]))
    assert means.mean[a].tolist() == [2, 0] and means.spread[a].tolist() == [1, 0]
    assert means.mean[b].tolist() == [0, 5] and means.spread[b].tolist() == [0, 0]
    torch.testing.assert_close(means.mean[BLANK], torch.tensor([4 / 3, 5 / 3]))
    assert means.seen.nonzero().flatten().tolist() == [a, b]
    assert means.prompt(Spelling("BA", noise=0.0)).tolist() == [[0, 5], [2, 0]]
    assert len(means.prompt(Spelling("..."))) == 1, "a text without characters is silence"
    with pytest.raises(ValueError, match="got 0 vectors"):
        means.fit(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))


def test_made_prompts_vary_with_their_seed_only() -> None:
    means = LabelMeans(2)
    labels = torch.arange(LABELS).repeat(2)
    means.fit(torch.stack((labels.float(), torch.randn(len(labels))), 1), labels)
    text = "abcdefgh" * 100

    def read(**settings: Any) -> list[int]:
        return means.prompt(Spelling(text, **settings))[:, 0].round().int().tolist()

    assert read() == spell(text), "noise has the spread of the label, which is 0 here"
    one, two = means.prompt(Spelling(text, seed=1)), means.prompt(Spelling(text, seed=2))
    assert torch.equal(one, means.prompt(Spelling(text, seed=1))) and not torch.equal(one, two)
    wrong = read(errors=0.2, seed=3)
    assert 800 - 120 < len(wrong) < 800 - 40, "about a tenth is dropped"
    pairs = zip(wrong[:5], spell(text)[:5], strict=True)
    assert wrong != spell(text)[: len(wrong)] and list(pairs)
    assert not set(wrong) <= set(spell(text)), "and a tenth replaced"


def test_documents_have_heard_or_made_prompts() -> None:
    def example(text: str) -> Example:
        return Example(key="0", text=text, audio="the sound")

    template = PromptedText(made=0.3, noise=0.5, errors=0.1)
    documents = [template(example("one"), torch.Generator().manual_seed(n)) for n in range(400)]
    prompts = [document[0] for document in documents]
    assert all(
        d[1] == Segment("text", "one", loss=True) and not d[0].loss and d[0].modality == "speech" for d in documents
    )
    made = [p.content for p in prompts if isinstance(p.content, Spelling)]
    assert 0.2 < len(made) / 400 < 0.4
    assert {(p.text, p.noise, p.errors) for p in made} == {("one", 0.5, 0.1)} and len({p.seed for p in made}) == len(
        made
    )
    assert {p.content for p in prompts if not isinstance(p.content, Spelling)} == {"the sound"}
    only = PromptedText(made=1.0)(Example(key="0", text="two"), torch.Generator().manual_seed(0))
    assert isinstance(only[0].content, Spelling), "texts need no sound"
    with pytest.raises(BrokenExample, match="has no field 'audio'"):
        PromptedText(made=0.0)(Example(key="0", text="two"), torch.Generator())
    with pytest.raises(ValueError, match="made is a probability between 0 and 1, got 2"):
        PromptedText(made=2)
    with pytest.raises(ValueError, match="noise is a factor of at least 0"):
        PromptedText(noise=-1)


# --- the encoder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> CTCEncoder:
    torch.manual_seed(0)
    return CTCEncoder(mels=16, width=16, layers=2, heads=2, kernel=5).eval()


def test_a_batch_gives_what_each_sound_gives_alone(encoder: CTCEncoder) -> None:
    sounds = [torch.tensor(spoken(text).samples) for text in ("abc", "f", "deadbeef")]
    features = [encoder.features(x) for x in sounds]
    frames, lengths, scores, alpha = encoder.read(features)
    assert lengths.tolist() == [-(-len(x) // 4) for x in features] and len(set(lengths.tolist())) == 3
    for n, one in enumerate(features):
        own, (length,), own_scores, own_alpha = encoder.read([one])
        torch.testing.assert_close(frames[n, :length], own[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores[n, :length], own_scores[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alpha[n, :length], own_alpha[0], rtol=1e-4, atol=1e-5)
        assert not frames[n, length:].any() and not alpha[n, length:].any()
    torch.testing.assert_close(frames[2].mean(-1), torch.zeros(len(frames[2])), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames[2].var(-1, correction=0), torch.ones(len(frames[2])), atol=1e-3, rtol=0)


def test_loudness_is_no_feature(encoder: CTCEncoder) -> None:
    x = torch.tensor(spoken("face").samples)
    torch.testing.assert_close(encoder.features(x), encoder.features(0.1 * x), rtol=1e-3, atol=1e-3)
    assert encoder.features(x).max() == 1 and encoder.features(x).min() >= -1
    assert encoder.features(torch.zeros(100)).isfinite().all() and len(encoder.features(torch.zeros(0))) >= 4


def test_gradients_reach_everything_that_is_trained() -> None:
    torch.manual_seed(0)
    tokenizer = SpeechCTC.tiny().train()
    training = SpeechEncoderTraining(tokenizer)
    training.log = training.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    batch = [Utterance((spoken(t).samples * 32767).astype(np.int16), t, "") for t in ("ab", "fade", "cab")]
    training.training_step(batch, 0).backward()
    assert not [name for name, p in training.named_parameters() if p.grad is None or not p.grad.any()]


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_every_frame_without_compression() -> None:
    torch.manual_seed(0)
    tokenizer = SpeechCTC(compress="none", mels=16, width=8, layers=1, heads=2, kernel=3).eval()
    audio = spoken("abcdef")
    assert tokenizer.encode(audio).grid[0] == pytest.approx(FRAME_RATE * audio.seconds, abs=1)
    assert tokenizer.spec.frame_rate == FRAME_RATE and tokenizer.spec.sample_rate == RATE and not tokenizer.spec.spatial
    with pytest.raises(ValueError, match=r"11.0 s of sound, which makes 276 vectors; expected up to 256: cut it"):
        tokenizer.encode(Audio(np.zeros(11 * RATE), RATE))
    with pytest.raises(ValueError, match=r"got 31.0 s of sound, expected up to 30 s: cut it into parts"):
        tokenizer.encode(Audio(np.zeros(31 * RATE), RATE))
    with pytest.raises(ValueError, match=r"expected a sound \(mm.audio.Audio\), got str"):
        tokenizer.encode("abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("compress", ["ctc", "cif", "none"])
def test_silence_and_noise_are_vectors_too(compress: Any) -> None:
    torch.manual_seed(0)
    tokenizer = SpeechCTC(compress=compress, mels=16, width=8, layers=1, heads=2, kernel=3).eval()
    loudest = 1e36 * np.sin(np.arange(4000.0))
    for samples in (np.zeros(1), np.zeros(RATE), np.full(300, 1e-9), loudest, np.full(300, -3e38)):
        encoded = tokenizer.encode(Audio(samples, RATE))
        assert len(encoded) >= 1 and encoded.content.isfinite().all()
    with pytest.raises(ValueError, match="the sound has no sample"):
        tokenizer.encode(Audio(np.zeros(0), RATE))


def test_it_only_reads() -> None:
    tokenizer = SpeechCTC.tiny()
    decoded = tokenizer.decode(tokenizer.encode(spoken("a")))
    assert not decoded.valid and "can't make any" in decoded.reason and len(decoded.value.samples) == 0


def test_mm_tokenize_reports_no_loss_of_what_is_not_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    tokenizer = SpeechCTC.tiny()
    tokenizer.save(tmp_path / "t")
    (tmp_path / "x.wav").write_bytes(wav(spoken("abc")))
    arguments = ["tokenize", str(tmp_path / "x.wav"), "--tokenizer", f"speech_ctc:{tmp_path / 't'}"]
    assert program([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"] == len(tokenizer.encode(load_audio(tmp_path / "x.wav"))) and "log_mel_l1" not in figures
    assert program([*arguments, "--out", str(tmp_path / "y.wav")]) == 2
    assert "makes prompts and can't decode them; leave out --out" in capsys.readouterr().err
    assert not (tmp_path / "y.wav").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compress": "zip"}, "compress must be one of ctc, cif, none, got 'zip'"),
        ({"width": 10, "heads": 4}, "width must be a multiple of heads, got 10 and 4"),
        ({"kernel": 4}, "kernel must be odd, .* got 4"),
        ({"vectors": 257}, r"vectors must be a whole number in 1..256, got 257"),
        ({"layers": 2.0}, "layers must be a whole number"),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeechCTC(**settings)


def test_saved_and_read_with_another_compression(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = SpeechCTC.tiny()
    tokenizer.save(tmp_path / "t")
    again, other = SpeechCTC(pretrained=str(tmp_path / "t")), SpeechCTC("none", pretrained=str(tmp_path / "t"))
    audio = spoken("abba")
    assert again.spec == tokenizer.spec and torch.equal(again.encode(audio).content, tokenizer.encode(audio).content)
    assert other.spec.fingerprint != again.spec.fingerprint and len(other.encode(audio)) > len(again.encode(audio))
    other.save(tmp_path / "u")
    assert SpeechCTC(pretrained=str(tmp_path / "u")).spec == other.spec

    def change(**settings: Any) -> Path:
        file = tmp_path / "t" / "config.json"
        value = json.loads(file.read_text())
        value["config"].update(settings)
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "config.json").write_text(json.dumps(value))
        (tmp_path / "bad" / "model.safetensors").write_bytes((tmp_path / "t" / "model.safetensors").read_bytes())
        return tmp_path / "bad"

    for settings, message in (
        ({"compress": "zip"}, "is damaged: compress must be one of"),
        ({"seconds": 3}, "its config.json says"),
        ({"width": 2048, "layers": 64}, "far more memory"),
        ({"width": 16}, "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeechCTC.from_directory(change(**settings))


# --- training ---------------------------------------------------------------------------------------------------------


def test_augmentation() -> None:
    torch.manual_seed(0)
    x = torch.tensor(spoken("abcdef").samples)
    none = Augmentation(speed=0, gain=0, noise=0, bands=0, gaps=0)
    assert torch.equal(none.sound(x), x)
    spectrum = torch.randn(50, 20)
    assert torch.equal(none.spectrum(spectrum), spectrum)
    sizes = [len(Augmentation().sound(x)) for _ in range(40)]
    assert 0.9 * len(x) < min(sizes) < 0.95 * len(x) and 1.05 * len(x) < max(sizes) < 1.12 * len(x)
    noisy = [Augmentation(speed=0, gain=0, noise=1, loudest_noise=10).sound(x) - x for _ in range(20)]
    ratios = torch.stack([20 * (x.std() / n.std()).log10() for n in noisy])
    assert 9 < ratios.min() and ratios.max() < 41 and ratios.std() > 3
    masked = [(Augmentation().spectrum(spectrum) != spectrum) for _ in range(40)]
    assert sum(m.all(0).any() for m in masked) > 20 and sum(m.all(1).any() for m in masked) > 20
    assert max(float(m.float().mean()) for m in masked) < 0.5
    short = Augmentation().spectrum(torch.randn(4, 3))
    assert short.shape == (4, 3) and short.isfinite().all()


def test_figures_of_recognition() -> None:
    made = recognition(["one two", "tree"], ["one two", "three"])
    assert made == {"cer": pytest.approx(1 / 12), "wer": pytest.approx(1 / 3), "exact": 0.5}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of tones to train with, and others."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    texts = sorted({"".join(rng.choice(list(LETTERS), int(rng.integers(1, 6)))) for _ in range(90)})
    rng.shuffle(texts)
    for name, some in (("train", texts[16:]), ("other", texts[:16])):
        members = []
        for n, text in enumerate(some):
            members.append((f"{n:03}.wav", wav(spoken(text, rate=8000 if n % 5 == 0 else RATE, seed=n))))
            members.append((f"{n:03}.json", json.dumps({"text": text, "index": n % 4}).encode()))
        write_tar(folder / f"{name}.tar", members)
    return folder


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that knows this language, trained for seconds with the shipped configuration."""
    folder = tmp_path_factory.mktemp("trained")
    source = "{class_path: mm.data.shards.ShardSource, init_args: {paths: [%s], split: all}}"
    sizes = {"mels": 24, "width": 48, "layers": 2, "heads": 2, "kernel": 7}
    options = [f"--model.init_args.tokenizer.init_args.{name}={value}" for name, value in sizes.items()]
    options.append(f"--data.init_args.train=[{{source: {source % (shards / 'train.tar')}}}]")
    options.append(f"--data.init_args.validation=[{{name: other, source: {source % (shards / 'other.tar')}}}]")
    options += [f"--model.init_args.save_to={folder}/tokenizer", f"--trainer.default_root_dir={folder}"]
    options += ["--trainer.max_steps=220", "--trainer.val_check_interval=110", "--data.init_args.batch_size=16"]
    options += ["--trainer.callbacks=[]", "--trainer.enable_checkpointing=false", "--trainer.logger=false"]
    options += ["--model.init_args.learning_rate=4e-3", "--model.init_args.warmup=20"]
    assert main(["fit", "-c", "configs/tokenizers/speech_ctc.yaml", *options, *QUIET]) == 0
    return folder / "tokenizer"


NEW = ["fade", "bead", "aabb", "cab fee"]


def test_it_learns_to_read_the_language(trained: Path) -> None:
    tokenizer = SpeechCTC.from_directory(trained)
    assert recognition([tokenizer.transcribe(spoken(t, seed=9)) for t in NEW[:3]], NEW[:3])["cer"] < 0.2
    slow = spoken("face", rate=8000)
    assert recognition([tokenizer.transcribe(slow)], ["face"])["cer"] <= 0.25, "sounds of other rates are resampled"


def test_compression_makes_about_a_vector_a_character(trained: Path) -> None:
    audio = [spoken(text, seed=9) for text in NEW[:3]]
    for kind in ("ctc", "cif"):
        tokenizer = SpeechCTC(kind, pretrained=str(trained))  # type: ignore[arg-type]
        counts = [len(tokenizer.encode(one)) for one in audio]
        assert all(2 <= count <= 9 for count in counts), (kind, counts)
    assert len(SpeechCTC("none", pretrained=str(trained)).encode(audio[0])) > 12


def test_made_prompts_are_near_heard_ones(trained: Path) -> None:
    """Nearer than those of another text."""
    tokenizer = SpeechCTC.from_directory(trained)
    letters = [spell(letter)[0] for letter in LETTERS]
    assert tokenizer.means.seen[letters].all()
    heard = tokenizer.encode(spoken("abcdef", seed=5)).content
    made = tokenizer.encode(Spelling("abcdef", noise=0.0)).content
    own = torch.cdist(made, heard).min(1).values
    for n in range(6):
        others = torch.cdist(made[n : n + 1], made[[m for m in range(6) if m != n]])
        assert own[n] < others.min(), LETTERS[n]


def test_data_that_are_left_out_are_counted(shards: Path, tmp_path: Path) -> None:
    members = [("a.wav", wav(spoken("ab"))), ("a.json", b'{"text": "ab"}')]
    members += [("b.wav", wav(spoken("ab"))), ("b.json", b'{"text": "route 66"}')]
    members += [("c.wav", b"RIFFnothing"), ("c.json", b'{"text": "ab"}')]
    members += [("d.wav", wav(Audio(np.zeros(5 * RATE), RATE))), ("d.json", b'{"text": "ab"}')]
    source = ShardSource(paths=[str(write_tar(tmp_path / "x.tar", members))], split="all")
    data = SpeechDataModule([SpeechSet(source)], [SpeechSet(source, "x")], longest=4)
    with pytest.warns(UserWarning, match="skipped [23] of 4 examples as broken"):
        data.setup()
    assert [len(data.utterances[which]) for which in ("train", "validation")] == [1, 2]
    assert [one.text for one in next(iter(data.train_dataloader()))] == ["ab"]
    strict = ShardSource(paths=[str(tmp_path / "x.tar")], split="all", strict=True)
    with pytest.raises(ValueError, match="has '6', expected letters"):
        SpeechDataModule([SpeechSet(strict)], [SpeechSet(strict, "x")]).setup()
    with pytest.raises(ValueError, match="sets of different names to validate with"):
        SpeechDataModule([SpeechSet(source)], [SpeechSet(source), SpeechSet(source)])


# --- recognisers ------------------------------------------------------------------------------------------------------


def fit(system: str, shards: Path, folder: Path, *changes: str) -> None:
    names = {
        "runs/speech/speech-train.tar": "train",
        "data/fsdd-train.tar": "train",
        "runs/speech/speech-heldout.tar": "other",
    }
    text = (SHIPPED / "systems" / f"{system}.yaml").read_text().replace("[5, 6]", "[3]")
    for path, name in names.items():
        text = text.replace(path, str(shards / f"{name}.tar"))
    file = folder / f"{system}.yaml"
    file.write_text(text.replace("extends: [../", f"extends: [{SHIPPED}/").replace(", ../", f", {SHIPPED}/"))
    small = ["--model.init_args.backbone={width: 64, layers: 2, heads: 2}", "--data.init_args.tokens=512"]
    small += [f"--trainer.default_root_dir={folder}/run", f"--data.init_args.cache={folder}/cache"]
    small += ["--trainer.callbacks=[]", "--trainer.enable_checkpointing=false", "--trainer.logger=false"]
    assert main(["fit", "-c", str(file), *small, *changes, *QUIET]) == 0


@pytest.mark.slow
def test_a_recogniser_reads_compressed_speech(trained: Path, shards: Path, tmp_path: Path) -> None:
    """The shipped system on this language: trained, saved, and asked."""
    save = "--trainer.callbacks=[{class_path: mm.export.SavePretrained}]"
    tokenizer = f"--model.init_args.modalities.tokenizer.init_args.pretrained={trained}"
    steps = ["--trainer.max_steps=120", "--trainer.val_check_interval=120", "--model.init_args.warmup_steps=10"]
    fit("asr_ctc_prompt", shards, tmp_path, tokenizer, *steps, save)
    model = load_pretrained(tmp_path / "run" / "model")
    assert model.modalities[1].tokenizer.spec.fingerprint == SpeechCTC.from_directory(trained).spec.fingerprint
    texts = SpeechToTextPipeline(model)([spoken(text, seed=9) for text in NEW[:3]], max_tokens=12).texts
    assert recognition(texts, NEW[:3])["cer"] < 0.5, texts


def test_a_recogniser_reads_codes(shards: Path, tmp_path: Path) -> None:
    """The shipped system takes a step with a small codec that knows nothing yet."""
    SpeechCodec.tiny().save(tmp_path / "codec")
    tokenizer = f"--model.init_args.modalities.tokenizer.init_args.pretrained={tmp_path}/codec"
    fit("asr", shards, tmp_path, tokenizer, "--trainer.fast_dev_run=true")


def test_the_encoder_is_saved_with_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = SpeechCTC.tiny()
    text = Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster())
    speech = Modality(name="speech", tokenizer=tokenizer, head=RegressionHead(), order=Raster(prefix=True))
    model = MultimodalModel(BackboneConfig(width=32, layers=1, heads=2), [text, speech], context=64).eval()
    save_pretrained(model, tmp_path / "model")
    again = load_pretrained(tmp_path / "model")
    audio = spoken("ab")
    assert torch.equal(again.modalities[1].tokenizer.encode(audio).content, tokenizer.encode(audio).content)
