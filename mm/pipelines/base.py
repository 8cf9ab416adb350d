"""What all pipelines share: a model with its recommended sampling, seeds that mean one thing in any batch, batches of
bounded size."""

from __future__ import annotations

import hashlib
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal, TypedDict, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mm import hub
from mm.audio import Audio, SoundSource, load_audio
from mm.batching import Generates
from mm.generation import Engine, Event, Request
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Sampling
from mm.layout import NULL, Segment
from mm.media import load_image
from mm.model import MultimodalModel
from mm.pipelines.media import ANIMATED, CLIPS, FILMS, MODELLERS, SPEAKERS, Medium, longest, medium_of, most_frames
from mm.video import Video, VideoSource, load_video, moves

P = TypeVar("P", bound="Pipeline")
Callback = Callable[[Event], None]
Picture = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray[Any, Any]
"""A path, the bytes of a file, an open binary file, a PIL picture, or an array (`mm.media.array_pixels`)."""
SOUND_SECONDS = 600.0
"""Seconds of given sounds at which no more are loaded before these are encoded."""
AT_ONCE = 1 << 24
"""Pixels of given pictures and clips at which no more are loaded before these are encoded (4096 × 4096)."""
MOST = 100_000
"""Most results of one call: they are kept until all are there."""


class SamplingOptions(TypedDict, total=False):
    """Fields of `mm.interfaces.Sampling`, as keywords of a pipeline's call. What isn't given is what the checkpoint
    recommends, or else that class's default."""

    temperature: float
    top_k: int
    top_p: float
    steps: int
    denoising_steps: int
    guidance: float
    context_guidance: float | None
    guidance_schedule: Literal["constant", "ramp"]
    guidance_interval: tuple[float, float]


