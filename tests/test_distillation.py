"""Distillation to one evaluation a block: what learns from what, the teacher's answers, the student that comes out.

The teacher knows sequences of three vectors in the plane, which all lie near (1, −1) or all near (−1, 1): two modes, and a
context that tells which.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from mm.adopt import fingerprint
from mm.backbone import BackboneConfig
from mm.data.example import Source
from mm.diffusion import Plan
from mm.distillation import Distillation, NoisyBlocks, Pairs
from mm.ema import EMA
from mm.export import SavePretrained
from mm.generation import Engine, Request
from mm.heads.lm import LMHead
from mm.heads.regression import RegressionHead
from mm.hub import load_pretrained, save_pretrained
from mm.interfaces import Encoded, Modality, Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.blocks import Blocks
from mm.orders.raster import Raster
from mm.stream import TokenStream, pack
from mm.testing import Frames
from mm.tokenizers.text_bytes import TextBytes

COUNT, STEPS = 3, 8
COSINE = {"schedule": "cosine", "prediction": "v"}
BACKBONE = BackboneConfig(width=48, layers=2, heads=2, adaln=True, qk_norm=True)


def modalities(**order: Any) -> list[Modality]:
    blocks = Blocks(**{"block": 1, "sampler": {"steps": STEPS}, "time_condition": False, **order})
    return [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="speech", tokenizer=Frames(), head=RegressionHead(), order=blocks),
    ]


def draw(count: int, rng: torch.Generator) -> Tensor:
    side = torch.where(torch.rand(count, 1, 1, generator=rng) < 0.5, -1.0, 1.0) * torch.tensor([1.0, -1.0])
    return side + 0.15 * torch.randn(count, COUNT, 2, generator=rng)


def document(vectors: Tensor) -> list[Segment]:
    return [Segment("text", "a", loss=False), Segment("speech", Encoded(grid=(len(vectors),), latents=vectors))]


def batches(model: MultimodalModel, count: int, size: int = 24, seed: int = 0) -> list[TokenStream]:
    rng = torch.Generator().manual_seed(seed)
    return [pack([model.build_document(document(v), rng) for v in draw(size, rng)]) for _ in range(count)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint trained for 300 steps."""
    torch.manual_seed(0)
    model, steps = MultimodalModel(BACKBONE, modalities()), 300
    optimizer = torch.optim.AdamW(model.parameters())
    for step, batch in zip(range(steps), itertools.cycle(batches(model, 60)), strict=False):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        model.loss(batch).total.backward()
        optimizer.step()
    return save_pretrained(model, tmp_path_factory.mktemp("teacher") / "model")


def distillation(teacher: Path, **settings: Any) -> Distillation:
    given = settings.pop("modalities", None) or modalities()
    return Distillation(
        **{
            "teacher": str(teacher),
            "backbone": BACKBONE,
            "modalities": given,
            "lr": 2e-3,
            "warmup_steps": 10,
            **settings,
        }
    )


class Cycle(torch.utils.data.IterableDataset[TokenStream]):
    def __init__(self, streams: Sequence[TokenStream]) -> None:
        self.streams = streams

    def __iter__(self) -> Iterator[TokenStream]:
        return itertools.cycle(self.streams)


def fit(
    module: Distillation, streams: Sequence[TokenStream], steps: int, resume: Path | None = None, **settings: Any
) -> pl.Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        **{"enable_checkpointing": False, **quiet, **settings},
    )
    loader: Any = torch.utils.data.DataLoader(Cycle(streams), batch_size=None)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return trainer


def sample(model: MultimodalModel, count: int, steps: int = 0) -> Tensor:
    requests = [
        Request(
            prompt=document(torch.zeros(1, 2))[:1],
            items=[("speech", (COUNT,))],
            text=False,
            seed=seed,
            sampling=Sampling(denoising_steps=steps),
        )
        for seed in range(count)
    ]
    return torch.stack([row[0].content.latents for row in Engine(model).generate(requests)])


