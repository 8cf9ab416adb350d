"""What the adapters of published picture tokenizers share: loading a checkpoint folder, pictures ↔ codebook indices,
decoding that never fails. A tokenizer file adds only what its network does differently.

Letters in shapes: B batch, H and W rows and columns of pixels, h and w of the token grid.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from mm import pictures, safe_io
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)

SETTINGS = "mm_tokenizer.json"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_AXIS = 256
"""Largest extent of a grid that the vocabulary's size controls can state."""
BATCH = 16
"""Pictures that go through a network at once; bounds memory, not results."""


class VQAdapter(ModalityTokenizer, nn.Module):
    """Pictures ↔ one codebook index a cell by a frozen network, which stays in evaluation mode.

    Args:
        source: folder of a checkpoint (see `load_network`), or the network itself. Its `state_dict` is what is saved
            and fingerprinted.
        size: side of the square that pictures are fitted to, in pixels; 0 = what was saved, else the network's own.
        build: configuration → network with random weights.
        optional: children of the network that a checkpoint may lack.
        mean, std: a channel in [0, 1] enters the network as (channel − mean) / std. What was saved comes first.

    Raises:
        ValueError: as `load_network`; or a size that the network's downsampling does not divide, or that makes more
            than 256 tokens a side.
    """

    network: Any

    def __init__(
        self,
        source: str | nn.Module,
        size: int,
        *,
        build: Callable[[dict[str, Any]], nn.Module],
        optional: Sequence[str] = (),
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        network: Any = load_network(source, build, optional=optional) if isinstance(source, str) else source
        settings = load_settings(source) if isinstance(source, str) else {}
        own_size, self.downsample, self.codebook_size = self._sizes(network.config)
        self.size = size or settings.get("size", own_size)
        if self.size < 1 or self.size % self.downsample or self.size // self.downsample > MAX_AXIS:
            raise ValueError(
                f"size must be a multiple of {self.downsample} up to {self.downsample * MAX_AXIS} for this network, "
                f"got {self.size}"
            )
        self.mean = tuple(map(float, settings.get("mean", mean)))
        self.std = tuple(map(float, settings.get("std", std)))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need three values a piece, std above 0, got {self.mean} and {self.std}")
        self.network = network.requires_grad_(False).eval()
        self._fingerprint: tuple[Any, str] | None = None

    # --- what a tokenizer file implements -----------------------------------------------------------------------------

    @staticmethod
    @abc.abstractmethod
    def _sizes(config: Any) -> tuple[int, int, int]:
        """Of the network's configuration: default side of a picture, pixels per token along a side, number of ids."""

    @abc.abstractmethod
    def codes(self, x: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Indices of normalised pictures whose sides `downsample` divides."""

    @abc.abstractmethod
    def pixels(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Normalised pictures of indices within the codebook, any h and w."""

    # --- the plug-in contract -----------------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        side = self.size // self.downsample
        return Spec(kind="discrete", vocab_size=self.codebook_size, max_grid=(side, side), fingerprint=self.fingerprint)

    def encode(self, raw: Image.Image | Tensor) -> Encoded:
        """Tokens of a picture (fitted to the square of `size`, padded with white), or of a float tensor (3, H, W) in
        [−1, 1] whose sides `downsample` divides and that is no larger than that square."""
        return self.encode_batch([raw])[0]

    @torch.no_grad()
    def encode_batch(self, raws: Sequence[Image.Image | Tensor]) -> list[Encoded]:
        tensors = [self._normalised(raw) for raw in raws]

        def run(where: list[int]) -> list[Encoded]:
            batch = _stack([tensors[i] for i in where], smallest=self.downsample**2 * 3)
            ids = self.codes(batch)[: len(where)].cpu().long()
            grid = (int(ids.shape[1]), int(ids.shape[2]))
            return [Encoded(grid=grid, ids=one.flatten()) for one in ids]

        return _grouped([tuple(t.shape) for t in tensors], run)

    def decode(self, encoded: Encoded) -> Decoded:
        """An RGB picture of the grid's size × `downsample`. What is no grid of ids is repaired, with `valid` off."""
        return self.decode_batch([encoded])[0]

    @torch.no_grad()
    def decode_batch(self, items: Sequence[Encoded]) -> list[Decoded]:
        grids = [self._repaired(item) for item in items]

        def run(where: list[int]) -> list[Decoded]:
            batch = _stack([grids[i][0] for i in where], smallest=1).to(self._like().device)
            x = self.pixels(batch)[: len(where)].float().cpu()
            mean, std = self._statistics(x)
            pixels = pictures.from_unit((x * std + mean) * 2 - 1)
            return [
                Decoded(value=pictures.to_image(one), valid=not grids[i][1], reason=grids[i][1])
                for i, one in zip(where, pixels, strict=True)
            ]

        return _grouped([tuple(grid.shape) for grid, _ in grids], run)

    def train(self, mode: bool = True) -> VQAdapter:
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    @property
    def fingerprint(self) -> str:
        """Hash of every weight and of the normalisation; kept until a weight changes."""
        state = self.network.state_dict()
        key = tuple((name, t.data_ptr(), t._version, t.dtype) for name, t in state.items())
        if self._fingerprint is None or self._fingerprint[0] != key:
            digest = hashlib.sha256(json.dumps([type(self).__name__, self.mean, self.std]).encode())
            for name, tensor in sorted(state.items()):
                # as it is read again, in float32, whatever type it was converted to
                values = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
                digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
                digest.update(values.reshape(-1).view(torch.uint8).numpy())
            self._fingerprint = (key, digest.hexdigest()[:16])
        return self._fingerprint[1]

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """A folder that `from_directory` reads: the network's configuration, its weights, and the settings here."""
        settings = {"size": self.size, "mean": self.mean, "std": self.std}
        with safe_io.atomic_folder(path, last=CONFIG) as folder:
            safe_io.write_tensors(folder / WEIGHTS, self.network.state_dict())
            safe_io.write_json(folder / SETTINGS, settings)
            safe_io.write_json(folder / CONFIG, json.loads(self._config_json()))

    @classmethod
    def from_directory(cls, path: str | Path) -> VQAdapter:
        """The tokenizer that `save` wrote. Raises `ValueError` as the constructor does."""
        return cls(str(path))  # type: ignore[call-arg]  # every subclass takes its folder first, and has defaults

    def _config_json(self) -> str:
        """The network's own configuration."""
        return self.network.config.to_json_string()

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _like(self) -> Tensor:
        return next(self.network.parameters())

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_tensor(self.mean).view(3, 1, 1), x.new_tensor(self.std).view(3, 1, 1)

    def _normalised(self, raw: Image.Image | Tensor) -> Float[Tensor, "3 H W"]:
        if isinstance(raw, Tensor):
            sides = raw.shape[1:]
            if raw.ndim != 3 or raw.shape[0] != 3 or not raw.is_floating_point():
                raise ValueError(
                    f"expected a float tensor (3, H, W) in [-1, 1], got {raw.dtype} {tuple(raw.shape)}: convert it"
                )
            if min(sides) < 1 or max(sides) > self.size or any(side % self.downsample for side in sides):
                raise ValueError(
                    f"expected sides that are multiples of {self.downsample} up to {self.size}, got {tuple(sides)}: "
                    "resize or pad the picture"
                )
            unit = raw.float()
        else:
            unit = pictures.to_unit(pictures.to_bytes(pictures.fit_square(raw, self.size)))
        mean, std = self._statistics(unit)
        return ((unit + 1) / 2 - mean).div(std).to(self._like())

    def _repaired(self, item: Encoded) -> tuple[Int[Tensor, "h w"], str]:
        """Ids on a grid that can be decoded, and what had to be repaired."""
        side = self.size // self.downsample
        if item.ids is None:
            return torch.zeros(side, side, dtype=torch.long), "these are not ids"
        ids = item.ids.detach().cpu().long().flatten()
        reasons = []
        outside = (ids < 0) | (ids >= self.codebook_size)
        if outside.any():
            reasons.append(f"{int(outside.sum())} ids outside 0..{self.codebook_size - 1}")
            ids = ids.clamp(0, self.codebook_size - 1)
        grid = tuple(item.grid)
        if len(grid) != 2 or not all(1 <= extent <= side for extent in grid):
            reasons.append(f"{len(ids)} ids on a grid of {grid}, expected rows and columns within {side}×{side}")
            grid = (side, side)
            ids = torch.cat([ids, ids.new_zeros(side * side)])[: side * side]
        return ids.view(grid), "; ".join(reasons)


def _stack(items: list[Tensor], smallest: int) -> Tensor:
    """A batch; a single item of the smallest size goes in twice, because torch refuses to normalise a group that is one
    value, and a narrow network has such groups when its grid is 1×1."""
    return torch.stack(items * 2 if len(items) == 1 and items[0].numel() == smallest else items)


def _grouped(keys: Sequence[Any], run: Callable[[list[int]], list[T]]) -> list[T]:
    """`run` on the indices of equal keys, in batches; the results in the order of the keys."""
    results: dict[int, T] = {}
    for key in dict.fromkeys(keys):
        where = [i for i, other in enumerate(keys) if other == key]
        for start in range(0, len(where), BATCH):
            batch = where[start : start + BATCH]
            results.update(zip(batch, run(batch), strict=True))
    return [results[i] for i in range(len(keys))]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def load_settings(folder: str) -> dict[str, Any]:
    """`size`, `mean`, `std` that `VQAdapter.save` wrote beside a network; empty for a published checkpoint."""
    path = safe_io.inside(folder, SETTINGS)
    if not path.exists():
        return {}
    settings = safe_io.read_json(path)
    three = [settings.get("mean"), settings.get("std")]
    sound = all(isinstance(v, list) and all(isinstance(x, int | float) for x in v) for v in three)
    if not isinstance(settings.get("size"), int) or not sound:
        raise ValueError(f"{str(path)!r} has a wrong size, mean or std; save the tokenizer again")
    return {key: settings[key] for key in ("size", "mean", "std")}


def load_config(folder: str) -> dict[str, Any]:
    """The network's configuration: `config.json`, or its `vq_config` where the folder holds a whole model.

    Raises:
        ValueError: no such folder or file, or values beyond what any such network has (building it would not end).
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"no folder {folder!r}; download a checkpoint first (hf download OWNER/NAME --local-dir FOLDER) and name it"
        )
    config = safe_io.read_json(safe_io.inside(folder, CONFIG))
    config = config.get("vq_config", config)
    if not isinstance(config, dict):
        raise ValueError(f"vq_config in {folder!r} is not an object; is {CONFIG} damaged?")
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        depth = 64 if name in ("num_res_blocks", "layers_per_block", "num_hidden_layers") else 1 << 20
        if len(values) > 64 or any(isinstance(v, int) and abs(v) > depth for v in values):
            raise ValueError(f"{name} in {CONFIG} of {folder!r} is {str(value)[:40]}, which no such network has")
    return config


def load_network(
    folder: str,
    build: Callable[[dict[str, Any]], Network],
    *,
    config: Mapping[str, Any] | None = None,
    optional: Sequence[str] = (),
    prefixes: Sequence[str] = ("", "model.vqmodel.", "vqmodel."),
) -> Network:
    """A network with the weights of a folder (safetensors, one file or shards). Nothing is built at full size before
    the shapes of the weights are known to fit.

    Args:
        folder: a checkpoint of the network alone, or of a model that contains it.
        build: configuration → network.
        config: instead of the folder's `config.json`.
        optional: children of the network that are taken off where the folder has no weights for them.
        prefixes: where the network may stand among the names of the weights.

    Raises:
        ValueError: files missing, damaged, pickles, or of another configuration.
    """
    config = load_config(folder) if config is None else dict(config)
    try:
        with torch.device("meta"):
            network = build(config)
    except Exception as error:  # the libraries check little of what a configuration says
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{CONFIG} of {folder!r} does not describe this network: {reason}") from error
    tensors = _read_all(folder, [name for name, _ in network.named_children()], prefixes)
    for child in optional:
        if not any(name.startswith(f"{child}.") for name in tensors):
            setattr(network, child, None)
    network.load_state_dict(safe_io.fit_tensors(f"{folder!r}", tensors, network.state_dict()), assign=True)
    assert not any(t.is_meta for t in [*network.parameters(), *network.buffers()])
    return network


def _read_all(folder: str, children: Sequence[str], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Every tensor that belongs to one of the children, by its name in the network."""
    files = _weight_files(folder)
    for prefix in sorted(prefixes, key=len, reverse=True):
        tensors: dict[str, Tensor] = {}
        for file in files:
            found = safe_io.read_tensors(file, prefix=prefix)
            tensors.update({name: t for name, t in found.items() if name.split(".")[0] in children})
        if tensors:
            return tensors
    raise ValueError(f"the weights in {folder!r} hold none of {', '.join(children)}; is it the right checkpoint?")


def _weight_files(folder: str) -> list[Path]:
    root = Path(folder)
    for index in sorted(root.glob("*.safetensors.index.json")):
        shards = safe_io.read_json(safe_io.inside(folder, index.name)).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{str(index)!r} has no weight_map; download the checkpoint again")
        return [safe_io.inside(folder, name) for name in sorted(set(shards.values()))]
    files = sorted(root.glob("*.safetensors"))
    if files:
        return [safe_io.inside(folder, file.name) for file in files]
    for file in sorted(root.iterdir()):
        safe_io.refuse_pickle(file)
    raise ValueError(f"no .safetensors file in {folder!r}; download the whole checkpoint")
