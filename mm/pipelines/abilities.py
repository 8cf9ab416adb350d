"""What a model can be asked for: which media it makes, says in words, and takes. Server, app and commands ask here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mm.directions import Directions
from mm.interfaces import ModalityTokenizer
from mm.pipelines.base import Pipeline
from mm.pipelines.media import Medium, medium_of

Kind = Medium | Literal["text"]
WORDS: dict[Kind, str] = {"text": "text", "picture": "pictures", "sound": "sounds", "video": "clips", "shape": "shapes"}
"""How messages call them."""


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """By what training showed the model, or, where that isn't known, by its modalities. Of several modalities of a medium
    the first counts, which is the one that pipelines use; of sounds any may be the one that is heard (`Pipeline.hearing`)."""

    modalities: dict[Medium, str]
    """The modality of each medium."""
    makes: frozenset[Medium]
    writes: bool
    """Whether it writes texts at all."""
    follows: frozenset[tuple[Kind, Kind]]
    """(given, made): what it makes of what, by medium or text; of sounds also what sounds of one modality it makes of those of
    another. Whether it goes on with more of the same isn't known."""

    @property
    def reads(self) -> frozenset[Medium]:
        """Media that it says in words what they are."""
        return frozenset(medium for medium in self.modalities if (medium, "text") in self.follows)

    @property
    def takes(self) -> frozenset[Medium]:
        """Media that something may follow on, be it text or not."""
        given = {given for given, made in self.follows if given != made}
        return frozenset(medium for medium in self.modalities if medium in given)


def abilities(
    text: str,
    tokenizers: Iterable[tuple[str, ModalityTokenizer]],
    directions: Directions | None = None,
    by_word: bool = False,
) -> Abilities:
    """Of a model's description.

    Args:
        text: name of the modality of text.
        tokenizers: (name, tokenizer) of each other modality, in the model's order.
        directions: what training showed; None, or nothing, where that isn't known.
        by_word: whether sounds were learned word by word. Who learned that, and of whom nothing else is known, learned to speak,
            not to listen.
    """
    names: dict[Medium, str] = {}
    given: dict[str, Kind] = {text: "text"}
    able: set[Medium] = set()
    for name, tokenizer in tokenizers:
        medium = medium_of(tokenizer.spec)
        if medium == "sound" or (medium and medium not in names):
            given[name] = medium  # `Pipeline.hearing` finds the one of sound
        if medium and medium not in names:
            names[medium] = name
            # sounds that stand for no place in time are those that are only read, such as a recogniser's
            if tokenizer.decodes and (tokenizer.spec.spatial or medium != "sound"):
                able.add(medium)
    if directions:
        made = {text: given[text], **{name: medium for medium, name in names.items()}}
        shown = [(one, other) for one, other in directions if one in given and other in made]
        results = {made[other] for _, other in shown}
        learned = {(given[one], made[other]) for one, other in shown if one != other}
        makes, writes = able & results, "text" in results
    else:
        # a model of speech alone, word by word, learned to speak only
        makes, writes = able, not (by_word and set(names) == {"sound"})
        starts: list[Kind] = ["text", *(medium for medium in names if not (medium == "sound" and by_word))]
        ends: list[Kind] = [*makes, "text"] if writes else [*makes]
        learned = {(given, made) for given in starts for made in ends if given != made}
    return Abilities(modalities=names, makes=frozenset(makes), writes=writes, follows=frozenset(learned))


def abilities_of(pipeline: Pipeline) -> Abilities:
    """Of a model."""
    model = pipeline.model
    tokenizers = ((one.name, one.tokenizer) for one in model.modalities if one.name != pipeline.text)
    return abilities(pipeline.text, tokenizers, model.directions, model.by_word)


def check_learned(pipeline: Pipeline, given: Kind, made: Kind, name: str = "this model") -> None:
    """Raises `ValueError` for a model of both whose training showed it none of `made` behind `given`: it would answer with
    anything. `name` is how the message calls it. Whoever needs a modality that the model lacks says so. A model whose
    `directions` are None is refused nothing, nor is more of the same (which directions don't tell), unless it hears with one
    modality and speaks with another."""
    able = abilities_of(pipeline)
    if (given, made) in able.follows or not {given, made} <= {"text", *able.modalities}:
        return
    alike = [one for one in pipeline.model.modalities[1:] if medium_of(one.tokenizer.spec) == given]
    if given == made and not (pipeline.model.directions and len(alike) > 1):
        return
    sources = [WORDS[kind] for kind in WORDS if (kind, made) in able.follows]
    results = [WORDS[kind] for kind in WORDS if (given, kind) in able.follows]
    knows = [f"{WORDS[made]} of {_list(sources)}"] * bool(sources) + [f"{_list(results)} of {WORDS[given]}"] * bool(
        results
    )
    raise ValueError(
        f"training showed {name} no {WORDS[made]} of {WORDS[given]}"
        + (f"; it makes {', and '.join(knows)}" if knows else "")
        + "; use another model"
    )


def _list(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
