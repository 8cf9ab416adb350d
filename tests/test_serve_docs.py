"""What docs/serve.md shows is run, against a server of the models that ship with the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mm.audio import load_audio
from mm.serve.command import load
from mm.serve.running import running
from mm.shape_files import load_mesh
from mm.video import load_video

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", TEXT, re.M | re.S)


def test_there_is_something_to_run() -> None:
    assert [language for language, _ in BLOCKS] == ["bash", "python"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the commands are written for a POSIX shell")
def test_it_runs(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    said = []
    with running(load(None, "cpu", 16, None)) as (address, _):
        for language, code in BLOCKS:
            command = ["sh", "-e"] if language == "bash" else [sys.executable, "-W", "error", "-"]
            done = subprocess.run(
                command, input=code, cwd=tmp_path, env={**os.environ, "PATH": path, "URL": address},
                capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            said.append(done.stdout)
    assert "three five one\n" in said[0] and "data: [DONE]" in said[0] and '"status":"ok"' in said[0]
    assert "seven" in "".join(re.findall(r'"content": ?"([^"]*)"', said[0])), "a caption, piece by piece"
    caption, rest = said[1].split("\n", 1)
    assert caption and rest.startswith(caption), "the caption, whole and as a stream"
    assert load_mesh(tmp_path / "mug.glb").faces.shape[0] > 100
    assert load_video(tmp_path / "seven.mp4").frames.shape[0] == 17
    assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("heart", "seven"))
    assert load_audio(tmp_path / "said.wav").seconds > 0.3 and load_audio(tmp_path / "said.flac").seconds > 0.3


def test_its_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from mm.serve.command import arguments

    with pytest.raises(SystemExit):
        arguments(["--help"])
    listed = capsys.readouterr().out
    options = set(re.findall(r"--[a-z][a-z-]+", re.sub(r"^```bash.*?^```$", "", TEXT, flags=re.M | re.S)))
    assert {"--rows", "--queue", "--timeout", "--max-mb", "--api-key"} <= options
    assert [option for option in options if option not in listed] == []
