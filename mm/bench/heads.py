"""Heads of vectors: the diffusion head beside MAR's own loop, few steps beside many, and what a token costs as an item grows.

- Speed: MAR's network and its `p_sample` in the loop of its `p_sample_loop` (100 ancestral steps of 1,000, learned variance,
  no guidance), imported from the checkout that `--mar` names; ours with the same weights and the same noise, and the same
  vectors come out, or nothing is reported. Width 256, 3 blocks, vectors of 16.
- Distances: heads trained on `mm.bench.mixture`, and the energy distance of their samples to new points of the data.
- Rounding: the best prediction, known in closed form, rounded to bfloat16 (MMAR's reason for predicting v).
- Raster: a random model, and the time between one vector and the next over the course of a long item.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.backbone import BackboneConfig
from mm.bench import Row, Settings, alternate, seconds
from mm.bench.language import Ids
from mm.bench.mixture import distance, points, sampled, train
from mm.cache import KVCache
from mm.diffusion import Process, Sampler
from mm.generation import Engine, Event, Request
from mm.heads.diffusion import DiffusionHead
from mm.heads.gaussian import GaussianHead
from mm.heads.regression import RegressionHead
from mm.interfaces import Decoded, Draw, Encoded, Head, Modality, ModalityTokenizer, Sampling, Spec
from mm.interop.denoiser import load_mlp_adaln
from mm.layout import Segment
from mm.model import MultimodalModel

DIM, WIDTH, BLOCKS, STEPS = 16, 256, 3, 100
"""Of the measured head: vector, network and condition, residual blocks, ancestral steps."""
FEW = Sampler(solver="dpm++", steps=10, rho=1.5)
ANCESTRAL = Sampler(solver="ddpm", steps=STEPS)
TRAINED_WIDTH, SETS, TRAININGS = 64, 8, 2
"""Width of the heads that learn the mixture, sets that a distance is the mean of, and trainings of a prediction."""

CLOCK, UNIT = time.thread_time, "ms of processor time a token"
"""Everything here runs on one thread, so that this is the time on a machine that does nothing else."""


def rows(settings: Settings) -> Iterator[Row]:
    if settings.mar is None:
        print(
            "heads: the rows beside MAR are left out; give --mar FOLDER, a checkout of github.com/LTH14/mar",
            file=sys.stderr,
        )
        peer = None
    else:
        peer = load_mar(settings.mar)
    yield from speed(peer, settings)
    yield from distances(settings)
    yield from predictions(settings)
    yield rounding()
    yield from raster(settings)


# --- speed ----------------------------------------------------------------------------------------------------------


def load_mar(folder: str) -> tuple[Any, Any]:
    """(`SimpleMLPAdaLN`, `create_diffusion`) of a checkout. Its modules have names as plain as `diffusion`, which they look for
    when they are loaded: the name is theirs for that long. Raises `ValueError` for a folder that is no checkout."""
    files = Path(folder, "diffusion", "__init__.py"), Path(folder, "models", "diffloss.py")
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{folder!r} has no {file.parent.name}/{file.name}; give a checkout of github.com/LTH14/mar"
            )
    aside = {name: sys.modules.pop(name) for name in _names()}
    try:
        loaded = [_load("diffusion", files[0]), _load("diffusion.diffloss", files[1])]
    finally:
        for name in _names():
            del sys.modules[name]
        sys.modules.update(aside)
    found = getattr(loaded[1], "SimpleMLPAdaLN", None), getattr(loaded[0], "create_diffusion", None)
    if None in found:
        raise ValueError(
            f"{folder!r} lacks SimpleMLPAdaLN or create_diffusion; give a checkout of github.com/LTH14/mar"
        )
    return found


def _names() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "diffusion"]


def _load(name: str, file: Path) -> Any:
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def ours_and_theirs(peer: tuple[Any, Any]) -> tuple[DiffusionHead, Callable[[Tensor], Tensor]]:
    """A head of ours, and MAR's sampling with the same weights: those that start at zero are random too."""
    network, create = peer
    torch.manual_seed(0)
    net = network(DIM, WIDTH, 2 * DIM, WIDTH, BLOCKS)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    process = create(str(STEPS), noise_schedule="cosine")
    head = DiffusionHead(
        Process(schedule="cosine", prediction="epsilon"),
        Sampler(solver="ddpm", steps=STEPS, spacing="linspace"),
        width=WIDTH, blocks=BLOCKS, learned_variance=True,
    )  # fmt: skip
    head.build(width=WIDTH, spec=Spec(kind="continuous", dim=DIM))
    load_mlp_adaln(head.net, net.state_dict())

    def theirs(hidden: Tensor) -> Tensor:
        """Their `p_sample_loop`, which works on CUDA alone."""
        x = torch.randn(len(hidden), DIM)
        for step in reversed(range(STEPS)):
            at = torch.tensor([step] * len(hidden))
            x = process.p_sample(net.forward, x, at, clip_denoised=False, model_kwargs={"c": hidden})["sample"]
        return x

    return head, theirs


