"""Schedules: times as cron means them, nothing lost by a kill, one retraining at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobs.locks import Busy, holder, only_one
from jobs.schedule_store import Run, Schedule, Store, cron_trigger
from jobs.scheduler import Service, _Watched, drift_since, log_file
from teasr.errors import UsageError

SATURDAY = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)


def until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def schedule(home: Path, name: str = "nightly", **more: object) -> Schedule:
    made = Schedule(name, "recipe.yaml", ("a=1",), str(home), "teasr", added="then")
    return replace(made, **more)


# ---------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("cron", "comes"),
    [
        ("0 3 * * *", "Sun 29 03:00"),
        ("0 3 * * 0", "Sun 29 03:00"),  # as in cron; APScheduler counts from Monday
        ("0 3 * * 7", "Sun 29 03:00"),
        ("30 4 * * 1-5", "Mon 30 04:30"),
        ("0 3 * * fri-mon", "Sun 29 03:00"),
        ("0 13 * * 6,2", "Sat 28 13:00"),
        ("0 3 * * 3/2", "Wed 02 03:00"),
        ("0 3 1 * *", "Tue 01 03:00"),
        ("*/15 * * * *", "Sat 28 12:00"),
    ],
)
def test_times_are_those_of_cron(cron: str, comes: str) -> None:
    found = cron_trigger(cron, "UTC").get_next_fire_time(None, SATURDAY)
    assert found.strftime("%a %d %H:%M") == comes


def test_a_time_zone_keeps_its_clock_over_summer_time() -> None:
    trigger = cron_trigger("0 3 * * *", "Europe/Zurich")
    spring = trigger.get_next_fire_time(None, datetime(2026, 3, 29, 12, tzinfo=UTC))
    assert spring.astimezone(UTC).hour == 1
    assert trigger.get_next_fire_time(None, SATURDAY).astimezone(UTC).hour == 2


@pytest.mark.parametrize(
    ("cron", "zone", "told"),
    [
        ("0 3 * *", "UTC", "has 4 fields. Give 5: minute hour"),
        ("61 * * * *", "UTC", "higher than the maximum"),
        ("0 3 * * 9", "UTC", "'9' is no day of the week"),
        ("0 3 1 * 1", "UTC", "a day of the month and a day of the week"),
        ("0 3 * * *", "Mars/Olympus", "--timezone Mars/Olympus is unknown"),
        ("0 3 * * *", "../etc", "unknown"),
    ],
)
def test_what_is_no_time_is_told(cron: str, zone: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        cron_trigger(cron, zone)


def wait_for_run(store: Store, reason: str) -> Run:
    until(lambda: store.runs())
    (found,) = store.runs()
    assert found.reason == reason
    return found


@pytest.mark.parametrize(("missed", "state"), [("run", "waiting"), ("skip", "missed")])
def test_times_missed_by_a_service_that_was_down(tmp_path: Path, missed: str, state: str) -> None:
    """Several in a row are one."""
    store = Store(tmp_path)
    store.add(schedule(tmp_path, cron="0 * * * *", missed=missed))
    first = Service(tmp_path)
    first.start()
    first._scheduler.pause()
    past = datetime.now(UTC) - timedelta(hours=5)
    first._scheduler.modify_job("nightly", next_run_time=past)  # and it is never heard of again
    assert store.runs() == []

    second = Service(tmp_path)
    second.start()
    found = wait_for_run(store, "missed time" if missed == "run" else "time")
    coming = second._scheduler.get_job("nightly").next_run_time
    second.stop()
    assert found.state == state and coming > datetime.now(UTC)
    assert len(store.runs()) == 1


def test_a_time_that_comes_asks_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(schedule(tmp_path, cron="0 0 1 1 *"))
    service = Service(tmp_path)
    service.start()
    for _ in range(2):
        service._scheduler.modify_job("nightly", next_run_time=datetime.now(UTC))
        assert wait_for_run(store, "time").state == "waiting"
    service.stop()


def test_what_was_removed_or_changed_meanwhile_does_not_come(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("gone", "changed"):
        store.add(schedule(tmp_path, name, cron="0 * * * *"))
    first = Service(tmp_path)
    first.start()
    first._scheduler.pause()
    for name in ("gone", "changed"):
        past = datetime.now(UTC) - timedelta(hours=5)
        first._scheduler.modify_job(name, next_run_time=past)
    for name in ("gone", "changed"):
        store.remove(name)
    store.add(schedule(tmp_path, "changed", cron="0 0 1 1 *", added="now"))
    second = Service(tmp_path)
    second.start()
    jobs = {job.id: job.next_run_time for job in second._scheduler.get_jobs()}
    second.stop()
    assert [*jobs] == ["changed"] and jobs["changed"] > datetime.now(UTC)
    assert store.runs() == []


# ---------------------------------------------------------------- new data and drift


def test_data_are_new_once_they_stand_still(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"1")
    service = Service(tmp_path / "home")
    of = schedule(tmp_path, photos=("photos",), on_new_data=True)
    watched = _Watched()
    assert [service._is_new(watched, of) for _ in range(2)] == [False, True]

    service.store.ask("nightly", "new data")
    service.store.change(1, state="promoted", stamps=watched.stamps)
    assert not service._is_new(watched, of)
    for size in (1, 2, 3):  # a file that is still being copied
        (photos / "b.jpg").write_bytes(b"2" * size)
        assert not service._is_new(watched, of)
    assert service._is_new(watched, of)
    (photos / "b.jpg").unlink()
    assert not any(service._is_new(watched, of) for _ in range(2))


def test_photographs_that_are_away_are_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service(tmp_path / "home")
    service.store.add(schedule(tmp_path, photos=("nowhere",), on_new_data=True))
    for _ in range(3):
        service._look()
    assert capsys.readouterr().out.count("nowhere") == 1
    assert service.store.runs() == []


def test_drift_is_looked_for_in_what_came_since() -> None:
    week, day = SATURDAY - timedelta(days=7), timedelta(days=1)

    def ended(reason: str, ago: timedelta) -> Run:
        return Run(1, "nightly", reason, "promoted", "", ended=(SATURDAY - ago).isoformat())

    assert drift_since([], SATURDAY) == week
    assert drift_since([ended("time", 3 * day)], SATURDAY) == SATURDAY - 3 * day
    assert drift_since([ended("time", 30 * day)], SATURDAY) == week
    assert drift_since([ended("drift", day / 2)], SATURDAY) is None
    assert drift_since([ended("drift", 2 * day)], SATURDAY) == SATURDAY - 2 * day


# ---------------------------------------------------------------- retrainings

CHILD = """
import json, sys, time
from pathlib import Path
given = sys.argv[1:]
options = dict(zip(given[-4::2], given[-3::2]))
home = Path(options["--home"])
sys.path.insert(0, {sources!r})
from jobs.locks import only_one
with only_one(home / "teasr.lock", "A retraining"):
    (home / "began").open("a").write(" ".join(given[:2]) + "\\n")
    while not (home / "go").exists():
        time.sleep(0.02)
    if (home / "fail").exists():
        sys.exit("teasr: The disk is full.")
    Path(options["--result"]).write_text(json.dumps(dict(version=3, promoted=True, new=True)))
