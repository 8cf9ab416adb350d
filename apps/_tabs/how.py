"""How it works: the token stream of a document, for the models at hand and for textbook orders."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mm.apps._live import toasts
from mm.apps._tabs import common, strip
from mm.apps._tabs.look import COLOURS

if TYPE_CHECKING:
    from PIL import Image

    from mm.apps._tabs.shelf import Shelf
    from mm.interfaces import Modality, Order
    from mm.stream import TokenStream
    from mm.vocabulary import Vocabulary

TEXT = "a smile"
TEXTBOOK = {
    "raster": (
        "Textbook: raster order",
        "One after another: each position predicts the next, and sees what stands before it.",
    ),
    "masked": (
        "Textbook: masked order",
        "All positions of the picture share one order and see each other. Some are masked (time 1), and predict themselves; in "
        "generation more and more of them are drawn, the surest first.",
    ),
    "blocks": (
        "Textbook: blocks (diffusion)",
        "Each block stands there twice: clean (copy 0), for those that come later, and noisy (copy 1, time 0 to 1), which "
        "learns to become clean. A noisy copy sees itself and the clean blocks before it, and nobody else sees it.",
    ),
    "scales": (
        "Textbook: scales",
        "The picture at ever finer scales, one order number each: a whole scale is drawn in one pass, and sees the coarser ones. "
        "A position doesn't read itself (time 1) but what the coarser scales have made up at its place.",
    ),
}
RULE = (
    "Every system on this page is one list of positions. Position i sees position j if both are of one document and "
    "(j is clean and has a smaller order) or (both have the same order and the same copy). That is the whole rule: "
    "causal text, two-way pictures, scales and diffusion are special cases of it."
)


def tab(shelf: Shelf) -> None:
    import gradio as gr

    choices = [(title, f"textbook/{name}") for name, (title, _) in TEXTBOOK.items()]
    for name, known in shelf.facts.items():
        choices += [(f"{name}: text and {medium}", f"{medium}/{name}") for medium in known.modalities]
    gr.Markdown(RULE)
    with gr.Row():
        which = gr.Dropdown(choices, value=choices[0][1], label="Whose stream", scale=2, min_width=200)
        text = gr.Textbox(TEXT, label="Text of the document", max_lines=1, scale=2, min_width=200)
        start = gr.Button("Show", variant="primary", scale=1, min_width=120)
    page = gr.HTML(value=shown(shelf, choices[0][1], TEXT))
    gr.on(
        [which.input, text.submit, start.click],
        lambda chosen, words: shown(shelf, chosen, words),
        [which, text],
        page,
        api_name="stream",
        show_progress="minimal",
        **common.TURN,
    )


def shown(shelf: Shelf, chosen: str, text: str) -> str:
    """The page for one of the choices: whose document, its strip, and who sees whom."""
    with toasts():
        text = common.words(text, "the text is empty; write something")
        kind, _, name = chosen.partition("/")
        if kind == "textbook":
            title, explained = TEXTBOOK[name]
            modalities, drawn, item = textbook(name)
            picture: Image.Image | None = drawn
            owner = 1
        else:
            from mm.pipelines.any_to_any import AnyToAnyPipeline

            pipeline = shelf.open(name, AnyToAnyPipeline)
            modalities = list(pipeline.model.modalities)
            owner = pipeline.model.vocabulary.index[shelf.facts[name].modalities[kind]]
            item, picture = something(kind, modalities[owner])
            title, explained = f"{name}, {modalities[owner].name}", summary(modalities[owner].order)
        stream, vocabulary = document(modalities, text, item, owner)
        cells = strip.cells(stream, modalities, vocabulary, picture)
        return described(title, explained, stream, cells)


def described(title: str, explained: str, stream: TokenStream, cells: Sequence[strip.Cell]) -> str:
    count = len(stream)
    first = f", the first {len(cells)} of which are shown" if count > len(cells) else ""
    orders, noisy = len(set(stream.order.tolist())), int((stream.copy > 0).sum())
    facts = f"{count} positions{first}; {orders} order numbers; {int((stream.target >= 0).sum())} predictions"
    facts += f"; {noisy} noisy copies" if noisy else ""
    return (
        f'<h3 style="color:{COLOURS["text"]}">{escape(title)}</h3><p>{escape(explained)}</p>{strip.legend(cells)}'
        f"{strip.strip(cells)}<p><b>Who sees whom.</b> {facts}. A row is a position that looks, a column one that is "
        f"seen.</p>{strip.matrix(stream, cells)}"
    )


def document(modalities: Sequence[Modality], text: str, item: Any, owner: int) -> tuple[TokenStream, Vocabulary]:
    """The stream of a text and an item behind it, as in training: with what is masked, and with noisy copies."""
    from mm.layout import DocumentBuilder, Segment
    from mm.vocabulary import Vocabulary

    vocabulary = Vocabulary([(one.name, one.tokenizer.spec) for one in modalities])
    segments = [Segment(modalities[0].name, text, loss=False), Segment(modalities[owner].name, item)]
    return DocumentBuilder(modalities, vocabulary)(segments, torch.Generator().manual_seed(0)), vocabulary


def summary(order: Order) -> str:
    """What an order does, by the first sentence of its file."""
    text = " ".join((inspect.getdoc(inspect.getmodule(type(order))) or type(order).__name__).split("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".:") + "."


# --- documents --------------------------------------------------------------------------------------------------------


def textbook(name: str) -> tuple[list[Modality], Image.Image, Any]:
    """Text and a small picture in one of the orders, without a model; the picture, and the same as the item."""
    from mm.heads.lm import LMHead
    from mm.interfaces import Modality, ModalityTokenizer
    from mm.orders.blocks import Blocks
    from mm.orders.masked import Masked
    from mm.orders.raster import Raster
    from mm.orders.scales import Scales
    from mm.testing import Palette
    from mm.tokenizers.image_msvq import ImageMSVQ
    from mm.tokenizers.image_patches import ImagePatches
    from mm.tokenizers.text_bytes import TextBytes

    orders: dict[str, Order] = {
        "raster": Raster(),
        "masked": Masked(),
        "blocks": Blocks(block=4, shift=False),
        "scales": Scales(),
    }
    order, picture = orders[name], smile(4)
    tokenizer: ModalityTokenizer = ImagePatches(size=4, patch=1) if name == "blocks" else Palette(4)
    if name == "scales":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokenizer = ImageMSVQ.tiny()
    order.check(tokenizer.spec)
    order.attach(tokenizer)
    text = Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster())
    item = Modality(name="image", tokenizer=tokenizer, head=LMHead(), order=order)
    return [text, item], picture, tokenizer.encode(picture)


def something(kind: str, modality: Modality) -> tuple[Any, Image.Image | None]:
    """An item to show, drawn by code, and the picture that it shows, if it is one."""
    spec = modality.tokenizer.spec
    if kind == "picture":
        picture = smile(64)
        return modality.tokenizer.encode(picture), picture
    if kind == "sound":
        from mm.audio import Audio

        time = np.arange(spec.sample_rate // 2) / spec.sample_rate
        melody = 0.3 * np.sin(2 * math.pi * (330 + 220 * (time > 0.25)) * time)
        return modality.tokenizer.encode(Audio(melody.astype(np.float32), spec.sample_rate)), None
    if kind == "video":
        from mm.video import Video

        face = np.asarray(smile(32))
        frames = np.stack([np.roll(face, 4 * number, axis=1) for number in range(1 + 2 * spec.frame_stride)])
        return modality.tokenizer.encode(Video(frames, spec.fps)), smile(32)
    import trimesh

    return modality.tokenizer.encode(trimesh.creation.capsule(0.6, 0.3)), None


def smile(side: int) -> Image.Image:
    """A yellow face on blue."""
    from PIL import Image, ImageDraw

    big = Image.new("RGB", (256, 256), "#3b82f6")
    draw = ImageDraw.Draw(big)
    draw.ellipse((16, 16, 240, 240), fill="#fde047")
    for x in (88, 168):
        draw.ellipse((x - 18, 76, x + 18, 124), fill="#1e293b")
    draw.arc((70, 90, 186, 200), 20, 160, fill="#dc2626", width=18)
    return big.resize((side, side), Image.Resampling.LANCZOS)
