"""A bar on a terminal; elsewhere lines in the log, for long jobs alone."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from sppnet import progress
from sppnet.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_long_job_says_in_the_log_how_far_it_is(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0)
    with caplog.at_level(logging.INFO, logger="sppnet"):
        assert list(progress_bar(range(3), "maps", "map", total=10, done=7)) == [0, 1, 2]
    assert caplog.messages[0].startswith("maps: 7 of 10 maps, 00:00 so far, ")
    assert "maps: 9 of 10 maps, 00:00 so far, 00:00 left" in caplog.messages
    assert capsys.readouterr().err == ""


def test_a_job_of_less_than_a_minute_says_nothing_there(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="sppnet"):
        assert list(progress_bar("ab", "maps", "map")) == ["a", "b"]
    assert caplog.messages == []
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.INFO, logger="sppnet"):
        assert list(progress_bar(range(2), "maps", "map")) == [0, 1]
    assert "maps: 100%" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert caplog.messages == []


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_not_to_be_shown_is_silent(
    terminal: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0)
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with caplog.at_level(logging.INFO, logger="sppnet"):
        assert list(progress_bar(range(2), "maps", "map", shown=False)) == [0, 1]
    assert stream.getvalue() == ""
    assert caplog.messages == []


def test_what_is_told_to_the_bar_is_shown_with_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0)
    with caplog.at_level(logging.INFO, logger="sppnet"):
        bar = progress_bar(range(3), "finetune", "step", total=3)
        for step in bar:
            bar.set_postfix(loss=f"0.{step}", refresh=False)
    assert any(
        line.startswith("finetune: 1 of 3 steps, ") and line.endswith(" left, loss=0.0") for line in caplog.messages
    )
