"""`mm fit|validate|test|predict`: Lightning's command line over the configurations, which may extend each other.

A configuration may begin with `extends: [other.yaml, …]`: files that are read before it, relative to it. Later files
change single keys of earlier ones; a list is replaced, or appended to with `key+:`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import Trainer
    from torch import Tensor
    from yaml import Node

SHIPPED = Path(__file__).resolve().parent.parent / "configs"
MAX_FILES, MAX_BYTES, MAX_DEPTH = 64, 1 << 20, 64


def main(argv: list[str]) -> int:
    """Run one subcommand; `argv` begins with its name. Raises `ValueError` for a configuration that can't be used."""
    arguments = [argv[0], *expand(argv[1:])]  # before the imports, which take seconds

    import warnings

    import yaml
    from jsonargparse import ArgumentError, get_loader, set_loader, set_parsing_settings
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from mm.runtime import tune_cpu

    tune_cpu()

    class CLI(LightningCLI):
        """Logs as CSV and for TensorBoard unless told otherwise; all that a run writes lies in `default_root_dir`."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {argv[0]: LightningCLI.subcommands()[argv[0]]}  # parsers of the others would take a second

        def _parse_ckpt_path(self) -> None:
            given = self.config[argv[0]].get("ckpt_path")
            if given and Path(given).is_file():  # not `last` and the like, which the trainer looks up
                check_readable(given, resume=argv[0] == "fit")
            super()._parse_ckpt_path()

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            settings = self.config_init[self.subcommand].trainer
            root = settings.default_root_dir or "."
            if settings.logger in (None, True):
                version = next(f"version_{n}" for n in range(10**9) if not Path(root, "logs", f"version_{n}").exists())
                place: dict[str, Any] = {"save_dir": root, "name": "logs", "version": version}
                kwargs.setdefault("logger", [TensorBoardLogger(**place), CSVLogger(**place)])
            if settings.precision is None and settings.accelerator in ("auto", "gpu", "cuda"):
                import torch

                if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
                    kwargs["precision"] = "bf16-mixed"
            trainer = super().instantiate_trainer(**kwargs)
            for callback in trainer.checkpoint_callbacks:  # a place that `--ckpt_path last` finds again
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str(Path(root, "checkpoints").absolute())
            watch(trainer, resume=argv[0] == "fit")
            return trainer

    set_loader(MODE, partial(load_value, get_loader("yaml")), exceptions=(yaml.YAMLError,))
    # strings below the fields of a dataclass become its help; reading them takes seconds
    set_parsing_settings(docstring_parse_attribute_docstrings=any("help" in argument for argument in argv))
    try:
        with warnings.catch_warnings():
            # what Lightning's own code is warned of, and that CSV and TensorBoard share a folder
            warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.(cli|utilities\._pytree)")
            warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
            warnings.filterwarnings("ignore", "Experiment logs directory .* exists")
            CLI(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"exit_on_error": False, "prog": "mm", "parser_mode": MODE},
                args=arguments,
            )
    except (ArgumentError, MisconfigurationException, ValueError) as error:
        raise ValueError(sentence(str(error))) from error
    return 0


def watch(trainer: Trainer, resume: bool) -> None:
    """A checkpoint that the trainer can't read, or that doesn't fit its model, is refused in a sentence.

    Not by catching what `fit` raises: errors of training itself are to stay as they are.
    """
    strategy = trainer.strategy
    vars(strategy)["load_checkpoint"] = partial(_load, strategy.load_checkpoint, resume)
    vars(strategy)["load_model_state_dict"] = partial(_restore, trainer, strategy.load_model_state_dict)


def _load(load: Callable[..., Any], resume: bool, checkpoint_path: Any, **kwargs: Any) -> Any:
    if Path(checkpoint_path).is_file():  # neither a folder of shards nor an address
        check_readable(checkpoint_path, resume)
    return load(checkpoint_path, **kwargs)


def _restore(trainer: Trainer, load: Callable[..., None], checkpoint: Mapping[str, Any], **kwargs: Any) -> None:
    try:
        load(checkpoint, **kwargs)
    except RuntimeError as error:
        difference = differing(checkpoint.get("state_dict", {}), trainer.lightning_module.state_dict())
        if not difference:
            raise
        raise ValueError(
            f"the checkpoint {str(trainer.ckpt_path)!r} was made with another configuration: {difference}; "
            "give the config.yaml in its logs folder"
        ) from error


def differing(have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    """The first weight in which a checkpoint differs from the model, and how; empty if there is none."""
    for name, weight in want.items():
        if name not in have:
            return f"it has no {name}"
        if have[name].shape != weight.shape:
            return f"{name} has shape {tuple(have[name].shape)}, expected {tuple(weight.shape)}"
    return next((f"it has {name}, which the model lacks" for name in have if name not in want), "")


def check_readable(path: str | Path, resume: bool) -> None:
    """Raises `ValueError` for a file that is no checkpoint of Lightning, or, to `resume`, one of weights alone."""
    import zipfile

    import torch

    what, advice = f"the checkpoint {str(path)!r}", "give a .ckpt file that `mm fit` wrote"
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{what} is empty; {advice}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{what} is cut short or no checkpoint at all; {advice}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped: what it holds isn't read
    except OSError:
        raise
    except Exception as error:  # a damaged file may fail anywhere in torch's reader
        raise ValueError(
            f"{what} is damaged, no checkpoint, or holds objects that could run code when they are loaded; {advice}"
        ) from error
    needed = ["state_dict", "pytorch-lightning_version"]
    if resume:
        needed += ["loops", "optimizer_states", "lr_schedulers"]
    missing = [key for key in needed if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{what} holds no {missing[0]}, expected what training goes on from; {advice}")


MODE = "yaml_with_none"
"""What jsonargparse is to call `load_value`."""


def load_value(load: Callable[[str], Any], text: str) -> Any:
    """YAML, with Python's word for null: what an option says of a part of a list's last element reaches the parser as the text
    of a Python value, where null has become None."""

    def nulled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: nulled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [nulled(inner) for inner in value]
        return None if value == "None" else value

    return nulled(load(text))


NOISE = re.compile(
    r"(- )*(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value( type)?: .*"
    r"|Expected a <class 'NoneType'>.*)$"
)
RIVAL = re.compile(r"Import path \S+ does not correspond to a subclass of")
"""What a type says of a class that was meant for another one; it tells something only where nothing else does."""


def sentence(text: str) -> str:
    """The parser's tree of attempts as one line: where, and what is wrong there."""
    lines = [line.strip() for line in text.splitlines()]
    kept = [re.sub(r"^(- )+", "", line) for line in lines if line and not NOISE.match(line)]
    if any(not line.endswith(":") and not RIVAL.match(line) for line in kept):
        kept = [line for line in kept if not RIVAL.match(line)]
    joined = " ".join(kept) or " ".join(lines)
    joined = re.sub(r'Parser key "([^"]*)":', r"\1:", joined)
    return re.sub(r"Problem with given class_path '([^']*)':", r"\1:", joined)


