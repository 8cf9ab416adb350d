"""The visibility rule: typed by hand, as a double loop, through every fast path, and against published masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mm.attention import Packed, dense, dense_bias, runs, visible, xformers_bias
from mm.stream import TokenStream, pack
from mm.testing import rule, stream

GOLDEN = json.loads((Path(__file__).parent / "golden" / "masks.json").read_text())["cases"]

BY_HAND = {
    "text, picture, text": (
        stream([0, 1, 2, 2, 2, 2, 3]),
        """10 0000 0
           11 0000 0
           11 1111 0
           11 1111 0
           11 1111 0
           11 1111 0
           11 1111 1""",
    ),
    "two documents": (
        stream([0, 1, 2, 0, 1, 1], document=[0, 0, 0, 1, 1, 1]),
        """100 000
           110 000
           111 000
           000 100
           000 111
           000 111""",
    ),
    "a masked picture after text": (  # what is hidden changes what is read, never who sees whom
        stream([0, 1, 1, 1, 1], time=torch.tensor([0.0, 1, 0, 1, 0])),
        """1 0000
           1 1111
           1 1111
           1 1111
           1 1111""",
    ),
    "scales": (
        stream([0, 1, 2, 2, 2, 3, 3]),
        """1 0 000 00
           1 1 000 00
           1 1 111 00
           1 1 111 00
           1 1 111 00
           1 1 111 11
           1 1 111 11""",
    ),
    "clean blocks and their noisy copies": (
        stream([0, 1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 1, 0, 0, 1, 1]),
        """1 00 00 00 00
           1 11 00 00 00
           1 11 00 00 00
           1 00 11 00 00
           1 00 11 00 00
           1 11 00 11 00
           1 11 00 11 00
           1 11 00 00 11
           1 11 00 00 11""",
    ),
    "fill in the middle": (  # stands as prefix, middle, suffix; generated as prefix, suffix, middle
        stream([0, 1, 4, 5, 2, 3]),
        """10 00 00
           11 00 00
           11 10 11
           11 11 11
           11 00 10
           11 00 11""",
    ),
    "three noisy draws of one picture": (
        stream([0, 1, 2, 2, 2, 2, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3]),
        """10 00 00 00
           11 00 00 00
           11 11 00 00
           11 11 00 00
           11 00 11 00
           11 00 11 00
           11 00 00 11
           11 00 00 11""",
    ),
    "prefix-LM": (
        stream([0, 0, 0, 1, 2]),
        """111 00
           111 00
           111 00
           111 10
           111 11""",
    ),
    "random order": (
        stream([0, 3, 1, 2]),
        """1000
           1111
           1010
           1011""",
    ),
}


def matrix(text: str) -> Tensor:
    return torch.tensor([[cell == "1" for cell in line.replace(" ", "")] for line in text.splitlines()])


def from_runs(tokens: TokenStream) -> Tensor:
    """The mask that the fast path works by, block by block."""
    blocks = []
    for run in runs(tokens):
        square = torch.ones(run.length, run.length, dtype=torch.bool)
        for number in range(run.count):
            if run.kind == "masked":
                assert run.mask is not None
                blocks.append(run.mask[number, 0])
            else:
                blocks.append(square.tril() if run.kind == "causal" else square)
    return torch.block_diag(*blocks).bool()


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention written out, grouped heads repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


@st.composite
def layouts(draw: st.DrawFn) -> TokenStream:
    """Packs of causal, bidirectional and arbitrary documents; equal neighbours are frequent."""
    documents = []
    for kind in draw(st.lists(st.sampled_from(("causal", "gaps", "full", "noisy", "any")), min_size=1, max_size=6)):
        length = draw(st.integers(1, 6))
        order, copy = list(range(length)), [0] * length
        if kind == "gaps":
            order = [3 * place + 1 for place in order]
        elif kind in ("full", "noisy"):
            order, copy = [2] * length, [int(kind == "noisy")] * length
        elif kind == "any":
            order = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
            copy = draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
        documents += [stream(order, copy)] * draw(st.integers(1, 2))
    return pack(documents)


@pytest.mark.parametrize("name", BY_HAND)
def test_masks_typed_by_hand(name: str) -> None:
    tokens, typed = BY_HAND[name]
    wanted = matrix(typed)
    assert torch.equal(rule(tokens), wanted)
    assert torch.equal(dense(tokens), wanted)
    assert torch.equal(from_runs(tokens), wanted)


@given(layouts())
@settings(max_examples=150, deadline=None)
def test_dense_and_runs_are_the_rule(tokens: TokenStream) -> None:
    wanted = rule(tokens)
    assert torch.equal(dense(tokens), wanted)
    assert torch.equal(from_runs(tokens), wanted)
    assert wanted.diagonal().all()  # softmax never meets an empty row


@given(layouts(), st.sampled_from([(4, 4), (4, 2), (4, 1)]))
@settings(max_examples=60, deadline=None)
def test_packed_attention_is_the_rule(tokens: TokenStream, heads: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(len(tokens))
    q, k, v = (torch.randn(len(tokens), h, 6, generator=rng, requires_grad=True) for h in (*heads, heads[1]))
    weight = torch.randn(len(tokens), heads[0], 6, generator=rng)
    fast, slow = Packed(tokens)(0, q, k, v), naive(q, k, v, rule(tokens))
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    for mine, reference in zip(
        torch.autograd.grad((fast * weight).sum(), (q, k, v)),
        torch.autograd.grad((slow * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


def test_neighbours_of_one_look_share_a_run() -> None:
    text, picture = stream(range(5)), stream([0] * 5)
    mixed = stream([0, 1, 1, 1, 2])
    got = [(run.count, run.length, run.kind) for run in runs(pack([text, text, picture, mixed, mixed, text]))]
    assert got == [(2, 5, "causal"), (1, 5, "full"), (2, 5, "masked"), (1, 5, "causal")]


def test_visible_takes_batches() -> None:
    order, copy = torch.randint(0, 4, (3, 2, 5)), torch.randint(0, 2, (3, 2, 5))
    key_order, key_copy = torch.randint(0, 4, (3, 2, 7)), torch.randint(0, 2, (3, 2, 7))
    seen = visible(order, copy, key_order, key_copy)
    assert seen.shape == (3, 2, 5, 7)
    assert torch.equal(seen[2, 1], visible(order[2, 1], copy[2, 1], key_order[2, 1], key_copy[2, 1]))


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("lengths", [[1024], [300, 1, 300, 423], [128] * 8])
def test_packed_causal_text_never_builds_a_square(lengths: list[int]) -> None:
    total, heads, width = 1024, 2, 4
    tokens = pack([stream(range(n)) for n in lengths])
    with Largest() as largest:
        plan = Packed(tokens)
        q, k, v = (torch.randn(total, h, width, requires_grad=True) for h in (heads, 1, 1))
        plan(0, q, k, v).sum().backward()
    assert q.grad is not None and not q.grad.isnan().any()
    assert largest.elements <= total * heads * width  # a square would have 128 times as many
    with Largest() as largest:  # the measure does see a square
        Packed(pack([stream([0] * 1023 + [1])]))
    assert largest.elements >= 1024 * 1024


# --- xformers -------------------------------------------------------------------------------------------------------


def seen_by(bias: Any, rows: int, columns: int) -> Tensor:
    """Who sees whom by an xformers bias, on the CPU."""
    values = bias if isinstance(bias, Tensor) else bias.materialize((rows, columns))
    assert set(values.unique().tolist()) <= {0.0, float("-inf")}
    return values == 0


@pytest.mark.parametrize(
    ("documents", "kind"),
    [
        ([stream(range(5)), stream(range(3)), stream(range(7))], "BlockDiagonalCausalMask"),
        ([stream(range(5)), stream([0]), stream(range(2))], "BlockDiagonalCausalMask"),  # one position is causal too
        ([stream([0]), stream([3])], "BlockDiagonalCausalMask"),
        ([stream([0] * 4), stream([1] * 3, [1] * 3)], "BlockDiagonalMask"),
        ([stream([0] * 4), stream([1])], "BlockDiagonalMask"),
        ([stream([0, 1, 2]), stream([0, 0])], "Tensor"),
        ([tokens for tokens, _ in (BY_HAND["clean blocks and their noisy copies"], BY_HAND["scales"])], "Tensor"),
    ],
)
def test_xformers_biases_are_the_rule(documents: list[TokenStream], kind: str) -> None:
    pytest.importorskip("xformers")
    tokens = pack(documents)
    bias = xformers_bias(tokens)
    assert type(bias).__name__ == kind
    assert torch.equal(seen_by(bias, len(tokens), len(tokens)), rule(tokens))


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_xformers_bias_of_any_layout_is_the_rule(tokens: TokenStream) -> None:
    pytest.importorskip("xformers")
    assert torch.equal(seen_by(xformers_bias(tokens), len(tokens), len(tokens)), rule(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_bias_is_aligned_in_its_own_dtype(dtype: torch.dtype) -> None:
    mask = torch.rand(5, 13) < 0.5
    bias = dense_bias(mask, dtype)
    assert bias.dtype == dtype and bias.shape == (5, 13)
    assert torch.equal(bias == 0, mask) and bool((bias[~mask] == float("-inf")).all())
    assert bias.stride() == (16, 1)  # kernels load 16 bytes at once; heads are a view of it
    assert bias.expand(1, 4, 5, 13).stride()[-2:] == (16, 1)


# --- published masks ------------------------------------------------------------------------------------------------


def bagel(split_lens: list[int], attn_modes: list[str], document_lens: list[int] | None = None) -> TokenStream:
    """BAGEL: `causal` text, `full` clean pictures, `noise` pictures that nothing later sees."""
    order, copy = [], []
    for length, mode in zip(split_lens, attn_modes, strict=True):
        start = order[-1] + 1 if order else 0
        order += [start + n for n in range(length)] if mode == "causal" else [start] * length
        copy += [int(mode == "noise")] * length
    document = [n for n, length in enumerate(document_lens or [len(order)]) for _ in range(length)]
    return stream(order, copy, document)


def spans(total: int, modalities: list[tuple[int, int]]) -> TokenStream:
    """Show-o2, Transfusion: causal, but each span (offset, length) is one block."""
    order = list(range(total))
    for offset, length in modalities:
        order[offset : offset + length] = [offset] * length
    return stream(order)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['function']}-{len(c['visible'])}")
def test_published_masks_are_special_cases(case: dict[str, Any]) -> None:
    given_to = case["arguments"]
    if "Bagel" in case["project"]:
        tokens = bagel(**given_to)
    else:
        total = given_to.get("LEN", given_to.get("seq_len"))
        tokens = spans(total, [(m[-2], m[-1]) for m in given_to["modalities"]])
    wanted = torch.tensor([[cell == "1" for cell in row] for row in case["visible"]])
    assert torch.equal(dense(tokens), wanted)
    assert torch.equal(from_runs(tokens), wanted)


def test_a_noisy_and_a_clean_picture_may_share_one_order() -> None:
    """BAGEL gives the two splits of a picture one after the other; sharing the order is the same mask."""
    case = next(c for c in GOLDEN if c["arguments"].get("attn_modes") == ["causal", "noise", "full", "causal"])
    shared = stream([0, 1, 2, 2, 2, 2, 2, 2, 3, 4], [0, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    assert torch.equal(dense(shared), torch.tensor([[cell == "1" for cell in row] for row in case["visible"]]))
