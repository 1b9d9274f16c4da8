from pathlib import Path

import numpy as np
import pytest
from devkit import record, things
from hypothesis import given
from hypothesis import strategies as st

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
    def digest(image="0" * 16, box=1.0, names=("cat", "dog"), difficult=False, classes=("cat",), image_id="1", more=()):
        boxes = np.float32([[box, 2, 3, 4], [5, 6, 7, 8]])
        annotation = Annotation(boxes, names, np.array([difficult, False]), more)
        return annotations_digest([ImageRecord(image_id, Path("x"), (9, 9), image, annotation)], classes)

    digests = [digest(), digest(image="1" * 16), digest(box=1.5), digest(difficult=True), digest(image_id="2")]
    digests += [
        digest(more=("cow",), classes=("cat", "cow")),
        digest(classes=("cat", "cow")),
        digest(classes=("cat", "dog")),
        digest(names=("dog", "cat")),
        annotations_digest([], ("cat",)),
    ]
    assert len(set(digests)) == len(digests)
    assert digest() == digest()
    assert digest(names=("cat", "cow")) == digest(more=("bird",)) == digest()  # objects of other classes are not seen
    assert len(annotations_digest([record("1")], ("cat",))) == 16


# --- names of classes


@pytest.mark.parametrize("name", ["a/b", "a\\b", "..", "a\x7fb", "é" * 101])
def test_a_class_that_cannot_name_a_file_is_an_error_where_it_is_trained(name):
    records = [record("A/1", things("cat")), record("A/2", things(name, "cat")), record("A/3", things(name))]
    with pytest.raises(SppnetError, match=r"^class .*, e\.g\. in the annotation of A/2, .*rename it .*data\.classes"):
        choose_classes(records, None)
    assert choose_classes(records, ("cat",)) == ("cat",)


@pytest.mark.parametrize(("one", "other"), [("Cat", "cat"), ("STRASSE", "straße"), ("Éa", "éa")])
def test_classes_that_differ_in_case_alone_are_an_error_that_names_both(one, other):
    records = [record("A/1", things(one)), record("A/2", things(other))]
    with pytest.raises(SppnetError, match=rf"{one}.* \(e\.g\. in A/1\) and .*{other}.* \(e\.g\. in A/2\) differ in"):
        choose_classes(records, None)
    assert choose_classes(records, (other,)) == (other,)


# --- what is held out


def many(count: int, *shown: tuple[str, ...]) -> list[ImageRecord]:
    """Images that show these classes in turn."""
    return [record(f"A/{i:04}", things(*shown[i % len(shown)])) for i in range(count)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("rare", "held"), [(1, False), (2, True), (3, True)])
def test_every_class_stays_in_training_and_is_held_out_where_two_images_show_it(seed, rare, held):
    records = many(20, ("cat",), ("dog",), ())
    for number in range(rare):
        records[3 * number + 2] = record(records[3 * number + 2].id, things("zebra"))
    train, out = hold_out(records, 0.2, seed)
    assert sorted(r.id for r in [*train, *out]) == [r.id for r in records]
    assert len(out) == 4
    assert {"cat", "dog", "zebra"} == {name for r in train for name in r.annotation.names}
    assert {name for r in out for name in r.annotation.names} == {"cat", "dog"} | ({"zebra"} if held else set())


def test_a_class_whose_only_easy_object_trains_stays_where_difficult_ones_do_not():
    easy, hard = things("owl"), Annotation(things("owl").boxes, ("owl",), np.array([True]))
    records = [*many(10, ("cat",)), record("A/e", easy), record("A/h", hard), record("A/i", hard)]
    for seed in range(6):
        assert "A/e" not in {r.id for r in hold_out(records, 0.4, seed, difficult=False)[1]}


@given(st.lists(st.sets(st.sampled_from("abcde")), min_size=2, max_size=30), st.floats(0.05, 0.95), st.integers(0, 9))
def test_no_class_is_lost_and_no_side_is_empty_or_shares_an_image(shown, share, seed):
    records = [record(f"A/{i}", things(*sorted(names))) for i, names in enumerate(shown)]
    try:
        train, out = hold_out(records, share, seed)
    except SppnetError:
        classes = [name for names in shown for name in names]
        assert all(any(classes.count(name) == 1 for name in names) for names in shown)  # nothing could go
        return
    assert 1 <= len(out) <= max(1, round(share * len(records)))
    assert {r.id for r in train} | {r.id for r in out} == {r.id for r in records}
    assert len(train) + len(out) == len(records)
    assert {name for names in shown for name in names} == {name for r in train for name in r.annotation.names}


def test_copies_are_held_out_together_or_not_at_all():
    records = [record(f"{year}/{stem}", things("cat")) for stem in range(12) for year in ("A", "B")]
    for seed in range(6):
        train, out = hold_out(records, 0.25, seed)
        assert len(out) == 6
        assert not {r.digest for r in train} & {r.digest for r in out}
    with pytest.raises(SppnetError, match="no image of 2 can be held out"):
        hold_out([record("A/1", things("cat")), record("B/1", things("cat"))], 0.5)


@pytest.mark.parametrize(("copies", "held"), [((3, 3), 3), ((5, 2), 2), ((4, 3, 9), 3)])
@pytest.mark.parametrize("bare", [0, 4])
def test_copies_exceed_the_share_where_nothing_with_objects_is_held_out_otherwise(copies, held, bare):
    records = [record(f"{year}/{i}", things("cat")) for i, count in enumerate(copies) for year in range(count)]
    records += [record(f"A/bare{i}", things()) for i in range(bare)]
    for seed in range(6):
        train, out = hold_out(records, 0.1, seed)
        assert len([r for r in out if r.annotation.names]) == held
        assert len(train) + len(out) == len(records)
        assert not {r.digest for r in train} & {r.digest for r in out}


def test_copies_without_objects_are_held_out_where_nothing_else_can_be():
    records = [record(f"{year}/bare", things()) for year in "ABC"] + [record("A/1", things("cat"))]
    assert {r.id for r in hold_out(records, 0.1)[1]} == {"A/bare", "B/bare", "C/bare"}


def test_an_image_more_changes_little_of_what_is_held_out():
    records = many(100, ("cat",), ("dog",), ("cat", "owl"))
    before = {r.id for r in hold_out(records, 0.2)[1]}
    after = {r.id for r in hold_out([*records, record("A/new", things("dog"))], 0.2)[1]}
    assert len(before) == len(after) == 20
    assert len(before & after) >= 18
