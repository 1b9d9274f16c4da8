"""Settings that are each fine but do not go together, and names that are no folder."""

import pytest

from sppnet.config_files import parse_config
from sppnet.errors import SppnetError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"finetune": {"negative_overlap": [0.5, 0.5]}}, r"^here: finetune: negative_overlap must be .*low < high"),
        ({"svm": {"evict_below": -0.5}}, r"^here: svm: evict_below=-0\.5 would .*; set evict_below to at most"),
        ({"pretrain": {"enabled": True}, "head": {"init": "imagenet"}}, r"^here: pretrain\.enabled trains .*; set"),
        ({"name": "."}, r"^here: name: "),
        ({"name": ".."}, r"^here: name: "),
        ({"name": "a/b"}, r"^here: name: "),
        ({"name": ""}, r"^here: name: "),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(SppnetError, match=message):
        parse_config(values, "here")


@pytest.mark.parametrize(
    "values",
    [
        {"svm": {"evict_below": -1.5, "mine_above": -1.5}},
        {"pretrain": {"enabled": True}},
        {"head": {"init": "imagenet"}},
        {"name": "a.b"},
        {"name": ".hidden"},
        {"name": "a"},
    ],
)
def test_settings_at_the_edge_of_the_rules_are_taken(values):
    parse_config(values, "here")
