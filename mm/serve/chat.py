"""`POST /v1/chat/completions`: a document of texts, pictures and sounds that a model goes on with.

The parts of all messages, in their order, are the document; these models know no roles. What is answered is text. With `image`
among the `modalities` a picture is made first, which stands before the text as a part of the content; with `audio` the text is
spoken, by the model itself if it can speak and by the server's model of speech otherwise.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request

from mm.generation import Event
from mm.pipelines.text_to_speech import TextToSpeechPipeline
from mm.serve.desk import Tell, Ticket
from mm.serve.errors import RESPONSES
from mm.serve.files import base64_text
from mm.serve.place import DONE, STREAM, Place, broken, sent, streamed
from mm.serve.schemas import Chat, ChatAudio, ChatRequest
from mm.serve.shelf import Served
from mm.serve.sounds import known_voice, spoken
from mm.serve.writing import Answer, Enough, SoFar, Writer

KEPT = 0
"""Seconds that a spoken answer is kept to be referred to: it isn't."""


def routes(place: Place) -> APIRouter:
    router = APIRouter(tags=["chat"])

    @router.post(
        "/v1/chat/completions",
        response_model=Chat,
        response_model_exclude_none=False,
        responses={**RESPONSES, **streamed(STREAM)},
    )
    async def complete(asked: ChatRequest, request: Request) -> Any:
        """Goes on with what the messages hold: texts, pictures (`data:` URIs) and sounds. `stream`: events
        `chat.completion.chunk`, and `[DONE]`."""
        served = place.shelf.choose("chat", asked.model)
        speaker = _speaker(place, served, asked)
        talk = _Talk(served, speaker, asked)
        if asked.stream:
            return await place.desk.stream(request, talk.live, STREAM, broken)
        return await place.desk.run(request, talk.whole)

    return router


def _speaker(place: Place, served: Served, asked: ChatRequest) -> Served | None:
    """Who speaks, if somebody is to. Raises `Refusal` where nobody can, or doesn't know the voice."""
    if "audio" not in (asked.modalities or ()):
        return None
    chosen = served if served.can("speech") else place.shelf.choose("speech")
    known_voice((asked.audio or ChatAudio()).voice, chosen.pipeline.model.voices)
    return chosen


class _Talk:
    """One request: answered whole, or live."""

    def __init__(self, served: Served, speaker: Served | None, asked: ChatRequest) -> None:
        self.served, self.speaker, self.asked = served, speaker, asked
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
        self.audio = asked.audio or ChatAudio()

    # --- whole ------------------------------------------------------------------------------------------------------

    def whole(self, ticket: Ticket) -> dict[str, Any]:
        writer = Writer(self.served, self.asked, ticket)
        answers = writer.write()
        choices = []
        for number, answer in enumerate(answers):
            message: dict[str, Any] = {"role": "assistant", "content": _content(answer)}
            if self.speaker is not None and answer.text.strip():
                data = b"".join(self._spoken(answer, ticket))
                message["audio"] = {**self._audio(), "data": base64_text(data), "transcript": answer.text}
                if not answer.pictures:
                    message["content"] = None
            choices.append({"index": number, "message": message, "finish_reason": answer.finish})
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": writer.usage(answers)}

    def _spoken(self, answer: Answer, ticket: Ticket) -> Any:
        assert self.speaker is not None
        pipeline = self.speaker.open(TextToSpeechPipeline, ticket)
        voice = known_voice(self.audio.voice, pipeline.model.voices)
        form = "pcm" if self.audio.format == "pcm16" else self.audio.format
        return spoken(pipeline, answer.text.strip(), voice, form, self.asked.seed)

    def _audio(self) -> dict[str, Any]:
        return {"id": f"audio_{uuid.uuid4().hex}", "expires_at": int(time.time()) + KEPT}

    # --- live -------------------------------------------------------------------------------------------------------

    def live(self, ticket: Ticket, tell: Tell) -> None:
        writer = Writer(self.served, self.asked, ticket)

        def delta(number: int, change: dict[str, Any], finish: str | None = None) -> None:
            choice = {"index": number, "delta": change, "finish_reason": finish, "logprobs": None}
            tell(sent({**self.head, "object": "chat.completion.chunk", "choices": [choice]}))

        rows = [SoFar(writer.text_of, writer.stops) for _ in range(writer.count)]

        def see(event: Event) -> None:
            if event.modality != writer.pipeline.text:
                ticket.check()
                return
            if new := rows[event.row].more(event.content):
                delta(event.row, {"content": new})
            if all(row.stopped for row in rows) and not writer.draws:  # a picture is told at the end
                raise Enough

        for number in range(writer.count):
            delta(number, {"role": "assistant", "content": ""})
        answers = writer.write(see, rows)
        for number, answer in enumerate(answers):
            if answer.pictures:
                delta(number, {"images": [_image(url) for url in answer.pictures]})
            if rest := rows[number].rest(answer.text):
                delta(number, {"content": rest})
            if self.speaker is not None and answer.text.strip():
                about = self._audio()
                delta(number, {"audio": {"id": about["id"], "transcript": answer.text}})
                for piece in self._spoken(answer, ticket):
                    delta(number, {"audio": {"id": about["id"], "data": base64_text(piece)}})
                delta(number, {"audio": about})
            delta(number, {}, answer.finish)
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            tell(sent({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": writer.usage(answers)}))
        tell(DONE)


def _content(answer: Answer) -> str | list[dict[str, Any]]:
    """The text alone, or parts, where there are pictures."""
    if not answer.pictures:
        return answer.text
    return [*map(_image, answer.pictures), *([{"type": "text", "text": answer.text}] if answer.text else [])]


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}