def energy(a: Tensor, b: Tensor) -> float:
    """Energy distance of two samples (Székely and Rizzo 2013)."""
    a, b = a.flatten(1), b.flatten(1)
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


# --- the student ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distances(teacher: Path) -> tuple[Tensor, float]:
    """A sample of the truth, and how far from it the teacher's one step is."""
    truth, before = draw(256, torch.Generator().manual_seed(9)), load_pretrained(teacher)
    one, many = (energy(sample(before, 256, steps), truth) for steps in (1, STEPS))
    assert many < 0.1 < 0.4 < one, "the teacher knows its data, but not in one step"
    return truth, one


@pytest.mark.parametrize(
    "settings", [{"fake_steps": 3}, {"betas_ode": (0.0, 0.0), "fake_steps": 2, "lr": 1e-3}], ids=str
)
def test_one_step_is_far_better_than_the_teachers_one_step(
    teacher: Path, distances: tuple[Tensor, float], settings: dict[str, Any]
) -> None:
    """With both losses, and with the difference of velocities alone."""
    torch.manual_seed(1)
    module = distillation(teacher, pairs=8, **settings)
    fit(module, batches(module.model, 60, seed=1), 300)
    truth, one = distances
    student = sample(module.model.eval(), 256)
    assert energy(student, truth) < 0.25 * one
    sides = (student[..., 0] - student[..., 1]).sign()
    same = (sides == sides[:, :1]).all(1)
    assert float(same.float().mean()) > 0.9, "later blocks know which mode the first one is in"
    assert 0.2 < float((sides[:, 0] > 0).float().mean()) < 0.8, "both modes are kept"


