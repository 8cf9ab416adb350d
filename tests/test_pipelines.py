"""Pipelines with tiny real models: shapes of results, what a seed means, files, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mm
from mm.generation import Event
from mm.interfaces import Encoded, Sampling
from mm.layout import Segment
from mm.media import load_image
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.pipelines.image_to_text import ImageToTextPipeline
from mm.pipelines.outputs import AnyOutput, ImageOutput, TextOutput, numbered
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.sheet import grid
from mm.testing import tiny


@pytest.fixture(params=["raster", "masked"])
def painter(request: pytest.FixtureRequest) -> TextToImagePipeline:
    return TextToImagePipeline(tiny(Raster() if request.param == "raster" else Masked(steps=3)))


def ids(output: ImageOutput | TextOutput) -> list[list[int]]:
    return [t.ids.tolist() for t in output.tokens if t.ids is not None]


def colours(seed: int, side: int = 4) -> Image.Image:
    """A picture that the tokenizer of the tiny model keeps exactly."""
    values = torch.randint(0, 2, (side, side, 3), generator=torch.Generator().manual_seed(seed)) * 255
    return Image.fromarray(values.to(torch.uint8).numpy())


def test_lazy_names() -> None:
    assert mm.TextToImagePipeline is TextToImagePipeline
    assert mm.ImageToTextPipeline is ImageToTextPipeline
    assert mm.AnyToAnyPipeline is AnyToAnyPipeline


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta", "mps:7", "", None, 1.5])
def test_a_device_that_is_not_there(device: str) -> None:
    for move in (TextToImagePipeline(tiny()).to, lambda d: TextToImagePipeline.from_pretrained("no_such", d)):
        with pytest.raises(ValueError, match=r"device .*; use cpu") as caught:
            move(device)
        assert "\n" not in str(caught.value)


def test_counts_and_kinds(painter: TextToImagePipeline) -> None:
    out = painter(["red", "blue"], num_images=3, seed=0)
    assert isinstance(out, ImageOutput) and len(out.images) == len(out.tokens) == 6
    assert out.prompts == ["red"] * 3 + ["blue"] * 3 and out.seed == 0
    assert {(image.size, image.mode) for image in out.images} == {((4, 4), "RGB")}
    assert len({tuple(row) for row in ids(out)}) == 6


def test_a_seed_means_the_same_in_any_batch(painter: TextToImagePipeline) -> None:
    many = ids(painter(["red", "blue", "red"], num_images=2, seed=5))
    assert many[2:4] == ids(painter("blue", num_images=2, seed=5))
    assert many[:2] + many[4:] == ids(painter("red", num_images=4, seed=5)), "equal prompts give different pictures"
    painter.batch_size = 2
    assert ids(painter(["red", "blue", "red"], num_images=2, seed=5)) == many
    assert ids(painter("blue", num_images=2, seed=6)) != many[2:4]


def test_generators(painter: TextToImagePipeline) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = painter("red", generator=generator), painter("red", generator=generator)
    assert first.seed != second.seed
    assert ids(painter("red", generator=torch.Generator().manual_seed(1))) == ids(first)
    assert ids(painter("red", seed=second.seed)) == ids(second)
    torch.manual_seed(3)
    third = painter("red")
    torch.manual_seed(3)
    assert ids(painter("red")) == ids(third)
    with pytest.raises(ValueError, match="both seed and generator"):
        painter("red", seed=1, generator=generator)
    for wrong in (-1, 1.5, True, 1 << 63):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            painter("red", seed=wrong)  # type: ignore[arg-type]


def test_the_steps_make_the_call(painter: TextToImagePipeline) -> None:
    whole = painter("red", num_images=2, seed=4, temperature=0.7)
    prompts = painter.encode(["red"])
    tokens = painter.generate(prompts, num_images=2, seed=4, sampling=Sampling(temperature=0.7))
    assert [t.ids.tolist() for t in tokens if t.ids is not None] == ids(whole)
    assert [image.tobytes() for image in painter.decode(tokens)] == [image.tobytes() for image in whole.images]


def test_sampling_options(painter: TextToImagePipeline) -> None:
    greedy = ids(painter("red", num_images=2, seed=0, temperature=0.0))
    if isinstance(painter.model.modalities[1].order, Raster):
        assert greedy[0] == greedy[1]
    assert ids(painter("red", seed=0, guidance=4.0)) != ids(painter("red", seed=0))
    assert ids(painter("red", seed=0, top_k=1)) != ids(painter("red", seed=0))
    with pytest.raises(ValueError, match="top_p must be in"):
        painter("red", top_p=0.0)
    with pytest.raises(ValueError, match="unknown option 'heat'; options of sampling are temperature, top_k, top_p"):
        painter("red", heat=1)  # type: ignore[call-arg]


def test_a_checkpoint_brings_its_sampling(painter: TextToImagePipeline, tmp_path: Path) -> None:
    painter.recommended = {"image": Sampling(guidance=3.0, temperature=0.5)}
    folder = painter.save_pretrained(tmp_path / "m", card="# Card\n")
    again = TextToImagePipeline.from_pretrained(folder)
    assert again.recommended == painter.recommended
    assert ids(again("red", seed=1)) == ids(painter("red", seed=1, guidance=3.0, temperature=0.5))
    assert ids(again("red", seed=1, guidance=1.0)) != ids(again("red", seed=1))
    assert ids(ImageToTextPipeline.from_pretrained(folder)(colours(0), seed=1))


def test_unconditional_and_empty_prompts(painter: TextToImagePipeline) -> None:
    out = painter(None, num_images=2, seed=0)
    assert out.prompts == ["", ""] and ids(out) != ids(painter("red", num_images=2, seed=0))
    for empty in ("", "  \n"):
        with pytest.raises(ValueError, match="the prompt is empty"):
            painter(empty)
    with pytest.raises(ValueError, match="the context holds 256; shorten the prompt"):
        painter("x" * 300)
    with pytest.raises(ValueError, match="got a int for a text"):
        painter([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="num_images must be at least 1"):
        painter("red", num_images=0)
    assert painter([], seed=0).images == []


def test_callback_and_preview(painter: TextToImagePipeline) -> None:
    painter.batch_size = 2
    events: list[Event] = []
    out = painter("red", num_images=3, seed=0, callback=events.append)
    assert {event.row for event in events} == {0, 1, 2}
    for row in range(3):
        done = [event.done for event in events if event.row == row]
        assert done == sorted(done) and len(done) > 1
    early, last = [event for event in events if event.row == 2][:: len(done) - 1]
    assert painter.preview(early.content).size == (4, 4)
    assert last.done == 1.0 and painter.preview(last.content).tobytes() == out.images[2].tobytes()


def test_inpainting_keeps_what_is_given() -> None:
    painter = TextToImagePipeline(tiny(Masked(steps=4)))
    picture, mask = colours(1), Image.new("L", (4, 4), 0)
    mask.paste(255, (0, 0, 2, 3))
    out = painter("red", num_images=5, image=picture, mask=mask, seed=0)
    changed = set()
    for image in out.images:
        for y in range(4):
            for x in range(4):
                if image.getpixel((x, y)) != picture.getpixel((x, y)):
                    changed.add((x, y))
    assert changed == {(x, y) for x in range(2) for y in range(3)}


def test_completion_with_raster_order() -> None:
    painter = TextToImagePipeline(tiny(Raster()))
    picture, lower, left = colours(2), Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 0)
    lower.paste(255, (0, 2, 4, 4))
    left.paste(255, (0, 0, 2, 4))
    out = painter("red", image=picture, mask=lower, seed=0)
    assert out.images[0].crop((0, 0, 4, 2)).tobytes() == picture.crop((0, 0, 4, 2)).tobytes()
    assert out.images[0].tobytes() != picture.tobytes()
    with pytest.raises(ValueError, match="the masked order fills in between"):
        painter("red", image=picture, mask=left)
    with pytest.raises(ValueError, match="give both or neither"):
        painter("red", image=picture)
    with pytest.raises(ValueError, match=r"the mask has \(3, 4\) pixels, the picture \(4, 4\)"):
        painter("red", image=picture, mask=Image.new("L", (3, 4)))


def test_masks_of_other_shapes() -> None:
    painter = TextToImagePipeline(tiny(Masked(steps=2)))
    wide, stroke = Image.new("RGB", (40, 20), "red"), Image.new("L", (40, 20), 0)
    stroke.putpixel((39, 0), 255)  # one pixel, and the picture stands in rows 10 to 29 of a 40×40 square
    content, given = painter.known(wide, stroke)
    assert content.view(4, 4).tolist() == [[7] * 4, [4] * 4, [4] * 4, [7] * 4]
    assert (~given).nonzero().tolist() == [[7]], "second row, last column"
    content, given = painter.known(Image.new("RGB", (1, 1), "blue"), Image.new("L", (1, 1), 255))
    assert len(content) == len(given) and not given.any()


def test_captions() -> None:
    reader = ImageToTextPipeline(tiny())
    one = reader(colours(0), max_tokens=12)
    assert isinstance(one, TextOutput) and len(one.texts) == 1 and isinstance(one.texts[0], str)
    assert len(one.tokens[0]) <= 12 and reader(colours(0), max_tokens=10**9).texts, "the context is the limit"
    assert reader(colours(0), max_tokens=12, seed=9).texts == one.texts, "greedy by default"
    two = reader([colours(0), colours(1)], max_tokens=12)
    assert two.texts[0] == one.texts[0] and len(two.texts) == 2
    several = reader(colours(0), num_texts=3, temperature=1.0, seed=0, max_tokens=12)
    assert len(set(several.texts)) > 1
    assert reader([], seed=0).texts == []
    prompted = reader.encode([colours(0)], "a ")[0]
    assert [segment.modality for segment in prompted] == ["image", "text"]
    assert reader(colours(0), prompt="a ", max_tokens=12).texts != one.texts
    with pytest.raises(ValueError, match="temperature 0 gives equal texts"):
        reader(colours(0), num_texts=2)
    with pytest.raises(ValueError, match="without guidance"):
        reader(colours(0), guidance=2.0)
    with pytest.raises(ValueError, match="missing"):
        reader("nothing.png")
    with pytest.raises(ValueError, match="got a int for a picture"):
        reader([3])  # type: ignore[list-item]


def test_paths_are_pictures(tmp_path: Path) -> None:
    colours(0).save(tmp_path / "a.png")
    reader = ImageToTextPipeline(tiny())
    expected = reader(colours(0), max_tokens=8).texts
    assert reader(str(tmp_path / "a.png"), max_tokens=8).texts == expected
    assert reader([tmp_path / "a.png"], max_tokens=8).texts == expected


def test_bytes_and_open_files_are_one_picture_each(tmp_path: Path) -> None:
    colours(0).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    reader, pipeline = ImageToTextPipeline(tiny()), AnyToAnyPipeline(tiny())
    expected = reader(colours(0), max_tokens=8).texts
    for given in (data, bytearray(data), memoryview(data), [data], [data, tmp_path / "a.png"]):
        assert reader(given, max_tokens=8).texts[0] == expected[0]  # type: ignore[arg-type]
    with (tmp_path / "a.png").open("rb") as file:
        assert reader(file, max_tokens=8).texts == expected
    documents = pipeline(["a", colours(0)], to="image", max_tokens=8, seed=1).documents
    again = pipeline(["a", data], to=["image"], max_tokens=8, seed=1).documents
    assert [p if isinstance(p, str) else p.tobytes() for p in again[0]] == [
        p if isinstance(p, str) else p.tobytes() for p in documents[0]
    ]
    assert len(pipeline(data, max_tokens=2, seed=1).documents) == 1
    with (tmp_path / "a.png").open("rb") as file:
        assert len(pipeline(file, max_tokens=2, seed=1).documents) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": 5}, "got a int for a prompt; give a string, None, or a list of them"),
        ({"prompt": Path("a")}, "got a .*Path for a prompt"),
        ({"prompt": b"red"}, "got a bytes for a prompt"),
        ({"prompt": {"red": 1}}, "got a dict for a prompt"),
        ({"prompt": ["red", Path("a")]}, "got a .*Path for a text; give a string"),
        ({"num_images": "2"}, "num_images must be a whole number, got '2'"),
        ({"num_images": 1.5}, "num_images must be a whole number, got 1.5"),
        ({"num_images": True}, "num_images must be a whole number, got True"),
        ({"num_images": None}, "num_images must be a whole number, got None"),
        ({"num_images": 10**9}, "num_images is 1,000,000,000, and one call makes up to 100,000; ask for fewer"),
        ({"prompt": ["a"] * 11, "num_images": 10_000}, "num_images is 10,000 for each of 11, and one call makes"),
        ({"generator": 5}, "generator must be a torch.Generator, got a int; or give a seed"),
        ({"seed": "3"}, "seed must be a whole number from 0 to .*, got '3'"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"guidance": None}, "guidance must be a finite number, got None"),
    ],
)
def test_wrong_types_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextToImagePipeline(tiny())(**{"prompt": "red", **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"image": None},
            "got a NoneType for a picture or clip; give a path, .*, a PIL picture, mm.Video, an array, or a list of them",
        ),
        ({"image": 3}, "got a int for a picture"),
        ({"image": [None]}, "got a NoneType for a picture"),
        ({"max_tokens": None}, "max_tokens must be a whole number, got None"),
        ({"num_texts": "2"}, "num_texts must be a whole number, got '2'"),
        ({"num_texts": 10**9, "temperature": 1.0}, "num_texts is 1,000,000,000, and one call makes up to"),
        ({"heat": 1}, "unknown option 'heat'"),
    ],
)
def test_wrong_types_for_texts_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageToTextPipeline(tiny())(**{"image": colours(0), **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"document": None}, "got a NoneType for a picture"),
        ({"document": ["a", 5]}, "got a int for a picture"),
        ({"to": None}, "got a NoneType for `to`; give the name of a modality, or a list of them"),
        ({"to": [["image"]]}, "got a list for a modality of `to`"),
        ({"to": "sound"}, "no modality 'sound'"),
        ({"max_tokens": None}, "max_tokens must be a whole number, got None"),
        ({"sampling": 3}, "got a int for sampling; give a mapping from modality to Sampling"),
        ({"sampling": {"image": 3}}, "got a int for the sampling of 'image'; give a Sampling"),
    ],
)
def test_wrong_types_for_documents_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnyToAnyPipeline(tiny())(**{"document": "a", **wrong})


def test_whole_numbers_of_numpy() -> None:
    painter = TextToImagePipeline(tiny(), batch_size=np.int64(2))  # type: ignore[arg-type]
    out = painter("red", seed=np.int64(3), num_images=np.int32(2))  # type: ignore[arg-type]
    assert ids(out) == ids(painter("red", seed=3, num_images=2)) and type(out.seed) is int
    with pytest.raises(ValueError, match="batch_size must be a whole number, got '4'"):
        TextToImagePipeline(painter.model, batch_size="4")  # type: ignore[arg-type]


def test_large_pictures_are_not_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mm.pipelines import base

    reader, sizes = ImageToTextPipeline(tiny()), []
    tokenizer = reader.tokenizer("image")
    original, loaded = tokenizer.encode_batch, []

    def encode(raws: list[Image.Image]) -> list[Encoded]:
        sizes.append((len(loaded), len(raws)))
        return original(raws)

    monkeypatch.setattr(tokenizer, "encode_batch", encode)
    monkeypatch.setattr(base, "load_image", lambda picture: loaded.append(picture) or load_image(picture))
    monkeypatch.setattr(base, "AT_ONCE", 40)
    pictures = [colours(n) for n in range(7)]  # of 16 pixels
    segments = reader.encode_pictures(pictures)
    assert sizes == [(3, 3), (6, 3), (7, 1)], "three reach the limit, and none is loaded before they are encoded"
    assert [s.content.ids.tolist() for s in segments] == [tokenizer.encode(p).ids.tolist() for p in pictures]


def test_any_to_any(tmp_path: Path) -> None:
    colours(0).save(tmp_path / "a.png")
    pipeline = AnyToAnyPipeline(tiny())
    out = pipeline(["first", tmp_path / "a.png", "then"], to=["image"], max_tokens=40, seed=2)
    assert isinstance(out, AnyOutput) and len(out.documents) == 1
    assert isinstance(out.documents[0][0], Image.Image)
    assert len(out.texts) + len(out.images) == len(out.documents[0])
    assert pipeline(["first", colours(0), "then"], to=["image"], max_tokens=40, seed=2).texts == out.texts
    batch = pipeline([["first", colours(0), "then"], ["other"]], to=["image"], max_tokens=40, seed=2)
    assert [str(part) for part in batch.documents[0] if isinstance(part, str)] == out.texts
    written = pipeline("hello", free=False, max_tokens=20, seed=0)
    assert all(isinstance(part, str) for part in written.documents[0])
    for document, message in (([], "document is empty"), ([["a"], []], "document is empty")):
        with pytest.raises(ValueError, match=message):
            pipeline(document)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no modality 'sound' in this model; it has text, image"):
        pipeline("a", to=["sound"])
    with pytest.raises(ValueError, match="no modality 'sound'"):
        pipeline("a", sampling={"sound": Sampling()})
    with pytest.raises(ValueError, match="text is written anyway"):
        pipeline("a", to=["text"])


def test_any_to_any_takes_segments_of_any_modality(tmp_path: Path) -> None:
    """So a modality that has no type of its own here can be given: raw, or encoded."""
    pipeline = AnyToAnyPipeline(tiny())
    plain = pipeline([colours(0), "then"], to="image", max_tokens=40, seed=2)
    encoded = pipeline.tokenizer("image").encode(colours(0))
    for content in (colours(0), encoded):
        same = pipeline([Segment("image", content), "then"], to="image", max_tokens=40, seed=2)
        assert same.texts == plain.texts and [x.tobytes() for x in same.images] == [x.tobytes() for x in plain.images]
    with pytest.raises(ValueError, match="no modality 'series' in this model; it has text, image"):
        pipeline([Segment("series", [1.0, 2.0])])
    with pytest.raises(ValueError, match="a part is a list, which has no file format here"):
        AnyOutput([["a text", [1.0, 2.0]]], 0).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_model_opens_pictures_by_itself() -> None:
    pipeline = AnyToAnyPipeline(tiny(seed=3))
    out = pipeline(["a"], max_tokens=200, seed=0)
    assert out.images, "random weights open a picture within 200 positions for this seed"
    assert not pipeline(["a"], max_tokens=200, seed=0, free=False).images


def test_a_model_without_pictures() -> None:
    from mm.model import MultimodalModel

    model = tiny()
    text = MultimodalModel(model.backbone.config, model.modalities[:1], 64)
    with pytest.raises(ValueError, match="no modality of pictures; it has text"):
        TextToImagePipeline(text)("red")
    out = AnyToAnyPipeline(text)("red", max_tokens=5, seed=0)
    assert out.images == [] and len(out.texts) <= 1


def test_saving(tmp_path: Path) -> None:
    painter = TextToImagePipeline(tiny())
    one, many = painter("red", seed=0), painter("red", num_images=3, seed=0)
    assert one.save(tmp_path / "a.png") == [tmp_path / "a.png"]
    assert load_image(tmp_path / "a.png").tobytes() == one.images[0].tobytes()
    assert [p.name for p in many.save(tmp_path / "b.png")] == ["b-01.png", "b-02.png", "b-03.png"]
    assert [p.name for p in many.save(tmp_path / "new" / "c")] == ["c-01.png", "c-02.png", "c-03.png"]
    assert many.save(str(tmp_path))[0] == tmp_path / "image-01.png"
    assert one.save(tmp_path / "d.webp")[0].read_bytes()[:4] == b"RIFF"
    with pytest.raises(ValueError, match="unknown ending '.exe'"):
        one.save(tmp_path / "e.exe")
    text = TextOutput(["grün"], [], 0)
    assert text.save(tmp_path / "t")[0].read_text(encoding="utf-8") == "grün\n"
    mixed = AnyOutput([["a", one.images[0]], ["b"]], 0)
    assert [p.name for p in mixed.save(tmp_path / "doc")] == ["01-01.txt", "01-02.png", "02-01.txt"]
    with pytest.raises(ValueError, match="saved into a folder"):
        mixed.save(tmp_path / "a.png")
    assert not list(tmp_path.rglob("*.tmp*"))
    assert [p.name for p in numbered("v1.5", 1, "image", (".png",))] == ["v1.5.png"]
    assert numbered("x.png", 100, "image", (".png",))[0].name == "x-001.png"


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        ImageOutput([Image.new("CMYK", (2, 2))], ["x"], [], 0).save(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_sheets() -> None:
    sheet = grid([colours(n) for n in range(5)])
    assert sheet.size == (3 * 8 + 4, 2 * 8 + 4) and sheet.mode == "RGB"
    assert sheet.crop((4, 4, 8, 8)).tobytes() == colours(0).tobytes()
    assert sheet.crop((12, 12, 16, 16)).tobytes() == colours(4).tobytes()
    named = grid([colours(0), Image.new("L", (2, 4))], columns=2, captions=["grün", "a very long caption indeed"])
    assert named.height > 96 and named.width == 2 * 100 + 4
    enlarged = grid([colours(0)], scale=3)
    assert enlarged.crop((4, 4, 16, 16)).tobytes() == colours(0).resize((12, 12), Image.Resampling.NEAREST).tobytes()
    for arguments, message in (
        (([],), "at least one picture"),
        (([colours(0)], None, ["a", "b"]), "2 captions for 1 pictures"),
        (([colours(0)], 0), "at least one column"),
        (([colours(0)], 1, None, 10_000), "at most 16384 a side"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(*arguments)  # type: ignore[arg-type]


def test_callbacks_know_how_many_rows_there_are() -> None:
    events: list[Event] = []
    painter = TextToImagePipeline(tiny(), batch_size=2)
    painter("red", num_images=5, seed=0, callback=events.append)
    assert {event.rows for event in events} == {5} and {event.row for event in events} == set(range(5))
