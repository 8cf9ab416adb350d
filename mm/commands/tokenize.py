"""`mm tokenize`: what a tokenizer makes of a file, what that costs, and what is lost."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mm.commands.common import parser, table, writable

if TYPE_CHECKING:
    from PIL import Image

    from mm.audio import Audio
    from mm.interfaces import Encoded, ModalityTokenizer, Spec

TEXT = (".txt", ".md", ".csv", ".json", ".yaml", ".py")
Kind = Literal["text", "picture", "sound", "video", "shape"]
PLURAL: dict[str, str] = {kind: f"{kind}s" for kind in ("text", "picture", "sound", "video", "shape")}
UNKNOWN = (math.inf, -math.inf)
"""Figures that JSON can't say, with NaN."""
MAX_TEXT = 1 << 24
COMPARED = 2_000
"""Characters of a text that came back changed that are compared."""


def main(argv: list[str]) -> int:
    """Returns the exit status; raises `ValueError` for a file or a tokenizer that can't be used."""
    command = parser("tokenize", "Encode and decode a file; report the rate and what is lost.")
    command.add_argument(
        "file", help="a picture, sound, video, shape or text; the ending says which, or else how it begins"
    )
    command.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME",
        help="a checkpoint (its tokenizer for such a file), a tokenizer's folder, NAME or NAME:FOLDER with a NAME of "
        "`mm list tokenizers`",
    )
    command.add_argument("--out", metavar="PATH", help="write what was decoded")
    command.add_argument(
        "--transcript",
        metavar="TEXT",
        help="what is said in the sound, in digits' names or the made corpus's words: reports how many of them a "
        "recogniser gets wrong",
    )
    command.add_argument("--json", action="store_true", help="the figures as JSON")
    args = command.parse_args(argv)
    kinds = kinds_of_file(args.file)
    words = [] if args.transcript is None else check_transcript(args.transcript, *kinds)
    if words:
        kinds = ("sound",)
    if args.out and len(kinds) == 1:  # before a tokenizer is loaded
        place(args.out, kinds[0])
    tokenizer = find(args.tokenizer, *kinds)
    made_for = kind_of(tokenizer.spec)
    if made_for and made_for not in kinds and os.path.isfile(args.file):  # `read` says what is missing
        raise ValueError(
            f"{args.tokenizer!r} is a tokenizer of {PLURAL[made_for]}, and {args.file!r} is a {kinds[0]}; "
            f"give one of {PLURAL[kinds[0]]}"
        )
    kind = made_for if made_for in kinds else kinds[0]
    out = place(args.out, kind) if args.out else None
    if not tokenizer.decodes and (out or args.transcript is not None):
        raise ValueError(f"{args.tokenizer!r} makes prompts and can't decode them; leave out --out and --transcript")
    raw = read(args.file, kind, tokenizer)
    measured: dict[str, Any]
    value: Any
    if isinstance(raw, Iterator):
        from mm.commands.long_sounds import tokenize_pieces

        if args.transcript is not None:
            raise ValueError(
                "--transcript is of sounds of up to ten minutes; leave it out, or cut the sound into parts"
            )
        measured, value = tokenize_pieces(raw, tokenizer, keep=bool(out))
    elif kind == "video":
        from mm.commands.tokenize_videos import tokenize_clip

        measured, value = tokenize_clip(raw, tokenizer, keep=bool(out))
    elif kind == "shape":
        from mm.commands.tokenize_shapes import tokenize_shape

        measured, value = tokenize_shape(raw, tokenizer)
    else:
        measured, value = tokenize(raw, tokenizer, kind)
    figures = {"tokenizer": type(tokenizer).__name__, "file_bits": file_bits(args.file), **measured}
    if kind == "sound":
        figures["frame_rate"] = round(tokenizer.spec.frame_rate, 4)
    if args.transcript is not None:
        figures |= heard(raw, value, words)
    if out:
        write(out, value)
        figures["wrote"] = str(out)
    figures = {name: None if value in UNKNOWN or value != value else value for name, value in figures.items()}
    if args.json:
        print(json.dumps(figures, allow_nan=False))
    else:
        print(table([(name.replace("_", " "), str(value)) for name, value in figures.items()]))
    return 0


def tokenize(raw: Any, tokenizer: ModalityTokenizer, kind: Kind) -> tuple[dict[str, Any], Any]:
    """Figures, and what was decoded."""
    start = time.perf_counter()
    encoded = tokenizer.encode(raw)
    middle = time.perf_counter()
    decoded = tokenizer.decode(encoded)
    end = time.perf_counter()
    size = bits(tokenizer.spec, encoded)
    figures = {
        "tokens": len(encoded),
        "grid": list(encoded.grid),
        "bits": size,
        **(lost(raw, decoded.value, kind, waveform(tokenizer)) if tokenizer.decodes else {}),
        "encode_ms": round(1000 * (middle - start), 2),
        "decode_ms": round(1000 * (end - middle), 2),
        **rate(size, raw, decoded.value, kind),
    }
    return figures, decoded.value


