"""Pictures as the bytes of JPEG files, read with a byte BPE (JPEG-LM, Han et al. 2024, arXiv 2408.08459): quality 25, colours at
half the resolution, a restart marker after every block of 16×16 pixels, and the tables, the same for all files, left out.

`mm fit -c configs/tokenizers/jpeg_bytes.yaml` learns the merges. Tables and the versions of Pillow and libjpeg are saved with
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from PIL import Image

from mm import jpeg, jpeg_huffman, pictures, saved
from mm.interfaces import Decoded, Encoded, Spec
from mm.jpeg_codes import Bits
from mm.jpeg_files import JpegFiles
from mm.jpeg_machine import JpegMachine, State
from mm.jpeg_markers import MarkerMachine
from mm.jpeg_tables import MARKERS, Tables


class JpegBytes(JpegFiles):
    """The bytes of a JPEG file of one size, and an id that ends them.

    Args:
        size: height and width that pictures are fitted to, in pixels.
        quality: of the file, 1 to 95.
        subsampling: 4:2:0, 4:2:2 or 4:4:4.
        restart: blocks (MCUs) between restart markers; 0: none. A damage, or a model's mistake, ends at the next marker.
        huffman: the tables of the files. `standard`: the usual ones, as in JPEG-LM; `aligned`: others, in which code and value
            always fill whole bytes (`mm.jpeg_huffman`); every decoder shows the same pixels.
        strip_header: leave out the header, which is the same for all files of one size.
        vocab: ids of the BPE, the 256 bytes among them.
        grammar: what the automaton holds a model to: `strict`, a file that is right to the last bit; `markers`, no marker where
            none may stand; `none`.
        pretrained: a directory that `save` wrote. What it says replaces every other argument.

    Raises:
        ValueError: settings out of range, or a saved tokenizer that is missing, damaged or foreign.
    """

    form: ClassVar[str] = "mm.tokenizers.jpeg_bytes"
    what: ClassVar[str] = "a tokenizer of JPEG files"
    apart: ClassVar[Sequence[bytes]] = MARKERS

    def __init__(
        self,
        size: Sequence[int] = (32, 32),
        quality: int = 25,
        subsampling: str = "4:2:0",
        restart: int = 1,
        huffman: Literal["standard", "aligned"] = "standard",
        strip_header: bool = False,
        vocab: int = 320,
        grammar: Literal["strict", "markers", "none"] = "strict",
        pretrained: str | None = None,
    ) -> None:
        config = dict(
            size=saved.as_list(size),
            quality=quality,
            subsampling=subsampling,
            restart=restart,
            huffman=huffman,
            strip_header=strip_header,
            vocab=vocab,
            grammar=grammar,
        )
        self._made(pretrained, config)

    def _build(self, config: dict[str, Any], facts: Mapping[str, str]) -> None:
        saved.whole_numbers("size", config["size"])
        saved.whole_number("restart", config["restart"])
        if config["grammar"] not in ("strict", "markers", "none"):
            raise ValueError(f"grammar must be strict, markers or none, got {config['grammar']!r:.20}")
        if not isinstance(config["strip_header"], bool):
            raise ValueError(f"strip_header must be true or false, got {config['strip_header']!r:.20}")
        if config["huffman"] not in ("standard", "aligned"):
            raise ValueError(f"huffman must be standard or aligned, got {config['huffman']!r:.20}")
        self.reader = self._reader(config, facts)
        self.recoder: jpeg_huffman.Recoder | None = None
        self.frame = self.reader.frame
        self.header = self.frame.header() if config["strip_header"] else b""

    @staticmethod
    def _tables(config: Mapping[str, Any]) -> bytes:
        blob = jpeg.tables(config["quality"], config["subsampling"])
        return jpeg_huffman.aligned(blob) if config["huffman"] == "aligned" else blob

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recoder": None}  # made again when it is used

    # ---- the plug-in contract ----------------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        return self.spec_of(pixels=self.frame.size)

    def file(self, raw: Image.Image) -> bytes:
        """The abbreviated file; without its header, if that is left out."""
        self._check_tables("pictures")
        image = pictures.fit(raw, *self.frame.size)
        data = jpeg.encode(image, self.frame, self.config["quality"])
        if self.config["huffman"] != "standard":
            if self.recoder is None:
                usual = jpeg.tables(self.config["quality"], self.config["subsampling"])
                self.recoder = jpeg_huffman.Recoder(self.frame, Tables.read(usual), Tables.read(self.reader.blob))
            data = self.recoder(data)
        return data[len(self.header) :]

    def decode(self, encoded: Encoded) -> Decoded:
        """An RGB picture; what can't be read of it is grey, and `reason` begins with the state of the file (`jpeg.Status`)."""
        data, odd = self.bytes_of(encoded)
        read = self.reader.read(self.header + data)
        return self.judged(read.picture, read.status, odd, read.reason)

    def prefix(self, raw: Image.Image, share: float) -> Encoded:
        if not 0 <= share <= 1:
            raise ValueError(f"the share of a picture that is kept is a number from 0 to 1, got {share}")
        data = self.file(raw)
        (rows, columns), height = self.frame.grid, self.frame.mcu[0]
        kept = rows if share == 1 else int(share * self.frame.size[0]) // height
        end = self._end_of(self.header + data, (rows - kept) * columns) - len(self.header)
        ids: list[int] = []
        for token in self.bpe.encode(data):
            end -= len(self.bpe.table[token])
            if end < 0:
                break
            ids.append(token)
        return Encoded(grid=(len(ids),), ids=torch.tensor(ids, dtype=torch.long))

    def _end_of(self, data: bytes, left: int) -> int:
        """How many bytes of a file hold nothing of its last `left` MCUs: with restart markers, up to the last one before them."""
        machine, state, end = self.reader.machine, self.reader.machine.start, 0
        for count, byte in enumerate(data, 1):
            following = machine.step(state, byte)
            assert following is not None, "what was just written can be read"
            state = following
            if self._is_before(state, left):
                end = count
        return end

    @staticmethod
    def _is_before(state: State, left: int) -> bool:
        inner = state.inner
        if state.mode == "header":
            return True
        if isinstance(inner, Bits):
            return inner.left > left or inner == Bits(left)
        return inner >= left

    def machine(self) -> Any:
        match self.config["grammar"]:
            case "strict":
                return JpegMachine(self.frame, Tables.read(self.reader.blob)) if self.header else self.reader.machine
            case "markers":
                return MarkerMachine(self.frame, b"" if self.header else self.frame.header())
        return None

    @classmethod
    def tiny(cls) -> JpegBytes:
        """A small one, for tests."""
        tokenizer = cls(size=(16, 24), vocab=300)
        noise = torch.rand(24, 3, 16, 24, generator=torch.Generator().manual_seed(0))
        tokenizer.fit(tokenizer.file(pictures.to_image((x * 255).byte())) for x in noise)
        return tokenizer

    @classmethod
    def examples(cls) -> list[Image.Image]:
        """Pictures of several sizes."""
        ramp = torch.arange(3 * 40 * 20).reshape(3, 40, 20) % 256
        pair = [pictures.to_image(x.byte()) for x in (ramp, ramp.flip(1))]
        return [*pair, Image.new("RGB", (1, 1), "red"), Image.new("L", (70, 9), 40)]