def expand(argv: list[str]) -> list[str]:
    """The arguments with each `-c FILE` replaced by the contents of the files it extends and its own."""
    import yaml

    out: list[str] = []
    lists: dict[tuple[str, ...], int] = {}
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in ("-c", "--config"):
            out.append(argument)
            continue
        file = value if equals else next(rest, "")
        if not file:
            raise ValueError(f"{name} needs the path of a configuration")
        for text in contents(find(file), []):
            if empty := replaced(yaml.safe_load(text), lists):
                out += ["--config", yaml.safe_dump(empty)]
            out += ["--config", text]
    return out


def replaced(value: Mapping[str, Any], known: dict[tuple[str, ...], int], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """What to empty before a file is read, so that its lists of objects replace those of earlier files: entries of two lists of
    one length the parser would merge, and what a file doesn't say of its data would be what another said of other data. `known`,
    the lengths of such lists so far, is brought up to date."""
    out: dict[str, Any] = {}
    for key, inner in value.items():
        place = (*path, str(key).removesuffix("+"))
        if isinstance(inner, dict):
            if below := replaced(inner, known, place):
                if "class_path" in inner:  # what stands there now may be of a class that has no such list
                    below["class_path"] = inner["class_path"]
                out[key] = below
        elif isinstance(inner, list):
            count = len(inner)
            if str(key).endswith("+"):
                count += known.get(place, 0)
            elif count == known.get(place) and any(isinstance(entry, dict) for entry in inner):
                out[key] = []
            known[place] = count
    return out


def find(name: str) -> Path:
    """A configuration's file: a path, or the path of one that is shipped (`systems/liquid.yaml`), also without its
    ending, and a system's without its folder."""
    path = Path(name)
    if path.is_file():
        return path
    inside = Path(*path.parts[path.parts[:1] == ("configs",) :])
    if ".." not in path.parts and not path.is_absolute():
        for folder in (SHIPPED, SHIPPED / "systems"):
            for shipped in (folder / inside, folder / f"{inside}.yaml"):
                if shipped.is_file():
                    return shipped
    raise ValueError(f"there is no configuration {name!r}; give a YAML file, or one that is shipped (mm list systems)")


def contents(path: Path, above: list[Path]) -> list[str]:
    """YAML texts of a file and, before it, of those it extends."""
    import yaml

    if path.resolve() in above:
        raise ValueError(f"the configuration {str(path)!r} extends itself: {' → '.join(p.name for p in above)}")
    if path.stat().st_size > MAX_BYTES or len(above) > MAX_FILES:
        raise ValueError(f"the configuration {str(path)!r} is too large or extends too deeply")
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        check_node(node, str(path))
        value = None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise ValueError(f"the configuration {str(path)!r} is nested too deeply") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"the configuration {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"the configuration {str(path)!r} is a {type(value).__name__}, expected keys such as model:")
    extends = value.pop("extends", [])
    if not isinstance(extends, list) or not all(isinstance(name, str) for name in extends):
        raise ValueError(f"extends of {str(path)!r} must be a list of files, got {extends!r}")
    out = []
    for name in extends:
        other = path.parent / name
        if not other.is_file():
            raise ValueError(f"{str(path)!r} extends {name!r}, which is missing; paths are relative to the file")
        out += contents(other, [*above, path.resolve()])
    return [*out, yaml.safe_dump(value, sort_keys=False)]


def check_node(root: Node | None, name: str) -> None:
    """Raises `ValueError` for a key that stands twice in one place, since YAML would drop the first without a word, and
    for what is nested too deeply or holds itself."""
    from yaml import MappingNode, ScalarNode, SequenceNode

    done = set()  # what aliases repeat is looked at once, or a short file could take hours

    def look(node: Node | None, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"the configuration {name!r} is nested too deeply, at most {MAX_DEPTH} levels are read")
        if id(node) in done:
            return
        if isinstance(node, MappingNode):
            keys = set()
            for key, value in node.value:
                if isinstance(key, ScalarNode):
                    if (key.tag, key.value) in keys:
                        line = key.start_mark.line + 1
                        raise ValueError(
                            f"the configuration {name!r} has the key {key.value!r} twice, again in line {line}; "
                            "leave one of them out"
                        )
                    keys.add((key.tag, key.value))
                look(key, depth + 1)
                look(value, depth + 1)
        elif isinstance(node, SequenceNode):
            for value in node.value:
                look(value, depth + 1)
        done.add(id(node))

    look(root, 0)
