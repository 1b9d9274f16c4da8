"""The parts of a scaled image that are classified (sec. 3.1.2 to 3.1.4)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from sppnet.errors import SppnetError
from sppnet.images import scaled_size

SIDE = 224  # px of a view in the paper; the scales below go with it
SCALES = (224, 256, 300, 360, 448, 560)  # sec. 3.1.4
CENTRE, CORNERS = (1, 1), tuple(product((0, 2), (0, 2)))  # x and y in halves of the room that a view has
MIDDLES = ((1, 0), (0, 1), (2, 1), (1, 2))


@dataclass(frozen=True)
class View:
    """A rectangle of an image whose shorter side is scaled to `scale` px, mirrored after it is cut where `flip`.

    box: xyxy, half-open, px of the scaled image, of the size that `scaled_size` gives.
    """

    scale: float
    box: tuple[int, int, int, int]
    flip: bool


def list_views(name: str, image_size: tuple[int, int], side: int = SIDE, min_side: int = 256) -> list[View]:
    """The views of an image of (height, width), of any size: smaller ones are scaled up.

    centre      1: side × side in the middle, the image's shorter side scaled to min_side
    ten         10: the middle and the four corners, each as it is and mirrored (sec. 3.1.2)
    full        2: the whole image, its shorter side scaled to min_side, as it is and mirrored (sec. 3.1.3)
    multiview   98: at six scales the middle, the corners and the middles of the four sides, mirrored too, and the two
                of full (sec. 3.1.4). At the smallest scale, as wide as a view, 6 of 18 differ: the middle and both ends
                of the longer side; they are the same place where the image is square.

    The scales are those of the paper, in proportion where `side` is not 224. `min_side` counts as `side` where it is
    less. SppnetError for a name that is none of these, BackboneError as in `scaled_size`.
    """
    base = max(side, min_side)
    if name == "centre":
        return _crops(image_size, base, side, (CENTRE,), (False,))
    if name == "ten":
        return _crops(image_size, base, side, (CENTRE, *CORNERS))
    (height, width), _ = scaled_size(image_size, base)
    full = [View(base, (0, 0, width, height), flip) for flip in (False, True)]
    if name == "full":
        return full
    if name != "multiview":
        raise SppnetError(f"views must be one of centre, ten, full, multiview, got {name!r}")
    wide = image_size[0] <= image_size[1]
    views = _crops(image_size, side, side, (CENTRE, *(((0, 1), (2, 1)) if wide else ((1, 0), (1, 2)))))
    for scale in SCALES[1:]:
        views += _crops(image_size, round(scale * side / SIDE), side, (CENTRE, *CORNERS, *MIDDLES))
    return views + full


def _crops(
    image_size: tuple[int, int],
    scale: int,
    side: int,
    places: tuple[tuple[int, int], ...],
    flips: tuple[bool, ...] = (False, True),
) -> list[View]:
    """Views of side × side px at these places of the image at this scale."""
    (height, width), _ = scaled_size(image_size, scale)
    corners = [((width - side) * x // 2, (height - side) * y // 2) for x, y in places]
    return [View(scale, (x, y, x + side, y + side), flip) for x, y in corners for flip in flips]
