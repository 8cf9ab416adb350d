"""Speech codec and speech autoencoder: what they make of sounds of any length, and their files. The plug-in contract
is tested in `test_tokenizers_contract`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm import speech, speech_tokenizer
from mm.audio import Audio
from mm.interfaces import Encoded
from mm.speech_losses import SpectralLosses
from mm.speech_tokenizer import SpeechTokenizer
from mm.tokenizers.speech_codec import SpeechCodec
from mm.tokenizers.speech_vae import SpeechVAE

KINDS: list[type[SpeechTokenizer]] = [SpeechCodec, SpeechVAE]
SMALL: dict[str, Any] = dict(width=16, blocks=(1, 1), decoder_blocks=(1, 1), expansion=2)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param


def voice(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray[Any, Any]:
    """A buzz whose pitch and loudness change, with a little noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    pitch = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 1.3 * t + seed)) / rate
    buzz = sum(np.sin(k * pitch) / k for k in range(1, 12))
    return (0.2 * buzz * np.sin(np.pi * 3 * t) ** 2 + 0.002 * rng.standard_normal(len(t))).astype(np.float32)


# --- spectra --------------------------------------------------------------------------------------------------------


def test_overlap_add_is_the_transpose_of_frames() -> None:
    x, y = torch.randn(2, 640, dtype=torch.double), torch.randn(2, 10, 256, dtype=torch.double)
    assert speech.frames(x, 256, 64).shape == y.shape
    torch.testing.assert_close((speech.frames(x, 256, 64) * y).sum(), (x * speech.overlap_add(y, 64)).sum())


def test_the_head_inverts_an_stft() -> None:
    """With the true magnitudes and phases it gives back the sound, ends included."""
    x = torch.from_numpy(voice(0.512))[None]
    head = speech.SpectralHead(1026)
    found = torch.fft.rfft(speech.frames(x, 1024, 256) * head.window)
    with torch.no_grad():
        head.project.weight.copy_(torch.eye(1026))
        head.project.bias.zero_()
    made = head(torch.cat([found.abs().clamp_min(1e-9).log(), found.angle()], dim=-1))
    torch.testing.assert_close(made, x, atol=1e-4, rtol=0)


def test_log_mel_finds_a_tone() -> None:
    t = torch.arange(8192) / 16_000
    mel = speech.LogMel()(torch.sin(2 * torch.pi * 1000 * t)[None])
    assert mel.shape == (1, 32, 80)
    centre = 700 * (10 ** ((torch.arange(1, 81) / 81 * 2840.02) / 2595) - 1)  # of the triangles on the HTK scale
    assert abs(float(centre[mel[0, 16].argmax()]) - 1000) < 60
    assert float(speech.LogMel()(torch.zeros(1, 1024)).max()) == pytest.approx(float(np.log(speech.FLOOR)))


def test_griffin_lim_keeps_the_mel_spectrum() -> None:
    x = torch.from_numpy(voice(1.024))[None]
    front = speech.LogMel()
    mel = front(x)
    made = speech.griffin_lim(mel, 16_000, 1024, 256)
    assert made.shape == x.shape
    assert torch.equal(made, speech.griffin_lim(mel, 16_000, 1024, 256))
    assert float((front(made) - mel).abs().mean()) < 0.35


def test_losses_are_nought_for_the_same_sound_only() -> None:
    judge = SpectralLosses(16_000, 1024, 256, 80)
    x, y = (torch.from_numpy(np.stack([voice(0.5, seed=s), voice(0.5, seed=s + 1)])) for s in (0, 5))
    same, other = judge(x, x), judge(y, x)
    for name in ("stft", "mel"):
        assert float(same[name]) < 1e-3 < 0.1 < float(other[name])


# --- lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "rate"), [(1, 16_000), (160, 16_000), (511, 16_000), (512, 16_000), (513, 16_000),
                                             (441, 44_100), (7_919, 11_025), (1, 48_000), (9_999, 8_000)])  # fmt: skip
