"""Tokenizers with weights: what is saved comes back in whatever type it was held; what is no setting, or asks for more than
its files hold, is refused by name before anything is built."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from mm import hub, plugins, saved
from mm.commands import tokenize
from mm.heads.lm import LMHead
from mm.heads.regression import RegressionHead
from mm.interfaces import Encoded, Modality
from mm.model import MultimodalModel
from mm.orders.raster import Raster
from mm.testing import tiny
from mm.tokenizers.image_kl import ImageKL
from mm.tokenizers.image_msvq import ImageMSVQ
from mm.tokenizers.image_softvq import ImageSoftVQ
from mm.tokenizers.image_vae import ImageVAE
from mm.tokenizers.image_vit import ImageViT
from mm.tokenizers.image_vq import ImageVQ
from mm.tokenizers.text_bytes import TextBytes
from mm.tokenizers.text_concepts import TextConcepts

WITH_FILES = ("image_kl", "image_msvq", "image_softvq", "image_vae", "image_vit", "image_vq", "text_concepts")
PICTURES = ("image_kl", "image_softvq", "image_vae", "image_vit")


def make(name: str) -> Any:
    return plugins.load("tokenizers", name).tiny()  # type: ignore[attr-defined]


def edit(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    """Change settings of a saved tokenizer."""
    value = json.loads((folder / file).read_text())
    (value["config"] if "digest" in value else value).update(changes)
    (folder / file).write_text(json.dumps(value))
    return folder


# --- types of floats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", WITH_FILES)
def test_any_type_of_float_comes_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer = make(name).to(dtype)
    tokenizer.save(tmp_path / "t")
    again = type(tokenizer).from_directory(tmp_path / "t")
    assert again.spec == tokenizer.spec
    for key, value in again.state_dict().items():
        held = tokenizer.state_dict()[key]
        if not (name == "image_kl" and key.startswith("normalizer.")):  # of the configuration, which has all digits
            assert torch.equal(value, held.float() if held.is_floating_point() else held), key
        assert value.dtype in (torch.float32, torch.bool, torch.int64), key


@pytest.mark.parametrize("name", PICTURES)
def test_another_type_has_another_fingerprint(name: str) -> None:
    tokenizer = make(name)
    before, whole = tokenizer.fingerprint, nn.ModuleDict({"inner": tokenizer})
    whole.to(torch.float64)
    assert tokenizer.fingerprint == before, "the values are those that they were"
    whole.to(torch.bfloat16)
    assert tokenizer.fingerprint != before, "the values were rounded"


@pytest.mark.parametrize("name", WITH_FILES)
def test_loading_a_module_around_it_forgets_the_fingerprint(name: str) -> None:
    tokenizer = make(name)
    whole, before = nn.ModuleDict({"inner": tokenizer}), tokenizer.fingerprint
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    of_encoder = next(k for k in state if ("encoder" in k or "network.enc" in k) and state[k].is_floating_point())
    whole.load_state_dict({**state, of_encoder: state[of_encoder] + 0.5})
    assert tokenizer.fingerprint != before
    whole.load_state_dict(state)
    assert tokenizer.fingerprint == before


def test_rounded_weights_take_half_the_space(tmp_path: Path) -> None:
    whole = make("image_vq")
    whole.save(tmp_path / "whole")
    before = whole.fingerprint
    rounded = whole.rounded()
    assert rounded is whole and rounded.fingerprint != before
    rounded.save(tmp_path / "rounded")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "rounded")]
    assert 0.45 < sizes[1] / sizes[0] < 0.75
    found = ImageVQ.from_directory(tmp_path / "rounded")
    assert found.fingerprint == rounded.fingerprint
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor) and found.state_dict()[name].dtype == tensor.dtype, name
    with torch.no_grad():
        next(rounded.parameters()).fill_(1e6)
    with pytest.raises(ValueError, match="16 bits can't"):
        rounded.rounded()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Pictures came out black, and nobody said why."""
    broken = make("image_vq")
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = float("nan")
    broken.save(tmp_path / "x")
    with pytest.raises(ValueError, match="holds values that are not finite; the file is damaged"):
        ImageVQ.from_directory(tmp_path / "x")


