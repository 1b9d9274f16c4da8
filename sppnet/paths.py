"""Names of files: as a shell writes them, and as text that can be written anywhere."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from sppnet.errors import SppnetError

LONGEST_NAME = 255  # bytes of a file name; Linux, macOS and Windows hold no more
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


def expand_path(text: str | os.PathLike[str]) -> Path:
    """The path with ``~``, ``$NAME`` and ``${NAME}`` filled in, as a shell does it outside of quotes.

    What exists under the name as it stands, or lies in such a folder, is meant itself. SppnetError for a variable
    that is not set and a user who is not known.
    """
    path = Path(text)
    special = [part for part in (path, *path.parents) if part.name.startswith("~") or "$" in part.name]
    if not special or any(map(os.path.lexists, special)):
        return path
    for match in VARIABLE.finditer(str(path)):
        name = match[1] or match[2]
        if name not in os.environ:
            reason = f"the variable {name} is not set, and nothing has this very name"
            raise SppnetError(f"{path}: {reason}; set or spell it out")
    try:
        return Path(os.path.expandvars(path)).expanduser()
    except RuntimeError:  # of a user who is not known here, or has no home
        reason = "~ stands for the home of a user, and none is known here"
        raise SppnetError(f"{path}: {reason}; spell it out, or write ./~ for a file of that name") from None


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
