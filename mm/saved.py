"""What a tokenizer with weights is saved as: `config.json` and `model.safetensors` in one folder, both or neither.

The settings are checked before anything is built from them, whoever wrote them: each of the type that the tokenizer's own
argument has, none missing, none too many. The memory that they ask for is held to the size of the weights file. A fingerprint
says what tokens mean, a digest what was saved together.

Weights are read in float32, and written so that nothing is lost, in half the space where 16 bits hold them (`rounded`): a
tokenizer that was moved to another type comes back with equal values.
"""

from __future__ import annotations

import abc
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mm import safe_io

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAX_CONFIG_BYTES, MAX_WEIGHT_BYTES = 1 << 16, 1 << 31
MAX_NUMBER = 1 << 30
"""Largest number among the settings; JSON has larger ones, and readers make infinity of some."""
MAX_LIST, MAX_TEXT = 32, 256
SHIPPED = Path(__file__).resolve().parent / "checkpoints"
SLACK = 1 << 24
"""Tensor elements that anything may take, however small its weights file is (64 MiB of float32)."""

# --- settings -------------------------------------------------------------------------------------------------------


def whole_number(name: str, value: Any, low: int | None = None, high: int | None = None) -> None:
    """Raises `ValueError` unless `value` is a whole number (a bool is none) from `low` to `high`, both given or neither."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if low is None or high is None:
        low, high, where = -MAX_NUMBER, MAX_NUMBER, ""
    else:
        where = f" in {low}..{high}"
    if not whole or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number{where}, got {value!r:.60}")


def number(name: str, value: Any, low: float | None = None) -> None:
    """Raises `ValueError` unless `value` is a number that a saved setting may be, and no less than `low`."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not max(-MAX_NUMBER, -MAX_NUMBER if low is None else low) <= value <= MAX_NUMBER:
        least = "" if low is None else f" of at least {low:g}"
        raise ValueError(f"{name} must be a number{least}, got {value!r:.60}")


def as_list(value: Any) -> Any:
    """A tuple as the list that JSON makes of it; what is neither is left to be refused by its name."""
    return list(value) if isinstance(value, tuple) else value


def as_float(value: Any) -> Any:
    """A whole number as a float, so that both are one setting; what is none is left to be refused by its name."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and abs(value) <= MAX_NUMBER else value


def whole_numbers(name: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is a list of whole numbers, at least one."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of whole numbers, got {value!r:.60}")
    for item in value:
        whole_number(f"each of {name}", item)


# --- files ----------------------------------------------------------------------------------------------------------


def find(pretrained: str | os.PathLike[str], what: str, form: str) -> Path:
    """The folder of a saved tokenizer: a path, or the name of one that ships with the package. `form`: of which shipped ones a
    message speaks. Raises `ValueError`."""
    if not isinstance(pretrained, str | os.PathLike):
        raise ValueError(
            f"a saved {what} is named by its folder (str or Path), got {type(pretrained).__name__}: give the folder that "
            "its save() wrote"
        )
    pretrained = os.fspath(pretrained)
    folders = [Path(pretrained)]
    if pretrained and len(Path(pretrained).parts) == 1 and pretrained != "..":
        folders.append(SHIPPED / pretrained)
    for folder in folders:
        try:
            if (folder / CONFIG).is_file():
                return folder
        except OSError as error:  # longer than names can be, or behind a folder that is closed to us
            raise ValueError(
                f"'{pretrained[:60]}' can't be looked up as a saved {what} ({error.strerror}): give a folder that its save() "
                "wrote"
            ) from error
    configs = sorted(SHIPPED.glob(f"*/{CONFIG}")) if SHIPPED.is_dir() else []
    shipped = [file.parent.name for file in configs if safe_io.read_json(file).get("format") == form]
    raise ValueError(
        f"no saved {what} in '{pretrained}' ({CONFIG} is missing): give a folder that its save() wrote"
        + (f", or one of the shipped names {shipped}" if shipped else "")
    )


def read(folder: Path, form: str, defaults: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The settings in a folder: exactly the names of `defaults`, each of the type that its default has.

    Raises:
        ValueError: missing, damaged, or not saved as `form`.
    """
    file = folder / CONFIG
    saved = safe_io.read_json(file, max_bytes=MAX_CONFIG_BYTES)
    if saved.get("format") != form:
        raise ValueError(f"{file} does not describe {what}: expected format '{form}'")
    config = saved.get("config")
    if not isinstance(config, dict) or set(config) != set(defaults):
        odd = sorted(set(defaults) ^ set(config)) if isinstance(config, dict) else "config"
        raise ValueError(f"{file} has missing or unknown settings ({odd}): it was saved by another version")
    for name, value in config.items():
        if not _like(value, defaults[name]):
            raise ValueError(f"{file} has a wrong value for {name}: {str(value)[:60]!r}")
    return config


