"""The demo: unfinished pictures, then the pipelines' results; mistakes in words; a real server on this machine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from mm import hub, plugins
from mm.apps import _live, demo
from mm.apps._live import live
from mm.cli import main
from mm.generation import Event
from mm.interfaces import Sampling
from mm.model import MultimodalModel
from mm.orders.masked import Masked
from mm.pipelines.image_to_text import ImageToTextPipeline
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.testing import tiny

if TYPE_CHECKING:
    from gradio import Blocks

SETTINGS = (2.0, 1.0, 0)  # guidance, temperature, steps


@pytest.fixture(scope="module")
def gr() -> Any:
    """Gradio, imported by the first test that needs it: that takes seconds, and every worker reads this file."""
    import gradio

    return gradio


@pytest.fixture(scope="module")
def painter() -> TextToImagePipeline:
    return TextToImagePipeline(tiny(), {"image": Sampling(temperature=0.5, guidance=3.0)})


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_live, "INTERVAL", 0.0)


def sliders(app: Blocks) -> dict[str, Any]:
    found: list[Any] = [block for block in app.blocks.values() if type(block).__name__ == "Slider"]
    return {block.label: block for block in found}


def ended() -> bool:
    return not any(thread.name == "mm app" for thread in threading.enumerate())


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_fill_in_and_end_as_the_pipelines(painter: TextToImagePipeline, every_step: None) -> None:
    seen = list(demo.draw(painter, "red", 3, " 7", *SETTINGS))
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
    assert len(list(demo.draw(painter, "red", 2, "7", *SETTINGS))) == 1


def test_an_empty_seed_is_random_and_shown(painter: TextToImagePipeline) -> None:
    notes = [list(demo.draw(painter, "red", 1, "", *SETTINGS))[-1] for _ in range(2)]
    first, second = (note.split(",")[0].removeprefix("Seed ") for _, note in notes)
    assert first != second
    again = list(demo.draw(painter, "red", 1, first, *SETTINGS))[-1][0]
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
    ],
)
def test_mistakes_are_toasts(gr: Any, painter: TextToImagePipeline, prompt: str, seed: str, message: str) -> None:
    with pytest.raises(gr.Error, match=f"^'{message}"):
        list(demo.draw(painter, prompt, 1, seed, *SETTINGS))


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


# --- captions ---------------------------------------------------------------------------------------------------------


def test_caption_is_the_pipelines(painter: TextToImagePipeline, tmp_path: Path) -> None:
    reader = ImageToTextPipeline(painter.model, {"text": Sampling(temperature=0.0)})
    picture = demo.example(painter)
    picture.save(tmp_path / "a.png")
    assert demo.caption(reader, str(tmp_path / "a.png")) == reader(picture).texts[0]


def test_pictures_that_are_none(
    gr: Any, painter: TextToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ImageToTextPipeline(painter.model)
    place = tmp_path / "a.png"
    with pytest.raises(gr.Error, match="There is no picture yet"):
        demo.caption(reader, None)
    place.write_text("no picture")
    with pytest.raises(gr.Error, match="The picture is damaged or not a picture") as caught:
        demo.caption(reader, str(place))
    assert str(tmp_path) not in str(caught.value)
    monkeypatch.setattr(demo, "MAX_PIXELS", 15)
    Image.new("RGB", (4, 4)).save(place)
    with pytest.raises(gr.Error, match="The picture is 4×4 = 16 pixels, but at most 15"):
        demo.caption(reader, str(place))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_fields_begin_with_what_the_checkpoint_recommends(painter: TextToImagePipeline) -> None:
    app = demo.build(painter)
    found = sliders(app)
    assert (found["Guidance"].value, found["Temperature"].value) == (3.0, 0.5)
    assert (found["Pictures"].minimum, found["Pictures"].maximum) == (1, 16)
    assert not found["Steps"].visible and found["Steps"].value == 0
    assert not app.analytics_enabled
    masked = sliders(demo.build(TextToImagePipeline(tiny(Masked(steps=3)))))["Steps"]
    assert masked.visible and masked.value == 3


def test_a_model_without_pictures_is_refused(painter: TextToImagePipeline) -> None:
    text = MultimodalModel(painter.model.backbone.config, painter.model.modalities[:1], 64)
    with pytest.raises(ValueError, match="no modality of pictures; it has text"):
        demo.build(TextToImagePipeline(text))


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


def test_it_serves_until_it_is_ended(
    gr: Any, painter: TextToImagePipeline, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    painter.save_pretrained(tmp_path / "mm-tiny")
    monkeypatch.setattr(hub, "SHIPPED", tmp_path)
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda self: None)
    assert main(["app", "--port", str(port)]) == 0
    # among what libraries may say on the same channel
    assert f"The demo is at http://127.0.0.1:{port}/ (Ctrl+C ends it)\n" in capsys.readouterr().err
    socket.create_server(("127.0.0.1", port)).close()  # free again


@pytest.fixture
def address(painter: TextToImagePipeline, port: int, tmp_path: Path, monkeypatch: Any) -> Iterator[str]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "sent"))
    app = demo.build(painter)
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
    assert client.predict(handle_file(files[0]), api_name="/caption") == reader(files[0]).texts[0]

    fake = tmp_path / "fake.png"
    fake.write_text("no picture")
    with pytest.raises(AppError, match="The picture is damaged or not a picture"):
        client.predict(handle_file(fake), api_name="/caption")
    with pytest.raises(AppError, match="Value 17 is greater than maximum value 16"):
        client.predict("red", 17, "7", *SETTINGS, api_name="/draw")
    fake.write_bytes(bytes(11 << 20))
    with pytest.raises(ValueError, match="exceeds the maximum file size"):
        client.predict(handle_file(fake), api_name="/caption")
