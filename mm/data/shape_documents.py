"""Documents of shapes and text: a shape from what it is called, its caption, and answers to questions about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mm.data.documents import Pair, Template, check_probability, happens, null_segment
from mm.layout import Segment


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
    """A shape, a question about it, and the answer, which is learned. The shape is dropped with probability `drop`."""

    def __init__(
        self,
        drop: float = 0.0,
        text: str = "text",
        shape: str = "shape",
        question_field: str = "question",
        answer_field: str = "answer",
        shape_field: str = "shape",
    ) -> None:
        self.drop = check_probability("drop", drop)
        self.text, self.shape = text, shape
        self.question_field, self.answer_field, self.shape_field = question_field, answer_field, shape_field

    def __call__(self, example: Mapping[str, Any], rng: torch.Generator) -> list[Segment]:
        dropped = happens(self.drop, rng)
        first = null_segment() if dropped else Segment(self.shape, example[self.shape_field], loss=False)
        return [
            first,
            Segment(self.text, example[self.question_field], loss=False),
            Segment(self.text, example[self.answer_field], loss=True),
        ]
