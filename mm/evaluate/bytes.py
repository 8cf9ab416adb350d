"""Pictures that a model writes as files: how many are whole, with the automaton and without, of the model and of one with the
same shape that has learned nothing; what they show; and what one wrong byte costs.

Everything but the files themselves is measured of any model of pictures, so that one of the same budget with other tokens
stands beside it. Distances are Fréchet's, of the features of the judges that `digits` and `emoji` train on real pictures.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm import pictures
from mm.byte_files import FileTokenizer
from mm.data.sources import DIGIT_NAMES
from mm.evaluate.digits import recogniser, right
from mm.evaluate.emoji import choose, prompt
from mm.evaluate.emoji_judge import emoji_judge
from mm.evaluate.frechet import frechet_distance
from mm.evaluate.gallery import Gallery
from mm.evaluate.networks import Say
from mm.evaluate.protocol import Protocol
from mm.evaluate.results import Figure, mean, share
from mm.evaluate.subject import Outcome, Subject
from mm.interfaces import Encoded
from mm.model import MultimodalModel

FAMILY = "bytes"
STATES = ("strict", "repaired", "partial", "invalid")
"""What a file that a model wrote may be: right to the last bit; whole after repair; in part; not at all."""
RARE = 0.15
"""The subcategories with the fewest pictures that hold at most this share of all are the rare ones."""
WRONG = 8
"""Wrong bytes tried of each picture, one at a time."""


def evaluate_bytes(
    subject: Subject,
    galleries: Mapping[str, Gallery],
    protocol: Protocol,
    folder: Path | None = None,
    say: Say = lambda line: None,
) -> list[Outcome]:
    """Figures of the galleries "digits" and "emoji", as far as they are given.

    Raises `ValueError` where neither is.
    """
    makers = {"digits": digit_group, "emoji": emoji_group}
    groups = [group for kind in makers if kind in galleries for group in makers[kind](galleries[kind], protocol)]
    if not groups:
        raise ValueError("files are asked for by captions of digits or emoji; give the source 'digits' or 'emoji'")
    first = galleries[groups[0].kind]
    asked = mixed([group.prompts for group in groups], protocol.samples)
    files = rate_figures(subject, asked, protocol, say)
    files += damage_figures(subject, first.subset(_or_all(first, first.where(held=True))), protocol, say)
    features = {kind: _features(kind, galleries[kind], protocol, folder, say) for kind in {own.kind for own in groups}}
    outcomes = []
    for group in groups:
        say(f"bytes: drawing {len(group.prompts)}, {group.name}")
        drawn = subject.draw(group.prompts, protocol.seed)
        figures = distance_figures(group, drawn.pixels, features[group.kind])
        if group.digits:
            judge = recogniser(galleries["digits"], protocol, folder)
            figures.insert(
                0, share(FAMILY, "digits recognised", right(judge, drawn.pixels, torch.tensor(group.digits)))
            )
        name = f"{FAMILY}-{group.name.replace(' ', '-')}"
        outcomes.append(Outcome(figures, group.prompts, drawn, [drawn], [], name))
    return [replace(outcomes[0], figures=files + outcomes[0].figures), *outcomes[1:]]


# --- what is asked for ----------------------------------------------------------------------------------------------


KINDS = frozenset(("digits", "emoji"))
"""Galleries that pictures are asked for by."""


@dataclass(frozen=True)
class Group:
    """Pictures that are asked for, and the real ones they are held against."""

    kind: str
    """Of the gallery."""
    name: str
    prompts: list[str]
    held: Tensor
    """Real pictures that are held out."""
    seen: Tensor
    """Other real pictures."""
    digits: list[int]


def digit_group(gallery: Gallery, protocol: Protocol) -> list[Group]:
    """The ten digits in turn."""
    asked = [number % len(DIGIT_NAMES) for number in range(protocol.samples)]
    prompts = [protocol.digit_prompt.format(name=DIGIT_NAMES[digit]) for digit in asked]
    held, seen = (gallery.pixels[_or_all(gallery, gallery.where(held=out))] for out in (True, False))
    return [Group("digits", "digits", prompts, held, seen, asked)]


def emoji_group(gallery: Gallery, protocol: Protocol) -> list[Group]:
    """Captions that the model was trained on: of all kinds, and of the rare ones."""
    rare = rare_kinds(gallery)
    seen = gallery.where(held=False) if protocol.trained_on == "train" else list(range(len(gallery)))
    groups = []
    for number, (name, kinds) in enumerate((("emoji", set(gallery.kinds)), ("rare emoji", rare))):
        rows = [row for row in seen if gallery.kinds[row] in kinds]
        held = [row for row in gallery.where(held=True) if gallery.kinds[row] in kinds]
        if rows:
            chosen = choose(gallery, rows, protocol, 5 + number)
            prompts = [prompt(gallery, row, protocol) for row in chosen]
            others = torch.randperm(len(rows), generator=torch.Generator().manual_seed(protocol.seed))
            real = gallery.pixels[[rows[place] for place in others.tolist()]]
            groups.append(Group("emoji", name, prompts, gallery.pixels[held], real, []))
    return groups


def rare_kinds(gallery: Gallery) -> set[str]:
    """The subcategories with the fewest pictures, as many as hold `RARE` of all pictures; equal ones by name."""
    counts = Counter(gallery.kinds)
    rare: set[str] = set()
    total = 0
    for kind, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        total += count
        if total > RARE * len(gallery):
            break
        rare.add(kind)
    return rare


def mixed(groups: Sequence[Sequence[str]], count: int) -> list[str]:
    """`count` prompts, of the groups in turn."""
    return [groups[n % len(groups)][n // len(groups) % len(groups[n % len(groups)])] for n in range(count)]


def _or_all(gallery: Gallery, rows: list[int]) -> list[int]:
    return rows or list(range(len(gallery)))


# --- what they show -------------------------------------------------------------------------------------------------


def _features(kind: str, gallery: Gallery, protocol: Protocol, folder: Path | None, say: Say) -> Any:
    if kind == "digits":
        return recogniser(gallery, protocol, folder, say).features
    return emoji_judge(gallery, protocol, folder, say).features


def distance_figures(group: Group, made: Tensor, features: Any) -> list[Figure]:
    """To held-out real pictures; and from other real ones to these, as many: what a perfect model would get."""
    count = min(len(made), len(group.held), len(group.seen))
    if count < 2:
        return []
    real = features(group.held[:count])
    note = f"of {real.shape[1]} features, to {count} held-out pictures"
    return [
        Figure(
            family=FAMILY,
            name=f"{name}, Fréchet distance",
            value=frechet_distance(features(shown[:count]), real),
            unit="distance",
            n=count,
            control=control,
            note=note,
        )
        for name, shown, control in ((group.name, made, False), (f"real {group.name}", group.seen, True))
    ]


# --- how many are whole ---------------------------------------------------------------------------------------------


def rate_figures(subject: Subject, prompts: Sequence[str], protocol: Protocol, say: Say) -> list[Figure]:
    """Shares of files that are strict, of the model and of its untrained twin, with the automaton and without; of other tokens
    the share that decodes without repair."""
    if not subject.tokenizer.spec.is_free:
        made = subject.draw(prompts, protocol.seed)
        return [share(FAMILY, "valid", made.valid, note="not files")]
    figures = []
    blank = Subject(untrained(subject.model, protocol.seed), name="untrained", batch=subject.batch)
    blank.sampling = subject.sampling
    for who, tested in (("", subject), ("untrained, ", blank)):
        for how, constrained in (("with the automaton", True), ("without", False)):
            say(f"bytes: writing {len(prompts)} files, {who}{how}")
            made = tested.draw(prompts, protocol.seed, constrained=constrained)
            states = [state(*told) for told in zip(made.valid, made.reasons, strict=True)]
            counts = {name: states.count(name) for name in STATES}
            note = ", ".join(f"{name} {counts[name]}" for name in STATES[1:])
            hits = [own == "strict" for own in states]
            name = f"{who}strict, {how}"
            figures.append(share(FAMILY, name, hits, control=bool(who), note=note, detail=counts))
            if not who:
                each = made.seconds / len(prompts)
                figures.append(
                    Figure(family=FAMILY, name=f"seconds a file, {how}", value=each, unit="s", n=len(prompts))
                )
    return figures


def state(valid: bool, reason: str) -> str:
    """Which of `STATES` a decoded file was in: a reason begins with it."""
    first = re.match(r"\w*", reason)
    return "strict" if valid else first[0] if first and first[0] in STATES else "invalid"


def untrained(model: MultimodalModel, seed: int) -> MultimodalModel:
    """A model of the same shape, its weights as they were before training; tokenizers are shared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modalities = [replace(own, head=copy.deepcopy(own.head)) for own in model.modalities]
        blank = MultimodalModel(model.backbone.config, modalities, model.context)
    blank.null_seen = model.null_seen
    return blank.eval()


