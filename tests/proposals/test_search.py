"""Selective search, its order, and the proposals of a whole data set."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scenes import OBJECTS, scene

from sppnet.artifacts import file_digest, write_arrays
from sppnet.config import ProposalSettings
from sppnet.errors import ArtifactError, SppnetError
from sppnet.images import read_image
from sppnet.proposals import search as proposals
from sppnet.proposals.files import export_windows, import_windows
from sppnet.proposals.search import make_proposer, propose_images, propose_union, read_windows
from sppnet.proposals.selective_search import box_hash, opencv_selective_search
from sppnet.proposals.sliding import sliding_windows
from sppnet.records import ImageRecord, pairwise_iou

opencv = partial(ProposalSettings, method="opencv_selective_search")
ALONE = opencv(workers=1)


def make_records(folder: Path, count: int = 3) -> list[ImageRecord]:
    records = []
    for i in range(count):
        path = folder / "images" / f"{i:06d}.png"
        path.parent.mkdir(exist_ok=True)
        image = scene() if i % 2 == 0 else np.ascontiguousarray(scene()[:, ::-1])
        cv2.imwrite(str(path), image[..., ::-1])
        records.append(ImageRecord(f"VOC2007/{i:06d}", path, image.shape[:2], file_digest(path)))
    return records


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# all searches

METHODS = "selective_search", "opencv_selective_search", "edge_boxes"


@pytest.mark.parametrize("method", METHODS)
def test_windows_are_distinct_whole_pixels_inside_the_image_and_large_enough(method: Any) -> None:
    windows = make_proposer(ProposalSettings(method=method, min_side=25))(scene())
    assert len(np.unique(windows, axis=0)) == len(windows) > 5
    assert (windows == np.rint(windows)).all()
    assert (windows[:, 2:] - windows[:, :2]).min() >= 25
    assert windows.min() >= 0
    ends = windows[:, 2:].max(axis=0)
    assert (ends <= [200, 150]).all()
    assert ends.tolist() == [200, 150] or method == "edge_boxes"  # regions cover the image, edges need not


@pytest.mark.parametrize("method", METHODS)
def test_fewer_windows_are_a_prefix_of_more(method: Any) -> None:
    many, few = (
        make_proposer(ProposalSettings(method=method, max_windows=count, min_side=5))(scene()) for count in (40, 15)
    )
    assert len(many) > len(few) == 15
    np.testing.assert_array_equal(few, many[:15])


# selective search


def test_the_objects_of_a_simple_scene_are_found() -> None:
    windows = opencv_selective_search(scene(), ALONE)
    assert windows.dtype == np.float32
    assert pairwise_iou(OBJECTS.astype(float), windows).max(axis=1).min() > 0.8


def test_the_same_image_gives_the_same_windows_in_the_same_order() -> None:
    settings = opencv(max_windows=30, min_side=5)
    first, second = opencv_selective_search(scene(), settings), opencv_selective_search(scene(), settings)
    np.testing.assert_array_equal(first, second)
    assert len(first) == 30


def test_nothing_but_small_boxes_is_lost_against_opencv() -> None:
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(scene()[..., ::-1]))
    search.switchToSelectiveSearchFast()
    expected = {(x, y, x + w, y + h) for x, y, w, h in search.process().tolist() if w >= 20 and h >= 20}
    assert {tuple(map(int, window)) for window in opencv_selective_search(scene(), ALONE)} == expected


def test_the_order_of_windows_is_that_of_a_hash_in_plain_integers() -> None:
    def key(box: list[float]) -> int:
        value = 0
        for corner in box:
            value = (value ^ int(corner)) * 0x9E3779B97F4A7C15 % 2**64
            value ^= value >> 32
        return value

    windows = opencv_selective_search(scene(), opencv(min_side=1)).tolist()
    assert len(windows) > 50
    assert windows == sorted(windows, key=key)


def test_a_prefix_of_the_order_is_a_fair_sample_of_sizes() -> None:
    corners = np.random.default_rng(2).integers(0, 250, (4000, 4))
    boxes = np.unique(np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], axis=1), axis=0)
    boxes = boxes[np.argsort(box_hash(boxes))]
    widths = boxes[:, 2] - boxes[:, 0]
    assert widths[:400].mean() == pytest.approx(widths.mean(), rel=0.1)


@pytest.mark.parametrize("size", [(1, 1), (5, 5), (2, 300), (19, 19), (300, 19), (3, 2000)])
def test_an_image_smaller_than_min_side_gives_no_windows(size: tuple[int, int]) -> None:
    assert opencv_selective_search(np.zeros((*size, 3), np.uint8), ALONE).shape == (0, 4)


@pytest.mark.parametrize("size", [(1, 1), (5, 5), (1, 300), (300, 1), (3, 2000), (20, 20)])
def test_tiny_and_thin_uniform_images_give_themselves(size: tuple[int, int]) -> None:
    windows = opencv_selective_search(np.full((*size, 3), 128, np.uint8), opencv(min_side=1))
    assert windows.tolist() == [[0, 0, size[1], size[0]]]


def test_a_large_image_is_searched_in_a_shrunk_copy_and_answered_in_its_own_pixels() -> None:
    large = cv2.resize(scene(), (601, 450), interpolation=cv2.INTER_NEAREST)
    windows = opencv_selective_search(large, opencv(max_side=200))
    assert pairwise_iou(OBJECTS * 3.0, windows).max(axis=1).min() > 0.8
    assert (windows[:, 2:] - windows[:, :2]).min() >= 20
    assert windows[:, 2].max() == 601
    assert windows[:, 3].max() == 450
    assert len(opencv_selective_search(large, opencv(max_side=None))) > len(windows)


@pytest.mark.parametrize(
    "image", [np.zeros((9, 9), np.float32), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3), np.uint32)]
)
def test_other_numbers_and_four_channels_are_refused(image: NDArray) -> None:
    with pytest.raises(ValueError, match=r"image must be a uint8 RGB array of shape \(H, W, 3\), got \w+ of shape"):
        opencv_selective_search(image, ALONE)


def test_an_opencv_without_its_contributions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "ximgproc")
    with pytest.raises(SppnetError, match=r"no ximgproc; .* install opencv-contrib-python-headless"):
        opencv_selective_search(scene(), ALONE)


def test_make_proposer_gives_the_search_of_the_settings() -> None:
    settings = opencv(max_windows=7)
    np.testing.assert_array_equal(make_proposer(settings)(scene()), opencv_selective_search(scene(), settings))


def test_sliding_windows_follow_those_of_the_search_each_once() -> None:
    settings, plain = opencv(max_windows=9, shapes=((0.5, 0.5), (1.0, 1.0))), opencv(max_windows=9)
    found = make_proposer(settings)(scene())
    own = opencv_selective_search(scene(), plain)
    np.testing.assert_array_equal(found[: len(own)], own)
    sliding = {*map(tuple, sliding_windows(scene().shape[:2], settings.shapes, 9).tolist())}
    assert {*map(tuple, found[len(own) :].tolist())} == sliding - {*map(tuple, own.tolist())}
    assert len(np.unique(found, axis=0)) == len(found) <= 18


# a data set


def test_every_image_gets_a_file_with_its_windows(tmp_path: Path) -> None:
    records = make_records(tmp_path)
    summary = propose_images(records, ALONE, tmp_path / "out", progress=False)
    assert (summary.computed, summary.imported, summary.reused) == (3, 0, 0)
    assert files_in(tmp_path / "out") == [f"{record.id}-{record.digest}.npz" for record in records]
    np.testing.assert_array_equal(read_windows(tmp_path / "out", records[0]), opencv_selective_search(scene(), ALONE))


def test_complete_files_are_reused_and_missing_ones_computed(tmp_path: Path) -> None:
    records = make_records(tmp_path)
    kept = np.array([[1, 2, 30, 40]], np.float32)
    write_arrays(records[1].path_in(tmp_path / "out"), windows=kept)
    summary = propose_images(records, ALONE, tmp_path / "out", progress=False)
    assert (summary.computed, summary.reused) == (2, 1)
    np.testing.assert_array_equal(read_windows(tmp_path / "out", records[1]), kept)
    assert propose_images(records, ALONE, tmp_path / "out", progress=False).reused == 3


def test_another_image_under_the_same_id_is_computed_anew(tmp_path: Path) -> None:
    records = make_records(tmp_path, 1)
    propose_images(records, ALONE, tmp_path / "out", progress=False)
    cv2.imwrite(str(records[0].path), np.full((40, 60, 3), 9, np.uint8))
    changed = ImageRecord(records[0].id, records[0].path, (40, 60), file_digest(records[0].path))
    assert propose_images([changed], ALONE, tmp_path / "out", progress=False).computed == 1
    assert read_windows(tmp_path / "out", changed).tolist() == [[0, 0, 60, 40]]


def test_no_images_are_an_ordinary_data_set(tmp_path: Path) -> None:
    summary = propose_images([], opencv(), tmp_path, progress=False)
    assert (summary.computed, summary.imported, summary.reused) == (0, 0, 0)


def test_two_workers_write_what_one_writes_and_a_broken_image_is_named(tmp_path: Path) -> None:
    records = make_records(tmp_path, 34)
    records[2].path.write_bytes(records[2].path.read_bytes()[:200])
    with pytest.raises(SppnetError, match=r"image VOC2007/000002: cannot compute its windows: .*000002\.png"):
        propose_images(records, opencv(workers=2), tmp_path / "pool", progress=False)
    assert all(name.endswith(".npz") for name in files_in(tmp_path / "pool"))
    good = [record for record in records if record.path_in(tmp_path / "pool").exists()]
    assert records[2] not in good
    assert good  # the images before the broken one are done
    propose_images(good, ALONE, tmp_path / "alone", progress=False)
    for record in good:
        np.testing.assert_array_equal(read_windows(tmp_path / "pool", record), read_windows(tmp_path / "alone", record))


def test_a_broken_image_is_named_without_a_pool_and_the_rest_stays_done(tmp_path: Path) -> None:
    records = make_records(tmp_path)
    records[1].path.unlink()
    with pytest.raises(SppnetError, match="image VOC2007/000001: cannot compute its windows"):
        propose_images(records, ALONE, tmp_path / "out", progress=False)
    assert files_in(tmp_path / "out") == [f"{records[0].id}-{records[0].digest}.npz"]


def test_an_interrupt_leaves_complete_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, calls = make_records(tmp_path), []

    def interrupted(image: NDArray[np.uint8], settings: ProposalSettings) -> NDArray[np.float32]:
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return np.zeros((0, 4), np.float32)

    monkeypatch.setitem(proposals.METHODS, "opencv_selective_search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        propose_images(records, ALONE, tmp_path / "out", progress=False)
    assert files_in(tmp_path / "out") == [f"{records[0].id}-{records[0].digest}.npz"]
    summary = propose_images(records, ALONE, tmp_path / "out", progress=False)
    assert (summary.computed, summary.reused) == (2, 1)


SCRIPT = """
import signal
from pathlib import Path
from sppnet.config import ProposalSettings
from sppnet.proposals.search import propose_images
from sppnet.images import read_image
from sppnet.records import ImageRecord
from sppnet.errors import ArtifactError, SppnetError
# A shell starts jobs in the background with interrupts ignored, and so would be those of tests that it started so.
signal.signal(signal.SIGINT, signal.default_int_handler)
{guard}
    records = [ImageRecord(f"A/{{i}}", Path({image!r}), (150, 200), "0" * 16) for i in range({count})]
    settings = ProposalSettings(method="opencv_selective_search", workers=2)
    propose_images(records, settings, Path({out!r}), progress=False)
