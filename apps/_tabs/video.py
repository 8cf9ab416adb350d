"""Clips for a prompt, whose frames one sees as they come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.apps import _live
from mm.apps._tabs import common

if TYPE_CHECKING:
    from PIL import Image

    from mm.apps._tabs.shelf import Shelf
    from mm.pipelines.text_to_video import TextToVideoPipeline
    from mm.video import Frames

EXAMPLES = ("a handwritten seven moves right", "a handwritten three moves up", "a handwritten zero moves left")
SIDE = 256
"""Pixels that small clips are enlarged to about."""


def tab(shelf: Shelf) -> None:
    import gradio as gr

    from mm.pipelines.media import FILMS

    able = shelf.makers("video")
    if not able:
        return common.cannot("makes video", FILMS)
    name, known = able[0], shelf.facts[able[0]]
    most = max(2, known.frames * 4 if known.goes_on else known.frames)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[0], max_lines=3)
            start, stop = common.buttons("Film")
            frames = gr.Slider(2, most, max(2, known.frames), label="Frames", visible=known.frames > 1, **common.WHOLE)
            with gr.Accordion("Begin with a picture", open=False):
                begin = common.as_path(
                    gr.Image(label="First frame", sources=["upload", "clipboard"], height=200, elem_classes="pictures")
                )
            controls = common.settings(known, known.modalities["video"])
            shown = gr.Column()
        with gr.Column(scale=3, min_width=300):
            look: dict[str, Any] = {"height": 420, "format": "png", "elem_classes": "pictures"}
            latest = gr.Image(label="Frames as they come", interactive=False, visible=False, buttons=[], **look)
            video = gr.Video(
                label="Clip",
                interactive=False,
                autoplay=True,
                loop=True,
                height=420,
                elem_classes="moving",
                buttons=["download"],
            )
            note = gr.Markdown(elem_classes="note")

    def run_it(*values: Any) -> Iterator[tuple[Any, ...]]:
        for frame, made, line in film(shelf.maker(name, "video"), shelf, known.frames > 1, *values):
            coming = frame is not None
            yield gr.update(value=frame, visible=coming), gr.update(value=made, visible=not coming), line

    run: dict[str, Any] = {
        "fn": run_it,
        "inputs": [prompt, frames, begin, *controls],
        "outputs": [latest, video, note],
        "show_progress": "minimal",
        **common.TURN,
    }
    common.starts(start, stop, prompt, run, "film", EXAMPLES, shown)


def film(
    filmer: TextToVideoPipeline,
    shelf: Shelf,
    counted: bool,
    prompt: str,
    frames: int,
    begin: str | None,
    seed: str,
    *options: Any,
) -> Iterator[tuple[Image.Image | None, str | None, str]]:
    """The latest frame, the clip at the end, and a line about it. `counted`: the model is told how many frames; `options`:
    guidance, temperature, top-p, steps."""
    with _live.toasts():
        prompt = common.words(prompt, "the prompt is empty; say what the video shows")
        given = common.picture(begin, "") if begin else None
        start, used, due = time.perf_counter(), common.chosen_seed(seed), 0.0
        stream = filmer.stream(
            prompt, num_frames=frames if counted else None, image=given, seed=used, **common.sampling(*options)
        )
        pieces: list[Frames] = []
        for piece in stream:
            for number, frame in enumerate(piece, 1 + sum(map(len, pieces))):
                if time.perf_counter() >= due:
                    due = time.perf_counter() + _live.INTERVAL
                    yield enlarged(frame), None, f"Seed {used}, {number} frames so far"
            pieces.append(piece)
        whole = np.concatenate(pieces)
        fps = filmer.tokenizer(filmer.video).spec.fps
        took = f"{time.perf_counter() - start:.1f} s"
        yield None, written(shelf, whole, fps), f"Seed {used}, {len(whole)} frames at {fps:g} a second, made in {took}"


def enlarged(frame: np.ndarray[Any, Any]) -> Image.Image:
    """A frame as a picture, each pixel a square."""
    from PIL import Image

    scale = max(1, SIDE // max(frame.shape[:2]))
    return Image.fromarray(frame).resize((frame.shape[1] * scale, frame.shape[0] * scale), Image.Resampling.NEAREST)


def written(shelf: Shelf, frames: Frames, fps: float) -> str:
    """A file with the clip that browsers play."""
    from mm.pipelines.outputs import video_endings
    from mm.video import save_video

    place = shelf.place(video_endings()[0])
    save_video(place, frames, fps, scale=max(1, SIDE // max(frames.shape[1:3])))
    return str(place)
