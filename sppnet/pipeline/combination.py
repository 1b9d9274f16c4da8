"""A run put together from others: their detectors combined, and what they were trained on (sec. 4.4)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from operator import methodcaller
from pathlib import Path

from sppnet.artifacts import check_writable, write_atomically
from sppnet.detection.combination import combine_detectors
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.errors import BackboneError, SppnetError
from sppnet.pipeline.run_data import Split
from sppnet.pipeline.stages import windows_folder

log = logging.getLogger("sppnet")


def combine_runs(runs: Sequence[str | Path], out: str | Path) -> SPPDetector:
    """Make the run `out` of the detectors of `runs`, of which it needs nothing any more; their windows are copied too.

    What it is evaluated on, and how, is that of the first. SppnetError, before anything is written, for fewer than two
    runs, runs without a complete detector, the same detector twice, other classes, a backbone that was given in Python,
    and an `out` that is a run already.
    """
    folder = Path(out) / "detector"
    inside = any((place / "detector.json").exists() for place in (folder, *folder.absolute().parents))
    if inside or (Path(out) / "config.yaml").exists():
        raise SppnetError(f"{out}: is a run already, or the detector of one; choose a new folder for --out")
    read = [DetectorDescription.read(run) for run in runs]
    members = [(Path(run), own) for run, each in zip(runs, read, strict=True) for own in (each, *each.others)]
    seen: dict[tuple[str, str], Path] = {}
    for run, own in members:
        key = replace(own, others=()).digest("cpu"), windows_folder(run, own.config).name
        if key in seen:
            raise SppnetError(f"{seen[key]} and {run} hold the same detector, which gains nothing; name another run")
        seen[key] = run
    try:
        detectors = [SPPDetector.load(run) for run in runs]
    except BackboneError as error:
        raise BackboneError(f"{error}; or combine in Python: combine_detectors([detector, …])") from None
    detector = combine_detectors(detectors, [str(run) for run in runs])
    tested, first = ("root", "val", "test"), read[0].config.data
    for run, own in members:
        differ = [f"data.{name}" for name in tested if getattr(own.config.data, name) != getattr(first, name)]
        if differ:
            log.info("%s of %s count; %s has others", ", ".join(differ), runs[0], run)
    splits = [Split.read(each.folder) or Split({}, {}, {}) for each in read]
    train = {name: digest for split in splits for name, digest in {**split.train, **split.objects}.items()}
    contents = set(train.values())
    check_writable(folder)
    for run, own in members:
        source = windows_folder(run, own.config)
        for path in source.rglob("*.npz"):
            target = folder.parent / path.relative_to(run)
            if not target.exists():
                write_atomically(target, methodcaller("write", path.read_bytes()), durable=False)
    # Without val and test it is evaluated on what the first run held out; others may have held out of other data.
    sides = splits if first.val or first.test else splits[:1]
    held_out = {name: digest for split in sides for name, digest in split.held_out.items()}
    apart = {name: digest for name, digest in held_out.items() if name not in train and digest not in contents}
    Split({}, train, apart, unknown=splits[0].unknown).write(folder)
    detector.save(folder)
    return detector
