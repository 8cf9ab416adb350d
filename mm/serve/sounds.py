"""`POST /v1/audio/speech` and `/v1/audio/transcriptions`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, UploadFile
from starlette.responses import PlainTextResponse

from mm.audio import Audio
from mm.pipelines.speech_to_text import SpeechToTextPipeline
from mm.pipelines.text_to_speech import TextToSpeechPipeline
from mm.serve.desk import Tell, Ticket
from mm.serve.errors import RESPONSES, Refusal
from mm.serve.files import SOUND_TYPES, STREAMED, Sounding, base64_text, sound
from mm.serve.place import STREAM, Place, broken, sent, streamed
from mm.serve.schemas import SpeechRequest, Temperature, Transcription, VerboseTranscription, VoiceId, Words

Written = Literal["json", "text", "verbose_json"]
MAX_TOKENS = 256
"""Longest text of one piece of a sound."""


def routes(place: Place) -> APIRouter:
    router = APIRouter(tags=["sound"])
    kinds = streamed(STREAM, *SOUND_TYPES.values())

    @router.post("/v1/audio/speech", responses={**RESPONSES, **kinds})
    async def speak(asked: SpeechRequest, request: Request) -> Any:
        """The text spoken. WAV and PCM (24 kHz, 16 bits) are sent while they are made; `stream_format: sse` sends any format as
        events `speech.audio.delta` and `speech.audio.done`."""
        served = place.shelf.choose("speech", asked.model)
        voice = known_voice(asked.voice, served.pipeline.model.voices)
        events = asked.stream_format == "sse"

        def work(ticket: Ticket, tell: Tell) -> None:
            speaker = served.open(TextToSpeechPipeline, ticket)
            for piece in spoken(
                speaker, asked.input, voice, asked.response_format, asked.seed, asked.speed, asked.sampling()
            ):
                tell(sent({"type": "speech.audio.delta", "audio": base64_text(piece)}, named=True) if events else piece)
            if events:
                tell(sent({"type": "speech.audio.done"}, named=True))

        kind = STREAM if events else SOUND_TYPES[asked.response_format]
        return await place.desk.stream(request, work, kind, broken if events else None)

    @router.post(
        "/v1/audio/transcriptions",
        response_model=Transcription | VerboseTranscription,
        responses={**RESPONSES, **streamed(STREAM, "text/plain; charset=utf-8")},
    )
    async def transcribe(
        request: Request,
        file: Annotated[UploadFile, File(description="WAV, FLAC, Ogg, MP3 and others; its name is not looked at.")],
        model: Annotated[str | None, Form(max_length=200)] = None,
        language: Annotated[str | None, Form(max_length=20)] = None,
        prompt: Annotated[Words | None, Form(description="Is not used.")] = None,
        response_format: Annotated[Written, Form()] = "json",
        temperature: Annotated[Temperature | None, Form()] = None,
        stream: Annotated[bool, Form()] = False,
    ) -> Any:
        """What is said in a sound. `stream`: events `transcript.text.delta`, one a piece of the sound, and
        `transcript.text.done`."""
        served = place.shelf.choose("transcription", model or None)
        data = await file.read()
        options: Any = {} if temperature is None else {"temperature": temperature}

        def listen(ticket: Ticket) -> tuple[SpeechToTextPipeline, Audio]:
            return served.open(SpeechToTextPipeline, ticket), sound(data)

        def work(ticket: Ticket) -> dict[str, Any]:
            listener, heard = listen(ticket)
            text = listener(heard, max_tokens=MAX_TOKENS, seed=0, **options).texts[0]
            if response_format != "verbose_json":
                return {"text": text}
            whole = {"id": 0, "start": 0.0, "end": heard.seconds, "text": text}
            about = {"task": "transcribe", "language": language or "unknown", "duration": heard.seconds}
            return {**about, "text": text, "segments": [whole] if text else []}

        def live(ticket: Ticket, tell: Tell) -> None:
            listener, heard = listen(ticket)
            texts: list[str] = []
            seen: Counter[bytes] = Counter()
            sampling = listener.sampling(listener.text, {"temperature": 0.0, **options})
            for piece in listener.pieces(heard):
                made = listener.generate(
                    listener.encode([piece]), max_tokens=MAX_TOKENS, sampling=sampling, seed=0, seen=seen
                )
                if text := listener.decode(made)[0].strip():
                    delta = f" {text}" if texts else text
                    tell(sent({"type": "transcript.text.delta", "delta": delta}, named=True))
                    texts.append(text)
            tell(sent({"type": "transcript.text.done", "text": " ".join(texts)}, named=True))

        if stream:
            return await place.desk.stream(request, live, STREAM, broken)
        made = await place.desk.run(request, work)
        return PlainTextResponse(made["text"] + "\n") if response_format == "text" else made

    return router


def known_voice(voice: str | VoiceId | None, known: tuple[str, ...]) -> str | None:
    """A voice by name: anything else would be taken for a file's name. Raises `Refusal` for one that the model doesn't know."""
    name = voice.id if isinstance(voice, VoiceId) else voice
    if name is None or name in known:
        return name
    there = ", ".join(known) or "none by name; leave it out"
    raise Refusal(
        400, f"there is no voice {name[:60]!r}; this model knows {there}", param="voice", code="voice_not_found"
    )


def spoken(
    speaker: TextToSpeechPipeline,
    text: str,
    voice: str | None,
    form: str,
    seed: int | None,
    speed: float = 1.0,
    sampling: dict[str, Any] | None = None,
) -> Iterator[bytes]:
    """A file of speech in pieces: as soon as they are certain, where the format allows that."""
    out = Sounding(form)
    options: dict[str, Any] = {"voice": voice, "stretch": 1 / speed, "seed": seed, **(sampling or {})}
    if form in STREAMED:
        with closing(speaker.stream(text, **options)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                yield from out.feed(piece)
    else:
        made = speaker(text, **options)
        yield from out.feed(Audio(made.audios[0], made.sample_rate))
    yield from out.finish()
