"""Detecting in files, folders and patterns: what is written, what is skipped, what is never overwritten."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sppnet import jobs
from sppnet.backbones import backbone as backbones
from sppnet.detection.detector import SPPDetector
from sppnet.errors import ArtifactError, SppnetError
from sppnet.images import read_image
from sppnet.pipeline import prediction as folder_detection
from sppnet.pipeline.prediction import detect_files
from sppnet.report.drawing import save_image

WINDOWS = np.array([[10, 10, 90, 90], [50, 40, 150, 160], [100, 20, 180, 120], [0, 0, 60, 200]], np.float32)
EVERYTHING = -1.5


@pytest.fixture(scope="module")
def detector(small_run):
    return SPPDetector.load(small_run.root, proposer=lambda image: WINDOWS)


@pytest.fixture
def photos(small_run, tmp_path) -> Path:
    """photos/a.jpg, photos/b.png, photos/deeper/a.jpg and a text file."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    images = sorted((small_run.devkit / "SHAPES/JPEGImages").glob("test*"))
    shutil.copy(images[0], folder / "a.jpg")
    Image.open(images[1]).save(folder / "b.png")
    shutil.copy(images[2], folder / "deeper/a.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_folder_gives_a_picture_per_image_and_two_lists(detector, photos, tmp_path):
    out = tmp_path / "out"
    result = detect_files(lambda: detector, [photos], out, EVERYTHING)
    assert sorted(path.relative_to(photos) for path in result.detections) == [
        Path("a.jpg"), Path("b.png"), Path("deeper/a.jpg")]  # fmt: skip
    assert result.skipped == {}
    assert {path.name for path in out.iterdir()} == {"a.jpg", "b.jpg", "a-2.jpg", "detections.json", "detections.csv"}
    assert read_image(out / "b.jpg").shape == read_image(photos / "b.png").shape


def test_worker_processes_find_what_this_process_finds(small_run, photos, tmp_path, monkeypatch):
    load = partial(SPPDetector.load, small_run.root)
    here = detect_files(load, [photos], tmp_path / "here", EVERYTHING)
    monkeypatch.setattr(jobs, "FEW", 1)
    there = detect_files(load, [photos], tmp_path / "there", EVERYTHING, workers=2)
    assert list(there.detections) == list(here.detections)
    for path, found in here.detections.items():
        other = there.detections[path]
        assert len(found) == len(other) > 0
        assert np.array_equal(found.labels, other.labels)
        np.testing.assert_allclose(found.boxes, other.boxes, atol=0.1)
        np.testing.assert_allclose(found.scores, other.scores, atol=1e-3)
        assert (tmp_path / "there" / path.with_suffix(".jpg").name).exists()


def test_the_lists_hold_the_detections(detector, photos, tmp_path):
    result = detect_files(lambda: detector, [photos / "a.jpg", str(photos / "b.png")], tmp_path, EVERYTHING)
    entries = json.loads((tmp_path / "detections.json").read_text())
    assert [entry["image"] for entry in entries] == [str(photos / "a.jpg"), str(photos / "b.png")]
    assert [entry["picture"] for entry in entries] == ["a.jpg", "b.jpg"]
    rows = list(csv.DictReader((tmp_path / "detections.csv").read_text().splitlines()))
    flat = [(entry["image"], found) for entry in entries for found in entry["detections"]]
    assert len(rows) == len(flat) == sum(map(len, result.detections.values())) > 0
    for row, (image, found) in zip(rows, flat, strict=True):
        assert (row["image"], row["class"], float(row["score"])) == (image, found["class"], found["score"])
        assert [float(row[corner]) for corner in ("x1", "y1", "x2", "y2")] == found["box"]
    found = result.detections[photos / "a.jpg"]
    expected = detector.detect(photos / "a.jpg", threshold=EVERYTHING)
    assert np.array_equal(found.boxes, expected.boxes)
    first = entries[0]["detections"][0]
    assert first["class"] == found.classes[found.labels[0]]
    assert first["score"] == pytest.approx(found.scores[0], abs=1e-6)
    assert first["box"] == pytest.approx(found.boxes[0].tolist(), abs=0.01)


def test_only_scores_at_or_above_the_threshold_are_listed(detector, photos, tmp_path):
    everything = detect_files(lambda: detector, [photos / "a.jpg"], tmp_path / "1", EVERYTHING).detections[
        photos / "a.jpg"
    ]
    threshold = float(everything.scores[2])
    found = detect_files(lambda: detector, [photos / "a.jpg"], tmp_path / "2", threshold).detections[photos / "a.jpg"]
    assert len(found) == 3
    nothing = detect_files(lambda: detector, [photos / "a.jpg"], tmp_path / "3", 1e6)
    assert len(nothing.detections[photos / "a.jpg"]) == 0
    assert json.loads((tmp_path / "3/detections.json").read_text())[0]["detections"] == []
    assert (tmp_path / "3/detections.csv").read_text().strip() == "image,class,score,x1,y1,x2,y2"
    assert (tmp_path / "3/a.jpg").is_file()


def test_a_pattern_names_the_images_it_matches(detector, photos, tmp_path):
    result = detect_files(lambda: detector, [str(photos / "*.png")], tmp_path / "out", EVERYTHING)
    assert list(result.detections) == [photos / "b.png"]
    deep = detect_files(lambda: detector, [str(photos / "**/a.*")], tmp_path / "deep", EVERYTHING)
    assert list(deep.detections) == [photos / "a.jpg", photos / "deeper/a.jpg"]


def test_an_image_named_twice_is_searched_once(detector, photos, tmp_path):
    result = detect_files(
        lambda: detector, [photos / "a.jpg", photos / "a.jpg", str(photos / "a*")], tmp_path, EVERYTHING
    )
    assert list(result.detections) == [photos / "a.jpg"]


def test_unreadable_images_are_skipped_with_the_reason(detector, photos, tmp_path):
    whole = (photos / "a.jpg").read_bytes()
    (photos / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "text.jpg").write_text("no image")
    result = detect_files(lambda: detector, [photos], tmp_path / "out", EVERYTHING)
    assert {path.name for path in result.skipped} == {"half.jpg", "text.jpg"}
    assert "half.jpg: expected a complete image" in result.skipped[photos / "half.jpg"]
    assert "text.jpg: expected an image" in result.skipped[photos / "text.jpg"]
    assert len(result.detections) == 3
    assert not (tmp_path / "out/half.jpg").exists()
    assert len(json.loads((tmp_path / "out/detections.json").read_text())) == 3


def test_images_too_narrow_for_the_network_are_skipped_with_the_reason(detector, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "map_side", lambda steps, side: 0)
    result = detect_files(lambda: detector, [photos], tmp_path / "out", EVERYTHING)
    assert len(result.skipped) == 3
    assert json.loads((tmp_path / "out/detections.json").read_text()) == []
    assert all("pixels is too narrow" in reason and str(path) in reason for path, reason in result.skipped.items())


def test_an_interruption_keeps_what_was_found(detector, photos, tmp_path, monkeypatch):
    def interrupt(path):
        if path.name == "b.png":
            raise KeyboardInterrupt
        return read_image(path)

    monkeypatch.setattr(folder_detection, "read_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        detect_files(lambda: detector, [photos], tmp_path / "out", EVERYTHING)
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    assert [entry["picture"] for entry in entries] == ["a.jpg"]
    assert (tmp_path / "out/detections.csv").read_text().count("a.jpg") == len(entries[0]["detections"]) > 0


def test_no_two_pictures_share_a_name(detector, photos, tmp_path):
    for name in ("A.png", "a-2.png"):
        shutil.copy(photos / "b.png", photos / name)
    detect_files(lambda: detector, [photos], tmp_path / "out", EVERYTHING)
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    names = {entry["picture"].lower() for entry in entries}
    assert len(entries) == len(names) == 5
    assert {path.name.lower() for path in (tmp_path / "out").glob("*.jpg")} == names


def test_drawn_pictures_are_not_searched_wherever_they_lie(detector, photos):
    own = sorted(photos.rglob("*.*g"))
    for out in ("found", "found/strict", "deeper/other", "found"):
        result = detect_files(lambda: detector, [photos], photos / out, EVERYTHING)
        assert list(result.detections) == own
    assert "not searched: 9 pictures that detections are drawn on" in result.note
    (photos / "found").rename(photos / "elsewhere")
    shutil.copy(photos / "elsewhere/a.jpg", photos / "copy of a.jpg")
    (photos / "elsewhere/detections.json").unlink()
    assert list(detect_files(lambda: detector, [photos], photos / "last", EVERYTHING).detections) == own
    with pytest.raises(SppnetError, match=r"copy of a\.jpg: a picture that detections are drawn on already"):
        detect_files(lambda: detector, [photos / "copy of a.jpg"], photos / "none", EVERYTHING)


def test_a_call_into_the_same_folder_goes_on_after_an_interruption_and_with_fewer_photos(detector, photos, monkeypatch):
    out, stop = photos / "found", [photos / "b.png"]

    def interrupt(path):
        if path in stop:
            raise KeyboardInterrupt
        return read_image(path)

    monkeypatch.setattr(folder_detection, "read_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        detect_files(lambda: detector, [photos], out, EVERYTHING)
    stop.clear()
    assert len(detect_files(lambda: detector, [photos], out, EVERYTHING).detections) == 3
    (photos / "b.png").unlink()
    for _ in range(2):
        assert len(detect_files(lambda: detector, [photos], out, EVERYTHING).detections) == 2


@pytest.mark.parametrize("name", ["a.jpg", "a-2.jpg", "detections.json", "detections.csv"])
def test_files_of_the_user_in_the_folder_of_results_are_never_overwritten(detector, photos, tmp_path, name):
    def load():
        raise AssertionError("nothing may be computed")

    own = tmp_path / "out" / name
    own.parent.mkdir()
    shutil.copy(photos / "a.jpg", own) if name.endswith(".jpg") else own.write_text("{}")
    before = own.read_bytes()
    with pytest.raises(SppnetError, match=rf"{name}: would be overwritten and is not of an earlier call; choose"):
        detect_files(load, [photos], own.parent, EVERYTHING)
    assert own.read_bytes() == before
    assert list(own.parent.iterdir()) == [own]


def test_other_files_of_the_user_there_stay(detector, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    shutil.copy(photos / "a.jpg", tmp_path / "out/mine.jpg")
    for _ in range(2):
        detect_files(lambda: detector, [photos], tmp_path / "out", EVERYTHING)
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    assert (tmp_path / "out/mine.jpg").read_bytes() == (photos / "a.jpg").read_bytes()


@pytest.mark.parametrize("inside", ["", "deeper/"])
def test_a_folder_of_results_that_cannot_be_is_refused_first(photos, tmp_path, inside):
    def load():
        raise AssertionError("nothing may be computed")

    (tmp_path / "file").touch()
    with pytest.raises(SppnetError, match=r"cannot write here \((File exists|Not a directory)\); expected a folder"):
        detect_files(load, [photos], tmp_path / "file" / inside, EVERYTHING)


ODD = {  # what to make of a path, and what is said of it
    "empty.jpg": (lambda path: path.touch(), "an empty file"),
    "pipe.jpg": (os.mkfifo, "a folder, pipe or device"),
    "gone.png": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "photo.heic": (lambda path: path.write_bytes(b"ftypheic"), "save it as JPEG"),
    "long.png": (lambda path: Image.new("RGB", (60_000, 4)).save(path), r"smaller scale \(a detector: maps\.max_side"),
    "dot.png": (lambda path: Image.new("RGB", (1, 1)).save(path), None),
    "thin.png": (lambda path: Image.new("RGB", (3, 500)).save(path), None),
}


def test_odd_files_do_not_end_the_folder(detector, photos, tmp_path):
    for name, (make, _) in ODD.items():
        make(photos / name)
    (photos / "folder.jpg").mkdir()
    shutil.copy(photos / "a.jpg", photos / "folder.jpg/inside.jpg")
    result = detect_files(lambda: detector, [photos], tmp_path / "out", EVERYTHING)
    for name, (_, reason) in ODD.items():
        skipped = result.skipped.get(photos / name)
        assert (reason is None) == (skipped is None), name
        assert reason is None or (re.search(reason, skipped) and name in skipped)
    expected = {photos / "folder.jpg/inside.jpg", photos / "a.jpg", photos / "b.png", photos / "deeper/a.jpg"}
    assert expected <= set(result.detections)
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    assert len(entries) == len(result.detections) == len(list((tmp_path / "out").glob("*.jpg")))


REFUSED = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    RuntimeError("Exception from src/inference/src/cpp/infer_request.cpp: std::bad_alloc"),
    RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"),
]


@pytest.mark.parametrize("error", REFUSED, ids=str)
def test_an_image_that_the_memory_does_not_hold_is_skipped(detector, photos, tmp_path, error):
    class Full:
        proposer, config = staticmethod(detector.proposer), detector.config

        def detect(self, image, windows, threshold):
            if image.shape == read_image(photos / "b.png").shape:
                raise error
            return detector.detect(image, windows, threshold=threshold)

    Image.new("RGB", (99, 77)).save(photos / "b.png")
    result = detect_files(Full, [photos], tmp_path / "out", EVERYTHING)
    assert list(result.skipped) == [photos / "b.png"]
    assert "b.png: not enough memory" in result.skipped[photos / "b.png"]
    assert len(result.detections) == 2


def test_any_other_failure_is_no_matter_of_an_image(photos, tmp_path):
    class Broken:
        proposer = staticmethod(lambda image: WINDOWS)

        def detect(self, image, windows, threshold):
            raise RuntimeError("a shape is wrong")

    with pytest.raises(RuntimeError, match="a shape is wrong"):
        detect_files(Broken, [photos], tmp_path / "out", EVERYTHING)


def test_a_full_disk_ends_it_and_keeps_what_is_done(detector, photos, tmp_path, monkeypatch):
    def full(picture, path):
        if path.name == "b.jpg":
            raise ArtifactError(f"{path}: cannot write (No space left on device)")
        save_image(picture, path)

    monkeypatch.setattr(folder_detection, "save_image", full)
    with pytest.raises(ArtifactError, match="No space left"):
        detect_files(lambda: detector, [photos], tmp_path / "out", EVERYTHING)
    assert [entry["picture"] for entry in json.loads((tmp_path / "out/detections.json").read_text())] == ["a.jpg"]


@pytest.mark.parametrize("length", [246, 251, 255])
def test_the_longest_names_are_kept_or_cut(detector, photos, tmp_path, length):
    for start in ("写", "x"):  # several bytes a letter, and one
        name = (start * length).encode()[: length - 4].decode(errors="ignore")
        shutil.copy(photos / "b.png", photos / f"{name}.png")
    result = detect_files(lambda: detector, [photos], tmp_path / "out", EVERYTHING)
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    assert len(result.detections) == len(entries) == 5
    assert {path.name for path in (tmp_path / "out").glob("*.jpg")} == {entry["picture"] for entry in entries}


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"\xff\xfe.jpg", b"line\nbreak.jpg", b'a "b", {}$_%.jpg'])
def test_names_of_any_bytes_are_listed(detector, photos, tmp_path, name):
    path = photos / os.fsdecode(name)
    shutil.copy(photos / "a.jpg", path)
    result = detect_files(lambda: detector, [photos], tmp_path / "out", EVERYTHING)
    assert path in result.detections
    assert (tmp_path / "out" / path.name).is_file()
    entries = json.loads((tmp_path / "out/detections.json").read_bytes().decode())
    listed = name.decode(errors="backslashreplace")
    assert f"{photos}/{listed}" in [entry["image"].encode().decode() for entry in entries]
    with (tmp_path / "out/detections.csv").open(encoding="utf-8", newline="") as file:
        assert f"{photos}/{listed}" in [row["image"] for row in csv.DictReader(file)]


def test_an_image_that_was_asked_for_is_never_overwritten(detector, photos):
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    for asked in ([photos], [photos / "a.jpg"], [str(photos / "*.jpg")], [photos / "deeper", photos / "b.png"]):
        with pytest.raises(SppnetError, match=r"lies in .*, where a picture could overwrite it; choose another --out"):
            detect_files(lambda: detector, asked, photos, EVERYTHING)
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before


def test_a_path_that_names_no_image_is_an_error(detector, tmp_path):
    with pytest.raises(SppnetError, match=r"none: no such file, folder or match"):
        detect_files(lambda: detector, [tmp_path / "none"], tmp_path / "out", EVERYTHING)
    assert not (tmp_path / "out").exists()


def test_folders_are_named_by_text_or_path(detector, photos, tmp_path):
    found = detect_files(lambda: detector, str(photos), str(tmp_path / "out"), EVERYTHING)
    assert list(found.detections) == list(detect_files(lambda: detector, photos, tmp_path / "2", EVERYTHING).detections)
    assert (tmp_path / "out/detections.json").read_text() == (tmp_path / "2/detections.json").read_text()


# ---- several calls into one folder ---------------------------------------------------------------------------------


def listed(out: Path) -> dict[str, tuple[str, int]]:
    """By image: its picture and how many detections; the table has as many."""
    entries = json.loads((out / "detections.json").read_text())
    rows = [row["image"] for row in csv.DictReader((out / "detections.csv").read_text().splitlines())]
    assert rows == [entry["image"] for entry in entries for _ in entry["detections"]]
    return {entry["image"]: (entry["picture"], len(entry["detections"])) for entry in entries}


def test_a_later_call_keeps_what_was_found_in_other_images(detector, photos, tmp_path):
    out = tmp_path / "out"
    detect_files(lambda: detector, photos / "a.jpg", out, EVERYTHING)
    first, picture = listed(out), (out / "a.jpg").read_bytes()
    other = detect_files(lambda: detector, [photos / "deeper", photos / "b.png"], out, EVERYTHING)
    assert other.note == "kept in the lists: 1 image of earlier calls"
    assert [name for name, _ in listed(out).values()] == ["a.jpg", "b.jpg", "a-2.jpg"]
    assert first.items() <= listed(out).items()
    assert (out / "a.jpg").read_bytes() == picture
    again = detect_files(lambda: detector, photos / "deeper", out, 1e6)
    assert again.note == "replaced: 1 picture of earlier calls; kept in the lists: 2 images of earlier calls"
    assert listed(out)[str(photos / "deeper/a.jpg")] == ("a-2.jpg", 0)
    assert len(listed(out)) == len(list(out.glob("*.jpg"))) == 3


def test_a_picture_that_is_gone_takes_its_entry_with_it_and_that_is_said(detector, photos, tmp_path):
    out = tmp_path / "out"
    detect_files(lambda: detector, photos, out, EVERYTHING)
    for name in ("b.jpg", "a.jpg"):
        (out / name).unlink()
    found = detect_files(lambda: detector, photos / "a.jpg", out, EVERYTHING)
    assert found.note.endswith("no longer in the lists, since the pictures are gone: 1 image of earlier calls")
    assert {picture for picture, _ in listed(out).values()} == {"a.jpg", "a-2.jpg"}


def test_an_interrupted_second_call_loses_nothing_of_the_first(detector, photos, tmp_path, monkeypatch):
    shutil.copy(photos / "a.jpg", photos / os.fsdecode(b"caf\xe9.jpg"))
    out, before = tmp_path / "out", None
    for stop in (None, "b.png", "a.jpg"):
        monkeypatch.setattr(folder_detection, "read_image", lambda path, stop=stop: interrupted_at(path, stop))
        try:
            detect_files(lambda: detector, photos, out, EVERYTHING)
        except KeyboardInterrupt:
            assert listed(out) == before
        before = listed(out)
    assert len(before) == 4


def interrupted_at(path, stop):
    if path.name == stop:
        raise KeyboardInterrupt
    return read_image(path)


@pytest.mark.parametrize(
    "text", ["[1]", '[{"image": "a", "detections": [{"box": 1}]}]', '{"image": []}', "[[[]]]", "x", "{}", '""']
)
def test_a_list_of_something_else_is_never_overwritten(photos, tmp_path, text):
    (tmp_path / "detections.json").write_text(text)
    with pytest.raises(SppnetError, match=r"detections\.json: would be overwritten and is not of an earlier call"):
        detect_files(lambda: None, [photos / "a.jpg"], tmp_path, EVERYTHING)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["detections.json"]


def test_images_without_windows_are_named_with_the_setting(small_run, photos, tmp_path):
    load = partial(SPPDetector.load, small_run.root)
    Image.new("RGB", (400, 12)).save(photos / "thin.png")
    note = detect_files(load, photos, tmp_path / "one", EVERYTHING).note
    assert note.startswith(
        f"passed over: 1 .txt; 1 image has no candidate window: {photos}/thin.png (proposals.min_side"
    )
    Image.new("RGB", (12, 400)).save(photos / "slim.png")
    note = detect_files(load, photos, tmp_path / "two", EVERYTHING).note
    assert f"2 images have no candidate window: {photos}/slim.png (proposals.min_side=20)" in note
