"""Images: read safely, upright and as RGB; resize as the release does; normalise; flip.

An image is a uint8 numpy array (H, W, 3) in RGB order, turned upright as its EXIF orientation says, so that
boxes mean the same pixels everywhere. What the network sees is a float32 tensor (1, 3, h, w).
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from sppnet.errors import BackboneError, ImageError, SppnetError
from sppnet.jpeg import open_jpeg

T = TypeVar("T")

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
SAMPLE_FORMAT = 339  # TIFF tag; 1 = unsigned
MAX_SCALED_PIXELS = 32_000_000  # ours: some 16 GB in the first layers of VGG16, 4 GB in those of MobileNetV2
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # raster formats only: no program is started
UNREAD_SUFFIXES = (".heic", ".heif", ".avif")  # photos too, which a folder must not lose without a word
# What a picture in a folder is known by, in this order where there are several of a name.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)

ImageInput = str | Path | Image.Image | NDArray[np.uint8] | Tensor


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """The upright image as uint8 (H, W, 3) RGB; first frame where there are several.

    Grey, palette, CMYK, 12- and 16-bit images are converted; transparency is laid on white. Raises ImageError for
    a missing, damaged, truncated or unreasonably large file: a partly decoded image is never returned.
    """
    with _opened(path) as image:
        if image.format in ("JPEG", "MPO"):
            image = open_jpeg(Path(path).read_bytes())
        return upright_pixels(image, path)


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
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # of Pillow's decoders, or a file that has been closed
            raise ImageError(f"image: expected a complete PIL image, but it cannot be read ({error})") from None
    elif isinstance(image, Tensor):
        pixels = _pixels_of_tensor(image)
    elif isinstance(image, np.ndarray):
        pixels = check_pixels(image)
    else:
        kinds = "a path, a PIL image, a uint8 array (H, W, 3), a tensor (3, H, W), or a list of these"
        raise ImageError(f"image must be {kinds}, got {type(image).__name__}")
    if not pixels.size:
        raise ImageError(f"image must have at least one pixel, got shape {pixels.shape}")
    return pixels


def check_pixels(image: NDArray[Any]) -> NDArray[np.uint8]:
    """The array; ImageError unless it is (H, W, 3) uint8."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        remedy = "scale it to 0 … 255 and round it, put its channels last, give several as a list"
        got = f"{image.dtype} of shape {image.shape}; {remedy}, or read it with sppnet.read_image"
        raise ImageError(f"image must be a uint8 RGB array of shape (H, W, 3), got {got}")
    return image


def upright_pixels(image: Image.Image, name: Path | str) -> NDArray[np.uint8]:
    """The same of an opened image; `name` names it in errors."""
    image.load()
    return np.array(_to_rgb(_upright(_eight_bits(image, name))), dtype=np.uint8)


def image_header(path: Path | str) -> tuple[tuple[int, int], int]:
    """(height, width) of the upright image and the EXIF orientation (1-8) that turned it; errors as in `read_image`."""
    with _opened(path) as image:
        (width, height), orientation = image.size, _orientation(image)
        # Pillow turns a TIFF itself when it loads it, and already reports the upright size.
        sideways = orientation in SIDEWAYS and image.format != "TIFF"
        return ((width, height) if sideways else (height, width)), orientation


def scaled_size(
    image_size: tuple[int, int], shorter_side: float, max_side: int | None = None
) -> tuple[tuple[int, int], float]:
    """Size (h', w') with the aspect ratio kept and the shorter side scaled to `shorter_side` (sec. 4.1).

    Where the longer side would exceed `max_side` the scale shrinks. Returns the size, in whole pixels, and the
    shorter side it stands for, not rounded: the s of the projection onto the map. BackboneError where the scaled image
    would have more than MAX_SCALED_PIXELS, as one much longer than wide has.
    """
    shorter, longer = min(image_size), max(image_size)
    if shorter < 1:
        raise ValueError(f"image_size must be (height, width) of at least one pixel, got {image_size}")
    scale = shorter_side / shorter
    if max_side is not None:
        scale = min(scale, max_side / longer)
    height, width = (max(1, int(side * scale + 0.5)) for side in image_size)
    if height * width > MAX_SCALED_PIXELS:
        sizes = f"an image of {image_size[1]} × {image_size[0]} pixels would be scaled to {width} × {height}"
        remedy = "cut it into parts, or use a smaller scale (a detector: maps.max_side or a smaller maps.scales)"
        raise BackboneError(f"{sizes}, more than {MAX_SCALED_PIXELS:,} pixels; {remedy}")
    return (height, width), shorter * scale


def prepare(
    image: NDArray[np.uint8],
    size: tuple[int, int],
    channel_order: str,
    mean: Sequence[float] | Tensor,
    std: Sequence[float],
    device: torch.device | str = "cpu",
) -> Tensor:
    """uint8 RGB (H, W, 3) -> float32 (1, 3, h', w'): resized to `size`, then (x - mean) / std per channel.

    Bilinear without antialiasing, pixel centres aligned (release; what OpenCV's INTER_LINEAR computes). `mean` and
    `std`, three numbers or an image (3, h, w) and three numbers, are in `channel_order` ("rgb" or "bgr"), as the
    weights expect their input.
    """
    if channel_order not in ("rgb", "bgr"):
        raise ValueError(f"channel_order must be 'rgb' or 'bgr', got {channel_order!r}")
    pixels = torch.tensor(np.ascontiguousarray(check_pixels(image)), device=device).permute(2, 0, 1)[None].float()
    if channel_order == "bgr":
        pixels = pixels.flip(1)
    grows = len(torch.as_tensor(mean).shape) == 1 and pixels[0, 0].numel() < size[0] * size[1]
    # An affine change and a mean with weights that sum to 1 may change places: the smaller image takes less time.
    if grows:
        pixels = normalise(pixels, mean, std)
    if pixels.shape[2:] != tuple(size):
        pixels = F.interpolate(pixels, size=tuple(size), mode="bilinear", align_corners=False, antialias=False)
    return pixels if grows else normalise(pixels, mean, std)


