"""Finds plug-ins: a file in `tokenizers/`, `heads/`, `mm/orders/` or `apps/` is one, and its name is its short name.

Nothing is registered: a new file is found at once and imported only when somebody asks for it. Other distributions add
theirs by entry points in the groups `mm.tokenizers`, `mm.heads`, `mm.orders` and `mm.apps`. A name that two plug-ins
claim is an error: which one a checkpoint meant must never depend on what else is installed.

Files whose name begins with an underscore are helpers, not plug-ins.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from mm.interfaces import Head, ModalityTokenizer, Order

Kind = Literal["tokenizers", "heads", "orders", "apps"]

# What a file must define one public subclass of; None: a function `main(argv)`.
_CONTRACTS: dict[str, str | None] = {
    "tokenizers": "ModalityTokenizer",
    "heads": "Head",
    "orders": "Order",
    "apps": None,
}
KINDS = tuple(_CONTRACTS)


def available(kind: Kind) -> tuple[str, ...]:
    """Short names of all plug-ins of a kind, sorted. Imports none of them.

    Raises:
        ValueError: no such kind, or two plug-ins claim one name.
    """
    return tuple(sorted(_find(kind)))


@overload
def load(kind: Literal["tokenizers"], name: str) -> type[ModalityTokenizer]: ...
@overload
def load(kind: Literal["heads"], name: str) -> type[Head]: ...
@overload
def load(kind: Literal["orders"], name: str) -> type[Order]: ...
@overload
def load(kind: Literal["apps"], name: str) -> Callable[[list[str]], int]: ...
def load(kind: Kind, name: str) -> Any:
    """The class of a plug-in (of an app: its function `main`), imported now. Whatever its import raises is raised.

    Raises:
        ValueError: unknown kind or name (the message lists the known ones and the nearest), two plug-ins of one name,
            or a file that does not define exactly one public subclass of its contract.
    """
    found = _find(kind)
    if name not in found:
        nearest = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"no plug-in {name!r} in {kind}; known: {', '.join(sorted(found)) or 'none'}{hint}")
    where = found[name]
    if isinstance(where, EntryPoint):
        return _check(kind, where.load(), f"entry point {where.group}:{name} ({where.value})")
    return _only(kind, importlib.import_module(where))


def short_name(plugin: type) -> str:
    """The short name of a class that `load` returns, for model cards and messages; its full path if it has none."""
    for kind in KINDS:
        for name, where in _find(kind).items():
            module = where.module if isinstance(where, EntryPoint) else where
            if module == plugin.__module__ and (not isinstance(where, EntryPoint) or where.attr == plugin.__qualname__):
                return name
    return f"{plugin.__module__}.{plugin.__qualname__}"


def _find(kind: str) -> dict[str, str | EntryPoint]:
    """Name → module to import, or entry point."""
    if kind not in _CONTRACTS:
        raise ValueError(f"no plug-ins of kind {kind!r}; kinds are {', '.join(KINDS)}")
    package = importlib.import_module(f"mm.{kind}")
    found: dict[str, str | EntryPoint] = {
        name: f"mm.{kind}.{name}" for _, name, _ in pkgutil.iter_modules(package.__path__) if not name.startswith("_")
    }
    # An editable installation can show the same entry point twice; only different targets are a clash.
    for point in _entry_points(f"mm.{kind}"):
        other = found.setdefault(point.name, point)
        target = other.value if isinstance(other, EntryPoint) else other
        if target != point.value:
            raise ValueError(
                f"two plug-ins in {kind} are called {point.name!r}: {target} and {point.value}"
                f"{_origin(point)}; rename one of them or uninstall its package"
            )
    return found


@cache
def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _origin(point: EntryPoint) -> str:
    return f" (from the package {point.dist.name})" if point.dist is not None else ""


def _contract(kind: str) -> type | None:
    name = _CONTRACTS[kind]
    return getattr(importlib.import_module("mm.interfaces"), name) if name else None


def _only(kind: str, module: Any) -> Any:
    """The one plug-in that a module of ours defines."""
    contract = _contract(kind)
    if contract is None:
        return _check(kind, getattr(module, "main", None), f"{module.__name__}.main")
    classes = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, contract)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(classes) != 1:
        names = ", ".join(cls.__name__ for cls in classes) or "none"
        raise ValueError(
            f"{module.__name__} must define exactly one public subclass of {contract.__name__}, it defines {names}; "
            "begin the names of helpers with an underscore"
        )
    return _check(kind, classes[0], f"{module.__name__}.{classes[0].__name__}")


def _check(kind: str, plugin: Any, where: str) -> Any:
    contract = _contract(kind)
    if contract is None:
        if not callable(plugin):
            raise ValueError(f"{where} is not a function; an app defines main(argv: list[str]) -> int")
        return plugin
    if not (inspect.isclass(plugin) and issubclass(plugin, contract)):
        raise ValueError(f"{where} is not a subclass of mm.interfaces.{contract.__name__}")
    if inspect.isabstract(plugin):
        raise ValueError(
            f"{where} leaves abstract: {', '.join(sorted(vars(plugin)['__abstractmethods__']))}; implement these"
        )
    return plugin
