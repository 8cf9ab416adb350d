"""Pipelines of speech with tiny random models: durations, voices, edits, streams, sounds of any length."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mm
from mm import hub, plugins
from mm.audio import Audio, load_audio, save_audio
from mm.cli import main as run_mm
from mm.data.documents import TextToSpeech
from mm.data.example import Example
from mm.generation import Engine, Event, Request
from mm.heads.lm import LMHead
from mm.heads.regression import RegressionHead
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Sampling, Spec
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.blocks import Blocks
from mm.orders.delay import Delay
from mm.orders.raster import Raster
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.pipelines.playing import Player
from mm.pipelines.sound_editing import Edit
from mm.pipelines.speech_to_text import SpeechToTextPipeline, cut_quietly, edit_distance
from mm.pipelines.text_to_speech import TextToSpeechPipeline, Utterance
from mm.pipelines.utterances import bounds, check_duration, divide, divided, share
from mm.testing import Frames, Levels, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*peaks reach")
"""Random models are loud."""

RATE, HOP, MOST = 100, 2, 64
"""Of `Frames`: samples a second, samples a frame, frames of the longest item."""
NAME = "image"
"""What `tiny` calls its second modality, whatever it is."""


class Ids(ModalityTokenizer):
    """Sound as one of 16 levels a sample, an id each."""

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=16, max_grid=(MOST,), sample_rate=RATE, frame_rate=float(RATE))

    def encode(self, raw: Audio) -> Encoded:
        ids = torch.tensor(np.clip(np.floor((raw.samples + 1) * 8), 0, 15)).long()
        return Encoded(grid=(len(ids),), ids=ids)

    def decode(self, encoded: Encoded) -> Decoded:
        return Decoded(value=Audio((encoded.content.numpy() + 0.5) / 8 - 1, RATE))


class Smooth(Frames):
    """Frames whose decoder mixes each sample with its neighbours."""

    decoder_reach = 1

    def decode(self, encoded: Encoded) -> Decoded:
        samples = super().decode(encoded).value.samples
        return Decoded(value=Audio(np.convolve(samples, [0.25, 0.5, 0.25], "same"), self.rate))


class Direct(Frames):
    """Frames that decode one by one."""

    decoder_reach = 0


def continuous(tokenizer: ModalityTokenizer | None = None, **settings: Any) -> MultimodalModel:
    made = tiny(
        Blocks(3, **{"infill": 0.5, "along": True, "sampler": {"steps": 2}, **settings}),
        tokenizer=tokenizer or Direct(),
        head=RegressionHead(),
    )
    made.voices = ("ann", "theo")
    return made


def discrete() -> MultimodalModel:
    made = tiny(Raster(), tokenizer=Ids(), head=LMHead())
    made.voices = ("ann", "theo")
    return made


def codes() -> MultimodalModel:
    made = tiny(Delay(), tokenizer=Levels(), head=LMHead())
    made.voices = ("ann", "theo")
    return made


@pytest.fixture(params=[continuous, discrete, codes])
def speaker(request: pytest.FixtureRequest) -> TextToSpeechPipeline:
    return TextToSpeechPipeline(request.param())


def sound(seconds: float, seed: int = 0, rate: int = RATE) -> Audio:
    """Noise."""
    samples = np.random.default_rng(seed).uniform(-0.9, 0.9, round(seconds * rate))
    return Audio(samples.astype(np.float32), rate)


def frames(output: Any) -> list[int]:
    return [sum(map(len, items)) for items in output.tokens]


def close(one: Sequence[np.ndarray[Any, Any]], other: Sequence[np.ndarray[Any, Any]]) -> bool:
    """Equal up to the rounding of batches of other shapes."""
    return len(one) == len(other) and all(
        a.shape == b.shape and np.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True)
    )


# --- text to speech: shapes, seeds ----------------------------------------------------------------------------------


def test_lazy_names() -> None:
    assert mm.TextToSpeechPipeline is TextToSpeechPipeline
    assert mm.SpeechToTextPipeline is SpeechToTextPipeline
    assert mm.Edit is Edit and mm.Audio is Audio


def test_the_speech_modality() -> None:
    assert TextToSpeechPipeline(continuous()).speech == NAME
    with pytest.raises(ValueError, match="no modality of sound; it has text, image"):
        TextToSpeechPipeline(tiny())("seven")


def test_a_model_that_only_reads_speech() -> None:
    class Prompts(Frames):
        @property
        def spec(self) -> Spec:
            return replace(super().spec, spatial=False)

    model = continuous(Prompts())
    with pytest.raises(ValueError, match="this model reads 'image' and can't make it"):
        TextToSpeechPipeline(model)("seven")
    assert len(SpeechToTextPipeline(model)(sound(0.2), max_tokens=3).texts) == 1


def test_kinds_and_counts(speaker: TextToSpeechPipeline, tmp_path: Path) -> None:
    out = speaker(["seven", "one two"], num_audios=2, seed=3)
    assert out.texts == ["seven", "seven", "one two", "one two"] and out.seed == 3 and out.sample_rate == RATE
    assert all(a.dtype == np.float32 and a.ndim == 1 and np.isfinite(a).all() for a in out.audios)
    hop = round(RATE / speaker.tokenizer(NAME).spec.frame_rate)
    assert [len(a) for a in out.audios] == [hop * n for n in frames(out)]
    assert not np.array_equal(out.audios[0], out.audios[1])
    places = out.save(tmp_path / "said.wav")
    assert [p.name for p in places] == [f"said-0{n}.wav" for n in (1, 2, 3, 4)]
    assert load_audio(places[2]).rate == RATE
    assert speaker([], seed=0).audios == []


def test_a_seed_means_the_same_in_any_batch(speaker: TextToSpeechPipeline) -> None:
    many = speaker(["seven", "nine", "seven"], num_audios=2, seed=5).audios
    assert close(many[2:4], speaker("nine", num_audios=2, seed=5).audios)
    assert close(many[:2] + many[4:], speaker("seven", num_audios=4, seed=5).audios), "equal texts give other sounds"
    speaker.batch_size = 2
    assert close(speaker(["seven", "nine", "seven"], num_audios=2, seed=5).audios, many)
    assert not close(speaker("nine", num_audios=2, seed=6).audios, many[2:4])
    torch.manual_seed(1)
    first = speaker("nine")
    torch.manual_seed(1)
    assert close(speaker("nine").audios, first.audios) and close(speaker("nine", seed=first.seed).audios, first.audios)
    with pytest.raises(ValueError, match="both seed and generator"):
        speaker("nine", seed=1, generator=torch.Generator())


def test_the_steps_make_the_call(speaker: TextToSpeechPipeline) -> None:
    utterances = speaker.encode(["seven"], voice="theo", duration=0.3)
    tokens = speaker.generate(utterances, num_audios=2, seed=4)
    assert close(
        [audio.samples for audio in speaker.decode(tokens)],
        speaker("seven", voice="theo", duration=0.3, num_audios=2, seed=4).audios,
    )


# --- durations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.13, 0.333])
def test_a_given_duration_is_exact(speaker: TextToSpeechPipeline, seconds: float) -> None:
    rate = speaker.tokenizer(NAME).spec.frame_rate
    assert frames(speaker("seven", duration=seconds, seed=0)) == [round(seconds * rate)]
    both = frames(speaker(["seven", "seven"], duration=[seconds, None], seed=0))
    assert both == [round(seconds * rate), *frames(speaker("seven", seed=0))]


@pytest.mark.parametrize("stretch", [0.8, 1.25, 4.0])
def test_a_stretched_duration_is_exact(speaker: TextToSpeechPipeline, stretch: float) -> None:
    texts = ["seven", "no", "one two", "three four"]

    def counts(**options: float) -> list[int]:
        return [len(item) for items in speaker(texts, seed=0, **options).tokens for item in items]  # type: ignore[arg-type]

    chosen = counts()
    assert len(set(chosen)) > 1
    assert counts(stretch=stretch) == [min(MOST, max(1, round(stretch * n))) for n in chosen]


def test_impossible_durations(speaker: TextToSpeechPipeline) -> None:
    for seconds in (0.0, -1.0, 0.05, 5.0, 60.0):
        with pytest.raises(ValueError, match=r"'seven' can't take .*; give a duration from 0.13 to \d.\d+ s, or none"):
            speaker("seven", duration=seconds)
    for wrong in (float("nan"), float("inf"), "long", True):
        with pytest.raises(ValueError, match="a duration is a number of seconds"):
            speaker("seven", duration=wrong)  # type: ignore[arg-type]


def test_impossible_settings(speaker: TextToSpeechPipeline) -> None:
    for stretch in (0.0, -1, 100, float("nan"), "fast", True):
        with pytest.raises(ValueError, match="stretch multiplies durations by 0.1 to 10"):
            speaker("seven", stretch=stretch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 1 of `duration` for 2 texts"):
        speaker(["seven", "one"], duration=[0.3])
    for empty in ("", " \n"):
        with pytest.raises(ValueError, match="the text is empty; say what is to be spoken"):
            speaker(empty)
    for wrong in (3, [3], b"seven"):
        with pytest.raises(ValueError, match="for a text"):
            speaker(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown option 'speed'"):
        speaker("seven", speed=1.0)  # type: ignore[call-arg]


def test_the_model_chooses_within_what_can_be_spoken() -> None:
    for seed in range(2):
        model = tiny(Blocks(3, sampler={"steps": 2}), tokenizer=Frames(), head=RegressionHead(), seed=seed)
        speaker = TextToSpeechPipeline(model)
        for text in ("a", "seven", "eleven letter"):
            (count,) = frames(speaker(text, seed=0))
            assert count in bounds(text, Frames())
    assert bounds("x" * 60, Frames()) == range(MOST, MOST + 1) and bounds("x", Levels()) == range(1, MOST + 1)


def test_anything_may_be_said(speaker: TextToSpeechPipeline) -> None:
    out = speaker([None, "seven"], num_audios=2, seed=0)
    assert out.texts == ["", "", "seven", "seven"]
    assert frames(speaker(None, duration=0.3, seed=0)) == [round(0.3 * speaker.tokenizer(NAME).spec.frame_rate)]
    with pytest.raises(ValueError, match="a voice without a text"):
        speaker(None, voice="theo")


# --- extents in the engine ------------------------------------------------------------------------------------------


def extent(model: MultimodalModel, items: list[Any], prompt: str = "seven", **options: Any) -> list[int]:
    request = Request(
        prompt=[Segment("text", prompt, loss=False)],
        items=items,
        text=False,
        by_modality={"text": Sampling(temperature=0.0)},
        **options,
    )
    return [len(segment.content) for segment in Engine(model).generate([request])[0]]


def test_a_chosen_extent_is_the_likeliest_that_is_allowed() -> None:
    model = discrete()
    vocabulary = model.vocabulary
    draft = model.build_document.draft([Segment("text", "seven", loss=False)], torch.Generator(), close=False)
    draft.controls([vocabulary.begin(NAME)], 0.0)
    logits = model.logits(draft.stream(), "text")[-1]
    sizes = logits[vocabulary.extent(1) : vocabulary.extent(MOST) + 1]
    assert extent(model, [(NAME, None)]) == [1 + int(sizes.argmax())]
    for low, high in ((1, 3), (5, 9), (40, 64), (7, 7)):
        assert extent(model, [(NAME, range(low, high + 1))]) == [low + int(sizes[low - 1 : high].argmax())]


def test_chosen_extents_leave_room_for_the_items_that_follow() -> None:
    model = tiny(Raster(), tokenizer=Ids(), head=LMHead(), context=40)
    for seed in range(8):
        request = Request(
            prompt=[Segment("text", "abcdefgh", loss=False)],
            items=[(NAME, None), (NAME, range(4, 30)), (NAME, (5,))],
            text=False,
            seed=seed,
        )
        counts = [len(segment.content) for segment in Engine(model).generate([request])[0]]
        assert len(counts) == 3 and counts[1] >= 4 and counts[2] == 5
        assert 1 + 8 + sum(counts) + 3 * 3 <= 40
    with pytest.raises(ValueError, match=r"the context holds 40; shorten the prompt"):
        extent(model, [(NAME, range(32, 40))], "abcdefgh")


def test_extents_that_can_not_be_chosen() -> None:
    for grid in (range(0, 4), range(4, 4), range(1, 9, 2)):
        with pytest.raises(ValueError, match="can't be left to the model"):
            extent(discrete(), [(NAME, grid)])
    with pytest.raises(ValueError, match="can't be left to the model"):
        extent(tiny(), [(NAME, range(1, 4))])
    assert 1 <= extent(tiny(), [(NAME, None)])[0] <= 16, "rows and columns of a picture"
    with pytest.raises(ValueError, match="name its grid"):
        extent(discrete(), [(NAME, None)], known=(torch.zeros(4).long(), torch.ones(4).bool()))


# --- voices ---------------------------------------------------------------------------------------------------------


def prompts(speaker: TextToSpeechPipeline, text: str = "seven", **options: Any) -> list[list[Segment]]:
    return [part.prompt for parts in speaker.encode([text], **options) for part in parts]


def same(one: Sequence[Segment], other: Sequence[Segment], speaker: TextToSpeechPipeline) -> bool:
    def stream(document: Sequence[Segment]) -> Any:
        return speaker.model.build_document(document, torch.Generator(), close=False)

    a, b = stream(one), stream(other)
    contents = [
        torch.equal(a.latents[name].values, b.latents[name].values)
        and torch.equal(a.latents[name].index, b.latents[name].index)
        for name in {*a.latents, *b.latents}
    ]
    return torch.equal(a.ids, b.ids) and torch.equal(a.position, b.position) and all(contents)


def test_prompts_are_those_of_training() -> None:
    speaker = TextToSpeechPipeline(continuous())
    clip = sound(0.3)
    template = TextToSpeech(drop=0, speech=NAME)
    example = Example(key="k", text="seven", speaker="theo", audio=clip)
    *given, _ = template(example, torch.Generator())
    assert same(prompts(speaker, voice="theo")[0], given, speaker)
    assert not same(prompts(speaker, voice="ann")[0], given, speaker)
    assert same(prompts(speaker)[0], prompts(speaker, voice="ann")[0], speaker), "the first voice is the default"
    reference = [Segment(NAME, clip, loss=False), given[1]]
    assert same(prompts(speaker, voice=clip)[0], reference, speaker)
    nothing = TextToSpeech(drop=1, speech=NAME)(example, torch.Generator())[:-1]
    assert same(speaker.encode([None])[0][0].prompt, nothing, speaker)
    speaker.model.voices = ()
    nameless = TextToSpeech(drop=0, speech=NAME, speaker_field=None)(example, torch.Generator())[:-1]
    assert same(prompts(speaker)[0], nameless, speaker)


def test_clips_as_voices(speaker: TextToSpeechPipeline, tmp_path: Path) -> None:
    clip = sound(0.3, rate=RATE)
    save_audio(tmp_path / "v.wav", clip)
    clip = load_audio(tmp_path / "v.wav")
    wanted = speaker("seven", voice=clip, seed=0).audios
    pair = (RATE, clip.samples)
    for voice in (tmp_path / "v.wav", str(tmp_path / "v.wav"), (tmp_path / "v.wav").read_bytes(), pair):
        assert close(speaker("seven", voice=voice, seed=0).audios, wanted)
    with (tmp_path / "v.wav").open("rb") as file:
        assert close(speaker("seven", voice=file, seed=0).audios, wanted)
    mixed = speaker(["seven", "seven", "seven"], voice=[pair, "theo", None], seed=0).audios
    assert close(mixed[:1], wanted) and close(mixed[1:2], speaker("seven", voice="theo", seed=0).audios)
    assert close(mixed[2:], speaker("seven", voice="ann", seed=0).audios) and not close(mixed[1:2], mixed[2:])


def test_voices_that_are_not_there(speaker: TextToSpeechPipeline) -> None:
    with pytest.raises(ValueError, match=r"there is no voice 'bob', .*; this model knows ann, theo"):
        speaker("seven", voice="bob")
    with pytest.raises(ValueError, match=r"there is no voice 'none.wav', and no sound file of that name"):
        speaker("seven", voice="none.wav")
    speaker.model.voices = ()
    with pytest.raises(ValueError, match="this model knows none by name"):
        speaker("seven", voice="theo")
    with pytest.raises(ValueError, match="got 1 of `voice` for 2 texts"):
        speaker(["seven", "one"], voice=["theo"])
    with pytest.raises(ValueError, match=r"a sound is 5.00 s long, .* holds up to"):
        speaker("seven", voice=sound(5))
    with pytest.raises(ValueError, match="got a int for a sound"):
        speaker("seven", voice=3)  # type: ignore[arg-type]


def test_voices_are_saved(tmp_path: Path) -> None:
    speaker = TextToSpeechPipeline(continuous(Frames()), {NAME: Sampling(denoising_steps=2)})
    folder = speaker.save_pretrained(tmp_path / "m")
    again = TextToSpeechPipeline.from_pretrained(folder)
    assert again.model.voices == ("ann", "theo")
    assert close(again("seven", voice="theo", seed=0).audios, speaker("seven", voice="theo", seed=0).audios)
    other = continuous(Frames())
    other.voices = ("bob",)
    hub.load_weights(other, folder)
    assert other.voices == ("ann", "theo")
    config = (folder / "model.json").read_text()
    for wrong in ('"ann"', "[3]", '[""]', '["a\\nb"]', '{"a": 1}', '["' + "x" * 101 + '"]'):
        spoilt = config.replace('["ann", "theo"]', wrong).replace('[\n    "ann",\n    "theo"\n  ]', wrong)
        assert spoilt != config
        (folder / "model.json").write_text(spoilt)
        with pytest.raises(ValueError, match="voices that are no list"):
            hub.load_pretrained(folder)


def test_training_learns_the_names_of_voices() -> None:
    import lightning.pytorch as pl

    from mm.backbone import BackboneConfig
    from mm.data.documents import Mixture, TextOnly
    from mm.data.example import Lazy, Source
    from mm.data.feeds import Part
    from mm.data.module import MultimodalDataModule
    from mm.interfaces import Modality
    from mm.tokenizers.text_bytes import TextBytes
    from mm.training import ModelTraining

    class Clips(Source):
        def __init__(self, speakers: int) -> None:
            super().__init__()
            self.loaded, self.speakers = 0, speakers
            self._finish([f"{number}" for number in range(6)], "clips")

        @property
        def identity(self) -> str:
            return "clips"

        def raw_picture(self, index: int) -> Any:
            return None

        def _fields(self, ordinal: int) -> dict[str, Any]:
            def load() -> Audio:
                self.loaded += 1
                return sound(0.1, ordinal)

            fields = {"text": "seven", "audio": Lazy(load)}
            return fields if ordinal >= self.speakers else fields | {"speaker": ("theo", "ann")[ordinal % 2]}

    clips, template = Clips(speakers=5), TextToSpeech()
    assert template.voices(clips) == {"ann", "theo"} and clips.loaded == 0, "no sound is read for it"
    assert TextToSpeech(speaker_field=None).voices(clips) == set()
    assert Mixture([TextOnly(), template]).voices(clips) == {"ann", "theo"}

    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="speech", tokenizer=Frames(), head=RegressionHead(), order=Blocks(3)),
    ]
    module = ModelTraining(BackboneConfig(width=16, layers=1, heads=2), modalities, context=64, unnormalized=True)
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    parts = [Part(source=Clips(speakers=6), template=template)]
    trainer.fit(module, datamodule=MultimodalDataModule(parts, tokens=256, batches_per_epoch=1))
    assert module.model.voices == ("ann", "theo")
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    module.model.voices = ()
    module.on_load_checkpoint(checkpoint)
    assert module.model.voices == ("ann", "theo")


# --- long texts -----------------------------------------------------------------------------------------------------


def test_where_texts_are_divided() -> None:
    def always(_: str) -> bool:
        return True

    assert divide("One two. Three four! Five", 15, always) == ["One two.", "Three four!", "Five"]
    assert divide("one two, three four five", 15, always) == ["one two,", "three four five"]
    assert divide("one two three", 7, always) == ["one two", "three"]
    assert divide("abcdefghij", 4, always) == ["abcd", "efgh", "ij"]
    assert divide("你好。世界很大", 4, always) == ["你好。", "世界很大"]
    assert divide("pi is 3.14 or so", 9, always) == ["pi is", "3.14 or", "so"]
    assert divide(" a ", 1, always) == ["a"]
    words = " ".join(["word"] * 100)
    for most in range(4, 40):
        parts = divide(words, most, lambda part: len(part) <= 11)
        assert " ".join(parts) == words and max(map(len, parts)) <= min(most, 11)
    with pytest.raises(ValueError, match="no room for a piece of 'word"):
        divide(words, 5, lambda part: not part)


def test_shares_of_a_duration() -> None:
    assert share(10, ["aaaa", "a"]) == [8, 2] and share(3, ["aaaaaaaa", "a", "a"]) == [1, 1, 1]
    rng = np.random.default_rng(0)
    for _ in range(50):
        parts = ["x" * int(n) for n in rng.integers(1, 20, rng.integers(1, 9))]
        total = int(rng.integers(len(parts), 200))
        out = share(total, parts)
        assert sum(out) == total and min(out) >= 1
    made = divided("one two three four", 100, 40, lambda _: True)
    assert sum(count for _, count in made) == 100 and max(count for _, count in made) <= 40
    assert check_duration(2.0, "one two three four", Frames()) == 100
    with pytest.raises(ValueError, match="up to|from 0.13 to 1.28 s"):
        check_duration(2.0, "seven", Frames())


def test_long_texts_are_joined(speaker: TextToSpeechPipeline) -> None:
    text = "One two three. Four five six, seven. " * 4
    out = speaker(text, seed=0)
    assert len(out.tokens[0]) > 4 and all(len(item) <= MOST for item in out.tokens[0])
    parts = [part.text for part in speaker.encode([text])[0]]
    assert " ".join(parts) == text.strip() and len(parts) == len(out.tokens[0])
    joined = np.concatenate([audio.samples for item in out.tokens[0] for audio in speaker.decode([[item]])])
    assert np.array_equal(joined, out.audios[0])
    seconds = 6.4
    whole = speaker(text, duration=seconds, seed=0)
    assert frames(whole) == [round(seconds * speaker.tokenizer(NAME).spec.frame_rate)] and len(whole.tokens[0]) > 2
    both = speaker([text, "seven"], seed=0)
    assert close(both.audios, [out.audios[0], speaker("seven", seed=0).audios[0]])


@pytest.mark.parametrize("text", ["naïve café", "你好", "\U0001f600!", "a\u0301\x00", "שלום", "x" * 300, "\ud800"])
def test_any_text_can_be_spoken(speaker: TextToSpeechPipeline, text: str) -> None:
    if text == "\ud800":  # half of a surrogate pair is no text
        with pytest.raises(ValueError):
            speaker(text)
    else:
        assert len(speaker(text, seed=0).audios[0]) > 0


def test_a_context_that_is_too_small() -> None:
    speaker = TextToSpeechPipeline(tiny(Raster(), tokenizer=Ids(), head=LMHead(), context=24))
    out = speaker("one two three four five", seed=0)
    assert len(out.tokens[0]) > 2
    speaker = TextToSpeechPipeline(tiny(Raster(), tokenizer=Ids(), head=LMHead(), context=24))
    with pytest.raises(ValueError, match="no room for a piece of 'one"):
        speaker("one", voice=sound(0.3))


# --- edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end"), [(0.2, 0.5), (0.0, 0.1), (0.7, 0.8), (0.0, 0.8), (0.333, 0.36), (0.21, 0.77)]
)
def test_edits_leave_the_rest_alone(start: float, end: float) -> None:
    speaker = TextToSpeechPipeline(continuous())
    clip = sound(0.8)
    out = speaker("seven eight", edit=Edit(clip, start, end), seed=0)
    first, last = round(start * RATE), round(end * RATE)
    made = out.audios[0]
    assert made.dtype == np.float32 and len(made) == len(clip.samples)
    assert np.array_equal(made[:first], clip.samples[:first]) and np.array_equal(made[last:], clip.samples[last:])
    assert not np.allclose(made[first:last], clip.samples[first:last])
    assert close(speaker("seven eight", edit=Edit(clip, start, end), seed=0).audios, out.audios)
    assert not close(speaker("seven eight", edit=Edit(clip, start, end), seed=1).audios, out.audios)


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.55, 0.31])
def test_a_span_may_change_its_length(seconds: float) -> None:
    speaker = TextToSpeechPipeline(continuous())
    clip, size = sound(0.8), round(seconds * RATE)
    made = speaker("seven eight", edit=Edit(clip, 0.2, 0.5), duration=seconds, seed=0).audios[0]
    assert len(made) == 80 - 30 + size
    assert np.array_equal(made[:20], clip.samples[:20]) and np.array_equal(made[20 + size :], clip.samples[50:])


def test_a_span_is_faded_into() -> None:
    speaker = TextToSpeechPipeline(continuous(Frames(dim=4, rate=800)))
    clip = Audio(np.full(160, 0.5, np.float32), 800)
    (parts,) = speaker.encode(["a b"], edit=[Edit(clip, 0.05, 0.15)])
    plan = parts[0].plan
    assert plan is not None
    made = plan.joined(Audio(np.full(160, -0.5, np.float32), 800)).samples
    assert np.array_equal(made[:40], clip.samples[:40]) and np.array_equal(made[120:], clip.samples[120:])
    inside = made[40:120]
    assert (np.diff(inside[:8]) < 0).all() and (np.diff(inside[-8:]) > 0).all() and (inside[8:-8] == -0.5).all()
    assert 0.4 < inside[0] < 0.5 and 0.4 < inside[-1] < 0.5


def test_a_clip_of_another_rate_is_resampled_first() -> None:
    speaker = TextToSpeechPipeline(continuous())
    clip = sound(0.8, rate=160)
    here = load_audio(clip, rate=RATE)
    made = speaker("seven", edit=Edit(clip, 0.3, 0.5), seed=0)
    assert made.sample_rate == RATE and np.array_equal(made.audios[0][:30], here.samples[:30])
    assert np.array_equal(made.audios[0][50:], here.samples[50:])


@pytest.mark.parametrize("make", [discrete, codes])
def test_an_order_that_only_continues(make: Callable[[], MultimodalModel]) -> None:
    clip = sound(0.4)
    speaker = TextToSpeechPipeline(make())
    made = speaker("seven", edit=Edit(clip, 0.1, 0.4), seed=0).audios[0]
    assert np.array_equal(made[:10], clip.samples[:10]) and len(made) == 40
    assert not np.array_equal(made[10:], clip.samples[10:])
    with pytest.raises(ValueError, match="given elements only at the start|only frames at the beginning"):
        speaker("seven", edit=Edit(clip, 0.1, 0.3), seed=0)


def test_edits_that_can_not_be(tmp_path: Path) -> None:
    speaker, clip = TextToSpeechPipeline(continuous()), sound(0.8)
    for start, end in ((0.5, 0.2), (-0.1, 0.2), (0.2, 0.9), (0.2, 0.2)):
        with pytest.raises(ValueError, match="isn't one of a clip of 0.8 s"):
            speaker("seven", edit=Edit(clip, start, end))
    for start in ("early", float("nan"), True):
        with pytest.raises(ValueError, match="the start of an edit is a number of seconds"):
            speaker("seven", edit=Edit(clip, start, 0.5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="up to 1.28 s long before and after"):
        speaker("seven", edit=Edit(sound(2), 0.1, 0.2))
    with pytest.raises(ValueError, match="up to 1.28 s long before and after"):
        speaker("seven", edit=Edit(clip, 0.1, 0.2), duration=1.0)
    with pytest.raises(ValueError, match="is missing"):
        speaker("seven", edit=Edit(tmp_path / "none.wav", 0.1, 0.2))
    with pytest.raises(ValueError, match="at least one sample"):
        speaker("seven", edit=Edit(clip, 0.1, 0.101))
    with pytest.raises(ValueError, match="got 1 of `edit` for 2 texts"):
        speaker(["seven", "one"], edit=[Edit(clip, 0.1, 0.2)])
    for wrong, kind in (((clip, 0.1, 0.2), "Audio"), (["clip.wav"], "str"), ({"start": 0.1}, "dict")):
        with pytest.raises(ValueError, match=rf"got a {kind} for an edit; give Edit\(clip, start, end\)"):
            speaker("seven", edit=wrong)  # type: ignore[arg-type]


# --- the best of several --------------------------------------------------------------------------------------------


def test_the_best_by_a_score(speaker: TextToSpeechPipeline) -> None:
    asked: list[tuple[float, str]] = []

    def loudness(audio: Audio, text: str) -> float:
        asked.append((float(np.square(audio.samples).mean()), text))
        return asked[-1][0]

    all_of_them = speaker(["seven", "nine"], num_audios=6, seed=0).audios
    loud = [float(np.square(audio).mean()) for audio in all_of_them]
    best = speaker(["seven", "nine"], num_audios=2, best_of=3, score=loudness, seed=0)
    wanted = [max(range(at, at + 3), key=loud.__getitem__) for at in (0, 3, 6, 9)]
    assert close(best.audios, [all_of_them[number] for number in wanted]) and len(best.tokens) == 4
    assert [text for _, text in asked] == ["seven"] * 6 + ["nine"] * 6
    assert best.texts == ["seven", "seven", "nine", "nine"]
    with pytest.raises(ValueError, match="best_of needs a score"):
        speaker("seven", best_of=2)


def test_the_best_edit_foresees_what_follows() -> None:
    speaker, clip = TextToSpeechPipeline(continuous()), sound(0.8)
    edit = Edit(clip, 0.2, 0.5)
    (parts,) = speaker.encode(["seven"], edit=[edit], probe=True)
    plan = parts[0].plan
    assert plan is not None and plan.probe == slice(25, 28), "a block after the span"
    assert plan.given.tolist() == [n < 10 or n >= 28 for n in range(40)]
    tokens = speaker.generate([parts], num_audios=5, seed=0)
    real = torch.tensor(clip.samples[50:56]).view(3, 2)
    distances = [float((items[0].content[25:28] - real).square().mean()) for items in tokens]
    best = int(np.argmin(distances))
    out = speaker("seven", edit=edit, best_of=5, seed=0)
    chosen = speaker.decode([tokens[best]], [parts])[0].samples
    assert close(out.audios, [chosen]) and np.array_equal(out.audios[0][50:], clip.samples[50:])
    assert len({round(d, 6) for d in distances}) == 5
    with pytest.raises(ValueError, match="nothing follows the span"):
        speaker("seven", edit=Edit(clip, 0.2, 0.8), best_of=2)


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["direct", "smooth", "far", "discrete", "codes"])
def test_a_stream_is_the_whole(kind: str) -> None:
    text = "One two three. Four five. Eight. Eight."
    model = {
        "direct": lambda: continuous(Direct()),
        "smooth": lambda: continuous(Smooth()),
        "far": lambda: continuous(Frames()),
        "discrete": discrete,
        "codes": codes,
    }[kind]()
    speaker = TextToSpeechPipeline(model)
    pieces = list(speaker.stream(text, seed=2, chunk=3, voice="theo"))
    whole = speaker(text, seed=2, voice="theo")
    joined = np.concatenate([piece.samples for piece in pieces])
    assert close([joined], whole.audios) and {piece.rate for piece in pieces} == {RATE}
    assert len(pieces) > len(whole.tokens[0]) > 1 or kind in ("far", "discrete", "codes")


@pytest.mark.parametrize("name", ["speech_vae", "speech_codec"])
def test_pieces_of_a_convolutional_decoder_join_without_a_seam(name: str) -> None:
    tokenizer: Any = plugins.load("tokenizers", name)
    tokenizer = tokenizer.tiny()
    rate = tokenizer.spec.sample_rate
    whole = tokenizer.encode(sound(3.0, rate=rate))
    kind = "codes" if whole.codes is not None else "latents"
    player = Player(tokenizer, lambda content: Encoded(grid=(len(content),), **{kind: content}), 5)  # type: ignore[arg-type]
    count = len(whole)
    played = [player.play(whole.content, final, final == count) for final in range(1, count + 1)]
    pieces = [piece.samples for piece in played if piece is not None]
    decoded = tokenizer.decode(whole).value.samples
    assert len(pieces) > 2
    assert np.abs(np.concatenate(pieces) - decoded).max() < 1e-5 * np.abs(decoded).max() + 1e-6


def test_a_stream_begins_before_the_end_and_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = TextToSpeechPipeline(continuous(Direct()))
    passes: list[int] = []
    held = threading.Event()
    forward = Engine._forward

    def counted(self: Engine, *arguments: Any) -> Tensor:
        passes.append(len(passes))
        if len(passes) > 40:  # the rest waits for the first piece to be heard
            assert held.wait(60)
        return forward(self, *arguments)

    monkeypatch.setattr(Engine, "_forward", counted)
    stream = speaker.stream("seven eight nine", duration=1.2, chunk=3, seed=0)
    first = next(stream)
    assert len(first.samples) == 3 * HOP and len(passes) <= 41
    before = threading.active_count()
    threading.Timer(0.05, held.set).start()
    stream.close()  # type: ignore[attr-defined]
    stopped = len(passes)
    assert stopped < 60, "a whole item takes hundreds of passes"
    assert threading.active_count() <= before and len(passes) == stopped
    assert list(stream) == []


def test_streams_refuse_before_they_begin(speaker: TextToSpeechPipeline) -> None:
    for options in ({"voice": "bob"}, {"duration": -1.0}, {"chunk": 0}, {"stretch": 0.0}, {"seed": -1}):
        with pytest.raises(ValueError):
            speaker.stream("seven", **options)  # type: ignore[arg-type]
    for text in ("", ["seven"], 3):
        with pytest.raises(ValueError, match="text"):
            speaker.stream(text)  # type: ignore[arg-type]


def test_what_goes_wrong_in_a_stream_is_raised(speaker: TextToSpeechPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Engine, "_forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(speaker.stream("seven", seed=0))


# --- speech to text -------------------------------------------------------------------------------------------------


class Stub(SpeechToTextPipeline):
    """Hears how long each piece is. Counts what it holds at a time."""

    most = 0

    def generate(self, prompts: Sequence[Sequence[Segment]], **_: Any) -> list[Encoded]:  # type: ignore[override]
        self.most = max(self.most, len(prompts))
        return [self.tokenizer(self.text).encode(str(len(prompt[0].content))) for prompt in prompts]


def listener(**settings: Any) -> SpeechToTextPipeline:
    return SpeechToTextPipeline(continuous(Frames(**settings)))


def test_texts_of_sounds(tmp_path: Path) -> None:
    reader = listener()
    clips = [sound(0.3, seed) for seed in range(3)]
    for number, clip in enumerate(clips):
        save_audio(tmp_path / f"{number}.wav", clip)
    paths = [tmp_path / f"{number}.wav" for number in range(3)]
    out = reader(paths, max_tokens=6, seed=0)
    assert len(out.texts) == len(out.tokens) == 3 and all(len(t) <= 6 for t in out.tokens)
    assert reader(str(paths[1]), max_tokens=6).texts == out.texts[1:2], "the likeliest, whatever the seed"
    assert reader(paths[2].read_bytes(), max_tokens=6).texts == out.texts[2:]
    reader.batch_size = 1
    assert reader(paths, max_tokens=6).texts == out.texts
    drawn = reader(clips, max_tokens=6, seed=1, temperature=1.0)
    assert drawn.texts == reader(clips, max_tokens=6, seed=1, temperature=1.0).texts != out.texts
    reader.batch_size = 2
    assert reader(clips, max_tokens=6, seed=1, temperature=1.0).texts == drawn.texts


def test_short_and_silent_sounds() -> None:
    reader = listener()
    assert len(reader(sound(0.01), max_tokens=4).texts) == 1
    assert reader(Audio(np.zeros(100, np.float32), RATE)).texts == [""]
    assert reader([Audio(np.zeros(5, np.float32), RATE), sound(0.1)], max_tokens=4).texts[0] == ""
    with pytest.raises(ValueError, match="no samples"):
        reader(Audio(np.zeros(0, np.float32), RATE))
    with pytest.raises(ValueError, match="is missing"):
        reader("none.wav")
    with pytest.raises(ValueError, match="text is generated without guidance"):
        reader(sound(0.1), guidance=2.0)
    with pytest.raises(ValueError, match="no modality of sound"):
        SpeechToTextPipeline(tiny())(sound(0.1))


def test_an_hour_is_read_piece_by_piece(tmp_path: Path) -> None:
    import soundfile

    rate, hour = 1000, 3600
    file = tmp_path / "hour.wav"
    with soundfile.SoundFile(file, "w", rate, 1, "PCM_16") as out:
        for number in range(hour // 60):
            out.write(sound(60, number, rate).samples)
    reader = Stub(
        tiny(Blocks(3, sampler={"steps": 2}), tokenizer=Frames(10, 100, rate), head=RegressionHead(), context=512),
        batch_size=16,
    )
    out_text = reader(file).texts[0]
    counts = [int(count) for count in out_text.split()]
    assert max(counts) <= 100 and sum(counts) >= hour * 100 and reader.most == 16
    assert len(counts) >= hour


def test_pieces_are_cut_at_quiet_places() -> None:
    samples = sound(4.0).samples.copy()
    for at in (70, 140, 210):
        samples[at : at + 12] *= 0.01
    chunks = [Audio(part, RATE) for part in np.split(samples, [33, 150, 151, 300])]
    pieces = list(cut_quietly(iter(chunks), 1.0))
    assert np.array_equal(np.concatenate([piece.samples for piece in pieces]), samples)
    assert max(len(piece.samples) for piece in pieces) <= 100
    ends = np.cumsum([len(piece.samples) for piece in pieces])
    assert 70 <= ends[0] <= 82 and 140 <= ends[1] <= 152 and 210 <= ends[2] <= 222
    assert list(cut_quietly(iter([]), 1.0)) == []
    assert [len(p.samples) for p in cut_quietly(iter([Audio(samples, RATE)]), 0.01)] == [1] * 400


def test_pieces_fit_the_context() -> None:
    reader = SpeechToTextPipeline(
        tiny(Blocks(3, sampler={"steps": 2}), tokenizer=Frames(), head=RegressionHead(), context=30)
    )
    assert reader.seconds < 0.5
    assert all(piece.seconds <= reader.seconds for piece in reader.pieces(sound(3.0)))
    assert isinstance(reader(sound(3.0), max_tokens=3).texts[0], str)
    with pytest.raises(ValueError, match="no room for a sound and its text"):
        SpeechToTextPipeline(
            tiny(Blocks(3, sampler={"steps": 2}), tokenizer=Frames(), head=RegressionHead(), context=5)
        )(sound(0.1))


def test_agreement() -> None:
    class Hears(SpeechToTextPipeline):
        def decode(self, tokens: Sequence[Encoded]) -> list[str]:
            return ["Seven"] * len(tokens)

    reader = Hears(continuous(Frames()))
    assert reader.agreement(sound(0.2), "seven") == 1.0
    assert reader.agreement(sound(0.2), "sevens") == pytest.approx(5 / 6)
    for a, b, wanted in (("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)):
        assert edit_distance(a, b) == edit_distance(b, a) == wanted


# --- documents, the command -----------------------------------------------------------------------------------------


def test_sounds_among_the_parts_of_documents(tmp_path: Path) -> None:
    pipeline = AnyToAnyPipeline(continuous(Frames()))
    clip = sound(0.3)
    save_audio(tmp_path / "clip.wav", clip)
    clip = load_audio(tmp_path / "clip.wav")
    out = pipeline(["say it again:", clip], to=[NAME], free=False, max_tokens=4, seed=0)
    assert len(out.audios) == 1 and out.audios[0].rate == RATE and out.images == []
    by_path = pipeline(["say it again:", tmp_path / "clip.wav"], to=[NAME], free=False, max_tokens=4, seed=0)
    assert close([by_path.audios[0].samples], [out.audios[0].samples])
    data = (tmp_path / "clip.wav").read_bytes()
    by_bytes = pipeline(["say it again:", data], to=[NAME], free=False, max_tokens=4, seed=0)
    assert close([by_bytes.audios[0].samples], [out.audios[0].samples])
    names = [place.name for place in out.save(tmp_path / "out")]
    assert names[0] == "01-01.wav" and load_audio(tmp_path / "out" / "01-01.wav").rate == RATE
    with pytest.raises(ValueError, match="no modality of sound"):
        AnyToAnyPipeline(tiny())([clip])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a saved model `m`, and a clip."""
    monkeypatch.chdir(tmp_path)
    TextToSpeechPipeline(continuous(Frames())).save_pretrained("m")
    save_audio("clip.wav", sound(0.8))
    yield tmp_path


