"""What a chat's answer is made of: the document of its messages, and the text that goes on with it, also while it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from mm.audio import Audio
from mm.batching import OnStep
from mm.generation import Request
from mm.interfaces import Sampling
from mm.layout import Segment
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.serve.desk import Ticket
from mm.serve.errors import Refusal
from mm.serve.files import base64_bytes, base64_text, data_uri, picture, picture_bytes, sound
from mm.serve.schemas import ChatRequest, ImagePart, TextPart
from mm.serve.shelf import Served

USUAL_TOKENS = 256
"""Most tokens of an answer, where the request doesn't say."""
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Enough(Exception):
    """All answers have come to a stop sequence."""


@dataclass(frozen=True)
class Answer:
    text: str
    pictures: list[str]
    """`data:` URIs."""
    finish: Literal["stop", "length"]
    tokens: int


class Writer:
    """The document of a request, and its answers. Raises `Refusal` or `ValueError` for a document that can't be gone on with."""

    def __init__(self, served: Served, asked: ChatRequest, ticket: Ticket) -> None:
        self.pipeline, self.asked = served.open(AnyToAnyPipeline, ticket), asked
        self.count = asked.n or 1
        self.stops = [asked.stop] if isinstance(asked.stop, str) else list(asked.stop or ())
        self.most = asked.max_completion_tokens or asked.max_tokens or USUAL_TOKENS
        self.draws = "image" in (asked.modalities or ())
        self.ticket, self.room = ticket, self.pipeline.model.context
        document = parts(asked, self._encoded)
        self.prompt = self.pipeline.encode([document])[0]
        self.seen = not all(isinstance(part, str) for part in document)
        model = self.pipeline.model
        self.given = len(model.build_document.draft(self.prompt, torch.Generator(), close=False).stream())

    def write(self, on_step: OnStep | None = None, rows: Sequence[SoFar] = ()) -> list[Answer]:
        """`rows`: what was already told of each answer, which stands if `on_step` had enough."""
        pipeline = self.pipeline
        wanted = self.asked.modalities or ["text"]
        items: list[Any] = []
        if self.draws:
            grid = pipeline.model.vocabulary[pipeline.picture].max_grid
            items = [(pipeline.picture, grid if len(grid) > 1 else None)]
        words = not items or "text" in wanted or "audio" in wanted
        request = Request(
            prompt=self.prompt,
            items=items,
            text=words,
            free=False,
            max_tokens=self.most + 1,  # and the end
            by_modality=self._sampling(bool(items)),
        )
        try:
            made = pipeline.run([request] * self.count, self._seed(), on_step)
        except Enough:
            return [Answer(row.told, [], "stop", row.tokens) for row in rows]
        return [self._answer(segments) for segments in made]

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        written = sum(answer.tokens for answer in answers)
        return {
            "prompt_tokens": self.given,
            "completion_tokens": written,
            "total_tokens": self.given + written,
        }

    def _encoded(self, part: Image.Image | Audio) -> Segment:
        """One part, so that of a large picture or a long sound only what the model reads is kept. Raises `Refusal` as soon as
        they are more than the model can hold."""
        self.ticket.check()
        segment = self.pipeline.encode([[part]], self.pipeline.picture if self.draws else None)[0][0]
        self.room -= len(segment.content)
        if self.room < 0:
            context = self.pipeline.model.context
            raise Refusal(
                400, f"pictures and sounds are more than the {context:,} positions that the model holds; send fewer"
            )
        return segment

    def text_of(self, ids: Tensor) -> str:
        return str(
            self.pipeline.decode_items(self.pipeline.text, [self.pipeline.wrap(self.pipeline.text, ids, (len(ids),))])[
                0
            ]
        )

    def _seed(self) -> int:
        return int(torch.randint(1 << 31, ())) if self.asked.seed is None else self.asked.seed

    def _sampling(self, draws: bool) -> dict[str, Sampling]:
        """Of a text about something that is seen or heard the likeliest token each time, by default."""
        options = self.asked.sampling()
        spoken: dict[str, Any] = {name: options[name] for name in ("temperature", "top_p") if name in options}
        pipeline = self.pipeline
        chosen = {
            pipeline.text: pipeline.sampling(pipeline.text, spoken, Sampling(temperature=0.0) if self.seen else None)
        }
        if draws:
            chosen[pipeline.picture] = pipeline.sampling(pipeline.picture, options)
        return chosen

    def _answer(self, segments: Sequence[Segment]) -> Answer:
        pipeline = self.pipeline
        texts = [s.content for s in segments if s.modality == pipeline.text]
        drawn = [s.content for s in segments if s.modality != pipeline.text]
        text = "".join(pipeline.decode_items(pipeline.text, texts))
        images: list[Image.Image] = pipeline.decode_items(pipeline.picture, drawn) if drawn else []
        written, elements = sum(len(t.content) for t in texts), sum(len(d.content) for d in drawn)
        full = written >= self.most or self.given + elements + written + 2 >= pipeline.model.context
        stop = min((at for s in self.stops if (at := text.find(s)) >= 0), default=None)
        finish: Literal["stop", "length"] = "length" if full and stop is None else "stop"
        urls = [f"data:image/png;base64,{base64_text(picture_bytes(image, 'png'))}" for image in images]
        return Answer(text[:stop], urls, finish, written + elements)


class SoFar:
    """An answer while it is written: what can be told of it already. A letter of which only some bytes are there waits, and so
    does what may be the beginning of a stop sequence."""

    def __init__(self, text_of: Callable[[Tensor], str], stops: Sequence[str]) -> None:
        self.text_of, self.stops = text_of, stops
        self.told, self.tokens, self.stopped = "", 0, False

    def more(self, ids: Tensor) -> str:
        """What is new, after all that was told before."""
        if self.stopped:
            return ""
        text, self.tokens = self.text_of(ids), len(ids)
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, end = True, min(ends)
        else:
            end = len(text.rstrip(UNKNOWN))
            end = min([end, *(len(text) - overlap(text, stop) for stop in self.stops)])
        return self._tell(text[:end])

    def rest(self, text: str) -> str:
        """What is left to be told, once the whole is known."""
        return self._tell(text)

    def _tell(self, text: str) -> str:
        new = text[len(self.told) :]
        self.told += new
        return new


def overlap(text: str, stop: str) -> int:
    """Letters at the end of a text that may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def parts(asked: ChatRequest, encoded: Callable[[Image.Image | Audio], Segment]) -> list[str | Segment]:
    """The document: texts (of neighbouring parts one, a line each), pictures and sounds, these as the model reads them."""
    document: list[str | Segment] = []

    def say(text: str) -> None:
        if not text:
            return
        if document and isinstance(before := document[-1], str):
            document[-1] = f"{before}\n{text}"
        else:
            document.append(text)

    for number, message in enumerate(asked.messages):
        if isinstance(message.content, str):
            say(message.content)
            continue
        for place, part in enumerate(message.content or ()):
            where = f"messages.{number}.content.{place}"
            if isinstance(part, TextPart):
                say(part.text)
            else:
                document.append(_medium(part, where, encoded))
    if not document:
        raise Refusal(400, "the messages are empty; give at least one text, picture or sound", param="messages")
    return document


def _medium(part: Any, where: str, encoded: Callable[[Image.Image | Audio], Segment]) -> Segment:
    try:
        if isinstance(part, ImagePart):
            return encoded(picture(data_uri(part.image_url.url, where)))
        return encoded(sound(base64_bytes(part.input_audio.data, where)))
    except ValueError as error:
        raise Refusal(400, str(error), param=where) from error
