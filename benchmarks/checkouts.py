"""Another checkout of sppnet, run in processes of its own: its words for settings, its commands, its functions."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Checkout:
    """The root of a checkout; `before` the restructuring its settings and modules have other names."""

    root: Path

    @property
    def before(self) -> bool:
        return (self.root / "sppnet/network/trunks.py").is_file()

    @property
    def environment(self) -> dict[str, str]:
        """For processes that import sppnet from here."""
        return {**os.environ, "PYTHONPATH": str(self.root)}

    def command(self, *arguments: str | Path) -> list[str]:
        """`sppnet ARGUMENTS`, to be run in `root` and `environment`."""
        return [sys.executable, "-m", "sppnet", *map(str, arguments)]

    def precision(self, precision: str) -> list[str]:
        """Overrides: everything in this precision."""
        keys = ("maps.compute", "finetune.precision", "detect.precision") if self.before else ("precision",)
        return [f"{key}={precision}" for key in keys]

    def weights(self, file: Path | None) -> list[str]:
        """Overrides: the backbone's weights, None for random ones."""
        section = "trunk" if self.before else "backbone"
        source, path = ("random", "null") if file is None else ("file", file.resolve())
        return [f"{section}.weights.source={source}", f"{section}.weights.file={path}"]


class Server:
    """A Python program in a checkout that answers every line of JSON with another one."""

    def __init__(self, checkout: Checkout, program: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=checkout.root,
            env=checkout.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        """The answer to one request; ends the program where the process has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the process of the other checkout ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()  # ends its input


@contextlib.contextmanager
def server(root: Path | None, program: str) -> Iterator[Server | None]:
    """A Server while the block runs; None without a checkout."""
    if root is None:
        yield None
        return
    running = Server(Checkout(root), program)
    try:
        yield running
    finally:
        running.close()


def existing(paths: Sequence[Path | None]) -> None:
    """Ends the program where one of the checkouts holds no sppnet."""
    for path in paths:
        if path is not None and not (path / "sppnet/__main__.py").is_file():
            sys.exit(f"{path}: holds no sppnet; name the root of a checkout")
