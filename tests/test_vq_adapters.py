"""Adapters of published picture tokenizers, held to the classes and formulas they wrap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mm import plugins, safe_io
from mm.interfaces import Encoded
from mm.vq_adapter import VQAdapter

NAMES = ("image_vqmodel", "image_emu3", "image_janus", "image_chameleon")


def tiny(name: str) -> VQAdapter:
    torch.manual_seed(0)
    return plugins.load("tokenizers", name).tiny()  # type: ignore[attr-defined]


def batch(tokenizer: VQAdapter) -> torch.Tensor:
    return torch.rand(3, 3, tokenizer.size, tokenizer.size) * 2 - 1


# --- parity -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_vqmodel_decodes_what_it_quantises() -> None:
    tokenizer = tiny("image_vqmodel")
    x = batch(tokenizer)
    latents = tokenizer.network.encode(x).latents
    ids = tokenizer.codes(x)
    distance = torch.cdist(latents.permute(0, 2, 3, 1).flatten(0, 2), tokenizer.network.quantize.embedding.weight)
    assert torch.equal(ids.flatten(), distance.argmin(-1))
    torch.testing.assert_close(tokenizer.pixels(ids), tokenizer.network.decode(latents).sample)


@torch.no_grad()
def test_emu3_equals_its_class() -> None:
    tokenizer = tiny("image_emu3")
    x = batch(tokenizer)
    sizes = torch.tensor([x.shape[2:]] * 3)
    theirs = torch.stack(list(tokenizer.network.encode(x, sizes).image_tokens))
    assert torch.equal(tokenizer.codes(x), theirs)
    assert len(theirs.unique()) > 2
    assert tokenizer.pixels(theirs).shape == x.shape
    torch.testing.assert_close(tokenizer.pixels(theirs), tokenizer.network.decode(theirs))


@torch.no_grad()
def test_janus_encodes_as_the_official_quantiser() -> None:
    """Nearest normalised code of normalised latents; the class in transformers forgets to normalise here."""
    tokenizer = tiny("image_janus")
    network = tokenizer.network
    network.quantize.embedding.weight.mul_(torch.linspace(0.1, 3, 16)[:, None])
    x = batch(tokenizer)
    z = F.normalize(network.quant_conv(network.encoder(x)).permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
    e = F.normalize(network.quantize.embedding.weight, dim=-1)
    official = ((z[:, None] - e[None]) ** 2).sum(-1).argmin(-1)
    assert torch.equal(tokenizer.codes(x).flatten(), official)
    assert not torch.equal(network.encode(x).image_tokens, official), "then this adapter could call it"


@torch.no_grad()
def test_janus_decodes_as_its_class() -> None:
    tokenizer = tiny("image_janus")
    ids = torch.randint(0, 16, (3, 8, 8))
    torch.testing.assert_close(tokenizer.pixels(ids), tokenizer.network.decode(ids.flatten(1)))
    assert tokenizer.pixels(ids[:, :3, :5]).shape == (3, 3, 6, 10), "which its class refuses"


@torch.no_grad()
def test_chameleon_encodes_as_its_class() -> None:
    tokenizer = tiny("image_chameleon")
    x = batch(tokenizer)
    assert torch.equal(tokenizer.codes(x).flatten(), tokenizer.network.encode(x).image_tokens)


@torch.no_grad()
def test_chameleon_decoder_is_vq_gans() -> None:
    """Against the decoder of diffusers, which is the same network under other names."""
    from diffusers.models.autoencoders.vae import Decoder

    tokenizer = tiny("image_chameleon")
    theirs = Decoder(8, 3, ("UpDecoderBlock2D",) * 2, (32, 64), layers_per_block=1, norm_num_groups=32).eval()
    state = {}
    for name, tensor in tokenizer.network.decoder.state_dict().items():
        for ours, other in [
            ("mid.block_1", "mid_block.resnets.0"),
            ("mid.block_2", "mid_block.resnets.1"),
            ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
            ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
            ("mid.attn_1.", "mid_block.attentions.0.to_"),
            ("up.1.upsample", "up_blocks.0.upsamplers.0"),
            ("up.1.block", "up_blocks.0.resnets"),
            ("up.0.block", "up_blocks.1.resnets"),
            ("nin_shortcut", "conv_shortcut"),
            ("norm_out", "conv_norm_out"),
        ]:
            name = name.replace(ours, other)
        state[name] = tensor[:, :, 0, 0] if "to_" in name and tensor.ndim == 4 else tensor
    theirs.load_state_dict(state)
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(tokenizer.network.decoder(x), theirs(x), rtol=1e-4, atol=1e-5)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_the_library_saves(name: str, tmp_path: Path) -> None:
    tokenizer = tiny(name)
    tokenizer.network.save_pretrained(tmp_path)
    again = type(tokenizer)(str(tmp_path), size=16)  # type: ignore[call-arg]
    x = batch(tokenizer)
    assert torch.equal(again.codes(x), tokenizer.codes(x))
    assert again.spec == tokenizer.spec


@pytest.mark.parametrize("name", ["image_emu3", "image_janus", "image_chameleon"])
def test_reads_the_tokenizer_out_of_a_whole_model_in_shards(name: str, tmp_path: Path) -> None:
    tokenizer = tiny(name)
    state = {
        f"model.vqmodel.{key}": value.half() if value.is_floating_point() else value
        for key, value in tokenizer.network.state_dict().items()
    }
    state["model.language_model.embed_tokens.weight"] = torch.zeros(3, 3)
    keys = sorted(state)
    shards = {"a-1.safetensors": keys[: len(keys) // 2], "a-2.safetensors": keys[len(keys) // 2 :]}
    for file, part in shards.items():
        safe_io.write_tensors(tmp_path / file, {key: state[key] for key in part})
    index = {"weight_map": {key: file for file, part in shards.items() for key in part}}
    safe_io.write_json(tmp_path / "model.safetensors.index.json", index)
    config = {"model_type": "whole", "vq_config": json.loads(tokenizer._config_json())}
    safe_io.write_json(tmp_path / "config.json", config)
    again = type(tokenizer)(str(tmp_path), size=16)  # type: ignore[call-arg]
    for key, value in tokenizer.network.state_dict().items():
        got = again.network.state_dict()[key]
        assert got.dtype == value.dtype
        torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-3)


def test_settings_survive(tmp_path: Path) -> None:
    network = tiny("image_emu3").network
    network.save_pretrained(tmp_path / "published")
    preprocessor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7]}
    safe_io.write_json(tmp_path / "published" / "preprocessor_config.json", preprocessor)
    cls = plugins.load("tokenizers", "image_emu3")
    tokenizer: Any = cls(str(tmp_path / "published"), size=32)  # type: ignore[call-arg]
    assert (tokenizer.mean, tokenizer.std) == ((0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    tokenizer.save(tmp_path / "saved")
    again: Any = cls.from_directory(tmp_path / "saved")  # type: ignore[attr-defined]
    assert (again.size, again.mean, again.std) == (32, tokenizer.mean, tokenizer.std)
    assert again.spec == tokenizer.spec
    assert again.spec.fingerprint != plugins.load("tokenizers", "image_emu3")(network).spec.fingerprint  # type: ignore


def test_normalisation_there_and_back() -> None:
    tokenizer = tiny("image_emu3")
    tokenizer.mean, tokenizer.std = (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    seen = tokenizer._normalised(picture)
    grey = torch.tensor(list(picture.tobytes())).view(16, 16, 3) / 255
    expected = (grey - torch.tensor(tokenizer.mean)) / torch.tensor(tokenizer.std)
    torch.testing.assert_close(seen, expected.permute(2, 0, 1))
    tokenizer.pixels = lambda ids: seen[None]  # type: ignore[method-assign]
    assert tokenizer.decode(Encoded(grid=(8, 8), ids=torch.zeros(64, dtype=torch.long))).value.tobytes() == (
        picture.tobytes()
    )


def test_chameleon_without_its_decoder(tmp_path: Path) -> None:
    cls: Any = plugins.load("tokenizers", "image_chameleon")
    tokenizer: Any = tiny("image_chameleon")
    state = {key: value for key, value in tokenizer.network.state_dict().items() if not key.startswith("decoder.")}
    safe_io.write_tensors(tmp_path / "model.safetensors", state)
    (tmp_path / "config.json").write_text(tokenizer._config_json())
    with pytest.raises(ValueError, match="has no decoder.*set decode=False"):
        cls(str(tmp_path))
    reader = cls(str(tmp_path), decode=False)
    x = batch(tokenizer)
    assert torch.equal(reader.codes(x), tokenizer.codes(x))
    decoded = reader.decode(Encoded(grid=(2, 3), ids=torch.zeros(6, dtype=torch.long)))
    assert not decoded.valid and "no decoder" in decoded.reason
    assert decoded.value.size == (6, 4)
    reader.save(tmp_path / "saved")
    assert cls.from_directory(tmp_path / "saved").spec == reader.spec


def test_stays_in_evaluation_mode() -> None:
    tokenizer = tiny("image_emu3")
    torch.nn.Sequential(tokenizer).train()
    assert not any(module.training for module in tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("image_janus").save(tmp_path)
    return tmp_path


def refused(folder: Path, message: str, size: int = 0) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        plugins.load("tokenizers", "image_janus")(str(folder), size)  # type: ignore[call-arg]
    assert "\n" not in str(caught.value).strip()


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no folder .*download a checkpoint first")


def test_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no .safetensors file")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, "is a pickle")
    (folder / "config.json").unlink()
    refused(folder, "config.json' is missing")


@pytest.mark.parametrize("size", [15, 2 * 257, -2])
def test_a_size_that_does_not_fit(folder: Path, size: int) -> None:
    refused(folder, f"size must be a multiple of 2 up to 512 for this network, got {size}", size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 7}, "expected .*belongs to another configuration"),
        ({"num_embeddings": 1 << 40}, "num_embeddings .*which no such network has"),
        ({"num_res_blocks": 10**6}, "num_res_blocks .*which no such network has"),
        ({"channel_multiplier": [1] * 1000}, "channel_multiplier .*which no such network has"),
        ({"channel_multiplier": "wide"}, "does not describe this network"),
        ({"base_channels": 1 << 20}, "belongs to another configuration"),
        ({"base_channels": -3}, "does not describe this network"),
    ],
)
def test_a_configuration_that_does_not_fit(folder: Path, changes: dict[str, object], message: str) -> None:
    """Whatever sizes it claims: they are compared with the weights before any memory is taken."""
    edit(folder / "config.json", **changes)
    refused(folder, message)


def test_damaged_settings(folder: Path) -> None:
    edit(folder / "mm_tokenizer.json", mean="white")
    refused(folder, "has a wrong size, mean or std")
    edit(folder / "mm_tokenizer.json", mean=[0.0, 0.0, 0.0], std=[0.0, 1.0, 1.0])
    refused(folder, "std above 0")


def test_an_index_that_leads_out(folder: Path) -> None:
    safe_io.write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../../etc/passwd"}})
    refused(folder, "does not stay inside its folder")
    safe_io.write_json(folder / "model.safetensors.index.json", {"weight_map": [1]})
    refused(folder, "has no weight_map")


def test_weights_of_something_else(folder: Path) -> None:
    safe_io.write_tensors(folder / "model.safetensors", {"model.embed.weight": torch.zeros(2)})
    refused(folder, "hold none of encoder")


@pytest.mark.parametrize("shape", [(3, 3, 16), (3, 18, 16), (3, 0, 16), (1, 16, 16)])
def test_tensors_that_are_no_pictures(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        tiny("image_janus").encode(torch.zeros(shape))


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_adapter_is_read_again(name: str, tmp_path: Path) -> None:
    tokenizer = tiny(name).to(torch.bfloat16)
    tokenizer.save(tmp_path / "saved")
    assert type(tokenizer).from_directory(tmp_path / "saved").fingerprint == tokenizer.fingerprint