def test_a_block_takes_one_evaluation_and_the_clean_pass(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    forward = MultimodalModel.forward

    def counting(self: MultimodalModel, *args: Any, **kwargs: Any) -> Tensor:
        passes.append(len(args[0]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MultimodalModel, "forward", counting)
    taken = {}
    for name, model in (("teacher", load_pretrained(teacher)), ("student", distillation(teacher).model)):
        passes.clear()
        sample(model, 1)
        taken[name] = len(passes)
    # the text, then a block's evaluations and its clean pass; nothing follows the last block
    assert taken == {"teacher": 1 + COUNT * (STEPS + 1) - 1, "student": 1 + COUNT * 2 - 1}


def test_it_is_saved_as_an_ordinary_model_of_one_step(teacher: Path, tmp_path: Path) -> None:
    module = distillation(teacher)
    fit(module, batches(module.model, 2), 3, callbacks=[EMA(0.5), SavePretrained(str(tmp_path / "student"))])
    made = load_pretrained(tmp_path / "student")
    kept = made.modalities[1].order
    assert isinstance(kept, Blocks) and kept.sampler.steps == 1 and kept.block == 1
    weights = dict(module.model.named_parameters())
    differ = [name for name, value in made.named_parameters() if not torch.equal(value, weights[name])]
    assert differ, "averaged weights are saved"
    assert sample(made, 2).isfinite().all()


# --- what learns from what --------------------------------------------------------------------------------------------


def randomised(teacher: Path, **settings: Any) -> tuple[Distillation, NoisyBlocks]:
    """A distillation whose three networks differ, and a batch."""
    torch.manual_seed(3)
    module = distillation(teacher, **settings)
    with torch.no_grad():
        for network in (module.model, module.fake, module.teacher):
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return module, NoisyBlocks(batches(module.model, 1, size=3)[0], module.modality)


def learning(module: Distillation) -> set[str]:
    """The networks that have a gradient now."""
    networks = {"student": module.model, "fake": module.fake, "teacher": module.teacher}
    found = {
        name for name, net in networks.items() if any(p.grad is not None and p.grad.any() for p in net.parameters())
    }
    module.zero_grad()
    return found


def test_gradients_reach_the_right_network_only(teacher: Path) -> None:
    module, blocks = randomised(teacher)
    noise = torch.randn(len(blocks), 2)
    x, _ = module.made(blocks, noise)
    module.fake_loss(blocks, x.detach()).backward()
    assert learning(module) == {"fake"}
    module.distribution_loss(blocks, x).backward(retain_graph=True)
    assert learning(module) == {"student"}
    module.pairs_loss(blocks, noise, x).backward()
    assert learning(module) == {"student"}
    module.pool[0].answer.zero_()
    module.most_pairs = 1
    module.pairs_loss(blocks, noise, module.made(blocks, noise)[0]).backward()
    assert learning(module) == {"student"} and len(module.pool) == 1


def test_the_gradient_is_the_difference_of_velocities(teacher: Path) -> None:
    module, blocks = randomised(teacher)
    x = torch.randn(len(blocks), 2, requires_grad=True)
    torch.manual_seed(4)
    module.distribution_loss(blocks, x).backward()
    torch.manual_seed(4)
    with torch.no_grad():
        noise, time = torch.randn_like(x), blocks.draw_time(module.process)
        mixed = (1 - time)[:, None] * x + time[:, None] * noise
        real, fake = (blocks.velocity(net, mixed, time)[0] for net in (module.teacher, module.fake))
    assert x.grad is not None and torch.allclose(x.grad, 2 * (real - fake) / x.numel(), atol=1e-6)
    assert len(set(time.tolist())) == blocks.count == len(blocks), "each block has a time of its own"


def test_the_teacher_stays_and_the_others_move(teacher: Path) -> None:
    module = distillation(teacher, fake_steps=2)
    before = {
        name: fingerprint(net)
        for name, net in (("student", module.model), ("fake", module.fake), ("teacher", module.teacher))
    }
    assert len(set(before.values())) == 1
    fit(module, batches(module.model, 2), 1)
    student = fingerprint(module.model)
    assert student != before["student"] and fingerprint(module.fake) != before["fake"]
    assert fingerprint(module.teacher) == before["teacher"]
    assert not any(name.startswith("teacher") for name in module.state_dict())


@pytest.mark.parametrize("told", ["a vector beside", "adaln"])
def test_noisy_blocks_read_what_training_reads(told: str) -> None:
    """With the contents and times that the layout drew, also where sounds are filled in and others are given."""
    torch.manual_seed(0)
    config = BackboneConfig(width=32, layers=2, heads=2, adaln=told == "adaln")
    made = modalities(block=2, infill=0.5, along=True, time_condition=told != "adaln")
    model = MultimodalModel(config, made).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # AdaLN and conditions start at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    rng = torch.Generator().manual_seed(0)
    clip = Segment("speech", Encoded(grid=(4,), latents=torch.randn(4, 2)), loss=False)
    stream = pack([model.build_document([clip, *document(torch.randn(n, 2))], rng) for n in (7, 1, 5, 6)])
    blocks, noise = NoisyBlocks(stream, "speech"), model.draw_noise(stream)
    record = stream.latents["speech"]
    rows, time = blocks.rows, stream.time[blocks.places]
    assert torch.equal(time > 0, torch.ones_like(time).bool()) and int((stream.time > 0).sum()) == len(blocks)
    mixed = model.modalities[1].order.process.corrupt(record.values[rows], noise["speech"][rows], time)  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.allclose(blocks.velocity(model, mixed, time)[1], model(stream, noise=noise), atol=1e-5)
    places = (stream.document[blocks.places].tolist(), stream.order[blocks.places].tolist())
    assert blocks.count == len(set(zip(*places, strict=True)))
    drawn = blocks.draw_time(model.modalities[1].order.process)  # type: ignore[attr-defined]
    for number in range(blocks.count):
        assert len(set(drawn[blocks.block == number].tolist())) == 1
        assert len(set(time[blocks.block == number].tolist())) == 1
    assert len(set(drawn.tolist())) == blocks.count < len(blocks)


# --- the teacher's answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(COUNT))
def test_all_blocks_at_once_are_what_generation_makes_of_each(
    teacher: Path, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer of a block is what the engine draws from the same noise after the true blocks before it."""
    module, _ = randomised(teacher, modalities=modalities(shift=False))
    truth = draw(1, torch.Generator().manual_seed(5))[0]
    stream = module.teacher.build_document(document(truth), torch.Generator())
    blocks, noise = NoisyBlocks(stream, "speech"), torch.randn(COUNT, 2)
    answers = module.answers(blocks, noise)
    given = torch.arange(COUNT) < first
    unused = iter(noise[first:])
    monkeypatch.setattr(Plan, "noise", lambda *_: next(unused)[None, None])
    request = Request(prompt=document(truth)[:1], items=[("speech", (COUNT,))], text=False, known=(truth, given))
    ((made,),) = Engine(module.teacher).generate([request])
    assert torch.allclose(made.content.latents[first], answers[first], atol=1e-5)


def test_pairs_are_made_once_and_bounded(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = distillation(teacher, pairs=2)
    asked: list[int] = []
    answers = Distillation.answers

    def counting(self: Distillation, *args: Any) -> Tensor:
        asked.append(1)
        return answers(self, *args)

    monkeypatch.setattr(Distillation, "answers", counting)
    fit(module, batches(module.model, 6), 6)
    assert len(module.pool) == len(asked) == 2
    kept = module.pool[0]
    blocks = NoisyBlocks(kept.stream, "speech")
    assert torch.allclose(kept.answer, module.answers(blocks, kept.noise), atol=1e-5)
    again = Pairs.from_dict(kept.to_dict())
    assert torch.equal(again.stream.order, kept.stream.order) and torch.equal(again.answer, kept.answer)


def test_weight_of_the_pairs_changes_late(teacher: Path) -> None:
    module = distillation(teacher, betas_ode=(2.0, 0.5), late=0.5)
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(module.beta)

    fit(module, batches(module.model, 2), 4, callbacks=[Watch()])
    assert seen == [2.0, 2.0, 0.5, 0.5]


# --- resuming, refusals -----------------------------------------------------------------------------------------------


def test_resumed_is_as_never_interrupted(teacher: Path, tmp_path: Path) -> None:
    streams = batches(distillation(teacher).model, 1)

    def run(steps: int, resume: Path | None = None) -> Distillation:
        torch.manual_seed(6)
        module = distillation(teacher, pairs=2, fake_steps=2)
        # a schedule of eight steps, however many are made
        trainer = fit(
            module, streams, 8, resume, callbacks=[Stop(steps)], enable_checkpointing=True, default_root_dir=tmp_path
        )
        if not resume:
            trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    whole, half = run(8), run(4)
    assert len(half.pool) == 2
    resumed = run(8, tmp_path / "4.ckpt")
    assert fingerprint(half.model) != fingerprint(whole.model) == fingerprint(resumed.model)
    assert fingerprint(whole.fake) == fingerprint(resumed.fake)
    other = load_pretrained(teacher)
    other.mask.weight.data += 1
    changed = distillation(save_pretrained(other, tmp_path / "other"))
    with pytest.raises(ValueError, match="begun with another teacher"):
        fit(changed, streams, 8, tmp_path / "4.ckpt")


class Stop(pl.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def test_batches_without_sound_teach_text(teacher: Path) -> None:
    module = distillation(teacher)
    text = pack([module.model.build_document([Segment("text", "only words")], torch.Generator())])
    before = fingerprint(module.fake)
    trainer = fit(module, [text], 1)
    assert set(trainer.callback_metrics) == {"train/text", "train/positions"} and fingerprint(module.fake) == before


def test_batches_without_sound_can_be_validated(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any vector, and with given ones only."""
    module, seen = distillation(teacher), dict[str, Tensor]()
    monkeypatch.setattr(module, "log", lambda name, value, **_: seen.update({name: value}))
    given = Segment("speech", Encoded(grid=(2,), latents=torch.ones(2, 2)), loss=False)
    for document in ([Segment("text", "only words")], [given, Segment("text", "words")]):
        seen.clear()
        batch = pack([module.model.build_document(document, torch.Generator())])
        total = module._step(batch, "val")
        assert set(seen) == {"val/text"} and torch.equal(total, seen["val/text"])


def test_another_denoised_modality_learns_as_ever(tmp_path: Path) -> None:
    """The loss of what isn't distilled is the one of ordinary training, noise and all."""

    def two() -> list[Modality]:
        notes = Modality(name="notes", tokenizer=Frames(), head=RegressionHead(), order=Blocks(1, time_condition=False))
        return [*modalities(), notes]

    torch.manual_seed(0)
    model = MultimodalModel(BACKBONE, two())
    with torch.no_grad():
        for parameter in model.parameters():  # AdaLN starts at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    saved = save_pretrained(model, tmp_path / "two")
    with pytest.raises(ValueError, match="name one of these"):
        distillation(saved, modalities=two())
    module = distillation(saved, modalities=two(), modality="speech")
    vectors = draw(1, torch.Generator().manual_seed(2))[0]
    notes = Segment("notes", Encoded(grid=(COUNT,), latents=vectors.flip(0)))
    stream = pack([module.model.build_document([*document(vectors), notes], torch.Generator().manual_seed(0))])
    torch.manual_seed(5)
    others = module._noise_of_others(stream)
    assert set(others) == {"notes"}
    blocks = NoisyBlocks(stream, "speech")
    hidden = module.made(blocks, torch.randn(len(blocks), 2), others)[1]
    found = dict(module._others(stream, hidden, others))
    noise = others | {"speech": torch.randn_like(stream.latents["speech"].values)}
    wanted = {
        name: losses.mean() for name, _, losses in module.model.losses(stream, module.model(stream, noise=noise), noise)
    }
    assert set(found) == {"text", "notes"} and torch.allclose(found["notes"], wanted["notes"], atol=1e-5)
    without = dict(module._others(stream, module.made(blocks, torch.randn(len(blocks), 2))[1], {}))
    assert not torch.allclose(without["notes"], wanted["notes"], atol=1e-2), "the noise has a say"
    fit(module, [stream], 2)


class NoClips(Source):
    identity, what = "none", "no clips"

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 0

    def _fields(self, ordinal: int) -> dict[str, Any]:
        raise IndexError


class Named:
    """A data module whose training documents name voices."""

    def __init__(self, names: Sequence[str]) -> None:
        self.parts = {"train": [SimpleNamespace(source=NoClips(), template=self)]}
        self.names = set(names)

    def voices(self, source: Any) -> set[str]:
        return self.names


@pytest.mark.parametrize("name", ["", "a" * 1000, "two\nlines"])
def test_voices_that_cannot_be_saved_are_found_before_training(teacher: Path, name: str) -> None:
    """And others are told by the student that comes out."""
    module = distillation(teacher)
    module._trainer = SimpleNamespace(datamodule=Named(["theo"]), world_size=1)  # type: ignore[assignment]
    module.on_fit_start()
    assert module.model.voices == ("theo",)
    module._trainer.datamodule = Named([name])  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="the training data has voices that are no list"):
        module.on_fit_start()


def test_what_cannot_work_is_refused(teacher: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"betas_ode": (-1.0, 0.0)}, "weights of the losses"),
        ({"betas_ode": (0.0, 0.0), "distribution": 0.0}, "one of them above"),
        ({"late": 1.5}, "share of the training"),
        ({"pairs": 0}, "at least 1"),
        ({"modality": "text"}, "name one of these"),
        ({"modalities": modalities(process=COSINE, sampler={"solver": "ddim"})}, "flow and flow"),
        ({"modalities": modalities(process={"shift": 2.0})}, "trained with process"),
        ({"modalities": modalities(block=2)}, "trained with block 1, here it is 2"),
        ({"modalities": modalities(along=True)}, "trained with along False"),
        ({"modalities": modalities(augment=0.1)}, "follow what is without noise"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            distillation(teacher, **settings)
    noisy = load_pretrained(teacher)
    noisy.modalities[1].order = Blocks(1, time_condition=False, sampler={"solver": "sde"})
    with pytest.raises(ValueError, match="adds noise on the way"):
        distillation(save_pretrained(noisy, tmp_path / "sde"))
