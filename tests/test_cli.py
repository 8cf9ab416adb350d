"""The `mm` program: fast and light to start, one sentence for mistakes, files where it says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from mm import hub
from mm.cli import COMMANDS, commands, main
from mm.commands.common import Bar
from mm.commands.list import title
from mm.commands.making import slug, unused
from mm.interfaces import Sampling
from mm.media import load_image
from mm.orders.masked import Masked
from mm.testing import tiny


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints to take for the shipped ones."""
    folder = tmp_path_factory.mktemp("shelf")
    hub.save_pretrained(tiny(Masked(steps=3)), folder / "mm-tiny", "# Small pictures\n")
    hub.save_pretrained(tiny(), folder / "raster", sampling={"image": Sampling(temperature=0.5)})
    return folder


@pytest.fixture
def here(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hub, "SHIPPED", shelf)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    return main([*arguments])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mm.cli import main; main(['--help']); "
        "print([m for m in ('torch', 'numpy', 'PIL', 'lightning', 'transformers', 'gradio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]" and lines[0].startswith("usage: mm COMMAND")
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in commands())


def test_the_commands_are_what_they_were() -> None:
    """Changing this list is a visible decision; see DESIGN, public names."""
    expected = "generate fit validate test predict tokenize list data app serve evaluate bench"
    assert list(COMMANDS) == expected.split()
    assert set(commands()) >= {"generate", "fit", "validate", "test", "predict", "tokenize", "list", "data"}


