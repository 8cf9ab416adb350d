"""Shapes ↔ discrete codes of three planes on ever finer grids, for the scales order (SAR3D, Chen et al. 2024, arXiv 2411.16856,
at the size of one processor core).

A cube of `size` cells a side, or pictures with depth from all round (`views`), becomes three planes of latents, which are
quantised side by side with the one codebook of all scales and planes: 3·Σ side² ids. Cells come from the sum of what the planes
say at them (`mm.triplane`). It is trained by `mm fit` with `mm.training_shapes.ShapeTokenizerModule`. Of an item's first scales
alone it decodes a coarser shape of the same size.

Letters in shapes: B batch, N cells a side, P planes, D latent channels, s side of a plane, n ids of the first scales, m of those
and the next, Q points.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm import saved
from mm.interfaces import Encoded, Spec
from mm.multiscale import MultiScaleQuantizer
from mm.quantizers import Quantized
from mm.shape_tokenizer import Lesson, ShapeTokenizer, pictures_of
from mm.shapes import Shape
from mm.trainable import Reconstruction
from mm.triplane import GridPlanes, PlaneDecoder, Planes, ViewPlanes, begin_principal
from mm.volume import Field
from mm.voxel_autoencoder import SIDES

QUANTIZER = ("codebook_size", "code_dim", "phis", "residual", "commitment", "decay", "dead_below", "normalize")
CHUNK = 1 << 21
"""Features of cells that are held at once while decoding."""
MAX_VIEWS, MAX_PIXELS = 24, 128


class TriplaneMSVQ(ShapeTokenizer):
    """Tokenizer of shapes with codes of planes at several scales.

    Args:
        size: cells a side.
        scales: sides of the grids of a plane, growing; the last divides `size`.
        views: pictures that are read of each shape, and their side in pixels, a multiple of 8 (SAR3D: 6); [0, 0]: the cube is
            read. A shape without a mesh shows the surface of its grid.
        width, depth, heads: of the encoder's network.
        decoder_width, decoder_depth: as above, of the decoder's; 0 = the encoder's.
        features, hidden: of a point of the planes, and of the network there.
        cells: cells along each axis, drawn at random, that a step of training looks at.
        codebook_size, code_dim, phis, residual, commitment, decay, dead_below, normalize: of the quantiser, as for
            `mm.multiscale.MultiScaleQuantizer`.
        pretrained: a directory that `save` wrote, or the name of a tokenizer shipped with the package. Its configuration
            replaces every other argument.

    Raises:
        ValueError: sizes that do not fit each other, or a saved tokenizer that is missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.triplane_msvq", "a multi-scale tokenizer of shapes"
    inner = ("decoder_width", "decoder_depth", "features", "hidden", "cells")

    def __init__(
        self,
        size: int = 32,
        scales: Sequence[int] = (1, 2, 4, 8),
        views: Sequence[int] = (0, 0),
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        decoder_width: int = 0,
        decoder_depth: int = 0,
        features: int = 32,
        hidden: int = 48,
        cells: int = 16,
        codebook_size: int = 1024,
        code_dim: int = 16,
        phis: int = 4,
        residual: float = 0.5,
        commitment: float = 0.25,
        decay: float = 0.99,
        dead_below: float = 0.1,
        normalize: bool = False,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = dict(
            size=size,
            scales=saved.as_list(scales),
            views=saved.as_list(views),
            width=width,
            depth=depth,
            heads=heads,
            decoder_width=decoder_width or width,
            decoder_depth=decoder_depth or depth,
            features=features,
            hidden=hidden,
            cells=cells,
            codebook_size=codebook_size,
            code_dim=code_dim,
            phis=phis,
            residual=saved.as_float(residual),
            commitment=saved.as_float(commitment),
            decay=saved.as_float(decay),
            dead_below=saved.as_float(dead_below),
            normalize=normalize,
        )
        self._made(pretrained, config)

    def _build(self, c: dict[str, Any]) -> None:
        self._check(c)
        self.config, self.size, self.looks = c, c["size"], (c["views"][0], c["views"][1])
        self.quantizer = MultiScaleQuantizer(c["scales"], planes=3, **{name: c[name] for name in QUANTIZER})
        side, latent, heads = c["scales"][-1], c["code_dim"], c["heads"]
        networks: dict[str, Any] = dict(width=c["width"], depth=c["depth"], heads=heads)
        self.encoder: GridPlanes | ViewPlanes
        if self.looks[0]:
            self.encoder = ViewPlanes(self.looks, side, latent, **networks)
        else:
            self.encoder = GridPlanes(self.size, side, latent, **networks)
        self.decoder = PlaneDecoder(
            self.size,
            side,
            latent,
            features=c["features"],
            width=c["decoder_width"],
            depth=c["decoder_depth"],
            heads=heads,
            hidden=c["hidden"],
        )

    @staticmethod
    def _check(c: dict[str, Any]) -> None:
        saved.whole_number("size", c["size"], *SIDES)
        saved.whole_numbers("scales", c["scales"])
        saved.whole_numbers("views", c["views"])
        for name in ("width", "decoder_width", "features", "hidden"):
            saved.whole_number(name, c[name], 1, 1024)
        for name in ("depth", "decoder_depth", "heads"):
            saved.whole_number(name, c[name], 1, 32)
        saved.whole_number("cells", c["cells"], 1, c["size"])
        for name in ("codebook_size", "code_dim", "phis"):
            saved.whole_number(name, c[name])
        for name in ("residual", "commitment", "decay", "dead_below"):
            saved.number(name, c[name], 0)
        if c["scales"][-1] < 1 or c["size"] % c["scales"][-1]:
            raise ValueError(f"the last scale must divide size, {c['size']}, got {c['scales'][-1]}")
        if c["width"] % c["heads"] or c["decoder_width"] % c["heads"]:
            raise ValueError(f"heads must divide the widths {c['width']} and {c['decoder_width']}, got {c['heads']}")
        views = c["views"]
        seen = len(views) == 2 and 1 <= views[0] <= MAX_VIEWS and 8 <= views[1] <= MAX_PIXELS and views[1] % 8 == 0
        if views != [0, 0] and not seen:
            raise ValueError(
                f"views are up to {MAX_VIEWS} pictures of a side that is a multiple of 8 up to {MAX_PIXELS}, or [0, 0]; "
                f"got {views}"
            )

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="discrete",
            vocab_size=self.quantizer.codebook_size,
            max_grid=self.quantizer.grids[-1],
            scales=self.quantizer.grids,
            scale_dim=self.quantizer.dim,
            spatial=False,
            voxels=self.size,
            fingerprint=self.fingerprint,
        )

    def scale_inputs(self, ids: Int[Tensor, " n"], *, own: bool = False) -> Float[Tensor, "m D"]:
        return self.quantizer.scale_inputs(ids[None].to(self._like().device), own=own)[0]

    def encoded(self, ids: Int[Tensor, " n"]) -> Encoded:
        return Encoded(grid=self.quantizer.grids[-1], scales=self.quantizer.grids, ids=ids)

    def repaired(self, item: Encoded) -> tuple[Int[Tensor, " n"], str]:
        return self.quantizer.repaired(item)

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def inputs(self, shapes: Sequence[Shape]) -> Float[Tensor, "B ..."]:
        if not self.looks[0]:
            return super().inputs(shapes)
        return torch.stack([pictures_of(shape, *self.looks) for shape in shapes]).to(self._like().dtype)

    def ids_of(self, x: Float[Tensor, "B ..."]) -> Int[Tensor, "B n"]:
        return self.quantizer(self.encoder(x)).ids

    def planes_of(self, ids: Int[Tensor, "B n"]) -> Planes:
        """Of ids of whole scales."""
        return self.decoder(self.quantizer.lookup(ids).to(self._like().dtype))

    @torch.no_grad()
    def solidity_at(self, ids: Int[Tensor, "B n"], points: Float[Tensor, "B Q 3"]) -> Float[Tensor, "B Q"]:
        """At any points of the unit cube, of ids of whole scales (`mm.shape_tokenizer`), a part of them at a time."""
        planes = self.planes_of(ids.to(self._like().device))
        step = max(1, CHUNK // (len(ids) * self.config["features"]))
        parts = points.to(planes.coarse.device).split(step, dim=1)
        return torch.cat([self.decoder.at_points(planes, part) for part in parts], dim=1)

    def solidity_of(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B N N N"]:
        return self._whole(self.planes_of(ids))

    def field_of(self, ids: Int[Tensor, "B n"]) -> Field:
        return partial(self.decoder.at_points, self.planes_of(ids))

    def _whole(self, planes: Planes) -> Float[Tensor, "B N N N"]:
        """All cells, a few layers along x at a time."""
        every = torch.arange(self.size, device=planes.coarse.device)
        step = max(1, CHUNK // (len(planes.coarse) * self.size**2 * self.config["features"]))
        return torch.cat([self.decoder.at_cells(planes, (part, every, every)) for part in every.split(step)], dim=1)

    def _through(self, x: Float[Tensor, "B ..."]) -> tuple[Planes, Quantized]:
        found = self.quantizer(self.encoder(x))
        return self.decoder(found.latents.to(self._like().dtype)), found

    def reconstruct(self, batch: Float[Tensor, "B ..."]) -> Reconstruction:
        """Of cubes, or of pictures (`mm.shape_tokenizer.pictures_of`); the output is cubes."""
        planes, found = self._through(batch)
        return Reconstruction(self._whole(planes), found.ids, found.loss)

    def learn(self, x: Float[Tensor, "B ..."], target: Float[Tensor, "B N N N"]) -> Lesson:
        """As `reconstruct`, looking only at cells of a few layers along each axis, drawn at random."""
        planes, found = self._through(x)
        kept = [torch.randperm(self.size, device=target.device)[: self.config["cells"]].sort().values for _ in range(3)]
        output = self.decoder.at_cells(planes, (kept[0], kept[1], kept[2]))
        truth = target[:, kept[0]][:, :, kept[1]][:, :, :, kept[2]]
        return Lesson(
            output.flatten(1), truth.flatten(1), found.ids, found.loss, partial(self.decoder.at_points, planes)
        )

    def last_layer(self) -> Tensor:
        return self.decoder.last.weight

    @torch.no_grad()
    def warm_start(self, batch: Float[Tensor, "B ..."]) -> None:
        """Of cubes: begin as the best linear code of columns over single places of each plane; what comes back is the mean of the
        three. Of pictures: begin as what differs among them. Codes begin as k-means over all scales and planes."""
        if isinstance(self.encoder, GridPlanes):
            begin_principal(self.encoder, self.decoder, batch)
        else:
            self.encoder.begin_principal(batch)
        self.quantizer.warm_start(self.encoder(batch))
        self.weights_changed()

    def synchronise(self, enabled: bool) -> None:
        self.quantizer.synchronise(enabled)

    @classmethod
    def tiny(cls) -> TriplaneMSVQ:
        """A small random tokenizer, for tests."""
        tokenizer = cls(
            size=16, scales=[1, 2, 4], width=16, depth=1, heads=2, features=8, hidden=8, codebook_size=16, code_dim=4
        )
        tokenizer.warm_start(torch.stack([tokenizer.inputs([shape])[0] for shape in cls.examples()]))
        torch.nn.init.constant_(tokenizer.decoder.last.bias, 0.3)  # so that whatever it decodes has an inside
        return tokenizer.eval()

    @classmethod
    def examples(cls) -> list[Shape]:
        """Boxes of several sizes."""
        grids = torch.zeros(3, 16, 16, 16, dtype=torch.bool)
        grids[0, 2:14, 6:10, 4:12] = grids[1, 6:9, 1:15, 6:9] = grids[2, 3:13, 3:13, 3:13] = True
        return [Shape(grid.numpy()) for grid in grids]
