"""Random-access sources: what they find, how they split, and what they do with broken or hostile files."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.data.example import BrokenExample, Example, Lazy, Source
from mm.data.sources import DIGIT_NAMES, DigitsSource, FolderSource, HFSource, ShardSource
from mm.testing import write_tar


def png(colour: tuple[int, int, int] = (1, 2, 3), size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def sample(stem: str, colour: tuple[int, int, int] = (1, 2, 3), **fields: Any) -> list[tuple[str, bytes]]:
    return [(f"{stem}.png", png(colour)), (f"{stem}.json", json.dumps(fields).encode())]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = [entry for n in range(10) for entry in sample(f"k{n}", (n, 0, 0), caption=f"thing {n}", style="flat")]
    return write_tar(tmp_path / "a.tar", members)


# --- examples -----------------------------------------------------------------------------------------------------


def test_lazy_values_load_once_and_only_when_read() -> None:
    calls: list[str] = []
    example = Example(key="k", image=Lazy(lambda: calls.append("image") or 7))
    assert "image" in example and not calls
    assert example["image"] == 7 and example.get("image") == 7 and dict(example.items())["image"] == 7
    assert calls == ["image"] and example.get("nothing", 3) == 3
    with pytest.raises(ValueError, match="example 'k' has no field 'sound'; it has: image, key"):
        example["sound"]


# --- shards -------------------------------------------------------------------------------------------------------


def test_shard_examples(shard: Path) -> None:
    source = ShardSource(shard, caption="{caption}, {style}")
    assert len(source) == 10 and source.key(3) == "k3"
    example = source[3]
    assert example["text"] == "thing 3, flat" and example["style"] == "flat"
    assert example["image"].mode == "RGB" and example["image"].getpixel((0, 0)) == (3, 0, 0)
    assert source[-1]["key"] == "k9"
    with pytest.raises(IndexError, match="has 10 examples"):
        source[10]


def test_grouping_is_that_of_webdataset(tmp_path: Path) -> None:
    members = [
        ("__skip__/x.png", png()),
        ("a/b.left.png", png((1, 0, 0))),
        ("a/b.Right.PNG", png((2, 0, 0))),
        ("a/b.txt", b" caption \n"),
        ("a/c.json", b'{"n": 1}'),
        ("nodot", b"?"),
        ("a/b.txt", b"again"),
        ("d.tar.gz", b"bytes"),
        ("d.cls", b"5"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    source = ShardSource(path)

    from webdataset.tariterators import tarfile_samples

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its file to the garbage collector
        theirs = list(tarfile_samples([{"url": str(path)}]))
    assert [entry["__key__"] for entry in theirs] == [source.key(n) for n in range(len(source))]
    ours = [{name: dict.get(source[n], name) for name in source[n]} for n in range(len(source))]
    assert ours[0].keys() == {"image", "right.png", "caption", "key", "text"}
    assert source[0]["caption"] == source[0]["text"] == "caption"
    assert source[0]["image"].getpixel((0, 0)) == (1, 0, 0) and source[0]["right.png"].getpixel((0, 0)) == (2, 0, 0)
    assert source[3]["tar.gz"] == theirs[3]["tar.gz"] and source[3]["cls"] == theirs[3]["cls"]


def test_json_never_hides_the_picture(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", sample("a", (9, 0, 0), image="no", key="no", caption="yes"))
    example = ShardSource(path)[0]
    assert example["key"] == "a" and example["image"].getpixel((0, 0)) == (9, 0, 0)


def test_split_by_sorted_unique_key_over_all_shards(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1.tar", [m for key in "dbca" for m in sample(key, caption=key)])
    two = write_tar(tmp_path / "2.tar", [m for key in "eab" for m in sample(key, caption=key)])
    paths = [one, two]
    held = ShardSource(paths, split="holdout", holdout_every=2)
    train = ShardSource(paths, split="train", holdout_every=2)
    # sorted unique keys: a b c d e → a, c, e are held out, in every shard they occur in
    assert [held.key(n) for n in range(len(held))] == ["c", "a", "e", "a"]
    assert [train.key(n) for n in range(len(train))] == ["d", "b", "b"]
    assert sorted([*held.ordinals, *train.ordinals]) == list(range(7)) == list(held.whole().ordinals)
    assert held.identity == train.identity == held.whole().identity
    assert len(ShardSource(paths, split="train", holdout_every=0)) == 7


@pytest.mark.parametrize(("split", "every"), [("test", 2), ("holdout", 0), ("train", -1)])
def test_wrong_split(shard: Path, split: Any, every: int) -> None:
    with pytest.raises(ValueError, match="split|holdout_every"):
        ShardSource(shard, split=split, holdout_every=every)


def test_caption_errors(shard: Path) -> None:
    with pytest.raises(ValueError, match="'k0' has no field 'colour' to make its text of; it has: caption, style"):
        ShardSource(shard, caption="{caption} {colour}")[0]["text"]
    for bad in ("{caption.__class__}", "{caption[0]}", "{}", "{caption"):
        with pytest.raises(ValueError, match="plain field names|not a format string"):
            ShardSource(shard, caption=bad)
    assert ShardSource(shard, caption="a picture")[0]["text"] == "a picture"


def test_text_defaults_and_lists(tmp_path: Path) -> None:
    members = [*sample("a", text="said"), *sample("b", names=["x", "y"], n=7), *sample("c", caption=None)]
    source = ShardSource(write_tar(tmp_path / "x.tar", members))
    assert source[0]["text"] == "said"
    for index in (1, 2):
        with pytest.raises(ValueError, match="has no field 'caption'"):
            source[index]["text"]
    assert ShardSource(tmp_path / "x.tar", caption="{names}: {n:03d}")[1]["text"] == "x, y: 007"


def test_broken_examples_are_skipped_with_one_counted_warning(tmp_path: Path) -> None:
    members = [
        *sample("good", caption="x"),
        ("cut.png", png()[:45]),
        ("cut.json", b"{}"),
        ("nojson.png", png()),
        ("nojson.json", b"{nope"),
        ("list.png", png()),
        ("list.json", b"[1]"),
        *sample("fine", caption="y"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.warns(UserWarning, match="skipped 3 of 5 examples as broken; the first: x.tar: cut.png"):
        keys = [example["key"] for example in ShardSource(path)]
    assert keys == ["good", "fine"]
    with pytest.raises(BrokenExample, match="cut.png: the picture is truncated or damaged"):
        list(ShardSource(path, strict=True))
    with pytest.raises(BrokenExample, match="nojson.json is not valid JSON"):
        ShardSource(path)[2]


def test_a_member_that_occurs_twice_or_is_too_large_spoils_its_example(tmp_path: Path) -> None:
    members = [*sample("a"), ("a.png", png()), *sample("b", caption="b"), ("c.bin", b"x" * 2000), *sample("c")]
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.warns(UserWarning, match="skipped 2 of 3 .*a.png occurs twice"):
        source = ShardSource(path, max_member_bytes=1000)
    assert [source.key(n) for n in range(len(source))] == ["b"]
    with pytest.raises(BrokenExample, match="occurs twice"):
        ShardSource(path, strict=True)


@pytest.mark.parametrize("damage", ["cut in data", "cut in header", "no end", "garbage header", "negative size"])
def test_a_damaged_shard_gives_what_comes_before_the_damage(shard: Path, damage: str) -> None:
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        infos = tar.getmembers()
    place = infos[7]  # the JSON of k3
    if damage == "cut in data":
        data = data[: place.offset_data + 3]
    elif damage == "cut in header":
        data = data[: place.offset + 100]
    elif damage == "no end":
        data = data[: place.offset]
    elif damage == "garbage header":
        data[place.offset : place.offset + 512] = b"\xaa" * 512
    else:
        header = bytearray(infos[7].tobuf())
        header[124:136] = b"\xff" * 12  # size −1 in base 256
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[place.offset : place.offset + 512] = header
    shard.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match=r"skipped 1 of 4 examples as broken; the first: shard a\.tar is damaged"):
        source = ShardSource(shard)
    assert [source.key(n) for n in range(len(source))] == ["k0", "k1", "k2"]
    assert source[2]["text"] == "thing 2"
    with pytest.raises(BrokenExample, match="is damaged"):
        ShardSource(shard, strict=True)


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", sample("a", caption="a"))
    whole = path.read_bytes()
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.XHDTYPE, 1 << 21
    end = whole.rindex(b"}") // 512 * 512 + 512
    path.write_bytes(whole[:end] + info.tobuf() + bytes(1 << 21) + bytes(1024))
    with pytest.raises(ValueError, match="a header of 2,097,152 bytes"):
        ShardSource(path, strict=True)


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nope\.tar' is missing"):
        ShardSource(tmp_path / "nope.tar")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="is compressed, so it has no random access"):
        ShardSource(tmp_path / "x.tar.gz")
    (tmp_path / "text.tar").write_bytes(b"hello " * 200)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="holds no examples .*text.tar is damaged"):
        ShardSource(tmp_path / "text.tar")
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match="shard empty.tar holds no examples"):
        ShardSource(tmp_path / "empty.tar")


def test_a_source_survives_pickling(shard: Path) -> None:
    source = ShardSource(shard)
    assert source[0]["text"] == "thing 0"  # opens the file, which must not travel
    again = pickle.loads(pickle.dumps(source))
    assert again[4]["image"].getpixel((0, 0)) == (4, 0, 0) and again.identity == source.identity


def test_identity_follows_the_content(shard: Path, tmp_path: Path) -> None:
    before = ShardSource(shard).identity
    copy = tmp_path / "elsewhere.tar"
    copy.write_bytes(shard.read_bytes())
    assert ShardSource(copy).identity == before
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"thing 0", b"other 0"))
    assert ShardSource(shard).identity != before


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    (root / "sub" / ".hidden").mkdir(parents=True)
    for n, name in enumerate(("a.png", "b.PNG", "sub/c.png", "sub/.hidden/d.png", ".e.png")):
        (root / name).write_bytes(png((n, 0, 0)))
    (root / "a.txt").write_text("a plain caption\n")
    (root / "b.json").write_text('{"caption": "from json", "style": "flat"}')
    (root / "metadata.jsonl").write_text(
        '{"file_name": "sub/c.png", "text": "from a row", "style": "round"}\n\n'
        '{"file_name": "a.png", "style": "thin"}\n'
    )
    (root / "notes.md").write_text("not a picture")
    return root


def test_folder(folder: Path) -> None:
    source = FolderSource(folder)
    assert [source.key(n) for n in range(len(source))] == ["a", "b", "sub/c"]
    assert [source[n]["text"] for n in range(3)] == ["a plain caption", "from json", "from a row"]
    assert [source[n]["style"] for n in range(3)] == ["thin", "flat", "round"]
    assert [source[n]["image"].getpixel((0, 0))[0] for n in range(3)] == [0, 1, 2]
    assert source.raw_picture(0) == (folder / "a.png").read_bytes()


def test_metadata_in_a_sub_folder_is_relative_to_it(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "c.png", "caption": "near"}\n')
    assert FolderSource(folder)[2]["text"] == "near"


def test_metadata_never_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    rows = ['{"file_name": "../secret.png"}', f'{{"file_name": "{tmp_path}/secret.png"}}', "{broken", '{"caption": 1}']
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n".join(rows))
    (folder / "zlink.png").symlink_to(tmp_path / "secret.png")
    with pytest.warns(UserWarning, match="skipped 4 of 8"):
        source = FolderSource(folder)
    assert source.total == 4
    with pytest.raises(BrokenExample, match=r"'zlink.png' is a link that leads out of the folder"):
        source[3]["image"]
    with pytest.raises(BrokenExample, match="is not valid JSON"):
        FolderSource(folder, strict=True)


def test_folder_errors(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="is missing or not a folder"):
        FolderSource(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder 'empty' holds no examples"):
        FolderSource(tmp_path / "empty")
    source = FolderSource(folder)
    (folder / "a.png").unlink()
    with pytest.raises(BrokenExample, match="'a.png' can't be read: No such file"):
        source[0]["image"]


def test_suffixes_beside_a_picture_match_whatever_their_case(folder: Path) -> None:
    (folder / "c.PNG").write_bytes(png())
    (folder / "c.TXT").write_text("shouted")
    (folder / "c.Json").write_text('{"style": "loud"}')
    example = FolderSource(folder)[2]
    assert (example["key"], example["text"], example["style"]) == ("c", "shouted", "loud")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_a_folder_is_not_read(folder: Path) -> None:
    os.mkfifo(folder / "p.png")
    os.mkfifo(folder / "a.json")
    source = FolderSource(folder)
    with pytest.warns(UserWarning, match="skipped 2 of 4 examples as broken; the first: 'a.json' is not a file"):
        assert [example["key"] for example in source] == ["b", "sub/c"]
    (folder / "metadata.jsonl").unlink()
    os.mkfifo(folder / "metadata.jsonl")
    with pytest.raises(ValueError, match=r"'metadata\.jsonl' is not a file"):
        FolderSource(folder)


def test_links_in_a_circle(folder: Path) -> None:
    (folder / "o.png").symlink_to("o.png")
    with pytest.warns(UserWarning, match="skipped 1 of 4 .*'o.png' is a link that leads in a circle"):
        assert len(list(FolderSource(folder))) == 3
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.jsonl").symlink_to("metadata.jsonl")
    with pytest.raises(ValueError, match="leads in a circle"):
        FolderSource(folder)


# --- Hugging Face datasets ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    root = tmp_path_factory.mktemp("hf")
    rows = {
        "image": [{"bytes": png((n, 0, 0)), "path": None} for n in range(3)],
        "caption": [f"row {n}" for n in range(3)],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(str(root / "plain"))
    keyed = table.add_column("id", ["c", "a", "b"])
    datasets.DatasetDict({"train": keyed, "test": keyed.select([0])}).save_to_disk(str(root / "dict"))
    return root


def test_hf_dataset(saved: Path) -> None:
    source = HFSource(saved / "plain")
    assert len(source) == 3 and source.key(2) == "2"
    assert source[2]["text"] == "row 2" and source[2]["image"].getpixel((0, 0)) == (2, 0, 0)
    assert source.raw_picture(1) == png((1, 0, 0))


def test_hf_rows_must_not_name_files(tmp_path: Path) -> None:
    """save_to_disk embeds pictures, but a stranger's data set may hold bare paths, which datasets would open."""
    import datasets

    (tmp_path / "secret.png").write_bytes(png())
    kind = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]}
    plain = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": kind}))
    plain.save_to_disk(str(tmp_path / "set"))
    info = json.loads((tmp_path / "set" / "dataset_info.json").read_text())
    info["features"]["image"] = {"_type": "Image"}
    (tmp_path / "set" / "dataset_info.json").write_text(json.dumps(info))
    source = HFSource(tmp_path / "set")
    assert source._columns["image"] == ["image"]
    with pytest.raises(BrokenExample, match="row 0, image names a file instead of holding the picture"):
        source[0]["image"]