def normalise(pixels: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float]) -> Tensor:
    """(N, 3, h, w) -> (x - mean) / std; a mean image (3, h', w') is warped to h × w, bilinear (sec. 3.1)."""
    shift = torch.as_tensor(mean, dtype=torch.float32, device=pixels.device)
    shift = shift.view(1, 3, 1, 1) if shift.ndim == 1 else shift[None]
    if shift.shape[2:] not in ((1, 1), pixels.shape[2:]):
        shift = F.interpolate(shift, size=pixels.shape[2:], mode="bilinear", align_corners=False)
    return (pixels - shift) / torch.tensor(std, dtype=torch.float32, device=pixels.device).view(1, 3, 1, 1)


def flip_image(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The horizontally mirrored image (a copy)."""
    return image[:, ::-1].copy()


def _pixels_of_tensor(image: Tensor) -> NDArray[np.uint8]:
    if image.ndim != 3 or image.shape[0] != 3:
        remedy = "put its three channels first, and give several as a list"
        raise ImageError(f"a tensor must be an RGB image of shape (3, H, W), got {tuple(image.shape)}; {remedy}")
    if image.dtype != torch.uint8:
        if not image.is_floating_point():
            raise ImageError(f"a tensor must be uint8, or floating-point in [0, 1], got {image.dtype}; convert it")
        image = image.detach()
        low, high = (float(image.min()), float(image.max())) if image.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):  # NaN neither
            got = f"got values from {low:g} to {high:g}; divide by 255 or clamp it, and do not normalise it"
            raise ImageError(f"a floating-point tensor must lie in [0, 1], {got}")
        image = (image.double() * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy())


@contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """The image behind `path`, header read and size checked; what goes wrong inside becomes ImageError.

    MemoryError alone stays what it is: the file is not to blame.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):  # a named pipe would be waited for
            raise ImageError(f"{path}: expected an image, got a folder, pipe or device; name a file")
        if status.st_size == 0:
            raise ImageError(f"{path}: expected an image, got an empty file; fetch it again or remove it")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL(\.|$)")  # what matters below is raised
            # A file and not its name: Pillow maps the pixels of a named TIFF into memory, turned ones in a wrong order.
            with Path(path).open("rb") as file, Image.open(file, formats=FORMATS) as image:
                yield image
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: expected an image, but there is no such file; check the path") from None
    except Image.DecompressionBombError:
        problem = "expected at most 178,956,970 pixels, but its header announces more"
        raise ImageError(f"{path}: {problem}; if the file is sound, scale it down first") from None
    except Image.UnidentifiedImageError:
        kinds, modern = ", ".join(FORMATS), Path(path).suffix.lower() in UNREAD_SUFFIXES
        hint = "save it as JPEG, or let the camera do so" if modern else "convert or remove it"
        raise ImageError(f"{path}: expected an image ({kinds}), got a file of another kind; {hint}") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and others
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        problem = f"expected a complete image, but it cannot be read ({reason})"
        raise ImageError(f"{path}: {problem}; fetch the file again or remove it") from None


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; unturned where its EXIF block cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block does not make the pixels wrong
        return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8 without decoding a pixel; 1 where there is none or none that can be read."""
    try:
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))  # image.getexif() decodes a PNG
    except Exception:
        return 1


def _eight_bits(image: Image.Image, name: Path | str) -> Image.Image:
    """Grey of 9 to 16 bits shrunk to 8; any other image as it is. ImageError for numbers without a known range."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF, which can say what Pillow's mode does not
    wide = image.mode == "I" and image.format not in ("PNG", "PPM")  # these have 16 bits at most
    if image.mode == "F" or wide or max(tags.get(SAMPLE_FORMAT, (1,))) > 1:
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise ImageError(f"{name}: expected 8 or 16 bits per channel, got {kind} pixels; convert it to 8 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    most = 2 ** max(tags.get(ExifTags.Base.BitsPerSample, (16,))) - 1
    values = np.clip(np.asarray(image).astype(np.int64), 0, most)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero; Pillow turns 8 bits alone
        values = most - values
    grey = Image.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))
    turned = image.format == "TIFF"  # by Pillow, when it was loaded
    grey.info, grey.getexif()[ExifTags.Base.Orientation] = image.info, 1 if turned else _orientation(image)
    return grey


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def one_by_one(do: Callable[..., T], *lists: Sequence[Any], **options: Any) -> list[T]:
    """The results of the images of a list; an error says which image it was."""
    results = []
    for place, own in enumerate(zip(*lists, strict=True)):
        try:
            results.append(do(*own, **options))
        except SppnetError as error:
            raise type(error)(f"image {place} of the list: {error}") from None
    return results
