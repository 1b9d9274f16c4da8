"""Candidate windows of many images in one file: what other programs hand over, and what we hand to them.

``.npz``: ``ids`` (N,) strings, ``offsets`` (N + 1,) integers, ``boxes`` (total, 4) xyxy, zero-based, half-open;
image i owns ``boxes[offsets[i]:offsets[i + 1]]``.
``.mat``: the layout of R-CNN's releases: ``boxes``, a cell per image of (R, 4) (y1, x1, y2, x2), one-based and
inclusive, and ``images``, a cell of names. Neither format needs pickle.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from numpy.typing import ArrayLike, NDArray

from sppnet.artifacts import write_arrays, write_atomically
from sppnet.checks import as_boxes
from sppnet.data.labels import normalise
from sppnet.errors import SppnetError, counted
from sppnet.images import IMAGE_SUFFIXES
from sppnet.records import ImageRecord, clip_boxes

logger = logging.getLogger("sppnet")

SUFFIXES = (".npz", ".mat")
INT16_LIMIT = np.iinfo(np.int16).max
INWARD = np.array([1, 1, 0, 0])  # one-based inclusive corners minus half-open ones
Y_FIRST = [1, 0, 3, 2]  # x1 y1 x2 y2 <-> y1 x1 y2 x2


def export_windows(path: Path | str, ids: Sequence[str], windows: Sequence[ArrayLike]) -> None:
    """Write the windows of N images, each (R, 4) xyxy half-open; the suffix of `path` chooses the format.

    The ``.npz`` holds int16 where every corner is a whole number below 32768, else float32; the ``.mat`` doubles.
    """
    path = _with_suffix(path)
    if len(ids) != len(windows):
        raise ValueError(f"expected one array of windows per id, got {len(ids)} ids and {len(windows)} arrays")
    _check_unique(path, ids)
    arrays = [as_boxes(rows, "windows") for rows in windows]
    if path.suffix == ".npz":
        boxes = np.concatenate([np.zeros((0, 4)), *arrays])
        whole = bool((np.rint(boxes) == boxes).all() and (np.abs(boxes) <= INT16_LIMIT).all())
        boxes = boxes.astype("i2" if whole else "f4")
        write_arrays(path, ids=np.array(ids, dtype=np.str_), offsets=_offsets(arrays), boxes=boxes)
    else:
        cells, names = np.empty((1, len(ids)), dtype=object), np.empty((len(ids), 1), dtype=object)
        for i, (name, rows) in enumerate(zip(ids, arrays, strict=True)):
            cells[0, i] = (rows + INWARD)[:, Y_FIRST]
            names[i, 0] = name
        content = {"boxes": cells, "images": names}
        write_atomically(path, lambda file: scipy.io.savemat(file, content, do_compression=True))


def import_windows(path: Path | str) -> dict[str, NDArray[np.float32]]:
    """Image id (NFC) -> windows (R, 4) float32 xyxy, zero-based, half-open, in the order of the file.

    The arrays are slices of one array. Raises SppnetError for a file that does not hold one of the two layouts.
    """
    path = _with_suffix(path)
    if not path.is_file():
        raise SppnetError(f"{path}: no such file; proposals.import_from must name existing .npz or .mat files")
    ids, offsets, boxes = _read_npz(path) if path.suffix == ".npz" else _read_mat(path)
    ids = [normalise(name) for name in ids]
    _check_unique(path, ids)
    if not np.isfinite(boxes).all():
        raise SppnetError(f"{path}: boxes hold values that are not finite; remove those rows")
    inverted = np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(axis=1))
    if len(inverted):
        raise SppnetError(
            f"{path}: {counted(len(inverted), 'box')} with x2 < x1 or y2 < y1, e.g. {boxes[inverted[0]].tolist()}; "
            "the order of the corners is x1 y1 x2 y2 in .npz and y1 x1 y2 x2 in .mat"
        )
    return {name: boxes[start:stop] for name, start, stop in zip(ids, offsets[:-1], offsets[1:], strict=True)}


def match_records(
    records: Sequence[ImageRecord], paths: Sequence[Path], needed: bool = True
) -> dict[str, NDArray[np.float32]]:
    """Record id -> its windows in the files, for the records that are in one of them.

    A file may name an image by its full id ("VOC2007/000005"), by its stem ("000005"), or by either with the suffix of
    a picture; the full id wins. What else the files hold is left out. Raises SppnetError where two files or two records
    claim the same entry, for windows outside the image, and, if they are `needed`, for files that fit none of the
    records. Warns, in the log, of a file that fits none where others do.
    """
    files = {path: import_windows(path) for path in paths}
    entries: dict[str, dict[tuple[Path, str], None]] = {}  # what may name an image -> the entries of that name
    for path, held in files.items():
        for name in held:
            for key in {name, name.rpartition(".")[0] if name.lower().endswith(IMAGE_SUFFIXES) else name}:
                entries.setdefault(key, {})[path, name] = None
    stems = Counter(normalise(record.id).rpartition("/")[2] for record in records)
    matched, used = {}, set[Path]()
    for record in records:
        full = normalise(record.id)
        key = full if full in entries else full.rpartition("/")[2]
        if key not in entries:
            continue
        (path, name), *others = entries[key]
        if others:
            both = " and ".join(str(path) if name == key else f"{path} ({name})" for path, name in entries[key])
            raise SppnetError(f"{both} both hold windows of {key}; import only one of them, or use full ids")
        if key != full and stems[key] > 1:
            raise SppnetError(f"{path}: {name} fits {stems[key]} images, e.g. {record.id}; name them by full id")
        used.add(path)
        windows = files[path][name]
        matched[record.id] = clip_boxes(windows, record.size)
        far = np.abs(windows - matched[record.id]).max(initial=0)
        if far > 1:  # a pixel is rounding, more is another image
            raise SppnetError(
                f"{path}: a window of {record.id} lies {far:g} px outside the image of (height, width) {record.size}; "
                "were the windows computed on this image, and are its corners x1 y1 x2 y2, zero-based, half-open?"
            )
    for path in files if records else ():
        if path not in used:
            found = f"its first image is {next(iter(files[path]), None)}, that of the data {records[0].id}"
            if needed and not used:
                raise SppnetError(f"{path}: windows of none of the images; {found}; name them by these ids or stems")
            logger.warning(f"{path}: windows of none of the images; {found}")
    return matched


def _read_npz(path: Path) -> tuple[list[str], NDArray[np.int64], NDArray[np.float32]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:  # numpy leaves a damaged one open
            content = dict(archive)
    except Exception as error:  # damaged files raise whatever zip, zlib and numpy stumble over, a single array too
        raise SppnetError(f"{path}: not a readable .npz file ({error}); export it again, plain arrays only") from None
    ids, offsets, boxes = _arrays(path, ("ids", "offsets", "boxes"), content)
    if ids.ndim != 1 or ids.dtype.kind != "U":
        raise SppnetError(f"{path}: ids must be (N,) strings, got {_kind(ids)}; write numpy.array(ids, dtype=str)")
    if offsets.shape != (len(ids) + 1,) or offsets.dtype.kind not in "iu":
        wanted = f"offsets must be ({len(ids) + 1},) integers for {len(ids)} ids"
        raise SppnetError(f"{path}: {wanted}, got {_kind(offsets)}; write one per image and the total")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind not in "iuf":
        raise SppnetError(f"{path}: boxes must be (total, 4) numbers, got {_kind(boxes)}")
    if offsets[0] != 0 or offsets[-1] != len(boxes) or (offsets[1:] < offsets[:-1]).any():
        wanted = f"offsets must run from 0 to {len(boxes)}, the number of boxes, and never decrease"
        raise SppnetError(f"{path}: {wanted}, got {offsets[0]} to {offsets[-1]}; write boxes in the order of ids")
    with np.errstate(over="ignore"):  # infinite boxes are refused
        return ids.tolist(), offsets.astype(np.int64), boxes.astype(np.float32)


def _read_mat(path: Path) -> tuple[list[str], NDArray[np.int64], NDArray[np.float32]]:
    try:
        content = scipy.io.loadmat(path, variable_names=["boxes", "images"])
    except Exception as error:  # damaged files raise whatever the parser stumbles over
        hint = "copy it again, or save it with save(..., '-v7')"  # MATLAB 7.3 is HDF5
        raise SppnetError(f"{path}: not a readable .mat file ({error}); {hint}") from None
    cells, names = _arrays(path, ("boxes", "images"), content)
    if cells.dtype != object or names.dtype != object or cells.size != names.size:
        wanted = "expected the cells boxes and images, one entry per image, as in R-CNN's releases"
        raise SppnetError(f"{path}: {wanted}, got {_kind(cells)} and {_kind(names)}")
    ids, arrays = [], [np.zeros((0, 4), np.float32)]
    for name, cell in zip(names.ravel(), cells.ravel(), strict=True):
        if name.dtype.kind != "U" or name.size != 1:
            raise SppnetError(f"{path}: images must hold one name per cell, got {_kind(name)}")
        if cell.dtype.kind not in "iuf" or (cell.size and cell.shape[1:] != (4,)):
            wanted = f"boxes of {name.item()} must be (R, 4) numbers (y1, x1, y2, x2)"
            raise SppnetError(f"{path}: {wanted}, got {_kind(cell)}")
        ids.append(str(name.item()))
        arrays.append((cell.reshape(-1, 4)[:, Y_FIRST] - INWARD).astype(np.float32))
    return ids, _offsets(arrays[1:]), np.concatenate(arrays)


def _arrays(path: Path, names: Sequence[str], content: dict[str, Any]) -> list[NDArray[Any]]:
    missing = [name for name in names if name not in content]
    if missing:
        raise SppnetError(f"{path}: {missing[0]} is missing; needed are {', '.join(names)}")
    return [content[name] for name in names]


def _kind(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _offsets(arrays: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, arrays)], dtype=np.int64)


def _with_suffix(name: Path | str) -> Path:
    path = Path(name)
    if path.suffix not in SUFFIXES:
        raise SppnetError(f"{path}: unknown kind of proposal file {path.suffix!r}; use {' or '.join(SUFFIXES)}")
    return path


def _check_unique(path: Path, ids: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise SppnetError(f"{path}: image {repeated[0]} occurs more than once; give each image one entry")
