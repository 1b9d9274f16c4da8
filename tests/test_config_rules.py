"""Settings that are each fine but do not go together, and names that are no folder."""

import pytest

from sppnet.config_files import parse_config
from sppnet.errors import SppnetError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"finetune": {"negative_overlap": [0.5, 0.5]}}, r"^here: finetune: negative_overlap must be .*low < high"),
        ({"svm": {"evict_below": -0.5}}, r"^here: svm: evict_below=-0\.5 would .*; set evict_below to at most"),
        ({"name": "."}, r"^here: name: "),
        ({"name": ".."}, r"^here: name: "),
        ({"name": "a/b"}, r"^here: name: "),
        ({"name": ""}, r"^here: name: "),
        ({"name": "a\0b"}, r"^here: name: expected a name without slashes and control characters"),
        ({"name": "a\n"}, r"^here: name: expected a name"),
        ({"name": "\x1b[31m"}, r"^here: name: expected a name"),
        ({"name": "a\x85b"}, r"^here: name: expected a name"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(SppnetError, match=message):
        parse_config(values, "here")


@pytest.mark.parametrize(
    "values",
    [
        {"svm": {"evict_below": -1.5, "mine_above": -1.5}},
        {"head": {"init": "imagenet"}},
        {"name": "a.b"},
        {"name": ".hidden"},
        {"name": "a"},
        {"name": "猫 1"},
    ],
)
def test_settings_at_the_edge_of_the_rules_are_taken(values):
    parse_config(values, "here")


NUMBERS = [
    ("finetune.batch", "a whole number"),
    ("head.fc6", "a whole number"),
    ("maps.max_side", "a whole number"),
    ("data.seed", "a whole number"),
    ("svm.C", "a number"),
    ("head.input_norm", "a number"),
    ("detect.score_threshold", "a number"),
    ("finetune.positive_overlap", "a number"),
]
LISTS = [
    ("maps.scales", "a whole number"), ("finetune.negative_overlap", "a number"), ("backbone.weights.mean", "a number")
]  # fmt: skip


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("key", "expected"), [*NUMBERS, *LISTS])
def test_true_and_false_are_no_numbers(key, expected, given):
    value = [1, given, 1][: 2 if key == "finetune.negative_overlap" else 3] if (key, expected) in LISTS else given
    with pytest.raises(SppnetError, match=rf"^here: {key}: expected {expected}, got .*{given}"):
        parse_config(nested(key, value), "here")


@pytest.mark.parametrize(("key", "value"), [("svm.C", 1), ("head.dropout", 0), ("finetune.flip", True)])
def test_whole_numbers_and_flags_are_taken_where_they_belong(key, value):
    section, name = key.split(".")
    assert getattr(getattr(parse_config(nested(key, value), "here"), section), name) == value
