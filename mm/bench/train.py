"""Training: a step of ours beside a step of what users would pick instead, AdamW on both sides, one thread.

- Dense rows: the same Llama weights and the same rows of equal length on both sides. The share of the matrix rate counts
  the products that the loss needs: 6 a weight and position (forward, and twice in the backward pass), and causal attention,
  12·width/2 a position and position before it.
- Uneven rows: captioned pictures (as ids) among texts whose lengths are lognormal, the same documents in every step. Ours
  are packed end to end; the peer's are padded to the longest of the batch, as its own data collators do.
- Text and pictures: `transfusion-pytorch`, the library for one transformer over both, on rows of a caption and a picture of
  64 positions. Width, depth, heads and positions are equal; the objectives are not. Theirs predicts the flow of 64
  continuous vectors (8 numbers each), ours 64 ids in raster order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mm.bench import Row, Settings, alternate
from mm.bench.language import VOCAB, pair
from mm.bench.limits import matrix_rate
from mm.interfaces import Decoded, Encoded, Modality, ModalityTokenizer, Spec
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.stream import TokenStream, pack

ROWS, LENGTH = 8, 128
"""Of a dense batch."""
DOCUMENTS, STEPS = 16, 4
"""Uneven rows: documents of a batch, and batches of a round."""
CAPTION, PICTURE, CODES, LATENT = 12, (8, 8), 1024, 8
"""Mixed rows: positions of the caption, grid and codebook of the picture, width of a latent on the other side."""


def rows(settings: Settings) -> Iterator[Row]:
    for width, layers in settings.sizes:
        yield from dense(width, layers, settings)
    width, layers = settings.sizes[0]
    yield from uneven(width, layers, settings)
    yield from mixed(width, layers, settings)


def stepper(model: torch.nn.Module, loss: Callable[[Any], torch.Tensor], batches: Sequence[Any]) -> Callable[[], None]:
    """A function that takes one training step a batch."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def run() -> None:
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            loss(batch).backward()
            optimizer.step()

    return run


def dense(width: int, layers: int, settings: Settings) -> Iterator[Row]:
    """Positions a second on rows of equal length."""
    model, peer, version = pair(width, layers)
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    stream = pack([document(model, row.tolist()) for row in ids])
    name, positions = f"train {width}×{layers}, dense rows", ids.numel()
    ours = stepper(model, lambda batch: model.loss(batch).total, [stream])
    theirs = stepper(peer, lambda batch: peer(input_ids=batch, labels=batch).loss, [ids])
    rate = matrix_rate(width)
    mine, other, ratio = alternate(ours, theirs, settings.rounds)
    yield Row(name, positions / mine, "positions/s", positions / other, ratio, version)
    share = flops(model, positions, LENGTH) / mine / 1e9
    yield Row(f"{name}, share of the matrix rate", share, "GFLOP/s", rate, share / rate, f"{rate:.0f} GFLOP/s")
    if settings.compile:
        import time

        model.backbone.compile()
        start = time.perf_counter()
        ours()
        first = time.perf_counter() - start
        mine, other, ratio = alternate(ours, theirs, settings.rounds)
        yield Row(f"{name}, compiled", positions / mine, "positions/s", positions / other, ratio, version)
        yield Row(f"{name}, compiling", first, "s")


def flops(model: MultimodalModel, positions: int, length: int) -> float:
    """Of one step on rows of `length`: what the loss needs, nothing that is computed twice or masked away."""
    config = model.backbone.config
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.embedding.weight.numel()
    matrices -= model.mask.weight.numel()
    attention = 12 * config.layers * config.heads * config.head_dim * length / 2
    return positions * (6 * matrices + attention)


def document(model: MultimodalModel, ids: list[int]) -> TokenStream:
    """A text with `bos` in place of its first id: as many positions and predictions as the peer's row."""
    stream = model.build_document([Segment("text", ids[1:])], torch.Generator(), close=False)
    if len(stream) != len(ids) or int((stream.target >= 0).sum()) != len(ids) - 1:
        raise ValueError(
            f"a text of {len(ids)} ids became {len(stream)} positions: the two sides would do unequal work"
        )
    return stream


