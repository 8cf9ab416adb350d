"""Decoding, batch 1, greedy, the same weights: our engine beside `transformers` `generate`, and beside the memory.

At batch 1 every token reads every weight once, so that no program on this machine writes a token faster than the weights
are read. The share of that limit is what is left of the time when all else is taken away.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from mm.bench import Row, Settings, alternate
from mm.bench.language import VOCAB, pair
from mm.bench.limits import bandwidth
from mm.generation import Engine, Request
from mm.interfaces import Sampling
from mm.layout import Segment
from mm.model import MultimodalModel

PROMPT = 16
CACHE = 64 << 20
"""Models smaller than this may stay in the processor's cache: memory is no limit for them."""


def rows(settings: Settings) -> Iterator[Row]:
    for width, layers in settings.sizes:
        yield from decode(width, layers, settings)


def decode(width: int, layers: int, settings: Settings) -> Iterator[Row]:
    """Milliseconds a token. Both sides write exactly `tokens` new tokens behind a prompt of 16."""
    tokens, name = settings.tokens, f"decode {width}×{layers}"
    model, peer, version = pair(width, layers)
    prompt = torch.randint(VOCAB, (PROMPT,))
    # one position of the budget is kept for `eos`
    request = Request(
        prompt=[Segment("text", prompt.tolist())], max_tokens=tokens + 1, sampling=Sampling(temperature=0.0)
    )
    engine = Engine(model)
    written: list[Segment] = []

    def ours() -> None:
        written[:] = engine.generate([request])[0]

    def theirs() -> None:
        with torch.inference_mode():
            peer.generate(
                prompt[None], attention_mask=torch.ones(1, PROMPT), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False,
            )  # fmt: skip

    def check() -> None:
        count = len(written[0].content) if written else 0
        if count != tokens:
            raise ValueError(f"the engine wrote {count} tokens instead of {tokens}: the two sides did unequal work")

    mine, other, ratio = alternate(ours, theirs, settings.rounds)
    check()
    token = 1e3 * mine / tokens
    yield Row(name, token, "ms a token", 1e3 * other / tokens, ratio, version)
    size = read_bytes(model)
    if size > CACHE:
        rate = bandwidth(width)
        limit = size / rate / 1e6
        yield Row(f"{name}, share of the bandwidth", token, "ms a token", limit, limit / token, f"{rate:.1f} GB/s")
    if settings.compile:
        model.backbone.compile(dynamic=True)
        start = time.perf_counter()
        ours()
        first = time.perf_counter() - start
        mine, other, ratio = alternate(ours, theirs, settings.rounds)
        check()
        yield Row(f"{name}, compiled", 1e3 * mine / tokens, "ms a token", 1e3 * other / tokens, ratio, version)
        yield Row(f"{name}, compiling", first, "s")


def read_bytes(model: MultimodalModel) -> int:
    """Bytes of weights that one token reads: all but the embedding, of which it reads one row."""
    return sum(p.numel() * p.element_size() for n, p in model.named_parameters() if not n.startswith("embedding"))
