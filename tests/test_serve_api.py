"""Requests made from the OpenAPI description, right and wrong: no answer that it doesn't describe, no mistake of the server's."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from mm.heads.lm import LMHead
from mm.orders.delay import Delay
from mm.orders.raster import Raster
from mm.pipelines.base import Pipeline
from mm.serve.app import create
from mm.serve.gate import Settings
from mm.serve.page import page
from mm.serve.shelf import Shelf
from mm.testing import Levels, tiny
from mm.tokenizers.video_frames import VideoFrames

SHELF = Shelf(
    {
        "painter": Pipeline(tiny(context=96)),
        "speaker": Pipeline(tiny(Delay(), tokenizer=Levels(most=16), head=LMHead(), context=96)),
        "filmer": Pipeline(tiny(Raster(), tokenizer=VideoFrames.tiny(), head=LMHead(), context=96)),
    }
)
APP, PLACE = create(SHELF, Settings(seconds=30))
CONFIG = schemathesis.Config.from_dict(
    {"generation": {"mode": "all", "deterministic": True}, "checks": {"positive_data_acceptance": {"enabled": False}}}
)
"""What the description allows may still be refused: an unknown model, a prompt that the context can't hold."""
schema = schemathesis.openapi.from_asgi("/openapi.json", APP, config=CONFIG)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_description_is_kept(case: Any) -> None:
    case.call_and_validate()


def test_everything_is_described() -> None:
    described = {(path, method.upper()) for path, methods in schema.items() for method in methods}
    assert {
        ("/v1/images/generations", "POST"),
        ("/v1/audio/speech", "POST"),
        ("/v1/audio/transcriptions", "POST"),
        ("/v1/chat/completions", "POST"),
        ("/v1/videos", "POST"),
        ("/v1/videos/{video_id}/content", "GET"),
        ("/v1/shapes", "POST"),
        ("/v1/models", "GET"),
        ("/health", "GET"),
        ("/metrics", "GET"),
    } <= described


def test_the_page_needs_no_network() -> None:
    """It was Swagger's, whose script comes from elsewhere."""
    from starlette.testclient import TestClient

    with TestClient(APP) as client:
        answer = client.get("/docs")
        described = client.get("/openapi.json").json()
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "//" not in answer.text.replace("<!doctype html>", "") and "<script" not in answer.text
    for path in described["paths"]:
        assert f"{path}</code>" in answer.text
    assert "integer from 1 to 16, optional" in answer.text and "data: URI" not in answer.text
    assert (
        page({"info": {"title": "<b>", "version": "1"}, "paths": {}, "components": {"schemas": {}}}).count("<b>") == 0
    )
