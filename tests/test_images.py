"""Reading, resizing and normalising images."""

from __future__ import annotations

import contextlib
import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from doubles import picture, refused_by_us
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from sppnet.errors import BackboneError, ImageError
from sppnet.images import flip_image, image_header, prepare, read_image, read_pixels, scaled_size, upright_pixels

COLOURS = np.array(  # 3 × 2 pixels, all different
    [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]], [[0, 255, 255], [255, 255, 255]]], dtype=np.uint8
)


def photo(height: int = 60, width: int = 80) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def png(width: int, height: int) -> bytes:
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return png_header(width, height) + chunk


# reading


def test_an_rgb_image_comes_back_as_it_was_written_and_may_be_changed(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.png", COLOURS))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, COLOURS)
    image[0, 0] = 0


def test_grey_images_get_three_equal_channels(tmp_path: Path) -> None:
    grey = photo()[..., 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", grey)), np.repeat(grey[..., None], 3, axis=2))


def test_palette_images_are_looked_up(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.gif", COLOURS, "P")), COLOURS)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", COLOURS, "P")), COLOURS)


def test_bilevel_images_are_black_and_white(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.png", np.array([[0, 255]], dtype=np.uint8), "1"))
    assert image.tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_cmyk_images_become_rgb(tmp_path: Path) -> None:
    red = np.zeros((16, 16, 3), dtype=np.uint8) + np.array([255, 0, 0], dtype=np.uint8)
    image = read_image(save(tmp_path / "a.jpg", red, "CMYK"))
    assert np.abs(image.astype(int) - red).max() < 10


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_images_keep_their_brightness(tmp_path: Path, name: str) -> None:
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / name)
    assert read_image(tmp_path / name)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 128]]], dtype=np.uint8)
    image = read_image(save(tmp_path / "a.png", rgba))
    assert image[0, :2].tolist() == [[200, 100, 0], [255, 255, 255]]
    np.testing.assert_allclose(image[0, 2], [227, 177, 127], atol=1)


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    indices = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    indices.putpalette([10, 20, 30, 40, 50, 60])
    indices.save(tmp_path / "a.png", transparency=1)
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


UPRIGHT = {  # what each orientation asks for, in numpy's words
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name.endswith("webp") else {}
    path = save(tmp_path / name, COLOURS, exif=exif, **options)
    expected = UPRIGHT[orientation](COLOURS)
    np.testing.assert_array_equal(read_image(path), expected)
    assert image_header(path)[0] == expected.shape[:2]


def test_a_rotated_jpeg_is_read_as_opencv_reads_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", photo(), exif=exif, quality=95)
    image = read_image(path)
    assert image.shape == (80, 60, 3)
    assert np.abs(image.astype(int) - cv2.imread(str(path))[..., ::-1]).mean() < 2
    assert image_header(path)[0] == (80, 60)


def test_an_unknown_or_damaged_orientation_leaves_the_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", COLOURS, exif=exif)), COLOURS)
    path = save(tmp_path / "b.jpg", photo(), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0")
    assert read_image(path).shape == (60, 80, 3)
    assert image_header(path)[0] == (60, 80)


def test_the_size_needs_only_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png(3000, 2000))
    decoded = []
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda image: decoded.append(image))
    assert image_header(tmp_path / "a.png")[0] == (2000, 3000)
    assert not decoded


