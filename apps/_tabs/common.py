"""What several tabs need: controls of sampling, checks of what is typed, files that visitors upload, turns at the model."""

from __future__ import annotations

import io
import unicodedata
import wave
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from gradio.components import Component
    from PIL import Image

    from mm.apps._tabs.shelf import Facts
    from mm.audio import Audio

T = TypeVar("T")
TURN: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""The models take one event at a time, whichever tab it comes from: two at once would only slow each other down."""
WHOLE: dict[str, Any] = {"step": 1, "precision": 0}
MOST_LETTERS = 4000
"""Characters of a prompt; the model's context is what usually bounds it."""
MAX_PIXELS = 1 << 24
"""Largest width × height of an uploaded picture (4096 × 4096)."""
MAX_SECONDS = 120.0
"""Longest uploaded sound."""
MAX_FRAMES = 512
"""Frames of the longest uploaded clip, at the model's rate."""
MAX_BYTES = 10 << 20
MAX_UPLOAD = "10mb"


# --- what is typed ----------------------------------------------------------------------------------------------------


def words(text: Any, empty: str) -> str:
    """A prompt as it is given to a model. Raises `ValueError`: `empty` for an empty one; and for what can't be read."""
    text = str(text or "").strip()
    if not text:
        raise ValueError(empty)
    if len(text) > MOST_LETTERS:
        raise ValueError(f"the text has {len(text):,} characters, and up to {MOST_LETTERS:,} are read; shorten it")
    odd = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"), None)
    if odd is not None:
        raise ValueError(
            f"the text has the control character U+{ord(odd):04X}; type it anew, without what can't be seen"
        )
    return text


def chosen_seed(seed: Any) -> int:
    """A seed as typed, or a random one. Raises `ValueError` for what is none."""
    from mm.pipelines.base import choose_seed

    typed = str(seed if seed is not None else "").strip()
    if typed and not (typed.isdecimal() and len(typed) < 20):
        raise ValueError("the seed must be a whole number from 0 to 2^63 - 1, or empty for a random one")
    return choose_seed(int(typed) if typed else None, None)


# --- controls ---------------------------------------------------------------------------------------------------------


def settings(known: Facts, name: str, *, opened: bool = False) -> list[Component]:
    """Seed, guidance, temperature, top-p and steps of a modality, beginning with what the checkpoint recommends, folded away;
    `sampling` takes their values."""
    import gradio as gr

    from mm.interfaces import Sampling

    usual = known.sampling.get(name, Sampling())
    order = known.steps.get(name, 0)
    rounds, strong, hot = usual.steps or order, max(8, usual.guidance), max(2, usual.temperature)
    with gr.Accordion("Settings", open=opened):
        # Text: a field for numbers that is left empty would say 0.
        seed = gr.Textbox("", label="Seed", placeholder="random", max_lines=1)
        guidance = gr.Slider(
            1, strong, usual.guidance, step=0.1, label="Guidance", info="strength of the prompt; 1 = off"
        )
        temperature = gr.Slider(0, hot, usual.temperature, step=0.05, label="Temperature", info="0 = the likeliest")
        top_p = gr.Slider(0.05, 1, usual.top_p, step=0.05, label="Top-p", info="share of the likeliest; 1 = all")
        # Hidden, not left out, where the order has none: one handler serves all.
        steps = gr.Slider(min(1, rounds), max(64, rounds), rounds, label="Steps", visible=order > 0, **WHOLE)
    return [seed, guidance, temperature, top_p, steps]


def sampling(guidance: float, temperature: float, top_p: float, steps: int) -> dict[str, Any]:
    """The values of `settings`, without the seed, as options of a pipeline."""
    return {"guidance": guidance, "temperature": temperature, "top_p": top_p, "steps": steps}


def buttons(label: str) -> tuple[Any, Any]:
    """One that starts, and one that stops what was started."""
    import gradio as gr

    with gr.Row():
        start = gr.Button(label, variant="primary", scale=3, min_width=140)
        stop = gr.Button("Stop", scale=1, min_width=80)
    return start, stop


def starts(
    start: Any,
    stop: Any,
    prompt: Any,
    run: dict[str, Any],
    name: str,
    texts: Iterable[str],
    place: Any,
    after: dict[str, Any] | None = None,
) -> None:
    """The button, or Enter in the prompt, starts; so does an example, when it is chosen; Stop ends any of them, and what has come
    stays. `run`: keywords of the event; `name`: of the endpoint; `place`: where the examples `texts` are shown; `after`: keywords
    of an event that follows."""
    import gradio as gr

    running = [gr.on([start.click, prompt.submit], api_name=name, **run)]
    with place:
        shown = gr.Examples([[text] for text in texts], prompt, label="For example", cache_examples=False)
    running.append(shown.load_input_event.then(**(run | {"api_name": None, "api_visibility": "private"})))
    if after is not None:
        for event in running:
            event.then(**after, api_visibility="private")
    stop.click(None, cancels=running, api_visibility="private")


def cannot(what: str, instead: str = "") -> None:
    """Where a tab can do nothing: one sentence."""
    import gradio as gr

    more = f": {instead}" if instead else ""
    gr.Markdown(f"No model at hand {what}{more}.", elem_classes="cannot")


# --- files ------------------------------------------------------------------------------------------------------------


def as_path(component: Any) -> Any:
    """Gradio would open an uploaded file here; our own loaders bound what they decode and say what is wrong with it."""
    component.preprocess = lambda file: None if file is None else file.path
    return component


def uploaded(path: str | None, load: Callable[[bytes], T], empty: str) -> T:
    """What is in an uploaded file. The loader sees bytes: neither its name nor its place plays a part, or is told."""
    if not path:
        raise ValueError(empty)
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"the file has more than {MAX_BYTES >> 20} MB; give a smaller one")
    return load(data)


def picture(path: str | None, empty: str) -> Image.Image:
    """An uploaded picture."""
    from mm.media import load_image

    return uploaded(path, lambda data: load_image(data, max_pixels=MAX_PIXELS), empty)


def sound(path: str | None, empty: str) -> Audio:
    """An uploaded or recorded sound."""
    from mm.audio import load_audio

    return uploaded(path, lambda data: load_audio(data, max_seconds=MAX_SECONDS), empty)


def clip(path: str | None, empty: str, fps: float) -> Any:
    """An uploaded clip, at so many frames a second."""
    from mm.video import load_video

    return uploaded(path, lambda data: load_video(data, max_frames=MAX_FRAMES, fps=fps), empty)


def pcm(audio: Audio) -> tuple[int, np.ndarray[Any, Any]]:
    """A sound as Gradio takes it. 16 bits: floats it would make as loud as they can be."""
    peak = max(1.0, float(np.abs(audio.samples).max(initial=0.0)))
    return audio.rate, np.round(audio.samples / peak * 32767).astype(np.int16)


def wav(audio: Audio) -> bytes:
    """A file of 16 bits of a piece of sound."""
    rate, samples = pcm(audio)
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return held.getvalue()
