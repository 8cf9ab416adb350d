"""Refusals as clients of OpenAI's API read them: `{"error": {"message", "type", "param", "code"}}`, one plain sentence each."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

log = logging.getLogger("mm.serve")
PATH = re.compile(r"(?<![\w.:/])(?:/[\w.@+-]+){2,}")
"""Names of files of this machine, which are nobody's business."""
LONGEST = 500
"""Characters of a message."""
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "server_unavailable",
    504: "timeout_error",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """What every refusal looks like."""

    error: ErrorDetail


WHY = {
    400: "The request can't be answered as it stands; the message says why.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or object, or no model that does this.",
    408: "The request took too long to arrive.",
    413: "The request is larger than the server takes.",
    422: "A parameter is missing, of the wrong type, or out of its range.",
    429: "As many requests as the server takes are on their way; try again after `Retry-After` seconds.",
    500: "A mistake of the server's own.",
    503: "The server is shutting down.",
    504: "The answer took longer than the server's limit.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": why} for status, why in WHY.items()
}
"""For the OpenAPI description of an endpoint."""


class Refusal(HTTPException):
    """Raises out of anywhere in a request; the client gets `message` with this status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(status, message, {"Retry-After": str(retry)} if retry is not None else None)
        self.param, self.code = param, code


class Broken(Exception):
    """An answer ended that was under way, so that nothing can be said but by breaking the connection."""


def refusal(error: BaseException) -> Refusal:
    """What a client is told about something that was raised. What isn't the client's to mend goes to the log."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ValueError | Broken):  # what our own code says about what it was given
        return Refusal(400, str(error))
    log.error("a request failed", exc_info=error)
    return Refusal(500, "the server made a mistake; it has been written to its log")


def body(error: HTTPException) -> dict[str, Any]:
    detail = ErrorDetail(
        message=sentence(error.detail),
        type=KINDS.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error"),
        param=getattr(error, "param", None),
        code=getattr(error, "code", None),
    )
    return {"error": detail.model_dump()}


def sentence(text: Any) -> str:
    """One line, no longer than `LONGEST`, without names of this machine's files."""
    words = " ".join(PATH.sub("a file of the server", str(text)).split())
    return "".join(c for c in words if c.isprintable())[:LONGEST] or "the request can't be answered"


def _place(error: Mapping[str, Any], body: Any) -> str:
    """Which field is wrong. Of a field that may be one of several things pydantic also names each of these, which no client
    knows: what isn't there in the body is such a name."""
    kind, *parts = error["loc"]
    if kind != "body" or not isinstance(body, Mapping):
        return ".".join(str(part) for part in parts)[:100]
    here: Any = body
    found: list[str] = []
    for number, part in enumerate(parts):
        inside = (isinstance(here, Mapping) and part in here) or (isinstance(here, list) and isinstance(part, int))
        if inside or (error["type"] == "missing" and number == len(parts) - 1):
            found.append(str(part))
            here = here[part] if inside else None
    return ".".join(found)[:100]


def _first(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str]:
    """The first field that is wrong, and what is wrong with it. Of one that may be several things: what is wrong with the one
    that came closest, and all that it could be where none did."""
    where = _place(errors[0], body)
    same = [(_place(error, body), error) for error in errors if _place(error, body).startswith(where)]
    meant = [(place, error) for place, error in same if not error["type"].endswith("_type")] or same
    place = max((place for place, _ in meant), key=lambda place: place.count("."))
    first, *others = [_wrong(error) for its, error in meant if its == place]
    could = [text.removeprefix("should be ") for text in dict.fromkeys(others) if text.startswith("should be ")]
    if could and first.startswith("should be "):
        first = " or ".join([first.partition(", got ")[0], *could])
    return place, first


def _wrong(error: Mapping[str, Any]) -> str:
    """What a field should be, and what came instead, of what pydantic says."""
    if error["type"] == "missing":
        return "is missing; the endpoint is described at /docs"
    said, got = str(error["msg"]), error.get("input")
    if error["type"] == "string_pattern_mismatch":
        said = "should be auto, or WIDTHxHEIGHT in pixels"  # the only pattern there is is that of sizes
    if error["type"] == "union_tag_invalid":
        return f"should be of the type {error['ctx']['expected_tags']}, got {str(error['ctx']['tag'])[:40]!r}"
    said = re.sub("^(Input|String|Value|List) should", "should", said.removeprefix("Value error, "))
    said = re.sub("valid dictionary or (instance|object) .*", "JSON object", said)
    said = re.sub(" after validation, not ", ", got ", said)
    if not said.startswith("should"):
        return f"is wrong: {said}"
    if error["type"] == "string_too_long":
        return f"{said}, got {len(str(got)):,}"
    plain = (
        got is None
        or isinstance(got, bool | int | float)
        or (isinstance(got, str) and len(got) <= 40 and "/" not in got)
    )
    return f"{said}, got {json.dumps(got, ensure_ascii=False)}" if plain else said


def response(error: HTTPException) -> JSONResponse:
    headers: Mapping[str, str] | None = error.headers
    return JSONResponse(body(error), error.status_code, headers)


def methods(routes: Iterable[Any]) -> Iterator[tuple[Route, str]]:
    """Of all routes, also of those of routers that were included."""
    for route in routes:
        if isinstance(route, Route):
            yield from ((route, method) for method in route.methods or ())
        elif (included := getattr(route, "original_router", None)) is not None:
            yield from methods(included.routes)


def install(app: FastAPI) -> None:
    """Every error of the application takes this shape."""

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 405:  # Starlette names the methods of the first route alone
            allowed = {
                method for route, method in methods(app.router.routes) if route.matches(request.scope)[0] != Match.NONE
            }
            error = HTTPException(
                405, f"use {' or '.join(sorted(allowed))} here", {"Allow": ", ".join(sorted(allowed))}
            )
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return response(Refusal(400, "the body is not JSON"))
        where, wrong = _first(error.errors(), error.body)
        return response(Refusal(422, f"{where or 'the body'} {wrong}", param=where or None))

    @app.exception_handler(Exception)
    async def _any(request: Request, error: Exception) -> JSONResponse:
        return response(refusal(error))