# files that cannot be read


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_image, image_header):
        with pytest.raises(ImageError, match=r"nowhere\.jpg: expected an image, but there is no such file; check"):
            read(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("content", [b"", b"hello, I am text\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (read_image, image_header):
        message = r"\(JPEG, .* another kind; convert or remove" if content else "got an empty file"
        with pytest.raises(ImageError, match=rf"a\.jpg: expected an image.* {message}"):
            read(tmp_path / "a.jpg")


@pytest.mark.parametrize("ending", [".heic", ".AVIF"])
def test_a_photo_in_a_format_that_is_not_read_gets_a_hint(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a{ending}").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 50)
    with pytest.raises(ImageError, match="another kind; save it as JPEG"):
        read_image(tmp_path / f"a{ending}")


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    for read in (read_image, image_header):
        with pytest.raises(ImageError, match="expected an image, got a folder, pipe or device"):
            read(tmp_path / "a.jpg")


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"P6 "]),
)
def test_any_bytes_are_an_image_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, rest: bytes, head: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jpg"
    path.write_bytes(head + rest)
    with contextlib.suppress(ImageError):
        assert read_image(path).dtype == np.uint8


@pytest.mark.parametrize(
    "options", [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "jpeg"}]
)
def test_a_tiff_cut_anywhere_is_refused(tmp_path: Path, options: dict[str, str]) -> None:
    cut_anywhere_is_refused(save(tmp_path / "a.tif", photo(), **options))


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "RGB"), ("a.png", "P"), ("a.gif", "P"), ("a.webp", "RGB"), ("a.bmp", "RGB"), ("a.ppm", "RGB")],
)
def test_files_cut_anywhere_are_refused(tmp_path: Path, name: str, mode: str) -> None:
    cut_anywhere_is_refused(save(tmp_path / name, photo(), mode))


def cut_anywhere_is_refused(path: Path) -> None:
    """Or nothing of the picture is missing: some formats end in bytes that are not needed."""
    data, whole = path.read_bytes(), read_image(path)
    for cut in (*range(0, len(data), max(1, len(data) // 25)), len(data) - 9, len(data) - 1):
        path.write_bytes(data[:cut])
        try:
            np.testing.assert_array_equal(read_image(path), whole)
            assert cut > len(data) - 25
        except ImageError:
            pass


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="expected an image, got a folder, pipe or device"):
        read_image(tmp_path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.tif", "a.webp"])
def test_a_truncated_file_is_refused_and_not_half_read(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, photo(200, 300))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=rf"{name}: expected .*(fetch|convert)"):
        read_image(path)


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (13_400, 13_400), (2_000_000_000, 1)])
def test_an_absurdly_large_header_is_refused_before_decoding(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "a.png").write_bytes(png(width, height))
    for read in (read_image, image_header):
        with pytest.raises(ImageError, match=r"a\.png: expected at most 178,956,970 pixels, .*scale it down"):
            read(tmp_path / "a.png")


def test_a_large_but_allowed_header_gives_no_warning(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_header(tmp_path / "a.png")[0] == (10_000, 10_000)


def tiff(path: Path, values: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> Path:
    """One row of grey values as an uncompressed TIFF; the values as they lie in the file."""
    data, pixels = values.tobytes(), values.nbytes * 8 // bits
    tags = [(256, pixels), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    tags += [(279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    )
    return path


DEEP = np.array([0, 257, 32896, 65535], dtype="<u2")


def test_a_tiff_of_12_bits_keeps_its_brightness(tmp_path: Path) -> None:
    packed = np.frombuffer(bytes.fromhex("000fff 800555"), np.uint8)  # 0, 4095, 2048, 1365
    assert read_image(tiff(tmp_path / "a.tif", packed, 12))[0, :, 0].tolist() == [0, 255, 128, 85]


@pytest.mark.parametrize(("values", "bits"), [(DEEP, 16), (np.array([0, 1, 128, 255], np.uint8), 8)])
def test_a_tiff_in_which_white_is_zero_is_turned(tmp_path: Path, values: np.ndarray, bits: int) -> None:
    assert read_image(tiff(tmp_path / "a.tif", values, bits, photometric=0))[0, :, 0].tolist() == [255, 254, 127, 0]


@pytest.mark.parametrize(
    ("values", "bits", "sample_format", "kind"),
    [
        (np.array([0, 1], "<f4"), 32, 3, "floating-point"),
        (np.array([0, 2**31], "<u4"), 32, 1, "32-bit or signed"),
        (np.array([-1, 2**30], "<i4"), 32, 2, "32-bit or signed"),
        (np.array([-1, 9], "<i2"), 16, 2, "32-bit or signed"),
        (np.array([-1, 9], np.int8), 8, 2, "32-bit or signed"),
    ],
)
def test_numbers_without_a_known_range_are_refused(
    tmp_path: Path, values: np.ndarray, bits: int, sample_format: int, kind: str
) -> None:
    path = tiff(tmp_path / "a.tif", values, bits, sample_format=sample_format)
    with pytest.raises(ImageError, match=rf"a\.tif: expected 8 or 16 bits per channel, got {kind} pixels"):
        read_image(path)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_in_memory_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=r"mine: expected 8 or 16 bits per channel"):
        upright_pixels(Image.new(mode, (4, 4), 200), "mine")


def test_colours_of_16_bits_keep_their_brightness(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.array([[[65535, 32896, 0], [0, 0, 51400]]], np.uint16))  # BGR
    assert read_image(tmp_path / "a.png").tolist() == [[[0, 128, 255], [200, 0, 0]]]


@pytest.mark.parametrize(("most", "data"), [(1023, struct.pack(">3H", 0, 512, 1023)), (100, bytes([0, 50, 100]))])
def test_the_largest_number_of_a_pgm_is_white(tmp_path: Path, most: int, data: bytes) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 %d " % most + data)
    assert read_image(tmp_path / "a.pgm")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_a_rotated_grey_image_is_turned(tmp_path: Path, name: str, dtype: type) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / name, np.array([[0, 1, 0], [0, 0, 0]], dtype) * np.iinfo(dtype).max, exif=exif)
    assert read_image(path)[..., 0].tolist() == [[0, 0], [0, 255], [0, 0]]
    assert image_header(path)[0] == (3, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}])
