"""Pictures as what a vision model of timm sees in them: a vector a patch, for prompts. Nothing makes a picture of them again.

The encoder stays as it is: with published weights, with those of a file, or with random ones, which keep what is in each
patch and need neither network nor training. Its features end with a layer norm, so that their spread is about 1.

Letters in shapes: B batch, S side in pixels, N patches, F width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mm import pictures, safe_io, saved
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec
from mm.saved import FromSettings
from mm.vit import vision_transformer

LIMITS: dict[str, tuple[int, int]] = {
    "size": (1, 1024), "patch": (0, 64), "width": (0, 4096), "depth": (0, 64), "heads": (0, 64),
}  # fmt: skip
"""Least and largest value of each size; whoever wrote them, no network is built beyond."""
MAX_SIDE = 256
"""Most patches along a side."""
UNUSED = ("head.", "attn_pool.")
"""What published weights of an encoder hold beyond the features."""
PUBLISHED = "timm"


class ImageFeatures(FromSettings, ModalityTokenizer):
    """A picture of `size`×`size` as (size / patch)² feature vectors of a vision transformer.

    Args:
        encoder: name of a vision transformer of timm.
        size: side of the square that pictures are fitted to, in pixels.
        patch, width, depth, heads: pixels of a patch along a side, width, blocks and attention heads, where they are not the
            named model's; 0 = as that model has them.
        weights: "" for random ones (by `seed`), "timm" for those that timm publishes, which are downloaded (then the four above
            stay 0), or a safetensors file with weights of exactly that encoder (a classifier's head is passed over). They are
            saved with the tokenizer, and not needed again.
        seed: of random weights.
        pretrained: a directory that `save` wrote. Its configuration replaces every other argument.

    Raises:
        ValueError: sizes that do not fit each other, an encoder that timm can't make, weights that don't fit or can't be had, or
            a saved tokenizer that is missing, damaged or foreign.
    """

    form, what = "mm.tokenizers.image_features", "a reader of pictures"
    decodes = False

    def __init__(
        self,
        encoder: str = "vit_tiny_patch16_224",
        size: int = 64,
        patch: int = 8,
        width: int = 96,
        depth: int = 1,
        heads: int = 3,
        weights: str = "",
        seed: int = 0,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = dict(encoder=encoder, size=size, patch=patch, width=width, depth=depth, heads=heads)
        if pretrained is not None and weights:
            raise ValueError("got both pretrained and weights: a saved reader holds its weights; give one of them")
        if weights == PUBLISHED and any((patch, width, depth, heads)):
            raise ValueError("published weights are of the model as it is; set patch, width, depth and heads to 0")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._made(pretrained, config)
        if weights:
            found = _published(encoder, size) if weights == PUBLISHED else _of_file(weights)
            found = {name: tensor for name, tensor in found.items() if not name.startswith(UNUSED)}
            self.encoder.load_state_dict(safe_io.fit_tensors(repr(weights), found, self.encoder.state_dict()))
        self.eval().requires_grad_(False)

    def _build(self, c: dict[str, Any]) -> None:
        for name, (low, high) in LIMITS.items():
            saved.whole_number(name, c[name], low, high)
        if c["patch"] and (c["size"] % c["patch"] or c["size"] // c["patch"] > MAX_SIDE):
            raise ValueError(
                f"size must be a multiple of patch, of at most {MAX_SIDE} patches, got {c['size']} and {c['patch']}"
            )
        self.config = c
        sizes = [c[name] for name in ("patch", "width", "depth", "heads")]
        self.encoder, tokens, self.width = vision_transformer(c["encoder"], c["size"], *sizes)
        self.others = int(getattr(self.encoder, "num_prefix_tokens", 0))
        self.side = round((tokens - self.others) ** 0.5)
        if self.side**2 != tokens - self.others:
            raise ValueError(f"{c['encoder']!r} gives {tokens} features, which are no square; give another encoder")
        # what the encoder's weights take pictures to be scaled to
        for name in ("mean", "std"):
            values = torch.tensor(self.encoder.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(f"pixel_{name}", values, persistent=False)

    @classmethod
    def tiny(cls) -> ImageFeatures:
        """A small one, for tests."""
        return cls(size=16, patch=8, width=16, depth=1, heads=2)

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="continuous",
            dim=self.width,
            max_grid=(self.side, self.side),
            spatial=False,
            fingerprint=self.fingerprint,
        )

    def encode(self, raw: Image.Image) -> Encoded:
        """Features of a picture, which is fitted to the square over white."""
        return self.encode_batch([raw])[0]

    def encode_batch(self, raws: Sequence[Image.Image]) -> list[Encoded]:
        if not raws:
            return []
        size = self.config["size"]
        pixels = torch.stack([pictures.to_unit(pictures.to_bytes(pictures.fit_square(raw, size))) for raw in raws])
        return [Encoded(grid=(self.side, self.side), latents=rows) for rows in self.features(pixels).float().cpu()]

    @torch.no_grad()
    def features(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N F"]:
        """Of pictures in [−1, 1]."""
        mean, std = self.get_buffer("pixel_mean"), self.get_buffer("pixel_std")
        scaled = ((x.to(mean) + 1) / 2 - mean) / std
        features: Tensor = self.encoder.forward_features(scaled)
        return features[:, self.others :]

    def decode(self, encoded: Encoded) -> Decoded:
        """No picture: the vectors are made to be read."""
        blank = Image.new("RGB", (self.config["size"],) * 2)
        return Decoded(value=blank, valid=False, reason="this tokenizer reads pictures and can't make any")


def _of_file(path: str) -> dict[str, Tensor]:
    return safe_io.read_tensors(path, max_bytes=saved.MAX_WEIGHT_BYTES)


def _published(encoder: str, size: int) -> dict[str, Tensor]:
    import timm

    try:
        model: Any = timm.create_model(encoder, pretrained=True, num_classes=0, global_pool="", img_size=size)
    except Exception as error:  # the network and its client raise anything
        raise ValueError(
            f"the published weights of {encoder!r} can't be had ({str(error).splitlines()[0]:.120}); give a file with them"
        ) from error
    return dict(model.state_dict())
