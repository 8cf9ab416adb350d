"""`POST /v1/images/generations`: pictures for a prompt, whole, or looks at them while they are drawn."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from mm.generation import Event
from mm.pipelines.outputs import ImageOutput
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.serve.desk import Tell, Ticket
from mm.serve.errors import RESPONSES
from mm.serve.files import base64_text, natural_size, picture_bytes, picture_size, resized
from mm.serve.place import STREAM, Place, broken, sent, streamed
from mm.serve.schemas import ImageRequest, Images


def routes(place: Place) -> APIRouter:
    router = APIRouter(tags=["pictures"])

    @router.post("/v1/images/generations", response_model=Images, responses={**RESPONSES, **streamed(STREAM)})
    async def draw(asked: ImageRequest, request: Request) -> Any:
        """Pictures for a prompt. `stream`: events `image_generation.partial_image` and `image_generation.completed`."""
        served = place.shelf.choose("image", asked.model)

        def work(ticket: Ticket) -> dict[str, Any]:
            return _whole(asked, _drawn(served.open(TextToImagePipeline, ticket), asked))

        def live(ticket: Ticket, tell: Tell) -> None:
            painter = served.open(TextToImagePipeline, ticket)
            looks = _Looks(painter, asked, tell)
            out = _drawn(painter, asked, looks.see)
            for image in out.images:
                looks.show(image, "image_generation.completed", {"usage": _usage(painter, asked, out)})

        if asked.stream:
            return await place.desk.stream(request, live, STREAM, broken)
        return await place.desk.run(request, work)

    return router


def _drawn(painter: TextToImagePipeline, asked: ImageRequest, callback: Any = None) -> ImageOutput:
    if asked.size not in (None, "auto"):
        picture_size(asked.size, natural_size(painter, painter.picture))  # refused before the work
    return painter(asked.prompt, num_images=asked.n, seed=asked.seed, callback=callback, **asked.sampling())


def _whole(asked: ImageRequest, out: ImageOutput) -> dict[str, Any]:
    form, size = asked.output_format or "png", picture_size(asked.size, out.images[0].size)
    encoded = [base64_text(picture_bytes(resized(image, size), form)) for image in out.images]
    if asked.response_format == "url":
        data = [{"url": f"data:image/{form};base64,{one}"} for one in encoded]
    else:
        data = [{"b64_json": one} for one in encoded]
    size_text = f"{size[0]}x{size[1]}"
    return {"created": int(time.time()), "data": data, "output_format": form, "size": size_text, "seed": out.seed}


def _usage(painter: TextToImagePipeline, asked: ImageRequest, out: ImageOutput) -> dict[str, Any]:
    """Of one picture."""
    text, drawn = len(painter.encode_text(asked.prompt).content.content), len(out.tokens[0].content)
    details = {"image_tokens": 0, "text_tokens": text}
    return {
        "input_tokens": text,
        "input_tokens_details": details,
        "output_tokens": drawn,
        "total_tokens": text + drawn,
    }


class _Looks:
    """Pictures while they are drawn: of each as many as were asked for, evenly spread over its making."""

    def __init__(self, painter: TextToImagePipeline, asked: ImageRequest, tell: Tell) -> None:
        self.painter, self.asked, self.tell = painter, asked, tell
        self.most = asked.partial_images or 0
        self.seen: dict[int, int] = {}

    def see(self, event: Event) -> None:
        count = self.seen.get(event.row, 0)
        if count < self.most and event.done * (self.most + 1) >= count + 1 and event.done < 1:
            self.seen[event.row] = count + 1
            image = self.painter.preview(event.content)
            self.show(image, "image_generation.partial_image", {"partial_image_index": count, "image_index": event.row})

    def show(self, image: Any, kind: str, more: dict[str, Any]) -> None:
        form, size = self.asked.output_format or "png", picture_size(self.asked.size, image.size)
        event = {
            "type": kind,
            "b64_json": base64_text(picture_bytes(resized(image, size), form)),
            "created_at": int(time.time()),
            "size": f"{size[0]}x{size[1]}",
            "quality": "auto",
            "background": "opaque",
            "output_format": form,
            **more,
        }
        self.tell(sent(event, named=True))