def _like(value: Any, default: Any) -> bool:
    """Of the default's type; a whole number will do for any number, lists are short and hold numbers of one type."""
    if isinstance(default, list | tuple):
        inner = default[0] if default else 0
        return isinstance(value, list) and 0 < len(value) <= MAX_LIST and all(_like(v, inner) for v in value)
    if isinstance(default, str):
        return isinstance(value, str) and len(value) <= MAX_TEXT
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    kinds = (int, float) if isinstance(default, float) else int
    return isinstance(value, kinds) and abs(value) <= MAX_NUMBER


def write(folder: Path, form: str, config: Mapping[str, Any], state: Mapping[str, Tensor], fingerprint: str) -> None:
    """Both files into a folder that exists (see `safe_io.atomic_folder`)."""
    safe_io.write_tensors(folder / WEIGHTS, {name: _packed(_stored(tensor)) for name, tensor in state.items()})
    value = {"format": form, "fingerprint": fingerprint, "digest": digest(config, state), "config": dict(config)}
    safe_io.write_json(folder / CONFIG, value)


def read_weights(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, of the names, shapes and types of `expected`. Raises `ValueError`."""
    state = safe_io.read_tensors(folder / WEIGHTS, expected, max_bytes=MAX_WEIGHT_BYTES)
    safe_io.check_finite(folder / WEIGHTS, state)
    return state


def check_whole(folder: Path, fingerprint: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` where the weights are not those that the settings were saved with."""
    saved = safe_io.read_json(folder / CONFIG, max_bytes=MAX_CONFIG_BYTES)
    for name, found in (("fingerprint", fingerprint), ("digest", digest(config, state))):
        if saved.get(name) != found:
            raise ValueError(
                f"{folder} has {name} {found}, its {CONFIG} says {str(saved.get(name))[:60]!r}: "
                "restore the pair of files that was saved together"
            )


def digest(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that change with any setting or weight, as it is stored: in float32."""
    found = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        values = _stored(tensor).contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _stored(tensor: Tensor) -> Tensor:
    """On the CPU; floating-point numbers as float32, which holds those of the 16-bit types exactly."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _packed(tensor: Tensor) -> Tensor:
    """In float16 where that loses nothing."""
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor


# --- identity -------------------------------------------------------------------------------------------------------


class Fingerprinted(nn.Module):
    """A module that may keep what it found out about its weights (a hash, vectors) until they change: `weights_changed` is
    called in training, and when weights are loaded or converted, also by a module around it."""

    _fingerprint: str | None = None

    def weights_changed(self) -> None:
        """Forget what is cached of the weights."""
        self._fingerprint = None

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.weights_changed()
        return super().train(mode)

    @torch.no_grad()
    def rounded(self) -> Self:
        """This module, its weights rounded to 16 bits: half as large a file, and another fingerprint. For what is given away;
        do it before a model learns its tokens. Raises `ValueError` for weights that 16 bits can't hold."""
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point():
                half = tensor.half()
                if not torch.isfinite(half).all():
                    raise ValueError(f"{name} holds values that 16 bits can't; save the tokenizer as it is")
                tensor.copy_(half)
        self.weights_changed()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.weights_changed()  # here and not in load_state_dict, which a module around this one doesn't call
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.weights_changed()  # of `to`, `half` and the like: another type rounds the weights
        return super()._apply(*args, **kwargs)


class FromSettings(Fingerprinted):
    """A tokenizer that is made from settings, and saved with them: its constructor fills a dictionary and calls `_made`. What it
    decodes with are the weights under `decoder.`, which may be trained further without its tokens changing their meaning."""

    form: ClassVar[str]
    """Of the saved settings, `mm.tokenizers.` and the file's name."""
    what: ClassVar[str]
    """What messages call it, with its article."""
    inner: ClassVar[tuple[str, ...]] = ()
    """Settings of decoder and training, which do not change what a token means."""
    config: dict[str, Any]

    @abc.abstractmethod
    def _build(self, c: dict[str, Any]) -> None:
        """Check the settings and make the networks."""

    def _made(self, pretrained: str | None, config: Mapping[str, Any]) -> None:
        """Become what the settings say, or, in evaluation mode, what `save` wrote with settings of these names. Raises
        `ValueError` for settings that don't fit, and for files that are missing, damaged, of other shapes, or not what was
        saved."""
        if pretrained is None:
            self._build(dict(config))
            return
        folder = find(pretrained, self.what.split(" ", 1)[1], self.form)
        found = read(folder, self.form, config, self.what)
        with building(folder):
            self._build(found)
        self.load_state_dict(read_weights(folder, self.state_dict()))
        self.eval()
        check_whole(folder, self.fingerprint, self.config, self.state_dict())

    def identity(self) -> str:
        """What a token means, hashed: settings and weights of all but the decoder."""
        config = {name: value for name, value in self.config.items() if name not in self.inner}
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("decoder.")}
        return f"{self.form.rpartition('.')[2]}-{digest(config, state)}"

    @property
    def fingerprint(self) -> str:
        """Of `identity`, computed once, then kept until the weights change."""
        if self._fingerprint is None:
            self._fingerprint = self.identity()
        return self._fingerprint

    def save(self, path: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into the folder `path`, both or neither."""
        self.weights_changed()
        with safe_io.atomic_folder(path, last=CONFIG) as folder:
            write(folder, self.form, self.config, self.state_dict(), self.fingerprint)

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """A saved tokenizer, in evaluation mode. Raises `ValueError` for files that are missing, damaged, of other shapes,
        or not what was saved."""
        return cls(pretrained=str(path))


# --- memory ---------------------------------------------------------------------------------------------------------


def building(folder: Path) -> budget:
    """A context for what is built from the settings in a folder: it may take no more memory than the weights beside them
    account for. Raises `ValueError` where they are missing."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is missing: restore the pair of files that was saved together")
    held = file.stat().st_size
    return budget(held + SLACK, f" ({str(file)!r}, {held:,} bytes): restore the pair of files that was saved together")


class budget(TorchFunctionMode):  # noqa: N801 - used as a context, like `torch.no_grad`
    """A context in which no more than so many tensor elements are created: a description that asks for far more than
    the weights file holds is refused before the memory is taken. Of several, one in another, each holds.

    (Building on torch's meta device would tell the same, but imports the compiler, which takes seconds.)

    Args:
        elements: how many.
        advice: the end of the refusal's sentence.

    Raises:
        ValueError: inside, when more would be created.
    """

    MAKERS = frozenset((torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange))

    def __init__(self, elements: int, advice: str = "") -> None:
        super().__init__()
        self.left, self.advice = elements, advice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.MAKERS:
            size = kwargs.get("size", args[0] if args and isinstance(args[0], list | tuple) else args)
            if func is torch.arange:
                size = [max((abs(x) for x in args if isinstance(x, int)), default=0)]
            elif func is torch.full:
                size = args[0] if args else size
            self.left -= math.prod(n for n in size if isinstance(n, int))
            if self.left < 0:
                raise ValueError(f"it asks for far more memory than its weights file holds{self.advice}")
        return func(*args, **kwargs)