def sample(head: Head, hidden: Float[Tensor, "n W"], seed: int = 0) -> Float[Tensor, "n D"]:
    draw = Draw(rows=slice(0, len(hidden)), sampling=Sampling(), generator=torch.Generator().manual_seed(seed))
    return head.sample(hidden, [draw])[0][0]


def check_equal(ours: Float[Tensor, "n D"], theirs: Float[Tensor, "n D"]) -> None:
    """Within 1e-4 of the largest value: the chain of a random network grows far beyond 1. Raises `ValueError`."""
    off = float((ours - theirs).abs().max() / theirs.abs().max())
    if not off <= 1e-4:
        raise ValueError(
            f"from equal noise the two heads made vectors that differ by {off:.1e} of the largest, expected at most 1e-4; "
            "their times are not comparable, so nothing is reported"
        )


def speed(peer: tuple[Any, Any] | None, settings: Settings) -> Iterator[Row]:
    """Milliseconds a vector; without the peer the times of the few-step head alone."""
    few = DiffusionHead(sampler=FEW, width=WIDTH, blocks=BLOCKS)
    few.build(width=WIDTH, spec=Spec(kind="continuous", dim=DIM))
    name = f"diffusion head, {FEW.solver} {FEW.steps} steps, batch 1"
    one = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if peer is None:
            sample(few, one)
            times = [seconds(partial(sample, few, one), CLOCK) for _ in range(settings.rounds)]
            yield Row(name, 1e3 * statistics.median(times), UNIT)
            return
        head, theirs = ours_and_theirs(peer)
        version = f"MAR's p_sample, {STEPS} steps"
        for count in (1, 64):
            hidden = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))
            torch.manual_seed(7)
            check_equal(sample(head, hidden, 7), theirs(hidden))
            mine, other, ratio = alternate(
                partial(sample, head, hidden), partial(theirs, hidden), settings.rounds, CLOCK
            )
            said, per = f"diffusion head, {STEPS} ancestral steps, batch {count}", 1e3 / count
            yield Row(said, per * mine, UNIT, per * other, ratio, version)
        mine, other, ratio = alternate(partial(sample, few, one), partial(theirs, one), settings.rounds, CLOCK)
        yield Row(name, 1e3 * mine, UNIT, 1e3 * other, ratio, version)


# --- distances to data ------------------------------------------------------------------------------------------------


def mean_distance(made: Callable[..., Float[Tensor, "n 2"]], count: int) -> float:
    """Over `SETS` sets of `count` points an angle; `made(angles, seed=…)`."""
    return statistics.fmean(distance(partial(made, seed=seed), count, seed) for seed in range(SETS))


def of_data(angle: Float[Tensor, " n"], seed: int) -> Float[Tensor, "n 2"]:
    return points(angle, torch.Generator().manual_seed(seed))


