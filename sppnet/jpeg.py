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
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
SEGMENT_FREE = (0x01, 0xD8)  # markers without a length
OTHER_CODING = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # arithmetic, lossless: not checked
START_OF_SCAN, END = 0xDA, 0xD9
# The decoder reads up to eight bytes ahead. Ones are no Huffman code: they stand for fewer values than any other bytes.
PADDING = b"\xff\x00" * 8
NOISE = hashlib.shake_256(b"").digest(4096).replace(b"\xff", b"\x00")
CUT = "the picture in it is cut off"
NO_END = "it has no end marker; where a viewer shows it whole, save it again there"
LOST = "a part of the picture in it is lost"


def open_jpeg(data: bytes) -> Image.Image:
    """The image in the bytes of a JPEG file; OSError, at the latest when it is loaded, where a part of it is missing.

    One scan: what follows it is taken away, and the decoder, which waits for it if it needs it, reports that the file
    is cut. At most the last two blocks of 8 or 16 pixels can be wrong unseen. Several scans, as in a progressive JPEG:
    the picture must not change where noise follows the last one. Restart markers, behind which the decoder goes on
    after damage without a word, must count from 0 to 7 and again. Bytes behind the end, as phones add, do not matter.
    """
    scans, end = _scans(data)
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    if end is None:
        raise OSError(NO_END)
    if not scans:
        return image
    wanted = {(component, band) for component in range(len(image.getbands())) for band in range(64)}
    components = list(dict.fromkeys(component for scan in scans for component, _ in scan))
    present = {(components.index(component), band) for scan in scans for component, bands in scan for band in bands}
    if not wanted <= present:
        raise OSError(CUT)
    start = data[:end].rstrip(b"\xff")  # without fill bytes
    if len(scans) == 1:
        return Image.open(io.BytesIO(start + PADDING), formats=("JPEG",))
    other = Image.open(io.BytesIO(start + NOISE + data[end:]), formats=("JPEG",))
    if image.tobytes() != other.tobytes():
        raise OSError(CUT)
    return image


def _scans(data: bytes) -> tuple[list[list[tuple[int, range]]], int | None]:
    """For every scan its components with the coefficients that it completes; and where the end marker stands."""
    scans: list[list[tuple[int, range]]] = []
    at, checked = 2, True
    while marker := MARKER.search(data, at):
        kind, at = data[marker.start() + 1], marker.end()
        if kind == END:
            return scans if checked else [], marker.start()
        if kind in SEGMENT_FREE:
            continue
        checked = checked and kind not in OTHER_CODING
        segment = data[at : at + int.from_bytes(data[at : at + 2])]
        if kind == START_OF_SCAN and len(segment) >= 6:
            first, last, precision = segment[-3:]
            bands = range(first, last + 1) if precision & 15 == 0 else range(0)  # else a later scan refines them
            scans.append([(component, bands) for component in segment[3:-3:2]])
        at += max(len(segment), 2)
        if kind == START_OF_SCAN:
            following = MARKER.search(data, at)
            restarts = RESTART.findall(data, at, following.start() if following else len(data))
            if any(restart[0] & 7 != number & 7 for number, restart in enumerate(restarts)):
                raise OSError(LOST)
    return scans, None
