"""The model: embed a stream, run the backbone, route hidden states to heads. Knows modalities by number, never by name.

Letters in shapes: T packed positions, W width, n selected positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.attention import AttentionPlan, Packed
from mm.backbone import Backbone, BackboneConfig, Float32Buffers
from mm.diffusion import Process
from mm.directions import Directions
from mm.fusion import Fusion
from mm.grammar import Grammar
from mm.interfaces import Fusion as Way
from mm.interfaces import Head, Modality
from mm.layout import DocumentBuilder
from mm.stream import TokenStream
from mm.vocabulary import NAMED, SIZES, Vocabulary

Injected = tuple[Float[Tensor, "C W"], Int[Tensor, " C"]]
"""Vectors, and the positions where they are added."""


@dataclass(frozen=True)
class LossReport:
    """Loss of one batch: `total` = Σ over modalities of the weighted mean over its predicted positions."""

    total: Float[Tensor, ""]
    raw: dict[str, Tensor]
    """Mean loss a predicted position, by modality, before weights."""
    weighted: dict[str, Tensor]
    count: dict[str, int]


class MultimodalModel(nn.Module):
    """Embeddings, backbone and heads for a list of modalities.

    The first modality is the host: its ids come first, and its head also predicts the control tokens. Raises `ValueError`
    when a head, an order and a tokenizer do not fit each other.
    """

    def __init__(self, backbone: BackboneConfig, modalities: Sequence[Modality], context: int = 1024) -> None:
        super().__init__()
        self.vocabulary = Vocabulary([(m.name, m.tokenizer.spec) for m in modalities])
        self.modalities = list(modalities)
        self.context = context
        self.null_seen: bool | None = None
        """Whether training showed it the null condition, which guidance needs; None: not known."""
        self.voices: tuple[str, ...] = ()
        """Names of voices that training showed it, sorted; speech may be asked for in each."""
        self.directions: Directions | None = None
        """(given, made) modalities that training showed it (`mm.directions`); None: not known."""
        self.by_word = False
        """Whether it learned to speak word by word (`mm.data.documents.TextToSpeech`)."""
        self.grammar = Grammar(self.vocabulary)
        self.build_document = DocumentBuilder(self.modalities, self.vocabulary)
        width = backbone.width
        self.backbone = Backbone(backbone)
        self.embedding = nn.Embedding(len(self.vocabulary), width)
        self.mask = nn.Embedding(len(self.modalities), width)
        """What the backbone reads where a position's content is hidden (time 1 of the masked order)."""
        self.heads = nn.ModuleDict()
        self.code_embeddings, self.latent_embeddings, self.inject = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for number, modality in enumerate(self.modalities):
            spec = modality.tokenizer.spec
            modality.order.check(spec)
            modality.order.attach(modality.tokenizer)
            modality.head.build(width=width, spec=spec, controls=0 if number else NAMED + SIZES)
            self.heads[modality.name] = modality.head
            if spec.kind == "codes":
                self.code_embeddings[modality.name] = nn.Embedding(spec.num_codes * spec.vocab_size, width)
            elif spec.kind == "continuous":
                self.latent_embeddings[modality.name] = modality.tokenizer.embedding(width)
            for name, features in getattr(modality.order, "conditions", {}).items():
                known = self.inject[name].features if name in self.inject else features
                if known != features:
                    raise ValueError(
                        f"{modality.name}: its order conditions on {features} facts as {name!r}, the other on {known}; "
                        "give both orders the same number of micro-conditions"
                    )
                if name not in self.inject:
                    self.inject[name] = Conditions(features, width)
            if number and not spec.max_grid and not spec.is_free:
                raise ValueError(
                    f"{modality.name}: its tokenizer says neither how large its items may be nor which id ends a list of free "
                    "length; only the first modality may do without"
                )
            if spec.stop >= 0 and spec.max_grid and not modality.order.ends:
                raise ValueError(
                    f"{modality.name}: its items may end early, which {type(modality.order).__name__} doesn't know; give it "
                    "an order that does, such as delay"
                )
            own: dict[str, nn.Module] = {n: Fusion(f, width, modality.fusion) for n, f in spec.alongside.items()}
            for name, module in (own | {n: Vectors(f, width) for n, f in modality.order.vectors.items()}).items():
                if name in self.inject:
                    raise ValueError(
                        f"{modality.name}: another modality has {name!r}, too; give each a name of its own"
                    )
                self.inject[name] = module
        for table in (self.embedding, self.mask, *self.code_embeddings.values()):
            nn.init.normal_(cast(nn.Embedding, table).weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def head(self, name: str) -> Head:
        """The head of a modality."""
        return cast(Head, self.heads[name])

    # --- forward ----------------------------------------------------------------------------------------------------

    def draw_noise(self, stream: TokenStream) -> dict[str, Tensor]:
        """Noise for the vectors that the backbone itself denoises, by modality (those whose order has a process)."""
        return {
            name: torch.randn_like(record.values)
            for name, record in stream.latents.items()
            if self.process(self.vocabulary.index[name]) is not None
        }

    def process(self, number: int) -> Process | None:
        """What a modality's positions are corrupted with at a time between 0 and 1; None: they are hidden (masked order)."""
        return getattr(self.modalities[number].order, "process", None)

    def embed(self, stream: TokenStream, noise: Mapping[str, Tensor] | None = None) -> Float[Tensor, "T W"]:
        """What the backbone reads: the truth corrupted to each position's time. Without `noise`, vectors that the backbone
        denoises are taken to be corrupted already (generation)."""
        if stream.codes or stream.latents:
            x = F.embedding(stream.ids.clamp(min=0), self.embedding.weight) * (stream.ids >= 0)[:, None]
            for name, record in stream.codes.items():
                table, codes = cast(nn.Embedding, self.code_embeddings[name]), record.read
                per_code = table.num_embeddings // codes.shape[1]
                shifted = codes + per_code * torch.arange(codes.shape[1], device=codes.device)
                valid = (codes >= 0)[..., None]
                x = x.index_add(0, record.index, (table(shifted.clamp(min=0)) * valid).sum(1).to(x.dtype))
            for name, record in stream.latents.items():
                values = record.read
                if record.reads is None and noise is not None and name in noise:
                    process = self.process(self.vocabulary.index[name])
                    assert process is not None
                    values = process.corrupt(values, noise[name], stream.time[record.index])
                x = x.index_add(0, record.index, self.latent_embeddings[name](values.to(x.dtype)).to(x.dtype))
        else:
            x = self.embedding(stream.ids)
        hidden = stream.time > 0
        if bool(hidden.any()):
            for number in range(len(self.modalities)):
                if self.process(number) is not None:
                    hidden = hidden & (stream.modality != number)
            x = torch.where(hidden[:, None], self.mask(stream.modality), x)
        return self.added(x, self.injected(stream, "early"))

    def injected(self, stream: TokenStream, way: Way) -> Injected | None:
        """Vectors that enter the backbone this way, and the positions where they do."""
        found = [(self.inject[name], record) for name, record in stream.inject.items()]
        chosen = [(module(record.values), record.index) for module, record in found if module.way == way]
        if not chosen:
            return None
        return torch.cat([values for values, _ in chosen]), torch.cat([index for _, index in chosen])

    @staticmethod
    def added(x: Float[Tensor, "T W"], injected: Injected | None) -> Float[Tensor, "T W"]:
        return x if injected is None else x.index_add(0, injected[1], injected[0].to(x.dtype))

    def forward(
        self, stream: TokenStream, plan: AttentionPlan | None = None, noise: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "T W"]:
        """Hidden state of every position; `plan` defaults to attention inside the packed documents, `noise` as `embed`."""
        middle = self.injected(stream, "middle")
        every = None if middle is None else dict.fromkeys(range(self.backbone.config.layers), middle)
        x = self.backbone(self.embed(stream, noise), stream.position, plan or Packed(stream), stream.time, every)
        return self.added(x, self.injected(stream, "late"))

    def logits(self, stream: TokenStream, name: str) -> Tensor:
        """Teacher-forced logits of one modality's head at every position."""
        head = cast(Any, self.heads[name])  # only heads of ids have logits
        return head.logits(self(stream))

    # --- loss -------------------------------------------------------------------------------------------------------

    def loss(self, stream: TokenStream, counts: Mapping[str, Tensor] | None = None) -> LossReport:
        """Routing: the head of `modality[target[p]]` gets hidden state p. `counts` (predicted positions by modality) replaces
        the batch's own, when the mean is to be taken over several ranks."""
        raw, weighted, count = {}, {}, {}
        noise = self.draw_noise(stream)
        hidden = self(stream, noise=noise)
        total = hidden.sum() * 0.0
        for name, source, losses in self.losses(stream, hidden, noise):
            weight = stream.weight[source]
            denominator = counts[name] if counts is not None else len(source)
            raw[name] = losses.detach().sum() / denominator
            term = (weight * losses).sum() / denominator
            weighted[name], count[name] = term.detach(), len(source)
            total = total + term
        return LossReport(total, raw, weighted, count)

    def losses(
        self, stream: TokenStream, hidden: Float[Tensor, "T W"], noise: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[str, Int[Tensor, " n"], Float[Tensor, " n"]]]:
        """For each modality that is predicted: its name, the positions that predict it, and the loss of each. `noise` is
        what the hidden states were made with."""
        predicting = (stream.target >= 0).nonzero()[:, 0]
        target = stream.target[predicting]
        owner = stream.modality[target]
        for number, modality in enumerate(self.modalities):
            places = (owner == number).nonzero()[:, 0] if len(self.modalities) > 1 else torch.arange(len(owner))
            if len(places):
                source = predicting[places]
                truth = self.truth(stream, number, target[places], noise)
                yield modality.name, source, self.head(modality.name).loss(hidden[source], truth)

    def untouched(self) -> Float[Tensor, ""]:
        """0, with a gradient of zeros for every parameter that a batch may have no use for (heads, mask vectors,
        conditions). Ranks of a data-parallel run add it, for they wait for each other's gradients of all parameters."""
        parts = (
            self.embedding, self.mask, self.heads, self.code_embeddings, self.latent_embeddings, self.inject,
        )  # fmt: skip
        parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
        return torch.stack([0.0 * p[(0,) * p.ndim] for p in parameters]).sum() if parameters else torch.zeros(())

    def truth(
        self, stream: TokenStream, number: int, places: Int[Tensor, " n"], noise: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """What the modality's head is to predict at the given positions: local ids, sub-codes, vectors, or what the process
        asks of them."""
        entry = self.vocabulary.entries[number]
        if entry.kind == "discrete":
            return stream.ids[places] - entry.start
        record = (stream.codes if entry.kind == "codes" else stream.latents)[entry.name]
        where = torch.full((len(stream),), -1, device=stream.device)
        where[record.index] = torch.arange(len(record.index), device=stream.device)
        values, process = record.values[where[places]], self.process(number)
        if process is not None and noise is not None and entry.name in noise:
            return process.target(values, noise[entry.name][where[places]], stream.time[places])
        return values


class Conditions(Float32Buffers):
    """Scalar facts (mask rate, size, score) → width: sinusoids of each, then a two-layer network. The last layer starts at zero,
    so that a condition added to a trained model changes nothing at first."""

    way: Way = "early"

    def __init__(self, features: int, width: int, bands: int = 32) -> None:
        super().__init__()
        self.features = features
        self.up, self.down = nn.Linear(2 * bands * features, width), nn.Linear(width, width)
        self.register_buffer("frequency", torch.logspace(0, 3, bands, dtype=torch.float32), persistent=False)
        self.frequency: Tensor
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, values: Float[Tensor, "n F"]) -> Float[Tensor, "n W"]:
        angle = (values.float()[..., None] * self.frequency).flatten(1)
        features = torch.cat((angle.cos(), angle.sin()), -1).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(features)))


class Vectors(nn.Linear):
    """Vectors that an order injects → width."""

    way: Way = "early"

    def forward(self, values: Float[Tensor, "n F"]) -> Float[Tensor, "n W"]:
        return super().forward(values.to(self.weight.dtype))
