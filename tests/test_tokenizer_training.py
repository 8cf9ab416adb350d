"""Training of the picture tokenizer: data, losses, averages of weights, logs, resumption, the shipped configuration."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 1,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists.*"),
]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def png(number: int, side: int = 24) -> bytes:
    """A disc whose colour, place and size follow from the number."""
    picture = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    x, y = number * 5 % 9, number * 7 % 9
    colour = (number * 67 % 256, number * 131 % 256, number * 29 % 256, 255)
    ImageDraw.Draw(picture).ellipse((x, y, x + 10 + number % 4, y + 12), fill=colour)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards that share most of their concepts, and digits."""
    folder = tmp_path_factory.mktemp("data")
    for name, numbers in (("one", range(0, 36)), ("two", range(4, 40))):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in numbers:
                add(tar, f"{number:04d}.png", png(number))
                add(tar, f"{number:04d}.json", json.dumps({"caption": f"disc {number}"}).encode())
    images = np.zeros((20, 12, 12), dtype=np.uint8)
    images[:, 3:9, 5:7] = 255
    np.savez(folder / "digits.npz", images=images, labels=np.zeros(20, dtype=np.int64))
    return folder


def data(files: Path, **changes: Any) -> Any:
    from mm.data.images import ImageTensorDataModule, PictureSource

    sources = [
        PictureSource(path=str(files / "one.tar"), flip=True),
        PictureSource(path=str(files / "two.tar"), flip=True),
        PictureSource(path=str(files / "digits.npz"), invert=True, share=0.5),
    ]
    return ImageTensorDataModule(sources, **{"size": 16, "batch_size": 8, "holdout_every": 5, **changes})


def module(**changes: Any) -> Any:
    from mm.tokenizers.image_vq import ImageVQ
    from mm.training_tokenizer import TokenizerModule

    torch.manual_seed(0)
    tokenizer = changes.pop("tokenizer", None) or ImageVQ(
        size=16,
        patch=4,
        channels=16,
        multipliers=[1],
        codebook_size=16,
        code_dim=4,
        dead_below=changes.pop("dead", 0.3),
    )
    return TokenizerModule(tokenizer, **{"warmup": 2, "warm_start": 0, "learning_rate": 3e-3, **changes})


def fit(
    model: Any, source: Any, folder: Path, *, steps: int, ckpt: Any = None, callbacks: Any = (), **changes: Any
) -> Any:
    import lightning as L

    settings = {**QUIET, "logger": False, "enable_checkpointing": False, **changes}
    trainer = L.Trainer(max_steps=steps, default_root_dir=folder, callbacks=list(callbacks), **settings)
    trainer.fit(model, datamodule=source, ckpt_path=ckpt)
    return trainer


# ---- data ------------------------------------------------------------------------------------------------------------


def test_a_held_out_concept_is_held_out_of_every_shard(files: Path) -> None:
    source = data(files)
    source.setup()
    held = {0, 5, 10, 15, 20, 25, 30, 35}  # every fifth of the union 0…39
    expected = [n in held for n in [*range(36), *range(4, 40)]] + [n % 5 == 0 for n in range(20)]
    assert source.held_out_rows.tolist() == [row for row, out in enumerate(expected) if out]
    assert sorted(torch.cat(source.train_rows).tolist()) == [row for row, out in enumerate(expected) if not out]
    assert source.names == ["one", "two", "digits"]
    assert [len(rows) for rows in source.draw(0)] == [28, 29, 8], "half of the sixteen digits"
    assert source.draw(0)[2].tolist() != source.draw(1)[2].tolist()


