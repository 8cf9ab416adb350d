"""What tokenizers share whose files are JPEG: the tables that are left out of them, and kept with the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm import jpeg
from mm.byte_files import FileTokenizer
from mm.jpeg_tables import Frame


class JpegFiles(FileTokenizer):
    """Files of one size, sampling and restart interval. A subclass sets `reader` to what `_reader` makes."""

    reader: jpeg.Reader
    _same_tables: bool | None = None

    def _facts(self, config: Mapping[str, Any]) -> dict[str, str]:
        from PIL import features

        blob = self._tables(config)
        versions = {name: str(features.version(name)) for name in ("pil", "libjpeg_turbo")}
        return {"tables": blob.hex(), **versions}

    @staticmethod
    def _tables(config: Mapping[str, Any]) -> bytes:
        """Those that files written now have."""
        return jpeg.tables(config["quality"], config["subsampling"])

    def _reader(self, config: Mapping[str, Any], facts: Mapping[str, str]) -> jpeg.Reader:
        """Raises `ValueError` for a size, sampling, interval or tables that are none."""
        height, width = config["size"] if len(config["size"]) == 2 else (0, 0)
        frame = Frame(size=(height, width), subsampling=config["subsampling"], restart=config["restart"])
        return jpeg.Reader(frame, self.bytes_of_fact(facts, "tables", "tables"))

    def _check_tables(self, what: str) -> None:
        """Raises `ValueError` where files written now would need other tables than the saved ones."""
        if self._same_tables is None:
            self._same_tables = self.reader.blob == self._tables(self.config)
        if not self._same_tables:
            raise ValueError(
                f"this version of Pillow writes other tables than that of the saved tokenizer; install Pillow "
                f"{self.facts.get('pil')} to encode {what}"
            )
