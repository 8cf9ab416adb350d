"""Figures with their uncertainty, as a table for people and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mm.evaluate.protocol import GOALS

Z = 1.959963984540054
"""The 97.5 % point of the normal distribution: intervals cover 95 %."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number."""

    family: str
    name: str
    value: float
    unit: str
    """`share`, `error` (a share that can exceed 1; less is better), `dB`, `s`, `codes`, `ratio`, `distance`, …"""
    n: int
    """Of how many cases."""
    low: float | None = None
    high: float | None = None
    """Ends of a 95 % interval: Wilson's for shares, of the normal distribution for means."""
    hits: int | None = None
    """Of a share: how many of the n."""
    goal: float | None = None
    control: bool = False
    """Measured on real pictures or by chance: what the other figures are to be compared with."""
    note: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    """Breakdown, for JSON."""

    def __post_init__(self) -> None:
        if self.goal is None:
            object.__setattr__(self, "goal", GOALS.get((self.family, self.name)))


def wilson(hits: int, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927): (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n)."""
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"a share needs 0 <= hits <= n and n >= 1, got {hits} of {n}")
    p, square = hits / n, z * z / n
    centre, half = p + square / 2, z * math.sqrt(p * (1 - p) / n + square / (4 * n))
    low, high = (centre - half) / (1 + square), (centre + half) / (1 + square)
    return (low if hits else 0.0), (high if hits < n else 1.0)  # exact where rounding would miss the end


def share(family: str, name: str, hits: Sequence[bool], **more: Any) -> Figure:
    """A share of cases, one truth value a case."""
    count, n = sum(map(bool, hits)), len(hits)
    low, high = wilson(count, n)
    return Figure(family=family, name=name, value=count / n, unit="share", n=n, hits=count, low=low, high=high, **more)


def mean(family: str, name: str, values: Sequence[float], unit: str, **more: Any) -> Figure:
    """A mean ± 1.96 standard errors; no interval for a single value."""
    n = len(values)
    if not n:
        raise ValueError(f"{family}, {name}: a mean of no values")
    average = math.fsum(values) / n
    low = high = None
    if n > 1:
        half = Z * math.sqrt(math.fsum((v - average) ** 2 for v in values) / (n - 1) / n)
        low, high = average - half, average + half
    return Figure(family=family, name=name, value=average, unit=unit, n=n, low=low, high=high, **more)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All figures of one model, with what is needed to measure them again."""

    model: str
    fingerprint: str
    """Of weights, vocabulary and tokenizers."""
    facts: dict[str, Any]
    """Protocol, sampling, data, versions, threads."""
    figures: list[Figure]
    seconds: float
    """Of the whole evaluation."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; JSON has no word for what isn't finite, so there are none."""
        return asdict(self)

    def __getitem__(self, key: tuple[str, str]) -> Figure:
        """The figure of (family, name)."""
        for figure in self.figures:
            if (figure.family, figure.name) == key:
                return figure
        known = ", ".join(f"{f.family}: {f.name}" for f in self.figures)
        raise KeyError(f"no figure {key}; there are: {known}")

    def table(self) -> Any:
        """A `rich` table. Controls are dim, a goal is marked as reached or not."""
        from rich.table import Table
        from rich.text import Text

        title = Text(f"{self.model}  {self.fingerprint}  {self.seconds:.0f} s")
        table = Table(title=title, caption="dim rows are controls on what is real")
        table.add_column("figure")
        for column in ("value", "95 %", "n", "goal"):
            table.add_column(column, justify="right")
        family = ""
        for figure in self.figures:
            if figure.family != family:
                table.add_section()
                table.add_row(Text(figure.family, style="bold"))
                family = figure.family
            goal = Text()
            if figure.goal is not None:
                less = figure.unit == "error"
                reached = figure.value <= figure.goal if less else figure.value >= figure.goal
                goal = Text(
                    f"{'≤' if less else '≥'} {form(figure.goal, figure.unit)} {'✓' if reached else '✗'}",
                    style="green" if reached else "red",
                )
            name = Text(f"  {figure.name}" + (f" ({figure.note})" if figure.note else ""))
            interval = ""
            if figure.low is not None and figure.high is not None:
                interval = f"{form(figure.low, figure.unit)} … {form(figure.high, figure.unit)}"
            style = "dim" if figure.control else None
            table.add_row(name, form(figure.value, figure.unit), interval, f"{figure.n:,}", goal, style=style)
        return table


def form(value: float, unit: str) -> str:
    """A value with its unit, for people."""
    if unit in ("share", "error"):
        return f"{100 * value:.1f} %"
    if unit == "s":
        return f"{value:.3f} s"
    return f"{value:.2f} {unit}" if unit != "codes" else f"{value:,.0f}"
