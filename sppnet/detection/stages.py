"""The stages of training: what is there of each, what would be done, and what was done, as lines to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STAGES = ("propose", "pretrain", "extract", "finetune", "compress", "svm", "boxes")


class StageError(ValueError):
    """A stage that cannot run as asked; the message gives the next step."""


@dataclass(frozen=True)
class StageStatus:
    """What is there of a stage: `done` of `total` parts; `skipped` says why it would not run at all."""

    name: str
    folder: Path
    done: int
    total: int
    skipped: str = ""
    checkpoint: Path | None = None  # of a single part that was interrupted

    @property
    def complete(self) -> bool:
        return bool(self.skipped) or self.done == self.total


@dataclass(frozen=True)
class StageReport:
    """What a stage did, in words, and how long it took."""

    name: str
    seconds: float
    summary: str


def stage_status(
    name: str, folder: Path, parts: Sequence[Path], skipped: str = "", checkpoint: str | None = None
) -> StageStatus:
    """The status of a stage with these files; `checkpoint` is the name of its file for resuming, if it has one."""
    saved = folder / checkpoint if checkpoint is not None and (folder / checkpoint).exists() else None
    return StageStatus(name, folder, sum(path.exists() for path in parts), len(parts), skipped, saved)


def describe_stage(status: StageStatus, only: Sequence[str] = STAGES, force: Sequence[str] = ()) -> str:
    """One line: would this stage run, and why; `force` names the stages that would be deleted before any runs."""
    action, why = _decision(status, only, force)
    return f"{status.name:<9} {action:<8} {why}"


def _decision(status: StageStatus, only: Sequence[str], force: Sequence[str]) -> tuple[str, str]:
    name, parts = status.folder.name, f"{status.done} of {status.total}"
    if status.skipped:
        return "skip", status.skipped
    if status.name not in only:
        stale = " rest on what is done again and would be deleted" if status.name in force and status.done else ""
        return "leave", f"not asked for; {parts} in {name}{stale}"
    if status.name in force:
        return "run", f"from scratch, as asked; {parts} in {name} are there and would be deleted"
    if status.done == status.total:
        return "reuse", f"all {status.total} in {name}"
    if status.done:
        return "resume", f"{parts} in {name}"
    if status.checkpoint is not None:
        return "resume", f"from {name}/{status.checkpoint.name}"
    others = sorted(path.name for path in status.folder.parent.glob(f"{status.name}-*") if path != status.folder)
    if others:
        return "run", f"settings or inputs are not those of {', '.join(others)}; {status.total} to do in {name}"
    return "run", f"nothing there yet; {status.total} to do in {name}"


def stage_table(reports: Sequence[StageReport]) -> str:
    """The summary at the end of training: stage, time, what was done."""
    lines = [f"{'stage':<9} {'time':>9}  done"]
    lines += [f"{report.name:<9} {duration(report.seconds):>9}  {report.summary}" for report in reports]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
