"""Adapters of published audio codecs, held to the classes of transformers that they wrap."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm import plugins, safe_io
from mm.audio import Audio
from mm.audio_codec_adapter import MAX_FRAMES, AudioCodecAdapter
from mm.interfaces import Encoded

NAMES = ("audio_encodec", "audio_dac", "audio_mimi")
LENGTHS = (1, 7, 80, 161, 1000)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    return plugins.load("tokenizers", name).tiny()  # type: ignore[attr-defined]


def sound(length: int, rate: int = 8000, seed: int = 0) -> Audio:
    return Audio(np.random.default_rng(seed).normal(0, 0.3, length).astype(np.float32), rate)


def random_codes(tokenizer: AudioCodecAdapter, frames: int) -> torch.Tensor:
    return torch.randint(0, tokenizer.facts.vocab_size, (frames, tokenizer.num_codes))


@torch.no_grad()
def theirs(name: str, network: Any, x: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Codes (K, T) of samples (1, 1, n) by the class alone, all its codebooks."""
    if name == "audio_encodec":
        found = network.encode(x, bandwidth=max(network.config.target_bandwidths)).audio_codes[0, 0]
    elif name == "audio_dac":
        hop = math.prod(network.config.downsampling_ratios)
        found = network.encode(torch.nn.functional.pad(x, (0, -x.shape[-1] % hop))).audio_codes[0]
    else:
        found = network.encode(x).audio_codes[0]
    return found[:num_codes]


@torch.no_grad()
def their_sound(name: str, network: Any, codes: torch.Tensor) -> torch.Tensor:
    """Samples of codes (K, T) by the class alone."""
    if name == "audio_encodec":
        return network.decode(codes[None, None], [None]).audio_values[0, 0]
    return network.decode(audio_codes=codes[None]).audio_values.reshape(-1)


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_codes", [1, 2, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_codes_are_those_of_the_class(name: str, length: int, num_codes: int) -> None:
    tokenizer = type(tiny(name))(tiny(name).network, num_codes)
    raw = sound(length)
    encoded = tokenizer.encode(raw)
    expected = theirs(name, tokenizer.network, torch.tensor(raw.samples)[None, None], num_codes)
    assert encoded.codes is not None and torch.equal(encoded.codes, expected.T)
    assert encoded.grid == (math.ceil(length / tokenizer.facts.hop),)
    if length == 1000:
        assert all(len(column.unique()) > 2 for column in encoded.codes.T), "codes that say something"


@pytest.mark.parametrize("frames", [1, 2, 5, 60])
def test_sound_is_that_of_the_class(name: str, frames: int) -> None:
    tokenizer = tiny(name)
    codes = random_codes(tokenizer, frames)
    decoded = tokenizer.decode(Encoded(grid=(frames,), codes=codes))
    expected = their_sound(name, tokenizer.network, codes.T)
    assert decoded.valid
    assert len(decoded.value.samples) == frames * tokenizer.facts.hop >= len(expected)
    torch.testing.assert_close(torch.tensor(decoded.value.samples)[: len(expected)], expected, rtol=0, atol=0)
    assert not decoded.value.samples[len(expected) :].any()


