"""The HTTP server as its clients see it: the `openai` package against a server on this machine, with tiny random models."""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from mm.audio import Audio, load_audio, to_wav
from mm.heads.lm import LMHead
from mm.interfaces import Sampling
from mm.orders.delay import Delay
from mm.orders.raster import Raster
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.pipelines.base import Pipeline
from mm.pipelines.image_to_text import ImageToTextPipeline
from mm.pipelines.speech_to_text import SpeechToTextPipeline
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.pipelines.text_to_speech import TextToSpeechPipeline
from mm.serve.desk import Ticket
from mm.serve.files import natural_size
from mm.serve.running import running
from mm.serve.shelf import Shelf
from mm.serve.writing import SoFar
from mm.testing import Levels, tiny
from mm.tokenizers.video_frames import VideoFrames
from mm.video import has_av, load_video

WEB = httpx.Client(timeout=60)
RED = Image.new("RGB", (4, 4), (255, 0, 0))


def uri(image: Image.Image = RED) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def see(text: str = "") -> list[dict[str, Any]]:
    """Messages of a picture, and a text."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": uri()}}]
    return [{"role": "user", "content": [*content, *([{"type": "text", "text": text}] if text else [])]}]


def noise(seconds: float = 0.5) -> Audio:
    return Audio(np.random.default_rng(0).uniform(-0.5, 0.5, int(100 * seconds)).astype(np.float32), 100)


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    speaking = tiny(Delay(), tokenizer=Levels(), head=LMHead())
    speaking.voices = ("ann", "theo")
    return Shelf(
        {
            "painter": Pipeline(tiny(), {"image": Sampling(temperature=0.5, guidance=2.0)}),
            "speaker": Pipeline(speaking),
            "filmer": Pipeline(tiny(Raster(), tokenizer=VideoFrames.tiny(), head=LMHead())),
        },
        rows=8,
    )


@pytest.fixture(scope="module")
def address(shelf: Shelf) -> Iterator[str]:
    with running(shelf) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    from openai import OpenAI

    with OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as made:
        yield made


def alone(shelf: Shelf, name: str, kind: type[Any]) -> Any:
    """A pipeline of a model of the server, with an engine of its own."""
    pipeline = shelf.models[name].pipeline
    return kind(pipeline.model, pipeline.recommended)


# --- pictures ---------------------------------------------------------------------------------------------------------


def decoded(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pictures(client: Any, shelf: Shelf) -> None:
    made = client.images.generate(model="painter", prompt="red", n=3, extra_body={"seed": 4})
    expected = alone(shelf, "painter", TextToImagePipeline)("red", num_images=3, seed=4).images
    assert [decoded(one.b64_json or "").convert("RGB").tobytes() for one in made.data or ()] == [
        image.tobytes() for image in expected
    ]
    assert made.size == "4x4" and made.output_format == "png" and made.model_extra == {"seed": 4}


def test_sizes_and_formats(client: Any) -> None:
    large = client.images.generate(prompt="red", size="256x256", output_format="webp", extra_body={"seed": 4})
    small = client.images.generate(prompt="red", extra_body={"seed": 4, "model": None})
    image, natural = (decoded((made.data or [])[0].b64_json or "").convert("RGB") for made in (large, small))
    assert image.size == (256, 256) and image.resize((4, 4), Image.Resampling.NEAREST).tobytes() == natural.tobytes()
    address = (client.images.generate(prompt="red", response_format="url", output_format="jpeg").data or [])[0].url
    assert address is not None and address.startswith("data:image/jpeg;base64,")
    assert decoded(address.split(",")[1]).format == "JPEG"


def test_pictures_while_they_are_drawn(client: Any) -> None:
    events = list(client.images.generate(prompt="red", n=2, stream=True, partial_images=2, extra_body={"seed": 4}))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 4 + ["image_generation.completed"] * 2
    whole = client.images.generate(prompt="red", n=2, extra_body={"seed": 4})
    assert [event.b64_json for event in events[-2:]] == [one.b64_json for one in whole.data or ()]
    assert events[0].b64_json != events[-2].b64_json
    assert sorted((e.partial_image_index, e.image_index) for e in events[:4]) == [(0, 0), (0, 1), (1, 0), (1, 1)]


# --- sound ------------------------------------------------------------------------------------------------------------


def speech(client: Any, form: str, **more: Any) -> bytes:
    with client.audio.speech.with_streaming_response.create(
        model="speaker", input="seven", voice="theo", response_format=form, extra_body={"seed": 4}, **more
    ) as answer:
        return answer.read()


@pytest.mark.parametrize("form", ["wav", "flac", "mp3", "opus", "pcm"])
def test_speech(client: Any, shelf: Shelf, form: str) -> None:
    expected = alone(shelf, "speaker", TextToSpeechPipeline)("seven", voice="theo", seed=4).audios[0]
    data = speech(client, form)
    if form == "pcm":
        samples = np.frombuffer(data, "<i2") / 32768
        assert len(samples) == len(expected) * 240, "24,000 samples a second"
        return
    heard = load_audio(data)
    if form in ("wav", "flac"):
        assert heard.rate == 100
        np.testing.assert_allclose(heard.samples, expected, atol=1e-4)
    else:
        assert heard.seconds == pytest.approx(len(expected) / 100, abs=0.15)


def test_speech_as_events(client: Any) -> None:
    data = speech(client, "wav", stream_format="sse").decode()
    events = [json.loads(line[6:]) for line in data.splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in events[-2:]] == ["speech.audio.delta", "speech.audio.done"]
    assert b"".join(base64.b64decode(event["audio"]) for event in events[:-1]) == speech(client, "wav")


def test_a_faster_voice(client: Any) -> None:
    lengths = [len(speech(client, "wav", speed=speed)) for speed in (0.5, 4.0)]
    assert lengths[0] > lengths[1]


def test_transcriptions(client: Any, shelf: Shelf) -> None:
    wav, listener = to_wav(noise()), alone(shelf, "speaker", SpeechToTextPipeline)
    expected = listener(noise(), seed=0).texts[0]
    answers = [
        client.audio.transcriptions.create(model="speaker", file=("../../etc/x.wav", wav), response_format=form)
        for form in ("json", "text", "verbose_json")
    ]
    assert answers[0].text == expected and answers[1] == expected + "\n"
    assert answers[2].text == expected and answers[2].duration == pytest.approx(0.5)
    assert answers[2].language == "unknown"
    events = list(client.audio.transcriptions.create(model="speaker", file=("x.wav", wav), stream=True))
    assert events[-1].type == "transcript.text.done" and events[-1].text == expected


# --- chat -------------------------------------------------------------------------------------------------------------


def test_captions(client: Any, shelf: Shelf) -> None:
    answer = client.chat.completions.create(model="painter", messages=see(), max_tokens=12, seed=4)
    expected = alone(shelf, "painter", ImageToTextPipeline)(RED, max_tokens=12, seed=4)
    assert answer.choices[0].message.content == expected.texts[0]
    assert answer.usage is not None and answer.usage.completion_tokens == len(expected.tokens[0].content)
    assert answer.choices[0].finish_reason == ("length" if answer.usage.completion_tokens == 12 else "stop")


def test_texts_of_several_messages_are_one_document(client: Any, shelf: Shelf) -> None:
    messages: Any = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
    ]
    answer = client.chat.completions.create(
        model="painter", messages=messages, max_tokens=9, seed=4, temperature=1.0, n=2
    )
    pipeline = alone(shelf, "painter", AnyToAnyPipeline)
    expected = pipeline(
        [["a\nb\nc"]] * 2, free=False, max_tokens=10, seed=4, sampling={"text": Sampling()}
    )  # and the end
    assert [choice.message.content for choice in answer.choices] == expected.texts


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_as_many_tokens_as_were_asked_for(client: Any, tokens: int) -> None:
    """It was one less, and "stop"."""
    answer = client.chat.completions.create(
        model="painter", messages=see("a"), max_tokens=tokens, temperature=1.0, seed=5
    )
    assert answer.usage is not None and answer.usage.completion_tokens == tokens
    assert answer.choices[0].finish_reason == "length"


def test_a_picture_stays_where_the_text_behind_it_stops(client: Any) -> None:
    """Streams left it out."""
    options: Any = {"model": "painter", "messages": see("a"), "max_tokens": 40, "seed": 5, "temperature": 1.0}
    options["modalities"] = ["image", "text"]
    text = client.chat.completions.create(**options).choices[0].message.content[1]["text"]
    options["stop"] = next(letter for letter in text[3:] if letter.isalnum())
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(**options, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    images = [image for delta in deltas for image in getattr(delta, "images", None) or ()]
    parts = {part["type"]: part for part in whole}
    assert images == [parts["image_url"]]
    assert "".join(delta.content or "" for delta in deltas) == parts.get("text", {"text": ""})["text"]


@pytest.mark.parametrize("stop", [None, "e", ["zzz", "\x00"]])
def test_streams_say_what_whole_answers_say(client: Any, stop: Any) -> None:
    options: Any = {"model": "painter", "messages": see("a"), "max_tokens": 40, "seed": 5, "temperature": 1.0, "n": 2}
    options["stop"] = stop
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for number, choice in enumerate(whole.choices):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == number]
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason and own[0].delta.role == "assistant"
        assert stop is None or stop[0] not in choice.message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_letters_are_told_whole_and_stops_never() -> None:
    def text_of(ids: torch.Tensor) -> str:
        return bytes(ids.tolist()).decode(errors="replace")

    letters = "ä€ab<end>x".encode()
    row = SoFar(text_of, ["<end>"])
    told = [row.more(torch.tensor(list(letters[: n + 1]))) for n in range(len(letters))]
    assert "".join(told) == "ä€ab" and "\N{REPLACEMENT CHARACTER}" not in "".join(told) and row.stopped
    assert told[1] == "ä" and told[0] == ""
    row = SoFar(text_of, ["<end>"])
    assert [row.more(torch.tensor(list(part))) for part in (b"a<", b"a<e", b"a<ex")] == ["a", "", "<ex"]
    assert row.rest("a<ex!") == "!"


def test_answers_that_are_spoken(client: Any) -> None:
    options: Any = {
        "model": "painter", "messages": see("a"), "max_tokens": 8, "seed": 5, "temperature": 1.0,
        "modalities": ["text", "audio"], "audio": {"voice": "ann", "format": "wav"},
    }  # fmt: skip
    said = client.chat.completions.create(**options).choices[0].message
    assert said.audio is not None and said.content is None and said.audio.transcript
    assert load_audio(base64.b64decode(said.audio.data)).rate == 100
    options["audio"] = {"voice": "ann", "format": "pcm16"}
    chunks = [chunk.choices[0].delta for chunk in client.chat.completions.create(**options, stream=True)]
    sounds = [delta.audio for delta in chunks if delta.audio]
    assert sounds[0].transcript == said.audio.transcript
    assert len(b"".join(base64.b64decode(sound.data or "") for sound in sounds)) > 0


def test_pictures_in_an_answer(client: Any) -> None:
    options: Any = {"model": "painter", "messages": [{"role": "user", "content": "red"}], "seed": 5, "max_tokens": 5}
    content: Any = client.chat.completions.create(**options, modalities=["text", "image"]).choices[0].message.content
    assert [part["type"] for part in content][:1] == ["image_url"]
    assert decoded(content[0]["image_url"]["url"].split(",")[1]).size == (4, 4)
    chunks = list(client.chat.completions.create(**options, modalities=["image"], stream=True))
    drawn = [
        c.choices[0].delta.model_extra["images"] for c in chunks if "images" in (c.choices[0].delta.model_extra or {})
    ]
    assert drawn == [[content[0]]]


def test_sounds_in_a_question(client: Any) -> None:
    sound = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(to_wav(noise())).decode(), "format": "wav"},
    }
    answer = client.chat.completions.create(
        model="speaker", messages=[{"role": "user", "content": [sound]}], max_tokens=5
    )
    assert answer.usage is not None and answer.usage.prompt_tokens > 10
    with pytest.raises(Exception, match="no modality of sound"):
        client.chat.completions.create(model="painter", messages=[{"role": "user", "content": [sound]}])


# --- video, models, health ---------------------------------------------------------------------------------------------


def test_videos(client: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # OpenAI ends its own service, not the shape of its API
        made = client.videos.create_and_poll(
            model="filmer", prompt="a ball", extra_body={"seed": "4"}, poll_interval_ms=20
        )
        assert made.status == "completed" and made.progress == 100, made.error
        data = client.videos.download_content(made.id).read()
        assert [one.id for one in client.videos.list()] == [made.id]
        clip = load_video(data)
        assert len(clip.frames) >= 1 and has_av() == (data[4:8] == b"ftyp")
        assert client.videos.delete(made.id).deleted
        with pytest.raises(Exception, match="there is no video"):
            client.videos.retrieve(made.id)


def test_sizes_are_refused_before_the_work(address: str, shelf: Shelf) -> None:
    for name, size in (("painter", (4, 4)), ("filmer", (16, 16))):
        pipeline = shelf.models[name].pipeline
        assert natural_size(pipeline, "image") == size
    answer = WEB.post(f"{address}/v1/videos", data={"model": "filmer", "prompt": "a", "size": "9x9"})
    assert answer.status_code == 400 and "whole multiple" in answer.json()["error"]["message"]
    assert WEB.get(f"{address}/v1/videos").json()["data"] == []
    asked = {"model": "painter", "prompt": "a", "size": "9x8", "n": 16, "stream": True}
    answer = WEB.post(f"{address}/v1/images/generations", json=asked)
    assert answer.status_code == 400 and "these proportions" in answer.json()["error"]["message"]


def test_models(client: Any) -> None:
    models = {model.id: model.model_extra for model in client.models.list()}
    assert list(models) == ["painter", "speaker", "filmer"]
    assert models["painter"] == {"tasks": ["chat", "image"], "voices": []}
    assert models["speaker"] == {"tasks": ["chat", "speech", "transcription"], "voices": ["ann", "theo"]}
    assert client.models.retrieve("filmer").model_extra == {"tasks": ["chat", "video"], "voices": []}


def test_health_and_metrics(address: str) -> None:
    assert WEB.get(f"{address}/health").json() == {"status": "ok", "models": ["painter", "speaker", "filmer"]}
    WEB.get(f"{address}/{'x' * 50}")
    answer = WEB.get(f"{address}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert 'mm_requests_total{route="/health",status="200"} 1.0' in lines
    assert 'mm_requests_total{route="other",status="404"} 1.0' in lines
    assert any(line.startswith('mm_passes_total{model="painter"}') for line in lines)


# --- many at once -----------------------------------------------------------------------------------------------------


def test_a_batched_answer_is_the_single_one(client: Any, shelf: Shelf) -> None:
    """Texts, captions and pictures of 24 clients at once are what each gets alone."""
    batcher = shelf.models["painter"].batcher

    def ask(number: int) -> Any:
        if number % 3 == 0:
            return client.images.generate(model="painter", prompt="r" * (1 + number), extra_body={"seed": number}).data
        messages: Any = see("a") if number % 3 == 1 else [{"role": "user", "content": "red" * (1 + number)}]
        made = client.chat.completions.create(
            model="painter", messages=messages, max_tokens=20 + number, seed=number, temperature=1.0
        )
        return made.choices[0].message.content

    before = batcher.fed
    single = [ask(number) for number in range(24)]
    passes, fed = batcher.passes, batcher.fed  # of one after the other
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, range(24))) == single
    assert batcher.fed - fed == fed - before, "as many rows in all passes"
    assert (batcher.fed - fed) / (batcher.passes - passes) > 2, "that shared their passes"


def test_a_ticket_knows_when_it_is_over() -> None:
    assert Ticket(0).gone() and not Ticket(60).gone()
    ticket = Ticket(60)
    ticket.leave()
    assert ticket.gone() and not ticket.expired
