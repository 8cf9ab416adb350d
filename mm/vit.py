"""Transformers that turn a picture's features into a few embeddings and back: a causal one whose learned queries read the
features of an encoder (VL-GPT, Zhu et al. 2023, arXiv 2312.09251), and one whose queries stand for squares of
pixels and read the embeddings.

Letters in shapes: B batch, T tokens of features, F their width, N embeddings, D width of an embedding, W width of the
transformer, Q queries, P squares of pixels, S side of the picture.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def linear(inside: int, outside: int) -> nn.Linear:
    """Weights as Glorot and Bengio 2010, equation 16. torch's own are √3 times smaller: attention then begins all but
    uniform, every query reads the mean of what there is, and training stays at the mean picture for long."""
    layer = nn.Linear(inside, outside)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Scaled dot-product attention with several heads, from x to a context (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = linear(width, width), linear(width, 2 * width)
        self.out = linear(width, width)

    def forward(self, x: Float[Tensor, "B Q W"], context: Float[Tensor, "B T W"], causal: bool = False) -> Tensor:
        key, value = self.key_value(context).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(x), key, value))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class ReadingBlock(nn.Module):
    """The queries see each other (with `causal`, themselves and those before), then read a context, then a network of two
    layers four times as wide: pre-normalised, each added."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.inner, self.outer = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(linear(width, 4 * width), nn.GELU(), linear(4 * width, width))

    def forward(self, x: Float[Tensor, "B Q W"], context: Float[Tensor, "B T W"]) -> Float[Tensor, "B Q W"]:
        normed = self.norms[0](x)
        x = x + self.inner(normed, normed, self.causal)
        x = x + self.outer(self.norms[1](x), context)
        return x + self.mlp(self.norms[2](x))


class CausalResampler(nn.Module):
    """Features → N embeddings, in an order of their own: embedding k depends on the features and on queries 1 … k, so that
    predicting one after another loses nothing."""

    def __init__(self, tokens: int, features: int, count: int, dim: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(count, width))
        self.places = nn.Parameter(torch.randn(tokens, width))
        self.enter = linear(features, width)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ReadingBlock(width, heads, causal=True) for _ in range(depth))
        self.out = linear(width, dim)

    def forward(self, features: Float[Tensor, "B T F"]) -> Float[Tensor, "B N D"]:
        context = self.norm_in(self.enter(features)) + self.places
        x = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            x = block(x, context)
        return self.out(self.norm_out(x))


class PatchDecoder(nn.Module):
    """The first n of N embeddings → a picture: a learned query for each square of patch×patch pixels, at its place, reads
    them. All embeddings are read by all squares: no embedding has a place in the picture."""

    def __init__(self, size: int, patch: int, count: int, dim: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.side, self.patch = size // patch, patch
        self.queries = nn.Parameter(torch.randn(self.side**2, width))
        self.positions = nn.Parameter(torch.randn(count, width))
        self.enter = linear(dim, width)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ReadingBlock(width, heads, causal=False) for _ in range(depth))
        self.last = linear(width, 3 * patch**2)

    def forward(self, embeddings: Float[Tensor, "B n D"]) -> Float[Tensor, "B 3 S S"]:
        context = self.norm_in(self.enter(embeddings)) + self.positions[: embeddings.shape[1]]
        x = self.queries.expand(len(embeddings), -1, -1)
        for block in self.blocks:
            x = block(x, context)
        squares = self.last(self.norm_out(x)).transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.pixel_shuffle(squares, self.patch)


def vision_transformer(name: str, size: int, patch: int, width: int, depth: int, heads: int) -> tuple[Any, int, int]:
    """A vision transformer of timm with random weights, and T and F of its features (`forward_features`).
    `patch`, `width`, `depth`, `heads` of 0 are the model's own.

    Raises:
        ValueError: a name that timm doesn't know, a model that is no vision transformer, or sizes that it can't have.
    """
    import timm

    # names such as hf-hub:… would be looked up in the network
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(
            f"encoder must be the name of a timm model such as vit_tiny_patch16_224, got {name!r:.60}; "
            "timm.list_models('vit_*') lists them"
        )
    given = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    changed: dict[str, Any] = {key: value for key, value in given.items() if value}
    try:
        model: Any = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", img_size=size, **changed)
        with torch.no_grad():
            features = model.eval().forward_features(torch.zeros(1, 3, size, size))
    except (TypeError, ValueError, AssertionError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"timm can't make {name!r} for pictures of {size}×{size} with {changed}: {str(error).splitlines()[0]:.120}; "
            "give a plain vision transformer and sizes that fit"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 3:
        raise ValueError(
            f"{name!r} gives no sequence of features; give a plain vision transformer (vit_…, deit_…, eva02_…)"
        )
    return model, int(features.shape[1]), int(features.shape[2])
