"""A text spoken, which one hears while it is made."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.apps._live import toasts
from mm.apps._tabs import common
from mm.audio import Audio

if TYPE_CHECKING:
    from mm.apps._tabs.shelf import Shelf
    from mm.pipelines.text_to_speech import TextToSpeechPipeline

EXAMPLES = ("three five one seven", "zero", "four two")
PIECE = 0.4
"""Seconds of sound that are sent at a time, at least: each piece is a file for the browser."""
SPOKEN = 600
"""Characters that are spoken at once, about a minute."""


def tab(shelf: Shelf) -> None:
    import gradio as gr

    from mm.pipelines.media import SPEAKERS

    able = shelf.makers("sound")
    if not able:
        return common.cannot("speaks", SPEAKERS)
    name, known = able[0], shelf.facts[able[0]]
    # Gradio sends pieces of sound through the program ffmpeg; without it one hears the whole at the end.
    streams = shutil.which("ffmpeg") is not None
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            text = gr.Textbox(label="Text", placeholder=EXAMPLES[0], max_lines=4)
            start, stop = common.buttons("Speak")
            voice = gr.Dropdown(list(known.voices), label="Voice", visible=bool(known.voices))
            recording = common.as_path(
                gr.Audio(label="Voice of a recording", sources=["upload", "microphone"], visible=not known.voices)
            )
            pace = gr.Slider(0.5, 2, 1, step=0.05, label="Duration", info="times what the model finds right")
            controls = common.settings(known, known.modalities["sound"])
            shown = gr.Column()
        with gr.Column(scale=3, min_width=300):
            heard = gr.Audio(
                label="While it is spoken",
                streaming=True,
                autoplay=True,
                interactive=False,
                visible=streams,
                buttons=[],
            )
            whole = gr.Audio(label="Speech", interactive=False, autoplay=not streams, buttons=["download"])
            note = gr.Markdown(elem_classes="note")

    def run_it(*values: Any) -> Iterator[tuple[Any, ...]]:
        for piece, sound, line in speak(shelf.maker(name, "sound"), *values):
            yield (piece, sound, line) if streams else (None, sound, line)

    run: dict[str, Any] = {
        "fn": run_it,
        "inputs": [text, voice, recording, pace, *controls],
        "outputs": [heard, whole, note],
        "show_progress": "minimal",
        **common.TURN,
    }
    common.starts(start, stop, text, run, "speak", EXAMPLES, shown)


def speak(
    speaker: TextToSpeechPipeline,
    text: str,
    voice: str | None,
    recording: str | None,
    pace: float,
    seed: str,
    *options: Any,
) -> Iterator[tuple[bytes | None, Any, str]]:
    """Pieces of sound as files, the whole at the end, and a line about it. `options`: guidance, temperature, top-p, steps."""
    with toasts():
        text = common.words(text, "the text is empty; say what is to be spoken")
        if len(text) > SPOKEN:
            raise ValueError(f"the text has {len(text)} characters, and up to {SPOKEN} are spoken at once; shorten it")
        given = common.sound(recording, "") if recording else voice
        start, used, first = time.perf_counter(), common.chosen_seed(seed), 0.0
        stream = speaker.stream(text, voice=given, stretch=pace, seed=used, **common.sampling(*options))
        pieces: list[Audio] = []
        sent = 0
        for piece in stream:
            pieces.append(piece)
            first = first or time.perf_counter() - start
            if sum(len(one.samples) for one in pieces[sent:]) >= PIECE * piece.rate:
                yield common.wav(_joined(pieces[sent:])), None, f"Seed {used}, {_joined(pieces).seconds:.1f} s so far"
                sent = len(pieces)
        whole = _joined(pieces)
        rest = common.wav(_joined(pieces[sent:])) if pieces[sent:] else None
        took = f"made in {time.perf_counter() - start:.1f} s, the first piece after {first:.1f} s"
        yield rest, common.pcm(whole), f"Seed {used}, {whole.seconds:.1f} s of sound, {took}"


def _joined(pieces: list[Audio]) -> Audio:
    return Audio(np.concatenate([piece.samples for piece in pieces]), pieces[0].rate)
