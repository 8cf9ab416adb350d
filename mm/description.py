"""`model.json`: what a checkpoint says about its model, written, checked and turned into objects.

The file names plug-ins and their arguments, so it decides which classes are constructed, and it may come from a
stranger. Classes are found only among this project's plug-ins and installed ones, and only subclasses of the contract
that the place wants. Values are plain and bounded. What is refused is refused with one sentence, a `ValueError`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mm import plugins, safe_io

Kind = Literal["tokenizers", "heads", "orders"]
T = TypeVar("T")

FORMAT, VERSION = "mm.model", 1
CONFIG = "model.json"
CONTRACTS = {"tokenizers": "ModalityTokenizer", "heads": "Head", "orders": "Order"}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
LEAST_SIZE, MAX_LAYERS, MAX_SIZE = {"layers": 1, "heads": 1, "width": 1}, 4096, 1 << 20
MAX_INTEGER, MAX_STRING, MAX_ITEMS, MAX_DEPTH = 1 << 24, 4096, 4096, 6


# --- writing --------------------------------------------------------------------------------------------------------


def describe(kind: Kind, plugin: Any, place: str) -> dict[str, Any]:
    """A plug-in as its class and its constructor's arguments. `place` names it in messages."""
    values = {name: plain(value, f"{place}: {name}") for name, value in plugin.arguments().items()}
    check_arguments(type(plugin), values, place)  # what could not be loaded again is not saved
    return {"class_path": class_path(kind, type(plugin), place), "init_args": values}


def class_path(kind: Kind, cls: type, place: str) -> str:
    """The short name of a plug-in, or the path of a class of `mm.testing`: what `find_class` finds again."""
    module, short = cls.__module__, cls.__module__.rpartition(".")[2]
    if module == f"mm.{kind}.{short}" and short in plugins.available(kind) and plugins.load(kind, short) is cls:
        return short
    for point in entry_points(group=f"mm.{kind}"):
        if point.value.replace(" ", "") == f"{module}:{cls.__qualname__}":
            return point.name
    if _ours(kind, module) and cls.__qualname__ == cls.__name__:
        return f"{module}.{cls.__name__}"
    raise ValueError(
        f"{place} is of class {module}.{cls.__qualname__}, which no checkpoint may name; install it as a plug-in "
        f"(an entry point in the group mm.{kind})"
    )


