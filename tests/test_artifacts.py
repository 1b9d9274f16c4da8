"""Artifacts on disk: complete or not there, named by content, and never pickled."""

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sppnet.artifacts import (
    check_writable,
    digest_of,
    file_digest,
    has_arrays,
    map_arrays,
    read_arrays,
    read_json,
    read_tensors,
    replaced_files,
    tensors_digest,
    write_arrays,
    write_atomically,
    write_json,
    write_tensors,
    write_text,
)
from sppnet.errors import ArtifactError

ARRAYS = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.array([0.5], np.float16), "none": np.zeros((0, 4))}
TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3), "empty": torch.zeros(0, 4)}
WRITERS = {
    "text": lambda path: write_text(path, "x"),
    "json": lambda path: write_json(path, 1),
    "arrays": lambda path: write_arrays(path, a=np.zeros(2)),
    "tensors": lambda path: write_tensors(path, TENSORS),
}


def test_arrays_come_back_with_their_types_and_shapes(tmp_path):
    write_arrays(tmp_path / "deep" / "er" / "x.npz", **ARRAYS)
    found = read_arrays(tmp_path / "deep" / "er" / "x.npz")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_tensors_come_back_with_their_types_and_shapes(tmp_path):
    transposed = {**TENSORS, "view": TENSORS["w"].T}  # not contiguous, shares memory
    write_tensors(tmp_path / "x.safetensors", transposed, {"note": "text"})
    found = read_tensors(tmp_path / "x.safetensors")
    assert set(found) == set(transposed)
    for name, tensor in transposed.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, 2.5, None], "b": "é"})
    assert read_json(tmp_path / "x.json") == {"a": [1, 2.5, None], "b": "é"}


