"""Latents: their normaliser, the tokenizers that make them, and what training refuses of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.interfaces import Encoded
from mm.latents import KINDS, LatentNormalizer
from mm.tokenizers.image_kl import ImageKL
from mm.tokenizers.image_patches import ImagePatches
from mm.tokenizers.image_softvq import ImageSoftVQ
from mm.tokenizers.image_vae import ImageVAE
from mm.tokenizers.image_vq import ImageVQ


def vectors(count: int = 4000, dim: int = 5) -> Tensor:
    """Channels of different centres and spreads."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(count, dim, generator=rng) * torch.tensor([0.1, 1, 3, 8, 20]) + torch.arange(dim) * 2.0


# --- the normaliser -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_normalised_comes_back(kind: Any) -> None:
    normalizer, x = LatentNormalizer(kind, 5), vectors()
    normalizer.fit(x)
    assert normalizer.ready
    if kind == "token":
        assert torch.allclose(normalizer(x), F.layer_norm(x, (5,), eps=1e-6))
        assert torch.equal(normalizer.inverse(normalizer(x)), normalizer(x)), (
            "a decoder of `token` reads normalised vectors"
        )
    else:
        assert torch.allclose(normalizer.inverse(normalizer(x)), x, atol=1e-4)
    again = LatentNormalizer(kind, 5)
    again.load_state_dict(normalizer.state_dict())
    assert torch.equal(again(x), normalizer(x)), "the statistics are part of the state"


def test_statistics_are_those_of_their_names() -> None:
    x = vectors()
    scale, channel, robust = (LatentNormalizer(kind, 5) for kind in ("scale", "channel", "robust"))
    for normalizer in (scale, channel, robust):
        normalizer.fit(x)
    assert torch.allclose(scale(x), x / x.std(correction=0), rtol=1e-5)
    assert torch.allclose(channel(x).mean(0), torch.zeros(5), atol=1e-5)
    assert torch.allclose(channel(x).std(0, correction=0), torch.ones(5), atol=1e-5)
    quartiles = x.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)
    assert torch.allclose(robust(x), (x - quartiles[1]) / (0.7413 * (quartiles[2] - quartiles[0])), atol=1e-4)
    spoiled = torch.cat([x, torch.full((40, 5), 1e6)])
    robust.fit(spoiled), channel.fit(spoiled)
    assert 0.9 < float(robust(x).std()) < 1.1 and float(channel(x).std()) < 0.1, "outliers move one of them only"
    assert torch.equal(LatentNormalizer("scale", 5, factor=0.18215)(x), x / (1 / torch.tensor(0.18215)))


