"""Speech word by word: documents in which each word stands before its part of the sound; texts given between items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm import hub
from mm.audio import Audio
from mm.backbone import BackboneConfig
from mm.data.documents import TextToSpeech, voice_segment, whole_text
from mm.data.example import BrokenExample
from mm.generation import Engine, Request
from mm.heads.lm import LMHead
from mm.interfaces import Encoded, Modality
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.delay import Delay
from mm.orders.raster import Raster
from mm.pipelines.sound_editing import Edit
from mm.pipelines.text_to_speech import TextToSpeechPipeline
from mm.pipelines.utterances import shares
from mm.testing import Levels
from mm.tokenizers.text_bytes import TextBytes


def model(by_word: bool = True) -> MultimodalModel:
    torch.manual_seed(0)
    made = MultimodalModel(
        BackboneConfig(width=32, layers=2, heads=2),
        [
            Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
            Modality(name="speech", tokenizer=Levels(), head=LMHead(), order=Delay(along=True)),
        ],
        context=256,
    ).eval()
    torch.nn.init.normal_(made.head("speech").weight)  # type: ignore[arg-type]
    made.by_word, made.voices = by_word, ("slt", "theo")
    return made


def example(**changed: Any) -> dict[str, Any]:
    codes = torch.randint(8, (20, 4), generator=torch.Generator().manual_seed(0))
    words = [["three", 0.1, 0.3], ["five", 0.3, 0.5], ["one", 0.5, 0.75]]
    found = {"key": "k", "text": "three five one", "speaker": "slt", "audio": Encoded(grid=(20,), codes=codes)}
    return found | {"words": words} | changed


TEMPLATE = TextToSpeech(drop=0.0, by_word=True, frame_rate=25.0)


def told(document: list[Segment]) -> list[Any]:
    return [s.content if isinstance(s.content, str) else len(s.content) for s in document]


def test_each_word_stands_before_its_part_of_the_sound() -> None:
    document = TEMPLATE(example(), torch.Generator())
    # five begins at 0.3 s · 25 = 7.5 elements, which rounds to the even 8; one at 12.5
    assert told(document) == ["slt: ", "three five one\n", "three", 8, "five", 4, "one", 8]
    assert [s.loss for s in document] == [False, False] + [False, True] * 3
    parts = [s.content.codes for s in document if isinstance(s.content, Encoded)]
    assert torch.equal(torch.cat(parts), example()["audio"].codes)


def test_an_example_without_words_is_one_word() -> None:
    document = TEMPLATE(example(words=None, text="seven"), torch.Generator())
    assert told(document) == ["slt: ", "seven\n", "seven", 20]


@pytest.mark.parametrize("kind", ["latents", "ids"])
def test_other_tokens_are_taken_apart_too(kind: str) -> None:
    content: Any = torch.randn(20, 2) if kind == "latents" else torch.arange(20)
    document = TEMPLATE(example(audio=Encoded(grid=(20,), **{kind: content})), torch.Generator())
    assert torch.equal(torch.cat([s.content.content for s in document if isinstance(s.content, Encoded)]), content)


def test_times_that_do_not_fit_are_a_broken_example() -> None:
    with pytest.raises(BrokenExample, match="word 2 of 3 spans the elements 8 to 50 of 20"):
        TEMPLATE(example(words=[["three", 0.1, 0.3], ["five", 0.3, 2.0], ["one", 2.0, 2.2]]), torch.Generator())
    with pytest.raises(BrokenExample, match="word 1 of 2"):
        TEMPLATE(example(words=[["three", 0.0, 0.0], ["five", 0.0, 0.2]]), torch.Generator())


def test_sounds_must_be_tokens_and_the_rate_known() -> None:
    with pytest.raises(ValueError, match="name it in the data module's cached"):
        TEMPLATE(example(audio=Audio(np.zeros(8, np.float32), 100)), torch.Generator())
    with pytest.raises(ValueError, match="needs frame_rate"):
        TextToSpeech(by_word=True)


def spoken_request(**options: Any) -> Request:
    between = [Segment("text", "three"), ("speech", (6,)), Segment("text", "five"), ("speech", range(2, 9))]
    prompt = [voice_segment("slt"), whole_text("three five")]
    return Request(prompt=prompt, items=between, text=False, **options)


def test_generation_sees_what_training_saw() -> None:
    """The logits that both words' parts are drawn from are those of the teacher-forced document."""
    one = model()
    seen: list[torch.Tensor] = []
    head: Any = one.head("speech")
    sample = head.sample
    head.sample = lambda hidden, draws: [seen.append(head.logits(hidden)), sample(hidden, draws)][1]
    made = Engine(one).generate([spoken_request()])[0]
    assert [s.modality for s in made] == ["text", "speech"] * 2
    assert len(made[1].content) == 6 and 2 <= len(made[3].content) <= 8
    stream = one.build_document([voice_segment("slt"), whole_text("three five"), *made], torch.Generator()).validate()
    predicts = (stream.target >= 0) & (stream.modality[stream.target.clamp(min=0)] == 1)
    torch.testing.assert_close(torch.cat(seen), one.logits(stream, "speech")[predicts], atol=2e-5, rtol=1e-4)
    # each part runs along its own word
    at = stream.position[stream.modality == 1, 0].tolist()
    begin = 1 + len("slt: three five\n")
    assert at[0] == begin and at[1] == pytest.approx(begin + 5 / 6)


