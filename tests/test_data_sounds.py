"""Sources of sounds: what shards, folders and `datasets` directories give, what is held out by value, what is cached."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm.audio import Audio, to_wav
from mm.data.cache import CachedSource, build_cache, cache_key, load_cache
from mm.data.documents import SpeechToText, TextToImage
from mm.data.example import BrokenExample, Lazy, Source
from mm.data.feeds import Part
from mm.data.module import MultimodalDataModule
from mm.data.sources import FolderSource, HFSource, ShardSource
from mm.interfaces import Encoded
from mm.runtime import release_memory
from mm.testing import Frames, Palette, write_tar


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(buffer, format="PNG")
    return buffer.getvalue()


def wav(level: float = 0.5, samples: int = 80, rate: int = 8000) -> bytes:
    return to_wav(Audio(np.full(samples, level, np.float32), rate))


def test_shards_with_sounds(tmp_path: Path) -> None:
    members = [
        ("a.wav", wav(0.25)),
        ("a.json", b'{"text": "one", "audio": "a field cannot hide the sound"}'),
        ("b.png", png()),
        ("b.mic2.wav", wav(0.5)),
        ("b.wav", wav(0.75)),
        ("c.flac", b"fLaC and no more"),
        ("d.txt", b"no sound"),
    ]
    source = ShardSource(write_tar(tmp_path / "x.tar", members))
    first, second = source[0], source[1]
    assert isinstance(dict(first)["audio"], Lazy) and first["text"] == "one"
    assert (first["audio"].rate, first["audio"].samples.tolist()) == (8000, [0.25] * 80)
    assert "image" not in first and source.raw_picture(0) is None and source.raw_sound(0) == members[0][1]
    # the first is `audio`, another goes by its suffix
    assert second["audio"].samples[0] == 0.5 and second["wav"].samples[0] == 0.75
    assert second["image"].size == (4, 4) and source.raw_sound(1) == wav(0.5)
    with pytest.raises(BrokenExample, match=r"x\.tar: c\.flac: the sound is damaged"):
        source[2]["audio"]
    assert source.raw_sound(3) is None
    with pytest.warns(UserWarning, match=r"skipped 1 of 4 .*c\.flac"):
        assert [example["key"] for example in source] == ["a", "b", "d"]
    with pytest.raises(BrokenExample, match="is 0.01 s long, which is more than the 0.001 s"):
        ShardSource(tmp_path / "x.tar", max_seconds=0.001)[0]["audio"]


def test_a_stream_gives_the_sounds_that_shards_give(tmp_path: Path) -> None:
    from mm.data.streaming import StreamingShards

    path = write_tar(tmp_path / "x.tar", [("a.wav", wav()), ("a.txt", b"one"), ("b.wav", b"RIFF"), ("b.txt", b"two")])
    with pytest.warns(UserWarning, match=r"skipped 1 of 2 .*b\.wav"):
        (example,) = StreamingShards(str(path), shuffle=1)
    assert example["audio"].samples.tolist() == [0.5] * 80 and example["text"] == "one"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    root = tmp_path / "mixed"
    (root / "sub").mkdir(parents=True)
    (root / "a.wav").write_bytes(wav(0.1))
    (root / "a.txt").write_text("a sound")
    (root / "b.png").write_bytes(png())
    (root / "b.WAV").write_bytes(wav(0.2))
    (root / "b.flac").write_bytes(b"damaged")
    (root / "sub" / "c.ogg").write_bytes(wav(0.3))  # the content says what it is
    (root / "d.jpg").write_bytes(png())
    rows = [{"file_name": "sub/c.ogg", "text": "from a row"}, {"file_name": "b.WAV", "caption": "both"}]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def test_folders_of_sounds_and_pictures(mixed: Path) -> None:
    source = FolderSource(mixed, strict=True)
    assert [source.key(n) for n in range(len(source))] == ["a", "b", "b", "d", "sub/c"]
    kinds = [tuple(name for name in ("image", "audio") if name in source[n]) for n in range(5)]
    # of two sounds with a picture's name the first by name is its own (B comes before f)
    assert kinds == [("audio",), ("audio",), ("image", "audio"), ("image",), ("audio",)]
    assert [source[n]["text"] for n in (0, 2, 4)] == ["a sound", "both", "from a row"]
    levels = [source[n]["audio"].samples[0] for n in (0, 2, 4)]
    assert levels == pytest.approx([0.1, 0.2, 0.3])
    assert source.raw_picture(0) is None and source.raw_sound(0) == (mixed / "a.wav").read_bytes()
    assert source.raw_picture(2) == png() and source.raw_sound(2) == (mixed / "b.WAV").read_bytes()
    assert source.raw_sound(3) is None
    with pytest.raises(BrokenExample, match=r"b\.flac: the sound is damaged"):
        source[1]["audio"]
    before = source.identity
    (mixed / "a.wav").write_bytes(wav(0.9))
    assert FolderSource(mixed).identity != before


def test_folders_say_which_sounds_they_leave_out(mixed: Path) -> None:
    (mixed / "other.m4a").write_bytes(b"....ftyp")
    (mixed / "film.mp4").write_bytes(b"....ftyp")
    with pytest.warns(UserWarning, match="left out 1 sounds of other kinds, the first is 'other.m4a'; convert them to"):
        FolderSource(mixed)


def test_shards_of_a_folder_keep_the_files_of_sounds(mixed: Path, tmp_path: Path) -> None:
    from mm.commands.data import main

    with pytest.warns(UserWarning, match="skipped 1 of 5 .*'mixed': b: the sound is damaged"):
        assert main(["shards", str(mixed), "--out", str(tmp_path / "out")]) == 0
    shards = ShardSource(tmp_path / "out" / "data-000000.tar")
    assert [shards.key(n) for n in range(len(shards))] == ["a", "b", "d", "sub/c"]
    assert [shards.raw_sound(n) for n in range(4)] == [
        (mixed / "a.wav").read_bytes(),
        (mixed / "b.WAV").read_bytes(),
        None,
        (mixed / "sub" / "c.ogg").read_bytes(),
    ]
    assert shards.raw_picture(1) == png() and shards[1]["text"] == "both"
    assert shards[0]["text"] == "a sound" and shards[3]["text"] == "from a row"  # kept, whatever the field is called
    with tarfile.open(tmp_path / "out" / "data-000000.tar") as tar:
        assert "sub/c.wav" in tar.getnames()


def test_further_sounds_of_an_example_survive_the_conversion(tmp_path: Path) -> None:
    from mm.data.convert import to_shards

    source = ShardSource(
        write_tar(tmp_path / "x.tar", [("a.wav", wav(0.1)), ("a.mic2.wav", wav(0.2)), ("a.bin", b"x")])
    )
    (path,) = to_shards(source, tmp_path / "out")
    again = ShardSource(path)[0]
    assert again["audio"].samples[0] == np.float32(0.1) and again["mic2.wav"].samples[0] == np.float32(0.2)
    assert again["bin"] == b"x"


def test_hf_sounds(tmp_path: Path) -> None:
    import datasets

    kind = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = {
        "id": ["x", "y"],
        "speech": [{"bytes": wav(0.25), "path": "a.wav"}, {"bytes": None, "path": str(tmp_path / "secret.wav")}],
        "noise": [{"bytes": wav(0.5), "path": None}, None],
        "index": [1, 5],
    }
    features = {"id": datasets.Value("string"), "speech": kind, "noise": kind, "index": datasets.Value("int64")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(tmp_path / "set"))
    # as a stranger's set may have it: writing datasets.Audio needs a decoder of its own
    info = json.loads((tmp_path / "set" / "dataset_info.json").read_text())
    info["features"] |= {name: {"_type": "Audio"} for name in ("speech", "noise")}
    (tmp_path / "set" / "dataset_info.json").write_text(json.dumps(info))
    source = HFSource(tmp_path / "set")
    assert source[0]["audio"].samples[0] == 0.25 and source[0]["noise"].samples[0] == 0.5 and "speech" not in source[0]
    assert source.raw_sound(0) == wav(0.25) and source.raw_picture(0) is None and "noise" not in source[1]
    with pytest.raises(BrokenExample, match="row 1, speech names a file instead of holding the sound"):
        source[1]["audio"]
    held = HFSource(tmp_path / "set", split="holdout", holdout_where={"index": [5]})
    assert [held.key(n) for n in range(len(held))] == ["y"]


# --- hold-out by value --------------------------------------------------------------------------------------------


@pytest.fixture
def takes(tmp_path: Path) -> Path:
    members = [
        (f"{speaker}{n}.json", json.dumps({"index": n, "speaker": speaker, "caption": "c"}).encode())
        for speaker in ("ann", "theo")
        for n in range(8)
    ]
    return write_tar(tmp_path / "takes.tar", [*members, ("broken.json", b"{"), ("nothing.json", b"{}")])


def keys(source: Source) -> list[str]:
    return [source.key(n) for n in range(len(source))]


def test_what_is_held_out_by_value(takes: Path) -> None:
    where: dict[str, list[str | int]] = {"index": [5, "6"]}
    held = ShardSource(takes, split="holdout", holdout_where=where)
    train = ShardSource(takes, split="train", holdout_where=where, holdout_every=2)  # which no longer counts
    assert keys(held) == ["ann5", "ann6", "theo5", "theo6"]
    assert keys(train) == [key for key in keys(train.whole()) if key not in keys(held)] and len(train) == 14
    assert held.identity == ShardSource(takes).identity and len(ShardSource(takes, holdout_where=where)) == 18
    either = {"index": [0], "speaker": ["theo"]}
    assert keys(ShardSource(takes, split="holdout", holdout_every=0, holdout_where=either)) == [
        "ann0",
        *(f"theo{n}" for n in range(8)),
    ]


def test_all_examples_of_a_key_are_held_out_together(tmp_path: Path) -> None:
    members = [("a.json", b'{"take": 1}'), ("b.json", b'{"take": 1}'), ("a.json", b'{"take": 2}')]
    path = write_tar(tmp_path / "x.tar", members)
    assert keys(ShardSource(path, split="train", holdout_where={"take": [2]})) == ["b"]


def test_a_value_that_holds_nothing_out_is_a_mistake(takes: Path, mixed: Path) -> None:
    with pytest.raises(ValueError, match=r"holds nothing out; index is 0, 1, 2, 3, 4, 5, 6, 7; take is in no example"):
        ShardSource(takes, split="train", holdout_where={"index": [50], "take": [1]})
    with pytest.raises(ValueError, match="image is in no example"):  # nothing is decoded to find out
        FolderSource(mixed, split="train", holdout_where={"image": [1]})
    for where in ({"index": []}, {"index": "56"}):
        with pytest.raises(ValueError, match="give a list of at least one value"):
            ShardSource(takes, holdout_where=where)
    assert keys(FolderSource(mixed, split="holdout", holdout_where={"text": ["from a row"]})) == ["sub/c"]


# --- caches of sounds ---------------------------------------------------------------------------------------------


def test_memory_is_given_back_while_a_cache_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed room lay in pieces that nothing fitted into: 5,000 clips took 22 GB (`mm.runtime.tune_cpu`)."""
    given = []
    monkeypatch.setattr("mm.data.cache.release_memory", lambda: given.append(len(done)))
    members = [(f"{n:02}.wav", wav(n / 20, 4, 100)) for n in range(1, 20)]
    done: list[int] = []
    source = ShardSource(write_tar(tmp_path / "x.tar", members))
    build_cache(source, Frames(), tmp_path / "c", "audio", batch_size=2, progress=lambda a, b: done.append(a))
    assert given == [3, 7], "after every fourth batch, before it is told"
    release_memory()


