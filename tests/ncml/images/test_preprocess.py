"""Images in all formats that users send, and hostile files."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from ncml import InputError, NotAnImage, TooLarge
from ncml.errors import TooCostly
from ncml.images import grid, open_image, place_known_half, resize_to, to_png
from ncml.images.tiff import read_blocks
from ncml.limits import KEEPS

ROOT = Path(__file__).parents[3]

Pixels = NDArray[np.uint8]


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(h: int, w: int, channels: int = 3) -> Pixels:
    return np.random.default_rng(h * 1000 + w).integers(0, 256, (h, w, channels), dtype=np.uint8)


def smooth(h: int, w: int) -> Pixels:
    y, x = np.mgrid[0:h, 0:w]
    return np.stack([255 * y // h, 255 * x // w, 128 + 0 * x], -1).astype(np.uint8)


def one_bit_png(width: int, height: int) -> bytes:
    """Return a valid PNG of any size with one colour, in a few kilobytes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    return png(width, height, 1, 0, b"".join(packer.compress(row) for _ in range(height)) + packer.flush())


def png(width: int, height: int, depth: int, colour: int, packed: bytes, transparent: bytes = b"") -> bytes:
    """Return a PNG with a bit depth, a colour type, compressed rows and, if given, a chunk tRNS."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    head += chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def tiff(*more: tuple[int, int, int | str], compressed: bytes = b"", order: str = "<", big: bool = False) -> bytes:
    """A TIFF of 16 x 16 grey pixels; `more` are tags, each with a type and a number (or DATA, SIZE: of the pixels)."""
    tags = [(256, 3, 16), (257, 3, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), *more]
    entry, number = ("HHQ", "Q") if big else ("HHI", "I")
    length = (16 if big else 8) + (8 if big else 2) + len(tags) * (20 if big else 12) + (8 if big else 4)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "H", 43 if big else 42)
    head += struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "I", 8)
    head += struct.pack(order + ("Q" if big else "H"), len(tags))
    for tag, kind, value in tags:
        number_value = {"DATA": length, "SIZE": len(compressed)}.get(value, value) if isinstance(value, str) else value
        packed = struct.pack(order + {3: "H", 4: "I", 16: "Q"}[kind], number_value)
        head += struct.pack(order + entry, tag, kind, 1) + packed.ljust(8 if big else 4, b"\0")
    return head + struct.pack(order + number, 0) + compressed


images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)))


@given(images)
def test_png_keeps_every_pixel(image: Pixels) -> None:
    assert np.array_equal(open_image(to_png(image)), image)


@given(images, st.integers(1, 40), st.integers(1, 40))
def test_resizing_gives_the_requested_shape_and_keeps_a_flat_image_flat(image: Pixels, height: int, width: int) -> None:
    resized = resize_to(image, height, width)
    assert resized.shape == (height, width, 3)
    assert resized.dtype == np.uint8
    assert np.all(resize_to(np.full_like(image, image[0, 0]), height, width) == image[0, 0])


@given(images)
def test_resizing_keeps_an_image_of_the_right_size_unchanged(image: Pixels) -> None:
    assert np.array_equal(resize_to(image, *image.shape[:2]), image)


@given(images)
def test_resizing_crops_the_middle(image: Pixels) -> None:
    """Only the pixels within the centred square affect the result."""
    h, w = image.shape[:2]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    crop = image[top : top + side, left : left + side]
    assert np.array_equal(resize_to(image, 8, 8), resize_to(crop, 8, 8))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_are_read_exactly(form: str) -> None:
    image = noise(13, 17)
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(open_image(encode(Image.fromarray(image), form, **options)), image)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_are_read_closely(form: str) -> None:
    image = smooth(32, 48)
    read = open_image(encode(Image.fromarray(image), form))
    assert read.shape == image.shape
    assert np.abs(read.astype(int) - image).mean() < 8


def test_a_path_is_read_like_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(to_png(noise(4, 5)))
    assert np.array_equal(open_image(tmp_path / "a.png"), noise(4, 5))
    with pytest.raises(InputError, match="cannot be read"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(TooLarge):
        open_image(tmp_path / "a.png", max_bytes=10)


def test_grey_becomes_three_equal_channels() -> None:
    grey = noise(6, 7, 1)[..., 0]
    assert np.array_equal(open_image(encode(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, -1))


def test_one_bit_becomes_black_and_white() -> None:
    bits = Image.fromarray(noise(6, 7, 1)[..., 0]).convert("1")
    read = open_image(encode(bits, "PNG"))
    assert set(np.unique(read)) == {0, 255}
    assert np.array_equal(read[..., 0] == 255, np.asarray(bits))


def test_alpha_is_composited_on_white() -> None:
    rgba = np.concatenate([noise(5, 6), np.zeros((5, 6, 1), np.uint8)], -1)
    rgba[0, 0, 3] = 255
    rgba[0, 1] = (0, 100, 200, 128)
    read = open_image(encode(Image.fromarray(rgba), "PNG"))
    assert np.array_equal(read[0, 0], rgba[0, 0, :3])
    assert np.abs(read[0, 1].astype(int) - (127, 177, 227)).max() <= 1
    assert np.all(read[1:] == 255)


def test_palette_and_its_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert open_image(encode(image, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert open_image(encode(image, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_rgb_with_a_transparent_colour() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert open_image(encode(image, "PNG", transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_grey_with_alpha() -> None:
    image = Image.merge("LA", [Image.new("L", (1, 1), 90), Image.new("L", (1, 1), 255)])
    assert open_image(encode(image, "PNG")).tolist() == [[[90, 90, 90]]]


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(form: str) -> None:
    read = open_image(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), form))
    assert np.abs(read.astype(int) - (0, 255, 255)).max() < 6


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_the_high_byte(form: str) -> None:
    samples = np.array([[0, 255, 256, 65535]], np.uint16)
    assert open_image(encode(Image.fromarray(samples), form))[0, :, 1].tolist() == [0, 0, 1, 255]


def test_sixteen_bit_colour_keeps_the_high_byte() -> None:
    row = zlib.compress(b"\0" + struct.pack(">HHH", 0x1234, 0xFFFF, 0x00FF))
    assert open_image(png(1, 1, 16, 2, row)).tolist() == [[[0x12, 0xFF, 0x00]]]


@pytest.mark.parametrize(
    ("depth", "row", "clear", "expected"),
    [
        (1, b"\x40", 0, [255, 255]),
        (2, b"\x60", 1, [255, 170]),
        (4, b"\x5f", 5, [255, 255]),
        (4, b"\x5f", 15, [85, 255]),
        (8, b"\x05\x06", 5, [255, 6]),
        (16, b"\x12\x34\x12\x35", 0x1234, [255, 0x12]),
    ],
)
def test_a_transparent_grey_is_exactly_that_of_the_file(
    depth: int, row: bytes, clear: int, expected: list[int]
) -> None:
    file = png(2, 1, depth, 0, zlib.compress(b"\0" + row), struct.pack(">H", clear))
    assert open_image(file)[0, :, 0].tolist() == expected


def test_a_sixteen_bit_half_may_be_marked_by_its_colour() -> None:
    rows = b"".join(b"\0" + struct.pack(">4H", *[0x8000 if y < 2 else 0x8001] * 4) for y in range(4))
    canvas, place = place_known_half(png(4, 4, 16, 0, zlib.compress(rows), b"\x80\0"), 4, 4, keeps=KEEPS)
    assert place == "bottom"
    assert canvas[..., 0].tolist() == [[0] * 4] * 2 + [[0x80] * 4] * 2


def test_a_transparent_colour_of_sixteen_bits_is_refused_in_a_sentence() -> None:
    row = zlib.compress(b"\0" + struct.pack(">HHH", 1, 2, 3))
    with pytest.raises(NotAnImage, match=r"^photo is a PNG of 16 bits .* with an alpha channel or without transp.*\.$"):
        open_image(png(1, 1, 16, 2, row, struct.pack(">HHH", 1, 2, 3)), field="photo")


def test_float_samples_are_refused_in_a_sentence() -> None:
    tiff = encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(NotAnImage, match=r"^photo is a TIFF file .* save it again as an ordinary PNG or JPEG\.$"):
        open_image(tiff, field="photo")


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_read(form: str) -> None:
    frames = [Image.new("RGB", (9, 5), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert np.all(open_image(data) == (255, 0, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = smooth(16, 24)
    stored: dict[int, Callable[[Pixels], Pixels]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored[orientation](upright)))
    assert np.array_equal(open_image(encode(image, "PNG", exif=exif)), upright)
    jpeg = open_image(encode(image, "JPEG", exif=exif, quality=95))
    assert jpeg.shape == upright.shape
    assert np.abs(jpeg.astype(int) - upright).mean() < 4


def test_only_scans_of_the_image_itself_are_counted() -> None:
    jpeg = encode(Image.fromarray(noise(64, 64)), "JPEG", progressive=True)
    video = np.random.default_rng(0).bytes(2**20) + b"\xff\xda" * 200
    np.testing.assert_array_equal(open_image(jpeg + video), open_image(jpeg))
    thumbnail = b"\xff\xe1" + (2 + 400).to_bytes(2, "big") + b"\xff\xda" * 200
    np.testing.assert_array_equal(open_image(jpeg[:2] + thumbnail + jpeg[2:]), open_image(jpeg))
    last_scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    with pytest.raises(TooCostly, match="more than 128 scans"):
        open_image(jpeg[:-2] + thumbnail + last_scan * 128 + jpeg[-2:])
    with pytest.raises(TooCostly, match="more than 4096 segments"):
        open_image(jpeg[:-2] + b"\xff\xfe\0\2" * 4096 + jpeg[-2:])


@pytest.mark.parametrize("form", ["EPS", "PPM", "ICO", "TGA", "PDF", "PCX", "JPEG2000"])
def test_other_formats_are_disabled(form: str) -> None:
    with pytest.raises(NotAnImage, match="PNG, JPEG, WebP, BMP, TIFF or GIF"):
        open_image(encode(Image.new("RGB", (16, 16)), form))


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0"]
)
def test_a_file_that_is_not_an_image_is_refused_as_such(data: bytes) -> None:
    with pytest.raises(NotAnImage, match=r"^photo .*\.$") as caught:
        open_image(data, field="photo")
    assert caught.value.field == "photo"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_truncated_file_never_crashes(form: str) -> None:
    whole = encode(Image.fromarray(noise(24, 24)), form)
    for size in range(0, len(whole) * 9 // 10, max(1, len(whole) // 60)):
        with pytest.raises(NotAnImage):
            open_image(whole[:size])


@given(st.data())
def test_a_file_with_bytes_changed_is_read_or_refused(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]))
    raw = bytearray(encode(Image.fromarray(noise(8, 8)), form))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(raw), max_pixels=10_000)
    except (NotAnImage, TooLarge):
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3


def test_what_follows_a_png_file_is_ignored() -> None:
    raw = encode(Image.fromarray(noise(8, 8)), "PNG")
    assert np.array_equal(open_image(raw + bytes(400_000)), open_image(raw))


@pytest.mark.parametrize("size", [(16000, 16000), (10000, 10000), (8000, 5000)])
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int], tmp_path: Path) -> None:
    """Decode in a separate process, so that its peak memory is that of this image alone."""
    bomb = one_bit_png(*size)
    assert len(bomb) < 2**20
    (tmp_path / "bomb.png").write_bytes(bomb)
    code = """
