"""One contract for every tokenizer that the plug-in finder finds. A new file in tokenizers/ is tested by being there.

It has a classmethod `tiny()` that makes a small instance without files, and the first part of its name says what it
takes: `text_…`, `image_…`. One of another kind of raw data has a classmethod `examples() -> list`: two or more items that
`encode` takes, the first two with different tokens, all of one type, which `decode` gives back. Without either it is
skipped.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm import plugins
from mm.audio import Audio
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec
from mm.shapes import Shape
from mm.video import Video, has_av

NEEDS_AV = {"avc_bytes"}
NAMES = [name for name in plugins.available("tokenizers") if name not in NEEDS_AV or has_av()]
WITHOUT_AV = [
    pytest.param(name, marks=pytest.mark.skip(reason="needs av: pip install 'mm[video]'"))
    for name in sorted(NEEDS_AV - set(NAMES))
]


def _pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (20, 13, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, 64 * 64 * 3).astype(np.uint8).reshape(64, 64, 3)
    return [
        Image.fromarray(noise),
        Image.fromarray(ramp),
        Image.new("RGB", (1, 1), "red"),
        Image.new("RGBA", (9, 30), (0, 0, 255, 100)),
    ]


RAW: dict[str, tuple[list[Any], type]] = {
    "text": (["a red apple", "", "green", "on a table with a plum and a pear"], str),
    "image": (_pictures(), Image.Image),
}


def raws(name: str) -> list[Any]:
    """The tokenizer's own examples, or those of the kind that its name begins with."""
    own = getattr(plugins.load("tokenizers", name), "examples", None)
    kind = name.split("_")[0]
    if own is not None:
        return list(own())
    if kind not in RAW:
        pytest.skip(
            f"{name} doesn't say what it takes: it needs a classmethod examples() -> list, or a name text_…, image_…"
        )
    return RAW[kind][0]


def type_of(name: str) -> type:
    kind = name.split("_")[0]
    return RAW[kind][1] if kind in RAW else type(raws(name)[0])


@pytest.fixture(scope="module", params=[*NAMES, *WITHOUT_AV])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name: str) -> ModalityTokenizer:
    torch.manual_seed(1)
    made = plugins.load("tokenizers", name).tiny()  # type: ignore[attr-defined]
    assert isinstance(made, ModalityTokenizer)
    return made


def content(spec: Spec, count: int, low: int = 0, high: int | None = None) -> dict[str, torch.Tensor]:
    """Random content that a model could emit."""
    high = spec.vocab_size if high is None else high
    if spec.kind == "discrete":
        return {"ids": torch.randint(low, high, (count,))}
    if spec.kind == "codes":
        return {"codes": torch.randint(low, high, (count, spec.num_codes))}
    return {"latents": torch.randn(count, spec.dim)}


def same(a: Any, b: Any) -> bool:
    """Equal raw data; pictures and frames may differ by one step of rounding, sounds by that of 16 bits."""
    if isinstance(a, Video):
        one, two = a.frames.astype(int), b.frames.astype(int)
        return a.fps == b.fps and one.shape == two.shape and int(np.abs(one - two).max()) <= 1
    if isinstance(a, Audio):
        return a.rate == b.rate and a.samples.shape == b.samples.shape and np.allclose(a.samples, b.samples, atol=1e-4)
    if isinstance(a, Image.Image):
        one, two = np.asarray(a, dtype=int), np.asarray(b, dtype=int)
        return one.shape == two.shape and int(np.abs(one - two).max(initial=0)) <= 1
    if isinstance(a, Shape):
        return a.size == b.size and np.allclose(a.distance, b.distance, atol=1e-4)
    return bool(a == b)


def test_sounds_of_nothing_are_refused_and_loud_ones_are_held(name: str, tokenizer: ModalityTokenizer) -> None:
    if not isinstance(raws(name)[0], Audio):
        pytest.skip("takes no sound")
    with pytest.raises(ValueError, match="the sound has no sample"):
        tokenizer.encode(Audio(np.zeros(0), 16_000))
    loud = Audio((3e38 * np.sin(np.arange(1000.0))).astype(np.float32), 8000)
    made = tokenizer.encode(loud)
    assert made.content.isfinite().all()
    if tokenizer.decodes:
        assert np.isfinite(tokenizer.decode(made).value.samples).all()