def test_pictures_are_fitted_inverted_and_padded(files: Path) -> None:
    source = data(files)
    source.setup()
    assert source.pixels.shape == (92, 3, 16, 16) and source.pixels.dtype == torch.uint8
    assert (source.pixels[0, :, 15, 15] == 255).all(), "transparency over white"
    digit = source.pixels[-1]
    assert (digit[:, 0, 0] == 255).all() and (digit[:, 5, 7] == 0).all(), "ink on paper, the margin like the paper"
    batch = source.batch(torch.tensor([0, 91]), flips=None)
    assert batch.pixels.min() >= -1 and batch.pixels.max() == 1 and batch.source.tolist() == [0, 2]


def test_only_sources_that_allow_it_are_mirrored(files: Path) -> None:
    source = data(files)
    source.setup()
    rows = torch.tensor([1] * 64 + [91] * 64)
    source.pixels[91, :, :, :3] = 7  # a digit that is not symmetric
    plain = source.batch(rows, flips=None).pixels
    mirrored = source.batch(rows, flips=torch.Generator().manual_seed(0)).pixels
    same = (plain == mirrored).flatten(1).all(1)
    assert same[64:].all() and 16 < same[:64].sum() < 48
    assert torch.equal(mirrored[:64][~same[:64]], plain[:64][~same[:64]].flip(-1))


def test_batches_resume_where_they_stopped_and_ranks_share_them(files: Path) -> None:
    from mm.data.images import ShuffledBatches

    source = data(files)
    source.setup()
    whole = ShuffledBatches(source, 0, 1)
    epochs = [[batch.pixels for batch in whole] for _ in range(2)]
    assert len(epochs[0]) == len(whole) == 65 // 8
    assert not torch.equal(epochs[0][0], epochs[1][0])
    first = ShuffledBatches(source, 0, 1)
    taken = [next(iter(first)).pixels]
    again = ShuffledBatches(source, 0, 1)
    again.load_state_dict(first.state_dict())
    taken += [batch.pixels for batch in again] + [batch.pixels for batch in again]
    assert len(taken) == 16
    for a, b in zip(taken, [*epochs[0], *epochs[1]], strict=True):
        assert torch.equal(a, b)
    order = source.order(0)
    halves = [list(ShuffledBatches(source, rank, 2)) for rank in range(2)]
    assert [len(half) for half in halves] == [4, 4]
    for step in range(4):
        want = sorted(source.pixels[order[step * 16 : step * 16 + 16]].double().mean((1, 2, 3)).tolist())
        both = torch.cat([half[step].pixels for half in halves])
        have = sorted(((both.double() + 1) * 127.5).mean((1, 2, 3)).tolist())
        assert have == pytest.approx(want, abs=1e-3)


def test_broken_members_are_counted_or_raise(tmp_path: Path) -> None:
    from mm.data.images import PictureSource, read_pictures

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.png", png(1))
        add(tar, "b.png", png(2)[:60])
        add(tar, "c.jpg", b"not a picture")
        add(tar, "d.txt", b"a caption")
    source = PictureSource(path=str(tmp_path / "x.tar"))
    with pytest.warns(UserWarning, match="skipped 2 broken pictures, the first is 'b.png'"):
        keys, pixels = read_pictures(source, 16)
    assert keys == ["a"] and pixels.shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="member 'b.png'"):
        read_pictures(source, 16, strict=True)


