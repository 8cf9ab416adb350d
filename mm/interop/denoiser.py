"""Weights of other projects' diffusion heads: MAR's `SimpleMLPAdaLN`, and NextStep-1's of the same name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mm.denoiser import Denoiser

NAMES = {
    "time_embed.mlp.0": "time_up",
    "time_embed.mlp.2": "time_down",
    "cond_embed": "condition",
    "input_proj": "enter",
    "final_layer.linear": "leave",
}


def load_mlp_adaln(denoiser: Denoiser, state: Mapping[str, Tensor]) -> Denoiser:
    """Copy the weights of a `SimpleMLPAdaLN` into a denoiser of its size.

    MAR's network sees DDPM's step and predicts ε (and the variance); NextStep-1's sees τ from 0 (noise) to 1 (data) and
    predicts data − noise, so that its velocity is ours with the sign turned, at t = 1 − τ.

    Raises:
        ValueError: the sizes differ, or a weight is missing or left over.
    """
    renamed: dict[str, Tensor] = {}
    modulation: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    for name, tensor in state.items():
        place, _, kind = name.rpartition(".")
        parts = place.split(".")
        if place in NAMES:
            renamed[f"{NAMES[place]}.{kind}"] = tensor
        elif parts[0] == "res_blocks" and parts[2:] in (["in_ln"], ["mlp", "0"], ["mlp", "2"]):
            ours = {"in_ln": "norm", "0": "up", "2": "down"}[parts[-1]]
            renamed[f"blocks.{parts[1]}.{ours}.{kind}"] = tensor
        elif parts[0] == "res_blocks" and parts[2:] == ["adaLN_modulation", "1"]:
            modulation[kind][int(parts[1])] = tensor
        elif place == "final_layer.adaLN_modulation.1":
            modulation[kind][denoiser.depth] = tensor
        else:
            raise ValueError(f"{name!r} is no weight of a SimpleMLPAdaLN")
    for kind, parts_of in modulation.items():
        if sorted(parts_of) != list(range(denoiser.depth + 1)):
            raise ValueError(f"the weights are those of {len(parts_of) - 1} blocks, the denoiser has {denoiser.depth}")
        renamed[f"modulation.{kind}"] = torch.cat([parts_of[n] for n in range(denoiser.depth + 1)])
    expected = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in renamed.items()}
    if expected != found:
        name = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise ValueError(f"{name} has shape {found.get(name, 'missing')}, expected {expected.get(name, 'none')}")
    denoiser.load_state_dict(renamed)
    return denoiser
