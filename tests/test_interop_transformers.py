"""Language models of `transformers` as backbone and host head: the same logits, from memory and from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.backbone import BackboneConfig
from mm.cache import Chunk, KVCache
from mm.heads.lm import LMHead
from mm.interfaces import Modality
from mm.interop.transformers import backbone_config, load_language_model, rotary_frequency
from mm.model import MultimodalModel
from mm.orders.raster import Raster
from mm.stream import pack
from mm.testing import Palette, stream
from mm.tokenizers.text_bytes import TextBytes

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def source(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny language model with random weights everywhere, norms and biases too."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": 260,
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            norm = "norm" in name
            parameter.uniform_(0.3, 1.7) if norm else parameter.normal_(0, 0.2)
    return made


def empty(config: BackboneConfig, pictures: bool = False) -> MultimodalModel:
    modalities = [Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster())]
    if pictures:
        modalities.append(Modality(name="image", tokenizer=Palette(), head=LMHead(), order=Raster()))
    return MultimodalModel(config, modalities).eval()


def loaded(origin: Any, config: Any = None) -> MultimodalModel:
    model = empty(backbone_config(config if config is not None else origin.config))
    load_language_model(model, origin)
    return model


@torch.no_grad()
def logits(model: MultimodalModel, ids: Tensor) -> Tensor:
    return model.logits(stream(range(len(ids)), ids=ids), "text")[:, :256]


@torch.no_grad()
def theirs(origin: nn.Module, ids: Tensor) -> Tensor:
    return origin(ids[None]).logits[0, :, :256]


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 20}),
    "llama-3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-mha": ("Qwen3", {"head_dim": 12, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None}),
}


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_transformers(name: str) -> None:
    kind, changes = KINDS[name]
    origin = source(kind, **changes)
    model, ids = loaded(origin), torch.randint(0, 256, (40,))
    wanted = theirs(origin, ids)
    assert wanted.std() > 0.3  # an answer, not zeros
    torch.testing.assert_close(logits(model, ids), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    kind, changes = KINDS[name]
    origin = source(kind, **changes)
    model, documents = loaded(origin), [torch.randint(0, 256, (n,)) for n in (7, 1, 19)]
    packed = pack([stream(range(len(ids)), ids=ids) for ids in documents])
    with torch.no_grad():
        mine = model.logits(packed, "text")[:, :256]
    torch.testing.assert_close(mine, torch.cat([theirs(origin, ids) for ids in documents]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-mha", "llama-3-rope", "qwen2", "qwen3"])
def test_step_by_step_through_the_cache(name: str) -> None:
    kind, changes = KINDS[name]
    origin = source(kind, **changes)
    model, ids = loaded(origin), torch.randint(0, 256, (20,))
    cache, out = KVCache(model.backbone.config, 1, 20, "cpu", torch.float32), []
    for start, end in [(0, 6), *((n, n + 1) for n in range(6, 17)), (17, 20)]:
        chunk = Chunk(0, list(range(start, end)))
        part = stream(
            range(start, end), ids=ids[start:end], position=torch.arange(start, end).float()[:, None].expand(-1, 3)
        )
        with torch.no_grad():
            out.append(model.heads["text"].logits(model(part, cache.plan([chunk])))[:, :256])
        cache.commit([chunk])
    torch.testing.assert_close(torch.cat(out), theirs(origin, ids), atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_transformers() -> None:
    origin = source("Llama")
    model, ids = loaded(origin), torch.randint(0, 256, (24,))
    F.cross_entropy(origin(ids[None]).logits[0, :-1, :256], ids[1:]).backward()
    tokens = stream(range(24), ids=ids)
    out = model.heads["text"].logits(model(tokens))[:-1, :256]
    F.cross_entropy(out, ids[1:]).backward()
    block, layer = model.backbone.blocks[1], origin.model.layers[1]
    attention = layer.self_attn
    wanted = torch.cat([getattr(attention, f"{x}_proj").weight.grad for x in "qkv"])
    torch.testing.assert_close(block.attention.qkv.weight.grad, wanted, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(block.mlp.down.weight.grad, layer.mlp.down_proj.weight.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(
        block.mlp_norm.weight.grad, layer.post_attention_layernorm.weight.grad, atol=1e-6, rtol=1e-4
    )
    mine = model.embedding.weight.grad[:256]
    # gradients near 1: in float32 both sides are about 1.2e-6 away from the same computed in float64
    torch.testing.assert_close(mine, origin.model.embed_tokens.weight.grad[:256], atol=5e-6, rtol=1e-4)


# --- new modalities -------------------------------------------------------------------------------------------------


def test_new_modalities_leave_old_logits_bit_for_bit() -> None:
    """Liquid, section 3: the vocabulary grows, the language model does not notice."""
    origin = source("Qwen3", head_dim=16)
    config = backbone_config(origin.config)
    small, large = empty(config), empty(config, pictures=True)
    for model in (small, large):
        load_language_model(model, origin)
    assert len(large.vocabulary) == len(small.vocabulary) + 8
    ids = torch.randint(0, 256, (30,))
    assert torch.equal(logits(small, ids), logits(large, ids))
    with torch.no_grad():  # nor does it notice that its head has new rows
        hidden = large(stream(range(30), ids=ids))
        before = origin.lm_head.weight[:256].t().contiguous().t()  # stored as ours is
        for count in (1, 2, 30):
            now = large.heads["text"].logits(hidden[:count])[:, :256]
            assert torch.equal(now, F.linear(hidden[:count], before))
    assert torch.equal(large.embedding.weight[:256], origin.model.embed_tokens.weight[:256])
    assert torch.equal(large.heads["text"].weight[:256], origin.lm_head.weight[:256])
    mean = origin.model.embed_tokens.weight[:256].mean(0)
    torch.testing.assert_close(large.embedding.weight[256:], mean.expand(len(large.vocabulary) - 256, -1))
    torch.testing.assert_close(large.heads["text"].weight[300], origin.lm_head.weight[:256].mean(0))


# --- from disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-3-rope", "qwen2-tied", "qwen3"])
@pytest.mark.parametrize("shard", ["50GB", "40KB"])
def test_a_checkpoint_directory(name: str, shard: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    kind, changes = KINDS[name]
    origin = source(kind, **changes)
    origin.save_pretrained(tmp_path, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "40KB")
    # the same weights under other names, as some repositories have beside their shards
    (tmp_path / "consolidated.safetensors").write_bytes(b"not even a safetensors file")
    model = loaded(str(tmp_path), AutoConfig.from_pretrained(tmp_path))
    ids = torch.randint(0, 256, (25,))
    torch.testing.assert_close(logits(model, ids), theirs(origin, ids), atol=1e-5, rtol=1e-5)


def test_incomplete_directories_are_refused(tmp_path: Path) -> None:
    origin = source("Llama")
    model = empty(backbone_config(origin.config))
    origin.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    (tmp_path / shards[0]).unlink()
    with pytest.raises(ValueError, match=f"holds {len(shards) - 1} of the {len(shards)} files its index names"):
        load_language_model(model, tmp_path)
    for damaged in ("{", "[]", "{}", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(ValueError, match="is not an index of weights"):
            load_language_model(model, tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    torch.save(origin.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no .safetensors file; .*pickled weights are not read"):
        load_language_model(model, tmp_path)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("GPT2", {}, "cannot load a 'gpt2' checkpoint; supported are llama, qwen2, qwen3, mistral"),
        ("Llama", {"hidden_act": "gelu"}, "has hidden_act='gelu'; the backbone supports 'silu'"),
        ("Llama", {"mlp_bias": True}, "has mlp_bias=True"),
        ("Llama", {"attention_bias": True}, "has attention_bias=True"),
        ("Qwen3", {"attention_bias": True}, "has attention_bias=True"),
        ("Llama", {"pretraining_tp": 2}, "has pretraining_tp=2"),
        (
            "Qwen2",
            {"use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 3},
            "sliding-window layers",
        ),
        ("Mistral", {"sliding_window": 128}, "sliding window"),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "positions by 'yarn'"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "by 'dynamic'"),
    ],
)
def test_what_the_backbone_cannot_express_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    import transformers

    with pytest.raises(ValueError, match=message):
        backbone_config(getattr(transformers, f"{kind}Config")(**changes))


def test_refused_weights_change_nothing() -> None:
    origin = source("Llama")
    config = backbone_config(origin.config)
    lacking = source("Llama")
    del lacking.model.layers[1].mlp.up_proj
    for target, from_where, message in [
        (
            backbone_config(origin.config, hidden=80),
            origin,
            r"gate_up.weight has shape \(144, 48\), the backbone's \(160, 48\)",
        ),
        (backbone_config(origin.config, layers=2), origin, "0 tensors missing .* unknown .first .'blocks.2"),
        (backbone_config(origin.config, qk_norm=True), origin, "6 tensors missing"),
        (
            config,
            source("Llama", vocab_size=255),
            "the host tokenizer has 256 ids, the checkpoint's embedding only 255",
        ),
        (config, lacking, "lacks the tensor 'layers.1.mlp.up_proj.weight'"),
        (config, origin.model.layers[0].mlp, "lacks the tensor 'embed_tokens.weight'"),
    ]:
        model = empty(target)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        if not hasattr(from_where, "config"):
            from_where.config = origin.config
        with pytest.raises(ValueError, match=message):
            load_language_model(model, from_where)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frequencies_are_those_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for name in ("llama", "llama-3-rope", "llama-linear-rope", "llama-theta", "llama-wide-heads"):
        config = source(*KINDS[name][:1], **KINDS[name][1]).config
        torch.testing.assert_close(rotary_frequency(config), LlamaRotaryEmbedding(config).inv_freq)
