"""Shapes for a prompt, to be turned and looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mm.apps._live import live, toasts
from mm.apps._tabs import common

if TYPE_CHECKING:
    from mm.apps._tabs.shelf import Shelf
    from mm.generation import Event

EXAMPLES = ("a tall table with four legs and a square top", "a short chair with armrests", "a tall mug with one handle")
CAMERA = (35, 70, None)


def tab(shelf: Shelf) -> None:
    import gradio as gr

    from mm.pipelines.media import MODELLERS

    able = shelf.makers("shape")
    if not able:
        return common.cannot("makes shapes", MODELLERS)
    name, known = able[0], shelf.facts[able[0]]
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[0], max_lines=3)
            start, stop = common.buttons("Build")
            controls = common.settings(known, known.modalities["shape"])
            shown = gr.Column()
        with gr.Column(scale=3, min_width=300):
            view = viewer("Shape (drag to turn it)", 460)
            note = gr.Markdown(elem_classes="note")
            file = gr.File(label="Its file", interactive=False)
    run: dict[str, Any] = {
        "fn": lambda *values: (yield from build(shelf.maker(name, "shape"), shelf, *values)),
        "inputs": [prompt, *controls],
        "outputs": [file, note],
        "show_progress": "minimal",
        **common.TURN,
    }
    common.starts(start, stop, prompt, run, "build", EXAMPLES, shown, after=follow(file, view))


def viewer(label: str, height: int, visible: bool = True) -> Any:
    """Where a mesh is turned and looked at."""
    import gradio as gr

    return gr.Model3D(label=label, interactive=False, height=height, camera_position=CAMERA, visible=visible)


def follow(file: Any, view: Any) -> dict[str, Any]:
    """An event after which a viewer shows what is in `file`. Gradio's stays empty where the same value comes twice in a row, as
    everything does at the end of what is streamed: so the file is streamed, and the viewer is told once."""
    return {"fn": lambda path: path, "inputs": file, "outputs": view, "show_progress": "hidden"}


def build(builder: Any, shelf: Shelf, prompt: str, seed: str, *options: Any) -> Iterator[tuple[Any, str]]:
    """A file with the mesh at the end, and a line about it. `options`: guidance, temperature, top-p, steps."""
    import gradio as gr

    with toasts():
        prompt = common.words(prompt, "the prompt is empty; say what the shape is")
        start, used = time.perf_counter(), common.chosen_seed(seed)
        yield None, f"Seed {used}, …"  # nothing of another prompt stays beside what is said about this one

        def work(tell: Callable[[Event], None]) -> Any:
            return builder(prompt, seed=used, callback=tell, **common.sampling(*options))

        for rows, made in live(work):
            if made is None:
                yield gr.skip(), f"Seed {used}, {rows[0].done:.0%} done"
                continue
            mesh, took = made.meshes[0], f"{time.perf_counter() - start:.1f} s"
            if not len(mesh.faces):
                yield None, f"Seed {used}: nothing came of it ({made.reasons[0] or 'an empty shape'}); try another seed"
                continue
            yield written(shelf, mesh), f"Seed {used}, {len(mesh.faces):,} faces, made in {took}"


def written(shelf: Shelf, mesh: Any) -> str:
    """A file with the mesh that browsers show."""
    from mm.shape_files import save_mesh

    place = shelf.place(".glb")
    save_mesh(place, mesh)
    return str(place)
