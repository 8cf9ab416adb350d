"""The `mm` program: finds the command and runs it; mistakes of the user become one sentence.

Commands live in modules with `main(argv) -> exit status`, imported when asked for: `mm --help` imports none of them.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from importlib.util import find_spec
from typing import TextIO

COMMANDS = {
    "generate": (
        "mm.commands.generate",
        "pictures, speech, video, shapes or text for a prompt or a file, from a checkpoint",
    ),
    "fit": ("mm.commands.train", "train a tokenizer or a model:  mm fit -c configs/systems/liquid.yaml"),
    "validate": ("mm.commands.train", "losses on the validation data of a configuration"),
    "test": ("mm.commands.train", "the same on the test data"),
    "predict": ("mm.commands.train", "losses of every validation document, as predictions.jsonl"),
    "tokenize": ("mm.commands.tokenize", "encode and decode a file; report rate and distortion"),
    "list": ("mm.commands.list", "tokenizers, orders, heads, systems, checkpoints"),
    "data": ("mm.commands.data", "make or convert data sets"),
    "app": ("mm.apps.demo", "the demo in a browser"),
    "serve": ("mm.serve.command", "the HTTP server: endpoints of OpenAI's shapes"),
    "evaluate": ("mm.evaluate", "every quality figure of a checkpoint as a table and JSON"),
    "bench": ("mm.bench", "speed side by side with what users would pick instead"),
}
LIGHTNING = ("fit", "validate", "test", "predict")


def main(argv: list[str] | None = None) -> int:
    """Run `mm` with the given arguments (by default the program's). Returns the exit status: 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        return _run(arguments)
    except BrokenPipeError as error:
        if not _is_read("\n"):
            return 0
        if "--debug" in arguments:
            raise
        print(f"mm: {error}", file=sys.stderr)  # some other pipe
        return 2
    finally:
        warnings.showwarning = show
        _is_read()


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from mm import __version__

        print(f"mm {__version__}")
        return 0
    name, known = arguments[0], commands()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        print(f"mm: there is no command {name!r}{hint} (mm --help lists them)", file=sys.stderr)
        return 2
    try:
        module = __import__(known[name][0], fromlist=["main"])
        return int(module.main(arguments if name in LIGHTNING else arguments[1:]) or 0)
    except (ValueError, OSError) as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        print(f"mm {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"mm {name}: interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:
        if type(error).__name__ != "SIGTERMException":  # Lightning's, which says that all went well
            raise
        print(f"mm {name}: ended by SIGTERM", file=sys.stderr)
        return 143


def _is_read(text: str = "") -> bool:
    """Whether somebody still reads what is printed. Who reads through `head` has seen enough: that is no mistake, and what
    is left unread must not fail once more when the program ends."""
    try:
        print(end=text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings of mm are for its users, who need no line of its source; others look as they do everywhere."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") == "warnings":
        frame = frame.f_back  # the file name is that of some caller, which may be anybody's
    if frame.f_globals.get("__name__", "").partition(".")[0] == "mm":
        print(f"mm: warning: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def commands() -> dict[str, tuple[str, str]]:
    """Commands whose module is there, with their module and what they do."""
    return {name: value for name, value in COMMANDS.items() if _is_there(value[0])}


def _is_there(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.origin is not None  # a folder without code is no command


def usage() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in commands().items()]
    return "\n".join(
        [
            "usage: mm COMMAND [options]        mm COMMAND --help says more",
            "",
            "One decoder, one token stream, every modality.",
            "",
            *lines,
            "",
            "  --version   print the version        --debug   show where an error comes from",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
