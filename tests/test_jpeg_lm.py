"""Pictures as JPEG files in a language model: what its automaton allows, what is kept of a picture, training, and memorising."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm import jpeg, plugins
from mm.byte_automaton import ByteGrammar
from mm.commands.train import main
from mm.interfaces import Decoded, Encoded, Order
from mm.layout import Segment
from mm.orders.followed import Followed
from mm.orders.raster import Raster
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.stream import pack
from mm.testing import tiny
from mm.tokenizers.jpeg_bytes import JpegBytes


def shapes(count: int, size: tuple[int, int] = (32, 32)) -> list[Image.Image]:
    """Coloured rectangles on a ground, as blurred as it happens."""
    rng = np.random.default_rng(5)
    out: list[Image.Image] = []
    for _ in range(count):
        pixels = np.full((*size, 3), rng.integers(0, 256, 3), np.uint8)
        for _ in range(3):
            top, left = rng.integers(0, size[0] - 4), rng.integers(0, size[1] - 4)
            height, width = rng.integers(3, 14, 2)
            pixels[top : top + height, left : left + width] = rng.integers(0, 256, 3)
        out.append(Image.fromarray(pixels))
    return out


def trained(**settings: Any) -> JpegBytes:
    tokenizer = JpegBytes(**{"vocab": 290, **settings})
    tokenizer.fit(tokenizer.file(image) for image in shapes(30, tokenizer.frame.size))
    return tokenizer


def drawn(tokenizer: JpegBytes, room: int, generator: torch.Generator, begun: tuple[int, ...] = ()) -> list[int]:
    """Ids after random logits, as the automaton allows."""
    automaton, ids = tokenizer.automaton(), list(begun)
    assert automaton is not None
    for token in begun:
        automaton.accept(token)
    while room and (not ids or ids[-1] != tokenizer.stop):
        allowed = automaton.allowed(room)
        assert allowed.shape == (tokenizer.spec.vocab_size,) and allowed.any()
        logits = 3 * torch.randn(len(allowed), generator=generator)
        ids.append(int(logits.masked_fill(~allowed, float("-inf")).argmax()))
        automaton.accept(ids[-1])
        room -= 1
    return ids


def decode(tokenizer: JpegBytes, ids: list[int]) -> Decoded:
    return tokenizer.decode(Encoded(grid=(len(ids),), ids=torch.tensor(ids, dtype=torch.long)))


KINDS: list[dict[str, Any]] = [
    {"strip_header": True},
    {"strip_header": True, "huffman": "aligned"},
    {"strip_header": True, "restart": 0, "size": (24, 20)},
    {"restart": 3, "size": (24, 40), "subsampling": "4:2:2"},
    {"size": (9, 30), "subsampling": "4:4:4", "quality": 60},
    {"size": (9, 30), "subsampling": "4:4:4", "quality": 60, "restart": 0, "huffman": "aligned"},
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_every_sample_is_a_strict_file(settings: dict[str, Any]) -> None:
    """Whatever the logits, and however little room there is: down to the least."""
    tokenizer, generator = trained(**settings), torch.Generator().manual_seed(0)
    least = tokenizer.spec.least
    lengths = set()
    for room in (least, least + 1, least + 2, least + 20, 150, 300):
        for _ in range(2):
            ids = drawn(tokenizer, room, generator)
            assert ids[-1] == tokenizer.stop and len(ids) <= room
            decoded = decode(tokenizer, ids)
            assert decoded.valid, decoded.reason
            lengths.add(len(ids))
    assert len(lengths) > 3


@pytest.mark.long
def test_hundreds_of_samples_are_strict_files() -> None:
    tokenizer, generator = trained(strip_header=True), torch.Generator().manual_seed(1)
    for number in range(400):
        room = tokenizer.spec.least + number
        assert decode(tokenizer, drawn(tokenizer, room, generator)).valid


@pytest.mark.parametrize("settings", [KINDS[0], *KINDS[2:4]], ids=str)
def test_the_loose_automaton_writes_markers_where_they_belong(settings: dict[str, Any]) -> None:
    tokenizer, generator = trained(grammar="markers", **settings), torch.Generator().manual_seed(0)
    reader, wrong = tokenizer.reader, 0
    machine = reader.machine
    markers = [machine.number(left) for left in range(machine.total - machine.interval, 0, -machine.interval)]
    for room in (tokenizer.spec.least, 300):
        for _ in range(3):
            ids = drawn(tokenizer, room, generator)
            assert ids[-1] == tokenizer.stop and len(ids) <= room
            data = tokenizer.header + tokenizer.bytes_of(Encoded(grid=(len(ids),), ids=torch.tensor(ids)))[0]
            body = data[len(reader.header) :]
            assert [found[1][0] for found in jpeg.MARKER.finditer(body)] == [*markers, 0xD9]
            assert body.endswith(b"\xff\xd9")
            wrong += not decode(tokenizer, ids).valid
    assert wrong, "codes are left to the model"


def test_real_files_are_allowed() -> None:
    for settings in KINDS:
        for grammar in ("strict", "markers"):
            tokenizer = trained(grammar=grammar, **settings)
            for image in shapes(2, tokenizer.frame.size):
                automaton, ids = tokenizer.automaton(), tokenizer.encode(image).content.tolist()
                assert automaton is not None
                for place, token in enumerate(ids):
                    assert automaton.allowed(len(ids) - place + 200)[token]
                    automaton.accept(token)


def test_kept_answers_are_those_that_are_found_anew() -> None:
    tokenizer = trained(strip_header=True)
    grammar = tokenizer.grammar()
    assert grammar is not None
    for image in shapes(2) + shapes(1):
        automaton = grammar.automaton()
        for token in tokenizer.encode(image).content.tolist():
            fresh = ByteGrammar(grammar.machine, grammar.table, grammar.stop)
            expected = {i for i, _ in fresh.following(automaton.state)} or {tokenizer.stop}
            assert set(automaton.allowed(1000).nonzero()[:, 0].tolist()) == expected
            automaton.accept(token)


def test_ids_that_were_not_allowed_do_no_harm() -> None:
    tokenizer, generator = trained(strip_header=True), torch.Generator().manual_seed(2)
    odd = tuple(torch.randint(-5, 400, (60,), generator=generator).tolist())
    ids = drawn(tokenizer, 300, generator, begun=tuple(i for i in odd if i != tokenizer.stop))
    assert ids[-1] == tokenizer.stop
    automaton = tokenizer.automaton()
    assert automaton is not None
    assert automaton.allowed(1).sum() == 1, "less room than is needed: the way to the end is gone"
    assert JpegBytes(grammar="none").automaton() is None


# --- a part of a picture --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"strip_header": True, "huffman": "aligned"}, {"restart": 2}, {"restart": 0}], ids=str
)
def test_the_upper_part_survives_whatever_follows(settings: dict[str, Any]) -> None:
    tokenizer, generator = trained(size=(64, 16), **settings), torch.Generator().manual_seed(3)
    for image in shapes(1, (64, 16)):
        whole = np.asarray(tokenizer.decode(tokenizer.encode(image)).value)
        counts = []
        for share, rows in ((0.0, 0), (0.2, 0), (0.25, 16), (0.5, 32), (0.8, 48), (1.0, 64)):
            begun: list[int] = tokenizer.prefix(image, share).content.tolist()
            counts.append(len(begun))
            assert tokenizer.encode(image).content.tolist()[: len(begun)] == begun
            decoded = decode(tokenizer, drawn(tokenizer, 600, generator, begun=tuple(begun)))
            assert decoded.valid
            kept = max(rows - 1, 0) if rows < 64 else 64  # colours of the next block reach into the last row
            if settings.get("restart", 1) != 1 and rows < 64:
                kept = max(rows - 17, 0)  # no marker there: the last code may lie in a byte of both
            assert np.array_equal(np.asarray(decoded.value)[:kept], whole[:kept])
        assert counts == sorted(counts) and counts[-1] > counts[1]


def test_bad_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="a number from 0 to 1, got 1.5"):
        JpegBytes().prefix(shapes(1)[0], 1.5)


def test_a_pipeline_completes_a_picture() -> None:
    """A random model: what it writes is a picture all the same, and its upper part is the one given."""
    tokenizer = trained(strip_header=True)
    pipeline = TextToImagePipeline(tiny(tokenizer=tokenizer, context=400))
    image = shapes(1)[0]
    mask = Image.fromarray(np.repeat(np.arange(32) >= 16, 32).reshape(32, 32).astype(np.uint8) * 255)
    out = pipeline("a thing", num_images=3, seed=0, image=image, mask=mask)
    whole = np.asarray(tokenizer.decode(tokenizer.encode(image)).value)
    for made, tokens in zip(out.images, out.tokens, strict=True):
        assert tokenizer.decode(tokens).valid
        assert np.array_equal(np.asarray(made)[:15], whole[:15])
    free = pipeline("a thing", num_images=2, seed=0, constrained=False)
    assert all(image.size == (32, 32) for image in free.images)


# --- the tokenizer --------------------------------------------------------------------------------------------------


def test_without_its_header_a_file_is_the_rest() -> None:
    image = shapes(1)[0]
    whole, rest = JpegBytes(), JpegBytes(strip_header=True)
    assert whole.file(image) == whole.frame.header() + rest.file(image)
    assert len(whole.file(image)) - len(rest.file(image)) == 59
    assert whole.spec.fingerprint != rest.spec.fingerprint
    assert whole.spec.fingerprint == JpegBytes(grammar="none").spec.fingerprint, "what is allowed changes no meaning"


def test_an_id_without_bytes_is_reported() -> None:
    tokenizer = JpegBytes(vocab=300)
    ids = tokenizer.encode(shapes(1)[0]).content.tolist()
    decoded = decode(tokenizer, [*ids[:-1], 299, tokenizer.stop])
    assert not decoded.valid and decoded.reason == "repaired: 1 ids stand for no bytes"
    assert decode(tokenizer, []).reason.startswith("invalid: the file ends early")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (32,)}, "size is height and width"),
        ({"size": "32"}, "size must be a list of whole numbers"),
        ({"size": (4096, 32)}, "size is height and width, each 1 to 1024"),
        ({"quality": 0}, "quality is a whole number"),
        ({"subsampling": "4:1:0"}, "subsampling must be one of"),
        ({"subsampling": ["4:2:0"]}, "subsampling must be one of"),
        ({"strip_header": "no"}, "strip_header must be true or false"),
        ({"subsampling": "4:1:1"}, "subsampling"),
        ({"restart": -1}, "restart is a number of MCUs"),
        ({"vocab": 100}, "vocab must be a whole number in 256..65536"),
        ({"grammar": "loose"}, "grammar must be strict, markers or none"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JpegBytes(**settings)


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    content.update(values)
    file.write_text(json.dumps(content))


def test_what_is_read_is_what_was_saved(tmp_path: Path) -> None:
    tokenizer = trained()
    tokenizer.save(tmp_path / "saved")
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("facts.json", {"tables": "ffd8ffd9"}, "expected 2 tables of steps and 4 of codes"),
        ("facts.json", {"tables": "xyz"}, "no hexadecimal digits"),
        ("facts.json", {"tables": 7}, "holds something that is no text"),
        ("facts.json", {"pil": "1.0"}, "restore the pair of files"),
        ("bpe.json", {"model": {"merges": []}}, "restore the pair of files"),
        ("config.json", {"config": {"size": [32, 32]}}, "missing or unknown settings"),
        ("config.json", {"format": "mm.tokenizers.image_vq"}, "does not describe a tokenizer of JPEG files"),
    ]
    for name, values, message in wrong:
        tokenizer.save(tmp_path / "other")
        change(tmp_path / "other" / name, **values)
        with pytest.raises(ValueError, match=message):
            JpegBytes.from_directory(tmp_path / "other")
    tokenizer.save(tmp_path / "other")
    (tmp_path / "other" / "bpe.json").unlink()
    with pytest.raises(ValueError, match="is no byte-pair encoding of bytes: .* is missing"):
        JpegBytes(pretrained=str(tmp_path / "other"))


def test_saved_tables_decode_and_others_do_not_encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pillow that writes other tables still reads what was written with the saved ones."""
    tokenizer, image = trained(), shapes(1)[0]
    tokens = tokenizer.encode(image)
    tokenizer.save(tmp_path / "saved")
    monkeypatch.setattr(jpeg, "tables", lambda quality=25, subsampling="4:2:0": b"another")
    again = JpegBytes.from_directory(tmp_path / "saved")
    assert np.array_equal(np.asarray(again.decode(tokens).value), np.asarray(tokenizer.decode(tokens).value))
    with pytest.raises(ValueError, match="writes other tables than that of the saved tokenizer; install Pillow"):
        again.encode(image)


