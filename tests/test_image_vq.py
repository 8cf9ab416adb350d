"""The trainable picture tokenizer: quantisers, identity of a saved tokenizer, what it takes and what it gives.

Run as a script it is one of two ranks, see `test_two_ranks_hold_the_same_codebook`.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

QUANTIZERS: dict[str, dict[str, Any]] = {
    "vq": {"codebook_size": 16, "code_dim": 4},
    "fsq": {"codebook_size": 0, "levels": (4, 3, 5)},
    "lfq": {"codebook_size": 32},
    "bsq": {"codebook_size": 32},
    "residual": {"codebook_size": 16, "code_dim": 4, "num_codes": 3},
}


def make_quantizer(name: str, **changes: Any) -> Any:
    """A quantiser whose codebooks have seen data."""
    from mm.quantizers import Quantizer

    quantizer = Quantizer(name, **{**QUANTIZERS[name], **changes}).train()  # type: ignore[arg-type]
    quantizer(torch.randn(4, quantizer.dim, 6, 6))
    return quantizer


def make(name: str = "vq", **changes: Any) -> Any:
    """A small tokenizer whose codebook has seen data."""
    from mm.tokenizers.image_vq import ImageVQ

    settings = {"size": 16, "patch": 2, "channels": 8, "quantizer": name, **QUANTIZERS[name], **changes}
    tokenizer = ImageVQ(**settings).train()
    tokenizer.reconstruct(torch.rand(4, 3, 16, 16) * 2 - 1)
    return tokenizer.eval()


# ---- quantisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZERS)
def test_ids_stand_for_the_latents_they_came_with(name: str) -> None:
    quantizer = make_quantizer(name).eval()
    out = quantizer(torch.randn(3, quantizer.dim, 5, 4))
    assert out.ids.dtype == torch.int64 and out.ids.shape[:3] == (3, 5, 4)
    assert out.ids.min() >= 0 and out.ids.max() < quantizer.codebook_size
    assert len(out.ids.unique()) > 5, "a quantiser that gives one id proves nothing here"
    torch.testing.assert_close(quantizer.lookup(out.ids), out.latents)


@pytest.mark.parametrize("name", ["vq", "fsq", "lfq", "bsq"])
def test_every_id_comes_back(name: str) -> None:
    """ids → latents → ids is the identity over the whole vocabulary. (Residual codes are not unique.)"""
    quantizer = make_quantizer(name).eval()
    ids = torch.arange(quantizer.codebook_size).reshape(1, 1, -1)
    latents = quantizer.lookup(ids)
    if name == "fsq":  # what is rounded is tanh of the latent, shifted where levels are even
        levels = torch.tensor(QUANTIZERS[name]["levels"])[:, None, None]
        half = (levels - 1) * 1.001 / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        latents = torch.atanh((latents * (levels // 2) + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(quantizer(latents).ids, ids)


def test_the_stages_are_the_packages() -> None:
    quantizer: Any = make_quantizer("residual").eval()
    ids = torch.randint(
        quantizer.codebook_size, (2, 5, quantizer.num_codes), generator=torch.Generator().manual_seed(0)
    )
    stages = quantizer.layer.get_codes_from_indices(ids)
    assert torch.equal(quantizer.stages(ids), stages) and len(stages) == quantizer.num_codes
    assert torch.equal(
        quantizer.lookup(ids[:, None])[:, :, 0].transpose(1, 2),
        quantizer.layer.get_output_from_indices(ids),
    )


@pytest.mark.parametrize("name", ["vq", "residual", "fsq", "lfq"])
def test_what_is_slow_to_import_waits_until_it_is_called(name: str) -> None:
    """The package's `einx` takes seconds; without it everything else works, and what needs it gets the real one."""
    code = f"""
import sys, torch
from mm.quantizers import Quantizer
quantizer = Quantizer({name!r}, codebook_size=0 if {name!r} == "fsq" else 16)
out = quantizer.train()(torch.randn(2, quantizer.dim, 3, 4))
quantizer.eval().lookup(quantizer(out.latents).ids)
assert not {{"einx", "sympy"}} & set(sys.modules)
if {name!r} == "vq":
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found, ids, loss = quantizer.layer.train()(torch.randn(2, 5, 8), mask=mask)
    assert (ids[1, 3:] == -1).all() and (ids[0] >= 0).all() and loss > 0
    import einx
    assert einx.where.__module__.startswith("einx")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["vq", "lfq", "residual"])
def test_the_gradient_passes_straight_through(name: str) -> None:
    quantizer = make_quantizer(name, commitment=0.0, **({"entropy": 0.0} if name == "lfq" else {}))
    latents = torch.randn(2, quantizer.dim, 3, 3, requires_grad=True)
    weight = torch.randn(2, quantizer.dim, 3, 3)
    (quantizer(latents).latents * weight).sum().backward()
    torch.testing.assert_close(latents.grad, weight)


def test_the_commitment_pulls_latents_and_not_codes() -> None:
    """β · mean((z − e)²) on z alone: gradient 2β(z − e)/n, no gradient on the codebook."""
    quantizer = make_quantizer("vq", commitment=0.25)
    codes = quantizer.codebooks()[0].embed
    assert not codes.requires_grad
    latents = torch.randn(2, quantizer.dim, 3, 3, requires_grad=True)
    before = codes.clone()
    out = quantizer(latents)
    out.loss.backward()
    nearest = before[0][out.ids].permute(0, 3, 1, 2)
    torch.testing.assert_close(latents.grad, 2 * 0.25 * (latents.detach() - nearest) / latents.numel())


@pytest.mark.parametrize("name", ["vq", "residual"])
def test_a_dead_code_is_revived_within_one_step(name: str) -> None:
    quantizer = make_quantizer(name, dead_below=0.5)
    book = quantizer.codebooks()[0]
    book.embed[0, 3], book.embed_avg[0, 3], book.cluster_size[0, 3] = 1e4, 0.0, 0.0
    latents = torch.randn(4, quantizer.dim, 6, 6)
    quantizer(latents)
    assert book.embed[0, 3].abs().max() < 10, "it stands among the data again"
    assert book.cluster_size[0, 3] == 0.5
    torch.testing.assert_close(book.embed_avg[0, 3], book.embed[0, 3] * 0.5)
    if name == "vq":
        ids = quantizer(latents).ids
        assert (ids == 3).any(), "and is used in the next step"


def test_without_a_threshold_dead_codes_stay_dead() -> None:
    quantizer = make_quantizer("vq", dead_below=0.0)
    book = quantizer.codebooks()[0]
    book.embed[0, 3], book.embed_avg[0, 3] = 1e4, 1e4
    assert not (quantizer(torch.randn(4, 4, 6, 6)).ids == 3).any()
    assert book.embed[0, 3].abs().max() > 1e3


@pytest.mark.parametrize("name", ["vq", "residual"])
def test_a_copy_fits_its_own_codebooks(name: str) -> None:
    """Processes that load data may be started afresh, and are sent the tokenizer; sent back it couldn't be unpickled."""
    from mm.quantizers import Quantizer

    quantizer = Quantizer(name, **QUANTIZERS[name])  # type: ignore[arg-type]
    for twin in (pickle.loads(pickle.dumps(quantizer)), copy.deepcopy(quantizer)):
        twin.train()(torch.randn(4, twin.dim, 6, 6))
        assert all(bool(book.initted) for book in twin.codebooks())
    assert not any(bool(book.initted) for book in quantizer.codebooks())