def test_the_command_speaks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "seven", "--to", "speech", "--model", "m", "--seed", "1"]
    assert run_mm([*common, "--voice", "theo", "--duration", "0.8", "--out", "seven.wav"]) == 0
    said = capsys.readouterr()
    assert said.out == "wrote seven.wav (0.80 s)\n" and "1 sound in " in said.err and "seed 1" in said.err
    assert load_audio("seven.wav").seconds == pytest.approx(0.8)
    assert run_mm([*common, "--num", "2", "--stretch", "0.8"]) == 0
    assert capsys.readouterr().out.startswith("wrote seven-2-01.wav"), "no file is replaced"
    assert run_mm([*common, "--voice", "clip.wav", "--out", "like.flac"]) == 0 and Path("like.flac").is_file()
    assert run_mm([*common, "--from", "clip.wav", "--span", "0.2", "0.4", "--out", "new.wav"]) == 0
    new, old = load_audio("new.wav").samples, load_audio("clip.wav").samples
    assert np.array_equal(new[:20], old[:20]) and np.array_equal(new[40:], old[40:]) and not np.array_equal(new, old)
    assert run_mm([*common, "--from", "clip.wav", "--out", "after.wav"]) == 0 and Path("after.wav").is_file()


def test_the_command_listens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_audio("other.wav", sound(0.4, 7))
    common = ["generate", "--to", "text", "--model", "m", "--max-tokens", "5", "--seed", "0", "--from"]
    assert run_mm([*common, "clip.wav"]) == 0
    one = capsys.readouterr()
    assert "1 text in " in one.err
    assert run_mm([*common, "clip.wav", "other.wav"]) == 0
    assert capsys.readouterr().out.startswith(f"clip.wav: {one.out}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seven", "--to", "speech", "--voice", "bob"], "this model knows ann, theo"),
        (["seven", "--to", "speech", "--duration", "60"], "can't take 60 s; give a duration from 0.13 to 1.28 s"),
        (["--to", "speech"], "the prompt is empty; say what is to be spoken"),
        (["seven", "--to", "image"], "'m' makes text and speech, not 'image'"),
        (["seven", "--to", "text", "--voice", "ann"], "--voice goes with --to speech"),
        (["seven", "--to", "speech", "--span", "0", "1"], "--span goes with one sound in --from"),
        (["seven", "--to", "speech", "--out", "x.png"], "unknown ending '.png'; use one of .wav, .flac"),
        (["--to", "text", "--from", "clip.wav", "a.png"], "either pictures or sounds"),
        (["--to", "text", "--num", "2", "--from", "clip.wav"], "sounds are written down once"),
        (["--to", "text", "--from", "none.wav"], "'none.wav' is missing"),
        (
            ["seven", "--to", "speech", "--voice", "ann", "--from", "clip.wav"],
            "--voice, --duration and --stretch go with a prompt",
        ),
        (["seven", "--to", "speech", "--stretch", "2", "--from", "clip.wav"], "--voice, --duration and --stretch go"),
        (["seven", "--to", "speech", "--stretch", "nan"], "--stretch multiplies durations by 0.1 to 10, got nan"),
        (["seven", "--to", "speech", "--stretch", "2", "--duration", "1"], "leave it out beside --duration and --span"),
        (["seven", "--to", "text", "--stretch", "1"], "--stretch goes with --to speech"),
        (["seven", "--to", "speech", "--mask", "a.png"], "--mask goes with --to image and one picture"),
        (["seven", "--to", "speech", "--max-tokens", "5"], "--max-tokens goes with --to text"),
        (
            ["seven", "--to", "speech", "--model", "mm-pictures"],
            "'mm-pictures' makes text and image, not 'speech'; models that",
        ),
    ],
)
def test_what_the_command_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_mm(["generate", "--model", "m", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_events_say_how_much_is_final(speaker: TextToSpeechPipeline) -> None:
    events: list[Event] = []
    out = speaker("seven", duration=0.3, seed=0, callback=events.append)
    final = [event.final for event in events]
    assert final == sorted(final) and final[-1] == len(out.tokens[0][0])
    for one, other in itertools.pairwise(events):
        assert torch.equal(one.content[: one.final], other.content[: one.final])
    utterance = speaker.encode(["seven"])[0][0]
    assert isinstance(utterance, Utterance) and utterance.text == "seven"