def waveform(tokenizer: ModalityTokenizer) -> bool:
    """Whether it was trained to give the waveform back, phases and all."""
    return bool(getattr(tokenizer, "waveform", False))


def file_bits(file: str) -> int | None:
    """None for a folder."""
    return 8 * Path(file).stat().st_size if os.path.isfile(file) else None


def kinds_of_file(file: str) -> tuple[Kind, ...]:
    """What it may be taken for, the likeliest first, by its ending, or else by its first bytes: a film has a sound too, and a
    picture is a video of one frame. Raises `ValueError` for a missing file whose name doesn't tell."""
    from mm import audio_files, media, shape_files, video, video_files
    from mm.audio import READ

    ending = Path(file).suffix.lower()
    if ending in TEXT:
        return ("text",)
    if ending[1:] in video.EXTENSIONS:
        return ("video", "sound")
    if ending[1:] in READ:
        return ("sound",)
    if ending[1:] in shape_files.EXTENSIONS or ending == ".npz":
        return ("shape",)
    if ending[1:] in media.EXTENSIONS:
        return ("picture", "video")
    if os.path.isdir(file):  # of pictures, one a frame
        return ("video",)
    if not os.path.isfile(file):
        raise ValueError(f"{file!r:.400} is missing; give the path of a picture, a sound, a video or a text")
    with open(file, "rb") as opened:
        start = opened.read(512)
    if video_files.file_kind(start[:16]) in video_files.FFMPEG:
        return ("sound", "video") if start[8:11] == b"M4A" else ("video", "sound")
    if audio_files.file_kind(start[:16]):
        return ("sound",)
    readable = start.decode("utf-8", "ignore")
    cut = len(start) - len(readable.encode())  # of a character that the 512 bytes end in
    text = start and cut < 4 and not any(ord(letter) < 9 for letter in readable)
    return ("text",) if text else ("picture", "video")


def find(name: str, *kinds: Kind) -> ModalityTokenizer:
    """The tokenizer that a name means; of several in a checkpoint that of the first kind which has one. Raises `ValueError`
    with what would be understood."""
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
        fitting = [t for kind in kinds for t in tokenizers.values() if kind_of(t.spec) == kind]
        if not fitting:
            raise ValueError(f"{name!r} has no tokenizer for {'text' if kinds[0] == 'text' else PLURAL[kinds[0]]}")
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


def kind_of(spec: Spec) -> Kind | None:
    """What a tokenizer is for, by its spec; None for none of them."""
    if spec.sample_rate:
        return "sound"
    if spec.fps:
        return "video"
    if spec.voxels:
        return "shape"
    if spec.is_free:
        return "picture" if spec.pixels else None
    return {0: "text", 2: "picture"}.get(len(spec.max_grid))  # type: ignore[return-value]


def read(file: str, kind: Kind, tokenizer: ModalityTokenizer) -> Any:
    """The file as its tokenizer wants it; a long sound as pieces of it."""
    if kind == "video":
        from mm.commands.tokenize_videos import read_clip

        return read_clip(file, tokenizer)
    if kind == "shape":
        from mm.commands.tokenize_shapes import read_shape

        return read_shape(file, tokenizer)
    if kind == "picture":
        from mm.media import load_image

        return load_image(file)
    if kind == "sound":
        from mm.commands.long_sounds import sound_or_pieces

        return sound_or_pieces(file)
    from mm import safe_io

    try:
        return safe_io.read_bytes(file, max_bytes=MAX_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file!r} is not UTF-8 text (byte {error.start})") from error


def place(path: str, kind: Kind) -> Path:
    """The file that `--out` means. Raises `ValueError` for an ending that doesn't fit, or a folder that can't be made."""
    from mm.pipelines.outputs import PICTURES, SOUNDS, numbered, video_endings
    from mm.shape_files import EXTENSIONS

    name, endings = {
        "text": ("text", TEXT),
        "picture": ("image", PICTURES),
        "sound": ("speech", SOUNDS),
        "video": ("video", video_endings()),
        "shape": ("shape", tuple(f".{ending}" for ending in sorted(EXTENSIONS))),
    }[kind]
    return writable(numbered(path, 1, name, endings)[0])


