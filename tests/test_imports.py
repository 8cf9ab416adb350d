"""Who may import whom, and what `import mm` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ("tokenizers", "heads", "orders")
HEAVY = (
    "torch numpy PIL lightning pytorch_lightning transformers diffusers gradio timm open_clip tokenizers datasets "
    "webdataset jsonargparse torchvision torchaudio xformers vector_quantize_pytorch rich yaml"
).split()

CORE = {
    f"mm.{name}"
    for name in "attention backbone cache decoding generation grammar hub layout model plugins rows training "
    "vocabulary cli commands bench data evaluate export interop orders pipelines".split()
}
"""What a tokenizer or a head must not need: they are used by these, and tested and reused without them."""

NAMES_PLUGINS = {"mm.testing", "mm.cli", "mm.commands", "mm.pipelines", "mm.bench"}
"""What may ask the finder for a plug-in by its name: the tiny models of the tests, and the ends of the program."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for folder in (ROOT / "mm", *(ROOT / "mm" / name for name in ("tokenizers", "heads", "apps"))):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


@cache
def imports(name: str, lazy: bool = True) -> frozenset[str]:
    """Modules of the package that a module imports; without `lazy` only those it imports when it is imported."""
    found = set()
    pending: list[ast.AST] = [tree(name)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found & set(modules())) - {name}


def reached(name: str) -> set[str]:
    seen, pending = {name}, [name]
    while pending:
        for other in imports(pending.pop(), lazy=False) - seen:
            seen.add(other)
            pending.append(other)
    return seen - {name}


def within(name: str, tops: set[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def plugin_modules(*kinds: str) -> list[str]:
    return sorted(n for n in modules() if n.count(".") == 2 and n.split(".")[1] in kinds)


def test_the_walk_sees_the_package() -> None:
    assert {"mm.interfaces", "mm.tokenizers.text_bytes", "mm.heads.lm", "mm.orders.raster"} <= set(modules())
    assert "mm.interfaces" in imports("mm.tokenizers.text_bytes")
    assert "mm.interfaces" in reached("mm.tokenizers.image_vqmodel")


@pytest.mark.parametrize("name", plugin_modules("tokenizers", "heads"))
def test_tokenizers_and_heads_do_without_the_core(name: str) -> None:
    """Neither directly, nor through a helper, nor inside a function."""
    wrong = {other for other in reached(name) | imports(name) if within(other, CORE)}
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("name", plugin_modules(*PLUGINS))
def test_plugins_do_not_import_each_other(name: str) -> None:
    """What two of them share stands in a module of mm, or in a file whose name begins with an underscore."""
    others = {o for o in imports(name) if o in plugin_modules(*PLUGINS) and not o.split(".")[-1].startswith("_")}
    assert not others


@pytest.mark.parametrize("name", sorted(set(modules()) - set(plugin_modules(*PLUGINS)) - {"mm.plugins"}))
def test_nothing_names_a_plugin(name: str) -> None:
    """Neither by import, nor by its path in a string, nor (but for the ends of the program) by its short name."""
    plugins = set(plugin_modules(*PLUGINS))
    if not within(name, {"mm.bench", "mm.apps"}):
        assert not imports(name) & plugins
    strings = [node.value for node in ast.walk(tree(name)) if isinstance(node, ast.Constant)]
    assert not {s for s in strings if isinstance(s, str) and ".".join(s.split(".")[:3]) in plugins}
    if not within(name, NAMES_PLUGINS):
        calls = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]
        loads = [c for c in calls if ast.unparse(c.func).split(".")[-1] == "load" and len(c.args) == 2]
        named = [ast.unparse(c) for c in loads if all(isinstance(a, ast.Constant) for a in c.args)]
        assert not named


def test_imports_make_no_circle() -> None:
    """Of modules that need each other in order to be imported, whichever comes second sees half of the other."""
    for name in modules():
        for other in imports(name, lazy=False):
            assert name not in reached(other) or within(name, {other}) or within(other, {name}), f"{name} ↔ {other}"


# --- cost -------------------------------------------------------------------------------------------------------------


def test_import_mm_loads_nothing_heavy() -> None:
    code = f"import sys, mm; dir(mm); mm.__version__; print(*[n for n in {HEAVY} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_import_mm_loads_the_standard_library_only() -> None:
    """What takes time is loaded where it is used."""
    code = "import sys; own = set(sys.modules); import mm; print(*{n.split('.')[0] for n in set(sys.modules) - own})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) - sys.stdlib_module_names == {"mm"}


def test_public_names_exist() -> None:
    import mm

    for name in mm.__all__:
        assert getattr(mm, name) is not None
        assert name in dir(mm)
    assert mm.TextToImagePipeline.__module__ == "mm.pipelines.text_to_image"


def test_a_wrong_name_says_what_there_is() -> None:
    import mm

    with pytest.raises(AttributeError, match="no attribute 'TextToImagePipelin'; it offers .*TextToImagePipeline"):
        mm.TextToImagePipelin  # noqa: B018
