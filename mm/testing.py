"""Tiny real parts for tests, debugging and documentation: no downloads, no training, milliseconds."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from mm.attention import Packed
from mm.audio import Audio
from mm.backbone import BackboneConfig
from mm.cache import Chunk, KVCache
from mm.generation import Engine, Request, assemble
from mm.interfaces import Automaton, Decoded, Draw, Encoded, Head, Modality, ModalityTokenizer, Order, Spec
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.stream import TokenStream, pack
from mm.tracks import Feed


class Palette(ModalityTokenizer):
    """A picture as one id a pixel: the nearest of 8 colours (one bit a channel). Lossless on pictures of those."""

    def __init__(self, side: int = 4) -> None:
        self.side = side

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=8, max_grid=(self.side, self.side), fingerprint=f"palette-{self.side}")

    def encode(self, raw: Image.Image) -> Encoded:
        small = raw.convert("RGB")
        if max(small.size) > self.side:
            small = small.resize((self.side, self.side))
        pixels = torch.tensor(list(small.tobytes())).view(small.height, small.width, 3)
        ids = ((pixels > 127).long() * torch.tensor([4, 2, 1])).sum(-1)
        return Encoded(grid=(small.height, small.width), ids=ids.flatten())

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.ids is not None
        bits = (encoded.ids[:, None] // torch.tensor([4, 2, 1])) % 2
        pixels = (bits * 255).to(torch.uint8).view(*encoded.grid, 3)
        return Decoded(value=Image.fromarray(pixels.numpy()))


class Frames(ModalityTokenizer):
    """Sound as frames of `dim` samples, a vector each; silence fills the last one."""

    def __init__(self, dim: int = 2, most: int = 64, rate: int = 100) -> None:
        self.dim, self.most, self.rate = dim, most, rate

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="continuous",
            dim=self.dim,
            max_grid=(self.most,),
            sample_rate=self.rate,
            frame_rate=self.rate / self.dim,
            fingerprint=f"frames-{self.dim}-{self.most}-{self.rate}",
        )

    def encode(self, raw: Audio) -> Encoded:
        samples = torch.tensor(raw.samples)
        count = -(-len(samples) // self.dim)
        if raw.rate != self.rate or not 1 <= count <= self.most:
            raise ValueError(
                f"got {count} frames at {raw.rate} samples a second, expected 1..{self.most} at {self.rate}"
            )
        padded = torch.nn.functional.pad(samples, (0, count * self.dim - len(samples)))
        return Encoded(grid=(count,), latents=padded.view(count, self.dim))

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.latents is not None
        return Decoded(value=Audio(encoded.latents.nan_to_num().flatten().numpy(), self.rate))


class Clips(ModalityTokenizer):
    """Clips (steps, rows, columns, D) of up to `most` steps of 2×2 vectors, as they are."""

    def __init__(self, dim: int = 5, most: int = 6) -> None:
        self.dim, self.most = dim, most

    @property
    def spec(self) -> Spec:
        grid = (self.most, 2, 2)
        return Spec(
            kind="continuous", dim=self.dim, max_grid=grid, fps=8.0, fingerprint=f"clips-{self.dim}-{self.most}"
        )

    def encode(self, raw: Tensor) -> Encoded:
        return Encoded(grid=(len(raw), 2, 2), latents=raw.flatten(0, 2))

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.latents is not None
        return Decoded(value=encoded.latents.view(*encoded.grid, self.dim))


class Levels(ModalityTokenizer):
    """Sound as frames of `num_codes` samples, a sub-code each: the nearest of 8 levels from −1 to 1. Silence fills the last."""

    def __init__(self, num_codes: int = 4, most: int = 64, rate: int = 100) -> None:
        self.num_codes, self.most, self.rate = num_codes, most, rate

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="codes",
            vocab_size=8,
            num_codes=self.num_codes,
            max_grid=(self.most,),
            sample_rate=self.rate,
            frame_rate=self.rate / self.num_codes,
            fingerprint=f"levels-{self.num_codes}-{self.most}-{self.rate}",
        )

    def encode(self, raw: Audio) -> Encoded:
        count = min(self.most, max(1, -(-len(raw.samples) // self.num_codes)))
        samples = torch.zeros(count * self.num_codes)
        given = torch.tensor(raw.samples)[: len(samples)]
        samples[: len(given)] = given
        codes = (samples.clamp(-1, 1) * 3.5 + 3.5).round().long().view(count, self.num_codes)
        return Encoded(grid=(count,), codes=codes)

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.codes is not None
        return Decoded(value=Audio((encoded.codes.flatten().float() / 3.5 - 1).numpy(), self.rate))


BRACKETS = "()[]x"
CLOSED = {0: 1, 2: 3}
"""Ids of opening brackets → those of the closing ones."""


class Brackets(ModalityTokenizer):
    """A text of brackets and the letter x as a list of free length: one id a letter, and one at the end. It is valid where the
    brackets close in turn, of which there is a pair at least; `automatic`: and then nothing else can be generated."""

    def __init__(self, automatic: bool = True) -> None:
        self.automatic = automatic

    @property
    def spec(self) -> Spec:
        stop = len(BRACKETS)
        return Spec(kind="discrete", vocab_size=stop + 1, stop=stop, least=3, fingerprint="brackets")

    def encode(self, raw: str) -> Encoded:
        return Encoded(grid=(len(raw) + 1,), ids=torch.tensor([*map(BRACKETS.index, raw), self.spec.stop]))

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.ids is not None
        ids = encoded.ids.tolist()
        letters = "".join(BRACKETS[i] for i in ids if i < self.spec.stop)
        return Decoded(value=letters, valid=ids[-1:] == [self.spec.stop] and balanced(letters))

    def automaton(self) -> Automaton | None:
        return Balance() if self.automatic else None


class Balance(Automaton):
    """What may follow in `Brackets`."""

    def __init__(self) -> None:
        self.open: list[int] = []
        self.paired = False

    def allowed(self, room: int) -> Bool[Tensor, " V"]:
        mask = torch.zeros(len(BRACKETS) + 1, dtype=torch.bool)
        if self.open:
            mask[CLOSED[self.open[-1]]] = True
        else:
            mask[-1] = self.paired
        least = len(self.open) + 1 if self.paired else 3  # elements that are needed from here on
        mask[[0, 2]] = room >= len(self.open) + 3 or not self.paired
        mask[4] = room > least
        return mask

    def accept(self, token: int) -> None:
        if token in CLOSED:
            self.open.append(token)
            self.paired = True
        elif self.open and token == CLOSED[self.open[-1]]:
            self.open.pop()


def balanced(letters: str) -> bool:
    """Whether brackets close in turn, of which there is a pair at least."""
    plain = letters.replace("x", "")
    while plain != (fewer := plain.replace("()", "").replace("[]", "")):
        plain = fewer
    return not plain and letters.strip("x") != ""


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A shard of the given members, names and contents as they are."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def stream(
    order: Sequence[int], copy: Sequence[int] | None = None, document: Sequence[int] | None = None, **fields: Any
) -> TokenStream:
    """A stream by hand: one modality, ids 0, 1, 2 …, coordinates 0, 1, 2 … within each document, no targets; `fields`
    replaces what differs."""
    count = len(order)
    belongs = torch.zeros(count, dtype=torch.int64) if document is None else torch.tensor(document, dtype=torch.int64)
    place = torch.arange(count)
    start = torch.searchsorted(belongs, belongs)
    values: dict[str, Any] = {
        "modality": torch.zeros(count, dtype=torch.int64),
        "ids": place,
        "document": belongs,
        "order": torch.tensor(order, dtype=torch.int64),
        "copy": torch.zeros(count, dtype=torch.int64) if copy is None else torch.tensor(copy, dtype=torch.int64),
        "position": (place - start).float()[:, None].expand(-1, 3),
        "time": torch.zeros(count),
        "target": torch.full((count,), -1),
        "weight": torch.zeros(count),
    }
    return TokenStream(**{**values, **fields})


def rule(stream: TokenStream) -> Bool[Tensor, "T T"]:
    """The visibility rule as a double loop over positions: the reference that every mask is held to."""
    documents, orders, copies = stream.document.tolist(), stream.order.tolist(), stream.copy.tolist()
    places = range(len(stream))
    seen = [
        [
            documents[i] == documents[j]
            and ((copies[j] == 0 and orders[j] < orders[i]) or (orders[j] == orders[i] and copies[j] == copies[i]))
            for j in places
        ]
        for i in places
    ]
    return torch.tensor(seen, dtype=torch.bool).view(len(stream), len(stream))


def tiny(
    order: Order | None = None,
    *,
    seed: int = 0,
    side: int = 4,
    context: int = 256,
    tokenizer: ModalityTokenizer | None = None,
    head: Head | None = None,
    **backbone: Any,
) -> MultimodalModel:
    """A random model of text and pictures (by default of a palette, with a language-model head), a few thousand weights."""
    from mm.plugins import load

    torch.manual_seed(seed)
    raster, lm = load("orders", "raster"), load("heads", "lm")
    config = BackboneConfig(**{"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, **backbone})
    modalities = [
        Modality(name="text", tokenizer=load("tokenizers", "text_bytes")(), head=lm(), order=raster()),
        Modality(name="image", tokenizer=tokenizer or Palette(side), head=head or lm(), order=order or raster()),
    ]
    model = MultimodalModel(config, modalities, context=context)
    for parameter in model.parameters():  # zero-initialised layers would hide mistakes
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


Seen = list[tuple[Tensor, Draw, Tensor]]
"""All hidden states that a head got in a call, what one row asked of it, and the tokens that it drew."""


def watch(model: MultimodalModel) -> dict[str, Seen]:
    """What every head is asked from now on, by modality."""
    seen: dict[str, Seen] = {}
    for modality in model.modalities:
        own = seen[modality.name] = Seen()
        head = model.head(modality.name)

        def sample(hidden: Tensor, draws: Sequence[Draw], own: Seen = own, sample: Any = head.sample) -> Any:
            made = sample(hidden, draws)
            own += [(hidden, draw, tokens) for draw, (tokens, _) in zip(draws, made, strict=True)]
            return made

        head.sample = sample  # type: ignore[method-assign]
    return seen


@torch.no_grad()
def predictors(model: MultimodalModel, tokens: TokenStream, name: str) -> Tensor:
    """Hidden states, all evaluated at once, of the positions that predict this modality, in the order of what is predicted."""
    owner = model.vocabulary.index[name]
    places = [p for p, t in enumerate(tokens.target.tolist()) if t >= 0 and int(tokens.modality[t]) == owner]
    return model(tokens)[sorted(places, key=lambda p: int(tokens.target[p]))]


class Uncached(Engine):
    """Evaluates every row's whole past again in every pass, packed, without a cache."""

    def _run(self, requests: Sequence[Request], on_step: Any) -> list[list[Segment]]:
        self.past: dict[int, list[TokenStream]] = {}
        return super()._run(requests, on_step)

    def _forward(self, feeds: list[Feed], cache: KVCache, count: int, *_: Any) -> Tensor:
        documents = []
        for feed in feeds:
            slot = feed.slot(count)
            if feed.reset:
                self.past.pop(slot, None)
            now = replace(
                assemble([feed], self.model.device),
                order=torch.tensor(feed.order),
                copy=torch.tensor(feed.copy or [0] * len(feed.order)),
            )
            documents.append([*self.past.get(slot, []), now])
            if feed.keep:
                self.past[slot] = documents[-1]
        cache.commit([Chunk(feed.slot(count), feed.order, feed.copy, feed.keep) for feed in feeds])
        whole = [pack(parts) for parts in documents]
        stream = pack([replace(one, document=torch.zeros_like(one.document)) for one in whole])
        hidden = self.model(stream, Packed(stream)).split(stream.lengths)
        return torch.cat([h[-len(feed.order) :] for h, feed in zip(hidden, feeds, strict=True)])