# --- what one wrong byte costs --------------------------------------------------------------------------------------


def damage_figures(subject: Subject, gallery: Gallery, protocol: Protocol, say: Say) -> list[Figure]:
    """Mean squared error of real pictures, one byte of each exchanged (behind the header), against what was to be shown: with
    restart markers and without. Nothing for tokenizers that don't write files with such."""
    tokenizer = subject.tokenizer
    if not isinstance(tokenizer, FileTokenizer) or "restart" not in tokenizer.config:
        return []
    shown = [pictures.to_image(pixels) for pixels in gallery.pixels[: protocol.captioned]]
    say(f"bytes: {WRONG} wrong bytes in each of {len(shown)} files")
    figures, medians = [], {}
    for name, restart in (("with restart markers", tokenizer.config["restart"] or 1), ("without", 0)):
        own = type(tokenizer)(**{**tokenizer.config, "restart": restart})
        errors, whole = damaged(own, shown, protocol.seed)
        medians[restart == 0] = median(errors)
        note = f"median {median(errors):.1f}"
        figures.append(mean(FAMILY, f"one byte wrong, {name}: error", errors, "levels²", control=True, note=note))
        figures.append(share(FAMILY, f"one byte wrong, {name}: strict", whole, control=True))
    if medians[False]:
        name, n = "one byte wrong: median error without ÷ with restart markers", len(shown) * WRONG
        value = medians[True] / medians[False]
        figures.append(Figure(family=FAMILY, name=name, value=value, unit="ratio", n=n, control=True))
    return figures


def damaged(tokenizer: FileTokenizer, shown: Sequence[Any], seed: int) -> tuple[list[float], list[bool]]:
    """Error of each damaged file, and whether it decodes as it is."""
    rng = np.random.default_rng(seed)
    files = [tokenizer.file(picture) for picture in shown]
    header = len(os.path.commonprefix(files))
    errors, whole = [], []
    for file in files:
        truth = _values(tokenizer, file)[0]
        for _ in range(WRONG):
            place = int(rng.integers(min(header, len(file) - 1), len(file)))
            wrong = bytearray(file)
            wrong[place] ^= int(rng.integers(1, 256))
            values, valid = _values(tokenizer, bytes(wrong))
            errors.append(float(np.square(values - truth).mean()))
            whole.append(valid)
    return errors, whole


def _values(tokenizer: FileTokenizer, file: bytes) -> tuple[np.ndarray[Any, Any], bool]:
    ids = torch.tensor([*tokenizer.bpe.encode(file), tokenizer.stop])
    decoded = tokenizer.decode(Encoded(grid=(len(ids),), ids=ids))
    return np.asarray(decoded.value, np.float64), decoded.valid
