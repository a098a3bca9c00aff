"""`teasr plan`, and the check before a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.plan import check_fits, this_machine
from jobs.recipe import load_recipe
from teasr.errors import UsageError

SMALL = (
    "backbone={width: 48, depth: 2, heads: 3, local_width: 16, stem_depth: 1, head_depth: 1}",
    "training.batch=2",
)


def run(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        app, ["plan", "teasr-s-cpu", *SMALL, "--home", str(tmp_path), *arguments]
    )
    return result.exit_code, result.output


def test_plan_of_a_recipe_that_fits(tmp_path: Path) -> None:
    code, output = run(tmp_path, "--json", "--gpus", "0")
    document = json.loads(output)
    assert code == 0 and document["given"]["fits"]
    assert document["sentence"].startswith("fits: ")
    host = [part["bytes"] for part in document["given"]["parts"] if part["place"] == "host"]
    assert document["given"]["needs"]["host"] > sum(host) > 0
    assert document["machine"]["flops"]["origin"] == "measured here"


def test_plan_of_one_that_does_not_says_why_and_fails(tmp_path: Path) -> None:
    code, output = run(tmp_path, "--gpus", "1", "--gpu-memory", "600MB", "--tflops", "100")
    assert code == 1
    assert "does not fit: the GPU would have to hold" in output
    assert "100.00 TFLOP/s (given)" in output


def test_a_run_without_a_chance_is_refused_before_it_starts() -> None:
    recipe = load_recipe("teasr-s-cpu", SMALL)
    check_fits(recipe, this_machine())
    with pytest.raises(UsageError, match="host memory would have to hold"):
        check_fits(recipe, replace(this_machine(), host_memory=10**8))
