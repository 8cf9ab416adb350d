"""Text, pictures, sound, video and shapes in, the same out, in any order that the model was trained for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from mm.audio import Audio
from mm.generation import Grid, Request
from mm.interfaces import Encoded, Sampling
from mm.layout import Segment
from mm.pipelines.base import Callback, check_count, choose_seed, several
from mm.pipelines.media import CLIPS, SHAPES, SOUNDS, Medium
from mm.pipelines.outputs import AnyOutput
from mm.pipelines.shape_to_text import ShapeReader
from mm.shapes import Shape
from mm.video import Frames, Video

if TYPE_CHECKING:  # imported where it is used, so that `import mm` stays fast
    from trimesh import Scene, Trimesh

    Mesh = Trimesh | Scene
else:
    Mesh = Any
Part = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | Audio | Video | Frames | Shape | Mesh | Segment
"""A text (str); a picture: the path of a file as `pathlib.Path`, its bytes, an open binary file, a PIL picture, or an array; a
sound: the path of a file whose ending says so, or `mm.Audio`; a clip: the path of a file whose ending says so, or of a folder of
pictures, `mm.video.Video`, or an array of frames; a shape: the path of a file whose ending says so, `mm.shapes.Shape`, or a
mesh of `trimesh`. Bytes and open files are what the model has: pictures, else sounds, else clips, else shapes. Raw data of any
other modality: `mm.layout.Segment(name, data)`."""
MEDIA: tuple[Medium, ...] = ("picture", "sound", "video", "shape")
"""What bytes and open files are taken for: the first of these that the model has."""
Document = Part | Sequence[Part]


class AnyToAnyPipeline(ShapeReader):
    """`pipeline(["a cat:", Path("cat.png"), "and a dog:"], to=["image"]).documents[0]`."""

    direction = ("text", "image")

    @torch.no_grad()
    def __call__(
        self,
        document: Document | Sequence[Sequence[Part]],
        *,
        to: str | Sequence[str] = (),
        free: bool = True,
        max_tokens: int = 256,
        sampling: Mapping[str, Sampling] | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> AnyOutput:
        """Continue one document, or several (a list of lists).

        Args:
            document: texts, pictures, sounds, clips and shapes in reading order. Strings are text; give paths as `pathlib.Path`.
            to: a modality or several, of which one item each is generated first, whatever the model would have opened.
            free: the model may open pictures, sounds and the like by itself; otherwise it writes text only (after `to`).
            max_tokens: positions generated at the most (after `to`), the end of the text one of them.
            sampling: by modality, where it differs from what the checkpoint recommends.
            seed, generator, callback: as for `TextToImagePipeline`.

        Raises:
            ValueError: an empty document, a modality that the model lacks, or more than its context holds.
        """
        seed = choose_seed(seed, generator)
        max_tokens = check_count("max_tokens", max_tokens)
        items: list[tuple[str, Grid]] = []
        for name in several(to, (str,), "`to`; give the name of a modality"):
            if not isinstance(name, str):
                raise ValueError(f"got a {type(name).__name__} for a modality of `to`; give its name")
            grid = self.model.vocabulary[name].max_grid
            if name == self.text:
                raise ValueError(f"{name!r} has no items to begin with; text is written anyway")
            items.append((name, grid if len(grid) > 1 else None))  # the model says how long a list is
        if not isinstance(sampling, Mapping | None):
            raise ValueError(f"got a {type(sampling).__name__} for sampling; give a mapping from modality to Sampling")
        chosen = {name: self.sampling(name, {}) for name in self.model.vocabulary.index} | dict(sampling or {})
        for name, value in chosen.items():
            self.model.vocabulary[name]  # refuses a modality that the model lacks
            if not isinstance(value, Sampling):
                raise ValueError(f"got a {type(value).__name__} for the sampling of {name!r}; give a Sampling")
        requests = [
            Request(prompt=prompt, items=items, free=free, max_tokens=max_tokens, by_modality=chosen)
            for prompt in self.encode(documents(document), items[0][0] if items else None)
        ]
        return AnyOutput([self.decode(segments) for segments in self.run(requests, seed, callback)], seed)

    def encode(self, documents: Sequence[Sequence[Part]], result: str | None = None) -> list[list[Segment]]:
        """Documents as segments; all pictures of all documents are encoded together, and all sounds, these as the modality
        that is heard where `result` is made of them."""
        if any(not document for document in documents):
            raise ValueError("the document is empty; give at least one text, picture, sound, clip or shape")
        given: list[Any] = [part for document in documents for part in document if not isinstance(part, str | Segment)]
        media = [self.medium(part) for part in given]
        encoders: dict[Medium, Callable[[list[Any]], list[Segment]]] = {
            "sound": lambda sounds: self.encode_sounds(sounds, self.hearing(result)) if sounds else [],
            "video": self.encode_videos,
            "picture": self.encode_pictures,
            "shape": self.encode_shapes,
        }
        made = {
            medium: iter(encode([part for part, its in zip(given, media, strict=True) if its == medium]))
            for medium, encode in encoders.items()
        }
        encoded = iter([next(made[medium]) for medium in media])

        def segment(part: Part) -> Segment:
            if isinstance(part, Segment):
                return self.encode_item(part)
            return self.encode_text(part) if isinstance(part, str) else next(encoded)

        return [[segment(part) for part in document] for document in documents]

    def encode_item(self, item: Segment) -> Segment:
        """A given item of any modality, raw or encoded. Raises `ValueError` for a modality that the model lacks, and for what its
        tokenizer can't encode."""
        self.model.vocabulary[item.modality]
        raw = item.content
        content = raw if isinstance(raw, Encoded) else self.tokenizer(item.modality).encode(raw)
        return Segment(item.modality, content, loss=False)

    def medium(self, part: Any) -> Medium:
        """What a part that is no text is taken for."""
        if isinstance(part, Image.Image):
            return "picture"
        if isinstance(part, Audio):
            return "sound"
        if isinstance(part, Shape) or hasattr(part, "faces") or hasattr(part, "geometry"):  # trimesh need not be there
            return "shape"
        if isinstance(part, os.PathLike | Video | np.ndarray):
            ending = Path(part).suffix.lower() if isinstance(part, os.PathLike) else ""
            if ending in {*SHAPES, ".npz"}:
                return "shape"
            if ending in SOUNDS and not (ending in CLIPS and "video" in self.media):  # .mp4 and .webm may be both
                return "sound"
            return "video" if self.is_clip(part) else "picture"
        return next((medium for medium in MEDIA if medium in self.media), "picture")

    def decode(self, segments: Sequence[Segment]) -> list[Any]:
        """The parts of one generated document: strings and what the other modalities' tokenizers decode to."""
        return [self.decode_items(segment.modality, [segment.content])[0] for segment in segments]


def documents(document: Any) -> list[Sequence[Part]]:
    """One document or several, as several."""
    if isinstance(document, list | tuple):
        if document and all(isinstance(part, list | tuple) for part in document):
            return list(document)
        return [document]
    return [[document]]