def distances(settings: Settings) -> Iterator[Row]:
    """One diffusion head sampled in several ways, and the heads that make one guess."""
    unit, name = "energy distance", f"mixture, sets of {settings.points}"
    real = mean_distance(of_data, settings.points)
    yield Row(f"{name}: data", real, unit)
    head = train(DiffusionHead(sampler=ANCESTRAL, width=TRAINED_WIDTH, blocks=BLOCKS), settings.training)
    many = mean_distance(partial(sampled, head), settings.points)
    yield Row(f"{name}: diffusion, {STEPS} ancestral steps", many, unit, real, real / many, "data")
    for sampler in (FEW, Sampler(solver="dpm++", steps=FEW.steps), Sampler()):
        head.sampler = sampler
        said = f"{sampler.solver} {sampler.steps} steps" + (f" with rho {sampler.rho:g}" if sampler.rho != 1 else "")
        made = mean_distance(partial(sampled, head), settings.points)
        yield Row(f"{name}: diffusion, {said}", made, unit, many, many / made, f"{STEPS} ancestral steps")
    for said, other in (("regression", RegressionHead(layers=3)), ("Gaussian", GaussianHead())):
        made = mean_distance(partial(sampled, train(other, settings.training)), settings.points)
        yield Row(f"{name}: {said}", made, unit, real, real / made, "data")


def predictions(settings: Settings) -> Iterator[Row]:
    """v beside ε, trained and sampled in float32 from the same seeds. One row a training: what differs between trainings is
    the noise of the comparison."""
    for seed in range(TRAININGS):
        found = {}
        for prediction in ("v", "epsilon"):
            process = Process(schedule="linear", prediction=prediction)
            head = DiffusionHead(process, Sampler(solver="ddim", steps=50), width=TRAINED_WIDTH, blocks=BLOCKS)
            train(head, settings.training, seed=seed)
            found[prediction] = mean_distance(partial(sampled, head), settings.points)
        v, epsilon = found["v"], found["epsilon"]
        name = f"mixture, sets of {settings.points}: diffusion, float32, v, ddim 50 steps, training {seed + 1}"
        yield Row(name, v, "energy distance", epsilon, epsilon / v, "epsilon")


# --- rounding ---------------------------------------------------------------------------------------------------------

MEAN, DEVIATION = 1.5, 0.4


def best(process: Process, times: Float[Tensor, " K"]) -> Callable[[Tensor, int], Tensor]:
    """The best prediction for data of Normal(1.5, 0.4²): the posterior mean of x0 and ε given x."""

    def predict(x: Tensor, k: int) -> Tensor:
        a, s = (float(level) for level in process.levels(times[k]))
        total = a * a * DEVIATION**2 + s * s
        x0 = MEAN + a * DEVIATION**2 / total * (x - a * MEAN)
        return process.target(x0, s / total * (x - a * MEAN), times[k].expand(len(x)))

    return predict


