"""`mm tokenize`: what a tokenizer makes of a file, what that costs, and what is lost."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.commands.common import parser, table, writable

if TYPE_CHECKING:
    from PIL import Image

    from mm.interfaces import Encoded, ModalityTokenizer, Spec

TEXT = (".txt", ".md", ".csv", ".json", ".yaml", ".py")
MAX_TEXT = 1 << 24
COMPARED = 2_000
"""Characters of a text that came back changed that are compared."""


def main(argv: list[str]) -> int:
    """Returns the exit status; raises `ValueError` for a file or a tokenizer that can't be used."""
    command = parser("tokenize", "Encode and decode a file; report the rate and what is lost.")
    command.add_argument("file", help="a picture or a text")
    command.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME",
        help="a checkpoint (its tokenizer for such a file), a tokenizer's folder, NAME or NAME:FOLDER with a NAME of "
        "`mm list tokenizers`",
    )
    command.add_argument("--out", metavar="PATH", help="write what was decoded")
    command.add_argument("--json", action="store_true", help="the figures as JSON")
    args = command.parse_args(argv)
    is_text = Path(args.file).suffix.lower() in TEXT
    out = place(args.out, is_text) if args.out else None
    tokenizer = find(args.tokenizer, is_text)
    raw = read(args.file, is_text)
    start = time.perf_counter()
    encoded = tokenizer.encode(raw)
    middle = time.perf_counter()
    decoded = tokenizer.decode(encoded)
    end = time.perf_counter()
    figures: dict[str, Any] = {
        "tokenizer": type(tokenizer).__name__,
        "tokens": len(encoded),
        "grid": list(encoded.grid),
        "bits": bits(tokenizer.spec, encoded),
        "file_bits": 8 * Path(args.file).stat().st_size,
        **(lost_text(raw, decoded.value) if is_text else lost_picture(raw, decoded.value)),
        "encode_ms": round(1000 * (middle - start), 2),
        "decode_ms": round(1000 * (end - middle), 2),
    }
    measure = ("character", max(1, len(raw))) if is_text else ("pixel", decoded.value.width * decoded.value.height)
    figures[f"bits_per_{measure[0]}"] = round(figures["bits"] / measure[1], 4)
    if out:
        write(out, decoded.value, is_text)
        figures["wrote"] = str(out)
    if args.json:
        print(json.dumps(figures))
    else:
        print(table([(name.replace("_", " "), str(value)) for name, value in figures.items()]))
    return 0


def find(name: str, is_text: bool) -> ModalityTokenizer:
    """The tokenizer that a name means. Raises `ValueError` with what would be understood."""
    from torch import nn

    from mm import hub, plugins, safe_io

    short, colon, folder = name.partition(":")
    if colon and short in plugins.available("tokenizers"):
        cls = plugins.load("tokenizers", short)
        if not hasattr(cls, "from_directory"):
            raise ValueError(f"{short!r} has no files of its own; leave out {':' + folder!r}")
        return cls.from_directory(folder)
    if name in plugins.available("tokenizers"):
        cls = plugins.load("tokenizers", name)
        if issubclass(cls, nn.Module) and not getattr(cls, "ready_made", False):
            raise ValueError(f"{name!r} has to be trained; give its folder as {name}:FOLDER")
        return cls()
    path = Path(name)
    if name in hub.shipped() or (path / hub.CONFIG).is_file() or ("/" in name and not path.exists()):
        where = hub.resolve(name)
        tokenizers = hub.load_tokenizers(where, hub.read_config(where))
        wanted = 0 if is_text else 2
        fitting = [t for t in tokenizers.values() if len(t.spec.max_grid) == wanted]
        if not fitting:
            raise ValueError(f"{name!r} has no tokenizer for {'text' if is_text else 'pictures'}")
        return fitting[0]
    if (path / "tokenizer.json").is_file():
        return plugins.load("tokenizers", "text_hf").from_directory(path)  # type: ignore[attr-defined]
    if (path / "config.json").is_file():
        form = str(safe_io.read_json(path / "config.json").get("format", ""))
        if form.startswith("mm.tokenizers."):
            return plugins.load("tokenizers", form.removeprefix("mm.tokenizers.")).from_directory(path)  # type: ignore
        raise ValueError(f"{name!r} is of a kind that its files don't tell; give it as NAME:{name}")
    known = ", ".join(plugins.available("tokenizers"))
    raise ValueError(f"there is no tokenizer {name!r}; give a checkpoint, a folder, or one of {known}")


