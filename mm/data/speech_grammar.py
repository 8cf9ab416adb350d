"""What the made speech corpus says: strings of digits, and commands of a small grammar; and what of it is held out.

The same tables make the sentences and the JSGF grammars that a recogniser is given, so the two cannot drift apart.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator
from typing import Literal

from mm.data.sources import DIGIT_NAMES

Kind = Literal["digits", "commands"]
KINDS: tuple[Kind, ...] = ("digits", "commands")
LENGTHS = {1: 0.02, 2: 0.08, 3: 0.25, 4: 0.30, 5: 0.20, 6: 0.15}
"""Digits in a string, and how often. Short ones are rare because there are few of them."""
HELD_OUT: dict[Kind, float] = {"digits": 0.10, "commands": 0.05}
"""Share of texts that no voice says in the training shard."""
FRUITLESS = 300_000
"""Draws in a row that were there before, after which hardly anything can be left."""
SHORTEST_HELD_OUT = 3
"""Digits. Of the shorter strings all are trained on, so that each digit is heard at every place."""
SLOTS: dict[str, tuple[str, ...]] = {
    "room": tuple("kitchen bedroom bathroom hallway garage office garden basement attic nursery".split())
    + ("living room", "dining room"),
    "device": tuple("light lamp fan heater radio television computer printer speaker alarm oven".split())
    + ("washing machine", "coffee machine"),
    "cover": tuple("window door curtains blinds gate roof".split()),
    "state": ("on", "off"),
    "level": tuple("up down higher lower brighter louder softer warmer colder".split()),
    "minutes": tuple("ten fifteen twenty thirty forty fifty sixty ninety".split()),
    "hour": tuple("seven eight nine ten eleven noon midnight".split()),
    "day": tuple("monday tuesday wednesday thursday friday saturday sunday tomorrow tonight today".split()),
    "person": tuple("mother father anna peter maria daniel laura grandmother doctor everybody".split()),
    "music": tuple("jazz rock classical piano guitar folk dance holiday quiet happy".split()),
    "place": tuple("london paris berlin boston chicago madrid sydney home school work".split()),
    "thing": tuple("milk bread butter coffee sugar apples oranges cheese rice water soap paper flowers".split()),
    "event": tuple("meeting dinner lunch breakfast party lesson concert appointment birthday".split()),
    "colour": tuple("red green blue yellow white orange purple".split()),
}
"""Phrases by slot. Every word is in the recogniser's dictionary."""
TEMPLATES = (
    "turn the {room} {device} {state}",
    "turn {state} the {device} in the {room}",
    "switch the {device} {state}",
    "make the {room} light {colour}",
    "make the {device} {level}",
    "open the {room} {cover}",
    "close the {cover} in the {room}",
    "set a timer for {minutes} minutes",
    "remind me in {minutes} minutes",
    "wake me at {hour} on {day}",
    "play some {music} music in the {room}",
    "stop the music and turn the {device} {state}",
    "call {person} at {hour}",
    "send a message to {person}",
    "what is the weather in {place} {day}",
    "show me the way to {place}",
    "how long is the drive to {place}",
    "add {thing} and {thing} to my shopping list",
    "remove {thing} from the list",
    "plan a {event} with {person} on {day}",
    "move the {event} to {day} at {hour}",
    "cancel the {event} on {day}",
    "is the {room} {cover} open",
    "read the news please",
    "lock every {cover} of the house",
)
"""Sentences; a slot in braces stands for each of its phrases, chosen by itself."""


def plan(seed: int, voices: tuple[str, ...], commands: float = 0.3) -> Iterator[tuple[Kind, str, str]]:
    """(kind, text, voice) without end, none twice, the same for a seed. Of the two kinds, `commands` is the share of one.

    Raises `ValueError` where next to nothing is left that a voice hasn't said.
    """
    rng = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    missed = 0
    while missed < FRUITLESS:
        kind: Kind = "commands" if rng.random() < commands else "digits"
        text = command_sentence(rng) if kind == "commands" else digit_string(rng)
        voice = rng.choice(voices)
        missed += 1
        if (text, voice) not in seen:
            missed = 0
            seen.add((text, voice))
            yield kind, text, voice
    raise ValueError(
        f"{len(voices)} voices have said nearly all that they can say ({len(seen):,} clips); ask for fewer hours, more "
        "voices, or another share of commands"
    )


def texts(commands: float) -> int:
    """How many texts there are of the kinds that this share of commands leaves, equal ones from two templates counted twice."""
    digits = sum(len(DIGIT_NAMES) ** length for length in LENGTHS)
    sentences = sum(math.prod(len(SLOTS[slot]) for slot in re.findall(r"\{(\w+)\}", one)) for one in TEMPLATES)
    return (digits if commands < 1 else 0) + (sentences if commands > 0 else 0)


def digit_string(rng: random.Random) -> str:
    """Such as "three five one"; `LENGTHS` says how long."""
    (length,) = rng.choices(list(LENGTHS), list(LENGTHS.values()))
    return " ".join(rng.choice(DIGIT_NAMES) for _ in range(length))


def command_sentence(rng: random.Random) -> str:
    """A template with a phrase in each slot."""
    return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(SLOTS[slot[1]]), rng.choice(TEMPLATES))


def held_out(kind: Kind, text: str) -> bool:
    """Whether a text belongs to the held-out split: its hash decides, so no seed, voice or order can move it."""
    if kind == "digits" and len(text.split()) < SHORTEST_HELD_OUT:
        return False
    value = int.from_bytes(hashlib.sha256(f"{kind}: {text}".encode()).digest()[:8], "big")
    return value < HELD_OUT[kind] * 2**64


def words(kind: Kind) -> list[str]:
    """Every word that a kind can say, sorted."""
    if kind == "digits":
        return sorted(DIGIT_NAMES)
    fixed = re.sub(r"\{\w+\}", " ", " ".join(TEMPLATES)).split()
    return sorted({*fixed, *(word for phrases in SLOTS.values() for phrase in phrases for word in phrase.split())})


def jsgf(kind: Kind) -> str:
    """Grammar in the JSpeech Grammar Format that accepts exactly what `kind` can say (digits: any number of them)."""
    header = f"#JSGF V1.0;\ngrammar {kind};\n"
    if kind == "digits":
        return f"{header}public <digits> = ({' | '.join(DIGIT_NAMES)})+;\n"
    slots = "".join(f"<{name}> = {' | '.join(phrases)};\n" for name, phrases in SLOTS.items())
    sentences = " | ".join(re.sub(r"\{(\w+)\}", r"<\1>", template) for template in TEMPLATES)
    return f"{header}{slots}public <commands> = {sentences};\n"
