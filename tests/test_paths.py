"""Names of files: as a shell writes them, cut to what a file system holds, as text that can be written anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sppnet
from sppnet.paths import as_text, expand_path, fitting_name


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name, value in {"HOME": str(tmp_path / "home"), "PLACE": "here", "OF_MINE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~", "{home}"),
        ("~/photos", "{home}/photos"),
        ("$HOME/a b", "{home}/a b"),
        ("${PLACE}s/$PLACE/x.jpg", "heres/here/x.jpg"),
        ("a/~/b", "a/~/b"),
        ("cost $5", "cost $5"),
        ("100%/a$", "100%/a$"),
        ("plain/path", "plain/path"),
        ("a/${NOWHERE}", "a/${{NOWHERE}}"),
        ("~no-such-user/x", "~no-such-user/x"),
    ],
)
def test_paths_are_read_as_a_shell_reads_them(written, meant, tmp_path):
    assert expand_path(written) == Path(meant.format(home=tmp_path / "home"))


def test_a_path_that_exists_is_taken_as_it_stands(tmp_path):
    (tmp_path / "pics$PLACE").mkdir()
    assert expand_path(tmp_path / "pics$PLACE") == tmp_path / "pics$PLACE"
    assert expand_path(tmp_path / "more$PLACE") == tmp_path / "morehere"


@pytest.mark.parametrize(
    ("name", "text"), [(b"caf\xe9.jpg", r"caf\xe9.jpg"), ("кот.jpg".encode(), "кот.jpg"), (b"a\xff\xfe", r"a\xff\xfe")]
)
def test_any_name_becomes_text(name, text):
    assert as_text(os.fsdecode(name)) == text
    as_text(os.fsdecode(name)).encode()


def test_names_are_written_where_the_locale_has_no_unicode(tmp_path):
    script = r"""import sys
from pathlib import Path
from sppnet.artifacts import read_json, write_json
from sppnet.data.comp4 import read_comp4, write_comp4
from sppnet.data.voc import read_annotation, write_annotation
from sppnet.paths import fitting_name
from sppnet.records import Detections
assert sys.getfilesystemencoding() != "utf-8"
found = {"a": Detections([[0, 0, 5, 5]], [0.5], [0], ("猫",))}
path, = write_comp4(Path("out"), "val", found, ("猫",))
assert path.name == r"comp4_det_val_\u732b.txt" and read_comp4(path)[0] == ["a"]
assert fitting_name("é", ".png") == r"\xe9.png" and len(fitting_name("猫" * 90, ".png")) <= 255
Path("a.json").write_bytes('"猫"'.encode())
assert read_json(Path("a.json")) == "猫"
write_annotation(Path("a.xml"), (9, 9), [[0, 0, 5, 5]], ["猫"], [False])
assert read_annotation(Path("a.xml"))[0].names == ("猫",)
"""
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    places = {"PYTHONPATH": str(Path(sppnet.__file__).parents[1])}
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command, own = [sys.executable, str(tmp_path / "script.py")], {**os.environ, **ascii_only, **places}
    result = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_names_are_cut_to_what_a_file_system_holds():
    assert fitting_name("a" * 250, ".jpg") == "a" * 250 + ".jpg"
    cut = [fitting_name(stem, ".jpg") for stem in ("a" * 252, "a" * 253, "写" * 84, "写" * 84 + "b")]
    assert len(set(cut)) == 4
    for name in cut:
        assert name.endswith(".jpg")
        assert 250 < len(name.encode()) <= 255
