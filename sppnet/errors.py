"""The errors of this package: one base class, and the kinds that some caller handles; counts in words."""


class SppnetError(ValueError):
    """Something that a user can mend: the message says what was expected, what was found and the next step.

    At the command line any other exception is a bug. The parts in `sppnet.ops` raise plain ValueError.
    """


class ImageError(SppnetError):
    """An image file that cannot be used."""


class BackboneError(SppnetError):
    """A backbone that cannot be built, or an image too small for it."""


class ArtifactError(SppnetError):
    """A file of a run that cannot be read or written."""


def counted(count: int, noun: str) -> str:
    """Number and noun for a message: "1 class", "9 classes"."""
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith(("s", "x", "ch")) else "s")
