"""Items that run along the text before them (`Order.along`): the same rotary coordinates in training and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm.backbone import BackboneConfig
from mm.generation import Engine, Request
from mm.heads.lm import LMHead
from mm.interfaces import Decoded, Encoded, Modality, ModalityTokenizer, Sampling, Spec
from mm.layout import NULL, Segment
from mm.model import MultimodalModel
from mm.orders.raster import Raster
from mm.tokenizers.text_bytes import TextBytes
from mm.tracks import Track


class Notes(ModalityTokenizer):
    """A list of ids with a stated length."""

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=5, max_grid=(16,))

    def encode(self, raw: Any) -> Encoded:
        return Encoded(grid=(len(raw),), ids=torch.tensor(raw))

    def decode(self, encoded: Encoded) -> Decoded:
        return Decoded(value=encoded.content.tolist())


def model(along: bool = True) -> MultimodalModel:
    torch.manual_seed(0)
    made = MultimodalModel(
        BackboneConfig(width=32, layers=2, heads=2),
        [
            Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
            Modality(name="notes", tokenizer=Notes(), head=LMHead(), order=Raster(along=along)),
            Modality(name="marks", tokenizer=Notes(), head=LMHead(), order=Raster(along=along)),
        ],
        context=128,
    ).eval()
    for name in ("notes", "marks"):
        torch.nn.init.normal_(made.head(name).weight)  # a fresh head is nearly uniform, and nothing could be told by it
    return made


def text(words: str) -> Segment:
    return Segment("text", words, loss=False)


def places(document: list[Segment], name: str = "notes") -> list[float]:
    one = model()
    stream = one.build_document(document, torch.Generator()).validate()
    return stream.position[stream.modality == one.vocabulary.index[name], 0].tolist()


def test_elements_are_spread_over_the_text() -> None:
    document = [text("theo: "), text("seven"), Segment("notes", [1, 2, 3, 4, 0, 1, 2, 3, 4, 0])]
    begin = 1.0 + len("theo: ")  # after `bos` and the other text
    assert places(document) == pytest.approx([begin + 0.5 * i for i in range(10)])
    one = model()
    stream = one.build_document([*document, text("x")], torch.Generator())
    after = stream.position[:, 0].tolist()[-3:]  # end of the item, x, eos: after the item's opening
    assert after == pytest.approx([begin + 5 + 2, begin + 5 + 3, begin + 5 + 4])


@pytest.mark.parametrize(
    "before", [[], [Segment(NULL)], [text("")], [text("ab"), Segment("notes", [1, 2], loss=False)]], ids=str
)
def test_without_a_text_right_before_they_stand_one_apart(before: list[Segment]) -> None:
    assert torch.tensor(places([*before, Segment("notes", [1, 2, 3])])[-3:]).diff().tolist() == [1.0, 1.0]


def test_another_modality_runs_along_the_same_text_after_it() -> None:
    document = [text("theo: "), text("seven"), Segment("marks", [1, 2]), Segment("notes", [1, 2, 3, 4, 0])]
    begin = 1.0 + len("theo: ")
    assert places(document, "marks") == pytest.approx([begin, begin + 2.5])
    assert places(document) == pytest.approx([begin + i for i in range(5)])
    assert torch.tensor(places([*document, Segment("marks", [1, 2])], "marks")[-2:]).diff() == 1, "each once"
    begin += 5 + 3 + 3  # the text, and twice begin, size and end
    assert places([*document, text("xy"), Segment("notes", [1] * 4)])[-4:] == pytest.approx(
        [begin + 0.5 * i for i in range(4)]
    ), "along a new text"


@pytest.mark.parametrize("along", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_two_items_along_a_text_are_generated_as_they_are_trained(along: bool, given: bool) -> None:
    one = model(along)
    seen: list[torch.Tensor] = []
    head: Any = one.head("notes")
    sample = head.sample
    head.sample = lambda hidden, draws: [seen.append(head.logits(hidden)), sample(hidden, draws)][1]
    prompt, items = [text("slt: "), text("three five")], [("marks", (3,)), ("notes", (7,))]
    if given:
        prompt, items = [*prompt, Segment("marks", [4, 0, 2], loss=False)], items[1:]
    made = Engine(one).generate([Request(prompt=prompt, items=items, text=False)])[0]
    assert [segment.modality for segment in made] == [name for name, _ in items]
    stream = one.build_document([*prompt, *made], torch.Generator())
    predicts = (stream.target >= 0) & (stream.modality[stream.target.clamp(min=0)] == 1)
    torch.testing.assert_close(torch.cat(seen), one.logits(stream, "notes")[predicts], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("along", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_generation_sees_what_training_saw(along: bool, guidance: float) -> None:
    one = model(along)
    seen: list[torch.Tensor] = []
    head: Any = one.head("notes")
    sample = head.sample
    head.sample = lambda hidden, draws: [seen.append(head.logits(hidden)), sample(hidden, draws)][1]
    request = Request(
        prompt=[text("slt: "), text("three five")], items=[("notes", (9,))], text=False,
        sampling=Sampling(guidance=guidance),
    )  # fmt: skip
    (made,) = Engine(one).generate([request])[0]
    for branch, before in enumerate([[text("slt: "), text("three five")], [Segment(NULL)]][: 1 + (guidance != 1)]):
        stream = one.build_document([*before, made], torch.Generator())
        predicts = (stream.target >= 0) & (stream.modality[stream.target.clamp(min=0)] == 1)
        wanted = one.logits(stream, "notes")[predicts]
        torch.testing.assert_close(torch.stack([logits[branch] for logits in seen]), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("before", ["aaaa", ""])
def test_text_that_the_model_wrote_is_run_along_too(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on with the text that stands right before it, as in training, where both are one."""
    one = model()
    prompt = [text(before)] if before else [Segment("marks", [1], loss=False)]
    head: Any = one.head("text")
    script = iter([*b"abc", one.vocabulary.begin("notes"), one.vocabulary.extent(4)])

    def say(hidden: torch.Tensor, draws: Any) -> Any:
        token = next(script, one.vocabulary.control("eos"))
        return [(torch.tensor([token]), torch.zeros(1)) for _ in draws]

    head.sample = say
    fed: list[float] = []
    push = Track._push

    def watched(track: Track, number: int, token: int, order: int, position: Any, *others: Any) -> None:
        fed.extend([position[0]] if number == 1 else [])
        push(track, number, token, order, position, *others)

    monkeypatch.setattr(Track, "_push", watched)
    made = Engine(one).generate([Request(prompt=prompt, text=True, free=True, max_tokens=40)])[0]
    assert [s.modality for s in made] == ["text", "notes"]
    assert len(made[1].content) == 4
    begin = 1.0 if before else 5.0  # after bos, and an item of one element with begin, size and end
    assert fed == pytest.approx([begin + 0.25 * (3 + len(before)) * n for n in range(4)])
    whole = [text(before + "abc")] if before else [*prompt, text("abc")]
    stream = one.build_document([*whole, made[1]], torch.Generator())
    assert stream.position[stream.modality == 1, 0].tolist() == pytest.approx(fed)