def test_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    from mm import __version__

    assert run("--version") == 0 and capsys.readouterr().out == f"mm {__version__}\n"
    assert run("generat") == 2
    assert "did you mean 'generate'" in capsys.readouterr().err
    assert run() == 0 and "usage: mm" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("help", "generate")
    assert capsys.readouterr().out.startswith("usage: mm generate")
    assert run("help", "generat") == 2 and "did you mean 'generate'" in capsys.readouterr().err
    assert run("help") == 0 and "usage: mm COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["list", "systems"], ["generate", "--help"], ["--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_mistake(arguments: list[str], unbuffered: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; from mm.cli import main; sys.exit(main({arguments!r}))"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_warnings_of_ours_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mm.commands import list as command
    from mm.data.example import warn_skipped

    def warn(argv: list[str]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warn_skipped("'a.tar'", 1, 3, "b.png: cut\nshort")
            warnings.warn("of others", stacklevel=1)
        return 0

    monkeypatch.setattr(command, "main", warn)
    before = warnings.showwarning
    assert run("list") == 0 and warnings.showwarning is before
    first, others = capsys.readouterr().err.split("\n", 1)
    assert first == "mm: warning: 'a.tar': skipped 1 of 3 examples as broken; the first: b.png: cut short"
    assert "UserWarning: of others" in others


def test_mistakes_are_one_sentence_and_debug_shows_where(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["generate", "red", "--model", "nothing"], "there is no checkpoint 'nothing'"),
        (["generate", "red", "--to", "video"], "'mm-tiny' makes text and image, not 'video'"),
        (["generate", "red", "--num", "0"], "--num must be at least 1, got 0"),
        (["generate", "red", "--num", "1000000000"], "--num must be at most 10,000, got 1,000,000,000"),
        (["generate", "red", "--top-p", "3"], "top_p must be in (0, 1], got 3.0"),
        (["generate", "red", "--seed", "-1"], "seed must be a whole number"),
        (["generate", "red", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["generate", "red", "--threads", "100000"], "--threads must be at most"),
        (["generate", "red", "--out", "/proc/x.png"], "can't write '/proc/x.png': in '/proc' nothing can be written"),
        (["generate", "red", "--out", "x.exe"], "unknown ending '.exe'"),
        (["generate"], "the prompt is empty; say what the picture shows\n"),
        (
            ["generate", "--from", "none.png", "red apple"],
            "a prompt goes before it: mm generate 'red apple' --from FILE",
        ),
        (["generate", "so", "--to", "text", "--guidance", "7"], "text is generated without guidance"),
        (["generate", "so", "--to", "text", "--temperature", "0", "--num", "2"], "temperature 0 gives equal texts"),
        (["generate", "x" * 400], "the context holds 256; shorten the prompt"),
        (["generate", "--to", "text"], "nothing to continue"),
        (["generate", "--to", "text", "--from", "none.png"], "'none.png' is missing"),
        (["generate", "red", "--mask", "m.png"], "--mask goes with --to image and one picture in --from"),
        (["fit", "-c", "none.yaml"], "there is no configuration 'none.yaml'"),
        (["generate", "red\x1b[31m apple"], "the prompt has the control character U+001B; leave it out"),
        (["generate", "--to", "3d", "--from", "a.wav"], "--to 3d takes pictures in --from, got the sound 'a.wav'"),
        (
            ["generate", "--to", "video", "--from", "a.wav"],
            "--to video takes a picture or a clip in --from, got the sound",
        ),
        (["tokenize", "none.png", "--tokenizer", "mm-tiny"], "'none.png' is missing"),
        (["tokenize", "none.png", "--tokenizer", "mm-tiny", "--out", "x.txt"], "unknown ending '.txt'"),
        (["tokenize", "none.txt", "--tokenizer", "text_bytes", "--out", "x.png"], "unknown ending '.png'"),
        (["tokenize", "none.txt", "--tokenizer", "text_bytes", "--out", "/proc/x"], "can't write '/proc/x.txt'"),
        (["tokenize", "none.png", "--tokenizer", "text_byte"], "there is no tokenizer 'text_byte'"),
        (["tokenize", "none.png", "--tokenizer", "image_vq"], "give its folder as image_vq:FOLDER"),
        (["tokenize", "none.png", "--tokenizer", "text_bytes:x"], "has no files of its own"),
        (["data", "shards", "nowhere", "--out", "x"], "missing or not a folder"),
    ):
        assert run(*arguments) == 2
        err = capsys.readouterr().err
        assert message in err and err.startswith(f"mm {arguments[0]}: ") and err.count("\n") == 1, err
    assert [path.name for path in here.iterdir()] == [], "nothing half-written stays"
    with pytest.raises(ValueError, match="there is no checkpoint"):
        run("generate", "red", "--model", "nothing", "--debug")
    with pytest.raises(SystemExit):
        run("generate", "red", "--guidance", "much")
    assert "argument --guidance: invalid float value: 'much'" in capsys.readouterr().err


def test_generate_pictures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "Red apple, noto!", "--seed", "1") == 0
    captured = capsys.readouterr()
    assert captured.out == "wrote red-apple-noto.png\n"
    assert captured.err.startswith("1 picture in ") and captured.err.endswith("seed 1\n")
    assert load_image("red-apple-noto.png").size == (4, 4)
    assert run("generate", "Red apple, noto!", "--seed", "1") == 0  # a name of its own, nothing is replaced
    assert capsys.readouterr().out == "wrote red-apple-noto-2.png\n"
    assert Path("red-apple-noto.png").read_bytes() == Path("red-apple-noto-2.png").read_bytes()

    assert run("generate", "red", "--num", "3", "--seed", "1", "--out", "out/red.png", "--steps", "2") == 0
    assert capsys.readouterr().out == "wrote out/red-01.png … red-03.png, all of them in out/red.png\n"
    assert sorted(path.name for path in Path("out").iterdir()) == ["red-01.png", "red-02.png", "red-03.png", "red.png"]
    assert load_image("out/red.png").width > 2 * 96, "the sheet"
    assert run("generate", "red", "--num", "2", "--out", "out") == 0
    assert Path("out/sheet.png").is_file() and Path("out/image-02.png").is_file()


def test_the_checkpoints_sampling_is_the_default(here: Path) -> None:
    common = ["generate", "red", "--model", "raster", "--seed", "1", "--out"]
    assert run(*common, "a.png") == run(*common, "b.png", "--temperature", "0.5") == 0
    assert run(*common, "c.png", "--temperature", "3") == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_generate_from_pictures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (4, 4), "red" if name == "a" else "blue").save(f"{name}.png")
    assert run("generate", "--to", "text", "--from", "a.png", "b.png", "--max-tokens", "6", "--seed", "0") == 0
    captured = capsys.readouterr()
    assert "a.png: " in captured.out and "b.png: " in captured.out and "2 texts in" in captured.err
    assert (
        run("generate", "so", "--to", "text", "--max-tokens", "6", "--num", "2", "--out", "t.txt", "--seed", "0") == 0
    )
    assert Path("t-01.txt").is_file() and Path("t-02.txt").is_file()
    assert Path("t-01.txt").read_bytes() != Path("t-02.txt").read_bytes()
    assert run("generate", "like this", "--from", "a.png", "--num", "2", "--out", "like.png") == 0
    assert load_image("like-02.png").size == (4, 4)

    mask = Image.new("L", (4, 4), 255)
    mask.paste(0, (0, 0, 4, 2))
    mask.save("mask.png")
    assert run("generate", "red", "--from", "a.png", "--mask", "mask.png", "--out", "filled.png", "--seed", "0") == 0
    filled = load_image("filled.png")
    assert filled.crop((0, 0, 4, 2)).tobytes() == load_image("a.png").crop((0, 0, 4, 2)).tobytes()
    assert filled.tobytes() != load_image("a.png").tobytes()