def test_the_codebook_finds_the_centres_of_clusters() -> None:
    from mm.quantizers import Quantizer

    centres = torch.tensor([[5.0, 0], [0, 5], [-5, 0], [0, -5]])
    quantizer = Quantizer("vq", codebook_size=4, code_dim=2, decay=0.8, dead_below=0.1).train()
    for _ in range(60):
        points = centres.repeat(64, 1) + 0.1 * torch.randn(256, 2)
        quantizer(points.T.reshape(1, 2, 16, 16))
    found = quantizer.codebooks()[0].embed[0]
    assert torch.cdist(centres, found).min(1).values.max() < 0.05


def test_the_codes_do_not_depend_on_autocast() -> None:
    quantizer = make_quantizer("vq").eval()
    latents = torch.randn(4, 4, 8, 8)
    plain = quantizer(latents).ids
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(latents).ids, plain)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lvq", {}, "must be one of vq, fsq, lfq, bsq, residual, got 'lvq'"),
        ("fsq", {"codebook_size": 1024}, "make 1000 codes, got codebook_size 1024: set it to 1000 or 0"),
        ("fsq", {"levels": (2, 5), "codebook_size": 0}, "at least 3 each"),
        ("lfq", {"codebook_size": 1000}, "power of two, got 1000"),
        ("vq", {"codebook_size": 1 << 20}, "between 2 and 262144"),
        ("residual", {"num_codes": 0}, "at least 1"),
        ("vq", {"code_dim": 4097}, "code_dim may be up to 4096, .* got code_dim 4097"),
        ("vq", {"code_dim": 4096, "codebook_size": 1 << 17}, "may hold 268,435,456 numbers, got .* 536,870,912"),
        ("residual", {"code_dim": 512, "codebook_size": 1 << 17, "num_codes": 8}, "got .* 536,870,912"),
    ],
)
def test_settings_of_a_quantiser_that_do_not_fit(name: Any, settings: dict[str, Any], message: str) -> None:
    from mm.quantizers import Quantizer

    with pytest.raises(ValueError, match=message):
        Quantizer(name, **settings)


