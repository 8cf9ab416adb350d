"""Finding plug-ins by file name and by entry point."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mm
from mm import plugins
from mm.interfaces import Head, ModalityTokenizer, Order

CONTRACTS = {"tokenizers": ModalityTokenizer, "heads": Head, "orders": Order}
ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tokenizers": ROOT / "tokenizers", "heads": ROOT / "heads", "orders": ROOT / "mm" / "orders"}


@pytest.mark.parametrize("kind", CONTRACTS)
def test_every_file_is_a_plugin(kind: plugins.Kind) -> None:
    files = {file.stem for file in FOLDERS[kind].glob("*.py") if not file.name.startswith("_")}
    assert files and files <= set(plugins.available(kind))
    for name in plugins.available(kind):
        cls = plugins.load(kind, name)
        assert issubclass(cls, CONTRACTS[kind])
        assert plugins.short_name(cls) == name


def test_finding_imports_nothing() -> None:
    code = "import sys; from mm import plugins; plugins.available('tokenizers'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_unknown_name_lists_known_ones_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"no plug-in 'text_byte' in tokenizers; known: .*image_vq.* mean 'text_bytes'\?"
    ):
        plugins.load("tokenizers", "text_byte")
    with pytest.raises(ValueError, match=r"no plug-in 'zzzzz' in heads; known: .*lm[^;]*$"):
        plugins.load("heads", "zzzzz")


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kinds are tokenizers, heads, orders, apps"):
        plugins.available("tails")  # type: ignore[arg-type]


# --- files ------------------------------------------------------------------------------------------------------------

TOKENIZER = """
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec
import torch

class {name}(ModalityTokenizer):
    spec = Spec(kind="discrete", vocab_size=2, fingerprint="x")
    def encode(self, raw): return Encoded(grid=(1,), ids=torch.tensor([int(raw)]))
    def decode(self, encoded): return Decoded(value=bool(encoded.ids[0]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second folder in which mm.tokenizers looks."""
    (tmp_path / "tokenizers").mkdir()
    monkeypatch.setattr(mm, "__path__", [*mm.__path__, str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path / "tokenizers"
    for name in set(sys.modules) - before:
        if name.startswith("mm.tokenizers."):
            del sys.modules[name]


def test_a_new_file_is_found_at_once(folder: Path) -> None:
    assert "lidar" not in plugins.available("tokenizers")
    (folder / "lidar.py").write_text(TOKENIZER.format(name="Lidar"))
    assert "lidar" in plugins.available("tokenizers")
    cls = plugins.load("tokenizers", "lidar")
    assert cls.__name__ == "Lidar"
    assert cls().decode(cls().encode(True)).value is True


def test_helpers_are_not_plugins(folder: Path) -> None:
    (folder / "_shared.py").write_text("raise RuntimeError('never imported by the finder')")
    (folder / "one.py").write_text(TOKENIZER.format(name="_Base") + TOKENIZER.format(name="One"))
    assert "_shared" not in plugins.available("tokenizers")
    assert plugins.load("tokenizers", "one").__name__ == "One"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (TOKENIZER.format(name="A") + TOKENIZER.format(name="B"), "exactly one public subclass .* it defines A, B"),
        ("from mm.tokenizers.text_bytes import TextBytes", "it defines none"),
        (
            "from mm.interfaces import ModalityTokenizer\nclass A(ModalityTokenizer): ...",
            "abstract: decode, encode, spec",
        ),
    ],
)
def test_a_file_that_is_not_one_plugin(folder: Path, code: str, message: str) -> None:
    (folder / "odd.py").write_text(code)
    with pytest.raises(ValueError, match=message):
        plugins.load("tokenizers", "odd")


def test_a_broken_file_raises_its_own_error_when_asked_for(folder: Path) -> None:
    (folder / "broken.py").write_text("import no_such_module_anywhere")
    assert "broken" in plugins.available("tokenizers")
    assert plugins.load("tokenizers", "text_bytes")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        plugins.load("tokenizers", "broken")


# --- other people's packages ------------------------------------------------------------------------------------------


def install(where: Path, package: str, points: str) -> None:
    """A distribution with entry points, as pip would leave it."""
    info = where / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


def ask(where: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(where)!r}); from mm import plugins; {code}"],
        capture_output=True,
        text=True,
    )


def test_entry_point(tmp_path: Path) -> None:
    install(tmp_path, "sonar", "[mm.tokenizers]\nsonar = sonar_mm:Sonar\n")
    (tmp_path / "sonar_mm.py").write_text(TOKENIZER.format(name="Sonar"))
    done = ask(
        tmp_path,
        "cls = plugins.load('tokenizers', 'sonar'); print(cls.__module__, cls.__name__, plugins.short_name(cls))",
    )
    assert done.stdout.split() == ["sonar_mm", "Sonar", "sonar"], done.stderr


@pytest.mark.parametrize("other", ["text_bytes = sonar_mm:Sonar", "echo = a:A\n[other]\necho = b:B"])
def test_a_name_claimed_twice_is_an_error(tmp_path: Path, other: str) -> None:
    install(tmp_path, "sonar", f"[mm.tokenizers]\n{other}\n")
    install(tmp_path, "twin", "[mm.tokenizers]\necho = c:C\n")
    done = ask(tmp_path, "plugins.available('tokenizers')")
    assert done.returncode == 1
    assert "two plug-ins in tokenizers are called" in done.stderr
    assert "(from the package sonar)" in done.stderr or "(from the package twin)" in done.stderr


def test_the_same_entry_point_seen_twice_is_no_clash(tmp_path: Path) -> None:
    for place in ("a", "b"):
        install(tmp_path / place, "sonar", "[mm.tokenizers]\nsonar = sonar_mm:Sonar\n")
    done = ask(
        tmp_path,
        f"sys.path[:0] = [{str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}]; "
        "print(plugins.available('tokenizers').count('sonar'))",
    )
    assert done.stdout.strip() == "1", done.stderr


def test_an_entry_point_to_something_else(tmp_path: Path) -> None:
    install(tmp_path, "sonar", "[mm.heads]\nsonar = json:JSONDecoder\n")
    done = ask(tmp_path, "plugins.load('heads', 'sonar')")
    assert "is not a subclass of mm.interfaces.Head" in done.stderr
