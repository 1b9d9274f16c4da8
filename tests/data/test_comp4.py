import numpy as np
import pytest

from sppnet.data.comp4 import read_comp4, write_comp4
from sppnet.errors import SppnetError
from sppnet.records import Detections


def detections(boxes, scores, labels, classes=("cat", "dog")) -> Detections:
    boxes = np.float32(boxes).reshape(-1, 4)
    return Detections(boxes, np.float32(scores), np.int64(labels), classes)


def test_comp4_files_hold_one_based_inclusive_corners(tmp_path):
    found = {
        "VOC2007/000002": detections([[0, 0, 10, 20], [1.5, 2, 3, 4]], [0.5, -1.25], [1, 0]),
        "VOC2007/000001": detections([], [], []),
    }
    paths = write_comp4(tmp_path / "results", "test", found, ("cat", "dog", "emu"))
    assert [path.name for path in paths] == [f"comp4_det_test_{name}.txt" for name in ("cat", "dog", "emu")]
    assert paths[0].read_text() == "000002 -1.250000000 2.500000 3.000000 3.000000 4.000000\n"
    assert paths[1].read_text() == "000002 0.500000000 1.000000 1.000000 10.000000 20.000000\n"
    assert paths[2].read_text() == ""


def test_detections_written_and_read_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 300, (40, 2, 2)).cumsum(axis=1)
    found = detections(corners.reshape(40, 4), rng.normal(size=40), np.zeros(40), classes=("dog",))
    path = write_comp4(tmp_path, "val", {"VOC2012/my photo": found}, ("dog",))[0]
    stems, scores, boxes = read_comp4(path)
    assert stems == ["my photo"] * 40
    np.testing.assert_array_equal(scores.astype(np.float32).argsort(), found.scores.argsort())
    np.testing.assert_allclose(scores, found.scores, atol=1e-9)
    np.testing.assert_allclose(boxes, found.boxes, atol=1e-6)


def test_an_empty_comp4_file_holds_no_detections(tmp_path):
    (tmp_path / "x.txt").write_text("\n")
    stems, scores, boxes = read_comp4(tmp_path / "x.txt")
    assert (stems, scores.shape, boxes.shape) == ([], (0,), (0, 4))


@pytest.mark.parametrize("line", ["000001 0.5 1 2 3", "000001 0.5 1 2 3 x", "000001 nan 1 2 3 4", "000001"])
def test_a_faulty_comp4_line_is_named(tmp_path, line):
    (tmp_path / "x.txt").write_text(f"000001 0.5 1 2 3 4\n{line}\n")
    with pytest.raises(SppnetError, match=r"x\.txt:2: expected 'id score xmin ymin xmax ymax', got .*; correct it"):
        read_comp4(tmp_path / "x.txt")


def test_a_missing_comp4_file_is_an_error(tmp_path):
    with pytest.raises(SppnetError, match="cannot read this text file"):
        read_comp4(tmp_path / "gone.txt")


def test_stems_of_two_years_do_not_mix_in_one_file(tmp_path):
    found = {"VOC2007/1": detections([], [], []), "VOC2012/1": detections([], [], [])}
    with pytest.raises(SppnetError, match="'1' occurs twice; write each year by itself"):
        write_comp4(tmp_path, "test", found, ("cat",))
