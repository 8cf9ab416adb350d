"""Media as requests bring them and answers carry them: bounded, decoded by our own loaders, never a file's name."""

from __future__ import annotations

import base64
import binascii
import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mm.audio import Audio, load_audio, resample
from mm.media import load_image
from mm.resampling import Resampler
from mm.serve.errors import Refusal

if TYPE_CHECKING:
    from PIL import Image

    from mm.pipelines.base import Pipeline

MAX_PIXELS = 1 << 24
"""Largest width × height of a picture that is sent (4096 × 4096)."""
MAX_SIDE = 2048
"""Longest side of a picture that is asked for."""
MAX_SECONDS = 600.0
"""Longest sound that is sent."""
PCM_RATE = 24_000
"""Samples a second of sound without a header, as clients expect them."""
SOUND_TYPES = {
    "mp3": "audio/mpeg", "opus": "audio/ogg", "flac": "audio/flac", "wav": "audio/wav", "pcm": "audio/pcm",
}  # fmt: skip
RATES = {
    "mp3": (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000),
    "opus": (8000, 12000, 16000, 24000, 48000),
}
"""Those that a format knows; sounds of other rates are resampled to `PCM_RATE`."""
STREAMED = ("wav", "pcm")
"""Formats that need not know the end before the beginning."""


# --- in -------------------------------------------------------------------------------------------------------------


def data_uri(uri: str, param: str) -> bytes:
    """What stands in a `data:` URI. Raises `Refusal` for any other address: nothing is ever fetched."""
    head, comma, content = uri.partition(",")
    scheme, _, kind = head[:200].partition(":")
    if scheme.lower() != "data" or not comma or not kind.lower().endswith(";base64"):
        raise Refusal(
            400,
            f"{param} must be a data: URI in base64 (data:image/png;base64,…); addresses are not fetched",
            param=param,
        )
    return base64_bytes(content, param)


def base64_bytes(text: str, param: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{param} is not base64", param=param) from error
    if not data:
        raise Refusal(400, f"{param} is empty", param=param)
    return data


def picture(data: bytes) -> Image.Image:
    return load_image(data, max_pixels=MAX_PIXELS)


def sound(data: bytes) -> Audio:
    return load_audio(data, max_seconds=MAX_SECONDS)


# --- pictures out ---------------------------------------------------------------------------------------------------


def picture_bytes(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    if form == "jpeg":
        image.save(file, "JPEG", quality=95)
    else:
        image.save(file, form.upper(), lossless=True)
    return file.getvalue()


def natural_size(pipeline: Pipeline, name: str) -> tuple[int, int]:
    """Width and height of the pictures or frames that a modality makes, by one of nothing but zeros."""
    spec = pipeline.tokenizer(name).spec
    if spec.pixels:
        return spec.pixels[1], spec.pixels[0]
    grid = (1, *spec.max_grid[1:]) if spec.fps else spec.max_grid
    shape = {"discrete": (), "codes": (spec.num_codes,), "continuous": (spec.dim,)}[spec.kind]
    content = torch.zeros(spec.count(grid), *shape, dtype=torch.float32 if spec.kind == "continuous" else torch.int64)
    made = pipeline.decode_items(name, [spec.item(content, grid)])[0]
    return made.size if hasattr(made, "size") else made.frames.shape[2:0:-1]


def picture_size(size: str | None, natural: tuple[int, int]) -> tuple[int, int]:
    """Width and height that are asked for. Raises `Refusal` for other proportions than the model's."""
    if size is None or size == "auto":
        return natural
    width, height = map(int, size.split("x"))
    if max(width, height) > MAX_SIDE:
        raise Refusal(400, f"size is up to {MAX_SIDE}x{MAX_SIDE}, got {size}", param="size")
    if width * natural[1] != height * natural[0]:
        raise Refusal(
            400, f"the model draws {natural[0]}x{natural[1]}; ask for these proportions, got {size}", param="size"
        )
    return width, height


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Whole factors enlarge each pixel to a square, which shows what the model drew."""
    from PIL import Image as Pillow

    if image.size == size:
        return image
    whole = size[0] % image.width == 0 and size[1] % image.height == 0
    return image.resize(size, Pillow.Resampling.NEAREST if whole else Pillow.Resampling.LANCZOS)


# --- sounds out -----------------------------------------------------------------------------------------------------


def sound_bytes(audio: Audio, form: str) -> bytes:
    """A file of one of `SOUND_TYPES`; 16 bits, clipped at full scale."""
    if form == "pcm":
        return _whole(resample(audio, PCM_RATE).samples).tobytes()
    import soundfile

    if audio.rate not in RATES.get(form, (audio.rate,)):
        audio = resample(audio, PCM_RATE)
    file = io.BytesIO()
    kind, subtype = {"mp3": ("MP3", None), "opus": ("OGG", "OPUS")}.get(form, (form.upper(), "PCM_16"))
    soundfile.write(file, _whole(audio.samples), audio.rate, format=kind, subtype=subtype)
    return file.getvalue()


class Sounding:
    """A sound that is sent while it is made, as one of `SOUND_TYPES`."""

    def __init__(self, form: str) -> None:
        self.form, self.rate = form, 0
        self._resampler: Resampler | None = None
        self._kept: list[Audio] = []

    def feed(self, piece: Audio) -> Iterator[bytes]:
        if self.form not in STREAMED:
            self._kept.append(piece)
            return
        if not self.rate:
            self.rate = piece.rate
            if self.form == "wav":
                yield wav_head(piece.rate)
            elif piece.rate != PCM_RATE:
                self._resampler = Resampler(piece.rate, PCM_RATE)
        samples = piece.samples if self._resampler is None else self._resampler.feed(piece.samples)
        if len(samples):
            yield _whole(samples).tobytes()

    def finish(self) -> Iterator[bytes]:
        if self._resampler is not None:
            yield _whole(self._resampler.finish()).tobytes()
        if self._kept:
            rate = self._kept[0].rate
            yield sound_bytes(Audio(np.concatenate([piece.samples for piece in self._kept]), rate), self.form)


def wav_head(rate: int) -> bytes:
    """Of a file whose length isn't known yet: its sizes are the largest there are."""
    most = 0xFFFFFFFF
    form = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", most)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", most)
    )


def _whole(samples: Any) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.clip(np.round(np.asarray(samples) * 32768.0), -32768, 32767).astype("<i2")


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()
