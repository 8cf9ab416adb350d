"""Starting from a model of other tokenizers: what means the same in both is taken over, the rest begins anew.

So a trained model of picture ids becomes the base of a model of picture vectors (Orthus begins with Chameleon).
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mm.soft_codes import SoftCodebook

if TYPE_CHECKING:
    from mm.backbone import Backbone, Block
    from mm.interfaces import Spec
    from mm.model import MultimodalModel
    from mm.vocabulary import Entry


@torch.no_grad()
def adopt(model: MultimodalModel, path_or_name: str | os.PathLike[str]) -> list[str]:
    """Copy from a checkpoint into `model`, and say what (names of parts).

    Taken over are the backbone, conditions that orders inject, the host's and the controls' embeddings and the host's head;
    of every other modality of the same name and tokenizer its embedding and, where it has the same shape, its head. A tokenizer
    made from the checkpoint's (its `origin` is that one's fingerprint) takes over the embeddings of its ids: as rows of a soft
    codebook (`mm.soft_codes`), or, if it has the same sub-codes and further ids after them, as their first ids and logits.

    A backbone with more layers computes at first what the checkpoint's does (`grow`).

    Raises:
        ValueError: another backbone, another host tokenizer, or modalities in another order; nothing is changed then.
    """
    from mm.hub import load_pretrained

    other = load_pretrained(path_or_name)
    for name, value in model.backbone.config.to_dict().items():
        theirs = other.backbone.config.to_dict()[name]
        if name == "layers" and cast(int, value) >= cast(int, theirs):
            continue
        if theirs != value and name not in ("dropout", "checkpointing"):
            raise ValueError(f"the checkpoint's backbone has {name} {theirs}, this one {value}; use the checkpoint's")
    mine, host = model.vocabulary, other.vocabulary.host
    if (mine.host.name, mine.host.fingerprint) != (host.name, host.fingerprint):
        raise ValueError(
            f"the checkpoint's host is {host.name!r} with the tokenizer {host.fingerprint!r}, here it is {mine.host.name!r} "
            f"with {mine.host.fingerprint!r}; use the checkpoint's text tokenizer"
        )
    shared = [(a.name, b.name) for a, b in zip(mine.entries, other.vocabulary.entries, strict=False)]
    if any(a != b for a, b in shared):  # controls go by number
        raise ValueError(
            f"the modalities here are {', '.join(mine.index)}, the checkpoint's {', '.join(other.vocabulary.index)}; "
            "begin with the same ones in the same order"
        )
    model.null_seen = other.null_seen or model.null_seen
    model.voices = other.voices or model.voices
    taken = ["backbone", "embedding", f"heads.{host.name}"]
    grow(model.backbone, other.backbone)
    first = mine.entries[1].start if len(mine.entries) > 1 else len(mine)
    model.embedding.weight[:first] = other.embedding.weight[:first]
    _copy(model.heads[host.name], other.heads[host.name])
    for name in model.inject:
        if name in other.inject and _copy(model.inject[name], other.inject[name]):
            taken.append(f"inject.{name}")
    for number, (name, _) in enumerate(shared):
        model.mask.weight[number] = other.mask.weight[number]
        if number:
            taken += _adopt_modality(model, other, mine[name], other.vocabulary[name])
    return taken


@torch.no_grad()
def blend(model: MultimodalModel, path_or_name: str | os.PathLike[str], share: float) -> list[str]:
    """Average `model` with what `adopt` takes over from the checkpoint that it was trained from: `share` of its own weights and
    the rest of that one's, which keeps more of what the checkpoint knew and most of what training added (WiSE-FT: Wortsman et al.
    2021, arXiv 2109.01903). What the checkpoint lacks stays as it is.

    Returns what was averaged. Raises `ValueError` as `adopt`, and for a share outside 0 to 1; nothing is changed then.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is of the model's own weights, from 0 to 1, got {share}")
    before = copy.deepcopy(model)
    taken = adopt(before, path_or_name)
    theirs = before.state_dict()
    for name, own in model.state_dict().items():
        if own.is_floating_point():
            own.copy_(share * own + (1 - share) * theirs[name])
    return taken


