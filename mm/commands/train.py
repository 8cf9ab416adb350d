"""`mm fit|validate|test|predict`: Lightning's command line over the configurations, which may extend each other.

A configuration may begin with `extends: [other.yaml, …]`: files that are read before it, relative to it. Later files
change single keys of earlier ones; a list is replaced, or appended to with `key+:`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).resolve().parent.parent / "configs"
MAX_FILES, MAX_BYTES = 64, 1 << 20


def main(argv: list[str]) -> int:
    """Run one subcommand; `argv` begins with its name. Raises `ValueError` for a configuration that can't be used."""
    import warnings

    from jsonargparse import ArgumentError, set_parsing_settings
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
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
            return trainer

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
                parser_kwargs={"exit_on_error": False, "prog": "mm"},
                args=[argv[0], *expand(argv[1:])],
            )
    except (ArgumentError, MisconfigurationException, ValueError) as error:
        raise ValueError(sentence(str(error))) from error
    return 0


NOISE = re.compile(
    r"(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value( type)?: .*"
    r"|- Expected a <class 'NoneType'>.*)$"
)


def sentence(text: str) -> str:
    """The parser's tree of attempts as one line: where, and what is wrong there."""
    lines = [line.strip() for line in text.splitlines()]
    kept = [line.removeprefix("- ") for line in lines if line and not NOISE.match(line)]
    joined = " ".join(kept) or " ".join(lines)
    joined = re.sub(r'Parser key "([^"]*)":', r"\1:", joined)
    return re.sub(r"Problem with given class_path '([^']*)':", r"\1:", joined)


def expand(argv: list[str]) -> list[str]:
    """The arguments with each `-c FILE` replaced by the contents of the files it extends and its own."""
    out: list[str] = []
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
            out += ["--config", text]
    return out


def find(name: str) -> Path:
    """A configuration's file: a path, or the path of one that is shipped (`systems/liquid.yaml`)."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = SHIPPED.joinpath(*path.parts[path.parts[:1] == ("configs",) :])
    if shipped.is_file() and ".." not in path.parts:
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
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
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
