"""Next-scale prediction beside raster order on the same tokens: passes through the backbone and time an item.

Both sides are our engine with the same backbone and random weights of the same measure: time doesn't depend on what the weights
say. The same ids are made: scale by scale, a scale a pass, or one after another as a list. Items are a picture of the scales 1,
2, 4 and 8 (85 ids, VAR) and three such planes (255 ids, SAR3D), behind a text of 16 positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mm.backbone import BackboneConfig
from mm.bench import Row, Settings, alternate
from mm.generation import Engine, Request
from mm.heads.lm import LMHead
from mm.interfaces import Decoded, Encoded, Modality, ModalityTokenizer, Order, Spec
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.multiscale import MultiScaleQuantizer
from mm.orders.raster import Raster
from mm.orders.scales import Scales
from mm.tokenizers.text_bytes import TextBytes

CODES, DIM, TEXT = 1024, 32, 16


class Ids(ModalityTokenizer):
    """Ids of several scales without a network around them, or as one list (`flat`)."""

    def __init__(self, planes: int, flat: bool) -> None:
        self.flat = flat
        self.quantizer = MultiScaleQuantizer(planes=planes, codebook_size=CODES, code_dim=DIM).eval()

    @property
    def spec(self) -> Spec:
        grids = self.quantizer.grids
        if self.flat:
            return Spec(kind="discrete", vocab_size=CODES, max_grid=(self.quantizer.count,))
        return Spec(kind="discrete", vocab_size=CODES, max_grid=grids[-1], scales=grids, scale_dim=DIM)

    def encode(self, raw: Tensor) -> Encoded:
        return self.spec.item(raw, self.spec.max_grid)

    def decode(self, encoded: Encoded) -> Decoded:
        return Decoded(value=encoded.ids)

    def scale_inputs(self, ids: Tensor, *, own: bool = False) -> Tensor:
        return self.quantizer.scale_inputs(ids[None], own=own)[0]


class Counted(Engine):
    """Counts passes through the backbone."""

    passes = 0

    def _forward(self, *args: Any) -> Tensor:
        self.passes += 1
        return super()._forward(*args)


def rows(settings: Settings) -> Iterator[Row]:
    for width, layers in settings.sizes:
        for planes, what in ((0, "a picture"), (3, "three planes")):
            yield from item_rows(width, layers, planes, what, settings)


def item_rows(width: int, layers: int, planes: int, what: str, settings: Settings) -> Iterator[Row]:
    torch.manual_seed(0)
    config = BackboneConfig(width=width, layers=layers, heads=width // 64, hidden=4 * width)
    engines = [Counted(model(config, Ids(planes, flat), Raster() if flat else Scales())) for flat in (False, True)]
    count = Ids(planes, True).quantizer.count
    for batch in (1, 8):
        text = Encoded(grid=(TEXT,), ids=torch.randint(256, (TEXT,)))
        made: list[list[list[Segment]]] = [[], []]

        def run(side: int, batch: int = batch, text: Encoded = text, made: Any = made) -> None:
            engine = engines[side]
            grid = engine.model.vocabulary["image"].max_grid
            prompt = [Segment("text", text, loss=False)]
            engine.passes = 0
            made[side] = engine.generate(
                [Request(prompt=prompt, items=[("image", grid)], text=False, seed=n) for n in range(batch)]
            )

        a, b, ratio = alternate(lambda: run(0), lambda: run(1), settings.rounds)  # noqa: B023 - called at once
        if any(len(row[0].content) != count for side in made for row in side):
            raise ValueError(f"a side made another number of ids than {count}: the two sides did unequal work")
        name = f"{what} of {count} ids, {width}×{layers}, batch {batch}"
        yield Row(name, 1e3 * a / batch, "ms an item", 1e3 * b / batch, ratio, "raster")
        passes = [engine.passes for engine in engines]
        yield Row(f"{name}, passes", passes[0], "passes", passes[1], passes[1] / passes[0], "raster")


def model(config: BackboneConfig, tokenizer: Ids, order: Order) -> MultimodalModel:
    modalities = [
        Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster()),
        Modality(name="image", tokenizer=tokenizer, head=LMHead(), order=order),
    ]
    return MultimodalModel(config, modalities, context=512).eval()