def test_small_models_use_one_thread(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        torch.set_num_threads(2)
        run("generate", "red", "--out", "a.png")
        assert torch.get_num_threads() == 1
        run("generate", "red", "--out", "a.png", "--threads", "2")
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        run("generate", "red", "--out", "a.png")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert slug("Red  Apple/../x") == "red-apple-x" and slug("日本") == "picture" and len(slug("a" * 300)) == 60
    assert unused("a.png") == "a.png"
    Path("a-01.png").touch()
    assert unused("a.png") == "a-2.png"
    Path("a-2.png").touch()
    assert unused("a.png") == "a-3.png"


def test_tokenize_a_picture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = Image.new("RGB", (4, 4), (255, 0, 0))
    picture.putpixel((0, 0), (200, 0, 0))  # the tokenizer of the tiny model knows full colours only
    picture.save("p.png")
    assert run("tokenize", "p.png", "--tokenizer", "mm-tiny", "--json", "--out", "back.png") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"] == 16 and figures["grid"] == [4, 4]
    assert figures["bits"] == 48.0 and figures["bits_per_pixel"] == 3.0
    assert figures["psnr_db"] == round(10 * math.log10(255**2 / (55**2 / 48)), 2)  # one of 48 values is off by 55
    assert not figures["lossless"]
    assert load_image("back.png").getpixel((0, 0)) == (255, 0, 0)
    for out, wrote in (("nn/o", "nn/o.png"), (".", "image.png")):
        assert run("tokenize", "p.png", "--tokenizer", "mm-tiny", "--json", "--out", out) == 0
        assert json.loads(capsys.readouterr().out)["wrote"] == wrote and Path(wrote).is_file()
    assert run("tokenize", "back.png", "--tokenizer", "mm-tiny") == 0
    assert "lossless        True" in capsys.readouterr().out


def test_tokenize_a_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.txt").write_text("grüne Äpfel", encoding="utf-8")
    for tokenizer in ("text_bytes", "mm-tiny"):
        assert run("tokenize", "t.txt", "--tokenizer", tokenizer, "--json", "--out", "back.txt") == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["tokens"] == 13 and figures["bits"] == 104 and figures["lossless"]
        assert Path("back.txt").read_text(encoding="utf-8") == "grüne Äpfel"
    assert run("tokenize", "t.txt", "--tokenizer", "text_bytes", "--json", "--out", ".") == 0
    assert json.loads(capsys.readouterr().out)["wrote"] == "text.txt" and Path("text.txt").is_file()
    assert run("tokenize", "t.txt", "--tokenizer", "text_hf", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert not figures["lossless"] and 0.5 < figures["characters_kept"] < 1  # it writes small letters only
    Path("t.txt").write_bytes(b"\xff\xfe")
    assert run("tokenize", "t.txt", "--tokenizer", "text_bytes") == 2
    assert "is not UTF-8 text (byte 0)" in capsys.readouterr().err


def test_how_much_of_a_text_came_back() -> None:
    from mm.commands.tokenize import COMPARED, lost_text
    from mm.edits import edit_distance

    for one, two, count in (
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("flaw", "lawn", 2),
        ("ä", "ä", 0),
    ):
        assert edit_distance(one, two) == count
    assert lost_text("abcd", "abcd") == {"lossless": True, "characters_kept": 1.0, "characters_compared": 4}
    assert lost_text("abcd", "abd") == {"lossless": False, "characters_kept": 0.75, "characters_compared": 4}
    # texts of few letters: a matcher of blocks needs the cube of the length for them, and was not done after minutes
    figures = lost_text("a b" * 10_000, "aab" * 10_000)
    assert 0.66 < figures["characters_kept"] < 0.67 and figures["characters_compared"] == COMPARED


def test_tokenize_with_a_saved_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mm.tokenizers.image_vq import ImageVQ

    torch.manual_seed(0)
    tokenizer = ImageVQ(size=8, channels=8, codebook_size=16, code_dim=4)
    tokenizer.reconstruct(torch.rand(16, 3, 8, 8))
    tokenizer.eval().save("vq")
    Image.new("RGB", (8, 8), "green").save("p.png")
    for name in ("vq", "image_vq:vq"):
        assert run("tokenize", "p.png", "--tokenizer", name, "--json") == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["tokens"] == 4 and figures["bits"] == 16.0 and figures["tokenizer"] == "ImageVQ"


def test_list(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mm import plugins
    from mm.commands.train import SHIPPED

    assert run("list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for kind in ("tokenizers", "orders", "heads"):
        assert set(found[kind]) == set(plugins.available(kind))  # type: ignore[arg-type]
        assert all(found[kind].values()), "every plug-in says what it is"
    assert set(found["systems"]) == {path.stem for path in (SHIPPED / "systems").glob("*.yaml")}
    assert found["checkpoints"] == {"mm-tiny": "Small pictures", "raster": ""}
    card = here / "named" / "README.md"
    card.parent.mkdir()
    for text, expected in (
        ("# named\n\nSmall pictures,\nroughly. More of it.\n", "Small pictures, roughly"),
        ("# named\n", ""),
        ("# Named\n\nText.", "Named"),
        ("Text.", ""),
    ):
        card.write_text(text)
        assert title(card) == expected
    assert run("list", "checkpoints") == 0
    assert capsys.readouterr().out == "checkpoints:\n  mm-tiny  Small pictures\n  raster\n"


def test_list_is_light() -> None:
    code = "import sys; from mm.cli import main; main(['list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "digits", "--count", "6", "--size", "8", "--out", "d") == 0
    assert capsys.readouterr().out == "wrote d/digits-000000.tar\n"
    assert run("data", "shards", "d/digits-000000.tar", "--caption", "a {name}", "--per-shard", "4", "--out", "s") == 0
    assert capsys.readouterr().out == "wrote s/data-000000.tar … data-000001.tar\n"
    from mm.data.sources import ShardSource

    source = ShardSource(sorted(Path("s").glob("*.tar")))
    assert len(source) == 6 and source[0]["text"].startswith("a ")
    assert run("data", "bpe", "d/digits-000000.tar", "--vocab-size", "270", "--out", "bpe") == 0
    Path("t.txt").write_text("digit digit")
    assert run("tokenize", "t.txt", "--tokenizer", "bpe", "--json") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["lossless"] and figures["tokens"] < 11


def test_a_progress_bar_learns_of_more() -> None:
    with Bar("drawing", "picture") as bar:
        bar(0.5, 1)
        bar(1.25, 3)
        assert (bar.bar.n, bar.bar.total) == (1.25, 3)