def test_a_model_with_a_tokenizer_of_another_type_comes_back(tmp_path: Path) -> None:
    tokenizer = ImageVAE.tiny().to(torch.bfloat16)
    text = Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster())
    picture = Modality(name="image", tokenizer=tokenizer, head=RegressionHead(), order=Raster())
    model = MultimodalModel(tiny().backbone.config, [text, picture], 64).to(torch.bfloat16).eval()
    again = hub.load_pretrained(hub.save_pretrained(model, tmp_path / "m"))
    assert again.modalities[1].tokenizer.spec == tokenizer.spec
    for key, value in again.state_dict().items():
        held = model.state_dict()[key]
        assert torch.equal(value, held.float() if held.is_floating_point() else held), key


def test_shipped_digests_are_those_of_float32() -> None:
    said = json.loads((saved.SHIPPED / "emoji_vq" / saved.CONFIG).read_text())
    vq = ImageVQ(pretrained="emoji_vq")
    assert vq.fingerprint == said["fingerprint"] and saved.digest(vq.config, vq.state_dict()) == said["digest"]
    assert ImageSoftVQ().origin == said["fingerprint"]
    assert len(hub.load_pretrained("mm-tiny").modalities) >= 2


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "changes", "message"),
    [
        ("image_vae", "config.json", {"pack": 8000}, r"pack must be a whole number in 1\.\.16, got 8000"),
        ("image_vae", "config.json", {"pack": 1 << 30}, r"pack must be a whole number in 1\.\.16"),
        ("image_kl", "mm_tokenizer.json", {"pack": 8000}, r"pack must be a whole number in 1\.\.16"),
        ("image_kl", "mm_tokenizer.json", {"pack": 1 << 40}, r"pack must be a whole number in 1\.\.16"),
        ("image_kl", "mm_tokenizer.json", {"pack": 0}, r"pack must be a whole number in 1\.\.16"),
        ("image_vae", "config.json", {"channels": 1024, "blocks": 2}, "far more memory .*: restore the pair of files"),
        ("image_vae", "config.json", {"channels": 2048}, "far more memory"),
        ("image_vae", "config.json", {"channels": 1024, "blocks": 64}, "far more memory"),
        ("image_vit", "config.json", {"width": 4096, "depth": 32, "heads": 2}, "far more memory"),
        ("text_concepts", "config.json", {"vocab_size": 1 << 16, "width": 1024}, r"asks for [0-9,]* weights"),
        ("image_softvq", "config.json", {"codebook_size": 1 << 18, "code_dim": 4096}, "far more memory"),
        (
            "image_vit", "config.json",
            {"encoder": "vit_large_patch16_224", "encoder_patch": 0, "encoder_width": 0, "encoder_depth": 0,
             "encoder_heads": 0},
            "far more memory",
        ),
        ("image_vq", "config.json", {"channels": 1024, "blocks": 2}, "far more memory"),
    ],
)  # fmt: skip
def test_memory_is_not_taken_for_settings_beyond_the_weights(
    name: str, file: str, changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make(name)
    tokenizer.save(tmp_path / "t")
    edit(tmp_path / "t", file, **changes)
    largest = 0

    def count(parameter: nn.Parameter, *args: Any, **kwargs: Any) -> None:
        nonlocal largest
        largest = max(largest, parameter.numel())

    monkeypatch.setattr(nn.Module, "register_parameter", watched(nn.Module.register_parameter, count))
    with pytest.raises(ValueError, match=message):
        type(tokenizer).from_directory(tmp_path / "t")
    assert largest <= saved.SLACK + (1 << 22), "nothing larger than what any folder may ask for was made"


def watched(method: Any, look: Any) -> Any:
    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            look(parameter)
        method(self, name, parameter)

    return register


def test_budgets_hold_one_in_another() -> None:
    with saved.budget(100), saved.budget(1000):
        torch.zeros(90)
        with pytest.raises(ValueError, match="far more memory"):
            torch.zeros(20)
    with saved.budget(1000) as outer:
        with saved.budget(100), pytest.raises(ValueError, match="far more memory"):
            torch.empty((20, 20))
        torch.ones(600)
    assert outer.left == 400, "what an inner one refuses is never made"


def test_settings_without_weights_are_refused(tmp_path: Path) -> None:
    ImageVAE.tiny().save(tmp_path / "t")
    (tmp_path / "t" / saved.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"model.safetensors' is missing: restore the pair of files"):
        ImageVAE.from_directory(tmp_path / "t")


# --- settings -------------------------------------------------------------------------------------------------------

SIZES: list[dict[str, Any]] = [
    {"size": 32.0}, {"size": None}, {"size": "32"}, {"size": True}, {"blocks": 1.5}, {"multipliers": 5},
    {"multipliers": "12"}, {"multipliers": [1, 2.0]}, {"multipliers": []}, {"patch": True}, {"downsample": 4.0},
    {"channels": "8"}, {"attention_heads": None}, {"decoder_blocks": 0.5}, {"block": ["residual"]},
]  # fmt: skip


@pytest.mark.parametrize("settings", SIZES, ids=str)
@pytest.mark.parametrize("cls", [ImageMSVQ, ImageVAE, ImageVQ])
def test_what_is_no_size_is_refused_by_name(cls: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be "):
        cls(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"pack": True}, {"pack": 2.0}, {"pack": 0}, {"pack": 17}, {"latent": True}, {"latent": 4.0}, {"kl": True},
        {"kl": None}, {"kl": float("nan")}, {"kl": float("inf")}, {"noise": "1"},
    ],
    ids=str,
)  # fmt: skip
def test_an_autoencoder_refuses_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(settings))} must be .*got {next(iter(settings.values()))!r}$"):
        ImageVAE(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"levels": 5}, {"codebook_size": 16.0}, {"code_dim": None}, {"num_codes": True}, {"decay": "0.9"}],
    ids=str,
)
def test_a_quantiser_refuses_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a "):
        ImageVQ(**settings)