def rounding(count: int = 2000) -> Row:
    """Root mean square of what rounding each prediction to bfloat16 changes in the result of 100 steps of DDIM."""
    error = {}
    for prediction in ("v", "epsilon"):
        process = Process(schedule="cosine", prediction=prediction)
        plan = Sampler(solver="ddim", steps=STEPS).plan(process)
        exact = best(process, plan.time.double())
        noise = torch.randn(1, count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def rounded(x: Tensor, k: int, exact: Callable[[Tensor, int], Tensor] = exact) -> Tensor:
            return exact(x, k).bfloat16().double()

        error[prediction] = float((plan.run(rounded, noise) - plan.run(exact, noise)).square().mean().sqrt())
    return Row(
        f"prediction rounded to bfloat16, ddim {STEPS} steps: v", error["v"], "RMSE", error["epsilon"],
        error["epsilon"] / error["v"], "epsilon",
    )  # fmt: skip


# --- the cost of a token in a long item --------------------------------------------------------------------------------


class Vectors(ModalityTokenizer):
    """A square of vectors as it is."""

    def __init__(self, side: int) -> None:
        self.side = side

    @property
    def spec(self) -> Spec:
        return Spec(kind="continuous", dim=DIM, max_grid=(self.side, self.side), fingerprint="vectors")

    def encode(self, raw: Tensor) -> Encoded:
        return Encoded(grid=(self.side, self.side), latents=raw)

    def decode(self, encoded: Encoded) -> Decoded:
        return Decoded(value=encoded.latents)


def raster_model(width: int, layers: int, side: int) -> MultimodalModel:
    """Random; text, and squares of vectors in raster order under a diffusion head of few steps."""
    from mm.plugins import load

    torch.manual_seed(0)
    head, order = DiffusionHead(sampler=FEW, width=WIDTH, blocks=BLOCKS), load("orders", "raster")
    modalities = [
        Modality(name="text", tokenizer=Ids(), head=load("heads", "lm")(), order=order()),
        Modality(name="image", tokenizer=Vectors(side), head=head, order=order()),
    ]
    config = BackboneConfig(width=width, layers=layers, heads=width // 64, head_dim=64)
    return MultimodalModel(config, modalities, context=side * side + 16).eval()


def token_times(model: MultimodalModel, side: int, rounds: int) -> tuple[Float[Tensor, " N"], int]:
    """Milliseconds of processor time between one vector and the next, the median over `rounds` items (N is one less than the
    vectors of an item), and how many vectors the backbone's input was given for one item. Processor time, because two places
    of one long run are compared, which can't take turns on a shared machine."""
    request = Request(prompt=[Segment("text", [1, 2, 3])], items=[("image", (side, side))], text=False)
    engine, embedded, found = Engine(model), 0, []

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal embedded
        embedded += len(inputs[0])

    with model.latent_embeddings["image"].register_forward_pre_hook(count):
        engine.generate([request])
    for _ in range(rounds):
        stamps: list[float] = []

        def stamp(_: Event, stamps: list[float] = stamps) -> None:
            stamps.append(CLOCK())

        engine.generate([request], on_step=stamp)
        found.append(1e3 * torch.tensor(stamps, dtype=torch.float64).diff())
    return torch.stack(found).median(0).values, embedded


def attention_times(model: MultimodalModel, lengths: Sequence[int], rounds: int = 15) -> list[float]:
    """Milliseconds of processor time that the attention of all layers takes for one query over caches of these lengths, as
    the engine's single step asks for it. Before each the weights are read once, so that keys and values come from where they
    come from in a model's step."""
    c = model.backbone.config
    cache = KVCache(c, 1, max(lengths), "cpu", torch.float32)
    query = torch.randn(1, c.kv_heads, c.heads // c.kv_heads, c.head_dim)

    def attend(length: int) -> None:
        keys, values = (past[:, :1, :length].transpose(2, 3).unbind(0) for past in (cache.keys, cache.values))
        for key, value in zip(keys, values, strict=True):
            F.scaled_dot_product_attention(query, key, value)

    found: dict[int, list[float]] = {length: [] for length in lengths}
    with torch.inference_mode():
        for _ in range(rounds):
            for length in lengths:
                for parameter in model.parameters():
                    parameter.sum()
                found[length].append(1e3 * seconds(partial(attend, length), CLOCK))
    return [statistics.median(found[length]) for length in lengths]


def raster(settings: Settings) -> Iterator[Row]:
    """The first and the last quarter of an item. What the last may cost more is the longer attention, measured alone."""
    (width, layers), side = settings.sizes[0], settings.side
    model = raster_model(width, layers, side)
    times, embedded = token_times(model, side, settings.rounds)
    count = side * side
    quarter = max(1, count // 4)
    first, last = (float(part.median()) for part in (times[:quarter], times[-quarter:]))
    alone = attention_times(model, [max(1, quarter // 2), count - quarter // 2])
    name = f"raster {side}×{side} vectors, {width}×{layers}"
    yield Row(f"{name}: first quarter", first, UNIT)
    expected = first + alone[1] - alone[0]
    yield Row(
        f"{name}: last quarter", last, UNIT, expected, expected / last,
        f"first quarter and {alone[1] - alone[0]:.3f} ms of longer attention",
    )  # fmt: skip
    yield Row(f"{name}: vectors embedded a vector generated", embedded / count, "vectors")
