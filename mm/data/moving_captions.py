"""What a moving clip is called: one plain sentence, or one of several that say the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mm.data.moving_paths import DIRECTIONS, Course
from mm.data.moving_things import Thing

PLAIN_SHARE = 0.5
"""Of captions that may vary, so many are the plain one."""
WAYS = {name: name.replace("-", " and to the ") for name in DIRECTIONS}
"""Direction → words: "up and to the right"."""
ALONG = (
    "{a} moves {way}",
    "{a} moving {way}",
    "{the} goes {way}",
    "{the} slides {way}",
    "{bare} moving {way}",
)
BOUNCING = ("{a} bounces", "{a} bouncing off the walls", "{the} bounces from wall to wall", "{bare} bouncing")
SPINNING = ("{a} rotates {way}", "{a} rotating {way}", "{the} turns {way}", "{bare} spinning {way}")
GROWING = {
    "grows": ("{a} grows", "{a} growing", "{the} gets bigger", "{bare} becoming larger"),
    "shrinks": ("{a} shrinks", "{a} shrinking", "{the} gets smaller", "{bare} becoming smaller"),
}
CROSSING = (
    "{a} moves {way} and {b} moves {back}",
    "{a} moving {way} and {b} moving {back}",
    "{a} moves {way} and passes {b} moving {back}",
    "{the} goes {way} while {b} goes {back}",
)
THEN = (", then ", " and then ", ", and then ")


def caption(
    things: Sequence[Thing], courses: Sequence[Course], ground: str, rng: np.random.Generator | None = None
) -> str:
    """The plain caption, or with `rng` one of several. The first of each list above is the plain one."""
    varied = rng is not None and float(rng.uniform()) >= PLAIN_SHARE
    steps = courses[0].steps
    if len(things) > 1:
        choices: Sequence[str] = CROSSING
    elif steps[0] in DIRECTIONS:
        choices = ALONG
    elif steps[0] == "bounces":
        choices = BOUNCING
    else:
        choices = GROWING.get(steps[0], SPINNING)
    form, joint = choices[0], THEN[0]
    if varied and rng is not None:
        form, joint = (options[int(rng.integers(len(options)))] for options in (choices, THEN))
    words = {
        "a": things[0].name("a"),
        "the": things[0].name("the"),
        "bare": things[0].name(""),
        "way": joint.join(WAYS.get(step, step) for step in steps),
    }
    if len(things) > 1:
        words |= {"b": things[1].name("a"), "back": WAYS[courses[1].steps[0]]}
    place = "" if ground == "black" else f" on {ground}"
    return form.format(**words) + place
