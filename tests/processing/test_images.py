"""Pictures of every kind come out as golden pixels; broken, huge and foreign files come out as one line."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vilau.processing.images import (
    load_image,
    normalise,
    resize_square,
    save_image,
    to_array,
    to_pil,
    to_pixels,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(width: int = 8, height: int = 4) -> Image.Image:
    """Left red, right blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def data(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def pixels(source: object) -> np.ndarray:
    return np.asarray(load_image(source))  # type: ignore[arg-type]


def header_only_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["PNG", "BMP", "WEBP", "GIF"])
def test_lossless_formats_give_exact_pixels(name: str, tmp_path: Path) -> None:
    """A picture from a path, from bytes and from PIL is the same picture."""
    options = {"lossless": True} if name == "WEBP" else {}
    content = data(halves(), name, **options)
    path = tmp_path / "picture.bin"
    path.write_bytes(content)
    for source in (content, path, str(path), Image.open(io.BytesIO(content))):
        assert np.array_equal(pixels(source), np.asarray(halves()))


def test_jpeg_cmyk_is_converted() -> None:
    """CMYK is turned into RGB, not into an inverted or crashed picture."""
    got = pixels(data(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG"))
    assert got.shape == (16, 16, 3) and abs(got.astype(int) - RED).max() < 8


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    """16-bit grey is scaled; plain conversion would clip nearly everything to white."""
    grey = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert pixels(data(grey))[0, :, 0].tolist() == [0, 128, 255]


def test_transparency_lies_over_white() -> None:
    """Alpha, palette transparency and grey with alpha are composited over white, before any resizing."""
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 2, 4))
    half = Image.new("LA", (4, 4), (0, 128))
    assert pixels(data(clear))[0].tolist() == [list(BLUE)] * 2 + [[255, 255, 255]] * 2
    assert pixels(data(half))[0, 0].tolist() == [127, 127, 127]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((3, 3), 1)
    assert pixels(data(palette, transparency=0))[0, 0].tolist() == [255, 255, 255]
    assert pixels(data(palette, transparency=0))[3, 3].tolist() == [0, 255, 0]
    assert pixels(data(palette))[0, 0].tolist() == list(RED)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """A telephone's picture stands upright: undoing each orientation gives the picture that was meant."""
    transpose = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what a camera did, as Image.Transpose
    stored = halves(16, 8)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(transpose[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = load_image(data(stored, "PNG", exif=exif))
    assert got.size == (16, 8) and np.array_equal(np.asarray(got), np.asarray(halves(16, 8)))


def test_animation_gives_its_first_frame() -> None:
    """An animated GIF as a picture is its first frame, however many follow."""
    content = data(halves(), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 4), BLUE)] * 50)
    assert np.array_equal(pixels(content), np.asarray(halves()))