def write(path: Path, value: Any) -> None:
    from mm import safe_io
    from mm.audio import Audio, save_audio
    from mm.pipelines.outputs import save_picture
    from mm.shape_files import save_mesh
    from mm.shapes import Shape
    from mm.video import Video, save_video

    if isinstance(value, str):
        safe_io.write_text(path, value)
    elif isinstance(value, Audio):
        save_audio(path, value)
    elif isinstance(value, Video):
        save_video(path, value)
    elif isinstance(value, Shape):
        save_mesh(path, value.mesh)
    else:
        save_picture(value, path)


def bits(spec: Spec, encoded: Encoded) -> float:
    """Bits of the tokens as they stand, without entropy coding; a continuous element counts 32 a number."""
    if encoded.latents is not None:
        return 32.0 * encoded.latents.numel()
    return round(encoded.content.numel() * math.log2(spec.vocab_size), 1)


def rate(bits: float, raw: Any, decoded: Any, kind: Kind) -> dict[str, Any]:
    """Bits of the tokens per unit of what they stand for."""
    if kind == "text":
        return {"bits_per_character": round(bits / max(1, len(raw)), 4)}
    if kind == "picture":
        return {"bits_per_pixel": round(bits / (decoded.width * decoded.height), 4)}
    return {"bits_per_second": round(bits / raw.seconds, 1)}


def lost(raw: Any, decoded: Any, kind: Kind, waveform: bool) -> dict[str, Any]:
    """How what came back differs from what went in, by the measures of its kind."""
    if kind == "sound":
        return lost_sound(raw, decoded, waveform)
    return lost_text(raw, decoded) if kind == "text" else lost_picture(raw, decoded)


def lost_sound(raw: Audio, decoded: Audio, waveform: bool) -> dict[str, Any]:
    """Distance of log-mel spectra and, with pystoi, intelligibility, both at 16 kHz (`mm.evaluate.speech`). The ratio of
    signal to distortion only for tokenizers that were trained to give the waveform back: where phases are made up it is
    below -15 dB even if every magnitude is right."""
    from importlib.util import find_spec

    from mm.evaluate.speech import mel_distance, si_sdr, stoi

    figures: dict[str, Any] = {
        "sample_rate": raw.rate,
        "decoded_sample_rate": decoded.rate,
        "seconds": round(raw.seconds, 4),
        "decoded_seconds": round(decoded.seconds, 4),
        "log_mel_l1": round(mel_distance(raw, decoded), 4),
    }
    if find_spec("pystoi"):
        intelligible = stoi(raw, decoded)
        figures["stoi"] = None if intelligible is None else round(intelligible, 4)
    if waveform:
        ratio = si_sdr(raw, decoded)
        figures["si_sdr_db"] = None if ratio is None else round(ratio, 2)
    return figures


def check_transcript(transcript: str, *kinds: Kind) -> list[str]:
    """Its words. Raises `ValueError` before the work: not a sound, no words, words that no grammar has, or no recogniser."""
    if "sound" not in kinds:
        raise ValueError("--transcript is of what is said in a sound; leave it out for other files")
    words = re.findall(r"[^\W_]+", transcript.lower())
    if not words:
        raise ValueError("--transcript is empty; give the words that are said")
    from mm.data import speech_grammar
    from mm.data.sources import DIGIT_NAMES
    from mm.data.speech_corpus import require_pocketsphinx

    commands = speech_grammar.words("commands")
    if not set(words) <= set(DIGIT_NAMES) and (unknown := [word for word in words if word not in commands]):
        raise ValueError(
            f"the recogniser can't hear {unknown[0]!r}; it knows either digits ({', '.join(DIGIT_NAMES)}) or commands of the "
            f"words {', '.join(commands)}"
        )
    require_pocketsphinx()
    return words


def heard(raw: Audio, decoded: Audio, words: list[str]) -> dict[str, Any]:
    """What a recogniser hears before and after, and the share of the transcript's words that it gets wrong. It listens
    for digits if there are only digits in the transcript, else for the made corpus's commands."""
    from mm.data.sources import DIGIT_NAMES
    from mm.evaluate.speech import recognise, word_error

    grammar = "digits" if set(words) <= set(DIGIT_NAMES) else "commands"
    before, after = recognise([raw, decoded], grammar=grammar)
    return {
        "heard_before": before,
        "heard": after,
        "word_error_before": round(word_error([" ".join(words)], [before]).rate, 4),
        "word_error": round(word_error([" ".join(words)], [after]).rate, 4),
    }


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
    from mm.edits import edit_distance

    if raw == decoded:
        return {"lossless": True, "characters_kept": 1.0, "characters_compared": len(raw)}
    start, came_back = raw[:COMPARED], decoded[:COMPARED]
    longer = max(1, len(start), len(came_back))
    kept = 1 - edit_distance(start, came_back) / longer
    return {"lossless": False, "characters_kept": round(kept, 4), "characters_compared": len(start)}
