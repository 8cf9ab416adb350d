"""The layout of the repository: folders at the top that are part of the package, and a folder named `tokenizers` that
must never be taken for Hugging Face's package of that name."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("tokenizers", "heads", "apps", "configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", LINKED)
def test_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "mm" / name
    assert link.is_symlink(), "on Windows: git config core.symlinks true, then check out again"
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir()


def test_namespace_folders_have_no_init() -> None:
    for name in ("tokenizers", "heads"):
        assert not (ROOT / name / "__init__.py").exists(), f"an __init__.py makes {name}/ a package of its own"
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("where", ["", "mm", "tests", "tokenizers"])
def test_import_tokenizers_is_hugging_face(where: str) -> None:
    """From the root with the current folder first on the path, where the danger is, and from folders below."""
    code = "import tokenizers, mm.tokenizers; print(tokenizers.Tokenizer.__module__, tokenizers.__file__)"
    module, file = python(code, ROOT / where).split(" ", 1)
    assert module == "tokenizers"
    assert ROOT / "tokenizers" not in Path(file).parents


def test_pythonpath_does_not_shadow_it_either() -> None:
    code = "import tokenizers; tokenizers.Tokenizer; import mm.tokenizers.text_bytes as t; print(t.__name__)"
    assert python(code, ROOT, PYTHONPATH=str(ROOT)) == "mm.tokenizers.text_bytes"


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """Built from a copy, installed by unpacking, imported from elsewhere."""
    source, folder = tmp_path / "source", tmp_path / "installed"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("mm", *LINKED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    wheel = python(build, source).splitlines()[-1]
    with zipfile.ZipFile(source / "dist" / wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(folder)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mm"}, "mm/ and its metadata, nothing beside them"
    expected = {"mm/__init__.py", "mm/py.typed", "mm/tokenizers/text_bytes.py", "mm/heads/lm.py"}
    shipped = [ROOT / "configs", *(ROOT / "mm").glob("checkpoints")]
    for file in (file for top in shipped for file in top.rglob("*")):
        if file.suffix in (".yaml", ".json", ".safetensors"):
            expected.add(f"mm/{file.relative_to(ROOT).as_posix().removeprefix('mm/')}")
    assert expected <= names
    code = "import mm, tokenizers; from mm import plugins; print(mm.__file__, *plugins.available('tokenizers'))"
    file, *found = python(code, tmp_path, PYTHONPATH=str(folder)).split()
    assert Path(file).is_relative_to(folder)
    assert "text_bytes" in found


# --- dependencies -----------------------------------------------------------------------------------------------------


def requirements() -> dict[str, list[Requirement]]:
    """By extra; "" is what every installation gets."""
    groups = {"": PROJECT["project"]["dependencies"], **PROJECT["project"]["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), f"not a plain exact version: {line}"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_constraints_are_exact_and_without_addresses() -> None:
    assert "://" not in (ROOT / "constraints.txt").read_text()
    assert len(pins()) > 50


def test_every_requirement_is_pinned_within_its_range() -> None:
    pinned = pins()
    for requirement in (r for group in requirements().values() for r in group):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes the tested {pinned[name]}"


def test_xformers_only_where_it_has_wheels() -> None:
    (xformers,) = (r for r in requirements()[""] if r.name == "xformers")
    assert xformers.marker is not None
    for system, machine, wanted in [
        ("linux", "x86_64", True),
        ("win32", "AMD64", True),
        ("darwin", "arm64", False),
        ("linux", "aarch64", False),
    ]:
        assert xformers.marker.evaluate({"sys_platform": system, "platform_machine": machine}) is wanted


def test_what_the_package_imports_is_required() -> None:
    """A module that a newcomer's installation lacks is a crash that none of us sees."""
    # What needs an extra names it when it is missing; the tools of the tests belong to no installation.
    groups = ("", "video", "mesh", "speech", "sentences", "bench")
    known = {canonicalize_name(r.name) for group in groups for r in requirements()[group]}
    distributions = packages_distributions()
    missing = {}
    for file in sorted((ROOT / "mm").glob("**/*.py")) + [f for n in LINKED for f in (ROOT / n).glob("**/*.py")]:
        for name in imported(file) - set(sys.stdlib_module_names) - {"mm"}:
            names = {canonicalize_name(d) for d in distributions.get(name, [name])}
            if not names & known:
                missing[name] = file.relative_to(ROOT).as_posix()
    assert not missing, f"add to pyproject.toml and constraints.txt: {missing}"


def imported(file: Path) -> set[str]:
    """Top-level names that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found
