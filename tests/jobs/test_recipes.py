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


def test_an_unknown_recipe_lists_what_exists(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quickstart"):
        load_recipe(str(tmp_path / "nothing.yaml"))
