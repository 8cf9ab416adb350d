"""The demo in a real browser without a window (Debian's chromium, driven by Playwright): every tab, at the width of a telephone,
with the keyboard alone, mistakes; and clips that `mm generate` writes, which must play there."""

from __future__ import annotations

import base64
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm.apps import demo
from mm.apps._tabs.shelf import Shelf
from mm.audio import Audio, save_audio
from mm.backbone import BackboneConfig
from mm.cli import main
from mm.heads.lm import LMHead
from mm.hub import save_pretrained
from mm.interfaces import Modality
from mm.model import MultimodalModel
from mm.orders.raster import Raster
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.tokenizers.text_bytes import TextBytes
from mm.tokenizers.video_frames import VideoFrames

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TABS = ("Picture", "Speech", "Video", "3D", "Caption / Transcribe", "Chat", "Compare", "How it works")
PATIENCE = 120_000
"""Milliseconds that an answer may take on a machine with other work."""
MISTAKE = "[data-testid='toast-body']"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(everything: MultimodalModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("sent")))
        app = demo.build(Shelf({"all": AnyToAnyPipeline(everything)}))
        yield demo.launch(app, "127.0.0.1", port)
        app.close(verbose=False)


class Visit:
    """A visitor's page."""

    def __init__(self, chromium: Any, address: str, width: int) -> None:
        self.page = chromium.new_page(viewport={"width": width, "height": 844})
        self.page.set_default_timeout(PATIENCE)
        self.elsewhere: list[str] = []
        self.page.on("request", self._asked)
        self.page.goto(address)
        self.page.get_by_role("tab", name="Picture").wait_for()

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            self.elsewhere.append(request.url)

    def tab(self, name: str) -> Any:
        """Go to a tab, also through the menu of those for which there is no room; returns its panel."""
        entry = self.page.get_by_role("tab", name=name, exact=True)
        if not entry.is_visible():
            self.page.locator(".overflow-menu > button").click()
            entry = self.page.locator(".overflow-dropdown button", has_text=name)
        entry.click()
        panel = self.page.locator("[role='tabpanel']:visible")
        panel.wait_for()
        return panel

    def toasts(self) -> list[str]:
        return self.page.locator(MISTAKE).all_inner_texts()

    def fits(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.fixture
def visit(chromium: Any, address: str) -> Iterator[Any]:
    visits: list[Visit] = []

    def open_page(width: int = 1200) -> Visit:
        visits.append(Visit(chromium, address, width))
        return visits[-1]

    yield open_page
    for one in visits:
        one.page.close()


@pytest.mark.long
def test_every_tab_makes_something(visit: Any, tmp_path: Path) -> None:
    v = visit()
    panel = v.tab("Picture")
    panel.get_by_text("blue heart, noto", exact=True).click()
    panel.get_by_text("Seed").last.wait_for()
    panel.locator(".pictures img").nth(3).wait_for()

    panel = v.tab("Speech")
    panel.get_by_label("Text", exact=True).fill("one")
    panel.get_by_role("button", name="Speak").click()
    panel.get_by_text("s of sound").wait_for()

    panel = v.tab("Video")
    panel.get_by_label("Prompt").fill("a dot moves")
    panel.get_by_role("button", name="Film").click()
    panel.get_by_text("frames at 8 a second").wait_for()
    v.page.wait_for_function("[...document.querySelectorAll('.moving video')].some(v => v.readyState >= 2)")

    panel = v.tab("3D")
    panel.get_by_label("Prompt").fill("a box")
    panel.get_by_role("button", name="Build").click()
    panel.get_by_text("faces, made in").wait_for()
    panel.locator("a[download$='.glb']").first.wait_for(state="attached")
    panel.locator("canvas").wait_for()

    panel = v.tab("Caption / Transcribe")
    panel.get_by_text("Draw an example").click()
    panel.get_by_text(" s", exact=False).last.wait_for()
    panel.locator(".pictures img").wait_for()

    panel = v.tab("Chat")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    save_audio(tmp_path / "a.wav", Audio(np.sin(np.arange(4000, dtype=np.float32) / 5), 8000))
    with v.page.expect_file_chooser() as chosen:
        panel.get_by_label("Upload a file").or_(panel.get_by_test_id("upload-button")).first.click()
    chosen.value.set_files([tmp_path / "a.png", tmp_path / "a.wav"])
    panel.get_by_label("Answer with").click()
    v.page.get_by_role("option", name="a picture").click()
    field = panel.get_by_placeholder("blue heart, noto")
    field.fill("another")
    field.press("Enter")
    panel.locator(".bot img, .bot-row img").first.wait_for()
    assert panel.locator(".user img, .user-row img").count() >= 1

    panel = v.tab("Compare")
    panel.get_by_label("Prompt").fill("red")
    panel.get_by_label("Prompt").press("Enter")
    panel.locator(".pictures img").nth(7).wait_for()

    panel = v.tab("How it works")
    panel.locator(".matrix svg").wait_for()
    panel.get_by_label("Whose stream").click()
    v.page.get_by_role("option", name="Textbook: blocks").click()
    panel.get_by_text("noisy copies").wait_for()
    assert not v.toasts() and not v.elsewhere, "neither mistakes nor requests to other machines"


@pytest.mark.long
def test_on_a_telephone(visit: Any) -> None:
    v = visit(390)
    for name in TABS:
        v.tab(name)
        assert v.fits(), f"{name} is wider than the screen"
    panel = v.tab("Picture")
    panel.get_by_label("Prompt").fill("red")
    panel.get_by_role("button", name="Draw").click()
    panel.locator(".pictures img").nth(3).wait_for()
    assert v.fits() and not v.toasts()


@pytest.mark.long
def test_with_the_keyboard_alone(visit: Any) -> None:
    v = visit()
    press = v.page.keyboard.press

    def focused() -> str:
        return v.page.evaluate("(document.activeElement.innerText || document.activeElement.placeholder || '').trim()")

    def reach(text: str) -> None:
        for _ in range(40):
            if focused() == text:
                return
            press("Tab")
        raise AssertionError(f"the Tab key doesn't lead to {text!r}")

    v.page.get_by_label("Prompt").locator("visible=true").wait_for()
    reach("blue heart, noto")
    v.page.keyboard.type("red")
    press("Enter")
    v.page.locator(".pictures img").nth(3).wait_for()
    reach("Draw")
    for _ in range(60):  # round, to the tabs
        if focused() == "Speech":
            break
        press("Shift+Tab")
    press("Enter")
    reach("three five one seven")
    v.page.keyboard.type("one")
    press("Enter")
    v.page.get_by_text("s of sound").wait_for()
    assert not v.toasts()


@pytest.mark.long
def test_mistakes_are_said_in_words(visit: Any, tmp_path: Path) -> None:
    v = visit()
    v.tab("Picture").get_by_role("button", name="Draw").click()
    v.page.get_by_text("The prompt is empty; say what the picture shows").wait_for()
    (tmp_path / "a.png").write_bytes(
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>document.title = 1</script></svg>'
    )
    panel = v.tab("Caption / Transcribe")
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "a.png")
    panel.locator(".pictures img").wait_for(state="attached")
    panel.get_by_role("button", name="Caption").first.click()
    v.page.get_by_text("The picture is damaged or not a picture").wait_for()
    said = " ".join(v.toasts())
    assert "Traceback" not in said and str(tmp_path) not in said and v.page.title() == "mm"


