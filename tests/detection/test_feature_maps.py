"""Maps of an image, computed once and kept on disk."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import picture, picture_record, random_backbone

from sppnet import distributed
from sppnet.backbones.runtime import make_runtime
from sppnet.config import BackboneSettings, MapSettings
from sppnet.detection import feature_maps
from sppnet.detection.feature_maps import compute_maps, count_cells, extract_images, read_maps, rounded, write_maps
from sppnet.errors import ArtifactError, BackboneError
from sppnet.images import flip_image, prepare
from sppnet.pipeline.networks import load_runtime
from sppnet.records import ImageRecord

BACKBONE = random_backbone("tiny5")
RUNTIME = make_runtime(BACKBONE, "torch")
FULL = MapSettings(scales=(64, 96), storage="float32")


@pytest.fixture
def records(tmp_path):
    sizes = [(60, 90), (80, 50), (70, 70)]
    return [picture_record(tmp_path, f"{i}", picture(*size, seed=i)) for i, size in enumerate(sizes)]


def upright(records):
    return [(record, False) for record in records]


def both(records):
    """Of every record the image, then its mirror image."""
    return [*upright(records), *((record, True) for record in records)]


def test_there_is_one_map_a_scale_of_the_resized_image():
    image = picture(60, 90)
    maps = compute_maps(RUNTIME, image, FULL)
    assert maps.sides == (64.0, 96.0)
    assert maps.image_size == (60, 90)
    for feature_map, size in zip(maps.maps, [(64, 96), (96, 144)], strict=True):
        weights = BACKBONE.weights
        with torch.no_grad():
            expected = BACKBONE(prepare(image, size, weights.channel_order, weights.mean, weights.std))[0]
        assert feature_map.shape == (BACKBONE.channels, *BACKBONE.map_size(size))
        torch.testing.assert_close(feature_map, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])  # of what a runtime gives
def test_maps_lie_in_memory_as_window_pooling_reads_them_fastest(layout):
    runtime = replace(RUNTIME, run=lambda images: RUNTIME(images).contiguous(memory_format=layout))
    for feature_map in compute_maps(runtime, picture(60, 90), FULL).maps:
        assert feature_map.permute(1, 2, 0).is_contiguous()
        assert not feature_map.requires_grad


def test_a_long_image_is_computed_at_a_smaller_scale():
    maps = compute_maps(RUNTIME, picture(50, 100), MapSettings(scales=(64, 96), max_side=100))
    assert maps.sides == (50.0, 50.0)
    assert {tuple(m.shape[1:]) for m in maps.maps} == {BACKBONE.map_size((50, 100))}


def test_an_image_too_narrow_for_its_bound_is_named_in_pixels():
    squeezed = make_runtime(random_backbone("squeezenet1_1"), "torch")
    with pytest.raises(
        BackboneError, match=r"an image of 2000 × 20 pixels is too narrow: .*expected an image large enough"
    ):
        compute_maps(squeezed, np.zeros((20, 2000, 3), np.uint8), MapSettings(scales=(64,), max_side=64))


def test_a_file_whose_image_is_too_narrow_is_named(tmp_path):
    record = picture_record(tmp_path, "narrow", np.zeros((20, 2000, 3), np.uint8))
    squeezed = make_runtime(random_backbone("squeezenet1_1"), "torch")
    settings = MapSettings(scales=(64,), max_side=64)
    with pytest.raises(BackboneError, match=r"narrow\.png: an image of 2000 × 20 pixels is too narrow: "):
        extract_images([(record, False)], lambda: squeezed, settings, tmp_path / "maps", progress=False)


def test_cells_are_counted_over_all_scales_and_images_without_are_named_once():
    settings, squeezed = MapSettings(scales=(64, 96), max_side=200), random_backbone("squeezenet1_1")
    records = [ImageRecord(f"TOY/{i}", Path(f"{i}.png"), size, "") for i, size in enumerate([(60, 90), (90, 30)])]
    expected = [[(64, 96), (96, 144)], [(192, 64), (200, 67)]]  # the last is bounded
    cells = [sum(np.prod(squeezed.map_size(size)) for size in sizes) for sizes in expected]
    assert count_cells(records, squeezed, settings).tolist() == cells
    narrow = [ImageRecord(f"TOY/n{i}", Path(f"n{i}.png"), (10, 900), "") for i in range(5)]
    first = r"^n0\.png: an image of 900 × 10 pixels has no map: .*, or leave it out"
    for count, more in ((1, ""), (2, "; 1 more: TOY/n1"), (5, "; 4 more: TOY/n1, TOY/n2, TOY/n3")):
        with pytest.raises(BackboneError, match=f"{first}{more}$"):
            count_cells([*records, *narrow[:count], *narrow[:count]], squeezed, settings)


def test_half_precision_in_the_convolutions_stays_close():
    image = picture(60, 90)
    exact = compute_maps(RUNTIME, image, FULL).maps[0]
    rough = compute_maps(make_runtime(BACKBONE, "torch", "bfloat16"), image, MapSettings(scales=(64,))).maps[0]
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() / exact.norm() < 0.03


def test_maps_in_full_precision_come_back_as_they_were(tmp_path, records):
    maps = compute_maps(RUNTIME, picture(60, 90), FULL)
    write_maps(records[0].path_in(tmp_path, False), rounded(maps, FULL))
    found = read_maps(tmp_path, records[0])
    assert (found.sides, found.image_size) == (maps.sides, maps.image_size)
    for own, expected in zip(found.maps, maps.maps, strict=True):
        assert torch.equal(own, expected)
        assert own.permute(1, 2, 0).is_contiguous()


def test_maps_in_half_precision_come_back_rounded(tmp_path, records):
    half = FULL.model_copy(update={"storage": "float16"})
    maps = compute_maps(RUNTIME, picture(60, 90), half)
    write_maps(records[0].path_in(tmp_path, False), rounded(maps, half))
    for own, expected in zip(read_maps(tmp_path, records[0]).maps, maps.maps, strict=True):
        assert own.permute(1, 2, 0).is_contiguous()
        assert own.dtype == torch.float16
        assert torch.equal(own, expected.half())


def test_values_beyond_half_precision_become_its_largest_number(tmp_path, records):
    huge = feature_maps.FeatureMaps((torch.tensor([[[1e6]], [[-1e6]]]),), (64.0,), (10, 10))
    write_maps(records[0].path_in(tmp_path, False), rounded(huge, MapSettings(storage="float16")))
    assert read_maps(tmp_path, records[0]).maps[0].flatten().tolist() == [65504, -65504]


def test_every_record_gets_the_maps_of_its_image_and_of_the_mirror_image(tmp_path, records):
    done = extract_images(both(records), lambda: RUNTIME, FULL, tmp_path / "maps", progress=False)
    assert (done.computed, done.reused) == (6, 0)
    for index, record in enumerate(records):
        image = picture(*record.size, seed=index)
        for flip, pixels in ((False, image), (True, flip_image(image))):
            for own, expected in zip(
                read_maps(tmp_path / "maps", record, flip).maps, compute_maps(RUNTIME, pixels, FULL).maps, strict=True
            ):
                assert torch.equal(own, expected)


def test_the_size_on_disk_is_reported(tmp_path, records):
    done = extract_images(upright(records), lambda: RUNTIME, FULL, tmp_path / "maps", progress=False)
    assert done.gigabytes == sum(path.stat().st_size for path in (tmp_path / "maps").rglob("*.npz")) / 1e9


def test_a_second_run_computes_only_what_is_missing(tmp_path, records):
    folder = tmp_path / "maps"
    extract_images(both(records), lambda: RUNTIME, FULL, folder, progress=False)
    records[1].path_in(folder, True).unlink()
    others = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.npz")}
    done = extract_images(both(records), lambda: RUNTIME, FULL, folder, progress=False)
    assert (done.computed, done.reused) == (1, 5)
    assert all((path.stat().st_mtime_ns, path.read_bytes()) == before for path, before in others.items())
    assert records[1].path_in(folder, True).exists()


def test_an_interruption_leaves_whole_maps_only(tmp_path, records, monkeypatch):
    def interrupted(backbone, image, settings):
        if image.shape[:2] == records[1].size:
            raise KeyboardInterrupt
        return compute_maps(backbone, image, settings)

    monkeypatch.setattr(feature_maps, "compute_maps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract_images(upright(records), lambda: RUNTIME, FULL, tmp_path / "maps", progress=False)
    assert list((tmp_path / "maps").rglob("*.npz")) == [records[0].path_in(tmp_path / "maps", False)]
    monkeypatch.undo()
    assert extract_images(upright(records), lambda: RUNTIME, FULL, tmp_path / "maps", progress=False).reused == 1


def test_of_several_processes_each_writes_its_share(tmp_path, records, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    done = extract_images(upright(records), lambda: RUNTIME, FULL, tmp_path / "maps", progress=False)
    assert (done.computed, done.reused) == (1, 0)
    assert list((tmp_path / "maps").rglob("*.npz")) == [records[1].path_in(tmp_path / "maps", False)]


def test_no_records_are_no_work(tmp_path):
    assert extract_images([], lambda: RUNTIME, FULL, tmp_path, progress=False).computed == 0


def test_another_image_under_the_same_name_has_maps_of_its_own(tmp_path, records):
    changed = picture_record(tmp_path, "0", picture(60, 90, seed=9))
    assert changed.id == records[0].id
    assert changed.path_in(tmp_path, False) != records[0].path_in(tmp_path, False)


def test_maps_that_were_never_computed_are_asked_for_by_name(tmp_path, records):
    with pytest.raises(ArtifactError, match=r"0-.*-flip\.npz: no maps for image TOY/0; run extract first"):
        read_maps(tmp_path, records[0], flip=True)


def test_maps_move_to_a_device_together():
    maps = compute_maps(RUNTIME, picture(60, 90), FULL).to("meta")
    assert {m.device.type for m in maps.maps} == {"meta"}
    assert maps.sides == (64.0, 96.0)


def test_worker_processes_write_the_same_maps(tmp_path):
    """As many images as start worker processes; each of them loads a runtime of its own."""
    records = [picture_record(tmp_path, f"{i}", picture(60, 90, seed=i)) for i in range(34)]
    load = partial(
        load_runtime, BackboneSettings(name="tiny5", weights={"source": "random"}), "torch", "float32", "cpu"
    )
    done = extract_images(upright(records), load, FULL, tmp_path / "maps", workers=2, progress=False)
    assert (done.computed, done.reused) == (34, 0)
    for index, record in enumerate(records):
        expected = compute_maps(RUNTIME, picture(60, 90, seed=index), FULL).maps
        for own, other in zip(read_maps(tmp_path / "maps", record).maps, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)  # sums of one thread and of several
