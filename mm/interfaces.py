"""The plug-in contracts: a *tokenizer* turns raw data into tokens and back, an *order* lays tokens out as positions,
a *head* turns hidden states into tokens. One file per plug-in; nothing in the core knows a modality by name.

Letters in shapes: N content elements of one item, K sub-codes, D latent width, W backbone width, n selected positions.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mm.automaton import Automaton as Automaton
from mm.configured import Checked as Checked
from mm.configured import Configured as Configured
from mm.draws import Draw as Draw
from mm.sampling import MAX_GUIDANCE as MAX_GUIDANCE
from mm.sampling import Sampling as Sampling

Kind = Literal["discrete", "codes", "continuous"]
Fusion = Literal["early", "middle", "late"]

DRAWN = -2
"""Among given sub-codes: this one is to be drawn (−1: none stands there)."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a tokenizer emits; everything the core needs to know about it."""

    kind: Kind
    """`discrete`: one id an element; `codes`: `num_codes` sub-codes an element; `continuous`: a vector an element."""
    vocab_size: int = 0
    """Ids an element (or a sub-code) can take; 0 for continuous."""
    num_codes: int = 1
    """Sub-codes an element."""
    dim: int = 0
    """Width of a continuous element."""
    max_grid: tuple[int, ...] = ()
    """Largest extent an axis may have, slowest axis first ((rows, columns) for a picture). Empty: a list of free length, whose
    extent isn't announced (text; file bytes, which end with `stop`)."""
    pixels: tuple[int, ...] = ()
    """Height and width of the pictures that a list of free length stands for; empty: it stands for none, or its grid says."""
    least: int = 1
    """The fewest elements that an item of free length has, `stop` included: where fewer fit, none is opened."""
    scales: tuple[tuple[int, ...], ...] = ()
    """Grids that an item consists of, coarsest first, up to `max_grid`, of which each refines what those before it made up (VAR);
    an item of fewer scales ends with another of them. Empty: an item is one grid."""
    scale_dim: int = 0
    """Width of the vectors that positions of such an item read (`ModalityTokenizer.scale_inputs`)."""
    spatial: bool = True
    """Whether an element stands for the place that its grid says, so that a part of the raw data is a part of the grid."""
    sample_rate: int = 0
    """Samples a second of the sound that elements stand for; 0: it isn't sound."""
    frame_rate: float = 0.0
    """Elements a second of a tokenizer of sound."""
    fps: float = 0.0
    """Frames a second of the video that elements stand for; 0: it isn't video."""
    frame_stride: int = 1
    """Frames of video that a step along the slowest axis stands for; the first stands for one alone: a grid (T, rows, columns) is
    1 + (T − 1)·stride frames."""
    voxels: int = 0
    """Cells a side of the grid that a shape (`mm.shapes.Shape`) has which elements stand for; 0: it isn't a shape."""
    alongside: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Name → width of the vectors that come from elsewhere beside every element (`Encoded.alongside`)."""
    stop: int = -1
    """The id that, as sub-code 0 of an element, ends an item before the extent it announced; −1: none does. A list of free
    length ends with this id (the tokenizer's last, by convention): one whose last id is another was cut off."""
    fingerprint: str = ""
    """Changes whenever the meaning of a token changes (weights, tables, version); checked against checkpoints and caches."""

    def __post_init__(self) -> None:
        if self.kind in ("discrete", "codes") and self.vocab_size < 1:
            raise ValueError(f"a {self.kind} tokenizer needs vocab_size >= 1, got {self.vocab_size}")
        if self.kind == "continuous" and self.dim < 1:
            raise ValueError(f"a continuous tokenizer needs dim >= 1, got {self.dim}")
        if self.is_free and (self.kind != "discrete" or self.stop >= self.vocab_size or self.least < 1):
            raise ValueError(
                f"a list of free length has ids, of which one is its end, and 1 or more elements; got {self.kind} with "
                f"stop {self.stop} of {self.vocab_size} and at least {self.least}"
            )
        if self.scales and (self.kind != "discrete" or self.scale_dim < 1 or self.scales[-1] != self.max_grid):
            raise ValueError(f"scales are of ids, with a scale_dim, and end with max_grid; got {self}")

    @property
    def is_free(self) -> bool:
        """Whether an item's extent isn't announced, but ended by `stop`."""
        return not self.max_grid and self.stop >= 0

    def upto(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The scales of an item that ends with this grid; empty where items have one grid."""
        if self.scales and grid not in self.scales:
            raise ValueError(f"an item ends with one of the scales {self.scales}, got {grid}; give one of them")
        return self.scales[: self.scales.index(grid) + 1] if self.scales else ()

    def count(self, grid: tuple[int, ...]) -> int:
        """Elements of an item of this grid."""
        return sum(math.prod(scale) for scale in self.upto(grid) or (grid,))

    def item(self, content: Tensor, grid: tuple[int, ...], **facts: Any) -> Encoded:
        """Elements of this kind as an item."""
        facts[{"discrete": "ids", "codes": "codes", "continuous": "latents"}[self.kind]] = content
        return Encoded(grid=grid, scales=self.upto(grid), **facts)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One item as tokens. Exactly one of `ids`, `codes`, `latents` is set; ids are local to the tokenizer (from 0)."""

    grid: tuple[int, ...]
    """Extent of every axis, slowest first; `(N,)` for a list, of free length too. Its product is N, if it has no `scales`."""
    scales: tuple[tuple[int, ...], ...] = ()
    """Grids of an item that has several, coarsest first, the last is `grid`; its elements stand grid by grid (`Spec.scales`)."""
    ids: Int[Tensor, " N"] | None = None
    codes: Int[Tensor, "N K"] | None = None
    latents: Float[Tensor, "N D"] | None = None
    micro: tuple[float, ...] = ()
    """Facts about the item as a whole (original size, crop, score) for orders that condition on them (Meissonic)."""
    alongside: dict[str, Float[Tensor, "N F"]] = field(default_factory=dict)
    """What comes from elsewhere at the time of each element and is never generated (what is heard while speaking, LSLM). The
    position that holds element i reads row i, and so predicts element i + 1 from what came up to i. Without it nothing is
    added there, which is the same as rows of zeros."""
    ended: bool = False
    """The item ended before the extent it announced: it has the first N elements of its grid only (a list)."""

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.ids, self.codes, self.latents)) != 1:
            raise ValueError("Encoded needs exactly one of ids, codes, latents")
        count = sum(math.prod(scale) for scale in self.scales or (self.grid,))
        if self.scales and self.scales[-1] != self.grid:
            raise ValueError(f"Encoded has scales {self.scales}, of which the last must be its grid {self.grid}")
        if self.ended and len(self.grid) == 1:
            count = min(count, len(self))
        if len(self.content) != count:
            raise ValueError(f"Encoded holds {len(self.content)} elements, but {self.scales or self.grid} are {count}")
        for name, rows in self.alongside.items():
            if rows.ndim != 2 or len(rows) != len(self.content):
                raise ValueError(
                    f"Encoded has {name!r} of shape {tuple(rows.shape)} alongside {len(self.content)} elements; give a row of "
                    "numbers an element"
                )

    @property
    def content(self) -> Tensor:
        """The one content tensor that is set, first axis N."""
        for value in (self.ids, self.codes, self.latents):
            if value is not None:
                return value
        raise AssertionError("unreachable: checked in __post_init__")

    def __len__(self) -> int:
        return len(self.content)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Raw data decoded from tokens. Decoding is total: what a model can emit never raises; `value` is the best sample."""

    value: Any
    valid: bool = True
    reason: str = ""


class ModalityTokenizer(Configured, abc.ABC):
    """Raw data ↔ tokens. May also be an `nn.Module` (then it has weights, and `to`, `eval` apply)."""

    decodes: bool = True
    """False: it makes prompts only, and `decode` gives an empty value that isn't valid."""

    @property
    @abc.abstractmethod
    def spec(self) -> Spec: ...

    @abc.abstractmethod
    def encode(self, raw: Any) -> Encoded:
        """Tokens of one item, on the CPU. Raises `ValueError` (got / expected / what to do) for what it can't encode."""

    @abc.abstractmethod
    def decode(self, encoded: Encoded) -> Decoded:
        """The inverse as far as it goes. Never raises on ids within the spec, whatever their number or order."""

    def automaton(self) -> Automaton | None:
        """A new automaton for one item of free length that is generated; None: any id may follow any."""
        return None

    def prefix(self, raw: Any, share: float) -> Encoded:
        """The first ids of the item, as far as they hold nothing but the upper `share` (0 to 1) of a picture's rows: what is
        kept where the rest is to be written anew. Raises `ValueError` as `encode`, and where the tokenizer can't tell."""
        raise ValueError(
            f"{type(self).__name__} can't tell which of its ids hold a part of a picture, so that no part can be kept; leave "
            "image and mask out"
        )

    def scale_inputs(self, ids: Int[Tensor, " n"], *, own: bool = False) -> Float[Tensor, "m D"]:
        """Of a tokenizer with `Spec.scales`: what positions read, on the CPU, where `ids` are of the first scales. For these and
        for the next scale: what those before it made up, as coarse as it is (zeros at the first). `own`: for these alone,
        each with its own ids in it."""
        raise ValueError(f"{type(self).__name__} has no scales; give its modality the raster order")

    def embedding(self, width: int) -> nn.Module:
        """How the backbone reads vectors: a new module (…, D) → (…, width), trained with the model. A linear map, unless the
        tokenizer has more to say (`mm.soft_codes`)."""
        return nn.Linear(self.spec.dim, width)

    def encode_batch(self, raws: Sequence[Any]) -> list[Encoded]:
        """Many items at once; tokenizers with a network override this with one batched forward."""
        return [self.encode(raw) for raw in raws]

    def decode_batch(self, items: Sequence[Encoded]) -> list[Decoded]:
        return [self.decode(item) for item in items]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Content of one item laid out as positions for training, relative to where the item begins. P positions.

    The builder (`mm.layout`) adds the item's begin, size and end controls, and shifts `order`, `position`, `target`.
    """

    element: Int[Tensor, " P"]
    """Which content element each position holds."""
    order: Int[Tensor, " P"]
    """From 0; when the position is generated."""
    position: Float[Tensor, "P 3"]
    """Rotary coordinates (time, row, column) from 0."""
    time: Float[Tensor, " P"]
    """0 = clean, 1 = fully corrupted (mask token or pure noise)."""
    copy: Int[Tensor, " P"]
    target: Int[Tensor, " P"]
    """Index among the P positions whose content this one predicts; P = whatever follows the item; −1 = nothing."""
    enters: bool
    """True when the position before the item predicts its first element (raster)."""
    inject: dict[str, Float[Tensor, "P F"]] = field(default_factory=dict)
    """Vectors the backbone gets beside the content (mask rate, micro-conditions)."""
    held: Shaped[Tensor, "P ..."] | None = None
    """What each position holds, where that isn't an element as it is: sub-codes of several frames (delay), −1 = none."""
    reads: Shaped[Tensor, "P ..."] | None = None
    """What the backbone reads there, where it differs from what is to be predicted there."""