import sys
from PIL import Image
import ncml, ncml.images
from tests.memory import peak
Image.init()
before = peak()
try:
    ncml.images.open_image(sys.argv[1])
except ncml.TooLarge as error:
    print(error, peak() - before, sep="|")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "bomb.png")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    sentence, grown = run.stdout.strip().split("|")
    assert "pixels" in sentence
    assert int(grown) < 4 * 2**20


ZEROS = zlib.compress(bytes(256))
STRIP = ((273, 4, "DATA"), (278, 4, 16), (279, 4, "SIZE"))


def tiles(*sides: tuple[int, int, int]) -> tuple[tuple[int, int, int | str], ...]:
    return (*sides, (324, 4, "DATA"), (325, 4, "SIZE"))


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiles_and_strips_are_read(order: str) -> None:
    for tags in (STRIP, tiles((322, 3, 16), (323, 3, 16)), tiles((322, 4, 16), (323, 4, 16))):
        assert open_image(tiff(*tags, compressed=ZEROS, order=order)).shape == (16, 16, 3)
    beyond = tiff((273, 4, "DATA"), (278, 4, 2**31 - 1), (279, 4, "SIZE"), compressed=ZEROS, order=order)
    assert open_image(beyond).shape == (16, 16, 3), "a strip ends with the image"
    if order == "<":
        assert open_image(tiff(*tiles((322, 4, 16), (323, 16, 16)), compressed=ZEROS, big=True)).shape == (16, 16, 3)


