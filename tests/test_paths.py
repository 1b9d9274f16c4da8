"""Names of files: as a shell writes them, cut to what a file system holds, as text that can be written anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sppnet.errors import SppnetError
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
    ],
)
def test_paths_are_read_as_a_shell_reads_them(written, meant, tmp_path):
    assert expand_path(written) == Path(meant.format(home=tmp_path / "home"))


@pytest.mark.parametrize("written", ["$NOWHERE/x", "a/${NOWHERE}", "~/$NOWHERE"])
def test_a_variable_that_is_not_set_is_named(written):
    with pytest.raises(SppnetError, match="the variable NOWHERE is not set"):
        expand_path(written)


@pytest.mark.parametrize("written", ["~no-such-user/x", "~nobody.here"])
def test_a_user_who_is_not_known_is_an_error(written):
    with pytest.raises(SppnetError, match=f"^{written}: ~ stands for the home of a user, and none is known"):
        expand_path(written)


@pytest.mark.parametrize("name", ["$NOWHERE", "~", "$PLACE", "~odd"])
def test_what_has_the_very_name_is_meant_itself(name):
    Path(name).mkdir()
    assert expand_path(name) == Path(name)
    assert expand_path(f"{name}/new/$PLACE") == Path(f"{name}/new/$PLACE")


@pytest.mark.parametrize(
    ("name", "text"), [(b"caf\xe9.jpg", r"caf\xe9.jpg"), ("кот.jpg".encode(), "кот.jpg"), (b"a\xff\xfe", r"a\xff\xfe")]
)
def test_any_name_becomes_text(name, text):
    assert as_text(os.fsdecode(name)) == text
    as_text(os.fsdecode(name)).encode()


def test_names_are_cut_to_what_a_file_system_holds():
    assert fitting_name("a" * 250, ".jpg") == "a" * 250 + ".jpg"
    cut = [fitting_name(stem, ".jpg") for stem in ("a" * 252, "a" * 253, "写" * 84, "写" * 84 + "b")]
    assert len(set(cut)) == 4
    for name in cut:
        assert name.endswith(".jpg")
        assert 250 < len(name.encode()) <= 255
