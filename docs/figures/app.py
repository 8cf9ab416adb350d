"""Pictures of the app's tabs, by Debian's chromium without a window (pip install playwright):

python docs/figures/app.py --out docs
"""

from __future__ import annotations

import argparse
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from mm.apps import demo
from mm.apps._tabs.shelf import Shelf

PATIENCE = 300_000
"""Milliseconds."""


def picture(panel: Any, page: Any) -> None:
    panel.get_by_label("Prompt").fill("handwritten digit seven")
    panel.get_by_role("button", name="Draw").click()
    panel.locator(".pictures img").nth(3).wait_for()


def speech(panel: Any, page: Any) -> None:
    panel.get_by_label("Text", exact=True).fill("three five one seven")
    panel.get_by_role("button", name="Speak").click()
    panel.get_by_text("s of sound").wait_for()


def video(panel: Any, page: Any) -> None:
    panel.get_by_label("Prompt").fill("a handwritten seven moves right")
    panel.get_by_role("button", name="Film").click()
    panel.get_by_text("frames at 8 a second").wait_for()


def shape(panel: Any, page: Any) -> None:
    panel.get_by_label("Prompt").fill("a tall mug with one handle")
    panel.get_by_role("button", name="Build").click()
    panel.get_by_text("faces, made in").wait_for()


def chat(panel: Any, page: Any) -> None:
    field = panel.get_by_placeholder("blue heart, noto")
    for text, answer, what in (
        ("mushroom, twemoji", "a picture", "img"),
        ("three five one", "speech", "audio"),
    ):
        panel.get_by_label("Answer with").click()
        page.get_by_role("option", name=answer).click()
        field.fill(text)
        field.press("Enter")
        panel.locator(f":is(.bot, .bot-row) :is({what})").last.wait_for(state="attached")
        time.sleep(4)
    page.evaluate("document.querySelectorAll('.bubble-wrap').forEach(one => one.scrollTop = 60)")


def compare(panel: Any, page: Any) -> None:
    panel.get_by_label("Prompt").fill("handwritten digit seven")
    panel.get_by_label("Seed of both").fill("0")
    panel.get_by_label("Prompt").press("Enter")
    panel.locator(".pictures img").nth(7).wait_for()


def how(panel: Any, page: Any) -> None:
    panel.get_by_label("Whose stream").click()
    page.get_by_role("option", name="Textbook: blocks").click()
    panel.get_by_text("noisy copies").wait_for()


TABS = {
    "picture": ("Picture", picture),
    "speech": ("Speech", speech),
    "video": ("Video", video),
    "shape": ("3D", shape),
    "chat": ("Chat", chat),
    "compare": ("Compare", compare),
    "how": ("How it works", how),
    "phone": ("Picture", picture),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tabs", nargs="+", choices=TABS, default=list(TABS))
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    app = demo.build(Shelf())
    address = demo.launch(app, "127.0.0.1", port)
    options = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        page = browser.new_page(viewport={"width": 1200, "height": 960})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        for file in args.tabs:
            name, act = TABS[file]
            if file == "phone":
                page.set_viewport_size({"width": 390, "height": 844})
                page.goto(address)
                page.get_by_role("tab", name=name).wait_for()
            page.get_by_role("tab", name=name, exact=True).click()
            panel = page.locator("[role='tabpanel']:visible")
            panel.wait_for()
            act(panel, page)
            time.sleep(3)  # what fades in
            page.screenshot(path=args.out / f"app-{file}.png")
        browser.close()
    app.close(verbose=False)


if __name__ == "__main__":
    main()
