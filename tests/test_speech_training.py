"""Sounds in memory, and the training of the speech tokenizers on them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from mm.audio import Audio, to_wav
from mm.data.sounds import SoundsDataModule, SoundSource, read_sounds
from mm.ema import EMA
from mm.speech_losses import SpeechDiscriminators
from mm.speech_tokenizer import SpeechTokenizer
from mm.tokenizers.speech_codec import SpeechCodec
from mm.tokenizers.speech_vae import SpeechVAE
from mm.training_speech import SpeechTokenizerModule

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


def shard(path: Path, lengths: list[float], rate: int = 16_000, extra: dict[str, bytes] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        members: dict[str, bytes] = {}
        for n, seconds in enumerate(lengths):
            members[f"{n:03d}.wav"] = to_wav(Audio(voice(seconds, rate, seed=n), rate))
            members[f"{n:03d}.json"] = json.dumps({"index": n, "speaker": "ab"[n % 2]}).encode()
        for name, data in (members | (extra or {})).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def module_of(path: Path, **options: Any) -> SoundsDataModule:
    settings: dict[str, Any] = dict(samples=8192, batch_size=4, batches=10) | options
    return SoundsDataModule([SoundSource(path=str(path), hold_out={"index": [1, 4]})], **settings)


def test_sounds_are_read_and_held_out(tmp_path: Path) -> None:
    found = read_sounds(
        SoundSource(path=str(shard(tmp_path / "a.tar", [0.5] * 6, 8_000)), hold_out={"index": [1, 4]}), 16_000
    )
    assert [len(x) for x in found.samples] == [8_000] * 6
    assert found.held_out == [False, True, False, False, True, False]


def test_a_sound_without_record_is_held_out(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [0.1], extra={"x.wav": to_wav(Audio(voice(0.1), 16_000))})
    assert read_sounds(SoundSource(path=str(path), hold_out={"index": [7]}), 16_000).held_out == [False, True]


def test_held_out_values_are_compared_as_they_are_written(tmp_path: Path) -> None:
    records = [{"index": "5"}, {"index": 5}, {"index": 6}, {"speaker": "a"}, {"index": None}]
    extra = {f"x{n}.json": json.dumps(record).encode() for n, record in enumerate(records)}
    extra |= {f"x{n}.wav": to_wav(Audio(voice(0.1), 16_000)) for n in range(len(records))}
    path = str(shard(tmp_path / "a.tar", [], extra=extra))
    for values in ([5], ["5"]):
        found = read_sounds(SoundSource(path=path, hold_out={"index": values}), 16_000)  # type: ignore[dict-item]
        assert found.held_out == [True, True, False, True, False]
    assert not any(read_sounds(SoundSource(path=path), 16_000).held_out)
    whole = str(shard(tmp_path / "b.tar", [0.1, 0.1]))
    with pytest.raises(ValueError, match="holds nothing of what is held out, {'index': .9.}"):
        read_sounds(SoundSource(path=whole, hold_out={"index": [9]}), 16_000)


def test_every_kind_of_sound_is_read(tmp_path: Path) -> None:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, voice(0.2), 16_000, format="MP3")
    path = shard(tmp_path / "a.tar", [0.1], extra={"x.mp3": file.getvalue()})
    assert len(read_sounds(SoundSource(path=str(path)), 16_000).samples) == 2


def test_broken_sounds_are_skipped_or_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [0.1, 0.1], extra={"bad.wav": b"RIFF nothing", "other.txt": b"text"})
    with pytest.warns(UserWarning, match="skipped 1 broken members, the first is 'bad.wav'"):
        assert len(read_sounds(SoundSource(path=str(path)), 16_000).samples) == 2
    with pytest.raises(ValueError, match=r"bad\.wav"):
        read_sounds(SoundSource(path=str(path)), 16_000, strict=True)
    with tarfile.open(path) as tar:
        inside = tar.getmember("001.wav").offset_data + 100
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:inside])
    with pytest.warns(UserWarning, match="damaged rest"):
        assert len(read_sounds(SoundSource(path=str(tmp_path / "cut.tar")), 16_000).samples) == 1
    (tmp_path / "none.tar").write_bytes(b"no tar" * 1000)
    for wrong in ("none.tar", "missing.tar"):
        with pytest.raises(ValueError, match="damaged, or not a tar|no sound file"):
            read_sounds(SoundSource(path=str(tmp_path / wrong)), 16_000)


def test_too_much_sound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.data.sounds.MAX_SAMPLES_IN_MEMORY", 10_000)
    with pytest.raises(ValueError, match="more than 10,000 samples"):
        read_sounds(SoundSource(path=str(shard(tmp_path / "a.tar", [0.5, 0.5]))), 16_000)


def test_crops(tmp_path: Path) -> None:
    """Held-out sounds never occur, crops are full, and a resumed epoch goes on with the same ones."""
    data = module_of(shard(tmp_path / "a.tar", [2.0, 2.0, 0.1, 1.0, 2.0, 3.0]), gain=0.0)
    data.setup()
    assert sorted(data.held_in[0].tolist()) == [0, 2, 3, 5] and data.held_out == [1, 4]
    loader = data.train_dataloader()
    first = [batch.samples for batch in loader]
    assert len(first) == 10 and loader.state_dict() == {"epoch": 1, "done": 0}
    own = {row: data._sound(row).numpy() for row in range(6)}
    for x in torch.cat(first).numpy():
        head = x[np.flatnonzero(x)[:200]]
        places = [r for r, s in own.items() for w in [np.lib.stride_tricks.sliding_window_view(s[s != 0], 200)]
                  if np.any(np.all(w[:, ::40] == head[::40], axis=1))]  # fmt: skip
        assert places and not {1, 4} & set(places)
    loader.load_state_dict({"epoch": 0, "done": 6})
    for a, b in zip(loader, first[6:], strict=True):
        assert torch.equal(a.samples, b)


def test_loudness_varies_within_full_scale(tmp_path: Path) -> None:
    data = module_of(shard(tmp_path / "a.tar", [2.0, 2.0, 2.0]), batch_size=16, gain=40.0)
    data.setup()
    peaks = torch.cat([batch.samples for batch in data.train_dataloader()]).abs().amax(1)
    assert float(peaks.max()) <= 1.0001 and float(peaks.max() / peaks.min()) > 30


def module(tokenizer: SpeechTokenizer, save_to: Path | None = None) -> SpeechTokenizerModule:
    return SpeechTokenizerModule(
        tokenizer, learning_rate=3e-3, warmup=5, warm_start=16, save_to=None if save_to is None else str(save_to)
    )


def trainer(path: Path, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = dict(
        accelerator="cpu", max_epochs=-1, default_root_dir=path, enable_progress_bar=False, enable_model_summary=False,
        logger=False, enable_checkpointing=False, num_sanity_val_steps=0, check_val_every_n_epoch=None,
    )  # fmt: skip
    return L.Trainer(**settings | options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_lowers_the_loss_and_saves(kind: Any, precision: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = SMALL | (dict(code_dim=8, codebook_size=32) if kind is SpeechCodec else dict(latent=8))
    tokenizer = kind(**small)
    fit = module(tokenizer, tmp_path / "saved")
    data = module_of(shard(tmp_path / "a.tar", [1.0] * 6))
    run = trainer(tmp_path, max_steps=40, val_check_interval=20, precision=precision, callbacks=[EMA(0.9)])
    before: list[float] = []
    data.setup()
    tokenizer.train()
    with torch.no_grad():
        x = data.sample(8)
        if kind is SpeechCodec:
            tokenizer.warm_start(x)
        tokenizer.eval()
        before.append(float(sum(fit.losses(tokenizer.reconstruct(x).output, x).values())))
    run.fit(fit, datamodule=data)
    loaded = kind.from_directory(tmp_path / "saved")
    with torch.no_grad():
        after = float(sum(fit.losses(loaded.reconstruct(x).output, x).values()))
    assert after < 0.8 * before[0]
    assert {"val/mel", "val/mel/a", "val/stft"} <= set(run.callback_metrics)
    if kind is SpeechCodec:
        assert 0 < float(run.callback_metrics["val/usage"]) <= 1
    assert loaded.decode(loaded.encode(Audio(voice(0.5), 16_000))).valid


def test_gradients_of_the_adversary_are_kept_apart() -> None:
    """The judges learn to tell the two apart, the output learns to be taken for real; neither moves the other."""
    torch.manual_seed(0)
    judges = SpeechDiscriminators(resolutions=(256,), channels=4)
    wanted = torch.from_numpy(np.stack([voice(0.25), voice(0.25, seed=1)]))
    output = (0.05 * torch.randn(2, 4000)).requires_grad_()
    terms = judges.losses(output, wanted)
    judge = [p for p in judges.parameters() if p.requires_grad]
    assert torch.autograd.grad(terms["discriminator"], [output], retain_graph=True, allow_unused=True) == (None,)
    for name in ("generator", "features"):
        assert all(g is None for g in torch.autograd.grad(terms[name], judge, retain_graph=True, allow_unused=True))
        assert float(torch.autograd.grad(terms[name], output, retain_graph=True)[0].abs().max()) > 0
    optimizer = torch.optim.Adam(judge, 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        judges.losses(output, wanted)["discriminator"].backward()
        optimizer.step()
    after = judges.losses(output, wanted)
    assert after["discriminator"].item() < 0.5 * terms["discriminator"].item()
    assert judges.losses(wanted.clone(), wanted)["features"].item() < 1e-6


def test_training_with_an_adversary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fit = SpeechTokenizerModule(
        SpeechVAE(**SMALL, latent=4), adversarial=1.0, adversarial_start=2, warmup=1, warm_start=0
    )
    assert fit.discriminators is not None
    before = [p.detach().clone() for p in fit.discriminators.parameters()]
    run = trainer(tmp_path, max_steps=4, limit_val_batches=0, gradient_clip_val=1.0, log_every_n_steps=1)
    run.fit(fit, datamodule=module_of(shard(tmp_path / "a.tar", [1.0] * 6), batch_size=2))
    assert run.global_step == 4
    assert any(not torch.equal(a, b) for a, b in zip(before, fit.discriminators.parameters(), strict=True))
    assert {"train/generator", "train/features", "train/discriminator"} <= set(run.callback_metrics)


def test_training_resumes_exactly(kind: Any, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    path = shard(tmp_path / "a.tar", [1.0] * 6)

    def fit(steps: int, resume: str | None = None, folder: str = "whole") -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        small = SMALL | (dict(code_dim=8, codebook_size=32) if kind is SpeechCodec else dict(latent=8))
        made = module(kind(**small))
        keep = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=3)
        run = trainer(tmp_path, max_steps=6, limit_val_batches=0, enable_checkpointing=True, callbacks=[keep, EMA(0.9)])
        if resume is None and steps < 6:
            made.on_train_batch_end = lambda *a: setattr(run, "should_stop", run.global_step >= steps)  # type: ignore[method-assign]
        run.fit(made, datamodule=module_of(path, batches=100), ckpt_path=resume, weights_only=False)
        return {k: v.clone() for k, v in made.state_dict().items()}

    whole = fit(6)
    fit(3, folder="half")
    rest = fit(6, resume=str(tmp_path / "half" / "last.ckpt"), folder="rest")
    for name, value in whole.items():
        torch.testing.assert_close(rest[name], value, msg=name)
