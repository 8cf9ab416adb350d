"""The demo in a browser: pictures that one sees being drawn, and captions of pictures."""

from __future__ import annotations

import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from mm.apps._live import live, toasts
from mm.commands.common import choose_threads, parser

if TYPE_CHECKING:
    from gradio import Blocks
    from PIL import Image

    from mm.generation import Event
    from mm.pipelines.base import Pipeline
    from mm.pipelines.image_to_text import ImageToTextPipeline
    from mm.pipelines.text_to_image import TextToImagePipeline

EXAMPLES = ("red apple, noto", "red apple, twemoji", "handwritten digit seven")
MOST = 16
"""Pictures drawn at once."""
WAITING = 16
"""Events that may wait for the model; whoever comes next is told to try again."""
MAX_UPLOAD = "10mb"
MAX_PIXELS = 1 << 24
"""Largest width × height of an uploaded picture (4096 × 4096)."""
# Small pictures are enlarged, each pixel to a square: a blur would hide what the model drew.
CSS = ".pictures img { image-rendering: pixelated; object-fit: contain !important; }"
CSS += ".pictures .grid-wrap { overflow-y: auto; }"
# The model takes one event at a time, whichever tab it comes from: two at once would only slow each other down.
TURN: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


def arguments(argv: list[str]) -> Namespace:
    command = parser(
        "app", "Serve the demo to a browser: pictures for a prompt, captions for pictures. Ctrl+C ends it."
    )
    add = command.add_argument
    add("--model", default="mm-tiny", help="a shipped checkpoint, a folder, or owner/name on the hub")
    add("--host", default="127.0.0.1", help="address to listen on: 127.0.0.1 = this machine only, 0.0.0.0 = all")
    add("--port", type=int, default=7860, help="port to listen on")
    return command.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit status; raises `ValueError` for what can't be done."""
    args = arguments(argv)
    check_address(args.host, args.port)  # before the seconds that loading takes
    from mm.pipelines.text_to_image import TextToImagePipeline

    pipeline = TextToImagePipeline.from_pretrained(args.model)
    choose_threads(pipeline.model)
    app = build(pipeline, args.model)
    print(f"The demo is at {launch(app, args.host, args.port)} (Ctrl+C ends it)", file=sys.stderr, flush=True)
    try:
        app.block_thread()
    finally:
        app.close(verbose=False)
    return 0


def check_address(host: str, port: int) -> None:
    """Refuse what can't be listened on, and say why. Gradio says only that it found no port."""
    import socket

    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be from 1 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (")[0].lower()
        raise ValueError(f"can't listen on {host}:{port}: {reason}; choose another --port or --host") from error


def launch(app: Blocks, host: str, port: int) -> str:
    """Serve the app without waiting for its end; returns its address."""
    serve = partial(app.launch, server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, css=CSS)
    # What environment variables could switch on, or would leave this machine, is off.
    serve = partial(serve, share=False, ssr_mode=False, run_history=False, enable_monitoring=False)
    _, address, _ = serve(max_file_size=MAX_UPLOAD, footer_links=["api", "settings"])
    return address


def build(pipeline: Pipeline, name: str = "mm") -> Blocks:
    """The app around a loaded model, which all visitors share. Raises `ValueError` for a model without pictures.

    Args:
        pipeline: any pipeline of the model.
        name: what the model is called on the page.
    """
    import gradio as gr

    from mm.pipelines.image_to_text import ImageToTextPipeline
    from mm.pipelines.text_to_image import TextToImagePipeline

    painter = TextToImagePipeline(pipeline.model, pipeline.recommended)
    reader = ImageToTextPipeline(pipeline.model, pipeline.recommended)
    # Every look at an unfinished picture is a file; those older than an hour are deleted.
    with gr.Blocks(analytics_enabled=False, title=f"mm · {name}", delete_cache=(600, 3600)) as app:
        gr.Markdown(f"# mm\nOne decoder, one token stream, every modality. Model: `{name}`")
        with gr.Tab("Picture"):
            picture_tab(painter)
        with gr.Tab("Caption"):
            caption_tab(reader, painter)
    return app.queue(max_size=WAITING)


def picture_tab(painter: TextToImagePipeline) -> None:
    import gradio as gr

    usual = painter.sampling(painter.picture, {})
    order = painter.model.modalities[painter.model.vocabulary.index[painter.picture]].order
    rounds, strong, hot = usual.steps or order.default_steps, max(8, usual.guidance), max(2, usual.temperature)
    whole: dict[str, Any] = {"step": 1, "precision": 0}
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[0])
            gr.Examples([[text] for text in EXAMPLES], prompt, label="For example", cache_examples=False)
            count = gr.Slider(1, MOST, 4, label="Pictures", **whole)
            # Text: a field for numbers that is left empty would say 0.
            seed = gr.Textbox("", label="Seed", placeholder="random")
            with gr.Row():
                guidance = gr.Slider(1, strong, usual.guidance, step=0.1, label="Guidance", info="1 = off")
                temperature = gr.Slider(
                    0, hot, usual.temperature, step=0.05, label="Temperature", info="0 = the likeliest"
                )
            # Hidden, not left out, where the order has none: one handler serves all.
            shown = order.default_steps > 0
            steps = gr.Slider(min(1, rounds), max(64, rounds), rounds, label="Steps", visible=shown, **whole)
            start = gr.Button("Draw", variant="primary")
        with gr.Column():
            look: dict[str, Any] = {"columns": 4, "height": 500, "format": "png", "elem_classes": "pictures"}
            gallery = gr.Gallery(
                label="Pictures", show_label=False, interactive=False, buttons=["download_all"], **look
            )
            note = gr.Markdown()
    gr.on(
        [start.click, prompt.submit],
        partial(draw, painter),
        [prompt, count, seed, guidance, temperature, steps],
        [gallery, note],
        api_name="draw",
        show_progress="minimal",
        **TURN,
    )


