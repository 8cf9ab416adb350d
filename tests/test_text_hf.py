"""Hugging Face tokenizers and CLIP's, held to the libraries they come from."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch

from mm import plugins
from mm.hf_checks import check_parts
from mm.interfaces import Encoded

TextHF = plugins.load("tokenizers", "text_hf")

TEXTS = [
    "A red Apple, noto",
    "it's 2024 &amp; we've  been\nthere!!! ünïcode 日本語 😀",
    "",
    "don’t they'LL ßtraße … ½ №",
    "tab\tand\u00a0space e\u0301 ﬁ",
]


@pytest.fixture(scope="module")
def clip():  # noqa: ANN201
    return TextHF("open_clip")


def ids(*values: int) -> Encoded:
    return Encoded(grid=(len(values),), ids=torch.tensor(values, dtype=torch.long))


def test_open_clip_equals_open_clip(clip) -> None:  # noqa: ANN001
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    assert clip.spec.vocab_size == theirs.vocab_size == 49408
    assert clip.backend.tokenizer.get_vocab() == theirs.encoder
    for text in TEXTS:
        encoded = clip.encode(text)
        assert encoded.ids.tolist() == theirs.encode(text), text
        assert clip.decode(encoded).value == theirs.decode(encoded.ids.tolist()).strip()


def test_open_clip_decodes_any_id(clip) -> None:  # noqa: ANN001
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    for row in torch.randint(0, 49406, (50, 20)):
        decoded = clip.decode(ids(*row.tolist()))
        assert decoded.value == theirs.decode(row.tolist()).strip()


def test_folder_equals_the_library(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = TextHF.tiny()
    tokenizer.save(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text).ids.tolist() == theirs.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)).value == text, "byte-level: nothing is lost"


def test_folder_without_tokenizer_json(tmp_path: Path) -> None:
    """What only transformers can read (here: vocabulary and merges in two files)."""
    from transformers import AutoTokenizer

    model = json.loads(TextHF.tiny().backend.tokenizer.to_str())["model"]
    vocabulary = {**model["vocab"]}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = TextHF(str(tmp_path))
    for text in TEXTS:
        assert tokenizer.encode(text).ids.tolist() == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text)).value == text


@pytest.mark.parametrize("text", ["<|endoftext|>", "a red <|endoftext|> apple"])
def test_a_prompt_can_not_inject_a_special_token(text: str) -> None:
    tokenizer = TextHF.tiny()
    special = tokenizer.backend.tokenizer.token_to_id("<|endoftext|>")
    encoded = tokenizer.encode(text)
    assert special not in encoded.ids.tolist()
    assert tokenizer.decode(encoded).value == text


def test_rows_of_the_embedding(tmp_path: Path) -> None:
    tokenizer = TextHF.tiny()
    tokenizer.save(tmp_path)
    own = tokenizer.spec.vocab_size
    wide = TextHF(str(tmp_path), vocab_size=own + 19)
    assert wide.spec.vocab_size == own + 19
    decoded = wide.decode(ids(*wide.encode("apple").ids.tolist(), own + 5))
    assert decoded.value == "apple" and not decoded.valid and decoded.reason == "1 ids stand for nothing"
    wide.save(tmp_path / "again")
    assert TextHF.from_directory(tmp_path / "again").spec == wide.spec
    with pytest.raises(ValueError, match=f"vocab_size is 5, but the tokenizer .* has {own} ids"):
        TextHF(str(tmp_path), vocab_size=5)


def test_broken_characters_are_reported() -> None:
    tokenizer = TextHF.tiny()
    encoded = tokenizer.encode("é")
    decoded = tokenizer.decode(ids(int(encoded.ids[0])))
    assert decoded.value == "\ufffd" and not decoded.valid


def test_fingerprints_follow_the_vocabulary(clip, tmp_path: Path) -> None:  # noqa: ANN001
    tokenizer = TextHF.tiny()
    tokenizer.save(tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = table["model"]["merges"]
    assert merges
    table["model"]["merges"] = merges[:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    changed = TextHF(str(tmp_path))
    assert len({clip.spec.fingerprint, tokenizer.spec.fingerprint, changed.spec.fingerprint}) == 3


# --- bad input --------------------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer that can be read; give a folder with a tokenizer.json"):
        TextHF(str(tmp_path))
    with pytest.raises(ValueError, match="is neither a folder nor on the hub"):
        TextHF("no-such-owner/no-such-tokenizer")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": 3}', "\0"])
def test_damaged_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged or not a Hugging Face tokenizer"):
        TextHF(str(tmp_path))


GROWS = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 64}] * 5
ODD = {
    "an empty map": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),
    "a map of an endless table": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "////f0FBQUFBQUE="}),
    "growth": ("normalizer", {"type": "Sequence", "normalizers": GROWS}),
    "nothing replaced": ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "a"}),
    "pieces of no length": ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    "a strip without end": ("decoder", {"type": "Strip", "content": "a", "start": 1 << 40, "stop": 1}),
    "no id for what is unknown": ("model", {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##",
                                            "max_input_chars_per_word": 9, "vocab": {"a": 0}}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_parts_that_the_library_panics_of(tmp_path: Path, name: str) -> None:
    """Its panics are no `Exception`, and some end the process."""
    TextHF.tiny().save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    part, settings[ODD[name][0]] = ODD[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is damaged or not a Hugging|the text tokenizer can't") as raised:
        made = TextHF(str(tmp_path))
        made.decode(made.encode("aaa b"))
    assert len(str(raised.value)) < 500


def test_parts_of_other_peoples_tokenizers_are_taken() -> None:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    words = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    table = base64.b64encode(b"\x08\0\0\0" + bytes(8) + "ſt\0ﷺ".encode()).decode()
    chars = {"type": "Precompiled", "precompiled_charsmap": table}
    check_parts({"normalizer": {"type": "Sequence", "normalizers": [chars, spaces, words]}, "decoder": spaces})


def test_a_vocabulary_of_impossible_size(tmp_path: Path) -> None:
    TextHF.tiny().save(tmp_path)
    with pytest.raises(ValueError, match="at most 16,777,216 ids"):
        TextHF(str(tmp_path), vocab_size=(1 << 24) + 1)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["!"] = 1 << 24  # far larger ones abort the process where they are not refused
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has ids up to 16,777,216, but at most 16,777,216 ids"):
        TextHF(str(tmp_path))


def test_damaged_settings(tmp_path: Path) -> None:
    TextHF.tiny().save(tmp_path)
    (tmp_path / "mm_tokenizer.json").write_text('{"source": "/etc", "vocab_size": 1}')
    with pytest.raises(ValueError, match="has a wrong source or vocab_size"):
        TextHF.from_directory(tmp_path)


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    TextHF.tiny().save(tmp_path / "real")
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "tokenizer.json").symlink_to(tmp_path / "real" / "tokenizer.json")
    with pytest.raises(ValueError, match="is a link that leads out"):
        TextHF(str(tmp_path / "fake"))


def test_half_a_surrogate_pair() -> None:
    for name in ("text_hf", "text_bytes"):
        tokenizer = plugins.load("tokenizers", name).tiny()  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="half a surrogate pair at index 2"):
            tokenizer.encode("a \ud800")


def test_a_shipped_checkpoint_names_its_text_tokenizer() -> None:
    from mm.hub import load_pretrained

    tokenizer = TextHF("mm-tiny")
    assert tokenizer.spec == load_pretrained("mm-tiny").modalities[0].tokenizer.spec
    assert tokenizer.decode(tokenizer.encode("red apple, noto")).value == "red apple, noto"
