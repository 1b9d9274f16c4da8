"""Reading, resizing and normalising images."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from sppnet.errors import ImageError
from sppnet.images import flip_image, image_size, prepare, read_image, scaled_size

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
    assert image_size(path) == expected.shape[:2]


def test_a_rotated_jpeg_is_read_as_opencv_reads_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", photo(), exif=exif, quality=95)
    image = read_image(path)
    assert image.shape == (80, 60, 3)
    assert np.abs(image.astype(int) - cv2.imread(str(path))[..., ::-1]).mean() < 2
    assert image_size(path) == (80, 60)


def test_an_unknown_or_damaged_orientation_leaves_the_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", COLOURS, exif=exif)), COLOURS)
    path = save(tmp_path / "b.jpg", photo(), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0")
    assert read_image(path).shape == (60, 80, 3)
    assert image_size(path) == (60, 80)


def test_the_size_needs_only_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png(3000, 2000))
    decoded = []
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda image: decoded.append(image))
    assert image_size(tmp_path / "a.png") == (2000, 3000)
    assert not decoded


# files that cannot be read


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=r"nowhere\.jpg: expected an image, but there is no such file; check"):
            read(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("content", [b"", b"hello, I am text\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=r"a\.jpg: expected an image \(JPEG, .* another kind; convert or remove"):
            read(tmp_path / "a.jpg")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="expected an image, got a folder, pipe or device"):
        read_image(tmp_path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.tif", "a.webp"])
def test_a_truncated_file_is_refused_and_not_half_read(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, photo(200, 300))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=rf"{name}: expected .*(fetch|convert)"):
        read_image(path)


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (13_400, 13_300), (2_000_000_000, 1)])
def test_an_absurdly_large_header_is_refused_before_decoding(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "a.png").write_bytes(png(width, height))
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=r"a\.png: expected at most 178,000,000 pixels, .*scale it down"):
            read(tmp_path / "a.png")


def test_a_large_but_allowed_header_gives_no_warning(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(tmp_path / "a.png") == (10_000, 10_000)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: expected 8 or 16 bits per channel, got floating-point"):
        read_image(tmp_path / "a.tif")


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
    with pytest.raises(ValueError, match=r"uint8 of shape \(H, W, 3\), got uint8 of shape \(4, 5\); read it"):
        prepare(photo()[:4, :5, 0], (4, 5), "rgb", (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match=r"got float32 of shape"):
        prepare(photo().astype(np.float32), (4, 5), "rgb", (0, 0, 0), (1, 1, 1))  # type: ignore[arg-type]


def test_an_unknown_channel_order_is_refused() -> None:
    with pytest.raises(ValueError, match="channel_order must be 'rgb' or 'bgr', got 'gbr'"):
        prepare(photo(), (4, 5), "gbr", (0, 0, 0), (1, 1, 1))
