"""What a Large Concept Model says next, judged on captions in groups (`configs/systems/lcm.yaml`).

    python -m mm.evaluate.concepts --model runs/lcm/model --data data/emoji-noto.tar --out runs/lcm/concepts.json

A prefix is a heading, the name of a group, and a caption of the group that neither the model nor its sentence autoencoder was
trained with. The model says the next sentence, once for each seed. Any caption of the group is right, so a model that is
right says different ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm import safe_io
from mm.concepts import TrainableConcepts
from mm.concepts_training import reconstruction
from mm.data.example import Source
from mm.generation import Engine, Request
from mm.interfaces import Sampling
from mm.model import MultimodalModel

ROWS = 512
"""Rows that are generated together."""


@dataclass(frozen=True)
class Said:
    """What one prefix was continued with."""

    group: str
    prefix: str
    sentences: list[str]
    """One for each seed."""
    vectors: Float[Tensor, "n D"]


def captions(source: Source, group: str) -> dict[str, list[str]]:
    """The different texts of each group, in the order of the source."""
    out: dict[str, dict[str, None]] = {}
    for example in source:
        out.setdefault(str(example[group]), {})[" ".join(str(example["text"]).split())] = None
    return {name: list(texts) for name, texts in out.items()}


def within_one_edit(a: str, b: str) -> bool:
    """Whether the edit distance of two texts is at most 1: one letter inserted, left out or replaced."""
    if abs(len(a) - len(b)) > 1:
        return False
    first = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[first:], b[first:]
    if len(rest_a) == len(rest_b):
        return rest_a[1:] == rest_b[1:]
    longer, shorter = (rest_a, rest_b) if len(rest_a) > len(rest_b) else (rest_b, rest_a)
    return longer[1:] == shorter


def expected_distinct(count: int, draws: int) -> float:
    """How many different ones are expected among `draws` of `count`, drawn evenly and with repetition."""
    return count * (1 - (1 - 1 / count) ** draws)


def continuations(
    model: MultimodalModel, prefixes: Sequence[tuple[str, str]], seeds: int, sampling: Sampling
) -> Iterator[Said]:
    """The next sentence after each (group, prefix), `seeds` times."""
    name, tokenizer = concepts_of(model)
    requests = []
    for _, prefix in prefixes:
        given = tokenizer.encode(prefix).latents
        assert given is not None
        content = torch.cat((given, torch.zeros(1, given.shape[1])))
        known = torch.arange(len(content)) < len(given)
        items = [(name, (len(content),))]
        requests += [
            Request(prompt=[], items=items, text=False, known=(content, known), sampling=sampling, seed=seed)
            for seed in range(seeds)
        ]
    last: list[Tensor] = []
    for first in range(0, len(requests), ROWS):
        made = Engine(model).generate(requests[first : first + ROWS])
        last += [segments[-1].content.latents[-1] for segments in made]
    vectors = torch.stack(last).view(len(prefixes), seeds, -1)
    for (group, prefix), own in zip(prefixes, vectors, strict=True):
        yield Said(group, prefix, tokenizer.write(own), own)


def concepts_of(model: MultimodalModel) -> tuple[str, Any]:
    """Name and tokenizer of the model's sentences. Raises `ValueError` where it has none."""
    for modality in model.modalities:
        if isinstance(modality.tokenizer, TrainableConcepts):
            return modality.name, modality.tokenizer
    names = ", ".join(modality.name for modality in model.modalities)
    raise ValueError(f"the model has the modalities {names}, none of them sentences as vectors; give an LCM")


def figures(said: Sequence[Said], real: Mapping[str, Sequence[str]], tokenizer: Any) -> dict[str, float]:
    """Of all sentences said:

    - `exact`: share that is a caption of the prefix's group; `near`: or at most one edit from one;
    - `exact_by_group`: the mean over groups of `exact`;
    - `elsewhere`: share that is a caption of another group; `repeated`: of the prefix itself;
    - `nearest`: share of vectors whose nearest caption's vector, of all captions, belongs to the group;
    - `diversity`: different right sentences of a prefix ÷ how many as many even draws of real ones would have, mean
      over prefixes; `distinct`: different sentences, right or wrong, by the same measure.
    """
    home: dict[str, set[str]] = {}
    for group, texts in real.items():
        for text in texts:
            home.setdefault(text, set()).add(group)
    everything = list(home)
    vectors = torch.cat([tokenizer.encode(text).latents[:1] for text in everything])
    counts = dict.fromkeys(("exact", "near", "elsewhere", "repeated", "nearest"), 0.0)
    by_group: dict[str, list[float]] = {}
    diversity, distinct = [], []
    total = sum(len(one.sentences) for one in said)
    for one in said:
        own = set(real[one.group])
        right = [sentence in own for sentence in one.sentences]
        counts["exact"] += sum(right)
        counts["near"] += sum(
            good or any(within_one_edit(sentence, text) for text in own)
            for good, sentence in zip(right, one.sentences, strict=True)
        )
        counts["elsewhere"] += sum(s in home and s not in own for s in one.sentences)
        counts["repeated"] += sum(one.prefix.endswith(f" {s}") for s in one.sentences if s)
        closest = torch.cdist(one.vectors, vectors).argmin(1).tolist()
        counts["nearest"] += sum(one.group in home[everything[n]] for n in closest)
        by_group.setdefault(one.group, []).append(sum(right) / len(right))
        possible = expected_distinct(len(own), len(one.sentences))
        diversity.append(len(own & set(one.sentences)) / possible)
        distinct.append(len(set(one.sentences)) / possible)
    out = {name: value / total for name, value in counts.items()}
    out["exact_by_group"] = sum(sum(v) / len(v) for v in by_group.values()) / len(by_group)
    out["diversity"], out["distinct"] = sum(diversity) / len(said), sum(distinct) / len(said)
    return out