"""


@contextmanager
def served(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A service in a process of its own, whose retrainings begin, wait for the file `go`, end."""
    sources = str(Path(__file__).parents[2])
    child = home / "child.py"
    home.mkdir(exist_ok=True)
    child.write_text(CHILD.format(sources=sources))
    program = (
        "import sys; from pathlib import Path; from jobs.scheduler import Service;"
        f"Service(Path({str(home)!r}), 0.2, (sys.executable, {str(child)!r})).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=sources)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_service_that_is_killed_is_taken_up(tmp_path: Path) -> None:
    home = tmp_path / "home"
    store = Store(home)
    store.add(schedule(home))
    store.add(schedule(home, "other"))  # of the same model
    began, go = home / "began", home / "go"
    with served(home) as first:
        store.ask("nightly", "time")
        until(began.exists)
        store.ask("other", "time")
        first.send_signal(signal.SIGKILL)
        first.wait()
    # The retraining lives on, and is waited for.
    with served(home):
        until(lambda: holder(home / "schedule.lock"))
        time.sleep(1)
        assert [run.state for run in store.runs()] == ["running", "waiting"]
        assert "process" in (holder(home / "teasr.lock") or "")
        assert began.read_text() == "recipe.yaml a=1\n"
        with pytest.raises(Busy, match=r"A schedule service is running in .* \(process \d+, since"):
            Service(home).run()
        go.touch()
        until(lambda: [run.state for run in store.runs()] == ["promoted"] * 2)
    assert began.read_text().count("\n") == 2
    assert [run.version for run in store.runs()] == [3, 3]


def test_sigterm_ends_a_retraining_and_the_next_service_goes_on(tmp_path: Path) -> None:
    home = tmp_path / "home"
    store = Store(home)
    store.add(schedule(home))
    store.ask("nightly", "new data")
    with served(home) as first:
        until((home / "began").exists)
        first.terminate()
        assert first.wait(30) == 0
    (run,) = store.runs()
    assert (run.state, run.detail) == ("waiting", "ended early, goes on")
    assert holder(home / "teasr.lock") is None
    (home / "go").touch()
    with served(home):
        until(lambda: store.runs()[0].state == "promoted")
    assert store.runs()[0].reason == "new data"


def test_a_retraining_that_fails_says_why(tmp_path: Path) -> None:
    home = tmp_path / "home"
    store = Store(home)
    store.add(schedule(home))
    for name in ("go", "fail"):
        (home / name).touch()
    with served(home):
        store.ask("nightly", "time")
        until(lambda: store.runs()[0].state == "failed")
    (run,) = store.runs()
    assert run.detail == "The disk is full." and log_file(home, run).is_file()
    assert run.seconds is not None and run.version is None


def test_the_lock_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "teasr.lock"
    program = (
        "import sys, time; from pathlib import Path; from jobs.locks import only_one\n"
        f"with only_one(Path({str(path)!r}), 'x'): print('held', flush=True); time.sleep(99)"
    )
    held = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert held.stdout is not None and held.stdout.readline() == b"held\n"
    with (
        pytest.raises(Busy, match=rf"A retraining is running in .* \(process {held.pid}, since 20"),
        only_one(path, "A retraining"),
    ):
        pass
    os.kill(held.pid, signal.SIGKILL)
    held.wait()
    with only_one(path, "A retraining"):
        assert json.loads((tmp_path / "teasr.lock.json").read_text())["pid"] == os.getpid()


# ---------------------------------------------------------------- the commands


def test_schedules_are_added_listed_and_removed(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("model: kitchen\nphotos: [photos]\ntraining: {steps: 2}\n")
    code, out, _ = run("schedule", "add", "own.yaml", "--cron", "0 3 * * 1", "--timezone", "UTC")
    assert code == 0 and "'kitchen' retrains kitchen: 0 3 * * 1 UTC" in out
    add = ("schedule", "add", "own.yaml", "training.steps=3", "--on-new-data")
    code, _, err = run(*add)
    assert code == 2 and "already" in err
    assert run(*add, "--name", "fresh", "--on-drift")[0] == 0
    (fresh, kitchen) = Store(tmp_path / "home").schedules()
    assert fresh.overrides == ("training.steps=3",) and fresh.when == "new data, drift"
    assert kitchen.recipe == str(recipe) and kitchen.folder == str(tmp_path)

    store = Store(tmp_path / "home")
    store.ask("fresh", "drift")
    store.change(1, state="failed", detail="[no] disk", started=now_is(0), ended=now_is(90))
    store.note_missed("fresh", "yesterday")
    code, out, _ = run("schedule", "list")
    for part in (
        "kitchen",
        "failed",
        "2026-11-28",
        "fresh: [no] disk Log: ",
        "1.5 min",
        "does not run",
    ):
        assert part in out, out
    code, _, err = run("schedule", "remove", "nightly")
    assert code == 2 and "Schedules: fresh, kitchen." in err
    assert run("schedule", "remove", "fresh")[0] == 0
    assert len(store.schedules()) == 1


def now_is(seconds: int) -> str:
    return (SATURDAY + timedelta(seconds=seconds)).isoformat()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("quickstart", "--cron", "0 3 * * *"), "neither photos nor"),
        (("quickstart", "photos=[x]"), "neither times nor events"),
        (("quickstart", "photos=[x]", "--cron", "0 3 * *"), "has 4 fields"),
        (("quickstart", "photos=[x]", "--on-drift", "--missed", "maybe"), "Give run or skip"),
        (("quickstart", "photos=[x]", "--on-drift", "--name", "a/b"), "letters, digits"),
    ],
)
def test_what_cannot_be_scheduled_is_told(
    run: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], told: str
) -> None:
    code, _, err = run("schedule", "add", *arguments)
    assert code == 2 and told in err
