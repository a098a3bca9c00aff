"""Steps are reused while their inputs stay the same, and the benchmark's photographs stay apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.retrain import split
from jobs.steps import Steps


def test_a_step_is_reused_until_its_inputs_change(tmp_path: Path) -> None:
    calls = []

    def work() -> dict[str, object]:
        calls.append(1)
        return {"summary": "done", "count": len(calls)}

    assert Steps(tmp_path).run("ingest", {"a": 1}, work)["count"] == 1
    second = Steps(tmp_path)
    assert second.run("ingest", {"a": 1}, work)["count"] == 1
    assert second.done == []
    assert second.run("ingest", {"a": 2}, work)["count"] == 2
    assert second.done == ["ingest"]


def test_a_step_that_fails_or_was_cut_off_is_done_again(tmp_path: Path) -> None:
    def fail() -> dict[str, object]:
        raise RuntimeError("power cut")

    steps = Steps(tmp_path)
    with pytest.raises(RuntimeError):
        steps.run("distill", {}, fail)
    assert steps.kept("distill") is None
    (tmp_path / "distill.json").write_text('{"identity": "half')
    assert steps.run("distill", {}, lambda: {"summary": "whole"})["summary"] == "whole"


def test_benchmark_photographs_are_chosen_once(tmp_path: Path) -> None:
    record = tmp_path / "held-out.json"
    photos = [f"/photos/{i}.jpg" for i in range(20)]
    chosen = split(photos, 0.15, record, usable=bool)
    assert len(chosen) == 3
    grown = photos + [f"/photos/new{i}.jpg" for i in range(50)]
    assert split(grown, 0.15, record, usable=bool) == chosen
    # The choice follows names, so another machine makes the same one.
    assert split([f"/other{p}" for p in photos], 0.15, tmp_path / "other.json", usable=bool) == {
        f"/other{p}" for p in chosen
    }


def test_one_photograph_cannot_be_split(tmp_path: Path) -> None:
    record = tmp_path / "held-out.json"
    assert split(["/photos/a.jpg"], 0.15, record, usable=bool) == set()
    assert not record.exists()  # with more photographs, the choice is still open


def test_broken_photographs_are_not_measured_on(tmp_path: Path) -> None:
    photos = [f"/photos/{i}.jpg" for i in range(20)]
    first = split(photos, 0.15, tmp_path / "all.json", usable=bool)
    chosen = split(photos, 0.15, tmp_path / "some.json", usable=lambda photo: photo not in first)
    assert len(chosen) == 3 and not chosen & first