def test_rows_of_a_batch_do_not_disturb_each_other() -> None:
    one = model()
    plain = Request(prompt=[Segment("text", "x")], items=[("speech", (5,))], seed=4)
    alone = [Engine(one).generate([r])[0] for r in (spoken_request(seed=1), plain)]
    both = Engine(one).generate([spoken_request(seed=1), plain])
    for mine, theirs in zip(alone, both, strict=True):
        assert [s.content.content.tolist() for s in mine] == [s.content.content.tolist() for s in theirs]


def test_what_can_not_stand_between_items_is_refused() -> None:
    one = model()
    sound = Segment("speech", Encoded(grid=(2,), codes=torch.zeros(2, 4, dtype=torch.int64)))
    with pytest.raises(ValueError, match="only texts can be given between items"):
        Engine(one).generate([Request(prompt=[], items=[sound, ("speech", (2,))])])
    with pytest.raises(ValueError, match="`items` holds texts only"):
        known = (torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
        Engine(one).generate([Request(prompt=[], items=[Segment("text", "a")], known=known)])
    with pytest.raises(ValueError, match="the context holds 256"):
        Engine(one).generate([Request(prompt=[], items=[Segment("text", "a" * 300), ("speech", (2,))])])


def test_pipeline_speaks_word_by_word() -> None:
    pipeline = TextToSpeechPipeline(model())
    out = pipeline(["three five", "one"], voice="theo", seed=3)
    alone = pipeline("one", voice="theo", seed=3)
    np.testing.assert_array_equal(out.audios[1], alone.audios[0])
    timed = pipeline("three five", voice="theo", duration=0.8, seed=3)
    assert len(timed.tokens[0][0]) == 20 and len(timed.audios[0]) == 80
    streamed = np.concatenate([a.samples for a in pipeline.stream("three five", voice="theo", seed=3, chunk=2)])
    np.testing.assert_array_equal(streamed, pipeline("three five", voice="theo", seed=3).audios[0])
    with pytest.raises(ValueError, match="speaks word by word"):
        pipeline("three five", edit=Edit(Audio(np.zeros(80, np.float32), 100), 0.1, 0.3))


def test_long_texts_are_divided_so_that_they_fit() -> None:
    pipeline = TextToSpeechPipeline(model())
    words = " ".join(["three"] * 40)
    utterances = pipeline.encode([words], voice=["slt"])[0]
    assert sum(len(u.words) for u in utterances) == 40 and len(utterances) > 1


@pytest.mark.parametrize("total", [3, 7, 30])
def test_shares_of_a_duration(total: int) -> None:
    found = shares("three a  seven", total)
    assert [word for word, _ in found] == ["three", "a", "seven"]
    assert sum(count for _, count in found) == total and min(count for _, count in found) >= 1
    assert found[0][1] == found[2][1] or abs(found[0][1] - found[2][1]) == 1
    with pytest.raises(ValueError, match="3 words can't be spoken in 2 elements"):
        shares("a b c", 2)


def test_a_checkpoint_remembers_it(tmp_path: Path) -> None:
    for by_word in (True, False):
        hub.save_pretrained(model(by_word), tmp_path / str(by_word))
        assert hub.load_pretrained(tmp_path / str(by_word)).by_word is by_word