class Pipeline:
    """A model and how to use it.

    Args:
        model: a model whose first modality is text.
        sampling: recommended sampling by modality.
        batch_size: rows that are generated at once; more are generated batch after batch.
    """

    direction = ("text", "image")
    """What is given and what is made, by the names of shipped models: of those that learned it `from_pretrained` loads one."""
    engine: Generates | None = None
    """What generates, in place of an engine of the pipeline's own: a server's batcher."""

    def __init__(
        self, model: MultimodalModel, sampling: Mapping[str, Sampling] | None = None, batch_size: int = 32
    ) -> None:
        batch_size = check_count("batch_size", batch_size)
        self.model, self.recommended, self.batch_size = model.eval(), dict(sampling or {}), batch_size

    @classmethod
    def from_pretrained(
        cls: type[P], path_or_name: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu"
    ) -> P:
        """A pipeline with the model of a checkpoint: the name of one that is shipped, a folder, or a hub name; None: the one that
        is shipped for this.

        Raises `ValueError` as `mm.hub.load_pretrained`.
        """
        device = choose_device(device)  # before the seconds that loading takes
        folder = hub.resolve(hub.usual(*cls.direction) if path_or_name is None else path_or_name)
        return cls(hub.load_pretrained(folder), hub.load_sampling(hub.read_config(folder))).to(device)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        card: str | None = None,
        *,
        storage: Literal["float32", "float16"] = "float32",
    ) -> Path:
        """Write a checkpoint folder that `from_pretrained` reads; see `mm.hub.save_pretrained`."""
        return hub.save_pretrained(self.model, path, card, storage=storage, sampling=self.recommended)

    def to(self: P, device: torch.device | str) -> P:
        """Move model and tokenizers. Raises `ValueError` for a device that isn't there."""
        device = choose_device(device)
        self.model.to(device)
        for modality in self.model.modalities:
            if isinstance(modality.tokenizer, nn.Module):
                modality.tokenizer.to(device)
        return self

    # --- the model's modalities -----------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """Name of the host modality."""
        return self.model.vocabulary.host.name

    @property
    def picture(self) -> str:
        """Name of the first modality of pictures. Raises `ValueError` where there is none."""
        return self._first("picture", "pictures; it has {}")

    @property
    def speech(self) -> str:
        """Name of the first modality beside the host whose tokenizer is one of sound. Raises `ValueError` where there is none."""
        return self._first("sound", f"sound; it has {{}}; {SPEAKERS}")

    def hearing(self, made: str | None = None) -> str:
        """Name of the modality that given sounds are read with, where `made` (a modality; text by default) is made of them: the
        first of sound that training showed before it, one that does nothing but read before others (as Janus sees through another
        tokenizer than it draws with: Wu et al. 2024, arXiv 2410.13848); where there is none, `speech`. Raises `ValueError` where
        there is no modality of sound."""
        shown = {given for given, what in self.model.directions or () if what == (made or self.text)}
        sounds = [one for one in self.model.modalities[1:] if medium_of(one.tokenizer.spec) == "sound"]
        fit = sorted((one for one in sounds if one.name in shown), key=lambda one: one.tokenizer.decodes)
        return fit[0].name if fit else self.speech

    @property
    def video(self) -> str:
        """Name of the first modality beside the host whose tokenizer is one of video. Raises `ValueError` where there is none."""
        return self._first("video", f"video; it has {{}}; {FILMS}")

    @property
    def shape(self) -> str:
        """Name of the first modality beside the host whose tokenizer is one of shapes. Raises `ValueError` if there is none."""
        return self._first("shape", f"shapes; it has {{}}; {MODELLERS}")

    @property
    def media(self) -> frozenset[Medium]:
        """What the model has beside text."""
        return frozenset(
            medium for modality in self.model.modalities[1:] if (medium := medium_of(modality.tokenizer.spec))
        )

    def _first(self, medium: Medium, otherwise: str) -> str:
        for modality in self.model.modalities[1:]:
            if medium_of(modality.tokenizer.spec) == medium:
                return modality.name
        raise ValueError(f"this model has no modality of {otherwise.format(', '.join(self.model.vocabulary.index))}")

    def tokenizer(self, name: str) -> ModalityTokenizer:
        return self.model.modalities[self.model.vocabulary.index[name]].tokenizer

    def sampling(self, name: str, options: Mapping[str, Any], fallback: Sampling | None = None) -> Sampling:
        """Sampling of a modality: what the call says, else what the checkpoint recommends, else `fallback`. Raises
        `ValueError` for an unknown option, and for numbers of steps where nothing is done in steps."""
        known = SamplingOptions.__annotations__
        if unknown := [option for option in options if option not in known]:
            raise ValueError(f"unknown option {unknown[0]!r}; options of sampling are {', '.join(known)}")
        made = self.model.modalities[self.model.vocabulary.index[name]]
        denoises = hasattr(made.order, "sampler"), hasattr(made.head, "sampler")
        able = {"steps": denoises[0] or made.order.default_steps > 0, "denoising_steps": any(denoises)}
        if odd := [option for option, can in able.items() if options.get(option) and not can]:
            how = f"({type(made.order).__name__.lower()} order, {type(made.head).__name__})"
            raise ValueError(f"{name!r} is made in no steps that could be counted {how}; leave {odd[0]} out")
        return replace(self.recommended.get(name, fallback or Sampling()), **options)

    # --- shared steps -----------------------------------------------------------------------------------------------

    def encode_text(self, text: str) -> Segment:
        """A given text. Raises `ValueError` for what isn't text."""
        if not isinstance(text, str):
            raise ValueError(f"got a {type(text).__name__} for a text; give a string")
        return Segment(self.text, self.tokenizer(self.text).encode(text), loss=False)

    def encode_prompts(self, prompts: Sequence[str | None], what: str) -> list[list[Segment]]:
        """Each prompt as the beginning of a document; None is the null condition. Raises `ValueError` for an empty one; `what`
        says what it shows."""
        documents = []
        for prompt in prompts:
            said = prompt.strip() if isinstance(prompt, str) else prompt  # a space at the end makes another last word
            if said == "":
                raise ValueError(f"the prompt is empty; say what the {what} shows (None stands for any {what})")
            documents.append([Segment(NULL, None, loss=False) if said is None else self.encode_text(said)])
        return documents

    def encode_pictures(self, pictures: Sequence[Picture]) -> list[Segment]:
        """Given pictures. Raises `ValueError` for what can't be loaded."""
        if not pictures:
            return []
        tokenizer = self.tokenizer(self.picture)
        encoded: list[Encoded] = []
        batch: list[Image.Image] = []
        pixels = 0
        for number, picture in enumerate(pictures, 1):
            batch.append(load_image(picture))
            pixels += batch[-1].width * batch[-1].height
            if len(batch) == self.batch_size or pixels >= AT_ONCE or number == len(pictures):
                encoded += tokenizer.encode_batch(batch)
                batch, pixels = [], 0  # large pictures must not all be in memory at once
        return [Segment(self.picture, item, loss=False) for item in encoded]

    def encode_sounds(self, sounds: Sequence[SoundSource], name: str | None = None) -> list[Segment]:
        """Given sounds, at the model's rate, of the modality `name` (by default `hearing()`). Raises `ValueError` for what
        can't be loaded, or is longer than one item."""
        if not sounds:
            return []
        name = name or self.hearing()
        tokenizer = self.tokenizer(name)
        most = longest(tokenizer)
        encoded: list[Encoded] = []
        batch: list[Audio] = []
        for number, sound in enumerate(sounds, 1):
            loaded = load_audio(sound, rate=tokenizer.spec.sample_rate)
            if loaded.seconds > most + 0.5 / tokenizer.spec.sample_rate:
                raise ValueError(
                    f"a sound is {loaded.seconds:.2f} s long, and {name!r} holds up to {most:.2f} s at a time; cut it"
                )
            batch.append(loaded)
            full = sum(audio.seconds for audio in batch) >= SOUND_SECONDS
            if len(batch) == self.batch_size or full or number == len(sounds):
                encoded += tokenizer.encode_batch(batch)
                batch = []  # they must not all be in memory at once
        return [Segment(name, item, loss=False) for item in encoded]

    def encode_videos(self, videos: Sequence[VideoSource]) -> list[Segment]:
        """Given clips, at the model's rate. Raises `ValueError` for what can't be loaded, or is longer than one item."""
        if not videos:
            return []
        name, tokenizer = self.video, self.tokenizer(self.video)
        most = most_frames(tokenizer.spec)
        encoded: list[Encoded] = []
        batch: list[Video] = []
        pixels = 0
        for number, source in enumerate(videos, 1):
            clip = self.load_video(source)
            if len(clip.frames) > most:
                raise ValueError(
                    f"a clip has {len(clip.frames)} frames at {clip.fps:g} a second, and {name!r} holds up to {most} at a time; "
                    "cut it"
                )
            batch.append(clip)
            pixels += clip.frames.size // 3
            if len(batch) == self.batch_size or pixels >= AT_ONCE or number == len(videos):
                encoded += tokenizer.encode_batch(batch)
                batch, pixels = [], 0  # they must not all be in memory at once
        return [Segment(name, item, loss=False) for item in encoded]

    def is_clip(self, source: Any) -> bool:
        """Whether something seen is to be taken for a clip, not for a picture. A file of an animation is a clip if it moves."""
        if isinstance(source, Image.Image):
            return False
        if isinstance(source, np.ndarray):  # grey frames have another extent where a picture has its colours
            return source.ndim > 2 and not (source.ndim == 3 and source.shape[2] in (1, 3, 4))
        if isinstance(source, Video):
            return True
        if {"picture", "video"} <= self.media and isinstance(source, str | os.PathLike):
            ending = Path(source).suffix.lower()
            return ending in CLIPS - ANIMATED or os.path.isdir(source) or (ending in ANIMATED and moves(source))
        return "video" in self.media and "picture" not in self.media

    def load_video(self, source: VideoSource) -> Video:
        """A clip at the model's frames a second. Frames that say no rate (arrays, lists, folders) are taken to be at that one."""
        rate = self.tokenizer(self.video).spec.fps
        timeless = isinstance(source, list | tuple | np.ndarray) or (
            isinstance(source, str | os.PathLike) and os.path.isdir(source)
        )
        return Video(load_video(source).frames, rate) if timeless else load_video(source, fps=rate)

    def wrap(self, name: str, content: Tensor, grid: tuple[int, ...]) -> Encoded:
        """Elements of a modality as an item."""
        return self.tokenizer(name).spec.item(content.clone(), grid)

    def decode_items(self, name: str, items: Sequence[Encoded]) -> list[Any]:
        """Raw data of generated items of one modality."""
        return [decoded.value for decoded in self.decoded(name, items)]

    def decoded(self, name: str, items: Sequence[Encoded]) -> list[Decoded]:
        """As `decode_items`, with whether each was valid."""
        tokenizer = self.tokenizer(name)
        return [
            decoded
            for start in range(0, len(items), self.batch_size)
            for decoded in tokenizer.decode_batch(list(items[start : start + self.batch_size]))
        ]

    def run(
        self,
        requests: Sequence[Request],
        seed: int,
        callback: Callback | None = None,
        *,
        seen: Counter[bytes] | None = None,
        batch_size: int = 0,
    ) -> list[list[Segment]]:
        """Segments that the engine generates for each request, batch after batch. Seeds of the requests are replaced:
        they follow from `seed`, the prompt, and how many rows before had this prompt, so neither the other prompts
        nor the batch size change a result, and equal prompts give different ones. `callback` sees each step; `row`
        counts through all batches. `seen` counts prompts through several calls; `batch_size` replaces the pipeline's."""
        seed = choose_seed(seed, None)
        seen, size = Counter() if seen is None else seen, batch_size or self.batch_size
        seeded = []
        for request in requests:
            key = _digest(request.prompt)
            seeded.append(replace(request, seed=_derive(seed, key, seen[key])))
            seen[key] += 1
        engine = self.engine or Engine(self.model)
        out = []
        for start in range(0, len(seeded), size):
            on_step = None if callback is None else shifted(callback, start, len(seeded))
            out += engine.generate(seeded[start : start + size], on_step)
        return out


