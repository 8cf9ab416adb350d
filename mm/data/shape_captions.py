"""What a generated shape is called: one plain caption, or one of several that say the same; and questions with answers."""

from __future__ import annotations

import numpy as np

from mm.data.shape_plans import Thing

PLAIN_SHARE = 0.5
"""Of captions that may vary, so many are the plain one."""
NUMBERS = ("no", "one", "two", "three", "four", "five")
NAMES = {"sphere": "ball", "torus": "ring", "cylinder": "cylinder", "box": "box", "cone": "cone", "capsule": "capsule"}
FORMS: dict[str, tuple[str, ...]] = {
    "table": (
        "a {height} table with {legs} and a {top} top",
        "a {height} {top} table with {legs}",
        "a {top} table, {height}, on {legs}",
        "{height} table, {top} top, {legs}",
        "a table with a {top} top and {legs}, {height}",
    ),
    "stool": (
        "a {height} stool with {legs} and a {top} seat",
        "a {height} {top} stool on {legs}",
        "a {top} stool, {height}, with {legs}",
        "{height} stool, {top} seat, {legs}",
    ),
    "chair": (
        "a {height} chair {arms} armrests",
        "a chair {arms} armrests, {height}",
        "{height} chair {arms} armrests",
        "a {height} chair with a back, {arms} armrests",
    ),
    "shelf": (
        "a {height} {width} shelf with {boards}",
        "a {width} shelf with {boards}, {height}",
        "{height} {width} shelf, {boards}",
        "a {height} shelf, {width}, of {boards}",
    ),
    "mug": (
        "a {height} mug with {handles}",
        "a mug with {handles}, {height}",
        "{height} mug, {handles}",
        "a {height} cup with {handles}",
    ),
    "sphere": ("a {size} ball", "a {size} sphere", "{size} ball", "a ball, {size}"),
    "box": ("a {form} box", "{form} box", "a box, {form}", "a {form} block"),
    "cylinder": ("a {form} cylinder", "{form} cylinder", "a cylinder, {form}"),
    "cone": ("a {height} cone", "{height} cone", "a cone, {height}"),
    "torus": (
        "a {thickness} {pose} ring",
        "a {pose} ring, {thickness}",
        "{thickness} ring, {pose}",
        "a {thickness} {pose} torus",
    ),
    "capsule": ("a {pose} capsule", "{pose} capsule", "a capsule, {pose}"),
    "drilled": (
        "a {body} with a {hole} hole from {way}",
        "a {body} that has a {hole} hole from {way}",
        "{body}, {hole} hole from {way}",
        "a {body} with a {hole} hole through it from {way}",
    ),
    "stack": (
        "a {upper} on top of a {lower}",
        "a {upper} on a {lower}",
        "a {lower} with a {upper} on top",
        "{upper} on {lower}",
    ),
}
"""Kind → captions; the first is the plain one."""
WHAT = {"drilled": "a {body} with a hole", "stack": "a {upper} on a {lower}", "sphere": "a ball", "torus": "a ring"}
"""What it is, where that isn't its kind."""
QUESTIONS = {
    "height": ("is it tall or short?", "{height}"),
    "legs": ("how many legs?", "{legs}"),
    "top": ("what shape is the top?", "{top}"),
    "arms": ("does it have armrests?", "{arms}"),
    "boards": ("how many boards?", "{boards}"),
    "width": ("is it wide or narrow?", "{width}"),
    "handles": ("how many handles?", "{handles}"),
    "size": ("is it big or small?", "{size}"),
    "form": ("what form does it have?", "{form}"),
    "pose": ("does it lie or stand?", "{pose}"),
    "thickness": ("is it thick or thin?", "{thickness}"),
    "hole": ("what shape is the hole?", "{hole}"),
    "body": ("what has the hole?", "a {body}"),
    "way": ("where does the hole go in?", "{way}"),
    "upper": ("what is on top?", "a {upper}"),
    "lower": ("what is below?", "a {lower}"),
}
"""Fact → question and answer."""


def caption(thing: Thing, rng: np.random.Generator | None = None) -> str:
    """The plain caption, or with `rng` one of several."""
    forms = FORMS[thing.kind]
    varied = rng is not None and float(rng.uniform()) >= PLAIN_SHARE
    form = forms[int(rng.integers(len(forms)))] if varied and rng is not None else forms[0]
    return form.format(**{name: _said(name, value) for name, value in thing.facts.items()})


def captions(thing: Thing) -> list[str]:
    """All that say what it is, the plain one first."""
    words = {name: _said(name, value) for name, value in thing.facts.items()}
    return [form.format(**words) for form in FORMS[thing.kind]]


def questions(thing: Thing) -> list[tuple[str, str]]:
    """Each with its answer; the first asks what it is."""
    words = {name: _word(value) for name, value in thing.facts.items()}
    what = WHAT.get(thing.kind, f"a {thing.kind}").format(**words)
    asked = [QUESTIONS[name] for name in thing.facts]
    return [("what is this?", what), *((question, answer.format(**words)) for question, answer in asked)]


def _word(value: str | int) -> str:
    """A number, or the name by which a solid is known."""
    return NUMBERS[value] if isinstance(value, int) else NAMES.get(value, value)


def _said(name: str, value: str | int) -> str:
    """As it stands in a caption: "three legs", "one leg", "without" (armrests), "the front"."""
    if isinstance(value, int):
        return f"{NUMBERS[value]} {name.removesuffix('s') if value == 1 else name}"
    if name == "arms":
        return "with" if value == "yes" else "without"
    return f"the {value}" if name == "way" else _word(value)
