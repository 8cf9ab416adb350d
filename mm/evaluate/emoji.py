"""Emoji: is the picture that was asked for the nearest of all real ones; are real ones captioned right.

For each of `samples` captions (with a style) that the model was trained on, one picture is generated and the nearest of
*all* real pictures, held-out ones included, is found: by pixels (Euclidean, 8-bit RGB at the tokenizer's size) and by
features of a network trained on the real pictures (`mm.evaluate.emoji_judge`). A hit is a nearest picture that carries
the asked caption, in either style. Real pictures equal in every pixel count as one picture with several captions. The
control is the real picture of the same caption and style after the tokenizer: no model of its tokens can expect more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mm.evaluate.emoji_judge import DISTANCES, EmojiJudge, emoji_judge
from mm.evaluate.gallery import Gallery
from mm.evaluate.networks import Say
from mm.evaluate.protocol import Protocol
from mm.evaluate.results import Figure, share
from mm.evaluate.styles import missing_style_figures, other_style_figures
from mm.evaluate.subject import Outcome, Subject, Written

FAMILY = "emoji"


def evaluate_emoji(
    subject: Subject,
    gallery: Gallery,
    protocol: Protocol,
    folder: Path | None = None,
    references: Gallery | None = None,
    say: Say = lambda line: None,
) -> Outcome:
    """All figures of emoji. `references`: real pictures in styles that the model has not seen (see `styles`).

    Raises `ValueError` for a source without captions and styles.
    """
    if not all(gallery.captions) or not all(gallery.styles):
        raise ValueError("the source of emoji has pictures without caption or style; give fields 'caption' and 'style'")
    judge = emoji_judge(gallery, protocol, folder, say)
    seen = gallery.where(held=False) if protocol.trained_on == "train" else list(range(len(gallery)))
    plain = [row for row in seen if protocol.skin_tone not in gallery.captions[row]]
    figures, drawn = [], []
    shown = None
    asked = {
        "training captions": choose(gallery, seen, protocol, 1),
        "no skin tone": choose(gallery, plain, protocol, 2),
    }
    for number, (name, rows) in enumerate(asked.items()):
        if not rows:
            continue
        prompts = [prompt(gallery, row, protocol) for row in rows]
        say(f"emoji: drawing {len(prompts)}, {name}")
        made = subject.draw(prompts, protocol.seed + 1 + number)
        figures += nearest_figures(judge, name, made.pixels, rows, control=False)
        after = subject.reconstruct(gallery.pixels[rows])
        figures += nearest_figures(judge, f"{name}, real after the tokenizer", after, rows, control=True)
        drawn.append(made)
        if name == "no skin tone":
            figures += other_style_figures(judge, "seen styles", made.pixels, rows)
        shown = shown or (prompts, made)
    missing, more = missing_style_figures(subject, judge, seen, protocol, references, say)
    captions, written = caption_figures(subject, gallery, seen, protocol, say)
    assert shown is not None  # a source has at least one picture, and seen rows are never empty
    return Outcome(figures + missing + captions, *shown, drawn + more, written)


def choose(gallery: Gallery, rows: Sequence[int], protocol: Protocol, salt: int) -> list[int]:
    """`samples` of the rows at random, no caption twice."""
    rng = torch.Generator().manual_seed(protocol.seed * 1000 + salt)
    chosen: dict[str, int] = {}
    for place in torch.randperm(len(rows), generator=rng).tolist():
        chosen.setdefault(gallery.captions[rows[place]], rows[place])
    return list(chosen.values())[: protocol.samples]


def prompt(gallery: Gallery, row: int, protocol: Protocol, style: str | None = None) -> str:
    """How the picture of a row, or its concept in another style, is asked for."""
    return protocol.emoji_prompt.format(caption=gallery.captions[row], style=style or gallery.styles[row])


def nearest_figures(
    judge: EmojiJudge, name: str, pixels: Tensor, rows: Sequence[int], *, control: bool
) -> list[Figure]:
    """What the nearest real picture is, for pictures that should show those of `rows`."""
    gallery, queries = judge.gallery, judge.queries(pixels)
    figures = []
    for distance in DISTANCES:
        matches = judge.searches[distance].match(queries[distance])
        pairs = list(zip(matches, rows, strict=True))
        hits = {
            "asked caption": [gallery.captions[row] in match.captions for match, row in pairs],
            "asked style": [gallery.styles[row] in match.styles for match, row in pairs],
            "caption and style": [(gallery.captions[row], gallery.styles[row]) in match.named for match, row in pairs],
            "asked subcategory": [gallery.kinds[row] in match.kinds for match, row in pairs],
        }
        wanted = ("asked caption", "caption and style") if control else tuple(hits)
        figures += [share(FAMILY, f"{name}: {what}, {distance}", hits[what], control=control) for what in wanted]
    return figures


def caption_figures(
    subject: Subject, gallery: Gallery, seen: Sequence[int], protocol: Protocol, say: Say
) -> tuple[list[Figure], list[Written]]:
    """Captions that the model writes for real pictures it was trained on, and for held-out ones (concepts that it has
    never seen; exact ones are then luck or composition): caption and style to the letter, caption alone, style alone.
    """
    if not subject.learned_captions:
        say("emoji: no captions, training showed the model none")
        return [], []
    figures, written = [], []
    groups = {"training pictures": choose(gallery, seen, protocol, 3)}
    held = [row for row in range(len(gallery)) if row not in set(seen)]
    if held:
        groups["held-out pictures"] = held[:: -(-len(held) // protocol.samples)]
    styles = sorted(set(gallery.styles))
    for name, rows in groups.items():
        say(f"emoji: captioning {len(rows)} {name}")
        texts = subject.write(gallery.pixels[rows], protocol.seed, protocol.caption_tokens)
        written.append(texts)
        pairs = [(text.strip(), row) for text, row in zip(texts.texts, rows, strict=True)]
        exact = [text == prompt(gallery, row, protocol) for text, row in pairs]
        caption = [text in {prompt(gallery, row, protocol, style) for style in styles} for text, row in pairs]
        style = [named(text, styles) == {gallery.styles[row]} for text, row in pairs]
        figures.append(share(FAMILY, f"captions of {name}, exact", exact))
        figures.append(share(FAMILY, f"captions of {name}, right but for the style", caption))
        figures.append(share(FAMILY, f"captions of {name}, right style", style))
    return figures, written


def named(text: str, styles: Sequence[str]) -> set[str]:
    """The styles that a text names as whole words."""
    words = set(text.lower().replace(",", " ").split())
    return {style for style in styles if style.lower() in words}