def test_hf_subsets_and_keys(saved: Path) -> None:
    source = HFSource(saved / "dict", subset="train", split="holdout", holdout_every=2)
    assert len(source) == 2
    assert {source.key(n) for n in range(len(source))} == {"a", "c"}  # sorted a b c, every second
    for subset in (None, "../plain", "validation"):
        with pytest.raises(ValueError, match=r"holds the subsets \['train', 'test'\]"):
            HFSource(saved / "dict", subset=subset)
    with pytest.raises(ValueError, match="leave subset out"):
        HFSource(saved / "plain", subset="train")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", {"_data_files": 5}, "its _data_files are no list"),
        ("state.json", {"_data_files": "x"}, "its _data_files are no list"),
        ("state.json", [5], "needs an object"),
        ("dataset_dict.json", {"splits": 5}, "its splits are no list of names"),
        ("dataset_dict.json", {"splits": [[]]}, "its splits are no list of names"),
    ],
)
def test_hf_settings_that_are_none(tmp_path: Path, file: str, content: object, message: str) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        HFSource(tmp_path, subset="train" if file == "dataset_dict.json" else None)


@pytest.mark.parametrize("file", ["state.json", "dataset_dict.json", "dataset_info.json"])
def test_hf_settings_are_read_within_bounds(tmp_path: Path, file: str) -> None:
    (tmp_path / "state.json").write_text("{}")
    with (tmp_path / file).open("wb") as out:
        out.truncate((1 << 24) + 1)
    with pytest.raises(ValueError, match="is larger than the 16,777,216 bytes"):
        HFSource(tmp_path, subset="train" if file == "dataset_dict.json" else None)