def caption_tab(reader: ImageToTextPipeline, painter: TextToImagePipeline) -> None:
    import gradio as gr

    with gr.Row():
        with gr.Column():
            look: dict[str, Any] = {"height": 360, "format": "png", "elem_classes": "pictures"}
            picture = gr.Image(label="Picture", sources=["upload", "clipboard"], **look)
            # Gradio would open the file here; our own loader bounds what it decodes and says what is wrong with it.
            picture.preprocess = lambda file: None if file is None else file.path  # type: ignore[assignment]
            with gr.Row():
                own = gr.Button("Draw an example")
                start = gr.Button("Caption", variant="primary")
        with gr.Column():
            text = gr.Textbox(label="Caption", interactive=False, buttons=["copy"])
    read: dict[str, Any] = {"fn": partial(caption, reader), "inputs": picture, "outputs": text, **TURN}
    start.click(**read, api_name="caption")
    drawn = own.click(partial(example, painter), None, picture, api_visibility="private", **TURN)
    drawn.then(**read, api_visibility="private")


def draw(
    painter: TextToImagePipeline, prompt: str, count: int, seed: str, guidance: float, temperature: float, steps: int
) -> Iterator[tuple[list[Image.Image], str]]:
    """The pictures as far as they are drawn, and a line about them."""
    from mm.pipelines.base import choose_seed

    with toasts():
        if not prompt.strip():
            raise ValueError("the prompt is empty; say what the picture shows")
        if seed.strip() and not (seed.strip().isdecimal() and len(seed) < 20):
            raise ValueError("the seed must be a whole number from 0 to 2^63 - 1, or empty for a random one")
        start, used = time.perf_counter(), choose_seed(int(seed) if seed.strip() else None, None)

        def work(tell: Callable[[Event], None]) -> list[Image.Image]:
            sampling: Any = {"guidance": guidance, "temperature": temperature, "steps": steps}
            return painter(prompt, num_images=count, seed=used, callback=tell, **sampling).images

        for rows, images in live(work):
            if images is None:
                done = sum(event.done for event in rows) / count
                yield [sketch(painter, event) for event in rows], f"Seed {used}, {done:.0%} drawn"
            else:
                yield images, f"Seed {used}, {time.perf_counter() - start:.1f} s"


def sketch(painter: TextToImagePipeline, event: Event) -> Image.Image:
    """An unfinished picture, white where it has no tokens yet: what a decoder makes of none is a pattern."""
    from PIL import Image

    picture, grid = painter.preview(event.content), painter.model.vocabulary[painter.picture].max_grid
    if not grid:  # a file, whose decoder leaves the rest empty
        return picture
    rows, columns = grid
    drawn = b"\xff" * len(event.content)
    mask = Image.frombytes("L", (columns, rows), drawn.ljust(rows * columns, b"\0")).resize(picture.size, 0)
    return Image.composite(picture, Image.new(picture.mode, picture.size, "white"), mask)


def caption(reader: ImageToTextPipeline, picture: str | None) -> str:
    """The caption of the picture in a file."""
    from mm.media import load_image

    with toasts():
        if picture is None:
            raise ValueError("there is no picture yet; put one in, or draw an example")
        with open(picture, "rb") as file:  # messages name a path, and the server's paths are nobody's business
            loaded = load_image(file, max_pixels=MAX_PIXELS)
        return reader(loaded).texts[0]


def example(painter: TextToImagePipeline) -> Image.Image:
    """A picture by the model itself, to try captions with."""
    return painter(random.choice(EXAMPLES)).images[0]