def test_tuples_are_lists() -> None:
    assert ImageVAE(multipliers=(1, 2)).config == ImageVAE(multipliers=[1, 2]).config


@pytest.mark.parametrize("temperature", [-1, -0.5, float("nan"), float("inf"), None, "1", True])
def test_a_temperature_is_checked_at_once(temperature: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="temperature of a soft codebook must be a number of at least 0, got"):
        ImageSoftVQ(temperature=temperature)
    if isinstance(temperature, float) and temperature == -0.5:
        ImageSoftVQ.tiny().save(tmp_path / "t")
        with pytest.raises(ValueError, match="must be a number of at least 0, got -0.5"):
            ImageSoftVQ.from_directory(edit(tmp_path / "t", temperature=temperature))


@pytest.mark.parametrize("source", [nn.Linear(2, 2), 3, b"emoji_vq"], ids=["module", "number", "bytes"])
def test_a_soft_tokenizer_refuses_what_is_no_vq_tokenizer(source: Any) -> None:
    with pytest.raises(ValueError, match="got (Linear|int|bytes): give"):
        ImageSoftVQ(source)


def test_pretrained_replaces_every_other_argument(tmp_path: Path) -> None:
    tokenizer = ImageSoftVQ.tiny()
    tokenizer.save(tmp_path / "t")
    again = ImageSoftVQ(source="emoji_vq", temperature=7.0, pretrained=str(tmp_path / "t"))
    assert again.config == tokenizer.config and again.origin == "random"


@pytest.mark.parametrize("factor", [1e-300, 1e-5, 1e5, float("inf"), float("nan"), -1.0, True, "1"])
def test_a_scaling_factor_is_within_bounds(factor: Any) -> None:
    network = ImageKL.tiny().network
    with pytest.raises(ValueError, match="scaling_factor of the VAE must be"):
        ImageKL(network, size=16, scaling_factor=factor)
    assert ImageKL(network, size=16, scaling_factor=1e4).normalizer.ready


def test_a_configuration_may_leave_out_what_has_a_default(tmp_path: Path) -> None:
    tokenizer = ImageKL.tiny()
    assert tokenizer.channels == 4, "the default of diffusers"
    tokenizer.save(tmp_path / "t")
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    del config["latent_channels"]
    (tmp_path / "t" / "config.json").write_text(json.dumps(config))
    assert ImageKL(tmp_path / "t").spec == ImageKL(str(tmp_path / "t")).spec == tokenizer.spec


@pytest.mark.parametrize("path", [None, 3, nn.Linear(2, 2)], ids=["None", "number", "module"])
def test_a_vae_refuses_what_is_none(path: Any) -> None:
    with pytest.raises(ValueError, match="expected the folder of a VAE .* got (NoneType|int|Linear): give one of them"):
        ImageKL(path)


