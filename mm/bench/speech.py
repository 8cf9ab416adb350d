"""Speech: sub-codes in the delay pattern beside MusicGen's decoder in `transformers`; codecs to tokens and back beside EnCodec's
network; and how fast checkpoints speak (`--model`), in seconds of sound a second of computing.

The peers have random weights of the same measure: time doesn't depend on what the weights say. MusicGen's decoder is called step
by step with its cache, without `generate`, whose overhead it so is spared. It reads its text by cross-attention, ours as a
prefix; the text is 16 positions of each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.bench import Row, Settings, alternate, seconds
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec

FRAMES, CODES, WORDS, TEXT, SECONDS = 128, 4, 256, 16, 8
SAID = "three five one seven"


def rows(settings: Settings) -> Iterator[Row]:
    for width, layers in settings.sizes:
        yield from delay_rows(width, layers, settings)
    yield from codec_rows(settings)
    for model in settings.models:
        yield from speaking_rows(model, settings)


class Codes(ModalityTokenizer):
    """Sub-codes without a codec: only their numbers matter here."""

    @property
    def spec(self) -> Spec:
        return Spec(kind="codes", vocab_size=WORDS, num_codes=CODES, max_grid=(256,))

    def encode(self, raw: Tensor) -> Encoded:
        return Encoded(grid=(len(raw),), codes=raw)

    def decode(self, encoded: Encoded) -> Decoded:
        return Decoded(value=encoded.codes)


def delay_rows(width: int, layers: int, settings: Settings) -> Iterator[Row]:
    """Frames a second, for one sound and for eight at once."""
    import transformers

    from mm.backbone import BackboneConfig
    from mm.generation import Engine, Request
    from mm.heads.lm import LMHead
    from mm.interfaces import Modality
    from mm.layout import Segment
    from mm.model import MultimodalModel
    from mm.orders.delay import Delay
    from mm.orders.raster import Raster
    from mm.tokenizers.text_bytes import TextBytes

    torch.manual_seed(0)
    model = MultimodalModel(
        BackboneConfig(width=width, layers=layers, heads=width // 64, hidden=4 * width),
        [
            Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
            Modality(name="speech", tokenizer=Codes(), head=LMHead(), order=Delay()),
        ],
        context=512,
    ).eval()
    config: Any = transformers.MusicgenDecoderConfig(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, ffn_dim=4 * width,
        num_codebooks=CODES, max_position_embeddings=512, pad_token_id=WORDS, bos_token_id=WORDS,
    )  # fmt: skip
    peer: Any = transformers.MusicgenForCausalLM(config).eval()
    version = f"transformers {transformers.__version__} Musicgen"
    for batch in (1, 8):
        text = Encoded(grid=(TEXT,), ids=torch.randint(256, (TEXT,)))
        requests = [
            Request(prompt=[Segment("text", text)], items=[("speech", (FRAMES,))], text=False, seed=n)
            for n in range(batch)
        ]
        start = torch.full((batch * CODES, 1), WORDS)
        states = torch.randn(batch, TEXT, width)

        def ours(requests: list[Request] = requests) -> object:
            return Engine(model).generate(requests)

        def theirs(codes: Tensor = start, states: Tensor = states) -> object:
            cache = None
            with torch.inference_mode():
                for _ in range(FRAMES + CODES - 1):
                    out = peer(input_ids=codes, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
                    cache, codes = out.past_key_values, torch.multinomial(out.logits[:, -1].softmax(-1), 1)
            return codes

        a, b, ratio = alternate(ours, theirs, settings.rounds)
        name = f"delay pattern, {width}×{layers}, {CODES} codebooks, batch {batch}"
        yield Row(name, batch * FRAMES / a, "frames/s", batch * FRAMES / b, ratio, version)


def codec_rows(settings: Settings) -> Iterator[Row]:
    """Seconds of sound a second, to tokens and back."""
    import transformers

    from mm.audio import Audio
    from mm.tokenizers.speech_codec import SpeechCodec

    torch.manual_seed(0)
    ours: Any = SpeechCodec().eval()
    for codebook in ours.quantizer.codebooks():
        codebook.initted.fill_(True)  # an untrained codec refuses to encode
    peer: Any = transformers.EncodecModel(transformers.EncodecConfig()).eval()
    audio = Audio((0.1 * torch.randn(16_000 * SECONDS)).numpy(), 16_000)
    wide = 0.1 * torch.randn(1, 1, 24_000 * SECONDS)
    item = ours.encode(audio)
    version = f"transformers {transformers.__version__} EncodecModel, 24 kHz"
    with torch.inference_mode():
        theirs = peer.encode(wide, bandwidth=3.0)
        for name, mine, other in (
            ("sound to tokens", lambda: ours.encode(audio), lambda: peer.encode(wide, bandwidth=3.0)),
            (
                "tokens to sound",
                lambda: ours.decode(item),
                lambda: peer.decode(theirs.audio_codes, theirs.audio_scales),
            ),
        ):
            a, b, ratio = alternate(mine, other, settings.rounds)
            yield Row(f"codec, {name}", SECONDS / a, "s of sound/s", SECONDS / b, ratio, version)


def speaking_rows(model: str, settings: Settings) -> Iterator[Row]:
    """A checkpoint's real-time factor (seconds of computing a second of sound) for one text and for eight together, and the
    seconds until the first piece of a stream is there."""
    from mm.pipelines.text_to_speech import TextToSpeechPipeline

    pipeline = TextToSpeechPipeline.from_pretrained(model)
    name = Path(model).name
    for batch in (1, 8):
        factors = []
        pipeline([SAID] * batch, seed=0)
        for round in range(settings.rounds):
            start = time.perf_counter()
            made = pipeline([SAID] * batch, seed=round)
            took = time.perf_counter() - start
            factors.append(took / sum(len(a) / made.sample_rate for a in made.audios))
        yield Row(f"{name}, batch {batch}, real-time factor", statistics.median(factors), "s/s of sound")

    def first() -> None:
        stream = pipeline.stream(SAID, seed=0)
        next(stream)
        stream.close()  # type: ignore[attr-defined]

    yield Row(
        f"{name}, first piece of a stream", statistics.median(seconds(first) for _ in range(settings.rounds)), "s"
    )
