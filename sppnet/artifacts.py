"""Artifacts on disk, named by stage and by the digest of what produced them, written atomically.

A stage folder is ``<root>/<stage>-<digest>``; the digest covers the stage's settings and the digests of
its inputs, so a changed setting leads to another folder and nothing stale is ever reused. A file appears
under its final name only when it is complete and on the disk, so that neither a killed process nor a power cut leaves
half of one; only what is not `durable` does not wait for the disk. Nothing here writes or reads pickle.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from sppnet.errors import ArtifactError

DIGEST_LENGTH = 16


def digest_of(*parts: Any) -> str:
    """16 hexadecimal digits that name JSON-like values (settings dumped with ``mode="json"``, digests, names)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:DIGEST_LENGTH]


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


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], durable: bool = True) -> None:
    """Call ``write(file)`` on a temporary file beside `path`, then rename it to `path`; ArtifactError if that fails.

    Where it is `durable`, its content is on the disk before it takes the name, and the name before this returns.
    """
    temporary = None
    try:
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".sppnet-", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        with temporary.open("wb") as file:
            write(file)
        temporary.chmod(0o644)
        if durable:
            _sync(temporary)
        temporary.replace(path)
        for folder in (path.parent, *(folder.parent for folder in made)) if durable else ():
            with contextlib.suppress(OSError):  # not every system and file system can do this for folders
                _sync(folder)
    except OSError as error:
        reason = error.strerror or error
        raise ArtifactError(f"{path}: cannot write ({reason}); free some space, or write to another place") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: Path) -> None:
    """Make the folder, and a file in it that goes again; ArtifactError if that fails, before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"cannot write here ({error.strerror})"
        raise ArtifactError(f"{folder}: {reason}; expected a folder with space in it, name another one") from None


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """UTF-8; what cannot be written so, such as half a character, becomes an escape."""
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")), durable)


def write_json(path: Path, value: Any) -> None:
    """Of plain values; ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def replaced_files(folder: Path, last: str) -> Iterator[Path]:
    """A new folder, whose files go to `folder` once all are complete, `last` last; after an error all stays there."""
    made = folder / "new"
    shutil.rmtree(made, ignore_errors=True)
    try:
        yield made
        (folder / last).unlink(missing_ok=True)
        for path in sorted(made.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (MemoryError, ArtifactError):  # the file is not to blame, or has been
        raise
    except Exception as error:  # damaged files raise whatever json, zip, zlib, numpy and safetensors stumble over
        raise ArtifactError(f"{path}: cannot read this artifact ({error}); delete it and run the stage again") from None


def read_json(path: Path) -> Any:
    with _reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def write_arrays(path: Path, durable: bool = True, **arrays: NDArray[Any]) -> None:
    """Named arrays of numbers as an uncompressed .npz; ValueError for Python objects, which would be pickled.

    Thousands of files, each of which can be computed again, need not be `durable`, which takes 10 to 40 ms: those that
    a power cut leaves cut short `has_arrays` finds, and `read_arrays` refuses.
    """
    named: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in named.items():
        if array.dtype.hasobject:
            raise ValueError(f"{path}: {name} holds Python objects, expected numbers or text; give it such a dtype")
    write_atomically(path, lambda file: np.savez(file, **named), durable)


def has_arrays(path: Path) -> bool:
    """Whether there is an .npz with its end, which is written last; reads no more than the end."""
    return zipfile.is_zipfile(path)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    # numpy leaves a damaged file open
    with _reading(path), path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


# A file is read once in a process, which compares it with its checksums, and again where it was changed.
_check_once = functools.cache(lambda path, modified: bool(read_arrays(path)))


def map_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of `write_arrays` where they lie: what is used of them is read from the disk."""
    with _reading(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        _check_once(path, path.stat().st_mtime_ns)
        arrays: dict[str, NDArray[Any]] = {}
        for member in archive.infolist():
            with archive.open(member) as content:  # leaves the file at the values
                np.lib.format.read_magic(content)
                shape, columns, dtype = np.lib.format.read_array_header_1_0(content)
                header = content.tell()
            file.seek(member.header_offset + 26)  # of the entry, which two lengths end, then the name and what is extra
            start = member.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist()) + header
            own = np.memmap(path, dtype, "c", start, shape, "F" if columns else "C")
            arrays[member.filename.removesuffix(".npy")] = own
        return arrays


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Named tensors as .safetensors."""
    # Copies: tensors that share memory, as tied weights do, are refused by safetensors.
    contiguous = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    own = dict(metadata) if metadata else None

    def write(file: IO[bytes]) -> None:
        try:
            save_file(contiguous, file.name, own)  # straight to the disk: a head may have gigabytes
        except SafetensorError:  # also of a name that is not UTF-8
            file.write(save(contiguous, own))

    write_atomically(path, write)


def read_tensors(path: Path) -> dict[str, Tensor]:
    with _reading(path):
        try:
            return load_file(path)
        except SafetensorError:  # also of a name that is not UTF-8
            return load(path.read_bytes())


def names_to_tensor(names: Sequence[str]) -> Tensor:
    """Names of one line each as a tensor of bytes, to be kept beside others; `names_from_tensor` reads it."""
    return torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)


def names_from_tensor(tensor: Tensor) -> tuple[str, ...]:
    return tuple(bytes(tensor.tolist()).decode().split("\n"))
