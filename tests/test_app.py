"""The demo's page: what the tabs say and make without a browser; a real server on this machine. The browser is in
test_app_browser.py."""

from __future__ import annotations

import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from mm import hub, plugins
from mm.apps import _live, demo
from mm.apps._live import live
from mm.apps._tabs import chat, common, compare, how, picture, reading, shape, speech, video
from mm.apps._tabs.shelf import Shelf
from mm.audio import Audio, load_audio, save_audio
from mm.cli import main
from mm.generation import Event
from mm.interfaces import Sampling
from mm.model import MultimodalModel
from mm.orders.masked import Masked
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.pipelines.image_to_text import ImageToTextPipeline
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.testing import tiny
from mm.video import Video, load_video, save_video

SETTINGS = (2.0, 1.0, 1.0, 0)  # guidance, temperature, top-p, steps


@pytest.fixture(scope="module")
def gr() -> Any:
    """Gradio, imported by the first test that needs it: that takes seconds, and every worker reads this file."""
    import gradio

    return gradio


@pytest.fixture(scope="module")
def painter() -> TextToImagePipeline:
    return TextToImagePipeline(tiny(), {"image": Sampling(temperature=0.5, guidance=3.0)})


@pytest.fixture(scope="module")
def every(everything: MultimodalModel) -> Shelf:
    """A random model of all media."""
    return Shelf({"all": AnyToAnyPipeline(everything)})


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_live, "INTERVAL", 0.0)


def blocks(app: Any, kind: str) -> dict[str, Any]:
    """Components of a kind by their labels; of equal ones the first."""
    found: dict[str, Any] = {}
    for block in app.blocks.values():
        if type(block).__name__ == kind:
            found.setdefault(getattr(block, "label", ""), block)
    return found


def ended() -> bool:
    return not any(thread.name in ("mm app", "mm stream") for thread in threading.enumerate())


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_fill_in_and_end_as_the_pipelines(painter: TextToImagePipeline, every_step: None) -> None:
    seen = list(picture.draw(painter, "red", 3, " 7", *SETTINGS))
    expected = painter("red", num_images=3, seed=7, guidance=2.0, temperature=1.0, steps=0).images
    assert [image.tobytes() for image in seen[-1][0]] == [image.tobytes() for image in expected]
    assert seen[-1][1].startswith("Seed 7, ") and seen[-1][1].endswith(" s")
    assert len(seen) == 1 + 3 * 16, "one look an event, and the result"
    assert seen[23][1] == "Seed 7, 50% drawn"
    half = seen[23][0][0]
    assert half.crop((0, 0, 4, 2)).tobytes() == expected[0].crop((0, 0, 4, 2)).tobytes()
    assert half.crop((0, 2, 4, 4)).tobytes() == b"\xff" * 24, "white where nothing is drawn yet"


def test_looks_are_rationed(painter: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_live, "INTERVAL", 60.0)
    assert len(list(picture.draw(painter, "red", 2, "7", *SETTINGS))) == 1


def test_an_empty_seed_is_random_and_shown(painter: TextToImagePipeline) -> None:
    notes = [list(picture.draw(painter, "red", 1, "", *SETTINGS))[-1] for _ in range(2)]
    first, second = (note.split(",")[0].removeprefix("Seed ") for _, note in notes)
    assert first != second
    again = list(picture.draw(painter, "red", 1, first, *SETTINGS))[-1][0]
    assert again[0].tobytes() == notes[0][0][0].tobytes()


@pytest.mark.parametrize(
    ("prompt", "seed", "message"),
    [
        (" ", "", "The prompt is empty; say what the picture shows"),
        ("red", "x", "The seed must be a whole number from 0 to 2\\^63 - 1, or empty"),
        ("red", "-1", "The seed must be a whole number"),
        ("red", "9" * 50, "The seed must be a whole number"),
        ("red", str(1 << 63), "Seed must be a whole number from 0 to 2\\^63 - 1, got 9223372036854775808"),
        ("x" * 400, "", "The prompt takes .* the context holds 256; shorten the prompt"),
        ("x" * 4001, "", "The text has 4,001 characters, and up to 4,000 are read"),
        ("red\0apple", "", "The text has the control character U\\+0000"),
        ("red\x1b[2Japple", "", "The text has the control character U\\+001B"),
        ("red\udc80", "", "The text has the control character U\\+DC80"),
    ],
)
def test_mistakes_are_toasts(gr: Any, painter: TextToImagePipeline, prompt: str, seed: str, message: str) -> None:
    with pytest.raises(gr.Error, match=f"^['\"]{message}"):
        list(picture.draw(painter, prompt, 1, seed, *SETTINGS))


