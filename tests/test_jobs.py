"""Long jobs: how far one is; work shared by processes gives what one gives, errors as they are, nothing left behind."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from sppnet import jobs
from sppnet.errors import SppnetError
from sppnet.jobs import FEW, available_cores, iterate_in_workers, one_bar, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_long_job_says_in_the_log_how_far_it_is(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SECONDS", 0)
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
    monkeypatch.setattr(jobs, "SECONDS", 0)
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with caplog.at_level(logging.INFO, logger="sppnet"):
        assert list(progress_bar(range(2), "maps", "map", shown=False)) == [0, 1]
        assert list(progress_bar([], "maps", "map")) == []
        assert list(progress_bar(iter(()), "maps", "map", 0)) == []
    assert stream.getvalue() == ""
    assert caplog.messages == []


def test_what_is_told_to_the_bar_is_shown_with_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SECONDS", 0)
    with caplog.at_level(logging.INFO, logger="sppnet"):
        bar = progress_bar(range(3), "finetune", "step", total=3)
        for step in bar:
            bar.set_postfix(loss=f"0.{step}", refresh=False)
    assert any(
        line.startswith("finetune: 1 of 3 steps, ") and line.endswith(" left, loss=0.0") for line in caplog.messages
    )


class Doubler:
    """Twice an item, and the process that computed it; refuses one item."""

    def __init__(self, refused: int = -1) -> None:
        self.refused, self.process = refused, os.getpid()

    def __call__(self, item: int) -> tuple[int, int]:
        if item == self.refused:
            raise SppnetError(f"item {item} is refused")
        return 2 * item, self.process


def test_on_a_terminal_the_one_bar_alone_is_shown_and_names_the_job(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with one_bar({"maps": 1.0}, total=2.0) as bar:
        bar.set_description_str("embed", refresh=False)
        assert list(progress_bar(range(1), "maps", "map")) == [0]
        bar.refresh()
    assert "embed:  50%|" in terminal.getvalue()
    assert "maps" not in terminal.getvalue()


def test_one_bar_moves_by_the_estimated_time_of_each_item_of_the_jobs_within(capsys):
    with one_bar({"proposals": 2.0, "joint": 0.5}, total=10.0) as bar:
        seen = [bar.n for _ in progress_bar(range(3), "proposals", "image")]
        assert (seen, bar.n) == ([0, 2, 4], 6)
        job = progress_bar(range(4), "joint", "step")
        assert list(job) == [0, 1, 2, 3]
        job.set_postfix(loss="1", refresh=False)
        assert list(progress_bar(range(2), "unknown", "image")) == [0, 1]
        assert bar.n == 8
        assert list(progress_bar(range(9), "proposals", "image")) == [*range(9)]
        assert bar.n == 10  # never beyond the whole
    assert capsys.readouterr().err == ""  # no terminal, and less than a minute


def test_after_the_one_bar_each_job_has_its_own_again(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(SppnetError), one_bar({}, total=1.0):
        raise SppnetError("a stage ends")
    assert list(progress_bar(range(2), "maps", "map")) == [0, 1]
    assert "maps: 100%" in terminal.getvalue()


def refuse_to_start() -> Doubler:
    raise SppnetError("cannot start")


@pytest.mark.parametrize("count", [0, 1, FEW - 1])
def test_few_items_are_done_in_this_process_in_their_order(count):
    assert list(iterate_in_workers(Doubler, range(count), 4)) == [(i, (2 * i, os.getpid())) for i in range(count)]


def test_one_worker_is_this_process():
    assert {process for _, (_, process) in iterate_in_workers(Doubler, range(FEW), 1)} == {os.getpid()}


def test_many_items_are_shared_by_processes_that_each_prepare_once():
    done = dict(iterate_in_workers(Doubler, range(FEW + 5), 2))
    assert {item: double for item, (double, _) in done.items()} == {item: 2 * item for item in range(FEW + 5)}
    processes = {process for _, process in done.values()}
    assert 1 <= len(processes) <= 2
    assert os.getpid() not in processes


@pytest.mark.parametrize(
    ("make", "message"), [(partial(Doubler, 3), "item 3 is refused"), (refuse_to_start, "cannot start")]
)
@pytest.mark.parametrize("count", [8, FEW])
def test_errors_arrive_as_they_are(make, message, count):
    with pytest.raises(SppnetError, match=message):
        list(iterate_in_workers(make, range(count), 2))


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert available_cores() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert available_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert available_cores() == 1


SCRIPT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from test_jobs import Slow
from sppnet.jobs import iterate_in_workers
if __name__ == "__main__":
    for _ in iterate_in_workers(Slow, range(40), 2):
        print(os.getpid(), flush=True)
"""


class Slow:
    """Leaves a file that names its process while it lives."""

    def __call__(self, item: int) -> None:
        Path(f"worker-{os.getpid()}").touch()
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(Path(__file__).parent)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        parent.kill()
    processes = [int(path.name.split("-")[1]) for path in tmp_path.glob("worker-*")]
    assert processes
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(_lives(process) for process in processes):
        time.sleep(0.1)
    assert not any(_lives(process) for process in processes)


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_prepares_a_worker_leaves_this_process_alone(monkeypatch):
    before = dict(os.environ)
    list(iterate_in_workers(Doubler, range(FEW), 2))
    assert dict(os.environ) == before
    assert jobs._work == []


class Interrupted:
    """Sends this process what Ctrl-C sends to all of a terminal's."""

    def __call__(self, item: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return item


def test_workers_finish_their_item_when_ctrl_c_reaches_them_too() -> None:
    done = iterate_in_workers(Interrupted, range(FEW), 2)
    assert sorted(done) == [(i, i) for i in range(FEW)]


@pytest.mark.parametrize("value", ["x", "2.5", "-1"])
def test_a_number_of_siblings_that_is_none_is_an_error(monkeypatch, value):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(SppnetError, match=f"LOCAL_WORLD_SIZE={value} in the environment: expected a whole number"):
        available_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert available_cores() >= 1


def test_a_script_from_standard_input_does_all_in_its_own_process():
    script = (
        "import operator, os; from functools import partial; from sppnet.jobs import iterate_in_workers\n"
        "def make(): return lambda item: os.getpid()\n"
        "print({pid for _, pid in iterate_in_workers(make, range(40), 2)} == {os.getpid()})"
    )
    done = subprocess.run([sys.executable], input=script, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
