"""Losses and measures of how well a picture comes back.

Letters in shapes: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.interfaces import ModalityTokenizer


def gradient_loss(x: Float[Tensor, "B C H W"], y: Float[Tensor, "B C H W"], scales: int = 3) -> Float[Tensor, ""]:
    """Mean |∂x − ∂y| over horizontal and vertical differences at `scales` resolutions, each half the former: edges
    count, flat areas do not. The structural term, far cheaper than a windowed one (Mathieu et al. 2015, equation 6,
    α = 1, made multi-scale)."""
    difference = x - y
    total = difference.new_zeros(())
    for _ in range(scales):
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        if min(difference.shape[-2:]) < 4:
            break
        difference = F.avg_pool2d(difference, 2)
    return total / scales


def ssim_loss(x: Float[Tensor, "B C H W"], y: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """1 − SSIM (Wang et al. 2004) of pictures in [−1, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(x, y, data_range=2.0)
    assert isinstance(value, Tensor)
    return 1 - value


def psnr(x: Float[Tensor, "B ..."], y: Float[Tensor, "B ..."]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each picture, or clip, in dB, both in [−1, 1] and rounded to bytes; identical
    pictures count as an error of half a byte's square, 51 dB, instead of infinity."""
    x, y = (((t.clamp(-1, 1) + 1) * 127.5).round() for t in (x, y))
    error = (x - y).square().flatten(1).mean(1).clamp_min(0.5)
    return 10 * torch.log10(255**2 / error)


def count_codes(
    counts: Int[Tensor, "K V"] | None, ids: Tensor | None, tokenizer: ModalityTokenizer
) -> Int[Tensor, "K V"] | None:
    """How often each code has occurred, with these ids (sub-codes on the last axis) added; None as long as there are none."""
    if ids is None:
        return None
    if counts is None:  # only then, for a spec hashes the weights
        spec = tokenizer.spec
        counts = torch.zeros(spec.num_codes, spec.vocab_size, dtype=torch.long, device=ids.device)
    for k, column in enumerate(ids.reshape(-1, len(counts)).unbind(1)):
        counts[k] += torch.bincount(column, minlength=counts.shape[1])
    return counts


def usage_and_perplexity(counts: Int[Tensor, "K V"]) -> tuple[float, float]:
    """Share of codes that occur at all, and exp(entropy) of their frequencies, both averaged over the codebooks."""
    p = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    entropy = -(p * p.clamp_min(1e-30).log()).sum(1)
    return float((counts > 0).double().mean()), float(entropy.exp().mean())


class PatchDiscriminator(nn.Sequential):
    """Real or decoded, judged patch by patch (Isola et al. 2017, "PatchGAN"); logits on a coarse grid.

    Args:
        channels: width of the first layer.
        layers: strided layers; the receptive field of a logit grows with them.
    """

    def __init__(self, channels: int = 32, layers: int = 2) -> None:
        stack: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for _ in range(layers - 1):
            stack += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.GroupNorm(1, 2 * width)]
            stack.append(nn.LeakyReLU(0.2))
            width *= 2
        stack.append(nn.Conv2d(width, 1, 3, padding=1))
        super().__init__(*stack)


def hinge_loss(real: Tensor, fake: Tensor) -> Float[Tensor, ""]:
    """The discriminator's loss (Lim and Ye 2017): ½ E[max(0, 1 − real)] + ½ E[max(0, 1 + fake)]."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last: Tensor) -> Float[Tensor, ""]:
    """λ = ‖∇reconstruction‖ / (‖∇generator‖ + 1e-4) at the decoder's last layer, at most 1e4 (Esser et al. 2021,
    equation 7): the adversarial gradient is as large as the other one."""
    (a,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (b,) = torch.autograd.grad(generator, last, retain_graph=True)
    return (a.norm() / (b.norm() + 1e-4)).clamp(0, 1e4).detach()