def grow(into: Backbone, source: Backbone) -> None:
    """Copy a backbone into one with as many layers or more. The further layers lie evenly between the others, each a copy of the
    one before whose output projections are zero, so that it adds nothing yet (block expansion: Wu et al. 2024, LLaMA Pro,
    section 3.2)."""
    into.load_state_dict(source.state_dict(), strict=False)  # what isn't of a layer
    few, many = len(source.blocks), len(into.blocks)
    for number, block in enumerate(into.blocks):
        origin = number * few // many
        block.load_state_dict(source.blocks[origin].state_dict())
        if number and origin == (number - 1) * few // many:
            for projection in (cast("Block", block).attention.out, cast("Block", block).mlp.down):
                projection.weight.zero_()


def _adopt_modality(model: MultimodalModel, other: MultimodalModel, mine: Entry, theirs: Entry) -> list[str]:
    name, taken = mine.name, []
    soft = model.latent_embeddings[name] if name in model.latent_embeddings else None
    if mine.fingerprint == theirs.fingerprint and mine.kind == theirs.kind:
        if mine.kind == "discrete":
            model.embedding.weight[mine.start : mine.stop] = other.embedding.weight[theirs.start : theirs.stop]
        for tables, sources in (
            (model.code_embeddings, other.code_embeddings), (model.latent_embeddings, other.latent_embeddings),
        ):  # fmt: skip
            if name in tables and name in sources and _copy(tables[name], sources[name]):
                taken.append(f"embedding of {name}")
        if _copy(model.heads[name], other.heads[name]):
            taken.append(f"heads.{name}")
        return taken
    tokenizer = model.modalities[model.vocabulary.index[name]].tokenizer
    if getattr(tokenizer, "origin", None) != theirs.fingerprint:
        return taken
    if isinstance(soft, SoftCodebook) and theirs.kind == "discrete" and soft.rows.num_embeddings == theirs.size:
        soft.rows.weight.copy_(other.embedding.weight[theirs.start : theirs.stop])
        taken.append(f"rows of {name}")
    elif mine.kind == theirs.kind == "codes":
        origin = other.modalities[other.vocabulary.index[name]].tokenizer
        if _copy_first(model.code_embeddings[name], other.code_embeddings[name], tokenizer.spec, origin.spec):
            taken.append(f"embedding of {name}")
        if _copy_first(model.heads[name], other.heads[name], tokenizer.spec, origin.spec):
            taken.append(f"heads.{name}")
    return taken


def _copy_first(into: nn.Module, source: nn.Module, mine: Spec, theirs: Spec) -> bool:
    """The first ids of every sub-code, for modules that hold one row an id and nothing else."""
    if mine.num_codes != theirs.num_codes or mine.vocab_size < theirs.vocab_size:
        return False
    pairs = []
    for module, spec in ((into, mine), (source, theirs)):
        values = dict(module.named_parameters())
        if any(len(value) != spec.num_codes * spec.vocab_size for value in values.values()):
            return False
        pairs.append({name: value.unflatten(0, (spec.num_codes, -1)) for name, value in values.items()})
    new, old = pairs
    if {name: value.shape[2:] for name, value in new.items()} != {name: value.shape[2:] for name, value in old.items()}:
        return False
    for name, value in old.items():
        new[name][:, : theirs.vocab_size] = value
    return True


def _copy(into: nn.Module, source: nn.Module) -> bool:
    """All weights, if names and shapes are the same."""

    def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(cast(Tensor, value).shape) for name, value in module.state_dict().items()}

    if shapes(into) != shapes(source):
        return False
    into.load_state_dict(source.state_dict())
    return True


def train_only(model: nn.Module, parts: list[str]) -> None:
    """Freeze every parameter but those whose name begins with one of `parts` (`heads.image`, `latent_embeddings.image`).
    Raises `ValueError` for a part that no parameter has."""
    if isinstance(parts, str):
        raise ValueError(f"train_only must be a list of parts, got the text {parts!r:.60}")
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(_within(name, part) for name in names):
            known = sorted({".".join(name.split(".")[:2]) for name in names if not name.startswith("backbone.")})
            raise ValueError(
                f"train_only names {part!r}, which no weight belongs to; there are backbone, {', '.join(known)}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(_within(name, part) for part in parts))


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def fingerprint(module: nn.Module) -> str:
    """Sixteen hexadecimal digits that change with any weight of a module: to show that it stayed as it was."""
    from mm.saved import digest

    return digest({}, {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)})
