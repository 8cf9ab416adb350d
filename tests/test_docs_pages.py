"""The pages of docs/: what they quote, link to, name and count is there, and the site is built without a warning."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import mm
from mm.commands.train import contents, find

ROOT = Path(__file__).resolve().parent.parent
DOCS, README = ROOT / "docs", ROOT / "README.md"
SYSTEMS = sorted(path.stem for path in (ROOT / "configs" / "systems").glob("*.yaml"))
PAGES = sorted(DOCS.rglob("*.md"))
SYSTEM_PAGES = sorted((DOCS / "systems").glob("*.md"))
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
QUOTE = re.compile(r"^# configs/systems/(?P<system>\w+)\.yaml\n(?P<yaml>(?:(?!# configs/).*\n)+)", re.M)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
NUMBER = re.compile(r"\d+(?:\.\d+)?%|\d+\.\d+")


def quotes(page: Path) -> Iterator[tuple[str, Any]]:
    """Systems and what is quoted of their configurations, each below a line that names the file."""
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        if block["language"] == "yaml":
            for quote in QUOTE.finditer(block["code"]):
                yield quote["system"], yaml.safe_load(quote["yaml"])


def links(page: Path) -> list[Path]:
    """The files that a page links to or shows, resolved."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [(page.parent / link).resolve() for link in LINK.findall(text) if "://" not in link]


def commands(page: Path) -> str:
    return "".join(block["code"] for block in FENCE.finditer(page.read_text(encoding="utf-8")))


def configuration(system: str) -> dict[str, Any]:
    """What `mm fit` reads: the files that it extends and its own, merged."""
    out: dict[str, Any] = {}
    for part in parts(f"systems/{system}"):
        merge(out, part)
    return out


@cache
def parts(name: str) -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in contents(find(name), [])]


def merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        name = key.removesuffix("+")
        if name != key:
            into[name] = [*into.get(name, []), *value]
        elif isinstance(value, dict) and isinstance(into.get(name), dict):
            merge(into[name], value)
        else:
            into[name] = value


def differences(quoted: Any, real: Any, where: str = "") -> list[str]:
    """Where what is quoted isn't what stands there. Keys may be left out, values may not."""
    if isinstance(quoted, dict) and isinstance(real, dict):
        return [line for key in quoted for line in differences(quoted[key], real.get(key), f"{where}.{key}")]
    return [] if quoted == real else [f"{where}: quoted {quoted!r}, is {real!r}"]


# --- systems ----------------------------------------------------------------------------------------------------------


def test_every_system_has_one_page() -> None:
    described = sorted({(system, page.stem) for page in SYSTEM_PAGES for system, _ in quotes(page)})
    assert [system for system, _ in described] == SYSTEMS
    assert {page for _, page in described} == {page.stem for page in SYSTEM_PAGES}


@pytest.mark.parametrize("page", SYSTEM_PAGES, ids=lambda page: page.stem)
def test_what_a_page_quotes_is_what_a_system_reads(page: Path) -> None:
    given = set()
    for system, quoted in quotes(page):
        real = configuration(system)
        modalities = {one["name"]: one for one in real["model"]["init_args"]["modalities"]}
        for piece in quoted if isinstance(quoted, list) else [quoted]:
            other = modalities[piece["name"]] if "name" in piece else real
            assert differences(piece, other, system) == []
            given |= set(piece)
    assert given >= {"name", "tokenizer", "head", "order"}


def test_a_quote_that_has_drifted_is_found() -> None:
    real = {"order": {"class_path": "a.B", "init_args": {"steps": 12, "rate": 1}}, "name": "image"}
    assert differences({"order": {"init_args": {"steps": 12}}}, real) == []
    assert differences({"order": {"init_args": {"steps": 13}}}, real) == [".order.init_args.steps: quoted 13, is 12"]
    assert differences({"order": {"init_args": {"seed": 1}}}, real) == [".order.init_args.seed: quoted 1, is None"]


@pytest.mark.parametrize("page", SYSTEM_PAGES, ids=lambda page: page.stem)
def test_a_page_says_how_to_train_and_what_differs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.match(r"# .+\n\n", text) and "https://arxiv.org/abs/" in text
    assert re.search(r"^## What (was reproduced|was measured)|^## Measured", text, re.M)
    assert re.search(r"^## What differs", text, re.M)
    for system in {system for system, _ in quotes(page)}:
        assert re.search(rf"mm fit -c (configs/systems/{system}\.yaml|{system}\b)", commands(page)), system


