"""`mm bench heads`: its rows at the smallest settings, the peer that isn't there, and what is counted. Nothing is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from mm.bench import heads, main
from mm.bench.heads import attention_times, check_equal, load_mar, raster_model, rounding, token_times


def test_rows_without_the_peer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "SETS", 1)
    monkeypatch.setattr(heads, "TRAININGS", 1)
    options = "--json --rounds 1 --training 2 --points 4 --side 3 --size 64x1"
    assert main(["heads", *options.split()]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "heads: the rows beside MAR are left out; give --mar FOLDER, a checkout of github.com/LTH14/mar"
    ]
    rows = [json.loads(line) for line in printed.out.splitlines()]
    names = "\n".join(row["name"] for row in rows)
    for part in ("dpm++ 10 steps, batch 1", "100 ancestral steps", "rho 1.5", "euler 20", "regression", "Gaussian",
                 "float32, v", "rounded to bfloat16", "first quarter", "last quarter", "embedded"):  # fmt: skip
        assert part in names
    for row in rows:
        assert row["ours"] > 0 and row["unit"]
        assert (row["peer"] is None) == (row["ratio"] is None) == (row["peer_version"] is None)
    assert not [row for row in rows if row["peer_version"] and "MAR" in row["peer_version"]]


def test_a_folder_without_the_peer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"has no diffusion/__init__.py; give a checkout of github.com/LTH14/mar"):
        main(["heads", "--mar", str(tmp_path)])
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion" / "__init__.py").write_text("from .parts import create_diffusion\n")
    (tmp_path / "diffusion" / "parts.py").write_text("create_diffusion = len\n")
    with pytest.raises(ValueError, match=r"has no models/diffloss.py"):
        load_mar(str(tmp_path))
    (tmp_path / "models").mkdir()
    module = tmp_path / "models" / "diffloss.py"
    module.write_text("from diffusion import create_diffusion\n")
    with pytest.raises(ValueError, match="lacks SimpleMLPAdaLN or create_diffusion"):
        load_mar(str(tmp_path))
    assert not capsys.readouterr().out


def test_the_peer_is_imported_and_leaves_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules find each other; a `diffusion` that was there before is there again."""
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "diffusion" / "__init__.py").write_text("from .parts import create_diffusion\n")
    (tmp_path / "diffusion" / "parts.py").write_text("def create_diffusion():\n    return 'theirs'\n")
    (tmp_path / "models" / "diffloss.py").write_text(
        "from diffusion import create_diffusion\n\n\nclass SimpleMLPAdaLN:\n    made = create_diffusion()\n"
    )
    before, path = object(), list(sys.path)
    monkeypatch.setitem(sys.modules, "diffusion", before)  # type: ignore[arg-type]
    network, create = load_mar(str(tmp_path))
    assert network.made == create() == "theirs"
    assert sys.modules["diffusion"] is before and "diffusion.parts" not in sys.modules and sys.path == path
    (tmp_path / "models" / "diffloss.py").write_text("raise RuntimeError('broken')\n")
    with pytest.raises(RuntimeError, match="broken"):
        load_mar(str(tmp_path))
    assert sys.modules["diffusion"] is before and "diffusion.parts" not in sys.modules


def test_unequal_vectors_are_not_reported() -> None:
    theirs = torch.tensor([[1000.0, -3.0]])
    check_equal(theirs + 0.05, theirs)
    for other in (theirs + 0.2, theirs * float("nan")):
        with pytest.raises(ValueError, match="nothing is reported"):
            check_equal(other, theirs)


def test_rounding_is_in_favour_of_v() -> None:
    row = rounding(200)
    assert row.ratio is not None and row.peer is not None
    assert row.ratio > 10 and row.peer == pytest.approx(row.ratio * row.ours)


def test_a_step_embeds_the_new_vector_alone() -> None:
    """Sixteen vectors: each is embedded once, when it is fed, and the last is never fed. As many times are between them."""
    model = raster_model(64, 1, side=4)
    times, embedded = token_times(model, side=4, rounds=1)
    assert embedded == 15 and len(times) == 15 and float(times.min()) > 0


def test_attention_is_timed_at_each_length() -> None:
    assert len(attention_times(raster_model(64, 1, side=3), [1, 5, 9], rounds=1)) == 3


@pytest.mark.parametrize("option", ["--training 0", "--points 1", "--side 1"])
def test_bad_options_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        main(["heads", *option.split()])
