"""A worker that hangs loses its task to another, under the real Ray; others are left alone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.shard_job import OnRay, map_on_ray
from pipelines.watch import FIRST_SECONDS, LEAST_SECONDS, SECONDS_VARIABLE, TIMES_LONGEST, Watch

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_task_that_hangs_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class HangsOnce(OnRay):  # here, so that it is sent by value: workers do not find this file
        def __call__(self, given: str) -> str:
            with (tmp_path / given).open("a") as file:
                file.write(f"{os.getpid()}\n")
            if given == "stuck" and len((tmp_path / given).read_text().split()) == 1:
                time.sleep(600)
            return given.upper()

        def name(self, given: str) -> str:
            return given

    monkeypatch.setenv(SECONDS_VARIABLE, "3")
    given = ["a", "stuck", "b", "c"]
    began = time.monotonic()
    assert sorted(map_on_ray(HangsOnce(), given, "tried")) == ["A", "B", "C", "STUCK"]
    assert time.monotonic() - began < 300
    pids = (tmp_path / "stuck").read_text().split()
    assert len(pids) == 2 and pids[0] != pids[1]
    assert all(len((tmp_path / name).read_text().split()) == 1 for name in "abc")


def test_a_worker_that_hangs_before_it_begins_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an import that never returns: nothing of the task has run yet."""
    tried = tmp_path / "tried"

    def load() -> OnRay:
        with tried.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(tried.read_text().split()) == 1:
            time.sleep(600)
        return Loaded()

    class Loaded(OnRay):
        def __call__(self, given: str) -> str:
            return given.upper()

        def name(self, given: str) -> str:
            return given

    class HangsInLoading(Loaded):
        def __reduce__(self) -> Any:
            return load, ()

    monkeypatch.setenv(SECONDS_VARIABLE, "3")
    assert sorted(map_on_ray(HangsInLoading(), ["a", "b", "c"], "tried")) == ["A", "B", "C"]
    first, *others = tried.read_text().split()
    assert first not in others and not psutil.pid_exists(int(first))


def test_patience_is_learned_from_what_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECONDS_VARIABLE, raising=False)
    watch = Watch()
    assert watch.patience == FIRST_SECONDS
    watch.ended(1.0)
    assert watch.patience == LEAST_SECONDS
    watch.ended(1000.0)
    watch.ended(2.0)
    assert watch.patience == TIMES_LONGEST * 1000
