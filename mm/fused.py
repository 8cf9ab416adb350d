"""RMSNorm on the CPU with a gradient by hand.

PyTorch's own is half a dozen operations there: each passes over the activations, and autograd keeps what lies between them.
Forward and backward below take half the time and keep the input only. Where PyTorch has a fused kernel (other devices,
`torch.compile`) or rounds differently (low precision), its own is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Float[Tensor, "*T W"], weight: Float[Tensor, " W"], eps: float) -> Float[Tensor, "*T W"]:
    """x / √(mean x² + eps) · weight, over the last axis. Under autocast in float32, as PyTorch's own norms."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        x = x.float()
    if _plain(x):
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


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
