"""Artifacts on disk, named by stage and by the digest of what produced them, written atomically.

A stage folder is ``<root>/<stage>-<digest>``; the digest covers the stage's settings and the digests of
its inputs, so a changed setting leads to another folder and nothing stale is ever reused. A file appears
under its final name only when it is complete. Nothing here writes or reads pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

DIGEST_LENGTH = 16


class StoreError(RuntimeError):
    """An artifact that cannot be read or written; the message names the file and the next step."""


def digest_of(*parts: Any) -> str:
    """16 hexadecimal digits that name JSON-like values (settings dumped with ``mode="json"``, digests, names)."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def file_digest(path: Path) -> str:
    """16 hexadecimal digits of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LENGTH]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of named tensors: names, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().numpy()
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()[:DIGEST_LENGTH]


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` for the block to fill; it becomes `path` if the block succeeds, else goes."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"{path}: cannot write ({reason}); free some space or choose another --run") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write(file)`` on a temporary file beside `path`, then rename it to `path`; StoreError if that fails."""
    with _replacing(path) as temporary, temporary.open("wb") as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot read this artifact ({error}); delete it and run the stage again") from None


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Named arrays of numbers as an uncompressed .npz; ValueError for Python objects, which would be pickled."""
    named: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in named.items():
        if array.dtype.hasobject:
            raise ValueError(f"{path}: {name} holds Python objects, expected numbers or text; give it such a dtype")
    write_atomically(path, lambda file: np.savez(file, **named))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:  # numpy leaves a damaged one open
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise StoreError(f"{path}: cannot read this artifact ({error}); delete it and run the stage again") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Named tensors as .safetensors."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own class, which has no public base
        raise StoreError(f"{path}: cannot read this artifact ({error}); delete it and run the stage again") from None


def stage_folder(root: Path, stage: str, *parts: Any) -> Path:
    """The folder of a stage's artifacts; `parts` are everything its content depends on."""
    return root / f"{stage}-{digest_of(stage, *parts)}"
