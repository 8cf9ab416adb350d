"""The application: endpoints over a shelf of models, behind the gate."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Path, Request
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from mm import __version__
from mm.serve import chat, errors, images, shapes, sounds, videos
from mm.serve.desk import Desk
from mm.serve.errors import RESPONSES
from mm.serve.films import UNFINISHED, Films
from mm.serve.gate import OPEN, Gate, Settings
from mm.serve.page import page
from mm.serve.place import Place, streamed
from mm.serve.schemas import Health, Model, Models
from mm.serve.shelf import TASKS, Served, Shelf

SUMMARY = "Text, pictures, speech, video and shapes from one kind of model; endpoints of OpenAI's shapes."


def create(shelf: Shelf, settings: Settings | None = None) -> tuple[ASGIApp, Place]:
    """The application, and what it works with, which is to be closed in the end."""
    settings = settings or Settings()
    gate = Gate(settings, shelf)
    place = Place(shelf, Desk(settings.places + UNFINISHED, settings.seconds), gate, settings)

    app = FastAPI(title="mm", version=__version__, summary=SUMMARY, docs_url=None, redoc_url=None)
    errors.install(app)
    for router in (
        about(place),
        images.routes(place),
        sounds.routes(place),
        chat.routes(place),
        videos.routes(place, Films(place.desk)),
        shapes.routes(place),
    ):
        app.include_router(router)
    app.openapi = lambda: _described(app, settings)  # type: ignore[method-assign]
    app.add_api_route("/docs", lambda: HTMLResponse(page(app.openapi())), include_in_schema=False)
    return gate.around(app), place


def about(place: Place) -> APIRouter:
    """What the server has, and how it is."""
    router = APIRouter(tags=["server"])

    def told(served: Served) -> Model:
        tasks = [task for task in TASKS if served.can(task)]
        return Model(
            id=served.name, created=served.created, tasks=list(tasks), voices=list(served.pipeline.model.voices)
        )

    @router.get("/v1/models", response_model=Models, responses=_some(401, 503))
    async def models() -> Any:
        """The models that can be named in requests."""
        return {"data": [told(served) for served in place.shelf.models.values()]}

    @router.get("/v1/models/{model}", response_model=Model, responses=_some(401, 404, 422, 503))
    async def model(model: str = Path(max_length=200)) -> Any:
        return told(place.shelf.named(model))

    @router.get("/health", response_model=Health, responses=_some(503))
    async def health() -> Any:
        """200 while requests are taken, 503 during a shutdown."""
        return {"models": list(place.shelf.models)}

    @router.get("/metrics", responses={**_some(401), **streamed("text/plain; charset=utf-8")})
    async def metrics(request: Request) -> Any:
        """Counts for Prometheus."""
        return Response(place.gate.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: RESPONSES[status] for status in statuses}


def _described(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """The OpenAPI description, with the key where one is needed."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        if settings.api_key is not None:
            described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in described["paths"].items():
                for operation in methods.values() if path not in OPEN else ():
                    operation["security"] = [{"key": []}]
        app.openapi_schema = described
    return app.openapi_schema
