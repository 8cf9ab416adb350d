"""The model under test: what it draws, what it writes, what its tokenizer keeps. Everything by seed.

Letters in shapes: N pictures, S side in pixels.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from mm import pictures
from mm.evaluate.results import Figure
from mm.interfaces import Encoded, ModalityTokenizer, Sampling
from mm.model import MultimodalModel
from mm.pipelines.abilities import abilities_of
from mm.pipelines.base import Pipeline
from mm.pipelines.image_to_text import ImageToTextPipeline
from mm.pipelines.text_to_image import TextToImagePipeline


@dataclass(frozen=True)
class Drawn:
    """Generated pictures."""

    pixels: UInt8[Tensor, "N 3 S S"]
    valid: list[bool]
    """Whether each decoded without repair."""
    reasons: list[str]
    seconds: float
    """Of generating and decoding them all."""


@dataclass(frozen=True)
class Written:
    """Generated captions."""

    texts: list[str]
    valid: list[bool]
    """Whether each was proper text."""
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a family of figures hands over: the figures; prompts and pictures to show; all that was generated."""

    figures: list[Figure]
    prompts: list[str]
    shown: Drawn
    drawn: list[Drawn]
    written: list[Written]
    name: str = ""
    """Of the contact sheet; by default the family of the figures."""


def held_model(model: MultimodalModel | Pipeline | Any) -> tuple[MultimodalModel, dict[str, Any]]:
    """The model that is meant, and the sampling that its pipeline recommends. Raises `ValueError` where there is none."""
    recommended = dict(model.recommended) if isinstance(model, Pipeline) else {}
    held = model if isinstance(model, MultimodalModel) else getattr(model, "model", None)
    if not isinstance(held, MultimodalModel):
        raise ValueError(f"got a {type(model).__name__} to evaluate; give a model, a pipeline or a training module")
    return held, recommended


class Tested:
    """The beginning of what is evaluated: a model that was given in one form or another, and what it is to be asked with.

    Args:
        model: a `MultimodalModel`, a pipeline, or whatever holds a model as its `model` (a training module).
        name: what the results call it.
        sampling: fields of `Sampling` for what it makes, instead of what the checkpoint recommends.
        batch: rows that are generated at once.

    Raises:
        ValueError: no model, or one without what is to be evaluated.
    """

    def __init__(
        self,
        model: MultimodalModel | Pipeline | Any,
        *,
        name: str = "model",
        sampling: Mapping[str, Any] | None = None,
        batch: int = 32,
    ) -> None:
        self.model, self.recommended = held_model(model)
        self.name, self.options, self.batch = name, dict(sampling or {}), batch
        self._open()

    def _open(self) -> None:
        """Make the pipelines."""


class Subject(Tested):
    """A model with text and pictures, used the way its pipelines use it."""

    def _open(self) -> None:
        held, recommended, batch = self.model, self.recommended, self.batch
        self.draws = TextToImagePipeline(held, recommended, batch)
        self.writes = ImageToTextPipeline(held, recommended, batch)
        self.sampling = self.draws.sampling(self.draws.picture, self.options)
        self.text_sampling = self.writes.sampling(self.writes.text, {}, Sampling(temperature=0.0))
        self.side = max(self.tokenizer.spec.pixels or self.tokenizer.decode(self._blank()).value.size)
        """Side of the pictures that the tokenizer decodes, in pixels."""

    @property
    def tokenizer(self) -> ModalityTokenizer:
        """Of the pictures."""
        return self.draws.tokenizer(self.draws.picture)

    @property
    def learned_captions(self) -> bool:
        """Whether training showed it captions of pictures, as far as is known."""
        return "picture" in abilities_of(self.writes).reads

    @property
    def grid(self) -> tuple[int, ...]:
        return self.model.vocabulary[self.draws.picture].max_grid

    def _blank(self) -> Encoded:
        """Tokens of the largest picture, all zero."""
        spec = self.tokenizer.spec
        count = spec.count(self.grid)
        if spec.kind == "discrete":
            return spec.item(torch.zeros(count, dtype=torch.int64), self.grid)
        if spec.kind == "codes":
            return spec.item(torch.zeros(count, spec.num_codes, dtype=torch.int64), self.grid)
        return spec.item(torch.zeros(count, spec.dim), self.grid)

    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def draw(self, prompts: Sequence[str], seed: int, constrained: bool = True) -> Drawn:
        """One picture a prompt; equal prompts give different ones. `seed` and prompt decide, not the batch. `constrained` as in
        `TextToImagePipeline`."""
        started = time.perf_counter()
        encoded = self.draws.encode(list(prompts))
        tokens = self.draws.generate(encoded, sampling=self.sampling, seed=seed, constrained=constrained)
        decoded = self._decode(tokens)
        seconds = time.perf_counter() - started
        pixels = [pictures.to_bytes(pictures.fit_square(d.value, self.side)) for d in decoded]
        return Drawn(_stack(pixels, self.side), [d.valid for d in decoded], [d.reason for d in decoded], seconds)

    def write(self, pixels: UInt8[Tensor, "N 3 S S"], seed: int, max_tokens: int) -> Written:
        """A caption for each picture."""
        started = time.perf_counter()
        prompts = self.writes.encode([pictures.to_image(p) for p in pixels])
        tokens = self.writes.generate(prompts, max_tokens=max_tokens, sampling=self.text_sampling, seed=seed)
        decoded = self.writes.tokenizer(self.writes.text).decode_batch(tokens)
        seconds = time.perf_counter() - started
        return Written([str(d.value) for d in decoded], [d.valid for d in decoded], seconds)

    def encode(self, pixels: UInt8[Tensor, "N 3 S S"]) -> list[Encoded]:
        """Tokens of pictures."""
        parts = pixels.split(self.batch)
        return [e for part in parts for e in self.tokenizer.encode_batch([pictures.to_image(p) for p in part])]

    def reconstruct(self, pixels: UInt8[Tensor, "N 3 S S"]) -> UInt8[Tensor, "N 3 S S"]:
        """What is left of pictures after the tokenizer, there and back."""
        decoded = self._decode(self.encode(pixels))
        return _stack([pictures.to_bytes(pictures.fit_square(d.value, self.side)) for d in decoded], self.side)

    def _decode(self, tokens: Sequence[Encoded]) -> list[Any]:
        starts = range(0, len(tokens), self.batch)
        return [d for s in starts for d in self.tokenizer.decode_batch(list(tokens[s : s + self.batch]))]


def _stack(pixels: Sequence[Tensor], side: int) -> UInt8[Tensor, "N 3 S S"]:
    return torch.stack(list(pixels)) if pixels else torch.zeros(0, 3, side, side, dtype=torch.uint8)


def fingerprint(model: MultimodalModel) -> str:
    """Hash of every weight and of the vocabulary, which names the tokenizers' fingerprints."""
    digest = hashlib.sha256(json.dumps(model.vocabulary.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