def test_mistakes_of_ours_go_to_the_log(gr: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(gr.Error, match="in the program, not in what you did") as caught:
        with _live.toasts():
            raise KeyError("secret")
    assert "secret" not in str(caught.value) and "KeyError: 'secret'" in caplog.text


def test_work_that_nobody_watches_ends() -> None:
    told = []

    def endless(tell: Callable[[Event], None]) -> None:
        for number in range(1_000_000):
            told.append(number)
            tell(Event(0, "image", torch.zeros(1), 0.0))
            time.sleep(0.001)

    watched = live(endless)
    assert next(watched)[0][0].row == 0 and not ended()
    watched.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended() and len(told) < 100_000


def test_what_the_work_raises_is_raised() -> None:
    def broken(tell: Callable[[Event], None]) -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        list(live(broken))


# --- speech, video, shapes --------------------------------------------------------------------------------------------


def test_speech_comes_in_pieces_and_whole(every: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "PIECE", 0.1)
    speaker = every.maker("all", "sound")
    seen = list(speech.speak(speaker, "one", None, None, 1.0, "3", *SETTINGS))
    rate, whole = seen[-1][1]
    assert all(sound is None for _, sound, _ in seen[:-1]) and len(seen) > 1, "the whole comes last"
    pieces = [load_audio(piece) for piece, _, _ in seen if piece is not None]
    assert {piece.rate for piece in pieces} == {rate} and sum(len(piece.samples) for piece in pieces) == len(whole)
    expected = speaker("one", seed=3, guidance=2.0).audios[0]
    assert np.array_equal(whole, common.pcm(Audio(expected, rate))[1])
    assert seen[-1][2].startswith("Seed 3, ")


def test_mistakes_of_speech(gr: Any, every: Shelf, tmp_path: Path) -> None:
    speaker = every.maker("all", "sound")
    (tmp_path / "a.wav").write_text("no sound")
    for text, voice, recording, message in (
        ("", None, None, "The text is empty; say what is to be spoken"),
        ("x" * 700, None, None, "The text has 700 characters, and up to 600 are spoken at once"),
        ("one", "nobody", None, "There is no voice 'nobody'"),
        ("one", None, str(tmp_path / "a.wav"), "sound .*damaged or"),
    ):
        with pytest.raises(gr.Error, match=message) as caught:
            list(speech.speak(speaker, text, voice, recording, 1.0, "", *SETTINGS))
        assert str(tmp_path) not in str(caught.value)


def test_frames_come_and_then_the_clip(every: Shelf, every_step: None) -> None:
    filmer = every.maker("all", "video")
    seen = list(video.film(filmer, every, True, "a dot", 4, None, "5", *SETTINGS))
    expected = filmer("a dot", num_frames=4, seed=5, guidance=2.0).videos[0]
    assert len(seen) == 5 and all(made is None for _, made, _ in seen[:-1])
    scale = video.SIDE // 16
    for (frame, _, _), wanted in zip(seen, expected, strict=False):
        assert frame is not None and np.array_equal(np.asarray(frame)[::scale, ::scale], wanted)
    file = seen[-1][1]
    assert file is not None
    clip = load_video(file)
    assert clip.frames.shape == (4, video.SIDE, video.SIDE, 3) and clip.fps == 8
    assert Path(file).parent == every.folder


def test_shapes_are_files(every: Shelf, every_step: None) -> None:
    import trimesh

    seen = list(shape.build(every.maker("all", "shape"), every, "a box", "1", *SETTINGS))
    assert len(seen) > 3 and seen[0][0] is None and "% done" in seen[1][1] and "faces, made in" in seen[-1][1]
    mesh: Any = trimesh.load(seen[-1][0], force="mesh")
    assert len(mesh.faces) == int(seen[-1][1].split(" faces")[0].split()[-1].replace(",", ""))


def test_old_files_are_deleted(monkeypatch: pytest.MonkeyPatch, every: Shelf) -> None:
    old = every.place(".x")
    old.touch()
    every.place(".x")
    assert old.exists()
    monkeypatch.setattr("mm.apps._tabs.shelf.KEPT", -1.0)
    every.place(".x")
    assert not old.exists()


# --- reading ----------------------------------------------------------------------------------------------------------


def test_caption_is_the_pipelines(painter: TextToImagePipeline, tmp_path: Path, every_step: None) -> None:
    reader = ImageToTextPipeline(painter.model, {"text": Sampling(temperature=0.0)})
    drawn = painter("red", seed=0).images[0]  # an example of its own is another one each time
    assert reading.example(painter).size == drawn.size
    drawn.save(tmp_path / "a.png")
    seen = list(reading.read(reader, "picture", str(tmp_path / "a.png")))
    assert seen[-1][0] == reader(drawn).texts[0] and len(seen) > 2


def test_recordings_clips_and_shapes_are_read(every: Shelf, tmp_path: Path) -> None:
    import trimesh

    save_audio(tmp_path / "a.wav", Audio(np.sin(np.arange(4000, dtype=np.float32) / 5), 8000))
    save_video(tmp_path / "a.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8.0)
    (tmp_path / "a.glb").write_bytes(trimesh.creation.box().export(file_type="glb"))
    for medium, name in (("sound", "a.wav"), ("video", "a.mp4"), ("shape", "a.glb")):
        reader = every.reader("all", medium)
        text, note = list(reading.read(reader, medium, str(tmp_path / name)))[-1]
        assert isinstance(text, str) and " s" in note, medium


BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0" + bytes(4)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("medium", "data", "message"),
    [
        ("picture", None, "There is no picture yet"),
        ("picture", b"no picture", "The picture is damaged or not a picture"),
        ("picture", SVG, "The picture is damaged or not a picture"),
        ("picture", b"<html><body>hello</body></html>", "The picture is damaged or not a picture"),
        ("picture", BOMB, "pixels, but at most|is damaged|truncated"),
        ("picture", b"", "The picture is an empty file"),
        ("picture", bytes((10 << 20) + 1), "The file has more than 10 MB"),
        ("sound", None, "There is no recording yet"),
        ("sound", SVG, "sound.* is damaged|not a sound"),
        ("video", b"RIFF", "video"),
        ("shape", b"solid \0\0", "mesh"),
    ],
)
def test_uploads_that_are_none(
    gr: Any, every: Shelf, tmp_path: Path, medium: str, data: bytes | None, message: str
) -> None:
    place = tmp_path / "a.png"
    if data is not None:
        place.write_bytes(data)
    with pytest.raises(gr.Error, match=message) as caught:
        list(reading.read(every.reader("all", medium), medium, None if data is None else str(place)))
    assert str(tmp_path) not in str(caught.value) and "Traceback" not in str(caught.value)


def test_large_pictures_and_long_sounds(gr: Any, every: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MAX_PIXELS", 15)
    monkeypatch.setattr(common, "MAX_SECONDS", 0.1)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    save_audio(tmp_path / "a.wav", Audio(np.zeros(8000, np.float32), 8000))
    with pytest.raises(gr.Error, match="The picture is 4×4 = 16 pixels, but at most 15"):
        list(reading.read(every.reader("all", "picture"), "picture", str(tmp_path / "a.png")))
    with pytest.raises(gr.Error, match="1.00? s"):
        list(reading.read(every.reader("all", "sound"), "sound", str(tmp_path / "a.wav")))


# --- chat and comparison ----------------------------------------------------------------------------------------------


def answers(shelf: Shelf, message: Any, wanted: str, talk: Any = None, whole: bool = False) -> tuple[Any, Any]:
    seen = list(chat.reply(shelf, message, talk or chat.Talk(), wanted, whole))
    return seen[-1][0], seen[-1][1]


def test_a_conversation_of_all_media(gr: Any, every: Shelf, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    save_audio(tmp_path / "a.wav", Audio(np.sin(np.arange(4000, dtype=np.float32) / 5), 8000))
    talk = chat.Talk()
    for wanted, kind in (("a picture", Image.Image), ("speech", Audio), ("a video", Video), ("text", str)):
        messages, talk = answers(every, {"text": "red", "files": []}, wanted, talk)
        assert all(isinstance(part, kind) for part in talk.said[-1][1]), wanted
    assert [role for role, _ in talk.said] == ["user", "assistant"] * 4
    message = {"text": "and this", "files": [str(tmp_path / "a.png")]}
    messages, talk = answers(every, message, "a picture", talk)
    assert [type(part).__name__ for part in talk.said[-2][1]] == ["Image", "str"]
    assert isinstance(talk.said[-1][1][0], Image.Image)
    _, talk = answers(every, {"text": "", "files": [str(tmp_path / "a.wav")]}, chat.AUTOMATIC)
    assert all(isinstance(part, str) for part in talk.said[-1][1]), "the words of a recording"
    _, talk = answers(every, {"text": "a box", "files": []}, "a shape")
    assert chat.kind_of(talk.said[-1][1][0]) == "shape"
    trimesh.creation.box((0.5, 0.4, 0.3)).export(tmp_path / "a.obj")
    messages, talk = answers(every, {"text": "", "files": [str(tmp_path / "a.obj")]}, "text")
    assert isinstance(talk.said[0][1][0], trimesh.Trimesh) and isinstance(messages[0]["content"], gr.Model3D)
    assert all(isinstance(part, str) for part in talk.said[-1][1]), "what the shape is"


def test_a_shape_of_the_conversation_is_none_of_pictures(every: Shelf, painter: TextToImagePipeline) -> None:
    """Where earlier messages count, models that know pictures alone were chosen to read it."""
    from mm.shapes import Shape

    assert chat.kind_of(solid := Shape(np.ones((8, 8, 8), bool))) == "shape"
    both = Shelf({"pictures": painter, "all": every.open("all", AnyToAnyPipeline)})
    given = {chat.kind_of(part) for part in ("a box", solid)} - {"text"}
    assert chat.choose(both, given, "picture") == "all"


def test_mistakes_in_a_conversation(gr: Any, every: Shelf, painter: TextToImagePipeline, tmp_path: Path) -> None:
    save_audio(tmp_path / "a.wav", Audio(np.zeros(400, np.float32), 8000))
    (tmp_path / "a.svg").write_bytes(SVG)
    pictures = Shelf({"pictures": painter})
    (tmp_path / "a.stl").write_bytes(b"solid of nothing")
    heard, drawn, solid = str(tmp_path / "a.wav"), str(tmp_path / "a.svg"), str(tmp_path / "a.stl")
    for shelf, message, wanted, expected in (
        (every, None, "text", "The message is empty"),
        (every, {"text": " ", "files": []}, "text", "The message is empty"),
        (every, {"text": "\0", "files": []}, "text", "control character"),
        (every, {"text": "", "files": [drawn]}, "text", "The picture is damaged or not a picture"),
        (every, {"text": "", "files": [solid]}, "text", "The mesh is damaged or can't be used as a mesh"),
        (every, {"text": "", "files": [heard] * 5}, "text", "Got 5 files, and a message takes up to 4"),
        (pictures, {"text": "", "files": [heard]}, "text", "No model at hand reads sounds"),
        (pictures, {"text": "", "files": [heard]}, "a picture", "No model at hand reads sounds and makes pictures"),
    ):
        with pytest.raises(gr.Error, match=expected):
            answers(shelf, message, wanted)


def test_two_sides_with_one_seed(every: Shelf, every_step: None) -> None:
    seen = list(compare.compare(every, "red", "picture", "3", "all", 1.0, 1.0, "all", 1.0, 0.0))
    expected = [
        every.maker("all", "picture")("red", num_images=4, seed=3, guidance=1.0, temperature=t).images
        for t in (1.0, 0.0)
    ]
    places = len(compare.KINDS) + 1
    for number, images in enumerate(expected):
        assert [i.tobytes() for i in seen[-1][places * number]] == [i.tobytes() for i in images]
        assert seen[-1][places * number + places - 1].startswith("Seed 3, ")
    for medium, place in (("sound", 1), ("video", 2), ("shape", 3)):
        last = list(compare.compare(every, "red", medium, "3", "all", 1.0, 1.0, "all", 1.0, 0.5))[-1]
        assert last[place] is not None and last[places + place] is not None and last[0] is None


def test_another_kind_begins_with_its_own_settings(every: Shelf) -> None:
    """Sliders stayed at what is recommended for pictures."""
    changes = compare.switched(every, "shape")
    known = every.facts["all"]
    recommended = known.sampling.get(known.modalities["shape"])
    heat = recommended.temperature if recommended else 1.0
    assert changes[3] == heat and changes[6] == min(2.0, heat + 0.6), "with one model, two settings"
    assert [change["visible"] for change in changes[-2:]] == [True, True]


def test_only_models_of_the_app_are_compared(gr: Any, every: Shelf) -> None:
    with pytest.raises(gr.Error, match="'owner/name' doesn't make pictures; choose another model"):
        list(compare.compare(every, "red", "picture", "", "owner/name", 1.0, 1.0, "all", 1.0, 1.0))


# --- how it works -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(how.TEXTBOOK))
def test_textbook_streams(every: Shelf, name: str) -> None:
    page = how.shown(every, f"textbook/{name}", "hi")
    assert how.TEXTBOOK[name][0] in page and page.count("<svg") == 1
    copies = "noisy copies" in page
    assert copies == (name == "blocks") and ("<b>?</b>" in page) == (name in ("masked", "scales"))


def test_streams_of_models(every: Shelf) -> None:
    for medium in ("picture", "sound", "video", "shape"):
        page = how.shown(every, f"{medium}/all", "<b>&")
        assert 'title="position 1: text &lt;' in page and "<b>&lt;</b>" in page, medium


def test_the_matrix_is_the_rule() -> None:
    import re

    from mm.apps._tabs import strip
    from mm.attention import dense
    from mm.testing import stream

    given = stream([0, 1, 2, 2, 2, 2, 3], copy=[0, 0, 0, 0, 1, 1, 0])
    cells = [strip.Cell("text", "x", int(o), int(c), 0.0, -1) for o, c in zip(given.order, given.copy, strict=True)]
    drawn = torch.zeros(7, 7, dtype=torch.bool)
    for x, y, width in re.findall(r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="1" ', strip.matrix(given, cells)):
        if int(x) >= 2:
            drawn[int(y) - 2, int(x) - 2 : int(x) - 2 + int(width)] = True
    assert torch.equal(drawn, dense(given))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_fields_begin_with_what_the_checkpoint_recommends(painter: TextToImagePipeline) -> None:
    app = demo.build(Shelf({"a": painter}))
    found = blocks(app, "Slider")
    assert (found["Guidance"].value, found["Temperature"].value, found["Top-p"].value) == (3.0, 0.5, 1.0)
    assert (found["Pictures"].minimum, found["Pictures"].maximum) == (1, 16)
    assert not found["Steps"].visible and found["Steps"].value == 0
    assert not app.analytics_enabled
    masked = demo.build(Shelf({"a": TextToImagePipeline(tiny(Masked(steps=3)))}))
    steps = blocks(masked, "Slider")["Steps"]
    assert steps.visible and steps.value == 3


def test_stop_ends_whatever_its_tab_started(every: Shelf) -> None:
    config = demo.build(every).config
    events = {event["id"]: event for event in config["dependencies"]}
    ended = [set(event["cancels"]) for event in events.values() if event["cancels"]]
    assert len(ended) == sum(one["props"].get("value") == "Stop" for one in config["components"]) == 6
    assert sorted(map(len, ended)) == [1, 1, 2, 2, 2, 2], "the button and the prompt; and the examples"
    names = {events[number]["api_name"] for one in ended for number in one} - {None, False}
    assert {"draw", "speak", "film", "build", "chat", "compare"} <= names


def test_every_control_has_a_label(every: Shelf) -> None:
    app: Any = demo.build(every)
    inputs = ("Textbox", "Slider", "Dropdown", "Checkbox", "Radio", "Image", "Audio", "Video", "MultimodalTextbox")
    assert all(b.label for b in app.blocks.values() if type(b).__name__ in inputs)
    assert all(b.value for b in app.blocks.values() if type(b).__name__ == "Button")


def sentences(app: Any) -> list[str]:
    return [b.value for b in app.blocks.values() if type(b).__name__ == "Markdown" and b.elem_classes == ["cannot"]]


def test_tabs_that_can_do_nothing_say_so(painter: TextToImagePipeline, every: Shelf) -> None:
    found = sentences(demo.build(Shelf({"a": painter})))
    assert len(found) == 4 and all(text.endswith(".") for text in found)
    for start in ("speaks", "makes video", "makes shapes", "writes down what is said"):
        assert any(text.startswith(f"No model at hand {start}: ") for text in found)
    assert not sentences(demo.build(every))
    text = MultimodalModel(painter.model.backbone.config, painter.model.modalities[:1], 64)
    found = sentences(demo.build(Shelf({"words": AnyToAnyPipeline(text)})))
    assert any(text.startswith("No model at hand draws pictures") for text in found)
    assert any(text.startswith("No model at hand makes anything but text") for text in found)


def test_usual_models_are_loaded_when_they_are_needed() -> None:
    shelf = Shelf()
    assert {"mm-tiny", "mm-pictures"} <= set(shelf.names) and all(map(shelf.loads, shelf.names))
    for medium in ("picture", "sound", "video", "shape"):
        assert shelf.makers(medium)[0] == "mm-tiny"
    known, pipeline = shelf.facts["mm-pictures"], shelf.maker("mm-pictures", "picture")
    assert known.voices == pipeline.model.voices == () and "sound" not in known.reads
    assert not shelf.loads("mm-pictures") and shelf.loads("mm-tiny")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "demo" in plugins.available("apps") and plugins.load("apps", "demo") is demo.main
    with pytest.raises(SystemExit, match="0"):
        main(["app", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--model", "--host", "--port", "(default: 127.0.0.1)"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        assert main(["app", "--port", str(taken)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"mm app: can't listen on 127.0.0.1:{taken}: ") and message.count("\n") == 1
    assert "already in use; choose another --port or --host" in message
    assert main(["app", "--port", "70000"]) == 2
    assert "--port must be from 1 to 65535, got 70000" in capsys.readouterr().err
    assert main(["app", "--port", str(taken), "--model", "x", "x"]) == 2
    assert "--model names a model twice" in capsys.readouterr().err


def test_it_serves_until_it_is_ended(
    gr: Any, painter: TextToImagePipeline, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    painter.save_pretrained(tmp_path / "mm-tiny")
    painter.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(hub, "SHIPPED", tmp_path)
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda self: None)
    for more in ([], ["--model", "mm-tiny", str(tmp_path / "other")]):
        assert main(["app", "--port", str(port), *more]) == 0
        # among what libraries may say on the same channel
        assert f"The demo is at http://127.0.0.1:{port}/ (Ctrl+C ends it)\n" in capsys.readouterr().err
        socket.create_server(("127.0.0.1", port)).close()  # free again


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps what visitors send."""
    return tmp_path_factory.mktemp("sent")


@pytest.fixture(scope="module")
def address(painter: TextToImagePipeline, sent: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(sent))
        app = demo.build(Shelf({"a": painter}))
        yield demo.launch(app, "127.0.0.1", port)
        app.close(verbose=False)


def test_over_http(painter: TextToImagePipeline, address: str, tmp_path: Path, every_step: None) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False, download_files=str(tmp_path / "got"))
    job = client.submit("red", 2, "7", *SETTINGS, api_name="/draw")
    pictures, note = job.result(timeout=60)
    expected = painter("red", num_images=2, seed=7, guidance=2.0, temperature=1.0).images
    files = [Path(picture["image"]) for picture in pictures]
    assert [Image.open(file).convert("RGB").tobytes() for file in files] == [image.tobytes() for image in expected]
    assert note.startswith("Seed 7, ") and any(" drawn" in note for _, note in job.outputs())

    reader = ImageToTextPipeline(painter.model, painter.recommended)
    assert client.predict(handle_file(files[0]), api_name="/caption")[0] == reader(files[0]).texts[0]
    shown = client.predict("textbook/raster", "hi", api_name="/stream")
    assert "<svg" in shown

    fake = tmp_path / "fake.png"
    fake.write_text("no picture")
    with pytest.raises(AppError, match="The picture is damaged or not a picture"):
        client.predict(handle_file(fake), api_name="/caption")
    with pytest.raises(AppError, match="Value 17 is greater than maximum value 16"):
        client.predict("red", 17, "7", *SETTINGS, api_name="/draw")
    fake.write_bytes(bytes(11 << 20))
    with pytest.raises(ValueError, match="exceeds the maximum file size"):
        client.predict(handle_file(fake), api_name="/caption")


def test_names_lead_nowhere(address: str, sent: Path, tmp_path: Path) -> None:
    """File names of uploads are no paths, and files outside the app's folder aren't read."""
    import httpx

    secret = tmp_path / "secret.txt"
    secret.write_text("nobody's business")
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    given = httpx.post(
        f"{address}gradio_api/upload", files={"files": ("../../../../evil.png", picture.getvalue(), "image/png")}
    )
    assert given.status_code == 200
    (stored,) = (Path(path) for path in given.json())
    assert stored.is_relative_to(sent) and stored.name == "evil.png"
    for path in (secret, "/etc/passwd", f"{sent}/../{tmp_path.name}/secret.txt"):
        got = httpx.get(f"{address}gradio_api/file={path}")
        assert got.status_code in (403, 404) and "business" not in got.text
        data = {"data": [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]}
        asked = httpx.post(f"{address}gradio_api/call/caption", json=data)
        if asked.status_code == 200:
            said = httpx.get(f"{address}gradio_api/call/caption/{asked.json()['event_id']}", timeout=60).text
            assert "event: error" in said and "Traceback" not in said and "event: complete" not in said