def test_files_that_hold_no_pictures(tmp_path: Path) -> None:
    from mm.data.images import PictureSource, read_pictures

    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        add(tar, "d.txt", b"a caption")
    np.savez(tmp_path / "float.npz", images=np.zeros((2, 4, 4)))
    np.savez(tmp_path / "objects.npz", images=np.array([{"a": 1}], dtype=object))
    (tmp_path / "junk.npz").write_bytes(b"junk")
    (tmp_path / "junk.tar").write_bytes(b"junk" * 400)
    (tmp_path / "x.zip").write_bytes(b"")
    for name, message in [
        ("none.tar", "no picture file"),
        ("empty.tar", "holds no picture that can be read"),
        ("float.npz", "expected images .* of uint8, got float64"),
        ("objects.npz", "is not an .npz with a field 'images'"),
        ("junk.npz", "is not an .npz"),
        ("junk.tar", "is not a tar"),
        ("x.zip", "neither .tar nor .npz"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_pictures(PictureSource(path=str(tmp_path / name)), 16)


# ---- measures and losses ---------------------------------------------------------------------------------------------


def test_measures_on_known_values() -> None:
    from mm.reconstruction import gradient_loss, psnr, ssim_loss, usage_and_perplexity

    x = torch.full((2, 3, 8, 8), -1.0)
    y = x.clone()
    y[1] += 2 * 51 / 255  # an error of 51 of 255 everywhere: 20·log10(5)
    assert psnr(x, y).tolist() == pytest.approx([51.14, 13.979], abs=1e-2)
    counts = torch.tensor([[4, 4, 0, 0], [1, 1, 1, 1]])
    assert usage_and_perplexity(counts) == pytest.approx((0.75, 3.0))
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) / 8
    assert gradient_loss(ramp, ramp + 0.3) < 1e-6, "flat differences have no edges"
    assert gradient_loss(ramp, torch.zeros_like(ramp), scales=1) == pytest.approx(1 / 8)
    noise = torch.rand(1, 3, 16, 16) * 2 - 1
    other = torch.rand(1, 3, 16, 16) * 2 - 1  # not -noise: SSIM's two factors are then both negative
    assert ssim_loss(noise, noise) == pytest.approx(0, abs=1e-5) and ssim_loss(noise, other) > 0.5


def test_the_adversary_counts_as_much_as_the_rest() -> None:
    """Doubling the generator's loss leaves its weighted gradient where it was: as long as the other one."""
    from mm.reconstruction import adaptive_weight

    weight = torch.randn(5, requires_grad=True)
    one, other = (weight * torch.randn(5)).sum(), (weight * torch.randn(5)).sum()
    (target,) = torch.autograd.grad(one, weight, retain_graph=True)
    for scale in (1.0, 100.0):
        balance = adaptive_weight(one, scale * other, weight)
        (gradient,) = torch.autograd.grad(balance * scale * other, weight, retain_graph=True)
        assert gradient.norm() == pytest.approx(float(target.norm()), rel=1e-3)


def test_the_perceptual_distance_reads_its_weights_from_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torchvision.models import vgg16

    from mm.perceptual import VGGDistance

    features = {f"features.{name}": tensor for name, tensor in vgg16().features.state_dict().items()}
    save_file({**features, "classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg.safetensors")
    distance = VGGDistance(tmp_path / "vgg.safetensors")
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    far, near = torch.rand(2, 3, 16, 16), x.detach() + 0.01
    assert distance(x, x) == 0 < distance(x, near) < distance(x, far)
    distance(x, far).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert not list(distance.parameters()) and not distance.state_dict(), "nothing of it is trained or saved"
    assert distance.double()(x.double(), x.double()) == 0, "it follows the module it stands in"
    save_file({name: t for name, t in features.items() if "28" not in name}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="lacks"):
        VGGDistance(tmp_path / "part.safetensors")


# ---- averages of weights ---------------------------------------------------------------------------------------------


def test_the_average_follows_its_formula_in_float32() -> None:
    from mm.ema import EMA

    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    average = EMA(decay=0.9)
    expected = None
    for step, value in enumerate([1.0, 2.0, 4.0, 4.0, 4.0]):
        nn.init.constant_(layer.weight, value)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        average.update(layer)
        assert average.shadow["weight"].dtype == torch.float32
        assert average.shadow["weight"].item() == pytest.approx(expected, rel=1e-6)
    average.swap_in(layer)
    assert layer.weight.item() == pytest.approx(expected, rel=1e-2)
    average.swap_in(layer)  # a second time changes nothing
    average.swap_out(layer)
    assert layer.weight.item() == 4.0


def test_slow_averages_of_coarse_weights_still_move() -> None:
    """In bfloat16 a step of 1e-4 of the difference would be lost in rounding."""
    from mm.ema import EMA

    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    average = EMA(decay=0.9999)
    average.updates = 10**6
    average.update(layer)
    nn.init.constant_(layer.weight, 2.0)
    for _ in range(100):
        average.update(layer)
    assert average.shadow["weight"].item() == pytest.approx(2 - 0.9999**100, rel=1e-4)


def test_averages_of_another_model_are_refused(files: Path, tmp_path: Path) -> None:
    from mm.ema import EMA

    average = EMA()
    average.load_state_dict({"updates": 3, "shadow": {"tokenizer.x": torch.zeros(2)}})
    with pytest.raises(ValueError, match="averaged weights do not fit the model"):
        fit(module(), data(files), tmp_path, steps=1, callbacks=[average])
    with pytest.raises(ValueError, match="decay must be in"):
        EMA(decay=1.0)


# ---- training --------------------------------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def test_the_loss_falls_and_what_matters_is_logged(files: Path, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mm.ema import EMA
    from mm.tokenizers.image_vq import ImageVQ

    model = module(save_to=str(tmp_path / "saved"), learning_rate=1e-2)
    average = EMA(decay=0.9)
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path / "board")]
    fit(model, data(files), tmp_path, steps=40, callbacks=[average], logger=loggers, val_check_interval=20)
    table = rows(tmp_path)
    losses = [float(row["train/loss"]) for row in table if row["train/loss"]]
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    checks = [row for row in table if row["val/psnr"]]
    assert [int(row["step"]) for row in checks] == [19, 39]
    assert float(checks[1]["val/psnr"]) > float(checks[0]["val/psnr"]) > 5
    for row in checks:
        figures = {name: float(row[name]) for name in row if row[name] and name.startswith(("val/", "train/"))}
        for part in ("val", "train"):
            assert 0 < figures[f"{part}/usage"] <= 1 <= figures[f"{part}/perplexity"] <= 16
        one, two, digits = (figures[f"val/psnr/{name}"] for name in ("one", "two", "digits"))
        assert figures["val/psnr"] == pytest.approx((8 * one + 7 * two + 4 * digits) / 19, abs=1e-3)
        assert -1 <= figures["val/ssim"] <= 1
    board = EventAccumulator(str(next((tmp_path / "board").rglob("events.*")).parent))
    board.Reload()
    assert [event.step for event in board.Images("pictures")] == [20, 40]
    saved = ImageVQ.from_directory(tmp_path / "saved")
    for name, tensor in saved.named_parameters():
        assert torch.equal(tensor, average.shadow[f"tokenizer.{name}"]), "the averaged weights are saved"
    assert any(not torch.equal(t, average.shadow[f"tokenizer.{n}"]) for n, t in model.tokenizer.named_parameters())