def test_a_tiff_is_turned_once_and_says_how(tmp_path: Path, orientation: int, mode: str, options: dict) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    (deep if mode == "I;16" else Image.fromarray(grey).convert(mode)).save(tmp_path / "a.tif", exif=exif, **options)
    Image.fromarray(grey).save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), upright)
    assert image_header(tmp_path / "a.tif") == (upright.shape[:2], orientation)


@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "YCbCr"), ("a.tif", "YCbCr"), ("a.tif", "CMYK"), ("a.jpg", "CMYK"), ("a.tif", "LAB")]
)
def test_other_colour_spaces_become_rgb(tmp_path: Path, name: str, mode: str) -> None:
    colour = (200, 100, 50)
    image = Image.new("RGB", (16, 16), colour)
    if mode == "LAB":
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        image = image.convert(mode)
    image.save(tmp_path / name, quality=95) if name == "a.jpg" else image.save(tmp_path / name)
    np.testing.assert_allclose(read_image(tmp_path / name)[8, 8], colour, atol=6)


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.png", "a.webp"])
def test_the_first_of_several_frames_counts(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 100, 50), (1, 2, 3))]
    frames[0].save(
        tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "webp" in name else {})
    )
    assert read_image(tmp_path / name)[4, 4].tolist() == [200, 100, 50]


# sizes


@pytest.mark.parametrize(
    ("size", "side", "max_side", "expected", "effective"),
    [
        ((375, 500), 688, None, (688, 917), 688.0),
        ((500, 375), 688, None, (917, 688), 688.0),
        ((352, 500), 480, None, (480, 682), 480.0),
        ((100, 100), 50, None, (50, 50), 50.0),
        ((375, 500), 688, 800, (600, 800), 600.0),
        ((375, 500), 688, 917, (688, 917), 687.75),
        ((375, 500), 300, 800, (300, 400), 300.0),
        ((1, 1000), 10, 100, (1, 100), 0.1),
    ],
)
def test_the_shorter_side_is_scaled_unless_the_longer_would_exceed_its_bound(
    size: tuple[int, int], side: int, max_side: int | None, expected: tuple[int, int], effective: float
) -> None:
    scaled, shorter = scaled_size(size, side, max_side)
    assert scaled == expected
    assert shorter == pytest.approx(effective)
    assert all(type(value) is int for value in scaled)


def test_an_image_without_pixels_has_no_scaled_size() -> None:
    with pytest.raises(ValueError, match=r"at least one pixel, got \(0, 5\)"):
        scaled_size((0, 5), 100)


# from image to tensor


