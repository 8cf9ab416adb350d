"""From the visibility rule to attention: the rule itself, how packed documents and cached rows run it fast.

Letters in shapes: T packed positions, H query heads, G key/value heads, E head width, Q queries, S keys.

`visible` is the rule; `runs` groups the documents of a stream by how the rule looks inside them, so that a packed causal
stream never builds a T×T mask. `Packed` (training, prompts) and `mm.cache.Cached` (decoding) are the two plans
the backbone can be given; both are callables `(layer, q, k, v) -> out`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.stream import TokenStream


@runtime_checkable
class AttentionPlan(Protocol):
    """Who sees whom, ready to run. Called once a layer."""

    def __call__(
        self, layer: int, q: Float[Tensor, "T H E"], k: Float[Tensor, "T G E"], v: Float[Tensor, "T G E"]
    ) -> Float[Tensor, "T H E"]: ...


def visible(
    order: Int[Tensor, "*b Q"],
    copy: Int[Tensor, "*b Q"],
    key_order: Int[Tensor, "*b S"],
    key_copy: Int[Tensor, "*b S"],
) -> Bool[Tensor, "*b Q S"]:
    """The rule inside one document: (copy_j = 0 and order_j < order_i) or (order_j = order_i and copy_j = copy_i)."""
    i, ci, j, cj = order[..., :, None], copy[..., :, None], key_order[..., None, :], key_copy[..., None, :]
    return ((cj == 0) & (j < i)) | ((j == i) & (cj == ci))


def dense(stream: TokenStream) -> Bool[Tensor, "T T"]:
    """The rule over a whole pack. For tests, and for kernels that only take a dense bias."""
    same = stream.document[:, None] == stream.document[None, :]
    return same & visible(stream.order, stream.copy, stream.order, stream.copy)


Kind = Literal["causal", "full", "masked"]


@dataclass(frozen=True)
class Run:
    """`count` neighbouring documents of equal `length` in which the rule has the same look."""

    count: int
    length: int
    kind: Kind
    mask: Bool[Tensor, "n 1 L L"] | None = None
    """Only for `masked`; who sees whom inside each document."""


def runs(stream: TokenStream) -> list[Run]:
    """Documents grouped by what the rule means inside them. Derived once a stream (on the CPU, by the data loader)."""
    if "runs" in stream.__dict__:
        return stream.__dict__["runs"]
    orders, copies = stream.order.split(stream.lengths), stream.copy.split(stream.lengths)
    groups: list[tuple[Kind, int, list[int]]] = []
    for number, (order, copy) in enumerate(zip(orders, copies, strict=True)):
        kind = _kind(order, copy)
        if groups and groups[-1][0] == kind and groups[-1][1] == len(order):
            groups[-1][2].append(number)
        else:
            groups.append((kind, len(order), [number]))
    out = []
    for kind, length, members in groups:
        mask = None
        if kind == "masked":
            order, copy = (torch.stack([x[n] for n in members]) for x in (orders, copies))
            mask = visible(order, copy, order, copy)[:, None]
        out.append(Run(len(members), length, kind, mask))
    stream.__dict__["runs"] = out
    return out


def _kind(order: Int[Tensor, " L"], copy: Int[Tensor, " L"]) -> Kind:
    if bool((copy == copy[0]).all()):
        steps = order.diff()
        if bool((steps == 0).all()):
            return "full"
        if bool((copy[0] == 0) & (steps > 0).all()):
            return "causal"
    return "masked"


class Packed:
    """Attention inside the documents of one packed stream: SDPA a run on the CPU, xformers on CUDA."""

    def __init__(self, stream: TokenStream) -> None:
        self.runs = runs(stream)
        self.sizes = [run.count * run.length for run in self.runs]
        self.bias = None
        if stream.device.type == "cuda":
            self.bias = xformers_bias(stream)
        else:
            self.masks = [None if r.mask is None else r.mask.to(stream.device) for r in self.runs]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.bias is not None:
            if isinstance(self.bias, Tensor) and self.bias.dtype != q.dtype:
                self.bias = dense_bias(self.bias == 0, q.dtype)  # once: every layer has the same dtype
            return xformers_attention(q, k, v, self.bias)
        # `split` and not slices: its backward is one concatenation instead of a zero-filled tensor a run
        parts = zip(self.runs, self.masks, q.split(self.sizes), k.split(self.sizes), v.split(self.sizes), strict=True)
        outs = [_sdpa(run, mask, qs, ks, vs) for run, mask, qs, ks, vs in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _sdpa(run: Run, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if v.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # short documents: float32 is three times as fast there as bfloat16, whose backward pass has no kernel of its own
        with torch.autocast("cpu", enabled=False):
            return _sdpa(run, mask, q.float(), k.float(), v.float())
    q, k, v = (x.view(run.count, run.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=run.kind == "causal", enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).reshape(run.count * run.length, out.shape[1], out.shape[3])


# --- xformers (CUDA) ------------------------------------------------------------------------------------------------


def xformers_bias(stream: TokenStream) -> Any:
    """The xformers bias of a stream: block-diagonal causal for packed causal documents, else a dense additive bias."""
    from xformers.ops.fmha import attn_bias as biases

    kinds = {run.kind for run in runs(stream) if run.length > 1}  # a document of one position is causal and full
    if kinds <= {"causal"}:
        return biases.BlockDiagonalCausalMask.from_seqlens(stream.lengths, device=stream.device)
    if kinds == {"full"}:
        return biases.BlockDiagonalMask.from_seqlens(stream.lengths, device=stream.device)
    return dense_bias(dense(stream))


def dense_bias(mask: Bool[Tensor, "Q S"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "Q S"]:
    """Additive bias over storage whose rows are padded to a multiple of 8, as the xformers kernels ask. Make it in the
    dtype of the queries: a later `.to` would lose the padding."""
    rows, columns = mask.shape
    padded = torch.full((rows, -(-columns // 8) * 8), float("-inf"), dtype=dtype, device=mask.device)
    bias = padded[:, :columns]
    bias.masked_fill_(mask, 0.0)
    return bias


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    """xformers fused attention over packed positions. Grouped-query heads are broadcast where the kernels can do it:
    without a dense bias, and forward only."""
    from xformers.ops import memory_efficient_attention

    heads, groups = q.shape[1], k.shape[1]
    if heads != groups and (isinstance(bias, Tensor) or q.requires_grad or k.requires_grad or v.requires_grad):
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
        groups = heads
    if isinstance(bias, Tensor):
        bias = bias.expand(1, heads, *bias.shape)
    if heads != groups:
        q = q.unflatten(1, (groups, heads // groups))
        k, v = (x[:, :, None].expand(-1, -1, heads // groups, -1) for x in (k, v))
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0].flatten(1, -2)
