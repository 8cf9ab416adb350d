"""Text, pictures and sound in, the same out, in any order that the model was trained for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image

from mm.audio import Audio
from mm.generation import Grid, Request
from mm.interfaces import Sampling
from mm.layout import Segment
from mm.pipelines.base import SOUNDS, Callback, Pipeline, check_count, choose_seed, several
from mm.pipelines.outputs import AnyOutput

Part = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | Audio
"""A text (str); a picture: the path of a file as `pathlib.Path`, its bytes, an open binary file, or a PIL picture; or a sound:
the path of a file whose ending says so, or `mm.Audio`. Bytes and open files are sounds for a model that has no pictures."""
Document = Part | Sequence[Part]


class AnyToAnyPipeline(Pipeline):
    """`pipeline(["a cat:", Path("cat.png"), "and a dog:"], to=["image"]).documents[0]`."""

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
            document: texts, pictures and sounds in reading order. Strings are text; give paths as `pathlib.Path`.
            to: a modality or several, of which one item each is generated first, whatever the model would have opened.
            free: the model may open pictures and sounds by itself; otherwise it writes text only (after `to`).
            max_tokens: positions generated at the most (after `to`).
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
            if not grid:
                raise ValueError(f"{name!r} has no items of a fixed size to begin with; text is written anyway")
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
            for prompt in self.encode(documents(document))
        ]
        return AnyOutput([self.decode(segments) for segments in self.run(requests, seed, callback)], seed)

    def encode(self, documents: Sequence[Sequence[Part]]) -> list[list[Segment]]:
        """Documents as segments; all pictures of all documents are encoded together, and all sounds."""
        if any(not document for document in documents):
            raise ValueError("the document is empty; give at least one text, picture or sound")
        given: list[Any] = [part for document in documents for part in document if not isinstance(part, str)]
        sounds = [self._is_sound(part) for part in given]
        audible = iter(self.encode_sounds([part for part, sound in zip(given, sounds, strict=True) if sound]))
        visible = iter(self.encode_pictures([part for part, sound in zip(given, sounds, strict=True) if not sound]))
        encoded = iter([next(audible) if sound else next(visible) for sound in sounds])
        return [
            [self.encode_text(part) if isinstance(part, str) else next(encoded) for part in document]
            for document in documents
        ]

    def _is_sound(self, part: Any) -> bool:
        if isinstance(part, Audio):
            return True
        if isinstance(part, os.PathLike):
            return Path(part).suffix.lower() in SOUNDS
        return not isinstance(part, Image.Image) and all(len(e.max_grid) != 2 for e in self.model.vocabulary.entries)

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
