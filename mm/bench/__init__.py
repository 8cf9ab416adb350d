"""`mm bench NAME [--json]`: speed side by side with what users would pick instead, alternating in one run, medians."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` = how many times as fast as the peer (above 1: ours is faster)."""

    name: str
    ours: float
    peer: float
    ratio: float
    unit: str
    peer_version: str


def alternate(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the pairwise ratios peer/ours; one warm-up of each, then A B A B …"""
    import statistics
    import time

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    ours(), peer()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(rounds)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in pairs)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mm bench", description=__doc__)
    parser.add_argument("name", choices=["decode"])
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each side")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a generation")
    parser.add_argument("--size", action="append", metavar="WIDTHxLAYERS", help="default: 256x6 and 768x12")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.tokens < 1:
        raise ValueError(f"rounds and tokens must be at least 1, got {arguments.rounds} and {arguments.tokens}")
    from mm.bench.decode import decode

    for size in arguments.size or ["256x6", "768x12"]:
        width, _, layers = size.partition("x")
        if not (width.isdigit() and layers.isdigit() and int(width) % 64 == 0 and int(layers)):
            raise ValueError(f"a size is WIDTHxLAYERS with a width that 64 divides, such as 256x6; got {size!r}")
        row = decode(int(width), int(layers), arguments.tokens, arguments.rounds)
        if arguments.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            print(
                f"{row.name}: ours {row.ours:.2f}, {row.peer_version} {row.peer:.2f} {row.unit}; {row.ratio:.2f}× as fast",
                flush=True,
            )
    return 0
