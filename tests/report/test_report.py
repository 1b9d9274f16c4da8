from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from sppnet.evaluation.results import ClassResult, PRCurve, VOCEvaluation
from sppnet.records import Detections
from sppnet.report import fonts
from sppnet.report.drawing import Picture, class_colour, contact_sheet, draw_detections, is_drawn, save_image
from sppnet.report.plots import draw_precision_recall

CLASSES = ("cat", "dog")


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def detections(*found: tuple) -> Detections:
    """Detections as (label, score, x1, y1, x2, y2)."""
    return Detections(
        np.array([f[2:] for f in found], dtype=np.float32).reshape(-1, 4),
        np.array([f[1] for f in found], dtype=np.float32),
        np.array([f[0] for f in found], dtype=np.int64),
        CLASSES,
    )


def extent(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The half-open rectangle that holds every pixel of a colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


# ---- drawn boxes ----------------------------------------------------------------------------------------------------


def test_a_box_is_drawn_on_its_own_pixels_in_the_colour_of_its_class():
    picture = draw_detections(grey(200, 300), detections((1, 0.5, 40, 60, 240, 180)))
    pixels = np.asarray(picture)
    for y, x in [(70, 40), (70, 239), (179, 100), (60, 230)]:
        assert tuple(pixels[y, x]) == class_colour(1)
    assert extent(picture, class_colour(1))[::2] == (40, 240)
    assert extent(picture, class_colour(1))[3] == 180
    assert (pixels[100:170, 60:230] == 128).all()


def test_the_tag_stands_on_top_of_its_box():
    picture = draw_detections(grey(200, 300), detections((0, 0.5, 40, 60, 240, 180)))
    left, top, _, _ = extent(picture, class_colour(0))
    assert left == 40
    assert 40 < top < 55


def test_lines_and_tags_grow_with_the_image():
    small = draw_detections(grey(200, 300), detections((0, 0.5, 40, 60, 240, 180)))
    large = draw_detections(grey(2000, 3000), detections((0, 0.5, 400, 600, 2400, 1800)))
    assert (np.asarray(small)[150, :100] != 128).any(axis=1).sum() == 1
    assert (np.asarray(large)[1500, :1000] != 128).any(axis=1).sum() == 14
    assert 600 - extent(large, class_colour(0))[1] > 60


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (200, 3), (24, 30), (375, 500)])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.6, 0.6, 1, 1), (-50, -50, 9000, 9000), (0, 0.9, 1, 3)])
def test_an_image_of_any_size_is_drawn_on_and_keeps_its_size(height, width, box):
    picture = draw_detections(grey(height, width), detections((0, -1.25, *box)))
    assert picture.size == (width, height)


@pytest.mark.parametrize("corner", [(0, 0), (450, 0), (0, 340), (450, 340)])
def test_the_whole_tag_is_inside_the_image_at_every_corner(corner):
    shape, colour = (375, 500), class_colour(0)
    inner = draw_detections(grey(*shape), detections((0, 0.5, 200, 200, 250, 235)))
    picture = draw_detections(grey(*shape), detections((0, 0.5, *corner, corner[0] + 50, corner[1] + 35)))
    tag = [(np.asarray(p) == 255).all(axis=2).sum() for p in (inner, picture)]
    assert tag[0] == tag[1] > 0, "the letters, white on this colour, are complete"
    assert extent(picture, colour)[2] <= 500


def test_tags_of_neighbouring_boxes_do_not_hide_each_other():
    one = draw_detections(grey(375, 500), detections((0, 0.5, 100, 100, 300, 300)))
    two = draw_detections(grey(375, 500), detections((0, 0.5, 100, 100, 300, 300), (0, 0.5, 102, 102, 302, 302)))
    letters = [(np.asarray(picture) == 255).all(axis=2).sum() for picture in (one, two)]
    assert letters[1] == 2 * letters[0]


def test_in_a_crowd_only_the_best_tags_that_can_be_read_are_drawn():
    one = draw_detections(grey(375, 500), detections((0, 1, 200, 200, 210, 210)))
    crowd = draw_detections(grey(375, 500), detections(*[(0, 1, 200, 200, 210, 210)] * 50))
    letters = [(np.asarray(picture) == 255).all(axis=2).sum() for picture in (one, crowd)]
    assert letters[1] % letters[0] == 0
    assert 1 < letters[1] // letters[0] < 8