def choose_device(device: torch.device | str) -> torch.device:
    """A device on which tensors can be made. Raises `ValueError` for one that isn't there."""
    try:
        chosen = torch.device(device)
        if chosen.type != "meta":  # which holds no values
            torch.empty(1, device=chosen)
            return chosen
    except Exception as error:  # each backend raises another type
        raise ValueError(f"there is no device {device!r:.60} here; use {_devices()}") from error
    raise ValueError(f"nothing can be computed on the device 'meta'; use {_devices()}")


def _devices() -> str:
    names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    return " or ".join([*names, *(["mps"] if torch.backends.mps.is_available() else [])])


def choose_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed of a call: given, drawn from the given generator, or from torch's global one."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, got a {type(generator).__name__}; or give a seed")
    if seed is not None and generator is not None:
        raise ValueError("got both seed and generator; give one of them")
    if seed is None:
        return int(torch.randint(1 << 31, (), generator=generator, device=generator.device if generator else "cpu"))
    number = whole(seed)
    if number is None or not 0 <= number < 1 << 63:
        raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, got {seed!r:.60}")
    return number


def whole(value: Any) -> int | None:
    """A whole number of any library as Python's; None for what is none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_count(name: str, value: int, each: int = 0) -> int:
    """A number of at least 1; of results of which so many are made for `each` input, all together no more than `MOST`."""
    number = whole(value)
    if number is None:
        raise ValueError(f"{name} must be a whole number, got {value!r:.60}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if number * each > MOST:
        of = f" for each of {each}" if each > 1 else ""
        raise ValueError(
            f"{name} is {number:,}{of}, and one call makes up to {MOST:,}; ask for fewer, in several calls"
        )
    return number


def several(value: Any, one: tuple[type, ...], what: str) -> list[Any]:
    """One or several, as several. Raises `ValueError` for what is neither; `what` names one, and what to give."""
    if isinstance(value, one) or hasattr(value, "read"):  # an open file, which would be read line by line
        return [value]
    if isinstance(value, Mapping | str | bytes) or not isinstance(value, Iterable):
        raise ValueError(f"got a {type(value).__name__} for {what}, or a list of them")
    return list(value)


def _digest(prompt: Sequence[Segment]) -> bytes:
    digest = hashlib.sha256()
    for segment in prompt:
        digest.update(f"{segment.modality}\0".encode())
        if isinstance(segment.content, Encoded):
            content = segment.content.content.detach().cpu().contiguous()
            digest.update(f"{segment.content.grid}\0{content.dtype}\0".encode() + content.numpy().tobytes())
    return digest.digest()


def _derive(seed: int, key: bytes, number: int) -> int:
    derived = hashlib.sha256(seed.to_bytes(8, "little") + number.to_bytes(8, "little") + key).digest()
    return int.from_bytes(derived[:8], "little") >> 1


def shifted(callback: Callback, start: int, rows: int = 0) -> Callback:
    """A callback of some rows, told of them as the rows from `start` on, of `rows` or as many more as there are."""
    return lambda event: callback(replace(event, row=event.row + start, rows=rows or event.rows + start))
