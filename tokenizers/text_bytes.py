"""Text as its UTF-8 bytes: 256 ids, no vocabulary file, nothing unknown (ByT5, Xue et al. 2022)."""

from __future__ import annotations

import torch

from mm.interfaces import Decoded, Encoded, ModalityTokenizer, Spec


class TextBytes(ModalityTokenizer):
    """One id a byte. Lossless; of ids that are not valid UTF-8, each broken sequence becomes U+FFFD."""

    @classmethod
    def tiny(cls) -> TextBytes:
        """An instance for tests."""
        return cls()

    @property
    def spec(self) -> Spec:
        return Spec(kind="discrete", vocab_size=256, fingerprint="utf-8")

    def encode(self, raw: str) -> Encoded:
        if not isinstance(raw, str):
            raise ValueError(f"got {type(raw).__name__}, expected text (str); decode bytes with .decode('utf-8') first")
        try:
            data = raw.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds half a surrogate pair at index {error.start}, which is not a character; "
                "it was read with the wrong encoding, read it as UTF-8"
            ) from error
        # bytearray: torch wants memory that it may write to.
        ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long() if data else torch.empty(0, dtype=torch.long)
        return Encoded(grid=(len(data),), ids=ids)

    def decode(self, encoded: Encoded) -> Decoded:
        assert encoded.ids is not None
        ids = encoded.ids.flatten().tolist()
        data = bytes(i for i in ids if 0 <= i < 256)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            return Decoded(
                value=data.decode("utf-8", "replace"), valid=False, reason=f"byte {error.start} is not valid UTF-8"
            )
        if len(data) < len(ids):
            return Decoded(value=text, valid=False, reason=f"{len(ids) - len(data)} ids are not bytes")
        return Decoded(value=text)
