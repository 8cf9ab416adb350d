"""The models of a server: which there are, what each can do, and which one answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

from mm.batching import Batcher
from mm.pipelines.abilities import Abilities, abilities_of
from mm.pipelines.base import Pipeline
from mm.serve.desk import Ticket
from mm.serve.errors import Refusal

P = TypeVar("P", bound=Pipeline)
Task = Literal["chat", "image", "speech", "transcription", "video", "shape"]
TASKS: dict[Task, str] = {
    "chat": "writes text",
    "image": "makes pictures",
    "speech": "speaks",
    "transcription": "writes speech down",
    "video": "makes videos",
    "shape": "makes shapes",
}


@dataclass(frozen=True)
class Served:
    """A model that answers, and the batch of its callers."""

    name: str
    pipeline: Pipeline
    batcher: Batcher
    created: int = field(default_factory=lambda: int(time.time()))

    def open(self, kind: type[P], ticket: Ticket) -> P:
        """A pipeline for one request, whose rows join the batch."""
        made = kind(self.pipeline.model, self.pipeline.recommended)
        made.engine = self.batcher.caller(ticket.gone)
        return made

    def can(self, task: Task) -> bool:
        """By what its training showed it, or by its modalities where that isn't known."""
        able = self.abilities
        return {
            "chat": able.writes,
            "image": "picture" in able.makes,
            "speech": "sound" in able.makes,
            "transcription": "sound" in able.reads,
            "video": "video" in able.makes,
            "shape": "shape" in able.makes,
        }[task]

    @cached_property
    def abilities(self) -> Abilities:
        return abilities_of(self.pipeline)


class Shelf:
    """Args: models by name, in the order in which they are asked."""

    def __init__(self, pipelines: Mapping[str, Pipeline], rows: int = 16) -> None:
        if not pipelines:
            raise ValueError("a server needs at least one model")
        self.models = {name: Served(name, p, Batcher(p.model, rows)) for name, p in pipelines.items()}

    def named(self, name: str) -> Served:
        """Raises `Refusal` where there is none."""
        if name not in self.models:
            there = ", ".join(self.models)
            raise Refusal(
                404, f"there is no model {name[:60]!r}; there are {there}", param="model", code="model_not_found"
            )
        return self.models[name]

    def choose(self, task: Task, name: str | None = None) -> Served:
        """The model of this name, or else the first that does this. Raises `Refusal` where there is none."""
        able = self.able(task)
        if name is not None:
            named = self.named(name)
            if named in able:
                return named
            instead = f"; use {able[0].name}" if able else ""
            raise Refusal(
                404, f"the model {name!r} isn't one that {TASKS[task]}{instead}", param="model", code="model_not_able"
            )
        if not able:
            raise Refusal(404, f"this server has no model that {TASKS[task]}", param="model", code="model_not_able")
        return able[0]

    def able(self, task: Task) -> Sequence[Served]:
        return [one for one in self.models.values() if one.can(task)]

    def close(self) -> None:
        for served in self.models.values():
            served.batcher.close()
