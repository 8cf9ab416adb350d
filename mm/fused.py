"""RMSNorm and SwiGLU on the CPU, with gradients by hand.

PyTorch's RMS norm and the product silu(gate)·up are several operations each there: every one passes over the activations, and
autograd keeps what lies between them. Forward and backward below take about a third of those passes and keep the input only.
Where PyTorch has fused kernels (other devices, `torch.compile`) or rounds differently (low precision), its own are used.

Letters in shapes: T positions, N heads or nothing, W the axis that is normed, M hidden width of the SwiGLU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Float[Tensor, "*T W"], weight: Float[Tensor, " W"], eps: float) -> Float[Tensor, "*T W"]:
    """x / √(mean x² + eps) · weight, over the last axis."""
    if _plain(x):
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate_up: Float[Tensor, "T 2*M"]) -> Float[Tensor, "T M"]:
    """silu(gate) · up, where the two stand side by side."""
    if _plain(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)


def _plain(x: Tensor) -> bool:
    return x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        # The gradient of a layer norm whose mean is taken to be 0 is that of the RMS norm, but for a term that comes of the
        # mean's dependence on x: − scale · mean(grad · weight). It is added back.
        grad = grad.contiguous()
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x.contiguous(), weight.shape, torch.zeros_like(scale), scale, weight, None, [True, True, False]
        )
        return dx.add_((grad @ weight).unsqueeze(-1).mul_(scale).div_(x.shape[-1])), dweight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, dim=-1)  # written in place: nothing to put together afterwards
        torch.mul(grad, F.silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=dgate)
        return out