class Order(Checked, abc.ABC):
    """When each element of an item is generated. Training layout and generation plan live in one class."""

    default_steps: int = 0
    """Rounds of an item, which `Sampling.steps` may change; 0: it has none, and `mm generate --steps` is refused."""
    along: bool = False
    """Whether a list (one axis) that comes right after a text runs along it: its elements' rotary coordinates are spread over
    the text's, so that they say how far the text has come, and the list's extent how fast (ARDiT, section 3.2). So does a list
    of another modality that comes right after such a one, along the same text."""
    beside: bool = False
    """Whether an item's elements are evaluated once more beside its clean positions, and the cache needs room for both."""
    ends: bool = False
    """Whether its items may end before the extent they announced (`Spec.stop`)."""
    free: bool = False
    """Whether it makes lists of free length (`Spec.is_free`)."""
    scaled: bool = False
    """Whether it makes items of several scales (`Spec.scales`)."""
    vectors: Mapping[str, int] = {}
    """Name → width of what it injects (`Layout.inject`) as vectors for a linear map, not as facts."""

    def check(self, spec: Spec) -> None:
        """Raises `ValueError` for a tokenizer whose tokens this order can't lay out."""
        if spec.is_free and not self.free:
            raise ValueError(
                f"{type(self).__name__} must know an item's extent beforehand, but this tokenizer makes lists of free length; "
                "use the raster order"
            )
        if spec.scales and not self.scaled:
            raise ValueError(
                f"{type(self).__name__} makes items of one grid, this tokenizer's have several; use scales"
            )

    def attach(self, tokenizer: ModalityTokenizer) -> None:  # noqa: B027 - optional
        """Whose tokens it lays out: told once, before anything else, for orders that ask the tokenizer what positions read."""

    def places(self, count: int, spec: Spec) -> int:
        """Clean positions that an item of `count` elements takes, where some leave the cache meanwhile: at any one time."""
        return count

    def announced(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The extents that the model is told of an item: fewer than it has, of an order whose items may go on for longer than any
        that training showed."""
        return grid

    @abc.abstractmethod
    def layout(self, encoded: Encoded, *, context: bool, rng: torch.Generator) -> Layout:
        """Positions of one item for training. `context`: the item is given, not learned (a prompt), and stays clean;
        otherwise `rng` draws what the order draws (mask rates, block shifts)."""

    @abc.abstractmethod
    def session(
        self,
        grid: tuple[int, ...],
        sampling: Sampling,
        rng: torch.Generator,
        known: tuple[Tensor, Bool[Tensor, " N"]] | None = None,
        dim: int = 0,
        num_codes: int = 0,
    ) -> Session:
        """The step plan that generates one item of this grid. `known` = (content, which of it is given): inpainting, prefix
        completion; orders that cannot honour it raise `ValueError`. `dim`: width of its vectors; `num_codes`: sub-codes of an
        element; both 0 = it has ids. An empty grid: a list of free length, whose given elements are as many as they are."""


class Session(abc.ABC):
    """Generation of one item, step by step. The engine asks `propose`, evaluates, samples, and calls `accept`."""

    lays_out: bool = False
    """An autoregressive session says by `settled` what enters the cache; otherwise its elements do, one by one, as they are."""
    stop: int = -1
    """As `Spec.stop`; the engine sets it."""
    most: int = 0
    """Elements that there is room for, of a list of free length; the engine sets it."""

    @abc.abstractmethod
    def propose(self) -> Proposal | None:
        """What to evaluate next; None when the item is complete."""

    @abc.abstractmethod
    def accept(self, sample: Tensor, log_prob: Float[Tensor, " n"] | None) -> None:
        """The head's draws for the elements that `propose` asked about, and the log-probability of each (untempered)."""

    def settled(self) -> Layout | None:
        """What is final since the last call and enters the cache now, before the item is complete, laid out clean."""
        return None

    def forgets(self) -> tuple[int, Float[Tensor, " 3"]] | None:
        """How many of its oldest elements leave the cache once what `settled` gave last is in it, and what is added to the
        coordinates of the others; None: all stay. Asked after `settled`, before `propose`."""
        return None

    @abc.abstractmethod
    def content(self) -> Tensor:
        """What is generated so far (elements not yet known hold 0)."""

    def final(self) -> int:
        """How many of the leading elements won't change any more; sound is played as far as that."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One evaluation of a session."""

    autoregressive: bool
    """True: the row's last hidden state predicts the one next element, which is then fed and kept in the cache.
    False: the positions of `layout` are fed, and those with target >= 0 are sampled, in stream order."""
    done: float
    """Fraction of the item that is generated, for guidance schedules; of a list of free length, fraction of its room."""
    content: Tensor | None = None
    """What the fed positions hold, element by element (any value where time = 1)."""
    layout: Layout | None = None
    given: Int[Tensor, "n K"] | None = None
    """Sub-codes at the sampled positions: given ones, −1 = none stands there, `DRAWN`; None: all are drawn."""
    keep: bool = False
    """The positions of `layout` stay in the cache as they were fed, and nothing else of these elements enters it (VAR)."""
    greedy: bool = False
    """The likeliest are taken, whatever the temperature (VALL-E's later stages)."""


class Head(Checked, nn.Module, abc.ABC):
    """Hidden states → tokens of one modality. Constructed from hyper-parameters; `build` makes the weights."""

    @abc.abstractmethod
    def build(self, *, width: int, spec: Spec, controls: int = 0) -> None:
        """Make the parameters. `controls` control ids follow the modality's own (host modality only)."""

    @abc.abstractmethod
    def loss(self, hidden: Float[Tensor, "n W"], target: Tensor) -> Float[Tensor, " n"]:
        """Loss per position (mean over the valid scalars of that position). Target: local ids (n), sub-codes (n, K) with −1
        where invalid, or latents (n, D)."""

    @abc.abstractmethod
    def sample(
        self, hidden: Float[Tensor, "n W"], draws: Sequence[Draw]
    ) -> list[tuple[Tensor, Float[Tensor, " m"] | None]]:
        """For each draw, tokens for its rows and their log-probabilities (None where the head has no density)."""


@dataclass(kw_only=True)
class Modality:
    """One entry of a model's `modalities` list in YAML."""

    name: str
    tokenizer: ModalityTokenizer
    head: Head
    order: Order
    weight: float = 1.0
    """Loss weight of the modality (Emu3: 0.5 on vision)."""
    fusion: Fusion = "middle"
    """Where what comes alongside its elements enters the backbone (`mm.fusion`)."""

    def __post_init__(self) -> None:
        if self.fusion not in get_args(Fusion):
            raise ValueError(f"fusion must be early, middle or late, got {self.fusion!r:.60}")
