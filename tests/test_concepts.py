"""Large Concept Models: sentences as vectors, their autoencoder, the next vector, and what is measured of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mm.backbone import BackboneConfig
from mm.commands.train import SHIPPED, main
from mm.concepts import Subwords, join_sentences, split_sentences
from mm.data.documents import Siblings
from mm.data.shards import ShardSource
from mm.evaluate import concepts as judge
from mm.generation import Engine, Request
from mm.heads.diffusion import DiffusionHead
from mm.heads.lm import LMHead
from mm.heads.regression import RegressionHead
from mm.hub import load_pretrained, save_pretrained
from mm.interfaces import Encoded, Head, Modality
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.raster import Raster
from mm.stream import Placed, TokenStream, pack
from mm.testing import write_tar
from mm.tokenizers.text_bytes import TextBytes
from mm.tokenizers.text_concepts import TextConcepts

COLOURS, THINGS = ("red", "green", "blue", "white", "black"), ("apple", "pear", "plum", "fig")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of colours, in groups of things."""
    rows = [{"caption": f"{c} {t}", "subcategory": t, "category": "fruit"} for t in THINGS for c in COLOURS]
    members = [(f"{n:02}.json", json.dumps(row).encode()) for n, row in enumerate(rows)]
    return write_tar(tmp_path_factory.mktemp("shard") / "fruit.tar", members)