@pytest.mark.parametrize("page", SYSTEM_PAGES, ids=lambda page: page.stem)
def test_what_a_page_says_was_reproduced_stands_where_it_links(page: Path) -> None:
    said = re.search(r"^## What was reproduced\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.M | re.S)
    if said is None:
        assert page.stem in {"lcm", "mega_tts", "vl_gpt"}, "these are where their figures stand"
        return
    linked = [(page.parent / link).resolve() for link in LINK.findall(said[1]) if "://" not in link]
    sources = "".join(path.read_text(encoding="utf-8") for path in linked)
    known = set(NUMBER.findall(sources)) | set(re.findall(r"\d+(?:\.\d+)?(?= ± [\d.]+%)", sources))
    assert [n for n in NUMBER.findall(said[1]) if n not in known and n.rstrip("%") not in known] == []


def test_overviews_name_every_page() -> None:
    for overview in (DOCS / "index.md", README):
        assert [page.stem for page in SYSTEM_PAGES if page not in links(overview)] == [], overview.name


# --- all pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page: Path) -> None:
    assert [str(path.relative_to(ROOT)) for path in links(page) if not path.is_file()] == []


def test_every_picture_is_shown() -> None:
    shown = {path for page in [README, *PAGES] for path in links(page)}
    pictures = {path for pattern in ("*.png", "*.svg", "*.gif") for path in DOCS.rglob(pattern)}
    assert pictures and pictures <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_configurations_of_commands_exist(page: Path) -> None:
    if page.parent.name == "tutorials":
        pytest.skip(
            "configurations of tutorials are written on the way; these pages are executed by tests of their own"
        )
    for line in re.findall(r"^mm (?:fit|validate|test) .*", commands(page).replace("\\\n", " "), re.M):
        named = re.findall(r"(?:^|\s)(?:-c|--config)[ =](\S+)", line)
        assert named, line
        for name in named:
            if not name.isupper():  # -c SYSTEM
                find(name)


@pytest.mark.parametrize("page", SYSTEM_PAGES, ids=lambda page: page.stem)
def test_models_of_commands_are_what_is_trained(page: Path) -> None:
    text = commands(page)
    trained = set(re.findall(r"default_root_dir[ =](\S+)", text))
    for name in re.findall(r"-c (\S+)", text):
        trained |= {(part.get("trainer") or {}).get("default_root_dir") for part in parts(name)}
    assert [used for used in re.findall(r"(runs/[\w/]+)/model\b", text) if used not in trained] == []


def test_names_in_the_pages_exist() -> None:
    names = {name for page in PAGES for name in re.findall(r"`(mm(?:\.\w+)+)", page.read_text(encoding="utf-8"))}
    assert "mm.heads.diffusion.DiffusionHead" in names
    assert [name for name in sorted(names) if not exists(name)] == []


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or stands at the top of one. Read, not imported, which would take seconds."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module, _, inside = name.rpartition(".")
    if module == "mm" and inside in mm.__all__:
        return True
    file = ROOT / f"{module.replace('.', '/')}.py"
    return file.is_file() and inside in top(file)


def top(file: Path) -> set[str]:
    """The names that a module defines or imports."""
    out = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            out.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            out |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            out |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_lists_and_tables_stand_by_themselves(page: Path) -> None:
    """On GitHub a list may follow a line of text; in the site it would be part of the paragraph."""
    lines = FENCE.sub("", page.read_text(encoding="utf-8")).split("\n")
    glued = [
        line
        for before, line in zip(lines, lines[1:], strict=False)
        if line.startswith(("- ", "|")) and before.strip() and not before.startswith(("- ", "|", "  "))
    ]
    assert glued == []


# --- the site ---------------------------------------------------------------------------------------------------------


def test_the_site_has_every_page() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def leaves(nav: Any) -> Iterator[str]:
        for value in nav if isinstance(nav, list) else nav.values():
            yield from [value] if isinstance(value, str) else leaves(value)

    assert sorted(leaves(settings["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_the_public_names_are_documented() -> None:
    shown = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert [name for name in shown if not exists(name)] == []
    assert {name for name in mm.__all__ if name != "__version__"} <= {name.rpartition(".")[2] for name in shown}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "mkdocstrings"):
        pytest.importorskip(package, reason="comes with `pip install 'mm[docs]'`")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|error", done.stderr, re.I), done.stderr
    made = {path.relative_to(tmp_path).with_suffix(".md").as_posix() for path in tmp_path.rglob("*.html")}
    assert {page.relative_to(DOCS).as_posix() for page in PAGES} <= made
    assert "TextToImagePipeline" in (tmp_path / "api.html").read_text(encoding="utf-8")
    fetched = re.compile(
        r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"(?:https?:)?//[^\"]*|url\(['\"]?(?:https?:)?//"
    )
    assert [
        (path.name, fetched.findall(path.read_text(encoding="utf-8")))
        for path in tmp_path.rglob("*")
        if path.suffix in {".html", ".css"} and fetched.search(path.read_text(encoding="utf-8"))
    ] == []
