"""What the adapters of published audio codecs share: loading a checkpoint folder, sounds ↔ codes, decoding that never fails.
A tokenizer file adds only what its network does differently.

Sounds go through a network one by one: Mimi's codes of a padded batch are not those of each sound alone (transformers issue
43377), and codes that depend on what else was in the batch would make caches of tokens differ from run to run.

Letters in shapes: n samples, T frames, K codebooks in use.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm import safe_io, saved
from mm.audio import Audio, given_samples
from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec
from mm.vq_adapter import CONFIG, SETTINGS, WEIGHTS, load_config

MAX_FRAMES = 256
"""Largest extent of a grid that the vocabulary's size controls can state."""
MAX_HOP, MAX_CODEBOOKS = 8192, 64
"""Samples of a frame and codebooks of a network, beyond all that are published (1,920 and 32)."""
RATES = (1000, 768_000)
HEADER = 1 << 20
"""Bytes that a weights file may have beside its numbers."""
LEGACY = ((".weight_g", ".parametrizations.weight.original0"), (".weight_v", ".parametrizations.weight.original1"))
"""Names of weight norm in checkpoints from before torch 2.0, and since."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a network's configuration says about its codes."""

    sample_rate: int
    hop: int
    """Samples of a frame."""
    codebooks: int
    vocab_size: int
    channels: int = 1
    least: int = 1
    """Fewest codebooks that it can do with."""