def test_a_constant_channel_is_only_moved() -> None:
    normalizer = LatentNormalizer("channel", 2)
    normalizer.fit(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert torch.equal(normalizer(torch.tensor([[2.0, 6.0]])), torch.tensor([[0.0, 1.0]]))


def test_a_normaliser_refuses() -> None:
    with pytest.raises(ValueError, match=r"one of none, scale, channel, robust, token, got 'best'"):
        LatentNormalizer("best", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"factor belongs to the kind scale and must be above 0, got 2.0 for channel"):
        LatentNormalizer("channel", 5, factor=2.0)
    normalizer = LatentNormalizer("channel", 5)
    with pytest.raises(ValueError, match=r"\(channel\) has no statistics yet: train or fit the tokenizer first"):
        normalizer(vectors())
    with pytest.raises(ValueError, match=r"width 5 got vectors \(3, 4\); give \(N, 5\)"):
        normalizer.fit(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="values that are not numbers"):
        normalizer.fit(torch.full((3, 5), float("nan")))


# --- tokenizers of vectors ------------------------------------------------------------------------------------------


def pictures(count: int = 3, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_packing_is_that_of_mar_and_nextstep() -> None:
    """Their einsum: nchpwq → nhwcpq."""
    torch.manual_seed(0)
    tokenizer = ImageVAE(size=16, channels=8, latent=3, pack=2)
    z = torch.randn(2, 3, 4, 6)
    grid, rows = tokenizer.rows(z)
    theirs = torch.einsum("nchpwq->nhwcpq", z.reshape(2, 3, 2, 2, 3, 2)).reshape(2, 6, 12)
    assert grid == (2, 3) and torch.equal(rows, theirs)
    assert torch.equal(tokenizer.map(rows, grid), z)


@torch.no_grad()
@pytest.mark.parametrize("normalizer", ["none", "scale", "channel", "robust"])
def test_the_normaliser_changes_the_tokens_and_not_the_picture(normalizer: Any) -> None:
    torch.manual_seed(0)
    tokenizer = ImageVAE(size=16, channels=8, latent=4, normalizer=normalizer).eval()
    x = pictures()
    tokenizer.fit_normalizer(x)
    grid, rows = tokenizer.tokens(x)
    plain = tokenizer.pixels(tokenizer.latents(x))
    assert grid == (4, 4) and rows.shape == (3, 16, 4)
    assert torch.allclose(tokenizer.untoken(rows, grid), plain, atol=1e-4)
    if normalizer != "none":
        assert 0.5 < float(rows.std()) < 2


@torch.no_grad()
def test_kl_is_that_of_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = ImageKL.tiny()
    network, x = tokenizer.network, pictures()
    assert network.config.scaling_factor == 0.18215 and network.config.shift_factor == 0.1
    wanted = (network.encode(x).latent_dist.mean - 0.1) * 0.18215
    encoded = [tokenizer.encode(one) for one in x]
    assert torch.allclose(torch.stack([e.content for e in encoded]), wanted.flatten(2).transpose(1, 2), atol=1e-5)
    assert torch.allclose(tokenizer.untoken(torch.stack([e.content for e in encoded]), encoded[0].grid),
                          network.decode(wanted / 0.18215 + 0.1).sample, atol=1e-4)  # fmt: skip
    tokenizer.save(tmp_path / "kl")
    again = ImageKL.from_directory(tmp_path / "kl")
    assert again.fingerprint == tokenizer.fingerprint and again.size == 16
    assert torch.equal(again.encode(x[0]).content, encoded[0].content)


def test_a_vae_without_its_scaling_factor_is_refused(tmp_path: Path) -> None:
    ImageKL.tiny().save(tmp_path / "kl")
    file = tmp_path / "kl" / "config.json"
    config = json.loads(file.read_text())
    for value, message in (
        (None, "states no scaling_factor, without which its latents have no known spread; give scaling_factor"),
        ("much", "scaling_factor of the VAE must be a number, got 'much'"),
        (-1.0, "scaling_factor of the VAE must be above 0, got -1.0"),
    ):
        file.write_text(json.dumps({**config, "scaling_factor": value}))
        with pytest.raises(ValueError, match=message):
            ImageKL.from_directory(tmp_path / "kl")
    del config["scaling_factor"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="states no scaling_factor"):
        ImageKL(str(tmp_path / "kl"))
    assert float(ImageKL(str(tmp_path / "kl"), scaling_factor=0.5).normalizer.scale[0]) == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent": 0}, "latent must be in 1..256, got 0"),
        ({"kl": -1.0}, "kl must be a number of at least 0"),
        ({"noise": 0.5}, "noise needs the normalizer token, got 0.5 with channel"),
        ({"pack": 3}, r"multiple of 12 \(downsample · pack\)"),
        ({"multipliers": [1]}, "has 2 levels, got 1 multipliers"),
        ({"normalizer": "odd"}, "a normaliser is one of"),
    ],
)
def test_a_vae_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageVAE(**{"size": 32, "channels": 8, **settings})


def test_a_saved_vae_is_whole_or_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = ImageVAE.tiny()
    tokenizer.save(tmp_path / "vae")
    again = ImageVAE.from_directory(tmp_path / "vae")
    x = pictures()[0]
    assert again.fingerprint == tokenizer.fingerprint and torch.equal(
        again.encode(x).content, tokenizer.encode(x).content
    )
    file = tmp_path / "vae" / "config.json"
    whole = json.loads(file.read_text())
    for change, message in (
        ({"normalizer": 3}, "wrong value for normalizer"),
        ({"size": True}, "wrong value for size"),
        ({"multipliers": [[1]]}, "wrong value for multipliers"),
        ({"kl": 0.5}, "restore the pair of files"),
        ({"latent": 8}, "belongs to another configuration"),
        ({"other": 1}, r"missing or unknown settings \(\['other'\]\)"),
    ):
        file.write_text(json.dumps({**whole, "config": {**whole["config"], **change}}))
        with pytest.raises(ValueError, match=message):
            ImageVAE.from_directory(tmp_path / "vae")


