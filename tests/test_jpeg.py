"""JPEGs that are cut off but end with an end marker are refused; whole ones of every kind are read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sppnet.errors import ImageError
from sppnet.images import read_image

END = b"\xff\xd9"
KINDS = {
    "baseline": {},
    "optimized": {"optimize": True},
    "full chroma": {"subsampling": 0, "quality": 98},
    "restarts": {"restart_marker_blocks": 3},
    "progressive": {"progressive": True},
}


def picture(height: int = 90, width: int = 120, mode: str = "RGB") -> Image.Image:
    small = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def flat_at_the_bottom(mode: str = "RGB") -> Image.Image:
    pixels = np.asarray(picture()).copy()
    pixels[20:] = 128  # what a decoder fills lost blocks with, but here it is the picture
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **{"quality": 90, **options})
    return stream.getvalue()


def read(folder: Path, data: bytes) -> np.ndarray:
    (folder / "a.jpg").write_bytes(data)
    return read_image(folder / "a.jpg")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda mode: picture(90, 120, mode), flat_at_the_bottom, lambda m: picture(1, 1, m)])
def test_whole_ones_are_read_as_pillow_reads_them(tmp_path, make, kind, mode):
    data = encoded(make(mode), **KINDS[kind])
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for behind in (b"", b"\0" * 7, b"\xff\xff", b"MotionPhoto" * 99, data):
        np.testing.assert_array_equal(read(tmp_path, data + behind), expected)
    filled = data[:-2] + b"\xff\xff" + data[-2:]  # fill bytes before a marker are allowed
    np.testing.assert_array_equal(read(tmp_path, filled), expected)


@pytest.mark.parametrize("kind", [*KINDS, "grey", "grey progressive"])
def test_cut_anywhere_they_are_refused_but_for_their_last_blocks(tmp_path, kind):
    options = KINDS.get(kind.removeprefix("grey").strip(), {})
    data = encoded(picture(mode="L" if "grey" in kind else "RGB"), **options)
    whole = read(tmp_path, data)
    refused = 0
    cuts = np.unique(np.r_[np.linspace(2, len(data) - 3, 60).astype(int), len(data) - np.arange(3, 14)])
    for cut in cuts:
        try:
            image = read(tmp_path, data[:cut] + END)
        except ImageError:
            refused += 1
            continue
        rows, columns = np.nonzero((image != whole).any(axis=2))
        assert rows.size == 0 or (rows.min() >= 80 - 2 and columns.min() >= 104 - 2), f"cut at {cut} of {len(data)}"
    assert refused > 0.85 * len(cuts)


@pytest.mark.parametrize("kind", [*KINDS, "arithmetic"])
@pytest.mark.parametrize("share", [0.3, 0.9, 1])
def test_one_whose_tail_is_zeros_or_gone_is_refused(tmp_path, kind, share):
    data = encoded(picture(), **KINDS.get(kind, {}))
    if kind == "arithmetic":
        data = data.replace(b"\xff\xc0", b"\xff\xc9", 1)
    kept = data[: int(len(data) * share) - 2]
    for tail in (b"", b"\0" * (len(data) - len(kept)), b"\0" * 5000):
        with pytest.raises(ImageError, match=r"no end marker; where a viewer shows it whole, save it again there"):
            read(tmp_path, kept + tail)


@pytest.mark.parametrize(
    ("kind", "reason"), [("baseline", "truncated"), ("progressive", "the picture in it is cut off")]
)
def test_one_scan_is_read_to_its_end_and_several_are_compared(tmp_path, kind, reason):
    data = encoded(picture(), **KINDS[kind])
    with pytest.raises(ImageError, match=reason):
        read(tmp_path, data[: int(len(data) * 0.9)] + END)


def test_arithmetic_coding_which_noise_does_not_spoil_is_not_checked(tmp_path):
    data = encoded(picture(), quality=50, progressive=True)
    cut = data[: int(len(data) * 0.9)] + END
    with pytest.raises(ImageError, match="cut off"):
        read(tmp_path, cut)
    other = cut.replace(b"\xff\xc2", b"\xff\xca", 1)
    np.testing.assert_array_equal(read(tmp_path, other), np.asarray(Image.open(io.BytesIO(other)).convert("RGB")))


def test_a_picture_of_several_frames_gives_the_first(tmp_path):
    picture().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (120, 90))])
    first = read_image(tmp_path / "a.jpg")
    assert np.abs(first.astype(int) - np.asarray(picture())).mean() < 5


def test_photos_of_a_data_set_are_whole(shared):
    for path in sorted((shared / "voc/VOCdevkit").glob("*/JPEGImages/*.jpg"))[:20]:
        np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))
