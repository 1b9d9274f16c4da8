"""The strongest responses of a filter, and the pixels that make them."""

import numpy as np
import pytest
import torch
from doubles import picture
from PIL import Image

from sppnet.backbones.probing import probe
from sppnet.classification.strongest import draw_responses, strongest_responses
from sppnet.cli import main
from sppnet.report.drawing import class_colour

FILTER, SIDE = 5, 96


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / "images" / f"{number}.png" for number in range(6)]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        Image.fromarray(picture(96, 96 + 20 * number, number)).save(path)
    return paths


def response_of(classifier, path):
    image = np.asarray(Image.open(path))
    with torch.no_grad():
        return classifier.network.backbone(classifier.runtime.prepare(image, image.shape[:2]))[0, FILTER].numpy()


def test_the_best_are_those_of_a_search_of_all_maps(classifier, images):
    damaged = images[0].with_name("damaged.png")
    damaged.write_bytes(b"none")
    found, skipped = strongest_responses(classifier, [*images, damaged], FILTER, SIDE, count=4, progress=False)
    maps = {path: response_of(classifier, path) for path in images}
    best = sorted(images, key=lambda path: -maps[path].max())[:4]
    assert [response.path for response in found] == best
    assert [response.value for response in found] == pytest.approx([float(maps[p].max()) for p in best], rel=1e-4)
    geometry = classifier.network.backbone.geometry
    for response in found:
        row, column = np.unravel_index(maps[response.path].argmax(), maps[response.path].shape)
        middle = (response.field[:2] + response.field[2:] - 1) / 2
        assert middle.tolist() == [geometry.first_centre + geometry.stride * n for n in (column, row)]
    assert "damaged.png" in skipped[damaged]


def test_the_field_grows_and_shrinks_with_the_image(classifier, tmp_path):
    pixels = Image.fromarray(picture(96, 120)).resize((240, 192), Image.Resampling.NEAREST)
    pixels.save(tmp_path / "large.png")
    (found,), _ = strongest_responses(classifier, [tmp_path / "large.png"], FILTER, SIDE, progress=False)
    field = probe(classifier.network.backbone).field
    assert (found.field[2:] - found.field[:2]).tolist() == [2 * field, 2 * field]


def test_the_sheet_shows_the_field_on_each_image(classifier, images):
    found, _ = strongest_responses(classifier, images[:2], FILTER, SIDE, progress=False)
    sheet = draw_responses(found, FILTER)
    marks = (np.asarray(sheet) == class_colour(0)).all(axis=2)
    assert sheet.size == (2 * 368 + 8, 298 + 8)
    assert marks[:, :376].any()
    assert marks[:, 376:].any()


def test_the_command_writes_the_sheet_and_names_the_images(run, images, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main(["classify", "strongest", str(run), str(images[0].parent), "--filter", "5", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"filter 5: the best 6 of 6 images in {out}"
    assert len(lines) == 7
    values = [float(line.split()[0]) for line in lines[:-1]]
    assert values == sorted(values, reverse=True)
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
