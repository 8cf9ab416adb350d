"""Captions of pictures, clips and shapes, and the words of recordings, which one sees being written."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mm.apps._live import live, toasts
from mm.apps._tabs import common
from mm.apps._tabs.picture import EXAMPLES

if TYPE_CHECKING:
    from PIL import Image

    from mm.apps._tabs.shelf import Shelf
    from mm.generation import Event
    from mm.pipelines.text_to_image import TextToImagePipeline

TITLES = {
    "picture": "Caption a picture",
    "sound": "Transcribe a recording",
    "video": "Caption a clip",
    "shape": "Name a shape",
}
EMPTY = {
    "picture": "there is no picture yet; put one in, or draw an example",
    "sound": "there is no recording yet; record something, or put a file in",
    "video": "there is no clip yet; put one in",
    "shape": "there is no shape yet; put one in",
}


def tab(shelf: Shelf) -> None:
    import gradio as gr

    from mm.pipelines.media import SPEAKERS

    with gr.Row():
        for medium in ("picture", "sound", "video", "shape"):
            able = shelf.readers(medium)
            if not able and medium in ("video", "shape"):
                continue
            with gr.Column(min_width=300):
                gr.Markdown(f"### {TITLES[medium]}")
                if able:
                    section(shelf, able[0], medium)
                elif medium == "sound":
                    common.cannot("writes down what is said", SPEAKERS)
                else:
                    common.cannot("captions pictures", "mm-tiny, which comes with the package, does")


def section(shelf: Shelf, name: str, medium: str) -> None:
    """One kind of thing to read: where it goes in, a button, its words."""
    import gradio as gr

    if medium == "picture":
        look: dict[str, Any] = {"height": 300, "format": "png", "elem_classes": "pictures"}
        given = common.as_path(gr.Image(label="Picture", sources=["upload", "clipboard"], **look))
    elif medium == "sound":
        given = common.as_path(gr.Audio(label="Recording", sources=["microphone", "upload"]))
    elif medium == "video":
        given = common.as_path(gr.Video(label="Clip", sources=["upload"], height=300))
    else:
        given = common.as_path(gr.Model3D(label="Shape", height=300))
    with gr.Row():
        own = gr.Button("Draw an example") if medium == "picture" and shelf.makers("picture") else None
        start = gr.Button("Transcribe" if medium == "sound" else "Caption", variant="primary")
    text = gr.Textbox(label="Words" if medium == "sound" else "Caption", interactive=False, buttons=["copy"], lines=2)
    note = gr.Markdown(elem_classes="note")
    run: dict[str, Any] = {
        "fn": lambda path: (yield from read(shelf.reader(name, medium), medium, path)),
        "inputs": given,
        "outputs": [text, note],
        "show_progress": "minimal",
        **common.TURN,
    }
    api = {"picture": "caption", "sound": "transcribe", "video": "caption_video", "shape": "caption_shape"}[medium]
    start.click(api_name=api, **run)
    if own is not None:
        painter = shelf.makers("picture")[0]
        drawn = own.click(
            lambda: example(shelf.maker(painter, "picture")), None, given, api_visibility="private", **common.TURN
        )
        drawn.then(api_visibility="private", **run)


def read(reader: Any, medium: str, path: str | None) -> Iterator[tuple[str, str]]:
    """The words as far as they are written, and a line about them, of what is in an uploaded file."""
    with toasts():
        loaded = opened(reader, medium, path)
        start = time.perf_counter()

        def work(tell: Callable[[Event], None]) -> str:
            return reader(loaded, callback=tell).texts[0]

        for rows, text in live(work):
            if text is None:
                tokens = [reader.wrap(reader.text, event.content, (len(event.content),)) for event in rows]
                yield " ".join(part.strip() for part in reader.decode(tokens)), "reading …"
            else:
                yield (
                    text,
                    f"{time.perf_counter() - start:.1f} s" + ("" if text.strip() else "; nothing was found in it"),
                )


def opened(reader: Any, medium: str, path: str | None) -> Any:
    """What is in an uploaded file, by our own loaders."""
    if medium == "picture":
        return common.picture(path, EMPTY[medium])
    if medium == "sound":
        return common.sound(path, EMPTY[medium])
    if medium == "video":
        return common.clip(path, EMPTY[medium], reader.tokenizer(reader.video).spec.fps)
    from mm.shape_files import load_mesh

    return common.uploaded(path, load_mesh, EMPTY[medium])


def example(painter: TextToImagePipeline) -> Image.Image:
    """A picture by the model itself, to try captions with."""
    with toasts():
        return painter(random.choice(EXAMPLES)).images[0]
