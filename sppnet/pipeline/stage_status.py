"""What is there of a stage, and what a training would do about it, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sppnet.config import STAGES


@dataclass(frozen=True)
class StageStatus:
    """What is there of a stage: `done` of `total` outputs; `skipped` says why it would not run at all."""

    name: str
    folder: Path
    done: int
    total: int
    skipped: str = ""
    checkpoint: Path | None = None  # of a single output that was interrupted

    @property
    def complete(self) -> bool:
        return bool(self.skipped) or self.done == self.total

    def describe(self, only: Sequence[str] = STAGES, invalidated: Sequence[str] = ()) -> str:
        """One line: would this stage run, and why; `invalidated` are deleted before any runs."""
        folder, stale = self.folder.name, self.name in invalidated
        others = sorted(path.name for path in self.folder.parent.glob(f"{self.name}-*") if path != self.folder)
        there = f"{self.done} of {self.total} in {folder}"
        if self.skipped:
            action, why = "skip", self.skipped
        elif self.name not in only:
            gone = "; depends on re-run stages and would be deleted" if stale and self.done else ""
            action, why = "leave", f"not selected; {there}{gone}"
        elif stale:
            action, why = "run", f"from scratch, as asked; {there} are there and would be deleted"
        elif self.complete:
            action, why = "reuse", f"all {self.total} in {folder}"
        elif self.done:
            action, why = "resume", there
        elif self.checkpoint is not None:
            action, why = "resume", f"from {folder}/{self.checkpoint.name}"
        else:
            why = f"settings or inputs are not those of {', '.join(others)}" if others else "nothing there yet"
            action, why = "run", f"{why}; {self.total} to do in {folder}"
        return f"{self.name:<10} {action:<8} {why}"