def rank(number: int, folder: Path) -> None:
    """One of two processes: different data on each, the codebook shared."""
    import torch.distributed as dist

    from mm.quantizers import Quantizer

    torch.manual_seed(0)
    quantizer = Quantizer("vq", codebook_size=16, code_dim=4, dead_below=0.5).train()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    quantizer.synchronise(True)
    torch.manual_seed(1 + number)
    states = []
    for step in range(4):
        if step == 2:  # a code dies: both ranks must put the same vector in its place
            book: Any = quantizer.codebooks()[0]
            book.embed[0, 3], book.embed_avg[0, 3], book.cluster_size[0, 3] = 1e4, 0.0, 0.0
        quantizer(torch.randn(4, 4, 6, 6))
        states.append({name: tensor.clone() for name, tensor in quantizer.state_dict().items()})
    torch.save(states, folder / f"{number}.pt")
    dist.destroy_process_group()


def test_two_ranks_hold_the_same_codebook(tmp_path: Path) -> None:
    """Bit-identical after every step, although the ranks see different data and the module was built before the group;
    a code that died on both is replaced by the same vector."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(n), str(tmp_path)], env=environment, stderr=subprocess.PIPE)
        for n in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in range(2))
    assert len(first) == 4
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        for name in a:
            assert torch.equal(a[name], b[name]), f"{name} differs after step {step}"
    assert not torch.equal(first[0]["layer._codebook.embed"], first[1]["layer._codebook.embed"])
    assert first[2]["layer._codebook.embed"][0, 3].abs().max() < 10


def test_two_ranks_are_one_rank_with_both_batches(tmp_path: Path) -> None:
    """The averages of two ranks are those of one process that sees both batches (checked on the update itself)."""
    import torch.distributed as dist

    from mm.quantizers import Quantizer

    torch.manual_seed(0)
    one = Quantizer("vq", codebook_size=8, code_dim=4, dead_below=0.0).train()
    one(torch.randn(2, 4, 6, 6))
    two = Quantizer("vq", codebook_size=8, code_dim=4, dead_below=0.0).train()
    two.load_state_dict(one.state_dict())
    a, b = torch.randn(2, 2, 4, 6, 6)
    one(torch.cat([a, b]))
    # A group of one process, in which the other rank's share is added by hand where the sums are exchanged.
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    try:
        two.synchronise(True)
        book: Any = two.codebooks()[0]
        ids = two.eval()(b).ids.flatten()
        hot = torch.nn.functional.one_hot(ids, 8).float()
        rows = b.permute(0, 2, 3, 1).reshape(-1, 4)
        other = iter([hot.sum(0)[None], (hot.T @ rows)[None]])
        shared = book.all_reduce_fn
        assert shared is dist.all_reduce
        book.all_reduce_fn = lambda tensor: tensor.add_(next(other))
        two.train()(a)
    finally:
        dist.destroy_process_group()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZERS)
def test_pictures_there_and_back(name: str) -> None:
    tokenizer = make(name)
    spec = tokenizer.spec
    assert spec.kind == ("codes" if name == "residual" else "discrete") and spec.max_grid == (4, 4)
    assert spec.vocab_size == tokenizer.quantizer.codebook_size
    encoded = tokenizer.encode(Image.new("RGB", (16, 16), "teal"))
    assert encoded.grid == (4, 4) and len(encoded) == 16
    if name == "residual":
        assert encoded.codes.shape == (16, 3) and spec.num_codes == 3
    decoded = tokenizer.decode(encoded)
    assert decoded.valid and decoded.value.size == (16, 16) and decoded.value.mode == "RGB"
    assert torch.equal(tokenizer.encode(Image.new("RGB", (16, 16), "teal")).content, encoded.content)


@pytest.mark.parametrize(("downsample", "patch", "levels"), [(4, 1, 3), (8, 2, 3), (16, 4, 3), (16, 1, 5), (4, 4, 1)])
@pytest.mark.parametrize("block", ["residual", "separable"])
def test_every_downsampling(downsample: int, patch: int, levels: int, block: Any) -> None:
    tokenizer = make(
        size=32, downsample=downsample, patch=patch, multipliers=[1] * levels, block=block, attention_heads=2
    )
    picture = torch.rand(1, 3, 64, 32) * 2 - 1
    ids = tokenizer.encode_pixels(picture)
    assert ids.shape == (1, 64 // downsample, 32 // downsample)
    assert tokenizer.decode_ids(ids).shape == picture.shape


def test_a_larger_tensor_that_is_not_square() -> None:
    tokenizer = make()
    picture = torch.rand(3, 24, 40) * 2 - 1
    encoded = tokenizer.encode(picture)
    assert encoded.grid == (6, 10) and len(encoded) == 60
    assert tokenizer.decode(encoded).value.size == (40, 24)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (torch.zeros(3, 18, 16), "multiples of 4, got \\(1, 3, 18, 16\\)"),
        (torch.zeros(16, 16, 3), "expected a float tensor \\(3, H, W\\)"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), "torch.uint8"),
        ("apple.png", "expected a PIL picture, got str"),
    ],
)
def test_what_cannot_be_encoded(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().encode(raw)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.MAX_IMAGE_PIXELS, limit = None, Image.MAX_IMAGE_PIXELS
    try:
        with Image.open(tmp_path / "huge.png") as picture, pytest.raises(ValueError, match="20000×20000"):
            make().encode(picture)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_odd_pictures_are_fitted_on_white() -> None:
    from mm.pictures import fit_square

    tall = fit_square(Image.new("RGB", (10, 40), "black"), 16)
    assert tall.size == (16, 16) and tall.getpixel((0, 8)) == (255, 255, 255) and tall.getpixel((8, 8)) == (0, 0, 0)
    clear = fit_square(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), 16)
    assert clear.getpixel((3, 3)) == (255, 255, 255)
    assert fit_square(Image.new("CMYK", (1, 1)), 16).size == (16, 16)
    assert fit_square(Image.new("RGB", (4000, 1)), 16).size == (16, 16), "no side shrinks to nothing"


def test_bytes_and_units_are_inverse() -> None:
    from mm.pictures import from_unit, to_unit

    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(from_unit(to_unit(every)), every)
    assert to_unit(every).min() == -1 and to_unit(every).max() == 1
    assert from_unit(torch.tensor([float("nan"), -9.0, 9.0])[None, :, None, None]).flatten().tolist() == [0, 0, 255]


@pytest.mark.parametrize("name", ["vq", "residual"])
def test_a_batch_equals_one_by_one(name: str) -> None:
    tokenizer = make(name)
    raws = [Image.new("RGB", (16, 16), c) for c in ("red", "green", "blue")] + [torch.rand(3, 8, 24) * 2 - 1]
    together = tokenizer.encode_batch(raws)
    for raw, encoded in zip(raws, together, strict=True):
        alone = tokenizer.encode(raw)
        assert alone.grid == encoded.grid and torch.equal(alone.content, encoded.content)
    for encoded, decoded in zip(together, tokenizer.decode_batch(together), strict=True):
        assert decoded.value.size == (encoded.grid[1] * 4, encoded.grid[0] * 4)


def test_decoding_never_raises() -> None:
    from mm.interfaces import Encoded

    tokenizer = make()
    wild = tokenizer.decode(Encoded(grid=(2, 2), ids=torch.tensor([0, 99, -1, 3])))
    assert not wild.valid and "2 ids outside 0..15" in wild.reason and wild.value.size == (8, 8)
    listed = tokenizer.decode(Encoded(grid=(10,), ids=torch.zeros(10, dtype=torch.long)))
    assert not listed.valid and listed.value.size == (12, 12) and "took 3×3" in listed.reason
    for empty in (
        Encoded(grid=(0,), ids=torch.zeros(0, dtype=torch.long)),
        Encoded(grid=(1, 1), latents=torch.ones(1, 2)),
    ):
        nothing = tokenizer.decode(empty)
        assert not nothing.valid and nothing.value.size == (16, 16)


def test_encoding_leaves_training_mode_and_codebook_alone() -> None:
    tokenizer = make().train()
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    tokenizer.encode_pixels(torch.rand(2, 3, 16, 16))
    assert tokenizer.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.state_dict().items())


def test_a_warm_start_is_the_best_code_of_squares() -> None:
    """Pictures made of twelve plain colours, squares aligned with the tokens: sixteen codes hold them exactly."""
    from mm.reconstruction import psnr

    colours = torch.rand(12, 3) * 2 - 1
    choice = torch.randint(12, (32, 4, 4))
    pictures = colours[choice].permute(0, 3, 1, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    tokenizer = make()
    cold = psnr(tokenizer.decode_ids(tokenizer.encode_pixels(pictures)), pictures).mean()
    tokenizer.warm_start(pictures)
    ids = tokenizer.encode_pixels(pictures)
    assert psnr(tokenizer.decode_ids(ids), pictures).mean() > 40 > cold + 10
    assert len(ids.unique()) >= 12


@pytest.mark.parametrize("name", ["fsq", "lfq", "bsq", "residual"])
def test_a_warm_start_of_the_other_quantisers_fills_their_levels(name: str) -> None:
    tokenizer = make(name)
    pictures = torch.rand(32, 3, 16, 16) * 2 - 1
    tokenizer.warm_start(pictures)
    latents = tokenizer.encoder(pictures)
    assert latents.std(dim=(0, 2, 3)).min() > 0.3
    assert len(tokenizer.encode_pixels(pictures).unique()) > 10


# ---- identity and files ----------------------------------------------------------------------------------------------


def same_weights(a: Any, b: Any) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_saved_tokenizer_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    from mm.tokenizers.image_vq import ImageVQ

    tokenizer = make(name)
    tokenizer.save(tmp_path / "saved")
    again = ImageVQ.from_directory(tmp_path / "saved")
    assert same_weights(tokenizer, again) and not again.training
    assert again.spec == tokenizer.spec
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    ids = tokenizer.encode_pixels(picture)
    assert torch.equal(again.encode_pixels(picture), ids)
    assert torch.equal(again.decode_ids(ids), tokenizer.decode_ids(ids))
    tokenizer.save(tmp_path / "saved")  # over the old one
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "model.safetensors", "saved"]


def test_a_state_dict_carries_the_codebook_and_its_averages() -> None:
    one, two = make(), make()
    assert not same_weights(one, two)
    state = one.state_dict()
    assert {"embed", "embed_avg", "cluster_size"} <= {name.rsplit(".", 1)[-1] for name in state}
    assert len({tensor.data_ptr() for tensor in state.values() if tensor.numel()}) == sum(
        1 for tensor in state.values() if tensor.numel()
    ), "no weight is stored twice"
    two.load_state_dict(state)
    assert same_weights(one, two) and one.fingerprint == two.fingerprint


def test_the_fingerprint_follows_the_weights() -> None:
    tokenizer = make()
    first = tokenizer.spec.fingerprint
    tokenizer.encode_pixels(torch.rand(1, 3, 16, 16))
    assert tokenizer.spec.fingerprint == first
    tokenizer.train().reconstruct(torch.rand(2, 3, 16, 16))  # the codebook moves without an optimiser
    assert tokenizer.eval().spec.fingerprint != first
    assert make(channels=16).fingerprint != first


def test_a_better_decoder_leaves_the_meaning_of_ids(tmp_path: Path) -> None:
    """The fingerprint stays, and a folder whose decoder was exchanged is refused all the same."""
    from mm.tokenizers.image_vq import ImageVQ

    tokenizer = make()
    first = tokenizer.fingerprint
    tokenizer.save(tmp_path / "a")
    with torch.no_grad():
        next(tokenizer.decoder.parameters()).add_(0.1)
    tokenizer.save(tmp_path / "b")
    assert ImageVQ.from_directory(tmp_path / "b").fingerprint == first == tokenizer.fingerprint
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="digest"):
        ImageVQ.from_directory(tmp_path / "b")


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    saved = json.loads(file.read_text())
    saved["config"].update(changes.pop("config", {}))
    file.write_text(json.dumps({**saved, **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no saved image tokenizer in"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "not a JSON file"),
        (lambda f: edit(f, format="other"), "expected format 'mm.tokenizers.image_vq'"),
        (lambda f: edit(f, config={"extra": 1}), "missing or unknown settings \\(\\['extra'\\]\\)"),
        (lambda f: edit(f, config={"channels": "8"}), "wrong value for channels"),
        (lambda f: edit(f, config={"channels": True}), "wrong value for channels"),
        (lambda f: edit(f, config={"multipliers": [1] * 99}), "wrong value for multipliers"),
        (lambda f: edit(f, config={"channels": 10**9}), "widths must be in 1..4096"),
        (lambda f: edit(f, config={"channels": 16}), "shape"),
        (
            lambda f: edit(f, config={"code_dim": 1 << 20}),
            "a codebook of 16,777,216 numbers, but model.safetensors has",
        ),
        (lambda f: edit(f, config={"decay": float("1e999")}), "not a JSON file"),
        (lambda f: edit(f, config={"decay": 1e300}), "wrong value for decay"),
        (lambda f: edit(f, config={"code_dim": 10**400}), "wrong value for code_dim"),
        (lambda f: edit(f, config={"commitment": 0.5}), "fingerprint"),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk" * 9), "damaged or not a safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02junk" * 9), "pickle"),
    ],
)
def test_a_saved_tokenizer_that_does_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    from mm.tokenizers.image_vq import ImageVQ

    make().save(tmp_path / "t")
    change(tmp_path / "t")
    with pytest.raises(ValueError, match=message) as caught:
        ImageVQ.from_directory(tmp_path / "t")
    assert "\n" not in str(caught.value)


def test_weights_of_another_tokenizer_of_the_same_shape(tmp_path: Path) -> None:
    from mm.tokenizers.image_vq import ImageVQ

    make().save(tmp_path / "a")
    make().save(tmp_path / "b")
    os.replace(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match="restore the pair of files that was saved together"):
        ImageVQ.from_directory(tmp_path / "a")


@pytest.mark.parametrize("name", ["", "..", "../checkpoints/emoji_vq", "no_such"])
def test_a_name_that_is_no_tokenizer(name: str) -> None:
    from mm.tokenizers.image_vq import ImageVQ

    with pytest.raises(ValueError, match="no saved image tokenizer in"):
        ImageVQ(pretrained=name)


def test_only_tokenizers_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model lies beside them, and has a file of weights too; and who wants a codec has no use for one of pictures."""
    from mm import saved

    for name, file in (("a_tokenizer", "config.json"), ("another", "config.json"), ("a_model", "model.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        (tmp_path / name / file).write_text('{"format": "mm.tokenizers.image_vq"}')
    (tmp_path / "another" / "config.json").write_text('{"format": "mm.tokenizers.speech_codec"}')
    monkeypatch.setattr(saved, "SHIPPED", tmp_path)
    with pytest.raises(ValueError, match=r"one of the shipped names \['a_tokenizer'\]"):
        saved.find("no_such", "image tokenizer", "mm.tokenizers.image_vq")
    with pytest.raises(ValueError, match=r"no saved codec in 'no_such' .*: give a folder that its save\(\) wrote$"):
        saved.find("no_such", "codec", "mm.tokenizers.audio_dac")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"downsample": 6}, "downsample must be 4, 8 or 16, got 6"),
        ({"patch": 3}, "patch must be 1, 2 or 4"),
        ({"size": 30}, "size must be a multiple of 4 up to 1024, got 30"),
        ({"multipliers": [1, 2, 4]}, "has 2 levels, got 3 multipliers"),
        ({"blocks": 0}, "blocks in 1..64"),
        ({"attention_heads": 3}, "must divide the coarsest width"),
        ({"block": "dense"}, "must be one of residual, separable"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    from mm.tokenizers.image_vq import ImageVQ

    with pytest.raises(ValueError, match=message):
        ImageVQ(**settings)


def shipped_pictures() -> Tensor:
    from PIL import ImageDraw

    from mm.pictures import to_bytes, to_unit

    out = []
    for colour, box in (("red", (6, 6, 26, 26)), ("orange", (3, 10, 28, 22)), ("navy", (10, 2, 22, 30))):
        picture = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(picture).ellipse([4 * x for x in box], fill=colour)
        out.append(to_unit(to_bytes(picture.resize((32, 32)))))
    return torch.stack(out)


def test_the_shipped_tokenizer_shows_what_it_was_given() -> None:
    from mm.reconstruction import psnr
    from mm.tokenizers.image_vq import ImageVQ

    tokenizer = ImageVQ(pretrained="emoji_vq")
    assert tokenizer.spec.max_grid == (8, 8) and tokenizer.spec.vocab_size == 1024
    pictures = shipped_pictures()
    ids = tokenizer.encode_pixels(pictures)
    assert psnr(tokenizer.decode_ids(ids), pictures).min() > 20
    shuffled = ids.flatten(1)[:, torch.randperm(64)].reshape(ids.shape)
    assert psnr(tokenizer.decode_ids(shuffled), pictures).max() < 15


if __name__ == "__main__":
    rank(int(sys.argv[1]), Path(sys.argv[2]))
