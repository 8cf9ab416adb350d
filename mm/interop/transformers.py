"""Weights from `transformers` checkpoints: Llama, Qwen2 and Qwen3 shaped language models become a backbone and a host head.

Nothing is unpickled: only safetensors files are read. A folder or, where the network allows, a hub name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mm.backbone import BackboneConfig
from mm.model import MultimodalModel

MODELS = ("llama", "qwen2", "qwen3", "mistral")


def backbone_config(config: Any, **changes: Any) -> BackboneConfig:
    """The backbone of a `transformers` config. Raises `ValueError` for what this backbone cannot express."""
    kind = config.model_type
    if kind not in MODELS:
        raise ValueError(f"cannot load a {kind!r} checkpoint; supported are {', '.join(MODELS)}")
    wrong = {
        "hidden_act": (getattr(config, "hidden_act", "silu"), "silu"),
        "mlp_bias": (getattr(config, "mlp_bias", False), False),
        "pretraining_tp": (getattr(config, "pretraining_tp", 1), 1),
    }
    if kind != "qwen2":
        wrong["attention_bias"] = (getattr(config, "attention_bias", False), False)
    for name, (got, wanted) in wrong.items():
        if got != wanted:
            raise ValueError(f"this {kind} checkpoint has {name}={got!r}; the backbone supports {wanted!r}")
    layer_types = getattr(config, "layer_types", None) or []
    if any(layer != "full_attention" for layer in layer_types):
        raise ValueError(f"this {kind} checkpoint uses sliding-window layers; the backbone attends fully")
    if kind == "mistral" and config.sliding_window is not None:
        raise ValueError("this mistral checkpoint uses a sliding window; the backbone attends fully")
    rope = _rope(config)
    return BackboneConfig(
        **{
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "hidden": config.intermediate_size,
            "norm_eps": config.rms_norm_eps,
            "rope_theta": float(rope["rope_theta"]),
            "qk_norm": kind == "qwen3",
            "qkv_bias": kind == "qwen2",
            **changes,
        }
    )


def _rope(config: Any) -> dict[str, Any]:
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    parameters.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"this checkpoint scales rotary positions by {kind!r}; supported are default, linear, llama3")
    return parameters


def rotary_frequency(config: Any) -> Tensor:
    """Rotary frequencies as `transformers` computes them for this config (llama3 and linear scaling included)."""
    if _rope(config).get("rope_type", "default") == "default":
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 1.0 / (_rope(config)["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequency, scaling = ROPE_INIT_FUNCTIONS[_rope(config)["rope_type"]](config, torch.device("cpu"))
    if scaling != 1.0:
        raise ValueError(f"this checkpoint scales attention by {scaling}; the backbone does not")
    return frequency


def read_checkpoint(path: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """Config and tensors of a checkpoint directory (or hub name), safetensors only."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():  # other files beside the shards may hold the same weights under other names
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of weights; download the checkpoint again") from error
        files = [file for file in files if file.name in shards]
        if len(files) != len(shards):
            raise ValueError(f"{path} holds {len(files)} of the {len(shards)} files its index names; download it again")
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    if not files:
        raise ValueError(f"{path} holds no .safetensors file; convert the checkpoint (pickled weights are not read)")
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_file(file))
    return AutoConfig.from_pretrained(folder, local_files_only=True), state


def load_language_model(model: MultimodalModel, source: Any) -> None:
    """Copy a language model into `model`: backbone, the host rows of the embedding, the host rows of the host's head.

    `source` is a `transformers` model, a checkpoint directory, or a hub name. Rows of controls and of other modalities become
    the mean of the copied rows (Liquid), so that logits of the old ids stay what they were, bit for bit. Raises `ValueError`
    where shapes do not fit, before anything is changed.
    """
    if hasattr(source, "state_dict"):
        config, state = source.config, dict(source.state_dict())
    else:
        config, state = read_checkpoint(source)
    state = {name.removeprefix("model."): value for name, value in state.items()}
    if "embed_tokens.weight" not in state:
        raise ValueError("the checkpoint lacks the tensor 'embed_tokens.weight'; it is incomplete or no language model")
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["embed_tokens.weight"]  # tied
    try:
        renamed = convert(state, config.num_hidden_layers)
    except KeyError as error:
        raise ValueError(f"the checkpoint lacks the tensor {error}; it is incomplete or of another kind") from error
    renamed["rotary.frequency"] = rotary_frequency(config)
    backbone = model.backbone.state_dict()
    missing, extra = backbone.keys() - renamed.keys(), renamed.keys() - backbone.keys()
    if missing or extra:
        raise ValueError(
            f"the checkpoint and the backbone differ: {len(missing)} tensors missing (first {sorted(missing)[:1]}), "
            f"{len(extra)} unknown (first {sorted(extra)[:1]}); build the backbone with interop.transformers.backbone_config"
        )
    for name, value in renamed.items():
        if value.shape != backbone[name].shape:
            raise ValueError(
                f"the checkpoint's {name} has shape {tuple(value.shape)}, the backbone's {tuple(backbone[name].shape)}"
            )
    rows = len(state["embed_tokens.weight"])
    host = model.vocabulary.host
    if host.size > rows:
        raise ValueError(f"the host tokenizer has {host.size} ids, the checkpoint's embedding only {rows}")
    model.backbone.load_state_dict(renamed)
    head = cast(Any, model.heads[host.name])
    with torch.no_grad():
        for table, old in ((model.embedding.weight, "embed_tokens.weight"), (head.weight, "lm_head.weight")):
            kept = state[old][: host.size].to(table)
            table[: host.size] = kept
            table[host.size :] = kept.mean(0)


def convert(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Backbone tensors under our names; query, key and value rows stacked, gate and up rows stacked."""
    out = {"norm.weight": state["norm.weight"]}
    for n in range(layers):
        old, new = f"layers.{n}.", f"blocks.{n}."
        out[new + "attention_norm.weight"] = state[old + "input_layernorm.weight"]
        out[new + "mlp_norm.weight"] = state[old + "post_attention_layernorm.weight"]
        for part in ("weight", "bias"):
            names = [f"{old}self_attn.{x}_proj.{part}" for x in "qkv"]
            if names[0] in state:
                out[f"{new}attention.qkv.{part}"] = torch.cat([state[name] for name in names])
        out[new + "attention.out.weight"] = state[old + "self_attn.o_proj.weight"]
        for x in "qk":
            if f"{old}self_attn.{x}_norm.weight" in state:
                out[f"{new}attention.{x}_norm.weight"] = state[f"{old}self_attn.{x}_norm.weight"]
        out[new + "mlp.gate_up.weight"] = torch.cat([state[f"{old}mlp.{x}_proj.weight"] for x in ("gate", "up")])
        out[new + "mlp.down.weight"] = state[old + "mlp.down_proj.weight"]
    return out