def plain(value: Any, place: str, depth: int = 0) -> Any:
    """A value as JSON holds it, within bounds. The same rule judges what is written and what is read."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)  # settings, which the plug-in takes as a mapping too
    if depth > MAX_DEPTH:
        raise ValueError(f"{place} is nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise ValueError(f"{place} is {_short(value)}; whole numbers of a checkpoint stay within ±{MAX_INTEGER:,}")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place} is {value}; a checkpoint holds finite numbers")
        return value
    if isinstance(value, str):
        if len(value) > MAX_STRING or "/" in value or "\\" in value or ".." in value:
            raise ValueError(
                f"{place} is {_short(value)!r}, which looks like a path; a checkpoint is complete in itself, "
                "so a tokenizer that needs files must have save() and from_directory()"
            )
        return value
    if isinstance(value, list | tuple):
        if len(value) > MAX_ITEMS:
            raise ValueError(f"{place} has {len(value)} entries; a checkpoint holds at most {MAX_ITEMS}")
        return [plain(item, place, depth + 1) for item in value]
    if isinstance(value, Mapping):
        if len(value) > MAX_ITEMS or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{place} needs at most {MAX_ITEMS} keys, all of them text")
        return {key: plain(item, f"{place}.{_short(key)}", depth + 1) for key, item in value.items()}
    raise ValueError(f"{place} is a {type(value).__name__}; a checkpoint holds numbers, text, lists and objects")


def _short(value: object) -> str:
    try:
        return str(value)[:80]
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number of thousands of digits"


# --- reading --------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """The description of a checkpoint folder; every field that is used has its type and lies within bounds."""
    from mm.backbone import BackboneConfig
    from mm.interfaces import Fusion

    file = safe_io.inside(folder, CONFIG)
    config = safe_io.read_json(file)
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise ValueError(
            f"{str(file)!r} has format {_short(config.get('format'))!r} version {_short(config.get('version'))}; "
            f"this version reads {FORMAT!r} version {VERSION}"
        )
    check = _Checker(str(file))
    check.types(config, "it", {"context": int, "backbone": dict, "modalities": list, "vocabulary": dict})
    if not 1 <= config["context"] <= MAX_INTEGER:
        raise ValueError(f"{str(file)!r} has a context of {_short(config['context'])}; expected 1 to {MAX_INTEGER:,}")
    kinds = {"int": int, "float": float, "bool": bool}
    backbone, settings = config["backbone"], {f.name: kinds[str(f.type)] for f in dataclasses.fields(BackboneConfig)}
    check.types(backbone, "the backbone", settings)
    check.names(backbone, "the backbone", set(settings))
    for name, size in ((name, backbone[name]) for name, kind in settings.items() if kind is int):
        least, most = LEAST_SIZE.get(name, 0), MAX_LAYERS if name == "layers" else MAX_SIZE
        if not least <= size <= most:
            raise ValueError(
                f"{str(file)!r} describes a backbone of impossible size: {name} is {_short(size)}, expected {least} to "
                f"{most:,}"
            )
    if not 0 < len(config["modalities"]) <= 30:
        raise ValueError(f"{str(file)!r} has {len(config['modalities'])} modalities; expected 1 to 30")
    parts = {"tokenizer": dict, "head": dict, "order": dict}
    for entry in config["modalities"]:
        check.types(entry, "a modality", {"name": str, "weight": float, **parts})
        if not NAME.fullmatch(entry["name"]):
            raise ValueError(f"{str(file)!r} has a modality {_short(entry['name'])!r}; expected letters, digits and _")
        if not fits(entry.get("fusion", "middle"), Fusion):
            raise ValueError(f"{str(file)!r} has fusion {_short(entry['fusion'])!r}; expected early, middle or late")
        for part in parts:
            place = f"the {part} of {entry['name']!r}"
            check.types(entry[part], place, {"class_path": str})
            check.names(entry[part], place, {"class_path", "folder" if "folder" in entry[part] else "init_args"})
    check.types(config["vocabulary"], "the vocabulary", {"modalities": list})
    for entry in config["vocabulary"]["modalities"]:
        check.types(entry, "a modality of the vocabulary", {"name": str, "fingerprint": str})
    if config.get("null_seen") is not None:
        check.types(config, "it", {"null_seen": bool})
    if config.get("sampling") is not None:
        check.types(config, "it", {"sampling": dict})
        for name in config["sampling"]:
            check.types(config["sampling"], "the sampling", {name: dict})
    return config


def fits(value: Any, wanted: Any) -> bool:
    """Whether a JSON value is what an annotation wants. Annotations that JSON has no word for fit anything."""
    origin, inner = get_origin(wanted) or wanted, get_args(wanted)
    if origin in (Union, UnionType):
        settings = [one for one in inner if dataclasses.is_dataclass(one)]  # a mapping beside them is their JSON
        return any(fits(value, one) for one in (settings if settings and isinstance(value, dict) else inner))
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if wanted in (None, NoneType):
        return value is None
    if wanted is float:  # JSON reads 1e999 as infinity, and whole numbers may lie beyond every float
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if wanted in (int, str, bool):
        return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list) or not inner:
            return isinstance(value, list)
        if origin is tuple and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(item, inner[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict)
    if dataclasses.is_dataclass(wanted):
        types = get_type_hints(wanted)
        return isinstance(value, dict) and all(fits(item, types.get(name, Any)) for name, item in value.items())
    return True


def spelled(wanted: Any) -> str:
    """An annotation for people."""
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", NoneType: "null"}
    origin, inner = get_origin(wanted) or wanted, get_args(wanted)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(spelled, inner)))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (list, tuple, Sequence):
        each = ", ".join(spelled(one) for one in inner if one is not Ellipsis)
        return f"a list of {each}" if each else "a list"
    if dataclasses.is_dataclass(wanted):
        return f"the fields of {getattr(wanted, '__name__', wanted)}"
    return words.get(wanted, "an object" if origin in (dict, Mapping) else str(wanted))


def check_arguments(cls: Any, values: Mapping[str, Any], place: str) -> None:
    """Raises `ValueError` for the first argument that isn't what the constructor's annotations want: most plug-ins
    would take it, and fail much later."""
    try:
        hints = get_type_hints(cls.__init__)
    except Exception:  # names that are imported for type checkers only
        return
    parameters = inspect.signature(cls.__init__).parameters
    for name, value in values.items():
        if name not in hints or name not in parameters or (value is None and parameters[name].default is None):
            continue
        if not fits(value, hints[name]):
            raise ValueError(f"{place} has {name} {_short(value)!r}, expected {spelled(hints[name])}; correct it")


class _Checker:
    """Types and names of JSON values, refused by name."""

    def __init__(self, file: str) -> None:
        self.file = file

    def types(self, value: Any, place: str, wanted: Mapping[str, type]) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{self.file!r}: {place} is a {type(value).__name__}, expected an object")
        for name, kind in wanted.items():
            got = value.get(name)
            if not fits(got, kind):
                raise ValueError(
                    f"{self.file!r}: {_short(name)} of {place} is {_short(got)!r}, expected {kind.__name__}; "
                    "the file is damaged"
                )

    def names(self, value: Mapping[str, Any], place: str, known: set[str]) -> None:
        if unknown := sorted(set(value) - known):
            raise ValueError(f"{self.file!r}: {place} has unknown settings: {_short(', '.join(unknown))}")


def find_class(kind: Kind, name: str, place: str) -> Any:
    """The plug-in class of a short name, or of a path that `class_path` wrote."""
    if "." not in name:
        return plugins.load(kind, name)
    module, _, attribute = name.rpartition(".")
    contract = getattr(importlib.import_module("mm.interfaces"), CONTRACTS[kind])
    found = None
    if _ours(kind, module) and attribute.isidentifier():
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            found = None
    if not (inspect.isclass(found) and issubclass(found, contract) and found.__module__ == module):
        raise ValueError(
            f"{place} is {_short(name)!r}, which is no {contract.__name__} of this project and no installed plug-in; "
            "it is not loaded"
        )
    return found


def _ours(kind: Kind, module: str) -> bool:
    """Modules whose classes a checkpoint may name by path: importing any other runs code that has no part in models."""
    return module == "mm.testing" or re.fullmatch(rf"mm\.{kind}\.[a-z][a-z0-9_]*", module) is not None


def construct(kind: Kind, described: Mapping[str, Any], place: str) -> Any:
    """The plug-in that `describe` described."""
    cls = find_class(kind, described["class_path"], place)
    if hasattr(cls, "from_directory"):
        raise ValueError(f"{place}, {described['class_path']!r}, is kept in a folder, but the checkpoint names none")
    values = plain(described.get("init_args", {}), place)
    if not isinstance(values, dict):
        raise ValueError(f"{place}: init_args is a {type(values).__name__}, expected an object")
    try:
        inspect.signature(cls.__init__).bind(None, **values)
    except TypeError as error:
        raise ValueError(f"{place}, {described['class_path']!r}, {error}; it is of another version") from error
    check_arguments(cls, values, place)
    return attempt(lambda: cls(**values), place)


def attempt(make: Callable[[], T], place: str) -> T:
    """What `make` makes of a stranger's values; whatever it raises becomes a `ValueError`."""
    try:
        return make()
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(f"{place} can't be made: {reason[0] if reason else type(error).__name__}") from error
