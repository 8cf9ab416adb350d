"""`POST /v1/shapes`: shapes for a prompt or a picture, as files of meshes."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from mm.serve.desk import Ticket
from mm.serve.errors import RESPONSES, Refusal
from mm.serve.files import base64_text, data_uri, picture
from mm.serve.place import Place
from mm.serve.schemas import ShapeRequest, Shapes


def routes(place: Place) -> APIRouter:
    router = APIRouter(tags=["shapes"])

    @router.post("/v1/shapes", response_model=Shapes, responses=RESPONSES)
    async def make(asked: ShapeRequest, request: Request) -> Any:
        """Shapes for a prompt or for a picture, each a file of a mesh in base64."""
        served = place.shelf.choose("shape", asked.model)
        if (asked.prompt is None) == (asked.image is None):
            raise Refusal(400, "give either prompt or image: what the shape is, or a picture of it", param="prompt")

        def work(ticket: Ticket) -> dict[str, Any]:
            from mm.pipelines.image_to_3d import ImageTo3DPipeline
            from mm.pipelines.text_to_3d import TextTo3DPipeline
            from mm.shape_files import to_bytes

            options: dict[str, Any] = {"num_meshes": asked.n, "seed": asked.seed, **asked.sampling()}
            if asked.image is not None:
                shown = picture(data_uri(asked.image, "image"))
                out = served.open(ImageTo3DPipeline, ticket)(shown, **options)
            else:
                out = served.open(TextTo3DPipeline, ticket)(asked.prompt, **options)
            data = [
                {"b64_json": base64_text(to_bytes(mesh, asked.format)), "valid": valid, "reason": reason}
                for mesh, valid, reason in zip(out.meshes, out.valid, out.reasons, strict=True)
            ]
            return {"created": int(time.time()), "data": data, "format": asked.format, "seed": out.seed}

        return await place.desk.run(request, work)

    return router