def test_dac_decodes_fewer_samples_than_it_is_asked_for() -> None:
    """What the padding is for (descript-audio-codec issue 37)."""
    tokenizer = tiny("audio_dac")
    expected = their_sound("audio_dac", tokenizer.network, random_codes(tokenizer, 20).T)
    assert len(expected) == 20 * tokenizer.facts.hop - 2


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("audio_encodec", {"use_causal_conv": False}),
        ("audio_encodec", {"norm_type": "time_group_norm", "use_conv_shortcut": False}),
        ("audio_encodec", {"upsampling_ratios": [5, 3], "pad_mode": "constant", "trim_right_ratio": 0.5}),
        ("audio_encodec", {"sampling_rate": 7777, "target_bandwidths": [30.0, 8.0, 60.0]}),
        ("audio_dac", {"downsampling_ratios": [3, 3, 2], "decoder_hidden_size": 32, "sampling_rate": 44100}),
        ("audio_mimi", {"frame_rate": 250.0, "num_semantic_quantizers": 2, "use_conv_shortcut": True}),
        ("audio_mimi", {"vector_quantization_hidden_dimension": 16, "codebook_dim": 16, "num_key_value_heads": 1}),
    ],
)
def test_other_configurations(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Everything is read from the checkpoint, also where it differs from the defaults of the class."""
    first = tiny(name)
    network: Any = first._build({**{k: v for k, v in first._config().items() if v is not None}, **changes}).eval()
    for key, value in network.state_dict().items():
        if key.endswith(("embed", "embed_sum")):
            value.normal_()
    network.save_pretrained(tmp_path)
    tokenizer = type(first).from_directory(tmp_path)
    assert tokenizer.num_codes == min(8, tokenizer.facts.codebooks)
    raw = sound(333, tokenizer.facts.sample_rate)
    encoded = tokenizer.encode(raw)
    expected = theirs(name, network, torch.tensor(raw.samples)[None, None], tokenizer.num_codes)
    assert torch.equal(encoded.content, expected.T)
    made = their_sound(name, network, expected)
    torch.testing.assert_close(torch.tensor(tokenizer.decode(encoded).value.samples)[: len(made)], made)
    assert tokenizer.spec.frame_rate * tokenizer.facts.hop == pytest.approx(tokenizer.spec.sample_rate)


def test_the_bandwidth_that_holds_the_codes() -> None:
    """EnCodec offers a few bandwidths; the smallest that is enough is asked for, in whatever order they are listed."""
    tokenizer = tiny("audio_encodec")
    network = tokenizer.network
    network.config.target_bandwidths = [16.0, 8.0, 12.0, 16.0]
    asked = []
    encode = network.encode
    network.encode = lambda x, bandwidth: asked.append(bandwidth) or encode(x, bandwidth=bandwidth)
    for num_codes in (1, 2, 3, 4):
        type(tokenizer)(network, num_codes).encode(sound(100))
    assert asked[2::3] == [8.0, 8.0, 12.0, 16.0], "after two frames to try it out"


def test_alone_and_in_a_batch(name: str) -> None:
    tokenizer = tiny(name)
    raws = [sound(n, seed=n) for n in (1000, 30, 999)]
    for one, other in zip(map(tokenizer.encode, raws), tokenizer.encode_batch(raws), strict=True):
        assert torch.equal(one.content, other.content)
    items = [Encoded(grid=(n,), codes=random_codes(tokenizer, n)) for n in (3, 40, 1)]
    for one_, other_ in zip(map(tokenizer.decode, items), tokenizer.decode_batch(items), strict=True):
        assert np.array_equal(one_.value.samples, other_.value.samples)


def test_mimi_in_a_padded_batch_is_another() -> None:
    """Why sounds go through one by one; when the class learns to (transformers issue 43377), they need not."""
    network = tiny("audio_mimi").network
    x = torch.tensor(sound(100).samples)[None, None]
    padded = torch.nn.functional.pad(x, (0, 900))
    mask = torch.nn.functional.pad(torch.ones_like(x), (0, 900)).bool()
    with torch.no_grad():
        alone, batched = network.encode(x).audio_codes, network.encode(padded, mask).audio_codes
    assert alone.shape[-1] == 7 and batched.shape[-1] == 63


def test_mimi_sees_new_weights() -> None:
    """Its codebooks keep what they computed, across `load_state_dict` too."""
    one, other = tiny("audio_mimi"), tiny("audio_mimi")
    raw = sound(1000)
    before = one.encode(raw).content
    for codebook in one.codebooks():
        codebook.neg_()
    changed = one.encode(raw).content
    assert not torch.equal(changed, before)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.encode(raw).content, changed)


# --- sounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [4000, 11025, 16000, 44100, 44101, 96_001, 192_000])
def test_any_rate(name: str, rate: int) -> None:
    """A tone of 400 Hz has the codes that it has at the network's own rate, nearly."""
    tokenizer = tiny(name)
    own = Audio(np.sin(2 * np.pi * 400 * np.arange(800) / 8000).astype(np.float32), 8000)
    raw = Audio(np.sin(2 * np.pi * 400 * np.arange(rate // 10) / rate).astype(np.float32), rate)
    seen = tokenizer._samples(raw).numpy()
    assert abs(len(seen) - 800) <= 1
    assert np.abs(seen[100:700] - own.samples[100:700]).max() < 0.02
    assert tokenizer.encode(raw).grid == (math.ceil(len(seen) / tokenizer.facts.hop),)


def test_length(name: str) -> None:
    tokenizer = tiny(name)
    most = MAX_FRAMES * tokenizer.facts.hop
    assert tokenizer.encode(sound(most)).grid == (MAX_FRAMES,)
    assert tokenizer.encode(sound(2 * most, 16000)).grid == (MAX_FRAMES,)
    for raw in (sound(most + 1), sound(2 * most + 2, 16000)):
        with pytest.raises(ValueError, match=r"has more than the 256 frames \(.* s\) .*cut it into parts"):
            tokenizer.encode(raw)
    with pytest.raises(ValueError, match="the sound has no sample"):
        tokenizer.encode(sound(0))


@pytest.mark.parametrize("raw", [np.zeros(8, np.float32), "sound.wav", None])
def test_what_is_no_sound(name: str, raw: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a sound \(mm.audio.Audio\)"):
        tiny(name).encode(raw)


@pytest.mark.parametrize("frames", [0, 1, 255, 256, 300])
def test_decoding_any_number_of_frames(name: str, frames: int) -> None:
    tokenizer = tiny(name)
    decoded = tokenizer.decode(Encoded(grid=(frames,), codes=random_codes(tokenizer, frames)))
    assert len(decoded.value.samples) == min(frames, MAX_FRAMES) * tokenizer.facts.hop
    assert np.isfinite(decoded.value.samples).all()
    assert decoded.valid == (1 <= frames <= MAX_FRAMES)


def test_repairs(name: str) -> None:
    tokenizer = tiny(name)
    good = random_codes(tokenizer, 4)
    bad = good.clone()
    bad[0], bad[1, 0] = 10**6, -5
    for codes, reason in (
        (bad, f"{tokenizer.num_codes + 1} codes outside 0..15"),
        (good[:, :1], f"1 codes a frame, expected {tokenizer.num_codes}"),
        (torch.cat([good, good], 1), f"{2 * tokenizer.num_codes} codes a frame"),
    ):
        decoded = tokenizer.decode(Encoded(grid=(4,), codes=codes))
        assert not decoded.valid and reason in decoded.reason
        assert len(decoded.value.samples) == 4 * tokenizer.facts.hop
    wide = tokenizer.decode(Encoded(grid=(4,), codes=torch.cat([good, good], 1)))
    assert np.array_equal(wide.value.samples, tokenizer.decode(Encoded(grid=(4,), codes=good)).value.samples)
    ids = tokenizer.decode(Encoded(grid=(3,), ids=torch.zeros(3, dtype=torch.long)))
    assert not ids.valid and "these are not codes" in ids.reason


def test_values_that_are_not_finite(name: str) -> None:
    tokenizer = tiny(name)
    tokenizer.sound = lambda codes: torch.full((codes.shape[1] * tokenizer.facts.hop,), math.nan)
    decoded = tokenizer.decode(Encoded(grid=(2,), codes=random_codes(tokenizer, 2)))
    assert not decoded.valid and "not finite" in decoded.reason
    assert not decoded.value.samples.any()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_reads_what_the_library_saves_and_the_other_way(name: str, tmp_path: Path) -> None:
    tokenizer = tiny(name)
    tokenizer.network.save_pretrained(tmp_path / "published")
    again = type(tokenizer)(tmp_path / "published", tokenizer.num_codes)
    assert again.spec == tokenizer.spec
    tokenizer.save(tmp_path / "saved")
    saved_, loaded = type(tokenizer.network).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(loaded.values()), "every weight was found, and no other"
    raw = sound(500)
    x = torch.tensor(raw.samples)[None, None]
    assert torch.equal(theirs(name, saved_.eval(), x, tokenizer.num_codes).T, again.encode(raw).content)


def test_saved_with_its_number_of_codes(name: str, tmp_path: Path) -> None:
    tokenizer = type(tiny(name))(tiny(name).network, 1)
    tokenizer.save(tmp_path)
    again = type(tokenizer).from_directory(tmp_path)
    assert again.num_codes == 1 and again.spec == tokenizer.spec
    assert type(tokenizer)(str(tmp_path), 2).num_codes == 2, "what is asked for comes first"
    assert type(tokenizer)(tokenizer.network, 2).spec.fingerprint != tokenizer.spec.fingerprint
    edit(tmp_path / "mm_tokenizer.json", num_codes="two")
    refused(tokenizer, tmp_path, "num_codes in .* must be a whole number")


def test_a_checkpoint_holds_it(name: str, tmp_path: Path) -> None:
    """As the folder of a tokenizer beside a model, and copied to the workers of a loader."""
    tokenizer = tiny(name)
    assert set(tokenizer.arguments()) == {"pretrained", "num_codes"}
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.spec == tokenizer.spec and copy._config() == tokenizer._config()
    raw = sound(300)
    assert torch.equal(copy.encode(raw).content, tokenizer.encode(raw).content)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_converted_adapter_is_read_again(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer = tiny(name).to(dtype)
    decoded = tokenizer.decode(tokenizer.encode(sound(200)))
    assert decoded.valid and decoded.value.samples.dtype == np.float32
    tokenizer.save(tmp_path / "saved")
    assert type(tokenizer).from_directory(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    assert pickle.loads(pickle.dumps(tokenizer))._like().dtype == dtype


def test_old_names_of_weight_norm(tmp_path: Path) -> None:
    """The weights on the hub were written before torch 2.0."""
    tokenizer = tiny("audio_encodec")
    tokenizer.save(tmp_path)
    state = safe_io.read_tensors(tmp_path / "model.safetensors")
    for number, letter in enumerate("gv"):
        end = f".parametrizations.weight.original{number}"
        state = {k.removesuffix(end) + f".weight_{letter}" if k.endswith(end) else k: v for k, v in state.items()}
    assert "encoder.layers.0.conv.weight_g" in state
    safe_io.write_tensors(tmp_path / "model.safetensors", state)
    assert type(tokenizer).from_directory(tmp_path).spec == tokenizer.spec


def test_the_sizes_of_published_checkpoints() -> None:
    """The defaults of the classes (EnCodec and Mimi: those of the 24 kHz checkpoints), and DAC's at 16 and 44.1 kHz."""
    from transformers import DacConfig, EncodecConfig, MimiConfig

    known: list[tuple[str, Any, tuple[int, int, int, int]]] = [
        ("audio_encodec", EncodecConfig(), (24000, 320, 32, 1024)),
        ("audio_encodec", EncodecConfig(sampling_rate=32000, upsampling_ratios=[8, 5, 4, 4], target_bandwidths=[2.2],
                                        codebook_size=2048), (32000, 640, 4, 2048)),
        ("audio_dac", DacConfig(downsampling_ratios=[2, 4, 5, 8], n_codebooks=12), (16000, 320, 12, 1024)),
        ("audio_dac", DacConfig(sampling_rate=44100), (44100, 512, 9, 1024)),
        ("audio_mimi", MimiConfig(), (24000, 1920, 32, 2048)),
        ("audio_mimi", MimiConfig(frame_rate=12.5), (24000, 1920, 32, 2048)),
    ]  # fmt: skip
    for name, config, expected in known:
        facts = plugins.load("tokenizers", name)._facts(config)  # type: ignore[attr-defined]
        assert (facts.sample_rate, facts.hop, facts.codebooks, facts.vocab_size) == expected


def test_stays_in_evaluation_mode(name: str) -> None:
    tokenizer = tiny(name)
    torch.nn.Sequential(tokenizer).train()
    assert not any(module.training for module in tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert tokenizer.waveform


def test_loading_draws_no_random_numbers(name: str, tmp_path: Path) -> None:
    tokenizer = tiny(name)
    tokenizer.save(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    type(tokenizer).from_directory(tmp_path)
    assert torch.equal(torch.rand(3), expected)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    tiny(name).save(tmp_path)
    return tmp_path


def refused(tokenizer: Any, source: Any, message: str, num_codes: Any = 0) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        (tokenizer if isinstance(tokenizer, type) else type(tokenizer))(source, num_codes)
    assert "\n" not in str(caught.value).strip()


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_codebooks_of_zeros() -> None:
    """As the classes begin, and as no trained network is."""
    for name, end in (("audio_encodec", "codebook.embed"), ("audio_mimi", "codebook.embed_sum")):
        network = tiny(name).network
        last = [value for key, value in network.state_dict().items() if key.endswith(end)][-1]
        last.zero_()
        tokenizer = plugins.load("tokenizers", name)
        assert tokenizer(network, 3).num_codes == 3  # type: ignore[call-arg]  # it is not among those in use
        refused(tokenizer, network, "codebook 3 of .* is all zeros, .*never trained.*use a published checkpoint", 4)


def test_weights_that_are_not_finite(name: str) -> None:
    network = tiny(name).network
    next(network.parameters()).data[0] = math.nan
    refused(plugins.load("tokenizers", name), network, "weights that are not finite")


@pytest.mark.parametrize("num_codes", [-1, 5, True, 2.0])
def test_a_number_of_codes_that_it_does_not_have(name: str, num_codes: Any) -> None:
    refused(tiny(name), tiny(name).network, r"num_codes of this network must be a whole number in 1\.\.[34]", num_codes)


def test_mimi_needs_its_semantic_codebooks() -> None:
    tokenizer = tiny("audio_mimi")
    config = {**tokenizer._config(), "num_semantic_quantizers": 2}
    network = tokenizer._build({key: value for key, value in config.items() if value is not None})
    refused(tokenizer, network, r"in 2\.\.4, got 1", 1)


@pytest.mark.parametrize("source", [3, None, ["a"]])
def test_neither_a_folder_nor_a_network(name: str, source: Any) -> None:
    refused(tiny(name), source, "expected a folder .* or a network")


def test_another_network(name: str, tmp_path: Path) -> None:
    other = NAMES[(NAMES.index(name) + 1) % 3]
    refused(tiny(name), tiny(other).network, "expected a .* network of transformers")
    refused(tiny(name), torch.nn.Linear(2, 2), "expected a .* network of transformers")
    tiny(other).save(tmp_path)
    refused(tiny(name), tmp_path, "describes a network of type .* use its own tokenizer")


def test_missing_files(name: str, folder: Path) -> None:
    tokenizer = tiny(name)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    refused(tokenizer, folder, "no model.safetensors in")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(tokenizer, folder, "pytorch_model.bin' is a pickle")
    (folder / "config.json").unlink()
    refused(tokenizer, folder, "config.json' is missing")
    refused(tokenizer, folder / "none", "no folder")


def test_damaged_weights(name: str, folder: Path) -> None:
    tokenizer = tiny(name)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for content, message in (
        (data[: len(data) // 2], "damaged or not a safetensors file"),
        (data[:4], "damaged or not a safetensors file"),
        (b"", "damaged or not a safetensors file"),
        (b"\x80\x02" + data, "is a pickle under another name"),
        (data + b"\0" * (1 << 25), "is larger than"),
    ):
        file.write_bytes(content)
        refused(tokenizer, folder, message)


def test_weights_of_another_configuration(name: str, folder: Path) -> None:
    tokenizer = tiny(name)
    file = folder / "model.safetensors"
    state = safe_io.read_tensors(file)
    first = sorted(state)[0]
    for changed, message in (
        ({key: value for key, value in state.items() if key != first}, "lacks"),
        ({**state, "more": torch.zeros(1)}, "has more too many"),
        ({**state, first: state[first].new_zeros(9, 9, 9)}, r"has shape \(9, 9, 9\)"),
        ({**state, first: state[first].long()}, "has dtype torch.int64"),
    ):
        safe_io.write_tensors(file, changed)
        refused(tokenizer, folder, message)


def test_weights_outside_the_folder(name: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "model.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    refused(tiny(name), folder, "a link that leads out of its folder")


BAD: list[tuple[str, dict[str, object], str]] = [
    # an amount of memory or of layers that no such network has, refused before any is taken
    ("audio_encodec", {"hidden_size": 1 << 20, "codebook_dim": 1 << 20}, "far more memory than its weights file holds"),
    ("audio_encodec", {"num_filters": 1 << 19}, "far more memory than its weights file holds"),
    ("audio_encodec", {"target_bandwidths": [1e15]}, "codebooks, at most 64"),
    ("audio_encodec", {"num_lstm_layers": 99999}, "num_lstm_layers .*which no such network has"),
    ("audio_encodec", {"dilation_growth_rate": 1 << 19}, "dilation_growth_rate .*which no such network has"),
    ("audio_encodec", {"num_residual_layers": 10}, "num_residual_layers .*which no such network has"),
    ("audio_dac", {"encoder_hidden_size": 1 << 18}, "does not describe this network: .*more memory than its weights"),
    ("audio_dac", {"downsampling_ratios": [2] * 63}, "does not describe this network"),
    ("audio_dac", {"n_codebooks": 100000}, "n_codebooks .*which no such network has"),
    ("audio_mimi", {"num_hidden_layers": 5000}, "num_hidden_layers .*which no such network has"),
    ("audio_mimi", {"intermediate_size": 1 << 20, "hidden_size": 1 << 16}, "does not describe this network"),
    ("audio_mimi", {"frame_rate": 1e-9}, "does not describe this network"),
    # values that its class does not check, or only when it is used
    ("audio_encodec", {"upsampling_ratios": [4, 0]}, "does not describe this network"),
    ("audio_encodec", {"codebook_size": 1}, "does not describe this network"),
    ("audio_encodec", {"codebook_size": "many"}, "does not describe this network"),
    ("audio_encodec", {"pad_mode": "wrong"}, "can't encode and decode 1 frames"),
    ("audio_encodec", {"target_bandwidths": []}, "does not describe this network"),
    ("audio_encodec", {"norm_type": "none"}, "does not describe this network"),
    ("audio_dac", {"downsampling_ratios": "2222"}, "does not describe this network"),
    ("audio_dac", {"codebook_dim": -1}, "does not describe this network"),
    ("audio_dac", {"sampling_rate": 10}, "sampling_rate of .* must be a whole number in 1000"),
    ("audio_mimi", {"frame_rate": 1000.0}, "belongs to another configuration|expected a whole part"),
    ("audio_mimi", {"hidden_act": "none_such"}, "does not describe this network"),
    ("audio_mimi", {"norm_eps": -1e6}, "decodes silence to values that are not finite"),
    ("audio_mimi", {"num_quantizers": 1}, "does not describe this network"),
    # what codes alone can't say
    ("audio_encodec", {"normalize": True}, "a loudness each, which codes do not hold"),
    ("audio_encodec", {"chunk_length_s": 1.0, "overlap": 0.01}, "use one of 24 or 32 kHz"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_configuration_that_does_not_fit(name: str, changes: dict[str, object], message: str, tmp_path: Path) -> None:
    tokenizer = tiny(name)
    tokenizer.save(tmp_path)
    edit(tmp_path / "config.json", **changes)
    refused(tokenizer, tmp_path, message)


def test_stereo() -> None:
    tokenizer = tiny("audio_encodec")
    config = {**tokenizer._config(), "audio_channels": 2}
    network = tokenizer._build({key: value for key, value in config.items() if value is not None})
    refused(tokenizer, network, "has 2 channels, but sounds are mono here: use a mono checkpoint")


def test_settings_of_strangers_are_not_passed_on(name: str, folder: Path) -> None:
    """Such as which code computes attention."""
    edit(
        folder / "config.json", attn_implementation="flash_attention_2", auto_map={"AutoModel": "a--b.C"}, dtype="int8"
    )
    edit(folder / "config.json", _attn_implementation="kernels-community/x", use_streaming=True, quantization_config={})
    assert type(tiny(name)).from_directory(folder).spec == tiny(name).spec