def measure(
    model: MultimodalModel,
    train: Source,
    holdout: Source,
    *,
    group: str = "subcategory",
    seeds: int = 20,
    least: int = 2,
    most: int = 0,
    sampling: Sampling | None = None,
) -> dict[str, Any]:
    """Figures of the autoencoder (`train` and `holdout` captions) and of what the model says next, with examples.

    Args:
        train, holdout: sources whose `text` is one sentence, what training has seen and what not.
        least: groups of fewer captions are left out: there, there is nothing to choose.
        most: prefixes at the most, evenly spread over all; 0 = all.
    """
    _, tokenizer = concepts_of(model)
    seen, unseen = captions(train, group), captions(holdout, group)
    real = {name: list(dict.fromkeys([*seen.get(name, []), *unseen.get(name, [])])) for name in {**seen, **unseen}}
    known = {text for texts in seen.values() for text in texts}
    prefixes = [
        (name, f"{name}. {text}")
        for name, texts in sorted(unseen.items())
        for text in texts
        if text not in known and len(real[name]) >= least and len(tokenizer.split(f"{name}. {text}")) == 2
    ]
    if not prefixes:
        raise ValueError("no held-out caption belongs to a group of several; give a larger holdout")
    if most:
        prefixes = [prefixes[n * len(prefixes) // most] for n in range(most)] if most < len(prefixes) else prefixes
    fresh = [text for texts in unseen.values() for text in texts if text not in known]
    autoencoder = {}
    for name, sentences in (("train", sorted(known)[:: max(1, len(known) // 500)]), ("holdout", fresh)):
        vectors = torch.cat([tokenizer.encode(sentence).latents[:1] for sentence in sentences])
        autoencoder[name] = {"sentences": len(sentences), **reconstruction(tokenizer.write(vectors), sentences)}
    said = list(continuations(model, prefixes, seeds, sampling or Sampling()))
    chosen = said[:: max(1, len(said) // 8)][:8]
    return {
        "autoencoder": autoencoder,
        "prefixes": len(prefixes),
        "groups": len({name for name, _ in prefixes}),
        "seeds": seeds,
        "next": figures(said, real, tokenizer),
        "examples": {one.prefix: one.sentences[:4] for one in chosen},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures a checkpoint, prints JSON. Raises `ValueError` for what the user can mend."""
    from mm.data.shards import ShardSource
    from mm.hub import load_pretrained, load_sampling, read_config, resolve

    parser = argparse.ArgumentParser(prog="python -m mm.evaluate.concepts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint folder of an LCM")
    parser.add_argument("--data", nargs="+", required=True, metavar="TAR", help="the shards it was trained with")
    parser.add_argument("--group", default="subcategory", help="field that names the group (%(default)s)")
    parser.add_argument("--caption", default="{caption}.", help="format of a sentence (%(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="sentences a prefix (%(default)s)")
    parser.add_argument("--most", type=int, default=0, help="prefixes at the most; 0 = all (%(default)s)")
    parser.add_argument("--temperature", type=float, help="of the noise that sampling begins with")
    parser.add_argument("--denoising-steps", type=int, help="of the diffusion head")
    parser.add_argument("--out", help="file for the JSON")
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.most < 0:
        raise ValueError(f"--seeds must be at least 1 and --most at least 0, got {options.seeds} and {options.most}")
    torch.set_num_threads(1)
    model = load_pretrained(options.model)
    recommended = load_sampling(read_config(resolve(options.model))).get(concepts_of(model)[0], Sampling())
    given = {"temperature": options.temperature, "denoising_steps": options.denoising_steps}
    sampling = Sampling(**{**vars(recommended), **{name: v for name, v in given.items() if v is not None}})
    sources = [ShardSource(options.data, split=split, caption=options.caption) for split in ("train", "holdout")]
    result = measure(model, *sources, group=options.group, seeds=options.seeds, most=options.most, sampling=sampling)
    if options.out:
        safe_io.write_json(Path(options.out), result)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
