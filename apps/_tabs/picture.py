"""Pictures for a prompt, which one sees being drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mm.apps._live import live, toasts
from mm.apps._tabs import common

if TYPE_CHECKING:
    from PIL import Image

    from mm.apps._tabs.shelf import Shelf
    from mm.generation import Event
    from mm.pipelines.text_to_image import TextToImagePipeline

EXAMPLES = ("blue heart, noto", "mushroom, twemoji", "handwritten digit seven")
MOST = 16
"""Pictures drawn at once."""


def tab(shelf: Shelf) -> None:
    import gradio as gr

    able = shelf.makers("picture")
    if not able:
        return common.cannot("draws pictures", "mm-tiny, which comes with the package, does")
    name, known = able[0], shelf.facts[able[0]]
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[0], max_lines=3, autofocus=True)
            start, stop = common.buttons("Draw")
            count = gr.Slider(1, MOST, 4, label="Pictures", **common.WHOLE)
            controls = common.settings(known, known.modalities["picture"])
            shown = gr.Column()
        with gr.Column(scale=3, min_width=300):
            look: dict[str, Any] = {"columns": 2, "height": 680, "format": "png", "elem_classes": "pictures"}
            gallery = gr.Gallery(
                label="Pictures", show_label=False, interactive=False, buttons=["download_all"], **look
            )
            note = gr.Markdown(elem_classes="note")
    run: dict[str, Any] = {
        "fn": lambda *values: (yield from draw(shelf.maker(name, "picture"), *values)),
        "inputs": [prompt, count, *controls],
        "outputs": [gallery, note],
        "show_progress": "minimal",
        **common.TURN,
    }
    common.starts(start, stop, prompt, run, "draw", EXAMPLES, shown)


def draw(
    painter: TextToImagePipeline, prompt: str, count: int, seed: str, *options: Any
) -> Iterator[tuple[list[Image.Image], str]]:
    """The pictures as far as they are drawn, and a line about them. `options`: guidance, temperature, top-p, steps."""
    with toasts():
        prompt = common.words(prompt, "the prompt is empty; say what the picture shows")
        start, used = time.perf_counter(), common.chosen_seed(seed)

        def work(tell: Callable[[Event], None]) -> list[Image.Image]:
            return painter(prompt, num_images=count, seed=used, callback=tell, **common.sampling(*options)).images

        for rows, images in live(work):
            if images is None:
                done = sum(event.done for event in rows) / count
                yield [sketch(painter, event) for event in rows], f"Seed {used}, {done:.0%} drawn"
            else:
                yield images, f"Seed {used}, {time.perf_counter() - start:.1f} s"


def sketch(painter: TextToImagePipeline, event: Event) -> Image.Image:
    """An unfinished picture, white where it has no tokens yet: what a decoder makes of none is a pattern."""
    from PIL import Image

    picture, spec = painter.preview(event.content), painter.tokenizer(painter.picture).spec
    if (
        len(spec.max_grid) != 2 or spec.scales
    ):  # a file, whose decoder leaves the rest empty; or scales, which hold all of it
        return picture
    rows, columns = spec.max_grid
    drawn = b"\xff" * len(event.content)
    mask = Image.frombytes("L", (columns, rows), drawn.ljust(rows * columns, b"\0")).resize(picture.size, 0)
    return Image.composite(picture, Image.new(picture.mode, picture.size, "white"), mask)
