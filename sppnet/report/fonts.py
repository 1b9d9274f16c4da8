"""A font that has the letters of a text, for names in any alphabet."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

BASIC = frozenset(range(32, 127)) | {ord("–"), ord("…")}  # what stands beside names

_warn_once = cache(logging.getLogger("sppnet").warning)


@cache
def legible(text: str) -> str:
    """The text in one line that some font here can draw: what none can, as an escape such as \\u732b."""
    if text.isascii() and text.isprintable():
        return text
    known = _letters(font_file(text))
    if any(letter.isprintable() and ord(letter) not in known for letter in text):
        _warn_once("no font of this system has all letters of the names: pictures show those it lacks as codes")
    return "".join(
        c if c.isprintable() and ord(c) in known else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def font_for(text: str, points: int) -> Font:
    """Pillow's own font where the text is plain, else one that has its letters."""
    return ImageFont.load_default(points) if text.isascii() else ImageFont.truetype(font_file(text), points)


@cache
def font_file(text: str) -> Path:
    """DejaVu Sans, which comes with matplotlib, or a font of the system that has more of the letters."""
    from matplotlib import get_data_path  # here, since plain names do without

    best = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # Latin, Cyrillic, Greek, Arabic, Hebrew and more
    wanted = {ord(letter) for letter in text if letter.isprintable()}
    if wanted <= _letters(best):
        return best
    from matplotlib.font_manager import fontManager  # which looks for all fonts when it is first imported

    for path in sorted({Path(font.fname) for font in fontManager.ttflist}):
        if _letters(path) >= BASIC and len(wanted & _letters(path)) > len(wanted & _letters(best)):
            best = path
    return best


@cache
def _letters(path: Path) -> frozenset[int]:
    from matplotlib import ft2font

    if "LastResort" in path.name:  # has a box for every letter that there is
        return frozenset()
    try:
        ImageFont.truetype(path, 13)  # fonts of coloured pictures have one size
        return frozenset(ft2font.FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):  # or one that has gone, or of a kind that the libraries do not read
        return frozenset()
