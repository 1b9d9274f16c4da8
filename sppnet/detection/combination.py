"""Several detectors as one: their detections of a class are pooled, and the best ones stay (sec. 4.4).

It pays where the convolutions were trained apart; two heads of one backbone gain nothing (sec. 4.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sppnet.detection.detector import SPPDetector
from sppnet.errors import SppnetError
from sppnet.proposals.search import make_proposer


def combine_detectors(detectors: Sequence[SPPDetector], names: Sequence[str] = ()) -> SPPDetector:
    """The first detector with the others beside it: what all find in an image is pooled and suppressed by class.

    All score the windows of all, each distinct search running once, on their own maps, and regress what they find. In
    `detect` each has its own thresholds; the order of classes, detect.score_threshold, nms_overlap and max_per_class
    are those of the first. Boxes of joint heads are suppressed, vote and are softened together.
    SppnetError for fewer than two, for scores of two kinds, and for other classes, with the `names` of the detectors.
    """
    members = [replace(own, others=()) for each in detectors for own in (each, *each.others)]
    if len(members) < 2:
        raise SppnetError(f"expected two detectors or more to combine, got {len(members)}; give another one")
    for place, other in enumerate(detectors[1:], start=1):
        differ = sorted({*detectors[0].classes} ^ {*other.classes})
        if differ:
            one, two = (names[0], names[place]) if names else ("detector 0", f"detector {place}")
            some = ", ".join(map(repr, differ[:5])) + (", …" if len(differ) > 5 else "")
            raise SppnetError(f"{one} and {two}: only one of them knows {some}; combine detectors of the same classes")
    if len({own.is_joint for own in members}) > 1:
        kinds = "some give probabilities (head.training=joint), others margins of SVMs"
        raise SppnetError(f"{kinds}, which cannot be compared; combine detectors of the same head.training")
    search = make_proposer(*(own.config.proposals for own in members))
    return replace(members[0], proposer=search, others=tuple(members[1:]))
