"""The benchmarks do equal work on both sides and print rows of one shape. Nothing here is timed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mm.bench import BENCHES, Row, Settings, alternate, main


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert main([*argv, "--json", "--rounds", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows
    for row in rows:
        assert set(row) == {"name", "ours", "peer", "ratio", "unit", "peer_version"}
        assert row["ours"] > 0 and row["unit"]
        assert (row["peer"] is None) == (row["ratio"] is None) == (row["peer_version"] is None)
        assert row["ratio"] is None or row["ratio"] > 0
    return rows


def test_decode(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = printed(capsys, "decode", "--size", "64x1", "--tokens", "5")
    assert row["name"] == "decode 64×1" and row["peer_version"].startswith("transformers ")


def test_train(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transfusion_pytorch", reason="the peer comes with `make setup-bench`")
    names = [row["name"] for row in printed(capsys, "train", "--size", "64x1")]
    assert len(names) == 4 and "dense" in names[0] and "matrix rate" in names[1] and "uneven" in names[2]


def test_tokenize(capsys: pytest.CaptureFixture[str]) -> None:
    names = [row["name"] for row in printed(capsys, "tokenize")]
    assert [name.split()[0] for name in names] == ["encode", "decode"]


def test_scales(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, "scales", "--size", "64x1")
    passes = {row["name"]: (row["ours"], row["peer"]) for row in rows if row["unit"] == "passes"}
    # the prompt takes one of its own; raster order draws its first id from it
    assert passes["a picture of 85 ids, 64×1, batch 1, passes"] == (5, 85)
    assert passes["three planes of 255 ids, 64×1, batch 8, passes"] == (5, 255)
    assert len(rows) == 8


def test_dense_rows_are_equal_work() -> None:
    from mm.bench.language import VOCAB, pair
    from mm.bench.train import document
    from mm.stream import pack

    model, peer, _ = pair(64, 2)
    ids = torch.randint(VOCAB, (3, 16))
    with torch.no_grad():
        stream = pack([document(model, row.tolist()) for row in ids])
        hidden = model(stream).view(3, 16, -1)
        # the first position is `bos` on our side, and an id on the other: from there on both read the same
        with_bos = torch.cat(
            (model.embedding(stream.ids).view(3, 16, -1)[:, :1], peer.model.embed_tokens(ids[:, 1:])), 1
        )
        theirs = peer.model(inputs_embeds=with_bos).last_hidden_state
    assert torch.allclose(hidden, theirs, atol=1e-5)


def test_padding_covers_the_same_documents() -> None:
    from mm.bench.train import lengths, padding

    rows = [torch.full((n,), n) for n in lengths(16, seed=0)]
    batch = padding(rows)
    assert [int(n) for n in batch["attention_mask"].sum(1)] == list(map(len, rows))
    assert bool(((batch["labels"] >= 0) == (batch["attention_mask"] == 1)).all())
    assert lengths(16, seed=0) == lengths(16, seed=0) != lengths(16, seed=1)


def test_flops_of_a_small_model_by_hand() -> None:
    from mm.bench.language import pair
    from mm.bench.train import flops

    model, _, _ = pair(64, 1)
    config = model.backbone.config
    matrices = 64 * 64 * 4 + 3 * 64 * config.hidden + 64 * len(model.head("text").weight)
    assert flops(model, positions=10, length=8) == 10 * (6 * matrices + 12 * 64 * 4)


def test_the_measured_program_reports_its_peak_and_its_failure() -> None:
    from mm.bench.start import peak

    assert 100e6 < peak("data = bytearray(100 << 20)") < 400e6
    with pytest.raises(ValueError, match="not enough"):
        peak("raise RuntimeError('not enough')")


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="WIDTHxLAYERS"):
        main(["decode", "--size", "100x2"])
    with pytest.raises(ValueError, match="at least 1"):
        main(["decode", "--rounds", "0"])


def test_every_benchmark_has_its_rows() -> None:
    from importlib import import_module

    for name in BENCHES:
        assert callable(import_module(f"mm.bench.{name}").rows)


def test_a_row_as_text() -> None:
    assert Row("start", 0.123456, "s").text() == "start: 0.1235 s"
    assert Row("decode", 4.0, "ms", 8.0, 2.0, "peer 1").text() == "decode: 4 ms; peer 1 8; 2.00×"
    assert Settings().sizes == ((256, 6), (768, 12))


def test_alternate_takes_turns() -> None:
    turns: list[str] = []
    alternate(lambda: turns.append("a"), lambda: turns.append("b"), rounds=3)
    assert "".join(turns) == "abababab"
