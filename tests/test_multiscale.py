"""The multi-scale quantiser: equal to VAR's, what training and sampling read, planes, codes that die, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.interfaces import Encoded
from mm.multiscale import MultiScaleQuantizer, chosen_phi, first_scales
from mm.tokenizers.image_msvq import ImageMSVQ

GOLDEN = json.loads((Path(__file__).parent / "golden" / "multiscale.json").read_text())["cases"]


def quantizer(*scales: int, seed: int = 0, **options: Any) -> MultiScaleQuantizer:
    torch.manual_seed(seed)
    made = MultiScaleQuantizer(scales or (1, 2, 4), **{"codebook_size": 32, "code_dim": 4, **options})
    for phi in made.phi:  # which begin as the identity, and would hide a mistake
        torch.nn.init.normal_(phi.weight, std=0.2)  # type: ignore[arg-type]
    return made.eval()


def phis_of(case: dict[str, Any], made: MultiScaleQuantizer) -> None:
    with torch.no_grad():
        made.codebook.copy_(torch.tensor(case["codebook"]))
    for phi, given in zip(made.phi, case["phi"], strict=True):
        phi.load_state_dict({name: torch.tensor(value) for name, value in given.items()})


@pytest.mark.parametrize("case", GOLDEN, ids=["four_phis", "normalised"])
def test_it_is_var_s(case: dict[str, Any]) -> None:
    latents = torch.tensor(case["latents"], requires_grad=True)
    made = MultiScaleQuantizer(
        case["scales"], codebook_size=len(case["codebook"]), code_dim=2, phis=case["phis"], decay=0.0, dead_below=0.0,
        normalize=case["normalize"],
    )  # fmt: skip
    phis_of(case, made)
    out = made.eval()(latents)
    assert out.ids.tolist() == case["ids"] and float(out.loss.detach()) == 0
    torch.testing.assert_close(out.latents, torch.tensor(case["sum"]))
    inputs = made.scale_inputs(out.ids)
    assert not inputs[:, :1].any(), "the first scale reads nothing"
    torch.testing.assert_close(inputs[:, 1:], torch.tensor(case["inputs"]))
    trained = made.train()(latents)
    trained.loss.backward()
    torch.testing.assert_close(float(trained.loss.detach()), case["loss"])
    torch.testing.assert_close(latents.grad, torch.tensor(case["gradient"]))
    torch.testing.assert_close(made.codebook.grad, torch.tensor(case["codebook_gradient"]))


def test_which_convolution_serves_which_scale() -> None:
    """Counted by hand from VAR's rule: the nearest of 3/36, 13/36, 23/36, 33/36; of two 1/4 and 3/4."""
    assert [chosen_phi(scale, 8, 4) for scale in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    ten = [chosen_phi(scale, 10, 4) for scale in range(10)]
    assert ten == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3], "VAR's own: at 2/9 and 7/9 two are as near, and its rounding decides"
    assert [chosen_phi(scale, 4, 2) for scale in range(4)] == [0, 0, 1, 1]
    assert [chosen_phi(scale, 3, 3) for scale in range(3)] == [0, 1, 2] and chosen_phi(0, 1, 4) == 0


@pytest.mark.parametrize("planes", [0, 3])
def test_what_is_read_in_training_is_what_sampling_builds(planes: int) -> None:
    """Bit by bit: the same operations on the same ids, scale by scale."""
    made = quantizer(planes=planes)
    latents = torch.randn(2, *((planes,) if planes else ()), 4, 4, 4)
    out = made(latents)
    assert out.latents.shape == latents.shape and out.ids.shape == (2, made.count) == (2, 21 * max(planes, 1))
    assert torch.equal(made.lookup(out.ids), out.latents), "the sum over scales is what training decodes"
    whole, begin = made.scale_inputs(out.ids), 0
    assert whole.shape == (2, made.count, 4) and whole[:, made.ends[0] :].abs().amax() > 0
    for known, end in zip((0, *made.ends), made.ends, strict=False):
        step = made.scale_inputs(out.ids[:, :known])
        assert step.shape[1] == end and torch.equal(step[:, begin:], whole[:, begin:end])
        begin = end
    own = made.scale_inputs(out.ids, own=True)
    assert torch.equal(
        own[:, made.ends[1] :].reshape(-1, 16, 4).mT.reshape(-1, 4, 4, 4), out.latents.reshape(-1, 4, 4, 4)
    )
    assert torch.equal(own[:, : made.ends[1]], made.scale_inputs(out.ids[:, : made.ends[1]], own=True))
    first = made.scale_inputs(out.ids[:, : made.ends[0]], own=True)
    assert first.shape[1] == made.ends[0] and torch.equal(first, own[:, : made.ends[0]])