@pytest.mark.parametrize("failure", [ValueError("in the middle"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, failure, old):
    path = tmp_path / "x.bin"
    if old is not None:
        path.write_bytes(old)

    def write(file):
        file.write(b"half of")
        file.flush()
        raise failure

    with pytest.raises(type(failure)):
        write_atomically(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["x.bin"])
    assert old is None or path.read_bytes() == old


def test_who_reads_the_old_file_reads_it_to_its_end(tmp_path):
    write_text(tmp_path / "x", "old " * 1000)
    with (tmp_path / "x").open() as reader:
        assert reader.read(4) == "old "
        write_text(tmp_path / "x", "new")
        assert reader.read() == "old " * 999
    assert (tmp_path / "x").read_text() == "new"


def test_a_full_disk_is_reported_with_the_next_step(tmp_path):
    def write(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(
        ArtifactError, match=r"x\.bin: cannot write \(No space left on device\); free some space, or write"
    ):
        write_atomically(tmp_path / "x.bin", write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_that_cannot_be_made_is_reported(tmp_path, kind):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ArtifactError, match=r"x: cannot write \((File exists|Not a directory)\); free some space"):
        WRITERS[kind](tmp_path / "file" / "x")


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys; from pathlib import Path; from sppnet.artifacts import write_atomically\n"
        "def write(file):\n    file.write(b'n' * 100_000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), write)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_bytes() == b"old"


class Steps(list):
    """What happened, in order: the inode and the name of what was synchronised, and renames."""

    def watch(self, monkeypatch):
        fsync, replace = os.fsync, Path.replace
        monkeypatch.setattr(os, "fsync", lambda handle: (self.append(("sync", os.fstat(handle).st_ino)), fsync(handle)))
        monkeypatch.setattr(Path, "replace", lambda own, new: (self.append(("name", new)), replace(own, new)))
        return self


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_on_the_disk_before_it_has_its_name_and_so_are_new_folders(tmp_path, monkeypatch, kind):
    steps = Steps().watch(monkeypatch)
    path = tmp_path / "stage" / "VOC2007" / "x"
    WRITERS[kind](path)
    folders = [path.parent, path.parent.parent, tmp_path]
    assert steps == [("sync", path.stat().st_ino), ("name", path), *(("sync", f.stat().st_ino) for f in folders)]


def test_a_folder_that_cannot_be_synchronised_is_no_error_but_a_file_is(tmp_path, monkeypatch):
    def refuse(folders):
        def fsync(handle):
            if stat.S_ISDIR(os.fstat(handle).st_mode) == folders:
                raise OSError(22, "Invalid argument")

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(folders=True))
    write_text(tmp_path / "x", "new")
    monkeypatch.setattr(os, "fsync", refuse(folders=False))
    with pytest.raises(ArtifactError, match=r"x: cannot write \(Invalid argument\); free some space"):
        write_text(tmp_path / "x", "newer")
    assert (tmp_path / "x").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_cached_arrays_are_the_same_without_waiting_for_the_disk(tmp_path, monkeypatch):
    steps = Steps().watch(monkeypatch)
    write_arrays(tmp_path / "x.npz", durable=False, **ARRAYS)
    assert steps == [("name", tmp_path / "x.npz")]
    found = read_arrays(tmp_path / "x.npz")
    assert all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)
    with pytest.raises(ValueError, match=r"x\.npz: bad holds Python objects, expected numbers or text"):
        write_arrays(tmp_path / "x.npz", durable=False, bad=np.array([None, {}]))


def test_an_archive_without_its_end_is_none(tmp_path):
    path = tmp_path / "x.npz"
    assert not has_arrays(path)
    write_arrays(path, **ARRAYS)
    assert has_arrays(path)
    whole = path.read_bytes()
    for left in (b"", whole[:100], whole[:-1], whole[:-100] + bytes(100)):
        path.write_bytes(left)
        assert not has_arrays(path)


def test_an_array_of_python_objects_is_refused_because_it_would_be_pickled(tmp_path):
    with pytest.raises(ValueError, match=r"x\.npz: bad holds Python objects, expected numbers or text"):
        write_arrays(tmp_path / "x.npz", good=np.zeros(2), bad=np.array([None, {}]))
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_in_an_archive_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", bad=np.array([print], dtype=object))
    with pytest.raises(ArtifactError, match=r"x\.npz: cannot read this artifact \(Object arrays cannot be loaded"):
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("read", [read_arrays, map_arrays])
@pytest.mark.parametrize("length", [0, 1, 3, 30, 100, 300, -1])
def test_a_truncated_archive_is_reported_with_the_next_step(tmp_path, length, read):
    path = tmp_path / "x.npz"
    write_arrays(path, **ARRAYS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(
        ArtifactError, match=r"x\.npz: cannot read this artifact \(.*\); delete it and run the stage again"
    ) as raised:
        read(path)
    assert str(raised.value).count("cannot read") == 1


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int8", "uint8", "int64", "bool", "complex64", "<U7"]
)
def test_mapped_arrays_are_those_that_are_read(tmp_path, dtype):
    """Of every shape, also of one number, which is no array of a line, and in both orders of memory."""
    values = np.random.default_rng(0).integers(0, 2, (4, 5, 6)).astype(dtype)
    arrays = {
        "one": values[0, 0, 0],
        "line": values[0, 0],
        "block": values,
        "turned": values.T,
        "wide": values[:, :1, ::2],
    }
    write_arrays(tmp_path / "x.npz", **arrays, ä=["name"])
    mapped, read = map_arrays(tmp_path / "x.npz"), read_arrays(tmp_path / "x.npz")
    assert list(mapped) == list(read) == [*arrays, "ä"]
    for name, array in read.items():
        assert (mapped[name].dtype, mapped[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(mapped[name], array)


def test_an_empty_array_is_mapped_as_one(tmp_path):
    write_arrays(tmp_path / "x.npz", **ARRAYS)
    assert map_arrays(tmp_path / "x.npz")["none"].shape == (0, 4)


def test_what_is_done_to_mapped_arrays_does_not_reach_the_file(tmp_path):
    write_arrays(tmp_path / "x.npz", a=np.arange(5))
    map_arrays(tmp_path / "x.npz")["a"][:] = 7
    assert map_arrays(tmp_path / "x.npz")["a"].tolist() == [0, 1, 2, 3, 4]


def test_mapped_arrays_are_compared_with_their_checksums_once_and_after_a_change(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    write_arrays(path, a=np.arange(1000))
    reads = []
    monkeypatch.setattr(
        np, "load", lambda *arguments, load=np.load, **options: reads.append(1) or load(*arguments, **options)
    )
    for _ in range(3):
        map_arrays(path)
    assert len(reads) == 1
    content = bytearray(path.read_bytes())
    content[4000] ^= 0xFF
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ArtifactError, match=r"^[^(]*x\.npz: cannot read this artifact \(Bad CRC-32 [^(]*\); delete it"):
        map_arrays(path)


@pytest.mark.parametrize("read", [read_arrays, map_arrays])
def test_a_damaged_archive_gives_an_error_of_ours_or_the_same_arrays(tmp_path, read):
    path = tmp_path / "x.npz"
    write_arrays(path, **ARRAYS)
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        os.utime(path, ns=(position, position))
        try:
            found = read(path)
        except ArtifactError:
            refused += 1
        else:
            assert all(np.array_equal(found[name], ARRAYS[name]) for name in found if name in ARRAYS)
    assert refused > 50


@pytest.mark.parametrize("content", [b"", b"{", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      more", b"\xff" * 64])
def test_damaged_tensors_and_json_are_reported_with_the_next_step(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x: cannot read this artifact \(.*\); delete it and run the stage again"):
        read_tensors(tmp_path / "x")
    with pytest.raises(ArtifactError, match=r"x: cannot read this artifact \(.*\); delete it and run the stage again"):
        read_json(tmp_path / "x")


def test_a_missing_artifact_is_reported(tmp_path):
    for read in (read_json, read_arrays, map_arrays, read_tensors):
        with pytest.raises(ArtifactError, match=r"none: cannot read this artifact"):
            read(tmp_path / "none")


def test_a_digest_is_the_same_on_every_machine_and_every_day():
    text = b'["stage", {"a": [1.5, null, true], "b": 1}, "\\u00e9"]'
    assert digest_of("stage", {"b": 1, "a": [1.5, None, True]}, "é") == hashlib.sha256(text).hexdigest()[:16]
    assert digest_of() == "4f53cda18c2baa0c"  # of the text []


def test_a_digest_depends_on_every_value_but_not_on_the_order_of_keys():
    value = {"a": 1, "b": {"c": [1, 2]}}
    assert digest_of(value) == digest_of({"b": {"c": [1, 2]}, "a": 1})
    others = [{"a": 2, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [2, 1]}}, {"a": "1", "b": {"c": [1, 2]}}, {"a": 1}]
    assert len({digest_of(value), *map(digest_of, others)}) == 5
    assert digest_of("a", "b") != digest_of("ab")


def test_the_digest_of_a_file_is_that_of_its_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea"  # the first digits of SHA-256("abc"), FIPS 180-2


def test_the_digest_of_tensors_covers_names_types_shapes_and_values():
    value = torch.arange(6.0)
    first = tensors_digest({"a": value, "b": torch.tensor(1)})
    assert first == tensors_digest({"b": torch.tensor(1), "a": value})
    assert first == tensors_digest({"a": torch.arange(6.0).repeat_interleave(2)[::2], "b": torch.tensor(1)})
    others = [{"a": value + 1}, {"c": value}, {"a": value.double()}, {"a": value.reshape(2, 3)}]
    assert len({first, *(tensors_digest({"b": torch.tensor(1), **other}) for other in others)}) == 5


@pytest.mark.parametrize("value", [float("nan"), [1, {"a": float("inf")}]])
def test_json_holds_no_numbers_that_json_does_not_have(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", value)
    assert list(tmp_path.iterdir()) == []


def test_half_characters_are_written_as_escapes(tmp_path):
    write_text(tmp_path / "x", "caf\udce9 кот")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "caf\\udce9 кот"


def test_the_longest_name_of_a_file_can_be_written(tmp_path):
    for name in ("x" * 255, "写" * 85):
        write_text(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"


def test_whether_a_folder_can_be_written_to_is_known_before(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError, match="cannot write here"):
            check_writable(folder)


def test_a_file_is_not_blamed_where_memory_runs_out(tmp_path, monkeypatch):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})

    def runs_out(path):
        raise MemoryError

    monkeypatch.setattr("sppnet.artifacts.load_file", runs_out)
    with pytest.raises(MemoryError):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", [b"run\xe9", b"\xff\xfe", "猫".encode()])
def test_tensors_are_kept_in_folders_of_any_name(tmp_path, name):
    path = tmp_path / os.fsdecode(name) / "a.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.float16), "c": torch.zeros(0, 4)}
    write_tensors(path, {**tensors, "d": tensors["a"]}, {"of": "mine"})
    found = read_tensors(path)
    assert found.keys() == {*tensors, "d"}
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in tensors.items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="cannot read this artifact"):
        read_tensors(path)


def test_files_replace_those_of_before_once_all_are_there_and_others_stay(tmp_path):
    for name, text in (("a", "old"), ("last", "old"), ("mine", "mine")):
        (tmp_path / name).write_text(text)

    def save(*names):
        with replaced_files(tmp_path, "last") as made:
            for name in names:
                write_text(made / name, "new")
                assert (tmp_path / "last").read_text() == "old"
            if "a" not in names:
                raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save("last", "b")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "last": "old", "mine": "mine"}
    save("last", "a", "b")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a": "new", "b": "new", "last": "new", "mine": "mine"}


def test_an_interruption_among_the_files_leaves_none_called_last(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    replace, left = Path.replace, [None]
    monkeypatch.setattr(Path, "replace", lambda path, to: left.pop() or replace(path, to))  # the second one fails

    def save():
        with replaced_files(tmp_path, "a") as made:
            made.mkdir()
            for name in ("a", "b", "c"):
                (made / name).write_text("new")

    with pytest.raises(IndexError):
        save()
    assert [path.name for path in tmp_path.iterdir()] in (["b"], ["c"])