@pytest.fixture(scope="module")
def trained(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of these captions, trained for seconds with the shipped configuration."""
    folder = tmp_path_factory.mktemp("trained")
    sizes = {"dim": 8, "width": 32, "layers": 1, "heads": 2, "vocab_size": 280, "max_bytes": 24, "sentences": 6}
    options = [f"--model.init_args.tokenizer.init_args.{name}={value}" for name, value in sizes.items()]
    for name in ("train", "validation"):
        options.append(f"--data.init_args.{name}.init_args.paths=[{shard}]")
        options.append(f"--data.init_args.{name}.init_args.holdout_every=10")
    options += [f"--model.init_args.save_to={folder}/tokenizer", f"--trainer.default_root_dir={folder}"]
    options += ["--trainer.max_steps=300", "--trainer.val_check_interval=150", "--data.init_args.batch_size=12"]
    options += ["--trainer.callbacks=[]", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    options += ["--model.init_args.learning_rate=1e-2", "--model.init_args.noise=0.2"]
    assert main(["fit", "-c", "configs/tokenizers/concepts.yaml", *options, *QUIET]) == 0
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> TextConcepts:
    return TextConcepts.from_directory(trained)


# --- text -------------------------------------------------------------------------------------------------------------


def test_sentences() -> None:
    text = "One. Two!  Is it three?\nfour\n\n 3.5 is a number… end"
    assert split_sentences(text) == ["One.", "Two!", "Is it three?", "four", "3.5 is a number…", "end"]
    assert split_sentences(" \n ") == []
    assert split_sentences("aaa bbb ccc", 7) == ["aaa bbb", "ccc"]
    assert split_sentences("żółwżółw", 5) == ["żó", "łwż", "ółw"], "cut between characters of two bytes"


@given(st.text(st.sampled_from("ab.! \nż🍎"), max_size=40), st.integers(8, 20))
def test_no_sentence_is_too_long_and_nothing_is_lost(text: str, limit: int) -> None:
    sentences = split_sentences(text, limit)
    assert all(sentence and len(sentence.encode()) <= limit for sentence in sentences)
    assert "".join(join_sentences(sentences).split()) == "".join(text.split())


def test_subwords() -> None:
    words = Subwords(270)
    words.fit(["a red apple", "a red pear"] * 3)
    assert words.merges and len(words.merges) <= 270 - 256
    sentences = ["a red apple", "żółw 🍎", "x"]
    tokens = words(sentences)
    assert [words.text([i for i in row.tolist() if 0 <= i < words.end]) for row in tokens] == sentences
    assert ((tokens == words.end).sum(1) == 1).all() and (tokens[2] >= 0).sum() == 2
    again = Subwords(270, words.merges)
    assert torch.equal(again(sentences), tokens)
    again.drop_merges(0.999)
    assert again(["a red apple"]).shape[1] > tokens[:1][tokens[:1] >= 0].numel(), "without merges it takes more"
    again.drop_merges(0.0)
    assert torch.equal(again(sentences), tokens)
    with pytest.raises(ValueError, match="merge of 'zz' and 'q' doesn't follow from those before it"):
        Subwords(300, [("zz", "q")])
    with pytest.raises(ValueError, match="256 .* to 65536 ids, got 10"):
        Subwords(10)


# --- the autoencoder --------------------------------------------------------------------------------------------------


def test_padding_changes_nothing() -> None:
    tokenizer = TextConcepts.tiny()
    alone, together = (tokenizer.encoder(tokenizer.subwords(s)) for s in (["a b"], ["a b", "a long sentence"]))
    torch.testing.assert_close(alone[0], together[0])
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_writing_sees_the_concept_and_what_is_written_only() -> None:
    tokenizer = TextConcepts.tiny()
    concepts, tokens = torch.randn(2, 8, requires_grad=True), torch.randint(0, 256, (2, 6))
    before = tokenizer.decoder(concepts, tokens)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 256
    after = tokenizer.decoder(concepts, changed)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6) and not torch.allclose(before[:, 4:], after[:, 4:])
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    hidden[:, 3] = True
    blanks = tokenizer.decoder(concepts, tokens, hidden), tokenizer.decoder(concepts, changed, hidden)
    assert torch.allclose(*blanks, atol=1e-6), "what is hidden can't matter"
    (gradient,) = torch.autograd.grad(before[0].sum(), concepts)
    assert gradient[0].abs().sum() > 0 and gradient[1].abs().sum() == 0


def test_it_learns_to_write_what_it_read(tokenizer: TextConcepts) -> None:
    text = "fig. red fig. blue plum. black apple."
    encoded = tokenizer.encode(text)
    assert encoded.grid == (4,) and encoded.latents is not None
    assert tokenizer.decode(encoded).value == text
    torch.manual_seed(0)
    near = Encoded(grid=(4,), latents=encoded.latents + 0.1 * torch.randn(4, 8))
    assert tokenizer.decode(near).value == text, "it was trained with noise"


def test_vectors_are_normalised(tokenizer: TextConcepts, shard: Path) -> None:
    source = ShardSource([shard], split="train", holdout_every=10, caption="{category}. {subcategory}. {caption}.")
    sentences = list(dict.fromkeys(s for e in source for s in tokenizer.split(e["text"])))
    x = torch.cat([tokenizer.encode(sentence).content for sentence in sentences])
    low, middle, high = x.quantile(torch.tensor((0.25, 0.5, 0.75)), dim=0)
    torch.testing.assert_close(middle, torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(0.7413 * (high - low), torch.ones(8), atol=1e-3, rtol=0)


def test_what_cant_be_encoded() -> None:
    tokenizer = TextConcepts.tiny()
    for text, message in (
        ("", "text of 0 sentences, expected 1 to 8; leave it out"),
        ("no. " * 9, "text of 9 sentences, expected 1 to 8; split it"),
        ("word " * 10_000, r"text of \d+ sentences, expected 1 to 8; split it"),
        (b"bytes", "got bytes, expected text"),
        ("\ud800", "half a surrogate pair at index 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(text)  # type: ignore[arg-type]
    assert tokenizer.encode("word " * 50).grid == (6,), "a long sentence is cut into several"
    with pytest.raises(ValueError, match="no statistics yet"):
        TextConcepts(dim=4, width=8, layers=1, heads=1, vocab_size=256).encode("a")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 0.0])
def test_decoding_never_raises(tokenizer: TextConcepts, value: float) -> None:
    decoded = tokenizer.decode(Encoded(grid=(3,), latents=torch.full((3, 8), value)))
    assert isinstance(decoded.value, str) and decoded.valid == (not decoded.reason)
    assert decoded.valid or value or decoded.reason
    if value != value or abs(value) == float("inf"):
        assert "not numbers" in decoded.reason
    for item in (
        Encoded(grid=(2,), latents=torch.full((2, 5), value)),
        Encoded(grid=(0,), latents=torch.zeros(0, 8)),
        Encoded(grid=(2,), ids=torch.zeros(2, dtype=torch.long)),
    ):
        assert tokenizer.decode(item).reason == "no vectors of width 8 to decode"
    fresh = TextConcepts(dim=8, width=8, layers=1, heads=1, vocab_size=256)
    assert "not trained" in fresh.decode(Encoded(grid=(1,), latents=torch.zeros(1, 8))).reason


def test_wrong_sizes_are_refused() -> None:
    for settings, message in (
        ({"dim": 0}, "dim must be a whole number in 1..4096, got 0"),
        ({"width": 10, "heads": 4}, "multiple of heads, got 10 and 4"),
        ({"sentences": 300}, "sentences must be a whole number in 1..256"),
        ({"bank": ["a", " "]}, "a bank is a list of at most 1,048,576 sentences"),
        ({"encoder": "some/model"}, "has no decoder; give a bank"),
    ):
        with pytest.raises(ValueError, match=message):
            TextConcepts(**settings)  # type: ignore[arg-type]


# --- saved ------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tokenizer: TextConcepts, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "again")
    again = TextConcepts.from_directory(tmp_path / "again")
    assert again.spec == tokenizer.spec and again.subwords.merges == tokenizer.subwords.merges
    encoded = tokenizer.encode("red fig. plum.")
    assert torch.equal(again.encode("red fig. plum.").content, encoded.content)
    assert again.decode(encoded) == tokenizer.decode(encoded)


def edited(folder: Path, file: str, change: Any) -> None:
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "not a JSON file"),
        (lambda f: (f / "config.json").unlink(), "no saved tokenizer of sentences"),
        (lambda f: (f / "words.json").unlink(), "words.json' is missing"),
        (lambda f: (f / "words.json").write_text('{"merges": [], "bank": []}'), "is not what was saved"),
        (lambda f: (f / "words.json").write_text('{"merges": 7, "bank": []}'), "wrong merges"),
        (lambda f: (f / "words.json").write_text('{"merges": [], "bank": [1]}'), "damaged: a bank is a list"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "asks for|damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "asks for .* weights, but model.safetensors has 0 bytes"),
        (lambda f: edited(f, "config.json", lambda c: c["config"].update(width=4096)), r"asks for [\d,]+ weights, but"),
        (lambda f: edited(f, "config.json", lambda c: c["config"].update(width="x")), "wrong value for width"),
        (lambda f: edited(f, "config.json", lambda c: c["config"].update(dim=9)), "has shape .* expected"),
        (lambda f: edited(f, "config.json", lambda c: c["config"].update(sentences=7)), "fingerprint"),
        (
            lambda f: edited(f, "config.json", lambda c: c["config"].update(encoder="/etc")),
            "may only name one of the hub",
        ),
        (lambda f: edited(f, "config.json", lambda c: c.update(format="other")), "does not describe"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    TextConcepts.tiny().save(tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        TextConcepts.from_directory(tmp_path / "saved")


# --- other people's encoders ------------------------------------------------------------------------------------------


class Letters:
    """Stands for `sentence_transformers.SentenceTransformer`: counts a few letters."""

    def __init__(self, name: str, trust_remote_code: bool) -> None:
        assert name == "some/model" and not trust_remote_code

    def get_sentence_embedding_dimension(self) -> int:
        return 5

    def encode(self, sentences: list[str], **_: Any) -> Tensor:
        return torch.tensor([[float(s.count(c)) for c in "abcde"] for s in sentences])


def test_a_borrowed_encoder_chooses_from_its_bank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Letters))
    bank = ["a bad cab", "decade", "abba", "e"]
    tokenizer = TextConcepts(encoder="some/model", bank=bank)
    assert tokenizer.spec.dim == 5 and not list(tokenizer.parameters())
    assert tokenizer.decode(tokenizer.encode("decade\nabba")).value == "decade abba"
    assert tokenizer.decode(tokenizer.encode("baab.")).value == "abba"
    tokenizer.save(tmp_path / "saved")
    again = TextConcepts.from_directory(tmp_path / "saved")
    assert again.bank == bank and again.spec == tokenizer.spec
    assert torch.equal(again.encode("abba").content, tokenizer.encode("abba").content)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="'some/model' needs .* pip install sentence-transformers"):
        TextConcepts(encoder="some/model", bank=["a"])


# --- the model --------------------------------------------------------------------------------------------------------


def model_of(tokenizer: TextConcepts, head: Head, width: int = 32) -> MultimodalModel:
    torch.manual_seed(0)
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="concepts", tokenizer=tokenizer, head=head, order=Raster()),
    ]
    return MultimodalModel(BackboneConfig(width=width, layers=2, heads=2), modalities, context=32)


def document(model: MultimodalModel, text: str) -> TokenStream:
    return model.build_document([Segment("concepts", text)], torch.Generator().manual_seed(0))


@pytest.mark.parametrize("head", [DiffusionHead(blocks=1), RegressionHead(layers=2)], ids=["diffusion", "regression"])
def test_a_concept_is_predicted_from_those_before_it_alone(head: Head) -> None:
    """The gradient of the loss of concept i reaches concepts before i and no other (the target is the truth itself, and so
    is taken out of the graph)."""
    model = model_of(TextConcepts.tiny(), head)
    for parameter in model.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    stream = document(model, "A red apple. A green pear! Is it a plum? on a table.")
    record = stream.latents["concepts"]
    values = record.values.clone().requires_grad_()
    stream.latents["concepts"] = Placed(values=values, index=record.index)
    hidden = model(stream)
    source = (stream.target[:, None] == record.index).nonzero()
    assert source[:, 1].tolist() == [0, 1, 2, 3], "each is predicted once, by the position before it"
    losses = model.head("concepts").loss(hidden[source[:, 0]], values.detach())
    for i, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
        reached = gradient.abs().sum(1) > 0
        assert reached.tolist() == [j < i for j in range(4)]


def learned(model: MultimodalModel, texts: list[str], steps: int) -> None:
    stream = pack([document(model, text) for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model.loss(stream).total.backward()
        optimizer.step()
        optimizer.zero_grad()


def nexts(model: MultimodalModel, prefix: str, count: int) -> Tensor:
    """The vectors of what comes next, for seeds 0 … count − 1."""
    given = model.modalities[1].tokenizer.encode(prefix).content
    known = (torch.cat((given, torch.zeros_like(given[:1]))), torch.arange(len(given) + 1) < len(given))
    items = [("concepts", (len(given) + 1,))]
    requests = [Request(prompt=[], items=items, text=False, known=known, seed=seed) for seed in range(count)]
    made = Engine(model).generate(requests)
    assert all(torch.equal(segments[-1].content.latents[:-1], given) for segments in made)
    return torch.stack([segments[-1].content.latents[-1] for segments in made])


def test_of_two_sentences_diffusion_says_either_and_regression_what_lies_between() -> None:
    """After "A red apple." come, evenly, "A green pear!" and "Is it a plum?"."""
    texts = ["A red apple. A green pear!", "A red apple. Is it a plum?"]
    tokenizer = TextConcepts.tiny()
    pear, plum = (tokenizer.encode(text).content[1] for text in texts)
    process = {"schedule": "cosine", "prediction": "x0", "train_steps": 100, "zero_terminal_snr": True}
    sampler = {"solver": "ddim", "steps": 20, "spacing": "trailing"}
    diffusion = model_of(tokenizer, DiffusionHead(process, sampler, width=64, blocks=2, batch_multiplier=32))
    learned(diffusion, texts, 300)
    said = nexts(diffusion, "A red apple.", 64)
    distance = torch.cdist(said, torch.stack((pear, plum)))
    gap = float((pear - plum).norm())
    assert (distance.amin(1) < 0.2 * gap).float().mean() > 0.9, "nearly all are one of the two"
    assert 16 <= int((distance.argmin(1) == 0).sum()) <= 48, "and both occur"
    regression = model_of(tokenizer, RegressionHead(layers=2))
    learned(regression, texts, 300)
    said = nexts(regression, "A red apple.", 4)
    torch.testing.assert_close(said, said[:1].expand(4, -1), atol=1e-5, rtol=0)
    assert float((said[0] - (pear + plum) / 2).norm()) < 0.1 * gap


@pytest.mark.parametrize("system", ["lcm", "lcm_regression"])
def test_the_shipped_systems_train_and_are_measured(
    system: str, trained: Path, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "emoji-noto.tar").write_bytes(shard.read_bytes())
    (tmp_path / "runs" / "concepts").mkdir(parents=True)
    (tmp_path / "runs" / "concepts" / "tokenizer").symlink_to(trained)
    options = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"]
    options += ["--trainer.log_every_n_steps=1"]
    options += ["--model.init_args.backbone={width: 16, layers: 1, heads: 1}", "--data.init_args.tokens=96"]
    assert main(["fit", "-c", f"configs/systems/{system}.yaml", *options, *QUIET]) == 0
    folder = tmp_path / "runs" / system / "model"
    model = load_pretrained(folder)
    assert [m.name for m in model.modalities] == ["text", "concepts"]
    capsys.readouterr()
    arguments = ["--model", str(folder), "--data", "data/emoji-noto.tar", "--seeds", "3", "--out", "figures.json"]
    assert judge.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "figures.json").read_text())
    assert result["prefixes"] == 1 and result["autoencoder"]["holdout"]["sentences"] == 1
    assert result["autoencoder"]["train"]["exact"] > 0.8
    assert set(result["next"]) == {
        "exact", "near", "exact_by_group", "elsewhere", "repeated", "nearest", "diversity", "distinct",
    }  # fmt: skip
    ((prefix, sentences),) = result["examples"].items()
    assert prefix == "apple. red apple." and len(sentences) == 3


def test_a_checkpoint_holds_its_tokenizer(tokenizer: TextConcepts, tmp_path: Path) -> None:
    model = model_of(tokenizer, RegressionHead())
    save_pretrained(model, tmp_path / "model")
    again = load_pretrained(tmp_path / "model")
    text = "red fig. plum."
    assert torch.equal(again.modalities[1].tokenizer.encode(text).content, tokenizer.encode(text).content)


# --- documents and figures --------------------------------------------------------------------------------------------


def test_siblings(shard: Path) -> None:
    source = ShardSource([shard], caption="{caption}.")
    template = Siblings(source, "subcategory", most=3, modality="concepts")
    counts = set()
    for seed in range(20):
        (segment,) = template(source[6], torch.Generator().manual_seed(seed))
        heading, first, *others = split_sentences(segment.content)
        assert (segment.modality, heading, first) == ("concepts", "pear.", "green pear.") and segment.loss
        assert all(text.endswith(" pear.") for text in others) and len({first, *others}) == len(others) + 1
        counts.add(len(others))
        assert template(source[6], torch.Generator().manual_seed(seed)) == [segment]
    assert counts == {0, 1, 2}
    with pytest.raises(ValueError, match="most >= 1"):
        Siblings(source, "subcategory", most=0)


@given(st.text(st.sampled_from("ab"), max_size=6), st.text(st.sampled_from("ab"), max_size=6))
def test_within_one_edit(a: str, b: str) -> None:
    from torchmetrics.functional.text import edit_distance

    assert judge.within_one_edit(a, b) == (int(edit_distance([a], [b])) <= 1)


def test_figures_by_hand() -> None:
    """Five of one group said to one prefix, in ten drawings: two right ones, each twice."""
    tokenizer = TextConcepts.tiny()
    real = {"fruit": ["A red apple.", "A green pear!"], "place": ["on a table"]}
    sentences = ["A red apple.", "A red apple.", "A green pear!", "A green pearl!", "on a table"]
    vectors = torch.cat([tokenizer.encode(s).content for s in ["A red apple."] * 4 + ["on a table"]])
    figures = judge.figures([judge.Said("fruit", "fruit. A red apple.", sentences, vectors)], real, tokenizer)
    possible = judge.expected_distinct(2, 5)
    assert figures == {
        "exact": 0.6,
        "near": 0.8,
        "elsewhere": 0.2,
        "repeated": 0.4,
        "nearest": 0.8,
        "exact_by_group": 0.6,
        "diversity": pytest.approx(2 / possible),
        "distinct": pytest.approx(4 / possible),
    }
    assert possible == pytest.approx(2 - 2 * 0.5**5)


def test_a_model_without_concepts_is_refused() -> None:
    from mm.testing import tiny

    with pytest.raises(ValueError, match="modalities text, image, none of them sentences as vectors"):
        judge.concepts_of(tiny())


def test_the_configurations_are_shipped() -> None:
    assert (SHIPPED / "systems" / "lcm.yaml").is_file() and (SHIPPED / "tokenizers" / "concepts.yaml").is_file()
