"""Checkpoints: a folder with `model.json`, `model.safetensors`, and a folder for each tokenizer that has files.

Checkpoints may come from strangers. What `model.json` may say is decided in `mm.description`; the memory that it asks
for is held to the size of the weights file; nothing leads out of the folder, and nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mm import safe_io
from mm.description import CONFIG, FORMAT, NAME, VERSION, attempt, class_path, construct, describe, find_class, plain
from mm.description import read_config as read_config

if TYPE_CHECKING:
    from mm.interfaces import Modality, ModalityTokenizer, Sampling
    from mm.model import MultimodalModel

WEIGHTS, CARD = "model.safetensors", "README.md"
SHIPPED = Path(__file__).resolve().parent / "checkpoints"
"""Checkpoints that come with the package, by the name of their folder."""
USUAL = "mm-tiny"
"""The shipped checkpoint that answers first."""
MAX_VOICES, MAX_NAME = 4096, 100
"""Voices of a model, and characters of the name of one."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

# --- saving ---------------------------------------------------------------------------------------------------------


def save_pretrained(
    model: MultimodalModel,
    path: str | os.PathLike[str],
    card: str | None = None,
    *,
    storage: Literal["float32", "float16"] = "float32",
    sampling: Mapping[str, Sampling] | None = None,
) -> Path:
    """Write a checkpoint folder, whole or not at all.

    Args:
        model: what is saved.
        path: the folder.
        card: text of the model card, written as README.md.
        storage: `float16` halves the file: matrices are rounded to it, and loading makes them float32 again.
        sampling: recommended sampling by modality, which pipelines take as their default.

    Raises:
        ValueError: a plug-in that a checkpoint can't describe, or weights that are not finite in the storage type.
    """
    import torch

    from mm import __version__

    if storage not in ("float32", "float16"):
        raise ValueError(f"storage must be 'float32' or 'float16', got {storage!r}")
    state = {}
    for name, tensor in model.state_dict().items():
        small = storage == "float16" and tensor.ndim >= 2 and tensor.is_floating_point()
        state[name] = tensor.detach().to("cpu", torch.float16 if small else tensor.dtype)
        if tensor.is_floating_point() and not bool(state[name].isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite in {state[name].dtype}; the model is not saved")
    for name in sampling or {}:
        model.vocabulary[name]  # refuses a modality that the model lacks
    with safe_io.atomic_folder(path, last=CONFIG) as folder:
        config = {
            "format": FORMAT,
            "version": VERSION,
            "mm_version": __version__,
            "context": model.context,
            "backbone": model.backbone.config.to_dict(),
            "modalities": [_describe_modality(modality, folder) for modality in model.modalities],
            "vocabulary": model.vocabulary.to_dict(),
            "null_seen": model.null_seen,
            "voices": list(check_voices(model.voices, "the model")),
            "by_word": model.by_word,
            "directions": None if model.directions is None else sorted(map(list, model.directions)),
            "sampling": {name: dataclasses.asdict(value) for name, value in (sampling or {}).items()},
        }
        safe_io.write_tensors(folder / WEIGHTS, state, {"format": "pt"})
        if card is not None:
            safe_io.write_text(folder / CARD, card)
        safe_io.write_json(folder / CONFIG, config)
    return Path(path)


def _describe_modality(modality: Modality, folder: Path) -> dict[str, Any]:
    if not NAME.fullmatch(modality.name):
        raise ValueError(f"a modality named {modality.name!r} can't be saved; its name needs letters, digits and _")
    # said only where it means something
    fusion = {"fusion": modality.fusion} if modality.tokenizer.spec.alongside else {}
    return {
        "name": modality.name,
        "weight": modality.weight,
        **fusion,
        "tokenizer": _describe_tokenizer(modality, folder),
        "head": describe("heads", modality.head, f"the head of {modality.name!r}"),
        "order": describe("orders", modality.order, f"the order of {modality.name!r}"),
    }


def _describe_tokenizer(modality: Modality, folder: Path) -> dict[str, Any]:
    """Class and arguments; or class and folder of a tokenizer that can `save` itself."""
    tokenizer, place = modality.tokenizer, f"the tokenizer of {modality.name!r}"
    save, load = getattr(tokenizer, "save", None), getattr(type(tokenizer), "from_directory", None)
    if save is None and load is None:
        return describe("tokenizers", tokenizer, place)
    if save is None or load is None:
        raise ValueError(f"{place}, {type(tokenizer).__name__}, needs both save() and from_directory()")
    name = f"tokenizers/{modality.name}"
    (folder / "tokenizers").mkdir(exist_ok=True)
    save(folder / name)
    return {"class_path": class_path("tokenizers", type(tokenizer), place), "folder": name}


def check_voices(voices: Any, what: str) -> tuple[str, ...]:
    """Names of voices, within bounds. Raises `ValueError` beginning with `what`."""
    fine = isinstance(voices, list | tuple) and len(voices) <= MAX_VOICES
    if not fine or not all(
        isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() for name in voices
    ):
        raise ValueError(
            f"{what} has voices that are no list of up to {MAX_VOICES:,} printable names of 1 to {MAX_NAME} characters"
        )
    return tuple(voices)


def check_directions(pairs: Any, names: Iterable[str], what: str) -> frozenset[tuple[str, str]] | None:
    """(given, made) modalities of `names`, None where nothing is known. Raises `ValueError` beginning with `what`."""
    if pairs is None:
        return None
    known = set(names)
    fine = isinstance(pairs, list | tuple | set | frozenset) and len(pairs) <= len(known) ** 2
    if not fine or any(
        not isinstance(pair, list | tuple) or len(pair) != 2 or not {*map(str, pair)} <= known for pair in pairs
    ):
        raise ValueError(
            f"{what} has directions {str(pairs)[:80]!r}; expected pairs of its modalities {', '.join(sorted(known))}"
        )
    return frozenset((str(given), str(made)) for given, made in pairs)


# --- finding --------------------------------------------------------------------------------------------------------


def shipped() -> tuple[str, ...]:
    """Names of the checkpoints that come with the package."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}")))


def answering() -> list[str]:
    """Names of these checkpoints in the order in which they are asked: `USUAL` first."""
    return sorted(shipped(), key=lambda name: name != USUAL)


def usual(given: str, made: str) -> str:
    """The checkpoint that answers where none is named: the first of `answering` that has learned to make `made` of `given`
    (modalities by the names that shipped checkpoints give them: text, image, speech, video, shape); where none has, `USUAL`,
    which says what it makes instead."""
    for name in answering():
        if [given, made] in (read_config(SHIPPED / name).get("directions") or []):
            return name
    return USUAL


def resolve(path_or_name: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: the name of a shipped one, a local folder, or `owner/name` on the Hugging Face hub.

    Of a hub repository only JSON and safetensors files are fetched. Raises `ValueError` where there is no checkpoint.
    """
    text = os.fspath(path_or_name)
    if text in shipped():
        return SHIPPED / text
    path = Path(text)
    if text and path.is_dir():
        if not (path / CONFIG).is_file():
            raise ValueError(f"the folder {text!r} holds no {CONFIG}; give a folder that save_pretrained wrote")
        return path
    if path.is_file():
        raise ValueError(f"{text!r} is a file; give the folder of a checkpoint")
    if HUB_NAME.fullmatch(text) and ".." not in text:
        return _fetch(text)
    known = ", ".join(shipped()) or "none"
    raise ValueError(
        f"there is no checkpoint {text!r}; give a folder, owner/name on the hub, or one that is shipped ({known})"
    )


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of the network, the hub, the cache: a dozen types
        first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(f"{name!r} is no local folder and can't be fetched from the hub: {first}") from error
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{name!r} on the hub holds no {CONFIG}; it is not a checkpoint of this project")
    return folder


# --- loading --------------------------------------------------------------------------------------------------------


def load_pretrained(path_or_name: str | os.PathLike[str]) -> MultimodalModel:
    """The model of a checkpoint, on the CPU in evaluation mode. Leaves torch's random state as it was.

    Raises:
        ValueError: no such checkpoint; files missing, damaged or oversized; classes that are not plug-ins; weights,
            vocabulary or tokenizer fingerprints that don't fit the description. One sentence that names what.
    """
    import torch

    from mm.saved import SLACK, budget

    folder = resolve(path_or_name)
    config = read_config(folder)
    with torch.random.fork_rng(devices=[]):
        tokenizers = load_tokenizers(folder, config)
        weights = safe_io.inside(folder, WEIGHTS)
        with budget((weights.stat().st_size if weights.is_file() else 0) + SLACK):
            model = _build(config, tokenizers)
    model.vocabulary.check(config["vocabulary"])
    model.load_state_dict(_read_weights(folder, model))
    return model.eval()


def load_weights(model: MultimodalModel, path_or_name: str | os.PathLike[str]) -> None:
    """Copy a checkpoint's weights into a model of the same modalities and backbone; orders and loss weights may differ.

    Raises `ValueError` where something doesn't fit, before anything is changed.
    """
    folder = resolve(path_or_name)
    config = read_config(folder)
    model.vocabulary.check(config["vocabulary"])
    for name, value in model.backbone.config.to_dict().items():
        saved = config["backbone"][name]
        if saved != value and name not in ("dropout", "checkpointing"):
            raise ValueError(
                f"the checkpoint's backbone has {name} {saved}, this one {value}; use the backbone it was trained with"
            )
    for modality, entry in zip(model.modalities, config["modalities"], strict=True):
        if modality.tokenizer.spec.alongside and entry.get("fusion") != modality.fusion:
            raise ValueError(
                f"the checkpoint's {modality.name} has fusion {entry.get('fusion')}, this one {modality.fusion}; use the one it "
                "was trained with"
            )
    model.load_state_dict(_read_weights(folder, model))
    model.null_seen = config.get("null_seen") or model.null_seen
    model.voices = check_voices(config.get("voices") or [], "the checkpoint") or model.voices
    model.by_word = bool(config.get("by_word")) or model.by_word
    model.directions = (
        check_directions(config.get("directions"), model.vocabulary.index, "the checkpoint") or model.directions
    )


def _read_weights(folder: Path, model: MultimodalModel) -> dict[str, Any]:
    file = safe_io.inside(folder, WEIGHTS)
    state = safe_io.read_tensors(file, model.state_dict())
    safe_io.check_finite(file, state)
    return state


def load_tokenizers(folder: Path, config: Mapping[str, Any]) -> dict[str, ModalityTokenizer]:
    """The tokenizers of a checkpoint, by modality, each checked against the fingerprint that was saved."""
    saved = {entry["name"]: entry["fingerprint"] for entry in config["vocabulary"]["modalities"]}
    out: dict[str, ModalityTokenizer] = {}
    for entry in config["modalities"]:
        name, described = entry["name"], entry["tokenizer"]
        place = f"the tokenizer of {name!r}"
        if "folder" in described:
            out[name] = _from_folder(folder, described, place)
        else:
            out[name] = construct("tokenizers", described, place)
        expected, got = saved.get(name), attempt(lambda t=out[name]: t.spec.fingerprint, place)  # type: ignore[misc]
        if expected != got:
            raise ValueError(
                f"{place} has fingerprint {got!r}, but the checkpoint was trained with {str(expected)[:80]!r}; "
                "restore the tokenizer that was saved with it"
            )
    return out


def _from_folder(folder: Path, described: Mapping[str, Any], place: str) -> Any:
    from mm.saved import SLACK, budget

    where = safe_io.inside(folder, str(described["folder"]))
    held = 0
    for file in where.rglob("*"):
        safe_io.inside(folder, file.relative_to(Path(folder).resolve()).as_posix())  # links inside it may lead out, too
        safe_io.refuse_pickle(file)
        held += file.stat().st_size if file.is_file() else 0
    cls = find_class("tokenizers", described["class_path"], place)
    if not hasattr(cls, "from_directory"):
        raise ValueError(
            f"{place}, {described['class_path']!r}, has no from_directory(), but the checkpoint names a folder"
        )
    with budget(held + SLACK):
        return attempt(lambda: cls.from_directory(where), place)


def load_sampling(config: Mapping[str, Any]) -> dict[str, Sampling]:
    """Recommended sampling by modality, of a description that `read_config` gave."""
    from mm.interfaces import Sampling

    out = {}
    for name, values in plain(config.get("sampling") or {}, "sampling").items():
        out[name] = attempt(lambda v=values: Sampling(**v), f"the sampling of {name[:60]!r}")  # type: ignore[misc]
    return out


def _build(config: Mapping[str, Any], tokenizers: Mapping[str, ModalityTokenizer]) -> MultimodalModel:
    from mm.backbone import BackboneConfig
    from mm.interfaces import Modality
    from mm.model import MultimodalModel

    modalities = [
        Modality(
            name=entry["name"],
            tokenizer=tokenizers[entry["name"]],
            head=construct("heads", entry["head"], f"the head of {entry['name']!r}"),
            order=construct("orders", entry["order"], f"the order of {entry['name']!r}"),
            weight=float(entry["weight"]),
            fusion=entry.get("fusion", "middle"),
        )
        for entry in config["modalities"]
    ]
    backbone = attempt(lambda: BackboneConfig(**config["backbone"]), "the backbone")
    model = attempt(lambda: MultimodalModel(backbone, modalities, config["context"]), "the model")
    model.null_seen = config.get("null_seen")
    model.voices = check_voices(config.get("voices") or [], "the checkpoint")
    model.by_word = bool(config.get("by_word"))
    model.directions = check_directions(config.get("directions"), model.vocabulary.index, "the checkpoint")
    return model