def test_hf_state_must_not_name_files_elsewhere(saved: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(saved / "plain", tmp_path / "evil")
    state = json.loads((tmp_path / "evil" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../plain/data-00000-of-00001.arrow"
    (tmp_path / "evil" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="names '../plain/data-00000-of-00001.arrow', which is not a file beside it"):
        HFSource(tmp_path / "evil")
    with pytest.raises(ValueError, match="it has no state.json"):
        HFSource(tmp_path)


# --- digits -------------------------------------------------------------------------------------------------------


def digits(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_digits(tmp_path: Path) -> None:
    images = np.zeros((12, 28, 28), np.uint8)
    images[7, 0, 0] = 255
    images[7, 27, 27] = 100
    labels = np.arange(12, dtype=np.uint8) % 10
    source = DigitsSource(digits(tmp_path / "d.npz", images=images, labels=labels), split="all")
    example = source[7]
    assert example["text"] == "handwritten digit seven" and example["digit"] == 7 and example["key"] == "07"
    pixels = np.asarray(example["image"])
    assert pixels.shape == (32, 32, 3) and pixels[0, 0].tolist() == [255] * 3
    assert pixels[2, 2].tolist() == [0] * 3 and pixels[29, 29].tolist() == [155] * 3 and (pixels < 255).sum() == 6
    held = DigitsSource(tmp_path / "d.npz", split="holdout", holdout_every=5, caption="{name}!")
    assert list(held.ordinals) == [0, 5, 10] and held[1]["text"] == "five!"
    assert DIGIT_NAMES[int(labels[3])] == "three"


def test_digits_that_do_not_fit(tmp_path: Path) -> None:
    good, labels = np.zeros((3, 28, 28), np.uint8), np.array([1, 2, 3])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"images": good}, "it has no array 'labels'"),
        ({"images": good.astype(float), "labels": labels}, r"expected images uint8\[n, h, w\]"),
        ({"images": good, "labels": labels[:2]}, r"labels int64\[2\]"),
        ({"images": good, "labels": labels * 5}, "has label 10 at row 1"),
        ({"images": np.zeros((3, 40, 40), np.uint8), "labels": labels}, "raise size"),
        ({"images": good, "labels": np.array([object()] * 3)}, "can't be used as an .npz file"),
    ]
    for number, (arrays, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            DigitsSource(digits(tmp_path / f"{number}.npz", **arrays))


def test_npz_files_from_strangers(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "x.npz"
    with pytest.raises(ValueError, match="is missing"):
        DigitsSource(path)
    path.write_bytes(b"PK\3\4 nothing")
    with pytest.raises(ValueError, match="can't be used as an .npz file"):
        DigitsSource(path)
    header = io.BytesIO()
    promise = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 28, 28)}
    np.lib.format.write_array_header_1_0(header, promise)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue() + b"tiny")
    with pytest.raises(ValueError, match="doesn't hold the uint8.* that its header promises"):
        DigitsSource(path)


def test_every_source_class_is_a_source() -> None:
    assert all(issubclass(kind, Source) for kind in (ShardSource, FolderSource, HFSource, DigitsSource))