@pytest.mark.parametrize("size", [(60, 80), (97, 129), (33, 44), (60, 200), (1, 1)])
def test_resizing_equals_opencv_bilinear_on_floats(size: tuple[int, int]) -> None:
    image = photo()
    tensor = prepare(image, size, "rgb", (0, 0, 0), (1, 1, 1))
    expected = cv2.resize(image.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
    assert tensor.shape == (1, 3, *size)
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor[0].permute(1, 2, 0).numpy(), expected, atol=2e-2)


def test_mean_and_std_apply_in_the_given_channel_order() -> None:
    image = np.array([[[10, 20, 30]]], dtype=np.uint8)
    assert prepare(image, (1, 1), "rgb", (1, 2, 3), (1, 2, 9)).flatten().tolist() == [9, 9, 3]
    assert prepare(image, (1, 1), "bgr", (1, 2, 3), (29, 2, 7)).flatten().tolist() == [1, 9, 1]


@pytest.mark.parametrize("size", [(60, 80), (97, 129), (33, 44)])
def test_a_mean_image_is_warped_to_the_scaled_picture(size: tuple[int, int]) -> None:
    image, mean = photo(), np.random.default_rng(1).uniform(0, 255, (20, 24, 3)).astype(np.float32)
    found = prepare(image, size, "bgr", torch.from_numpy(mean).permute(2, 0, 1), (2, 3, 4))
    picture, warped = (
        cv2.resize(own.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR) for own in (image, mean)
    )
    expected = (picture[..., ::-1] - warped) / [2, 3, 4]
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), expected, atol=2e-2)