def test_sounds_are_cached(tmp_path: Path) -> None:
    members = [(f"{n}.wav", wav(n / 8, 2 * n, 100)) for n in range(1, 5)] + [("5.wav", wav(0.5, 8, 50))]
    source = ShardSource(write_tar(tmp_path / "x.tar", members))
    tokenizer = Frames()
    with pytest.warns(UserWarning, match="skipped 1 of 5 .* at 50 samples a second"):
        build_cache(source, tokenizer, tmp_path / "cache", "audio")
    key = cache_key(source, tokenizer, "audio")
    cached = CachedSource(source, {"audio": load_cache(tmp_path / "cache", key, source, tokenizer, "audio")})
    for n in range(4):
        encoded = cached[n]["audio"]
        assert encoded.grid == (n + 1,) and torch.equal(encoded.latents, tokenizer.encode(source[n]["audio"]).latents)
        assert cached.raw_sound(n) == members[n][1]
    with pytest.raises(BrokenExample, match="couldn't be encoded"):
        cached[4]["audio"]


def test_the_data_module_caches_the_fields_that_sources_have(tmp_path: Path) -> None:
    sounds = ShardSource(write_tar(tmp_path / "s.tar", [("a.wav", wav(0.5, 8, 100)), ("a.txt", b"x")]))
    pictures = ShardSource(write_tar(tmp_path / "p.tar", [("p.png", png()), ("p.txt", b"y")]))
    parts = [Part(source=sounds, template=SpeechToText()), Part(source=pictures, template=TextToImage())]

    def module(tokenizers: dict[str, Any], **options: Any) -> MultimodalDataModule:
        return MultimodalDataModule(
            parts,
            to_stream=lambda *_: pytest.fail("not laid out"),
            tokenizers=tokenizers,
            cache=str(tmp_path),
            **options,
        )

    both = module({"speech": Frames(), "image": Palette(), "text": Frames()})
    both.setup()
    with_sounds, with_pictures = (part.source for part in both._with_caches(parts))
    assert isinstance(with_sounds[0]["audio"], Encoded) and "image" not in with_sounds[0]
    assert isinstance(with_pictures[0]["image"], Encoded) and "audio" not in with_pictures[0]
    named = module({"voice": Frames()}, cached={"audio": "voice"})
    named.setup()
    assert isinstance(named._with_caches(parts)[0].source[0]["audio"], Encoded)
    for tokenizers, cached, message in (
        ({"text": Frames()}, None, r"name them in cached; there is \['text'\]"),
        ({"speech": Frames()}, {"audio": "sound"}, r"cached names the modality 'sound'; there is \['speech'\]"),
        ({"speech": Frames()}, {"noise": "speech"}, "cached names the field 'noise', which none of the sources has"),
    ):
        with pytest.raises(ValueError, match=message):
            module(tokenizers, cached=cached).setup()