def test_training_takes_draws_and_evaluation_means() -> None:
    torch.manual_seed(0)
    tokenizer, x = ImageVAE(size=16, channels=8, latent=4), pictures()
    tokenizer.warm_start(pictures(64))
    one, other = tokenizer.train().reconstruct(x), tokenizer.reconstruct(x)
    assert one.ids is None and not torch.equal(one.output, other.output)
    mean, log_variance = tokenizer.distribution(x)
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0)).mean()
    assert torch.allclose(one.loss, 1e-4 * wanted, rtol=1e-4)
    assert torch.equal(tokenizer.eval().reconstruct(x).output, tokenizer.reconstruct(x).output)


@torch.no_grad()
def test_warm_start_is_the_best_linear_code() -> None:
    """With as many channels as a square has numbers, nothing is lost."""
    torch.manual_seed(0)
    tokenizer, x = ImageVAE(size=16, channels=8, latent=48).eval(), pictures(64)
    tokenizer.warm_start(x)
    assert torch.allclose(tokenizer.reconstruct(x).output, x, atol=1e-3)
    assert abs(float(tokenizer.latents(x).std()) - 1) < 0.05


def test_noise_goes_with_normalised_tokens() -> None:
    torch.manual_seed(0)
    tokenizer, x = ImageVAE(size=16, channels=8, latent=4, normalizer="token", noise=0.5), pictures()
    seen: list[Tensor] = []
    tokenizer.decoder.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    tokenizer.eval().reconstruct(x)
    _, rows = tokenizer.rows(seen[-1])
    assert torch.allclose(rows.mean(-1), torch.zeros(3, 16), atol=1e-5)
    tokenizer.train()
    torch.manual_seed(0)
    tokenizer.reconstruct(x)
    _, noisy = tokenizer.rows(seen[-1])
    assert float(noisy.mean(-1).abs().max()) > 1e-3


def test_decoding_repairs_and_says_so() -> None:
    tokenizer = ImageVAE.tiny()
    good = tokenizer.encode(pictures()[0])
    assert tokenizer.decode(good).valid
    broken = good.content.clone()
    broken[0, 0] = float("nan")
    for item, reason in (
        (Encoded(grid=(4, 4), latents=broken), "not numbers"),
        (Encoded(grid=(16,), latents=good.content), "expected rows and columns within 4×4"),
        (Encoded(grid=(4, 4), latents=torch.zeros(16, 7)), "no vectors of width 4"),
        (Encoded(grid=(2,), ids=torch.zeros(2, dtype=torch.long)), "no vectors of width 4"),
    ):
        decoded = tokenizer.decode(item)
        assert not decoded.valid and reason in decoded.reason and decoded.value.size == (16, 16)


# --- soft codes -----------------------------------------------------------------------------------------------------


def soft(temperature: float, seed: int = 0) -> tuple[ImageSoftVQ, Any, ImageVQ]:
    torch.manual_seed(seed)
    vq = ImageVQ.tiny()
    tokenizer = ImageSoftVQ(vq, temperature=temperature)
    return tokenizer, tokenizer.embedding(6), vq