def test_detections_below_the_threshold_and_outside_the_image_are_not_drawn():
    found = detections((0, 0.9, 500, 500, 600, 600), (1, 0.1, 20, 20, 60, 60), (1, 0.8, -30, 30, 0, 60))
    assert (np.asarray(draw_detections(grey(100, 100), found, threshold=0.5)) == 128).all()


def test_no_detections_leave_the_image_as_it_is():
    image = grey(20, 30)
    picture = draw_detections(image, detections())
    assert (np.asarray(picture) == image).all()


def test_drawing_does_not_change_the_image_it_was_given():
    image = grey(100, 100)
    draw_detections(image, detections((0, 1, 10, 10, 50, 50)))
    assert (image == 128).all()


def test_the_colours_of_twenty_classes_are_far_apart_and_more_exist():
    colours = np.array([class_colour(index) for index in range(20)], dtype=float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 1e3 * np.eye(20)
    assert distances.min() > 45
    assert len({class_colour(index) for index in range(100)}) == 100


def test_an_image_that_is_not_rgb_bytes_is_an_error():
    with pytest.raises(ValueError, match=r"image must be a uint8 RGB array .* got uint8 of shape \(4, 4\)"):
        draw_detections(np.zeros((4, 4), dtype=np.uint8), detections())
    with pytest.raises(ValueError, match=r"got float64 of shape \(4, 4, 3\); scale it"):
        draw_detections(np.zeros((4, 4, 3)), detections())


@pytest.mark.parametrize("name", ["a/b/c.png", "c.JPG"])
def test_a_saved_picture_can_be_read_back(tmp_path, name):
    save_image(Image.fromarray(grey(20, 30)), tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.size == (30, 20)


def test_a_picture_of_unknown_format_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"c\.xyz: a picture is written as \.png, \.jpg, \.jpeg, got '\.xyz'"):
        save_image(Image.fromarray(grey(2, 2)), tmp_path / "c.xyz")


# ---- contact sheet --------------------------------------------------------------------------------------------------


def test_a_sheet_has_one_cell_per_picture_and_shrinks_boxes_with_their_image():
    picture = Picture(grey(400, 400), detections((1, 0.5, 100, 200, 300, 400)), "a caption that is far too long " * 9)
    sheet = contact_sheet([picture] * 3, columns=2, cell=(100, 200))
    assert sheet.size == (2 * 208 + 8, 2 * 128 + 8)
    first = sheet.crop((8, 8, 208, 108))
    left, _, right, bottom = extent(first, class_colour(1))
    assert left == 50 + 25
    assert right >= 50 + 75
    assert bottom == 100
    assert (np.asarray(sheet)[8:236, 208:216] == 255).all(), "captions are cut at the edge of their cell"


def test_small_images_are_not_enlarged():
    sheet = contact_sheet([Picture(np.zeros((10, 20, 3), dtype=np.uint8), detections())], cell=(100, 200))
    left, top, right, bottom = extent(sheet.crop((8, 8, 208, 108)), (0, 0, 0))
    assert (right - left, bottom - top) == (20, 10)


def test_a_sheet_without_pictures_says_so():
    assert (np.asarray(contact_sheet([])) < 100).any()


# ---- curves ---------------------------------------------------------------------------------------------------------


def evaluation(count: int) -> VOCEvaluation:
    """Class 0 is absent, class 1 has no detections, the others have a falling curve."""
    empty = PRCurve(*(np.zeros(0) for _ in range(3)))
    falling = PRCurve(np.linspace(0.1, 0.8, 8), np.linspace(1, 0.4, 8), np.linspace(2, -1, 8))
    results = [ClassResult(None, empty, 0, 0), ClassResult(0.0, empty, 4, 0)]
    results += [ClassResult(0.6, falling, 10, 8)] * count
    return VOCEvaluation({f"class{i}": r for i, r in enumerate(results[:count])}, "area", 0.5, False)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_precision_recall_has_a_panel_per_class(count):
    width, height = draw_precision_recall(evaluation(count)).size
    assert width > 250 * min(count, 4)
    assert height > 250 * count / 6


def test_curves_are_drawn_without_the_global_state_of_pyplot():
    code = "import sys, sppnet.report.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("count", [49, 1000])
def test_of_many_classes_the_worst_are_drawn_in_seconds(count, monkeypatch):
    curve = PRCurve(np.linspace(0.1, 0.8, 8), np.linspace(1, 0.4, 8), np.linspace(2, -1, 8))
    results = {f"class{i}": ClassResult(i / count if i % 2 else None, curve, 3, 8) for i in range(count)}
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **options: titles.append(text))
    picture = draw_precision_recall(VOCEvaluation(results, "area", 0.5, False))
    assert len(titles) == 48
    assert picture.size[0] * picture.size[1] < 5_000_000
    lowest = [f"class{i}" for i in range(1, count, 2)][:48]
    assert {title.split()[0] for title in titles} >= set(lowest)