def test_a_mean_image_of_one_value_is_that_mean() -> None:
    constant = torch.full((3, 5, 7), 9.0) + torch.arange(3).view(3, 1, 1)
    found, expected = (prepare(photo(), (97, 129), "rgb", mean, (2, 3, 4)) for mean in (constant, (9, 10, 11)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_mirrored_and_read_only_images_are_accepted() -> None:
    image = photo()
    image.flags.writeable = False
    flipped = prepare(image[:, ::-1], (60, 80), "rgb", (0, 0, 0), (1, 1, 1))
    assert torch.equal(flipped.flip(3), prepare(image, (60, 80), "rgb", (0, 0, 0), (1, 1, 1)))


def test_flipping_twice_gives_the_image_back() -> None:
    image = photo()
    np.testing.assert_array_equal(flip_image(image)[:, 0], image[:, -1])
    np.testing.assert_array_equal(flip_image(flip_image(image)), image)


def test_an_image_of_another_shape_or_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"array of shape \(H, W, 3\), got uint8 of shape \(4, 5\); scale it"):
        prepare(photo()[:4, :5, 0], (4, 5), "rgb", (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match=r"got float32 of shape"):
        prepare(photo().astype(np.float32), (4, 5), "rgb", (0, 0, 0), (1, 1, 1))  # type: ignore[arg-type]


def test_an_unknown_channel_order_is_refused() -> None:
    with pytest.raises(ValueError, match="channel_order must be 'rgb' or 'bgr', got 'gbr'"):
        prepare(photo(), (4, 5), "gbr", (0, 0, 0), (1, 1, 1))


def test_a_mirrored_image_is_a_copy_even_of_one_column() -> None:
    for image in (np.arange(12, dtype=np.uint8).reshape(4, 1, 3), np.arange(24, dtype=np.uint8).reshape(4, 2, 3)):
        flipped = flip_image(image)
        np.testing.assert_array_equal(flipped, np.stack([row[::-1] for row in image]))
        assert torch.equal(torch.tensor(flipped), torch.from_numpy(flipped))  # takes no negative strides
        assert not np.shares_memory(flipped, image)


def test_an_image_much_longer_than_wide_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(BackboneError, match=r"30000 × 22 pixels would be scaled to 545455 × 400, .* maps\.max_side"):
        scaled_size((22, 30_000), 400)
    assert scaled_size((22, 30_000), 400, max_side=2000)[0] == (1, 2000)
    assert scaled_size((4000, 6000), 4000)[0] == (4000, 6000)


# ---- whatever people hold an image in ------------------------------------------------------------------------------

PIXELS = picture(21, 34)
TENSOR = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_tensor_between_zero_and_one_holds_the_pixels_that_it_was_made_of(dtype):
    found = read_pixels((TENSOR.double() / 255).to(dtype).requires_grad_())
    assert (found.dtype, found.shape) == (np.uint8, PIXELS.shape)
    exact = dtype in (torch.float32, torch.float64, torch.float16)
    assert np.abs(found.astype(int) - PIXELS).max() <= (0 if exact else 1)


def test_files_pil_images_arrays_and_tensors_hold_the_same_pixels(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    turned = Image.fromarray(PIXELS).transpose(Image.Transpose.ROTATE_90)  # counter-clockwise
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        inputs = [
            tmp_path / "a.png", str(tmp_path / "a.png"), tmp_path / "turned.png", opened, Image.fromarray(PIXELS),
            PIXELS, PIXELS[::-1][::-1], np.asfortranarray(PIXELS), TENSOR, TENSOR.clone(),
        ]  # fmt: skip
        for image in inputs:
            np.testing.assert_array_equal(read_pixels(image), PIXELS)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA", "HSV", "I;16"])
def test_pil_images_of_any_mode_are_read_as_their_files_are(tmp_path, mode):
    grey = Image.fromarray(PIXELS[..., 0])
    image = grey.convert("I").convert(mode) if mode.startswith("I") else Image.fromarray(PIXELS).convert(mode)
    found = read_pixels(image)
    assert (found.dtype, found.shape) == (np.uint8, PIXELS.shape)
    suffix = {"CMYK": "tif", "YCbCr": "tif", "HSV": None}.get(mode, "png")
    if suffix:
        image.save(tmp_path / f"a.{suffix}")
        np.testing.assert_array_equal(found, read_pixels(tmp_path / f"a.{suffix}"))


def test_an_array_stays_as_it_is():
    assert read_pixels(PIXELS) is PIXELS


@pytest.mark.parametrize(
    ("image", "remedy"),
    [
        (PIXELS.astype(np.float32), "scale it to 0 … 255"), (PIXELS / 255, "scale it to 0 … 255"),
        (PIXELS.astype(int), "scale it"), (PIXELS > 9, "scale it"),
        (PIXELS[..., 0], "put its channels last"), (PIXELS.transpose(2, 0, 1), "put its channels last"),
        (np.dstack([PIXELS, PIXELS[..., :1]]), "shape .*, 4"), (PIXELS[None], "as a list"),
        (PIXELS[:0], "at least one pixel"), (PIXELS[:, :, :2], "read it with"),
        (TENSOR.float(), r"in \[0, 1\], got values from .* divide by 255"), (TENSOR / 255 - 1e-3, "clamp it"),
        (TENSOR / 255 * torch.nan, "got values from nan"), (TENSOR / 255 * torch.inf, "got values from"),
        (TENSOR.long(), "uint8, or floating-point"), (TENSOR > 9, "uint8, or floating-point"),
        (TENSOR.permute(1, 2, 0), "put its three channels first"), (TENSOR[0], "put its three"),
        (TENSOR[:, :0], "at least one pixel"), (TENSOR[None], "as a list"),
        (torch.cat([TENSOR, TENSOR[:1]]), r"got \(4, "), (TENSOR[:0], r"got \(0, "),
        (None, "got NoneType"), (b"GIF89a", "got bytes"), (3, "got int"), ({"image": PIXELS}, "got dict"),
        (Image.new("RGB", (0, 5)), "at least one pixel"), (Image.new("F", (4, 5)), "floating-point pixels"),
        ("no such file.jpg", "no such file"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_with_the_remedy(image, remedy):
    with pytest.raises(ImageError, match=remedy):
        read_pixels(image)
    refused_by_us(lambda: read_pixels(image))


def test_an_opened_image_is_not_blamed_where_memory_runs_out(monkeypatch):
    def runs_out(image):
        raise MemoryError

    image = Image.fromarray(PIXELS)
    monkeypatch.setattr(Image.Image, "load", runs_out)
    with pytest.raises(MemoryError):
        read_pixels(image)
