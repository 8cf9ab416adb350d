"""Spectrograms of what the speech systems make: a recording, what is left of it after the tokenizers, and sentences that models
speak.

    python docs/figures/speech.py --codec runs/speech_codec/tokenizer --vae runs/speech_vae/tokenizer \\
        --model runs/musicgen/model --model runs/ardit/model --out docs/speech.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

from mm.audio import Audio, log_mel, resample  # noqa: E402
from mm.data.shards import ShardSource  # noqa: E402

SAID = "three five one seven"


def clip(path: str, **wanted: Any) -> Audio:
    """The first example of a shard with these fields."""
    source = ShardSource([path], split="all")
    for index in range(len(source)):
        example = source[index]
        if all(example.get(name) == value for name, value in wanted.items()):
            return example["audio"]
    raise ValueError(f"{path} has no example with {wanted}")


def panels(args: argparse.Namespace) -> list[tuple[str, Audio]]:
    from mm.pipelines.text_to_speech import TextToSpeechPipeline
    from mm.tokenizers.speech_codec import SpeechCodec
    from mm.tokenizers.speech_vae import SpeechVAE

    codec = SpeechCodec.from_directory(args.codec)
    vae, lim = SpeechVAE.from_directory(args.vae), SpeechVAE.from_directory(args.vae)
    lim.vocoder = "griffin_lim"
    out = []
    clips = [
        ("a recording, theo: seven", clip(args.real, speaker="theo", text="seven", index=5)),
        ("flite's slt", clip(args.made, speaker="slt", kind="digits")),
    ]
    for name, audio in clips:
        out.append((name, audio))
        for what, tokenizer in (("codec, 1.0 kbit/s", codec), ("VAE", vae), ("VAE's mel, Griffin-Lim", lim)):
            out.append((f"{name}: {what}", tokenizer.decode(tokenizer.encode(audio)).value))
    for model in args.model:
        pipeline = TextToSpeechPipeline.from_pretrained(model)
        name = Path(model).parent.name if Path(model).name == "model" else Path(model).name
        for text, voice in ((SAID, "slt"), (SAID, "rms"), ("seven", "theo"), ("two", "jackson")):
            made = pipeline(text, voice=voice, seed=0)
            out.append((f"{name}, {voice}: “{text}”", Audio(made.audios[0], made.sample_rate)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="runs/speech_codec/tokenizer")
    parser.add_argument("--vae", default="runs/speech_vae/tokenizer")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--real", default="data/fsdd-train.tar")
    parser.add_argument("--made", default="runs/speech/speech-heldout.tar")
    parser.add_argument("--out", default="docs/speech.png")
    args = parser.parse_args()
    drawn = panels(args)
    rows = -(-len(drawn) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(12, 1.7 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, audio) in zip(axes.flat, drawn, strict=False):
        samples = torch.as_tensor(resample(audio, 16_000).samples)
        mel = log_mel(samples, rate=16_000, bins=80, n_fft=1024, hop=256)
        axis.imshow(mel.numpy(), origin="lower", aspect="auto", cmap="magma", vmin=-9, vmax=3)
        axis.set_title(f"{name} ({audio.seconds:.2f} s)", fontsize=7)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
