"""The Fréchet distance between two sets of features, each taken for a normal distribution (Dowson and Landau 1982; Heusel et al.
2017, equation 6, which takes Inception's features: ours are a judge's, so that values compare within this project only).

Letters in shapes: N, M features in a set, F width of a feature.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def frechet_distance(a: Float[Tensor, "N F"], b: Float[Tensor, "M F"]) -> float:
    """‖μ − ν‖² + tr(A + B − 2·(A·B)^½), in float64. It falls with the number of features at equal distributions, so that sets
    must be of one size to be compared. Raises `ValueError` for fewer than two features, or values that are not numbers."""
    for features in (a, b):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != a.shape[1]:
            raise ValueError(
                f"got features {tuple(a.shape)} and {tuple(b.shape)}; give two sets of two or more of one width"
            )
        if not bool(features.isfinite().all()):
            raise ValueError("the features hold values that are not numbers; look at the pictures they are of")
    a, b = a.double(), b.double()
    between = (a.mean(0) - b.mean(0)).square().sum()
    covariances = torch.cov(a.T), torch.cov(b.T)
    first, second = (c.reshape(a.shape[1], a.shape[1]) for c in covariances)
    # (A·B)^½ and (A^½·B·A^½)^½ have one trace, and the latter is symmetric: its eigenvalues are real and found stably
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(between + first.trace() + second.trace() - 2 * inner))