def uneven(width: int, layers: int, settings: Settings) -> Iterator[Row]:
    """Useful positions a second: those of the documents, not those of the padding."""
    model, peer, version = pair(width, layers)
    batches = [[torch.randint(VOCAB, (n,)) for n in lengths(DOCUMENTS, seed)] for seed in range(STEPS)]
    useful = sum(len(row) for batch in batches for row in batch)
    streams = [pack([document(model, row.tolist()) for row in batch]) for batch in batches]
    padded = [padding(batch) for batch in batches]
    ours = stepper(model, lambda batch: model.loss(batch).total, streams)
    theirs = stepper(peer, lambda batch: peer(**batch).loss, padded)
    mine, other, ratio = alternate(ours, theirs, settings.rounds)
    share = useful / sum(batch["input_ids"].numel() for batch in padded)
    name = f"train {width}×{layers}, uneven rows ({share:.0%} of the padded batch is useful)"
    yield Row(name, useful / mine, "positions/s", useful / other, ratio, version)


def lengths(count: int, seed: int) -> list[int]:
    """Half captioned pictures of 64 codes, half texts: lognormal around 90 positions, 8 to 512."""
    rng = torch.Generator().manual_seed(seed)
    texts = torch.empty(count - count // 2).log_normal_(4.5, 0.8, generator=rng).long().clamp(8, 512)
    captions = torch.randint(6, 24, (count // 2,), generator=rng) + PICTURE[0] * PICTURE[1]
    order = torch.randperm(count, generator=rng)
    return torch.cat((texts, captions))[order].tolist()


def padding(batch: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `transformers`' collators: filled up on the right to the longest row, masked, and not learned."""
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, content in enumerate(batch):
        ids[row, : len(content)] = labels[row, : len(content)] = content
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Codes(ModalityTokenizer):
    """Pictures that are ids already."""

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=CODES, max_grid=PICTURE, fingerprint="codes")

    def encode(self, raw: torch.Tensor) -> Encoded:
        return Encoded(grid=PICTURE, ids=raw)

    def decode(self, encoded: Encoded) -> Decoded:
        return Decoded(value=encoded.ids)


def mixed(width: int, layers: int, settings: Settings) -> Iterator[Row]:
    """Rows of a caption and a picture, a second."""
    try:
        from importlib.metadata import version

        from transfusion_pytorch import Transfusion
    except ImportError:
        raise ValueError("the peer transfusion-pytorch is not installed; `make setup-bench` installs it") from None
    from mm.backbone import BackboneConfig
    from mm.bench.language import Ids
    from mm.plugins import load

    lm, raster = load("heads", "lm"), load("orders", "raster")
    modalities = [
        Modality(name="text", tokenizer=Ids(), head=lm(), order=raster()),
        Modality(name="image", tokenizer=Codes(), head=lm(), order=raster()),
    ]
    heads = width // 64
    model = MultimodalModel(BackboneConfig(width=width, layers=layers, heads=heads, head_dim=64), modalities)
    peer = Transfusion(
        num_text_tokens=VOCAB, dim_latent=LATENT, modality_default_shape=PICTURE, modality_num_dim=2,
        transformer={"dim": width, "depth": layers, "dim_head": 64, "heads": heads},
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    captions = torch.randint(VOCAB, (ROWS, CAPTION), generator=rng)
    codes = torch.randint(CODES, (ROWS, PICTURE[0] * PICTURE[1]), generator=rng)
    latents = torch.randn(ROWS, *PICTURE, LATENT, generator=rng)
    stream = pack([
        model.build_document([Segment("text", c.tolist()), Segment("image", p)], rng)
        for c, p in zip(captions, codes, strict=True)
    ])  # fmt: skip
    ours = stepper(model, lambda batch: model.loss(batch).total, [stream])
    samples = [[caption, latent] for caption, latent in zip(captions, latents, strict=True)]
    theirs = stepper(peer, lambda batch: peer(batch), [samples])
    mine, other, ratio = alternate(ours, theirs, settings.rounds)
    yield Row(
        f"train {width}×{layers}, captions and pictures", ROWS / mine, "rows/s", ROWS / other, ratio,
        f"transfusion-pytorch {version('transfusion-pytorch')}",
    )  # fmt: skip