def test_training_goes_on_exactly_where_it_stopped(files: Path, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, with dead codes being replaced: bit-equal weights, codebook and averages."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from mm.ema import EMA

    def keeper(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(folder, every_n_train_steps=11, save_top_k=-1, filename="{step}")

    def state(model: Any, average: EMA) -> dict[str, torch.Tensor]:
        return {**model.state_dict(), **{f"ema.{n}": t for n, t in average.shadow.items()}}

    settings: dict[str, Any] = {"val_check_interval": 1000, "enable_checkpointing": True}
    straight, whole = module(dead=2.0), EMA(decay=0.9)
    fit(straight, data(files), tmp_path, steps=18, callbacks=[whole, keeper(tmp_path / "a")], **settings)
    checkpoint = tmp_path / "a" / "step=11.ckpt"
    assert checkpoint.is_file()
    torch.rand(100)  # the generator is elsewhere by now
    resumed, average = module(dead=2.0, learning_rate=3e-3), EMA(decay=0.9)
    torch.manual_seed(99)
    fit(resumed, data(files), tmp_path, steps=18, ckpt=checkpoint, callbacks=[average], val_check_interval=1000)
    want, have = state(straight, whole), state(resumed, average)
    assert want.keys() == have.keys() and len(want) > 30
    for name in want:
        assert torch.equal(want[name], have[name]), name


def test_a_frozen_part_stays_and_ids_keep_their_meaning(files: Path, tmp_path: Path) -> None:
    trained = module()
    fit(trained, data(files), tmp_path, steps=8)
    tokenizer = trained.tokenizer.eval()
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    source = data(files)
    source.setup()
    pictures = source.batch(torch.arange(30), flips=None).pixels
    ids = tokenizer.encode_pixels(pictures)
    fit(module(tokenizer=tokenizer, frozen=["encoder", "quantizer"]), data(files), tmp_path, steps=8)
    changed = {
        name.split(".")[0] for name, tensor in tokenizer.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"decoder"}
    assert torch.equal(tokenizer.encode_pixels(pictures), ids)
    with pytest.raises(
        ValueError, match="frozen names \\['coder'\\], the tokenizer has the parts \\['decoder', 'encoder'"
    ):
        module(frozen=["coder"])


def test_a_loaded_tokenizer_is_trained_codebook_and_all(files: Path, tmp_path: Path) -> None:
    from mm.tokenizers.image_vq import ImageVQ

    first = module()
    fit(first, data(files), tmp_path, steps=2)
    first.tokenizer.save(tmp_path / "saved")
    again = ImageVQ.from_directory(tmp_path / "saved")
    book = again.quantizer.codebooks()[0].embed.clone()
    fit(module(tokenizer=again), data(files), tmp_path, steps=2)
    assert not torch.equal(again.quantizer.codebooks()[0].embed, book)


def test_the_adversary_begins_when_it_should(files: Path, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    model = module(adversarial=0.5, adversarial_start=3)
    judge = {name: tensor.clone() for name, tensor in model.discriminator.state_dict().items()}
    fit(model, data(files), tmp_path, steps=3)
    assert all(torch.equal(tensor, judge[name]) for name, tensor in model.discriminator.state_dict().items())
    model = module(adversarial=0.5, adversarial_start=3)
    trainer = fit(model, data(files), tmp_path, steps=11, logger=CSVLogger(tmp_path))
    # three steps alone, then four of both optimisers
    assert trainer.global_step == 11 and model.batches_done == 7 and model._steps() == [7, 4]
    assert sum(bool(row["train/discriminator"]) for row in rows(tmp_path)) == 4
    assert any(not torch.equal(tensor, judge[name]) for name, tensor in model.discriminator.state_dict().items())
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([3e-5] * 4), "both schedules have come to their end"


def test_the_learning_rate_warms_up_and_falls() -> None:
    from mm.optimization import warmup_cosine

    rates = [warmup_cosine(step, warmup=10, total=110, floor=0.1) for step in range(111)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == 1 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize("settings", [{"l1": -1.0}, {"l1": 0.0, "l2": 0.0}, {"perceptual": 1.0}])
def test_losses_that_make_no_sense(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="loss"):
        module(**settings)


def test_the_shipped_configuration_trains(files: Path, tmp_path: Path) -> None:
    """The real command on the real YAML; the data are ours and the steps few."""
    from mm.commands.train import main
    from mm.tokenizers.image_vq import ImageVQ

    config = Path(__file__).parents[1] / "configs" / "tokenizers" / "emoji_vq.yaml"
    sources = [{"path": str(files / f"{name}.tar"), "flip": True} for name in ("one", "two")]
    arguments = ["fit", "-c", str(config), f"--data.init_args.sources={json.dumps(sources)}"]
    arguments += ["--data.init_args.batch_size=4", "--trainer.max_steps=3", "--trainer.val_check_interval=3"]
    arguments += [f"--trainer.default_root_dir={tmp_path}", f"--model.init_args.save_to={tmp_path / 'saved'}"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    arguments += [f"--trainer.callbacks.dirpath={tmp_path / 'checkpoints'}", "--model.init_args.warm_start=64"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(arguments) == 0
    tokenizer = ImageVQ.from_directory(tmp_path / "saved")
    assert tokenizer.spec.max_grid == (8, 8) and tokenizer.spec.vocab_size == 1024
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_prediction_writes_a_row_a_picture(files: Path, tmp_path: Path) -> None:
    import json

    import lightning as L

    model, source = module(), data(files)
    L.Trainer(default_root_dir=tmp_path, logger=False, **QUIET).predict(model, datamodule=source)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows].count("digits") == 4 and len(rows) == len(source.held_out_rows)
    picture = source.batch(source.held_out_rows[:1], flips=None).pixels
    with torch.no_grad():
        made = model.tokenizer.eval().reconstruct(picture)
    assert rows[0]["ids"] == made.ids.flatten().tolist()
    a, b = (((t.clamp(-1, 1) + 1) * 127.5).round() for t in (made.output, picture))
    assert rows[0]["psnr"] == pytest.approx(float(10 * torch.log10(255**2 / (a - b).square().mean())), rel=1e-4)


@pytest.mark.parametrize("normalizer", ["channel", "robust", "token"])
def test_a_tokenizer_of_vectors_learns_and_is_saved_with_its_statistics(
    normalizer: Any, files: Path, tmp_path: Path
) -> None:
    """With averages of weights on: the statistics are those of the averaged encoder that is saved."""
    from mm.ema import EMA
    from mm.tokenizers.image_vae import ImageVAE

    torch.manual_seed(0)
    tokenizer = ImageVAE(size=16, patch=4, channels=16, multipliers=[1], latent=6, normalizer=normalizer)
    model = module(tokenizer=tokenizer, save_to=str(tmp_path / "saved"), warm_start=64)
    source = data(files)
    start = fit_and_measure(model, source, tmp_path, steps=1)
    model = module(tokenizer=tokenizer, save_to=str(tmp_path / "saved"), warm_start=0)
    end = fit_and_measure(model, source, tmp_path, steps=40, callbacks=[EMA(decay=0.5)])
    assert end > start + 1, (start, end)
    saved = ImageVAE.from_directory(tmp_path / "saved")
    pictures = torch.cat([x for x, _ in source.held_in_batches()])
    with torch.no_grad():
        rows = saved.tokens(pictures)[1].flatten(0, 1)
    centre = rows.median(0).values if normalizer == "robust" else rows.mean(0 if normalizer == "channel" else 1)
    assert float(centre.abs().max()) < 0.02
    if normalizer == "channel":
        assert torch.allclose(rows.std(0), torch.ones(6), atol=1e-2)
    written = saved.decode_batch(saved.encode_batch(list(pictures)))
    assert all(decoded.valid for decoded in written)


def fit_and_measure(model: Any, source: Any, folder: Path, **settings: Any) -> float:
    """PSNR on held-out pictures after training."""
    return float(fit(model, source, folder, val_check_interval=1, **settings).callback_metrics["val/psnr"])


def test_features_of_a_codebook_get_a_decoder_of_their_own(files: Path, tmp_path: Path) -> None:
    """Orthus: the encoder stays, the decoder learns to read what was not quantised."""
    from mm.tokenizers.image_softvq import ImageSoftVQ

    trained = module()
    fit(trained, data(files), tmp_path, steps=8)
    tokenizer = ImageSoftVQ(trained.tokenizer.eval())
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    model = module(tokenizer=tokenizer, frozen=["encoder"], save_to=str(tmp_path / "saved"))
    fit(model, data(files), tmp_path, steps=8, val_check_interval=4)
    saved = ImageSoftVQ.from_directory(tmp_path / "saved")
    changed = {n.split(".")[0] for n, value in saved.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"decoder", "normalizer"} and saved.origin == trained.tokenizer.fingerprint