@pytest.mark.slow
def test_clips_of_mm_generate_play(chromium: Any, tmp_path: Path) -> None:
    """An MP4 that `mm generate` writes is decoded, and goes on by itself."""
    pytest.importorskip("av", reason="needs FFmpeg: pip install -e '.[video]'")
    torch.manual_seed(0)
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="video", tokenizer=VideoFrames.tiny(), head=LMHead(), order=Raster()),
    ]
    model = MultimodalModel(BackboneConfig(width=32, layers=2, heads=4, kv_heads=2), modalities, context=512)
    save_pretrained(model, tmp_path / "model")
    where = tmp_path / "a.mp4"
    args = ["a dot", "--to", "video", "--model", str(tmp_path / "model"), "--out", str(where), "--seed", "0"]
    assert main(["generate", *args]) == 0
    data = base64.b64encode(where.read_bytes()).decode()
    page = chromium.new_page()
    page.set_content(f'<video muted autoplay loop src="data:video/mp4;base64,{data}"></video>')
    page.wait_for_function("document.querySelector('video').readyState >= 2", timeout=PATIENCE)
    page.wait_for_function("document.querySelector('video').currentTime > 0.1", timeout=PATIENCE)
    assert page.evaluate("document.querySelector('video').error") is None
    assert page.evaluate("document.querySelector('video').videoWidth") == 256
    page.close()