def test_there_are_tokenizers_to_test() -> None:
    assert {"text_bytes", "text_hf", "image_vq", "image_vqmodel"} <= set(NAMES)


def test_spec(name: str, tokenizer: ModalityTokenizer) -> None:
    spec = tokenizer.spec
    assert spec == tokenizer.spec
    assert spec.fingerprint
    assert (spec.sample_rate > 0) == (spec.frame_rate > 0), "sound has both"
    assert all(1 <= extent <= 256 for extent in spec.max_grid), "size controls state extents of 1 to 256"
    assert (spec.kind == "continuous") == (spec.dim > 0)
    assert (spec.fps > 0) == isinstance(raws(name)[0], Video), "video says its rate, and nothing else does"
    assert spec.frame_stride >= 1


def test_encode(name: str, tokenizer: ModalityTokenizer) -> None:
    spec = tokenizer.spec
    for raw in raws(name):
        encoded = tokenizer.encode(raw)
        tokens = encoded.content
        assert tokens.device.type == "cpu" and not tokens.requires_grad
        if spec.max_grid:
            assert len(encoded.grid) == len(spec.max_grid)
            assert all(1 <= have <= most for have, most in zip(encoded.grid, spec.max_grid, strict=True))
        else:
            assert encoded.grid == (len(tokens),)
        assert encoded.scales == spec.upto(encoded.grid)
        match spec.kind:
            case "discrete":
                assert encoded.ids is not None and tokens.shape == (spec.count(encoded.grid),)
            case "codes":
                assert encoded.codes is not None and tokens.shape == (spec.count(encoded.grid), spec.num_codes)
            case "continuous":
                assert encoded.latents is not None and tokens.shape == (spec.count(encoded.grid), spec.dim)
                assert tokens.dtype == torch.float32 and tokens.isfinite().all()
        if spec.kind != "continuous":
            assert tokens.dtype == torch.int64
            assert tokens.numel() == 0 or (tokens.min() >= 0 and tokens.max() < spec.vocab_size)


def test_different_inputs_differ(name: str, tokenizer: ModalityTokenizer) -> None:
    first, second = (tokenizer.encode(raw) for raw in raws(name)[:2])
    assert first.grid != second.grid or not torch.equal(first.content, second.content)


def test_deterministic(name: str, tokenizer: ModalityTokenizer) -> None:
    for raw in raws(name):
        torch.manual_seed(2)
        first = tokenizer.encode(raw)
        torch.manual_seed(3)
        if isinstance(tokenizer, torch.nn.Module):
            tokenizer.train()  # a model in training must not change what its tokens are
        second = tokenizer.encode(raw)
        assert first.grid == second.grid and torch.equal(first.content, second.content)
        assert same(tokenizer.decode(first).value, tokenizer.decode(second).value)
        if isinstance(tokenizer, torch.nn.Module):
            tokenizer.eval()


def test_round_trip(name: str, tokenizer: ModalityTokenizer) -> None:
    for raw in raws(name):
        encoded = tokenizer.encode(raw)
        decoded = tokenizer.decode(encoded)
        if not tokenizer.decodes:
            check(decoded, name)
            assert not decoded.valid, "what can't be decoded says so"
            continue
        assert decoded.valid and not decoded.reason
        assert isinstance(decoded.value, type_of(name))
        if isinstance(raw, str):
            assert decoded.value == raw
        elif isinstance(raw, Image.Image):
            assert decoded.value.mode == "RGB"
            width, height = decoded.value.size
            if tokenizer.spec.spatial:
                assert width * encoded.grid[0] == height * encoded.grid[1], "rows and columns have the same scale"
        elif isinstance(raw, Video):
            spec, step = tokenizer.spec, tokenizer.spec.frame_stride
            assert decoded.value.fps == spec.fps
            if spec.max_grid:
                assert len(decoded.value) == 1 + (encoded.grid[0] - 1) * step, "steps have one length"
            assert 0 <= len(decoded.value) - raw.seconds * spec.fps < step, "the clip keeps its length"
        elif isinstance(raw, Audio):
            spec, seconds = tokenizer.spec, decoded.value.seconds
            assert decoded.value.rate == spec.sample_rate
            assert abs(seconds - encoded.grid[0] / spec.frame_rate) <= 2 / spec.frame_rate, "elements have one length"
            assert abs(seconds - raw.seconds) <= 2 / spec.frame_rate, "the sound keeps its length"