def read(file: str, is_text: bool) -> Any:
    """The file as its tokenizer wants it."""
    if not is_text:
        from mm.media import load_image

        return load_image(file)
    from mm import safe_io

    try:
        return safe_io.read_bytes(file, max_bytes=MAX_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file!r} is not UTF-8 text (byte {error.start})") from error


def place(path: str, is_text: bool) -> Path:
    """The file that `--out` means. Raises `ValueError` for an ending that doesn't fit, or a folder that can't be made."""
    from mm.pipelines.outputs import PICTURES, numbered

    file = numbered(path, 1, "text", TEXT)[0] if is_text else numbered(path, 1, "image", PICTURES)[0]
    return writable(file)


def write(path: Path, value: Any, is_text: bool) -> None:
    from mm import safe_io
    from mm.pipelines.outputs import save_picture

    if is_text:
        safe_io.write_text(path, value)
    else:
        save_picture(value, path)


def bits(spec: Spec, encoded: Encoded) -> float:
    """Bits of the tokens as they stand, without entropy coding; a continuous element counts 32 a number."""
    if encoded.latents is not None:
        return 32.0 * encoded.latents.numel()
    return round(encoded.content.numel() * math.log2(spec.vocab_size), 1)


def lost_picture(raw: Image.Image, decoded: Image.Image) -> dict[str, Any]:
    """PSNR in dB (10·log10(255² / mean squared error)) against the picture at the size that came back."""
    import numpy as np

    from mm.pictures import fit_square, to_rgb

    if raw.size == decoded.size:
        reference = to_rgb(raw)
    elif decoded.width == decoded.height:
        reference = fit_square(raw, decoded.width)
    else:
        reference = to_rgb(raw).resize(decoded.size)
    error = np.asarray(reference, dtype=np.float64) - np.asarray(decoded.convert("RGB"), dtype=np.float64)
    mean = float((error**2).mean())
    psnr = round(10 * math.log10(255**2 / mean), 2) if mean else None
    return {"size": list(raw.size), "decoded_size": list(decoded.size), "lossless": mean == 0, "psnr_db": psnr}


def lost_text(raw: str, decoded: str) -> dict[str, Any]:
    """Whether the text came back, and the share of its characters that did, in order: 1 - edits / length, where edits
    are the fewest characters to insert, delete or replace. Of a longer text only the first `COMPARED` are compared."""
    if raw == decoded:
        return {"lossless": True, "characters_kept": 1.0, "characters_compared": len(raw)}
    start, came_back = raw[:COMPARED], decoded[:COMPARED]
    longer = max(1, len(start), len(came_back))
    kept = 1 - edits(start, came_back) / longer
    return {"lossless": False, "characters_kept": round(kept, 4), "characters_compared": len(start)}


def edits(one: str, two: str) -> int:
    """Levenshtein distance, row by row; always len(one)·len(two) steps, whatever the texts are."""
    import numpy as np

    columns = np.arange(len(two) + 1)
    letters = np.array([ord(letter) for letter in two], dtype=np.int64)
    row = columns.copy()
    for number, letter in enumerate(one, 1):
        above = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        # an insertion costs 1 more than the cell to the left: a running minimum of cost - column
        row = np.minimum.accumulate(np.concatenate(([number], above)) - columns) + columns
    return int(row[-1])
