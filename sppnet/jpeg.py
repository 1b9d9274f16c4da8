"""Whether a JPEG holds its whole picture.

libjpeg only warns of a scan that ends too early, fills the rest with grey, and nothing above it hears of the warning.
So the decoder is given something else behind the last scan: a whole picture does not notice.
"""

from __future__ import annotations

import hashlib
import io
import re

from PIL import Image

MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither stuffing nor a restart, which belong to a scan
SEGMENT_FREE = (0x01, 0xD8)  # markers without a length
OTHER_CODING = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # arithmetic, lossless: not checked
START_OF_SCAN, END = 0xDA, 0xD9
# The decoder reads up to eight bytes ahead. Ones are no Huffman code: they stand for fewer values than any other bytes.
PADDING = b"\xff\x00" * 8
NOISE = hashlib.shake_256(b"").digest(4096).replace(b"\xff", b"\x00")


def open_jpeg(data: bytes) -> Image.Image:
    """The image in the bytes of a JPEG file; OSError, at the latest when it is loaded, where a part of it is missing.

    One scan: what follows it is taken away, and the decoder, which waits for it if it needs it, reports that the file
    is cut. At most the last two blocks of 8 or 16 pixels can be wrong unseen. Several scans, as in a progressive JPEG:
    the picture must not change where noise follows the last one; whole scans can be missing unseen. Bytes behind the
    end, as phones add, do not matter.
    """
    scans, end = _scans(data)
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    if end is None:
        raise OSError("it has no end marker; where a viewer shows it whole, save it again there")
    start = data[:end].rstrip(b"\xff")  # without fill bytes
    if scans == 1:
        return Image.open(io.BytesIO(start + PADDING), formats=("JPEG",))
    if scans:
        other = Image.open(io.BytesIO(start + NOISE + data[end:]), formats=("JPEG",))
        if image.tobytes() != other.tobytes():
            raise OSError("the picture in it is cut off")
    return image


def _scans(data: bytes) -> tuple[int, int | None]:
    """How many scans there are to check, and where the end marker stands."""
    scans, at, checked = 0, 2, True
    while marker := MARKER.search(data, at):
        kind, at = data[marker.start() + 1], marker.end()
        if kind == END:
            return scans * checked, marker.start()
        if kind not in SEGMENT_FREE:
            checked &= kind not in OTHER_CODING
            scans += kind == START_OF_SCAN
            at += max(int.from_bytes(data[at : at + 2]), 2)
    return scans, None
