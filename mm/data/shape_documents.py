"""Documents of shapes and text: a shape from what it is called or from a picture, its caption, and answers to questions about it;
and documents in which what is given is shown coarsely."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from mm.data.documents import Pair, Template, check_probability, happens, null_segment
from mm.interfaces import Encoded
from mm.layout import Segment
from mm.multiscale import first_scales


class TextToShape(Pair):
    """Text, then the shape it asks for. The text is dropped with probability `drop`."""

    def __init__(
        self,
        drop: float = 0.1,
        text: str = "text",
        shape: str = "shape",
        text_field: str = "text",
        shape_field: str = "shape",
    ) -> None:
        super().__init__((text_field, text), (shape_field, shape), drop, False)


class ImageToShape(Pair):
    """A picture, then the shape that it shows. The picture is dropped with probability `drop`."""

    def __init__(
        self,
        drop: float = 0.1,
        image: str = "image",
        shape: str = "shape",
        image_field: str = "image",
        shape_field: str = "shape",
    ) -> None:
        super().__init__((image_field, image), (shape_field, shape), drop, False)


class ShapeToText(Pair):
    """A shape, then its caption, which is learned. The shape is dropped with probability `drop` (0: captioning needs no
    guidance)."""

    def __init__(
        self,
        drop: float = 0.0,
        text: str = "text",
        shape: str = "shape",
        text_field: str = "text",
        shape_field: str = "shape",
    ) -> None:
        super().__init__((shape_field, shape), (text_field, text), drop, False)


class ShapeQuestion(Template):
    """A shape, a question about it, and the answer, which is learned. The shape is dropped with probability `drop`. Of an example
    that has several questions one is drawn."""

    def __init__(
        self,
        drop: float = 0.0,
        text: str = "text",
        shape: str = "shape",
        question_field: str = "question",
        answer_field: str = "answer",
        questions_field: str = "questions",
        shape_field: str = "shape",
    ) -> None:
        self.drop = check_probability("drop", drop)
        self.text, self.shape = text, shape
        self.question_field, self.answer_field, self.shape_field = question_field, answer_field, shape_field
        self.questions_field = questions_field

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        dropped = happens(self.drop, rng)
        which = float(torch.rand((), generator=rng, dtype=torch.float64))
        first = null_segment() if dropped else Segment(self.shape, example[self.shape_field], loss=False)
        if several := example.get(self.questions_field):
            question, answer = several[int(which * len(several))]
        else:
            question, answer = example[self.question_field], example[self.answer_field]
        return [first, Segment(self.text, question, loss=False), Segment(self.text, answer, loss=True)]


class Coarse(Template):
    """Documents of another template, in which what is given with several scales is shown, with probability `share`, only to one
    of those before the last: so a model learns to say what it is from the first scales alone (SAR3D's truncation).

    For contents that come as tokens (`cached` of the data module).
    """

    def __init__(self, template: Template, share: float = 0.5) -> None:
        self.template, self.share = template, check_probability("share", share)

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        fewer = happens(self.share, rng)
        which = float(torch.rand((), generator=rng, dtype=torch.float64))
        document = self.template(example, rng)
        if not fewer:
            return document
        return [segment if segment.loss else self._cut(segment, which) for segment in document]

    def _cut(self, segment: Segment, which: float) -> Segment:
        item = segment.content
        if not isinstance(item, Encoded):
            if item is None or isinstance(item, str):
                return segment
            raise ValueError(
                f"Coarse takes tokens apart, but {segment.modality} is a {type(item).__name__}; name its field in the data "
                "module's cached"
            )
        if len(item.scales) < 2:
            return segment
        return dataclasses.replace(segment, content=first_scales(item, 1 + int(which * (len(item.scales) - 1))))