def test_planes_are_quantised_each_by_itself_and_stand_side_by_side() -> None:
    flat, planes = quantizer(), quantizer(planes=3)
    planes.load_state_dict(flat.state_dict())
    latents = torch.randn(2, 3, 4, 4, 4)
    together = planes(latents)
    alone = [flat(latents[:, plane]) for plane in range(3)]
    assert torch.equal(together.latents, torch.stack([one.latents for one in alone], dim=1))
    begin = 0
    for grid, end in zip(planes.grids, planes.ends, strict=True):
        ids = together.ids[:, begin:end].view(2, *grid)
        for plane, one in enumerate(alone):
            assert torch.equal(ids[:, plane].flatten(1), one.ids[:, begin // 3 : end // 3])
        begin = end


def test_each_scale_brings_it_nearer() -> None:
    made = quantizer(1, 2, 4, 8, codebook_size=256, residual=0.0)
    latents = torch.nn.functional.interpolate(torch.randn(16, 4, 3, 3), size=8, mode="bicubic")
    made.warm_start(latents)
    ids = made(latents).ids
    errors = [float((made.lookup(ids[:, :end]) - latents).square().mean()) for end in (0, *made.ends)]
    assert all(later < 0.9 * before for before, later in zip(errors, errors[1:], strict=False)), errors


def test_codes_follow_what_takes_them() -> None:
    """Averages over identical batches come to each code's mean, as k-means would."""
    made = quantizer(2, codebook_size=2, code_dim=1, decay=0.5, dead_below=0.0, residual=0.0).train()
    with torch.no_grad():
        made.codebook.copy_(torch.tensor([[-1.0], [1.0]]))
    latents = torch.tensor([-3.0, -5.0, 2.0, 4.0]).view(1, 1, 2, 2)
    for _ in range(30):
        made(latents)
    torch.testing.assert_close(made.codebook.detach().flatten(), torch.tensor([-4.0, 3.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.size, torch.tensor([2.0, 2.0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_a_dead_code_begins_anew(decay: float) -> None:
    made = quantizer(2, codebook_size=4, decay=decay, dead_below=0.5).train()
    with torch.no_grad():
        made.codebook[2] = 1e4
        made.size[2] = 0.0
    latents = torch.randn(4, 4, 2, 2)
    made(latents)
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    assert bool((made.codebook[2].detach() == vectors).all(1).any())
    assert made.size[2] >= 0.5 and torch.equal(made.sums[2], made.size[2] * made.codebook[2].detach())
    before = made.codebook.detach().clone()
    made.eval()(latents)
    assert torch.equal(made.codebook.detach(), before), "evaluation changes nothing"


def test_gradients_pass_straight_through() -> None:
    made = quantizer(commitment=0.0).train()
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    weight = torch.randn(2, 4, 4, 4)
    out = made(latents)
    (out.latents * weight).sum().backward()
    assert latents.grad is not None and torch.equal(latents.grad, weight)
    out = made(latents.detach())
    out.loss.backward()
    assert made.codebook.grad is None
    assert any(bool(p.grad.any()) for p in made.phi.parameters() if p.grad is not None)


def test_precision_around_it_does_not_change_ids() -> None:
    made, latents = quantizer(), torch.randn(4, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = made(latents)
    assert torch.equal(mixed.ids, made(latents).ids) and mixed.latents.dtype == torch.float32


def test_first_scales_of_an_item() -> None:
    made = quantizer(planes=2)
    item = Encoded(grid=(2, 4, 4), scales=made.grids, ids=torch.arange(42) % 32)
    less = first_scales(item, 2)
    assert less.grid == (2, 2, 2) and less.ids is not None and less.ids.tolist() == list(range(10))
    for number in (0, 4):
        with pytest.raises(ValueError, match=f"number must be from 1 to the item's 3 scales, got {number}"):
            first_scales(item, number)


def test_what_cannot_be_decoded_is_repaired() -> None:
    made = quantizer()
    good = torch.arange(21)

    def repaired(ids: Tensor, number: int = 3) -> tuple[int, str]:
        scales = made.grids[:number]
        item = Encoded(grid=scales[-1], scales=scales, ids=ids)
        kept, reason = made.repaired(item)
        assert made.lookup(kept[None]).isfinite().all()
        return len(kept), reason

    assert repaired(good) == (21, "") and repaired(good[:5], 2) == (5, "")
    assert repaired(torch.full((21,), 99)) == (21, "21 ids outside 0..31")
    kept, reason = made.repaired(Encoded(grid=(3, 3), ids=good[:9]))
    assert len(kept) == 5 and reason == "9 ids for scales (3, 3), took 5 of them"
    kept, reason = made.repaired(Encoded(grid=(0,), ids=good[:0]))
    assert kept.tolist() == [0] and reason == "no ids of a scale to decode, grid (0,)"


def test_bad_input_is_refused() -> None:
    for scales in ((), (2, 2), (4, 1), (0, 2), (1, 300)):
        with pytest.raises(ValueError, match="scales are up to 32 growing sides of grids"):
            MultiScaleQuantizer(scales)
    for options in ({"phis": -1}, {"residual": 1.5}, {"decay": 1.0}, {"planes": -1}):
        with pytest.raises(ValueError, match=r"phis must be in 0\.\.32, planes"):
            MultiScaleQuantizer(**options)
    for codes, width in ((1, 4), (4, 0), (1 << 18, 4096)):
        with pytest.raises(ValueError, match="a codebook has 2"):
            MultiScaleQuantizer(codebook_size=codes, code_dim=width)
    with pytest.raises(ValueError, match=r"expected latents of shape \(B, 4, 4, 4\), got \(2, 4, 8, 8\)"):
        quantizer()(torch.zeros(2, 4, 8, 8))
    for call in (quantizer().lookup, quantizer().scale_inputs):
        with pytest.raises(ValueError, match=r"got 7 ids, but the scales end with the ids \[1, 5, 21\]"):
            call(torch.zeros(1, 7, dtype=torch.int64))


# --- the tokenizer of pictures ----------------------------------------------------------------------------------------


def test_pictures_are_saved_and_loaded(tmp_path: Path) -> None:
    made = ImageMSVQ.tiny()
    pictures = torch.rand(3, 3, 16, 16) * 2 - 1
    made.save(tmp_path / "t")
    again = ImageMSVQ.from_directory(tmp_path / "t")
    assert again.fingerprint == made.fingerprint and again.spec == made.spec
    for one, two in zip(made.encode_batch(list(pictures)), again.encode_batch(list(pictures)), strict=True):
        assert torch.equal(one.content, two.content) and one.scales == two.scales == made.spec.scales
    with torch.no_grad():
        made.quantizer.phi[0].bias.add_(0.1)  # type: ignore[operator]
    made.weights_changed()
    assert made.fingerprint != again.fingerprint, "an id means another thing"
    with pytest.raises(ValueError, match="the last scale must be size / downsample, 8, got 4"):
        ImageMSVQ(scales=[1, 2, 4])


def test_pictures_of_more_scales_are_nearer() -> None:
    """From the closed-form start: smooth pictures, decoded from one scale to all."""
    torch.manual_seed(0)
    pictures = F.interpolate(torch.rand(32, 3, 3, 3) * 2 - 1, size=16, mode="bicubic").clamp(-1, 1)
    made = ImageMSVQ(size=16, scales=[1, 2, 4], channels=8, codebook_size=256, code_dim=8)
    made.warm_start(pictures)
    made.eval()
    ids = made.encode_pixels(pictures)
    errors = [float((made.decode_ids(ids[:, :end]) - pictures).square().mean()) for end in made.quantizer.ends]
    assert errors[2] < 0.5 * errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.2 * float((pictures - pictures.mean((0, 2, 3), keepdim=True)).square().mean())
    item = made.encode(pictures[0])
    assert all(made.decode(first_scales(item, number)).valid for number in (1, 2, 3))


def test_pictures_are_learned() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(8, 3, 16, 16) * 2 - 1
    made = ImageMSVQ.tiny().train()
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        out = made.reconstruct(pictures)
        loss = (out.output - pictures).square().mean() + out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    for part in (made.encoder, made.decoder, made.quantizer.phi):
        assert any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())
