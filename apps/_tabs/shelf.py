"""Which models the app has, what each can do, and the models themselves, loaded when somebody first needs them."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mm.interfaces import ModalityTokenizer, Order, Sampling
    from mm.pipelines.abilities import Abilities
    from mm.pipelines.base import Pipeline

P = TypeVar("P", bound="Pipeline")
MAKERS = {
    "picture": "mm.pipelines.text_to_image.TextToImagePipeline",
    "sound": "mm.pipelines.text_to_speech.TextToSpeechPipeline",
    "video": "mm.pipelines.text_to_video.TextToVideoPipeline",
    "shape": "mm.pipelines.text_to_3d.TextTo3DPipeline",
}
"""Medium → the pipeline that makes it of a text."""
READERS = {
    "picture": "mm.pipelines.image_to_text.ImageToTextPipeline",
    "sound": "mm.pipelines.speech_to_text.SpeechToTextPipeline",
    "video": "mm.pipelines.image_to_text.ImageToTextPipeline",
    "shape": "mm.pipelines.shape_to_text.ShapeToTextPipeline",
}
"""Medium → the pipeline that says in words what is in it."""
WORDS = {"picture": "pictures", "sound": "sounds", "video": "videos", "shape": "shapes"}
KEPT = 3600.0
"""Seconds that a written file stays."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the app must know of a model to lay out its tabs, without the model itself."""

    modalities: dict[str, str]
    """See `mm.pipelines.abilities.Abilities`, as of the next four."""
    makes: frozenset[str]
    reads: frozenset[str]
    takes: frozenset[str]
    follows: frozenset[tuple[str, str]]
    sampling: dict[str, Sampling]
    """What the checkpoint recommends, by modality."""
    steps: dict[str, int] = field(default_factory=dict)
    """Refinement steps of the order of each modality; 0: it has none."""
    frames: int = 0
    """Frames of the longest clip of the training; 0: the model decides by itself."""
    goes_on: bool = False
    """Whether clips may be longer than those of the training."""
    voices: tuple[str, ...] = ()


def facts(
    able: Abilities,
    parts: Mapping[str, tuple[ModalityTokenizer, Order]],
    sampling: Mapping[str, Sampling],
    voices: Sequence[str] = (),
) -> Facts:
    """What a model can do, and with what settings: `parts` are its modalities beside text."""
    import math

    from mm.pipelines.media import most_frames

    frames, goes_on = 0, False
    if "video" in able.modalities:
        tokenizer, order = parts[able.modalities["video"]]
        if math.isfinite(most := most_frames(tokenizer.spec)):
            frames, goes_on = int(most), bool(getattr(order, "window", 0))
    return Facts(
        modalities={medium: name for medium, name in able.modalities.items()},
        makes=able.makes,
        reads=able.reads,
        takes=able.takes,
        follows=frozenset(able.follows),
        sampling=dict(sampling),
        steps={name: parts[name][1].default_steps for name in able.modalities.values()},
        frames=frames,
        goes_on=goes_on,
        voices=tuple(voices),
    )


def _known(pipeline: Pipeline) -> Facts:
    from mm.pipelines.abilities import abilities_of

    model = pipeline.model
    parts = {modality.name: (modality.tokenizer, modality.order) for modality in model.modalities[1:]}
    return facts(abilities_of(pipeline), parts, pipeline.recommended, model.voices)


def _described(name: str) -> Facts:
    """Of a checkpoint that isn't loaded: its description and its tokenizers say all of it."""
    from mm import hub
    from mm.description import construct
    from mm.pipelines.abilities import abilities

    folder = hub.resolve(name)
    config = hub.read_config(folder)
    tokenizers = hub.load_tokenizers(folder, config)
    text, *others = config["modalities"]
    parts = {
        entry["name"]: (tokenizers[entry["name"]], construct("orders", entry["order"], "an order")) for entry in others
    }
    directions = hub.check_directions(
        config.get("directions"), [entry["name"] for entry in config["modalities"]], "the checkpoint"
    )
    able = abilities(
        text["name"],
        [(name, tokenizer) for name, (tokenizer, _) in parts.items()],
        directions,
        bool(config.get("by_word")),
    )
    return facts(able, parts, hub.load_sampling(config), tuple(config.get("voices") or ()))


class Shelf:
    """The models that the app has.

    Args:
        given: loaded models by their names, which serve every tab they can; None: the shipped ones, loaded on first
            use.
    """

    def __init__(self, given: Mapping[str, Pipeline] | None = None) -> None:
        self.loaded: dict[str, Pipeline] = dict(given or {})
        if given is None:
            from mm.hub import answering

            self.facts = {name: _described(name) for name in answering()}
        else:
            self.facts = {name: _known(pipeline) for name, pipeline in given.items()}
        self.lock = threading.Lock()
        self._written: dict[int, str] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="mm-app-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    @property
    def names(self) -> list[str]:
        return list(self.facts)

    def makers(self, medium: str) -> list[str]:
        """Models that make a medium of a text, in the order in which they are kept."""
        return [name for name, known in self.facts.items() if medium in known.makes]

    def readers(self, medium: str) -> list[str]:
        """Models that read a medium, in the order in which they are kept."""
        return [name for name, known in self.facts.items() if medium in known.reads]

    def loads(self, name: str) -> bool:
        """Whether a model is loaded only when it is next used."""
        return name not in self.loaded

    def open(self, name: str, cls: type[P]) -> P:
        """A pipeline of a model, which is loaded if nobody has needed it yet."""
        from mm.commands.common import choose_threads

        with self.lock:
            if name not in self.loaded:
                self.loaded[name] = cls.from_pretrained(name)
            kept = self.loaded[name]
        choose_threads(kept.model)
        return cls(kept.model, kept.recommended)

    def maker(self, name: str, medium: str) -> Any:
        """The pipeline that makes a medium with a model."""
        return self.open(name, _find(MAKERS[medium]))

    def reader(self, name: str, medium: str) -> Any:
        """The pipeline that says what is in a medium with a model."""
        return self.open(name, _find(READERS[medium]))

    def written(self, part: Any, write: Callable[[], str]) -> str:
        """The file of something that is shown again and again: written when it is first asked for, or once it was deleted."""
        path = self._written.get(id(part))
        if path is None or not Path(path).is_file():
            if path is None:
                weakref.finalize(part, self._written.pop, id(part), None)
            path = self._written[id(part)] = write()
        return path

    def place(self, ending: str) -> Path:
        """Where a new file may be written: in a folder of the app, under a random name. Old files there are deleted."""
        for file in self.folder.iterdir():
            if time.time() - file.stat().st_mtime > KEPT:
                file.unlink(missing_ok=True)
        return self.folder / f"{secrets.token_hex(8)}{ending}"


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
