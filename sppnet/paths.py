"""Names of files: as a shell writes them, and as text that can be written anywhere."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

LONGEST_NAME = 255  # bytes of a file name; Linux, macOS and Windows hold no more


def expand_path(text: str | os.PathLike[str]) -> Path:
    """The path with ``~``, ``$NAME`` and ``${NAME}`` filled in, as a shell does it; what is not known here stays.

    A path that exists is taken as it stands.
    """
    if os.path.lexists(text):
        return Path(text)
    return Path(os.path.expanduser(os.path.expandvars(text)))  # noqa: PTH111, pathlib's refuses an unknown user


def fitting_name(stem: str, ending: str) -> str:
    """The name of a file: letters that file names cannot have here are escapes, as in "\\u732b".

    Its stem is cut where both are too long together, with a digest to tell it from others.
    """
    try:
        os.fsencode(stem)
    except UnicodeEncodeError:  # a locale without UTF-8
        stem = stem.encode("ascii", "backslashreplace").decode()
    if len(os.fsencode(stem + ending)) <= LONGEST_NAME:
        return stem + ending
    ending = f"-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]}{ending}"
    return os.fsencode(stem)[: LONGEST_NAME - len(ending)].decode(errors="ignore") + ending


def as_text(name: str | os.PathLike[str]) -> str:
    """A file name that can be written anywhere: bytes that are not UTF-8 become escapes, as in "caf\\xe9.jpg"."""
    return os.fsencode(name).decode(errors="backslashreplace")