class AudioCodecAdapter(ModalityTokenizer, nn.Module):
    """Sounds ↔ a few codebook indices a frame by a frozen network of `transformers`, which stays in evaluation mode.

    Args:
        pretrained: folder of a checkpoint (`config.json` and `model.safetensors`), or the network itself.
        num_codes: how many of its codebooks are used, the coarsest first; 0 = what was saved, else `default_codes`.

    Raises:
        ValueError: files missing, damaged, pickled or of another configuration; a network that was never trained (a codebook
            of zeros), is not mono, or can't pass on one frame; a `num_codes` that it doesn't have.
    """

    network: Any
    waveform = True
    """Trained to give the waveform back, so that distances between waveforms (SI-SDR) say something."""
    model_type: ClassVar[str]
    """What `config.json` calls such a network."""
    fields: ClassVar[Mapping[str, int]]
    """The settings that say what its codes mean, and the largest number of each (0: what every checkpoint is held to)."""
    default_codes: ClassVar[int] = 0
    """Codebooks used where nobody says how many; 0 = all."""

    def __init__(self, pretrained: str | Path | nn.Module, num_codes: int = 0) -> None:
        super().__init__()
        if isinstance(pretrained, nn.Module):
            held = getattr(pretrained, "config", None)
            if getattr(held, "model_type", None) != self.model_type:
                raise ValueError(
                    f"expected a {self.model_type} network of transformers or the folder of one, got "
                    f"{type(pretrained).__name__}: give one of them"
                )
            network: Any = pretrained
            what = f"the {self.model_type} network"
        elif isinstance(pretrained, str | Path):
            network, what = self._load(str(pretrained)), repr(str(pretrained))
            num_codes = num_codes or _settings(str(pretrained))
        else:
            raise ValueError(
                f"expected a folder (str or Path) or a network, got {type(pretrained).__name__}: give one of them"
            )
        self.facts = self._checked(what, network.config)
        most = self.facts.codebooks
        num_codes = num_codes or min(self.default_codes or most, most)
        saved.whole_number("num_codes of this network", num_codes, self.facts.least, most)
        self.num_codes = num_codes
        self.network = network.requires_grad_(False).eval()
        self._fingerprint: tuple[Any, str] | None = None
        self._probe(what)

    # --- what a tokenizer file implements -----------------------------------------------------------------------------

    @staticmethod
    @abc.abstractmethod
    def _build(config: dict[str, Any]) -> nn.Module:
        """The network of a configuration, with random weights."""

    @staticmethod
    @abc.abstractmethod
    def _facts(config: Any) -> Facts:
        """Of the network's configuration. Raises `ValueError` for one that has no codes of one frame each."""

    @abc.abstractmethod
    def codes(self, x: Float[Tensor, "1 1 n"]) -> Int[Tensor, "k T"]:
        """Indices of the first codebooks, K or more, of n ≥ 1 samples."""

    @abc.abstractmethod
    def sound(self, codes: Int[Tensor, "K T"]) -> Float[Tensor, " n"]:
        """Samples of T ≥ 1 frames of indices within the codebooks."""

    @abc.abstractmethod
    def codebooks(self) -> list[Tensor]:
        """The vectors of every codebook, coarsest first."""

    @staticmethod
    def published(name: str) -> str:
        """What checkpoints call a weight that the network calls `name`."""
        return name

    # --- the plug-in contract -----------------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        return Spec(
            kind="codes",
            vocab_size=self.facts.vocab_size,
            num_codes=self.num_codes,
            max_grid=(MAX_FRAMES,),
            sample_rate=self.facts.sample_rate,
            frame_rate=self.facts.sample_rate / self.facts.hop,
            fingerprint=self.fingerprint,
        )

    @torch.no_grad()
    def encode(self, raw: Audio) -> Encoded:
        """Codes of a sound of any rate and of one sample or more, at most 256 frames; the last frame may reach beyond its
        end."""
        x = self._samples(raw)
        frames = math.ceil(len(x) / self.facts.hop)
        codes = self.codes(x.to(self._like()).view(1, 1, -1))[: self.num_codes, :frames]
        return Encoded(grid=(frames,), codes=codes.T.contiguous().cpu().long())

    @torch.no_grad()
    def decode(self, encoded: Encoded) -> Decoded:
        """A sound of T × `facts.hop` samples. What is no list of frames is repaired, with `valid` off."""
        codes, reasons = self._repaired(encoded)
        length = len(codes) * self.facts.hop
        samples = torch.zeros(length)
        if length:
            made = self.sound(codes.T.to(self._like().device)).float().cpu()[:length]
            samples[: len(made)] = made  # DAC makes a few samples fewer than it was given
        if not samples.isfinite().all():
            reasons.append("the network made values that are not finite")
            samples = samples.nan_to_num(0.0, 0.0, 0.0)
        value = Audio(samples.numpy(), self.facts.sample_rate)
        return Decoded(value=value, valid=not reasons, reason="; ".join(reasons))

    def train(self, mode: bool = True) -> AudioCodecAdapter:
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    @property
    def fingerprint(self) -> str:
        """Hash of every weight and setting; kept until a weight changes."""
        state = self.network.state_dict()
        key = tuple((name, t.data_ptr(), t._version, t.dtype) for name, t in state.items())
        if self._fingerprint is None or self._fingerprint[0] != key:
            settings = {**self._config(), "num_codes": self.num_codes}
            self._fingerprint = (key, f"audio_{self.model_type}-{saved.digest(settings, state)}")
        return self._fingerprint[1]

    @classmethod
    def examples(cls) -> list[Audio]:
        """Sounds for the tests: rates above and below the tiny networks' own, a click, silence."""
        time = torch.arange(900) / 16000
        noise = torch.randn(900, generator=torch.Generator().manual_seed(0)) / 4
        tone = torch.sin(2 * math.pi * 440 * time) / 2
        sounds = [(noise, 16000), (tone, 16000), (tone, 6000), (torch.ones(1), 8000), (torch.zeros(300), 8000)]
        return [Audio(samples.numpy(), rate) for samples, rate in sounds]

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """A folder that `from_directory` reads, and `from_pretrained` of the network's class in `transformers`."""
        state = {self.published(name): tensor for name, tensor in self.network.state_dict().items()}
        config = {"architectures": [type(self.network).__name__], "model_type": self.model_type, **self._config()}
        with safe_io.atomic_folder(path, last=CONFIG) as folder:
            safe_io.write_tensors(folder / WEIGHTS, state, {"format": "pt"})
            safe_io.write_json(folder / SETTINGS, {"num_codes": self.num_codes})
            safe_io.write_json(folder / CONFIG, config)

    @classmethod
    def from_directory(cls, path: str | Path) -> AudioCodecAdapter:
        """The tokenizer that `save` wrote, or that of a published checkpoint. Raises `ValueError` as the constructor does."""
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Weight norm, as torch has it, can't be pickled: the network is built again around its weights."""
        state = self.network.state_dict()
        return _rebuilt, (type(self), self._config(), state, self._like().detach(), self.num_codes)

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        """The network's settings, as JSON has them."""
        return {name: saved.as_list(getattr(self.network.config, name, None)) for name in self.fields}

    def _like(self) -> Tensor:
        return next(self.network.parameters())

    def _samples(self, raw: Audio) -> Float[Tensor, " n"]:
        """At the network's rate, at least one and at most 256 frames."""
        rate, most = self.facts.sample_rate, MAX_FRAMES * self.facts.hop
        if isinstance(raw, Audio) and math.ceil(len(raw.samples) * rate / raw.rate) > most:
            raise ValueError(
                f"a sound of {raw.seconds:.2f} s has more than the {MAX_FRAMES} frames ({most / rate:.2f} s) that an item "
                "may have: cut it into parts"
            )
        return torch.tensor(given_samples(raw, rate))[:most]

    def _repaired(self, item: Encoded) -> tuple[Int[Tensor, "T K"], list[str]]:
        """Codes that can be decoded, and what had to be repaired."""
        count = len(item)
        reasons = []
        if item.codes is None:
            codes = torch.zeros(count, self.num_codes, dtype=torch.long)
            reasons.append("these are not codes")
        else:
            codes = item.codes.detach().cpu().long()
        if codes.shape[1] != self.num_codes:
            reasons.append(f"{codes.shape[1]} codes a frame, expected {self.num_codes}")
            codes = torch.cat([codes, codes.new_zeros(count, self.num_codes)], 1)[:, : self.num_codes]
        most = self.facts.vocab_size - 1
        if outside := int(((codes < 0) | (codes > most)).sum()):
            reasons.append(f"{outside} codes outside 0..{most}")
            codes = codes.clamp(0, most)
        if len(item.grid) != 1 or not 1 <= count <= MAX_FRAMES:
            reasons.append(f"a grid of {tuple(item.grid)}, expected 1 to {MAX_FRAMES} frames on one axis")
        return codes[:MAX_FRAMES], reasons

    def _probe(self, what: str) -> None:
        """Raises `ValueError` for a network that fails only when it is used; afterwards it doesn't."""
        for number, vectors in enumerate(self.codebooks()[: self.num_codes]):
            if not vectors.any():
                raise ValueError(
                    f"codebook {number} of {what} is all zeros, so that every sound has the same code: it was never trained "
                    "(transformers makes such); use a published checkpoint"
                )
        if not all(bool(t.isfinite().all()) for t in self.network.state_dict().values()):
            raise ValueError(f"{what} holds weights that are not finite; download the checkpoint again")
        with torch.no_grad():
            for frames in (1, 3):
                try:
                    found = self.codes(torch.zeros(1, 1, frames * self.facts.hop).to(self._like()))
                    made = self.sound(found[: self.num_codes, :frames])
                except Exception as error:  # the libraries check little of what a configuration says
                    raise ValueError(f"{what} can't encode and decode {frames} frames: {_line(error)}") from error
                if not made.isfinite().all():
                    raise ValueError(f"{what} decodes silence to values that are not finite: is its {CONFIG} damaged?")
                shape, expected = tuple(found[: self.num_codes, :frames].shape), (self.num_codes, frames)
                if shape != expected or made.ndim != 1 or abs(len(made) - frames * self.facts.hop) >= self.facts.hop:
                    raise ValueError(
                        f"{what} makes codes {shape} and {tuple(made.shape)} samples of {frames} frames, expected {expected} "
                        f"and {frames * self.facts.hop}: its {CONFIG} is that of another network"
                    )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @classmethod
    def _load(cls, folder: str) -> nn.Module:
        """The network of a folder. What its configuration asks for is held to the size of the weights file."""
        config = cls._settled(folder)
        file = safe_io.inside(folder, WEIGHTS)
        if not file.is_file():
            for other in sorted(Path(folder).iterdir()):
                safe_io.refuse_pickle(other)
            raise ValueError(f"no {WEIGHTS} in {folder!r}; download the whole checkpoint")
        held = file.stat().st_size
        with saved.budget(held + saved.SLACK, f" ({str(file)!r}, {held:,} bytes): is it the right checkpoint?"):
            network = _attempt(f"{CONFIG} of {folder!r}", lambda: _quietly(cls._build, config))
        state = network.state_dict()
        # at most 8 bytes a number
        found = safe_io.read_tensors(file, max_bytes=HEADER + 8 * sum(t.numel() for t in state.values()))
        names = {cls.published(name): name for name in state}
        tensors = {}
        for name, tensor in found.items():
            for old, new in LEGACY:
                name = name.replace(old, new) if name.endswith(old) else name
            tensors[names.get(name, name)] = tensor
        network.load_state_dict(safe_io.fit_tensors(f"{str(file)!r}", tensors, state))
        return network

    @classmethod
    def _settled(cls, folder: str) -> dict[str, Any]:
        """The settings that the network is built from: no others are passed on, and none without bounds."""
        config = load_config(folder)
        if config.get("model_type") != cls.model_type:
            raise ValueError(
                f"{CONFIG} of {folder!r} describes a network of type {str(config.get('model_type'))[:40]!r}, expected "
                f"{cls.model_type!r}: use its own tokenizer"
            )
        # transformers writes what it keeps as `_frame_rate` under that name
        found = {name: config.get(name, config.get(f"_{name}")) for name in cls.fields}
        settled = {name: value for name, value in found.items() if value is not None}
        for name, most in cls.fields.items():
            value = settled.get(name)
            if most and isinstance(value, int) and not 0 <= value <= most:
                raise ValueError(f"{name} in {CONFIG} of {folder!r} is {value}, which no such network has")
        return settled

    @classmethod
    def _checked(cls, what: str, config: Any) -> Facts:
        facts: Facts = _attempt(f"the configuration of {what}", lambda: cls._facts(config))
        for name, value, most in (
            ("frame of samples", facts.hop, MAX_HOP),
            ("number of codebooks", facts.codebooks, MAX_CODEBOOKS),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{what} has a {name} of {value}, expected 1 to {most:,}: is its {CONFIG} damaged?")
        if facts.channels != 1:
            raise ValueError(f"{what} has {facts.channels} channels, but sounds are mono here: use a mono checkpoint")
        saved.whole_number(f"sampling_rate of {what}", facts.sample_rate, *RATES)
        return facts


def _settings(folder: str) -> int:
    """`num_codes` that `save` wrote beside a network; 0 for a published checkpoint."""
    path = safe_io.inside(folder, SETTINGS)
    if not path.exists():
        return 0
    value: Any = safe_io.read_json(path).get("num_codes")
    saved.whole_number(f"num_codes in {str(path)!r}", value, 1, MAX_CODEBOOKS)
    return value


def _quietly(build: Callable[[dict[str, Any]], nn.Module], config: dict[str, Any]) -> nn.Module:
    """The random numbers of weights that are then replaced are nobody else's."""
    with torch.random.fork_rng(devices=[]):
        return build(config)


def _attempt(what: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:  # the libraries check little of what a configuration says
        raise ValueError(f"{what} does not describe this network: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _rebuilt(cls: Any, config: dict[str, Any], state: dict[str, Tensor], like: Tensor, num_codes: int) -> Any:
    network = _quietly(cls._build, config).to(like)
    network.load_state_dict(state)
    return cls(network, num_codes)
