"""Proposal files: what is written is read back, what does not fit is refused by name."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st

from sppnet.errors import SppnetError
from sppnet.proposals.files import export_windows, import_windows, match_records
from sppnet.records import ImageRecord

IDS = ["VOC2007/000005", "VOC2007/000007", "VOC2012/2008_000009"]
WINDOWS = [
    np.array([[0, 0, 500, 375], [10, 20, 30, 45]], np.float32),
    np.zeros((0, 4), np.float32),
    np.ones((1, 4)) * [1, 2, 3, 4],
]


def write_npz(path: Path, **changes: object) -> Path:
    arrays = {"ids": np.array(["a", "b"]), "offsets": np.array([0, 1, 3]), "boxes": np.array([[0, 0, 9, 9]] * 3)}
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})
    return path


def cells(*values: object) -> np.ndarray:
    array = np.empty((1, len(values)), dtype=object)
    array[0, :] = values
    return array


def write_mat(path: Path, **changes: object) -> Path:
    content = {"boxes": cells(np.array([[1, 1, 5, 9]]), np.zeros((0, 4))), "images": cells("a", "b"), **changes}
    scipy.io.savemat(path, {key: value for key, value in content.items() if value is not None})
    return path


def record(name: str, size: tuple[int, int] = (375, 500)) -> ImageRecord:
    return ImageRecord(name, Path(f"{name}.jpg"), size, "0" * 16)


@pytest.mark.parametrize("suffix", [".npz", ".mat"])
def test_what_is_exported_is_imported_again(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"windows{suffix}"
    export_windows(str(path), IDS, WINDOWS)
    read = import_windows(str(path))
    assert list(read) == IDS
    for name, rows in zip(IDS, WINDOWS, strict=True):
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], rows)


@pytest.mark.parametrize("suffix", [".npz", ".mat"])
def test_no_images_and_one_image_are_ordinary_files(tmp_path: Path, suffix: str) -> None:
    export_windows(tmp_path / f"none{suffix}", [], [])
    assert import_windows(tmp_path / f"none{suffix}") == {}
    export_windows(tmp_path / f"one{suffix}", ["a"], [[[0, 0, 3, 4]]])
    np.testing.assert_array_equal(import_windows(tmp_path / f"one{suffix}")["a"], [[0, 0, 3, 4]])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(*[st.integers(0, 2000)] * 4), max_size=5), max_size=4), st.booleans())
def test_any_windows_survive_both_formats(tmp_path_factory: pytest.TempPathFactory, images: list, halves: bool) -> None:
    folder = tmp_path_factory.mktemp("formats")
    windows = [np.array([(x, y, x + w, y + h) for x, y, w, h in rows]).reshape(-1, 4) + halves / 2 for rows in images]
    ids = [f"image{i}" for i in range(len(windows))]
    for suffix in (".npz", ".mat"):
        export_windows(folder / f"f{suffix}", ids, windows)
        read = import_windows(folder / f"f{suffix}")
        assert list(read) == ids
        for name, rows in zip(ids, windows, strict=True):
            np.testing.assert_array_equal(read[name], rows)


def test_whole_small_corners_are_stored_as_int16_and_others_as_float32(tmp_path: Path) -> None:
    for rows, kind in (
        ([[0, 0, 32767, 9]], np.int16),
        ([[0, 0, 32768, 9]], np.float32),
        ([[0, 0, 1.5, 9]], np.float32),
    ):
        export_windows(tmp_path / "w.npz", ["a"], [rows])
        with np.load(tmp_path / "w.npz", allow_pickle=False) as archive:
            assert archive["boxes"].dtype == kind
        np.testing.assert_array_equal(import_windows(tmp_path / "w.npz")["a"], rows)


def test_a_mat_file_holds_one_based_inclusive_corners_with_y_first(tmp_path: Path) -> None:
    export_windows(tmp_path / "w.mat", ["a"], [[[0, 10, 5, 30]]])
    content = scipy.io.loadmat(tmp_path / "w.mat")
    assert content["boxes"].shape == (1, 1)
    np.testing.assert_array_equal(content["boxes"][0, 0], [[11, 1, 30, 5]])
    assert content["images"][0, 0].item() == "a"


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float64])
def test_cells_may_lie_in_a_row_or_a_column_and_hold_any_numbers(tmp_path: Path, shape: tuple, kind: type) -> None:
    boxes = cells(np.array([[1, 2, 30, 40]], kind), np.zeros((0, 0))).reshape(shape)
    path = write_mat(tmp_path / "w.mat", boxes=boxes, images=cells("a", "b").reshape(shape))
    read = import_windows(path)
    np.testing.assert_array_equal(read["a"], [[1, 0, 40, 30]])
    assert read["b"].shape == (0, 4)


def test_imported_windows_are_slices_of_one_array(tmp_path: Path) -> None:
    read = import_windows(write_npz(tmp_path / "w.npz"))
    assert read["a"].base is not None
    assert read["a"].base is read["b"].base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, "ids is missing; needed are ids, offsets, boxes"),
        ({"offsets": None}, "offsets is missing"),
        ({"boxes": None}, "boxes is missing"),
        ({"ids": np.array([1, 2])}, r"ids must be \(N,\) strings, got int64"),
        ({"ids": np.array(["a", "a"])}, "image a occurs more than once"),
        ({"ids": np.array(["a", "b"], dtype=object)}, "not a readable .npz file .*allow_pickle"),
        ({"offsets": np.array([0, 3])}, r"offsets must be \(3,\) integers for 2 ids, got int64 of shape \(2,\)"),
        ({"offsets": np.array([0.0, 1.0, 3.0])}, r"offsets must be \(3,\) integers for 2 ids, got float64"),
        ({"offsets": np.array([0, 5, 3])}, "offsets must run from 0 to 3, the number of boxes, and never decrease"),
        ({"offsets": np.array([0, 1, 2])}, "offsets must run from 0 to 3, .* got 0 to 2"),
        ({"offsets": np.array([1, 1, 3])}, "offsets must run from 0 to 3, .* got 1 to 3"),
        ({"boxes": np.zeros((3, 5))}, r"boxes must be \(total, 4\) numbers, got float64 of shape \(3, 5\)"),
        ({"boxes": np.array([["a"] * 4] * 3)}, r"boxes must be \(total, 4\) numbers, got <U1"),
        ({"boxes": np.array([[0, 0, 9, 9], [0, 0, np.nan, 9], [0, 0, 9, 9]])}, "not finite"),
        ({"boxes": np.full((3, 4), 1e300)}, "not finite"),  # in float32
        ({"boxes": np.array([[0, 0, 200, 9]] * 3).astype(np.int8)}, "3 boxes with x2 < x1 or y2 < y1"),  # overflown
        ({"boxes": np.zeros((3, 4), complex)}, r"boxes must be \(total, 4\) numbers, got complex128"),
        ({"boxes": np.zeros((3, 4), object)}, "not a readable .npz file .*allow_pickle"),
        (
            {"ids": np.array([b"a", b"b"])},
            r"ids must be \(N,\) strings, got \|S1 .* write numpy\.array\(ids, dtype=str\)",
        ),
        ({"boxes": np.array([[0, 0, 9, 9], [5, 5, 2, 9], [0, 0, 9, 9]])}, "1 box with x2 < x1 or y2 < y1"),
    ],
)
def test_an_npz_of_another_layout_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(SppnetError, match=message):
        import_windows(write_npz(tmp_path / "w.npz", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": None}, "boxes is missing; needed are boxes, images"),
        ({"images": None}, "images is missing; needed are boxes, images"),
        ({"images": cells("a")}, "one entry per image"),
        ({"boxes": np.zeros((2, 4))}, "expected the cells boxes and images"),
        ({"images": cells("a", 7)}, "images must hold one name per cell"),
        ({"images": cells("a", "a")}, "image a occurs more than once"),
        ({"boxes": cells(np.zeros((3, 5)), np.zeros((0, 4)))}, r"boxes of a must be \(R, 4\) numbers .*shape \(3, 5\)"),
        ({"boxes": cells(np.array([[5, 5, 1, 9]]), np.zeros((0, 4)))}, "y1 x1 y2 x2 in .mat"),
    ],
)
def test_a_mat_of_another_layout_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(SppnetError, match=message):
        import_windows(write_mat(tmp_path / "w.mat", **changes))


def test_a_matlab_7_3_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "w.mat"
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124, b" ")
    path.write_bytes(head + b"\x00\x02" + b"IM" + b"\x89HDF\r\n\x1a\n" + bytes(600))
    with pytest.raises(SppnetError, match=r"not a readable .mat file .* save it with save\(..., '-v7'\)"):
        import_windows(path)


@pytest.mark.parametrize("suffix", [".npz", ".mat"])
def test_damaged_and_missing_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    with pytest.raises(SppnetError, match=r"no such file; proposals\.import_from"):
        import_windows(path)
    export_windows(path, ["a", "b"], [np.tile([0.0, 0, 9, 9], (500, 1))] * 2)
    whole = path.read_bytes()
    for content in (b"", b"not windows", whole[: len(whole) // 2], whole[: len(whole) * 3 // 4]):
        path.write_bytes(content)
        with pytest.raises(SppnetError, match="not a readable"):
            import_windows(path)


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    with (tmp_path / "w.npz").open("wb") as file:
        np.save(file, np.zeros((3, 4)))
    with pytest.raises(SppnetError, match=r"not a readable \.npz file"):
        import_windows(tmp_path / "w.npz")


@pytest.mark.parametrize("name", ["w.txt", "w", "w.pkl", "w.h5"])
def test_an_unknown_suffix_is_refused_for_reading_and_writing(tmp_path: Path, name: str) -> None:
    with pytest.raises(SppnetError, match=r"unknown kind of proposal file .* use \.npz or \.mat"):
        import_windows(tmp_path / name)
    with pytest.raises(SppnetError, match="unknown kind of proposal file"):
        export_windows(tmp_path / name, [], [])


def test_export_refuses_what_it_could_not_read_back(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one array of windows per id, got 2 ids and 1 arrays"):
        export_windows(tmp_path / "w.npz", ["a", "b"], [np.zeros((0, 4))])
    with pytest.raises(SppnetError, match="image a occurs more than once"):
        export_windows(tmp_path / "w.npz", ["a", "a"], [np.zeros((0, 4))] * 2)
    assert not list(tmp_path.iterdir())


def test_a_record_finds_its_windows_by_full_id_or_by_stem(tmp_path: Path) -> None:
    export_windows(tmp_path / "w.npz", ["VOC2007/000005", "000007"], [[[0, 0, 5, 5]], [[0, 0, 7, 7]]])
    records = [record("VOC2007/000005"), record("VOC2007/000007"), record("VOC2007/000009")]
    matched = match_records(records, [tmp_path / "w.npz"])
    assert {name: rows.tolist() for name, rows in matched.items()} == {
        "VOC2007/000005": [[0, 0, 5, 5]],
        "VOC2007/000007": [[0, 0, 7, 7]],
    }
    assert match_records(records, []) == {}
    assert match_records([], [tmp_path / "w.npz"]) == {}


@pytest.mark.parametrize("name", ["VOC2007/000005.jpg", "000005.JPG", "000005.pgm", "000005.jpe", "000005"])
def test_a_name_may_end_as_its_picture_does(tmp_path: Path, name: str) -> None:
    export_windows(tmp_path / "w.npz", [name, "VOC2012/1"], [[[0, 0, 5, 5]], [[0, 0, 9, 9]]])
    assert match_records([record("VOC2007/000005")], [tmp_path / "w.npz"])["VOC2007/000005"].tolist() == [[0, 0, 5, 5]]


def test_a_stem_with_a_dot_is_no_suffix(tmp_path: Path) -> None:
    export_windows(tmp_path / "w.npz", ["a.b", "c.jpg"], [[[0, 0, 5, 5]], [[0, 0, 7, 7]]])
    matched = match_records([record("A/a.b"), record("A/c.jpg"), record("A/a")], [tmp_path / "w.npz"])
    assert {key: rows[0, 2] for key, rows in matched.items()} == {"A/a.b": 5, "A/c.jpg": 7}


def test_two_entries_of_one_name_conflict(tmp_path: Path) -> None:
    export_windows(tmp_path / "w.npz", ["5", "5.jpg"], [[[0, 0, 5, 5]]] * 2)
    with pytest.raises(SppnetError, match=r"w\.npz and .*w\.npz \(5\.jpg\) both hold windows of 5"):
        match_records([record("A/5")], [tmp_path / "w.npz"])


@pytest.mark.parametrize("suffix", [".npz", ".mat"])
@pytest.mark.parametrize("names", [["VOC2008/000005", "7"], ["images/000005"], ["5"], []])
def test_files_that_fit_none_of_the_images_name_both(tmp_path: Path, names: list[str], suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    export_windows(path, names, [[[0, 0, 5, 5]]] * len(names))
    records = [record(f"VOC2007/00000{i}") for i in range(5, 10)]
    first = names[0] if names else None
    expected = f"windows of none of the images; its first image is {first}, that of the data VOC2007/000005; name them"
    with pytest.raises(SppnetError, match=expected):
        match_records(records, [path])
    assert match_records(records, [path], needed=False) == {}


def test_a_file_that_fits_none_where_another_does_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("5", "other"):
        export_windows(tmp_path / f"{name}.npz", [name], [[[0, 0, 5, 5]]])
    assert list(match_records([record("A/5")], [tmp_path / "5.npz", tmp_path / "other.npz"])) == ["A/5"]
    assert "other.npz: windows of none of the images; its first image is other, that of the data A/5" in caplog.text
    assert "5.npz: windows" not in caplog.text


def test_the_full_id_wins_over_the_stem_in_another_file(tmp_path: Path) -> None:
    export_windows(tmp_path / "stem.npz", ["000005"], [[[0, 0, 5, 5]]])
    export_windows(tmp_path / "full.npz", ["VOC2007/000005"], [[[0, 0, 7, 7]]])
    matched = match_records([record("VOC2007/000005")], [tmp_path / "stem.npz", tmp_path / "full.npz"])
    assert matched["VOC2007/000005"].tolist() == [[0, 0, 7, 7]]


def test_two_files_with_the_same_entry_conflict(tmp_path: Path) -> None:
    for name in ("one.npz", "two.npz"):
        export_windows(tmp_path / name, ["000005"], [[[0, 0, 5, 5]]])
    with pytest.raises(SppnetError, match=r"one\.npz and .*two\.npz both hold windows of 000005"):
        match_records([record("VOC2007/000005")], [tmp_path / "one.npz", tmp_path / "two.npz"])
    assert match_records([record("VOC2007/000005")], [tmp_path / "one.npz"] * 2)  # named twice is one file


def test_two_records_with_the_same_stem_need_full_ids(tmp_path: Path) -> None:
    export_windows(tmp_path / "w.npz", ["5"], [[[0, 0, 5, 5]]])
    with pytest.raises(SppnetError, match=r"5 fits 2 images, e\.g\. A/5; name them by full id"):
        match_records([record("A/5"), record("B/5")], [tmp_path / "w.npz"])


def test_windows_are_clipped_by_a_pixel_and_refused_farther_outside(tmp_path: Path) -> None:
    export_windows(tmp_path / "w.npz", ["5"], [[[-1, 0, 501, 376]]])
    assert match_records([record("A/5")], [tmp_path / "w.npz"])["A/5"].tolist() == [[0, 0, 500, 375]]
    with pytest.raises(SppnetError, match=r"window of A/5 lies 76 px outside the image of .*\(300, 500\)"):
        match_records([record("A/5", (300, 500))], [tmp_path / "w.npz"])


@pytest.mark.shared_data
@pytest.mark.parametrize("year", ["VOC2007", "VOC2012"])
def test_the_shared_proposals_are_read(shared: Path, year: str) -> None:
    root = shared / "voc"
    windows = import_windows(root / "proposals" / f"selective_search_fast_{year}.npz")
    assert len(windows) == {"VOC2007": 1038, "VOC2012": 1512}[year]
    total = sum(map(len, windows.values()))
    assert total / len(windows) == pytest.approx({"VOC2007": 1344, "VOC2012": 920}[year], abs=1)


@pytest.mark.parametrize("held", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
@pytest.mark.parametrize("suffix", [".npz", ".mat"])
def test_ids_are_one_in_either_form_of_unicode(tmp_path, held, asked, suffix):
    names = [unicodedata.normalize(held, name) for name in ("é1", "A/Å.jpg")]
    export_windows(tmp_path / f"w{suffix}", names, [[[0, 0, 5, 5]], [[1, 1, 4, 4]]])
    ids = [unicodedata.normalize(asked, name) for name in ("A/é1", "A/Å")]
    records = [ImageRecord(name, Path("x.jpg"), (10, 10), "0") for name in ids]
    found = match_records(records, [tmp_path / f"w{suffix}"])
    assert {name: rows.tolist() for name, rows in found.items()} == {ids[0]: [[0, 0, 5, 5]], ids[1]: [[1, 1, 4, 4]]}


def test_two_forms_of_one_id_are_an_error(tmp_path):
    export_windows(tmp_path / "w.npz", [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")], [[], []])
    with pytest.raises(SppnetError, match="image é occurs more than once"):
        import_windows(tmp_path / "w.npz")
