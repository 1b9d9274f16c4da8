from pathlib import Path

import numpy as np
import pytest
from devkit import record, things

from sppnet.data.selection import annotations_digest, choose_classes, hold_out, restrict
from sppnet.errors import SppnetError
from sppnet.records import Annotation, ImageRecord


def test_classes_are_discovered_sorted():
    records = [record("1", things("dog", "cat")), record("2"), record("3", things("ant"))]
    assert choose_classes(records, None) == ("ant", "cat", "dog")
    assert choose_classes(records, ("dog", "ant")) == ("dog", "ant")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "horse"), "class 'horse' never occurs; classes found in the training images: cat, dog"),
        (("cat", "cat"), "names 'cat' twice; name each class once"),
        ((), "no class to train; classes found in the training images: cat, dog"),
    ],
)
def test_classes_that_cannot_be_trained_are_an_error(classes, message):
    with pytest.raises(SppnetError, match=message):
        choose_classes([record("1", things("dog", "cat"))], classes)


def test_no_objects_at_all_are_an_error():
    with pytest.raises(SppnetError, match="no class to train; classes found in the training images: none"):
        choose_classes([record("1", things())], None)


def test_restricting_keeps_every_image():
    restricted = restrict([record("1", things("dog", "cat")), record("2"), record("3", things("cat"))], ("dog",))
    assert [r.id for r in restricted] == ["1", "2", "3"]
    assert restricted[0].annotation.names == ("dog",)
    assert restricted[1].annotation is None
    assert restricted[2].annotation.boxes.shape == (0, 4)


def test_holding_out_depends_on_seed_and_ids_alone():
    records = [record(f"VOC2007/{number:06}") for number in range(50)]
    train, held = hold_out(records, 0.2, seed=0)
    assert (len(train), len(held)) == (40, 10)
    assert sorted(r.id for r in [*train, *held]) == [r.id for r in records]
    assert [r.id for r in held] == sorted(r.id for r in held)
    shuffled = hold_out(records[::-1], 0.2, seed=0)[1]
    assert {r.id for r in shuffled} == {r.id for r in held}
    assert {r.id for r in hold_out(records, 0.2, seed=1)[1]} != {r.id for r in held}


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.99, 2)])
def test_holding_out_leaves_an_image_on_either_side(share, count):
    assert len(hold_out([record("1"), record("2"), record("3")], share)[1]) == count


@pytest.mark.parametrize(("share", "images"), [(0.0, 5), (1.0, 5), (0.5, 1), (0.5, 0)])
def test_holding_out_needs_a_share_and_two_images(share, images):
    message = (
        f"expected a held-out share between 0 and 1 and at least 2 images, got {share} and {images}; set data.holdout"
    )
    with pytest.raises(SppnetError, match=message):
        hold_out([record(str(number)) for number in range(images)], share)


def test_the_digest_covers_everything_that_training_sees():
    def digest(image="0" * 16, box=1.0, names=("cat", "dog"), difficult=False, classes=("cat",), image_id="1"):
        boxes = np.float32([[box, 2, 3, 4], [5, 6, 7, 8]])
        annotation = Annotation(boxes, names, np.array([difficult, False]))
        return annotations_digest([ImageRecord(image_id, Path("x"), (9, 9), image, annotation)], classes)

    digests = [digest(), digest(image="1" * 16), digest(box=1.5), digest(difficult=True), digest(image_id="2")]
    digests += [digest(classes=("cat", "dog")), digest(names=("dog", "cat")), annotations_digest([], ("cat",))]
    assert len(set(digests)) == len(digests)
    assert digest() == digest()
    assert digest(names=("cat", "cow")) == digest()  # objects of other classes are not seen
    assert len(annotations_digest([record("1")], ("cat",))) == 16