@torch.no_grad()
def test_a_soft_lookup_is_its_formula() -> None:
    tokenizer, embedding, _ = soft(0.7)
    tokens = torch.stack([tokenizer.encode(x).content for x in pictures(5)]).flatten(0, 1)
    features = tokenizer.normalizer.inverse(tokens)
    distance = (features[:, None] - tokenizer.codes).square().sum(-1)
    wanted = (-distance.double() / 0.7).softmax(-1) @ embedding.rows.weight.double()
    assert torch.allclose(embedding(tokens).double(), wanted, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(embedding(tokens).double(), wanted, atol=1e-5), "float32 inside autocast"


@torch.no_grad()
def test_cold_it_is_the_hard_lookup_and_hot_the_mean() -> None:
    tokenizer, embedding, vq = soft(0.0)
    x = pictures(5)
    tokens = torch.stack([tokenizer.encode(one).content for one in x])
    ids = vq.encode_pixels(x).flatten(1)
    hard = embedding.rows(ids)
    assert len(ids.unique()) > 2 and torch.equal(embedding(tokens), hard)
    embedding.temperature = 1e-6
    assert torch.allclose(embedding(tokens), hard, atol=1e-6)
    embedding.temperature = 1e8
    assert torch.allclose(embedding(tokens), embedding.rows.weight.mean(0).expand_as(hard), atol=1e-5)


def test_gradients_reach_codes_and_rows() -> None:
    tokenizer, embedding, _ = soft(1.0)
    embedding(tokenizer.encode(pictures()[0]).content).square().sum().backward()
    assert float(embedding.codes.grad.abs().max()) > 0 and float(embedding.rows.weight.grad.abs().max()) > 0


@torch.no_grad()
def test_features_draw_better_than_codes() -> None:
    """What quantising loses is not lost here: the shipped tokenizer's decoder, on random squares of colour."""
    vq, tokenizer = ImageVQ(pretrained="emoji_vq"), ImageSoftVQ("emoji_vq")
    x = F.interpolate(pictures(8, 4), size=(32, 32))
    grid, rows = tokenizer.tokens(x)
    hard, kept = vq.decode_ids(vq.encode_pixels(x)), tokenizer.untoken(rows, grid)
    assert float((kept - x).square().mean()) < 0.7 * float((hard - x).square().mean())


def test_a_soft_tokenizer_refuses_and_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the quantizer vq, which has one codebook; got fsq"):
        ImageSoftVQ(ImageVQ(size=16, channels=8, quantizer="fsq"))
    with pytest.raises(ValueError, match="give source, a VQ tokenizer"):
        ImageSoftVQ(None)
    with pytest.raises(ValueError, match="the normalizer token forgets a feature's length"):
        ImageSoftVQ(ImageVQ.tiny(), normalizer="token")
    for temperature in (-1.0, float("nan"), None):
        with pytest.raises(ValueError, match="temperature.* must be a number of at least 0, got"):
            ImageSoftVQ(ImageVQ.tiny(), temperature=temperature)  # type: ignore[arg-type]
    for source in (torch.nn.Linear(2, 2), 3):
        with pytest.raises(ValueError, match="must be an ImageVQ or the folder of one|is named by its folder"):
            ImageSoftVQ(source)  # type: ignore[arg-type]
    tokenizer, _, _ = soft(2.0)
    tokenizer.save(tmp_path / "soft")
    again = ImageSoftVQ.from_directory(tmp_path / "soft")
    assert again.fingerprint == tokenizer.fingerprint and again.origin == tokenizer.origin
    assert again.embedding(3).temperature == 2.0


# --- what training refuses ------------------------------------------------------------------------------------------


def test_vectors_that_are_no_numbers_are_refused() -> None:
    from mm.heads.regression import RegressionHead
    from mm.layout import Segment
    from mm.orders.raster import Raster
    from mm.testing import tiny

    net = tiny(Raster(), tokenizer=ImagePatches(size=8, patch=2), head=RegressionHead())
    broken = Encoded(grid=(1, 1), latents=torch.full((1, 12), float("nan")))
    with pytest.raises(ValueError, match="its vectors hold values that are not numbers; look at what encoded them"):
        net.build_document([Segment("image", broken)], torch.Generator())


def test_averages_of_weights_leave_statistics_alone() -> None:
    """They are taken from the averaged encoder, and stay when the trained weights come back."""
    from mm.ema import EMA

    torch.manual_seed(0)
    tokenizer, average = ImageVAE(size=16, channels=8, latent=4).train(), EMA()
    average.update(tokenizer)
    average.swap_in(tokenizer)
    tokenizer.fit_normalizer(pictures())
    found = tokenizer.normalizer.scale.clone()
    average.swap_out(tokenizer)
    assert tokenizer.normalizer.ready and torch.equal(tokenizer.normalizer.scale, found)
    assert not any("normalizer" in name for name in average.shadow) and any(
        "encoder" in name for name in average.shadow
    )


def test_many_vectors_are_sampled_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column of a grid has its say: here the first one is another world."""
    from mm import latents

    monkeypatch.setattr(latents, "MAX_SAMPLE", 1 << 12)
    x = torch.randn(64 * 1024, 2, generator=torch.Generator().manual_seed(0))
    x[::64] += 10
    normalizer = LatentNormalizer("robust", 2)
    normalizer.fit(x)
    assert float(normalizer.shift.abs().max()) < 0.15 and 0.85 < float(normalizer.scale.min()) < 1.15


@torch.no_grad()
def test_no_temperature_breaks_a_soft_lookup() -> None:
    _, embedding, _ = soft(1.0)
    v = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 3
    for temperature in (1e-38, 1e-12, 1e30):
        embedding.temperature = temperature
        assert bool(embedding.weights(v).isfinite().all())
    embedding.temperature = 1e-38
    assert torch.equal(embedding.weights(v).argmax(-1), embedding.nearest(v))
