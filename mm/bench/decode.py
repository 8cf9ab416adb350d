"""Decoding, batch 1, greedy, the same weights: our engine beside `transformers` `generate`. One thread."""

from __future__ import annotations

from typing import Any, cast

import torch

from mm.bench import Row, alternate
from mm.generation import Engine, Request
from mm.interfaces import Decoded, Encoded, Modality, ModalityTokenizer, Sampling, Spec
from mm.interop.transformers import backbone_config, load_language_model
from mm.layout import Segment
from mm.model import MultimodalModel

VOCAB, PROMPT = 4096, 16


class Ids(ModalityTokenizer):
    """Ids as they are."""

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=VOCAB, fingerprint="ids")

    def encode(self, raw: list[int]) -> Encoded:
        return Encoded(grid=(len(raw),), ids=torch.tensor(raw))

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.ids is not None
        return Decoded(value=encoded.ids.tolist())


def decode(width: int, layers: int, tokens: int, rounds: int) -> Row:
    """Milliseconds a token. Both sides write exactly `tokens` new tokens behind a prompt of 16."""
    import transformers

    from mm.plugins import load

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width * 8 // 3 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    peer = transformers.LlamaForCausalLM(config).eval()
    text = Modality(name="text", tokenizer=Ids(), head=load("heads", "lm")(), order=load("orders", "raster")())
    model = MultimodalModel(backbone_config(config), [text], context=1024).eval()
    load_language_model(model, peer)
    with torch.no_grad():  # controls are mean rows, which a random model may like best; ours must not stop early
        cast(Any, model.head("text")).weight[VOCAB:] = 0.0
    prompt = torch.randint(VOCAB, (PROMPT,))
    # one position of the budget is kept for `eos`
    request = Request(
        prompt=[Segment("text", prompt.tolist())], max_tokens=tokens + 1, sampling=Sampling(temperature=0.0)
    )
    engine = Engine(model)
    written: list[Segment] = []

    def ours() -> None:
        written[:] = engine.generate([request])[0]

    def theirs() -> None:
        with torch.inference_mode():
            peer.generate(
                prompt[None], attention_mask=torch.ones(1, PROMPT), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False,
            )  # fmt: skip

    try:
        mine, other, ratio = alternate(ours, theirs, rounds)
    finally:
        torch.set_num_threads(threads)
    count = len(written[0].content) if written else 0
    if count != tokens:
        raise ValueError(f"the engine wrote {count} tokens instead of {tokens}: the two sides did unequal work")
    return Row(
        name=f"decode {width}×{layers}", ours=1e3 * mine / tokens, peer=1e3 * other / tokens, ratio=ratio,
        unit="ms a token", peer_version=f"transformers {transformers.__version__}",
    )  # fmt: skip
