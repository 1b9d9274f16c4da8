"""Whatever people hold an image in becomes the pixels that this package works on; nothing about it is guessed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sppnet.errors import ImageError
from sppnet.images import read_image, upright_pixels

ImageInput = str | Path | Image.Image | NDArray[np.uint8] | Tensor


def read_pixels(image: ImageInput) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a file, a PIL image, an array (H, W, 3) uint8, or a tensor (3, H, W), uint8 or in [0, 1].

    Files and PIL images are turned upright as their EXIF orientation says. ImageError for anything else, with what
    to do.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        try:
            pixels = upright_pixels(image, "image")
        except ImageError:
            raise
        except Exception as error:  # of Pillow's decoders, or a file that has been closed
            raise ImageError(f"image: expected a complete PIL image, but it cannot be read ({error})") from None
    elif isinstance(image, Tensor):
        pixels = _pixels_of_tensor(image)
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            hint = _hint(image.shape, 2, "np.ascontiguousarray(image.transpose(1, 2, 0))", "image[..., :3]")
            raise ImageError(
                f"image must be a uint8 RGB array of shape (H, W, 3), got {image.dtype} of shape {image.shape}; "
                f"{hint or 'scale it to 0 … 255 and round it'}, or read it with sppnet.read_image"
            )
        pixels = image
    else:
        raise ImageError(
            "image must be a path, a PIL image, a uint8 array (H, W, 3), a tensor (3, H, W), or a list of these, "
            f"got {type(image).__name__}"
        )
    if not pixels.size:
        raise ImageError(f"image must have at least one pixel, got shape {pixels.shape}")
    return pixels


def _pixels_of_tensor(image: Tensor) -> NDArray[np.uint8]:
    if image.ndim != 3 or image.shape[0] != 3:
        hint = _hint(tuple(image.shape), 0, "image.permute(2, 0, 1)", "image[:3]") or "pass (3, H, W)"
        raise ImageError(f"a tensor must be an RGB image of shape (3, H, W), got {tuple(image.shape)}; {hint}")
    if image.dtype != torch.uint8:
        if not image.is_floating_point():
            raise ImageError(f"a tensor must be uint8, or floating-point in [0, 1], got {image.dtype}; convert it")
        image = image.detach()
        low, high = (float(image.min()), float(image.max())) if image.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):  # NaN neither
            raise ImageError(
                f"a floating-point tensor must lie in [0, 1], got values from {low:g} to {high:g}; divide by 255 or "
                "clamp it, and do not normalise it"
            )
        image = (image.double() * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy())


def _hint(shape: tuple[int, ...], channels: int, turned: str, cut: str) -> str:
    """What makes the shape one with three channels last (`channels` = 2) or first (0), where that can be told."""
    if len(shape) == 4:
        return "give a batch as a list of images"
    if len(shape) == 2:
        return "it is grey: stack it three times"
    if len(shape) == 3 and shape[2 - channels] == 3:
        return f"its channels are {'first' if channels else 'last'}: pass {turned}"
    if len(shape) == 3 and shape[channels] == 4:
        return f"it has four channels: pass {cut} if the fourth is transparency"
    return ""
