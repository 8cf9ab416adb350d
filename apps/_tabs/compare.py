"""One prompt, two models or two settings, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mm.apps._live import live, toasts
from mm.apps._tabs import common, picture, shape, speech, video

if TYPE_CHECKING:
    from gradio.components import Component

    from mm.apps._tabs.shelf import Shelf
    from mm.generation import Event

KINDS = {"picture": "pictures", "sound": "speech", "video": "a video", "shape": "a shape"}
EXAMPLES = {
    "picture": picture.EXAMPLES[0],
    "sound": speech.EXAMPLES[0],
    "video": video.EXAMPLES[0],
    "shape": shape.EXAMPLES[0],
}
PICTURES = 4
"""Pictures of each side."""


def tab(shelf: Shelf) -> None:
    import gradio as gr

    kinds = [medium for medium in KINDS if shelf.makers(medium)]
    if not kinds:
        return common.cannot("makes anything but text")
    first = kinds[0]
    with gr.Row():
        prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[first], max_lines=3, scale=3, min_width=260)
        kind = gr.Dropdown([(KINDS[m], m) for m in kinds], value=first, label="Makes", scale=1, min_width=120)
        seed = gr.Textbox("", label="Seed of both", placeholder="random", max_lines=1, scale=1, min_width=120)
    start, stop = common.buttons("Compare")
    with gr.Row():
        sides = [side(shelf, number, first) for number in (0, 1)]
    controls, outputs = [one for some, _, _ in sides for one in some], [one for _, shown, _ in sides for one in shown]
    views = [view for _, _, view in sides]
    kind.input(
        lambda medium: switched(shelf, medium), kind, [prompt, *controls, *outputs, *views], api_visibility="private"
    )
    running = gr.on(
        [start.click, prompt.submit],
        lambda *values: (yield from compare(shelf, *values)),
        [prompt, kind, seed, *controls],
        outputs,
        api_name="compare",
        show_progress="minimal",
        **common.TURN,
    )
    for _, places, view in sides:
        running.then(**shape.follow(places[list(KINDS).index("shape")], view), api_visibility="private")
    stop.click(None, cancels=[running], api_visibility="private")


def side(shelf: Shelf, number: int, first: str) -> tuple[list[Component], list[Component], Component]:
    """The controls of a side (model, guidance, temperature); where its results appear: one place a kind, and a line; and a viewer
    of shapes."""
    import gradio as gr

    able, letter = shelf.makers(first), "AB"[number]
    name, strength, heat = usual(shelf, first, number)
    with gr.Column(min_width=300):
        model = gr.Dropdown(able, value=name, label=f"Model {letter}")
        with gr.Row():
            guidance = gr.Slider(1, max(8.0, strength), strength, step=0.1, label=f"Guidance {letter}", min_width=120)
            temperature = gr.Slider(0, 2, heat, step=0.05, label=f"Temperature {letter}", min_width=120)
        look: dict[str, Any] = {"format": "png", "elem_classes": "pictures"}
        gallery = gr.Gallery(
            label=f"Pictures {letter}", columns=2, height=380, interactive=False, visible=first == "picture", **look
        )
        heard = gr.Audio(label=f"Speech {letter}", interactive=False, buttons=["download"], visible=first == "sound")
        seen = gr.Video(
            label=f"Clip {letter}",
            autoplay=True,
            loop=True,
            interactive=False,
            visible=first == "video",
            height=380,
            elem_classes="moving",
        )
        view = shape.viewer(f"Shape {letter}", 380, first == "shape")
        mesh = gr.File(label=f"File of {letter}", interactive=False, visible=first == "shape")
        note = gr.Markdown(elem_classes="note")
    return [model, guidance, temperature], [gallery, heard, seen, mesh, note], view


def usual(shelf: Shelf, medium: str, number: int) -> tuple[str, float, float]:
    """Model, guidance and temperature with which a side begins. With one model two settings are compared: as recommended, and
    wilder."""
    able = shelf.makers(medium)
    name = able[min(number, len(able) - 1)]
    known = shelf.facts[name]
    sampling = known.sampling.get(known.modalities[medium])
    heat = (sampling.temperature if sampling else 1.0) + (0.6 if number and len(able) == 1 else 0.0)
    return name, sampling.guidance if sampling else 1.0, min(2.0, round(heat, 2))


def switched(shelf: Shelf, medium: str) -> list[Any]:
    """What changes on the page when another kind is compared."""
    import gradio as gr

    places = [gr.update(value=None, visible=medium == kind) for kind in KINDS]
    controls: list[Any] = []
    for number in (0, 1):
        name, *values = usual(shelf, medium, number)
        controls += [gr.update(choices=shelf.makers(medium), value=name), *values]
    views = [gr.update(value=None, visible=medium == "shape")] * 2
    return [gr.update(placeholder=EXAMPLES[medium]), *controls, *places, "", *places, "", *views]


def compare(shelf: Shelf, prompt: str, medium: str, seed: str, *values: Any) -> Iterator[list[Any]]:
    """The results of A while they are made, then those of B beside them. `values`: model, guidance and temperature of each."""
    with toasts():
        prompt = common.words(prompt, "the prompt is empty; say what is to be made")
        used = common.chosen_seed(seed)
        shown: list[list[Any]] = [blank(), blank()]
        place = list(KINDS).index(medium)
        for number in (0, 1):
            model, guidance, temperature = values[3 * number : 3 * number + 3]
            if model not in shelf.makers(medium):
                raise ValueError(f"{model!r} doesn't make {KINDS[medium]}; choose another model")
            options = {"guidance": guidance, "temperature": temperature}
            for value, line in made(shelf, model, medium, prompt, used, options):
                shown[number][place], shown[number][-1] = value, line
                yield [*shown[0], *shown[1]]


def blank() -> list[Any]:
    return [None] * len(KINDS) + [""]


def made(
    shelf: Shelf, model: str, medium: str, prompt: str, seed: int, options: dict[str, Any]
) -> Iterator[tuple[Any, str]]:
    """What a model makes, as far as it has come, for the place of its kind; and a line about it."""
    from mm.audio import Audio

    pipeline, start = shelf.maker(model, medium), time.perf_counter()
    several: dict[str, Any] = {"num_images": PICTURES} if medium == "picture" else {}

    def work(tell: Callable[[Event], None]) -> Any:
        return pipeline(prompt, seed=seed, callback=tell, **several, **options)

    for rows, out in live(work):
        took = f"Seed {seed}, {time.perf_counter() - start:.1f} s"
        if out is None:
            half = [picture.sketch(pipeline, event) for event in rows] if medium == "picture" else None
            yield half, f"{sum(event.done for event in rows) / max(1, len(rows)):.0%} done"
        elif medium == "picture":
            yield out.images, took
        elif medium == "sound":
            yield (
                common.pcm(Audio(out.audios[0], out.sample_rate)),
                f"{took}, {len(out.audios[0]) / out.sample_rate:.1f} s long",
            )
        elif medium == "video":
            yield video.written(shelf, out.videos[0], out.fps), took
        else:
            yield shape.written(shelf, out.meshes[0]) if len(out.meshes[0].faces) else None, took