@pytest.mark.parametrize("size", [(30_000, 30_000), (10_000, 6_500), (2**31 - 1, 2**31 - 1)])
def test_huge_pictures_are_refused_from_their_header(size: tuple[int, int]) -> None:
    """A decompression bomb of 100 bytes must not cost gigabytes; the message names the limit."""
    with pytest.raises(ValueError, match="64 megapixels"):
        load_image(header_only_png(*size))
    with pytest.raises(ValueError, match="10x10 pixels"):
        load_image(data(Image.new("RGB", (10, 10))), max_pixels=99)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_truncated_files_are_refused(name: str, share: float, tmp_path: Path) -> None:
    """Half a file is no picture, in every format, and the message names the file."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = data(noise, name)
    path = tmp_path / "half.img"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"cannot read .*half\.img as a picture: "):
        load_image(path)


@pytest.mark.parametrize("name", ["TIFF", "PPM", "ICO", "JPEG2000", "TGA", "EPS"])
def test_other_formats_are_refused(name: str) -> None:
    """Decoders that are not needed are not reached, whatever the file is called."""
    try:
        content = data(halves(), name)
    except OSError:
        pytest.skip(f"this Pillow cannot write {name}")
    with pytest.raises(ValueError, match="none of JPEG, PNG, WebP, GIF, BMP"):
        load_image(content)


def test_missing_empty_and_wrong_sources(tmp_path: Path) -> None:
    """Each way to name nothing has its own clear line."""
    with pytest.raises(FileNotFoundError, match="no such file: .*nothing.png"):
        load_image(tmp_path / "nothing.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="the file is empty"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="not a regular file"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="it is empty"):
        load_image(b"")
    with pytest.raises(ValueError, match="NUL"):
        load_image("a\0b.png")
    with pytest.raises(ValueError, match="float32"):
        load_image(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="int given"):
        load_image(3)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=12),
)
def test_damaged_files_never_raise_anything_else(name: str, damage: list[tuple[int, int]]) -> None:
    """Whatever bytes are flipped, a picture or a ``ValueError`` comes out."""
    content = bytearray(data(halves(24, 24), name))
    for position, value in damage:
        content[position % len(content)] = value
    with contextlib.suppress(ValueError):
        assert load_image(bytes(content)).mode == "RGB"


def test_squash_and_crop() -> None:
    """Understanding sees the whole picture, drawing learns from the centre square."""
    wide = Image.new("RGB", (12, 4), RED)
    wide.paste(BLUE, (4, 0, 8, 4))
    assert np.asarray(resize_square(wide, 4, "crop")).reshape(-1, 3).tolist() == [list(BLUE)] * 16
    squashed = np.asarray(resize_square(wide, 4, "squash"))
    assert squashed[0, 0, 0] > 200 and squashed[0, 3, 0] > 200
    assert resize_square(Image.new("RGB", (1, 10_000)), 8, "crop").size == (8, 8)
    assert resize_square(Image.new("RGB", (1, 10_000)), 8).size == (8, 8)
    with pytest.raises(ValueError, match="'squash' or 'crop'"):
        resize_square(wide, 4, "stretch")  # type: ignore[arg-type]


def test_frames_of_the_right_size_are_left_alone() -> None:
    """Rendered training frames must not be resampled a second time."""
    frame = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert to_array(frame, 8) is frame
    assert np.array_equal(to_array(Image.fromarray(frame), 8), frame)
    assert to_array(frame, 4).shape == (4, 4, 3)


def test_every_value_survives_the_way_in_and_out() -> None:
    """uint8 -> [-1, 1] -> uint8 is exact; values outside are clamped, values between are rounded, NaN is an error."""
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    values = normalise(frames)
    assert values.shape == (1, 3, 16, 16) and values.dtype == np.float32 and values.min() == -1 and values.max() == 1
    assert np.array_equal(to_pixels(values), frames)
    assert np.array_equal(np.asarray(to_pil(frames)[0]), frames[0])
    odd = np.array([-9.0, 9.0, 0.6 / 127.5 - 1], np.float32).reshape(1, 3, 1, 1)
    assert to_pixels(odd).ravel().tolist() == [0, 255, 1]
    with pytest.raises(ValueError, match="NaN"):
        to_pixels(odd * np.nan)
    with pytest.raises(ValueError, match=r"\(I, 3, S, S\)"):
        to_pixels(odd[0])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp"])
def test_saved_pictures_load_again(suffix: str, tmp_path: Path) -> None:
    """Each suffix writes its format, whole, and leaves nothing else behind."""
    path = save_image(halves(16, 16), tmp_path / f"a{suffix}")
    assert abs(pixels(path).astype(int) - np.asarray(halves(16, 16)).astype(int)).mean() < 12
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    save_image(Image.new("RGBA", (4, 4)), path)
    assert load_image(path).size == (4, 4)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    """An error while writing neither destroys what was there nor leaves half a file."""
    path = save_image(halves(), tmp_path / "a.png")
    before = path.read_bytes()
    broken = halves()
    broken.save = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        save_image(broken, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match=r"'a\.xyz': end it in \.png"):
        save_image(halves(), tmp_path / "a.xyz")
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_image(halves(), tmp_path / "none" / "a.png")
