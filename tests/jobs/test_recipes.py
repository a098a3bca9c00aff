"""Recipes: the shipped ones load, and a wrong one says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.recipe import load_recipe, recipe_names
from teasr.errors import UsageError


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.training.minutes or recipe.training.steps


def test_overrides_reach_their_fields() -> None:
    recipe = load_recipe("quickstart", ["engine.learning_rate=3e-4", "evaluation.steps=[8]"])
    assert recipe.engine.learning_rate == 3e-4
    assert recipe.evaluation.steps == (1, 8)  # one step is always measured


@pytest.mark.parametrize(
    ("override", "same"),
    [
        *[("training.workers=4", True), ("training.gpu=true", True), ("training.minutes=9", True)],
        *[("training.keep_best=3", True), ("engine.offload_optimizer=cpu", True)],
        *[("gate.rules.fidelity.by=1", True), ("evaluation.steps=[1,2]", True), ("data=a/b", True)],
        *[("training.batch=3", False), ("training.seed=3", False), ("feed.crop=64", False)],
        *[("engine.zero_stage=3", False), ("engine.learning_rate=1e-3", False)],
        *[("warm_start=false", True), ("warm_start=true", False)],
        *[("objective.any_step=1", False), ("init=scratch", False), ("backbone=teasr-xs", False)],
    ],
)
def test_a_run_may_go_on_elsewhere_and_longer_but_is_of_one_recipe(
    override: str, same: bool
) -> None:
    trajectory = load_recipe("quickstart", [override]).trajectory
    assert (trajectory == load_recipe("quickstart").trajectory) is same


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("engine.zero_stage=4", "engine.zero_stage"),
        ("objectve.any_step=1", "Did you mean 'objective'"),
        ("training.steps=5", "either minutes or steps"),
        ("backbone=teasr-z", "teasr-s"),
        ("feed.crop=100", "multiple of 16"),
        ("training.minutes=-1", "training.minutes"),
        ("objective.fake_time_range=[0,2]", "between 0 and 1"),
    ],
)
def test_a_wrong_field_is_named(override: str, told: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe("quickstart", [override])
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["objective.passes=partitioned", "training.batch=1"], "4 samples per worker"),
        (
            [
                "objective.passes=sequential",
                "engine.zero_stage=3",
                "engine.offload_parameters=nvme",
                "engine.nvme_path=/fast",
            ],
            "engine.gradient_checkpointing=true",
        ),
    ],
)
def test_passes_that_do_not_go_with_the_rest_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load_recipe("quickstart", overrides)
    others = ["engine.gradient_accumulation=4", "engine.gradient_checkpointing=true"]
    load_recipe("quickstart", [*overrides, *others])


def test_an_unknown_recipe_lists_what_exists(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quickstart"):
        load_recipe(str(tmp_path / "nothing.yaml"))