# ---- names in any alphabet ------------------------------------------------------------------------------------------

ALPHABETS = {
    "Cyrillic": ("кот", "пёс"),
    "Greek": ("αβγ", "δεζ"),
    "Chinese": ("猫", "犬"),
    "Korean": ("고양이", "개"),
    "Thai": ("แมว", "หมา"),
    "Arabic": ("قط", "كل"),
    "Hebrew": ("חתול", "כלב"),
    "accents": ("žluť", "žlut"),
    "pictures": ("😀", "😁"),
    "controls": ("a\nb", "a\tb"),
    "halves": ("\udce9", "\udcea"),
}
SPECIAL = [
    "$5_$10 note",
    "$$",
    r"\frac{a}",
    "a_b^{2}",
    "50 %",
    "{}",
    "x" * 300,
    *(pair[0] for pair in ALPHABETS.values()),
]


def named(name: str) -> Detections:
    return Detections(np.array([[20, 40, 160, 100]], np.float32), np.array([0.5], np.float32), np.array([0]), (name,))


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_different_names_are_drawn_differently_in_every_alphabet(alphabet):
    one, other = (np.asarray(draw_detections(grey(120, 400), named(name))) for name in ALPHABETS[alphabet])
    assert not np.array_equal(one, other)
    one, other = (np.asarray(contact_sheet([Picture(grey(9, 9), detections(), name)])) for name in ALPHABETS[alphabet])
    assert not np.array_equal(one, other)


def test_letters_that_no_font_has_are_escapes_and_the_log_says_so_once(caplog, monkeypatch):
    fonts._warn_once.cache_clear()
    monkeypatch.setattr(fonts, "_letters", lambda path: fonts.BASIC | {ord(letter) for letter in "кот"})
    fonts.legible.cache_clear()
    with caplog.at_level("WARNING", "sppnet"):
        assert [fonts.legible(text) for text in ("кот", "кит", "сам\n")] == [
            "кот",
            r"к\u0438т",
            r"\u0441\u0430\u043c\n",
        ]
    fonts.legible.cache_clear()
    assert caplog.messages == [
        "no font of this system has all letters of the names: pictures show those it lacks as codes"
    ]


@pytest.mark.parametrize("name", [*SPECIAL, *(one for one, _ in ALPHABETS.values())])
def test_a_name_of_any_letters_is_the_title_of_its_curve(name):
    curve = PRCurve(*(np.linspace(0, 1, 3) for _ in range(3)))
    results = {name: ClassResult(0.5, curve, 3, 3), name + " ": ClassResult(None, curve, 0, 0)}
    titles = []
    set_title = Axes.set_title

    def spy(axes, text, **options):
        titles.append((text, options["parse_math"]))
        return set_title(axes, text, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "set_title", spy)
        draw_precision_recall(VOCEvaluation(results, "area", 0.5, False))  # warnings of missing letters are errors
    assert titles[0][0].startswith(fonts.legible(name)[:17])
    assert not any(mathematics for _, mathematics in titles)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_drawn_pictures_are_known_by_their_mark(tmp_path, name):
    Image.fromarray(grey(20, 30)).save(tmp_path / name)
    assert not is_drawn(tmp_path / name)
    save_image(Image.fromarray(grey(20, 30)), tmp_path / name)
    assert is_drawn(tmp_path / name)
    assert not is_drawn(tmp_path)
    assert not is_drawn(tmp_path / "none.jpg")


@pytest.mark.parametrize("size", [(65_501, 3), (4, 70_000), (65_500, 2)])
def test_a_picture_longer_than_a_jpeg_may_be_is_shrunk(tmp_path, size):
    save_image(Image.new("RGB", size), tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as picture:
        assert max(picture.size) == 65_500
        assert min(picture.size) in (min(size), min(size) - 1)
