"""The benchmarks do equal work on both sides and print rows of one shape. Nothing here is timed."""

from __future__ import annotations

import json

import pytest


def test_decode_prints_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    from mm.bench import main

    assert main(["decode", "--json", "--size", "64x1", "--tokens", "5", "--rounds", "1"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert set(row) == {"name", "ours", "peer", "ratio", "unit", "peer_version"}
    assert row["ours"] > 0 and row["peer"] > 0 and row["peer_version"].startswith("transformers ")


def test_sizes_are_checked() -> None:
    from mm.bench import main

    with pytest.raises(ValueError, match="WIDTHxLAYERS"):
        main(["decode", "--size", "100x2"])


def test_alternate_takes_turns() -> None:
    from mm.bench import alternate

    turns: list[str] = []
    alternate(lambda: turns.append("a"), lambda: turns.append("b"), rounds=3)
    assert "".join(turns) == "abababab"
