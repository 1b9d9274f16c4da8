"""What people hold an image in: the same pixels from all of it, and a remedy where it cannot be told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from doubles import picture, refused_by_us
from PIL import Image

from sppnet.errors import ImageError
from sppnet.image_inputs import read_pixels

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
        (PIXELS[..., 0], "it is grey"), (PIXELS.transpose(2, 0, 1), "channels are first: pass np.ascontiguousarray"),
        (np.dstack([PIXELS, PIXELS[..., :1]]), r"pass image\[..., :3\]"), (PIXELS[None], "as a list"),
        (PIXELS[:0], "at least one pixel"), (PIXELS[:, :, :2], "read it with"),
        (TENSOR.float(), r"in \[0, 1\], got values from .* divide by 255"), (TENSOR / 255 - 1e-3, "clamp it"),
        (TENSOR / 255 * torch.nan, "got values from nan"), (TENSOR / 255 * torch.inf, "got values from"),
        (TENSOR.long(), "uint8, or floating-point"), (TENSOR > 9, "uint8, or floating-point"),
        (TENSOR.permute(1, 2, 0), r"channels are last: pass image.permute\(2, 0, 1\)"), (TENSOR[0], "it is grey"),
        (TENSOR[:, :0], "at least one pixel"), (TENSOR[None], "as a list"),
        (torch.cat([TENSOR, TENSOR[:1]]), r"pass image\[:3\]"), (TENSOR[:0], r"pass \(3, H, W\)"),
        (None, "got NoneType"), (b"GIF89a", "got bytes"), (3, "got int"), ({"image": PIXELS}, "got dict"),
        (Image.new("RGB", (0, 5)), "at least one pixel"), (Image.new("F", (4, 5)), "floating-point pixels"),
        ("no such file.jpg", "no such file"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_with_the_remedy(image, remedy):
    with pytest.raises(ImageError, match=remedy):
        read_pixels(image)
    refused_by_us(lambda: read_pixels(image))