@pytest.mark.parametrize(
    "settings", [{"pack": True}, {"pack": 2.0}, {"pack": -1}, {"size": "16"}, {"size": 16.0}], ids=str
)
def test_a_vae_refuses_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a whole number"):
        ImageKL(ImageKL.tiny().network, **{"size": 16, **settings})


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300, None, 3, True, b"emoji_vq", "", "\0"], ids=repr)
def test_what_names_no_saved_tokenizer_is_refused(name: Any) -> None:
    with pytest.raises(
        ValueError, match="saved image tokenizer.* give a folder|saved image tokenizer.* give the folder"
    ) as caught:
        saved.find(name, "image tokenizer", "mm.tokenizers.image_vq")
    assert len(str(caught.value)) < 600


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "grid"),
    [
        (lambda: ImageVAE(size=16, channels=8, latent=4, pack=2), (2, 2)),
        (lambda: ImageVAE(size=16, channels=8, latent=4), (1, 3)),
        (lambda: ImageViT(size=16, embeddings=4, latent=16, encoder_width=16, encoder_depth=1, encoder_heads=2, width=16,
                          depth=1, heads=2, normalizer="robust"), (1, 4)),
    ],
)  # fmt: skip
def test_an_untrained_tokenizer_decodes_and_says_so(tokenizer: Any, grid: tuple[int, int]) -> None:
    made = tokenizer().eval()
    decoded = made.decode(Encoded(grid=grid, latents=torch.randn(grid[0] * grid[1], made.width)))
    assert isinstance(decoded.value, Image.Image) and not decoded.valid
    if made.spec.spatial:
        assert decoded.value.size == tuple(side * made.downsample * made.pack for side in reversed(grid))
    assert decoded.reason == "the tokenizer is not trained yet, its normaliser has no statistics"
    wrong = made.decode(Encoded(grid=(1,), latents=torch.full((1, made.width), float("nan"))))
    assert "not trained yet" in wrong.reason and "not numbers" in wrong.reason
    made.fit_normalizer(torch.rand(4, 3, 16, 16) * 2 - 1)
    assert made.decode(Encoded(grid=grid, latents=torch.randn(grid[0] * grid[1], made.width))).valid


@pytest.mark.parametrize("name", ["image_vq", "voxel_vq"])
def test_an_untrained_codebook_stays_as_it_is(name: str, tmp_path: Path) -> None:
    """It was fitted to what was encoded first: ids meant another thing afterwards, and the fingerprint was that of before."""
    cls: Any = plugins.load("tokenizers", name)
    settings = {"size": 16, "channels": 8, "codebook_size": 16, "code_dim": 4}
    fresh = cls(**settings).eval()
    raw = cls.examples()[0] if hasattr(cls, "examples") else Image.effect_noise((16, 16), 90)
    fresh.save(tmp_path / "fresh")
    before = fresh.encode(raw).content
    fresh.save(tmp_path / "used")
    for folder in ("fresh", "used"):
        again = cls.from_directory(tmp_path / folder)
        assert again.spec == fresh.spec and torch.equal(again.encode(raw).content, before)
    assert len(before.unique()) > 1
    held = hub.load_pretrained(hub.save_pretrained(tiny(tokenizer=fresh), tmp_path / "model"))
    assert torch.equal(held.modalities[1].tokenizer.encode(raw).content, before)
    twin = copy.deepcopy(fresh).train()  # the first batch of training fits it, and its own alone
    twin.quantizer(torch.randn(64, fresh.quantizer.dim, 1, 1))
    assert all(bool(book.initted) for book in twin.quantizer.codebooks())
    assert torch.equal(fresh.encode(raw).content, before)


def test_a_bank_holds_what_the_autoencoder_reads() -> None:
    small: dict[str, Any] = {"dim": 8, "width": 16, "layers": 1, "heads": 2, "vocab_size": 256, "sentences": 2}
    with pytest.raises(
        ValueError, match=r"sentence 1 of the bank has 9 bytes, expected up to max_bytes \(8\): shorten it"
    ):
        TextConcepts(**small, max_bytes=8, bank=["A plum.", "żółwie"])
    longest = TextConcepts(**small, max_bytes=8, bank=["A plum.", "12345678"])
    longest.normalizer.fit(longest._vectors(longest.bank))
    assert longest.decode(longest.encode("12345678")).value == "12345678"


# --- mm tokenize ----------------------------------------------------------------------------------------------------


def test_a_ready_made_tokenizer_is_built_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "p.png")
    assert tokenize.main([str(tmp_path / "p.png"), "--tokenizer", "image_softvq", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokenizer"] == "ImageSoftVQ" and figures["tokens"] == len(
        ImageSoftVQ().encode(Image.new("RGB", (20, 20)))
    )
    with pytest.raises(ValueError, match="'image_vae' has to be trained; give its folder as image_vae:FOLDER"):
        tokenize.main([str(tmp_path / "p.png"), "--tokenizer", "image_vae"])
