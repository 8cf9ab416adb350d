"""The tokenizer of a vision transformer and a causal one: causality, prefixes, saving, frozen encoders, what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

SMALL: dict[str, Any] = {
    "size": 16, "embeddings": 6, "latent": 8, "encoder_width": 16, "encoder_depth": 1, "encoder_heads": 2, "encoder_patch": 4,
    "width": 16, "depth": 2, "heads": 2, "decoder_depth": 1, "decoder_patch": 4,
}  # fmt: skip


def make(**changes: Any) -> Any:
    from mm.tokenizers.image_vit import ImageViT

    return ImageViT(**{**SMALL, **changes})


def pictures(count: int = 4, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side) * 2 - 1


def encoder_file(path: Path, **extra: torch.Tensor) -> Path:
    """Random weights of the small encoder, as timm would save them."""
    torch.manual_seed(5)
    save_file({**make().encoder.state_dict(), **extra}, path)
    return path


# ---- causality -------------------------------------------------------------------------------------------------------


def test_an_embedding_depends_on_the_queries_up_to_its_own_and_no_other() -> None:
    tokenizer = make().eval()
    x = pictures(2)
    queries = tokenizer.resampler.queries
    count = len(queries)
    depends = torch.zeros(count, count, dtype=torch.bool)
    for k in range(count):
        (gradient,) = torch.autograd.grad(tokenizer.embeddings(x)[:, k].square().sum(), queries)
        depends[k] = gradient.abs().sum(-1) > 0
    assert torch.equal(depends, torch.ones(count, count).tril().bool())


def test_every_embedding_sees_the_whole_picture() -> None:
    tokenizer = make().eval()
    x = pictures(1).requires_grad_()
    for k in range(SMALL["embeddings"]):
        (gradient,) = torch.autograd.grad(tokenizer.embeddings(x)[:, k].square().sum(), x)
        assert (gradient.abs().sum(1) > 0).all(), "of every pixel"


def test_shorter_is_a_prefix() -> None:
    """With the same weights a tokenizer of fewer embeddings gives the first of them."""
    whole = make().eval()
    short = make(embeddings=3).eval()
    state = whole.state_dict()
    for name in ("resampler.queries", "decoder.positions"):
        state[name] = state[name][:3]
    short.load_state_dict(state)
    x = pictures(2)
    torch.testing.assert_close(short.embeddings(x), whole.embeddings(x)[:, :3])


def test_every_square_of_the_decoder_reads_every_embedding() -> None:
    tokenizer = make().eval()
    rows = torch.randn(1, 6, 8, requires_grad=True)
    made = tokenizer.decoder(rows)
    assert made.shape == (1, 3, 16, 16)
    for row, column in ((0, 0), (15, 15), (7, 9)):
        (gradient,) = torch.autograd.grad(made[0, :, row, column].sum(), rows, retain_graph=True)
        assert (gradient.abs().sum(-1) > 0).all()


# ---- the grid, batches -----------------------------------------------------------------------------------------------


def test_a_picture_is_a_row_of_vectors() -> None:
    tokenizer = make().eval()
    encoded = tokenizer.encode(Image.new("RGB", (40, 20), "red"))
    assert encoded.grid == tokenizer.spec.max_grid == (1, 6) and encoded.latents.shape == (6, 8)
    torch.testing.assert_close(encoded.latents.mean(-1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded.latents.std(-1, correction=0), torch.ones(6), atol=1e-3, rtol=0)


@pytest.mark.parametrize("normalizer", ["token", "channel", "robust", "scale", "none"])
def test_batches_equal_single_pictures_and_reconstruct_what_training_sees(normalizer: str) -> None:
    tokenizer = make(normalizer=normalizer).eval()
    x = pictures(3)
    tokenizer.fit_normalizer(pictures(20))
    together = tokenizer.encode_batch(list(x))
    for one, both in zip(x, together, strict=True):
        torch.testing.assert_close(tokenizer.encode(one).latents, both.latents, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = tokenizer.reconstruct(x).output
        grid, rows = tokenizer.tokens(x)
        torch.testing.assert_close(tokenizer.untoken(rows, grid), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", range(1, 7))
def test_the_first_vectors_can_be_decoded(count: int) -> None:
    from mm.interfaces import Encoded

    tokenizer = make().eval()
    rows = tokenizer.encode(pictures(1)[0]).latents
    decoded = tokenizer.decode(Encoded(grid=(1, count), latents=rows[:count]))
    assert decoded.valid and decoded.value.size == (16, 16)


@pytest.mark.parametrize("grid", [(2, 3), (6, 1), (1, 7), (6,), (1, 1, 6)])
def test_other_grids_are_decoded_and_reported(grid: tuple[int, ...]) -> None:
    from mm.interfaces import Encoded

    decoded = make().eval().decode(Encoded(grid=grid, latents=torch.randn(torch.Size(grid).numel(), 8)))
    assert decoded.value.size == (16, 16) and "expected rows and columns within 1×6" in decoded.reason


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected sides that are multiples of 16 up to 16, got \(8, 8\)"):
        make().encode(pictures(1, 8)[0])


def test_the_pixels_are_scaled_as_the_encoder_was_trained() -> None:
    """A model of CLIP takes its own mean and deviation."""
    tokenizer = make(encoder="vit_base_patch16_clip_224")
    seen: list[torch.Tensor] = []
    tokenizer.encoder.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    mean = torch.tensor(tokenizer.encoder.pretrained_cfg["mean"]).view(3, 1, 1)
    tokenizer.embeddings((2 * mean - 1).expand(1, 3, 16, 16))
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 16, 16), atol=1e-6, rtol=0)


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    from mm.tokenizers.image_vit import ImageViT

    tokenizer = make(normalizer="channel").eval()
    tokenizer.fit_normalizer(pictures(16))
    tokenizer.save(tmp_path / "saved")
    again = ImageViT.from_directory(tmp_path / "saved")
    assert not again.training and again.spec == tokenizer.spec and again.config == tokenizer.config
    x = pictures(2)
    for one, two in zip(tokenizer.encode_batch(list(x)), again.encode_batch(list(x)), strict=True):
        assert torch.equal(one.content, two.content)
        assert tokenizer.decode(one).value.tobytes() == again.decode(two).value.tobytes()


def test_the_fingerprint_is_of_what_makes_vectors() -> None:
    tokenizer = make().eval()
    before = tokenizer.fingerprint
    with torch.no_grad():
        for part, changes in (("decoder", False), ("resampler", True), ("encoder", True)):
            parameter = next(getattr(tokenizer, part).parameters())
            parameter += 0.1
            tokenizer.weights_changed()
            assert (tokenizer.fingerprint != before) == changes, part
            before = tokenizer.fingerprint


def saved(tmp_path: Path) -> Path:
    make().save(tmp_path / "saved")
    return tmp_path / "saved"


def test_hostile_folders(tmp_path: Path) -> None:
    from mm.tokenizers.image_vit import ImageViT

    folder = saved(tmp_path)
    weights, config = folder / "model.safetensors", folder / "config.json"
    good, settings = weights.read_bytes(), json.loads(config.read_text())
    bad: list[tuple[dict[str, Any], str]] = [
        ({"encoder": "hf-hub:someone/something"}, "encoder must be the name of a timm model"),
        ({"encoder": "resnet18"}, "timm can't make 'resnet18'"),
        ({"width": 1 << 20}, "width must be a whole number in 1..4096, got 1048576"),
        ({"embeddings": 7}, "belongs to another configuration"),
        ({"latent": "8"}, "wrong value for latent"),
        ({"noise": 0.5}, "says .*: restore the pair of files"),
    ]
    for change, message in bad:
        config.write_text(json.dumps({**settings, "config": {**settings["config"], **change}}))
        with pytest.raises(ValueError, match=message):
            ImageViT.from_directory(folder)
    config.write_text(json.dumps(settings))
    weights.write_bytes(pickle.dumps({"a": torch.zeros(2)}))
    with pytest.raises(ValueError, match="is a pickle under another name"):
        ImageViT.from_directory(folder)
    weights.write_bytes(good[:-40])
    with pytest.raises(ValueError, match="is damaged"):
        ImageViT.from_directory(folder)
    with pytest.raises(ValueError, match="no saved image embedder in .*nowhere"):
        ImageViT.from_directory(tmp_path / "nowhere")
    weights.write_bytes(good)
    ImageViT.from_directory(folder)


# ---- encoders with weights of their own ------------------------------------------------------------------------------


def test_weights_of_an_encoder_come_from_a_file(tmp_path: Path) -> None:
    from mm.tokenizers.image_vit import ImageViT

    file = encoder_file(tmp_path / "encoder.safetensors", **{"head.weight": torch.zeros(3, 16)})
    torch.manual_seed(6)
    tokenizer, other = make(encoder_weights=str(file)), make()
    torch.manual_seed(5)
    source = make()
    for name, tensor in source.encoder.state_dict().items():
        assert torch.equal(tokenizer.encoder.state_dict()[name], tensor)
    assert not torch.equal(other.encoder.patch_embed.proj.weight, source.encoder.patch_embed.proj.weight)
    tokenizer.save(tmp_path / "saved")
    file.unlink()
    again = ImageViT.from_directory(tmp_path / "saved")
    assert torch.equal(again.encoder.patch_embed.proj.weight, source.encoder.patch_embed.proj.weight)


def test_a_frozen_encoder_stays_and_does_not_drop(tmp_path: Path) -> None:
    file = encoder_file(tmp_path / "encoder.safetensors")
    tokenizer = make(encoder_weights=str(file), encoder_frozen=True).train()
    assert tokenizer.training and tokenizer.resampler.training and not tokenizer.encoder.training
    outer = torch.nn.Sequential(tokenizer).train()
    assert not tokenizer.encoder.training, "also as part of a module"
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    tokenizer.reconstruct(pictures()).output.square().mean().backward()
    optimizer.step()
    changed = {n.split(".")[0] for n, t in tokenizer.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"resampler", "decoder"}
    assert all(parameter.grad is None for parameter in tokenizer.encoder.parameters())


def test_foreign_weights_of_an_encoder_are_refused(tmp_path: Path) -> None:
    file = encoder_file(tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="has shape .* belongs to another configuration"):
        make(encoder_weights=str(file), encoder_width=32)
    with pytest.raises(ValueError, match="has blocks.0.* too many|lacks"):
        make(encoder_weights=str(file), encoder_depth=2)
    with pytest.raises(ValueError, match="is missing"):
        make(encoder_weights=str(tmp_path / "none.safetensors"))
    hostile = tmp_path / "hostile.safetensors"
    hostile.write_bytes(pickle.dumps({"a": torch.zeros(2)}))
    with pytest.raises(ValueError, match="pickle"):
        make(encoder_weights=str(hostile))
    with pytest.raises(ValueError, match="pickle"):
        make(encoder_weights=str(tmp_path / "weights.bin"))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": 0}, r"embeddings must be a whole number in 1\.\.256, got 0"),
        ({"embeddings": 257}, "embeddings must be a whole number"),
        ({"latent": True}, "latent must be a whole number in 1..1024, got True"),
        ({"size": 16.0}, "size must be a whole number in 1..1024, got 16.0"),
        ({"width": 15}, r"width must be a multiple of heads \(2\), got 15"),
        ({"decoder_width": 7}, r"decoder_width must be a multiple of heads \(2\), got 7"),
        ({"decoder_patch": 5}, r"size must be a multiple of decoder_patch \(5\), got 16"),
        ({"encoder_patch": 3}, r"size must be a multiple of encoder_patch \(3\), got 16"),
        ({"encoder_heads": 3}, "timm can't make 'vit_tiny_patch16_224' for pictures of 16×16"),
        ({"encoder": "convnext_tiny"}, "timm can't make 'convnext_tiny'"),
        ({"encoder": "vit_of_nobody"}, "encoder must be the name of a timm model such as vit_tiny_patch16_224"),
        ({"encoder": 3}, "encoder must be the name of a timm model"),
        ({"normalizer": "batch"}, "a normaliser is one of"),
        ({"noise": -1.0}, "noise must be a number of at least 0, got -1.0"),
        ({"noise": float("nan")}, "noise must be a number of at least 0"),
        ({"noise": 0.5, "normalizer": "channel"}, "noise needs the normalizer token, got 0.5 with channel"),
        ({"encoder_frozen": True}, "encoder_frozen would keep random weights; give encoder_weights"),
        ({"pretrained": "a", "encoder_weights": "b"}, "got both pretrained and encoder_weights"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
def test_it_is_trained_as_every_tokenizer(tmp_path: Path) -> None:
    """By `TokenizerModule`, with an adversary from the middle on; what is saved loads, its normaliser fitted."""
    import lightning as L
    import numpy as np

    from mm.data.images import ImageTensorDataModule, PictureSource
    from mm.tokenizers.image_vit import ImageViT
    from mm.training_tokenizer import TokenizerModule

    rng = np.random.default_rng(0)
    images = np.zeros((40, 12, 12), dtype=np.uint8)
    for image in images:
        row, column = rng.integers(1, 8, 2)
        image[row : row + 4, column : column + 2] = 255
    np.savez(tmp_path / "digits.npz", images=images, labels=np.zeros(40, dtype=np.int64))
    source = ImageTensorDataModule([PictureSource(path=str(tmp_path / "digits.npz"))], 16, 8, holdout_every=5)
    tokenizer = make(normalizer="channel")
    options: dict[str, Any] = {"adversarial": 0.1, "adversarial_start": 20, "learning_rate": 3e-3, "warmup": 5}
    model = TokenizerModule(tokenizer, save_to=str(tmp_path / "saved"), l2=1.0, **options)
    source.setup()
    taught = source.batch(torch.cat(source.train_rows), flips=None).pixels
    with torch.no_grad():
        before = (tokenizer.eval().reconstruct(taught).output - taught).square().mean()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=60, num_sanity_val_steps=0, logger=False, **quiet)
    trainer.fit(model, datamodule=source)
    with torch.no_grad():
        after = (tokenizer.eval().reconstruct(taught).output - taught).square().mean()
    assert after < 0.5 * before
    saved = ImageViT.from_directory(tmp_path / "saved")
    assert saved.normalizer.ready
    rows = torch.stack([item.content for item in saved.encode_batch(list(taught))]).flatten(0, 1)
    torch.testing.assert_close(rows.mean(0), torch.zeros(8), atol=0.1, rtol=0)
    torch.testing.assert_close(rows.std(0), torch.ones(8), atol=0.1, rtol=0)


def test_noise_is_for_training_alone() -> None:
    x, tokenizer = pictures(2), make(noise=0.5)
    with torch.no_grad():
        one, two = (tokenizer.train().reconstruct(x).output for _ in range(2))
        assert not torch.equal(one, two)
        one, two = (tokenizer.eval().reconstruct(x).output for _ in range(2))
        assert torch.equal(one, two)


def test_pictures_are_generated_and_captioned() -> None:
    """The 1×N grid goes through the engine and both pipelines."""
    import mm
    from mm.backbone import BackboneConfig
    from mm.heads.lm import LMHead
    from mm.heads.regression import RegressionHead
    from mm.interfaces import Modality
    from mm.model import MultimodalModel
    from mm.orders.raster import Raster
    from mm.tokenizers.text_bytes import TextBytes

    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="image", tokenizer=make().eval(), head=RegressionHead(), order=Raster()),
    ]
    model = MultimodalModel(BackboneConfig(width=32, layers=2, heads=2), modalities)
    made = mm.TextToImagePipeline(model)("seven", num_images=2, seed=0)
    assert [item.grid for item in made.tokens] == [(1, 6)] * 2 and made.images[0].size == (16, 16)
    assert torch.equal(made.tokens[0].content, made.tokens[1].content), "a regression head has one answer"
    assert len(mm.ImageToTextPipeline(model)(made.images[0], max_tokens=3).texts) == 1


def test_a_part_of_a_picture_is_no_part_of_its_vectors() -> None:
    """Inpainting is refused: no vector stands for a place."""
    from PIL import Image

    from mm.heads.regression import RegressionHead
    from mm.orders.raster import Raster
    from mm.pipelines.text_to_image import TextToImagePipeline
    from mm.testing import tiny

    painter = TextToImagePipeline(tiny(Raster(), tokenizer=make().eval(), head=RegressionHead()))
    assert not make().spec.spatial
    with pytest.raises(ValueError, match="stand for whole pictures, not for places in them"):
        painter("a cat", image=Image.new("RGB", (16, 16)), mask=Image.new("L", (16, 16)))