def test_any_length(kind: Any, count: int, rate: int) -> None:
    tokenizer = kind.tiny()
    sound = Audio(0.1 * np.random.default_rng(0).standard_normal(count), rate)
    encoded = tokenizer.encode(sound)
    at_rate = -(-count * 16_000 // rate)
    assert encoded.grid == (-(-at_rate // 512),)
    decoded = tokenizer.decode(encoded)
    assert decoded.valid and decoded.value.rate == 16_000
    assert len(decoded.value.samples) == 512 * len(encoded)


@pytest.mark.parametrize(("rate", "strides", "hertz"), [(16_000, [2], 31.25), (8_000, [2], 31.25), (16_000, [3], 62.5 / 3),
                                                        (16_000, [1, 2], 31.25), (8_000, [2, 2], 15.625)])  # fmt: skip
def test_rates_and_strides(kind: Any, rate: int, strides: list[int], hertz: float) -> None:
    blocks = [1] * (len(strides) + 1)
    tokenizer = kind(rate=rate, strides=strides, width=16, blocks=blocks, decoder_blocks=blocks).eval()
    tokenizer.warm_start(torch.randn(2, 200 * tokenizer.samples_per_element))
    tokenizer.before_saving(torch.randn(2, 4 * tokenizer.samples_per_element))
    tokenizer.eval()
    assert tokenizer.spec.frame_rate == pytest.approx(hertz)
    assert tokenizer.spec.sample_rate == rate
    encoded = tokenizer.encode(Audio(voice(1.0, 16_000), 16_000))
    assert len(encoded) == int(np.ceil(hertz))
    assert len(tokenizer.decode(encoded).value.samples) == pytest.approx(len(encoded) * rate / hertz)


def test_no_sound_no_code(kind: Any) -> None:
    with pytest.raises(ValueError, match="no sample"):
        kind.tiny().encode(Audio(np.zeros(0), 16_000))
    with pytest.raises(ValueError, match="expected a sound .* got ndarray"):
        kind.tiny().encode(np.zeros(512))


def test_enormous_samples_make_finite_elements(kind: Any) -> None:
    encoded = kind.tiny().encode(Audio(np.full(1000, 3e38), 16_000))
    assert encoded.content.isfinite().all()


@pytest.mark.parametrize("strides", [[2], [3], [1, 2]])
def test_pieces_equal_the_whole(kind: Any, strides: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sounds go through the networks in pieces; every output is the same, so the networks see far enough."""
    blocks = list(range(1, len(strides) + 2))
    few = dict(codebook_size=16, code_dim=8) if kind is SpeechCodec else {}  # more than one vector a code: fewer ties
    tokenizer = kind(strides=strides, width=16, blocks=blocks, decoder_blocks=blocks[::-1], expansion=2, **few).eval()
    for block in tokenizer.modules():
        if isinstance(block, speech.ConvNeXtBlock):
            torch.nn.init.ones_(block.scale)  # what is far away must matter
    x = torch.from_numpy(voice(6.0))
    x = x[: len(x) // tokenizer.samples_per_element * tokenizer.samples_per_element]
    if kind is SpeechVAE:
        tokenizer.before_saving(x[None, : 40 * tokenizer.samples_per_element])
    else:
        tokenizer.warm_start(x[None])
        tokenizer.eval()
    sound = Audio(x.numpy(), 16_000)
    whole = tokenizer.encode(sound)
    made = tokenizer.decode(whole).value.samples
    monkeypatch.setattr(speech_tokenizer, "PIECE", 20)
    parts = tokenizer.encode(sound)
    assert 20 + 2 * tokenizer.encoder_reach < len(whole), "the sound is too short for pieces"
    if kind is SpeechVAE:
        torch.testing.assert_close(parts.content, whole.content, atol=1e-4, rtol=1e-4)
    else:
        assert float((parts.content == whole.content).float().mean()) > 0.995  # ties may fall either way
    np.testing.assert_allclose(tokenizer.decode(whole).value.samples, made, atol=1e-4)


def test_pieces_would_differ_with_less_context() -> None:
    """Guards the test above: without context the seams show."""
    torch.manual_seed(0)
    encoder = speech.SpeechEncoder(80, 16, [1, 2], [2], 8, 2)
    for block in encoder.modules():
        if isinstance(block, speech.ConvNeXtBlock):
            torch.nn.init.ones_(block.scale)
    mel = torch.randn(1, 200, 80)
    far = speech.reach([1, 2], [2], 1024, 256)

    def run(context: int) -> torch.Tensor:
        return speech.in_pieces(encoder, mel, core=20, context=context, unit=2, made=1)

    with torch.no_grad():
        whole = encoder(mel)
        torch.testing.assert_close(run(far), whole, atol=1e-5, rtol=1e-5)
        assert float((run(2) - whole).abs().max()) > 1e-3


def test_a_long_sound_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece is longer than it should be, whatever the sound."""
    tokenizer = SpeechCodec.tiny()
    seen: list[int] = []
    analysed = tokenizer.analysed
    monkeypatch.setattr(tokenizer, "analysed", lambda x: (seen.append(x.shape[1]), analysed(x))[1])
    assert len(tokenizer.encode(Audio(np.zeros(16_000 * 100), 16_000))) == 3125
    assert len(seen) > 3 and max(seen) <= 512 * (speech_tokenizer.PIECE + 2 * tokenizer.encoder_reach)


# --- decoding -------------------------------------------------------------------------------------------------------


def test_any_codes_decode_to_finite_sound() -> None:
    tokenizer = SpeechCodec.tiny()
    with torch.no_grad():
        tokenizer.decoder.head.project.bias.fill_(1e4)
    rng = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 256, 700):
        decoded = tokenizer.decode(
            Encoded(grid=(count,), codes=torch.randint(0, tokenizer.spec.vocab_size, (count, 4), generator=rng))
        )
        assert decoded.valid and np.isfinite(decoded.value.samples).all()
        assert len(decoded.value.samples) == 512 * count
    for codes in (torch.full((3, 4), -1), torch.full((3, 4), 1 << 40), torch.zeros(3, 2, dtype=torch.long)):
        decoded = tokenizer.decode(Encoded(grid=(3,), codes=codes))
        assert not decoded.valid and len(decoded.value.samples) == 3 * 512
    assert not tokenizer.decode(Encoded(grid=(3,), ids=torch.zeros(3, dtype=torch.long))).valid


@pytest.mark.parametrize("vocoder", ["istft", "griffin_lim"])
def test_any_vectors_decode_to_finite_sound(vocoder: str) -> None:
    tokenizer = SpeechVAE.tiny()
    tokenizer.vocoder = vocoder
    for value in (0.0, 1e30, float("inf"), float("nan")):
        decoded = tokenizer.decode(Encoded(grid=(5,), latents=torch.full((5, 4), value)))
        assert np.isfinite(decoded.value.samples).all() and len(decoded.value.samples) == 5 * 512
        assert decoded.valid == bool(np.isfinite(value))


def test_an_untrained_autoencoder_says_so() -> None:
    tokenizer = SpeechVAE(**SMALL, latent=4).eval()
    with pytest.raises(ValueError, match="no statistics"):
        tokenizer.encode(Audio(np.zeros(512), 16_000))
    decoded = tokenizer.decode(Encoded(grid=(2,), latents=torch.zeros(2, 4)))
    assert not decoded.valid and "not trained" in decoded.reason


def test_an_untrained_codec_says_so() -> None:
    """It must not fit its codebooks to the first sound that it is asked to encode."""
    tokenizer = SpeechCodec(**SMALL).eval()
    before = tokenizer.spec.fingerprint
    with pytest.raises(ValueError, match="codebooks are empty"):
        tokenizer.encode(Audio(np.zeros(512), 16_000))
    decoded = tokenizer.decode(Encoded(grid=(2,), codes=torch.zeros(2, 4, dtype=torch.long)))
    assert not decoded.valid and "not trained" in decoded.reason
    tokenizer.weights_changed()
    assert tokenizer.spec.fingerprint == before


def test_batch_equals_single(kind: Any) -> None:
    tokenizer = kind.tiny()
    sounds = [Audio(voice(s, seed=n), 16_000) for n, s in enumerate((0.3, 0.5, 0.3, 0.1))]
    together = tokenizer.encode_batch(sounds)
    for sound, encoded in zip(sounds, together, strict=True):
        torch.testing.assert_close(tokenizer.encode(sound).content, encoded.content, atol=1e-4, rtol=1e-4)
    for encoded, decoded in zip(together, tokenizer.decode_batch(together), strict=True):
        np.testing.assert_allclose(tokenizer.decode(encoded).value.samples, decoded.value.samples, atol=1e-5)


# --- quantisers -----------------------------------------------------------------------------------------------------


def test_fsq_codes_round_trip() -> None:
    """Ids stand for exactly the latents that were rounded, group by group."""
    torch.manual_seed(0)
    tokenizer = SpeechCodec(**SMALL, quantizer="fsq", num_codes=3, levels=(5, 3)).eval()
    assert (tokenizer.spec.num_codes, tokenizer.spec.vocab_size) == (3, 15)
    z = torch.randn(2, 7, 6)
    latents, ids, _ = tokenizer.quantized(z)
    assert ids.shape == (2, 7, 3) and len(ids.unique()) > 5
    torch.testing.assert_close(tokenizer.looked_up(ids), latents)
    one, one_ids, _ = tokenizer.quantized(torch.cat([z[..., :2], torch.zeros(2, 7, 4)], dim=-1))
    assert torch.equal(one_ids[..., 0], ids[..., 0]) and torch.equal(one[..., :2], latents[..., :2])


def test_fewer_codebooks_are_what_the_first_ones_say() -> None:
    torch.manual_seed(0)
    tokenizer = SpeechCodec(**SMALL, code_dim=4, codebook_size=16, dropout=1.0, num_codes=2).train()
    x = torch.from_numpy(voice(1.024)).repeat(4, 1)
    tokenizer.warm_start(x)
    z = torch.randn(3, 5, 4, requires_grad=True)
    latents, ids, _ = tokenizer.quantized(z)
    fewer = tokenizer._fewer(z, latents, ids)  # with K = 2, always the first alone
    first = tokenizer.quantizer.layer.get_codes_from_indices(ids)[0]  # type: ignore[operator, union-attr]
    torch.testing.assert_close(fewer, first)
    fewer.sum().backward()
    torch.testing.assert_close(z.grad, torch.ones_like(z))  # straight through


# --- files ----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(kind: Any, tmp_path: Path) -> None:
    tokenizer = kind.tiny()
    tokenizer.save(tmp_path / "t")
    again = kind.from_directory(tmp_path / "t")
    assert again.spec == tokenizer.spec
    sound = Audio(voice(0.5), 16_000)
    assert torch.equal(again.encode(sound).content, tokenizer.encode(sound).content)
    with torch.no_grad():
        again.decoder.head.project.bias += 1  # a better decoder makes other sound of the same elements
    again.weights_changed()
    assert again.spec.fingerprint == tokenizer.spec.fingerprint
    with torch.no_grad():
        again.encoder.last.bias += 1
    again.weights_changed()
    assert again.spec.fingerprint != tokenizer.spec.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 4000}, "far more memory|shape"),
        ({"expansion": 16, "width": 4096, "blocks": [64, 64]}, "far more memory"),
        ({"mels": 0}, "mels must be a whole number"),
        ({"strides": [0]}, "each of strides"),
        ({"strides": [8, 8]}, "blocks must be|strides may join"),
        ({"blocks": [1]}, "blocks must be 2 numbers"),
        ({"blocks": [1, -1]}, "blocks must be 2 numbers"),
        ({"rate": 44_100}, "rate must be one of"),
        ({"unknown": 1}, "unknown settings"),
    ],
)
def test_damaged_settings_are_refused(kind: Any, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    kind.tiny().save(tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    saved = json.loads(file.read_text())
    saved["config"] |= change
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        kind.from_directory(tmp_path / "t")


def test_a_codebook_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    SpeechCodec.tiny().save(tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    saved = json.loads(file.read_text())
    saved["config"] |= {"codebook_size": 1 << 18, "code_dim": 256}
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="far more memory|asks for"):
        SpeechCodec.from_directory(tmp_path / "t")


def test_the_vocoder_is_chosen_for_any_saved_one(tmp_path: Path) -> None:
    SpeechVAE.tiny().save(tmp_path / "t")
    one, other = (SpeechVAE(pretrained=str(tmp_path / "t"), vocoder=v) for v in ("istft", "griffin_lim"))  # type: ignore[arg-type]
    encoded = one.encode(Audio(voice(0.3), 16_000))
    assert not np.allclose(one.decode(encoded).value.samples, other.decode(encoded).value.samples)
    assert one.spec == other.spec
    with pytest.raises(ValueError, match="vocoder must be istft or griffin_lim"):
        SpeechVAE(vocoder="vocos")  # type: ignore[arg-type]
