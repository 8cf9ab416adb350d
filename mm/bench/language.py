"""The same language model on both sides: `transformers`' Llama, and ours with its weights."""

from __future__ import annotations

from typing import Any, cast

import torch

from mm.interfaces import Decoded, Encoded, Modality, ModalityTokenizer, Spec
from mm.interop.transformers import backbone_config, load_language_model
from mm.model import MultimodalModel

VOCAB = 4096


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


def pair(width: int, layers: int, context: int = 1024) -> tuple[MultimodalModel, Any, str]:
    """Ours, a random `LlamaForCausalLM` of the same weights, and the peer's version."""
    import transformers

    from mm.plugins import load

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width * 8 // 3 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    peer = transformers.LlamaForCausalLM(config).eval()
    text = Modality(name="text", tokenizer=Ids(), head=load("heads", "lm")(), order=load("orders", "raster")())
    model = MultimodalModel(backbone_config(config), [text], context=context).eval()
    load_language_model(model, peer)
    with torch.no_grad():  # controls are mean rows, which a random model may like best; ours must not stop early
        cast(Any, model.head("text")).weight[VOCAB:] = 0.0
    return model, peer, f"transformers {transformers.__version__}"
