"""A perceptual distance of pictures from the features of a VGG-16 whose weights the user gives.

Letters in shapes: B batch, H rows, W columns.
"""

from __future__ import annotations

import os
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm import safe_io

ENDS = (3, 8, 15, 22, 29)
"""Index of the last ReLU of each of VGG-16's five stages within torchvision's `features`."""
MAX_BYTES = 1 << 30


class VGGDistance(nn.Module):
    """Mean squared difference of channel-normalised features over five stages: LPIPS (Zhang et al. 2018, equation 1)
    with every channel weighted equally, since its learned weights do not come with the network.

    Args:
        weights: a safetensors file with the state dict of `torchvision.models.vgg16` (names `features.…`).

    Raises:
        ValueError: the file is missing, damaged or of another network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        super().__init__()
        from torchvision.models import vgg16

        with torch.device("meta"):
            features = vgg16().features
        tensors = safe_io.read_tensors(weights, features.state_dict(), prefix="features.", max_bytes=MAX_BYTES)
        features.load_state_dict(tensors, assign=True)
        for layer in features.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the features before it are kept
        # In a tuple the network is no part of the module: it is not trained, and checkpoints need not hold it.
        self._fixed = (features.requires_grad_(False).eval(),)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, x: Float[Tensor, "B 3 H W"], y: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """The distance of two batches of pictures in [−1, 1]; sides of at least 16."""
        both = (torch.cat([x, y]) + 1) / 2
        both = (both - self.mean) / self.std
        total = both.new_zeros(())
        for index, layer in enumerate(self._fixed[0]):
            both = layer(both)
            if index in ENDS:
                a, b = F.normalize(both, dim=1, eps=1e-10).chunk(2)
                total = total + (a - b).square().sum(1).mean()
            if index == ENDS[-1]:
                break
        return total

    def _apply(self, fn: Any, recurse: bool = True) -> VGGDistance:
        # What `to` and `float` call: the network follows although it is not registered.
        self._fixed[0]._apply(fn, recurse)
        return cast(VGGDistance, super()._apply(fn, recurse))
