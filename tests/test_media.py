"""`load_image`: every kind of picture becomes 8-bit RGB; what can't is refused with one sentence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from mm.media import MAX_PIXELS, MAX_SIDE, load_image

pytestmark = [  # what Pillow says about damaged files on its way to an error
    pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    picture = gradient()
    loaded = load_image(encoded(picture, kind))
    assert loaded.mode == "RGB" and loaded.tobytes() == picture.tobytes() and loaded.info == {}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "AVIF"])
def test_lossy_formats_come_close(kind: str) -> None:
    loaded = load_image(encoded(gradient(), kind))
    assert loaded.mode == "RGB" and loaded.size == (24, 16)
    assert np.abs(np.asarray(loaded).astype(int) - np.asarray(gradient())).mean() < 16


def test_every_kind_of_input_gives_the_same_picture(tmp_path: Path) -> None:
    data, path = encoded(gradient(), "PNG"), tmp_path / "x.png"
    path.write_bytes(data)
    expected = gradient().tobytes()
    for source in (data, path, str(path), io.BytesIO(data), Image.open(path), gradient()):
        assert load_image(source).tobytes() == expected


def test_arrays() -> None:
    """Whole numbers of 8 bits, numbers from 0 to 1, truth values; grey, colours, and transparency over white."""
    wanted = gradient()
    pixels = np.asarray(wanted)
    for given in (pixels, pixels[::-1][::-1], pixels / 255, (pixels / 255).astype(np.float32)):
        assert load_image(given).tobytes() == wanted.tobytes()
    grey = pixels[..., 0]
    for given in (grey, grey[..., None], grey / 255):
        assert np.array_equal(np.asarray(load_image(given)), grey[..., None].repeat(3, 2))
    assert np.array_equal(np.asarray(load_image(grey > 100))[..., 0], (grey > 100) * 255)
    assert (np.asarray(load_image(np.dstack((pixels, np.zeros_like(grey))))) == 255).all()


def test_a_pil_picture_is_copied() -> None:
    picture = gradient()
    load_image(picture).putpixel((0, 0), (9, 9, 9))
    assert picture.getpixel((0, 0)) == (0, 0, 0)


def test_one_pixel() -> None:
    assert load_image(encoded(Image.new("RGB", (1, 1), "red"), "PNG")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (9000, 9000), (1, MAX_PIXELS + 1)])
def test_a_huge_picture_is_refused_before_decoding(width: int, height: int) -> None:
    # The file holds 64 bytes of pixels: had it been decoded, the message would be about damage.
    with pytest.raises(ValueError, match="at most 67,108,864 are decoded"):
        load_image(png_header(width, height))


@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1)])
def test_a_side_that_can_not_be_scaled_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="sides of at most 65,535 pixels are decoded"):
        load_image(encoded(Image.new("L", size), "PNG"))
    assert load_image(Image.new("L", (MAX_SIDE, 1))).size == (MAX_SIDE, 1)


def test_the_limit_can_be_set() -> None:
    with pytest.raises(ValueError, match=r"is 24×16 = 384 pixels, but at most 383 are decoded"):
        load_image(encoded(gradient(), "PNG"), max_pixels=383)
    with pytest.raises(ValueError, match="at most 383"):
        load_image(gradient(), max_pixels=383)
    assert load_image(gradient(), max_pixels=384).size == (24, 16)


def test_cmyk() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("TIFF", "JPEG"):
        red, green, blue = load_image(encoded(cmyk, kind)).getpixel((4, 4))
        assert red > 240 and green < 15 and blue < 15


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        loaded = np.asarray(load_image(encoded(Image.fromarray(values), kind)))
        assert loaded[0, :, 0].tolist() == [0, 0, 1, 128, 255]
        assert (loaded == loaded[..., :1]).all()


def test_values_of_unknown_range_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point values, whose range is unknown"):
        load_image(Image.fromarray(np.zeros((2, 2), np.float32)))
    with pytest.raises(ValueError, match=r"values beyond 0\.\.65535"):
        load_image(Image.fromarray(np.full((2, 2), 70_000, np.int32)))


def test_alpha_is_composited_over_white() -> None:
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert load_image(encoded(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    clear = Image.new("LA", (1, 1), (0, 0))
    assert load_image(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_a_transparent_colour() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    loaded = load_image(encoded(picture, "PNG", transparency=0))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    loaded = load_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert loaded.getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """For every orientation the stored pixels are moved the inverse way; the loader must undo it."""
    upright = gradient()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        assert load_image(encoded(stored, kind, exif=exif)).tobytes() == upright.tobytes()


def test_damaged_exif_is_ignored() -> None:
    data = encoded(gradient(), "PNG", exif=b"Exif\0\0" + b"\xff" * 32)
    assert load_image(data).tobytes() == gradient().tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_picture_is_refused_wherever_it_is_cut(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    data = encoded(noise, kind)
    for cut in (1, 10, 30, len(data) // 4, len(data) // 2):
        with pytest.raises(ValueError, match="truncated or damaged|not a picture") as caught:
            load_image(data[:cut])
        assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_random_damage_never_escapes_as_another_error() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        clean = encoded(gradient(), kind)
        for _ in range(40):
            data = bytearray(clean)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            try:
                assert load_image(bytes(data), max_pixels=1 << 20).mode == "RGB"
            except ValueError as error:
                assert str(error).startswith("the picture")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is an empty file"),
        (b"just some text", "damaged or not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "damaged or not a picture"),
        (7, "got a int for a picture"),
        (np.zeros(4, np.uint8), r"has the shape \[H, W\], .*, got \[4\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"got \[2, 4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"got \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), "4×0, so it has no pixels"),
        (np.zeros((4, 4, 3), np.int64), "holds uint8, bool, or floating-point numbers from 0 to 1, got int64"),
        (np.full((4, 4, 3), 1.01), "floating-point numbers beyond 0 to 1; scale them"),
        (np.full((4, 4, 3), np.nan), "floating-point numbers beyond 0 to 1; scale them"),
        (np.zeros((2, 70_000), np.uint8), "sides of at most 65,535"),
        (io.StringIO("text"), "open it in binary mode"),
    ],
)
def test_what_is_no_picture(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(data)  # type: ignore[arg-type]


def test_paths_and_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.png' is missing"):
        load_image(tmp_path / "no.png")
    with pytest.raises(ValueError, match="not a file"):
        load_image(tmp_path)
    (tmp_path / "x.png").write_bytes(encoded(gradient(), "PNG"))
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        load_image(tmp_path / "x.png", max_bytes=10)


def test_pillow_is_left_as_it_is() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    with pytest.raises(ValueError):
        load_image(png_header(20_000, 20_000))
    load_image(gradient())
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before
