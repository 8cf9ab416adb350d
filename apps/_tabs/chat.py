"""A conversation in which texts, pictures, sounds, clips and shapes go in and come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.apps._live import live, toasts
from mm.apps._tabs import common, shape
from mm.apps._tabs.video import written

if TYPE_CHECKING:
    from mm.apps._tabs.shelf import Shelf
    from mm.generation import Event
    from mm.pipelines.any_to_any import AnyToAnyPipeline

EXAMPLES = ("blue heart, noto", "handwritten digit seven", "mushroom, twemoji")
AUTOMATIC, TEXT = "whatever fits", "text"
ANSWERS = {"picture": "a picture", "sound": "speech", "video": "a video", "shape": "a shape"}
FILES = 4
"""Files of one message."""
TURNS = 40
"""Messages that are kept."""
TOKENS = 200
"""Positions of an answer in which the model decides what comes."""


@dataclass
class Talk:
    """What was said so far: by whom, and the parts of it as the pipelines take them."""

    said: list[tuple[str, list[Any]]] = field(default_factory=list)


def tab(shelf: Shelf) -> None:
    import gradio as gr

    from mm.pipelines.media import SHAPES

    if not shelf.names:
        return common.cannot("answers")
    made = [medium for medium in ANSWERS if shelf.makers(medium)]
    talk = gr.State(Talk())
    chat = gr.Chatbot(
        label="Conversation",
        height=460,
        elem_classes="chat",
        layout="bubble",
        buttons=["copy"],
        feedback_options=None,
        render_markdown=False,
        placeholder="Write something, or drop a picture or a sound into the field below.",
    )
    message = gr.MultimodalTextbox(
        label="Message",
        show_label=False,
        placeholder=EXAMPLES[0],
        file_count="multiple",
        file_types=["image", "audio", "video", *sorted(SHAPES)],
        sources=["upload", "microphone"] if shelf.readers("sound") else ["upload"],
    )
    with gr.Row():
        wanted = gr.Dropdown(
            [AUTOMATIC, TEXT, *(ANSWERS[medium] for medium in made)], value=AUTOMATIC, label="Answer with"
        )
        whole = gr.Checkbox(False, label="Earlier messages count too", info="for models trained on conversations")
        stop = gr.Button("Stop", scale=0, min_width=80)
    run: dict[str, Any] = {
        "fn": lambda *values: (yield from reply(shelf, *values)),
        "inputs": [message, talk, wanted, whole],
        "outputs": [chat, talk, message],
        "show_progress": "hidden",
        **common.TURN,
    }
    running = message.submit(api_name="chat", **run)
    stop.click(None, cancels=[running], api_visibility="private")
    chat.clear(Talk, None, talk, api_visibility="private")
    gr.Examples([[{"text": text, "files": []}] for text in EXAMPLES], message, label="For example")


def reply(
    shelf: Shelf, message: dict[str, Any] | None, talk: Talk, wanted: str, whole: bool
) -> Iterator[tuple[list[dict[str, Any]], Talk, Any]]:
    """The conversation with the message and its answer, as far as it has come; the field for messages is emptied at once."""
    import gradio as gr

    with toasts():
        parts = parts_of(message)
        earlier = [part for _, said in talk.said for part in said] if whole else []
        said = [*talk.said, ("user", parts)][-TURNS:]
        empty = gr.MultimodalTextbox(value=None)
        before = shown(shelf, said)  # once: files are written for it
        yield [*before, {"role": "assistant", "content": "…"}], talk, empty
        for answer, ended in answered(shelf, [*earlier, *parts], wanted):
            both = [*said, ("assistant", answer or ["(nothing)" if ended else "…"])]
            yield [*before, *shown(shelf, both[-1:])], Talk(both) if ended else talk, empty


def parts_of(message: dict[str, Any] | None) -> list[Any]:
    """A message as parts of a document: its files in their order, by our own loaders, then its text."""
    from mm.pipelines.media import ANIMATED, CLIPS, SHAPES, SOUNDS
    from mm.shape_files import load_mesh

    files, text = (message or {}).get("files") or [], str((message or {}).get("text") or "")
    if len(files) > FILES:
        raise ValueError(f"got {len(files)} files, and a message takes up to {FILES}; send the others later")
    out: list[Any] = []
    for path in files:
        ending = Path(path).suffix.lower()
        if ending in CLIPS - SOUNDS - ANIMATED:
            out.append(common.clip(path, "the clip is missing", 8.0))
        elif ending in SOUNDS:
            out.append(common.sound(path, "the sound is missing"))
        elif ending in SHAPES:
            out.append(common.uploaded(path, load_mesh, "the mesh is missing"))
        else:
            out.append(common.picture(path, "the picture is missing"))
    if text.strip() or not out:
        out.append(common.words(text, "the message is empty; write something, or add a picture or a sound"))
    return out


def shown(shelf: Shelf, said: Sequence[tuple[str, list[Any]]]) -> list[dict[str, Any]]:
    """The conversation as messages: a bubble a part."""
    return [{"role": role, "content": bubble(shelf, part)} for role, parts in said for part in parts]


def bubble(shelf: Shelf, part: Any) -> Any:
    import gradio as gr
    from trimesh import Trimesh

    from mm.audio import Audio
    from mm.shapes import Shape
    from mm.video import Video

    if isinstance(part, str):
        return part
    if isinstance(part, Audio):
        return gr.Audio(common.pcm(part), show_label=False, buttons=["download"], container=False)
    if isinstance(part, Video):
        path = shelf.written(part, lambda: written(shelf, part.frames, part.fps))
        return gr.Video(path, show_label=False, autoplay=True, loop=True, buttons=[])
    if isinstance(part, Shape | Trimesh):
        mesh = part.mesh if isinstance(part, Shape) else part
        return gr.Model3D(shelf.written(part, lambda: shape.written(shelf, mesh)), show_label=False, height=300)
    return gr.Image(part, format="png", show_label=False, buttons=["download"], container=False)


# --- answers ----------------------------------------------------------------------------------------------------------


def answered(shelf: Shelf, parts: list[Any], wanted: str) -> Iterator[tuple[list[Any], bool]]:
    """What a model answers, as far as it has come, and whether that is all of it."""
    from mm.pipelines.any_to_any import AnyToAnyPipeline

    given = {kind_of(part) for part in parts} - {"text"}
    target = next((medium for medium, name in ANSWERS.items() if name == wanted), None)
    if wanted == AUTOMATIC and given == {"sound"}:
        wanted = TEXT  # what one wants of a recording is its words
    name = choose(shelf, given, target)
    if target == "sound" and not given:
        from mm.apps._tabs.speech import speak

        text = " ".join(parts)
        speaker = shelf.maker(name, "sound")
        voice = next(iter(shelf.facts[name].voices), None)
        for _, sound, _ in speak(speaker, text, voice, None, 1.0, "", *_usual(speaker)):
            if sound is not None:
                from mm.audio import load_audio

                yield [load_audio(sound)], True
        return
    if wanted == TEXT and given == {"sound"}:
        listener = shelf.reader(name, "sound")
        for _, out in live(lambda tell: listener(parts, callback=tell).texts if _alone(parts) else None):
            if out is not None:
                yield [text for text in out if text.strip()], True
        return
    pipeline = shelf.open(name, AnyToAnyPipeline)

    def work(tell: Callable[[Event], None]) -> list[Any]:
        if target is None:
            free = wanted == AUTOMATIC
            return pipeline(parts, free=free, max_tokens=TOKENS, callback=tell).documents[0]
        return pipeline(parts, to=[shelf.facts[name].modalities[target]], max_tokens=1, callback=tell).documents[0][:1]

    for rows, out in live(work):
        if out is None:
            yield preview(pipeline, rows[-1:]), False
        else:
            yield [part for part in out if not isinstance(part, str) or part.strip()], True


def _alone(parts: list[Any]) -> bool:
    if any(isinstance(part, str) for part in parts):
        raise ValueError("a recording is written down without a text beside it; send it alone")
    return True


def _usual(speaker: Any) -> tuple[Any, ...]:
    usual = speaker.sampling(speaker.speech, {})
    return usual.guidance, usual.temperature, usual.top_p, usual.steps


def kind_of(part: Any) -> str:
    from trimesh import Trimesh

    from mm.audio import Audio
    from mm.shapes import Shape
    from mm.video import Video

    kinds: dict[type, str] = {str: "text", Audio: "sound", Video: "video", Shape: "shape", Trimesh: "shape"}
    return next((kind for cls, kind in kinds.items() if isinstance(part, cls)), "picture")


def choose(shelf: Shelf, given: set[str], target: str | None) -> str:
    """The model that reads what is given and makes what is wanted. Raises `ValueError` where there is none."""
    from mm.apps._tabs.shelf import WORDS

    able = shelf.makers(target) if target else shelf.names
    for name in able:
        known = shelf.facts[name]
        # what is of the kind that is made comes before it in conversations, which training notes as nothing of its own
        learned = {medium for medium, made in known.follows if made == target} | {target} if target else known.takes
        if given <= learned:
            return name
    read = " and ".join(WORDS[medium] for medium in sorted(given)) or "text"
    make = f" and makes {WORDS[target]}" if target else ""
    raise ValueError(f"no model at hand reads {read}{make}; ask for another kind of answer, or send something else")


def preview(pipeline: AnyToAnyPipeline, rows: Sequence[Event]) -> list[Any]:
    """What the model is writing or drawing just now."""
    from mm.apps._tabs.picture import sketch
    from mm.pipelines.text_to_image import TextToImagePipeline

    for event in rows:
        if event.modality == pipeline.text:
            item = pipeline.wrap(event.modality, event.content, (len(event.content),))
            return [pipeline.decode_items(event.modality, [item])[0] or "…"]
        if "picture" in pipeline.media and event.modality == pipeline.picture:
            return [sketch(TextToImagePipeline(pipeline.model, pipeline.recommended), event)]
    return ["…"]