"""


def start_script(folder: Path, guard: str, count: int) -> subprocess.Popen[str]:
    image = make_records(folder, 1)[0].path
    script = folder / "script.py"
    script.write_text(SCRIPT.format(guard=guard, image=str(image), out=str(folder / "out"), count=count))
    root = str(Path(proposals.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, script], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_leaves_complete_files_only(tmp_path: Path) -> None:
    process = start_script(tmp_path, 'if __name__ == "__main__":', 3000)
    out = tmp_path / "out"
    deadline = time.monotonic() + 300
    while not (out.exists() and len(files_in(out)) > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
    errors = process.communicate(timeout=300)[1]
    assert "KeyboardInterrupt" in errors
    assert 3 < len(files_in(out)) < 3000
    assert all(name.startswith("A/") and name.endswith(".npz") for name in files_in(out))


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    errors = start_script(tmp_path, "if True:", 40).communicate(timeout=300)[1]
    assert "a worker process died" in errors.strip().splitlines()[-1]


def test_a_process_computes_its_share_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, waited = make_records(tmp_path), []
    monkeypatch.setattr(proposals, "shard", lambda items: items[1::2])
    monkeypatch.setattr(proposals, "barrier", lambda: waited.append(files_in(tmp_path / "out")))
    summary = propose_images(records, ALONE, tmp_path / "out", progress=False)
    assert summary.computed == 1
    assert waited == [[f"{records[1].id}-{records[1].digest}.npz"]]


# imported windows


def test_imported_windows_keep_their_order_and_lose_the_small_ones_before_the_cut(tmp_path: Path) -> None:
    records = make_records(tmp_path)
    rows = [[0, 0, 19, 50], [5, 5, 90, 90], [0, 0, 200, 150], [0, 0, 20, 20], [1, 1, 60, 60]]
    export_windows(tmp_path / "w.npz", ["000001"], [rows])
    settings = opencv(workers=1, import_from=(tmp_path / "w.npz",), max_windows=3)
    summary = propose_images(records, settings, tmp_path / "out", progress=False)
    assert (summary.computed, summary.imported, summary.reused) == (2, 1, 0)
    windows = read_windows(tmp_path / "out", records[1])
    assert windows.dtype == np.float32
    assert windows.tolist() == [rows[1], rows[2], rows[3]]
    np.testing.assert_array_equal(
        read_windows(tmp_path / "out", records[2]), opencv_selective_search(scene(), opencv(max_windows=3))
    )


def test_without_shapes_imported_windows_stay_as_they_are_twice_where_they_are_twice(tmp_path: Path) -> None:
    records = make_records(tmp_path, 1)
    rows = [[50, 50, 90, 90], [5, 5, 90, 90], [5, 5, 90, 90]]
    export_windows(tmp_path / "w.npz", [records[0].id], [rows])
    settings = opencv(workers=1, import_from=(tmp_path / "w.npz",))
    propose_images(records, settings, tmp_path / "out", progress=False)
    assert read_windows(tmp_path / "out", records[0]).tolist() == rows


def test_imported_windows_are_joined_by_sliding_ones(tmp_path: Path) -> None:
    records = make_records(tmp_path, 1)
    export_windows(tmp_path / "w.npz", [records[0].id], [[[5, 5, 90, 90]]])
    settings = opencv(workers=1, import_from=(tmp_path / "w.npz",), max_windows=4, shapes=((0.9, 0.9),))
    propose_images(records, settings, tmp_path / "out", progress=False)
    windows = read_windows(tmp_path / "out", records[0])
    np.testing.assert_array_equal(windows[1:], sliding_windows(records[0].size, settings.shapes, 4))
    assert windows[0].tolist() == [5, 5, 90, 90]


def test_an_image_without_imported_windows_has_an_empty_file(tmp_path: Path) -> None:
    records = make_records(tmp_path, 1)
    export_windows(tmp_path / "w.mat", [records[0].id], [np.zeros((0, 4))])
    settings = opencv(workers=1, import_from=(tmp_path / "w.mat",))
    assert propose_images(records, settings, tmp_path / "out", progress=False).imported == 1
    assert read_windows(tmp_path / "out", records[0]).shape == (0, 4)


def test_images_that_the_files_lack_are_searched_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = make_records(tmp_path)
    export_windows(tmp_path / "w.npz", ["000001"], [[[0, 0, 60, 60]]])
    settings = opencv(workers=1, import_from=(tmp_path / "w.npz",))
    propose_images(records, settings, tmp_path / "out", progress=False)
    lacking = "holds no windows of 2 of 3 images, e.g. VOC2007/000000; they are searched with opencv_selective_search"
    assert lacking in caplog.text
    caplog.clear()
    propose_images(records, settings, tmp_path / "out", progress=False)  # everything is there
    propose_images(records[1:2], settings, tmp_path / "again", progress=False)  # nothing is lacking
    assert not caplog.text


@pytest.mark.parametrize("rows", [[[0, 0, 0.4, 0.9], [0.1, 0.1, 1, 1]], [[0, 0, 19, 100]]])
def test_files_without_a_window_of_min_side_are_refused_before_anything_is_written(tmp_path: Path, rows: list) -> None:
    export_windows(tmp_path / "w.npz", ["000000", "000001"], [rows, rows])
    settings = opencv(workers=1, import_from=(tmp_path / "w.npz",))
    with pytest.raises(
        SppnetError, match=r"w\.npz: no window has both sides of proposals\.min_side=20 px .* not in shares"
    ):
        propose_images(make_records(tmp_path), settings, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_files_of_other_images_are_refused_unless_they_are_not_needed(tmp_path: Path) -> None:
    export_windows(tmp_path / "w.npz", ["train1"], [[[0, 0, 60, 60]]])
    settings = opencv(workers=1, import_from=(tmp_path / "w.npz",))
    with pytest.raises(
        SppnetError, match=r"w\.npz: windows of none of the images; its first image is train1, that of .*0000"
    ):
        propose_images(make_records(tmp_path), settings, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    summary = propose_images(make_records(tmp_path), settings, tmp_path / "out", progress=False, imports_needed=False)
    assert (summary.computed, summary.imported) == (3, 0)


def test_a_missing_import_file_stops_before_anything_is_computed(tmp_path: Path) -> None:
    settings = opencv(workers=1, import_from=(tmp_path / "absent.npz",))
    with pytest.raises(SppnetError, match=r"absent\.npz: no such file"):
        propose_images(make_records(tmp_path), settings, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_windows_that_were_never_proposed_are_asked_for(tmp_path: Path) -> None:
    record = make_records(tmp_path, 1)[0]
    with pytest.raises(ArtifactError, match="no windows for image VOC2007/000000; run sppnet propose"):
        read_windows(tmp_path / "out", record)
    write_arrays(record.path_in(tmp_path / "out"), boxes=np.zeros((0, 4)))
    with pytest.raises(ArtifactError, match="expected the array windows, got boxes"):
        read_windows(tmp_path / "out", record)


# several searches together


def union_of(folder: Path) -> tuple[list[ImageRecord], dict[Path, ProposalSettings]]:
    """Three images, and searches of which the first imports windows of the second image."""
    rows = [[5, 5, 90, 90], [0, 0, 200, 150], [5, 5, 90, 90]]
    export_windows(folder / "w.npz", ["000001"], [rows])
    first = opencv(workers=1, import_from=(folder / "w.npz",))
    second = ProposalSettings(method="edge_boxes", workers=1, max_windows=40)
    return make_records(folder), {folder / "a": first, folder / "b": second}


def test_windows_of_several_searches_follow_each_other_each_once(tmp_path: Path) -> None:
    records, searches = union_of(tmp_path)
    summary = propose_union(records, searches, tmp_path / "out", progress=False)
    assert (summary.computed, summary.imported, summary.reused) == (5, 1, 0)
    lengths = []
    for record in records:
        rows = [tuple(row) for folder in ("a", "b") for row in read_windows(tmp_path / folder, record).tolist()]
        windows = read_windows(tmp_path / "out", record)
        assert windows.dtype == np.float32
        assert [tuple(row) for row in windows.tolist()] == list(dict.fromkeys(rows))
        lengths.append(len(windows))
    assert read_windows(tmp_path / "out", records[1])[:2].tolist() == [[5, 5, 90, 90], [0, 0, 200, 150]]
    assert lengths[1] < 3 + 40  # a window stood twice


def test_a_union_that_is_there_needs_no_search_and_one_that_is_lost_only_its_windows(tmp_path: Path) -> None:
    records, searches = union_of(tmp_path)
    propose_union(records, searches, tmp_path / "out", progress=False)
    before = read_windows(tmp_path / "out", records[2])
    records[2].path_in(tmp_path / "out").unlink()
    summary = propose_union(records, searches, tmp_path / "out", progress=False)
    assert (summary.computed, summary.imported, summary.reused) == (0, 0, 6)  # by two searches
    np.testing.assert_array_equal(read_windows(tmp_path / "out", records[2]), before)
    for folder in searches:
        shutil.rmtree(folder)
    summary = propose_union(records, searches, tmp_path / "out", progress=False)
    assert (summary.computed, summary.imported, summary.reused) == (0, 0, 6)
    assert not any(folder.exists() for folder in searches)


@pytest.mark.shared_data
def test_a_real_image_gives_the_windows_that_were_computed_elsewhere(shared: Path) -> None:
    root = shared / "voc"
    theirs = import_windows(root / "proposals" / "selective_search_fast_VOC2007.npz")["000012"]
    image = read_image(root / "VOCdevkit/VOC2007/JPEGImages/000012.jpg")
    ours = opencv_selective_search(image, opencv(min_side=16, max_windows=10_000))
    common = set(map(tuple, ours.tolist())) & set(map(tuple, theirs.tolist()))
    assert len(common) > 0.9 * max(len(ours), len(theirs))
