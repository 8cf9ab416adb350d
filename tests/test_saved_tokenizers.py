"""What a tokenizer is saved as: whatever type its weights had, whoever wrote its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mm import plugins, saved
from mm.hub import load_pretrained, save_pretrained
from mm.interfaces import Encoded
from mm.testing import tiny
from mm.tokenizers.image_kl import ImageKL
from mm.tokenizers.image_vae import ImageVAE
from mm.tokenizers.image_vit import ImageViT
from mm.tokenizers.text_concepts import TextConcepts

SAVED = ("image_vq", "image_vae", "image_softvq", "image_vit", "image_kl", "text_concepts")


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whatever_type_it_had_it_comes_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer: Any = plugins.load("tokenizers", name).tiny().to(dtype)  # type: ignore[attr-defined]
    tokenizer.save(tmp_path / "saved")
    again = type(tokenizer).from_directory(tmp_path / "saved")
    assert again.spec == tokenizer.spec
    assert all(tensor.dtype in (torch.float32, torch.bool, torch.int64) for tensor in again.state_dict().values())


def test_a_converted_tokenizer_travels_with_its_model(tmp_path: Path) -> None:
    from mm.heads.regression import RegressionHead

    model = tiny(tokenizer=ImageVAE.tiny().to(torch.bfloat16), head=RegressionHead())
    assert (
        load_pretrained(save_pretrained(model, tmp_path / "model")).vocabulary.to_dict() == model.vocabulary.to_dict()
    )


def test_a_module_around_it_changes_its_fingerprint_too() -> None:
    tokenizer, other = ImageVAE.tiny(), ImageVAE.tiny()
    before = tokenizer.fingerprint
    torch.nn.ModuleList([tokenizer]).load_state_dict(torch.nn.ModuleList([other]).state_dict())
    assert tokenizer.fingerprint == other.fingerprint != before


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image_vae", {"pack": 8000}, "pack must be a whole number in 1..16, got 8000"),
        ("image_vae", {"channels": 2048}, "more memory than its weights file holds"),
        ("image_vae", {"blocks": 64, "channels": 1024}, "more memory than its weights file holds"),
        ("image_softvq", {"codebook_size": 1 << 18, "code_dim": 4096}, "more memory than its weights file holds"),
        ("image_vit", {"width": 4096, "depth": 32, "heads": 2}, "more memory than its weights file holds"),
        ("text_concepts", {"vocab_size": 1 << 16, "width": 1024}, "more memory than|asks for [0-9,]* weights"),
    ],
)
def test_settings_that_ask_for_too_much_are_refused_before_it_is_taken(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tokenizer: Any = plugins.load("tokenizers", name).tiny()  # type: ignore[attr-defined]
    tokenizer.save(tmp_path / "saved")
    file = tmp_path / "saved" / saved.CONFIG
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "config": {**whole["config"], **change}}))
    with pytest.raises(ValueError, match=message):
        type(tokenizer).from_directory(tmp_path / "saved")


def test_a_vae_of_diffusers_with_a_huge_pack(tmp_path: Path) -> None:
    ImageKL.tiny().save(tmp_path / "kl")
    file = tmp_path / "kl" / "mm_tokenizer.json"
    for pack in (8000, 1 << 40):
        file.write_text(json.dumps({"size": 16, "pack": pack}))
        with pytest.raises(ValueError, match="pack must be a whole number in 1..16"):
            ImageKL.from_directory(tmp_path / "kl")


@pytest.mark.parametrize(
    "settings",
    [
        {"pack": True}, {"pack": 0}, {"pack": 2.0}, {"latent": True}, {"latent": 4.0}, {"kl": True}, {"kl": None},
        {"size": 32.0}, {"size": None}, {"size": "32"}, {"blocks": 1.5}, {"multipliers": 5}, {"multipliers": []},
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}.* must be a (list of )?(whole )?number"):
        ImageVAE(**settings)


@pytest.mark.parametrize("value", [None, 3, "x" * 300])
def test_what_names_no_folder_is_refused_in_a_sentence(value: Any) -> None:
    with pytest.raises(ValueError, match="give the folder|give a folder"):
        saved.find(value, "tokenizer")


def test_diffusers_networks_and_paths(tmp_path: Path) -> None:
    ImageKL.tiny().save(tmp_path / "kl")
    assert ImageKL(tmp_path / "kl").size == 16
    for wrong in (None, 3, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="expected the folder of a VAE"):
            ImageKL(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be from 0.0001 to 10000"):
        ImageKL(str(tmp_path / "kl"), scaling_factor=1e-300)


def test_decoding_before_training_is_total() -> None:
    fresh = ImageVAE(size=16, channels=8, latent=4)
    decoded = fresh.decode(Encoded(grid=(4, 4), latents=torch.zeros(16, 4)))
    assert not decoded.valid and "not trained yet" in decoded.reason and decoded.value.size == (16, 16)


def test_a_bank_that_the_autoencoder_can_not_read() -> None:
    with pytest.raises(ValueError, match=r"sentence 1 of the bank has 100 bytes, expected up to max_bytes \(16\)"):
        TextConcepts(dim=8, width=16, layers=1, heads=1, vocab_size=256, max_bytes=16, bank=["short", "x" * 100])


def test_a_large_encoder_is_not_built_for_a_small_file(tmp_path: Path) -> None:
    ImageViT.tiny().save(tmp_path / "vit")
    file = tmp_path / "vit" / saved.CONFIG
    whole = json.loads(file.read_text())
    large = {
        "encoder": "vit_large_patch16_224",
        "encoder_patch": 0,
        "encoder_width": 0,
        "encoder_depth": 0,
        "encoder_heads": 0,
    }
    file.write_text(json.dumps({**whole, "config": {**whole["config"], **large}}))
    with pytest.raises(ValueError, match="more memory than its weights file holds"):
        ImageViT.from_directory(tmp_path / "vit")
