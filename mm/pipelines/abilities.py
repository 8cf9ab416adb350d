"""What a model can be asked for: which media it makes, says in words, and takes. Server, app and commands ask here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mm.directions import Directions
from mm.interfaces import ModalityTokenizer
from mm.pipelines.base import Pipeline
from mm.pipelines.media import Medium, medium_of


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """By what training showed the model, or, where that isn't known, by its modalities."""

    modalities: dict[Medium, str]
    """The modality of each medium: where there are several, the first that is made."""
    makes: frozenset[Medium]
    reads: frozenset[Medium]
    """Media that it says in words what they are."""
    takes: frozenset[Medium]
    """Media that something may follow on, be it text or not."""
    writes: bool
    """Whether it writes texts at all."""


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
        directions: what training showed; None where that isn't known.
        by_word: whether sounds were learned word by word. Who learned that, and of whom nothing else is known, learned to speak,
            not to listen.
    """
    media: dict[str, Medium] = {}
    makers: set[str] = set()
    for name, tokenizer in tokenizers:
        if medium := medium_of(tokenizer.spec):
            media[name] = medium
            # sounds that stand for no place in time are those that are only read, such as a recogniser's
            if tokenizer.decodes and (tokenizer.spec.spatial or medium != "sound"):
                makers.add(name)
    if not directions:
        read = taken = {name for name, medium in media.items() if not (medium == "sound" and by_word)}
        # a model of speech alone, word by word, learned to speak only
        writes = not (by_word and media and set(media.values()) == {"sound"})
    else:
        makers &= {made for _, made in directions}
        read = {given for given, made in directions if made == text}
        taken = {given for given, made in directions if made != given}
        writes = any(made == text for _, made in directions)
    return Abilities(
        modalities=_first(media, makers),
        makes=frozenset(media[name] for name in makers),
        reads=frozenset(medium for name, medium in media.items() if name in read),
        takes=frozenset(medium for name, medium in media.items() if name in taken),
        writes=writes,
    )


def abilities_of(pipeline: Pipeline) -> Abilities:
    """Of a model."""
    model = pipeline.model
    tokenizers = ((one.name, one.tokenizer) for one in model.modalities if one.name != pipeline.text)
    return abilities(pipeline.text, tokenizers, model.directions, model.by_word)


def _first(media: dict[str, Medium], makers: set[str]) -> dict[Medium, str]:
    found: dict[Medium, str] = {}
    for name in [*(name for name in media if name in makers), *media]:
        found.setdefault(media[name], name)
    return {medium: found[medium] for medium in dict.fromkeys(media.values())}