@pytest.mark.parametrize(("order", "big"), [("<", False), ("<", True), (">", False)])
@pytest.mark.parametrize(
    "sides",
    [
        [(322, 4, 6000), (323, 4, 6000)],
        [(322, 3, 6000), (323, 3, 6000)],
        [(322, 4, 6000), (323, 4, 6000), (322, 4, 16), (323, 4, 16)],
        [(322, 4, 16), (323, 4, 16), (322, 4, 6000), (323, 4, 6000)],
        [(322, 4, 2**32 - 1), (323, 4, 2**32 - 1)],
    ],
)
def test_a_tile_above_the_pixel_limit_is_refused(order: str, big: bool, sides: list) -> None:
    """The file is refused for the larger one of two equal tags, which some decoder would read."""
    file = tiff(*tiles(*sides), compressed=ZEROS, order=order, big=big)
    with pytest.raises(TooLarge, match=r"^photo is a TIFF file in tiles of \d+ x \d+ pixels; at most .*\.$"):
        open_image(file, field="photo")


def test_a_file_that_decoders_read_differently_is_refused() -> None:
    """Pillow takes big-endian BigTIFF for a classic file, and reads its directory from another offset."""
    with pytest.raises(NotAnImage, match="not an image in a supported format"):
        open_image(tiff(*STRIP, compressed=ZEROS, order=">", big=True))


