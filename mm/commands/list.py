"""`mm list`: what there is to choose from."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mm.commands.common import parser

KINDS = ("tokenizers", "orders", "heads", "systems", "checkpoints")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    command = parser("list", "Tokenizers, orders, heads, systems and checkpoints, those of other packages too.")
    command.add_argument("kind", nargs="?", choices=KINDS, help="only these")
    command.add_argument("--json", action="store_true", help="as JSON")
    args = command.parse_args(argv)
    found = {kind: names(kind) for kind in KINDS if args.kind in (None, kind)}
    if args.json:
        print(json.dumps(found))
        return 0
    width = max((len(name) for values in found.values() for name in values), default=0)
    for kind, values in found.items():
        print(f"{kind}:" if values else f"{kind}: none")
        for name, text in values.items():
            print(f"  {name.ljust(width)}  {text}".rstrip())
    return 0


def names(kind: str) -> dict[str, str]:
    """Name → what it is, in a line. Nothing is imported for it."""
    if kind == "systems":
        return {path.stem: comment(path) for path in sorted((CONFIGS / "systems").glob("*.yaml"))}
    if kind == "checkpoints":
        from mm.hub import CARD, SHIPPED, shipped

        return {name: title(SHIPPED / name / CARD) for name in shipped()}
    from importlib import import_module

    from mm import plugins

    package = import_module(f"mm.{kind}")
    out = {}
    for name in plugins.available(kind):  # type: ignore[arg-type]
        files = [Path(place) / f"{name}.py" for place in package.__path__]
        file = next((file for file in files if file.is_file()), None)
        out[name] = docstring(file) if file else "from another package"
    return out


def docstring(file: Path) -> str:
    """The first sentence of a module's docstring."""
    import ast

    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return sentence(text)


def comment(file: Path) -> str:
    """The first sentence of a file's leading comment."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return sentence(" ".join(lines))


def title(file: Path) -> str:
    """The heading of a model card; the first sentence below it where the heading is but the checkpoint's name."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    _, found, below = ("\n" + text).partition("\n# ")
    if not found:
        return ""
    heading, _, rest = below.partition("\n")
    return heading.strip() if heading.strip() != file.parent.name else sentence(rest.strip())


def sentence(text: str) -> str:
    """A text's beginning, at most one line."""
    first = " ".join(text.split("\n\n")[0].split())
    first = re.split(r"(?<! al)\. ", first)[0].rstrip(".")
    return first if len(first) <= 110 else first[:109].rsplit(" ", 1)[0] + " …"
