"""Room 2: maps of an image, computed once and kept on disk."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import picture, picture_record, random_trunk

from sppnet.config import MapSettings
from sppnet.detection import feature_maps
from sppnet.detection.feature_maps import compute_maps, extract_images, maps_path, read_maps, write_maps
from sppnet.images import flip_image, prepare
from sppnet.network.trunks import TrunkError
from sppnet.store import StoreError

TRUNK = random_trunk("tiny5")
FULL = MapSettings(scales=(64, 96), storage="float32")


@pytest.fixture
def records(tmp_path):
    sizes = [(60, 90), (80, 50), (70, 70)]
    return [picture_record(tmp_path, f"{i}", picture(*size, seed=i)) for i, size in enumerate(sizes)]


def test_there_is_one_map_a_scale_of_the_resized_image():
    image = picture(60, 90)
    maps = compute_maps(TRUNK, image, FULL)
    assert maps.sides == (64.0, 96.0)
    assert maps.image_size == (60, 90)
    for feature_map, size in zip(maps.maps, [(64, 96), (96, 144)], strict=True):
        weights = TRUNK.weights
        with torch.no_grad():
            expected = TRUNK(prepare(image, size, weights.channel_order, weights.mean, weights.std))[0]
        assert feature_map.shape == (TRUNK.channels, *TRUNK.map_size(size))
        torch.testing.assert_close(feature_map, expected)


def test_maps_lie_in_memory_as_window_pooling_reads_them_fastest():
    for feature_map in compute_maps(TRUNK, picture(60, 90), FULL).maps:
        assert feature_map.permute(1, 2, 0).is_contiguous()
        assert not feature_map.requires_grad


def test_a_long_image_is_computed_at_a_smaller_scale():
    maps = compute_maps(TRUNK, picture(50, 100), MapSettings(scales=(64, 96), max_side=100))
    assert maps.sides == (50.0, 50.0)
    assert {tuple(m.shape[1:]) for m in maps.maps} == {TRUNK.map_size((50, 100))}


def test_an_image_too_narrow_for_its_bound_is_named_in_pixels():
    squeezed = random_trunk("squeezenet1_1")
    with pytest.raises(
        TrunkError, match=r"an image of 2000 × 20 pixels is too narrow: .*expected an image large enough"
    ):
        compute_maps(squeezed, np.zeros((20, 2000, 3), np.uint8), MapSettings(scales=(64,), max_side=64))


def test_half_precision_in_the_convolutions_stays_close():
    image = picture(60, 90)
    exact = compute_maps(TRUNK, image, FULL).maps[0]
    rough = compute_maps(TRUNK, image, MapSettings(scales=(64,), compute="bfloat16")).maps[0]
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() / exact.norm() < 0.03


def test_maps_in_full_precision_come_back_as_they_were(tmp_path, records):
    maps = compute_maps(TRUNK, picture(60, 90), FULL)
    write_maps(maps_path(tmp_path, records[0], False), maps, FULL)
    found = read_maps(tmp_path, records[0])
    assert (found.sides, found.image_size) == (maps.sides, maps.image_size)
    for own, expected in zip(found.maps, maps.maps, strict=True):
        assert torch.equal(own, expected)
        assert own.permute(1, 2, 0).is_contiguous()


def test_maps_in_half_precision_come_back_rounded_and_as_float32(tmp_path, records):
    half = FULL.model_copy(update={"storage": "float16"})
    maps = compute_maps(TRUNK, picture(60, 90), half)
    write_maps(maps_path(tmp_path, records[0], False), maps, half)
    for own, expected in zip(read_maps(tmp_path, records[0]).maps, maps.maps, strict=True):
        assert own.dtype == torch.float32
        assert torch.equal(own, expected.half().float())


def test_values_beyond_half_precision_become_its_largest_number(tmp_path, records):
    huge = feature_maps.FeatureMaps((torch.tensor([[[1e6]], [[-1e6]]]),), (64.0,), (10, 10))
    write_maps(maps_path(tmp_path, records[0], False), huge, MapSettings(storage="float16"))
    assert read_maps(tmp_path, records[0]).maps[0].flatten().tolist() == [65504, -65504]


def test_every_record_gets_the_maps_of_its_image_and_of_the_mirror_image(tmp_path, records):
    done = extract_images(records, TRUNK, FULL, tmp_path / "maps", flips=True, progress=False)
    assert (done.computed, done.reused) == (6, 0)
    for index, record in enumerate(records):
        image = picture(*record.size, seed=index)
        for flip, pixels in ((False, image), (True, flip_image(image))):
            for own, expected in zip(
                read_maps(tmp_path / "maps", record, flip).maps, compute_maps(TRUNK, pixels, FULL).maps, strict=True
            ):
                assert torch.equal(own, expected)


def test_the_size_on_disk_is_reported(tmp_path, records):
    done = extract_images(records, TRUNK, FULL, tmp_path / "maps", flips=False, progress=False)
    assert done.gigabytes == sum(path.stat().st_size for path in (tmp_path / "maps").rglob("*.npz")) / 1e9


def test_a_second_run_computes_only_what_is_missing(tmp_path, records):
    folder = tmp_path / "maps"
    extract_images(records, TRUNK, FULL, folder, flips=True, progress=False)
    maps_path(folder, records[1], True).unlink()
    others = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.npz")}
    done = extract_images(records, TRUNK, FULL, folder, flips=True, progress=False)
    assert (done.computed, done.reused) == (1, 5)
    assert all((path.stat().st_mtime_ns, path.read_bytes()) == before for path, before in others.items())
    assert maps_path(folder, records[1], True).exists()


def test_an_interruption_leaves_whole_maps_only(tmp_path, records, monkeypatch):
    def interrupted(trunk, image, settings):
        if image.shape[:2] == records[1].size:
            raise KeyboardInterrupt
        return compute_maps(trunk, image, settings)

    monkeypatch.setattr(feature_maps, "compute_maps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract_images(records, TRUNK, FULL, tmp_path / "maps", flips=False, progress=False)
    assert list((tmp_path / "maps").rglob("*.npz")) == [maps_path(tmp_path / "maps", records[0], False)]
    monkeypatch.undo()
    assert extract_images(records, TRUNK, FULL, tmp_path / "maps", False, progress=False).reused == 1


def test_no_records_are_no_work(tmp_path):
    assert extract_images([], TRUNK, FULL, tmp_path, flips=True, progress=False).computed == 0


def test_another_image_under_the_same_name_has_maps_of_its_own(tmp_path, records):
    changed = picture_record(tmp_path, "0", picture(60, 90, seed=9))
    assert changed.id == records[0].id
    assert maps_path(tmp_path, changed, False) != maps_path(tmp_path, records[0], False)


def test_maps_that_were_never_computed_are_asked_for_by_name(tmp_path, records):
    with pytest.raises(StoreError, match=r"0-.*-flip\.npz: no maps for image TOY/0; run extract first"):
        read_maps(tmp_path, records[0], flip=True)


def test_maps_move_to_a_device_together():
    maps = compute_maps(TRUNK, picture(60, 90), FULL).to("meta")
    assert {m.device.type for m in maps.maps} == {"meta"}
    assert maps.sides == (64.0, 96.0)


MEMORY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
from doubles import random_trunk
from sppnet.config import MapSettings
from sppnet.detection.feature_maps import compute_maps
torch.set_num_threads(1)
trunk, rng = random_trunk("mobilenet_v2"), np.random.default_rng(0)

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

for count in range(1, 113):
    image = np.zeros((rng.integers(100, 150), rng.integers(100, 150), 3), np.uint8)
    compute_maps(trunk, image, MapSettings(scales=(400,)))
    if count in (32, 112):
        print(megabytes())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
def test_memory_does_not_grow_with_the_number_of_image_sizes():
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    command = [sys.executable, "-c", MEMORY, str(tests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    early, late = map(float, done.stdout.split())
    assert late - early < 60
