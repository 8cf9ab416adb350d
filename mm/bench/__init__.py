"""`mm bench [NAME] [--json]`: speed side by side with what users would pick instead.

Both sides take turns in one run (A B A B …), medians count, one thread unless a row says otherwise. The machine's own
limits are measured in the same run, for a share of them says more than a time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One line of the results.

    `ratio` = how many times as fast as the peer, or what part of the limit (above 1: ours is better). A row without a peer
    is a fact of its own.
    """

    name: str
    ours: float
    unit: str
    peer: float | None = None
    ratio: float | None = None
    peer_version: str | None = None

    def text(self) -> str:
        said = f"{self.name}: {self.ours:.4g} {self.unit}"
        if self.peer is not None and self.ratio is not None:
            said += f"; {self.peer_version} {self.peer:.4g}; {self.ratio:.2f}×"
        return said


@dataclass(frozen=True)
class Settings:
    """What the user may choose."""

    rounds: int = 5
    """Counted rounds of each side."""
    tokens: int = 128
    """New tokens a generation."""
    sizes: tuple[tuple[int, int], ...] = ((256, 6), (768, 12))
    """Width and layers of the language models."""
    compile: bool = False
    """Also measure with `torch.compile`."""
    models: tuple[str, ...] = ()
    """Checkpoints that speak."""
    mar: str | None = None
    """Folder of MAR's own code."""
    training: int = 1500
    """Steps of training of each head that learns the mixture."""
    points: int = 1000
    """Points of a set at each angle."""
    side: int = 32
    """Vectors along a side of the item whose tokens are timed."""


def alternate(
    ours: Callable[[], object],
    peer: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the pairwise ratios peer/ours; one warm-up of each, then A B A B …
    `clock`: `time.thread_time` counts the processor's time alone, which other work on the machine disturbs less."""
    import statistics

    ours(), peer()
    pairs = [(seconds(ours, clock), seconds(peer, clock)) for _ in range(rounds)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in pairs)


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


BENCHES = {
    "start": "seconds until the program is there, and the memory that generating and training take",
    "decode": "writing text: beside `transformers` `generate`, and the memory's bandwidth",
    "train": "training: beside `LlamaForCausalLM`, padded batches, `transfusion-pytorch`, and the matrix rate",
    "heads": "heads of vectors: beside MAR's own sampling, few steps beside many, and a long item",
    "scales": "next-scale prediction beside raster order on the same tokens: passes, and time an item",
    "app": "the demo with 1 and 50 visitors: pictures a second, wrong answers, refusals, memory (2 s a round each)",
    "serve": "the HTTP server with 1, 8 and 50 clients: tokens a second, wrong answers, memory (2 s a round each)",
    "speech": "sub-codes beside MusicGen's decoder, a codec beside EnCodec's; how fast checkpoints speak (--model)",
    "tokenize": "pictures to tokens and back: beside a network of `diffusers`",
}


def rows(name: str, settings: Settings) -> Iterator[Row]:
    """The rows of one benchmark as they are measured. Threads are one meanwhile, and what they were afterwards."""
    from importlib import import_module

    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from import_module(f"mm.bench.{name}").rows(settings)
    finally:
        torch.set_num_threads(threads)


def main(argv: list[str]) -> int:
    width = max(map(len, BENCHES))
    parser = argparse.ArgumentParser(
        prog="mm bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:<{width}}  {text}" for name, text in BENCHES.items()),
    )
    parser.add_argument("name", nargs="?", choices=[*BENCHES, "all"], default="all", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each side (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="decode: new tokens a generation (%(default)s)")
    parser.add_argument(
        "--size", action="append", metavar="WIDTHxLAYERS",
        help="decode, train, heads, scales: size of the models (256x6 and 768x12; heads: the first)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="decode, train: with torch.compile too (takes minutes)")
    parser.add_argument(
        "--model", action="append", metavar="NAME", help="speech: a checkpoint that speaks; may be repeated"
    )
    parser.add_argument("--mar", metavar="FOLDER", help="heads: a checkout of github.com/LTH14/mar to compare with")
    parser.add_argument("--training", type=int, default=1500, help="heads: steps of training (%(default)s)")
    parser.add_argument("--points", type=int, default=1000, help="heads: points of a set at each angle (%(default)s)")
    parser.add_argument("--side", type=int, default=32, help="heads: side of the item that is timed (%(default)s)")
    given = vars(parser.parse_args(argv))
    name, as_json, sizes = given.pop("name"), given.pop("json"), given.pop("size")
    models = given.pop("model") or ()
    for option, least in (("rounds", 1), ("tokens", 1), ("training", 1), ("points", 2), ("side", 2)):
        if given[option] < least:
            raise ValueError(f"{option} must be at least {least}, got {given[option]}")
    settings = Settings(**given, models=tuple(models), sizes=tuple(map(size, sizes)) if sizes else Settings.sizes)
    for each in BENCHES if name == "all" else [name]:
        for row in rows(each, settings):
            print(json.dumps(asdict(row)) if as_json else row.text(), flush=True)
    return 0


def size(text: str) -> tuple[int, int]:
    width, _, layers = text.partition("x")
    if not (width.isdigit() and layers.isdigit() and int(width) and int(width) % 64 == 0 and int(layers)):
        raise ValueError(f"a size is WIDTHxLAYERS with a width that 64 divides, such as 256x6; got {text!r}")
    return int(width), int(layers)
