"""What the server refuses: bodies, media, numbers, names, keys, one too many, what takes too long; and how it ends."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from mm.audio import Audio
from mm.cli import main
from mm.heads.lm import LMHead
from mm.orders.delay import Delay
from mm.pipelines.base import Pipeline
from mm.pipelines.text_to_speech import TextToSpeechPipeline
from mm.serve import films, writing
from mm.serve.command import listen, load
from mm.serve.errors import LONGEST, sentence
from mm.serve.gate import Settings
from mm.serve.place import Place
from mm.serve.running import running
from mm.serve.shelf import Shelf
from mm.testing import Levels, tiny

WEB = httpx.Client(timeout=60)
"""Making one takes longer than most requests."""
SECRET = "open sesame ä"


def models() -> Shelf:
    speaking = tiny(Delay(), tokenizer=Levels(), head=LMHead())
    speaking.voices = ("ann",)
    painting = tiny(context=8192)
    head = painting.head("text")
    with torch.no_grad():  # the likeliest next is never the end
        head.weight[painting.vocabulary.control("eos")] = 0.0  # type: ignore[index,operator]
    return Shelf({"painter": Pipeline(painting), "speaker": Pipeline(speaking)}, rows=2)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Place]]:
    with running(models(), Settings(places=3, seconds=20.0, max_bytes=1 << 20)) as made:
        yield made


@pytest.fixture
def address(server: tuple[str, Place]) -> str:
    return server[0]


def refused(answer: httpx.Response, status: int, says: str = "") -> dict[str, Any]:
    """The error of a refusal: one plain sentence, and nothing of this machine."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert says in error["message"], error
    assert 0 < len(error["message"]) <= LONGEST and error["message"].isprintable()
    for secret in ("Traceback", 'File "', str(Path.cwd()), "site-packages", "/tmp"):
        assert secret not in answer.text
    return dict(error)


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def shown(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def endless(tokens: int = 4096) -> dict[str, Any]:
    """A text that takes long: it never ends by itself."""
    return {
        "model": "painter",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": tokens,
        "temperature": 0.0,
    }


def png(width: int, height: int) -> bytes:
    """A picture whose header says so, with nothing in it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


# --- hostile pictures, sounds, texts ----------------------------------------------------------------------------------

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
PICTURES = {
    "an address": ("https://example.org/a.png", "addresses are not fetched"),
    "a file": ("file:///etc/passwd", "addresses are not fetched"),
    "a path": ("/etc/passwd", "addresses are not fetched"),
    "svg": (data_uri(SVG, "image/svg+xml"), "not a picture"),
    "svg that says it is png": (data_uri(SVG), "not a picture"),
    "html": (data_uri(b"<!doctype html><script>alert(1)</script>", "text/html"), "not a picture"),
    "postscript": (data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n"), "not a picture"),
    "no base64": ("data:image/png;base64,@@@", "is not base64"),
    "percent": ("data:image/png,%89PNG", "must be a data: URI in base64"),
    "nothing": ("data:image/png;base64,", "is empty"),
    "a bomb": (data_uri(png(30_000, 30_000)), "pixels"),
    "an end too soon": (data_uri(png(64, 64)), "truncated or damaged"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_none(address: str, name: str) -> None:
    url, says = PICTURES[name]
    error = refused(WEB.post(f"{address}/v1/chat/completions", json=shown(url)), 400, says)
    assert error["param"] == "messages.0.content.0"


@pytest.mark.parametrize("content", [b"RIFF", b"<html>", bytes(1000), b"ID3" + bytes(100), b"fLaC" + bytes(60)])
def test_sounds_that_are_none(address: str, content: bytes) -> None:
    files = {"file": ("../../../etc/passwd", content, "audio/wav")}
    refused(WEB.post(f"{address}/v1/audio/transcriptions", files=files), 400, "sound")
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": "wav"}}
    asked = {"model": "speaker", "messages": [{"role": "user", "content": [part]}]}
    refused(WEB.post(f"{address}/v1/chat/completions", json=asked), 400, "sound")


def test_uploads_leave_nothing_behind(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = {"file": ("../escaped.wav", bytes(1 << 19), "audio/wav")}
    for _ in range(2):
        refused(WEB.post(f"{address}/v1/audio/transcriptions", files=files), 400)
    assert list(tmp_path.rglob("*")) == [] and not (tmp_path.parent / "escaped.wav").exists()


@pytest.mark.parametrize("text", ["a\x00b", "\x1b[31mred", "a\x7f", "a\x85"])
def test_control_characters(address: str, text: str) -> None:
    for route, body in {
        "images/generations": {"prompt": text},
        "audio/speech": {"input": text},
        "chat/completions": {"messages": [{"role": "user", "content": text}]},
        "shapes": {"prompt": text},
    }.items():
        refused(WEB.post(f"{address}/v1/{route}", json=body), 422, "control characters; leave them out")


def test_more_pictures_than_the_model_holds(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them were decoded, and in memory at once, before that was said."""
    seen: list[int] = []
    real = writing.picture
    monkeypatch.setattr(writing, "picture", lambda data: seen.append(len(data)) or real(data))
    parts = [{"type": "image_url", "image_url": {"url": data_uri(png(9, 9))}}] * 64
    body = {"model": "painter", "messages": [{"role": "user", "content": parts}] * 32}
    refused(WEB.post(f"{address}/v1/chat/completions", json=body), 400, "that the model holds; send fewer")
    assert 1 < len(seen) < 1500


WRONG: dict[str, tuple[str, Any, int, str]] = {
    "no prompt": ("images/generations", {}, 422, "prompt is missing; the endpoint is described at /docs"),
    "an empty prompt": ("images/generations", {"prompt": ""}, 422, "prompt"),
    "a blank prompt": ("images/generations", {"prompt": "  "}, 400, "the prompt is empty"),
    "a long prompt": ("images/generations", {"prompt": "a" * 5000}, 422, "at most 4096 characters"),
    "a prompt that is a number": ("images/generations", {"prompt": 3}, 422, "valid string"),
    "half a letter": ("images/generations", '{"prompt": "\\ud800"}', 422, "prompt"),
    "a number that is a text": ("images/generations", {"prompt": "a", "n": "2"}, 422, "n should be a valid integer, got \"2\""),
    "too many": ("images/generations", {"prompt": "a", "n": 17}, 422, "n should be less than or equal to 16, got 17"),
    "no number": ("images/generations", '{"prompt": "a", "temperature": NaN}', 422, "temperature"),
    "no end": ("images/generations", '{"prompt": "a", "guidance": Infinity}', 422, "guidance"),
    "a seed too large": ("images/generations", {"prompt": "a", "seed": 1 << 63}, 422, "seed"),
    "digits without end": ("images/generations", '{"prompt": "a", "seed": ' + "9" * 9999 + "}", 400, ""),
    "a size that is none": ("images/generations", {"prompt": "a", "size": "0x4"}, 422, "WIDTHxHEIGHT in pixels, got \"0x4\""),
    "another shape": ("images/generations", {"prompt": "a", "size": "32x64"}, 400, "ask for these proportions"),
    "a large picture": ("images/generations", {"prompt": "a", "size": "4096x4096"}, 400, "size is up to"),
    "no model": ("images/generations", {"prompt": "a", "model": "../../etc"}, 404, "there is no model '../../etc'"),
    "another's task": ("images/generations", {"prompt": "a", "model": "speaker"}, 404, "use painter"),
    "nobody's task": ("shapes", {"prompt": "a"}, 404, "no model that makes shapes"),
    "no JSON": ("images/generations", "{", 400, "the body is not JSON"),
    "a list": ("images/generations", [], 422, "the body"),
    "deep": ("images/generations", "[" * 100_000, 400, ""),
    "no messages": ("chat/completions", {"messages": []}, 422, "messages"),
    "empty messages": ("chat/completions", {"messages": [{"role": "user", "content": ""}]}, 400, "messages are empty"),
    "an odd part": ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "file"}]}]}, 422,
                    "messages.0.content.0 should be of the type 'text', 'image_url', 'input_audio', got 'file'"),
    "a part's text": ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": 4}]}]}, 422,
                      "messages.0.content.0.text should be a valid string, got 4"),
    "a message that is a number": ("chat/completions", {"messages": [{"role": "user", "content": 4}]}, 422,
                                   "messages.0.content should be a valid string or a valid list, got 4"),
    "a voice that is a number": ("audio/speech", {"input": "a", "voice": 3}, 422,
                                "voice should be a valid string or a JSON object, got 3"),
    "a voice without a name": ("audio/speech", {"input": "a", "voice": {}}, 422, "voice.id is missing"),
    "a long voice": ("audio/speech", {"input": "a", "voice": "x" * 300}, 422,
                     "voice should have at most 200 characters, got 300"),
    "a long document": ("chat/completions", {"model": "speaker", "messages": [{"role": "user", "content": "a" * 4000}]},
                        400, "shorten the prompt"),
    "steps of what has none": ("images/generations", {"prompt": "a", "steps": 3}, 400, "made in no steps that could be counted"),
    "guided text": ("images/generations", {"prompt": "a", "guidance": 21}, 422, "guidance"),
    "a voice": ("audio/speech", {"input": "a", "voice": "/etc/passwd"}, 400, "this model knows ann"),
    "a voice of a chat": ("chat/completions", {**shown(data_uri(png(1, 1))), "modalities": ["audio"],
                                                "audio": {"voice": "bob"}}, 400, "there is no voice 'bob'"),
    "an odd format": ("audio/speech", {"input": "a", "response_format": "aac"}, 422, "response_format"),
    "too fast": ("audio/speech", {"input": "a", "speed": 5}, 422, "speed"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_requests_that_are_wrong(address: str, name: str) -> None:
    route, body, status, says = WRONG[name]
    content = body if isinstance(body, str) else json.dumps(body)
    answer = WEB.post(f"{address}/v1/{route}", content=content, headers={"Content-Type": "application/json"})
    refused(answer, status, says)


def test_streams_refuse_before_they_begin(address: str) -> None:
    refused(WEB.post(f"{address}/v1/chat/completions", json={**shown(data_uri(SVG)), "stream": True}), 400, "picture")
    refused(WEB.post(f"{address}/v1/images/generations", json={"prompt": " ", "stream": True}), 400, "empty")


def test_forms_that_are_wrong(address: str) -> None:
    refused(WEB.post(f"{address}/v1/audio/transcriptions", data={"model": "speaker"}), 422, "file")
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    refused(WEB.post(f"{address}/v1/audio/transcriptions", content=b"--y\r\n", headers=broken), 400)
    refused(WEB.post(f"{address}/v1/videos", data={"prompt": "a"}), 404, "no model that makes videos")


def test_what_there_is_not(address: str) -> None:
    refused(WEB.get(f"{address}/v1/../../etc/passwd"), 404)
    refused(WEB.get(f"{address}/v1/%2e%2e/%2e%2e/etc/passwd"), 404)
    refused(WEB.get(f"{address}/v1/videos/..%2f..%2fetc"), 404)
    refused(WEB.get(f"{address}/v1/models/gpt"), 404, "there is no model 'gpt'")
    answer = WEB.get(f"{address}/v1/images/generations")
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_messages_name_no_files_and_have_no_odd_letters() -> None:
    assert sentence("can't read /home/ann/x.wav,\n  or\x1b[1m") == "can't read a file of the server, or[1m"
    assert len(sentence("a" * 9999)) == LONGEST
    assert "image/png" in sentence("give data:image/png;base64,…")


# --- sizes, places, times ---------------------------------------------------------------------------------------------


def test_large_bodies(address: str) -> None:
    large = b'{"prompt": "' + b"a" * (1 << 20) + b'"}'
    json_type = {"Content-Type": "application/json"}
    said = refused(
        WEB.post(f"{address}/v1/images/generations", content=large, headers=json_type), 413, "1,048,576 bytes"
    )
    assert said["type"] == "invalid_request_error"

    def pieces() -> Iterator[bytes]:  # whose length isn't said
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    refused(WEB.post(f"{address}/v1/images/generations", content=pieces(), headers=json_type), 413)
    refused(WEB.post(f"{address}/v1/audio/transcriptions", files={"file": large}), 413)


def test_one_too_many_is_told_to_come_back(server: tuple[str, Place]) -> None:
    address, place = server
    with ThreadPoolExecutor(3) as pool:
        inside = [pool.submit(WEB.post, f"{address}/v1/chat/completions", json=endless(1500)) for _ in range(3)]
        until(lambda: place.gate.inside == 3)
        answer = WEB.post(f"{address}/v1/chat/completions", json=endless(1))
        error = refused(answer, 429, "all 3 places are taken")
        assert answer.headers["retry-after"] == "2" and error["code"] == "queue_full"
        assert error["type"] == "rate_limit_error"
        assert WEB.get(f"{address}/health").status_code == 200, "looks need no place"
        assert [one.result().status_code for one in inside] == [200] * 3
    assert WEB.post(f"{address}/v1/chat/completions", json=endless(1)).status_code == 200


def test_a_client_that_leaves_frees_its_row(server: tuple[str, Place]) -> None:
    address, place = server
    batcher = place.shelf.models["painter"].batcher
    for stream in (False, True):
        with httpx.Client(timeout=60) as client:
            request = client.build_request(
                "POST", f"{address}/v1/chat/completions", json={**endless(), "stream": stream}
            )
            if stream:
                answer = client.send(request, stream=True)
                assert next(answer.iter_lines()).startswith("data: ")
                answer.close()
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{address}/v1/chat/completions", json=endless(), timeout=0.5)
        until(lambda: batcher.running == 0 and place.gate.inside == 0)


def hesitating(*args: Any, **options: Any) -> Iterator[Audio]:
    yield Audio(np.zeros(100, np.float32), 100)
    time.sleep(1.0)
    yield Audio(np.zeros(100, np.float32), 100)


def test_what_takes_too_long(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with running(models(), Settings(seconds=0.6)) as (address, place):
        error = refused(WEB.post(f"{address}/v1/chat/completions", json=endless()), 504, "longer than 0.6 s")
        assert error["type"] == "timeout_error"
        streamed = WEB.post(f"{address}/v1/chat/completions", json={**endless(), "stream": True}).text
        last = json.loads(streamed.strip().splitlines()[-1].removeprefix("data: "))
        assert "longer than 0.6 s" in last["error"]["message"] and "[DONE]" not in streamed

        asked = {"model": "speaker", "input": "a " * 2000, "voice": "ann", "response_format": "wav"}
        monkeypatch.setattr(TextToSpeechPipeline, "stream", hesitating)
        with (
            pytest.raises(httpx.RemoteProtocolError),
            WEB.stream("POST", f"{address}/v1/audio/speech", json=asked) as begun,
        ):
            assert begun.status_code == 200
            begun.read()
        said = [record.getMessage() for record in caplog.records if record.exc_info]
        assert "was broken off: the answer took longer than 0.6 s" in caplog.text and not said

        def slow() -> Iterator[bytes]:
            yield b'{"prompt": '
            time.sleep(1.5)
            yield b'"a"}'

        headers = {"Content-Type": "application/json", "Content-Length": "15"}
        answer = WEB.post(f"{address}/v1/images/generations", content=slow(), headers=headers)
        refused(answer, 408, "longer than 0.6 s to arrive")
        until(lambda: place.gate.inside == 0 and place.shelf.models["painter"].batcher.running == 0)


def until(true: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys() -> None:
    with running(models(), Settings(api_key=SECRET)) as (address, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": SECRET.encode()}):
            shown: Any = {
                name: value if isinstance(value, bytes) else value.encode() for name, value in headers.items()
            }
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                error = refused(WEB.get(address + path, headers=shown), 401, "API key is missing or wrong")
            assert error["code"] == "invalid_api_key" and error["type"] == "authentication_error"
            refused(WEB.post(f"{address}/v1/images/generations", json={"prompt": "a"}, headers=shown), 401)
        right: Any = {"Authorization": f"Bearer {SECRET}".encode()}
        assert WEB.get(f"{address}/v1/models", headers=right).status_code == 200
        assert WEB.get(f"{address}/metrics", headers=right).status_code == 200
        assert WEB.get(f"{address}/health").status_code == 200
        described = WEB.get(f"{address}/openapi.json").json()
        assert described["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
        assert "security" not in described["paths"]["/health"]["get"]


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_shutdown_serves_who_is_inside() -> None:
    said: dict[str, Any] = {}
    with running(models(), Settings(seconds=60)) as (address, place):
        pool = ThreadPoolExecutor(1)
        inside = pool.submit(WEB.post, f"{address}/v1/chat/completions", json=endless(2000))
        until(lambda: place.gate.inside == 1)
        place.gate.draining = True
        said["late"] = WEB.post(f"{address}/v1/images/generations", json={"prompt": "a"})
        said["health"] = WEB.get(f"{address}/health")
    assert refused(said["late"], 503, "shutting down")["type"] == "server_unavailable"
    assert said["late"].headers["retry-after"] == "2"
    refused(said["health"], 503)
    assert inside.result().status_code == 200
    with pytest.raises(httpx.ConnectError):
        WEB.get(f"{address}/health")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_the_command_ends_when_it_is_told_to(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mm.cli", "serve", "--model", "mm-tiny", "--port", "0", "--queue", "5"]
    environment = {**os.environ, "MM_API_KEY": "sesame"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as program:
        assert program.stderr is not None
        line = program.stderr.readline()
        address = line.split(" at ")[1].split(" ")[0]
        assert line.startswith("mm-tiny at http://127.0.0.1:")
        refused(WEB.get(f"{address}/models"), 401)
        right = {"Authorization": "Bearer sesame"}
        asked = {"prompt": "red apple, noto", "n": 8, "seed": 0}
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(WEB.post(f"{address}/images/generations", json=asked, headers=right))
        )
        thread.start()
        until(lambda: "mm_requests_in_flight 1.0" in WEB.get(f"{address[:-3]}/metrics", headers=right).text)
        program.send_signal(signal.SIGTERM)
        thread.join()
        assert program.wait(30) == 0 and program.stderr.read() == ""
    assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["--host", "256.1.1.1"], "can't listen on 256.1.1.1:8000"),
        (["--port", "0", "--rows", "0"], "--rows must be at least 1, got 0"),
        (["--port", "0", "--queue", "0"], "--queue must be a number above 0, got 0"),
        (["--port", "0", "--timeout", "nan"], "--timeout must be a number above 0, got nan"),
        (["--port", "0", "--max-mb", "inf"], "--max-mb must be a number above 0, got inf"),
        (["--port", "0", "--api-key", " "], "the API key must be printable"),
        (["--port", "0", "--model", "nowhere"], "nowhere"),
        (["--port", "0", "--model", "mm-tiny", "--model", "mm-tiny"], "two models are called 'mm-tiny'"),
    ],
)
def test_refusals_of_the_command(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ValueError, match="choose another --port or --host"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_the_shipped_models_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shelf = load(None, "cpu", 2, None)
    assert next(iter(shelf.models)) == "mm-tiny" and "mm-pictures" in shelf.models
    for endpoint in ("speech", "transcription", "image", "video", "shape"):
        assert shelf.choose(endpoint).name == "mm-tiny"
    assert not shelf.models["mm-pictures"].can("speech") and shelf.models["mm-pictures"].can("image")
    shelf.close()
    with pytest.raises(ValueError, match="at least one model"):
        Shelf({})


# --- videos -----------------------------------------------------------------------------------------------------------


def test_videos_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from mm.serve.desk import Desk, Ticket
    from mm.serve.errors import Refusal

    desk = Desk(2, 5.0)
    kept, free = films.Films(desk), threading.Event()

    def work(film: films.Film) -> None:
        free.wait(5)
        film.status = "completed"

    made = [kept.start(films.Film("m", "a", Ticket(5)), work) for _ in range(films.UNFINISHED)]
    with pytest.raises(Refusal, match="videos are being made"):
        kept.start(films.Film("m", "a", Ticket(5)), lambda film: None)
    free.set()
    until(lambda: all(one.status == "completed" for one in made))
    monkeypatch.setattr(films, "KEPT", 3)
    assert [one.id for one in kept.all()] == [one.id for one in made[:-4:-1]]
    made[-1].created -= 60 * films.MINUTES + 1
    with pytest.raises(Refusal, match="too long ago"):
        kept.find(made[-1].id)
    failed = kept.start(films.Film("m", "a", Ticket(5)), lambda film: film.fail(ValueError("no /etc/passwd/x")))
    until(lambda: failed.status == "failed")
    error = failed.told().error
    assert error is not None and error.message == "no a file of the server"
    late = kept.start(films.Film("m", "a", Ticket(0)), lambda film: None)
    until(lambda: late.status == "failed")
    assert late.error is not None and "longer than 5 s" in late.error.message
    ended = threading.Event()

    def endless_work(film: films.Film) -> None:
        while True:
            film.ticket.check()
            time.sleep(0.01)

    given_up = kept.start(films.Film("m", "a", Ticket(60, ended.is_set)), endless_work)
    ended.set()  # the server ends, and nobody can fetch it any more
    until(lambda: given_up.status == "failed")
    assert films.scale_of("64x32", 32, 16) == 2 and films.scale_of(None, 3, 3) == 1
    for size in ("64x64", "16x8", "4096x2048"):
        with pytest.raises(Refusal, match="whole multiple"):
            films.scale_of(size, 32, 16)
    desk.close()


def test_pictures_that_are_loaded_are_files_of_the_kinds_that_are_known(address: str) -> None:
    for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(file, form)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answer = WEB.post(
                f"{address}/v1/chat/completions", json={**shown(data_uri(file.getvalue())), "max_tokens": 1}, timeout=30
            )
        assert answer.status_code == 200, answer.text
