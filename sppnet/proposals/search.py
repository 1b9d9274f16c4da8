"""Candidate windows of an image (sec. 4.1: selective search "fast", about 2,000 per image).

A :data:`Proposer` maps an image to its windows. ``propose_images`` runs one over a data set, in all cores, and
leaves one file per image, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sppnet.artifacts import read_arrays, write_arrays
from sppnet.config import ProposalSettings
from sppnet.distributed import barrier, shard
from sppnet.errors import ArtifactError, SppnetError, counted
from sppnet.images import read_image
from sppnet.jobs import available_cores, map_in_workers
from sppnet.proposals.edge_boxes import edge_boxes
from sppnet.proposals.files import match_records
from sppnet.proposals.selective_search import opencv_selective_search, selective_search
from sppnet.proposals.sliding import sliding_windows
from sppnet.records import ImageRecord

logger = logging.getLogger("sppnet")

Windows = NDArray[np.float32]
Proposer = Callable[[NDArray[np.uint8]], Windows]
"""Image (H, W, 3) uint8 RGB -> windows (R, 4) float32 xyxy, half-open, in pixels of the image, best first."""

METHODS: dict[str, Callable[..., Windows]] = {  # image, settings
    "selective_search": selective_search,
    "opencv_selective_search": opencv_selective_search,
    "edge_boxes": edge_boxes,
}


@dataclass(frozen=True)
class ProposeSummary:
    """What `propose_images` did with the images of this process."""

    computed: int  # searched now
    imported: int  # taken from proposals.import_from now
    reused: int  # found complete from an earlier run


def make_proposer(*settings: ProposalSettings) -> Proposer:
    """The search that the settings name, as a function of the image alone; of several, the windows of all."""
    distinct = dict.fromkeys(own.model_copy(update={"import_from": (), "workers": 0}) for own in settings)
    searches = [partial(_search_image, own) for own in distinct]
    return searches[0] if len(searches) == 1 else partial(_search_all, searches)


def unite_windows(sources: Sequence[Windows]) -> Windows:
    """The windows (R, 4) of several searches in their order, each once; those of one as they are."""
    every = np.concatenate(sources)
    return every if len(sources) == 1 else every[np.sort(np.unique(every, axis=0, return_index=True)[1])]


def _search_image(settings: ProposalSettings, image: NDArray[np.uint8]) -> Windows:
    return _with_sliding(METHODS[settings.method](image, settings=settings), image.shape[:2], settings)


def _with_sliding(windows: Windows, size: tuple[int, ...], settings: ProposalSettings) -> Windows:
    if not settings.shapes:
        return windows
    height, width = size
    return unite_windows([windows, sliding_windows((height, width), settings.shapes, settings.max_windows)])


def _search_all(searches: Sequence[Proposer], image: NDArray[np.uint8]) -> Windows:
    return unite_windows([search(image) for search in searches])


def propose_images(
    records: Sequence[ImageRecord],
    settings: ProposalSettings,
    folder: Path,
    progress: bool = True,
    imports_needed: bool = True,
) -> ProposeSummary:
    """Write the windows of every record to `folder`, one file each; complete files are kept as they are.

    Records found in settings.import_from take their windows from there, in the given order, without those below
    min_side and cut to max_windows; the others are searched by settings.workers processes, which the log says. Sliding
    windows of settings.shapes follow both. Under torchrun every process does its share of the records. An error names
    the image and ends the run; what is done stays done. Files that fit none of the records are an error where they are
    needed; so are those with no window as large as min_side; both before anything is written.
    `folder` must stand for the settings and for the content of the imported files (see pipeline.stages).
    """
    mine = shard(records)
    missing = [record for record in mine if not record.path_in(folder).exists()]
    imported = match_records(records, settings.import_from, imports_needed) if missing else {}
    large = {
        name: rows[(rows[:, 2:] - rows[:, :2] >= settings.min_side).all(axis=1)] for name, rows in imported.items()
    }
    if sum(map(len, imported.values())) and not sum(map(len, large.values())):
        least = f"no window has both sides of proposals.min_side={settings.min_side} px or more"
        files = ", ".join(map(str, settings.import_from))
        raise SppnetError(f"{files}: {least}; boxes are in pixels of the image, not in shares of it")
    searched = [replace(record, annotation=None) for record in missing if record.id not in imported]
    if searched and settings.import_from:
        missed = f"{len(searched)} of {counted(len(mine), 'image')}, e.g. {searched[0].id}"
        logger.warning(f"proposals.import_from holds no windows of {missed}; they are searched with {settings.method}")
    for record in missing:
        if record.id in large:
            windows = _with_sliding(large[record.id][: settings.max_windows], record.size, settings)
            write_arrays(record.path_in(folder), windows=windows)
    workers = settings.workers or available_cores()  # a search holds no weights
    map_in_workers(partial(partial, _search, settings, folder), searched, "proposals", "image", workers, progress)
    barrier()
    return ProposeSummary(len(searched), len(missing) - len(searched), len(mine) - len(missing))


def propose_union(
    records: Sequence[ImageRecord], searches: Mapping[Path, ProposalSettings], folder: Path, progress: bool = True
) -> ProposeSummary:
    """Write the windows of several searches together to `folder`: of each those that none before it has found.

    `searches`: by the folders that keep the windows of each, as `propose_images` does; counts are sums over them.
    """
    missing = not all(record.path_in(folder).exists() for record in records)  # of all, since processes wait together
    done = [propose_images(records, own, place, progress) for place, own in searches.items() if missing]
    for record in (record for record in shard(records) if not record.path_in(folder).exists()):
        windows = unite_windows([read_windows(place, record) for place in searches])
        write_arrays(record.path_in(folder), windows=windows)
    barrier()
    computed, imported = sum(each.computed for each in done), sum(each.imported for each in done)
    return ProposeSummary(computed, imported, len(searches) * len(shard(records)) - computed - imported)


def read_windows(folder: Path, record: ImageRecord) -> Windows:
    """The windows (R, 4) float32 that `propose_images` wrote for a record."""
    path = record.path_in(folder)
    if not path.exists():
        raise ArtifactError(f"{path}: no windows for image {record.id}; run sppnet propose, or eval for test images")
    arrays = read_arrays(path)
    if "windows" not in arrays:
        raise ArtifactError(f"{path}: expected the array windows, got {', '.join(arrays)}; delete it and propose again")
    return arrays["windows"]


def _search(settings: ProposalSettings, folder: Path, record: ImageRecord) -> None:
    """Search one image and write its windows."""
    try:
        windows = make_proposer(settings)(read_image(record.path))
    except Exception as error:  # whatever it is, the image must be named
        raise SppnetError(f"image {record.id}: cannot compute its windows: {error}") from error
    write_arrays(record.path_in(folder), windows=windows.astype(np.float32))
