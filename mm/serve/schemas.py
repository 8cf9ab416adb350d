"""What requests hold, and within which bounds. Fields that aren't named here are let pass unread: clients send many."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LONGEST_PROMPT = 4096
"""Characters."""
MOST_SEED = (1 << 63) - 1


def _plain(text: str) -> str:
    """Raises `ValueError` for control characters other than line ends and tabs."""
    if any((ord(c) < 32 and c not in "\t\n\r") or 127 <= ord(c) < 160 for c in text):
        raise ValueError("the text has control characters; leave them out")
    return text


Text = Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT), AfterValidator(_plain)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED, description="The same seed gives the same answer.")]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Portion = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Guidance = Annotated[float, Field(ge=0, le=20, allow_inf_nan=False, description="Strength of the prompt; 1 = off.")]
Steps = Annotated[int, Field(ge=1, le=256, description="Refinement steps, of models that have them.")]
Size = Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$")]


class Body(BaseModel):
    model_config = ConfigDict(strict=True)


class Sampled(Body):
    """What all generations may be told; left out, it is what the checkpoint recommends."""

    model: Name | None = Field(None, description="One of `/v1/models`; left out, the model that does this best.")
    seed: Seed | None = None
    temperature: Temperature | None = None
    top_p: Portion | None = None

    def sampling(self) -> dict[str, Any]:
        """Options of a pipeline."""
        names = ("temperature", "top_p", "guidance", "steps")
        return {name: value for name in names if (value := getattr(self, name, None)) is not None}


# --- pictures and shapes --------------------------------------------------------------------------------------------


class ImageRequest(Sampled):
    prompt: Text
    n: int = Field(1, ge=1, le=16)
    size: Size | None = Field(None, description="`auto`: as the model draws; enlarged or reduced to this otherwise.")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="`url` gives a `data:` URI: nothing is stored."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = None
    guidance: Guidance | None = None
    steps: Steps | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3, description="Looks at unfinished pictures, when streaming.")


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    created: int
    data: list[ImageData]
    output_format: str
    size: str
    seed: int


class ShapeRequest(Sampled):
    prompt: Text | None = None
    image: str | None = Field(None, min_length=1, description="A picture as a `data:` URI, in the place of the prompt.")
    n: int = Field(1, ge=1, le=16)
    format: Literal["glb", "obj", "ply", "stl", "off"] = "glb"
    guidance: Guidance | None = None
    steps: Steps | None = None


class ShapeData(BaseModel):
    b64_json: str
    valid: bool
    reason: str


class Shapes(BaseModel):
    created: int
    data: list[ShapeData]
    format: str
    seed: int


# --- sound ----------------------------------------------------------------------------------------------------------

SoundFormat = Literal["mp3", "opus", "flac", "wav", "pcm"]


class VoiceId(Body):
    id: Name


class SpeechRequest(Sampled):
    input: Text
    voice: Name | VoiceId | None = None
    response_format: SoundFormat = "mp3"
    speed: float = Field(1.0, ge=0.25, le=4, allow_inf_nan=False)
    stream_format: Literal["audio", "sse"] = "audio"


class Transcription(BaseModel):
    text: str


class Segment(BaseModel):
    id: int
    start: float
    end: float
    text: str


class VerboseTranscription(BaseModel):
    task: str
    language: str
    duration: float
    text: str
    segments: list[Segment]


# --- video ----------------------------------------------------------------------------------------------------------


class VideoError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A piece of work, which is asked for until it is done."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    seconds: str
    size: str
    error: VideoError | None = None


class Videos(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    has_more: bool = False


class Deleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


# --- chat -----------------------------------------------------------------------------------------------------------


class TextPart(Body):
    type: Literal["text"]
    text: Annotated[str, Field(max_length=LONGEST_PROMPT), AfterValidator(_plain)]


class ImageUrl(Body):
    url: str = Field(min_length=1, description="A `data:` URI. Addresses are never fetched.")


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Body):
    data: str = Field(min_length=1, description="A sound file in base64.")
    format: Annotated[str, Field(max_length=20)] | None = None


class AudioPart(Body):
    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]
Words = Annotated[str, Field(max_length=LONGEST_PROMPT), AfterValidator(_plain)]


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[Part], Field(max_length=64)] | None = None


class StreamOptions(Body):
    include_usage: bool | None = None


class ChatAudio(Body):
    voice: Name | VoiceId | None = None
    format: SoundFormat | Literal["pcm16"] = "wav"


Stop = Annotated[str, Field(min_length=1, max_length=100)]


class ChatRequest(Sampled):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=64)]
    n: int | None = Field(None, ge=1, le=8)
    max_tokens: int | None = Field(None, ge=1, le=4096)
    max_completion_tokens: int | None = Field(None, ge=1, le=4096)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    modalities: Annotated[list[Literal["text", "audio", "image"]], Field(min_length=1, max_length=3)] | None = None
    audio: ChatAudio | None = None
    guidance: Guidance | None = None
    steps: Steps | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | list[dict[str, Any]] | None
    audio: dict[str, Any] | None = None
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: ChatAnswer
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Chat(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


# --- models ---------------------------------------------------------------------------------------------------------


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mm"
    tasks: list[str] = Field(description="What it can be asked for, by its modalities.")
    voices: list[str] = Field(description="Voices that it knows by name.")


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    models: list[str]