# --- training -------------------------------------------------------------------------------------------------------


def test_the_merges_are_learned_by_mm_fit(here: Path) -> None:
    source = "{class_path: mm.data.shards.ShardSource, init_args: {paths: [data/debug/digits-000000.tar]}}"
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    data = [f"--data.init_args.train=[{source}]", f"--data.init_args.validation=[{source}]"]
    config = ["-c", "configs/tokenizers/jpeg_bytes.yaml", "--model.init_args.save_to=made"]
    assert main(["fit", *config, *data, *quiet]) == 0
    made = plugins.load("tokenizers", "jpeg_bytes").from_directory("made")  # type: ignore[attr-defined]
    assert len(made.bpe.merges) > 20 and made.config["strip_header"]


PLAIN: dict[str, Any] = {"strip_header": True, "vocab": 320}
ALIGNED: dict[str, Any] = {**PLAIN, "quality": 10, "subsampling": "4:4:4", "huffman": "aligned"}


def memorised(count: int, steps: int, width: int, order: Order, **settings: Any) -> tuple[int, int]:
    """How many of so many files a model writes again byte for byte, greedily, each behind its name."""
    tokenizer = trained(**settings)
    model = tiny(order, tokenizer=tokenizer, context=384, width=width, layers=3, heads=4).train()
    names, images = [f"thing {n}" for n in range(count)], shapes(count)
    documents = []
    for name, image in zip(names, images, strict=True):
        segments = [Segment("text", name), Segment("image", image, loss=True)]
        documents.append(model.build_document(segments, torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(step))[:16].tolist()
        loss = model.loss(pack([documents[n] for n in chosen])).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    pipeline = TextToImagePipeline(model.eval())
    made = pipeline(names, seed=0, temperature=0.0, guidance=1.0).tokens
    same = sum(tokenizer.bytes_of(one)[0] == tokenizer.file(image) for one, image in zip(made, images, strict=True))
    return same, count


@pytest.mark.parametrize(("order", "settings"), [(Raster(), PLAIN), (Followed(), ALIGNED)], ids=["plain", "aligned"])
def test_a_few_files_are_memorised_byte_for_byte(order: Order, settings: dict[str, Any]) -> None:
    same, count = memorised(2, 60, 48, order, **settings)
    assert same == count


@pytest.mark.long
def test_64_files_are_memorised_byte_for_byte() -> None:
    same, count = memorised(64, 600, 128, Raster(), **PLAIN)
    assert same == count