def test_a_directory_of_many_entries_is_read_without_further_copies() -> None:
    """Of values that are stored outside the directory, only their own bytes are read."""

    class Counted(bytes):
        read = 0

        def __getitem__(self, key: object) -> bytes:  # type: ignore[override]
            part = super().__getitem__(key)  # type: ignore[index]
            Counted.read += len(part)
            return part

    file = Counted(tiff(*STRIP, *[(322, 16, 16)] * 1000, compressed=ZEROS) + bytes(2**20))
    assert read_blocks(file) is not None
    assert Counted.read < 30_000


def test_a_file_of_very_many_strips_is_refused() -> None:
    whole = tiff(*STRIP, compressed=ZEROS)
    many = whole.replace(struct.pack("<HHI", 273, 4, 1), struct.pack("<HHI", 273, 4, 3_000_000))
    with pytest.raises(TooLarge, match=r"^image is a TIFF file in 3000000 strips or tiles; at most 131072 are .*\.$"):
        open_image(many)


@pytest.mark.parametrize("name", ["gif", "gif-frame", "gif-disposal", "webp", "webp-lossless", "png"])
def test_a_hostile_header_is_refused_for_its_pixels(name: str) -> None:
    """The files are refused before they are decoded: that they have nothing to decode goes unnoticed."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x08" + bytes(40)
    file = {
        "gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + frame,
        "gif-frame": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + frame,
        "gif-disposal": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"!\xf9\x04\x08\0\0\0\0" + frame,
        "webp": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff\xff\0" * 2,
        "webp-lossless": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + struct.pack("<I", 0x0FFFFFFF) + bytes(8),
        "png": png(65535, 65535, 8, 2, ZEROS),
    }[name]
    pixels = 16384 * 16384 if name == "webp-lossless" else 65536 * 65536 if name == "webp" else 65535 * 65535
    with pytest.raises(TooLarge, match=rf"^image has {pixels} pixels; at most 33554432 pixels are accepted, so .*\.$"):
        open_image(file)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_a_limit_above_that_of_pillow_applies(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(Image.fromarray(noise(20, 30)), form, **({"compression": "tiff_deflate"} if form == "TIFF" else {}))
    assert open_image(data, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(TooLarge, match=r"^image is 30 x 20 pixels; at most 599 pixels are accepted"):
        open_image(data, max_pixels=599)


def test_a_header_with_a_false_size_is_refused() -> None:
    honest = one_bit_png(1, 1)
    huge = honest.replace(struct.pack(">II", 1, 1), struct.pack(">II", 2**31 - 1, 1))
    with pytest.raises(InputError):
        open_image(huge)


def test_too_many_bytes_are_refused_with_their_number() -> None:
    with pytest.raises(TooLarge, match=r"^image has 50 bytes; at most 49 are accepted\.$"):
        open_image(bytes(50), max_bytes=49)


def test_an_image_of_one_pixel_is_read() -> None:
    image = np.array([[[1, 2, 3]]], np.uint8)
    assert np.all(resize_to(open_image(to_png(image)), 32, 32) == (1, 2, 3))


# Half an image.

SIDES = {
    "top": (slice(0, 16), slice(None)),
    "bottom": (slice(16, 32), slice(None)),
    "left": (slice(None), slice(0, 16)),
    "right": (slice(None), slice(16, 32)),
}


@pytest.mark.parametrize("keep", KEEPS)
def test_three_forms_of_half_an_image_agree(keep: str) -> None:
    whole, side = noise(32, 32), SIDES[keep]
    alpha = np.zeros((32, 32, 1), np.uint8) + 127
    alpha[side] = 128
    expected = np.zeros_like(whole)
    expected[side] = whole[side]
    forms = {
        "whole": to_png(whole),
        "half": to_png(np.ascontiguousarray(whole[side])),
        "alpha": encode(Image.fromarray(np.concatenate([whole, alpha], -1)), "PNG"),
    }
    for name, data in forms.items():
        canvas, place = place_known_half(data, 32, 32, keep=keep, keeps=KEEPS)
        assert place == keep, name
        assert np.array_equal(canvas, expected), name


@pytest.mark.parametrize(("h", "w", "place"), [(16, 32, "top"), (32, 16, "left"), (32, 32, "top"), (20, 90, "top")])
def test_the_half_without_keep_is_derived_from_the_image(h: int, w: int, place: str) -> None:
    assert place_known_half(to_png(noise(h, w)), 32, 32, keeps=KEEPS)[1] == place


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("shape", [(64, 64), (100, 150), (151, 90), (31, 33)])
def test_alpha_half_of_any_size_reaches_only_its_half(keep: str, shape: tuple[int, int]) -> None:
    """The red of the unknown half must not affect the known half, which is grey and stays grey to its last row."""
    h, w = shape
    rgba = np.zeros((h, w, 4), np.uint8)
    rgba[..., 0] = 255
    halves = {
        "top": np.s_[: h // 2],
        "bottom": np.s_[h // 2 :],
        "left": np.s_[:, : w // 2],
        "right": np.s_[:, w // 2 :],
    }
    rgba[halves[keep]] = (90, 90, 90, 255)
    canvas, place = place_known_half(encode(Image.fromarray(rgba), "PNG"), 32, 32, keeps=KEEPS)
    assert place == keep
    assert np.all(canvas[SIDES[keep]] == 90)
    assert canvas.sum() == 90 * 3 * 512


def test_alpha_that_does_not_mark_a_half_is_refused() -> None:
    for opaque in (np.s_[:15], np.s_[8:24], np.s_[::2], np.s_[:16, :16], np.s_[:0]):
        rgba = noise(32, 32, 4)
        rgba[..., 3] = 0
        rgba[opaque][..., 3] = 255
        with pytest.raises(InputError, match=r"^image has transparent pixels .*\.$"):
            place_known_half(encode(Image.fromarray(rgba), "PNG"), 32, 32, keeps=KEEPS)


def test_keep_is_checked_against_the_image_and_the_model() -> None:
    square, wide, tall = (to_png(noise(*shape)) for shape in ((32, 32), (16, 32), (32, 16)))
    rgba = noise(32, 32, 4)
    rgba[..., 3] = 255
    rgba[16:, :, 3] = 0
    for data, keep, keeps, words in [
        (square, "middle", KEEPS, "must be one of top, bottom, left, right"),
        (square, "bottom", ("top",), "cannot complete an image from its bottom half: .*the top half is known"),
        (square, None, ("left", "right"), "from its top half: .*the left or right half is known"),
        (square, None, (), "it completes none"),
        (wide, "left", KEEPS, "keep must be top or bottom, or crop the image to a square"),
        (tall, "top", KEEPS, "keep must be left or right"),
        (tall, None, ("top",), "from its left half"),
        (encode(Image.fromarray(rgba), "PNG"), "bottom", KEEPS, "the opaque half of image is its top"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            place_known_half(data, 32, 32, keep=keep, keeps=keeps)
        assert caught.value.field == "keep"


def test_half_an_image_of_a_model_that_is_not_square_is_read() -> None:
    half = noise(8, 64)
    canvas, place = place_known_half(to_png(half), 16, 64, keeps=KEEPS)
    assert place == "top"
    assert np.array_equal(canvas[:8], half)
    assert not canvas[8:].any()
    with pytest.raises(InputError, match="crop the image to 4:1"):
        place_known_half(to_png(half), 16, 64, keep="left", keeps=KEEPS)


# Encoding.


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 5), st.integers(1, 5), st.just(3))))
def test_a_grid_contains_all_images_in_reading_order(stack: Pixels) -> None:
    n, h, w, _ = stack.shape
    sheet = grid(stack)
    columns = sheet.shape[1] // w
    assert columns * (sheet.shape[0] // h) >= n
    for i, image in enumerate(stack):
        y, x = divmod(i, columns)
        assert np.array_equal(sheet[y * h : (y + 1) * h, x * w : (x + 1) * w], image)


def test_an_empty_grid_is_an_error() -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        grid([])