def test_batches_equal_single_items(name: str, tokenizer: ModalityTokenizer) -> None:
    alone = [tokenizer.encode(raw) for raw in raws(name)]
    together = tokenizer.encode_batch(raws(name))
    assert [e.grid for e in alone] == [e.grid for e in together]
    for one, two in zip(alone, together, strict=True):
        if tokenizer.spec.kind == "continuous":
            torch.testing.assert_close(one.content, two.content, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(one.content, two.content)
    for one_, two_ in zip(map(tokenizer.decode, alone), tokenizer.decode_batch(alone), strict=True):
        assert same(one_.value, two_.value) and one_.valid == two_.valid
    assert tokenizer.encode_batch([]) == [] and tokenizer.decode_batch([]) == []


def test_decode_is_total(name: str, tokenizer: ModalityTokenizer) -> None:
    spec = tokenizer.spec
    grids: list[tuple[int, ...]] = [
        (0,),
        (1,),
        (7,),
        (0, 3),
        (1, 1),
        (3, 5),
        (2, 2, 2),
        (300,),
        (1, 300),
        spec.max_grid,
    ]
    for grid in filter(None, grids):
        for _ in range(2):
            item = Encoded(grid=grid, **content(spec, math.prod(grid)))
            check(tokenizer.decode(item), name)
    for grid in spec.scales:
        check(tokenizer.decode(spec.item(content(spec, spec.count(grid))["ids"], grid)), name)


def test_a_legal_grid_of_random_tokens_is_valid(name: str, tokenizer: ModalityTokenizer) -> None:
    spec = tokenizer.spec
    if not spec.max_grid:
        # Random ids of text need not be text, but those of one letter each are.
        item = tokenizer.encode("abc" if type_of(name) is str else raws(name)[0])
        assert tokenizer.decode(item).valid
        return
    for grid in (spec.max_grid, spec.scales[0] if spec.scales else (1,) * len(spec.max_grid)):
        scales = spec.upto(grid)
        decoded = tokenizer.decode(Encoded(grid=grid, scales=scales, **content(spec, spec.count(grid))))
        empty = isinstance(decoded.value, Shape) and not decoded.value.valid  # a solid of nothing, which is said
        assert decoded.valid == (tokenizer.decodes and not empty), decoded.reason
        check(decoded, name)


def test_ids_outside_the_vocabulary_are_reported(name: str, tokenizer: ModalityTokenizer) -> None:
    spec = tokenizer.spec
    grid = spec.max_grid or (5,)
    if spec.kind == "continuous":
        bad = {"latents": torch.full((math.prod(grid), spec.dim), float("nan"))}
    else:
        bad = content(spec, math.prod(grid), spec.vocab_size, spec.vocab_size + 9)
    decoded = tokenizer.decode(Encoded(grid=grid, **bad))
    assert not decoded.valid
    check(decoded, name)


def check(decoded: Decoded, name: str) -> None:
    assert isinstance(decoded.value, type_of(name))
    assert decoded.valid == (decoded.reason == ""), "what is not valid says why"
    if isinstance(decoded.value, Image.Image):
        assert min(decoded.value.size) >= 1
    if isinstance(decoded.value, Audio):
        assert np.isfinite(decoded.value.samples).all()


def test_fingerprint_follows_the_weights(name: str, tokenizer: ModalityTokenizer) -> None:
    if not isinstance(tokenizer, torch.nn.Module):
        again = plugins.load("tokenizers", name).tiny()  # type: ignore[attr-defined]
        assert again.spec == tokenizer.spec
        return
    before = tokenizer.spec.fingerprint
    state = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    # not of a decoder: a better one may draw the same tokens
    keys = [key for key, value in state.items() if value.is_floating_point() and value.numel()]
    key = [key for key in keys if ".decoder." not in f".{key}"][-1]
    changed = {**state, key: state[key] + 0.5}
    tokenizer.load_state_dict(changed)
    after = tokenizer.spec.fingerprint
    tokenizer.load_state_dict(state)
    assert after != before
    assert tokenizer.spec.fingerprint == before


def test_fingerprints_of_tokenizers_differ() -> None:
    prints = [plugins.load("tokenizers", name).tiny().spec.fingerprint for name in NAMES]  # type: ignore[attr-defined]
    assert len(set(prints)) == len(NAMES)


def test_saved_and_loaded(name: str, tokenizer: ModalityTokenizer, tmp_path: Path) -> None:
    save, load = getattr(tokenizer, "save", None), getattr(type(tokenizer), "from_directory", None)
    assert (save is None) == (load is None), "save and from_directory come together"
    if save is None or load is None:
        again = type(tokenizer)(**tokenizer.arguments())  # its arguments say all
    else:
        save(tmp_path / "saved")
        files = [file for file in (tmp_path / "saved").rglob("*") if file.is_file()]
        assert files and all(file.suffix in (".json", ".safetensors", ".txt", ".model") for file in files)
        assert [file.name for file in tmp_path.iterdir()] == ["saved"], "no temporary file stays"
        again = load(tmp_path / "saved")
    check_same(name, tokenizer, again)


def test_pickles(name: str, tokenizer: ModalityTokenizer) -> None:
    """Workers of a data loader get their tokenizer so, where processes are not forked."""
    check_same(name, tokenizer, pickle.loads(pickle.dumps(tokenizer)))


def check_same(name: str, tokenizer: ModalityTokenizer, again: ModalityTokenizer) -> None:
    assert again.spec == tokenizer.spec
    for raw in raws(name):
        encoded = tokenizer.encode(raw)
        assert torch.equal(again.encode(raw).content, encoded.content)
        assert same(again.decode(encoded).value, tokenizer.decode(encoded).value)


class Thermometer(ModalityTokenizer):
    """Temperatures as tenths of a degree: neither a text nor a picture."""

    @classmethod
    def tiny(cls) -> Thermometer:
        return cls()

    @classmethod
    def examples(cls) -> list[list[float]]:
        return [[21.5, -3.0], [0.0], []]

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=1001, fingerprint="tenths-1")

    def encode(self, raw: list[float]) -> Encoded:
        ids = (torch.tensor(raw) * 10).round().clamp(-500, 500).long() + 500
        return Encoded(grid=(len(raw),), ids=ids)

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.ids is not None
        inside = encoded.ids.clamp(0, 1000)
        reason = "" if torch.equal(inside, encoded.ids) else "an id outside the scale"
        return Decoded(value=((inside - 500) / 10).tolist(), valid=not reason, reason=reason)


class Silent(Thermometer):
    examples = None  # type: ignore[assignment]


CONTRACT = [
    test_spec, test_encode, test_different_inputs_differ, test_deterministic, test_round_trip,
    test_batches_equal_single_items, test_decode_is_total, test_a_legal_grid_of_random_tokens_is_valid,
    test_ids_outside_the_vocabulary_are_reported, test_fingerprint_follows_the_weights, test_pickles,
]  # fmt: skip


@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__)
def test_other_kinds_of_raw_data_bring_examples(test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "load", lambda kind, name: Thermometer)
    test("thermometer", Thermometer())


def test_without_examples_it_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "load", lambda kind, name: Silent)
    with pytest.raises(pytest.skip.Exception, match=r"silent doesn't say what it takes: .* examples\(\) -> list"):
        test_encode("silent", Silent())
